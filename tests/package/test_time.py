"""Time conventions against plain formulas and diffusers' schedulers, the window table, and the checks on x_t."""

import copy
import math
import pickle
import re
from collections.abc import Callable

import diffusers
import pytest
import torch
from torch import Tensor

import selftrans_reg.time as time_module
from selftrans_reg.errors import SettingError, ShapeError, TimeConventionError
from selftrans_reg.time import TimeConvention, check_against_latents, check_times, check_window, resolve, window_mask

NAMES = TimeConvention.names()


def draw_times(convention: TimeConvention, count: int, generator: torch.Generator) -> Tensor:
    """Times as a loop of the convention draws them."""
    assert convention.domain is not None
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


def noised(convention: TimeConvention, latents: Tensor, t: Tensor, generator: torch.Generator) -> Tensor:
    alpha, sigma = (part(t).view(-1, 1, 1, 1) for part in (convention.signal, convention.noise))
    return alpha * latents + sigma * torch.randn(latents.shape, generator=generator)


# --- values


PLAIN = {
    "repa": lambda t: (1 - t, t),
    "repa-cosine": lambda t: (math.cos(math.pi * t / 2), math.sin(math.pi * t / 2)),
    "sit": lambda t: (t, 1 - t),
    "sit-gvp": lambda t: (math.sin(math.pi * t / 2), math.cos(math.pi * t / 2)),
    "sit-vp": lambda t: plain_vp(1 - t),
    "flow": lambda t: (1 - t / 1000, t / 1000),
    "flow-unit": lambda t: (1 - t, t),
    "uvit": lambda t: plain_vp(t / 999),
    "edm": lambda t: (1.0, t),
    "maskdit": lambda t: (1.0, t),
    # diffusers divides x + s ε by √(s² + 1) and passes t = atan(s) · 2 / π
    "stable-audio": lambda t: (
        (math.tan(math.pi * t / 2) ** 2 + 1) ** -0.5,
        (1 + math.tan(math.pi * t / 2) ** -2) ** -0.5,
    ),
}


def plain_vp(s: float) -> tuple[float, float]:
    """ᾱ = exp(−∫ β) with β growing linearly from 0.1 to 20; the integral by the trapezoid, exact for a line."""
    alpha_bar = math.exp(-s * (0.1 + (0.1 + (20 - 0.1) * s)) / 2)
    return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)


def plain_steps(betas: list[float]) -> list[tuple[float, float]]:
    product, pairs = 1.0, []
    for beta in betas:
        product *= 1 - beta
        pairs.append((math.sqrt(product), math.sqrt(1 - product)))
    return pairs


def scaled_linear(end: float) -> list[float]:
    low, high = math.sqrt(0.00085), math.sqrt(end)
    return [(low + (high - low) * step / 999) ** 2 for step in range(1000)]


PLAIN_STEPS = {
    "ddpm": plain_steps([1e-4 + (0.02 - 1e-4) * step / 999 for step in range(1000)]),
    "ddpm-scaled-linear": plain_steps(scaled_linear(0.012)),
    "uvit-discrete": [(1.0, 0.0), *plain_steps(scaled_linear(0.012))],
    "hunyuandit": plain_steps(scaled_linear(0.03)),
    "hunyuandit-1.2": plain_steps(scaled_linear(0.018)),
}


@pytest.mark.parametrize("name", PLAIN)
def test_continuous_convention_is_its_formula(name: str, device: torch.device) -> None:
    convention = TimeConvention.named(name)
    unit = {"flow": 1000, "uvit": 999}.get(name, 1)
    times = [unit * value for value in (0.01, 0.1, 0.37, 0.5, 0.83, 0.99)]
    t = torch.tensor(times, dtype=torch.float64, device=device)
    alpha, sigma = zip(*map(PLAIN[name], times), strict=True)
    assert convention.signal(t).cpu().tolist() == pytest.approx(alpha, abs=1e-6)
    assert convention.noise(t).cpu().tolist() == pytest.approx(sigma, abs=1e-6)
    fraction = [s / (s + a * (0.5 if name == "edm" else 1)) for a, s in zip(alpha, sigma, strict=True)]
    assert convention.noise_fraction(t).cpu().tolist() == pytest.approx(fraction, abs=1e-6)


