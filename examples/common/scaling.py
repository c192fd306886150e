"""What lies between a VAE's latents and the model's: ``z = (latent - shift) * scale``, and the way back."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.data_files import DataError

_TOLERANCE = 1e-4  # relative to the latents' spread: scale factors are written with five digits


class Scaling(NamedTuple):
    """A scale and a shift, each one number for all channels or one number a channel.

    Attributes:
        scale: What latents are multiplied by, after the shift is subtracted.
        shift: What is subtracted, in the units of the VAE.
    """

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
        channels = max(len(part) for part in (*self, *other, [0]) if isinstance(part, list))
        mine, theirs = ([_listed(part, channels) for part in scaling] for scaling in (self, other))
        if {len(part) for part in (*mine, *theirs)} != {channels}:
            return False
        return all(
            math.isclose(a, b, rel_tol=_TOLERANCE) and abs(x - y) * a <= _TOLERANCE * max(1.0, abs(x) * a)
            for a, x, b, y in zip(*mine, *theirs, strict=True)
        )

    @property
    def factor(self) -> float | None:
        """The scale, if one number says all that the scaling does."""
        return None if isinstance(self.scale, list) or self.shift else self.scale

    def __str__(self) -> str:
        return f"scale {self.scale}, shift {self.shift}"


def scaling_of(config: Mapping[str, Any], where: str) -> Scaling:
    """The scaling that the configuration of diffusers' ``AutoencoderKL`` states.

    That is ``scaling_factor`` with ``shift_factor``, or with ``latents_mean`` and ``latents_std``, one number a
    channel; then the latents are divided by the standard deviation, too.

    Args:
        config: ``vae.config``.
        where: What the error calls the VAE.
    """
    mean, std, shift = (config.get(name) for name in ("latents_mean", "latents_std", "shift_factor"))
    if mean is not None and shift:
        raise DataError(
            f"{where} states two shifts of its latents.\nFound: shift_factor {shift} and latents_mean {mean}.\n"
            "Keep in its config.json the one that the latents were made with."
        )
    scale = config.get("scaling_factor")
    scale = 1.0 if scale is None else scale
    try:
        scale = scale if std is None else [scale / deviation for deviation in std]
        return checked_scaling(scale, (shift or 0.0) if mean is None else list(mean), config["latent_channels"])
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise DataError(
            f"{where} states a scaling that no latents can have: {error}\nFound: scaling_factor "
            f"{config.get('scaling_factor')}, shift_factor {shift}, latents_mean {mean}, latents_std {std}."
        ) from error


def checked_scaling(scale: Any, shift: Any, channels: int | None = None) -> Scaling:
    """A scaling of latents, of so many channels where that is known.

    Raises:
        ValueError: If it is none: scales above 0, finite shifts, and of both one number or as many as channels.
    """
    for name, value, low in [("scale", scale, 0.0), ("shift", shift, -math.inf)]:
        numbers = value if isinstance(value, list) else [value]
        if isinstance(value, list) and channels is not None and len(value) != channels:
            raise ValueError(f"the {name} has {len(value)} numbers, the latents {channels} channels.")
        if not all(type(number) in (int, float) and low < number < math.inf for number in numbers):
            raise ValueError(f"the {name} is {value}; finite numbers are needed{', above 0' * (name == 'scale')}.")
    return Scaling(scale, shift)


def recorded_scaling(args: Mapping[str, Any], source: object) -> Scaling | None:
    """The scaling of the latents that a run was trained on, or None where its checkpoint does not say."""
    if args.get("scale_factor") is None:
        return None
    try:
        return checked_scaling(args["scale_factor"], args.get("shift_factor", 0.0))
    except ValueError as error:
        raise DataError(f"{source} records a scaling that no latents can have: {error}") from error


def _per_channel(value: float | list[float], latents: Tensor) -> Tensor | float:
    if isinstance(value, list):
        return torch.tensor(value, dtype=latents.dtype, device=latents.device)[:, None, None]
    return value


def _listed(value: float | list[float], channels: int) -> list[float]:
    return value if isinstance(value, list) else [value] * channels
