"""Pictures of tokens and of a report. They need matplotlib, as in the extra ``plot``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import pad

from ..errors import MissingDependencyError, SettingError, ShapeError
from ..modules import check_positive
from ..teacher import check_guidance_scale
from .report import LayerReport, Measure
from .scores import standard_error
from .survey import LayerReader, guided, undisturbed

_DPI = 150
_MOST_NUMBERED = 12  # layers
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

    def colours(self, tokens: Tensor, grid: Sequence[int] | None = None) -> Tensor:
        """Tokens (N, T, D) as red, green and blue (N, rows, columns, 3) in [0, 1], on the CPU.

        These are the three components, clipped to the basis's range; without a grid it is a square.
        """
        components = self._prepared(tokens) @ self.directions
        n, count, _ = components.shape
        rows, columns = grid or (math.isqrt(count),) * 2
        if rows * columns != count:
            raise ShapeError(f"{count} tokens are no grid of {rows} x {columns}: pass grid=, or tokens= for a part.")
        colours: Tensor = ((components - self.low) / (self.high - self.low)).clamp(0, 1).nan_to_num()
        return colours.reshape(n, rows, columns, 3).float().cpu()

    def _prepared(self, tokens: Tensor) -> Tensor:
        centred = tokens.double() - tokens.double().mean(0)
        size = centred.square().mean().sqrt()
        return centred / size if self.unit and size > 0 else centred


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
    _figure(1, 1)  # no forward for nothing
    for scale in guidance_scales:
        check_guidance_scale(scale)
    scales = [1.0] if reading.get("null") is None else list(dict.fromkeys(map(float, guidance_scales)))
    check_positive("shown", shown)
    reader = LayerReader(model, layers, **reading)
    with undisturbed(model):
        latents, _, arguments = reader.read(batch)
        if latents.ndim != 4 or len(latents) < 2:
            raise ShapeError(f"Drawn are latents (N, C, H, W), 2 or more; got {tuple(latents.shape)}.")
        noise = torch.randn(latents.shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
        x_t, found = reader.run(latents, arguments, noise, noise_fraction)
        pictures = _inputs((latents, x_t), decode, shown)
    if broken := [name for name, tokens in found.items() if not tokens.isfinite().all()]:
        raise SettingError(f"Features that are not finite cannot be drawn; layer {broken[0]!r} has some.")
    maps = {(name, scale): guided(tokens, scale) for name, tokens in found.items() for scale in scales}
    basis = ColourBasis(*maps.values(), unit=True)
    figure = _figure(2.1 * (len(scales) + 1) + 1, max(2.1 * len(found), 4.4) + 0.7)
    basis_of = f"one basis for all maps, of {len(latents)} samples; each map less its mean at each position"
    figure.suptitle(f"Three principal components at noise fraction {noise_fraction:g}:\n{basis_of}", fontsize=10)
    figure.get_layout_engine().set(wspace=0.1, hspace=0.12)  # or samples of one layer and the next run together
    cells = figure.subplots(max(2, len(found)), 1 + len(scales))
    for axes in cells.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)

    def show(axes: Any, images: Tensor, title: str) -> None:
        tiled = _tile(images[:shown], math.isqrt(shown - 1) + 1, gap=max(1, images.shape[1] // 8))
        axes.imshow(tiled.numpy(), interpolation="nearest")
        axes.set_title(title, fontsize=9)

    kind = "" if decode else ": latents' components"
    for axes, title, picture in zip(cells[:2, 0], ("clean", "$x_t$"), pictures, strict=True):
        show(axes, picture, title + kind)
    height, width = latents.shape[2:]
    titles = {0.0: "$f_u$ (w = 0)", 1.0: "$f_c$ (w = 1)"}
    for axes, ((name, scale), tokens) in zip(cells[:, 1:].flat, maps.items(), strict=False):
        title = titles.get(scale, f"w = {scale:g}") if name == next(iter(found)) else ""
        side = math.isqrt(max(1, height * width // tokens.shape[1]))  # of a square patch
        show(axes, basis.colours(tokens, grid or (height // side, width // side)), title)
        axes.set_ylabel(name if scale == scales[0] else "", fontsize=9)
    figure.savefig(path, dpi=_DPI)


def draw_report(report: LayerReport, path: str | PathLike[str]) -> None:
    """Draw a report: how well each layer knows the labels, contrast, rank, size, and alignment; the proposal marked.

    Over layers and guidance scales it shows how well nearest neighbours of f_g find the label or, where that is the
    same for all within two standard errors, how long f_g is.
    """
    first, has_scales = report.guidance_scales[0], len(report.guidance_scales) > 1
    own = " of the null condition alone" if first == 0 else ""
    profiles: list[tuple[Measure, str, float]] = [("effective_rank", f"Effective rank{own}", first)]
    if report.labelled:
        profiles = [("probe", f"Linear probe{own}", first), ("knn", f"k-NN{own}", first), *profiles]
    if has_scales:
        profiles.append(("contrast", "Contrast $|f_c - f_u|\\,/\\,|f_c|$", 1.0))
    rows = math.ceil((len(profiles) + has_scales + 1) / 3)
    figure = _figure(13, 3.6 * rows)
    panels = iter(figure.subplots(rows, 3).flatten())
    for profile in profiles:
        _profile(next(panels), report, *profile)
    if has_scales:
        _scale_panel(next(panels), report)
    _alignment_panel(next(panels), report)
    for axes in panels:
        axes.set_axis_off()
    named = [pair for axes in figure.axes for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    legend = {label: handle for handle, label in named}
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=len(legend), fontsize=8)
    figure.suptitle(f"{report.model}, {report.samples:,} samples", fontsize=11)
    figure.savefig(path, dpi=_DPI)


def _figure(width: float, height: float) -> Any:
    """An empty figure, its sides in inches: no window is opened and no backend chosen."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("Pictures need matplotlib. Install it: pip install matplotlib.") from error
    return Figure(figsize=(width, height), layout="constrained")


