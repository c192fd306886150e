"""From a recorded forward to the alignment: the rows inside the window, their tokens, targets and distances."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Self, get_args

import torch
from torch import Tensor, nn

from .calls import Call, CallSpec
from .errors import (
    SettingError,
    ShapeError,
    TeacherError,
    TimeConventionError,
)
from .heads import ProjectionHead
from .health import Look
from .losses import Distance, VAEAlignmentLoss, check_distance, distance_of, velocity_target, zero_of
from .modules import Layout, check_device, find_layer, sharded_parts, unwrap
from .settings import Gating, Target, check_choice, check_interval_of
from .taps import Record, layer_names
from .teacher import CFGFeatureTeacher
from .time import TimeConvention, check_window, resolve, window_mask
from .tokens import Select, Tokens, as_tokens, check_select, check_tokens, described, select_tensor

# Devices of which a copy to or from pinned memory is left to itself; on others it is waited for.
ASYNCHRONOUS = ("cuda",)


@dataclass(frozen=True)
class Gated:
    """A call and its rows inside the window.

    Attributes:
        call: The model's call by names.
        inside: (N,), bool, on the batch's device.
        on_host: (N,), the same on the host, once ``ready`` has happened.
        ready: The end of the copy; None where there was nothing to wait for.
    """

    call: Call
    inside: Tensor
    on_host: Tensor
    ready: torch.cuda.Event | None

    def rows(self) -> Tensor:
        """(n,), the indices of the rows inside, on the host. Waits only for what was queued before the forward."""
        if self.ready is not None:
            self.ready.synchronize()
        return self.on_host.nonzero().squeeze(1)


class Gate:
    """Finds the rows inside the window when the model is called, so that the loss need not wait for the forward.

    On CUDA the mask is copied to the host asynchronously before the forward is queued; the number of rows, on which
    shapes depend, is then known while the forward still runs.
    """

    def __init__(self, spec: CallSpec, time: TimeConvention, window: tuple[float, float] | None) -> None:
        self.spec = spec
        self.time = time
        self.window = window

    @torch.no_grad()
    def __call__(self, record: Record[Gated]) -> Gated:
        """Bind the record's call and see which rows are inside.

        Raises:
            CallError: If x_t or t cannot be told from the call.
        """
        call = self.spec.bind(record.args, record.kwargs)
        if self.window is None:
            inside = torch.ones(call.rows, dtype=torch.bool, device=call.x_t.device)
        else:
            inside = window_mask(self.time.noise_fraction(call.t), self.window)
        if inside.device.type not in ASYNCHRONOUS:
            return Gated(call, inside, inside.cpu(), None)
        on_host = torch.empty(inside.shape, dtype=torch.bool, device="cpu", pin_memory=True)
        on_host.copy_(inside, non_blocking=True)
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        # The copy is in the stream of the batch's device, which need not be the current one.
        ready.record(torch.cuda.current_stream(inside.device))
        return Gated(call, inside, on_host, ready)


def check_teacher_rows(teacher_rows: object) -> None:
    """Raise ``SettingError`` unless ``teacher_rows`` is None, a count of at least 1, or a share in (0, 1)."""
    count = isinstance(teacher_rows, int) and not isinstance(teacher_rows, bool) and teacher_rows >= 1
    share = isinstance(teacher_rows, float) and 0.0 < teacher_rows < 1.0
    if not (teacher_rows is None or count or share):
        raise SettingError(
            f"teacher_rows must be None, a whole number of rows from 1, or a share between 0 and 1; got "
            f"{teacher_rows!r}."
        )


def sample_rows(rows: Tensor, teacher_rows: int | float | None, seed: int) -> Tensor:
    """A random part of ``rows``: at most a count, or a share (rounded up), each subset as likely as any other.

    Args:
        rows: (n,), indices on the host.
        teacher_rows: The count or the share; None for all.
        seed: What the choice depends on, and nothing else: no random number generator is advanced.

    Shape:
        returns: (k,), in ascending order
    """
    if teacher_rows is None:
        return rows
    wanted = math.ceil(teacher_rows * len(rows)) if isinstance(teacher_rows, float) else teacher_rows
    if wanted >= len(rows):
        return rows
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed), device="cpu")[:wanted]
    return rows[chosen.sort().values]


def to_device(rows: Tensor, device: torch.device) -> Tensor:
    """Indices on ``device``, without waiting for it."""
    return rows.pin_memory().to(device, non_blocking=True) if device.type in ASYNCHRONOUS else rows.to(device)


def check_teacher(teacher: CFGFeatureTeacher, model: nn.Module, time: TimeConvention) -> None:
    """Make sure that ``teacher`` can teach ``model``.

    Raises:
        TeacherError: If it is the model itself, or shares the weights of its layer with it.
        TimeConventionError: If it was built for another time convention.
    """
    if unwrap(teacher.model) is unwrap(model):
        raise TeacherError("The teacher holds the student itself: build it from a copy of the model.")
    own = {id(p) for p in unwrap(model).parameters()}
    if any(id(p) in own for p in find_layer(teacher.model, teacher.layer).parameters()):
        raise TeacherError(
            f"The teacher shares the weights of its layer {teacher.layer!r} with the student, and would change with "
            "it: build it from a copy of its own, copy.deepcopy(model)."
        )
    if teacher.time is not None and teacher.time != time:
        names = f"{teacher.time.name!r}, the student's is {time.name!r}"
        raise TimeConventionError(
            f"The teacher was built for the time convention {names}; both see the same x_t and t, so they must agree."
            + ("\nThese are two of one name: pass one object to both." if teacher.time.name == time.name else "")
        )


def check_denoising(denoising: object) -> None:
    """Raise ``ShapeError`` unless the loop's own loss is a floating tensor, a scalar or (N,)."""
    if not isinstance(denoising, Tensor) or not denoising.is_floating_point() or denoising.ndim > 1:
        raise ShapeError(
            f"The loop's own loss must be a floating tensor, a scalar or (N,); got {described(denoising)}.\n"
            "Average what is left over channels and pixels first, as the loop does before backward(). The loss comes "
            "first: criterion(loss, latents=x, step=step)."
        )


