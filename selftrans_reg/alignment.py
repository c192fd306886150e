"""From a recorded forward to the alignment: the rows inside the window, their tokens, targets and distances."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .calls import Call, CallSpec
from .errors import SettingError, ShapeError, TeacherError, TimeConventionError
from .heads import Head, zero_of
from .health import Look
from .modules import Layout, sharded_parts, some_of, unwrap
from .settings import Settings
from .taps import Record
from .teacher import CFGFeatureTeacher
from .time import TimeConvention, check_against_latents, check_times, window_mask
from .tokens import as_tokens, described, select_tensor
from .truncate import identity

# Devices of which a copy to or from pinned memory is left to itself; on others it is waited for.
ASYNCHRONOUS = ("cuda",)


@dataclass(frozen=True)
class Gated:
    """A call and its rows inside the window."""

    call: Call
    inside: Tensor  # (N,), bool, on the batch's device; (N, T) where each token has a time of its own
    on_host: Tensor | None  # (N,), whether anything of a row is inside, once `ready` has happened; None for all rows
    ready: torch.cuda.Event | None  # the end of the copy to the host; None where there was nothing to wait for
    in_ddp: bool  # whether the model ran inside DDP

    def rows(self) -> Tensor:
        """(n,), the indices of the rows inside, on the host. Waits only for what was queued before the forward."""
        if self.on_host is None:
            return torch.arange(self.call.rows, device="cpu")
        if self.ready is not None:
            self.ready.synchronize()
        return self.on_host.nonzero().squeeze(1)


@torch.no_grad()
def gate(spec: CallSpec, settings: Settings, record: Record[Gated]) -> Gated:
    """Find the rows inside the window before the forward is queued, so that the loss need not wait for its end."""
    call, ready = spec.bind(record.args, record.kwargs), None
    if settings.window is None:
        return Gated(call, torch.ones(call.rows, dtype=torch.bool, device=call.x_t.device), None, ready, in_ddp())
    inside = window_mask(settings.time.noise_fraction(call.t), settings.window)
    rows = inside.any(1) if inside.ndim == 2 else inside
    waits = rows.device.type not in ASYNCHRONOUS
    on_host = torch.empty(rows.shape, dtype=torch.bool, device="cpu", pin_memory=not waits)
    on_host.copy_(rows, non_blocking=not waits)
    if not waits:
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        # The copy is in the stream of the batch's device, which need not be the current one.
        ready.record(torch.cuda.current_stream(rows.device))
    return Gated(call, inside, on_host, ready, in_ddp())


def in_ddp() -> bool:
    """Whether this runs inside the forward of a DDP wrapper, which then averages the gradients over the ranks."""
    return getattr(DistributedDataParallel, "_active_ddp_module", None) is not None


def unsynchronised(criterion: nn.Module, model: nn.Module | None, gated: Gated) -> str | None:
    """What to say where the model's gradients are averaged over the ranks and the criterion's are not."""
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    averaged = gated.in_ddp or (model is not None and bool(sharded_parts(model)))
    trains = any(p.requires_grad for p in criterion.parameters())
    if ranks == 1 or not averaged or not trains or in_ddp() or sharded_parts(criterion):
        return None
    return (
        f"The model's gradients are averaged over {ranks} ranks, and the head's are not: each rank "
        "trains a head of its own.\nWrap the criterion as the model is, and call the wrapper: "
        "DistributedDataParallel(criterion), fully_shard(criterion), accelerator.prepare(criterion)."
    )


def align(
    settings: Settings,
    heads: Iterable[Head],
    teacher: CFGFeatureTeacher | None,
    spec: CallSpec,
    layouts: Iterable[Layout],
    record: Record[Gated],
    latents: Tensor | None,
    seed: int,
    checking: bool,
    look: Look | None,
) -> Tensor:
    """The mean over the whole batch of the distances of the rows inside the window; 0-d, float32."""
    gated, heads = record.note, list(heads)
    call, device = gated.call, gated.call.x_t.device
    captures = [record.capture(layer) for layer in settings.layers]
    tokens = []
    for layer, capture, head, layout in zip(settings.layers, captures, heads, layouts, strict=True):
        tensor = select_tensor(capture.output, settings.select, layer)
        if look is not None and look.probe is not None:
            tensor = look.probe.branch(tensor, look.denoising)
        found = as_tokens(tensor, None, settings.tokens, layer=layer, layout=layout, arguments=lambda: call.arguments)
        _check_captured(found, layer, head, record)
        try:
            if latents is not None and settings.stage == 1:
                head.check_fit(found, latents)
            elif settings.tokens is None:  # there is no latent grid to compare with
                head.check_fit(found, call.x_t)
        except ShapeError as error:
            if settings.tokens is None:
                raise
            given = f"tokens={settings.tokens} was given: these are the tokens that it leaves."
            raise ShapeError(f"{error}\n{given}") from error
        tokens.append(found)
    if look is not None:
        look.tokens = [found.detach() for found in tokens]
    if teacher is not None:
        _check_place(teacher, device, "teacher")
        taught = teacher.spec.adopt(call, spec)
    inside = gated.rows()
    if len(inside) == 0:
        if teacher is not None and sharded_parts(teacher):
            # On other ranks it runs, and gathers its weights from all of them: they wait for this one.
            teacher.features(taught, torch.zeros(1, dtype=torch.long, device=device), settings.teacher_chunk)
        return zero_of(heads)
    released = settings.gating == "released"
    candidates = torch.arange(call.rows, device="cpu") if released else inside
    chosen = sample_rows(candidates, settings.teacher_rows, seed=seed)
    rows = None
    if len(chosen) < call.rows:  # to the device without waiting for it
        rows = (chosen.pin_memory() if device.type in ASYNCHRONOUS else chosen).to(device, non_blocking=True)
    weights = gated.inside.float() if gated.inside.ndim == 2 and not released else None  # (N, T)
    if rows is not None:
        tokens = [found.index_select(0, rows) for found in tokens]
        weights = None if weights is None else weights.index_select(0, rows)
    autocast = captures[0].autocast
    with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        if teacher is None:
            goal = _latents_target(settings, call, latents, rows)
        else:
            features = teacher.features(taught, rows, settings.teacher_chunk, check_indices=checking)
            goal = teacher.guide(*features)
            if look is not None:
                look.features = features
        distances = [head.distance(found, goal, weights) for head, found in zip(heads, tokens, strict=True)]
    if look is not None:
        look.target, look.rows, look.inside = goal, rows, len(inside)
    mean = torch.stack(distances).mean()  # over layers and over the chosen rows
    # Divided by the whole batch, whatever was chosen: an average over ranks is then the global value.
    return mean * (gated.inside.float().mean() if released else len(candidates) / call.rows)


def _latents_target(settings: Settings, call: Call, latents: Tensor | None, rows: Tensor | None) -> Tensor:
    """(n, C, H, W), the latents or the velocity of the given rows.

    The velocity is ε − x, with ε = (x_t − α x) / σ recovered from x_t = α x + σ ε: the released code's stage-1 target
    on the linear path; off it that code regresses dα/dt x + dσ/dt ε.
    """
    assert latents is not None  # check_batch has seen to it
    target = latents.detach()
    if settings.target == "velocity":
        _check_same_shape(call, latents)
        if call.t.ndim != 1:
            raise ShapeError(
                f"target='velocity' needs one time for each sample, but t is {tuple(call.t.shape)}.\n"
                "Use target='latents', or say which time is the sample's with call=dict(t=...)."
            )
        levels = settings.time.signal(call.t), settings.time.noise(call.t).clamp(min=1e-4)
        alpha, sigma = (level.reshape(-1, *[1] * (latents.ndim - 1)) for level in levels)
        target = (call.x_t.detach().float() - alpha * target.float()) / sigma - target.float()
    return target if rows is None else target.index_select(0, rows)


def sample_rows(rows: Tensor, teacher_rows: int | float | None, seed: int) -> Tensor:
    """(k,), ascending: a random part of ``rows``, at most a count, or a share (rounded up), each subset as likely."""
    if teacher_rows is None:
        return rows
    wanted = math.ceil(teacher_rows * len(rows)) if isinstance(teacher_rows, float) else teacher_rows
    generator = torch.Generator(device="cpu").manual_seed(seed)
    chosen = torch.randperm(len(rows), generator=generator, device="cpu")[:wanted]  # (k,), all where fewer are there
    return rows[chosen.sort().values]


def check_teacher(teacher: object, model: nn.Module, time: TimeConvention) -> None:
    """Make sure that ``teacher`` can teach ``model``."""
    if not isinstance(teacher, CFGFeatureTeacher):
        raise SettingError(
            f"teacher must be a CFGFeatureTeacher; got {described(teacher)}.\n"
            "A model becomes one by st.build_teacher(model, checkpoint, layer=..., null=...)."
        )
    teacher.check_model()
    student = unwrap(model)
    modules = {module for module in student.modules() if next(module.parameters(), None) is not None}
    trained = {identity(p) for p in student.parameters() if p.requires_grad}
    inside = [name for name, module in teacher.model.named_modules() if module in modules]
    tensors = (*teacher.model.named_parameters(), *teacher.model.named_buffers())
    if shared := inside or [name for name, tensor in tensors if identity(tensor) in trained]:
        teacher.give_back()  # the student is as it was before the teacher took over what they share
        what = "modules" if inside else "weights that train"
        problem = f"The teacher shares {what} with the student, and would change with it: {some_of(shared)}."
        if unwrap(teacher.model) is student:
            problem = "The teacher holds the student itself."
        raise TeacherError(
            f"{problem}\nBuild it from a copy of its own: copy.deepcopy(model), or share_frozen(model), which copies "
            "only what trains."
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
            "Average it over channels and pixels, and pass it first: criterion(loss, latents=x, step=step)."
        )


def check_batch(call: Call, denoising: Tensor, latents: object, stage: int) -> None:
    """Make sure that loss and latents are those of the captured call."""
    if denoising.ndim == 1 and len(denoising) != call.rows:
        raise ShapeError(
            f"The loop's loss has {len(denoising)} values, but the model's last call had {call.rows} samples: pass the "
            "loss of that call."
        )
    if latents is None:
        if stage == 1:
            raise ShapeError("Stage 1 aligns with the clean latents: call criterion(loss, latents=...).")
        return
    if not isinstance(latents, Tensor) or latents.ndim == 0:
        raise ShapeError(
            f"latents must be the batch's clean latents, a tensor (N, ...); got {described(latents)}.\n"
            "Of a VAE's posterior pass the sample that the loop adds noise to, scaled as the model sees it."
        )
    if len(latents) != call.rows:
        raise ShapeError(
            f"There are {len(latents)} latents, but the model's last call had {call.rows} samples: pass the same batch."
        )
    if latents.device != call.x_t.device:
        raise ShapeError(f"The latents lie on {latents.device}, x_t on {call.x_t.device}: move them there.")


def check_time(time: TimeConvention, call: Call, latents: Tensor | None) -> str | None:
    """Raise where t or x_t contradicts the convention; gives what to say where x_t cannot tell."""
    if latents is None:
        check_times(time, call.t, call.time_from)
        return None
    _check_same_shape(call, latents)
    return check_against_latents(time, call.x_t.detach(), call.t, latents.detach(), call.time_from)


def _check_same_shape(call: Call, latents: Tensor) -> None:
    if latents.shape != call.x_t.shape:
        raise ShapeError(
            f"The latents {tuple(latents.shape)} and the captured x_t {tuple(call.x_t.shape)} differ in shape.\n"
            "Pass this batch's clean latents in x_t's layout: packed if that is packed, in stage 1 with channel_axis= "
            "if its channels are not on axis 1. Where x_t holds more than the noisy latents, as for inpainting, pass "
            "check_interval=None."
        )


def _check_captured(tokens: Tensor, layer: str, head: Head, record: Record[Gated]) -> None:
    """Make sure that a head can be trained on the tokens."""
    rows, inside = record.note.call.rows, record.note.inside
    if len(tokens) != rows:
        raise ShapeError(
            f"Layer {layer!r} gave {len(tokens)} rows in a call of {rows} samples: tap a layer that keeps one row for "
            "each sample."
        )
    if inside.ndim == 2 and inside.shape != tokens.shape[:2]:
        raise ShapeError(
            f"The model's t has {inside.shape[1]} times a sample, but layer {layer!r} gave {tokens.shape[1]} tokens.\n"
            "Pick the image's tokens with tokens=, or say which time is the sample's, or each token's, with "
            "call=dict(t=lambda arguments: ...)."
        )
    if tokens.shape[-1] != head.in_features:
        raise ShapeError(
            f"Layer {layer!r} gave tokens of width {tokens.shape[-1]}, but the head reads {head.in_features}.\n"
            f"Build the criterion with hidden_size={tokens.shape[-1]}, or turn maps that are not (N, D, H, W) into "
            "(N, T, D) with a callable as tokens=."
        )
    _check_place(head, tokens.device, "head")
    if torch.is_grad_enabled() and not tokens.requires_grad:
        raise record.no_gradient(
            layer,
            "so aligning them would train nothing of the model",
            "Either everything up to this layer is frozen: tap a later one. Or it lies inside a segment of reentrant "
            "activation checkpointing: use use_reentrant=False, or tap the very module that is checkpointed.",
        )


def _check_place(module: Head | nn.Module, device: torch.device, what: str) -> None:
    """Raise ``ShapeError`` unless ``module`` lies on ``device``."""
    found = next(module.parameters()).device
    if found != device and not getattr(module, "is_placed", False):
        raise ShapeError(
            f"The {what} lies on {found}, the batch on {device}: call criterion.to({str(device)!r}), as for the model."
        )
