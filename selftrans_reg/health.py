"""Whether a run looks healthy: what a criterion measures of itself at an interval, and what it warns of."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field

import torch
from torch import Tensor, nn

from .calls import Call
from .errors import HealthWarning, NotFiniteError
from .modules import named_layers, quoted, some_of
from .plateau import GradientProbe
from .teacher import CFGFeatureTeacher
from .tokens import tensors_in

_AVERAGED, _LATER = 100, 5  # calls that the alignment is averaged over at first; later so many times as long
_LEARNED = 2000  # calls of a run within which any head learns at least the mean of what it is to predict
_SETTLED = 20  # calls of a process that may look ill in a good run too, such as while the learning rate warms up
# With less contrast f_u + w (f_c − f_u) is f_c up to 3 % even with w = 30; trained models have 0.02 and more.
_NO_CONTRAST = 1e-3
_COMPARED = 16  # samples whose conditions a loop that drops some of them hardly ever drops all
# Norms grow while a diffusion transformer trains, by far less. Both must be passed: a layer may begin near 0.
_GROWN, _LARGE = 100.0, 100.0
# A window that takes in 1 % of all samples stays empty for so many with a probability of 2e-9.
_EMPTY_CALLS, _EMPTY_SAMPLES = 100, 2000
# gradient_ratio at the published weight: about 0.1 to 10 in good runs. A loss that is a sum over a sample's values
# shows in its own value too: so large a part of their number is beyond any mean squared error of unit latents.
_PUBLISHED_WEIGHT = 0.5
_FAINT, _SUMMED, _GONE, _DROWNING = 0.02, 0.05, 1e-3, 1e3


@dataclass
class Look:
    """What a measured call sees; it is gone when the call returns, since it holds the graph."""

    denoising: Tensor  # the loop's own loss
    probe: GradientProbe | None  # sees the gradients in the backward pass; None where the weight is 0
    call: Call  # the student's
    fractions: Tensor  # (N,), its noise fractions, or (N, T); NaN where the call has no t, and none is needed
    window: tuple[float, float] | None
    model: nn.Module  # the student
    layers: Mapping[str, nn.Module]  # the tapped ones
    heads: nn.ModuleList  # one for each layer
    teacher: CFGFeatureTeacher | None
    weight: float = _PUBLISHED_WEIGHT  # of the alignment in this call
    tokens: list[Tensor] = field(default_factory=list)  # (N, T, D) of each layer
    features: tuple[Tensor, Tensor] | None = None  # (n, T, D) twice: the teacher's (f_c, f_u)
    target: Tensor | None = None  # (n, T, D), or the latents in stage 1; None where no row was inside the window
    rows: Tensor | None = None  # (n,), which rows these are; None for all
    inside: int = 0  # how many rows are inside the window


@dataclass
class Trend:
    """The alignment of the samples inside the window, averaged over the run's first stretch and over later ones."""

    sum: Tensor | float = 0.0  # since the last stretch ended; 0-d on the device once a sample was inside
    inside: float = 0.0  # the samples of these calls that were, as shares of their batches
    calls: int = 0
    first: float = math.nan  # the run's first average; inf where that was before the run was watched

    def add(self, alignment: Tensor, inside: float) -> None:
        """Take in one call: its alignment and the share of its samples that were inside. Nothing is read."""
        self.calls += 1
        self.inside += inside
        if inside:
            self.sum = self.sum + alignment.detach()

    def close(self, total: float, calls: int) -> float:
        """End a stretch with this sum at this call of the run if it is long enough; its average, else NaN."""
        began = math.isnan(self.first)
        if self.calls < (_AVERAGED if began else _LATER * _AVERAGED) or not self.inside:
            return math.nan
        average = total / self.inside
        if began:
            self.first = average if calls - self.calls < _AVERAGED else math.inf
        self.sum, self.inside, self.calls = 0.0, 0.0, 0
        return math.nan if began else average


