"""What encoding images takes: the VAE, checked, and images that a loader's workers read and crop."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.data_files import DataError
from common.images import read_square
from common.vae import load_vae

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def load_encoder(name: str, precision: str, size: int) -> tuple["AutoencoderKL", int]:
    """The VAE in one of `PRECISIONS`, and the side of its latents of images of a size."""
    vae = load_vae(name, dtype=PRECISIONS[precision])
    if vae.config.in_channels != 3:
        raise DataError(f"The VAE {name!r} takes images of {vae.config.in_channels} channels; RGB images have 3.")
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if size % factor:
        raise DataError(f"--size {size} is no multiple of {factor}, the pixels per latent of the VAE {name!r}.")
    return vae, size // factor


class _Images(Dataset[tuple[Tensor | None, str]]):
    def __init__(self, folder: Path, names: list[str], size: int) -> None:
        self._folder, self._size = folder, size
        # One array: a list of strings would be copied into every worker, page by page.
        self._names = np.array([os.fsencode(name) for name in names])

    def __getitem__(self, index: int) -> tuple[Tensor | None, str]:
        try:
            return read_square(self._folder / os.fsdecode(self._names[index]), self._size), ""
        except DataError as error:
            return None, str(error)


def image_batches(
    folder: Path, names: list[str], batches: list[list[int]], *, size: int, workers: int
) -> DataLoader[tuple[Tensor | None, list[str]]]:
    """Batches of cropped images: uint8 (n, 3, size, size) of those that can be read, or None without any; and reasons.

    The reasons are one for each image of the batch, empty where it can be read.

    Args:
        folder: Of the images.
        names: Their files, relative to it.
        batches: Which of them, batch by batch.
        size: Pixels a side.
        workers: Processes that read; 0 reads in this one.
    """
    return DataLoader(_Images(folder, names, size), batch_sampler=batches, num_workers=workers, collate_fn=_collate)


def _collate(items: list[tuple[Tensor | None, str]]) -> tuple[Tensor | None, list[str]]:
    good = [pixels for pixels, _ in items if pixels is not None]
    return torch.stack(good) if good else None, [reason for _, reason in items]
