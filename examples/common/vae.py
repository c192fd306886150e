"""A small KL-VAE, trained in seconds: diffusers' AutoencoderKL with three levels, so that 32x32 becomes 4x8x8."""

from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from common.data import shuffled_batches
from common.training import endless, progress

LATENT_CHANNELS = 4
DOWNSAMPLING = 4

# Small enough that the latents keep the image's detail, large enough that their scale does not drift.
_KL_WEIGHT = 1e-3
_BATCH_SIZE = 32
_DECODE_BATCH = 256


def new_vae(
    image_size: int = 32, image_channels: int = 1, widths: tuple[int, int, int] = (16, 32, 32)
) -> AutoencoderKL:
    """An untrained VAE; its weights come from the global generator."""
    return AutoencoderKL(
        in_channels=image_channels,
        out_channels=image_channels,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=widths,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=LATENT_CHANNELS,
        sample_size=image_size,
        mid_block_add_attention=False,
    )


def train_vae(vae: AutoencoderKL, images: Tensor, *, steps: int, lr: float = 2e-3, seed: int = 0) -> None:
    """Train on squared error and a weak KL term, and record the latents' scale in ``vae.config.scaling_factor``.

    As in latent diffusion, the scale is one over the standard deviation of all latents: what the SiT sees has
    variance 1. The VAE ends in eval mode, frozen.

    Args:
        vae: As from `new_vae`.
        images: (N, C, H, W) in [-1, 1].
        steps: Optimiser steps.
        lr: Peak of the one-cycle learning rate.
        seed: Of the order of the images.
    """
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    batches = endless(shuffled_batches(images, batch_size=_BATCH_SIZE, seed=seed))
    vae.train()
    for _ in progress(range(steps), "VAE"):
        (batch,) = next(batches)
        batch = batch.to(vae.device)
        posterior = vae.encode(batch).latent_dist
        reconstruction = vae.decode(posterior.sample()).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = (reconstruction - batch).square().mean() + _KL_WEIGHT * kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    vae.eval().requires_grad_(False)
    mean, std = encode_moments(vae, images)
    # The variance of a posterior's sample: that of the means plus the mean of the variances.
    variance = mean.var(correction=0) + std.square().mean()
    vae.register_to_config(scaling_factor=variance.rsqrt().item())


def save_vae(vae: AutoencoderKL, folder: Path) -> None:
    """Save for `load_vae`, weights and scale factor, under another name and then by a rename: never half a folder."""
    partial = folder.with_name(folder.name + ".partial")
    vae.save_pretrained(partial)
    partial.rename(folder)


def load_vae(folder: Path) -> AutoencoderKL:
    """The saved VAE, in eval mode and frozen."""
    return AutoencoderKL.from_pretrained(folder).eval().requires_grad_(False)


def trained_vae(folder: Path, images: Tensor, *, steps: int, seed: int, device: str) -> AutoencoderKL:
    """The VAE saved in the folder; if there is none yet, one is trained on the images, from the seed, and saved."""
    if folder.exists():
        print(f"{folder}: finished before")
    else:
        torch.manual_seed(seed)
        vae = new_vae(images.shape[-1], images.shape[1]).to(device)
        train_vae(vae, images, steps=steps, seed=seed)
        save_vae(vae, folder)
    return load_vae(folder).to(device)


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    yield from tensor.split(_DECODE_BATCH)


@torch.no_grad()
def encode_moments(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (not log-variance) of each image's posterior, unscaled.

    Shape:
        images: (N, C, H, W); returns: twice (N, 4, H / 4, W / 4), on the images' device
    """
    posteriors = [vae.encode(chunk.to(vae.device)).latent_dist for chunk in _chunks(images)]
    mean = torch.cat([posterior.mean for posterior in posteriors])
    std = torch.cat([posterior.std for posterior in posteriors])
    return mean.to(images.device), std.to(images.device)


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Images (N, C, H, W), clamped to [-1, 1], from scaled latents as a SiT makes them."""
    scale = vae.config.scaling_factor
    return torch.cat([vae.decode(chunk.to(vae.device) / scale).sample for chunk in _chunks(latents)]).clamp(-1, 1)
