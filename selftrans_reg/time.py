"""Time conventions, windows in noise fraction, and the check that a convention is the one that a loop uses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, SupportsIndex, TypeAlias, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import SettingError, TimeConventionError
from .modules import nearest, quoted

# A sum of n squared standard normals is above n + 2 √(q n) + 2 q, or below n − 2 √(q n), with a probability of at most
# exp(−q) each (Laurent & Massart, 2000, lemma 1).
_TAIL = 20.0
# Statistics aside, slopes may be off by this much and the noise's power by this factor: harmless.
_HARMLESS_RMS, _HARMLESS_POWER = 0.05, 4.0
_ROUNDING = 0.01  # standard deviation granted to every slope besides: t and x_t may have been rounded to bfloat16
_NOISE_FLOOR = 0.1  # standard deviation on top of which noise is compared: samples with next to none do not count
# From two samples on, "all at most 1" is no accident where steps up to 1000 are drawn (1e-6 for uniform ones). All t
# from 0 to 1 are one noise level within this there; a noise level itself has many.
_ENOUGH, _ONE_LEVEL = 2, 0.05
_ROUNDED_TIME = 2**-8  # relative error of a time that was rounded to bfloat16: 998.9 becomes 1000
_SLACK = 1e-6  # times and noise fractions go through float32 arithmetic before they are compared with an edge

_Path: TypeAlias = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]  # α and σ


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

    :meth:`named` gives those of the field; the page on time has a table of them and of the loops that use them.

    Args:
        name: How messages call it.
        alpha: The signal's factor α, a function of a float32 tensor to a tensor of the same shape.
        sigma: The noise's factor σ, likewise.
        data_std: Standard deviation of the latents that the window is matched at; 1 but for EDM's 0.5.
        domain: Smallest and largest legal t; None leaves t unchecked.
        discrete: Whether t must be whole steps.

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
        domain = self.domain is None or (is_pair(self.domain) and self.domain[0] < self.domain[1])
        for which, fits, wanted in (
            ("name", isinstance(self.name, str) and self.name, "a non-empty string"),
            ("alpha", callable(self.alpha), "a function of t"),
            ("sigma", callable(self.sigma), "a function of t"),
            ("data_std", is_number(self.data_std) and 0 < self.data_std < math.inf, "above 0"),
            ("domain", domain, "None or (smallest t, largest t)"),
        ):
            if not fits:
                found = getattr(self, which)
                raise SettingError(f"{which} of time convention {self.name!r} must be {wanted}; got {found!r}.")

    @classmethod
    def named(cls, name: str) -> TimeConvention:
        """The convention of that name; a ``SettingError`` that lists all names and the nearest if there is none."""
        if not isinstance(name, str) or name not in _NAMED:
            raise SettingError(
                f"Unknown time convention {name!r}.\nKnown: {quoted(_NAMED)}.\n"
                f"Nearest: {quoted(nearest(str(name), _NAMED)) or 'none'}.\n"
                "For another one pass TimeConvention('mine', alpha=..., sigma=...)."
            )
        return _NAMED[name]

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names that ``named`` knows."""
        return tuple(_NAMED)

    @classmethod
    def from_alphas_cumprod(cls, name: str, alphas_cumprod: Tensor | Sequence[float]) -> TimeConvention:
        """A convention over whole steps, the first noisy one being 0: ``x_t = √ᾱ_t x + √(1 − ᾱ_t) ε``.

        ``alphas_cumprod`` is ᾱ_t = Π_{s ≤ t} (1 − β_s) (Ho et al., 2020, eq. 4), as schedulers of diffusers have it.

        Raises:
            SettingError: If they are not one axis of at least two numbers in [0, 1] that never grow.
        """
        try:
            alpha_bar = torch.as_tensor(alphas_cumprod, dtype=torch.float64, device="cpu").detach()
        except (TypeError, ValueError):
            alpha_bar = torch.empty(0, device="cpu")
        one_axis = alpha_bar.ndim == 1 and len(alpha_bar) > 1
        if not one_axis or not ((alpha_bar >= 0) & (alpha_bar <= 1)).all() or (alpha_bar.diff() > 0).any():
            raise SettingError(
                f"alphas_cumprod of time convention {name!r} must be numbers in [0, 1] along one axis that never grow, "
                f"one for each of at least two steps; got {str(alphas_cumprod)[:200]}.\n"
                "Give the product of the alphas, from the first noisy step on."
            )
        alpha, sigma = _Table(alpha_bar.sqrt().float()), _Table((1 - alpha_bar).sqrt().float())
        return cls(name, alpha, sigma, domain=(0, len(alpha_bar) - 1), discrete=True)

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


