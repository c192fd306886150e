"""Small images, a small VAE of them, and the posteriors that diffusers gives."""

from pathlib import Path

import numpy as np
import torch
from common.vae import new_vae
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

SIZE = 16
# Sums in another order: what a batch of another size may change.
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def write_noise(path: Path, seed: int) -> None:
    """Write a random image of `SIZE`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(256, size=(SIZE, SIZE, 3), dtype=np.uint8)).save(path)


def write_rgb_vae(folder: Path, seed: int = 0, **config: float) -> AutoencoderKL:
    """Write a VAE of colour images; latents have four channels and a quarter of the side."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = new_vae(SIZE, 3, widths=(8, 8, 8)).eval().requires_grad_(False)
    vae.quant_conv.bias[4:] = -3.0  # a trained posterior is narrow
    vae.register_to_config(scaling_factor=0.31, **config)
    vae.save_pretrained(folder)
    return vae


def plain_posterior(vae: AutoencoderKL, path: Path, *, mirrored: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and std of one image."""
    pixels = np.asarray(Image.open(path)).astype(np.float32)
    image = torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None]
    with torch.no_grad():
        posterior = vae.encode(image.flip(-1) if mirrored else image).latent_dist
    return posterior.mean[0], posterior.std[0]