def same_weights(layers: Mapping[str, nn.Module], teacher: nn.Module) -> dict[str, Tensor]:
    """Whether all that trains in the layers is as in the teacher's of the same names; 0-d, bool; none if none compares.

    Frozen weights are meant to be the same: those of a base that student and teacher share.
    """
    mine = {f"{name}.{key}": p for name in layers for key, p in layers[name].named_parameters() if p.requires_grad}
    taught = {name: layer for name, layer in named_layers(teacher).items() if name in layers}
    theirs = {f"{name}.{key}": p for name in taught for key, p in taught[name].named_parameters()}
    if not mine or not mine.keys() <= theirs.keys():
        return {}
    theirs = {name: theirs[name] for name in mine}
    if any(p.is_meta or (hasattr(p, "__tensor_flatten__") and not hasattr(p, "full_tensor")) for p in theirs.values()):
        return {}  # offloaded, or quantised into several tensors
    a, b = _values(mine.values()), _values(theirs.values())
    return {"same_weights": (a == b.to(a.device)).all()} if a.shape == b.shape else {}


def _values(parameters: Iterable[nn.Parameter], each: int = 256) -> Tensor:
    """(n,), float32, a copy of the first values of each parameter."""
    found = [_local(p.detach()).flatten()[:each].float() for p in parameters]
    return torch.cat(found) if found else torch.zeros(0, device="cpu")


