"""From what a layer returns to tokens (N, T, D): pick the tensor, flatten its grid, pick the image's tokens."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any, TypeAlias

from torch import Tensor

from .errors import CallError, SettingError, ShapeError
from .modules import Layout

Select: TypeAlias = int | str | Callable[[Any], Any] | None
Tokens: TypeAlias = slice | Callable[..., Tensor] | None  # of the tensor, or of the tensor and the call's arguments


def check_choice(select: object, tokens: object) -> None:
    """Raise ``SettingError`` unless these are a ``Select`` and a ``Tokens``."""
    if isinstance(select, bool) or not (select is None or isinstance(select, int | str) or callable(select)):
        raise SettingError(f"select must be an index, a key or a callable; got {select!r}.")
    if not (tokens is None or isinstance(tokens, slice) or callable(tokens)):
        raise SettingError(f"tokens must be a slice, such as slice(1, None), or a callable; got {tokens!r}.")


def as_tokens(
    output: Any,
    select: Select,
    tokens: Tokens,
    *,
    layer: str,
    layout: Layout,
    arguments: Callable[[], Mapping[str, Any]],
) -> Tensor:
    """(N, T, D), the tokens in a layer's raw output.

    A tensor of four or five axes is flattened row by row; its width is on axis 1, on axis 2 of a video's maps, or last,
    where the layer's own width says. ``tokens`` is given the tensor, and the call's arguments if it takes two.
    """
    tensor = select_tensor(output, select, layer)
    if callable(tokens):
        tensor = tokens(tensor, arguments()) if _takes_arguments(tokens) else tokens(tensor)
        if not isinstance(tensor, Tensor):
            raise CallError(f"tokens= returned {type(tensor).__name__} for layer {layer!r}; it must return a tensor.")
    elif tensor.ndim in (4, 5) or (
        tensor.ndim == 3 and (layout.axis == 1 or (len(layout.widths) == 1 and tensor.shape[2] not in layout.widths))
    ):
        tensor = tensor.movedim(_width_axis(tensor, layout, layer), -1).flatten(1, -2)
    if tensor.ndim != 3:
        raise ShapeError(
            f"Layer {layer!r} gives a tensor of shape {tuple(tensor.shape)}, not tokens (N, T, D).\n"
            "Tap a block, or pass tokens= a callable that turns the tensor into (N, T, D)."
        )
    if isinstance(tokens, slice):
        count, tensor = tensor.shape[1], tensor[:, tokens]
        if tensor.shape[1] == 0:
            raise ShapeError(f"tokens={tokens} leaves none of the {count} tokens of layer {layer!r}.")
    return tensor


def _width_axis(tensor: Tensor, layout: Layout, layer: str) -> int:
    """Which axis of (N, D, L), (N, D, H, W), (N, H, W, D), (N, D, F, H, W), (N, F, D, H, W), (N, F, H, W, D) is D."""
    if layout.axis is not None:
        return layout.axis
    shape, last = tensor.shape, tensor.ndim - 1
    fitting = [axis for axis in ((1, 2, last) if last == 4 else (1, last)) if shape[axis] in layout.widths]
    if len(fitting) == 1 and last > 2:
        return fitting[0]
    if last == 2 and not fitting:
        return last  # of a width that is not the layer's: of another stream, or one that hidden_size= gets wrong
    known = "its width is one of" if len(layout.widths) > 1 else "its width is"
    fit = "no axis fits" if not fitting else f"axes {fitting} fit" if last > 2 else f"only axis {fitting[0]} fits"
    raise ShapeError(
        f"Layer {layer!r} gives a tensor of shape {tuple(shape)}, and which axis is D is open: {known} "
        f"{', '.join(map(str, sorted(layout.widths))) or 'not known'}, and {fit}.\n"
        "Pass tokens=lambda x: x.flatten(1, -2) if D comes last, tokens=lambda x: x.flatten(2).transpose(1, 2) if it "
        "is axis 1; if this is not the image's tensor, pick that one with select=."
    )


def _takes_arguments(tokens: Callable[..., Tensor]) -> bool:
    """Whether a callable has a second parameter that must be given by position."""
    try:
        parameters = inspect.signature(tokens).parameters.values()
    except ValueError:  # some of C's functions do not tell: they know nothing of calls
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters) == 2


def select_tensor(output: Any, select: Select, layer: str) -> Tensor:
    """The tensor of a layer's raw output that ``select`` means; without one, the only tensor."""
    if select is None:
        if isinstance(output, Tensor):
            return output
        found = [tensor for _, tensor in tensors_in(output)]
        if len(found) == 1:
            return found[0]
        raise CallError(
            f"Layer {layer!r} returns {described(output)} with {len(found)} tensors, and nothing is guessed:\n"
            f"{_listing(output)}\n"
            "Say which with select= (an index, a key, or a callable)."
        )
    shown = getattr(select, "__name__", repr(select))
    try:
        if callable(select):
            picked = select(output)
        elif isinstance(select, str) and not isinstance(output, Mapping):
            picked = getattr(output, select)
        else:
            picked = output[select]
    except (LookupError, AttributeError, TypeError) as error:
        raise CallError(
            f"select={shown} does not fit the output of layer {layer!r}, {described(output)}: {error}.\n"
            f"It holds:\n{_listing(output)}"
        ) from error
    if not isinstance(picked, Tensor):
        raise CallError(f"select={shown} picks {described(picked)} from the output of layer {layer!r}, not a tensor.")
    return picked


