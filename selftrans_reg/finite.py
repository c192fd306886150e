"""Where NaN and inf come from: which of the models, which layer, at which noise fractions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .calls import Call
from .errors import NotFiniteError
from .names import named_layers, quoted, sharded_parts, unwrap
from .teacher import CFGFeatureTeacher
from .tokens import tensors_in

if TYPE_CHECKING:
    from .health import Look, Subject

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