@pytest.mark.parametrize("name", PLAIN_STEPS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32])
def test_discrete_convention_is_its_table_at_every_step(name: str, dtype: torch.dtype, device: torch.device) -> None:
    convention = TimeConvention.named(name)
    t = torch.arange(len(PLAIN_STEPS[name]), dtype=dtype, device=device)
    alpha, sigma = zip(*PLAIN_STEPS[name], strict=True)
    for found, expected in ((convention.signal(t), alpha), (convention.noise(t), sigma)):
        assert found.device.type == device.type
        assert found.dtype == torch.float32
        assert found.cpu().tolist() == pytest.approx(expected, abs=1e-6)
    assert convention.domain == (0, len(t) - 1)


def test_every_name_is_compared_with_a_formula_or_with_diffusers() -> None:
    assert {*PLAIN, *PLAIN_STEPS, "cogvideox", "cogvideox-5b"} == set(NAMES)


@pytest.mark.parametrize(
    ("name", "scheduler", "settings"),
    [
        ("ddpm", "DDPMScheduler", {"beta_schedule": "linear"}),
        ("cogvideox", "CogVideoXDDIMScheduler", {"rescale_betas_zero_snr": True, "snr_shift_scale": 3.0}),
        ("cogvideox-5b", "CogVideoXDDIMScheduler", {"rescale_betas_zero_snr": True, "snr_shift_scale": 1.0}),
    ],
)
def test_diffusers_adds_noise_as_the_convention_says(
    name: str, scheduler: str, settings: dict[str, float], generator: torch.Generator
) -> None:
    latents, noise = torch.randn(2, 5, 4, 2, 2, generator=generator)
    t = torch.tensor([0, 1, 400, 998, 999])
    x_t = getattr(diffusers, scheduler)(**settings).add_noise(latents, noise, t)
    convention = TimeConvention.named(name)
    alpha, sigma = (part(t).view(-1, 1, 1, 1) for part in (convention.signal, convention.noise))
    torch.testing.assert_close(alpha * latents + sigma * noise, x_t, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_fraction_stays_in_the_unit_interval_and_grows_with_the_noise(name: str, generator: torch.Generator) -> None:
    convention = TimeConvention.named(name)
    assert convention.domain is not None
    t = draw_times(convention, 500, generator).double()
    t = torch.cat([t, torch.tensor([convention.domain[0], min(convention.domain[1], 1e4)])]).sort().values
    fraction = convention.noise_fraction(t)
    assert fraction.dtype == torch.float32
    assert fraction.min() >= 0
    assert fraction.max() <= 1
    growth = fraction.diff() * (-1 if name.startswith("sit") else 1)
    assert growth.min() >= -1e-6
    assert growth.max() > 1e-3


def test_steps_without_a_value_are_nan_and_never_in_the_window(device: torch.device) -> None:
    fraction = TimeConvention.named("ddpm").noise_fraction(
        torch.tensor([300, 1000, -1, 300.5, math.nan], device=device)
    )
    assert fraction.isnan().tolist() == [False, True, True, True, True]
    assert window_mask(fraction, (0.4, 0.7)).tolist() == [True, False, False, False, False]


# --- windows


def test_window_has_slack_of_a_millionth_and_no_more() -> None:
    assert check_window(None) is None
    assert check_window([0, 1]) == (0.0, 1.0)
    assert window_mask(torch.tensor([0.0, 1.0]), None).tolist() == [True, True]
    fraction = torch.tensor([0.4 - 2e-6, 0.4 - 5e-7, 0.7 + 5e-7, 0.7 + 2e-6])
    assert window_mask(fraction, (0.4, 0.7)).tolist() == [False, True, True, False]
    # the nearest bfloat16 below 0.4 is 0.3984375, outside: comparing in bfloat16 would round the edge onto it
    assert window_mask(torch.tensor([0.3984375], dtype=torch.bfloat16), (0.4, 0.7)).tolist() == [False]


@pytest.mark.parametrize(
    "window",
    [(0.7, 0.4), (0.5, 0.5), (-0.1, 0.5), (400, 700), (0.1, math.nan), (0.1,), (0.1, 0.2, 0.3), 0.5, "ab", (True, 1)],
)
def test_window_that_makes_no_sense(window: object) -> None:
    with pytest.raises(SettingError, match=r"window must be None or \(low, high\)") as raised:
        check_window(window)
    assert repr(window) in str(raised.value)
    assert "the published window is (0.4, 0.7)" in str(raised.value)


# --- names and conventions of the user's own


def test_unknown_names_list_the_known_and_the_nearest() -> None:
    assert resolve("sit") is resolve(TimeConvention.named("sit")) is TimeConvention.named("sit")
    with pytest.raises(SettingError, match=r"t = 1 is data in SiT \(time='sit'\) and noise in REPA \(time='repa'\)"):
        resolve(None)
    with pytest.raises(SettingError, match="Unknown time convention 'sit_gvp'") as raised:
        resolve("sit_gvp")
    assert "Nearest: 'sit-gvp'" in str(raised.value)
    assert all(repr(name) in str(raised.value) for name in NAMES)
    for value in (0.5, ["sit"]):
        with pytest.raises(SettingError, match=re.escape(f"Unknown time convention {value!r}.")):
            resolve(value)


def test_named_conventions_survive_pickling_and_copying() -> None:
    for name in NAMES:
        convention = TimeConvention.named(name)
        assert convention.is_named
        assert pickle.loads(pickle.dumps(convention)) is convention
        assert copy.deepcopy(convention) is convention


def test_own_betas_are_multiplied_up_and_survive_pickling(device: torch.device) -> None:
    mine = TimeConvention.from_betas("ddpm", [0.1, 0.2, 1.0])
    alpha_bar = [0.9, 0.9 * 0.8, 0.0]
    t = torch.arange(3, device=device)
    mine.signal(t)  # a copy of the table on this device stays out of the pickle
    for convention in mine, pickle.loads(pickle.dumps(mine)):
        assert not convention.is_named
        assert convention.signal(t).square().tolist() == pytest.approx(alpha_bar, abs=1e-6)
        assert convention.noise(t).square().tolist() == pytest.approx([1 - value for value in alpha_bar], abs=1e-6)
        assert convention.domain == (0, 2)


def test_own_schedule_gives_what_its_scheduler_does(generator: torch.Generator) -> None:
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=50, beta_schedule="squaredcos_cap_v2")
    mine = TimeConvention.from_alphas_cumprod("mine", scheduler.alphas_cumprod)
    latents, noise = torch.randn(2, 50, 3, generator=generator)
    t = torch.arange(50)
    x_t = mine.signal(t)[:, None] * latents + mine.noise(t)[:, None] * noise
    torch.testing.assert_close(x_t, scheduler.add_noise(latents, noise, t), atol=1e-5, rtol=0)


