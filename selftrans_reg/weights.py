"""Load weights into a model, whole or not at all."""

from __future__ import annotations

import importlib
import math
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .checkpoints import local_path, read_checkpoint, read_json
from .errors import CheckpointError, SettingError
from .modules import SHARED, bare_key, nearest, plain_key, quoted, some_of
from .truncate import dropped_names

# The counter that torch.optim.swa_utils.AveragedModel saves beside the model that it wraps.
_COUNTER = "n_averaged"

# Heads that training left in the backbone's state dict: REPA's and the released Self-Transcendence code's.
_HEADS = (
    re.compile(r"projectors(\.\d+)?\.[024]\.(weight|bias)"),
    re.compile(r"projectors_final\.linear\.(weight|bias)"),
)

_FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}

_LISTED = 8  # keys that one section of an error message names


class LoadReport(NamedTuple):
    """What ``load_weights`` read."""

    source: str | None = None  # the path as given, or None if the weights did not come from a file
    entry: str | None = None  # the entry that was taken ("ema", "state_dict.net"), or None for a bare state dict
    left_out: tuple[str, ...] = ()  # keys of the file that belong to a projection head which the model does not have
    step: int | None = None  # the training step that the file names (steps, step or global_step), if it does


def load_weights(
    model: nn.Module, checkpoint: str | os.PathLike[str] | Mapping[str, Any] | None, *, weights: str = "ema"
) -> LoadReport:
    """Load a checkpoint into ``model``, strictly: everything fits and is copied, or nothing is touched.

    Prefixes that DDP, ``torch.compile``, checkpointing and ``AveragedModel`` put into keys are taken off; the model may
    be wrapped too. Floating-point weights take the model's dtype and device; every other dtype has to be the model's
    own. Of weights that are tied in the model, the file may hold one. Projection heads that REPA and the released
    Self-Transcendence code keep inside the backbone are left out, and reported, if the model has none.

    A PEFT adapter's folder or file is loaded into the model's adapter, all of it or none; its other weights stay.

    Args:
        model: The model that the weights are for, with real (not meta) tensors and before any sharding.
        checkpoint: What :func:`read_checkpoint` reads; the dictionary itself; or None for the model's own weights.
        weights: The name of an entry, and after a dot what is below it, an entry or a common prefix of the keys.
            ``"state_dict.net"`` are the weights of ``self.net`` in a Lightning checkpoint, ``"net"`` those in a bare
            state dict. ``"model"`` also takes ``state_dict``. A bare state dict is taken whole for ``"ema"`` and
            ``"model"``; below a prefix of that name are ``"ema."`` and ``"model."``.

    Raises:
        CheckpointError: If the file cannot be read, would run code, holds weights that are not finite, or does not fit.
        SettingError: If ``weights`` is no name.
    """
    if not isinstance(weights, str) or not weights:
        raise SettingError(f"weights names the entry of the checkpoint to take, such as 'ema'; got {weights!r}.")
    if checkpoint is None:
        return LoadReport()
    if isinstance(checkpoint, Mapping):
        source, where, content = None, "the given dictionary", checkpoint
    else:
        where = str(local_path(checkpoint))
        source, content = os.fspath(checkpoint), read_checkpoint(checkpoint)
    keys = {bare_key(key) for key in model.state_dict()}
    entry, chosen = _choose_entry(content, weights, where, keys)
    where = where if entry is None else f"{where}, entry {entry!r},"
    own = _adapter(model, chosen, source) or own_tensors(model)
    saved = _matched(own, chosen, where)
    heads = [head for head in _HEADS if not any(map(head.fullmatch, own))]
    left_out = tuple(key for key in saved if any(head.fullmatch(key) for head in heads))
    gone = tuple(f"{name}." for name in dropped_names(model))  # by a truncated teacher
    for key in [key for key in saved if key in left_out or key.startswith(gone)]:
        del saved[key]
    if not own.keys() & saved.keys():
        advice = ""
        if paths := [path for path in _paths(chosen, keys, f"{entry}." if entry else "") if path != entry]:
            advice = f"The model's keys are there below a prefix: {_pass(paths)}"
        elif any(".lora_" in key for key in saved):
            advice = (
                "These are the weights of an adapter: give the model one first, "
                "model = peft.get_peft_model(model, peft.PeftConfig.from_pretrained(folder))."
            )
        if advice:
            raise CheckpointError(f"{where} does not fit {type(model).__name__}; nothing was loaded.\n{advice}")
    check_fit(model, own, saved, where)
    check_values(own, saved, where)
    shared = vars(model).get(SHARED, ())
    clash = [k for k, v in saved.items() if id(own[k]) in shared and not torch.equal(own[k].cpu(), v.to(own[k].dtype))]
    if clash:
        raise CheckpointError(
            f"{where} has other values than the model under {some_of(clash)}, which share_frozen() has left to another "
            "model: that one would change too. Load the weights that train alone, or into copy.deepcopy(model)."
        )
    with torch.no_grad():
        for key, value in saved.items():
            mine = own[key]
            # In a buffer made by expand() or as_strided(), elements share memory, into which copy_ does not write.
            if torch._debug_has_internal_overlap(mine) == 1 or mine.nbytes > mine.untyped_storage().nbytes():
                mine.data = value.to(mine.device, mine.dtype, copy=True)
            else:
                mine.copy_(value)
    step = next((content[key] for key in ("steps", "step", "global_step") if type(content.get(key)) is int), None)
    return LoadReport(source, entry, left_out, step)


