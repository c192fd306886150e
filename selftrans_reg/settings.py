"""What both stages of the criterion take besides, and which values make sense."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, Literal, SupportsIndex, TypeAlias, TypedDict

from torch import Tensor

from .errors import SettingError
from .heads import check_positive
from .names import quoted
from .plateau import Plateau
from .schedules import Schedule
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
