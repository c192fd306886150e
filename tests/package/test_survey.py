"""From a noise fraction to t and x_t, under every convention."""

import math

import pytest
import torch

from selftrans_reg import TimeConvention
from selftrans_reg.analysis.survey import time_at
from selftrans_reg.errors import SettingError


@pytest.mark.parametrize("name", TimeConvention.names())
def test_t_has_the_noise_fraction(name: str) -> None:
    time = TimeConvention.named(name)
    for fraction in (0.05, 0.4, 0.55, 0.7, 0.9):
        t = torch.tensor([time_at(time, fraction)])
        assert not time.discrete or t == t.round()
        assert time.noise_fraction(t).item() == pytest.approx(fraction, abs=0.01 if time.discrete else 1e-5)


@pytest.mark.parametrize(
    ("name", "fraction", "t"),
    [("repa", 0.3, 0.3), ("sit", 0.3, 0.7), ("flow", 0.3, 300.0), ("maskdit", 0.3, 0.3 / 0.7), ("edm", 0.3, 0.15 / 0.7),
     ("sit", 0, 1), ("sit", 1, 0), ("edm", 0, 0), ("ddpm", 0, 0)],  # whose first step has some noise: 0.0099
)  # fmt: skip
def test_t_of_known_paths(name: str, fraction: float, t: float) -> None:
    assert time_at(TimeConvention.named(name), fraction) == pytest.approx(t, rel=1e-6, abs=0)


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
        (
            TimeConvention.named("uvit-discrete"),
            0.95,
            "No t of time .uvit-discrete.*nearest is off by 0.0140, at t = 1000",
        ),
        (TimeConvention.from_alphas_cumprod("mine", [0.9, 0.1]), 0.5, "No t of time 'mine' has noise fraction 0.5"),
        (TimeConvention("mine", lambda t: 1 - t, lambda t: t), 0.5, "give it domain="),
    ],
)
def test_what_has_no_t_is_an_error(time: TimeConvention, fraction: float, match: str) -> None:
    with pytest.raises(SettingError, match=match):
        time_at(time, fraction)