def _linear_roots(last: float = 0.012) -> Tensor:
    """Stable Diffusion's ᾱ: √β grows linearly; others changed its end."""
    roots = torch.linspace(0.00085**0.5, last**0.5, 1000, dtype=torch.float64, device="cpu")
    return torch.cumprod(1 - roots.square(), 0)


def _cogvideox_alphas_cumprod(shift: float) -> Tensor:
    """CogVideoX's ᾱ: SNR divided by ``shift``, then √ᾱ stretched to end at exactly 0.

    Followed: ``CogVideoXDDIMScheduler`` of diffusers; zero terminal SNR is algorithm 1 of Lin et al., 2023.
    """
    alpha_bar = _linear_roots()
    root = (alpha_bar / (shift + (1 - shift) * alpha_bar)).sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()


def _vp(s: Callable[[Tensor], Tensor]) -> _Path:
    """The continuous variance-preserving path at s(t) in 0..1 (Song et al., 2021, eq. 33, β from 0.1 to 20)."""

    def log_alpha(t: Tensor) -> Tensor:
        return -0.25 * s(t).square() * (20 - 0.1) - 0.5 * s(t) * 0.1

    # expm1: 1 − α² would cancel near the data
    return lambda t: log_alpha(t).exp(), lambda t: (-torch.expm1(2 * log_alpha(t))).sqrt()


_LINEAR: _Path = (lambda t: 1 - t, lambda t: t)
_COSINE: _Path = (lambda t: torch.cos(t * (math.pi / 2)), lambda t: torch.sin(t * (math.pi / 2)))
_LEVEL: _Path = (torch.ones_like, lambda t: t)
_UNIT = (0.0, 1.0)
_NAMED = {
    convention.name: convention
    for convention in (
        TimeConvention("repa", *_LINEAR, domain=_UNIT),
        TimeConvention("repa-cosine", *_COSINE, domain=_UNIT),
        TimeConvention("sit", _LINEAR[1], _LINEAR[0], domain=_UNIT),
        TimeConvention("sit-gvp", _COSINE[1], _COSINE[0], domain=_UNIT),
        TimeConvention("sit-vp", *_vp(lambda t: 1 - t), domain=_UNIT),
        TimeConvention.from_alphas_cumprod(
            "ddpm", torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64, device="cpu"), 0)
        ),
        TimeConvention.from_alphas_cumprod("ddpm-scaled-linear", _linear_roots()),
        TimeConvention("flow", lambda t: 1 - t / 1000, lambda t: t / 1000, domain=(0.0, 1000.0)),
        TimeConvention("flow-unit", *_LINEAR, domain=_UNIT),
        TimeConvention("uvit", *_vp(lambda t: t / 999), domain=(0.0, 999.0)),  # draws s from 0..1, and passes 999 s
        # it counts the noisy steps from 1
        TimeConvention.from_alphas_cumprod("uvit-discrete", F.pad(_linear_roots(), (1, 0), value=1.0)),
        TimeConvention("edm", *_LEVEL, data_std=0.5, domain=(0.0, math.inf)),
        TimeConvention("maskdit", *_LEVEL, domain=(0.0, math.inf)),
        TimeConvention.from_alphas_cumprod("cogvideox", _cogvideox_alphas_cumprod(shift=3.0)),
        TimeConvention.from_alphas_cumprod("cogvideox-5b", _cogvideox_alphas_cumprod(shift=1.0)),
        TimeConvention.from_alphas_cumprod("hunyuandit", _linear_roots(0.03)),
        TimeConvention.from_alphas_cumprod("hunyuandit-1.2", _linear_roots(0.018)),
        TimeConvention("stable-audio", *_COSINE, domain=_UNIT),
    )
}


def resolve(time: Any) -> TimeConvention:
    """The convention that a ``time=`` argument means: a name or a convention."""
    if time is None:
        raise SettingError(
            "time has no default, as t means opposite things: t = 1 is data in SiT (time='sit') and noise in REPA "
            f"(time='repa').\nSay which your loop uses: {quoted(_NAMED)}, or a TimeConvention of your own."
        )
    return time if isinstance(time, TimeConvention) else TimeConvention.named(time)


def window_mask(fraction: Tensor, window: tuple[float, float]) -> Tensor:
    """(N,), bool: whose noise fraction, (N,), lies in the window, both edges included with 1e-6 of slack."""
    fraction = fraction.float()
    return (fraction >= window[0] - _SLACK) & (fraction <= window[1] + _SLACK)


@torch.no_grad()
def check_times(time: TimeConvention, t: Tensor, name: str | None = None) -> None:
    """Raise unless the values of t are ones that the convention knows: finite, in its domain, whole where it has steps.

    Fractions given to a convention that counts up to 1000 lie inside its domain; two of them or more are refused as
    well, for all t up to 1 are next to the same noise level there. One host sync. ``name``: what t was read from.
    """
    _raise_unless_known(time, t.float().flatten().cpu(), t.device, name)


