"""The projection head, and one layer's tokens through it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .errors import ShapeError
from .modules import check_positive


class ProjectionHead(nn.Sequential):
    """Linear(D → hidden) SiLU Linear(hidden → hidden) SiLU Linear(hidden → out).

    The head of Self-Transcendence, which is REPA's. Weights are Xavier-uniform and biases 0, as every Linear of the
    backbone; they are drawn from ``generator`` and never advance the global random number generator. The parameters'
    names ``{0,2,4}.{weight,bias}`` are those of the released projectors.

    Args:
        in_features: D, the width of the student's tokens.
        out_features: The width of what they are compared with.
        hidden_features: The width in between.
        generator: Source of the initial weights, on the CPU; by default a new one with seed 0, so that every process
            starts alike.
        device: Where the weights lie.

    Shape:
        tokens: (N, T, in_features), of any floating dtype: cast to that of the weights
        returns: (N, T, out_features)

    Raises:
        ShapeError: If the tokens' width is not ``in_features``.
        SettingError: If a width is not a positive integer.

    Reference: Sun et al., 2026, https://arxiv.org/abs/2601.07773; Yu et al., 2025, https://arxiv.org/abs/2410.06940

    Example:
        >>> import torch, selftrans_reg as st
        >>> head = st.ProjectionHead(384, 768, hidden_features=2048)
        >>> head(torch.zeros(2, 256, 384)).shape
        torch.Size([2, 256, 768])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden_features: int = 2048,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        widths = {"in_features": in_features, "out_features": out_features, "hidden_features": hidden_features}
        for name, width in widths.items():
            check_positive(name, width)
        generator = generator or torch.Generator().manual_seed(0)
        super().__init__(
            linear(in_features, hidden_features, generator, device),
            nn.SiLU(),
            linear(hidden_features, hidden_features, generator, device),
            nn.SiLU(),
            linear(hidden_features, out_features, generator, device),
        )
        self.in_features = in_features
        self.out_features = out_features
        self.hidden_features = hidden_features

    def forward(self, tokens: Tensor) -> Tensor:
        """Project tokens; see the class."""
        if tokens.shape[-1] != self.in_features:
            raise ShapeError(
                f"The head reads tokens of width {self.in_features}, but got {tuple(tokens.shape)}.\n"
                f"Build it with hidden_size={tokens.shape[-1]}, or tap the layer that it was built for."
            )
        first = self[0]
        assert isinstance(first, nn.Linear)
        result: Tensor = super().forward(tokens.to(first.weight.dtype))  # type: ignore[no-untyped-call]
        return result


def linear(
    in_features: int, out_features: int, generator: torch.Generator, device: torch.device | str | None
) -> nn.Linear:
    """A Linear with Xavier-uniform weights and zero bias, made without the global random number generator."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, in_features, out_features, device="cpu")  # type: ignore[no-untyped-call]
    nn.init.xavier_uniform_(layer.weight, generator=generator)
    nn.init.zeros_(layer.bias)
    moved: nn.Linear = layer.to(device)
    return moved
