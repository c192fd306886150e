"""Time conventions against plain formulas and diffusers' schedulers, windows, and the checks on t and x_t."""

import copy
import math
import pickle
from typing import Any

import diffusers
import pytest
import torch
from backbones import PATHS
from einops import repeat
from plain import refused
from torch import Tensor

from selftrans_reg.errors import SettingError, TimeConventionError
from selftrans_reg.time import TimeConvention, check_against_latents, check_times, resolve, window_mask

NAMES = TimeConvention.names()
named = TimeConvention.named


def draw_times(convention: TimeConvention, count: int, generator: torch.Generator) -> Tensor:
    """Times as a loop of the convention draws them."""
    low, high = convention.domain
    if math.isinf(high):  # EDM: log-normal noise levels
        return torch.exp(1.2 * torch.randn(count, generator=generator) - 1.2)
    if convention.discrete:
        return torch.randint(int(low), int(high) + 1, (count,), generator=generator)
    return low + (high - low) * torch.rand(count, generator=generator)


def smooth_latents(count: int, generator: torch.Generator) -> Tensor:
    """Latents (N, 4, 16, 16) with an image's spatial correlation, channel means and unequal contrast."""
    coarse = torch.randn(count, 4, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, scale_factor=4, mode="bilinear")
    contrast = 0.3 + torch.rand(count, 1, 1, 1, generator=generator)
    return contrast * smooth + 0.5 * torch.randn(count, 4, 1, 1, generator=generator)


