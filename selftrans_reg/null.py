"""The null condition: what takes a condition's place in the teacher's second pass, and whether it fits one batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .artefacts import nested
from .calls import ABSENT, Call, CallSpec, Rows, RowTensors, Way, at
from .errors import CheckpointError, SettingError
from .modules import nearest, quoted
from .taps import watched
from .tokens import described, replaced

Null: TypeAlias = Mapping[Any, Any]
Path: TypeAlias = tuple[Any, ...]

_NESTED = "A condition inside an argument takes a nested mapping: null={'cond': {'y': 1000}} for cond['y']."
PREFIX = "null_condition."  # of the keys under which its tensors are saved


class NullCondition(nn.Module):
    """The null condition of a model's calls, as :func:`build_teacher` describes it.

    Its tensors are buffers, so that they move with whoever holds it.
    """

    def __init__(self, null: object, spec: CallSpec) -> None:
        super().__init__()
        if not isinstance(null, Mapping) or not null:
            raise SettingError(
                f"null= maps argument names to the null condition, such as null={{'y': 1000}}; got {null!r}."
            )
        self.values = {_typed(path): (path, value) for path, value in _leaves(null).items()}
        self._known = frozenset(spec.names)
        self.known: dict[str, Way] = {}  # how the null condition's own calls held the samples
        for index, (name, (path, value)) in enumerate(self.values.items()):
            spec.check_name(path[0], "null=", f"\n{_NESTED}")
            if path[0] in (spec.x, spec.t):
                raise SettingError(f"null= names {path[0]!r}, which is x_t or t, not a condition.")
            if isinstance(value, Tensor):
                self.register_buffer(f"value_{index}", value.detach(), persistent=False)
            elif not (isinstance(value, bool | int | float | str | None) or callable(value)):
                raise SettingError(
                    f"The null condition for {name!r} must be a number, None, a tensor without batch axis, or a "
                    f"callable; got {value!r}."
                )

    def now(self) -> list[tuple[str, Path, Any]]:
        """Name, path and value of each part, tensors where they have been moved to."""
        return [
            (name, path, self.get_buffer(f"value_{index}") if isinstance(value, Tensor) else value)
            for index, (name, (path, value)) in enumerate(self.values.items())
        ]

    def plain(self) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        """The condition as JSON has it, functions by their names, and its tensors by the keys that it names there."""
        entries, tensors = [], {}
        for index, (_, path, value) in enumerate(self.now()):
            entry: dict[str, Any] = {"path": list(path)}
            if isinstance(value, Tensor):
                entry["tensor"] = f"{PREFIX}{index}"
                tensors[entry["tensor"]] = value
            else:
                entry |= unsaved(value) if callable(value) else {"value": value}
            entries.append(entry)
        return entries, tensors

    def __str__(self) -> str:
        """Numbers as they are, the rest by kind."""
        return ", ".join(
            f"{name} = {value if isinstance(value, int | float | None) else type(value).__name__}"
            for name, (_, value) in self.values.items()
        )

    def passes(self, call: Call, held: RowTensors, rows: Tensor | None = None) -> list[tuple[RowTensors, list[Rows]]]:
        """What to run: one doubled batch, the condition first; or, where shapes differ, condition and null condition.

        ``held`` are the rows of the whole batch's call, ``rows`` (n,) the indices of those to run.
        """
        found, others, ways, fits = list(held.tensors), [], dict(call.ways), held.certain
        for name, path, value in self.now():
            argument = at(call.arguments, path)
            if name in held.paths:
                place = held.paths.index(name)
                new = self._rows(name, value, held.tensors[place], call)
                if new is not None:
                    fits = fits and (isinstance(new, list) or new.shape == held.tensors[place].shape)  # type: ignore[union-attr]
                    found[place] = new
                    continue
            else:
                new = self._whole(name, value, argument, call, held)
                if new is None and argument in (None, ABSENT):
                    continue
                if isinstance(new, Tensor):  # what held no rows holds none now, however long it is
                    ways.setdefault(name, "shared" if isinstance(argument, Tensor) else 0)
            fits = False
            others.append((path, new))

        def chosen(side: Sequence[Rows]) -> list[Any]:
            if rows is None:
                return list(side)
            return [v.index_select(0, rows) if isinstance(v, Tensor) else [v[i] for i in rows.tolist()] for v in side]

        if fits:
            pairs = zip(chosen(held.tensors), chosen(found), strict=True)
            return [(held, [torch.cat(pair) if isinstance(pair[0], Tensor) else pair[0] + pair[1] for pair in pairs])]
        arguments: Any = held.rebuild(found)
        for path, new in others:
            arguments = _put(arguments, path, new)
        other = RowTensors(dataclasses.replace(call, arguments=arguments, ways=ways), self.known, self.values)
        return [(side, chosen(side.tensors)) for side in (held, other)]

    def _rows(self, name: str, value: Any, argument: Rows, call: Call) -> Rows | None:
        """The null condition of an argument that holds rows."""
        if callable(value):
            value = value(call.arguments)
            if isinstance(value, list | tuple) and isinstance(argument, list) and len(value) == call.rows:
                return list(value)
            if value is not None and (not isinstance(value, Tensor) or value.shape[:1] != (call.rows,)):
                found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                wanted = tuple(argument.shape) if isinstance(argument, Tensor) else f"a list of {len(argument)}"
                raise SettingError(
                    f"The callable null condition for {name!r} returned {found}; it gets the call's arguments by name "
                    f"and must return {call.rows} rows, as the argument has them: {wanted}."
                )
        elif isinstance(argument, list) and value is not None:
            return [_filled(name, value, entry) for entry in argument]
        elif isinstance(value, Tensor) and isinstance(argument, Tensor):
            if value.ndim != argument.ndim - 1:
                raise SettingError(
                    f"The null condition for {name!r} has shape {tuple(value.shape)}; the argument is "
                    f"{tuple(argument.shape)}, so without its batch axis it should be {tuple(argument.shape[1:])}."
                )
            value = value.expand(call.rows, *value.shape)
        filled: Rows | None = None if value is None else _filled(name, value, argument)
        return filled

    def _whole(self, name: str, value: Any, argument: Any, call: Call, held: RowTensors) -> Any:
        """The null condition of an argument that holds no rows, or that the call does not have."""
        if callable(value):
            return value(call.arguments)
        if value is None:
            return None
        if isinstance(argument, Tensor):
            return _filled(name, value, argument)
        if isinstance(value, Tensor):
            if argument is None or (argument is ABSENT and name in self._known):
                value = value.to(call.x_t.device)
                return value if call.ways.get(name) == "shared" else value.expand(call.rows, *value.shape)
        elif isinstance(argument, bool | int | float | str):
            return value
        raise SettingError(
            f"The null condition names {name!r}, but the call holds no tensor with {call.rows} rows there; it holds "
            f"{quoted(held.paths)}.\n"
            f"Nearest: {quoted(nearest(name, held.paths)) or 'none'}. The model must be called with the condition that "
            "null= replaces." + (f"\n{_NESTED}" if any(other.startswith(f"{name}[") for other in held.paths) else "")
        )


def restored(
    entries: Sequence[Mapping[str, Any]], tensors: dict[str, Tensor], functions: Null | None, asked: list[str]
) -> Null:
    """What :meth:`NullCondition.plain` gave as ``null=``; its tensors are taken out of ``tensors``.

    ``functions`` are what could not be saved; which of these are missing is added to ``asked``.
    """
    if functions is not None and not isinstance(functions, Mapping):
        raise SettingError(f"null= maps argument names to functions that could not be saved; got {functions!r}.")
    given = _leaves(functions or {})
    null: dict[Any, Any] = {}
    for entry in entries:
        path = tuple(entry["path"])
        value = entry.get("value")
        if "tensor" in entry:
            value = tensors.pop(entry["tensor"], None) if entry["tensor"].startswith(PREFIX) else None
            if value is None:
                raise CheckpointError(f"The saved teacher lacks its null condition's tensor {entry['tensor'][:100]!r}.")
        elif "unsaved" in entry:
            value = given.pop(path, None)
            if value is None:
                asked.append(f"null={nested(path)} (it was {entry['unsaved']!r})"[:300])
        level: Any = null
        for key in path[:-1]:
            level = level.setdefault(key, {}) if isinstance(level, dict) else None
        if not isinstance(level, dict) or path[-1] in level:
            raise CheckpointError(f"The saved teacher's null condition has {str(list(path))[:100]} twice.")
        level[path[-1]] = value
    if given:
        raise SettingError(f"The null condition was saved but for functions; null= also names {sorted(given)}.")
    return null


def unsaved(function: object) -> dict[str, str]:
    """What stands for a function in JSON: its name, for whoever has to find it again."""
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return {"unsaved": name if name.isprintable() else "a function"}


def _leaves(null: Mapping[Any, Any], above: Path = ()) -> dict[Path, Any]:
    found: dict[Path, Any] = {}
    for key, value in null.items():
        path = (*above, key)
        found |= _leaves(value, path) if isinstance(value, Mapping) and value else {path: value}
    return found


def _typed(path: Path) -> str:
    """A path as one would type it."""
    return "".join([str(path[0]), *(f"[{key!r}]" for key in path[1:])])


def _put(value: Any, path: Path, new: Any) -> Any:
    """Nested arguments with ``new`` at a path; what lies on the way is copied."""
    return replaced(value, {path[0]: _put(at(value, path[:1]), path[1:], new)}) if path else new


def _filled(name: str, value: Any, argument: Any) -> Any:
    """A value in the place of a list's entry, or of a tensor: a number in its shape, all in its dtype and place."""
    if not isinstance(argument, Tensor):
        return value
    whole = not (value.is_floating_point() if isinstance(value, Tensor) else isinstance(value, float) and value % 1)
    if isinstance(value, str) or not (whole or argument.is_floating_point()):
        raise SettingError(
            f"The null condition for {name!r} is {described(value)}, which the argument's {argument.dtype} cannot hold."
        )
    return value.to(argument) if isinstance(value, Tensor) else torch.full_like(argument, value)


def checked_indices(model: nn.Module, null: NullCondition | None) -> AbstractContextManager[None]:
    """While inside, every index is compared with the embedding before it reaches it. It waits for the device."""

    def check(module: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(module, nn.Embedding)
        if not args or not isinstance(args[0], Tensor) or not args[0].numel():
            return
        low, high = (int(v) for v in args[0].aminmax())
        if low < 0 or high >= module.num_embeddings:
            name = next(n for n, m in model.named_modules() if m is module)
            raise SettingError(
                f"Index {low if low < 0 else high} would reach embedding {name!r}, which has {module.num_embeddings} "
                f"rows (0 to {module.num_embeddings - 1}). The null condition: {null or 'none'}.\n"
                "A model built without label dropout has no null row: train the teacher with dropout; or name the "
                "index of its null class. If the index is not the null condition's, it is one of the loop's own."
            )

    # Embeddings alone: compiled blocks would be compiled anew for a hook inside them.
    return watched([module for module in model.modules() if isinstance(module, nn.Embedding)], check)