def check_batch(call: Call, denoising: Tensor, latents: object) -> None:
    """Make sure that loss and latents are those of the captured call.

    Raises:
        ShapeError: If they have another number of samples, or the latents are no tensor.
        ShapeError: If the latents lie elsewhere.
    """
    if denoising.ndim == 1 and len(denoising) != call.rows:
        raise ShapeError(
            f"The loop's loss has {len(denoising)} values, but the model's last call had {call.rows} samples.\n"
            "Pass the loss of that call: a scalar, or one value for each sample."
        )
    if latents is not None and (not isinstance(latents, Tensor) or latents.ndim == 0):
        raise ShapeError(
            f"latents must be the batch's clean latents, a tensor (N, ...); got {described(latents)}.\n"
            "Of a VAE's posterior pass the sample that the loop adds noise to, scaled as the model sees it."
        )
    if latents is not None and len(latents) != call.rows:
        raise ShapeError(
            f"There are {len(latents)} latents, but the model's last call had {call.rows} samples: pass the same batch."
        )
    if latents is not None and latents.device != call.x_t.device:
        raise ShapeError(f"The latents lie on {latents.device}, x_t on {call.x_t.device}: move them there.")


def check_same_shape(call: Call, latents: Tensor) -> None:
    """Raise ``ShapeError`` unless latents and captured x_t have one shape."""
    if latents.shape != call.x_t.shape:
        raise ShapeError(
            f"The latents {tuple(latents.shape)} and the captured x_t {tuple(call.x_t.shape)} differ in shape, so x_t "
            "cannot be checked against them, nor a velocity be computed.\n"
            "Pass the clean latents of this batch in the layout in which the model gets x_t: packed if that is packed, "
            "with channel_axis= for stage 1 if its channels are not on axis 1. Where x_t holds more than the noisy "
            "latents, as for inpainting, switch the check off with check_interval=None."
        )


