"""Whether a run looks healthy: what a criterion measures of itself at an interval, and what it warns of."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from .calls import Call
from .errors import HealthWarning, NotFiniteError
from .modules import named_layers, quoted, sharded_parts, unwrap
from .plateau import GradientProbe
from .teacher import CFGFeatureTeacher
from .tokens import tensors_in

# The alignment is averaged over at least so many calls, and so many averages are compared with the first.
_AVERAGED, _RECENT = 100, 5
# Within so many calls of a run any head learns at least the mean of what it is to predict.
_LEARNED = 2000
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
    taught: Call | None = None  # the call as the teacher was shown it
    features: tuple[Tensor, Tensor] | None = None  # (n, T, D) twice: the teacher's (f_c, f_u)
    target: Tensor | None = None  # (n, T, D), or the latents in stage 1; None where no row was inside the window
    rows: Tensor | None = None  # (n,), which rows these are; None for all
    inside: int = 0  # how many rows are inside the window

    def branch(self, tensor: Tensor) -> Tensor:
        """A tapped tensor, as the alignment is to be computed from it."""
        return tensor if self.probe is None else self.probe.branch(tensor, self.denoising)

    @property
    def named(self) -> str:
        """The layers, for messages."""
        return f"layer{'s' * (len(self.layers) > 1)} {quoted(self.layers)}"

    @property
    def values(self) -> int:
        """How many values a sample has."""
        return self.call.x_t[0].numel()

    @property
    def width(self) -> int:
        """D."""
        return self.tokens[0].shape[-1]

    @property
    def null(self) -> str:
        """The teacher's null condition, for messages."""
        return "none" if self.teacher is None else self.teacher.shown_null()


class Trend:
    """The alignment of the samples inside the window, averaged over stretches of the run."""

    def __init__(self) -> None:
        self.sum: Tensor | float = 0.0  # since the last stretch ended; 0-d on the device once a sample was inside
        self.first = math.nan  # the run's first average; inf where that was before the run was watched
        self.recent: list[float] = []  # the latest averages, oldest first
        self._inside, self._calls = 0.0, 0

    def add(self, alignment: Tensor, inside: float) -> None:
        """Take in one call: its alignment and the share of its samples that were inside. Nothing is read."""
        self._calls += 1
        self._inside += inside
        if inside:
            self.sum = self.sum + alignment.detach()

    def close(self, total: float, calls: int) -> bool:
        """End a stretch with this sum at this call of the run, if it is long enough.

        Returns:
            Whether the alignment should have fallen and has not.
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

    def load(self, state: Sequence[float]) -> None:
        """Go on from what :meth:`state` gave."""
        self.sum, self._inside, calls, self.first, *recent = state
        self._calls, self.recent = int(calls), [value for value in recent if not math.isnan(value)]


class Movement:
    """Whether the heads move while the tapped layers do; ``late`` in a run, a small step may round to none."""

    def __init__(self, late: bool = False) -> None:
        self._late = late
        self._watching = True
        self._start: list[Tensor] = []

    def since_start(self, look: Look) -> dict[str, Tensor]:
        """Whether heads and layers differ from what they were at the first call of this; 0-d, bool.

        Nothing at that first call, where the layers train nothing, and once :meth:`left_out` knows.
        """
        if not self._watching:
            return {}
        heads = list(look.heads.parameters())
        trained = [p for layer in look.layers.values() for p in layer.parameters() if p.requires_grad]
        start, now = self._start, [_values(heads), _values(trained)]
        if not start:
            rounds = self._late and any(p.dtype in (torch.bfloat16, torch.float16) for p in heads)
            self._start, self._watching = now, all(len(values) for values in now) and not rounds
            return {}
        self._watching = [then.shape for then in start] == [found.shape for found in now]  # else it was wrapped anew
        if not self._watching:
            return {}
        return {"heads_moved": (start[0] != now[0]).any(), "layers_moved": (start[1] != now[1]).any()}

    def left_out(self, found: Mapping[str, float], ready: bool) -> bool:
        """Whether the layers moved and the heads did not, once ``ready``; what was found is as :meth:`since_start`."""
        if "heads_moved" not in found or not (found["heads_moved"] or (ready and found["layers_moved"])):
            return False
        self._watching, self._start = False, []
        return not found["heads_moved"]


def same_weights(layers: Mapping[str, nn.Module], teacher: nn.Module) -> Tensor | None:
    """Whether all that trains in the layers is as in the teacher's of the same names; 0-d, bool; None if none compares.

    Frozen weights are meant to be the same: those of a base that student and teacher share.
    """
    taught, pairs = named_layers(teacher), []
    for name, layer in layers.items():
        mine = {key: p for key, p in layer.named_parameters() if p.requires_grad}
        theirs = dict(taught[name].named_parameters()) if name in taught else {}
        if not mine or not mine.keys() <= theirs.keys() or any(_is_elsewhere(theirs[key]) for key in mine):
            return None
        pairs.append((_values(mine.values()), _values(theirs[key] for key in mine)))
    if any(a.shape != b.shape for a, b in pairs):
        return None
    return torch.stack([(a == b.to(a.device)).all() for a, b in pairs]).all()


def _is_elsewhere(p: Tensor) -> bool:
    """Whether a tensor's values are offloaded, or quantised into several tensors."""
    return p.is_meta or (hasattr(p, "__tensor_flatten__") and not hasattr(p, "full_tensor"))


