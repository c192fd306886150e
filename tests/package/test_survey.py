"""From a noise fraction to t and x_t, under every convention."""

import math

import pytest
import torch
from plain import refused

from selftrans_reg import TimeConvention
from selftrans_reg.analysis.survey import time_at
from selftrans_reg.errors import SettingError


@pytest.mark.parametrize("name", TimeConvention.names())
def test_t_has_the_noise_fraction(name: str) -> None:
    time = TimeConvention.named(name)
    for fraction in (0.05, 0.4, 0.55, 0.7, 0.9, *([] if time.discrete else [0.0])):
        t = torch.tensor([time_at(time, fraction)])
        assert not time.discrete or t == t.round()
        assert time.noise_fraction(t).item() == pytest.approx(fraction, abs=0.01 if time.discrete else 1e-5)


def test_a_step_is_the_nearest_and_what_has_no_t_is_an_error() -> None:
    time = TimeConvention.from_alphas_cumprod("mine", [0.9, 0.5, 0.49, 0.1])
    fractions = [math.sqrt(1 - a) / (math.sqrt(1 - a) + math.sqrt(a)) for a in (0.9, 0.5, 0.49, 0.1)]
    assert [time_at(time, fraction) for fraction in fractions] == [0, 1, 2, 3]
    assert time_at(time, fractions[1] + 0.001) == 1
    for convention, fraction, message in (
        (TimeConvention.named("repa"), 1.2, "from 0 (data) to 1"),
        (TimeConvention.named("repa"), math.nan, "from 0 (data) to 1"),
        (time, 0.6, "No t of time 'mine' has noise fraction 0.6: the nearest is off by 0.0950, at t = 2"),
        (TimeConvention("mine", lambda t: 1 - t, lambda t: t), 0.5, "give it domain="),
    ):
        with refused(SettingError, message):
            time_at(convention, fraction)
