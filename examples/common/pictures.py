"""Pictures of the examples: the library's, and what they draw besides."""

import matplotlib

matplotlib.use("Agg")  # pictures are written to files: no window, and no display needed

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from selftrans_reg.analysis import draw
from selftrans_reg.analysis.draw import ColourBasis, save_panels

__all__ = ["ColourBasis", "grey_to_rgb", "plt", "save_panels", "tile"]


def tile(images: Tensor, columns: int, *, gap: int = 1) -> NDArray[np.float32]:
    """Images (N, H, W, 3) in [0, 1] in a grid with white gaps, as the array that Pillow and matplotlib take."""
    return draw.tile(images, columns, gap=gap).numpy()


def grey_to_rgb(images: Tensor) -> Tensor:
    """Images (N, 1, H, W) in [-1, 1] as dark ink on white, (N, H, W, 3) in [0, 1]."""
    return (0.5 - images.permute(0, 2, 3, 1).expand(-1, -1, -1, 3) / 2).clamp(0, 1).cpu()