def _values(parameters: Iterable[nn.Parameter], each: int = 256) -> Tensor:
    """(n,), float32, a copy of the first values of each parameter."""
    found = [local(p.detach()).flatten()[:each].float() for p in parameters]
    return torch.cat(found) if found else torch.zeros(0, device="cpu")


class Health:
    """Measures at an interval, and warns of what looks wrong, once of each kind.

    Args:
        interval: Calls from one look to the next; None switches all of it off.
    """

    def __init__(self, interval: int | None) -> None:
        self.interval = interval
        self.measures: dict[str, Tensor] = {}
        self.warned: set[str] = set()
        self.calls = 0  # of this process
        self.first_norm = math.nan  # the student's at the run's first look
        self.contrast, self.compared = 0.0, 0  # the largest in any look, and the samples that were looked at
        self.empty_calls = self.empty_samples = 0
        self.trend = Trend()
        self._entered = False
        self._eval_calls = 0  # in a row
        self._probe: GradientProbe | None = None  # of the last look: the backward pass came after it
        self._weight = _PUBLISHED_WEIGHT  # of the last look
        self._movement = Movement()

    @property
    def settled(self) -> bool:
        """Whether the process is past what the first steps of a good run may look like."""
        return self.calls >= _SETTLED and self._entered

    @property
    def missed(self) -> bool:
        """Whether the backward pass of the last look went by without the alignment."""
        return self._probe is not None and self._probe.missed and self._probe.sums is None

    def count(self, rows: int, inside: int, alignment: Tensor) -> None:
        """Take part in a call, measured or not: nothing is read off the device."""
        if self.interval is None:
            return
        self.calls += 1
        self._eval_calls = 0
        self.trend.add(alignment, inside / rows if rows else 0.0)
        self._entered |= inside > 0
        self.empty_calls = 0 if inside else self.empty_calls + 1
        self.empty_samples = 0 if inside else self.empty_samples + rows

    def measure(self, look: Look) -> None:
        """Refresh the measures: nothing is read off the device."""
        self.measures["student_norm"] = _mean_norm(look.tokens)
        if look.features is not None and look.target is not None:
            conditional, unconditional = look.features
            self.measures["contrast"] = _norm(conditional - unconditional) / _norm(conditional)
            self.measures["target_norm"] = _mean_norm([look.target])

    def judge(self, look: Look, calls: int, alignment: Tensor) -> None:
        """Read off the device, at once, what was measured in this call of the run, and say what looks wrong.

        Raises:
            NotFiniteError: If something is NaN or inf.
        """
        found = self._read(look, calls, alignment.detach())
        if not found["finite"]:
            raise not_finite(look)
        if math.isnan(self.first_norm):
            self.first_norm = found["student_norm"]
        if look.features is not None:
            self.contrast = max(self.contrast, found["contrast"])
            self.compared += len(look.features[0])
        found["run"] = calls
        # Without a gradient of the loop's own, as of a last layer that begins at 0, there is no ratio.
        scale = _PUBLISHED_WEIGHT / self._weight if self._weight else math.nan
        found["ratio"] = scale * math.sqrt(found["aligned"] / found["own"]) if found["own"] > 0 else math.nan
        found["head_left_out"] = self._movement.left_out(found, ready=self.settled and look.probe is not None)
        found["not_falling"] = (
            self.interval is not None and calls % self.interval == 0 and self.trend.close(found["sum"], calls)
        )
        found["latest"] = self.trend.recent[-1] if self.trend.recent else math.nan
        for kind, holds, message in _SIGNS:
            if holds(self, look, found):
                self.warn(kind, message.format(health=self, look=look, **found))
        self._probe = look.probe if look.inside else None  # without a row inside there is no gradient
        self._weight = look.weight

    def count_in_eval_mode(self) -> None:
        """Take part in a call in eval mode with the loss of a forward that trains, and say so where they go on."""
        self._eval_calls += 1
        if self._eval_calls >= _SETTLED:
            self.warn(
                "eval_mode",
                f"The criterion was in eval mode for {self._eval_calls} calls in a row, while the model ran in train "
                "mode with gradients: these losses are the loop's own alone, without an alignment.\n"
                "Call criterion.train() where you call model.train(). To go on without the alignment on purpose, train "
                "on your own loss, or give a stop_step.",
            )

    def judge_step(self, step: int, last: int, stop_step: int) -> None:
        """Say that a step came after a later one."""
        self.warn(
            "step_went_back",
            f"The step went back from {last} to {step}, and the alignment stops at step {stop_step}: a count that "
            "starts again with each epoch may never get there.\n"
            "Count the optimiser's steps over the whole run. A run that goes back to a checkpoint loads the "
            "criterion's state too.",
        )

    def warn(self, kind: str, message: str) -> None:
        """Warn, unless a warning of this kind was given before, or all of it is switched off."""
        if self.interval is not None and kind not in self.warned:
            self.warned.add(kind)
            warnings.warn(HealthWarning(f"{kind}: {message}"), stacklevel=2)

    def stop(self) -> None:
        """Forget what was measured: the alignment has stopped."""
        self.measures.clear()
        self._probe = None

    def state(self) -> list[float]:
        """What a resumed run needs, as floating numbers."""
        return [self.first_norm, *self.trend.state()]

    def load(self, state: Sequence[float]) -> None:
        """Go on from what :meth:`state` gave."""
        self.first_norm, *trend = state
        self.trend.load(trend)
        self._movement = Movement(late=True)

    def _read(self, look: Look, calls: int, alignment: Tensor) -> dict[str, float]:
        """Everything that is judged, in one reading; NaN for what there is nothing to read of."""
        values = dict(self.measures)
        values["finite"] = all_finite([*look.tokens, *(look.features or ()), alignment])
        values["loss"] = look.denoising.detach().mean()
        values["low"], values["high"] = look.fractions.min(), look.fractions.max()
        values["sum"] = torch.as_tensor(self.trend.sum, device=alignment.device)
        values |= self._movement.since_start(look)
        if self._probe is not None and self._probe.sums is not None:
            _, values["own"], values["aligned"] = self._probe.sums
        same = same_weights(look.layers, look.teacher.model) if calls == 1 and look.teacher is not None else None
        values |= {} if same is None else {"same_weights": same}
        read = torch.stack([value.float() for value in values.values()]).tolist()
        return dict.fromkeys(("own", "aligned", "same_weights"), math.nan) | dict(zip(values, read, strict=True))


