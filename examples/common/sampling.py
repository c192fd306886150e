"""Images from a model: the VAE that decodes them, and what each begins with, a function of the seed and its number."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from common.images import tile, to_uint8, write_png
from common.options import Mistake
from common.paths import path_named
from common.samplers import Guidance, Model, sample_ode, sample_sde
from common.vae import Scaling, decode, load_vae, scaling_of

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

Labels = Callable[[Sequence[int], Sequence[torch.Generator]], Tensor]

_GRID_COLUMNS, _GRID_ROWS = 10, 4


def image_generator(seed: int, number: int) -> torch.Generator:
    """The random numbers of one image: its label, its first noise, and the noise of the SDE's steps, in this order.

    torch's CPU generator takes 32 bits of a seed. Seeds that count up keep all images of a run apart; among 50,000
    hashes of 32 bits, two would be equal one time in four.
    """
    first = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return torch.Generator().manual_seed((first + number) % 2**32)


@dataclass
class ImageSampler:
    """Makes the images of some numbers, whatever batches they come in.

    Args:
        vae: Decodes the latents.
        scaling: Between its latents and the model's.
        shape: Of a latent, (C, h, w).
        labels: From numbers and their generators to the labels y of these images; may draw from the generators.
        steps: Of the sampler.
        guidance: Classifier-free guidance.
        seed: Of the generators.
        method: "euler" or "heun", the ODE's; or "sde".
        path: The path that the model was trained on.
    """

    vae: "AutoencoderKL"
    scaling: Scaling
    shape: tuple[int, int, int]
    labels: Labels
    steps: int
    guidance: Guidance
    seed: int
    method: Literal["euler", "heun", "sde"] = "heun"
    path: str = "linear"

    def __post_init__(self) -> None:
        self._latents(lambda x, t, y: x, [0], "cpu")  # a setting without sense is named now, not after a run

    def images(self, model: Model, numbers: Sequence[int], device: str | torch.device) -> NDArray[np.uint8]:
        """The images (N, H, W, 3) of these numbers, by a model in eval mode on the device."""
        latents = self._latents(model, numbers, device)
        broken = [number for number, latent in zip(numbers, latents, strict=True) if not latent.isfinite().all()]
        if broken:
            raise Mistake(
                f"The model's latents are not finite for {len(broken)} of {len(numbers)} images.\n"
                f"Found: image {broken[0]}, by {self.method} in {self.steps} steps, guidance {self.guidance.scale}.\n"
                "Take an earlier checkpoint, --precision fp32, or a smaller guidance scale."
            )
        return to_uint8(decode(self.vae.to(device), latents, self.scaling))

    def _latents(self, model: Model, numbers: Sequence[int], device: str | torch.device) -> Tensor:
        generators = [image_generator(self.seed, number) for number in numbers]
        y = self.labels(numbers, generators).to(device)
        noise = torch.stack([torch.randn(self.shape, generator=generator) for generator in generators]).to(device)
        settings = {"steps": self.steps, "guidance": self.guidance}
        if self.method == "sde":
            return sample_sde(model, noise, y, generator=generators, path=path_named(self.path), **settings)
        return sample_ode(model, noise, y, method=self.method, **settings)


def class_columns(num_classes: int) -> Labels:
    """The labels of `draw_grid`: ten classes, evenly chosen, in turn."""
    classes = torch.linspace(0, num_classes - 1, _GRID_COLUMNS).round().long()
    return lambda numbers, generators: classes[torch.tensor(numbers) % _GRID_COLUMNS]


def draw_grid(sampler: ImageSampler, model: nn.Module, path: Path) -> None:
    """Write a picture of a model in eval mode while it trains: the same labels and noise each time, ten in a row."""
    device = next(model.parameters()).device
    write_png(tile(sampler.images(model, range(_GRID_COLUMNS * _GRID_ROWS), device), _GRID_COLUMNS, gap=2), path)


def vae_place(recorded: Any, checkpoint: Path) -> str | None:
    """Where the VAE is that a run has recorded: a folder from where one is or from the run's, or a name on the hub."""
    if not isinstance(recorded, str):
        return None
    beside = checkpoint.parent.parent / recorded
    return str(beside) if beside.exists() and not Path(recorded).exists() else recorded


def matching_vae(
    name: str | os.PathLike[str] | None,
    trained: Scaling | None,
    channels: int,
    of: str | os.PathLike[str],
    *,
    scale_factor: float | None = None,
) -> tuple["AutoencoderKL", Scaling]:
    """The VAE of a model's latents, and the scaling to decode them with.

    Args:
        name: Folder or hub name.
        trained: The scaling of the latents that the model was trained on; None takes the VAE's.
        channels: Of these latents.
        of: What messages call their source.
        scale_factor: To decode with another factor than the one that is known.
    """
    if name is None:
        raise Mistake(
            f"{of} does not name its VAE.\n"
            "Pass --vae: a folder of diffusers' AutoencoderKL, or its name on the hub, as stabilityai/sd-vae-ft-mse."
        )
    vae = load_vae(name)
    if vae.config.latent_channels != channels:
        raise Mistake(
            f"The VAE {name} decodes latents of {vae.config.latent_channels} channels; those of {of} have {channels}.\n"
            "Pass with --vae the one that they came from."
        )
    own = scaling_of(vae.config, f"The VAE {name}")
    if scale_factor is not None:
        return vae, (trained or own)._replace(scale=scale_factor)
    if trained is not None and not trained.equals(own):
        raise Mistake(
            f"The VAE {name} is not the one that the latents of {of} came from.\nFound: {own} in the VAE, {trained} "
            "in the latents.\nPass with --vae the one that encoded them."
        )
    return vae, trained or own