@pytest.mark.parametrize("betas", [[0.1, 1.2], [-0.1, 0.1], [[0.1, 0.2]], [0.1], [], [0.1, math.nan], "linear"])
def test_tables_that_make_no_sense(betas: list[float]) -> None:
    with pytest.raises(SettingError, match=r"betas of time convention 'mine' must be numbers in \[0, 1\]"):
        TimeConvention.from_betas("mine", betas)
    with pytest.raises(SettingError, match="alphas_cumprod of time convention 'mine' must never grow"):
        TimeConvention.from_alphas_cumprod("mine", [0.1, 0.5, 0.9])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": ""}, "name must be a non-empty string; got ''"),
        ({"alpha": 1.0}, "alpha of time convention 'mine' must be a function of t; got 1.0"),
        ({"data_std": 0.0}, "data_std of time convention 'mine' must be above 0; got 0.0"),
        (
            {"domain": (1, 0)},
            r"domain of time convention 'mine' must be None or \(smallest t, largest t\); got \(1, 0\)",
        ),
    ],
)
def test_conventions_that_make_no_sense(wrong: dict[str, object], message: str) -> None:
    right = {"name": "mine", "alpha": torch.ones_like, "sigma": torch.ones_like}
    with pytest.raises(SettingError, match=message):
        TimeConvention(**{**right, **wrong})


