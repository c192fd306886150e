"""Pictures: tokens as colours, a report, the curves of a log. They need matplotlib, as in the extra ``examples``."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import MissingDependencyError, SettingError, ShapeError
from ..modules import layer_names, quoted
from ..null import Null
from ..recipes import find_blocks
from ..teacher import check_guidance_scale
from ..time import TimeConvention, resolve
from ..tokens import Select, Tokens
from .colours import ColourBasis, image_colours, tile
from .report import LayerReport, Measure
from .scores import standard_error
from .survey import LayerReader, add_noise, noise_generator, times_at, undisturbed

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
    time: str | TimeConvention,
    null: Null | None = None,
    noise_fraction: float = 0.5,
    call: Mapping[str, Any] | None = None,
    select: Select = None,
    tokens: Tokens = None,
    decode: Callable[[Tensor], Tensor] | None = None,
    shown: int = 4,
    grid: tuple[int, int] | None = None,
    seed: int = 0,
) -> None:
    """Draw the tokens of layers as colours, for every guidance scale, beside the clean and the noisy input.

    The colours are three principal components, on one basis for the whole picture: that of all tokens in it, over the
    whole batch. Each map is first freed of its mean over the batch at each position and scaled to one size, so that
    the same colour is the same direction in every layer and at every scale.

    Args:
        model: Any backbone. It, its mode and the global random state stay as they are.
        batch: As for :func:`layer_report`; some dozens of samples make a good basis.
        path: The picture; its ending names the format.
        layers: Names, of one width; by default all blocks.
        guidance_scales: w, a column each; 0 is the null condition alone. Without ``null`` there is the condition alone.
        time: What the model's t means.
        null: The null condition, as :func:`build_teacher` takes it.
        noise_fraction: Of the noisy input.
        call: Where x_t and t are, as for :func:`build_teacher`.
        select: Which tensor of a layer's output.
        tokens: Which tokens are the image's.
        decode: From latents to images (N, 1 or 3, H, W) in [-1, 1]; without it the latents' own components are drawn.
        shown: How many samples of the batch are drawn, from its first on.
        grid: Rows and columns of the tokens, where they are not those of square patches of the latents.
        seed: Of the noise.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
        SettingError: If an argument makes no sense, or features are not finite.
        ShapeError: If the layers differ in width, or the tokens do not make a grid.
    """
    _new_figure(1, 1)  # no forward for nothing
    for scale in guidance_scales:
        check_guidance_scale(scale)
    scales = [float(scale) for scale in guidance_scales] if null is not None else [1.0]
    if not scales or type(shown) is not int or shown < 1:
        raise SettingError(f"Name guidance scales, and show one sample or more; got {guidance_scales!r}, {shown!r}.")
    names = find_blocks(model, None) if layers is None else layer_names(layers)
    reader = LayerReader(model, names, time=resolve(time), null=null, call=call, select=select, tokens=tokens)
    with undisturbed(model), torch.no_grad():
        read = reader.read(batch)
        latents = read.latents
        if latents.ndim != 4 or len(latents) < 2:
            raise ShapeError(f"Drawn are latents (N, C, H, W), 2 or more; got {tuple(latents.shape)}.")
        noise = torch.randn(latents.shape, generator=noise_generator(seed), device="cpu").to(latents)
        found = reader.run(read, noise, noise_fraction)
        t = times_at(reader.time, noise_fraction, len(latents), latents.device)
        pictures = _latent_pictures(latents, add_noise(reader.time, latents, noise, t), decode, shown)
    maps = {
        (name, scale): c if u is None else u + scale * (c - u) for name, (c, u) in found.items() for scale in scales
    }
    if broken := [name for name in names if not all(maps[name, scale].isfinite().all() for scale in scales)]:
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
    cells = right.subplots(len(names), len(scales), squeeze=False)
    titles = {0.0: "$f_u$ (w = 0)", 1.0: "$f_c$ (w = 1)"}
    for row, name in enumerate(names):
        for column, scale in enumerate(scales):
            tokens_of = maps[name, scale]
            colours = basis.colours(tokens_of, grid or _grid_of(latents, tokens_of))[:shown]
            title = "" if row else titles.get(scale, f"w = {scale:g}")
            _show(cells[row, column], tile(colours, columns), title, "" if column else name)
    save_figure(figure, path)


def draw_report(report: LayerReport, path: str | PathLike[str]) -> None:
    """Draw a report: how well each layer knows the labels, contrast, rank, size, and alignment; the proposal marked.

    Over layers and guidance scales it shows how well nearest neighbours of f_g find the label or, where that is the
    same for all within two standard errors, how long f_g is.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    first, guided = report.guidance_scales[0], len(report.guidance_scales) > 1
    own = "of the null condition alone" if first == 0 else ""
    figure = _new_figure(13, 7.2 if report.labelled or guided else 3.8)
    all_panels = figure.subplots(2 if report.labelled or guided else 1, 3).flatten()
    panels = iter(all_panels)
    if report.labelled:
        _profile(next(panels), report, "probe", f"Linear probe {own}, %", first, 100)
        _profile(next(panels), report, "knn", f"k-NN {own}, %", first, 100)
    _profile(next(panels), report, "effective_rank", f"Effective rank {own}", first)
    if guided:
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

    Args:
        log: A file of JSON lines, or the lines as mappings, each with ``step`` (or ``steps``); or several logs by name,
            to be compared. A last line without its end, as a run that is still going leaves it, is left out.
        path: The picture; its ending names the format.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
        SettingError: If a line is not JSON, names no step, or nothing was logged.
    """
    logs = dict(log) if isinstance(log, Mapping) else {"": log}
    lines = {name: [(_step(entry, name), _numbers(entry)) for entry in _lines(one)] for name, one in logs.items()}
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
    """Write rows of pictures, pixels square and unsmoothed, as one PNG.

    Args:
        rows: A heading for each row, and for each of its pictures, (H, W, 3) in [0, 1], a title.
        path: The file.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    figure = _new_figure(12, 2.7 * len(rows))
    figure.get_layout_engine().set(wspace=0.06)  # or white borders would run together
    parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for part, (heading, row) in zip(parts, rows.items(), strict=True):
        part.suptitle(heading, fontsize=10)
        for axes, (title, picture) in zip(part.subplots(1, len(row), squeeze=False)[0], row.items(), strict=True):
            _show(axes, picture, title)
    save_figure(figure, path)