# What looks wrong: its kind, when, and what is said of it. `f` is what the call's reading gave, by name.
_SIGNS: tuple[tuple[str, Callable[[Health, Look, Mapping[str, float]], object], str], ...] = (
    (
        "no_gradient",
        lambda health, look, f: health.missed,
        "A backward pass reached {look.named} without the alignment's gradient: nothing is aligned.\n"
        "Call backward() on the total that the criterion returns, not on the loop's own loss: terms.total.backward(). "
        "To measure the alignment only, pass weight=0.0.",
    ),
    (
        "no_gradient",
        lambda health, look, f: f["aligned"] == 0.0 and health.settled,
        "The alignment's gradient is exactly 0 at {look.named}.\n"
        "In float16 small gradients become 0 without a gradient scaler. Otherwise something cuts them off: a head "
        "whose weights are all 0, or a hook that changes gradients.",
    ),
    (
        "head_not_trained",
        # without a gradient it stays as it is, and that has been said
        lambda health, look, f: f["head_left_out"] and "no_gradient" not in health.warned,
        "The criterion's head has not changed in {health.calls} calls, while {look.named} has: nothing trains it.\n"
        "Build the optimiser from [*model.parameters(), *criterion.parameters()], after wrapping and moving both; "
        "criterion.check_optimizer(opt) names what is missing. If nothing is: is the head frozen, is its learning "
        "rate 0, is backward() called on another loss than terms.total?",
    ),
    (
        "loss_scale",
        lambda health, look, f: (
            health.settled
            and ((f["ratio"] < _FAINT and abs(f["loss"]) > _SUMMED * look.values) or 0 < f["ratio"] < _GONE)
        ),
        "At {look.named} the alignment's gradient is only {ratio:.2g} times that of the loop's own loss (at the "
        "published weight of 0.5), so it has next to no effect. The loop's loss is {loss:.4g}.\n"
        "Is that loss a sum over the {look.values} values of a sample rather than their mean? Then pass the mean, and "
        "scale the total: (terms.total * {look.values}).backward(). Or pass weight= as many times larger.",
    ),
    (
        "loss_scale",
        lambda health, look, f: f["ratio"] > _DROWNING and f["run"] >= _LEARNED,
        "At {look.named} the alignment's gradient is {ratio:.2g} times that of the loop's own loss (at the published "
        "weight of 0.5), so the loss hardly counts. The loop's loss is {loss:.4g}.\n"
        "Is that loss divided before the criterion gets it, by the steps of accumulation for instance? Pass the mean "
        "over the batch, and divide the total instead.",
    ),
    (
        "exploding_features",
        lambda health, look, f: f["student_norm"] > max(_GROWN * health.first_norm, _LARGE * math.sqrt(look.width)),
        "The tokens of {look.named} have a mean norm of {student_norm:.4g}; at first it was {health.first_norm:.4g}.\n"
        "Lower the learning rate or the weight, clip the gradients, and check that the denoising loss is what it was "
        "without the alignment.",
    ),
    (
        "same_weights",
        lambda health, look, f: f["same_weights"] == 1,
        "The student's {look.named} has the teacher's weights, so it would be aligned with itself.\n"
        "Stage 2 trains a new model from scratch. If it is meant to start from the teacher's weights, ignore this.",
    ),
    (
        "no_contrast",
        lambda health, look, f: health.settled and health.compared >= _COMPARED and health.contrast < _NO_CONTRAST,
        "The condition changes the teacher's features by only {health.contrast:.2g} of their norm, so guidance has "
        "nothing to work with. Null condition: {look.null}.\n"
        "Is the null condition right, and was the teacher trained with the condition dropped at random? Does the "
        "condition reach the teacher's layer, and was the teacher trained for long enough?",
    ),
    (
        "empty_window",
        lambda health, look, f: health.empty_calls >= _EMPTY_CALLS and health.empty_samples >= _EMPTY_SAMPLES,
        "None of the {health.empty_samples} samples of the last {health.empty_calls} calls was inside the window "
        "{look.window}, which is in noise fraction; those of this call range from {low:.3g} to {high:.3g}.\n"
        "Is time= what the loop calls t? Does the loop draw any t inside the window? window=None aligns every sample.",
    ),
    (
        "alignment_not_falling",
        lambda health, look, f: f["not_falling"],
        "After {run:.0f} calls the alignment is {latest:.4g} inside the window, and was {health.trend.first:.4g} at "
        "first: it does not fall.\n"
        "Does the optimiser hold the head (criterion.check_optimizer)? Are the latents, or the teacher's tokens, those "
        "of the same batch in the same order as the student's? Is the learning rate right?",
    ),
)