def _choose_entry(
    content: Mapping[str, Any], weights: str, where: str, keys: Collection[str]
) -> tuple[str | None, Mapping[str, Any]]:
    """The name of the entry that holds the asked weights, None if ``content`` is a state dict itself, and the entry."""
    if weights in ("ema", "model") and content and all(isinstance(value, Tensor) for value in content.values()):
        return None, content
    names = ("model", "state_dict") if weights == "model" else (weights,)
    found = [(name, below) for name in names if (below := _below(content, name)) is not None]
    if len(found) == 1:
        return found[0]
    there = some_of([_shown(key) for key in content], quote=False)
    if found:
        advice = "it is open which is meant: pass weights='state_dict', or the entry 'model' itself."
        raise CheckpointError(f"{where} has {there}, and {advice}")
    if not (paths := _paths(content, keys)):
        others = [f"{_shown(key)} ({type(v).__name__})" for key, v in content.items() if not isinstance(v, Tensor)]
        raise CheckpointError(
            f"{where} is no state dict and has no entry {weights!r} that is one.\n"
            f"Not tensors: {some_of(others, quote=False)}.\n"
            "Pass the dictionary of the weights itself as the checkpoint."
        )
    raise CheckpointError(f"{where} has {there} but no {weights!r}: {_pass(paths)}")


def _below(content: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """The entry of that name, an entry of an entry, or the part of a state dict below a common prefix of its keys."""
    if isinstance(content.get(name), Mapping):
        entry: Mapping[str, Any] = content[name]
        return entry
    for outer, entry in content.items():
        if isinstance(outer, str) and isinstance(entry, Mapping) and name.startswith(f"{outer}."):
            return _below(entry, name[len(outer) + 1 :])
    prefix = name.rstrip(".") + "."
    cut = {k.removeprefix(prefix): v for k, v in content.items() if isinstance(k, str) and k.startswith(prefix)}
    return cut or None


def _paths(content: Mapping[str, Any], keys: Collection[str], above: str = "", depth: int = 4) -> list[str]:
    """What ``weights`` can name: each entry with tensors, by prefixes below which it has a key that tells the model."""
    sign, prefixes, paths = max(keys, key=len, default=""), dict[str, None](), []
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, Tensor):
            parts = key[:500].split(".")
            starts = [i for i in range(len(parts[:16])) if bare_key(".".join(parts[i:])) == sign]
            prefixes |= {".".join(parts[: starts[0]]): None} if starts else {}
        elif depth and isinstance(key, str) and isinstance(value, Mapping):
            paths += _paths(value, keys, f"{above}{key[:100]}.", depth - 1)
    if not prefixes and any(isinstance(value, Tensor) for value in content.values()):
        prefixes[""] = None
    here = [f"{above}{prefix}".rstrip(".") for prefix in prefixes if above or prefix]
    return [path + "." * (path in ("ema", "model") and not above) for path in here] + paths


def _pass(paths: Sequence[str]) -> str:
    return f"pass {' or '.join(f'weights={path!r}' for path in paths[:_LISTED])}."


def _shown(key: object) -> str:
    """A key as a message names it: a file can have any object for one."""
    return repr(key[:100]) if isinstance(key, str) else f"a {type(key).__name__}"