def save_figure(figure: Any, path: str | PathLike[str]) -> None:
    """Write under another name of the same ending, then rename: always whole. The folder is made if there is none."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.stem}.partial{file.suffix}")
    figure.savefig(partial, dpi=_DPI)
    partial.replace(file)


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


def _grid_of(latents: Tensor, tokens: Tensor) -> tuple[int, int] | None:
    """Rows and columns of square patches that give so many tokens; None if none do."""
    height, width = latents.shape[2:]
    side = math.isqrt(max(1, height * width // tokens.shape[1]))
    fits = height % side == width % side == 0 and height * width == side * side * tokens.shape[1]
    return (height // side, width // side) if fits else None


def _latent_pictures(
    latents: Tensor, noisy: Tensor, decode: Callable[[Tensor], Tensor] | None, shown: int
) -> dict[str, Tensor]:
    both = {"clean": latents, "$x_t$": noisy}
    if decode is not None:
        return {title: image_colours(decode(x[:shown])) for title, x in both.items()}
    if latents.shape[1] < 3:
        middle, size = latents.mean(), 2 * latents.std()
        return {t: image_colours((x[:shown].mean(1, keepdim=True) - middle) / size) for t, x in both.items()}
    height, width = latents.shape[2:]
    basis = ColourBasis(latents.flatten(2).mT)
    return {
        f"{title}: latents' components": basis.colours(x.flatten(2).mT, (height, width))[:shown]
        for title, x in both.items()
    }


def _plain(text: str) -> str:
    """A name as it is: matplotlib would read formulas between dollars."""
    return text.replace("$", r"\$")


def _layer_axis(axes: Any, layers: Sequence[str], *, which: str = "x") -> None:
    shown = [_plain(name if len(name) <= 24 else f"…{name[-23:]}") for name in layers]
    step = math.ceil(len(layers) / 28)
    setter, rotation = (axes.set_xticks, 90.0) if which == "x" else (axes.set_yticks, 0.0)
    setter(range(0, len(layers), step), shown[::step], fontsize=7, rotation=rotation)


def _profile(axes: Any, report: LayerReport, measure: Measure, title: str, scale: float, factor: int = 1) -> None:
    """A measure over the layers, one line for each noise fraction, proposed layers marked."""
    count = len(report.noise_fractions)
    for index, fraction in enumerate(report.noise_fractions):
        rows = {r.layer: r for r in report.rows if r.noise_fraction == fraction and r.guidance_scale == scale}
        y = _or_nan([getattr(rows[layer], measure) for layer in report.layers], factor)
        shade = str(0.6 * (1 - (index + 1) / count) + 0.1)
        label = f"noise fraction {fraction:g}"
        axes.plot(range(len(y)), y, marker="o", markersize=3, color=shade, linewidth=1.2, label=label)
    if factor == 100 and report.chance is not None:
        axes.axhline(100 * report.chance, color="grey", linestyle=":", linewidth=1, label="chance")
    plan = report.recipe
    proposed = (
        {"student": (plan.student_layer, "tab:blue"), "teacher": (plan.teacher_layer, "tab:orange")} if plan else {}
    )
    for what, (name, colour) in proposed.items():
        if name in report.layers:
            axes.axvline(report.layers.index(name), color=colour, alpha=0.4, linewidth=5, label=f"{what} layer")
    axes.set_title(title, fontsize=10)
    axes.tick_params(labelsize=8)
    _layer_axis(axes, report.layers)
    axes.grid(alpha=0.3)
    axes.set_ylim(bottom=0)  # or differences of chance would fill the panel


def _scale_panel(axes: Any, report: LayerReport) -> None:
    """A measure of the guided features over layers and scales, the proposed pair framed."""
    scales = [scale for scale in report.guidance_scales if scale >= 1]
    found = [report.mean("knn", layer, scale) for layer in report.layers for scale in scales]
    known = [value for value in found if value is not None]
    tells = bool(known) and max(known) - min(known) > 2 * standard_error(max(known), report.held_out)
    measure: Measure = "knn" if tells else "norm"
    rows = [[report.mean(measure, layer, scale) for scale in scales] for layer in report.layers]
    image = [_or_nan(row, 100 if tells else 1) for row in rows]
    plan = report.recipe
    proposed = (plan.guidance_scale, plan.teacher_layer) if plan is not None else None
    _map(axes, image, scales, report.layers, proposed, ".0f" if tells else ".3g", 100 if tells else None, "viridis")
    axes.set_aspect("auto")
    axes.set_xticks(range(len(scales)), [f"{scale:g}" for scale in scales], fontsize=8)
    axes.set_xlabel("guidance scale w", fontsize=8)
    axes.set_title("k-NN of $f_g$, %" if tells else "Norm of a token of $f_g$", fontsize=10)


def _alignment_panel(axes: Any, report: LayerReport) -> None:
    """How alike the layers are: f_c of one with f_g of another, at the proposed scale if it was measured."""
    plan = report.recipe
    scale = plan.guidance_scale if plan is not None and plan.guidance_scale in report.guidance_scales else 1.0
    image = [_or_nan(row) for row in report.alignment[report.guidance_scales.index(scale)]]
    proposed = (plan.teacher_layer, plan.student_layer) if plan is not None else None
    _map(axes, image, report.layers, report.layers, proposed, ".2f", 1, "magma")
    _layer_axis(axes, report.layers)
    axes.set_title(f"CKA: $f_c$ (row) with $f_g$ (column), w = {scale:g}", fontsize=10)


def _map(
    axes: Any,
    image: Sequence[Sequence[float]],
    columns: Sequence[object],
    layers: Sequence[str],
    proposed: tuple[object, str] | None,
    form: str,
    highest: float | None,
    colours: str,
) -> None:
    """An image over columns and layers, where there is room with its numbers; the proposed column and row framed."""
    shown = axes.imshow(image, vmin=0, vmax=highest, cmap=colours)
    axes.figure.colorbar(shown, ax=axes)
    _layer_axis(axes, layers, which="y")
    cells = [(row, column, value) for row, line in enumerate(image) for column, value in enumerate(line)]
    for row, column, value in cells if len(layers) <= _MOST_NUMBERED else ():
        if not math.isnan(value):
            red, green, blue, _ = shown.to_rgba(value)
            colour = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.5 else "white"
            axes.text(column, row, f"{value:{form}}", color=colour, fontsize=7, ha="center", va="center")
    if proposed is not None and proposed[0] in columns and proposed[1] in layers:
        x, y = columns.index(proposed[0]) - 0.5, layers.index(proposed[1]) - 0.5
        corners = [x, x + 1, x + 1, x, x], [y, y, y + 1, y + 1, y]
        axes.plot(*corners, color="red", linewidth=1.5, clip_on=False, label="proposed")


def _or_nan(values: Sequence[float | None], factor: float = 1) -> list[float]:
    return [math.nan if value is None else factor * value for value in values]


def _lines(log: Log) -> list[Mapping[str, Any]]:
    if not isinstance(log, str | PathLike):
        return list(log)
    entries: list[Mapping[str, Any]] = []
    for number, line in enumerate(Path(log).read_text("utf-8").split("\n")[:-1], 1):
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise SettingError(f"Line {number} of {log} is not JSON: {line[:80]!r}.") from error
        if not isinstance(entry, dict):
            raise SettingError(f"Line {number} of {log} is no JSON object: {line[:80]!r}.")
        entries.append(entry)
    return entries


def _numbers(entry: Mapping[str, Any]) -> dict[str, float]:
    return {k: v for k, v in entry.items() if type(v) in (int, float) and k not in ("step", "steps")}


def _step(entry: Mapping[str, Any], name: str) -> float:
    for key in ("step", "steps"):
        if type(entry.get(key)) in (int, float):
            return float(entry[key])
    raise SettingError(f"An entry of the log {name!r} has no step: {dict(entry)!r:.120}.")
