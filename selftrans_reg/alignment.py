"""From a recorded forward to the alignment: the part of the loss that knows of heads, targets and windows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Self, get_args

import torch
from torch import Tensor, nn

from .calls import Call, CallSpec
from .checks import check_captured, check_device, check_patches, check_same_shape
from .errors import ShapeError
from .gate import Gated, check_teacher_rows, sample_rows, to_device
from .health import Look
from .layer_losses import distance_of, zero_of
from .losses import Distance, VAEAlignmentLoss, check_distance, velocity_target
from .names import sharded_parts
from .settings import Gating, Target, check_choice, check_interval_of
from .taps import Record, layer_names
from .teacher import CFGFeatureTeacher
from .time import TimeConvention, check_window, resolve
from .tokens import Select, Tokens, as_tokens, check_select, check_tokens, select_tensor


class Alignment(nn.Module):
    """Heads, and what they are aligned with. The settings are those of :class:`SelfTransLoss`, which describes them."""

    spec: CallSpec  # of the student's calls

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
            self.teacher._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _alignment(
        self,
        record: Record,
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
        for layer, capture, head in zip(self.layers, captures, self.heads, strict=True):
            tensor = select_tensor(capture.output, self.select, layer)
            if look is not None:
                tensor = look.branch(tensor)
            tokens.append(as_tokens(tensor, None, self.tokens, layer=layer, arguments=lambda: call.arguments))
            check_captured(tokens[-1], call, layer, head)
            if isinstance(head, VAEAlignmentLoss):
                assert latents is not None  # the caller has seen to it
                self._check_fit(head, latents, tokens[-1])
            elif self.tokens is None:  # there is no latent grid to compare with
                check_patches(tokens[-1], call, layer)
        if self.teacher is not None:
            check_device(self.teacher, call.x_t.device, "teacher")
        if look is not None:
            look.tokens = [found.detach() for found in tokens]
        inside = torch.arange(call.rows) if self.window is None else gated.rows()
        candidates = torch.arange(call.rows) if self.gating == "released" else inside
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
