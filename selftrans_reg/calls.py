"""A model's call: its arguments by name, where x_t and t are, and which of them hold one row for each sample."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor, nn

from .errors import CallError, SelfTransError, SettingError, ShapeError
from .modules import nearest, quoted, unwrap
from .tokens import described, tensors_in, walk

_KEYS = ("x", "t", "shared", "rows", "fixed")

# What models call their time. Where exactly one argument has such a name, it is t.
_TIMES = frozenset({
    "t", "ts", "time", "times", "timestep", "timesteps", "time_step", "time_steps", "time_input", "t_input", "sigma",
    "sigmas", "noise_labels", "noise_level", "noise_levels", "c_noise", "logsnr", "log_snr",
})  # fmt: skip

Read: TypeAlias = Callable[[Mapping[str, Any]], Any]  # from a call's arguments by name to x_t or t
ABSENT = object()
Rows: TypeAlias = Tensor | list[Any]  # one entry a sample: along the first axis, or in the list
Way: TypeAlias = int | str  # how an argument holds the samples: along an axis, as a "list", or not at all ("shared")


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of one call by name; ``x_t`` and the time among them."""

    arguments: Mapping[str, Any]
    x_t: Tensor  # (N, ...), the noisy latents
    times: Tensor | None  # (N,), or (N, T), one a token; None where the call has none that is needed
    time_from: str = "argument 't'"  # where t was read, or why there is none
    ways: Mapping[str, Way] = dataclasses.field(default_factory=dict)  # by path, what the user says of the samples

    @functools.cached_property
    def rows(self) -> int:
        """N, the number of samples."""
        return len(self.x_t)

    @property
    def t(self) -> Tensor:
        """(N,) or (N, T), the time that is needed."""
        if self.times is None:
            raise CallError(f"The model's call has no time t: {self.time_from}")
        return self.times


