"""A report as one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from os import PathLike
from typing import Any

from .figures import new_figure, save_figure
from .result import LayerReport, Measure

_MOST_NUMBERED = 12  # layers


def draw_report(report: LayerReport, path: str | PathLike[str]) -> None:
    """Draw a report: how well each layer knows the labels, contrast, rank, size, and alignment; the proposal marked.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    first = report.guidance_scales[0]
    own = "of the null condition alone" if first == 0 else ""
    labelled = report.chance is not None and report.classes != 1
    guided = len(report.guidance_scales) > 1
    figure = new_figure(13, 7.2 if labelled or guided else 3.8)
    all_panels = figure.subplots(2 if labelled or guided else 1, 3).flatten()
    panels = iter(all_panels)
    if labelled:
        _profile(next(panels), report, "probe", f"Linear probe {own}", first, percent=True)
        _profile(next(panels), report, "knn", f"k-NN {own}", first, percent=True)
    _profile(next(panels), report, "effective_rank", f"Effective rank {own}", first)
    if guided:
        _profile(next(panels), report, "contrast", "Contrast $|f_c - f_u|\\,/\\,|f_c|$", 1.0)
        _scale_panel(next(panels), report, "knn" if labelled else "norm")
    _alignment_panel(next(panels), report)
    for axes in panels:
        axes.set_axis_off()
    named = [pair for axes in all_panels for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    legend = {label: handle for handle, label in named}
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=len(legend), fontsize=8)
    figure.suptitle(f"{_plain(report.model)}, {report.samples:,} samples", fontsize=11)
    save_figure(figure, path)


def _plain(text: str) -> str:
    """A name as it is: matplotlib would read formulas between dollars."""
    return text.replace("$", r"\$")


def _layer_axis(axes: Any, layers: Sequence[str], *, which: str = "x") -> None:
    shown = [_plain(name if len(name) <= 24 else f"…{name[-23:]}") for name in layers]
    step = math.ceil(len(layers) / 28)
    setter = axes.set_xticks if which == "x" else axes.set_yticks
    rotation = 90.0 if which == "x" else 0.0
    setter(range(0, len(layers), step), shown[::step], fontsize=7, rotation=rotation)


def _profile(
    axes: Any, report: LayerReport, measure: Measure, title: str, scale: float, *, percent: bool = False
) -> None:
    """A measure over the layers, one line for each noise fraction, proposed layers marked."""
    factor = 100 if percent else 1
    for index, fraction in enumerate(report.noise_fractions):
        rows = {r.layer: r for r in report.rows if r.noise_fraction == fraction and r.guidance_scale == scale}
        values = [getattr(rows[layer], measure) for layer in report.layers]
        shade = str(0.6 * (1 - (index + 1) / len(report.noise_fractions)) + 0.1)
        label = f"noise fraction {fraction:g}"
        y = [math.nan if value is None else factor * value for value in values]
        axes.plot(range(len(y)), y, marker="o", markersize=3, color=shade, linewidth=1.2, label=label)
    if percent and report.chance is not None:
        axes.axhline(100 * report.chance, color="grey", linestyle=":", linewidth=1, label="chance")
    if report.recipe is not None:
        for name, colour, what in (
            (report.recipe.student_layer, "tab:blue", "student layer"),
            (report.recipe.teacher_layer, "tab:orange", "teacher layer"),
        ):
            if name in report.layers:
                axes.axvline(report.layers.index(name), color=colour, alpha=0.4, linewidth=5, label=what)
    axes.set_title(title + (", %" if percent else ""), fontsize=10)
    axes.tick_params(labelsize=8)
    _layer_axis(axes, report.layers)
    axes.grid(alpha=0.3)
    axes.set_ylim(bottom=0)  # or differences of chance would fill the panel


def _scale_panel(axes: Any, report: LayerReport, measure: Measure) -> None:
    """A measure of the guided features over layers and scales, the proposed pair framed."""
    scales = [scale for scale in report.guidance_scales if scale >= 1]
    factor = 100 if measure == "knn" else 1
    values = [[report.mean(measure, layer, scale) for scale in scales] for layer in report.layers]
    image = [[math.nan if value is None else factor * value for value in row] for row in values]
    shown = axes.imshow(image, aspect="auto", cmap="viridis", vmin=0, vmax=100 if measure == "knn" else None)
    axes.figure.colorbar(shown, ax=axes)
    _numbers(axes, shown, image, ".0f" if measure == "knn" else ".3g")
    axes.set_xticks(range(len(scales)), [f"{scale:g}" for scale in scales], fontsize=8)
    axes.set_xlabel("guidance scale w", fontsize=8)
    _layer_axis(axes, report.layers, which="y")
    axes.set_title("k-NN of $f_g$, %" if measure == "knn" else "Norm of a token of $f_g$", fontsize=10)
    plan = report.recipe
    if plan is not None and plan.teacher_layer in report.layers and plan.guidance_scale in scales:
        _frame(axes, scales.index(plan.guidance_scale), report.layers.index(plan.teacher_layer))


def _alignment_panel(axes: Any, report: LayerReport) -> None:
    """How alike the layers are: f_c of one with f_g of another, at the proposed scale if it was measured."""
    plan = report.recipe
    scale = plan.guidance_scale if plan is not None and plan.guidance_scale in report.guidance_scales else 1.0
    matrix = report.alignment[report.guidance_scales.index(scale)]
    image = [[math.nan if value is None else value for value in row] for row in matrix]
    shown = axes.imshow(image, vmin=0, vmax=1, cmap="magma")
    axes.figure.colorbar(shown, ax=axes)
    _numbers(axes, shown, image, ".2f")
    _layer_axis(axes, report.layers)
    _layer_axis(axes, report.layers, which="y")
    axes.set_title(f"CKA: $f_c$ (row) with $f_g$ (column), w = {scale:g}", fontsize=10)
    if plan is not None and plan.teacher_layer in report.layers and plan.student_layer in report.layers:
        _frame(axes, report.layers.index(plan.teacher_layer), report.layers.index(plan.student_layer))


def _numbers(axes: Any, shown: Any, values: Sequence[Sequence[float]], form: str) -> None:
    """Each cell's value in it, where there is room: near values are hard to tell by their colours."""
    if len(values) > _MOST_NUMBERED:
        return
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            if math.isnan(value):
                continue
            red, green, blue, _ = shown.to_rgba(value)
            colour = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.5 else "white"
            axes.text(column, row, f"{value:{form}}", color=colour, fontsize=7, ha="center", va="center")


def _frame(axes: Any, column: int, row: int) -> None:
    x, y = column - 0.5, row - 0.5
    corners = [x, x + 1, x + 1, x, x], [y, y, y + 1, y + 1, y]
    axes.plot(*corners, color="red", linewidth=1.5, clip_on=False, label="proposed")
