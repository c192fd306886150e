"""The VAE between images and latents: diffusers' AutoencoderKL, and a small one of its kind that is trained in seconds.

The small one has three levels, so that 32x32 becomes 4x8x8. diffusers is imported when a VAE is made or loaded.
"""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
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
    """What latents are multiplied by, after the shift is subtracted; each one number, or one number a channel."""

    scale: float | list[float] = 1.0
    shift: float | list[float] = 0.0

    def to_model(self, latents: Tensor) -> Tensor:
        """Latents (N, C, H, W) of the VAE, as the model sees them."""
        return (latents - _per_channel(self.shift, latents)) * _per_channel(self.scale, latents)

    def to_vae(self, latents: Tensor) -> Tensor:
        """Latents (N, C, H, W) of the model, as the VAE decodes them."""
        return latents / _per_channel(self.scale, latents) + _per_channel(self.shift, latents)

    def drawn(self, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """Latents of the posteriors ``mean + std noise``, as the model sees them."""
        return self.to_model(mean + std * noise)

    def equals(self, other: "Scaling") -> bool:
        """Whether the two are the same, as far as five digits tell."""
        try:
            a, x, b, y = np.broadcast_arrays(self.scale, self.shift, other.scale, other.shift)
        except ValueError:  # they have other numbers of channels
            return False
        near = abs(x - y) * a <= _TOLERANCE * np.maximum(1.0, abs(x) * a)
        return np.allclose(a, b, rtol=_TOLERANCE, atol=0.0) and bool(near.all())

    def __str__(self) -> str:
        return f"scale {self.scale}, shift {self.shift}"


def scaling_of(config: Mapping[str, Any], where: str) -> Scaling:
    """The scaling that ``vae.config`` of diffusers' ``AutoencoderKL`` states; ``where`` is what an error calls it.

    That is ``scaling_factor`` with ``shift_factor``, or with ``latents_mean`` and ``latents_std``, one number a
    channel; then the latents are divided by the standard deviation, too.
    """
    names = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
    factor, shift, mean, std = (config.get(name) for name in names)
    scale = 1.0 if factor is None else factor
    try:
        if mean is not None and shift:
            raise ValueError("it has two shifts. Keep in its config.json the one that the latents were made with")  # noqa: TRY301
        scale = scale if std is None else [scale / deviation for deviation in std]
        return checked_scaling(scale, (shift or 0.0) if mean is None else list(mean), config["latent_channels"])
    except (TypeError, ValueError, ZeroDivisionError) as error:
        found = ", ".join(f"{name} {config.get(name)}" for name in names)
        raise DataError(f"{where} states a scaling that no latents can have: {error}.\nFound: {found}.") from error


def checked_scaling(scale: Any, shift: Any, channels: int | None = None) -> Scaling:
    """A scaling of latents, of so many channels where that is known.

    Raises:
        ValueError: If it is none: scales above 0, finite shifts, and of both one number or as many as channels.
    """
    for name, value, low in [("scale", scale, 0.0), ("shift", shift, -math.inf)]:
        numbers = value if isinstance(value, list) else [value]
        if isinstance(value, list) and channels not in (None, len(value)):
            raise ValueError(f"the {name} has {len(value)} numbers, the latents {channels} channels")
        if not all(type(number) in (int, float) and low < number < math.inf for number in numbers):
            raise ValueError(f"the {name} is {value}; finite numbers are needed{', above 0' * (name == 'scale')}")
    return Scaling(scale, shift)


def recorded_scaling(
    args: Mapping[str, Any], source: object, scale: str = "scale_factor", shift: str = "shift_factor"
) -> Scaling | None:
    """The scaling of the latents that a run was trained on, or None where its checkpoint or teacher does not say."""
    if args.get(scale) is None:
        return None
    try:
        return checked_scaling(args[scale], args.get(shift, 0.0))
    except ValueError as error:
        raise DataError(f"{source} records a scaling that no latents can have: {error}.") from error


def _per_channel(value: float | list[float], latents: Tensor) -> Tensor | float:
    if isinstance(value, list):
        return torch.tensor(value, dtype=latents.dtype, device=latents.device)[:, None, None]
    return value


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
