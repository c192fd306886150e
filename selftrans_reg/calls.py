"""A model's call: its arguments by name, where x_t and t are, and which tensors hold rows."""

from __future__ import annotations

import dataclasses
import inspect
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .errors import CallError, SettingError, ShapeError
from .modules import nearest, quoted, unwrap
from .tokens import described, rebuilt

_KEYS = ("x", "t", "shared", "fixed")


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of one call by name; ``x_t`` and ``t`` among them.

    Attributes:
        arguments: Every argument that was passed, by the name in the model's signature.
        x_t: (N, ...), the noisy latents.
        t: (N,), the time as the model was given it; a scalar is repeated for every row.
        shared: Names of arguments that hold nothing by row, whatever they look like.
    """

    arguments: Mapping[str, Any]
    x_t: Tensor
    t: Tensor
    shared: frozenset[str]

    @property
    def rows(self) -> int:
        """N, the number of samples."""
        return self.x_t.shape[0]


class CallSpec:
    """How a model is called: its signature, and which arguments are x_t and t.

    Args:
        model: The model, wrapped or not.
        call: Optional names: ``x`` and ``t`` where they are not the first two arguments; ``shared``, a sequence of
            arguments that hold nothing by row although their first axis looks like it; and ``fixed``, values that
            replace those of a call, such as ``dict(mask_ratio=0.0)``.

    Raises:
        SettingError: If ``call`` has other keys, or names that the signature does not have.
        CallError: If the signature names fewer than two arguments and ``call`` does not help.
    """

    def __init__(self, model: nn.Module, call: Mapping[str, Any] | None) -> None:
        root = unwrap(model)
        self.model_name = type(root).__name__
        self.signature = inspect.signature(root.forward)
        self.names = [
            n for n, p in self.signature.parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        self._takes_any = _spill(self.signature) is not None
        call = dict(call or {})
        if unknown := set(call) - set(_KEYS):
            raise SettingError(f"call= takes {quoted(_KEYS)}; got {quoted(sorted(unknown))}.")
        shared = call.get("shared", ())
        self.shared = frozenset([shared] if isinstance(shared, str) else shared)
        self.x = self._name_of("x", call, 0)
        self.t = self._name_of("t", call, 1)
        if self.x == self.t:
            raise SettingError(f"x_t and t cannot both be the argument {self.x!r}: name the other one in call=.")
        for name in self.shared:
            self.check_name(name, "call=dict(shared=...)")
        if own := self.shared & {self.x, self.t}:
            raise SettingError(f"call=dict(shared=...) names {quoted(sorted(own))}: x_t or t, which are never shared.")
        self.fixed = dict(call.get("fixed", {}))
        for name in self.fixed:
            self.check_name(name, "call=dict(fixed=...)")
        if own := frozenset(self.fixed) & {self.x, self.t}:
            raise SettingError(f"call=dict(fixed=...) names {quoted(sorted(own))}: x_t or t, which differ by call.")

    def _name_of(self, key: str, call: Mapping[str, Any], position: int) -> str:
        if key in call:
            self.check_name(call[key], f"call=dict({key}=...)")
            return str(call[key])
        if len(self.names) <= position:
            raise CallError(
                f"{self.model_name}.forward{self.signature} does not name its arguments, so x_t and t cannot be told.\n"
                "Attach to the module that names them, or pass call=dict(x=..., t=...) if they are keywords."
            )
        return self.names[position]

    def check_name(
        self, name: object, where: str, error: type[Exception] = SettingError, advice: str | None = None
    ) -> None:
        """Raise ``error``, with ``advice``, unless the model can take an argument called ``name``."""
        if not isinstance(name, str) or (name not in self.names and not self._takes_any):
            raise error(
                f"{where} names {name!r}, which {self.model_name}.forward does not take.\n"
                f"It takes {quoted(self.names)}. Nearest: {quoted(nearest(str(name), self.names)) or 'none'}."
                + (f"\n{advice}" if advice else "")
            )

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """The call ``model(*args, **kwargs)`` by names.

        Raises:
            CallError: If the signature does not take these arguments, or x_t or t is missing or no tensor.
            ShapeError: If t is neither a scalar nor one value for each row of x_t.
        """
        return self._call(by_name(self.signature, args, kwargs, self.model_name), self.shared)

    def adopt(self, call: Call, source: CallSpec) -> Call:
        """The call of another model, made ready for this one: x_t and t by their names here, the rest by theirs.

        Raises:
            CallError: If an argument of the other model is unknown here.
        """
        rest = {name: value for name, value in call.arguments.items() if name not in (source.x, source.t)}
        if not self._takes_any and (unknown := [name for name in rest if name not in self.names]):
            raise CallError(
                f"The student was called with {quoted(unknown)}, which {self.model_name}.forward does not take; it "
                f"takes {quoted(self.names)}.\n"
                "The teacher sees the student's own call: it must take the same conditions under the same names."
            )
        arguments = {self.x: call.arguments[source.x], self.t: call.arguments[source.t], **rest}
        return self._call(arguments, self.shared | call.shared)

    def _call(self, arguments: dict[str, Any], shared: frozenset[str]) -> Call:
        arguments = arguments | self.fixed
        for key, name in (("x", self.x), ("t", self.t)):
            if name not in arguments:
                raise CallError(
                    f"The call of {self.model_name} has no argument {name!r}; it has {quoted(arguments)}.\n"
                    f"Say which holds {'x_t' if key == 'x' else 't'}: call=dict({key}=...)."
                )
        x_t, t = arguments[self.x], arguments[self.t]
        if not isinstance(x_t, Tensor) or not x_t.is_floating_point() or x_t.ndim < 2:
            raise CallError(
                f"Argument {self.x!r} of {self.model_name} should be x_t, a floating tensor (N, ...); got "
                f"{described(x_t)}.\n"
                "Say which argument is x_t: call=dict(x=...)."
            )
        rows = x_t.shape[0]
        if isinstance(t, bool) or not isinstance(t, Tensor | float | int):
            raise CallError(
                f"Argument {self.t!r} of {self.model_name} should be the time t; got {described(t)}.\n"
                "Say which argument is t: call=dict(t=...)."
            )
        times = t if isinstance(t, Tensor) else torch.full((), float(t), device=x_t.device)
        if times.numel() not in (1, rows):
            raise ShapeError(
                f"Argument {self.t!r} of {self.model_name} has shape {tuple(times.shape)}; the time is a scalar or one "
                f"value for each of the {rows} rows of {self.x!r} {tuple(x_t.shape)}.\n"
                "If t is another argument, pass call=dict(t=...)."
            )
        return Call(arguments, x_t, times.reshape(-1).expand(rows), shared)

    def arguments(self, arguments: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments by name as ``(args, kwargs)`` of a call."""
        known = self.signature.parameters
        bound = inspect.BoundArguments(self.signature, OrderedDict((n, v) for n, v in arguments.items() if n in known))
        return bound.args, {**bound.kwargs, **{n: v for n, v in arguments.items() if n not in known}}


