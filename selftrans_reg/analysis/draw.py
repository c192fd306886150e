"""Pictures: tokens as colours, a report, the curves of a log. They need matplotlib, as in the extra ``examples``."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import MissingDependencyError, SettingError, ShapeError
from ..modules import quoted
from ..teacher import check_guidance_scale
from .colours import ColourBasis, image_colours, tile
from .report import LayerReport, Measure, replaced
from .scores import standard_error
from .survey import LayerReader, guided, noise_generator, undisturbed

__all__ = ["ColourBasis", "draw_curves", "draw_features", "draw_report", "save_panels", "tile"]

Log: TypeAlias = str | PathLike[str] | Sequence[Mapping[str, Any]]

_DPI = 150
_MOST_NUMBERED = 12  # layers


def draw_features(
    model: nn.Module,
    batch: Any,
    path: str | PathLike[str],
    layers: Sequence[str] | None = None,
    guidance_scales: Sequence[float] = (0, 1, 4, 30),
    *,
    noise_fraction: float = 0.5,
    decode: Callable[[Tensor], Tensor] | None = None,
    shown: int = 4,
    grid: tuple[int, int] | None = None,
    seed: int = 0,
    **reading: Any,
) -> None:
    """Draw the tokens of layers as colours, for every guidance scale, beside the clean and the noisy input.

    The colours are three principal components, on one basis for the whole picture: that of all tokens in it, over the
    whole batch. Each map is first freed of its mean over the batch at each position and scaled to one size, so that
    the same colour is the same direction in every layer and at every scale.

    The batch is one of :func:`layer_report`'s, as are ``reading``: ``time=``, ``null=``, ``call=``, ``select=`` and
    ``tokens=``. Some dozens of samples make a good basis; the first ``shown`` are drawn. Layers are of one width, by
    default all blocks. Without ``null=`` there is the condition alone. ``decode`` makes images (N, 1 or 3, H, W) in
    [-1, 1] of latents; without it their own components are drawn. ``grid`` is rows and columns of the tokens, where
    they are not those of square patches.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
        SettingError: If an argument makes no sense, or features are not finite.
        ShapeError: If the layers differ in width, or the tokens do not make a grid.
    """
    _new_figure(1, 1)  # no forward for nothing
    for scale in guidance_scales:
        check_guidance_scale(scale)
    scales = [1.0] if reading.get("null") is None else list(dict.fromkeys(map(float, guidance_scales)))
    if not scales or type(shown) is not int or shown < 1:
        raise SettingError(f"Name guidance scales, and show one sample or more; got {guidance_scales!r}, {shown!r}.")
    reader = LayerReader(model, layers, **reading)
    with undisturbed(model), torch.no_grad():
        latents, _, arguments = reader.read(batch)
        if latents.ndim != 4 or len(latents) < 2:
            raise ShapeError(f"Drawn are latents (N, C, H, W), 2 or more; got {tuple(latents.shape)}.")
        noise = torch.randn(latents.shape, generator=noise_generator(seed), device="cpu")
        x_t, found = reader.run(latents, arguments, noise, noise_fraction)
        pictures = _latent_pictures(latents, x_t, decode, shown)
    names = list(found)
    maps = {(name, scale): guided(found[name], scale) for name in names for scale in scales}
    if broken := [name for (name, _), tokens_of in maps.items() if not tokens_of.isfinite().all()]:
        raise SettingError(f"Features that are not finite cannot be drawn; layer {broken[0]!r} has some.")
    basis = ColourBasis(*maps.values(), unit=True)
    columns = math.isqrt(shown - 1) + 1
    figure = _new_figure(2.1 * (len(scales) + 1) + 1, max(2.1 * len(names), 4.4) + 0.7)
    figure.suptitle(
        f"Tokens as colours at noise fraction {noise_fraction:g}: three principal components, one basis for all maps,\n"
        f"taken from all of them over {len(latents)} samples; each map less its mean at each position, and of one size",
        fontsize=10,
    )
    left, right = figure.subfigures(1, 2, width_ratios=[1, len(scales) + 0.2])
    inputs = left.subplots(max(2, len(names)), 1)
    for axes in inputs:
        axes.set_axis_off()
    for axes, (title, picture) in zip(inputs, pictures.items(), strict=False):  # beside the first two layers
        _show(axes, tile(picture, columns, gap=max(1, picture.shape[1] // 8)), title)
    figure.get_layout_engine().set(wspace=0.1, hspace=0.12)  # or samples of one layer and the next run together
    cells = right.subplots(len(names), len(scales), squeeze=False).flatten()
    titles = {0.0: "$f_u$ (w = 0)", 1.0: "$f_c$ (w = 1)"}
    for axes, ((name, scale), tokens_of) in zip(cells, maps.items(), strict=True):
        colours = basis.colours(tokens_of, grid or _grid_of(latents, tokens_of.shape[1]))[:shown]
        title = titles.get(scale, f"w = {scale:g}") if name == names[0] else ""
        _show(axes, tile(colours, columns), title, name if scale == scales[0] else "")
    save_figure(figure, path)


def draw_report(report: LayerReport, path: str | PathLike[str]) -> None:
    """Draw a report: how well each layer knows the labels, contrast, rank, size, and alignment; the proposal marked.

    Over layers and guidance scales it shows how well nearest neighbours of f_g find the label or, where that is the
    same for all within two standard errors, how long f_g is.
    """
    first, many = report.guidance_scales[0], report.labelled or len(report.guidance_scales) > 1
    own = "of the null condition alone" if first == 0 else ""
    figure = _new_figure(13, 7.2 if many else 3.8)
    all_panels = figure.subplots(2 if many else 1, 3).flatten()
    panels = iter(all_panels)
    if report.labelled:
        _profile(next(panels), report, "probe", f"Linear probe {own}, %", first, 100)
        _profile(next(panels), report, "knn", f"k-NN {own}, %", first, 100)
    _profile(next(panels), report, "effective_rank", f"Effective rank {own}", first)
    if len(report.guidance_scales) > 1:
        _profile(next(panels), report, "contrast", "Contrast $|f_c - f_u|\\,/\\,|f_c|$", 1.0)
        _scale_panel(next(panels), report)
    _alignment_panel(next(panels), report)
    for axes in panels:
        axes.set_axis_off()
    named = [pair for axes in all_panels for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    legend = {label: handle for handle, label in named}
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=len(legend), fontsize=8)
    figure.suptitle(f"{_plain(report.model)}, {report.samples:,} samples", fontsize=11)
    save_figure(figure, path)


def draw_curves(log: Log | Mapping[str, Log], path: str | PathLike[str]) -> None:
    """Draw every term of a training log over the steps, one panel a term; values that are not finite are marked.

    A log is a file of JSON lines, or the lines as mappings, each with ``step`` (or ``steps``); several logs by name are
    compared. A last line without its end, as a run that is still going leaves it, is left out.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
        SettingError: If a line is not JSON, names no step, or nothing was logged.
    """
    logs = dict(log) if isinstance(log, Mapping) else {"": log}
    lines = {name: list(_entries(one, name)) for name, one in logs.items()}
    terms = list(dict.fromkeys(key for entries in lines.values() for _, entry in entries for key in entry))
    if not terms:
        raise SettingError(f"There is no curve to draw: no number was logged in {quoted(map(str, logs))}.")
    columns = min(3, len(terms))
    rows = math.ceil(len(terms) / columns)
    figure = _new_figure(4 * columns, 2.6 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, term in zip(panels, terms, strict=False):
        for index, entries in enumerate(lines.values()):
            points = [(step, entry[term]) for step, entry in entries if term in entry]
            steps, values = [step for step, _ in points], [v if math.isfinite(v) else math.nan for _, v in points]
            axes.plot(steps, values, color=f"C{index}", linewidth=1.2, marker="." if len(points) < 3 else None)
            broken = [step for step, value in points if not math.isfinite(value)]
            axes.plot(broken, [0.03] * len(broken), "x", color="red", transform=axes.get_xaxis_transform())
            if broken:
                axes.set_title(f"{term} (x: not finite)", fontsize=10)
        axes.set_title(axes.get_title() or term, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    for axes in panels[len(terms) :]:
        axes.set_axis_off()
    if len(logs) > 1:
        handles = [panels[0].plot([], [], color=f"C{index}", label=name)[0] for index, name in enumerate(logs)]
        figure.legend(handles=handles, loc="outside upper center", ncols=len(logs), fontsize=9)
    save_figure(figure, path)


def save_panels(rows: Mapping[str, Mapping[str, Any]], path: str | PathLike[str]) -> None:
    """Write rows of pictures, (H, W, 3) in [0, 1], as one: a heading for each row, and a title for each picture."""
    figure = _new_figure(12, 2.7 * len(rows))
    figure.get_layout_engine().set(wspace=0.06)  # or white borders would run together
    parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for part, (heading, row) in zip(parts, rows.items(), strict=True):
        part.suptitle(heading, fontsize=10)
        for axes, (title, picture) in zip(part.subplots(1, len(row), squeeze=False)[0], row.items(), strict=True):
            _show(axes, picture, title)
    save_figure(figure, path)


def save_figure(figure: Any, path: str | PathLike[str]) -> None:
    """Write a figure, always whole."""
    with replaced(path) as partial:
        figure.savefig(partial, dpi=_DPI)


def _new_figure(width: float, height: float) -> Any:
    """An empty figure, its sides in inches: no window is opened and no backend chosen."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "Pictures need matplotlib, which is not installed. Install it: pip install matplotlib."
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def _show(axes: Any, picture: Any, title: str = "", label: str = "") -> None:
    """A picture (H, W, 3), pixels square and unsmoothed, with a title above and a label beside it."""
    axes.imshow(picture.numpy() if isinstance(picture, Tensor) else picture, interpolation="nearest")
    axes.set_title(title, fontsize=9)
    axes.set_ylabel(label, fontsize=9)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _grid_of(latents: Tensor, count: int) -> tuple[int, int] | None:
    """Rows and columns of square patches that give so many tokens; None if none do."""
    height, width = latents.shape[2:]
    side = math.isqrt(max(1, height * width // count))
    rows, columns = height // side, width // side
    return (rows, columns) if rows * columns == count else None


def _latent_pictures(
    latents: Tensor, x_t: Tensor, decode: Callable[[Tensor], Tensor] | None, shown: int
) -> dict[str, Tensor]:
    """The clean and the noisy input by title, (shown, H, W, 3): decoded, or the latents' own components."""
    both, kind = (latents, x_t), ""
    if decode is not None:
        pictures = [image_colours(decode(x[:shown])) for x in both]
    elif latents.shape[1] < 3:
        middle, size = latents.mean(), 2 * latents.std()
        pictures = [image_colours((x[:shown].mean(1, keepdim=True) - middle) / size) for x in both]
    else:
        kind, basis = ": latents' components", ColourBasis(latents.flatten(2).mT)
        height, width = latents.shape[2:]
        pictures = [basis.colours(x.flatten(2).mT, (height, width))[:shown] for x in both]
    return {f"clean{kind}": pictures[0], f"$x_t${kind}": pictures[1]}


def _plain(text: str) -> str:
    return text.replace("$", r"\$")  # matplotlib would read formulas between dollars


def _label(axis: Any, names: Sequence[str], rotation: int = 0) -> None:
    """Layers, or as many as there is room for, along an axis."""
    shown = [_plain(name if len(name) <= 24 else f"…{name[-23:]}") for name in names]
    step = math.ceil(len(names) / 28)
    axis.set_ticks(range(0, len(names), step), shown[::step], fontsize=7, rotation=rotation)


def _profile(axes: Any, report: LayerReport, measure: Measure, title: str, scale: float, factor: int = 1) -> None:
    """A measure over the layers, one line for each noise fraction, proposed layers marked."""
    for index, fraction in enumerate(report.noise_fractions, 1):
        rows = {r.layer: r for r in report.rows if r.noise_fraction == fraction and r.guidance_scale == scale}
        y = _or_nan([getattr(rows[layer], measure) for layer in report.layers], factor)
        shade, label = str(0.7 - 0.6 * index / len(report.noise_fractions)), f"noise fraction {fraction:g}"
        axes.plot(range(len(y)), y, marker="o", markersize=3, color=shade, linewidth=1.2, label=label)
    if factor == 100 and report.chance is not None:
        axes.axhline(100 * report.chance, color="grey", linestyle=":", linewidth=1, label="chance")
    for what, colour in ("student", "tab:blue"), ("teacher", "tab:orange"):
        if (name := getattr(report.recipe, f"{what}_layer", None)) in report.layers:
            axes.axvline(report.layers.index(name), color=colour, alpha=0.4, linewidth=5, label=f"{what} layer")
    axes.set_title(title, fontsize=10)
    axes.tick_params(labelsize=8)
    _label(axes.xaxis, report.layers, 90)
    axes.grid(alpha=0.3)
    axes.set_ylim(bottom=0)  # or differences of chance would fill the panel


def _scale_panel(axes: Any, report: LayerReport) -> None:
    """k-NN of the guided features over layers and scales or, where it is the same for all, their norm."""
    layers = report.layers
    scales = [scale for scale in report.guidance_scales if scale >= 1]
    known = [knn for layer in layers for w in scales if (knn := report.mean("knn", layer, w)) is not None]
    tells = bool(known) and max(known) - min(known) > 2 * standard_error(max(known), report.held_out)
    measure: Measure = "knn" if tells else "norm"
    image = [_or_nan([report.mean(measure, layer, w) for w in scales], 100 if tells else 1) for layer in layers]
    look = {"vmax": 100 if tells else None, "cmap": "viridis", "aspect": "auto"}
    _map(axes, report, image, scales, ("teacher_layer", "guidance_scale"), ".0f" if tells else ".3g", **look)
    axes.set_xticks(range(len(scales)), [f"{scale:g}" for scale in scales], fontsize=8)
    axes.set_xlabel("guidance scale w", fontsize=8)
    axes.set_title("k-NN of $f_g$, %" if tells else "Norm of a token of $f_g$", fontsize=10)


def _alignment_panel(axes: Any, report: LayerReport) -> None:
    """How alike the layers are: f_c of one with f_g of another, at the proposed scale if it was measured."""
    layers, plan = report.layers, report.recipe
    scale = plan.guidance_scale if plan is not None and plan.guidance_scale in report.guidance_scales else 1.0
    image = [_or_nan(row) for row in report.alignment[report.guidance_scales.index(scale)]]
    _map(axes, report, image, layers, ("student_layer", "teacher_layer"), ".2f", vmax=1, cmap="magma")
    _label(axes.xaxis, layers, 90)
    axes.set_title(f"CKA: $f_c$ (row) with $f_g$ (column), w = {scale:g}", fontsize=10)


def _map(
    axes: Any, report: LayerReport, image: Any, columns: Sequence[Any], pair: Sequence[str], form: str, **look: Any
) -> None:
    """An image over layers and columns, where there is room with its numbers; the proposed pair of both framed."""
    shown = axes.imshow(image, vmin=0, **look)
    axes.figure.colorbar(shown, ax=axes)
    _label(axes.yaxis, report.layers)
    cells = [(row, column, value) for row, line in enumerate(image) for column, value in enumerate(line)]
    for row, column, value in cells if len(report.layers) <= _MOST_NUMBERED else ():
        if not math.isnan(value):
            red, green, blue, _ = shown.to_rgba(value)
            colour = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.5 else "white"
            axes.text(column, row, f"{value:{form}}", color=colour, fontsize=7, ha="center", va="center")
    mark = [getattr(report.recipe, name, None) for name in pair]
    if mark[0] in report.layers and mark[1] in columns:
        x, y = columns.index(mark[1]) - 0.5, report.layers.index(mark[0]) - 0.5
        corners = [x, x + 1, x + 1, x, x], [y, y, y + 1, y + 1, y]
        axes.plot(*corners, color="red", linewidth=1.5, clip_on=False, label="proposed")


def _or_nan(values: Sequence[float | None], factor: float = 1) -> list[float]:
    return [math.nan if value is None else factor * value for value in values]


def _entries(log: Log, name: str) -> Iterator[tuple[float, dict[str, float]]]:
    """The step of each entry and the other numbers in it; a last line without its end is left out."""
    lines: Sequence[Any] = Path(log).read_text("utf-8").split("\n")[:-1] if isinstance(log, str | PathLike) else log
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line) if isinstance(line, str) else line
        except ValueError as error:
            raise SettingError(f"Line {number} of {log} is not JSON: {line[:80]!r}.") from error
        if not isinstance(entry, Mapping):
            raise SettingError(f"Line {number} of {name or log} is no JSON object: {entry!r:.80}.")
        numbers = {key: value for key, value in entry.items() if type(value) in (int, float)}
        steps = [numbers.pop(key) for key in ("step", "steps") if key in numbers]
        if not steps:
            raise SettingError(f"An entry of the log {name!r} has no step: {dict(entry)!r:.120}.")
        yield float(steps[0]), numbers
