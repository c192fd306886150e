"""The weight of the alignment over the steps of a run."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from .errors import SettingError

Schedule: TypeAlias = Literal["constant", "linear", "cosine"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)


def check_schedule(schedule: object, stop_step: object) -> None:
    """Raise ``SettingError`` unless the schedule is known and has the stop step that it needs."""
    if schedule not in SCHEDULES:
        raise SettingError(f"schedule must be one of {', '.join(SCHEDULES)}; got {schedule!r}.")
    if stop_step is None:
        if schedule != "constant":
            raise SettingError(f"schedule={schedule!r} decays to 0 at stop_step: give a stop_step.")
    elif isinstance(stop_step, bool) or not isinstance(stop_step, int) or stop_step < 0:
        raise SettingError(f"stop_step must be None or an integer, 0 or more; got {stop_step!r}.")


def factor(schedule: Schedule, step: int | None, stop_step: int | None) -> float:
    """What the weight is multiplied with at ``step``: in [0, 1], and 0 from ``stop_step`` on.

    With s = step / stop_step: ``constant`` 1, ``linear`` 1 − s, ``cosine`` (1 + cos πs) / 2.

    Raises:
        SettingError: If there is a ``stop_step`` and no ``step``.
    """
    if stop_step is None:
        return 1.0
    if step is None:
        raise SettingError(
            f"The alignment stops at step {stop_step}, so every call needs the step: criterion(loss, ..., step=step)."
        )
    if step >= stop_step:
        return 0.0
    progress = step / stop_step
    if schedule == "linear":
        return 1.0 - progress
    if schedule == "cosine":
        return (1.0 + math.cos(math.pi * progress)) / 2.0
    return 1.0


def schedule_state(schedule: Schedule, weight: float, stop_step: int | None) -> Tensor:
    """The schedule as a small integer tensor for a state dict: which one, the weight in 1e-9, the stop step or -1.

    Integers, since ``.half()`` on the criterion would round a floating buffer.
    """
    return torch.tensor([SCHEDULES.index(schedule), round(weight * 1e9), -1 if stop_step is None else stop_step])


def check_same_schedule(saved: Tensor, schedule: Schedule, weight: float, stop_step: int | None) -> None:
    """Make sure that a resumed run has the schedule that it was saved with.

    Raises:
        SettingError: If it has another.
    """
    if torch.equal(saved.cpu(), schedule_state(schedule, weight, stop_step)):
        return
    kind, scaled, stop = saved.tolist()
    raise SettingError(
        f"The state was saved with schedule={SCHEDULES[kind]!r}, weight={scaled / 1e9:g}, "
        f"stop_step={None if stop < 0 else stop}; this criterion has schedule={schedule!r}, weight={weight:g}, "
        f"stop_step={stop_step}.\n"
        "Build it with the saved settings; to change them on purpose, put the new ones into the state: "
        "state['schedule_state'] = criterion.state_dict()['schedule_state']."
    )