_BACK = (
    "Go back to an earlier checkpoint and set health_interval=1: the call in which it begins then says where it comes "
    "from. If nothing else is named, clip the gradients or lower the learning rate."
)
_REBUILD = (
    "A teacher does not train: its checkpoint has them already, or a cast to half precision made them. Build it from "
    "another checkpoint, or in float32."
)


def not_finite(look: Look) -> NotFiniteError:
    """What to say of a call in which something is NaN or inf, the first cause first."""
    call, fractions, teacher = look.call, look.fractions, look.teacher
    for layer, tokens in zip(look.layers, look.tokens, strict=True):
        if (bad := _bad_rows(tokens)).any():
            cause = [*_in_arguments(call), *_in_weights(look.model, _BACK), _overflowed("up to there")][0]
            return NotFiniteError(f"The student's layer {layer!r} gave NaN or inf {_where(bad, fractions)}.\n{cause}")
    assert look.target is not None  # with no row inside the window nothing else was computed
    if look.rows is not None:
        fractions = fractions[look.rows]
    if teacher is not None and look.features is not None:
        with_what = {"the condition": _bad_rows(look.features[0]), "the null condition": _bad_rows(look.features[1])}
        if (bad := torch.stack(list(with_what.values())).any(0)).any():
            named = " and with ".join(name for name, found in with_what.items() if found.any())
            causes = _in_arguments(call) + _in_weights(teacher.model, _REBUILD)
            return NotFiniteError(
                f"The teacher's layer {teacher.layer!r} gave NaN or inf with {named} {_where(bad, fractions)}.\n"
                f"{causes[0] if causes else _overflowed(_first_module(teacher, look))}"
            )
    elif (bad := _bad_rows(look.target)).any():
        return NotFiniteError(f"The latents to align with hold NaN or inf {_where(bad, fractions)}.")
    cause = [*_in_weights(look.heads, _BACK, "heads."), _overflowed("in the head or the distance")][0]
    return NotFiniteError(
        "The alignment is NaN or inf, although the layer's tokens and what they are aligned with are finite.\n" + cause
    )


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """0-d, bool: whether every value is neither NaN nor inf."""
    return torch.stack([tensor.detach().isfinite().all() for tensor in tensors]).all()