@pytest.mark.parametrize(("value", "found"), [(1.0, "got 1.0"), (torch.ones(()), r"got shape \(\)")])
def test_functions_must_return_a_value_for_every_time(value: object, found: str) -> None:
    mine = TimeConvention("mine", alpha=lambda t: value, sigma=lambda t: t)
    with pytest.raises(SettingError, match=r"alpha .* must return a tensor of t's shape \(3,\)") as raised:
        mine.noise_fraction(torch.rand(3, generator=torch.Generator().manual_seed(0)))
    assert raised.match(found)
    assert raised.match(r"A constant is torch.ones_like\(t\)")


# --- the range of t


@pytest.mark.parametrize("name", NAMES)
def test_times_that_a_loop_draws_pass(name: str, generator: torch.Generator, device: torch.device) -> None:
    convention = TimeConvention.named(name)
    assert convention.domain is not None
    for count in (1, 4, 200):
        check_times(convention, draw_times(convention, count, generator).to(device))
    check_times(convention, torch.tensor([convention.domain[0]] * 8, device=device))
    check_times(convention, torch.tensor([], device=device))


@pytest.mark.parametrize(
    ("name", "t", "messages"),
    [
        (
            "repa",
            [3, 640, 12, 999],
            ["from 3 to 999, which look like steps", "values from 0 to 1 are", "'ddpm'", "'flow'"],
        ),
        ("sit", [0.2, -0.5], ["from -0.5 to 0.2", "neither fractions nor steps", "No named convention has such t"]),
        ("ddpm", [0.2, 0.5], ["whole steps are expected", "which look like fractions", "'repa'", "'sit'"]),
        ("ddpm", [1000, 3], ["values from 0 to 999 are expected", "'flow'"]),
        ("ddpm", [30.5, 3], ["whole steps are expected", "'flow', 'uvit'"]),
        ("flow", [0.2, 0.5, 0.9, 0.1], ["none of these is above 1", "'flow-unit'"]),
        ("uvit", [0.2, 0.5, 0.9, 0.1], ["none of these is above 1", "fractions"]),
        ("uvit", [1010.0, 3], ["values from 0 to 999 are expected"]),
        ("edm", [-1.2, 0.5], ["values from 0 to inf are expected"]),
        ("repa", [0.2, math.nan], ["Not every t is finite"]),
        ("edm", [0.2, math.inf], ["Not every t is finite"]),
    ],
)
def test_times_of_another_convention(name: str, t: list[float], messages: list[str], device: torch.device) -> None:
    with pytest.raises(TimeConventionError) as raised:
        check_times(TimeConvention.named(name), torch.tensor(t, device=device))
    for message in messages:
        assert message in str(raised.value)


@pytest.mark.parametrize(
    ("alpha", "sigma", "domain"),
    [
        (lambda t: t.sigmoid().sqrt(), lambda t: (-t).sigmoid().sqrt(), (-20, 20)),  # log SNR
        (torch.ones_like, torch.exp, (-6, 4.4)),  # log σ
        (torch.ones_like, lambda t: t, (0.002, 80)),  # σ
        (torch.ones_like, lambda t: t, (0, math.inf)),
        (lambda t: 1 - t / 4, lambda t: t / 4, (0, 4)),
    ],
)
def test_times_up_to_1_are_no_fractions_where_they_are_noise_levels(
    alpha: Callable[[Tensor], Tensor],
    sigma: Callable[[Tensor], Tensor],
    domain: tuple[float, float],
    device: torch.device,
) -> None:
    mine = TimeConvention("mine", alpha=alpha, sigma=sigma, domain=domain)
    check_times(mine, torch.linspace(max(domain[0], -0.5), 1.0, 64, device=device))
    check_times(mine, torch.linspace(0.01, 0.02, 64, device=device))
    with pytest.raises(TimeConventionError, match=r"Give yours the domain= that t really has"):
        check_times(mine, torch.tensor([domain[0] - 1.0, 1e9], device=device))


