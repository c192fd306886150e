"""What a criterion measures of itself while it trains."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def mean_norm(tokens: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of a token's vector, averaged over samples, tokens and layers; 0-d, float32.

    Args:
        tokens: (N, T, D), one tensor a layer.
    """
    return torch.stack([found.detach().float().norm(dim=-1).mean() for found in tokens]).mean()


@torch.no_grad()
def contrast(conditional: Tensor, unconditional: Tensor) -> Tensor:
    """‖f_c − f_u‖ / ‖f_c‖ over all samples and tokens: what the condition changes in the features; 0-d, float32."""
    ratio: Tensor = (conditional - unconditional).norm() / conditional.norm()
    return ratio
