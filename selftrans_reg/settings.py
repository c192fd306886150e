"""The settings of a criterion, and which values make sense."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, Literal, SupportsIndex, TypeAlias, TypedDict, get_args

import torch
from torch import Tensor

from .errors import SettingError
from .modules import check_positive, quoted
from .plateau import Plateau
from .taps import WhichForward
from .tokens import Select, Tokens, described

Target: TypeAlias = Literal["latents", "velocity"]
Gating: TypeAlias = Literal["per-sample", "released"]

# A larger weight is a slip, and would not fit into the state dict's integers.
_MAX_WEIGHT = 1_000_000


class Settings(TypedDict, total=False):
    """What both stages take besides; :class:`SelfTransLoss` describes each."""

    weight: float
    window: tuple[float, float] | None
    gating: Gating
    schedule: Schedule
    stop_step: int | None
    stop_when: Plateau | None
    call: Mapping[str, Any] | None
    select: Select
    tokens: Tokens
    forward: WhichForward
    eval_mode: bool
    check_interval: int | None
    health_interval: int | None


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise ``SettingError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise SettingError(f"{name} must be one of {quoted(choices)}; got {value!r}.")


def check_interval_of(name: str, value: object) -> None:
    """Raise ``SettingError`` unless ``value`` is a positive integer or None."""
    if value is not None:
        check_positive(name, value)


def check_weight(weight: object) -> None:
    """Raise ``SettingError`` unless ``weight`` is a number that a weight can be."""
    if isinstance(weight, bool) or not isinstance(weight, float | int) or not 0 <= weight <= _MAX_WEIGHT:
        raise SettingError(f"weight must be a number from 0 to {_MAX_WEIGHT}; got {weight!r}.")


def check_stop_when(stop_when: object, weight: float) -> None:
    """Raise ``SettingError`` unless ``stop_when`` is a :class:`Plateau` that can be measured, or None."""
    if stop_when is not None and not isinstance(stop_when, Plateau):
        raise SettingError(f"stop_when must be a Plateau or None, such as st.Plateau(); got {stop_when!r}.")
    if stop_when is not None and weight == 0.0:
        raise SettingError("stop_when= compares gradients, and with weight=0.0 the alignment has none.")


def checked_step(step: object) -> int:
    """An integer, such as NumPy's too, as Python's.

    Raises:
        SettingError: If it is none, or negative.
    """
    if isinstance(step, SupportsIndex) and not isinstance(step, bool | Tensor) and operator.index(step) >= 0:
        return operator.index(step)
    raise SettingError(f"step must be an integer, 0 or more; got {described(step)}.")


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
