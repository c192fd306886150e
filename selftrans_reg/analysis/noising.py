"""Noisy latents at a given noise fraction, under any time convention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import SettingError
from ..time import TimeConvention, is_number

# A table of steps has no step at every fraction, and none may reach the ends.
_NEAR = 0.01
# Halvings of the interval: float32 tells no more of them apart.
_HALVINGS = 40
# Doublings of an upper end that is not given: a noise level of a million times the data's is beyond any.
_DOUBLINGS = 20


def time_at(time: TimeConvention, fraction: float) -> float:
    """The t at which ``time.noise_fraction(t)`` is ``fraction``; of steps, the nearest one.

    By bisection: every path from data to noise is monotonic in its noise fraction.

    Raises:
        SettingError: If the fraction is not in [0, 1], the convention does not say where t ends, or no t comes within
            0.01 of the fraction.
    """
    if not is_number(fraction) or not 0 <= fraction <= 1:
        raise SettingError(f"A noise fraction is a number from 0 (data) to 1 (noise); got {fraction!r}.")
    if time.domain is None:
        raise SettingError(
            f"Time convention {time.name!r} does not say from where to where t goes, so the t of noise fraction "
            f"{fraction:g} cannot be found: give it domain=(smallest t, largest t)."
        )
    t = _nearest_step(time, fraction) if time.discrete else _bisected(time, fraction)
    found = _fraction(time, t)
    if not abs(found - fraction) <= _NEAR:
        raise SettingError(
            f"No t of time {time.name!r} has noise fraction {fraction:g}: the nearest is {found:.4f} at t = {t:g}.\n"
            "Name a noise fraction that it reaches."
        )
    return t


def times_at(time: TimeConvention, fraction: float, rows: int, device: torch.device) -> Tensor:
    """The same t for every row, as a loop gives it: whole steps where the convention has steps.

    Shape:
        returns: (rows,), int64 or float32
    """
    t = time_at(time, fraction)
    return torch.full((rows,), t, dtype=torch.long if time.discrete else torch.float32, device=device)


def add_noise(time: TimeConvention, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """``x_t = α(t) latents + σ(t) noise``, in the latents' dtype.

    Shape:
        latents, noise: (N, ...); t: (N,); returns: (N, ...)
    """
    alpha, sigma = (factor.reshape(-1, *[1] * (latents.ndim - 1)) for factor in (time.signal(t), time.noise(t)))
    return (alpha * latents + sigma * noise).to(latents.dtype)


def _fraction(time: TimeConvention, t: float) -> float:
    return time.noise_fraction(torch.tensor([t])).item()


def _nearest_step(time: TimeConvention, fraction: float) -> float:
    assert time.domain is not None
    steps = torch.arange(int(time.domain[0]), int(time.domain[1]) + 1)
    return float(steps[(time.noise_fraction(steps) - fraction).abs().argmin()])


def _bisected(time: TimeConvention, fraction: float) -> float:
    assert time.domain is not None
    low, high = time.domain
    if math.isinf(high):
        high = next((2.0**i for i in range(_DOUBLINGS) if _fraction(time, 2.0**i) >= fraction), 2.0**_DOUBLINGS)
    clean, noisy = (low, high) if _fraction(time, high) > _fraction(time, low) else (high, low)
    for end in (clean, noisy):
        if _fraction(time, end) == fraction:
            return end
    for _ in range(_HALVINGS):
        middle = (clean + noisy) / 2
        clean, noisy = (middle, noisy) if _fraction(time, middle) < fraction else (clean, middle)
    return (clean + noisy) / 2
