"""Latents that need no download: the handwritten digits through a small VAE, and random ones to measure speed with."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.data import Dataset

from common.data import NUM_DIGIT_CLASSES, digits
from common.scaling import Scaling, scaling_of
from common.step_sampler import mixed_seed
from common.vae import encode_moments, trained_vae

IMAGE_SIZE = 32


class MemoryLatents(Dataset[tuple[Tensor, Tensor, int]]):
    """Posteriors held in memory, with the attributes of `common.latents.LatentFolder`.

    Args:
        mean: (N, C, h, h), unscaled.
        std: (N, C, h, h), standard deviations.
        labels: (N,), int64.
        num_classes: Labels are in 0 .. num_classes - 1.
        scaling: From latents to what a model sees.
        vae: Path of the VAE.
    """

    def __init__(
        self, mean: Tensor, std: Tensor, labels: Tensor, *, num_classes: int, scaling: Scaling, vae: str | None
    ) -> None:
        self.mean = mean
        self.std = std
        self.labels = labels
        self.num_classes = num_classes
        _, self.channels, self.size, _ = mean.shape
        self.scaling = scaling
        self.vae = vae

    def __len__(self) -> int:
        """Images."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        """Mean, std, label."""
        return self.mean[index], self.std[index], int(self.labels[index])


def demo_latents(vae_folder: Path, *, vae_steps: int, device: str) -> tuple[MemoryLatents, AutoencoderKL]:
    """The training digits as (4, 8, 8) posteriors, and their VAE, which is trained now if the folder is not there."""
    images, labels = digits(IMAGE_SIZE)[0]
    vae = trained_vae(vae_folder, images, steps=vae_steps, seed=0, device=device)
    mean, std = encode_moments(vae, images)
    scaling = scaling_of(vae.config, f"The VAE in {vae_folder}")
    data = MemoryLatents(mean, std, labels, num_classes=NUM_DIGIT_CLASSES, scaling=scaling, vae=str(vae_folder))
    return data, vae


class RandomLatents(Dataset[tuple[Tensor, Tensor, int]]):
    """Standard normal "posteriors" of ImageNet's number and classes, made as they are read.

    Args:
        size: Side of the latents.
        length: Number of items.
    """

    num_classes = 1000
    channels = 4
    scaling = Scaling()
    vae = None

    def __init__(self, size: int, length: int = 1_281_167) -> None:
        self.size = size
        self.length = length

    def __len__(self) -> int:
        """Items."""
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        """Mean, std 0, label: the same each time."""
        generator = torch.Generator().manual_seed(mixed_seed(index))
        mean = torch.randn(self.channels, self.size, self.size, generator=generator)
        return mean, torch.zeros_like(mean), index % self.num_classes
