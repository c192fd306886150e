"""Time conventions, windows in noise fraction, and the check that a convention is the one that a loop uses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, SupportsIndex, TypeAlias, TypeGuard

import torch
from torch import Tensor

from .errors import SettingError, ShapeError, TimeConventionError
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
        if not isinstance(self.name, str) or not self.name:
            raise SettingError(f"A time convention's name must be a non-empty string; got {self.name!r}.")
        domain = self.domain is None or (is_pair(self.domain) and self.domain[0] < self.domain[1])
        for which, fits, wanted in (
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
            SettingError: Unless betas are one axis of at least two numbers in [0, 1].
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
                f"alphas_cumprod of time convention {name!r} must never grow: give the product of the alphas, from the "
                "first noisy step on."
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


def _steps(name: str, which: str, values: Tensor | Sequence[float]) -> Tensor:
    """Numbers in [0, 1] along one axis, one a step, in float64 on the CPU."""
    try:
        steps = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError):
        steps = torch.empty(0, device="cpu")
    if steps.ndim != 1 or len(steps) < 2 or not ((steps >= 0) & (steps <= 1)).all():
        raise SettingError(
            f"{which} of time convention {name!r} must be numbers in [0, 1] along one axis, one for each "
            f"of at least two steps; got {str(values)[:200]}."
        )
    return steps


# Stable Diffusion's schedule; others changed its end.
def _scaled_linear_betas(end: float = 0.012) -> Tensor:
    return torch.linspace(0.00085**0.5, end**0.5, 1000, dtype=torch.float64, device="cpu").square()


def _cogvideox_alphas_cumprod(shift: float) -> Tensor:
    """CogVideoX's ᾱ: SNR divided by ``shift``, then √ᾱ stretched to end at exactly 0.

    Followed: ``CogVideoXDDIMScheduler`` of diffusers; zero terminal SNR is algorithm 1 of Lin et al., 2023.
    """
    alpha_bar = torch.cumprod(1 - _scaled_linear_betas(), 0)
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
        TimeConvention.from_betas("ddpm", torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64, device="cpu")),
        TimeConvention.from_betas("ddpm-scaled-linear", _scaled_linear_betas()),
        TimeConvention("flow", lambda t: 1 - t / 1000, lambda t: t / 1000, domain=(0.0, 1000.0)),
        TimeConvention("flow-unit", *_LINEAR, domain=_UNIT),
        TimeConvention("uvit", *_vp(lambda t: t / 999), domain=(0.0, 999.0)),  # draws s from 0..1, and passes 999 s
        TimeConvention.from_alphas_cumprod(
            "uvit-discrete",
            # it counts the noisy steps from 1
            torch.cat([torch.ones(1, dtype=torch.float64, device="cpu"), torch.cumprod(1 - _scaled_linear_betas(), 0)]),
        ),
        TimeConvention("edm", *_LEVEL, data_std=0.5, domain=(0.0, math.inf)),
        TimeConvention("maskdit", *_LEVEL, domain=(0.0, math.inf)),
        TimeConvention.from_alphas_cumprod("cogvideox", _cogvideox_alphas_cumprod(shift=3.0)),
        TimeConvention.from_alphas_cumprod("cogvideox-5b", _cogvideox_alphas_cumprod(shift=1.0)),
        TimeConvention.from_betas("hunyuandit", _scaled_linear_betas(0.03)),
        TimeConvention.from_betas("hunyuandit-1.2", _scaled_linear_betas(0.018)),
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


def check_window(window: object) -> tuple[float, float] | None:
    """The window as two floats, or None; equal edges would hold no sample."""
    if window is None:
        return None
    if not is_pair(window) or not 0 <= window[0] < window[1] <= 1:
        raise SettingError(
            f"window must be None or (low, high) with 0 <= low < high <= 1; got {window!r}.\n"
            "It is in noise fraction, σ / (σ + α), whatever the loop calls t: the published window is (0.4, 0.7)."
        )
    return float(window[0]), float(window[1])


def window_mask(fraction: Tensor, window: tuple[float, float] | None) -> Tensor:
    """(N,), bool: whose noise fraction, (N,), lies in the window, both edges included with 1e-6 of slack."""
    if window is None:
        return torch.ones_like(fraction, dtype=torch.bool)
    fraction = fraction.float()
    return (fraction >= window[0] - _SLACK) & (fraction <= window[1] + _SLACK)


@torch.no_grad()
def check_times(time: TimeConvention, t: Tensor, name: str | None = None) -> None:
    """Raise unless the values of t are ones that the convention knows: finite, in its domain, whole where it has steps.

    Fractions given to a convention that counts up to 1000 lie inside its domain; they are refused as well, as soon as
    there are two of them, for all t up to 1 are next to the same noise level there. One host sync. ``name`` says what
    t, of any shape, was read from.
    """
    if t.numel():
        _raise_unless_known(time, _Times(*_times(t).tolist()), t.device, name)


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
    if x_t.shape != latents.shape or t.ndim == 0 or t.shape[:1] != x_t.shape[:1]:
        raise ShapeError(
            f"Checking time {time.name!r} needs x_t and latents of one shape (N, ...) and t (N,) or (N, T); "
            f"got x_t {tuple(x_t.shape)}, latents {tuple(latents.shape)}, t {tuple(t.shape)}.\n"
            "Pass the latents in the shape in which the model is given x_t."
        )
    if not x_t.numel():
        return None
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
    sums = torch.stack([(product.sum(shared) if shared else product).flatten() for product in products])  # (3, N)
    t, size = by_value.flatten(), x_t.numel() // by_value.numel()
    all_zero = (sums[2] == 0).all().float()
    numbers = torch.cat([all_zero[None], _times(t), _fit(time, t, sums, size)]).tolist()
    times, fit = _Times(*numbers[1:6]), _Fit(*numbers[6:])
    _raise_unless_known(time, times, t.device, name)
    if numbers[0]:
        raise TimeConventionError(
            f"Time {time.name!r} cannot be checked: the latents of all {len(x_t)} samples are zero.\n"
            "Pass the clean latents that the loop adds noise to."
        )
    if fit.good():
        return None
    ratio = fit.noise / fit.expected_noise if fit.expected_noise else math.inf
    otherwise = (
        f"No other named convention fits. x_t holds {fit.scale:.3g} times as much of these latents as expected: pass "
        "them scaled (and shifted) as the model sees them."
    )
    known = [other for other in _NAMED.values() if other is not time and _problem(other, times, t.device) is None]
    fitting = [other.name for other in known if _Fit(*_fit(other, t, sums, size).tolist()).good()]
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
    """Lay t out along the axes of an x_t of that shape, 1 where it does not vary; None if that is not certain.

    Followed are t by sample, by the values themselves, by one axis (frames, packed tokens) and, over (N, C, H, W) and
    (N, C, F, H, W), by square patches in row-major order.
    """
    n, *rest = shape
    if t.numel() == n:
        return t.reshape(n, *[1] * len(rest))
    if t.ndim == len(shape):
        return t if all(own in (1, size) for own, size in zip(t.shape, shape, strict=True)) else None
    if t.ndim != 2:
        return None
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

    samples: float
    values: float
    expected_noise: float
    chi2: float
    mean_square: float
    noise: float
    scale: float  # at which the latents would fit best

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


def _fit(time: TimeConvention, t: Tensor, sums: Tensor, size: int) -> Tensor:
    """The fields of ``_Fit``, still on the device, from <x_t, x_t>, <x_t, x> and <x, x> of samples of this size."""
    given, product, latents = sums
    alpha, sigma, slope = time.signal(t), time.noise(t), product / latents  # (N,), NaN for zero latents
    used = torch.stack([slope, given, latents, alpha, sigma]).isfinite().all(0)
    variance = sigma.square()
    slope_weight = 1 / (variance / latents + _ROUNDING**2)
    noise_weight = 1 / (variance + _NOISE_FLOOR**2)

    def total(values: Tensor) -> Tensor:
        return torch.where(used, values, 0.0).sum()

    count = used.sum()
    scale = total(slope_weight * slope * alpha) / total(slope_weight * alpha.square())  # least squares
    off = (slope - alpha).square()
    rest = given - 2 * alpha * product + alpha.square() * latents  # |x_t − α x|²
    expected = size * total(noise_weight * variance)
    numbers = [count, count * size, expected, total(slope_weight * off), total(off) / count]
    return torch.stack([number.float() for number in (*numbers, total(noise_weight * rest), scale)])


class _Times(NamedTuple):
    """What is known of a batch's t: numbers, so that one transfer brings them all."""

    samples: float
    finite: float
    smallest: float
    largest: float
    whole: float