def local(tensor: Tensor) -> Tensor:
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
    return (
        f"What goes in and all weights are finite, so a value overflowed {where}. Use bfloat16 or float32 where it is "
        "float16, and autocast rather than a model in half precision."
    )


def _first_module(teacher: CFGFeatureTeacher, look: Look) -> str:
    """Where the teacher first gives NaN or inf: it is run again."""
    if sharded_parts(teacher.model):  # running it takes all ranks
        return "up to there"
    found: list[str] = []

    def see(name: str, output: Any) -> None:
        if not found and any(t.is_floating_point() and not t.isfinite().all() for _, t in tensors_in(output)):
            found.append(name)

    layers = {module: name for name, module in named_layers(teacher.model).items()}
    handles = [
        module.register_forward_hook(lambda module, args, output, name=name: see(name, output))
        for module, name in layers.items()
        if module is not unwrap(teacher.model)
    ]
    try:
        teacher.features(look.taught or look.call, look.rows)
    finally:
        for handle in handles:
            handle.remove()
    return f"in {(found or [teacher.layer])[0]!r}"


def _norm(tensor: Tensor) -> Tensor:
    """The Euclidean norm of all values; 0-d, float32: in float16 that of finite features may be inf."""
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=torch.float32)
    return norm


def _mean_norm(tokens: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of a token's vector, averaged over samples, tokens and layers; 0-d, float32."""
    return torch.stack([found.detach().float().norm(dim=-1).mean() for found in tokens]).mean()