def tensors_in(value: Any, path: str = "") -> list[tuple[str, Tensor]]:
    """Every tensor in a nested value with the path to it, as one would type it."""
    found: list[tuple[str, Tensor]] = []

    def note(tensor: Tensor, where: str) -> Tensor:
        found.append((where, tensor))
        return tensor

    walk(value, note, path)
    return found


def walk(
    value: Any,
    put: Callable[[Tensor, str], Any],
    path: str = "",
    *,
    enter: Callable[[Any, str], Any] | None = None,
    fresh: bool = False,
) -> Any:
    """A nested value with ``put(tensor, path)`` in the place of every tensor: the one walk over lists, dicts and so on.

    ``enter(container, path)`` may return what takes the container's place; ``...`` goes on into it. Containers in which
    nothing changes are not copied, unless ``fresh``: then none that others could change is shared with ``value``.
    """
    if isinstance(value, Tensor):
        return put(value, path)
    items: Iterable[tuple[Any, Any]]
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    else:
        return value
    if enter is not None and (instead := enter(value, path)) is not ...:
        return instead
    changed = {}
    for key, item in items:
        if item is None or isinstance(item, int | float | str):
            continue
        where = f"{path}[{key!r}]"
        new = put(item, where) if isinstance(item, Tensor) else walk(item, put, where, enter=enter, fresh=fresh)
        if new is not item or (fresh and isinstance(item, Tensor)):
            changed[key] = new
    if not changed:
        return value.copy() if fresh and type(value) in (dict, list) else value
    return replaced(value, changed)


def replaced(container: Any, items: Mapping[Any, Any]) -> Any:
    """A copy of a list, tuple, mapping or dataclass, of its own kind, with other items."""
    if isinstance(container, list | tuple):
        listed = [items.get(index, item) for index, item in enumerate(container)]
        return type(container)(*listed) if hasattr(container, "_fields") else type(container)(listed)
    if isinstance(container, Mapping) and not isinstance(container, MutableMapping):
        return {**container, **items}
    copied = copy.copy(container)  # a model may ask it for attributes
    for key, item in items.items():
        if isinstance(copied, MutableMapping):
            copied[key] = item
        else:
            object.__setattr__(copied, key, item)
    return copied


def described(value: Any) -> str:
    """What a value is, in a few words: numbers and strings as they are, anything else by type and shape."""
    if isinstance(value, bool | int | float | str | None):
        return f"{value!r}"[:80]
    kind = f"{value.dtype} tensor".removeprefix("torch.") if isinstance(value, Tensor) else type(value).__name__
    shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
    return f"{'an' if re.match('[aeio]|nd', kind, re.IGNORECASE) else 'a'} {kind}{shape}"  # an ndarray, a uint8 tensor


def _listing(output: Any) -> str:
    found = [f"  {path or 'output'}: {tuple(tensor.shape)}" for path, tensor in tensors_in(output)]
    return "\n".join(found) or "  no tensor at all"


def grid_of(latents: Tensor, patch_size: tuple[int, ...], channel_axis: int = 1) -> tuple[int, ...]:
    """Tokens along each spatial axis of latents (N, C, *spatial), or with C on ``channel_axis``."""
    spatial = [size for axis, size in enumerate(latents.shape) if axis not in (0, channel_axis)]
    if len(spatial) != len(patch_size) or any(s % p for s, p in zip(spatial, patch_size, strict=True)):
        raise ShapeError(
            f"Latents of shape {tuple(latents.shape)} do not divide into patches of {patch_size}.\n"
            "Latents are (N, C, L), (N, C, H, W) or (N, C, F, H, W), with C where channel_axis= says; patch_size "
            "counts latent pixels per token along each of the other axes (an int for square patches)."
        )
    return tuple(s // p for s, p in zip(spatial, patch_size, strict=True))


def check_grid(tokens: Tensor, grid: tuple[int, ...]) -> None:
    """Raise ``ShapeError`` unless there is one token for each place of the grid; it says which slices would fit."""
    count, wanted = tokens.shape[1], math.prod(grid)
    if count == wanted:
        return
    shown, extra = "×".join(map(str, grid)), count - wanted
    stream = "another stream, such as the text's (select=), "
    if extra > 0:
        message = (
            f"If {extra} extra tokens precede the image's, pass tokens=slice({extra}, None); if they follow them, "
            f"tokens=slice(None, {wanted}); if k precede and the rest follow, tokens=slice(k, k + {wanted}); if their "
            "place differs by sample, a callable that also takes the call's arguments.\n"
            f"Otherwise this may be {stream}or another patch_size."
        )
    else:
        message = (
            f"This may be {stream}a masked encoder's layer, which sees a part of the image, or another patch_size."
        )
    raise ShapeError(f"{count} tokens do not fit the latent grid {shown}, which has {wanted}.\n{message}")
