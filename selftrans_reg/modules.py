"""A model whatever wraps it: its layers by name, its blocks, the width and device of a layer, its fingerprint."""

from __future__ import annotations

import copy
import difflib
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from .errors import LayerNotFoundError, SettingError

M = TypeVar("M", bound=nn.Module)
SHARED = "_selftrans_shared"  # where a copy keeps the ids of the tensors that are another model's too

# What wrappers call the module that they hold, by package and class, so that none of them has to be imported. A child's
# name alone tells nothing: blocks have parts that are called `module`.
_WRAPPERS = {
    "module": {
        "torch.DataParallel", "torch.DistributedDataParallel", "torch.AveragedModel", "timm.ModelEmaV2",
        "timm.ModelEmaV3", "apex.DistributedDataParallel", "fairscale.ShardedDataParallel",
        "deepspeed.DeepSpeedEngine", "torch_xla.XlaFullyShardedDataParallel",
    },
    "_orig_mod": {"torch.OptimizedModule"},
    "_checkpoint_wrapped_module": {"torch.ActivationWrapper"},  # CheckpointWrapper and OffloadWrapper
    "_fsdp_wrapped_module": {"torch.FullyShardedDataParallel", "fairscale.FullyShardedDataParallel"},
    "_forward_module": {"lightning._FabricModule", "lightning_fabric._FabricModule"},
    "base_model": {"peft.PeftModel", "peft.PeftMixedModel"},
    "model": {"peft.BaseTuner", "peft.LoraModel"},
}  # fmt: skip


def _wrapped_child(module: nn.Module) -> str | None:
    """What a wrapper calls the module that it wraps; None if ``module`` is no wrapper."""
    for child, wrappers in _WRAPPERS.items():
        if module._modules.get(child) is not None and any(
            f"{base.__module__.partition('.')[0]}.{base.__name__}" in wrappers for base in type(module).__mro__
        ):
            return child
    return None


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own model: what DDP, ``torch.compile``, checkpoint wrappers, FSDP and PEFT hold."""
    while (child := _wrapped_child(model)) is not None:
        model = model._modules[child]  # type: ignore[assignment]  # it is there
    return model


def plain_key(model: nn.Module, key: str) -> str:
    """The name of a weight of ``model`` without the parts that stand for its wrappers."""
    module: nn.Module | None = model
    kept = []
    for part in key.split("."):
        inner = None
        while part != inner and module is not None and (inner := _wrapped_child(module)) is not None:
            module = module._modules[inner]  # whether the key names it or not: checkpoint wrappers leave their part out
        if part != inner:
            kept.append(part)
            module = None if module is None else module._modules.get(part)
    return ".".join(kept)


def bare_key(key: str) -> str:
    """A weight's name without all that wrappers put into it, whatever its model; PEFT's are names of parts, too."""
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS or part in ("base_model", "model"))


def sharded_parts(model: nn.Module) -> list[nn.Module]:
    """The modules of ``model`` that FSDP2 shards (``fully_shard``), known by the method that it gives them."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []  # without walking through all modules, at every step of a run on one GPU
    return [module for module in model.modules() if hasattr(type(module), "reshard")]


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer of the unwrapped model by the name that it prints, wrappers' prefixes left out.

    A wrapper takes the name of what it wraps: its output alone carries a gradient under reentrant checkpointing.
    """
    found: dict[str, nn.Module] = {}

    def walk(module: nn.Module, name: str) -> None:
        found.setdefault(name, module)
        inner = _wrapped_child(module)
        for child_name, child in module._modules.items():  # named_children leaves out a shared module's other names
            if child is not None:
                walk(child, name if child_name == inner else f"{name}.{child_name}" if name else child_name)

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
    """The module that ``name`` means, or a ``LayerNotFoundError`` with the numbered groups and the nearest names."""
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


def layer_names(layer: str | Sequence[str]) -> tuple[str, ...]:
    """One name or several as a tuple."""
    names = (layer,) if isinstance(layer, str) or not isinstance(layer, Sequence) else tuple(layer)
    if not names or len(set(names)) != len(names):
        raise SettingError(f"Name at least one layer, and none twice; got {quoted(names) or 'none'}.")
    return names


def _summary(layers: dict[str, nn.Module]) -> str:
    parts = []
    for group, members in numbered_groups(layers).items():
        kinds = sorted({type(m).__name__ for m in members})
        if len(kinds) == 1 or not group or isinstance(layers[group], nn.ModuleList):  # or parts of a small Sequential
            prefix = f"{group}." if group else ""
            parts.append(f"{prefix}0 … {prefix}{len(members) - 1} ({len(members)} {' / '.join(kinds)})")
    return ", ".join(parts or [name for name in layers if "." not in name] or ["no layers at all"])


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """The three nearest names, best first."""
    return difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)


def quoted(names: Iterable[object]) -> str:
    """``'a', 'b'``: names as an error message lists them."""
    return ", ".join(repr(name) for name in names)


def some_of(names: Sequence[str], *, quote: bool = True) -> str:
    """Up to twenty names, each cut at a hundred characters, and how many more there are."""
    shown = [repr(name[:100]) if quote else name for name in names[:20]]
    return ", ".join(shown) + (f" ... and {len(names) - 20} more" if len(names) > 20 else "") or "nothing"


def fingerprint(model: nn.Module, settings: Mapping[str, Any]) -> Tensor:
    """SHA-256 of a model's weights, and of settings on which its features depend, as 32 bytes in a uint8 tensor.

    Functions among the settings count by their names.
    """
    digest = hashlib.sha256()
    digest.update("\n".join(f"{name}={_plain(value)}" for name, value in sorted(settings.items())).encode())
    for name, value in sorted(unwrap(model).state_dict().items()):
        if isinstance(value, Tensor):  # a module's extra state may be anything
            digest.update(f"\n{name} {_plain(value)}".encode())
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


def _plain(value: Any) -> str:
    if isinstance(value, Tensor):
        value = value.full_tensor() if hasattr(value, "full_tensor") else value.detach()  # FSDP2's are in parts
        what = f"{value.dtype} {tuple(value.shape)}"
        if value.is_meta:  # offloaded: its values are elsewhere
            return what
        if hasattr(value, "__tensor_flatten__"):  # quantised: several plain tensors, and how they make one
            names, _ = value.__tensor_flatten__()
            return f"{what} {type(value).__name__} {' '.join(_plain(getattr(value, name)) for name in names)}"
        data = memoryview(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return f"{what} {hashlib.sha256(data).hexdigest()}"
    return getattr(value, "__qualname__", "callable") if callable(value) else repr(value)


def check_positive(name: str, value: object) -> None:
    """Raise ``SettingError`` unless ``value`` is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SettingError(f"{name} must be a positive integer; got {value!r}.")


