"""From a noise fraction to t and x_t, under every convention."""

import math

import pytest
import torch

from selftrans_reg import TimeConvention
from selftrans_reg.analysis.survey import add_noise, time_at, times_at
from selftrans_reg.errors import SettingError

FRACTIONS = (0.05, 0.4, 0.55, 0.7, 0.9)


@pytest.mark.parametrize("name", TimeConvention.names())
@pytest.mark.parametrize("fraction", FRACTIONS)
def test_t_has_the_noise_fraction(name: str, fraction: float) -> None:
    time = TimeConvention.named(name)
    t = times_at(time, fraction, 3, torch.device("cpu"))
    assert t.shape == (3,)
    assert t.dtype == (torch.int64 if time.discrete else torch.float32)
    tolerance = 0.01 if time.discrete else 1e-5
    assert time.noise_fraction(t).tolist() == pytest.approx([fraction] * 3, abs=tolerance)


@pytest.mark.parametrize(("name", "t"), [("repa", 0.3), ("sit", 0.7), ("flow", 300.0), ("maskdit", 0.3 / 0.7)])
def test_t_of_known_paths(name: str, t: float) -> None:
    assert time_at(TimeConvention.named(name), 0.3) == pytest.approx(t, rel=1e-6)


def test_edm_is_matched_at_its_latents_deviation() -> None:
    assert time_at(TimeConvention.named("edm"), 0.5) == pytest.approx(0.5, abs=1e-6)  # sigma = 0.5, the data's


def test_the_ends_are_reached_where_there_are_any() -> None:
    assert [time_at(TimeConvention.named("sit"), fraction) for fraction in (0, 1)] == [1, 0]
    assert time_at(TimeConvention.named("edm"), 0) == 0


def test_as_near_as_a_hundredth_will_do() -> None:
    assert time_at(TimeConvention.named("ddpm"), 0) == 0  # the first step has some noise: 0.0099
    assert time_at(TimeConvention.named("edm"), 1) > 1000  # no noise level is nothing but noise


def test_a_step_is_the_nearest() -> None:
    time = TimeConvention.from_alphas_cumprod("mine", [0.9, 0.5, 0.49, 0.1])
    fractions = [math.sqrt(1 - a) / (math.sqrt(1 - a) + math.sqrt(a)) for a in (0.9, 0.5, 0.49, 0.1)]
    assert [time_at(time, fraction) for fraction in fractions] == [0, 1, 2, 3]
    assert time_at(time, fractions[1] + 0.001) == 1


@pytest.mark.parametrize(
    ("time", "fraction", "match"),
    [
        (TimeConvention.named("repa"), 1.2, "from 0 .data. to 1"),
        (TimeConvention.named("repa"), math.nan, "from 0"),
        (TimeConvention.named("uvit-discrete"), 0.95, "No t of time .uvit-discrete.*nearest is 0.9360 at t = 1000"),
        (TimeConvention.from_alphas_cumprod("mine", [0.9, 0.1]), 0.5, "No t of time 'mine' has noise fraction 0.5"),
        (TimeConvention("mine", lambda t: 1 - t, lambda t: t), 0.5, "give it domain="),
    ],
)
def test_what_has_no_t_is_an_error(time: TimeConvention, fraction: float, match: str) -> None:
    with pytest.raises(SettingError, match=match):
        time_at(time, fraction)


def test_noise_is_added_as_the_convention_says(generator: torch.Generator) -> None:
    latents, noise = (torch.randn(3, 2, 4, generator=generator) for _ in range(2))
    t = torch.tensor([0.0, 0.25, 1.0])
    expected = torch.stack([t[i] * latents[i] + (1 - t[i]) * noise[i] for i in range(3)])
    torch.testing.assert_close(add_noise(TimeConvention.named("sit"), latents, noise, t), expected)
    assert add_noise(TimeConvention.named("sit"), latents.bfloat16(), noise, t).dtype == torch.bfloat16
