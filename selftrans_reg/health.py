"""Whether a run looks healthy: what a criterion measures of itself at an interval, and what it warns of."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from .calls import Call
from .errors import (
    AlignmentNotFallingWarning,
    EmptyWindowWarning,
    EvalModeWarning,
    ExplodingFeaturesWarning,
    HeadNotTrainedWarning,
    HealthWarning,
    NoContrastWarning,
    NoGradientWarning,
    NotFiniteError,
    SameWeightsWarning,
    StepWentBackWarning,
)
from .modules import named_layers, quoted, sharded_parts, unwrap
from .plateau import GradientProbe, Interval
from .teacher import CFGFeatureTeacher
from .tokens import tensors_in

# The alignment is averaged over at least so many calls, and so many averages are compared with the first.
_AVERAGED, _RECENT = 100, 5
# Within so many calls of a run any head learns at least the mean of what it is to predict.
_LEARNED = 2000


class Trend:
    """The alignment of the samples inside the window, averaged over stretches of the run.

    Attributes:
        sum: Of the alignments since the last stretch ended; a 0-d tensor on the device once a sample was inside.
        first: The average over the run's first stretch; inf where that was before the run was watched.
        recent: Those over the latest ones, oldest first.
    """

    def __init__(self) -> None:
        self.sum: Tensor | float = 0.0
        self.first = math.nan
        self.recent: list[float] = []
        self._inside = 0.0
        self._calls = 0

    def add(self, alignment: Tensor, inside: float) -> None:
        """Take in one call: its alignment and the share of its samples that were inside. Nothing is read."""
        self._calls += 1
        self._inside += inside
        if inside:
            self.sum = self.sum + alignment.detach()

    def close(self, total: float, calls: int) -> bool:
        """End a stretch if it is long enough, and say whether the alignment should have fallen and has not.

        Args:
            total: The value of ``sum``.
            calls: The number of this call in the run.
        """
        if self._calls < _AVERAGED or not self._inside:
            return False
        average = total / self._inside
        if math.isnan(self.first):
            self.first = average if calls - self._calls < _AVERAGED else math.inf
        else:
            self.recent = [*self.recent, average][-_RECENT:]
        self.sum, self._inside, self._calls = 0.0, 0.0, 0
        return calls >= _LEARNED and len(self.recent) == _RECENT and mean(self.recent) >= self.first

    def state(self) -> list[float]:
        """What a resumed run needs, as floating numbers."""
        recent = [*self.recent, *[math.nan] * (_RECENT - len(self.recent))]
        return [float(self.sum), self._inside, self._calls, self.first, *recent]

    def load(self, state: list[float]) -> None:
        """Go on from what :meth:`state` gave."""
        self.sum, self._inside, calls, self.first, *recent = state
        self._calls = int(calls)
        self.recent = [value for value in recent if not math.isnan(value)]


_VALUES = 256  # of each parameter


class Movement:
    """Whether the heads move while the tapped layers do.

    Args:
        late: Whether the run is in its middle, where a small step may round to none.
    """

    def __init__(self, late: bool = False) -> None:
        self._late = late
        self._watching = True
        self._start: tuple[Tensor, Tensor] | None = None

    def since_start(self, heads: nn.Module, layers: Iterable[nn.Module]) -> dict[str, Tensor]:
        """Whether heads and layers differ from what they were at the first call of this; 0-d, bool.

        Nothing at that first call, where the layers train nothing, and once :meth:`left_out` knows.
        """
        if not self._watching:
            return {}
        now = _values(heads.parameters(), True), _values(p for layer in layers for p in layer.parameters())
        if self._start is None:
            rounds = self._late and any(p.dtype in (torch.bfloat16, torch.float16) for p in heads.parameters())
            self._start = now
            self._watching = all(len(values) for values in now) and not rounds
            return {}
        same_size = all(then.shape == found.shape for then, found in zip(self._start, now, strict=True))
        self._watching = same_size  # else the model was wrapped anew
        differ = [(then != found).any() for then, found in zip(self._start, now, strict=True)] if same_size else []
        return dict(zip(("heads_moved", "layers_moved"), differ, strict=False))

    def left_out(self, found: Mapping[str, float], ready: bool) -> bool:
        """Whether the layers moved and the heads did not, once ``ready``; what was found is as :meth:`since_start`."""
        if "heads_moved" not in found or not (found["heads_moved"] or (ready and found["layers_moved"])):
            return False
        self._watching, self._start = False, None
        return not found["heads_moved"]


def same_weights(layers: Mapping[str, nn.Module], teacher: nn.Module) -> Tensor | None:
    """Whether each of the layers holds what the teacher's of the same name does; 0-d, bool; None if none compares."""
    taught = named_layers(teacher)
    pairs = []
    for name, layer in layers.items():
        theirs = dict(taught[name].named_parameters()) if name in taught else {}
        mine = dict(layer.named_parameters())
        if not mine or mine.keys() != theirs.keys():
            return None
        pairs.append((_values(mine.values(), True), _values(theirs.values(), True)))
    if any(a.shape != b.shape for a, b in pairs):
        return None
    return torch.stack([(a == b).all() for a, b in pairs]).all()


