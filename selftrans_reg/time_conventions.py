"""What a loop's t means: the time conventions, by name or from two functions.

Every convention describes ``x_t = α(t) x + σ(t) ε`` with latents x and standard normal noise ε. Loops disagree on what
they call t: 0.3 is mostly data in REPA, mostly noise in SiT, and no step at all in DiT. The library therefore measures
noise by its ratio to the signal, which every convention shares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, SupportsIndex, TypeGuard

import torch
from torch import Tensor

from .errors import SettingError
from .names import nearest, quoted


class _Table:
    """One value a step. NaN where t is no step of the table: raising an index error would need a host sync."""

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self._copies: dict[torch.device, Tensor] = {}  # one a device, so that no step pays for a transfer

    def __call__(self, t: Tensor) -> Tensor:
        if t.device not in self._copies:
            self._copies[t.device] = self._values.to(t.device)
        is_step = (t >= 0) & (t < len(self._values)) & (t == t.floor())
        index = torch.where(is_step, t, torch.zeros_like(t)).long()
        return torch.where(is_step, self._copies[t.device][index], torch.nan)

    def __reduce__(self) -> tuple[type[_Table], tuple[Tensor]]:
        return _Table, (self._values,)  # copies on other devices stay out of pickles


@dataclass(frozen=True)
class TimeConvention:
    """What the t of a loop means: ``x_t = α(t) x + σ(t) ε``.

    The named conventions, with the loops that use them:

    ===================  ==================================  =====================================================
    name                 t                                   loops
    ===================  ==================================  =====================================================
    repa                 0..1, 1 is noise, linear            REPA, SRA and the paper
    repa-cosine          0..1, 1 is noise, cosine            REPA with path type cosine
    sit                  0..1, 1 is data, linear             SiT, LightningDiT, Lumina2
    sit-gvp, sit-vp      0..1, 1 is data                     SiT with path type GVP or VP
    ddpm                 steps 0..999, linear betas          DiT, fast-DiT, MDT, PixArt
    ddpm-scaled-linear   steps 0..999, Stable Diffusion's    diffusers' DDPM with beta_schedule scaled_linear
    flow                 0..1000, 1000 is noise, linear      SD3, Wan, LTX, Sana
    flow-unit            0..1, 1 is noise, linear            Flux, AuraFlow (timestep / 1000)
    uvit                 0..999, continuous VP               U-ViT's train_ldm.py
    uvit-discrete        steps 0..1000, 0 is clean           U-ViT's train_ldm_discrete.py, train_t2i_discrete.py
    edm                  the noise level sigma               EDM2 (latents of standard deviation 0.5)
    maskdit              the noise level sigma               MaskDiT (latents of standard deviation 1)
    cogvideox            steps 0..999                        CogVideoX-2B (SNR shift 3, zero terminal SNR)
    cogvideox-5b         steps 0..999                        CogVideoX-5B (no shift, zero terminal SNR)
    hunyuandit           steps 0..999                        HunyuanDiT up to 1.1 (beta_end 0.03)
    hunyuandit-1.2       steps 0..999                        HunyuanDiT 1.2 (beta_end 0.018)
    stable-audio         0..1, 1 is noise, cosine            StableAudio: t = atan(sigma) · 2 / π
    ===================  ==================================  =====================================================

    Args:
        name: How messages call it.
        alpha: The signal's factor α, a function of a float32 tensor to a tensor of the same shape.
        sigma: The noise's factor σ, likewise.
        data_std: Standard deviation of the latents that the window is matched at; 1 but for EDM's 0.5.
        domain: Smallest and largest legal t; None leaves t unchecked.
        discrete: Whether t must be whole steps.

    Raises:
        SettingError: If an argument makes no sense.

    Example:
        >>> import torch
        >>> TimeConvention.named("sit").noise_fraction(torch.tensor([0.25, 0.5]))
        tensor([0.7500, 0.5000])
        >>> mine = TimeConvention("mine", alpha=lambda t: 1 - t**2, sigma=lambda t: t**2, domain=(0, 1))
        >>> mine.noise_fraction(torch.tensor([0.5]))
        tensor([0.2500])
    """

    name: str
    alpha: Callable[[Tensor], Tensor] = field(repr=False)
    sigma: Callable[[Tensor], Tensor] = field(repr=False)
    data_std: float = 1.0
    domain: tuple[float, float] | None = None
    discrete: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise SettingError(f"A time convention's name must be a non-empty string; got {self.name!r}.")
        for which in ("alpha", "sigma"):
            if not callable(getattr(self, which)):
                raise SettingError(
                    f"{which} of time convention {self.name!r} must be a function of t; got {getattr(self, which)!r}."
                )
        if not is_number(self.data_std) or not 0 < self.data_std < math.inf:
            raise SettingError(f"data_std of time convention {self.name!r} must be above 0; got {self.data_std!r}.")
        if self.domain is not None and (not is_pair(self.domain) or not self.domain[0] < self.domain[1]):
            raise SettingError(
                f"domain of time convention {self.name!r} must be None or (smallest t, largest t); got {self.domain!r}."
            )

    @classmethod
    def named(cls, name: str) -> TimeConvention:
        """The convention of that name.

        Raises:
            SettingError: If there is none; it lists all names and the nearest.
        """
        if not isinstance(name, str) or name not in _NAMED:
            close = nearest(str(name), _NAMED)
            raise SettingError(
                f"Unknown time convention {name!r}.\n"
                f"Known: {quoted(_NAMED)}.\n"
                + (f"Nearest: {quoted(close)}.\n" if close else "")
                + "For another one pass TimeConvention('mine', alpha=..., sigma=...)."
            )
        return _NAMED[name]

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names that ``named`` knows."""
        return tuple(_NAMED)

    @classmethod
    def from_betas(cls, name: str, betas: Tensor | Sequence[float]) -> TimeConvention:
        """A convention over whole steps 0..len(betas) − 1, with ᾱ_t = Π_{s ≤ t} (1 − β_s).

        ``x_t = √ᾱ_t x + √(1 − ᾱ_t) ε`` (Ho et al., 2020, eq. 4), t = 0 being the first noisy step. Computed in float64.

        Raises:
            SettingError: If betas are not one axis of at least two numbers in [0, 1].
        """
        return cls.from_alphas_cumprod(name, torch.cumprod(1 - _steps(name, "betas", betas), 0))

    @classmethod
    def from_alphas_cumprod(cls, name: str, alphas_cumprod: Tensor | Sequence[float]) -> TimeConvention:
        """A convention over whole steps from ᾱ itself, such as a diffusers scheduler's ``alphas_cumprod``.

        Raises:
            SettingError: If they are not one axis of at least two numbers in [0, 1] that never grow.
        """
        alpha_bar = _steps(name, "alphas_cumprod", alphas_cumprod)
        if (alpha_bar.diff() > 0).any():
            raise SettingError(
                f"alphas_cumprod of time convention {name!r} must never grow, since noise is added step by step; "
                "these do. Were alphas instead of their product given, or the steps in reverse?"
            )
        return cls(
            name,
            alpha=_Table(alpha_bar.sqrt().float()),
            sigma=_Table((1 - alpha_bar).sqrt().float()),
            domain=(0, len(alpha_bar) - 1),
            discrete=True,
        )

    @property
    def is_named(self) -> bool:
        """Whether this is one of the named conventions, which its name alone brings back."""
        return _NAMED.get(self.name) is self

    def signal(self, t: Tensor) -> Tensor:
        """α(t), float32 whatever dtype t has, of t's shape. NaN where a table of steps has no value."""
        return self._evaluate("alpha", t)

    def noise(self, t: Tensor) -> Tensor:
        """σ(t), likewise."""
        return self._evaluate("sigma", t)

    def noise_fraction(self, t: Tensor) -> Tensor:
        """σ / (σ + α · data_std), float32 in [0, 1], of t's shape: the paper's t, in which windows are given."""
        noise, signal = self.noise(t), self.signal(t)
        return (noise / (noise + signal * self.data_std)).clamp(0, 1)

    def _evaluate(self, which: str, t: Tensor) -> Tensor:
        value = getattr(self, which)(t.float())
        if not isinstance(value, Tensor) or value.shape != t.shape:
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise SettingError(
                f"{which} of time convention {self.name!r} must return a tensor of t's shape {tuple(t.shape)}; "
                f"got {found}. A constant is torch.ones_like(t)."
            )
        return value.float()

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        # By name, as functions defined in place cannot be pickled; user's own conventions take the usual way.
        return (TimeConvention.named, (self.name,)) if self.is_named else super().__reduce_ex__(protocol)


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a real number, and not NaN or a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def is_pair(value: object) -> TypeGuard[tuple[float, float]]:
    """Whether it is two numbers."""
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(is_number(edge) for edge in value)