class Health:
    """Measures at an interval of calls, and warns of what looks wrong, once of each kind; None switches it all off."""

    def __init__(self, interval: int | None) -> None:
        self.interval = interval
        self.measures: dict[str, Tensor] = {}
        self._warned: set[str] = set()
        self._calls = 0  # of this process
        self._first_norm = math.nan  # the student's at the run's first look
        self._contrast, self._compared = 0.0, 0  # the largest in any look, and the samples that were looked at
        self._empty_calls = self._empty_samples = 0  # in a row
        self._eval_calls = 0  # in a row
        self._trend = Trend()
        self._start: tuple[Tensor, Tensor] | None = None  # heads and layers as at the first look
        self._entered = False
        self._probe: GradientProbe | None = None  # of the last look: the backward pass came after it
        self._weight = _PUBLISHED_WEIGHT  # of the last look

    def count(self, rows: int, inside: int, alignment: Tensor) -> None:
        """Take part in a call, measured or not: nothing is read off the device."""
        if self.interval is None:
            return
        self._calls += 1
        self._eval_calls = 0
        self._trend.add(alignment, inside / rows if rows else 0.0)
        self._entered |= inside > 0
        self._empty_calls = 0 if inside else self._empty_calls + 1
        self._empty_samples = 0 if inside else self._empty_samples + rows

    def measure(self, look: Look) -> None:
        """Refresh the measures: nothing is read off the device."""
        self.measures["student_norm"] = _mean_norm(look.tokens)
        if look.features is not None and look.target is not None:
            f_c, f_u = look.features
            whole, changed = (torch.linalg.vector_norm(f, dtype=torch.float32) for f in (f_c, f_c - f_u))
            self.measures["contrast"] = changed / whole  # in float16 the norm of finite features may be inf
            self.measures["target_norm"] = _mean_norm([look.target])

    def judge(self, look: Look, calls: int, alignment: Tensor) -> None:
        """Read off the device, at once, what was measured in this call of the run, and say what looks wrong.

        Raises:
            NotFiniteError: If something is NaN or inf.
        """
        found = self._read(look, calls, alignment.detach())
        if not found["finite"]:
            raise not_finite(look)
        if math.isnan(self._first_norm):
            self._first_norm = found["student_norm"]
        if look.features is not None:
            self._contrast = max(self._contrast, found["contrast"])
            self._compared += len(look.features[0])
        for message in self._complaints(look, found, calls):
            self.warn(message)
        self._probe = look.probe if look.inside else None  # without a row inside there is no gradient
        self._weight = look.weight

    def _complaints(self, look: Look, f: Mapping[str, float], calls: int) -> Iterator[str]:
        """What looks wrong, each as its kind and what to do: of the last look's gradients, then of this call."""
        layers = f"layer{'s' * (len(look.layers) > 1)} {quoted(look.layers)}"
        settled = self._calls >= _SETTLED and self._entered
        if self._probe is not None and self._probe.missed and self._probe.sums is None:
            yield (
                f"no_gradient: A backward pass reached {layers} without the alignment's gradient: nothing is aligned.\n"
                "Call terms.total.backward(), not backward() of the loop's own loss; to measure only, pass weight=0.0."
            )
        if f["aligned"] == 0.0 and settled:
            yield (
                f"no_gradient: The alignment's gradient is exactly 0 at {layers}.\n"
                "Use a gradient scaler with float16. Without float16, look for a head whose weights are all 0."
            )
        # Without a gradient it stays as it is.
        if settled and look.probe and f["layers_moved"] > f["heads_moved"] and "no_gradient" not in self._warned:
            yield (
                f"head_not_trained: The criterion's head has not changed in {self._calls} calls, while {layers} has: "
                "nothing trains it.\nBuild the optimiser from [*model.parameters(), *criterion.parameters()], after "
                "wrapping and moving both; criterion.check_optimizer(opt) names what is missing. If nothing is, the "
                "head is frozen or its learning rate is 0."
            )
        # Without a gradient of the loop's own, as of a last layer that begins at 0, there is no ratio.
        scale = _PUBLISHED_WEIGHT / self._weight if self._weight else math.nan
        ratio = scale * math.sqrt(f["aligned"] / f["own"]) if f["own"] > 0 else math.nan
        values = math.prod(look.call.x_t.shape[1:])
        if settled and ((ratio < _FAINT and abs(f["loss"]) > _SUMMED * values) or 0 < ratio < _GONE):
            yield (
                f"loss_scale: At {layers} the alignment's gradient is only {ratio:.2g} times that of the loop's own "
                "loss (at the published weight of 0.5), so it has next to no effect. The loop's loss is "
                f"{f['loss']:.4g}.\n"
                f"If that loss is a sum over the {values} values of a sample, pass their mean, and scale the total: "
                f"(terms.total * {values}).backward(). Or pass weight= as many times larger."
            )
        if ratio > _DROWNING and calls >= _LEARNED:
            yield (
                f"loss_scale: At {layers} the alignment's gradient is {ratio:.2g} times that of the loop's own loss "
                f"(at the published weight of 0.5), so the loss hardly counts. The loop's loss is {f['loss']:.4g}.\n"
                "If that loss is divided by the steps of accumulation, pass it undivided, and divide the total."
            )

        if f["student_norm"] > max(_GROWN * self._first_norm, _LARGE * math.sqrt(look.tokens[0].shape[-1])):
            yield (
                f"exploding_features: The tokens of {layers} have a mean norm of {f['student_norm']:.4g}; at first it "
                f"was {self._first_norm:.4g}.\nLower the learning rate or the weight, or clip the gradients."
            )
        if f["same_weights"] == 1:
            yield (
                f"same_weights: The student's {layers} has the teacher's weights, so it would be aligned with itself.\n"
                "Stage 2 trains a new model from scratch. If that is meant to start as the teacher, ignore this."
            )
        if settled and self._compared >= _COMPARED and self._contrast < _NO_CONTRAST:
            null = "none" if look.teacher is None else look.teacher.null_condition
            yield (
                f"no_contrast: The condition changes the teacher's features by only {self._contrast:.2g} of their "
                f"norm, so guidance has nothing to work with. Null condition: {null}.\n"
                "Check the null condition, and that the teacher is trained, with the condition dropped at random."
            )
        if self._empty_calls >= _EMPTY_CALLS and self._empty_samples >= _EMPTY_SAMPLES:
            yield (
                f"empty_window: None of the {self._empty_samples} samples of the last {self._empty_calls} calls was "
                f"inside the window {look.window}, which is in noise fraction; those of this call range from "
                f"{f['low']:.3g} to {f['high']:.3g}.\nCheck that time= is what the loop calls t. window=None aligns "
                "every sample."
            )
        average = self._trend.close(f["sum"], calls) if self.interval and calls % self.interval == 0 else math.nan
        fixed = look.teacher is None or not look.teacher.refreshed  # what is aligned with
        if fixed and calls >= _LEARNED and average >= self._trend.first:
            yield (
                f"alignment_not_falling: After {calls} calls the alignment is {average:.4g} inside the window, and was "
                f"{self._trend.first:.4g} at first: it does not fall.\n"
                "Make sure that the optimiser holds the head (criterion.check_optimizer), and that the latents, or the "
                "teacher's tokens, are those of the same batch in the same order as the student's."
            )

    def count_in_eval_mode(self) -> None:
        """Take part in a call in eval mode with the loss of a forward that trains, and say so where they go on."""
        self._eval_calls += 1
        if self._eval_calls >= _SETTLED:
            self.warn(
                f"eval_mode: The criterion was in eval mode for {self._eval_calls} calls in a row, while the model ran "
                "in train mode with gradients: these losses are the loop's own alone, without an alignment.\n"
                "Call criterion.train() where you call model.train(), or train on your own loss.",
            )

    def judge_step(self, step: int, last: int, stop_step: int) -> None:
        """Say that a step came after a later one."""
        self.warn(
            f"step_went_back: The step went back from {last} to {step}, and the alignment stops at step {stop_step}: a "
            "count that starts again with each epoch may never get there.\n"
            "Count the optimiser's steps over the whole run, and load the criterion's state when you go back.",
        )

    def warn(self, message: str) -> None:
        """Warn, unless a warning of the kind that it begins with was given before, or all of it is switched off."""
        warning = HealthWarning(message)
        if self.interval is not None and warning.kind not in self._warned:
            self._warned.add(warning.kind)
            warnings.warn(warning, stacklevel=2)

    def stop(self) -> None:
        """Forget what was measured: the alignment has stopped."""
        self.measures.clear()
        self._probe = None

    def state(self) -> list[float]:
        """What a resumed run needs, as floating numbers."""
        return [self._first_norm, *map(float, astuple(self._trend))]

    def load(self, state: Sequence[float]) -> None:
        """Go on from what :meth:`state` gave."""
        self._first_norm, total, inside, calls, first = state
        self._trend = Trend(total, inside, int(calls), first)
        self._start = None

    def _read(self, look: Look, calls: int, alignment: Tensor) -> dict[str, float]:
        """Everything that is judged, in one reading; NaN for what there is nothing to read of."""
        values = dict(self.measures)
        checked = [*look.tokens, *(look.features or ()), alignment]
        values["finite"] = torch.stack([tensor.isfinite().all() for tensor in checked]).all()
        values["loss"] = look.denoising.detach().mean()
        values["low"], values["high"] = look.fractions.min(), look.fractions.max()
        values["sum"] = torch.as_tensor(self._trend.sum, device=alignment.device)
        values |= self._moved(look)
        if self._probe is not None and self._probe.sums is not None:
            _, values["own"], values["aligned"] = self._probe.sums
        if calls == 1 and look.teacher is not None:
            values |= same_weights(look.layers, look.teacher.model)
        read = torch.stack([value.float() for value in values.values()]).tolist()
        there = dict(zip(values, read, strict=True))
        return dict.fromkeys(("own", "aligned", "same_weights", "heads_moved", "layers_moved"), math.nan) | there

    def _moved(self, look: Look) -> dict[str, Tensor]:
        """Whether heads and layers differ from what they were at the first look; 0-d, bool; none if that is no sign."""
        trained = [p for layer in look.layers.values() for p in layer.parameters() if p.requires_grad]
        now = _values(look.heads.parameters()), _values(trained)
        start = self._start or now
        if any((a.shape, a.device) != (b.shape, b.device) for a, b in zip(start, now, strict=True)):
            start = now  # they were moved, or wrapped anew
        self._start = start
        if not all(len(values) for values in now):
            return {}
        return {"heads_moved": (start[0] != now[0]).any(), "layers_moved": (start[1] != now[1]).any()}


