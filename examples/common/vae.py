"""The VAE between images and latents: diffusers' AutoencoderKL, and a small one of its kind that is trained in seconds.

The small one has three levels, so that 32x32 becomes 4x8x8. diffusers is imported when a VAE is made or loaded.
"""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from common.data import fit
from common.data_files import DataError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

LATENT_CHANNELS = 4
DOWNSAMPLING = 4

# Small enough that the latents keep the image's detail, large enough that their scale does not drift.
_KL_WEIGHT = 1e-3
_BATCH_SIZE = 32
_DECODE_BATCH = 256
_TOLERANCE = 1e-4  # relative to the latents' spread: scale factors are written with five digits
PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Scaling(NamedTuple):
    """What latents are multiplied by, after the shift is subtracted."""

    scale: float = 1.0
    shift: float = 0.0

    def to_model(self, latents: Tensor) -> Tensor:
        """Latents (N, C, H, W) of the VAE, as the model sees them."""
        return (latents - self.shift) * self.scale

    def to_vae(self, latents: Tensor) -> Tensor:
        """Latents (N, C, H, W) of the model, as the VAE decodes them."""
        return latents / self.scale + self.shift

    def drawn(self, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """Latents of the posteriors ``mean + std noise``, as the model sees them."""
        return self.to_model(mean + std * noise)

    def equals(self, other: "Scaling") -> bool:
        """Whether the two are the same, as far as five digits tell."""
        moved = abs(self.shift - other.shift) * self.scale  # in units of the latents' spread
        near = moved <= _TOLERANCE * max(1.0, abs(self.shift) * self.scale)
        return near and math.isclose(self.scale, other.scale, rel_tol=_TOLERANCE)

    def __str__(self) -> str:
        return f"scale {self.scale}, shift {self.shift}"


def scaling_of(config: Mapping[str, Any], where: str) -> Scaling:
    """The ``scaling_factor`` and ``shift_factor`` of the config of diffusers' ``AutoencoderKL``.

    An error calls it ``where``, as it does one that has a scale and a shift for each channel.
    """
    if any(config.get(name) is not None for name in ("latents_mean", "latents_std")):
        raise DataError(
            f"{where} has latents_mean or latents_std, a scale for each channel, which these scripts do not apply.\n"
            "Pass a VAE with a scaling_factor alone, or with a shift_factor."
        )
    factor, shift = config.get("scaling_factor"), config.get("shift_factor")
    return checked_scaling(1.0 if factor is None else factor, shift or 0.0, where)


def checked_scaling(scale: Any, shift: Any, where: object) -> Scaling:
    """A scaling of latents, as ``where`` states it; a `DataError` if no latents can have it."""
    for value, low in [(scale, 0.0), (shift, -math.inf)]:
        if type(value) not in (int, float) or not low < value < math.inf:
            raise DataError(f"{where} states a scaling that no latents can have: scale {scale}, shift {shift}.")
    return Scaling(scale, shift)


def recorded_scaling(
    args: Mapping[str, Any], source: object, scale: str = "scale_factor", shift: str = "shift_factor"
) -> Scaling | None:
    """The scaling of the latents that a run was trained on, or None where its checkpoint or teacher does not say."""
    return None if args.get(scale) is None else checked_scaling(args[scale], args.get(shift, 0.0), source)


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


def load_encoder(name: str, precision: str, size: int) -> tuple["AutoencoderKL", int]:
    """The VAE in one of `PRECISIONS`, and the side of its latents of images of a size."""
    vae = load_vae(name, dtype=PRECISIONS[precision])
    if vae.config.in_channels != 3:
        raise DataError(f"The VAE {name!r} takes images of {vae.config.in_channels} channels; RGB images have 3.")
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if size % factor:
        raise DataError(f"--size {size} is no multiple of {factor}, the pixels per latent of the VAE {name!r}.")
    return vae, size // factor


def trained_vae(folder: Path, images: Tensor, *, steps: int, seed: int, device: str) -> "AutoencoderKL":
    """The VAE saved in the folder; if there is none yet, one is trained, from the seed, and saved.

    It learns from images (N, C, H, W) in [-1, 1] by squared error and a weak KL term. As in latent diffusion, its
    ``scaling_factor`` is one over the standard deviation of all latents: what the SiT sees has variance 1.
    """
    if folder.exists():
        print(f"{folder}: finished before")
        return load_vae(folder).to(device)
    torch.manual_seed(seed)
    vae = new_vae(images.shape[-1], images.shape[1]).to(device)

    def loss(batch: Tensor) -> Tensor:
        posterior = vae.encode(batch).latent_dist
        reconstruction = vae.decode(posterior.sample()).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return (reconstruction - batch).square().mean() + _KL_WEIGHT * kl

    fit(vae, loss, (images,), steps=steps, batch_size=_BATCH_SIZE, lr=2e-3, seed=seed, title="VAE")
    mean, std = encode_moments(vae, images)
    # The variance of a posterior's sample: that of the means plus the mean of the variances.
    variance = mean.var(correction=0) + std.square().mean()
    vae.register_to_config(scaling_factor=variance.rsqrt().item())
    partial = folder.with_name(folder.name + ".partial")
    vae.save_pretrained(partial)
    partial.rename(folder)  # never half a folder
    return load_vae(folder).to(device)


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of a model's weights: two files of one model are the same model."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def encode_moments(vae: "AutoencoderKL", images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (not log-variance) of the posteriors of images (N, C, H, W) in [-1, 1], unscaled.

    Twice (N, 4, H / 4, W / 4), float32, on the images' device.
    """
    posteriors = [vae.encode(chunk.to(vae.device, vae.dtype)).latent_dist for chunk in images.split(_DECODE_BATCH)]
    mean = torch.cat([posterior.mean for posterior in posteriors]).float()
    # From the log-variance, in float32: half precision has no room for the smallest deviations.
    std = (0.5 * torch.cat([posterior.logvar for posterior in posteriors]).float()).exp()
    return mean.to(images.device), std.to(images.device)


@torch.no_grad()
def decode(vae: "AutoencoderKL", latents: Tensor, scaling: Scaling | None = None) -> Tensor:
    """Images (N, C, H, W), clamped to [-1, 1], from latents as a model sees them, by default with the VAE's scaling."""
    scaling = scaling or scaling_of(vae.config, "The VAE")
    chunks = [vae.decode(scaling.to_vae(chunk.to(vae.device))).sample for chunk in latents.split(_DECODE_BATCH)]
    return torch.cat(chunks).clamp(-1, 1)
