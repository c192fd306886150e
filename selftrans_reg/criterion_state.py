"""The small buffers of the criterion's state dict: written when one is made, checked when one is loaded."""

from __future__ import annotations

import hashlib
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


def _settings(criterion: SelfTransLoss) -> dict[str, Any]:
    """What a head was trained for, besides teacher and schedule: with another of these it is another head's state."""
    return {
        "stage": criterion.stage,
        "layer": criterion.layers,
        "time": criterion.time.name,
        "window": criterion.window,
        "gating": criterion.gating,
        "distance": criterion.distance,
        "target": criterion.target,
    }


def settings_state(criterion: SelfTransLoss) -> Tensor:
    """(7,), int64: a number for each of the settings, equal where these are equal."""
    digests = [hashlib.sha256(repr(value).encode()).digest() for value in _settings(criterion).values()]
    return torch.tensor([int.from_bytes(digest[:7], "big") for digest in digests])


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
    """Before a state dict is loaded: see that settings, teacher and schedule are those that it was saved with.

    A state from before there were observations gets fresh ones, one that tells no settings this criterion's.

    Raises:
        TeacherError: If the teacher is another.
        SettingError: If settings or schedule are others, or a rule stopped the run that the criterion has not.
    """
    for name, value in {**fresh_observations(), "settings_state": settings_state(criterion)}.items():
        state.setdefault(f"{prefix}{name}", value)
    _check_same_settings(state[f"{prefix}settings_state"], criterion)
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


def _check_same_settings(saved: Tensor, criterion: SelfTransLoss) -> None:
    same = zip(saved.tolist(), settings_state(criterion).tolist(), _settings(criterion).items(), strict=True)
    other = {name: value for before, now, (name, value) in same if before != now}
    if other:
        raise SettingError(
            "The state was saved with other settings than this criterion's "
            f"{', '.join(f'{name}={value!r}' for name, value in other.items())}.\n"
            "Build it with the saved settings; to change them on purpose, put the new ones into the state: "
            "state['settings_state'] = criterion.state_dict()['settings_state']."
        )


def _hex(fingerprint: Tensor) -> str:
    return bytes(fingerprint.tolist()).hex()[:16]
