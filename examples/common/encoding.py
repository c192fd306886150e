"""What encoding images takes: the VAE, checked, its posterior of a batch, and images read by a loader's workers."""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.data import Dataset

from common.data_files import DataError
from common.image_folder import read_image
from selftrans_reg.errors import CheckpointError, SettingError

PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def load_encoder(name: str, dtype: torch.dtype) -> AutoencoderKL:
    """The VAE, in eval mode and frozen.

    Raises:
        CheckpointError: If there is none, or not as safetensors.
        SettingError: If it takes other images than RGB, or shifts its latents, which no sampler here undoes.
    """
    try:
        vae = AutoencoderKL.from_pretrained(name, use_safetensors=True, torch_dtype=dtype)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"There is no AutoencoderKL at {name!r}: {error}\n"
            "Name a folder that save_pretrained wrote, or a repository on the hub such as stabilityai/sd-vae-ft-mse."
        ) from error
    if vae.config.in_channels != 3:
        raise SettingError(f"The VAE {name!r} takes images of {vae.config.in_channels} channels; RGB images have 3.")
    shifts = {key: vae.config.get(key) for key in ("shift_factor", "latents_mean", "latents_std")}
    if any(value for value in shifts.values()):
        raise SettingError(
            f"The VAE {name!r} normalises its latents by more than a scale factor.\nFound: {shifts}.\n"
            "The examples know latents = scale (mean + std noise) alone: take another VAE."
        )
    return vae.eval().requires_grad_(False)


def weights_digest(vae: AutoencoderKL) -> str:
    """SHA-256 of the VAE's weights: two folders of one VAE are the same VAE."""
    digest = hashlib.sha256()
    for name, value in sorted(vae.state_dict().items()):
        digest.update(name.encode() + value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def latent_side(vae: AutoencoderKL, size: int) -> int:
    """The side of the latents of images of a size.

    Raises:
        SettingError: If the VAE cannot halve the size as often as it does.
    """
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if size % factor:
        raise SettingError(f"--size {size} is no multiple of {factor}, the VAE's pixels per latent.")
    return size // factor


class Images(Dataset[tuple[Tensor | None, str]]):
    """The images, each as uint8 pixels and an empty reason, or as None and the reason why it cannot be read."""

    def __init__(self, folder: Path, names: list[str], size: int) -> None:
        self._folder, self._size = folder, size
        # One array: a list of strings would be copied into every worker, page by page.
        self._names = np.array([os.fsencode(name) for name in names])

    def __getitem__(self, index: int) -> tuple[Tensor | None, str]:
        """Pixels (3, size, size) or None, and a reason."""
        try:
            return read_image(self._folder / os.fsdecode(self._names[index]), self._size), ""
        except DataError as error:
            return None, str(error)


def collate(items: list[tuple[Tensor | None, str]]) -> tuple[Tensor | None, list[str]]:
    """The pixels of the readable images (n, 3, size, size), or None without any, and the reason of each image."""
    good = [pixels for pixels, _ in items if pixels is not None]
    return torch.stack(good) if good else None, [reason for _, reason in items]


@torch.no_grad()
def posterior(vae: AutoencoderKL, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of images (N, 3, H, W), uint8: twice (N, C, h, w), float32 on the CPU."""
    distribution = vae.encode((pixels.to(vae.device) / 127.5 - 1).to(vae.dtype)).latent_dist
    # From the log-variance, in float32: half precision has no room for the smallest deviations.
    return distribution.mean.float().cpu(), (0.5 * distribution.logvar.float()).exp().cpu()
