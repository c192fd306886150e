"""Dropping what a teacher never runs before its layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .errors import PrunedModuleError
from .names import named_layers, unwrap
from .taps import watched


class Pruned(nn.Module):
    """Stands where a module was that never ran; says its name when it is touched."""

    def __init__(self, name: str, touched: list[str]) -> None:
        super().__init__()
        self._name = name
        self._touched = touched  # kept besides raising: the model may swallow the error

    def _raise(self) -> NoReturn:
        self._touched.append(self._name)
        raise PrunedModuleError(
            f"Module {self._name!r} of the teacher was used, but it was dropped: the teacher's first call did not run "
            "it before the tapped layer.\n"
            "Give build_teacher an example= that takes every path which later calls take."
        )

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse the call."""
        self._raise()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # what copy, pickle and torch itself ask every module for
            raise AttributeError(name)
        self._raise()

    def __getitem__(self, index: Any) -> NoReturn:
        self._raise()

    def __iter__(self) -> NoReturn:
        self._raise()

    def __len__(self) -> NoReturn:
        self._raise()


def truncate(model: nn.Module, layer: nn.Module, run: Callable[[], Tensor]) -> Tensor:
    """Replace every module of ``model`` that ``run`` does not start by a :class:`Pruned`, and return ``run()``.

    A module that has finished is kept whole, since parts of it may be used without being called (as the output
    projection of ``nn.MultiheadAttention``). ``run`` is repeated afterwards; whatever it touches is put back, until it
    gives what it gave at first.

    Args:
        model: The model, which ``run`` calls and leaves at ``layer``.
        layer: The tapped layer.
        run: Calls the model on real rows.
    """
    started: set[nn.Module] = set()
    finished: set[nn.Module] = {layer}
    with watched(model.modules(), lambda module, args: started.add(module), finished.add):
        reference = run()

    touched: list[str] = []
    originals: dict[str, nn.Module] = {}
    for name, module in list(_never_started(model, "", started, finished)):
        originals[name] = module
        _put(model, name, Pruned(name, touched))
    while True:
        touched.clear()
        try:
            result = run()
        except Exception:
            if not touched:
                raise
        if not touched:
            break
        for name in set(touched):
            _put(model, name, originals.pop(name))
    if not torch.allclose(result, reference, rtol=1e-4, atol=1e-5, equal_nan=True):
        for name, module in originals.items():
            _put(model, name, module)
        warnings.warn(
            "The teacher's features changed when the modules that never run were dropped, so the teacher was kept "
            "whole. Its forward looks at its own modules: please report the model.",
            stacklevel=2,
        )
    return reference


def dropped_names(model: nn.Module) -> list[str]:
    """The names of the modules that a truncated model has lost."""
    return [name for name, module in named_layers(model).items() if isinstance(module, Pruned)]


def drop(model: nn.Module, names: Iterable[str]) -> None:
    """Replace the modules of these names, where the model has them, by a :class:`Pruned`."""
    layers = named_layers(model)
    for name in names:
        if name in layers:
            parent, _, child = name.rpartition(".")
            unwrap(layers[parent] if parent else model)._modules[child] = Pruned(name, [])


def _never_started(
    module: nn.Module, prefix: str, started: set[nn.Module], finished: set[nn.Module]
) -> Iterator[tuple[str, nn.Module]]:
    """The largest modules of which nothing ran, outside of those that finished."""
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if child in finished:
            continue
        # Lists are not called but counted and indexed: they stay, and their members go.
        if isinstance(child, nn.ModuleList | nn.ModuleDict) or any(m in started for m in child.modules()):
            yield from _never_started(child, path, started, finished)
        else:
            yield path, child


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent)._modules[child] = module