# --- x_t against the latents


@pytest.mark.parametrize("name", NAMES)
def test_right_convention_never_alarms(name: str, generator: torch.Generator) -> None:
    convention = TimeConvention.named(name)
    for count in (1, 2, 3, 12, 64) * 4:
        for latents in (smooth_latents(count, generator), torch.randn(count, 1, 3, 3, generator=generator)):
            t = draw_times(convention, count, generator)
            x_t = noised(convention, latents, t, generator)
            check_against_latents(convention, x_t, t, latents)
            if not convention.discrete:  # steps are not rounded to bfloat16: they are integers
                check_against_latents(convention, x_t.bfloat16(), t.bfloat16(), latents)


@pytest.mark.parametrize(("used", "claimed"), [("sit", "repa"), ("repa", "sit"), ("sit-gvp", "repa-cosine")])
def test_reversed_time_is_caught_from_twelve_samples_up(used: str, claimed: str, generator: torch.Generator) -> None:
    for trial in range(60):
        count = 12 + trial % 20
        latents = smooth_latents(count, generator)
        t = draw_times(TimeConvention.named(used), count, generator)
        x_t = noised(TimeConvention.named(used), latents, t, generator)
        with pytest.raises(
            TimeConventionError, match=f"time='{claimed}' contradicts what the model was given"
        ) as raised:
            check_against_latents(TimeConvention.named(claimed), x_t, t, latents)
        assert raised.match(f"These conventions fit: .*'{used}'.* Pass the one that your loop uses")


# Conventions that a batch cannot tell apart: the same functions, or nearly so.
NEIGHBOURS = [
    {"repa", "flow-unit"},
    {"repa-cosine", "stable-audio"},
    {"edm", "maskdit"},
    {"ddpm", "uvit", "hunyuandit", "hunyuandit-1.2", "cogvideox"},
    {"ddpm-scaled-linear", "uvit-discrete", "cogvideox-5b", "hunyuandit-1.2", "flow"},
]


DISTINCT = [
    (used, claimed)
    for used in NAMES
    for claimed in NAMES
    if used != claimed and not any({used, claimed} <= group for group in NEIGHBOURS)
]


@pytest.mark.parametrize(("used", "claimed"), DISTINCT)
def test_any_other_convention_is_caught(used: str, claimed: str, generator: torch.Generator) -> None:
    latents = smooth_latents(64, generator)
    t = draw_times(TimeConvention.named(used), 64, generator)
    x_t = noised(TimeConvention.named(used), latents, t, generator)
    with pytest.raises(TimeConventionError, match=f"time='{claimed}'"):
        check_against_latents(TimeConvention.named(claimed), x_t, t, latents)


def test_message_reports_slope_and_power_as_a_plain_formula_finds_them(generator: torch.Generator) -> None:
    latents, t = smooth_latents(16, generator), torch.rand(16, generator=generator)
    x_t = noised(TimeConvention.named("repa"), latents, t, generator)
    squares = []
    for given, x, time in zip(x_t.double(), latents.double(), t.tolist(), strict=True):
        squares.append((float((given * x).sum() / (x * x).sum()) - time) ** 2)
    rms = math.sqrt(sum(squares) / 16)
    with pytest.raises(
        TimeConventionError, match=f"over 16 samples the slope .* is off from alpha.* by {rms:.2f} RMS"
    ) as raised:
        check_against_latents(TimeConvention.named("sit"), x_t, t, latents)
    # the limit: 16 + 2 √(20 · 16) + 40
    assert raised.match("chi-squared .* at most 92 expected")
    assert raised.match("times the power of the noise")


