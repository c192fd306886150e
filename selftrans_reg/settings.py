"""The settings of a criterion, checked here and nowhere else, and the state of its run, as JSON and back."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, NamedTuple, TypeAlias, TypedDict, get_args

import torch
from torch import Tensor

from .errors import CheckpointError, SettingError, TeacherError
from .heads import Distance
from .health import Health
from .modules import check_one_of, check_positive
from .plateau import Plateau, PlateauRule
from .taps import WhichForward
from .time import TimeConvention, is_pair
from .tokens import Select, Tokens, check_choice

Target: TypeAlias = Literal["latents", "velocity"]
Gating: TypeAlias = Literal["per-sample", "released"]
Schedule: TypeAlias = Literal["constant", "linear", "cosine"]

_MAX_WEIGHT = 1_000_000  # a larger one is a slip
MAX_STEP = 2**63 - 1  # as wherever steps are kept
_FORMAT = 1
_DAMAGED = (
    "The criterion's saved state is damaged, or of a later version; nothing was loaded. Take another checkpoint, or "
    "load the heads alone, by criterion.heads.load_state_dict()."
)
_ON_PURPOSE = "To go on with this criterion's on purpose, call criterion.allow_changes() before loading."


class Common(TypedDict, total=False):
    """What both stages take besides; :class:`SelfTransLoss` describes each."""

    weight: float
    distance: Distance
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


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A criterion's settings, checked once: here. :class:`SelfTransLoss` and its two stages describe each."""

    stage: int
    layers: tuple[str, ...]
    time: TimeConvention
    target: Target = "latents"
    distance: Distance = "mse"
    weight: float = 0.5
    window: tuple[float, float] | None = (0.4, 0.7)
    gating: Gating = "per-sample"
    schedule: Schedule = "constant"
    stop_step: int | None = None
    stop_when: Plateau | None = None
    call: Mapping[str, Any] | None = None
    select: Select = None
    tokens: Tokens = None
    forward: WhichForward = None
    eval_mode: bool = False
    check_interval: int | None = 1000
    health_interval: int | None = 100
    teacher_chunk: int | None = None
    teacher_rows: int | float | None = None

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            check_one_of(name, getattr(self, name), choices)
        check_choice(self.select, self.tokens)
        for name in ("check_interval", "health_interval", "teacher_chunk"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        for name, (fits, expected) in _VALUES.items():
            if not fits(getattr(self, name)):
                raise SettingError(f"{name} must be {expected}; got {getattr(self, name)!r}.")
        object.__setattr__(self, "window", self.window and tuple(float(edge) for edge in self.window))
        object.__setattr__(self, "weight", float(self.weight))
        if self.stop_step is None and self.schedule != "constant":
            raise SettingError(f"schedule={self.schedule!r} decays to 0 at stop_step: give a stop_step.")
        if self.stop_when is not None and self.weight == 0.0:
            raise SettingError("stop_when= compares gradients, and with weight=0.0 the alignment has none.")

    def factor(self, step: int | None) -> float:
        """What the weight is multiplied with at ``step``: in [0, 1], and 0 from ``stop_step`` on."""
        stop = self.stop_step
        if stop is None:
            return 1.0
        if step is None:
            raise SettingError(
                f"The alignment stops at step {stop}, so every call needs the step: criterion(loss, ..., step=step)."
            )
        if step >= stop:
            return 0.0
        s = step / stop
        return {"constant": 1.0, "linear": 1.0 - s, "cosine": (1.0 + math.cos(math.pi * s)) / 2.0}[self.schedule]

    def to_json(self) -> dict[str, Any]:
        """What a head is trained for, as JSON: with another of these a saved state is that of another run."""
        names = ("stage", "target", "distance", "weight", "gating", "schedule", "stop_step")
        return {
            "layer": list(self.layers),
            "time": self.time.name,
            "window": self.window and list(self.window),
            "stop_when": self.stop_when and asdict(self.stop_when),
            **{name: getattr(self, name) for name in names},
        }


# What can be read off a criterion by its name; its `forward` is a method.
FIELDS = frozenset(field.name for field in fields(Settings)) - {"forward"}


def shown(settings: Mapping[str, Any], names: Iterable[str] | None = None) -> str:
    """Some of the settings, or all, as one would type them."""
    values = {name: settings.get(name) for name in (settings if names is None else names)}
    return ", ".join(f"{k}={tuple(v) if isinstance(v, list) else v!r}" for k, v in values.items())


class RunState(NamedTuple):
    """Where a run is, for the next to go on from: what a criterion saves beside its heads."""

    step: int  # the last, -1 before the first
    calls: int  # of the criterion
    weight: float  # as it is: the settings have the one that the criterion was built with
    teacher: str | None  # its fingerprint, in hexadecimal; None where there never was one
    health: Sequence[float]  # what the run's health has seen
    plateau: Sequence[float] | None  # what `stop_when` has seen; None without
    settings: Mapping[str, Any]  # as Settings.to_json gives them

    def to_tensor(self) -> Tensor:
        """JSON in a uint8 tensor: it survives ``.half()``, safetensors and sharded checkpoints."""
        # Distributed checkpoints are loaded in place, so one criterion's states have one size, whatever it counts.
        size = 1024 * math.ceil(1 + len(json.dumps(self.settings)) / 1024)
        text = json.dumps({"format": _FORMAT, **self._asdict()}).encode().ljust(size)
        return torch.tensor(list(text), dtype=torch.uint8, device="cpu")

    @classmethod
    def from_tensor(cls, tensor: Any) -> RunState:
        """What :meth:`to_tensor` was given."""
        try:
            entries = json.loads(bytes(tensor.tolist()))
            version = entries.pop("format")
            health, plateau = ([float(v) for v in entries.pop(name) or []] for name in ("health", "plateau"))
            state = cls(**entries, health=health, plateau=plateau or None)
            Health(None).load(state.health)
            PlateauRule(Plateau()).load(plateau or PlateauRule(Plateau()).state())
            sound = _is_whole(state.step, -1) and _is_whole(state.calls, 0) and _is_weight(state.weight)
            sound &= isinstance(state.settings, dict) and isinstance(state.teacher, str | None) and version == _FORMAT
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise CheckpointError(f"{_DAMAGED}\n{type(error).__name__}: {str(error)[:200]}") from error
        if not sound:
            raise CheckpointError(f"{_DAMAGED}\nFound format {version}, {str(state[:4])[:200]}.")
        return state

    def check_continued_by(self, own: RunState, *, taught: bool) -> None:
        """Refuse to go on from this where ``own`` is another run's: other settings, rule or, if ``taught``, teacher."""
        other = [k for k, value in own.settings.items() if k != "stop_when" and self.settings.get(k) != value]
        if self.weight == own.weight and "weight" in other:
            other.remove("weight")  # it was changed to that while the run went on
        if other:
            raise SettingError(
                f"The state was saved with {shown(self.settings, other)}; this criterion has "
                f"{shown(own.settings, other)}.\nBuild it with the saved settings. {_ON_PURPOSE}"
            )
        if own.plateau is None and self.plateau is not None and self.plateau[0] >= 0:
            raise SettingError(
                f"The state is one of a run that {shown(self.settings, ['stop_when'])} has stopped; this criterion "
                f"has none, and the alignment would set in again.\nBuild it with the saved stop_when=. {_ON_PURPOSE}"
            )
        if taught and self.teacher is not None and self.teacher != own.teacher:
            raise TeacherError(
                "The state was saved with another teacher: weights, layer, guidance scale or null condition differ.\n"
                f"Saved {self.teacher[:16]}, this criterion's {str(own.teacher)[:16]}. Build the teacher as when the "
                f"run began. {_ON_PURPOSE}"
            )


def _is_whole(value: object, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= MAX_STEP


def _is_weight(value: object) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and 0 <= value <= _MAX_WEIGHT


_CHOICES: dict[str, tuple[object, ...]] = {
    "target": get_args(Target),
    "distance": get_args(Distance),
    "gating": get_args(Gating),
    "schedule": get_args(Schedule),
    "forward": (None, *get_args(get_args(WhichForward)[0])),
    "eval_mode": (False, True),
}
_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "weight": (_is_weight, f"a number from 0 to {_MAX_WEIGHT}"),
    "window": (
        lambda window: window is None or (is_pair(window) and 0 <= window[0] < window[1] <= 1),
        "None or (low, high) in noise fraction, σ / (σ + α), with 0 <= low < high <= 1, such as (0.4, 0.7)",
    ),
    "stop_step": (lambda step: step is None or _is_whole(step, 0), "None or an integer, 0 or more"),
    "stop_when": (lambda rule: isinstance(rule, Plateau | None), "a Plateau or None, such as st.Plateau()"),
    "teacher_rows": (
        lambda rows: rows is None or _is_whole(rows, 1) or (isinstance(rows, float) and 0.0 < rows < 1.0),
        "None, a whole number of rows from 1, or a share between 0 and 1",
    ),
}
