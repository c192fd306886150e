"""What one call of the criterion is checked for: loss, latents and tokens must be those of the captured call."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .calls import Call
from .errors import GradientError, PlacementError, ShapeError, TeacherError, TimeConventionError
from .heads import ProjectionHead
from .losses import VAEAlignmentLoss
from .names import find_layer, unwrap
from .teacher import CFGFeatureTeacher
from .time import TimeConvention
from .tokens import described


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
        PlacementError: If the latents lie elsewhere.
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
        raise PlacementError(f"The latents lie on {latents.device}, x_t on {call.x_t.device}: move them there.")


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


def check_captured(tokens: Tensor, call: Call, layer: str, head: nn.Module) -> None:
    """Make sure that a head can be trained on the tokens.

    Raises:
        ShapeError: If there is not one row for each sample, or the head reads another width.
        PlacementError: If the head lies elsewhere.
        GradientError: If the tokens carry no gradient although gradients are enabled.
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
        raise GradientError(
            f"The tokens of layer {layer!r} carry no gradient, so aligning them would train nothing of the model.\n"
            "Either everything up to this layer is frozen: tap a later one. Or reentrant activation checkpointing "
            "hides the gradient of what lies inside a checkpointed segment: use use_reentrant=False, or tap the very "
            "module that is checkpointed."
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


def check_device(module: nn.Module, device: torch.device, what: str) -> None:
    """Raise ``PlacementError`` unless ``module`` lies on ``device``."""
    if device_of(module) != device:
        raise PlacementError(
            f"The {what} lies on {device_of(module)}, the batch on {device}: call criterion.to({str(device)!r}) where "
            "the model is moved."
        )


def device_of(module: nn.Module) -> torch.device:
    """Where a module's parameters lie; the CPU for one without, or one on the meta device."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    return torch.device("cpu") if device.type == "meta" else device