def check_one_of(name: str, value: object, choices: Iterable[object]) -> None:
    """Raise ``SettingError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise SettingError(f"{name} must be one of {quoted(choices)}; got {value!r}.")


_CHANNELS_FIRST = (_ConvNd, _BatchNorm, nn.GroupNorm)


@dataclass(frozen=True)
class Layout:
    """Which axis of a layer's output holds its width D, as far as the layer tells."""

    axis: int | None  # 1 or -1 where the layer's class leaves no doubt
    widths: frozenset[int]  # every width that it may be, a single one where that is certain

    @classmethod
    def of(cls, layer: nn.Module, hidden_size: int | None = None) -> Layout:
        """The layout of a layer's output, of width ``hidden_size`` if given."""
        width = infer_width(layer, hidden_size)
        widths = frozenset([width]) if width else _possible_widths(layer)
        last = _last(layer)
        if isinstance(last, _CHANNELS_FIRST):
            return cls(1, widths)
        return cls(-1 if isinstance(last, nn.Linear | nn.LayerNorm | nn.RMSNorm | nn.Embedding) else None, widths)


def infer_width(layer: nn.Module, hidden_size: int | None = None) -> int | None:
    """``hidden_size`` if given, else the width of a layer's output tokens where its parts leave no doubt, or None.

    In a transformer block the residual width is the one that is normalised, enters a Linear and leaves at least two,
    the attention's last and the MLP's. The MLP's inner width is not normalised, a head's width (qk-norm) enters no
    Linear, and in a final layer at most one Linear gives it, that of the condition.
    """
    if hidden_size is not None:
        check_positive("hidden_size", hidden_size)
        return hidden_size
    last = _last(layer)
    if isinstance(last, nn.Linear):
        return last.out_features
    if (width := _norm_width(last)) is not None:
        return width
    linears = [m for m in last.modules() if isinstance(m, nn.Linear)]
    normalised = {_norm_width(m) for m in last.modules()}
    given = Counter(m.out_features for m in linears)
    widths = [width for width in normalised & {m.in_features for m in linears} if width and given[width] > 1]
    return widths[0] if len(widths) == 1 else None


