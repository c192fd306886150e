"""The null condition: what takes a condition's place in a call, and whether its indices have an embedding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .calls import Call, CallSpec, Rows, RowTensors, nested_path
from .errors import SettingError
from .modules import nearest, quoted
from .taps import watched

Null: TypeAlias = Mapping[str, Any]

_NESTED = "A condition inside an argument takes a nested mapping: null={'cond': {'y': 1000}} for cond['y']."


def flatten_null(null: object, spec: CallSpec) -> Iterator[tuple[str, Any]]:
    """The null condition with the path of each value, as :class:`RowTensors` names paths.

    Raises:
        SettingError: If it is empty, names x_t, t or what the model does not take, or holds something else than
            numbers, tensors and callables.
    """
    if not isinstance(null, Mapping) or not null:
        raise SettingError(
            f"null= maps argument names to the null condition, such as null={{'y': 1000}}; got {null!r}."
        )
    for name in null:
        spec.check_name(name, "null=", SettingError, _NESTED)
    if overlap := [name for name in null if name in (spec.x, spec.t)]:
        raise SettingError(f"null= names {quoted(overlap)}, which is x_t or t, not a condition.")

    def walk(value: Any, path: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, Mapping) and value:
            for key, item in value.items():
                yield from walk(item, nested_path(path, key))
        elif isinstance(value, bool | int | float | Tensor) or callable(value):
            yield path, value
        else:
            raise SettingError(
                f"The null condition for {path!r} must be a number, a tensor without batch axis, or a callable; "
                f"got {value!r}."
            )

    for name, value in null.items():
        yield from walk(value, name)


def null_tensors(null: Mapping[str, Any], call: Call, held: RowTensors) -> Iterator[Rows]:
    """For each row tensor of the call its null counterpart: itself where the null condition does not name it.

    Args:
        null: By path, as from :func:`flatten_null`.
        call: The whole batch's call.
        held: Its row tensors.

    Raises:
        SettingError: If the null condition does not fit the call.
    """
    if missing := [path for path in null if path not in held.paths]:
        raise SettingError(
            f"The null condition names {quoted(missing)}, but the call holds no tensor with {call.rows} rows "
            f"there; it holds {quoted(held.paths)}.\n"
            f"Nearest: {quoted(nearest(missing[0], held.paths)) or 'none'}. The model must be called with the "
            "condition that null= replaces."
            + (f"\n{_NESTED}" if any(path.startswith(f"{missing[0]}[") for path in held.paths) else "")
        )
    for path, tensor in zip(held.paths, held.tensors, strict=True):
        if path not in null:
            yield tensor
        elif isinstance(tensor, Tensor):
            yield _null_like(path, null[path], tensor, call)
        else:
            yield list(null[path](call.arguments)) if callable(null[path]) else [null[path]] * len(tensor)


def _null_like(path: str, value: Any, tensor: Tensor, call: Call) -> Tensor:
    if callable(value):
        rows = value(call.arguments)
        if not isinstance(rows, Tensor) or rows.shape != tensor.shape:
            found = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            raise SettingError(
                f"The callable null condition for {path!r} returned {found}; it gets the call's arguments by name "
                f"and must return a tensor of the argument's shape, {tuple(tensor.shape)}."
            )
        return _cast(path, rows, tensor)
    if not isinstance(value, Tensor):
        if not tensor.is_floating_point() and not float(value).is_integer():
            raise SettingError(
                f"The null condition {value!r} for {path!r} is no whole number, but the argument holds {tensor.dtype}."
            )
        return torch.full_like(tensor, value)
    if value.shape != tensor.shape[1:]:
        raise SettingError(
            f"The null condition for {path!r} has shape {tuple(value.shape)}; the argument is "
            f"{tuple(tensor.shape)}, so without its batch axis it should be {tuple(tensor.shape[1:])}."
        )
    return _cast(path, value, tensor).expand_as(tensor)


def _cast(path: str, null: Tensor, argument: Tensor) -> Tensor:
    """The null condition in the argument's dtype and place."""
    if null.is_floating_point() and not argument.is_floating_point():
        raise SettingError(
            f"The null condition for {path!r} holds {null.dtype}, but the argument {argument.dtype}: it would be cut "
            "off."
        )
    return null.to(argument)


def shown(null: Mapping[str, Any]) -> str:
    """The null condition in short: numbers as they are, the rest by kind."""
    return ", ".join(
        f"{path} = {value if isinstance(value, int | float) else type(value).__name__}" for path, value in null.items()
    )


def checked_indices(model: nn.Module, null: Mapping[str, Any]) -> AbstractContextManager[None]:
    """While inside, every index is compared with the embedding that it reaches. It waits for the device.

    Raises:
        SettingError: In the forward, before the embedding sees an index that it does not have.
    """

    def check(module: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(module, nn.Embedding)
        if not args or not isinstance(args[0], Tensor) or not args[0].numel():
            return
        low, high = (int(v) for v in args[0].aminmax())
        if low < 0 or high >= module.num_embeddings:
            name = next(n for n, m in model.named_modules() if m is module)
            raise SettingError(
                f"Index {low if low < 0 else high} would reach embedding {name!r}, which has {module.num_embeddings} "
                f"rows (0 to {module.num_embeddings - 1}). The null condition: {shown(null)}.\n"
                "A model built without label dropout has no null row: train the teacher with dropout; or name the "
                "index of its null class. If the index is not the null condition's, it is one of the loop's own."
            )

    # Embeddings alone: compiled blocks would be compiled anew for a hook inside them.
    return watched([module for module in model.modules() if isinstance(module, nn.Embedding)], check)