def _size(tensor: Tensor) -> str:
    return str(tuple(tensor.shape)) if tensor.dim() <= 8 else f"of {tensor.dim()} axes"


def _matched(own: Mapping[str, Tensor], state: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """``state``, known to hold plain tensors, by the keys of ``own`` where it has them but for wrappers' prefixes.

    An ``AveragedModel``'s counter is left out.
    """
    names = {bare_key(key): key for key in own}
    averaged = all(isinstance(key, str) and (key == _COUNTER or key.startswith("module.")) for key in state)
    plain: dict[str, Tensor] = {}
    for key, value in state.items():
        if not isinstance(key, str):
            raise CheckpointError(f"{where} has a {type(key).__name__} for a key; a state dict's keys are strings.")
        if problem := defect(value):
            raise CheckpointError(f"{where} has under {key[:100]!r} {problem}; weights are dense tensors with data.")
        name = key if key in own else names.get(bare_key(key), bare_key(key))
        if averaged and name == _COUNTER and name not in own:
            continue
        if name in plain:
            raise CheckpointError(
                f"{where} has the weights {name[:100]!r} twice, under different prefixes of wrappers."
            )
        plain[name] = value
    if not plain:
        raise CheckpointError(f"{where} holds no weights at all.")
    return plain


def defect(value: object) -> str | None:
    """What keeps ``value`` from being weights, in words."""
    if type(value) not in (Tensor, nn.Parameter):
        return f"a {type(value).__name__}"
    assert isinstance(value, Tensor)
    if value.is_nested or value.is_quantized or value.layout is not torch.strided:
        return "a nested, quantised or sparse tensor"
    return "a tensor on the meta device" if value.is_meta else None


def own_tensors(model: nn.Module, purpose: str = "take weights") -> dict[str, Tensor]:
    """The model's own parameters and persistent buffers, plain tensors all, by keys without wrappers' prefixes."""
    owned = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    own: dict[str, Tensor] = {}
    for key, value in model.state_dict(keep_vars=True).items():
        problem, name = "", plain_key(model, key)
        if is_lazy(value) or getattr(value, "is_meta", False):
            problem = (
                "has no data here: bring the model's weights into memory first (a first forward, "
                "model.to_empty(device='cpu'), or without offloading)"
            )
        elif id(value) not in owned or defect(value) or value.is_inference():
            # Copying into what a hook of state_dict() made up, or into one rank's shard, would load nothing or a part.
            kind = type(value).__name__
            problem = (
                f"is no plain tensor of its own ({kind}): do it before the model is sharded, quantised or converted"
            )
        elif name in own:
            problem = "has the same name as another once the wrappers' prefixes are gone: rename the module"
        if problem:
            raise CheckpointError(f"{type(model).__name__} cannot {purpose}: its {key!r} {problem}.")
        own[name] = value
    return own


def _adapter(model: nn.Module, state: Mapping[str, Any], source: str | None) -> dict[str, Tensor] | None:
    """The tensors of the model's PEFT adapter by the keys that PEFT saves, if ``state`` holds an adapter."""
    holder = next((m for m in model.modules() if getattr(m, "peft_config", None)), None)
    if holder is None:
        return None
    configs: Mapping[str, Any] = holder.peft_config  # type: ignore[assignment]
    name = next(iter(configs)) if len(configs) == 1 else getattr(holder, "active_adapter", None)
    saved: dict[str, Tensor] = importlib.import_module("peft").get_peft_model_state_dict(
        holder, adapter_name=name if isinstance(name, str) else next(iter(configs)), save_embedding_layers=False
    )
    if not any(key in saved for key in state):
        return None
    owned = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers()) if not defect(tensor)}
    own = {key: owned[value.data_ptr()] for key, value in saved.items() if value.data_ptr() in owned}
    if len(own) < len(saved) or not isinstance(name, str):
        raise CheckpointError(
            f"It is open into which adapter of {quoted(configs)} to load, or it has no plain tensors: make the one "
            "that is meant the only active one."
        )
    folder = Path(source or "")
    beside = (folder if folder.is_dir() else folder.parent) / "adapter_config.json"
    trained = read_json(beside) if source and beside.is_file() else {}
    for key in trained.keys() & {"peft_type", "lora_alpha", "alpha_pattern", "use_rslora"}:
        # The weights fit whatever these are, and mean something else.
        if trained[key] != getattr(configs[name], key):
            raise CheckpointError(
                f"{source} was trained with {key}={trained[key]!r}, and the model's adapter {name!r} has "
                f"{getattr(configs[name], key)!r}.\nGive the model the adapter with "
                "peft.get_peft_model(model, peft.PeftConfig.from_pretrained(folder))."
            )
    return own


