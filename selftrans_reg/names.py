"""Layer names as the unwrapped model prints them, whatever wraps the model."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from .errors import LayerNotFoundError, SettingError

# Children under these names are the wrapped module itself: torch.compile, checkpoint_wrapper, FSDP1.
_TRANSPARENT = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


def _looks_through(parent: nn.Module, child: str) -> bool:
    """Whether ``parent.child`` is what ``parent`` wraps, so that ``child`` is no part of a layer's name."""
    if child in _TRANSPARENT:
        return True
    if child == "module":  # DDP, DataParallel, DeepSpeed, AveragedModel: one child, called so
        return len(parent._modules) == 1
    # PEFT, recognised without importing it: PeftModel.base_model, and the tuner's own `model`.
    return child in ("base_model", "model") and type(parent).__module__.partition(".")[0] == "peft"


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own model: what DDP, ``torch.compile``, checkpoint wrappers, FSDP and PEFT hold."""
    while True:
        inner = next((c for name, c in model.named_children() if _looks_through(model, name)), None)
        if inner is None:
            return model
        model = inner


def sharded_parts(model: nn.Module) -> list[nn.Module]:
    """The modules of ``model`` that FSDP2 shards (``fully_shard``), known by the method that it gives them."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []  # without walking through all modules, at every step of a run on one GPU
    return [module for module in model.modules() if hasattr(type(module), "reshard")]


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer of the unwrapped model by the name that it prints, wrappers' prefixes left out.

    Where a wrapper and what it wraps share a name, the wrapper is meant: its output is the one that the model goes on
    with, and under reentrant checkpointing the only one that carries a gradient.
    """
    found: dict[str, nn.Module] = {}

    def walk(module: nn.Module, name: str) -> None:
        found.setdefault(name, module)
        for child_name, child in module._modules.items():  # named_children leaves out a shared module's other names
            if child is None:
                continue
            child_path = name if _looks_through(module, child_name) else f"{name}.{child_name}" if name else child_name
            walk(child, child_path)

    walk(unwrap(model), "")
    del found[""]
    return found


def numbered_groups(layers: dict[str, nn.Module]) -> dict[str, list[nn.Module]]:
    """The lists of blocks, outermost first: ``blocks`` -> [blocks.0, blocks.1, ...]."""
    groups: dict[str, list[nn.Module]] = {}
    for name, module in layers.items():
        group, _, index = name.rpartition(".")
        if index.isdecimal() and not re.search(r"(^|\.)\d+(\.|$)", group):
            groups.setdefault(group, []).append(module)
    return groups


def find_layer(model: nn.Module, name: str) -> nn.Module:
    """The module that ``name`` means.

    Raises:
        LayerNotFoundError: If there is none; it lists the numbered groups and the nearest names.
        SettingError: If ``name`` is not a string.
    """
    if not isinstance(name, str):
        raise SettingError(
            f"A layer is named by its dotted module name, such as 'blocks.7'; got {name!r}.\n"
            "Names count from 0: the eighth block (REPA's encoder_depth=8) is 'blocks.7'."
        )
    layers = named_layers(model)
    if name not in layers:
        raise LayerNotFoundError(
            f"{type(unwrap(model)).__name__} has no layer {name!r}.\n"
            f"Found: {_summary(layers)}.\n"
            f"Nearest: {quoted(nearest(name, layers)) or 'none'}."
        )
    return layers[name]


def _summary(layers: dict[str, nn.Module]) -> str:
    parts = []
    for group, members in numbered_groups(layers).items():
        kinds = sorted({type(m).__name__ for m in members})
        if len(kinds) > 1 and group and not isinstance(layers[group], nn.ModuleList):
            continue  # the parts of a small Sequential, such as an embedder's: no blocks
        prefix = f"{group}." if group else ""
        parts.append(f"{prefix}0 … {prefix}{len(members) - 1} ({len(members)} {' / '.join(kinds)})")
    return ", ".join(parts or [name for name in layers if "." not in name] or ["no layers at all"])


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """The three nearest names, best first."""
    return difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)


def quoted(names: Iterable[str]) -> str:
    """``'a', 'b'``: names as an error message lists them."""
    return ", ".join(repr(name) for name in names)


def some_of(names: Sequence[str], *, quote: bool = True) -> str:
    """Up to twenty names, each cut at a hundred characters, and how many more there are."""
    shown = [repr(name[:100]) if quote else name for name in names[:20]]
    return ", ".join(shown) + (f" ... and {len(names) - 20} more" if len(names) > 20 else "") or "nothing"
