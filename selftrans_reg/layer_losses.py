"""One layer's tokens through its head: the distance to the target, and a zero that depends on the head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .checks import device_of
from .errors import ShapeError
from .heads import ProjectionHead
from .losses import Distance, VAEAlignmentLoss, feature_alignment


def distance_of(head: nn.Module, tokens: Tensor, target: Tensor, distance: Distance) -> Tensor:
    """(n,), the distance of each row's tokens, through ``head``, to the latents or to the teacher's features.

    Raises:
        ShapeError: If the features do not fit what the head gives.
    """
    if isinstance(head, VAEAlignmentLoss):
        distances: Tensor = head(tokens, target)
        return distances
    prediction = head(tokens)
    if prediction.shape != target.shape:
        raise ShapeError(
            f"The teacher gives features {tuple(target.shape)}, the student's head {tuple(prediction.shape)}: both "
            "must have the same samples, tokens and width.\n"
            "Check that both are tapped at the image's tokens (tokens=), at the same resolution and patch size, "
            "and that the head was built for this teacher's layer."
        )
    return feature_alignment(prediction, target, distance)


def zero_of(heads: nn.ModuleList) -> Tensor:
    """An exact 0 that depends on every parameter: without it DDP waits for gradients that never come."""
    return torch.stack([_on_no_rows(head) for head in heads]).sum()


def _on_no_rows(head: nn.Module) -> Tensor:
    device = device_of(head)
    if isinstance(head, VAEAlignmentLoss):
        one_patch = torch.zeros(0, head.latent_channels, *head.patch_size, device=device).movedim(1, head.channel_axis)
        distances: Tensor = head(torch.zeros(0, 1, head.head.in_features, device=device), one_patch)
        return distances.sum()
    assert isinstance(head, ProjectionHead)
    projected: Tensor = head(torch.zeros(0, 1, head.in_features, device=device))
    return projected.float().sum()