def check_fit(model: nn.Module, own: Mapping[str, Tensor], saved: Mapping[str, Tensor], where: str) -> None:
    """Refuse unless the keys are the same, tied ones once at least, and shapes and kinds of dtype agree."""
    loaded = {id(own[key]) for key in saved if key in own}
    missing = [key for key, tensor in own.items() if key not in saved and id(tensor) not in loaded]
    extra = [key for key in saved if key not in own]
    shared = [key for key in own if key in saved]  # in the model's order: a file may have any
    shapes = [key for key in shared if saved[key].shape != own[key].shape]
    # Floating point converts; 8-bit floats do not, being quantised; integers and booleans have to be the same.
    kinds = {key: {saved[key].dtype, own[key].dtype} for key in shared}
    dtypes = [key for key in shared if len(kinds[key]) > 1 and not kinds[key] <= _FLOATS]

    def section(title: str, keys: list[str], described: Callable[[str], str]) -> list[str]:
        more = [f"... and {len(keys) - _LISTED} more"] if len(keys) > _LISTED else []
        return ["\n  ".join([f"{title} ({len(keys)}):", *map(described, keys[:_LISTED]), *more])] if keys else []

    def absent(key: str) -> str:
        note = "" if isinstance(own[key], nn.Parameter) else ", a buffer"
        return f"{key[:100]} {_size(own[key])}{note}; nearest: {_nearest(key, extra)}"

    problems = [
        *section(f"Missing, of the model's {len(own)}", missing, absent),
        *section(
            "Extra, not in the model", extra, lambda k: f"{k[:100]} {_size(saved[k])}; nearest: {_nearest(k, missing)}"
        ),
        *section("Of another shape", shapes, lambda k: f"{k}: saved {_size(saved[k])}, model {_size(own[k])}"),
        *section("Of another dtype", dtypes, lambda k: f"{k}: saved {saved[k].dtype}, model {own[k].dtype}"),
    ]
    if problems:
        first = f"{where} does not fit {type(model).__name__}; nothing was loaded."
        last = "Build the model with the settings of the run that saved it, or rename the keys of a state dict."
        raise CheckpointError("\n".join([first, *problems, last]))


def _nearest(key: str, candidates: Sequence[str]) -> str:
    # difflib takes time quadratic in the names' length and linear in their number, and the file chooses both.
    return quoted(nearest(key[:100], [name for name in candidates[:300] if len(name) <= 100])) or "none"


def check_values(own: Mapping[str, Tensor], saved: Mapping[str, Tensor], where: str) -> None:
    """Refuse weights that are not finite in the model's dtype, and tied weights that were saved with other values.

    A buffer may hold −inf, as a mask does.
    """
    first: dict[int, str] = {}
    for key, value in saved.items():
        dtype = own[key].dtype
        mask = not isinstance(own[key], nn.Parameter)
        # In parts, as the mask of a large tensor, whole, would add to the memory that loading takes.
        parts: Sequence[Tensor] = torch.split(value.detach().flatten(), 1 << 20)
        if bad := sum([_not_finite(part.to(dtype), mask) for part in parts]):
            raise CheckpointError(
                f"{where} has {bad} of {value.numel()} values under {key!r} that are not finite in {dtype}.\n"
                "Take an earlier checkpoint of the run, or build the model in a wider dtype."
            )
        twin = first.setdefault(id(own[key]), key)
        if twin != key and not torch.equal(saved[twin].to(dtype), value.to(dtype)):
            raise CheckpointError(
                f"{where} has different values under {twin!r} and {key!r}, which are one tensor in the model.\n"
                "Untie them in the model, or drop one of them from the state dict."
            )


def _not_finite(part: Tensor, mask: bool) -> int:
    part = part.float() if part.dtype.itemsize == 1 else part  # 8-bit floats are not compared
    return int((~(part.isfinite() | (part == -math.inf) & mask)).sum())
