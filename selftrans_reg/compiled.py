"""Compiling a teacher: block by block, with a cache of its own, on batches of a few sizes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .truncate import Pruned

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
