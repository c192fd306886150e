"""Dropping what a teacher never runs before its layer, and compiling what is left."""

from __future__ import annotations

import functools
import gc
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType, ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .errors import PrunedModuleError
from .modules import named_layers, quoted, unwrap
from .taps import watched


class Pruned(nn.Module):
    """Stands where a module was that never ran; says its name when it is touched.

    Attributes:
        name: Where it stands.
        touched: Whether it was. Kept besides raising, as the model may swallow the error.
        probed: Whether a private attribute was asked for: libraries ask every module for theirs.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.forget()

    def forget(self) -> None:
        """Nothing has touched it."""
        self.touched = self.probed = False

    def _raise(self) -> NoReturn:
        self.touched = True
        raise pruned_error([self.name])

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse the call."""
        self._raise()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copy and pickle ask every object for
            raise AttributeError(name)
        if name.startswith("_"):
            self.probed = True
            raise pruned_error([self.name])
        self._raise()

    def __getitem__(self, index: Any) -> NoReturn:
        self._raise()

    def __iter__(self) -> NoReturn:
        self._raise()

    def __len__(self) -> NoReturn:
        self._raise()


def pruned_error(names: Iterable[str]) -> PrunedModuleError:
    """What to raise when modules that were dropped are used."""
    return PrunedModuleError(
        f"Module {quoted(names)} of the teacher was used, but it was dropped: the teacher's first call did not run "
        "it before the tapped layer.\n"
        "Give build_teacher an example= that takes every path which later calls take."
    )


def truncate(model: nn.Module, layer: nn.Module, run: Callable[[], Tensor]) -> Tensor:
    """Replace every module of ``model`` that ``run`` does not start by a :class:`Pruned`, and return ``run()``.

    A module that has finished is kept whole, since parts of it may be used without being called (as the output
    projection of ``nn.MultiheadAttention``); and so is one that the model holds beside its tree of modules, as in a
    tuple or a bound method. ``run`` is repeated afterwards; whatever it touches is put back, until it gives what it
    gave at first.

    Args:
        model: The model, which ``run`` calls and leaves at ``layer``.
        layer: The tapped layer.
        run: Calls the model on real rows.
    """
    started: set[nn.Module] = set()
    finished: set[nn.Module] = {layer}
    with watched(model.modules(), lambda module, args: started.add(module), finished.add):
        reference = run()

    dropped: dict[str, tuple[nn.Module, Pruned]] = {}
    for name, module in list(_never_started(model, "", started, finished, set())):
        dropped[name] = module, Pruned(name)
        _put(model, name, dropped[name][1])

    def put_back(names: Iterable[str]) -> None:
        for name in names:
            _put(model, name, dropped.pop(name)[0])

    put_back(_held_elsewhere(model, {name: module for name, (module, _) in dropped.items()}))
    while True:
        for _, pruned in dropped.values():
            pruned.forget()
        failed: Exception | None = None
        try:
            result = run()
        except Exception as error:
            failed = error
        missed = [name for name, (_, pruned) in dropped.items() if pruned.touched or (failed and pruned.probed)]
        if not missed:
            break
        put_back(missed)
    if failed is not None:
        put_back(list(dropped))
        raise failed
    if not torch.allclose(result, reference, rtol=1e-4, atol=1e-5, equal_nan=True):
        put_back(list(dropped))
        warnings.warn(
            "The teacher's features changed when the modules that never run were dropped, so the teacher was kept "
            "whole. Its forward looks at its own modules: please report the model.",
            stacklevel=2,
        )
    return reference


def pruned_modules(model: nn.Module) -> list[Pruned]:
    """What stands in a truncated model for what it has lost."""
    return [module for module in model.modules() if isinstance(module, Pruned)]


def dropped_names(model: nn.Module) -> list[str]:
    """The names of the modules that a truncated model has lost."""
    return [name for name, module in named_layers(model).items() if isinstance(module, Pruned)]


def drop(model: nn.Module, names: Iterable[str]) -> None:
    """Replace the modules of these names, where the model has them, by a :class:`Pruned`."""
    layers = named_layers(model)
    for name in names:
        if name in layers:
            parent, _, child = name.rpartition(".")
            unwrap(layers[parent] if parent else model)._modules[child] = Pruned(name)


