"""The combined loss: it watches the model through hooks and adds the alignment to the loop's own loss."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex, cast

import torch
from torch import Tensor, nn

from .alignment import Gated, align, check_batch, check_denoising, check_teacher, check_time, gate, unsynchronised
from .calls import Call, CallSpec
from .errors import CaptureError, SettingError, TeacherError
from .heads import Head, ProjectionHead, VAEAlignmentLoss, zero_of
from .health import Health, Look
from .modules import Layout, bare_key, device_of, find_layer, layer_names, quoted, resolve_width
from .plateau import GradientProbe, PlateauRule
from .settings import FIELDS, MAX_STEP, Common, RunState, Settings, Target, shown
from .taps import Recorder
from .teacher import CFGFeatureTeacher
from .time import TimeConvention, resolve
from .tokens import described

if TYPE_CHECKING:
    from typing_extensions import Unpack

# A mistake in a new loop shows in the first calls of a process, and is cheap to find there.
_FIRST = 3


class LossTerms(NamedTuple):
    """The terms of one call: 0-d tensors on the model's device, all but ``total`` detached.

    Attributes:
        total: denoising + weight * alignment, to call ``backward()`` on.
        denoising: The loop's own loss, averaged.
        alignment: The alignment, averaged over the whole batch with samples outside the window counted as 0.
        weight: The factor applied to the alignment at this step.
        in_window: The fraction of the batch inside the window; 0 in eval mode and from ``stop_step`` on.
    """

    total: Tensor
    denoising: Tensor
    alignment: Tensor
    weight: Tensor
    in_window: Tensor


class SelfTransLoss(nn.Module):
    """Denoising loss plus the alignment of Self-Transcendence. Made by :meth:`stage1` or :meth:`stage2`.

    Hooks record the model's own call while the loop runs it; ``criterion(loss)`` then computes::

        total = denoising + weight · alignment
        alignment = (1/N) Σ_i 1[t_i inside the window] · distance_i

    with the distance of each sample averaged over tokens and channels, in float32. The mean is over the *whole* batch,
    so that averages over ranks and over equal micro-batches are the global value. Only rows inside the window pass
    through head and teacher. ``gating="released"`` computes what the released code does instead: mean(mask) ·
    mean(distance), over every sample.

    Head and teacher run under the autocast that the tapped layer ran under. The criterion's parameters are the head's:
    give them to the optimiser. Its state dict holds the head and one small extra state, nothing of the model or
    the teacher. ``.to()`` moves the teacher too. The global random number generator is never advanced.

    Both stages take these settings, which can be read off the criterion by their names; only ``weight`` can be changed
    once it is built:

    - ``weight=0.5``: λ. With 0 the alignment is only measured.
    - ``distance="mse"``: or ``"cosine"`` or ``"smooth_l1"``, of :func:`feature_alignment`.
    - ``window=(0.4, 0.7)``: the noise fractions at which the alignment applies, closed at both ends; None for all.
    - ``gating="per-sample"`` or ``"released"``, as above.
    - ``stop_step=None``: from that step on the alignment is 0, and the teacher is not run.
    - ``schedule="constant"``: or ``"linear"`` or ``"cosine"``, a decay of the weight to 0 at ``stop_step``.
    - ``call=None``: x_t is the first argument; t is the one with a usual name (``t``, ``timestep``, ``sigma``, ...) if
      there is exactly one, else the second. ``dict(x=..., t=...)`` names others, or gives callables from the call's
      arguments by name to x_t (N, ...) and t (N,) or, one a token, (N, T).
    - ``select=None``, ``tokens=None``: which tensor of the layer's output, and which of its tokens: see
      :class:`FeatureTap`.
    - ``forward=None``: which of several forwards before one call counts, ``"first"`` or ``"last"``; None refuses them.
    - ``eval_mode=False``: True for a loop that trains the model in eval mode, as sd-scripts and musubi-tuner do: a
      forward with gradients enabled then counts whatever the mode.
    - ``check_interval=1000``: what has to be read off the device (the range of t, x_t against the latents) is checked
      in the first three calls and then at this interval; None switches that off.
    - ``health_interval=100``: in the first three calls and then at this interval the criterion takes
      :attr:`measures`, warns once of each thing that looks wrong, and raises an error for NaN or inf. Other calls read
      nothing off the device. None switches that off.
    - ``stop_when=None``: a :class:`Plateau`, which stops the alignment by itself, as ``stop_step`` does.

    Reference: Sun et al., 2026, https://arxiv.org/abs/2601.07773
    """

    if TYPE_CHECKING:  # for nn.Module a call is of anything and gives anything

        def __call__(self, denoising: Tensor, latents: Tensor | None = None, step: int | None = None) -> LossTerms:
            """As :meth:`forward`."""

    _recorder: Recorder[Gated] | None = None

    def __init__(
        self, model: nn.Module, heads: Iterable[Head], settings: Settings, teacher: CFGFeatureTeacher | None = None
    ) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)
        self._teacher = [teacher]  # in a list: to nn.Module the teacher is no part of the criterion
        self._taught_by: str | None = None  # whose state it is, once the teacher is gone
        self._step = -1
        self._calls = 0  # of the run
        self._seen = 0  # of this process: a resumed run is looked at anew
        self._changes_allowed = False
        self._health = Health(settings.health_interval)
        self._plateau = None if settings.stop_when is None else PlateauRule(settings.stop_when)
        self.weight = settings.weight
        self.settings = settings  # from here on they are fixed
        self.attach(model)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["settings"], name) if name in FIELDS else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            value = replace(self.settings, weight=value).weight if "settings" in self.__dict__ else value
        # The rest was read when it was built; and nn.Module would take in a teacher beside the one that it has.
        elif name in FIELDS or name == "teacher" or (name == "settings" and name in self.__dict__):
            raise SettingError(
                f"{name} of a criterion cannot be changed once it is built.\n"
                "Build a new one with the new value, and hand the head over: "
                "new.heads.load_state_dict(old.heads.state_dict()); then old.detach()."
            )
        super().__setattr__(name, value)

    @classmethod
    def stage1(
        cls,
        model: nn.Module,
        *,
        layer: str | Sequence[str],
        time: str | TimeConvention,
        latent_channels: int,
        patch_size: int | Sequence[int],
        channel_axis: int = 1,
        hidden_size: int | None = None,
        hidden_features: int = 2048,
        target: Target = "latents",
        **settings: Unpack[Common],
    ) -> SelfTransLoss:
        """Stage 1: align a shallow layer with the VAE's clean latents.

        Args:
            model: The model, wrapped or not; it is not modified. The head is created on its device.
            layer: The dotted name of the layer to align (published: ``"blocks.1"``), or several names, each with a
                head of its own; their alignments are averaged.
            time: How to read t: ``"repa"`` (1 is noise), ``"sit"`` (1 is data), ``"ddpm"``, ``"flow"``, ... or a
                :class:`TimeConvention`.
            latent_channels: C of the latents, which are given in the layout in which the model gets x_t.
            patch_size: Latent pixels per token along each axis.
            channel_axis: Which axis of the latents is C, as in :class:`VAEAlignmentLoss`.
            hidden_size: The layer's width, where it cannot be read off.
            hidden_features: The head's inner width.
            target: ``"latents"`` (paper) or ``"velocity"`` (released code: noise − latents, whatever the loop's sign).
            **settings: Those of both stages (``weight``, ``window``, ...), which :class:`SelfTransLoss` lists.

        Raises:
            LayerNotFoundError: If the model has no such layer.
            SettingError: If a setting makes no sense, or the width is needed.
        """
        names = layer_names(layer)
        common = Settings(stage=1, layers=names, time=resolve(time), target=target, **settings)
        shape = {"latent_channels": latent_channels, "patch_size": patch_size, "channel_axis": channel_axis}
        heads = _heads(VAEAlignmentLoss, model, common, hidden_size, hidden_features=hidden_features, **shape)
        return cls(model, heads, common)

    @classmethod
    def stage2(
        cls,
        model: nn.Module,
        *,
        layer: str | Sequence[str],
        teacher: CFGFeatureTeacher | None,
        time: str | TimeConvention,
        hidden_size: int | None = None,
        hidden_features: int = 2048,
        target_size: int | None = None,
        teacher_chunk: int | None = None,
        teacher_rows: int | float | None = None,
        **settings: Unpack[Common],
    ) -> SelfTransLoss:
        """Stage 2: align a layer of a new model with the guided features of the stage-1 model.

        Args:
            model: The new model, wrapped or not; it is not modified.
            layer: The dotted name of the student's layer (published: ``"blocks.5"`` of 12), or several names.
            teacher: From :func:`build_teacher`; moved to the model's device. None only past the run's ``stop_step``.
            time: How to read t, as in :meth:`stage1`.
            hidden_size: The student layer's width, where it cannot be read off.
            hidden_features: The head's inner width.
            target_size: The width of the teacher's features, where the teacher does not tell.
            teacher_chunk: The largest batch that the teacher runs at once, condition and null counted, to save memory.
            teacher_rows: Run teacher and head only on a random part of the rows inside the window: at most this many,
                or this share of them. The loss and its gradient stay the same in expectation and vary more.
            **settings: Those of both stages (``weight``, ``window``, ...), which :class:`SelfTransLoss` lists.

        Raises:
            LayerNotFoundError: If the model has no such layer.
            SettingError: If a setting makes no sense, or a width is needed.
            TeacherError: If the teacher holds the student itself.
            TimeConventionError: If the teacher was built for another time convention.
        """
        if teacher is not None:
            check_teacher(teacher, model, resolve(time))
            teacher.to(device_of(model))
            target_size = teacher.hidden_size if target_size is None else target_size
        elif settings.get("stop_step") is None and settings.get("stop_when") is None:
            raise SettingError("Stage 2 needs a teacher; only a run past its stop_step can do without.")
        if target_size is None:
            raise SettingError(
                "The width of the teacher's features is not known. Give build_teacher hidden_size= or example=, or "
                "pass target_size= here."
            )
        common = Settings(
            stage=2,
            layers=layer_names(layer),
            time=resolve(time),
            teacher_chunk=teacher_chunk,
            teacher_rows=teacher_rows,
            **settings,
        )
        shape = {"out_features": target_size, "hidden_features": hidden_features}
        return cls(model, _heads(ProjectionHead, model, common, hidden_size, **shape), common, teacher)

    @property
    def measures(self) -> dict[str, Tensor]:
        """What was measured last, 0-d tensors on the device; empty before, and once the alignment has stopped.

        - ``student_norm``: the norm of a token at the tapped layers, averaged.
        - ``target_norm``, in stage 2: that of the guided features inside the window.
        - ``contrast``, in stage 2: ‖f_c − f_u‖ / ‖f_c‖, what the condition changes in the teacher's features.
        - ``gradient_cosine``: between the gradients of the two terms at the tapped tokens, and ``gradient_ratio``, the
          norm of the weighted alignment's over that of the loss's; from the backward pass, on each rank its own.
        - ``gradient_cosine_smoothed``, with ``stop_when``: what it compares with its threshold, over all ranks.
        """
        return self._health.measures

    @property
    def stopped_at(self) -> int | None:
        """The step, or without steps the call, at which ``stop_when`` stopped the alignment; None before."""
        return None if self._plateau is None else self._plateau.stopped_at

    @property
    def teacher(self) -> CFGFeatureTeacher | None:
        """The teacher of stage 2; None in stage 1 and after :meth:`release_teacher`."""
        return self._teacher[0]

    def forward(self, denoising: Tensor, latents: Tensor | None = None, step: int | None = None) -> LossTerms:
        """The total loss for the forward that the model has just run; in eval mode the denoising term alone.

        Args:
            denoising: The loop's own loss, a scalar or (N,), which is then averaged.
            latents: The clean latents as the model sees them, (N, C, H, W) or in whatever layout x_t has. Required in
                stage 1; in stage 2 they only serve to check the time convention.
            step: The optimiser's step, counted from 0. Required with ``stop_step``.

        Raises:
            CaptureError: If there was no forward, or several; if the layer did not run, or its tokens carry no
                gradient; or if ``stop_when`` cannot be measured.
            ShapeError: If loss, latents, tokens or features do not fit each other, or do not lie on one device.
            TimeConventionError: If t or x_t contradicts the time convention.
            SettingError: If ``step`` is needed and missing.
            TeacherError: If the teacher is needed and was released.
            NotFiniteError: If student, teacher or head gave NaN or inf in a call that is measured.
        """
        try:
            return self._forward(denoising, latents, step)
        finally:
            self.discard()  # also after a call that was refused: corrected and run again, it is no second forward

    def _forward(self, denoising: Tensor, latents: Tensor | None, step: int | None) -> LossTerms:
        check_denoising(denoising)
        settings, heads = self.settings, cast("Iterable[Head]", self.heads)
        if not self.training:
            if denoising.requires_grad and self._recorder is not None and self._recorder.holds_record:
                self._health.count_in_eval_mode()
            nothing = denoising.new_zeros((), dtype=torch.float32)
            return LossTerms(denoising.mean(), denoising.detach().mean(), nothing, nothing, nothing)
        scale = self._advance(step, denoising.device)
        if scale == 0.0:  # past the stop step nothing is looked at any more
            self._health.stop()
            zero = zero_of(heads)
            return _terms(denoising, zero, zero, 0.0, zero.detach())
        if self._recorder is None:
            raise CaptureError(
                "This criterion watches no model: it was detached, or is a copy of one that does.\n"
                "Call criterion.attach(model) before the model's forward."
            )
        recorder, weight = self._recorder, self.weight * scale
        record = recorder.take()
        gated = record.note
        record.check_arguments()
        checking = self._check(gated, denoising, latents, recorder.model)
        look = self._new_look(denoising, gated.call, recorder.model, weight)
        with torch.set_grad_enabled(weight > 0.0 and torch.is_grad_enabled()):
            student = self.spec, self._layouts, record
            alignment = align(settings, heads, self.teacher, *student, latents, self._calls, checking, look)
        self._health.count(gated.call.rows, len(gated.rows()), alignment)
        if look is not None:
            self._health.measure(look)
            if settings.health_interval is not None:
                self._health.judge(look, self._calls, alignment)
            if self._plateau is not None and look.probe is not None:
                self._plateau.arm(look.probe, self._calls)
        return _terms(denoising, alignment, weight * alignment if weight else zero_of(heads), weight, gated.inside)

    def attach(self, model: nn.Module) -> None:
        """Watch ``model``: done at construction, and needed again only for a copy or after :meth:`detach`."""
        self.detach()
        _keep_out_of_graphs()
        settings = self.settings
        needs_t = settings.window is not None or settings.stage == 2 or settings.target == "velocity"
        self.spec = CallSpec(model, settings.call, needs_t=needs_t)
        tapped = zip(settings.layers, cast("Iterable[Head]", self.heads), strict=True)
        self._layouts = [Layout.of(find_layer(model, layer), head.in_features) for layer, head in tapped]
        gated = functools.partial(gate, self.spec, settings)
        which, anyway = settings.forward, settings.eval_mode
        self._recorder = Recorder(model, settings.layers, gated, training_only=True, eval_mode=anyway, forward=which)

    def detach(self) -> None:
        """Remove every hook from the model."""
        if self._recorder is not None:
            self._recorder.detach()
        self._recorder = None

    def discard(self) -> None:
        """Forget the last forward: for a batch that the loop skips after the model has run."""
        if self._recorder is not None:
            self._recorder.discard()

    def release_teacher(self) -> None:
        """Drop the teacher and its memory: for a run past its ``stop_step``."""
        self._taught_by = self._state().teacher  # for when the teacher is back
        self._teacher[0] = None

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Make sure that ``optimizer`` trains the head.

        Raises:
            SettingError: If it does not hold every parameter of the criterion.
        """
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if missing := [name for name, p in self.named_parameters() if id(p) not in held]:
            raise SettingError(
                f"The optimiser does not hold {len(missing)} of the criterion's {len(list(self.parameters()))} "
                f"parameters: {quoted(missing[:4])}{', …' if len(missing) > 4 else ''}.\n"
                "Build it from [*model.parameters(), *criterion.parameters()], after wrapping and moving both."
            )

    def extra_repr(self) -> str:
        """The settings, as ``print(criterion)`` shows them."""
        return shown(self.settings.to_json() | {"weight": self.weight})

    def get_extra_state(self) -> Tensor:
        """What a resumed run needs besides the heads, in a uint8 tensor: every format and wrapper keeps that."""
        return self._state().to_tensor()

    def _state(self) -> RunState:
        plateau = None if self._plateau is None else self._plateau.state()
        # As the teacher is now: it may have been refreshed.
        taught_by = self._taught_by if self.teacher is None else bytes(self.teacher.fingerprint.tolist()).hex()
        counts = self._step, self._calls, self.weight, taught_by
        return RunState(*counts, self._health.state(), plateau, self.settings.to_json())

    def set_extra_state(self, state: Tensor) -> None:
        """Go on from what :meth:`get_extra_state` gave. ``load_state_dict`` calls this before it loads the heads.

        Raises:
            CheckpointError: If it is no such state.
            TeacherError: If the teacher is another.
            SettingError: If settings or schedule are others, or a rule stopped the run that the criterion has not.
        """
        saved = RunState.from_tensor(state)
        if not self._changes_allowed:
            saved.check_continued_by(self._state(), taught=self.teacher is not None)
        self._changes_allowed = False
        self._step, self._calls = saved.step, saved.calls
        if saved.settings.get("weight") == self.settings.weight:
            self.weight = saved.weight  # which the loop may have changed since
        if self.teacher is None:
            self._taught_by = saved.teacher  # for when the teacher is back
        self._health.load(saved.health)
        if self._plateau is not None and saved.plateau is not None:
            self._plateau.load(saved.plateau)

    def allow_changes(self) -> None:
        """Let the next state that is loaded be one of other settings or of another teacher: this criterion's stay."""
        self._changes_allowed = True

    def _load_from_state_dict(self, state_dict: MutableMapping[str, Any], prefix: str, *rest: Any) -> None:
        """Look through what wrappers put into the keys, those of the state and those of the heads."""
        own = ["_extra_state", *(name for name, _ in self.named_parameters())]
        names = {bare_key(name): f"{prefix}{name}" for name in own}
        for key in [key for key in state_dict if key.startswith(prefix)]:
            state_dict[names.get(bare_key(key.removeprefix(prefix)), key)] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SelfTransLoss:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.teacher is not None:
            self.teacher._apply(fn, recurse)
        return self

    def __enter__(self) -> SelfTransLoss:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def _advance(self, step: int | None, device: torch.device) -> float:
        """Count the call and give the schedule's factor at this step, 0 once the alignment has stopped."""
        if step is not None:
            whole = isinstance(step, SupportsIndex) and not isinstance(step, bool | Tensor)
            if not whole or not 0 <= operator.index(step) <= MAX_STEP:
                raise SettingError(f"step must be an integer, 0 or more and below 2**63; got {described(step)}.")
            step = operator.index(step)  # NumPy's too, as Python's
        stop = self.settings.stop_step
        if step is not None and stop is not None and step < self._step:
            self._health.judge_step(step, self._step, stop)
        scale = 1.0 if stop is None else self.settings.factor(step)
        self._calls += 1
        self._seen += scale > 0.0
        self._step = self._step if step is None else step
        if self._plateau is None:
            return scale
        if scale > 0.0:
            self.measures.update(self._plateau.decide(self._calls, step, device))
        return scale if self.stopped_at is None else 0.0

    def _due(self, every: int | None) -> bool:
        """Whether to look in this call: in the first ones of a process, and at an interval of the run."""
        return every is not None and (self._seen <= _FIRST or self._calls % every == 0)

    def _check(self, gated: Gated, denoising: Tensor, latents: Tensor | None, model: nn.Module | None) -> bool:
        """Make sure that the call's batch can be aligned; whether values on the device are looked at too."""
        call, settings = gated.call, self.settings
        check_batch(call, denoising, latents, settings.stage)
        if self.teacher is None and settings.stage == 2:
            raise TeacherError(
                f"The alignment is still on (step {self._step}, stop_step {settings.stop_step}), but there is no "
                "teacher: it was released, or never given.\n"
                "Build the criterion with the teacher that the run began with."
            )
        if self._seen == 1 and (message := unsynchronised(self, model, gated)):
            self._health.warn(f"head_not_synchronised: {message}")
        checking = self._due(settings.check_interval)
        if checking and call.times is not None and (message := check_time(settings.time, call, latents)):
            self._health.warn(f"time_not_checked: {message}")
        return checking

    def _new_look(self, denoising: Tensor, call: Call, model: nn.Module | None, weight: float) -> Look | None:
        """Where this call is measured, what is to see it."""
        settings = self.settings
        due = self._due(settings.health_interval) or (settings.stop_when and self._due(settings.stop_when.interval))
        if not due or model is None:
            return None
        probe = GradientProbe(self.measures) if weight > 0.0 else None
        nowhere = torch.full((call.rows,), torch.nan, device=call.x_t.device)
        fractions = nowhere if call.times is None else settings.time.noise_fraction(call.times)
        layers = {layer: find_layer(model, layer) for layer in settings.layers}
        trained = model, layers, self.heads, self.teacher
        return Look(denoising, probe, call, fractions, settings.window, *trained, weight)


def _terms(denoising: Tensor, alignment: Tensor, added: Tensor, weight: float, inside: Tensor) -> LossTerms:
    mean = denoising.mean()
    factor = torch.full((), weight, device=mean.device)
    return LossTerms(mean + added, mean.detach(), alignment.detach(), factor, inside.float().mean())


def _heads(kind: type[Head], model: nn.Module, settings: Settings, width: int | None, **shape: Any) -> list[Head]:
    """A head for each layer: its first argument is the layer's width. Their weights are alike in every process."""
    shape |= {"generator": torch.Generator(device="cpu").manual_seed(0), "device": device_of(model)}
    widths = [resolve_width(find_layer(model, layer), layer, width) for layer in settings.layers]
    return [kind(width, distance=settings.distance, **shape) for width in widths]


@functools.cache
def _keep_out_of_graphs() -> None:
    """Mark what ``torch.compile(criterion)`` must not trace; not at import, since the mark imports all of dynamo."""
    SelfTransLoss.forward = torch.compiler.disable(SelfTransLoss.forward)  # type: ignore[method-assign, no-untyped-call]