_BACK = "Go back to an earlier checkpoint and set health_interval=1: the call in which it begins then names the cause."
_REBUILD = "A teacher does not train, so its checkpoint or a cast made them: build it from another, or in float32."


def not_finite(look: Look) -> NotFiniteError:
    """What to say of a call in which something is NaN or inf, the first cause first."""
    fractions, teacher = look.fractions, look.teacher
    for layer, tokens in zip(look.layers, look.tokens, strict=True):
        if (bad := _bad_rows(tokens)).any():
            cause = _cause(look.model, _BACK, look.call)
            return NotFiniteError(f"The student's layer {layer!r} gave NaN or inf {_where(bad, fractions)}.\n{cause}")
    assert look.target is not None  # with no row inside the window nothing else was computed
    if look.rows is not None:
        fractions = fractions[look.rows]
    if teacher is not None and look.features is not None:
        with_what = {"the condition": _bad_rows(look.features[0]), "the null condition": _bad_rows(look.features[1])}
        if (bad := torch.stack(list(with_what.values())).any(0)).any():
            named = " and with ".join(name for name, found in with_what.items() if found.any())
            cause = _cause(teacher.model, _REBUILD, look.call)
            return NotFiniteError(
                f"The teacher's layer {teacher.layer!r} gave NaN or inf with {named} {_where(bad, fractions)}.\n{cause}"
            )
    elif (bad := _bad_rows(look.target)).any():
        return NotFiniteError(f"The latents to align with hold NaN or inf {_where(bad, fractions)}.")
    return NotFiniteError(
        "The alignment is NaN or inf, although the layer's tokens and what they are aligned with are finite.\n"
        + _cause(look.heads, _BACK, prefix="heads.")
    )