def _steps(name: str, which: str, values: Tensor | Sequence[float]) -> Tensor:
    """Numbers in [0, 1] along one axis, one a step, in float64 on the CPU."""
    try:
        steps = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError) as error:
        raise SettingError(f"{which} of time convention {name!r} must be numbers; got {values!r}.") from error
    if steps.ndim != 1 or len(steps) < 2 or not ((steps >= 0) & (steps <= 1)).all():
        raise SettingError(
            f"{which} of time convention {name!r} must be numbers in [0, 1] along one axis, one for each "
            f"of at least two steps; got shape {tuple(steps.shape)}"
            + (f", values from {steps.min():g} to {steps.max():g}." if steps.numel() else ".")
        )
    return steps


# Stable Diffusion's schedule; others changed its end.
def _scaled_linear_betas(end: float = 0.012) -> Tensor:
    return torch.linspace(0.00085**0.5, end**0.5, 1000, dtype=torch.float64).square()


def _cogvideox_alphas_cumprod(shift: float) -> Tensor:
    """CogVideoX's ᾱ: SNR divided by ``shift``, then √ᾱ stretched to end at exactly 0.

    Followed: ``CogVideoXDDIMScheduler`` of diffusers; zero terminal SNR is algorithm 1 of Lin et al., 2023.
    """
    alpha_bar = torch.cumprod(1 - _scaled_linear_betas(), 0)
    root = (alpha_bar / (shift + (1 - shift) * alpha_bar)).sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()


