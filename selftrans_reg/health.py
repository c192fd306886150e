"""Whether a run looks healthy: what a criterion measures of itself at an interval, and what it warns of."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

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
    SameWeightsWarning,
    StepWentBackWarning,
)
from .finite import all_finite, not_finite
from .gradient_probe import GradientProbe
from .intervals import Interval
from .movement import Movement, same_weights
from .names import quoted
from .teacher import CFGFeatureTeacher
from .trend import Trend

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
