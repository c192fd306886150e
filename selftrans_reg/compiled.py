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

# Sizes to which rows are padded, from a power of two to the next. How many are inside the window differs from step to
# step. Graphs of a changing size take them all, but a block whose code depends on the size needs a graph for each.
# Sixteen cost a sixteenth more rows at most; multiples of eight would make 24 rows of 18.
_SIZES = 16


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
    """The tensor with its last row repeated up to one of a few sizes, at most a sixteenth larger."""
    octave = 2 ** (len(tensor).bit_length() - 1)
    missing = -len(tensor) % max(1, octave // _SIZES)
    return torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])]) if missing else tensor