def _never_started(
    module: nn.Module, prefix: str, started: set[nn.Module], finished: set[nn.Module], seen: set[nn.Module]
) -> Iterator[tuple[str, nn.Module]]:
    """The largest modules of which nothing ran, outside of those that finished, by each of their names."""
    seen.add(module)
    for name, child in module._modules.items():  # named_children leaves out a shared module's other names
        path = f"{prefix}.{name}" if prefix else name
        if child is None or child in finished:
            continue
        # Lists are not called but counted and indexed: they stay, and their members go.
        if isinstance(child, nn.ModuleList | nn.ModuleDict) or any(m in started for m in child.modules()):
            if child not in seen:
                yield from _never_started(child, path, started, finished, seen)
        else:
            yield path, child


def _held_elsewhere(model: nn.Module, dropped: dict[str, nn.Module]) -> list[str]:
    """The names of dropped modules that ``model`` still reaches: it may use their weights without calling them.

    Such weights would be in no state dict, and moved by no ``.to()``.
    """
    kept = {id(part) for part in (*model.modules(), *model.parameters(), *model.buffers())}  # shared with those dropped
    parts: dict[int, set[str]] = {}  # modules, parameters and buffers, by the dropped modules that hold them
    for name, module in dropped.items():
        for part in (*module.modules(), *module.parameters(), *module.buffers()):
            if id(part) not in kept:
                parts.setdefault(id(part), set()).add(name)
    found: set[str] = set()
    seen = {id(model)}
    todo: list[Any] = [model]
    while todo:
        thing = todo.pop()
        found |= parts.get(id(thing), set())
        # All that a function's globals hold is not the model's.
        own = ("__closure__", "__defaults__", "__kwdefaults__", "__dict__")
        held = [getattr(thing, name) for name in own] if isinstance(thing, FunctionType) else gc.get_referents(thing)
        for other in held:
            if id(other) not in seen and not issubclass(type(other), type | ModuleType):
                seen.add(id(other))
                todo.append(other)
    return [name for name in dropped if name in found]


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent)._modules[child] = module


# Sizes to which rows are padded, from a power of two to the next. How many are inside the window differs from step to
# step. Graphs of a changing size take them all, but a block whose code depends on the size needs a graph for each.
# Sixteen cost a sixteenth more rows at most; multiples of eight would make 24 rows of 18.
_SIZES = 16


def compile_blocks(model: nn.Module) -> None:
    """Compile the forward of every block of ``model``; one graph serves all blocks of a class that are alike.

    The forward as a whole cannot be compiled, since it is left by an exception. Where PyTorch can, the graphs get a
    cache of their own: student, EMA copy and teacher share a class, and with it a cache of eight entries; and as many
    entries as blocks may need that differ in a number, such as their index.
    """
    blocks = blocks_of(model)
    wanted = {"isolate_recompiles": True, "recompile_limit": 8 * len(blocks)}
    options: dict[str, Any] = {k: v for k, v in wanted.items() if k in inspect.signature(torch.compile).parameters}
    compiled: dict[type[nn.Module], Callable[..., Any]] = {}
    for block in blocks:
        if "forward" in vars(block):  # patched for this block alone, as by accelerate's hooks
            block.forward = torch.compile(block.forward, **options)
            continue
        kind = type(block)
        if kind not in compiled:
            compiled[kind] = torch.compile(kind.forward, **options)
        block.forward = functools.partial(compiled[kind], block)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The outermost members of lists and dicts of modules, and of Sequentials of one class, as timm has them."""
    found: dict[nn.Module, None] = {}  # a dict keeps the order, and a shared block once
    for child in model.children():
        for block in _members(child) if _is_container(child) else blocks_of(child):
            found[block] = None
    return list(found)


def _members(container: nn.Module) -> Iterator[nn.Module]:
    for member in container.children():
        if _is_container(member):
            yield from _members(member)
        elif not isinstance(member, Pruned):
            yield member


def _is_container(module: nn.Module) -> bool:
    if isinstance(module, nn.Sequential):
        kinds = {type(member) for member in module.children()} - {Pruned}
        return len(module) > 1 and len(kinds) == 1
    return isinstance(module, nn.ModuleList | nn.ModuleDict)


def pad_rows(tensor: Tensor) -> Tensor:
    """The tensor with its last row repeated up to one of a few sizes, at most a sixteenth larger."""
    octave = 2 ** (len(tensor).bit_length() - 1)
    missing = -len(tensor) % max(1, octave // _SIZES)
    return torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])]) if missing else tensor