def _values(parameters: Iterable[nn.Parameter], frozen: bool = False) -> Tensor:
    """(n,), float32, a copy of the first values of each parameter that trains, or of each."""
    found = [local(p.detach()).flatten()[:_VALUES].float() for p in parameters if p.requires_grad or frozen]
    return torch.cat(found) if found else torch.zeros(0)


_BACK = (
    "Go back to an earlier checkpoint and set health_interval=1: the call in which it begins then says where it comes "
    "from. If nothing else is named, clip the gradients or lower the learning rate."
)
_REBUILD = (
    "A teacher does not train: its checkpoint has them already, or a cast to half precision made them. Build it from "
    "another checkpoint, or in float32."
)
_OVERFLOW = "Use bfloat16 or float32 where it is float16, and autocast rather than a model in half precision."


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """0-d, bool: whether every value is neither NaN nor inf."""
    return torch.stack([tensor.detach().isfinite().all() for tensor in tensors]).all()


def local(tensor: Tensor) -> Tensor:
    """A sharded tensor's part on this rank; any other tensor as it is."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def not_finite(look: Look, subject: Subject) -> NotFiniteError:
    """What to say of a call in which something is NaN or inf, the first cause first."""
    call, fractions, teacher = subject.call, subject.fractions, subject.teacher
    for layer, tokens in zip(subject.layers, look.tokens, strict=True):
        if (bad := _bad_rows(tokens)).any():
            cause = [*_in_arguments(call), *_in_weights(subject.model, _BACK), _overflowed("up to there")][0]
            return NotFiniteError(f"The student's layer {layer!r} gave NaN or inf {_where(bad, fractions)}.\n{cause}")
    assert look.target is not None  # with no row inside the window nothing else was computed
    rows = torch.arange(call.rows, device=fractions.device) if look.rows is None else look.rows
    if teacher is not None and look.features is not None:
        with_what = {"the condition": _bad_rows(look.features[0]), "the null condition": _bad_rows(look.features[1])}
        if (bad := torch.stack(list(with_what.values())).any(0)).any():
            named = " and with ".join(name for name, found in with_what.items() if found.any())
            causes = _in_arguments(call) + _in_weights(teacher.model, _REBUILD)
            return NotFiniteError(
                f"The teacher's layer {teacher.layer!r} gave NaN or inf with {named} {_where(bad, fractions[rows])}.\n"
                f"{causes[0] if causes else _overflowed(_first_module(teacher, look.taught or call, rows))}"
            )
    elif (bad := _bad_rows(look.target)).any():
        return NotFiniteError(f"The latents to align with hold NaN or inf {_where(bad, fractions[rows])}.")
    cause = [*_in_weights(subject.heads, _BACK, "heads."), _overflowed("in the head or the distance")][0]
    return NotFiniteError(
        "The alignment is NaN or inf, although the layer's tokens and what they are aligned with are finite.\n" + cause
    )


def _bad_rows(tensor: Tensor) -> Tensor:
    return ~tensor.detach().flatten(1).isfinite().all(1)


def _where(bad: Tensor, fractions: Tensor) -> str:
    found = fractions[bad].float()
    low, high = (f"{value:.2f}" for value in (found.min().item(), found.max().item()))
    at = f"noise fraction {low}" if low == high else f"noise fractions from {low} to {high}"
    return f"in {int(bad.sum())} of {len(bad)} samples, at {at}"


def _in_arguments(call: Call) -> list[str]:
    """The call's arguments as the cause."""
    tensors = [found for name, value in call.arguments.items() for found in tensors_in(value, name)]
    bad = [path for path, tensor in tensors if tensor.is_floating_point() and not tensor.isfinite().all()]
    return [f"The model was called with NaN or inf in {quoted(bad)}: look at what the loop makes it of."] * bool(bad)