def _times(t: Tensor) -> Tensor:
    """The fields of ``_Times``, still on the device."""
    t = t.float().flatten()
    count = torch.full_like(t[0], t.numel())
    return torch.stack([count, t.isfinite().all().float(), t.min(), t.max(), (t == t.floor()).all().float()])


def _problem(time: TimeConvention, times: _Times, device: torch.device) -> str | None:
    """What is wrong with such times under a convention; None if nothing is."""
    if not times.finite:
        return "finite values are expected"
    if time.discrete and not times.whole:
        return "whole steps are expected"
    if time.domain is None:
        return None
    low, high = time.domain
    slack = 0.0 if time.discrete else _ROUNDED_TIME
    if times.smallest < low - slack * abs(low) - _SLACK or times.largest > high + slack * abs(high) + _SLACK:
        return f"values from {low:g} to {high:g} are expected"
    if times.smallest >= 0 and times.largest <= 1 < high and not times.whole and times.samples >= _ENOUGH:
        first, last = time.noise_fraction(torch.tensor([low, 1.0], device=device)).tolist()
        if abs(last - first) < _ONE_LEVEL:
            return f"values from {low:g} to {high:g} are expected, and none of these is above 1"
    return None


def _raise_unless_known(time: TimeConvention, times: _Times, device: torch.device, name: str | None) -> None:
    problem = _problem(time, times, device)
    if problem is None:
        return
    found = f"t of {times.samples:.0f} samples from {times.smallest:g} to {times.largest:g}"
    if not times.finite:
        raise TimeConventionError(f"Not every t is finite; found {found}. Look at what the loop draws t from.")
    kind = "neither fractions nor steps"
    if times.smallest >= 0 and (times.whole or times.largest <= 1):
        kind = "fractions" if times.largest <= 1 else "steps"
    own = "Pass a TimeConvention of your own" if time.is_named else "Give yours the domain= that t really has"
    fitting = [other.name for other in _NAMED.values() if _problem(other, times, device) is None]
    advice = _advice(fitting, f"No named convention has such t. {own}, or look at what the loop draws.", name)
    raise TimeConventionError(
        f"t does not fit time={time.name!r}: {problem}.\nFound: {found}, which look like {kind}.\n{advice}"
    )