def check_captured(tokens: Tensor, call: Call, layer: str, head: nn.Module, record: Record[Gated]) -> None:
    """Make sure that a head can be trained on the tokens.

    Raises:
        ShapeError: If there is not one row for each sample, or the head reads another width.
        ShapeError: If the head lies elsewhere.
        CaptureError: If the tokens carry no gradient although gradients are enabled.
    """
    if len(tokens) != call.rows:
        raise ShapeError(
            f"Layer {layer!r} gave {len(tokens)} rows in a call of {call.rows} samples: tap a layer that keeps one row "
            "for each sample."
        )
    assert isinstance(head, ProjectionHead | VAEAlignmentLoss)
    if tokens.shape[-1] != head.in_features:
        raise ShapeError(
            f"Layer {layer!r} gave tokens of width {tokens.shape[-1]}, but the head reads {head.in_features}.\n"
            f"Build the criterion with hidden_size={tokens.shape[-1]}; or, if the layer's maps are not (N, D, H, W), "
            "turn them into (N, T, D) with tokens= a callable."
        )
    check_device(head, tokens.device, "head")
    if torch.is_grad_enabled() and not tokens.requires_grad:
        raise record.no_gradient(
            layer,
            "so aligning them would train nothing of the model",
            "Either everything up to this layer is frozen: tap a later one. Or reentrant activation checkpointing "
            "hides the gradient of what lies inside a checkpointed segment: use use_reentrant=False, or tap the very "
            "module that is checkpointed.",
        )


def check_patches(tokens: Tensor, call: Call, layer: str) -> None:
    """Raise ``ShapeError`` if so many tokens cannot be patches of x_t: patches divide a sample's values evenly.

    For features without a latent grid to compare with; it tells text or class tokens at the usual sizes.
    """
    values = call.x_t[0].numel()
    if values % tokens.shape[1]:
        raise ShapeError(
            f"Layer {layer!r} gave {tokens.shape[1]} tokens, which cannot be the patches of x_t "
            f"{tuple(call.x_t.shape)}: its {values} values a sample do not divide by {tokens.shape[1]}.\n"
            "Is it another stream, such as the text's (select=)? Are class, time or text tokens among the image's "
            "(tokens=)? To align all of them on purpose, pass tokens=slice(None)."
        )