def _in_weights(model: nn.Module, advice: str, prefix: str = "") -> list[str]:
    """A model's weights as the cause."""
    bad = [f"{prefix}{name}" for name, p in model.named_parameters() if not local(p.detach()).isfinite().all()]
    listed = f"{quoted(bad[:3])}{', …' if len(bad) > 3 else ''}"
    return [f"NaN or inf is in {len(bad)} of its parameters already: {listed}.\n{advice}"] * bool(bad)


def _overflowed(where: str) -> str:
    return f"What goes in and all weights are finite, so a value overflowed {where}. {_OVERFLOW}"


def _first_module(teacher: CFGFeatureTeacher, call: Call, rows: Tensor) -> str:
    """Where the teacher first gives NaN or inf: it is run again."""
    if sharded_parts(teacher.model):  # running it takes all ranks
        return "up to there"
    found: list[str] = []

    def look(name: str, output: Any) -> None:
        if not found and any(t.is_floating_point() and not t.isfinite().all() for _, t in tensors_in(output)):
            found.append(name)

    layers = {module: name for name, module in named_layers(teacher.model).items()}
    handles = [
        module.register_forward_hook(lambda module, args, output, name=name: look(name, output))
        for module, name in layers.items()
        if module is not unwrap(teacher.model)
    ]
    try:
        teacher.features(call, rows)
    finally:
        for handle in handles:
            handle.remove()
    return f"in {(found or [teacher.layer])[0]!r}"


# What the first steps of a good run may look like too, such as a learning rate that warms up, is not spoken of before
# so many calls of a process.
_SETTLED = 20
# With less contrast f_u + w (f_c − f_u) is f_c up to 3 % even with w = 30; trained models have 0.02 and more.
_NO_CONTRAST = 1e-3
# A loop may drop conditions itself, and a small batch may have no other inside. So many are hardly ever all dropped.
_COMPARED = 16
# Norms grow while a diffusion transformer trains, by far less. Both must be passed: a layer may begin near 0.
_GROWN, _LARGE = 100.0, 100.0
# A window that takes in 1 % of all samples stays empty for so many with a probability of 2e-9.
_EMPTY_CALLS, _EMPTY_SAMPLES = 100, 2000


@dataclass
class Look:
    """What a measured call sees; it is gone when the call returns, since it holds the graph.

    Attributes:
        denoising: The loop's own loss.
        probe: Sees the gradients in the backward pass; None where the weight is 0, and the alignment has none.
        tokens: (N, T, D) of each layer.
        taught: The call as the teacher was shown it.
        features: (n, T, D) twice: the teacher's (f_c, f_u).
        target: (n, T, D), or the latents in stage 1; None where no row was inside the window.
        rows: (n,), which rows these are; None for all.
        inside: How many rows are inside the window.
    """

    denoising: Tensor
    probe: GradientProbe | None
    tokens: list[Tensor] = field(default_factory=list)
    taught: Call | None = None
    features: tuple[Tensor, Tensor] | None = None
    target: Tensor | None = None
    rows: Tensor | None = None
    inside: int = 0

    def branch(self, tensor: Tensor) -> Tensor:
        """A tapped tensor, as the alignment is to be computed from it."""
        return tensor if self.probe is None else self.probe.branch(tensor, self.denoising)


@dataclass(frozen=True)
class Subject:
    """Whom the health is of, as things stand in this call.

    Attributes:
        call: The student's call.
        fractions: (N,), its noise fractions.
        window: In noise fractions; None for all.
        model: The student.
        layers: Its tapped layers by name.
        heads: One for each layer.
        teacher: The teacher of stage 2.
    """

    call: Call
    fractions: Tensor
    window: tuple[float, float] | None
    model: nn.Module
    layers: dict[str, nn.Module]
    heads: nn.ModuleList
    teacher: CFGFeatureTeacher | None

    @property
    def named(self) -> str:
        """The layers, for messages."""
        return f"layer{'s' * (len(self.layers) > 1)} {quoted(self.layers)}"


