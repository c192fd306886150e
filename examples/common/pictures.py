"""Pictures: grids of images, and tokens as colours on one shared basis."""

import math

import matplotlib

matplotlib.use("Agg")  # pictures are written to files: no window, and no display needed

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def tile(images: Tensor, columns: int, *, gap: int = 1) -> NDArray[np.float32]:
    """Lay images out row by row in a grid, with a white gap.

    Shape:
        images: (N, H, W, 3), values in [0, 1]; returns: (rows * (H + gap) - gap, columns * (W + gap) - gap, 3)
    """
    n, height, width, channels = images.shape
    rows = -(-n // columns)
    canvas = torch.ones(rows * (height + gap) - gap, columns * (width + gap) - gap, channels)
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return canvas.numpy()


def grey_to_rgb(images: Tensor) -> Tensor:
    """Images (N, 1, H, W) in [-1, 1] as dark ink on white, (N, H, W, 3) in [0, 1]."""
    return (0.5 - images.permute(0, 2, 3, 1).expand(-1, -1, -1, 3) / 2).clamp(0, 1).cpu()


class ColourBasis:
    """Three principal directions of some tokens, and the range that they fill: what the three colours mean.

    All tokens, the basis's and those that are drawn, are first freed of their own mean at each position: position is
    what tokens differ in most, and it is the same in every image.

    Args:
        tokens: (N, T, D), what the basis is taken from.
    """

    _OUTLIERS = 0.01  # this fraction at each end of a component is cut off, or a few tokens would take all the contrast

    def __init__(self, tokens: Tensor) -> None:
        centred = _centred(tokens).flatten(0, 1)
        _, _, directions = torch.linalg.svd(centred, full_matrices=False)
        self.directions = directions[:3].T  # (D, 3)
        quantiles = torch.tensor([self._OUTLIERS, 1 - self._OUTLIERS], dtype=torch.float64, device=tokens.device)
        self.low, self.high = torch.quantile(centred @ self.directions, quantiles, dim=0)

    def colours(self, tokens: Tensor) -> Tensor:
        """Red, green and blue from the three components, clipped to the basis's range.

        Shape:
            tokens: (N, T, D), T a square; returns: (N, sqrt(T), sqrt(T), 3), values in [0, 1]
        """
        components = _centred(tokens) @ self.directions
        side = math.isqrt(components.shape[1])
        colours = ((components - self.low) / (self.high - self.low)).clamp(0, 1)
        return colours.unflatten(1, (side, side)).float().cpu()


def _centred(tokens: Tensor) -> Tensor:
    return tokens.double() - tokens.double().mean(0)


def save_panels(rows: dict[str, dict[str, NDArray[np.float32]]], path: Path) -> None:
    """Write rows of pictures, pixels square and unsmoothed, as one PNG.

    Args:
        rows: A heading for each row, and for each of its pictures a title.
        path: The file.
    """
    figure = plt.figure(figsize=(12, 2.7 * len(rows)), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)  # or pictures with white borders would run into each other
    parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for part, (heading, row) in zip(parts, rows.items(), strict=True):
        part.suptitle(heading, fontsize=10)
        for axes, (title, picture) in zip(part.subplots(1, len(row), squeeze=False)[0], row.items(), strict=True):
            axes.imshow(picture, interpolation="nearest")
            axes.set_title(title, fontsize=9)
            axes.set_axis_off()
    figure.savefig(path, dpi=150)
    plt.close(figure)