def _last(layer: nn.Module) -> nn.Module:
    """The module whose output is the layer's: the last of a Sequential, what a wrapper holds."""
    layer = unwrap(layer)
    return _last(layer[-1]) if isinstance(layer, nn.Sequential) and len(layer) else layer


def _norm_width(module: nn.Module) -> int | None:
    """What a norm normalises over, whatever its class: it has no parts, and its weights are vectors of one length."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return int(module.normalized_shape[-1])
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    weights = [weight for weight in module._parameters.values() if weight is not None]
    if module._modules or not weights or any(is_lazy(weight) or weight.ndim != 1 for weight in weights):
        return None
    lengths = {len(weight) for weight in weights}
    return lengths.pop() if len(lengths) == 1 and max(lengths) > 1 else None


def _possible_widths(layer: nn.Module) -> frozenset[int]:
    found = {_norm_width(module) for module in layer.modules()}
    found |= {getattr(m, name, None) for m in layer.modules() for name in ("out_features", "out_channels", "embed_dim")}
    found |= {p.shape[0] for p in layer.parameters() if not is_lazy(p) and p.ndim > 1}  # of classes of one's own
    return frozenset(width for width in found if isinstance(width, int) and width > 1)


def resolve_width(layer: nn.Module, name: str, hidden_size: int | None) -> int:
    """``hidden_size`` if given, else the layer's width; a ``SettingError`` if that is not certain."""
    if (width := infer_width(layer, hidden_size)) is None:
        lazy = any(is_lazy(parameter) for parameter in layer.parameters())
        more = "; or run the model once, as some of its parameters are not initialised yet" if lazy else ""
        raise SettingError(
            f"The width of layer {name!r} ({type(layer).__name__}) cannot be read off with certainty.\n"
            f"Pass hidden_size=, the last axis of that layer's tokens{more}."
        )
    return width


def device_of(module: nn.Module) -> torch.device:
    """Where a module's parameters lie; the CPU for one without, or one on the meta device."""
    parameter = next(module.parameters(), None)
    return torch.device("cpu") if parameter is None or parameter.is_meta else parameter.device


def share_frozen(model: M) -> M:
    """A copy of ``model`` that shares its frozen parameters and buffers, and owns what trains.

    With an adapter (LoRA) the copy takes the adapter's memory alone, so the base model can teach itself:

    >>> import torch, selftrans_reg as st
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2).requires_grad_(False), torch.nn.Linear(2, 2))
    >>> other = st.share_frozen(model)
    >>> other[0].weight is model[0].weight, other[1].weight is model[1].weight
    (True, False)

    It holds the weights that train as they are now: a snapshot. Statistics that a batch norm gathers are its own.
    """
    memo: dict[int, Any] = {id(p): p for p in model.parameters() if not p.requires_grad}
    for module in model.modules():
        if not getattr(module, "track_running_stats", False):
            memo |= {id(buffer): buffer for buffer in module._buffers.values() if buffer is not None}
    other = copy.deepcopy(model, dict(memo))
    other.__dict__[SHARED] = frozenset(memo)  # nothing may be loaded into these
    return other


def freeze(model: nn.Module) -> list[tuple[nn.Module, bool, dict[str, nn.Parameter]]]:
    """Freeze every parameter, and return each module with its mode and the parameters that trained.

    A plain one is replaced by one of the same memory that does not train: another model may hold it too.
    """
    frozen: dict[int, nn.Parameter] = {}
    taken = []
    for module in model.modules():
        trained = {name: p for name, p in module._parameters.items() if p is not None and p.requires_grad}
        for name, p in trained.items():
            if type(p) is nn.Parameter and type(p.data) is Tensor:
                module._parameters[name] = frozen.setdefault(id(p), nn.Parameter(p.detach(), requires_grad=False))
            else:
                p.requires_grad_(False)
        taken.append((module, module.training, trained))
    return taken