@pytest.mark.parametrize("name", ["repa", "sit", "ddpm", "edm", "flow"])
def test_latents_of_another_scale_are_named_as_the_cause(name: str, generator: torch.Generator) -> None:
    convention = TimeConvention.named(name)
    latents = smooth_latents(32, generator)
    t = draw_times(convention, 32, generator)
    x_t = noised(convention, latents, t, generator)
    with pytest.raises(TimeConventionError, match="No other named convention fits") as raised:
        check_against_latents(convention, x_t, t, latents / 0.18215)
    assert raised.match(r"x_t holds 0\.1[78]\d* times as much of these latents as expected")
    assert raised.match(r"pass them scaled \(and shifted\) as the model sees them")


def test_samples_with_zero_latents_are_left_out(generator: torch.Generator) -> None:
    latents, t = smooth_latents(24, generator), torch.rand(24, generator=generator)
    latents[::2] = 0
    x_t = noised(TimeConvention.named("sit"), latents, t, generator)
    check_against_latents(TimeConvention.named("sit"), x_t, t, latents)
    with pytest.raises(TimeConventionError, match="over 12 samples"):
        check_against_latents(TimeConvention.named("repa"), x_t, t, latents)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["x_t", "latents"])
def test_values_that_are_not_finite_do_not_mislead(bad: float, where: str, generator: torch.Generator) -> None:
    sit = TimeConvention.named("sit")
    latents, t = smooth_latents(24, generator), torch.rand(24, generator=generator)
    x_t = noised(sit, latents, t, generator)
    {"x_t": x_t, "latents": latents}[where][:3, 0, 0, 0] = bad
    check_against_latents(sit, x_t, t, latents)
    with pytest.raises(TimeConventionError, match="over 21 samples"):
        check_against_latents(TimeConvention.named("repa"), x_t, t, latents)
    {"x_t": x_t, "latents": latents}[where][:] = bad
    check_against_latents(sit, x_t, t, latents)


@pytest.mark.parametrize(
    ("name", "signal", "t", "latents", "message"),
    [
        ("edm", 1.0, 500.0, 1.0, "chi-squared 0, at most .* 1e-06 times the power"),  # the slope alone cannot tell
        ("repa", 0.0, 0.0, 1.0, "inf times the power of the noise"),  # no noise is expected at all
        ("sit", 0.0, 0.5, 0.0, "the latents of all 24 samples are zero"),
        ("sit", 0.0, 900.0, 1.0, "which look like steps"),  # the range of t comes first
    ],
)
def test_other_contradictions(
    name: str, signal: float, t: float, latents: float, message: str, generator: torch.Generator
) -> None:
    x, times = latents * smooth_latents(24, generator), torch.full((24,), t)
    x_t = signal * x + 0.5 * torch.randn(x.shape, generator=generator)
    with pytest.raises(TimeConventionError, match=message):
        check_against_latents(TimeConvention.named(name), x_t, times, x)
    check_against_latents(TimeConvention.named(name), x_t[:0], times[:0], x[:0])  # an empty batch says nothing


def test_shapes_that_cannot_be_compared(generator: torch.Generator) -> None:
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    packed = latents.reshape(2, 16, 16)
    with pytest.raises(ShapeError, match=r"got x_t \(2, 16, 16\), latents \(2, 4, 8, 8\), t \(2,\)") as raised:
        check_against_latents(TimeConvention.named("flow-unit"), packed, torch.rand(2, generator=generator), latents)
    assert raised.match("Pass the latents in the shape in which the model is given x_t")
    with pytest.raises(ShapeError, match=r"t \(\)"):
        check_against_latents(TimeConvention.named("repa"), latents, torch.tensor(0.5), latents)


