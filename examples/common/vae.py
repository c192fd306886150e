"""The VAE between images and latents: diffusers' AutoencoderKL, and a small one of its kind that is trained in seconds.

The small one has three levels, so that 32x32 becomes 4x8x8. diffusers is imported when a VAE is made or loaded.
"""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from common.data_files import DataError
from common.scaling import Scaling, scaling_of

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

LATENT_CHANNELS = 4
DOWNSAMPLING = 4

# Small enough that the latents keep the image's detail, large enough that their scale does not drift.
_KL_WEIGHT = 1e-3
_BATCH_SIZE = 32
_DECODE_BATCH = 256


def new_vae(
    image_size: int = 32, image_channels: int = 1, widths: tuple[int, int, int] = (16, 32, 32)
) -> "AutoencoderKL":
    """An untrained VAE; its weights come from the global generator."""
    from diffusers import AutoencoderKL

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


def train_vae(vae: "AutoencoderKL", images: Tensor, *, steps: int, lr: float = 2e-3, seed: int = 0) -> None:
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
    from common.data import shuffled_batches
    from common.training import endless, progress

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


def save_vae(vae: "AutoencoderKL", folder: Path) -> None:
    """Save for `load_vae`, weights and scale factor, under another name and then by a rename: never half a folder."""
    partial = folder.with_name(folder.name + ".partial")
    vae.save_pretrained(partial)
    partial.rename(folder)


def load_vae(name: str | Path, *, dtype: torch.dtype = torch.float32) -> "AutoencoderKL":
    """The VAE in a folder or on the hub, in eval mode and frozen."""
    from diffusers import AutoencoderKL

    try:
        vae = AutoencoderKL.from_pretrained(name, use_safetensors=True, torch_dtype=dtype)
    except (OSError, ValueError) as error:
        raise DataError(
            f"There is no VAE of diffusers' AutoencoderKL at {str(name)!r}.\nFound: {str(error).splitlines()[0]}\n"
            "Pass a folder that save_pretrained wrote, or a name on the hub, as stabilityai/sd-vae-ft-mse."
        ) from error
    scaling_of(vae.config, f"The VAE {str(name)!r}")
    return vae.eval().requires_grad_(False)


def trained_vae(folder: Path, images: Tensor, *, steps: int, seed: int, device: str) -> "AutoencoderKL":
    """The VAE saved in the folder; if there is none yet, one is trained on the images, from the seed, and saved."""
    if folder.exists():
        print(f"{folder}: finished before")
    else:
        torch.manual_seed(seed)
        vae = new_vae(images.shape[-1], images.shape[1]).to(device)
        train_vae(vae, images, steps=steps, seed=seed)
        save_vae(vae, folder)
    return load_vae(folder).to(device)


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of a model's weights: two files of one model are the same model."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def encode_moments(vae: "AutoencoderKL", images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (not log-variance) of each image's posterior, unscaled.

    Shape:
        images: (N, C, H, W) in [-1, 1]; returns: twice (N, 4, H / 4, W / 4), float32, on the images' device
    """
    posteriors = [vae.encode(chunk.to(vae.device, vae.dtype)).latent_dist for chunk in images.split(_DECODE_BATCH)]
    mean = torch.cat([posterior.mean for posterior in posteriors]).float()
    # From the log-variance, in float32: half precision has no room for the smallest deviations.
    std = (0.5 * torch.cat([posterior.logvar for posterior in posteriors]).float()).exp()
    return mean.to(images.device), std.to(images.device)


@torch.no_grad()
def decode(vae: "AutoencoderKL", latents: Tensor, scaling: Scaling | None = None) -> Tensor:
    """Images (N, C, H, W), clamped to [-1, 1], from latents as a SiT makes them.

    Args:
        vae: Of the latents.
        latents: (N, C, h, w), as the model sees them.
        scaling: With which they were made; by default the VAE's own.
    """
    scaling = scaling or scaling_of(vae.config, "The VAE")
    chunks = [vae.decode(scaling.to_vae(chunk.to(vae.device))).sample for chunk in latents.split(_DECODE_BATCH)]
    return torch.cat(chunks).clamp(-1, 1)