def _vp_log_alpha(s: Tensor) -> Tensor:
    """Log α of the continuous variance-preserving path at s in 0..1 (Song et al., 2021, eq. 33, β from 0.1 to 20)."""
    return -0.25 * s.square() * (20 - 0.1) - 0.5 * s * 0.1


def _vp_sigma(s: Tensor) -> Tensor:
    return (-torch.expm1(2 * _vp_log_alpha(s))).sqrt()  # expm1: 1 − α² would cancel near the data


def _cos(s: Tensor) -> Tensor:
    return torch.cos(s * (math.pi / 2))


def _sin(s: Tensor) -> Tensor:
    return torch.sin(s * (math.pi / 2))


_UNIT = (0.0, 1.0)
_NAMED = {
    convention.name: convention
    for convention in (
        TimeConvention("repa", lambda t: 1 - t, lambda t: t, domain=_UNIT),
        TimeConvention("repa-cosine", _cos, _sin, domain=_UNIT),
        TimeConvention("sit", lambda t: t, lambda t: 1 - t, domain=_UNIT),
        TimeConvention("sit-gvp", _sin, _cos, domain=_UNIT),
        TimeConvention("sit-vp", lambda t: _vp_log_alpha(1 - t).exp(), lambda t: _vp_sigma(1 - t), domain=_UNIT),
        TimeConvention.from_betas("ddpm", torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)),
        TimeConvention.from_betas("ddpm-scaled-linear", _scaled_linear_betas()),
        TimeConvention("flow", lambda t: 1 - t / 1000, lambda t: t / 1000, domain=(0.0, 1000.0)),
        TimeConvention("flow-unit", lambda t: 1 - t, lambda t: t, domain=_UNIT),
        TimeConvention(
            "uvit",
            # its loop draws s from 0..1 and gives the model 999 s
            lambda t: _vp_log_alpha(t / 999).exp(),
            lambda t: _vp_sigma(t / 999),
            domain=(0.0, 999.0),
        ),
        TimeConvention.from_alphas_cumprod(
            "uvit-discrete",
            # it counts the noisy steps from 1
            torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - _scaled_linear_betas(), 0)]),
        ),
        TimeConvention("edm", torch.ones_like, lambda t: t, data_std=0.5, domain=(0.0, math.inf)),
        TimeConvention("maskdit", torch.ones_like, lambda t: t, domain=(0.0, math.inf)),
        TimeConvention.from_alphas_cumprod("cogvideox", _cogvideox_alphas_cumprod(shift=3.0)),
        TimeConvention.from_alphas_cumprod("cogvideox-5b", _cogvideox_alphas_cumprod(shift=1.0)),
        TimeConvention.from_betas("hunyuandit", _scaled_linear_betas(0.03)),
        TimeConvention.from_betas("hunyuandit-1.2", _scaled_linear_betas(0.018)),
        TimeConvention("stable-audio", _cos, _sin, domain=_UNIT),
    )
}