def _local(tensor: Tensor) -> Tensor:
    """A sharded tensor's part on this rank; any other tensor as it is."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def _bad_rows(tensor: Tensor) -> Tensor:
    return ~tensor.detach().flatten(1).isfinite().all(1)


def _where(bad: Tensor, fractions: Tensor) -> str:
    found = fractions[bad].float()
    low, high = (f"{value:.2f}" for value in (found.min().item(), found.max().item()))
    at = f"noise fraction {low}" if low == high else f"noise fractions from {low} to {high}"
    return f"in {int(bad.sum())} of {len(bad)} samples" + (f", at {at}" if low != "nan" else "")


def _cause(model: nn.Module, advice: str, call: Call | None = None, prefix: str = "") -> str:
    """The first that holds: the call's arguments, the model's weights, or an overflow."""
    tensors = [found for name, value in (call.arguments if call else {}).items() for found in tensors_in(value, name)]
    if bad := [path for path, tensor in tensors if tensor.is_floating_point() and not tensor.isfinite().all()]:
        return f"The model was called with NaN or inf in {quoted(bad)}: look at what the loop makes it of."
    if bad := [f"{prefix}{name}" for name, p in model.named_parameters() if not _local(p.detach()).isfinite().all()]:
        return f"NaN or inf is in {len(bad)} of its parameters already: {some_of(bad)}.\n{advice}"
    return (
        "What goes in and all weights are finite, so a value overflowed on the way. Use bfloat16, float32 or autocast "
        "where it is float16."
    )


def _mean_norm(tokens: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of a token's vector, averaged over samples, tokens and layers; 0-d, float32."""
    return torch.stack([found.detach().float().norm(dim=-1).mean() for found in tokens]).mean()