class Health:
    """Measures at an interval, and warns of what looks wrong, of each thing once.

    Args:
        interval: Calls from one look to the next; None switches all of it off.
    """

    def __init__(self, interval: int | None) -> None:
        self.interval = Interval(interval)
        self.measures: dict[str, Tensor] = {}
        self._calls = 0  # of this process
        self._entered = False
        self._empty_calls = self._empty_samples = 0
        self._eval_calls = 0  # in a row
        self._probe: GradientProbe | None = None  # of the last look: the backward pass came after it
        self._warned: set[type[HealthWarning]] = set()
        self._norm = math.nan  # the student's at the run's first look
        self._contrast, self._compared = 0.0, 0  # the largest in any look, and the samples that were looked at
        self._movement = Movement()
        self._trend = Trend()

    def count(self, rows: int, inside: int, alignment: Tensor) -> None:
        """Take part in a call, measured or not: nothing is read off the device."""
        if self.interval.every is None:
            return
        self._calls += 1
        self._eval_calls = 0
        self._trend.add(alignment, inside / rows)
        self._entered |= inside > 0
        self._empty_calls = 0 if inside else self._empty_calls + 1
        self._empty_samples = 0 if inside else self._empty_samples + rows

    def measure(self, look: Look) -> None:
        """Refresh the measures: nothing is read off the device."""
        self.measures["student_norm"] = _mean_norm(look.tokens)
        if look.features is not None and look.target is not None:
            conditional, unconditional = look.features
            self.measures["contrast"] = _norm(conditional - unconditional) / _norm(conditional)
            self.measures["target_norm"] = _mean_norm([look.target])

    def judge(self, look: Look, calls: int, alignment: Tensor, subject: Subject) -> None:
        """Read off the device, at once, what was measured, and say what looks wrong.

        Args:
            look: The measured call.
            calls: Its number in the run.
            alignment: What it gave.
            subject: Whom it is of.

        Raises:
            NotFiniteError: If something is NaN or inf.
        """
        found = self._read(look, calls, alignment.detach(), subject)
        if not found["finite"]:
            raise not_finite(look, subject)
        self._judge_gradient(found.get("aligned"), subject)
        self._judge_head(found, look, subject)
        self._judge_norm(found["student_norm"], look.tokens[0].shape[-1], subject)
        self._judge_teacher(found, look, subject)
        self._judge_window(subject)
        if self.interval.regular(calls) and self._trend.close(found["sum"], calls):
            self._warn(
                AlignmentNotFallingWarning(
                    f"After {calls} calls the alignment is {self._trend.recent[-1]:.4g} inside the window, and was "
                    f"{self._trend.first:.4g} at first: it does not fall.\n"
                    "Does the optimiser hold the head (criterion.check_optimizer)? Are the latents, or the teacher's "
                    "tokens, those of the same batch in the same order as the student's? Is the learning rate right?"
                )
            )
        self._probe = look.probe if look.inside else None  # without a row inside there is no gradient

    def count_in_eval_mode(self) -> None:
        """Take part in a call in eval mode with the loss of a forward that trains, and say so where they go on."""
        self._eval_calls += 1
        if self._eval_calls < _SETTLED:
            return
        self._warn(
            EvalModeWarning(
                f"The criterion was in eval mode for {self._eval_calls} calls in a row, and the model ran in train "
                "mode with gradients: these losses are the loop's own alone, without an alignment.\n"
                "Call criterion.train() where you call model.train(). To go on without the alignment on purpose, train "
                "on your own loss, or give a stop_step."
            )
        )

    def judge_step(self, step: int, last: int, stop_step: int) -> None:
        """Say that a step came after a later one."""
        self._warn(
            StepWentBackWarning(
                f"The step went back from {last} to {step}, and the alignment stops at step {stop_step}: a step that "
                "begins anew with each epoch may never get there.\n"
                "Count the optimiser's steps over the whole run. A run that goes back to a checkpoint loads the "
                "criterion's state too."
            )
        )

    def stop(self) -> None:
        """Forget what was measured: the alignment has stopped."""
        self.measures.clear()
        self._probe = None

    def state(self) -> list[float]:
        """What a resumed run needs, as floating numbers."""
        return [self._norm, *self._trend.state()]

    def load(self, state: list[float]) -> None:
        """Go on from what :meth:`state` gave."""
        self._norm, *trend = state
        self._trend.load(trend)
        self._movement = Movement(late=True)

    def _read(self, look: Look, calls: int, alignment: Tensor, subject: Subject) -> dict[str, float]:
        """Everything that is judged, in one reading."""
        values: dict[str, Tensor] = {}
        values |= {name: self.measures[name] for name in ("student_norm", "contrast") if name in self.measures}
        values["finite"] = all_finite([*look.tokens, *(look.features or ()), alignment])
        values |= self._movement.since_start(subject.heads, subject.layers.values())
        values["sum"] = torch.as_tensor(self._trend.sum, device=alignment.device)
        if self._probe is not None and self._probe.sums is not None:
            values["aligned"] = self._probe.sums[2]
        if calls == 1 and subject.teacher is not None:
            same = same_weights(subject.layers, subject.teacher.model)
            values |= {} if same is None else {"same_weights": same}
        return dict(zip(values, torch.stack([v.float() for v in values.values()]).tolist(), strict=True))

    @property
    def _settled(self) -> bool:
        return self._calls >= _SETTLED and self._entered

    def _warn(self, warning: HealthWarning) -> None:
        if self.interval.every is not None and type(warning) not in self._warned:
            self._warned.add(type(warning))
            warnings.warn(warning, stacklevel=2)

    def _judge_gradient(self, aligned: float | None, subject: Subject) -> None:
        if self._probe is not None and self._probe.missed and self._probe.sums is None:
            self._warn(
                NoGradientWarning(
                    f"A backward pass reached {subject.named} without the alignment's gradient: nothing is aligned.\n"
                    "Call backward() on the total that the criterion returns, not on the loop's own loss: "
                    "terms.total.backward(). To measure the alignment only, say weight=0.0."
                )
            )
        if aligned == 0.0 and self._settled:
            self._warn(
                NoGradientWarning(
                    f"The alignment's gradient is exactly 0 at {subject.named}.\n"
                    "In float16 small gradients become 0 without a gradient scaler. Otherwise something cuts them: a "
                    "head whose weights are all 0, or a hook that changes gradients."
                )
            )

    def _judge_head(self, found: Mapping[str, float], look: Look, subject: Subject) -> None:
        left_out = self._movement.left_out(found, ready=self._settled and look.probe is not None)
        if left_out and NoGradientWarning not in self._warned:  # which is why it stays as it was
            self._warn(
                HeadNotTrainedWarning(
                    f"The criterion's head has stayed as it was for {self._calls} calls, while {subject.named} moves: "
                    "nothing trains it.\n"
                    "Build the optimiser from [*model.parameters(), *criterion.parameters()], after wrapping and "
                    "moving both; criterion.check_optimizer(opt) names what is missing. If nothing is: is the head "
                    "frozen, is its learning rate 0, is backward() called on another loss than terms.total?"
                )
            )

    def _judge_norm(self, norm: float, width: int, subject: Subject) -> None:
        if math.isnan(self._norm):
            self._norm = norm
        if norm > _GROWN * self._norm and norm > _LARGE * math.sqrt(width):
            self._warn(
                ExplodingFeaturesWarning(
                    f"The tokens of {subject.named} have a mean norm of {norm:.4g}; at first it was {self._norm:.4g}.\n"
                    "Lower the learning rate or the weight, clip the gradients, and see whether the denoising loss is "
                    "as it was without the alignment."
                )
            )

    def _judge_teacher(self, found: Mapping[str, float], look: Look, subject: Subject) -> None:
        if found.get("same_weights"):
            self._warn(
                SameWeightsWarning(
                    f"The student's {subject.named} holds the teacher's weights: it would be aligned with itself.\n"
                    "Stage 2 trains a new model from scratch. If it is to begin with the teacher's weights, go on."
                )
            )
        if subject.teacher is None or look.features is None:
            return
        self._contrast = max(self._contrast, found["contrast"])
        self._compared += len(look.features[0])
        if self._settled and self._compared >= _COMPARED and self._contrast < _NO_CONTRAST:
            self._warn(
                NoContrastWarning(
                    f"The condition changes the teacher's features by {self._contrast:.2g} of their norm only, so "
                    f"guidance has nothing to work with. Null condition: {subject.teacher.shown_null()}.\n"
                    "Is the null condition right, and was the teacher trained with the condition dropped at random? "
                    "Does the condition reach the teacher's layer, and was the teacher trained for long enough?"
                )
            )

    def _judge_window(self, subject: Subject) -> None:
        if self._empty_calls >= _EMPTY_CALLS and self._empty_samples >= _EMPTY_SAMPLES:
            low, high = subject.fractions.min().item(), subject.fractions.max().item()
            self._warn(
                EmptyWindowWarning(
                    f"None of the {self._empty_samples} samples of the last {self._empty_calls} calls was inside the "
                    f"window {subject.window}, which is in noise fraction; this call's go from {low:.3g} to "
                    f"{high:.3g}.\n"
                    "Is time= what the loop calls t? Does the loop draw t where the window is? window=None aligns "
                    "every sample."
                )
            )


def _norm(tensor: Tensor) -> Tensor:
    """The Euclidean norm of all values; 0-d, float32: in float16 that of finite features may be inf."""
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=torch.float32)
    return norm


def _mean_norm(tokens: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of a token's vector, averaged over samples, tokens and layers; 0-d, float32."""
    return torch.stack([found.detach().float().norm(dim=-1).mean() for found in tokens]).mean()