class CallSpec:
    """How a model is called: its signature, and which arguments are x_t and t, as the user's ``call=`` says.

    The arguments are ``x`` and ``t``, or None where a callable makes them; ``known`` is what earlier calls have told
    beyond doubt of how arguments hold the samples, by path.
    """

    def __init__(self, model: nn.Module, call: Mapping[str, Any] | None, *, needs_t: bool = True) -> None:
        root = unwrap(model)
        self.model_name = type(root).__name__
        self.signature = inspect.signature(root.forward)
        self.names = [
            n for n, p in self.signature.parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        self._takes_any = any(p.kind is p.VAR_KEYWORD for p in self.signature.parameters.values())
        self.needs_t = needs_t
        self.known: dict[str, Way] = {}
        call = dict(call or {})
        if unknown := set(call) - set(_KEYS):
            raise SettingError(f"call= takes {quoted(_KEYS)}; got {quoted(sorted(unknown))}.")
        self._read: dict[str, Read | None] = {}
        self._sources: dict[str, str] = {}
        self.x = self._name_of("x", call, self.names[:1])
        named = [name for name in self.names if name in _TIMES and name != self.x]
        self.t = self._name_of("t", call, named if len(named) == 1 else self.names[1:2] if needs_t else [])
        if self.x is not None and self.x == self.t:
            raise SettingError(f"x_t and t cannot both be the argument {self.x!r}: name the other one in call=.")
        shared, rows, self.fixed = call.get("shared", ()), dict(call.get("rows", {})), dict(call.get("fixed", {}))
        shared = [shared] if isinstance(shared, str) else shared
        why = {"shared": "which are never shared", "rows": "whose axis is the first", "fixed": "which differ by call"}
        for key, paths in zip(why, (shared, rows, self.fixed), strict=True):
            for path in paths:
                name = re.split(r"[.\[]", path)[0] if isinstance(path, str) and key != "fixed" else path
                self.check_name(name, f"call=dict({key}=...)")
                if name in (self.x, self.t):
                    raise SettingError(f"call=dict({key}=...) names {path!r}: x_t or t, {why[key]}.")
        for path, way in rows.items():
            if way not in ("shared", "list") and (type(way) is not int or way < 0):
                raise SettingError(f"call=dict(rows=...) takes an axis or 'list'; got {way!r} for {path!r}.")
        self.ways = {bracketed(path): way for path, way in (dict.fromkeys(shared, "shared") | rows).items()}

    @property
    def config(self) -> dict[str, Any]:
        """``call=`` as it would make this one again."""
        shared = sorted(path for path, way in self.ways.items() if way == "shared")
        rows = {path: way for path, way in self.ways.items() if way != "shared"}
        names = {"x": self._read["x"] or self.x, "t": self._read["t"] or self.t}
        return {**names, "shared": shared, "fixed": self.fixed, **({"rows": rows} if rows else {})}

    def _name_of(self, key: str, call: Mapping[str, Any], names: list[str]) -> str | None:
        given = call.get(key)
        self._read[key] = given if callable(given) else None
        self._sources[key] = f"value of call=dict({key}=...)"
        if callable(given):
            return None
        if given is not None:
            self.check_name(given, f"call=dict({key}=...)")
            names = [str(given)]
        elif not names and (key == "x" or self.needs_t):
            raise CallError(
                f"{self.model_name}.forward{self.signature} does not name its arguments, so x_t and t cannot be told.\n"
                "Attach to the module that names them, or pass call=dict(x=..., t=...) if they are keywords."
            )
        name = names[0] if names else None
        self._sources[key] = f"argument {name!r} of {self.model_name}"
        return name

    def check_name(self, name: object, where: str, advice: str = "") -> None:
        """Raise ``SettingError``, with ``advice``, unless the model can take an argument called ``name``."""
        if not isinstance(name, str) or not (name in self.names or self._takes_any):
            raise SettingError(
                f"{where} names {name!r}, which {self.model_name}.forward does not take.\n"
                f"It takes {quoted(self.names)}. Nearest: {quoted(nearest(str(name), self.names)) or 'none'}." + advice
            )

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """The call ``model(*args, **kwargs)`` by names; a ``CallError`` or ``ShapeError`` if it has no x_t or t."""
        return self._call(by_name(self.signature, args, kwargs, self.model_name), self.ways)

    def adopt(self, call: Call, source: CallSpec) -> Call:
        """The call of another model, made ready for this one: x_t and t by their names here, the rest by theirs."""
        arguments = dict(call.arguments)
        if (source.x, source.t) != (self.x, self.t):
            names = {source.x or self.x: self.x, source.t or self.t: self.t}
            arguments = {names.get(name) or name: value for name, value in arguments.items()}
        if not self._takes_any and (unknown := arguments.keys() - self.names):
            raise CallError(
                f"The student was called with {quoted(sorted(unknown))}, which {self.model_name}.forward does not "
                f"take; it takes {quoted(name for name in self.names if name not in (self.x, self.t))}.\n"
                "The teacher sees the student's own call: it must take the same conditions under the same names."
            )
        return self._call(arguments, {**call.ways, **self.ways})

    def _call(self, arguments: dict[str, Any], ways: Mapping[str, Way]) -> Call:
        arguments.update(self.fixed)
        x_t, source = arguments[self.x] if self.x in arguments else self._made("x", arguments), self._sources["x"]
        if not isinstance(x_t, Tensor) or not x_t.is_floating_point() or x_t.ndim < 2:
            raise CallError(
                f"The {source} should be x_t, a floating tensor (N, ...); got {described(x_t)}.\n"
                "Say which argument is x_t: call=dict(x=...)."
                + (" Or make it of the list: call=dict(x=lambda call: torch.stack(...))." if type(x_t) is list else "")
            )
        if x_t.is_meta or not len(x_t):
            nothing = "lies on the meta device, without values" if x_t.is_meta else "has no rows"
            raise ShapeError(f"x_t {tuple(x_t.shape)} {nothing}: run the model on a batch of real samples.")
        t, source = arguments[self.t] if self.t in arguments else self._made("t", arguments), self._sources["t"]
        error: SelfTransError | None = None
        rows = len(x_t)
        times = t if isinstance(t, Tensor) else None
        if isinstance(t, float | int) and not isinstance(t, bool):
            times = torch.full((), float(t), device=x_t.device)
        if times is None:
            error = CallError(
                f"The {source} should be the time t; got {described(t)}.\nSay which argument is t: call=dict(t=...)."
            )
        elif times.numel() == 1:
            times = times.reshape(1).expand(rows)
        elif len(times) == rows:
            times = times.reshape(rows) if times.numel() == rows else times.reshape(rows, -1)
        else:
            error = ShapeError(
                f"The {source} has shape {tuple(times.shape)}; the time is a scalar, one value for each of the "
                f"{rows} rows of x_t {tuple(x_t.shape)}, or one for each of their tokens, (N, T).\n"
                "If t is another argument, name it: call=dict(t=...); or pass a callable that makes t of the arguments."
            )
        if error is not None and self.needs_t:
            raise error
        if error is not None:
            times, source = None, str(error)
        return Call(arguments, x_t, times, source, ways)

    def _made(self, key: str, arguments: Mapping[str, Any]) -> Any:
        """What a callable makes of the arguments for x_t or t; None for a t that is neither there nor needed."""
        if (read := self._read[key]) is not None:
            try:
                return read(arguments)
            except Exception as error:
                raise CallError(
                    f"The callable call=dict({key}=...) failed on the call's arguments {quoted(arguments)}: {error!r}."
                ) from error
        if key == "t" and not self.needs_t:
            return None
        raise CallError(
            f"The call has no {self._sources[key]}; it has {quoted(arguments)}.\n"
            f"Say which holds {'x_t' if key == 'x' else 't'}: call=dict({key}=...)."
        )

    def arguments(self, arguments: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments by name as ``(args, kwargs)`` of a call."""
        parameters = self.signature.parameters
        known = OrderedDict([(name, value) for name, value in arguments.items() if name in parameters])
        bound = inspect.BoundArguments(self.signature, known)
        return bound.args, bound.kwargs | {name: value for name, value in arguments.items() if name not in known}


def by_name(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any], model_name: str
) -> dict[str, Any]:
    """The arguments of ``model(*args, **kwargs)`` by the names in its signature, those in its ``**kwargs`` too."""
    try:
        arguments = dict(signature.bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise CallError(f"{model_name}.forward{signature} does not take this call: {error}.") from error
    for name in arguments:
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(name))
            break
    return arguments


class RowTensors:
    """What a call holds by sample, nested or not, and a way to put other rows in its place.

    A tensor whose first axis is N holds rows; so does a list of N tensors, unless all of them hold rows themselves.
    Other tensors are shared by all samples. What may be either is asked about: a first axis of 2N, 3N, ..., as of a
    doubled or packed batch; N on a later axis; a mapping by numbers; N entries that are no tensors.

    ``tensors`` are the rows, ``paths`` where they are, as one would type it; ``whole`` are the shapes of the others.
    They are ``certain`` unless the call is of a single sample: then only as far as said, or told by larger calls.

    Args:
        call: The call.
        known: By path, what earlier calls told; what this one tells is added.
        conditions: Paths of what is known to differ by sample, as the null condition's.
    """

    def __init__(self, call: Call, known: dict[str, Way] | None = None, conditions: Container[str] = ()) -> None:
        self.paths: list[str] = []
        self.tensors: list[Rows] = []
        self.whole: dict[str, torch.Size] = {}
        self.certain = True
        self._arguments = call.arguments
        self._n = call.rows
        self._known = {} if known is None else known
        self._said = call.ways
        self._ways = {**self._known, **self._said}
        self._conditions = conditions
        self._axes: dict[str, int] = {}  # of the tensors whose samples are not on the first
        for name, value in call.arguments.items():
            if isinstance(value, Tensor):
                self._find(value, name)
            else:
                walk(value, self._find, name, enter=self._enter)
        for path in call.ways:
            if not _reaches(path, call.arguments):
                raise CallError(
                    f"call= names {path!r}, which this call does not have; it has rows under {quoted(self.paths)}."
                )

    def rebuild(self, tensors: Sequence[Rows]) -> dict[str, Any]:
        """The call's arguments with ``tensors`` in place of :attr:`tensors`, in containers of their own."""
        new = dict(zip(self.paths, tensors, strict=True))

        def put(tensor: Tensor, path: str) -> Any:
            rows = new.get(path, tensor)
            return rows.movedim(0, self._axes[path]) if path in self._axes and isinstance(rows, Tensor) else rows

        def enter(container: Any, path: str) -> Any:
            rows = new.get(path)
            if rows is None:
                return ...
            return dict(enumerate(rows)) if isinstance(container, Mapping) else type(container)(rows)

        return {name: walk(value, put, name, enter=enter, fresh=True) for name, value in self._arguments.items()}

    def __str__(self) -> str:
        """What was taken for rows, and what was not."""
        whole = ", ".join(f"{path!r} {tuple(shape)}" for path, shape in self.whole.items())
        return f"Taken for one row a sample: {quoted(self.paths)}. Left whole: {whole or 'none'}."

    def _find(self, tensor: Tensor, path: str) -> Tensor:
        n, shape = self._n, tensor.shape
        way = self._ways.get(path)
        if way is None and self._said:  # of all that lies in a container
            way = next((way for said, way in self._said.items() if path.startswith(f"{said}[")), None)
        if way is None and shape[:1] == (n,):
            way = 0
        if isinstance(way, int):
            if tensor.ndim <= way or shape[way] != n:
                self._ask(path, f"has shape {tuple(shape)}, not {n} samples on axis {way}, where they were said to be")
            if way:
                self._axes[path] = way
            self._take(path, way, tensor.movedim(way, 0) if way else tensor)
            return tensor
        if way is None and tensor.ndim:
            if n > 1 and shape[0] and shape[0] % n == 0:
                times = f"{shape[0] // n} times the batch of {n}, as in a doubled or packed batch"
                self._ask(path, f"has shape {tuple(shape)}: its first axis is {times}")
            if shape[0] > 1 and n in shape[1 : None if n > 1 else 2]:
                self._ask(path, f"has shape {tuple(shape)}: axis {shape.index(n, 1)} looks like the batch of {n}")
            if n > 1:
                self._known[path] = "shared"
        self.whole[path] = shape
        return tensor

    def _enter(self, container: Any, path: str) -> Any:
        n = self._n
        way = self._ways.get(path)
        if way == "shared":
            self.whole |= {where: tensor.shape for where, tensor in tensors_in(container, path)}
            return container
        numbered = isinstance(container, Mapping) and bool(container) and all(type(key) is int for key in container)
        if not (numbered or isinstance(container, list | tuple)):
            return ...
        entries = list(container.values() if isinstance(container, Mapping) else container)
        held = [tensor.ndim > 0 and len(tensor) == n for _, tensor in tensors_in(entries)]  # whether each holds rows
        by_tensor, one_each = bool(held) and all(held), len(entries) == n
        bare = all(isinstance(entry, Tensor) for entry in entries)
        listed = isinstance(container, list) and not by_tensor  # rather than a tuple, which is one value
        if way == "list" or (way is None and one_each and bare and (listed or path in self._conditions)):
            if not one_each:
                self._ask(path, f"has {len(entries)} entries, not one for each of the {n} samples, as it was said to")
            self._take(path, "list", entries)
            return container
        # A tuple of numbers or tensors is one value; of strings, or of several shapes, it is what zip(*samples) makes.
        lengths = {entry.shape if isinstance(entry, Tensor) else isinstance(entry, str) for entry in entries}
        by_sample = numbered or isinstance(container, list) or True in lengths or (bare and len(lengths) > 1)
        if way is None and (
            (by_sample and one_each and n > 1 and (numbered or bare or not any(held)))
            or (numbered and held and (one_each or not by_tensor))
        ):
            kind = "mapping by numbers" if numbered else type(container).__name__
            look = "one for each sample by the look of it, and rows can only be taken from tensors, unless you say so"
            self._ask(path, f"is a {kind} of {len(entries)} entries, {look}", "'list'")
        if by_tensor and n > 1:
            self._known[path] = 0  # its tensors hold the samples, whatever their number
        return ...

    def _take(self, path: str, way: Way, rows: Rows) -> None:
        self.paths.append(path)
        self.tensors.append(rows)
        if self._n > 1:
            self._known[path] = way
        elif path not in self._ways:
            self.certain = False

    def _ask(self, path: str, found: str, way: str = "axis") -> NoReturn:
        raise CallError(
            f"Argument {path!r} {found}.\n"
            f"Pass a tensor with {self._n} rows; or say what it is: call=dict(shared=[{path!r}]) if all samples share "
            f"it, call=dict(rows={{{path!r}: {way}}}) if it holds one entry for each."
        )


def at(value: Any, path: Iterable[object]) -> Any:
    """What stands at a path of nested arguments; ``ABSENT`` if nothing does."""
    for key in path:
        if isinstance(value, Mapping):
            value = value.get(key, ABSENT)
        elif isinstance(value, list | tuple):
            value = value[key] if isinstance(key, int) and 0 <= key < len(value) else ABSENT
        else:
            value = getattr(value, str(key), ABSENT) if dataclasses.is_dataclass(value) else ABSENT
    return value


def bracketed(path: str) -> str:
    """A path with attributes written as keys: ``cond.text`` and ``cond["text"]`` are ``cond['text']``."""
    return re.sub(r"(\[.*?\])|\.(\w+)", lambda part: part[1] or f"['{part[2]}']", path.replace('"', "'"))


def _reaches(path: str, arguments: Mapping[str, Any]) -> bool:
    """Whether there is something at a path in brackets, or nothing at all at its argument."""
    name, *keys = re.split(r"\[(.*?)\]", path)
    value = arguments.get(name)
    for key in keys[::2]:
        if value is not None:
            value = at(value, [key.strip("'") if "'" in key else int(key) if key.isdecimal() else ABSENT])
    return value is not ABSENT


def in_precision_of(model: nn.Module, x_t: Tensor, rows: Sequence[Rows]) -> list[Rows]:
    """The rows of a call for a model that may hold its weights in another precision than the one that was called.

    Where some of its weights have the dtype of ``x_t``, its own user would give it that call, and autocast sees to
    the rest: nothing is cast. Otherwise all that came in that dtype goes to the dtype of most weights, but for one
    number a sample, such as t: models embed those in float32 whatever their weights.
    """
    sizes: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.dtype == x_t.dtype:
            return list(rows)
        if parameter.is_floating_point() and parameter.element_size() > 1:  # 8-bit weights compute in another dtype
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    if not sizes or torch.is_autocast_enabled(x_t.device.type):
        return list(rows)
    dtype = max(sizes, key=lambda d: sizes[d])

    def cast(value: Any) -> Any:
        if isinstance(value, list):
            return [cast(item) for item in value]
        return value.to(dtype) if isinstance(value, Tensor) and value.dtype == x_t.dtype and value.ndim > 1 else value

    return [cast(value) for value in rows]
