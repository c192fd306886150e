"""Figures of matplotlib, imported only when one is made: no window is opened and no backend chosen."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import MissingDependencyError

_DPI = 150


def new_figure(width: float, height: float) -> Any:
    """An empty figure, its sides in inches, that no window shows.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "Pictures need matplotlib, which is not installed.\n"
            "Install it alone (pip install matplotlib), or all that the examples use: "
            "pip install 'selftrans-reg[examples]'."
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: str | PathLike[str]) -> None:
    """Write under another name of the same ending, then rename: always whole. The folder is made if there is none."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.stem}.partial{file.suffix}")
    figure.savefig(partial, dpi=_DPI)
    partial.replace(file)


def show(axes: Any, picture: Any, title: str = "", label: str = "") -> None:
    """A picture (H, W, 3), pixels square and unsmoothed, with a title above and a label beside it."""
    axes.imshow(picture.numpy() if isinstance(picture, Tensor) else picture, interpolation="nearest")
    axes.set_title(title, fontsize=9)
    axes.set_ylabel(label, fontsize=9)
    if label:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    else:
        axes.set_axis_off()


def save_panels(rows: Mapping[str, Mapping[str, Any]], path: str | PathLike[str]) -> None:
    """Write rows of pictures, pixels square and unsmoothed, as one PNG.

    Args:
        rows: A heading for each row, and for each of its pictures, (H, W, 3) in [0, 1], a title.
        path: The file.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    figure = new_figure(12, 2.7 * len(rows))
    figure.get_layout_engine().set(wspace=0.06)  # or white borders would run together
    parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for part, (heading, row) in zip(parts, rows.items(), strict=True):
        part.suptitle(heading, fontsize=10)
        for axes, (title, picture) in zip(part.subplots(1, len(row), squeeze=False)[0], row.items(), strict=True):
            show(axes, picture, title)
    save_figure(figure, path)
