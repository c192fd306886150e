"""Images for prompts, which to a sampler are classes, with the empty prompt as the null class; pictures of them."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor, nn

from common.image_seeds import image_generator
from common.image_sets import to_uint8
from common.pictures import plt
from common.samplers import Guidance, Model, sample_ode, sample_sde
from common.text_features import TextEncoder
from common.vae import decode
from selftrans_reg.errors import SettingError, ShapeError

_SCALE_TOLERANCE = 1e-4  # relative: scale factors are written with five digits
_COLUMNS = 8
_CAPTION_WIDTH = 17  # letters that fit below an image


class Prompts(NamedTuple):
    """Texts and their features.

    Attributes:
        texts: The prompts.
        features: (P, L, D), theirs.
        empty: (L, D), those of the empty prompt.
    """

    texts: list[str]
    features: Tensor
    empty: Tensor


def encoded_prompts(encoder: TextEncoder, texts: Sequence[str], *, empty: Tensor | None = None) -> Prompts:
    """Prompts with their features.

    Args:
        encoder: The text encoder of the captions that the model was trained on.
        texts: The prompts.
        empty: (L, D), the empty prompt's features as the data has them, which the encoder has to agree with.

    Raises:
        SettingError: If a prompt is too long, or the data's empty prompt has other features.
        ShapeError: If the encoder has another width than the data.
    """
    features = encoder.encode(["", *texts]).features
    if empty is not None:
        encoder.check_width(empty.shape[-1], "the data")
        # Features of half precision, or of another device, are still those of the same encoder.
        if features[0].shape != empty.shape or not torch.allclose(features[0], empty, rtol=0.05, atol=0.05):
            raise SettingError(
                f"{encoder.name} is not the text encoder of this data: the empty prompt has other features.\n"
                f"Found: {tuple(features[0].shape)}, and {tuple(empty.shape)} in the data.\n"
                "Name with --text-encoder the one that the captions were encoded with."
            )
    return Prompts(list(texts), features[1:], features[0])


def by_prompt(model: nn.Module, prompts: Prompts) -> Model:
    """The model as the samplers call it: y is the number of a prompt, and ``len(prompts.texts)`` the empty one."""
    device = next(model.parameters()).device
    table = torch.cat([prompts.features, prompts.empty.unsqueeze(0)]).to(device)
    return lambda x, t, y: model(x, t, context=table[y])


class PromptSampler:
    """One image for each prompt; its noise depends on the seed and on the prompt's place alone.

    Args:
        vae: Decodes the latents.
        prompts: What to draw.
        shape: Of a latent, (C, h, w).
        scale: The latents' scale factor, which has to be the VAE's.
        steps: Of the sampler.
        guidance: Classifier-free guidance, its null left open: that is the empty prompt.
        seed: Of the noise.
        method: "euler" or "heun", the ODE's; or "sde".

    Raises:
        SettingError: If the VAE is not the one that the latents came from, or a setting makes no sense.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        prompts: Prompts,
        *,
        shape: tuple[int, int, int],
        scale: float,
        steps: int,
        guidance: Guidance,
        seed: int,
        method: Literal["euler", "heun", "sde"] = "heun",
    ) -> None:
        channels, own_scale = vae.config.latent_channels, vae.config.scaling_factor
        if channels != shape[0] or abs(scale / own_scale - 1) > _SCALE_TOLERANCE:
            raise SettingError(
                f"The VAE is not the one that the latents came from.\n"
                f"Found: {channels} channels and the scale factor {own_scale}; the latents have {shape[0]} and {scale}."
                "\nPass the VAE that encoded the data with --vae."
            )
        self.vae = vae
        self.prompts = prompts
        self.shape = shape
        self.steps = steps
        self.guidance = guidance._replace(null=len(prompts.texts))
        self.seed = seed
        self.method = method
        self._latents(lambda x, t, y: x, [0], "cpu")  # a setting without sense is named now

    def images(self, model: nn.Module, numbers: Sequence[int]) -> NDArray[np.uint8]:
        """The images (N, H, W, 3) of the prompts of these numbers, by a model in eval mode.

        Raises:
            ShapeError: If the model's latents are not finite.
        """
        device = next(model.parameters()).device
        latents = self._latents(by_prompt(model, self.prompts), numbers, device)
        broken = [number for number, latent in zip(numbers, latents, strict=True) if not latent.isfinite().all()]
        if broken:
            raise ShapeError(
                f"The model's latents are not finite for {len(broken)} of {len(numbers)} prompts.\n"
                f"Found: prompt {broken[0]}, {self.prompts.texts[broken[0]]!r}.\n"
                "Take an earlier checkpoint or a smaller guidance scale."
            )
        return to_uint8(decode(self.vae.to(device), latents))

    def _latents(self, model: Model, numbers: Sequence[int], device: str | torch.device) -> Tensor:
        generators = [image_generator(self.seed, number) for number in numbers]
        noise = torch.stack([torch.randn(self.shape, generator=generator) for generator in generators]).to(device)
        y, common = torch.tensor(numbers, device=device), {"steps": self.steps, "guidance": self.guidance}
        if self.method == "sde":
            return sample_sde(model, noise, y, generator=generators, **common)
        return sample_ode(model, noise, y, method=self.method, **common)

    def __call__(self, model: nn.Module, path: Path) -> None:
        """Write a picture of all prompts, each below its image."""
        images = self.images(model, range(len(self.prompts.texts)))
        save_captioned({"": images}, self.prompts.texts, path)


def save_captioned(rows: dict[str, NDArray[np.uint8]], captions: Sequence[str], path: Path) -> None:
    """Write images with captions as one PNG, under another name and then by a rename.

    Args:
        rows: By heading, images (N, H, W, 3), one for each caption. A single row is wrapped; of several, the captions
            are below the last.
        captions: N texts.
        path: The file.
    """
    columns = min(len(captions), _COLUMNS) if len(rows) == 1 else len(captions)
    grid = [
        (heading, list(images[start : start + columns]), captions[start : start + columns])
        for heading, images in rows.items()
        for start in range(0, len(captions), columns)
    ]
    height = 1.75 * len(grid) if len(rows) == 1 else 1.4 * len(grid) + 0.35  # with captions in each row, or below all
    figure, axes = plt.subplots(
        len(grid), columns, figsize=(1.35 * columns + 0.6, height), squeeze=False, layout="constrained"
    )
    for line, (heading, images, texts) in enumerate(grid):
        for place, axis in enumerate(axes[line]):
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
            if place < len(images):
                axis.imshow(images[place], interpolation="nearest")
                if len(rows) == 1 or line == len(grid) - 1:
                    axis.set_xlabel(textwrap.fill(texts[place], _CAPTION_WIDTH), fontsize=8)
        axes[line, 0].set_ylabel(heading, fontsize=9)
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, dpi=110, format="png")
    plt.close(figure)
    partial.replace(path)
