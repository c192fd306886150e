"""The small buffers of the criterion's state dict: written when one is made, checked when one is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import TeacherError
from .schedules import check_same_schedule

if TYPE_CHECKING:
    from .criterion import SelfTransLoss


def write_buffers(criterion: SelfTransLoss, prefix: str, keep_vars: bool) -> None:
    """Before a state dict is made: put the counters into their buffers."""
    criterion.step.fill_(criterion._step)
    criterion.calls.fill_(criterion._calls)


def read_buffers(criterion: SelfTransLoss, incompatible: object) -> None:
    """After a state dict was loaded: take the counters out of their buffers."""
    criterion._step = int(criterion.step)
    criterion._calls = int(criterion.calls)


def check_state(criterion: SelfTransLoss, state: Mapping[str, Any], prefix: str, *rest: object) -> None:
    """Before a state dict is loaded: see that teacher and schedule are those that it was saved with.

    Raises:
        TeacherError: If the teacher is another.
        SettingError: If the schedule is another.
    """
    saved = state.get(f"{prefix}teacher_fingerprint")
    teacher = criterion.teacher
    if saved is not None and teacher is not None and not torch.equal(saved.cpu(), teacher.fingerprint):
        raise TeacherError(
            "The state was saved with another teacher: weights, layer, guidance scale or null condition differ.\n"
            f"Saved {_hex(saved)}, this criterion's {_hex(teacher.fingerprint)}. Build the teacher as when the run "
            "began; to go on with another one on purpose, put this one's fingerprint into the state: "
            "state['teacher_fingerprint'] = teacher.fingerprint."
        )
    saved = state.get(f"{prefix}schedule_state")
    if saved is not None:
        check_same_schedule(saved, criterion.schedule, criterion.weight, criterion.stop_step)


def _hex(fingerprint: Tensor) -> str:
    return bytes(fingerprint.tolist()).hex()[:16]
