"""The weight over the steps of a run."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from selftrans_reg import SettingError
from selftrans_reg.settings import check_same_schedule, check_schedule, factor, schedule_state


@pytest.mark.parametrize("step", [0, 1, 33, 50, 99, 100, 101, 10**9])
def test_each_schedule_is_its_formula_up_to_the_stop_step_and_zero_from_there(step: int) -> None:
    on = step < 100
    assert factor("constant", step, 100) == (1.0 if on else 0.0)
    assert factor("linear", step, 100) == pytest.approx(1 - step / 100 if on else 0.0)
    assert factor("cosine", step, 100) == pytest.approx(math.cos(math.pi * step / 200) ** 2 if on else 0.0)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_decay_falls_at_every_step_and_ends_where_it_becomes_zero(schedule: Any) -> None:
    values = [factor(schedule, step, 50) for step in range(51)]
    assert values[0] == 1.0
    assert values[50] == 0.0
    assert all(a > b for a, b in itertools.pairwise(values))
    assert values[49] < 0.03


def test_without_a_stop_step_the_weight_is_constant_and_no_step_is_needed() -> None:
    assert factor("constant", None, None) == factor("constant", 10**12, None) == 1.0


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_stop_step_of_zero_is_a_run_without_alignment(schedule: Any) -> None:
    assert factor(schedule, 0, 0) == 0.0


def test_a_stop_step_without_a_step_is_refused() -> None:
    with pytest.raises(SettingError) as error:
        factor("constant", None, 100)
    assert "stops at step 100, so every call needs the step" in str(error.value)
    assert "criterion(loss, ..., step=step)" in str(error.value)


@pytest.mark.parametrize(
    ("schedule", "stop_step", "part"),
    [
        ("exponential", None, "schedule must be one of constant, linear, cosine; got 'exponential'"),
        ("linear", None, "schedule='linear' decays to 0 at stop_step: give a stop_step"),
        ("constant", -1, "stop_step must be None or an integer, 0 or more; got -1"),
        ("constant", 1e5, "0 or more; got 100000.0"),
        ("constant", True, "0 or more; got True"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(schedule: Any, stop_step: Any, part: str) -> None:
    with pytest.raises(SettingError) as error:
        check_schedule(schedule, stop_step)
    assert part in str(error.value)


@pytest.mark.parametrize("weight", [0.5, 0.1, 1e-9, 0.0, 123456.789])
@pytest.mark.parametrize("stop_step", [None, 0, 10**12])
def test_the_state_holds_what_it_is_compared_with(weight: float, stop_step: int | None) -> None:
    state = schedule_state("cosine", weight, stop_step)
    assert not state.is_floating_point()  # .half() would round it
    check_same_schedule(state, "cosine", weight, stop_step)
    for other in (("linear", weight, stop_step), ("cosine", weight + 1e-8, stop_step), ("cosine", weight, 7)):
        with pytest.raises(SettingError, match="The state was saved with schedule='cosine'"):
            check_same_schedule(state, *other)


def test_a_difference_is_told_in_full() -> None:
    with pytest.raises(SettingError) as error:
        check_same_schedule(schedule_state("linear", 0.5, 100), "constant", 0.25, None)
    for part in (
        "saved with schedule='linear', weight=0.5, stop_step=100; this criterion has schedule='constant', ",
        "weight=0.25, stop_step=None.\n",
        "state['schedule_state'] = criterion.state_dict()['schedule_state']",
    ):
        assert part in str(error.value)


def test_a_state_on_another_device_compares(device: torch.device) -> None:
    check_same_schedule(schedule_state("linear", 0.5, 100).to(device), "linear", 0.5, 100)
