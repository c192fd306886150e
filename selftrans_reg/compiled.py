"""Compiling a teacher: block by block, with a cache of its own, on batches of a few sizes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .names import named_layers, numbered_groups
from .truncate import Pruned

# Row counts differ from step to step: padded, they need one graph of fixed and one of changing size.
_MULTIPLE = 8


def compile_blocks(model: nn.Module) -> None:
    """Compile the forward of every block in a ``ModuleList`` of ``model``; one graph serves all blocks of a class.

    The forward as a whole cannot be compiled, since it is left by an exception. Where PyTorch can, the graphs get a
    cache of their own: student, EMA copy and teacher share a class, and with it a cache of eight entries.
    """
    isolate = (
        {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
    )
    compiled: dict[type[nn.Module], Callable[..., Any]] = {}
    layers = named_layers(model)
    for name, blocks in numbered_groups(layers).items():
        for block in blocks:
            if isinstance(block, Pruned) or not isinstance(layers.get(name), nn.ModuleList):
                continue  # a Sequential's members are numbered too, but small
            if "forward" in vars(block):  # patched for this block alone, as by accelerate's hooks
                block.forward = torch.compile(block.forward, **isolate)  # type: ignore[call-overload]
                continue
            kind = type(block)
            if kind not in compiled:
                compiled[kind] = torch.compile(kind.forward, **isolate)  # type: ignore[call-overload]
            block.forward = functools.partial(compiled[kind], block)


def pad_rows(tensor: Tensor) -> Tensor:
    """The tensor with its last row repeated up to a multiple of eight rows."""
    missing = -len(tensor) % _MULTIPLE
    return torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])]) if missing else tensor