def _tile(images: Tensor, columns: int, gap: int) -> Tensor:
    """Images (N, H, W, 3) in [0, 1] row by row in a grid with white gaps, (rows * (H + gap) - gap, ..., 3)."""
    padded = pad(images, (0, 0, 0, gap, 0, gap, 0, -len(images) % columns), value=1.0)
    return rearrange(padded, "(r c) h w rgb -> (r h) (c w) rgb", c=columns)[:-gap, :-gap]


def _inputs(inputs: Sequence[Tensor], decode: Callable[[Tensor], Tensor] | None, shown: int) -> list[Tensor]:
    """Latents (N, C, H, W) as pictures (N, H, W, 3): decoded, or their own components on the first's basis."""
    if decode is None:
        tokens = [pad(x.flatten(2).mT, (0, max(0, 3 - x.shape[1]))) for x in inputs]  # three colours need as many
        basis = ColourBasis(tokens[0])
        return [basis.colours(x, inputs[0].shape[2:]) for x in tokens]
    images = [decode(x[:shown]) for x in inputs]
    for x in images:
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise ShapeError(f"Images to draw are (N, 1, H, W) or (N, 3, H, W) in [-1, 1]; got {tuple(x.shape)}.")
    return [(0.5 + x.float().expand(-1, 3, -1, -1).permute(0, 2, 3, 1) / 2).clamp(0, 1).cpu() for x in images]


def _label(axis: Any, names: Sequence[str], rotation: int = 0) -> None:
    """Layers, or as many as there is room for, along an axis."""
    step = math.ceil(len(names) / 28)
    shown = [(name if len(name) <= 24 else f"…{name[-23:]}").replace("$", r"\$") for name in names]  # no formulas
    axis.set_ticks(range(0, len(names), step), shown[::step], fontsize=7, rotation=rotation)


def _profile(axes: Any, report: LayerReport, measure: Measure, title: str, scale: float) -> None:
    """A measure over the layers, one line for each noise fraction, proposed layers marked."""
    for index, fraction in enumerate(report.noise_fractions, 1):
        rows = {r.layer: r for r in report.rows if r.noise_fraction == fraction and r.guidance_scale == scale}
        y = _or_nan(getattr(rows[layer], measure) for layer in report.layers)
        shade, label = str(0.7 - 0.6 * index / len(report.noise_fractions)), f"noise fraction {fraction:g}"
        axes.plot(range(len(y)), y, marker="o", markersize=3, color=shade, linewidth=1.2, label=label)
    if measure in ("probe", "knn") and report.chance is not None:
        axes.axhline(report.chance, color="grey", linestyle=":", linewidth=1, label="chance")
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
    scales = [scale for scale in report.guidance_scales if scale >= 1]
    known = [knn for layer in report.layers for w in scales if (knn := report.mean("knn", layer, w)) is not None]
    tells = bool(known) and max(known) - min(known) > 2 * standard_error(max(known), report.held_out)
    measure: Measure = "knn" if tells else "norm"
    image = [_or_nan(report.mean(measure, layer, w) for w in scales) for layer in report.layers]
    _map(axes, report, image, scales, ("teacher_layer", "guidance_scale"), vmax=1 if tells else None, aspect="auto")
    axes.set_xticks(range(len(scales)), [f"{scale:g}" for scale in scales], fontsize=8)
    axes.set_xlabel("guidance scale w", fontsize=8)
    axes.set_title("k-NN of $f_g$" if tells else "Norm of a token of $f_g$", fontsize=10)


def _alignment_panel(axes: Any, report: LayerReport) -> None:
    """How alike the layers are: f_c of one with f_g of another, at the proposed scale if it was measured."""
    scales, plan = report.guidance_scales, report.recipe
    scale = plan.guidance_scale if plan is not None and len(scales) > 1 else 1.0
    image = [_or_nan(row) for row in report.alignment[scales.index(scale)]]
    _map(axes, report, image, report.layers, ("student_layer", "teacher_layer"), vmax=1, cmap="magma")
    _label(axes.xaxis, report.layers, 90)
    axes.set_title(f"CKA: $f_c$ (row) with $f_g$ (column), w = {scale:g}", fontsize=10)


def _map(axes: Any, report: LayerReport, image: Any, columns: Sequence[Any], pair: Sequence[str], **look: Any) -> None:
    """An image over layers and columns, where there is room with its numbers; the proposed pair of both framed."""
    shown = axes.imshow(image, vmin=0, **look)
    axes.figure.colorbar(shown, ax=axes)
    _label(axes.yaxis, report.layers)
    cells = [(row, column, value) for row, line in enumerate(image) for column, value in enumerate(line)]
    for row, column, value in cells if len(report.layers) <= _MOST_NUMBERED else ():
        if not math.isnan(value):
            colour = "black" if shown.norm(value) > 0.6 else "white"  # both maps begin dark
            axes.text(column, row, f"{value:.3g}", color=colour, fontsize=7, ha="center", va="center")
    mark = [getattr(report.recipe, name, None) for name in pair]
    if mark[0] in report.layers and mark[1] in columns:
        x, y = columns.index(mark[1]) - 0.5, report.layers.index(mark[0]) - 0.5
        corners = [x, x + 1, x + 1, x, x], [y, y, y + 1, y + 1, y]
        axes.plot(*corners, color="red", linewidth=1.5, clip_on=False, label="proposed")


def _or_nan(values: Iterable[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]
