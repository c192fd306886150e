"""Samplers from noise to latents: ODE by Euler and Heun, SDE by Euler-Maruyama, with guidance in an interval.

REPA's convention: t runs from 1 (noise) to 0 (data) and the model predicts the velocity dx_t / dt. The state is
float64; the model sees it in the precision of the noise that it started from.
Source followed: the samplers of REPA, https://github.com/sihyun-yu/REPA.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from common.options import Mistake
from common.paths import Path, linear_path

Model = Callable[[Tensor, Tensor, Tensor], Tensor]

# REPA stops the diffusion here and takes the last step without noise: the score's variance vanishes at t = 0.
LAST_SDE_TIME = 0.04


class Guidance(NamedTuple):
    """Classifier-free guidance ``v_u + scale (v_c - v_u)``, in the steps that begin at ``low <= t <= high``.

    Args:
        scale: 1 is the conditional velocity: the null condition is then never run.
        null: Index of the null class.
        low: Smallest t, noise being 1, at which guidance acts.
        high: Largest such t.
    """

    scale: float = 1.0
    null: int | None = None
    low: float = 0.0
    high: float = 1.0


UNGUIDED = Guidance()


def reversed_time(model: Model) -> Model:
    """A model in the SiT repository's convention, where t = 1 is data and the velocity leads there, in REPA's.

    With ``s = 1 - t`` both describe one path run in opposite directions: ``v(x, t) = -u(x, 1 - t)``.
    """
    return lambda x, t, y: -model(x, 1 - t, y)


class _Velocity:
    """The guided velocity at a time that all samples share, in float64."""

    def __init__(self, model: Model, y: Tensor, dtype: torch.dtype, guidance: Guidance) -> None:
        if guidance.scale != 1 and guidance.null is None:
            raise Mistake(
                f"Guidance of scale {guidance.scale} needs the null class.\n"
                "Found: null=None. Pass Guidance(scale, null=num_classes)."
            )
        if not 0 <= guidance.low <= guidance.high <= 1:
            raise Mistake(
                f"The guidance interval needs 0 <= low <= high <= 1.\nFound: low={guidance.low}, high={guidance.high}."
            )
        self.model, self.y, self.dtype, self.guidance = model, y, dtype, guidance

    def __call__(self, x: Tensor, t: Tensor, step_time: Tensor | None = None) -> Tensor:
        """``step_time`` decides whether guidance acts; by default t itself."""
        now = (t if step_time is None else step_time).item()
        guided = self.guidance.scale != 1 and self.guidance.low <= now <= self.guidance.high
        times = t.to(self.dtype).expand(len(x))
        if not guided:
            return self.model(x.to(self.dtype), times, self.y).double()
        y = torch.cat([self.y, torch.full_like(self.y, self.guidance.null)])
        both = self.model(x.to(self.dtype).repeat(2, 1, 1, 1), times.repeat(2), y).double()
        conditional, unconditional = both.chunk(2)
        return unconditional + self.guidance.scale * (conditional - unconditional)


def _check_steps(steps: int, least: int) -> None:
    if steps < least:
        raise Mistake(f"This sampler needs at least {least} steps.\nFound: steps={steps}.")


@torch.no_grad()
def sample_ode(
    model: Model,
    noise: Tensor,
    y: Tensor,
    *,
    steps: int,
    method: Literal["euler", "heun"] = "euler",
    guidance: Guidance = UNGUIDED,
) -> Tensor:
    """Follow the probability-flow ODE from t = 1 to t = 0 on equal steps.

    Euler: ``x <- x + (t' - t) v(x, t)``. Heun averages the velocities at both ends, except in the last step, which is
    Euler's: steps * 2 - 1 evaluations. Whether guidance acts is decided at t for the whole step, as REPA does.

    Args:
        model: Called as ``model(x_t, t, y)``; eval mode is the caller's business.
        noise: The starting point; its dtype is the one that the model sees.
        y: Labels.
        steps: Number of steps.
        method: "euler" or "heun".
        guidance: Classifier-free guidance.

    Shape:
        noise: (N, C, H, W); y: (N,); returns: (N, C, H, W), of the noise's dtype

    Raises:
        Mistake: If a setting makes no sense.
    """
    _check_steps(steps, 1)
    if method not in ("euler", "heun"):
        raise Mistake(f"There is no ODE method named {method!r}.\nKnown: euler, heun.")
    velocity = _Velocity(model, y, noise.dtype, guidance)
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64, device=noise.device)
    x = noise.double()
    for i, (t, t_next) in enumerate(pairwise(times)):
        slope = velocity(x, t)
        if method == "heun" and i < steps - 1:
            slope = (slope + velocity(x + (t_next - t) * slope, t_next, step_time=t)) / 2
        x = x + (t_next - t) * slope
    return x.to(noise.dtype)


def score_from_velocity(velocity: Tensor, x: Tensor, t: Tensor, path: Path = linear_path) -> Tensor:
    """The score of x_t: ``s = (a v - x) / (sigma**2 - a sigma' sigma)`` with ``a = alpha / alpha'``."""
    alpha, sigma, d_alpha, d_sigma = path(t)
    ratio = alpha / d_alpha
    return (ratio * velocity - x) / (sigma**2 - ratio * d_sigma * sigma)


@torch.no_grad()
def sample_sde(
    model: Model,
    noise: Tensor,
    y: Tensor,
    *,
    steps: int,
    generator: torch.Generator | Sequence[torch.Generator],
    path: Path = linear_path,
    guidance: Guidance = UNGUIDED,
) -> Tensor:
    """Follow the reverse SDE with diffusion ``w(t) = 2 t`` by Euler-Maruyama.

    ``x <- x + d dt + sqrt(w |dt|) noise`` with the drift ``d = v - w s / 2`` and the score s, at
    ``linspace(1, 0.04, steps)`` and then 0; the last step has no noise. Guiding the velocity is guiding the drift, as
    the drift is affine in it.

    Args:
        model: As for `sample_ode`; likewise ``noise``, ``y`` and ``guidance``.
        noise: The starting point.
        y: Labels.
        steps: Number of steps, the noiseless last one included.
        generator: Of the noise; a list with one for each sample makes samples independent of the batch they share.
        path: The path that the model was trained on.
        guidance: Classifier-free guidance.

    Shape:
        noise: (N, C, H, W); y: (N,); returns: (N, C, H, W), of the noise's dtype

    Raises:
        Mistake: If a setting makes no sense.
    """
    _check_steps(steps, 2)
    velocity = _Velocity(model, y, noise.dtype, guidance)
    times = torch.linspace(1, LAST_SDE_TIME, steps, dtype=torch.float64, device=noise.device)
    times = torch.cat([times, times.new_zeros(1)])
    x = noise.double()
    generators = generator if isinstance(generator, torch.Generator) else list(generator)
    for i, (t, t_next) in enumerate(pairwise(times)):
        v, dt, diffusion = velocity(x, t), t_next - t, 2 * t
        x = x + (v - diffusion / 2 * score_from_velocity(v, x, t, path)) * dt
        if i < steps - 1:
            # Drawn in the noise's dtype: a float32 run sees the same stream whatever the state is kept in.
            fresh = randn_tensor(x.shape, generator=generators, device=x.device, dtype=noise.dtype)
            x = x + torch.sqrt(diffusion * dt.abs()) * fresh
    return x.to(noise.dtype)