def by_token(t: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(N, T) as the values of x_t have it: packed tokens, frames, or patches of 2 by 2."""
    if len(shape) == 3:
        return t[:, :, None]
    if len(shape) == 5:
        return t[:, None, :, None, None]
    side = shape[-1] // 2
    return t.reshape(-1, 1, side, 1, side, 1).expand(-1, 1, side, 2, side, 2).reshape(-1, 1, *shape[2:])


@pytest.mark.parametrize(
    ("shape", "count"),
    [((6, 16, 12), 16), ((6, 4, 5, 8, 8), 5), ((6, 4, 8, 8), 16)],
    ids=["packed", "frames", "patches"],
)
@pytest.mark.parametrize("name", ["sit", "flow", "ddpm"])
def test_times_by_token_or_frame_are_checked_where_they_belong(
    name: str, shape: tuple[int, ...], count: int, generator: torch.Generator
) -> None:
    convention = TimeConvention.named(name)
    latents = torch.randn(shape, generator=generator)
    t = torch.stack([draw_times(convention, count, generator) for _ in range(shape[0])])
    alpha, sigma = (by_token(part(t), shape) for part in (convention.signal, convention.noise))
    x_t = alpha * latents + sigma * torch.randn(shape, generator=generator)
    assert check_against_latents(convention, x_t, t, latents) is None
    swapped = TimeConvention("swapped", convention.noise, convention.signal, domain=convention.domain)
    with pytest.raises(TimeConventionError, match=f"These conventions fit: .*'{name}'"):
        check_against_latents(swapped, x_t, t, latents)


def test_times_by_axes_that_are_not_certain_are_left_to_their_range(generator: torch.Generator) -> None:
    sit, latents = TimeConvention.named("sit"), torch.randn(4, 8, 8, 8, generator=generator)
    why = check_against_latents(sit, latents, torch.rand(4, 8, generator=generator), latents)
    assert why is not None
    assert "t (4, 8) was not compared with x_t (4, 8, 8, 8)" in why
    with pytest.raises(
        TimeConventionError,
        match=r"t was read from argument 'sigma' of EDM; if it is another one, pass call=dict\(t=...\)",
    ):
        check_against_latents(sit, latents, torch.full((4, 8), 7.5), latents, "argument 'sigma' of EDM")


def test_other_noise_is_named_with_the_switch(generator: torch.Generator) -> None:
    repa, latents, t = TimeConvention.named("repa"), smooth_latents(32, generator), torch.rand(32, generator=generator)
    noise = torch.randn(latents.shape, generator=generator) + 3 * torch.randn(32, 4, 1, 1, generator=generator)
    x_t = (1 - t)[:, None, None, None] * latents + t[:, None, None, None] * noise
    with pytest.raises(TimeConventionError, match=r"noise offset, pyramid noise.*check_interval=None") as raised:
        check_against_latents(repa, x_t, t, latents, "argument 'timestep'")
    assert raised.match("t was read from argument 'timestep'")


def test_check_syncs_once_and_leaves_its_inputs_alone(
    generator: torch.Generator, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    sit = TimeConvention.named("sit")
    latents, t = smooth_latents(8, generator), torch.rand(8, generator=generator)
    x_t = noised(sit, latents, t, generator).to(device).requires_grad_()
    latents, t = latents.to(device), t.to(device)
    before = [value.clone() for value in (x_t, latents, t)]
    transfers = []
    original = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: transfers.append(self.shape) or original(self))
    for name in ("item", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(Tensor, name, lambda self: pytest.fail("a second host sync"))
    time_module.check_against_latents(sit, x_t, t, latents)
    monkeypatch.undo()
    assert len(transfers) == 1
    assert all(torch.equal(old, new) for old, new in zip(before, (x_t, latents, t), strict=True))


def test_fraction_needs_no_host_sync(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    t = torch.tensor([0.5, 1.0], device=device)
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(Tensor, name, lambda self: pytest.fail("a host sync"))
    masks = [window_mask(TimeConvention.named(name).noise_fraction(t), (0.4, 0.7)) for name in NAMES]
    monkeypatch.undo()
    assert len(masks) == len(NAMES)