def by_name(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any], model_name: str
) -> dict[str, Any]:
    """The arguments of ``model(*args, **kwargs)`` by the names in its signature, those in its ``**kwargs`` too.

    Raises:
        CallError: If the signature does not take them.
    """
    try:
        arguments = dict(signature.bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise CallError(f"{model_name}.forward{signature} does not take this call: {error}.") from error
    if (spill := _spill(signature)) is not None:
        arguments.update(arguments.pop(spill, {}))
    return arguments


def _spill(signature: inspect.Signature) -> str | None:
    """What the signature calls its ``**kwargs``."""
    return next((name for name, p in signature.parameters.items() if p.kind is p.VAR_KEYWORD), None)


class RowTensors:
    """The tensors of a call that hold one row for each sample, nested ones too, and a way to put others in their place.

    A tensor counts as rows if its first axis is N. Others are shared by all rows; a first axis of 2N, 3N, ... could be
    a doubled or packed batch and is refused rather than cut or shared.

    Args:
        call: The call.

    Raises:
        CallError: If a tensor's first axis is a multiple of N, or a list or tuple holds other things by sample.
    """

    def __init__(self, call: Call) -> None:
        self._arguments = call.arguments
        self._n = call.rows
        self._shared = call.shared
        found = [item for name, value in call.arguments.items() for item in self._find(value, name, name)]
        self.paths = [path for path, _ in found]  # where each tensor is, as one would type it
        self.tensors = [tensor for _, tensor in found]

    def rebuild(self, tensors: list[Tensor]) -> dict[str, Any]:
        """The call's arguments with ``tensors`` in place of :attr:`tensors`."""
        replacements = iter(tensors)

        def put(name: str, tensor: Tensor) -> Tensor:
            return next(replacements) if self._is_row(tensor, name) else tensor

        return {name: rebuilt(value, partial(put, name)) for name, value in self._arguments.items()}

    def _is_row(self, tensor: Tensor, name: str) -> bool:
        return name not in self._shared and tensor.ndim > 0 and tensor.shape[0] == self._n

    def _find(self, value: Any, name: str, path: str) -> Iterator[tuple[str, Tensor]]:
        if isinstance(value, Tensor):
            if self._is_row(value, name):
                yield path, value
            elif name not in self._shared:
                self._refuse_packed(value, name, path)
        elif isinstance(value, Mapping):
            for key, item in value.items():
                yield from self._find(item, name, nested_path(path, key))
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            for field in dataclasses.fields(value):
                yield from self._find(getattr(value, field.name), name, nested_path(path, field.name))
        elif isinstance(value, list | tuple):
            found = [f for i, item in enumerate(value) for f in self._find(item, name, nested_path(path, i))]
            # A tuple of numbers or tensors is one value; of strings it is what zip(*samples) makes of captions.
            by_sample = isinstance(value, list) or any(isinstance(item, str) for item in value)
            if by_sample and len(value) == self._n > 1 and not found and name not in self._shared:
                kind = "list" if isinstance(value, list) else "tuple"
                raise CallError(
                    f"Argument {path!r} is a {kind} of {self._n} entries, one for each sample by the look of it, and "
                    "rows can only be taken from tensors.\n"
                    f"Pass a tensor with {self._n} rows; or, if all samples share the list, "
                    f"call=dict(shared=[{name!r}])."
                )
            yield from found

    def _refuse_packed(self, tensor: Tensor, name: str, path: str) -> None:
        if self._n > 1 and tensor.ndim > 0 and tensor.shape[0] > self._n and tensor.shape[0] % self._n == 0:
            raise CallError(
                f"Argument {path!r} has shape {tuple(tensor.shape)}: its first axis is {tensor.shape[0] // self._n} "
                f"times the batch of {self._n}, as in a doubled or packed batch, from which rows cannot be taken.\n"
                f"If all samples share it, pass call=dict(shared=[{name!r}]); else call the model with one row a "
                "sample."
            )


def nested_path(path: str, key: object) -> str:
    """Where ``path[key]`` is, as one would type it."""
    return f"{path}[{key!r}]"


def as_weights(model: nn.Module, tensor: Tensor, *, exact: bool) -> Tensor:
    """A tensor of a call in the dtype of the model's weights, unless autocast sees to it.

    If it must stay ``exact`` it is never rounded: models embed t in float32 whatever their weights.
    """
    if not tensor.is_floating_point() or torch.is_autocast_enabled(tensor.device.type):
        return tensor
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), tensor.dtype)
    return tensor.to(torch.promote_types(tensor.dtype, dtype) if exact else dtype)
