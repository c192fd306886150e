"""The combined loss: it watches the model through hooks and adds the alignment to the loop's own loss."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor, nn

from .alignment import Alignment, Gate, Gated, check_batch, check_denoising, check_same_shape, check_teacher
from .calls import Call, CallSpec
from .errors import CaptureError, SettingError, ShapeError, TeacherError
from .heads import ProjectionHead
from .health import Health, Look
from .losses import Distance, VAEAlignmentLoss, zero_of
from .modules import Layout, device_of, find_layer, quoted, resolve_width
from .plateau import GradientProbe, Interval, Plateau, PlateauRule
from .settings import (
    Gating,
    Schedule,
    Settings,
    Target,
    check_interval_of,
    check_same_schedule,
    check_schedule,
    check_stop_when,
    check_weight,
    checked_step,
    factor,
    schedule_state,
)
from .taps import Recorder, WhichForward, layer_names
from .teacher import CFGFeatureTeacher
from .time import TimeConvention, check_against_latents, check_times, resolve
from .tokens import Select, Tokens

# What is fixed when a criterion is built. Its weight, for one, is read at every call.
_FIXED = frozenset({
    "layers", "time", "window", "gating", "distance", "target", "call", "which_forward", "eval_mode", "schedule",
    "stop_step", "stop_when", "check_interval", "health_interval",
})  # fmt: skip


class LossTerms(NamedTuple):
    """The terms of one call: 0-d tensors on the model's device, all but ``total`` detached.

    Attributes:
        total: denoising + weight * alignment, to call ``backward()`` on.
        denoising: The loop's own loss, averaged.
        alignment: The alignment, averaged over the whole batch with samples outside the window counted as 0.
        weight: What the alignment was multiplied with at this step.
        in_window: The fraction of the batch inside the window; 0 in eval mode and from ``stop_step`` on, where nobody
            looks.
    """

    total: Tensor
    denoising: Tensor
    alignment: Tensor
    weight: Tensor
    in_window: Tensor


class SelfTransLoss(Alignment):
    """Denoising loss plus the alignment of Self-Transcendence. Made by :meth:`stage1` or :meth:`stage2`.

    Hooks record the model's own call while the loop runs it; ``criterion(loss)`` then computes

        total = denoising + weight · alignment,   alignment = (1/N) Σ_i 1[t_i inside the window] · distance_i

    with the distance of each sample averaged over tokens and channels, in float32. The mean is over the *whole* batch,
    so that averages over ranks and over equal micro-batches are the global value. Only rows inside the window are
    projected, and only they are shown to the teacher. ``gating="released"`` computes what the released code does
    instead: mean(mask) · mean(distance), over every sample.

    Head and teacher run under the autocast that the tapped layer ran under. The criterion's parameters are the head's:
    give them to the optimiser. Its state dict holds the head and a few small buffers; the model and the teacher are
    no part of it. ``.to()`` moves the teacher too. The global random number generator is never advanced.

    Both stages take these settings:

    - ``weight=0.5``: λ. With 0 the alignment is only measured.
    - ``window=(0.4, 0.7)``: the noise fractions at which the alignment applies, closed at both ends; None for all.
    - ``gating="per-sample"`` or ``"released"``, as above.
    - ``stop_step=None``: from that step on the alignment is 0, and the teacher is not run.
    - ``schedule="constant"``: or ``"linear"`` or ``"cosine"``, a decay of the weight to 0 at ``stop_step``.
    - ``call=None``: ``dict(x=..., t=...)`` names the arguments that hold x_t and t where they are not the first two.
    - ``select=None``, ``tokens=None``: which tensor of the layer's output, and which of its tokens, as in
      :class:`FeatureTap`.
    - ``forward=None``: which of several forwards before one call counts, ``"first"`` or ``"last"``; None makes several
      an error.
    - ``eval_mode=False``: True for a loop that trains the model in eval mode, as sd-scripts and musubi-tuner do: a
      forward with gradients enabled then counts whatever the mode.
    - ``check_interval=1000``: what has to be read off the device (the range of t, x_t against the latents) is checked
      in the first three calls and then at this interval; None switches that off.
    - ``health_interval=100``: in the first three calls and then at this interval the criterion measures itself
      (:attr:`measures`), and what looks wrong is warned of, each thing once, or an error where it is NaN or inf. Other
      calls read nothing off the device. None switches that off.
    - ``stop_when=None``: a :class:`Plateau`, which stops the alignment by itself, as ``stop_step`` does.

    Reference: Sun et al., 2026, https://arxiv.org/abs/2601.07773
    """

    step: Tensor
    calls: Tensor
    schedule_state: Tensor
    settings_state: Tensor
    teacher_fingerprint: Tensor
    health_state: Tensor
    plateau_state: Tensor
    _recorder: Recorder[Gated] | None = None

    def __init__(
        self,
        model: nn.Module,
        heads: Iterable[nn.Module],
        *,
        layer: str | Sequence[str],
        time: str | TimeConvention,
        teacher: CFGFeatureTeacher | None = None,
        target: Target = "latents",
        distance: Distance = "mse",
        weight: float = 0.5,
        window: tuple[float, float] | None = (0.4, 0.7),
        gating: Gating = "per-sample",
        schedule: Schedule = "constant",
        stop_step: int | None = None,
        stop_when: Plateau | None = None,
        call: Mapping[str, Any] | None = None,
        select: Select = None,
        tokens: Tokens = None,
        forward: WhichForward = None,
        eval_mode: bool = False,
        check_interval: int | None = 1000,
        health_interval: int | None = 100,
        teacher_chunk: int | None = None,
        teacher_rows: int | float | None = None,
    ) -> None:
        super().__init__(
            heads,
            layer=layer,
            time=time,
            teacher=teacher,
            target=target,
            distance=distance,
            window=window,
            gating=gating,
            select=select,
            tokens=tokens,
            teacher_chunk=teacher_chunk,
            teacher_rows=teacher_rows,
        )
        check_weight(weight)
        check_schedule(schedule, stop_step)
        check_stop_when(stop_when, weight)
        check_interval_of("check_interval", check_interval)
        check_interval_of("health_interval", health_interval)
        self.weight = float(weight)
        self.schedule: Schedule = schedule
        self.stop_step = stop_step
        self.stop_when = stop_when
        self.call = call
        self.which_forward: WhichForward = forward
        self.eval_mode = eval_mode
        self.check_interval = check_interval
        self.health_interval = health_interval
        # The counters live here and go to the buffers only when a state dict is made: a step writes nothing.
        self._step = -1
        self._calls = 0
        self._check_interval = Interval(check_interval)
        self._health = Health(health_interval)
        self._plateau = PlateauRule(stop_when)
        buffers = {
            "step": torch.tensor(-1),
            "calls": torch.tensor(0),
            "schedule_state": schedule_state(schedule, self.weight, stop_step),
            "settings_state": settings_state(self),
            "teacher_fingerprint": torch.zeros(32, dtype=torch.uint8) if teacher is None else teacher.fingerprint,
            **fresh_observations(),
        }
        for name, buffer in buffers.items():  # with the heads: NCCL broadcasts no buffers of the CPU
            self.register_buffer(name, buffer.clone().to(device_of(self)))
        self.register_state_dict_pre_hook(write_buffers)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(check_state)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(read_buffers)  # type: ignore[no-untyped-call]
        self.attach(model)

    def __setattr__(self, name: str, value: Any) -> None:
        # Half of them were read when it was built; and nn.Module would take in a teacher beside the one that it has.
        if name == "teacher" or (name in _FIXED and name in self.__dict__):
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
        distance: Distance = "mse",
        generator: torch.Generator | None = None,
        **settings: Unpack[Settings],
    ) -> SelfTransLoss:
        """Stage 1: align a shallow layer with the VAE's clean latents.

        Args:
            model: The model, wrapped or not; it stays as it is. The head is made on its device.
            layer: The dotted name of the layer to align (published: ``"blocks.1"``), or several names, each with a
                head of its own; their alignments are averaged.
            time: How to read t: ``"repa"`` (1 is noise), ``"sit"`` (1 is data), ``"ddpm"``, ``"flow"``, ... or a
                :class:`TimeConvention`.
            latent_channels: C of the latents.
            patch_size: Latent pixels per token along each axis.
            channel_axis: Which axis of the latents is C: 2 for (N, F, C, H, W), and for tokens packed as (N, T, C) with
                ``patch_size=(1,)``. The latents are given in the layout in which the model gets x_t.
            hidden_size: The layer's width, where it cannot be read off.
            hidden_features: The head's inner width.
            distance: ``"mse"``, ``"cosine"`` or ``"smooth_l1"``.
            target: ``"latents"`` (the paper) or ``"velocity"`` (the released code: noise − latents, whatever the sign
                of the loop's own).
            generator: Source of the head's initial weights; by default a new one with seed 0.
            **settings: ``weight``, ``window``, ``stop_step``, ...: see the class.

        Raises:
            LayerNotFoundError: If the model has no such layer.
            SettingError: If a setting makes no sense, or the width is needed.
        """
        generator = generator or torch.Generator().manual_seed(0)
        heads = [
            VAEAlignmentLoss(
                width,
                latent_channels,
                patch_size,
                channel_axis=channel_axis,
                hidden_features=hidden_features,
                distance=distance,
                generator=generator,
                device=device_of(model),
            )
            for width in _widths(model, layer, hidden_size)
        ]
        return cls(model, heads, layer=layer, time=time, target=target, distance=distance, **settings)

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
        distance: Distance = "mse",
        teacher_chunk: int | None = None,
        teacher_rows: int | float | None = None,
        generator: torch.Generator | None = None,
        **settings: Unpack[Settings],
    ) -> SelfTransLoss:
        """Stage 2: align a layer of a new model with the guided features of the stage-1 model.

        Args:
            model: The new model, wrapped or not; it stays as it is.
            layer: The dotted name of the student's layer (published: ``"blocks.5"`` of 12), or several names.
            teacher: From :func:`build_teacher`; moved to the model's device. None only for a run that is resumed after
                its ``stop_step``.
            time: How to read t, as in :meth:`stage1`.
            hidden_size: The student layer's width, where it cannot be read off.
            hidden_features: The head's inner width.
            target_size: The width of the teacher's features, where the teacher does not tell.
            distance: ``"mse"``, ``"cosine"`` or ``"smooth_l1"``.
            teacher_chunk: The largest batch that the teacher runs at once, condition and null counted, where memory
                is short; the result is the same.
            teacher_rows: Run teacher and head only on a random part of the rows inside the window: at most this many,
                or this share of them. The loss and its gradient stay the same in expectation and vary more.
            generator: Source of the head's initial weights; by default a new one with seed 0.
            **settings: ``weight``, ``window``, ``stop_step``, ...: see the class.

        Raises:
            LayerNotFoundError: If the model has no such layer.
            SettingError: If a setting makes no sense, or a width is needed.
            TeacherError: If the teacher holds the student itself.
            TimeConventionError: If the teacher was built for another time convention.
        """
        if teacher is None and settings.get("stop_step") is None and settings.get("stop_when") is None:
            raise SettingError("Stage 2 needs a teacher; only a run past its stop_step can do without.")
        if teacher is not None:
            check_teacher(teacher, model, resolve(time))
            teacher.to(device_of(model))
        target_size = target_size if teacher is None or target_size is not None else teacher.hidden_size
        if target_size is None:
            raise SettingError(
                "The width of the teacher's features is not known. Give build_teacher hidden_size= or example=, or "
                "pass target_size= here."
            )
        generator = generator or torch.Generator().manual_seed(0)
        heads = [
            ProjectionHead(width, target_size, hidden_features, generator=generator, device=device_of(model))
            for width in _widths(model, layer, hidden_size)
        ]
        return cls(
            model,
            heads,
            layer=layer,
            time=time,
            teacher=teacher,
            distance=distance,
            teacher_chunk=teacher_chunk,
            teacher_rows=teacher_rows,
            **settings,
        )

    @property
    def measures(self) -> dict[str, Tensor]:
        """What was measured last, 0-d tensors on the device; see ``health_interval`` for when.

        - ``student_norm``: the norm of a token at the tapped layers, averaged.
        - ``target_norm``, in stage 2: that of the guided features inside the window.
        - ``contrast``, in stage 2: ‖f_c − f_u‖ / ‖f_c‖, what the condition changes in the teacher's features.
        - ``gradient_cosine``: between the gradients of the two terms at the tapped tokens, and ``gradient_ratio``, the
          norm of the weighted alignment's over that of the denoising loss's. They come with the backward pass; on each
          rank its own.
        - ``gradient_cosine_smoothed``, with ``stop_when``: what it compares with its threshold, over all ranks.

        Empty before the first measured call, and once the alignment has stopped.
        """
        return self._health.measures

    @property
    def stopped_at(self) -> int | None:
        """The step, or without steps the call, at which ``stop_when`` stopped the alignment; None before."""
        return self._plateau.stopped_at

    def forward(self, denoising: Tensor, latents: Tensor | None = None, step: int | None = None) -> LossTerms:
        """The total loss for the forward that the model has just run.

        In eval mode the denoising term alone.

        Args:
            denoising: The loop's own loss, a scalar or (N,), which is then averaged.
            latents: The clean latents as the model sees them, (N, C, H, W) or in whatever layout x_t has. Required in
                stage 1; in stage 2 they only serve to check the time convention.
            step: The optimiser's step, counted from 0. Required with ``stop_step``.

        Raises:
            CaptureError: If there was no forward, or several; or the layer did not run.
            CaptureError: If the captured tokens carry no gradient.
            ShapeError: If loss, latents, tokens or features do not fit each other.
            TimeConventionError: If t or x_t contradicts the time convention.
            SettingError: If ``step`` is needed and missing.
            TeacherError: If the teacher is needed and was released.
            ShapeError: If head, teacher and tokens are not on one device.
            NotFiniteError: If student, teacher or head gave NaN or inf in a call that is measured.
            CaptureError: If ``stop_when`` cannot be measured.
        """
        try:
            return self._forward(denoising, latents, step)
        finally:
            self.discard()  # also after a call that was refused: corrected and run again, it is no second forward

    def _forward(self, denoising: Tensor, latents: Tensor | None, step: int | None) -> LossTerms:
        check_denoising(denoising)
        if not self.training:
            if denoising.requires_grad and self._recorder is not None and self._recorder.holds_record:
                self._health.count_in_eval_mode()
            nothing = denoising.new_zeros((), dtype=torch.float32)
            return LossTerms(denoising.mean(), denoising.detach().mean(), nothing, nothing, nothing)
        scale = self._advance(step, denoising.device)
        if scale == 0.0:  # past the stop step nothing is looked at any more
            self._health.stop()
            return self._terms(denoising, zero_of(self.heads), 0.0, None)
        record = self._watching().take()
        gated = record.note
        record.check_arguments()
        checking = self._check_interval.due(self._calls)
        self._check(gated.call, denoising, latents, checking)
        look = self._new_look(denoising, gated.call, self.weight * scale)
        with torch.no_grad() if self.weight == 0.0 else contextlib.nullcontext():
            alignment = self._alignment(record, gated, latents, seed=self._calls, checking=checking, look=look)
        self._observe(look, gated, alignment)
        return self._terms(denoising, alignment, self.weight * scale, gated.inside)

    def attach(self, model: nn.Module) -> None:
        """Watch ``model``: done at construction, and needed again only for a copy or after :meth:`detach`."""
        self.detach()
        needs_t = self.window is not None or self.stage == 2 or self.target == "velocity"
        self.spec = CallSpec(model, self.call, needs_t=needs_t)
        self.layouts = [
            Layout.of(find_layer(model, layer), head.in_features)
            for layer, head in zip(self.layers, self.heads, strict=True)
            if isinstance(head, ProjectionHead | VAEAlignmentLoss)
        ]
        self._recorder = Recorder(
            model,
            self.layers,
            Gate(self.spec, self.time, self.window),
            training_only=True,
            eval_mode=self.eval_mode,
            forward=self.which_forward,
        )

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
        self._teacher[0] = None

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Make sure that ``optimizer`` trains the head.

        Raises:
            SettingError: If it does not hold every parameter of the criterion.
        """
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [name for name, p in self.named_parameters() if id(p) not in held]
        if missing:
            raise SettingError(
                f"The optimiser does not hold {len(missing)} of the criterion's {len(list(self.parameters()))} "
                f"parameters: {quoted(missing[:4])}{', …' if len(missing) > 4 else ''}.\n"
                "Build it from [*model.parameters(), *criterion.parameters()], after wrapping and moving both."
            )

    def extra_repr(self) -> str:
        """The settings, as ``print(criterion)`` shows them."""
        return (
            f"stage={self.stage}, layers={list(self.layers)}, time={self.time.name!r}, weight={self.weight}, "
            f"window={self.window}, distance={self.distance!r}, gating={self.gating!r}, schedule={self.schedule!r}, "
            f"stop_step={self.stop_step}, stop_when={self.stop_when}"
        )

    def __enter__(self) -> SelfTransLoss:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def _watching(self) -> Recorder[Gated]:
        if self._recorder is None:
            raise CaptureError(
                "This criterion watches no model: it was detached, or is a copy of one that does.\n"
                "Call criterion.attach(model) before the model's forward."
            )
        return self._recorder

    def _advance(self, step: int | None, device: torch.device) -> float:
        """Count the call and give the schedule's factor at this step, 0 once the alignment has stopped."""
        if step is not None:
            step = checked_step(step)
            if self.stop_step is not None and step < self._step:
                self._health.judge_step(step, self._step, self.stop_step)
        scale = factor(self.schedule, step, self.stop_step)
        self._calls += 1
        if step is not None:
            self._step = step
        if scale > 0.0:
            self.measures.update(self._plateau.decide(self._calls, step, device))
        return scale if self.stopped_at is None else 0.0

    def _check(self, call: Call, denoising: Tensor, latents: Tensor | None, checking: bool) -> None:
        if latents is None and self.stage == 1:
            raise ShapeError("Stage 1 aligns with the clean latents: call criterion(loss, latents=...).")
        check_batch(call, denoising, latents)
        if self.teacher is None and self.stage == 2:
            raise TeacherError(
                f"The alignment is still on (step {self._step}, stop_step {self.stop_step}), but there is no teacher: "
                "it was released, or never given.\nBuild the criterion with the teacher that the run began with."
            )
        if not checking or call.times is None:
            return
        if latents is None:
            check_times(self.time, call.t, call.time_from)
        else:
            check_same_shape(call, latents)
            left_out = check_against_latents(self.time, call.x_t.detach(), call.t, latents.detach(), call.time_from)
            if left_out is not None:
                self._health.warn("time_not_checked", left_out)

    def _new_look(self, denoising: Tensor, call: Call, weight: float) -> Look | None:
        """Where this call is measured, what is to see it."""
        due = [interval.due(self._calls) for interval in (self._health.interval, self._plateau.interval)]
        model = self._watching().model
        if not any(due) or model is None:
            return None
        nowhere = torch.full((call.rows,), torch.nan, device=call.x_t.device)
        return Look(
            denoising,
            GradientProbe(self.measures.update) if self.weight > 0.0 else None,
            call,
            nowhere if call.times is None else self.time.noise_fraction(call.times),
            self.window,
            model,
            {layer: find_layer(model, layer) for layer in self.layers},
            self.heads,
            self.teacher,
            weight,
        )

    def _observe(self, look: Look | None, gated: Gated, alignment: Tensor) -> None:
        call = gated.call
        inside = call.rows if self.window is None else len(gated.rows())
        self._health.count(call.rows, inside, alignment)
        if look is None:
            return
        look.inside = inside
        self._health.measure(look)
        if self.health_interval is not None:
            self._health.judge(look, self._calls, alignment)
        if look.probe is not None:
            self._plateau.arm(look.probe, self._calls)

    def _terms(self, denoising: Tensor, alignment: Tensor, weight: float, inside: Tensor | None) -> LossTerms:
        mean = denoising.mean()
        device = mean.device
        return LossTerms(
            total=mean + (weight * alignment if weight > 0.0 else zero_of(self.heads)),
            denoising=mean.detach(),
            alignment=alignment.detach(),
            weight=torch.full((), weight, device=device),
            in_window=torch.zeros((), device=device) if inside is None else inside.float().mean(),
        )


def _widths(model: nn.Module, layer: str | Sequence[str], hidden_size: int | None) -> list[int]:
    return [resolve_width(find_layer(model, name), name, hidden_size) for name in layer_names(layer)]


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
