"""The tokens of layers as colours, beside what the model was given."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SettingError, ShapeError
from ..null import Null
from ..recipes import find_blocks
from ..taps import layer_names
from ..teacher import check_guidance_scale
from ..time import TimeConvention, resolve
from ..tokens import Select, Tokens
from .colours import ColourBasis, image_colours, tile
from .figures import new_figure, save_figure, show
from .noising import add_noise, times_at
from .survey import LayerReader, undisturbed


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
    new_figure(1, 1)  # no forward for nothing
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
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(latents)
        found = reader.run(read, noise, noise_fraction)
        t = times_at(reader.time, noise_fraction, len(latents), latents.device)
        noisy = add_noise(reader.time, latents, noise, t)
        pictures = _latent_pictures(latents, noisy, decode, shown)
    maps = {
        (name, scale): c if u is None else u + scale * (c - u) for name, (c, u) in found.items() for scale in scales
    }
    if broken := [name for name in names if not all(maps[name, scale].isfinite().all() for scale in scales)]:
        raise SettingError(f"Features that are not finite cannot be drawn; layer {broken[0]!r} has some.")
    basis = ColourBasis(*maps.values(), unit=True)
    columns = math.isqrt(shown - 1) + 1
    heading = (
        f"Tokens as colours at noise fraction {noise_fraction:g}: three principal components, one basis for all maps,\n"
        f"taken from all of them over {len(latents)} samples; each map less its mean at each position, and of one size"
    )
    figure = new_figure(2.1 * (len(scales) + 1) + 1, max(2.1 * len(names), 4.4) + 0.7)
    figure.suptitle(heading, fontsize=10)
    left, right = figure.subfigures(1, 2, width_ratios=[1, len(scales) + 0.2])
    inputs = left.subplots(max(2, len(names)), 1)
    for axes in inputs:
        axes.set_axis_off()
    for axes, (title, picture) in zip(inputs, pictures.items(), strict=False):  # beside the first two layers
        show(axes, tile(picture, columns, gap=max(1, picture.shape[1] // 8)), title)
    figure.get_layout_engine().set(wspace=0.1, hspace=0.12)  # or samples of one layer and the next run together
    cells = right.subplots(len(names), len(scales), squeeze=False)
    for row, name in enumerate(names):
        for column, scale in enumerate(scales):
            size = grid or _grid_of(latents, maps[name, scale])
            colours = tile(basis.colours(maps[name, scale], size)[:shown], columns)
            show(cells[row, column], colours, "" if row else _scale_title(scale), "" if column else name)
    save_figure(figure, path)


def _scale_title(scale: float) -> str:
    named = {0.0: "$f_u$ (w = 0)", 1.0: "$f_c$ (w = 1)"}
    return named.get(scale, f"w = {scale:g}")


def _grid_of(latents: Tensor, tokens: Tensor) -> tuple[int, int] | None:
    """Rows and columns of square patches that give so many tokens; None if none do."""
    height, width = latents.shape[2:]
    side = math.isqrt(max(1, height * width // tokens.shape[1]))
    fits = height % side == width % side == 0 and height * width == side * side * tokens.shape[1]
    return (height // side, width // side) if fits else None


def _latent_pictures(
    latents: Tensor, noisy: Tensor, decode: Callable[[Tensor], Tensor] | None, shown: int
) -> dict[str, Tensor]:
    titles = ("clean", "$x_t$")
    if decode is not None:
        return {title: image_colours(decode(x[:shown])) for title, x in zip(titles, (latents, noisy), strict=True)}
    if latents.shape[1] < 3:
        middle, size = latents.mean(), 2 * latents.std()
        pair = [((x[:shown].mean(1, keepdim=True) - middle) / size) for x in (latents, noisy)]
        return {title: image_colours(x) for title, x in zip(titles, pair, strict=True)}
    height, width = latents.shape[2:]
    basis = ColourBasis(latents.flatten(2).mT)
    return {
        f"{title}: latents' components": basis.colours(x.flatten(2).mT, (height, width))[:shown]
        for title, x in zip(titles, (latents, noisy), strict=True)
    }
