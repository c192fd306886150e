"""The small buffers of the criterion's state dict: written when one is made, checked when one is loaded."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import SettingError, TeacherError
from .health import Health
from .plateau import PlateauRule
from .schedules import check_same_schedule

if TYPE_CHECKING:
    from .criterion import SelfTransLoss


def as_bits(values: Sequence[float]) -> Tensor:
    """Floating numbers as the integers of the same bits: ``.half()`` on the criterion would round a floating buffer."""
    return torch.tensor(values, dtype=torch.float64).view(torch.int64)


def from_bits(bits: Tensor) -> list[float]:
    """What :func:`as_bits` was given."""
    values: list[float] = bits.detach().cpu().view(torch.float64).tolist()
    return values


def fresh_observations() -> dict[str, Tensor]:
    """The buffers of what a run has observed, as they are before its first call."""
    return {"health_state": as_bits(Health(None).state()), "plateau_state": as_bits(PlateauRule(None).state())}


def write_buffers(criterion: SelfTransLoss, prefix: str, keep_vars: bool) -> None:
    """Before a state dict is made: put the counters into their buffers."""
    criterion.step.fill_(criterion._step)
    criterion.calls.fill_(criterion._calls)
    criterion.health_state.copy_(as_bits(criterion._health.state()))
    criterion.plateau_state.copy_(as_bits(criterion._plateau.state()))


def read_buffers(criterion: SelfTransLoss, incompatible: object) -> None:
    """After a state dict was loaded: take the counters out of their buffers."""
    criterion._step = int(criterion.step)
    criterion._calls = int(criterion.calls)
    criterion._health.load(from_bits(criterion.health_state))
    criterion._plateau.load(from_bits(criterion.plateau_state))


def check_state(criterion: SelfTransLoss, state: MutableMapping[str, Any], prefix: str, *rest: object) -> None:
    """Before a state dict is loaded: see that teacher and schedule are those that it was saved with.

    A state from before there were observations gets fresh ones.

    Raises:
        TeacherError: If the teacher is another.
        SettingError: If the schedule is another, or the run was stopped by a rule that the criterion has not.
    """
    for name, value in fresh_observations().items():
        state.setdefault(f"{prefix}{name}", value)
    if criterion.stop_when is None and from_bits(state[f"{prefix}plateau_state"])[0] >= 0:
        raise SettingError(
            "The state is one of a run that stop_when= has stopped; this criterion has none, and the alignment would "
            "set in again.\nBuild it with the saved stop_when=; to let it set in again on purpose, put this "
            "criterion's state into the saved one: state['plateau_state'] = criterion.state_dict()['plateau_state']."
        )
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