class Alignment(nn.Module):
    """Heads, and what they are aligned with. The settings are those of :class:`SelfTransLoss`, which describes them."""

    spec: CallSpec  # of the student's calls
    layouts: list[Layout]  # of the layers' outputs

    def __init__(
        self,
        heads: Iterable[nn.Module],
        *,
        layer: str | Sequence[str],
        time: str | TimeConvention,
        teacher: CFGFeatureTeacher | None,
        target: Target,
        distance: Distance,
        window: tuple[float, float] | None,
        gating: Gating,
        select: Select,
        tokens: Tokens,
        teacher_chunk: int | None,
        teacher_rows: int | float | None,
    ) -> None:
        super().__init__()
        check_choice("target", target, get_args(Target))
        check_choice("gating", gating, get_args(Gating))
        check_distance(distance)
        check_select(select)
        check_tokens(tokens)
        check_interval_of("teacher_chunk", teacher_chunk)
        check_teacher_rows(teacher_rows)
        self.heads = nn.ModuleList(heads)
        self.layers = layer_names(layer)
        self.time = resolve(time)
        self.target = target
        self.distance: Distance = distance
        self.window = check_window(window)
        self.gating = gating
        self.select = select
        self.tokens = tokens
        self.teacher_chunk = teacher_chunk
        self.teacher_rows = teacher_rows
        self._teacher = [teacher]  # in a list: to nn.Module the teacher is no part of the criterion

    @property
    def teacher(self) -> CFGFeatureTeacher | None:
        """The teacher of stage 2; None in stage 1 and after :meth:`release_teacher`."""
        return self._teacher[0]

    @property
    def stage(self) -> int:
        """1 or 2."""
        return 1 if isinstance(self.heads[0], VAEAlignmentLoss) else 2

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.teacher is not None:
            self.teacher._apply(fn, recurse)
        return self

    def _alignment(
        self,
        record: Record[Gated],
        gated: Gated,
        latents: Tensor | None,
        *,
        seed: int,
        checking: bool,
        look: Look | None,
    ) -> Tensor:
        """The mean over the whole batch of the distances of the rows inside the window; 0-d, float32.

        Args:
            record: The forward.
            gated: Its call, and which rows are inside.
            latents: The clean latents; needed in stage 1.
            seed: What the choice of ``teacher_rows`` depends on.
            checking: Whether the teacher's indices are checked, which waits for the device.
            look: What is to see this call, if it is measured.
        """
        call = gated.call
        captures = [record.capture(layer) for layer in self.layers]
        tokens = []
        for layer, capture, head, layout in zip(self.layers, captures, self.heads, self.layouts, strict=True):
            tensor = select_tensor(capture.output, self.select, layer)
            if look is not None:
                tensor = look.branch(tensor)
            tokens.append(
                as_tokens(tensor, None, self.tokens, layer=layer, layout=layout, arguments=lambda: call.arguments)
            )
            check_captured(tokens[-1], call, layer, head, record)
            if isinstance(head, VAEAlignmentLoss):
                assert latents is not None  # the caller has seen to it
                self._check_fit(head, latents, tokens[-1])
            elif self.tokens is None:  # there is no latent grid to compare with
                check_patches(tokens[-1], call, layer)
        if self.teacher is not None:
            check_device(self.teacher, call.x_t.device, "teacher")
        if look is not None:
            look.tokens = [found.detach() for found in tokens]
        inside = torch.arange(call.rows, device="cpu") if self.window is None else gated.rows()
        candidates = torch.arange(call.rows, device="cpu") if self.gating == "released" else inside
        if len(inside) == 0:
            if self.teacher is not None and sharded_parts(self.teacher):
                # On other ranks it runs, and gathers its weights from all of them: they wait for this one.
                self._target(call, torch.zeros(1, dtype=torch.long, device=call.x_t.device), latents, checking)
            return zero_of(self.heads)
        chosen = sample_rows(candidates, self.teacher_rows, seed=seed)
        rows = None if len(chosen) == call.rows else to_device(chosen, call.x_t.device)
        if rows is not None:
            tokens = [found.index_select(0, rows) for found in tokens]
        autocast = captures[0].autocast
        with torch.autocast(call.x_t.device.type, dtype=autocast, enabled=autocast is not None):
            target = self._target(call, rows, latents, checking, look)
            distances = [
                distance_of(head, found, target, self.distance) for head, found in zip(self.heads, tokens, strict=True)
            ]
        if look is not None:
            look.target, look.rows = target, rows
        mean = torch.stack(distances).mean()  # over layers and over the chosen rows
        # Divided by the whole batch, whatever was chosen: an average over ranks is then the global value.
        return mean * (gated.inside.float().mean() if self.gating == "released" else len(candidates) / call.rows)

    def _check_fit(self, head: VAEAlignmentLoss, latents: Tensor, tokens: Tensor) -> None:
        try:
            head.check_fit(latents, tokens)
        except ShapeError as error:
            if self.tokens is not None:
                error.add_note(f"tokens={self.tokens} was given: these are the tokens that it leaves.")
            raise

    def _target(
        self,
        call: Call,
        rows: Tensor | None,
        latents: Tensor | None,
        checking: bool,
        look: Look | None = None,
    ) -> Tensor:
        """What the heads' outputs are compared with, for the given rows."""
        if self.stage == 2:
            teacher = self.teacher
            assert teacher is not None  # the caller has seen to it
            adopted = teacher.spec.adopt(call, self.spec)
            features = teacher.features(adopted, rows, self.teacher_chunk, check_indices=checking)
            if look is not None:
                look.taught, look.features = adopted, features
            return teacher.guide(*features)
        assert latents is not None  # the caller has seen to it
        target = latents.detach()
        if self.target == "velocity":
            check_same_shape(call, latents)
            target = velocity_target(call.x_t.detach(), target, self.time.signal(call.t), self.time.noise(call.t))
        return target if rows is None else target.index_select(0, rows)