def a_batch(used: str, count: int, generator: torch.Generator, white: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """(x_t, t, latents) of a loop of the named convention, with latents like images or, smaller, like noise."""
    t, shape = draw_times(named(used), count, generator), (count, 1, 3, 3)
    latents = torch.randn(shape, generator=generator) if white else smooth_latents(count, generator)
    alpha, sigma = (part(t).view(-1, 1, 1, 1) for part in (named(used).signal, named(used).noise))
    return alpha * latents + sigma * torch.randn(latents.shape, generator=generator), t, latents


# --- values


CONTINUOUS = {name: path.coefficients for name, path in PATHS.items() if not path.steps and name in NAMES} | {
    "repa-cosine": PATHS["stable-audio"].coefficients,
    "sit-gvp": lambda t: PATHS["stable-audio"].coefficients(1 - t),
    "sit-vp": lambda t: PATHS["uvit"].coefficients(999 * (1 - t)),
}


@pytest.mark.parametrize("name", CONTINUOUS)
def test_a_continuous_convention_is_its_formula(name: str, device: torch.device) -> None:
    convention, unit = named(name), {"flow": 1000, "uvit": 999}.get(name, 1)
    t = unit * torch.tensor([0.01, 0.1, 0.37, 0.5, 0.83, 0.99], dtype=torch.float64, device=device)
    alpha, sigma = CONTINUOUS[name](t.cpu())
    fraction = sigma / (sigma + alpha * (0.5 if name == "edm" else 1))
    for part, wanted in ((convention.signal, alpha), (convention.noise, sigma), (convention.noise_fraction, fraction)):
        assert part(t).dtype == part(t.bfloat16()).dtype == torch.float32
        torch.testing.assert_close(part(t).cpu(), wanted.float(), rtol=0, atol=1e-6)


ROOTS, ZERO_SNR = {"beta_schedule": "scaled_linear", "beta_start": 0.00085}, {"rescale_betas_zero_snr": True}
SCHEDULERS = {
    "ddpm": ("DDPMScheduler", {"beta_schedule": "linear"}),
    "ddpm-scaled-linear": ("DDPMScheduler", ROOTS | {"beta_end": 0.012}),
    "uvit-discrete": ("DDPMScheduler", ROOTS | {"beta_end": 0.012}),  # which counts the noisy steps from 1
    "hunyuandit": ("DDPMScheduler", ROOTS | {"beta_end": 0.03}),
    "hunyuandit-1.2": ("DDPMScheduler", ROOTS | {"beta_end": 0.018}),
    "cogvideox": ("CogVideoXDDIMScheduler", ZERO_SNR | {"snr_shift_scale": 3.0}),
    "cogvideox-5b": ("CogVideoXDDIMScheduler", ZERO_SNR | {"snr_shift_scale": 1.0}),
    "mine": ("DDPMScheduler", {"beta_schedule": "squaredcos_cap_v2"}),
}


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_diffusers_adds_noise_as_the_convention_says_at_every_step(
    name: str, dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> None:
    latents, noise = torch.randn(2, 1000, 3, generator=generator)
    kind, settings = SCHEDULERS[name]
    scheduler = getattr(diffusers, kind)(**settings)
    convention = TimeConvention.from_alphas_cumprod(name, scheduler.alphas_cumprod) if name == "mine" else named(name)
    first = int(name == "uvit-discrete")
    t = torch.arange(1000, device=device).to(dtype) + first
    alpha, sigma = (part(t)[:, None].cpu() for part in (convention.signal, convention.noise))
    wanted = scheduler.add_noise(latents, noise, torch.arange(1000))
    torch.testing.assert_close(alpha * latents + sigma * noise, wanted, atol=1e-4, rtol=0)
    assert convention.domain == (0, 999 + first)
    assert first == 0 or convention.signal(torch.tensor([0])) == 1


def test_every_name_is_compared_with_a_formula_or_with_diffusers() -> None:
    assert {*CONTINUOUS, *SCHEDULERS} == {*NAMES, "mine"}


def test_a_window_has_slack_of_a_millionth_and_holds_no_step_without_a_value(device: torch.device) -> None:
    fraction = torch.tensor([0.4 - 2e-6, 0.4 - 5e-7, 0.7 + 5e-7, 0.7 + 2e-6])
    assert window_mask(fraction, (0.4, 0.7)).tolist() == [False, True, True, False]
    # the nearest bfloat16 below 0.4 is 0.3984375, outside: comparing in bfloat16 would round the edge onto it
    assert window_mask(torch.tensor([0.3984375], dtype=torch.bfloat16), (0.4, 0.7)).tolist() == [False]
    fraction = named("ddpm").noise_fraction(torch.tensor([300, 1000, -1, 300.5, math.nan], device=device))
    assert fraction.isnan().tolist() == [False, True, True, True, True]
    assert window_mask(fraction, (0.4, 0.7)).tolist() == [True, False, False, False, False]


# --- conventions of the user's own


def test_conventions_survive_pickling_and_copying(device: torch.device) -> None:
    for convention in map(named, NAMES):
        assert pickle.loads(pickle.dumps(convention)) is copy.deepcopy(convention) is convention is resolve(convention)
    mine, t = TimeConvention.from_alphas_cumprod("ddpm", [0.9, 0.72, 0.0]), torch.arange(3, device=device)
    mine.signal(t)  # a copy of the table on this device stays out of the pickle
    copied = pickle.loads(pickle.dumps(mine))
    assert not copied.is_named
    assert copied.signal(t).square().tolist() == pytest.approx([0.9, 0.72, 0.0], abs=1e-6)


NO_TABLES = ([0.9, 1.2], [0.1, -0.1], [[0.2, 0.1]], [0.1], [], [0.1, math.nan], "x", [0.1, 0.5])


@pytest.mark.parametrize(
    ("setting", "values", "wanted"),
    [
        ("alpha", (1.0, None), "be a function of t"),
        ("alpha", (lambda t: 1.0, lambda t: torch.ones(())), "return a tensor of t's shape (3,)"),
        ("data_std", (0.0,), "be above 0"),
        ("domain", ((1, 0),), "be None or (smallest t, largest t)"),
        ("alphas_cumprod", NO_TABLES, "be numbers in [0, 1] along one axis that never grow"),
    ],
)
def test_a_convention_that_makes_no_sense(setting: str, values: tuple[Any, ...], wanted: str) -> None:
    usual = {"name": "mine", "alpha": torch.ones_like, "sigma": torch.ones_like}
    for value in values:
        with refused(SettingError, f"{setting} of time convention", f"must {wanted}"):
            if setting == "alphas_cumprod":
                TimeConvention.from_alphas_cumprod("mine", value)
            TimeConvention(**usual | {setting: value}).noise_fraction(torch.zeros(3))


# --- the range of t


@pytest.mark.parametrize(
    ("name", "t", "messages"),
    [
        ("repa", [3, 640, 12, 999], ["from 3 to 999, which look like steps", "from 0 to 1 are", "'ddpm'", "'flow'"]),
        ("sit", [0.2, -0.5], ["from -0.5 to 0.2", "neither fractions nor steps", "No named convention has such t"]),
        ("ddpm", [1000, 3], ["values from 0 to 999 are expected", "'flow'"]),
        ("ddpm", [30.5, 3], ["whole steps are expected", "'flow', 'uvit'"]),
        ("flow", [0.2, 0.5, 0.9, 0.1], ["none of these is above 1", "'flow-unit'"]),
        ("edm", [0.2, math.inf], ["Not every t is finite"]),
    ],
)
def test_times_of_another_convention(name: str, t: list[float], messages: list[str], device: torch.device) -> None:
    with refused(TimeConventionError, *messages):
        check_times(named(name), torch.tensor(t, device=device))


# --- x_t against the latents


@pytest.mark.parametrize("name", NAMES)
def test_the_right_convention_never_alarms(name: str, generator: torch.Generator) -> None:
    convention = named(name)
    check_times(convention, torch.full((8,), convention.domain[0]))
    for count in (1, 2, 3, 12, 64) * 4:
        for white in (False, True):
            x_t, t, latents = a_batch(name, count, generator, white)
            check_against_latents(convention, x_t, t, latents)
            if not convention.discrete:  # steps are not rounded to bfloat16: they are integers
                check_against_latents(convention, x_t.bfloat16(), t.bfloat16(), latents)


# Conventions that a batch cannot tell apart: the same functions, or nearly so.
NEIGHBOURS = [
    {"repa", "flow-unit"},
    {"repa-cosine", "stable-audio"},
    {"edm", "maskdit"},
    {"ddpm", "uvit", "hunyuandit", "hunyuandit-1.2", "cogvideox"},
    {"ddpm-scaled-linear", "uvit-discrete", "cogvideox-5b", "hunyuandit-1.2", "flow"},
]
REVERSED = {"sit": "repa", "repa": "sit", "sit-gvp": "repa-cosine"}  # caught from twelve samples up


@pytest.mark.parametrize("used", NAMES)
def test_any_other_convention_is_caught(used: str, generator: torch.Generator) -> None:
    for claimed in NAMES:
        if claimed == used or any({used, claimed} <= group for group in NEIGHBOURS):
            continue
        for count in (64, *(3 * [*range(12, 32)] if claimed == REVERSED.get(used) else [])):
            x_t, t, latents = a_batch(used, count, generator)
            with refused(TimeConventionError, f"time='{claimed}'", "These conventions fit: ", f"'{used}'"):
                check_against_latents(named(claimed), x_t, t, latents)


@pytest.mark.parametrize("name", ["repa", "ddpm", "edm"])
def test_the_message_reports_slope_and_scale_as_a_plain_formula_finds_them(
    name: str, generator: torch.Generator
) -> None:
    x_t, t, latents = a_batch(name, 32, generator)
    latents /= 0.18215  # not as the model sees them
    slopes = (latents * x_t).flatten(1).sum(1) / latents.square().flatten(1).sum(1)
    rms = (slopes - named(name).signal(t)).square().mean().sqrt()
    message = f"over 32 samples the slope of x_t on the latents is off from alpha(t) by {rms:.2f} RMS"
    with refused(TimeConventionError, message, "No other named convention fits. x_t holds 0.1"):
        check_against_latents(named(name), x_t, t, latents)


@pytest.mark.parametrize(("changed", "bad"), [(0, math.nan), (0, math.inf), (2, math.nan), (2, math.inf), (2, 0.0)])
def test_values_that_are_not_finite_and_zero_latents_are_left_out(
    changed: int, bad: float, generator: torch.Generator
) -> None:
    x_t, t, latents = drawn = a_batch("sit", 24, generator)
    drawn[changed][:3] = bad
    check_against_latents(named("sit"), x_t, t, latents)
    with refused(TimeConventionError, "over 21 samples"):
        check_against_latents(named("repa"), x_t, t, latents)
    with refused(TimeConventionError, "the latents of all 24 samples are zero"):
        check_against_latents(named("sit"), x_t, t, torch.zeros_like(latents))


# The shape of x_t, the number of times a sample, and how these belong to the values of x_t.
BY_TOKEN: list[tuple[tuple[int, ...], int, str, dict[str, int]]] = [
    ((6, 16, 12), 16, "n t -> n t 1", {}),
    ((6, 4, 5, 8, 8), 5, "n f -> n 1 f 1 1", {}),
    ((6, 4, 8, 8), 16, "n (h w) -> n 1 (h p) (w q)", {"h": 4, "p": 2, "q": 2}),
]


@pytest.mark.parametrize(("shape", "count", "pattern", "sizes"), BY_TOKEN)
@pytest.mark.parametrize("name", ["sit", "flow", "ddpm"])
def test_times_by_token_or_frame_are_checked_where_they_belong(
    name: str, shape: Any, count: int, pattern: str, sizes: Any, generator: torch.Generator
) -> None:
    convention, latents = named(name), torch.randn(shape, generator=generator)
    t = draw_times(convention, 6 * count, generator).reshape(6, count)
    alpha, sigma = (repeat(part(t), pattern, **sizes) for part in (convention.signal, convention.noise))
    x_t = alpha * latents + sigma * torch.randn(shape, generator=generator)
    assert check_against_latents(convention, x_t, t, latents) is None
    swapped = TimeConvention("swapped", convention.noise, convention.signal, domain=convention.domain)
    with refused(TimeConventionError, "These conventions fit: ", f"'{name}'"):
        check_against_latents(swapped, x_t, t, latents)


def test_times_by_axes_that_are_not_certain_are_left_to_their_range(generator: torch.Generator) -> None:
    sit, latents = named("sit"), torch.randn(4, 8, 8, 8, generator=generator)
    why = check_against_latents(sit, latents, torch.rand(4, 8, generator=generator), latents)
    assert "t (4, 8) was not compared with x_t (4, 8, 8, 8)" in str(why)
    with refused(TimeConventionError, "t was read from argument 'sigma' of EDM"):
        check_against_latents(sit, latents, torch.full((4, 8), 7.5), latents, "argument 'sigma' of EDM")