@torch.no_grad()
def check_against_latents(
    time: TimeConvention, x_t: Tensor, t: Tensor, latents: Tensor, name: str | None = None
) -> str | None:
    """Raise if x_t cannot be ``α(t) latents + σ(t) ε`` under the convention, or t fails ``check_times``.

    The slope of x_t on the latents, <x_t, x> / <x, x> for each of N samples, is α(t) with standard deviation
    σ(t) / |x|. Refused are χ² > N + 2 √(20 N) + 40 together with a root mean square above 0.05; and a rest,
    x_t − α(t) x, of more than 4 times the power of the noise or less than a quarter beyond what chance explains, which
    tells noise levels (EDM) from steps. A right convention fails with a probability below 1e-8. One host sync.

    x_t and latents have one shape (N, ...), t (N,) or, by token or frame, (N, T): then all values that share a t are a
    sample. Left out are samples whose latents are all zero or whose values are not finite.

    Returns:
        None; or why x_t was not compared: it is not certain which of its values a t of several axes belongs to.
    """
    by_value = _by_value(t.to(x_t.device), x_t.shape)
    if by_value is None:
        check_times(time, t, name)
        return (
            f"t {tuple(t.shape)} was not compared with x_t {tuple(x_t.shape)}: it is not certain which values of x_t "
            "share a t. That t is in the range of its convention was checked."
        )
    x_t, latents = x_t.float(), latents.to(x_t.device).float()
    shared = [axis for axis, size in enumerate(by_value.shape) if axis and size == 1]
    products = (x_t * x_t, x_t * latents, latents * latents)  # summed over what shares a t
    sums = [(product.sum(shared) if shared else product).flatten() for product in products]
    t = by_value.flatten()
    device, size = t.device, x_t.numel() // t.numel()
    t, alpha, sigma, *sums = torch.stack([t.float(), time.signal(t), time.noise(t), *sums]).cpu()  # (N,) each
    _raise_unless_known(time, t, device, name)
    if not sums[2].any():
        raise TimeConventionError(
            f"Time {time.name!r} cannot be checked: the latents of all {len(x_t)} samples are zero.\n"
            "Pass the clean latents that the loop adds noise to."
        )
    fit = _Fit.of(alpha, sigma, sums, size)
    if fit.good():
        return None
    ratio = fit.noise / fit.expected_noise if fit.expected_noise else math.inf
    otherwise = (
        f"No other named convention fits. x_t holds {fit.scale:.3g} times as much of these latents as expected: pass "
        "them scaled (and shifted) as the model sees them."
    )
    known = [other for other in _NAMED.values() if other is not time and _problem(other, t) is None]
    fitting = [other.name for other in known if _Fit.of(other.signal(t), other.noise(t), sums, size).good()]
    raise TimeConventionError(
        f"time={time.name!r} contradicts what the model was given: x_t = alpha(t) * latents + sigma(t) * noise fails.\n"
        f"Found: over {fit.samples:.0f} samples the slope of x_t on the latents is off from alpha(t) by "
        f"{fit.mean_square**0.5:.2f} RMS (chi-squared {fit.chi2:.0f}, at most {_upper(fit.samples):.0f} expected), and "
        f"the rest has {ratio:.2g} times the power of the noise.\n{_advice(fitting, otherwise, name)}\n"
        "If the noise is not white noise of unit size (noise offset, pyramid noise), pass check_interval=None."
    )


def _advice(fitting: Sequence[str], otherwise: str, name: str | None) -> str:
    """What to do: take a convention that fits, or something else; and where t was read from, if that has a name."""
    advice = f"These conventions fit: {quoted(fitting)}. Pass the one that your loop uses." if fitting else otherwise
    return advice + (f"\nt was read from {name}; if it is another one, pass call=dict(t=...)." if name else "")


