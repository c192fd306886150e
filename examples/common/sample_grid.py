"""A picture of samples while a run trains: rows of classes, from the same noise each time."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn

from common.image_sets import to_uint8, write_png
from common.pictures import tile
from common.samplers import Guidance, sample_ode
from common.vae import decode
from selftrans_reg.errors import SettingError

CLASSES = 10  # columns
_ROWS = 4
_SCALE_TOLERANCE = 1e-4  # relative: scale factors are written with five digits


class SampleGrid:
    """Draws a column of samples for each of ten classes, evenly chosen, by Heun's method.

    Args:
        vae: Decodes the latents.
        num_classes: Of the model; also the index of its null class.
        shape: Of a latent, (C, h, w).
        scale: The latents' scale factor, which has to be the VAE's.
        steps: Of the sampler.
        cfg_scale: Classifier-free guidance; 1 is without.
        seed: Of the noise.

    Raises:
        SettingError: If the VAE is not the one that the latents came from.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        *,
        num_classes: int,
        shape: tuple[int, int, int],
        scale: float,
        steps: int,
        cfg_scale: float,
        seed: int,
    ) -> None:
        channels, own_scale = vae.config.latent_channels, vae.config.scaling_factor
        if channels != shape[0] or abs(scale / own_scale - 1) > _SCALE_TOLERANCE:
            raise SettingError(
                f"The VAE for the sample grids is not the one that the latents came from.\n"
                f"Found: {channels} channels and the scale factor {own_scale}; the data has {shape[0]} and {scale}.\n"
                "Pass the VAE that encoded the data with --vae."
            )
        self.vae = vae
        classes = torch.linspace(0, num_classes - 1, CLASSES).round().long()
        self.labels = classes.repeat(_ROWS)
        generator = torch.Generator().manual_seed(seed)
        self.noise = torch.randn(len(self.labels), *shape, generator=generator)
        self.steps = steps
        self.guidance = Guidance(cfg_scale, num_classes)

    def __call__(self, model: nn.Module, path: Path) -> None:
        """Write the picture of a model in eval mode as a PNG."""
        device = next(model.parameters()).device
        noise, labels = self.noise.to(device), self.labels.to(device)
        latents = sample_ode(model, noise, labels, steps=self.steps, method="heun", guidance=self.guidance)
        images = torch.from_numpy(to_uint8(decode(self.vae.to(device), latents)))
        grid = tile(images / 255, CLASSES, gap=2)
        write_png((grid * 255).round().astype(np.uint8), path)
