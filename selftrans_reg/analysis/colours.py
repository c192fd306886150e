"""Tokens as colours on one shared basis, and images laid out in grids: tensors only."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import SettingError, ShapeError

_MOST_VALUES = 1 << 23  # that a basis is taken from: its directions are settled long before
_OUTLIERS = 0.01  # this fraction at each end of a component is cut off, or a few tokens would take all the contrast


class ColourBasis:
    """Three principal directions of some tokens, and the range that they fill: what the three colours mean.

    All tokens, the basis's and those that are drawn, are first freed of their own mean at each position: position is
    what tokens differ in most, and it is the same in every image. With ``unit`` each group, (N, T, D) of one D, is
    divided by the root mean square of its values, so that colours tell directions and not sizes.
    """

    def __init__(self, *groups: Tensor, unit: bool = False) -> None:
        shapes = [tuple(group.shape) for group in groups]
        if not groups or any(len(shape) != 3 for shape in shapes) or len({shape[2] for shape in shapes}) > 1:
            raise ShapeError(f"A colour basis is taken from tokens (N, T, D) of one width D; got {shapes}.")
        if shapes[0][2] < 3:
            raise SettingError(f"Three colours need tokens of width 3 or more; got {shapes[0][2]}.")
        self.unit = unit
        step = math.ceil(sum(group.numel() for group in groups) / _MOST_VALUES)
        centred = torch.cat([self._prepared(group).flatten(0, 1)[::step] for group in groups])
        self.directions = torch.linalg.svd(centred, full_matrices=False).Vh[:3].T  # (D, 3)
        quantiles = torch.tensor([_OUTLIERS, 1 - _OUTLIERS], dtype=torch.float64, device=centred.device)
        self.low, self.high = torch.quantile(centred @ self.directions, quantiles, dim=0)

    def colours(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Tokens (N, T, D) as red, green and blue (N, rows, columns, 3) in [0, 1], on the CPU.

        These are the three components, clipped to the basis's range; without a grid it is a square.
        """
        components = self._prepared(tokens) @ self.directions
        n, count, _ = components.shape
        rows, columns = grid or (math.isqrt(count),) * 2
        if rows * columns != count:
            raise ShapeError(
                f"{count} tokens are no grid of {rows} x {columns}: pass grid=, and tokens= if not all count."
            )
        colours: Tensor = ((components - self.low) / (self.high - self.low)).clamp(0, 1)
        return colours.reshape(n, rows, columns, 3).float().cpu()

    def _prepared(self, tokens: Tensor) -> Tensor:
        centred = tokens.double() - tokens.double().mean(0)
        size = centred.square().mean().sqrt()
        return centred / size if self.unit and size > 0 else centred


def tile(images: Tensor, columns: int, *, gap: int = 1) -> Tensor:
    """Images (N, H, W, 3) in [0, 1] row by row in a grid with white gaps, (rows * (H + gap) - gap, ..., 3)."""
    n, height, width, channels = images.shape
    rows = -(-n // columns)
    canvas = images.new_ones(rows * (height + gap) - gap, columns * (width + gap) - gap, channels)
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return canvas


def image_colours(images: Tensor) -> Tensor:
    """Images (N, 1 or 3, H, W) in [-1, 1] as (N, H, W, 3) in [0, 1], on the CPU."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ShapeError(f"Images to draw are (N, 1, H, W) or (N, 3, H, W) in [-1, 1]; got {tuple(images.shape)}.")
    return (0.5 + images.detach().float().permute(0, 2, 3, 1).expand(-1, -1, -1, 3) / 2).clamp(0, 1).cpu()