def _by_value(t: Tensor, shape: torch.Size) -> Tensor | None:
    """Lay t, (N,) or (N, T), out along the axes of an x_t of that shape, 1 where it does not vary; None if uncertain.

    Followed are t by sample, by one axis (frames, packed tokens) and, over (N, C, H, W) and (N, C, F, H, W), by square
    patches in row-major order.
    """
    n, *rest = shape
    if t.numel() == n:
        return t.reshape(n, *[1] * len(rest))
    count = t.shape[1]
    axes = [i for i, size in enumerate(rest) if size == count]
    found = [t.reshape(n, *(count if i == axis else 1 for i in range(len(rest)))) for axis in axes]
    if len(rest) in (3, 4):
        *frames, height, width = rest[1:]
        side = max(1, math.isqrt(math.prod(rest[1:]) // count))
        grid = [n, 1, *frames, height // side, width // side]
        if height % side == width % side == 0 and math.prod(grid) == t.numel() > n * math.prod(frames):
            found.append(t.reshape(grid).repeat_interleave(side, -1).repeat_interleave(side, -2))
    return found[0] if len(found) == 1 else None


class _Fit(NamedTuple):
    """How well a convention agrees with a batch."""

    samples: int
    values: int
    expected_noise: float
    chi2: float
    mean_square: float
    noise: float
    scale: float  # at which the latents would fit best

    @classmethod
    def of(cls, alpha: Tensor, sigma: Tensor, sums: Sequence[Tensor], size: int) -> _Fit:
        """From <x_t, x_t>, <x_t, x> and <x, x> of N samples of this size; all (N,)."""
        used = torch.stack([sums[1] / sums[2], *sums, alpha, sigma]).isfinite().all(0)  # the slope of no latents is NaN
        given, product, latents, alpha, sigma = (values[used].double() for values in (*sums, alpha, sigma))
        variance, slope = sigma.square(), product / latents
        weight = 1 / (variance / latents + _ROUNDING**2)  # of a slope
        noise_weight = 1 / (variance + _NOISE_FLOOR**2)
        off = (slope - alpha).square()
        rest = given - 2 * alpha * product + alpha.square() * latents  # |x_t − α x|²
        scale = (weight * slope * alpha).sum() / (weight * alpha.square()).sum()  # least squares
        expected = size * (noise_weight * variance).sum()
        numbers = expected, (weight * off).sum(), off.mean(), (noise_weight * rest).sum(), scale
        return cls(len(alpha), len(alpha) * size, *(number.item() for number in numbers))

    def good(self) -> bool:
        slope_is_off = self.chi2 > _upper(self.samples) and self.mean_square > _HARMLESS_RMS**2
        noise, expected, values = self.noise, self.expected_noise, self.values
        # Of x_t without noise, rounding leaves less than a tenth of the floor.
        loud = noise > _HARMLESS_POWER * expected + 0.1 * values and noise - expected > _upper(values) - values
        quiet = _HARMLESS_POWER * noise < expected and expected - noise > 2 * math.sqrt(_TAIL * values)
        return not (slope_is_off or loud or quiet)


def _upper(count: float) -> float:
    """What a sum of so many squared standard normals stays below."""
    return count + 2 * math.sqrt(_TAIL * count) + 2 * _TAIL


def _problem(time: TimeConvention, t: Tensor, device: torch.device | str = "cpu") -> str | None:
    """What is wrong with such times, on the host, under a convention of that device; None if nothing is."""
    if not t.isfinite().all():
        return "finite values are expected"
    whole = torch.equal(t, t.floor())
    if time.discrete and not whole:
        return "whole steps are expected"
    if time.domain is None:
        return None
    low, high = time.domain
    smallest, largest = t.min().item(), t.max().item()
    slack = 0.0 if time.discrete else _ROUNDED_TIME
    if smallest < low - slack * abs(low) - _SLACK or largest > high + slack * abs(high) + _SLACK:
        return f"values from {low:g} to {high:g} are expected"
    if smallest >= 0 and largest <= 1 < high and not whole and len(t) >= _ENOUGH:
        first, last = time.noise_fraction(torch.tensor([low, 1.0], device=device)).tolist()
        if abs(last - first) < _ONE_LEVEL:
            return f"values from {low:g} to {high:g} are expected, and none of these is above 1"
    return None


def _raise_unless_known(time: TimeConvention, t: Tensor, device: torch.device, name: str | None) -> None:
    problem = _problem(time, t, device)
    if problem is None:
        return
    smallest, largest = t.min().item(), t.max().item()
    found = f"t of {len(t)} samples from {smallest:g} to {largest:g}"
    if not math.isfinite(largest - smallest):
        raise TimeConventionError(f"Not every t is finite; found {found}. Look at what the loop draws t from.")
    kind = "neither fractions nor steps"
    if smallest >= 0 and (largest <= 1 or torch.equal(t, t.floor())):
        kind = "fractions" if largest <= 1 else "steps"
    own = "Pass a TimeConvention of your own" if time.is_named else "Give yours the domain= that t really has"
    fitting = [other.name for other in _NAMED.values() if _problem(other, t) is None]
    advice = _advice(fitting, f"No named convention has such t. {own}, or look at what the loop draws.", name)
    raise TimeConventionError(
        f"t does not fit time={time.name!r}: {problem}.\nFound: {found}, which look like {kind}.\n{advice}"
    )
