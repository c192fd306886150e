"""Load the weights that people have: which entry of a checkpoint, which keys, and whether they fit the model.

A model is either loaded whole or not touched at all.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .errors import CheckpointError, SettingError
from .names import nearest, quoted, some_of
from .weight_files import read_checkpoint

# What wrappers put into a parameter's name: DDP, torch.compile, checkpoint_wrapper, FSDP1.
_WRAPPERS = frozenset({"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
# The counter that torch.optim.swa_utils.AveragedModel saves beside the model that it wraps.
_COUNTER = "n_averaged"

# Heads that training left in the backbone's state dict: REPA's and the released Self-Transcendence code's.
_HEADS = (
    re.compile(r"projectors(\.\d+)?\.[024]\.(weight|bias)"),
    re.compile(r"projectors_final\.linear\.(weight|bias)"),
)

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_LISTED = 8  # keys that one section of an error message names


class LoadReport(NamedTuple):
    """What ``load_weights`` read.

    Attributes:
        source: The path as given, or None if the weights did not come from a file.
        entry: The entry that was taken (``"ema"``, ``"model"``, ``"state_dict"``), or None for a bare state dict.
        left_out: Keys of the file that belong to a projection head which the model does not have.
        step: The training step that the file names (``steps`` or ``step``), if it does.
    """

    source: str | None = None
    entry: str | None = None
    left_out: tuple[str, ...] = ()
    step: int | None = None


def load_weights(
    model: nn.Module,
    checkpoint: str | os.PathLike[str] | Mapping[str, Any] | None,
    *,
    weights: Literal["ema", "model"] = "ema",
) -> LoadReport:
    """Load a checkpoint into ``model``, strictly: everything fits and is copied, or nothing is touched.

    Keys are compared without the prefixes that DDP, ``torch.compile``, checkpointing and ``AveragedModel`` put into
    them, on both sides.
    Floating-point weights take the model's dtype and device; every other dtype has to be the model's own. Of weights
    that are tied in the model, the file may hold one. Keys of the projection heads that REPA and the released
    Self-Transcendence code keep inside the backbone are left out, and reported, if the model has no such keys.

    Args:
        model: The model that the weights are for, with real (not meta) tensors and before any sharding.
        checkpoint: A ``.pt``/``.pth``/``.ckpt``/``.bin`` file of ``torch.save``: a state dict, or a dictionary with the
            entries ``ema``, ``model`` or ``state_dict``; a ``.safetensors`` file or a ``.safetensors.index.json`` with
            its shards; a folder that holds one of these under diffusers' or transformers' name; the dictionary itself;
            or None for the weights that the model already has.
        weights: Which entry to take. ``"model"`` also takes ``state_dict``. A bare state dict and safetensors hold one
            set of weights only, which is taken for either value.

    Raises:
        CheckpointError: If the file cannot be read, would run code, holds weights that are not finite, or does not fit.
        SettingError: If ``weights`` is neither of its two values.
    """
    if weights not in ("ema", "model"):
        raise SettingError(f"weights is 'ema' or 'model', the entry of the checkpoint to take; got {weights!r}.")
    if checkpoint is None:
        return LoadReport()
    if isinstance(checkpoint, Mapping):
        source, where, content = None, "the given dictionary", checkpoint
    elif isinstance(checkpoint, (str, os.PathLike)):
        source = where = os.fspath(checkpoint)
        content = read_checkpoint(checkpoint)
    else:
        raise CheckpointError(
            "A checkpoint is a path, a state dict, or None for the weights that the model has; "
            f"got {type(checkpoint).__name__}."
        )
    entry, chosen = choose_entry(content, weights, where)
    where = where if entry is None else f"{where}, entry {entry!r},"
    own = own_tensors(model)
    saved = plain_keys(chosen, where)
    heads = [head for head in _HEADS if not any(map(head.fullmatch, own))]
    left_out = tuple(key for key in saved if any(head.fullmatch(key) for head in heads))
    for key in left_out:
        del saved[key]
    check_fit(model, own, saved, where)
    check_values(own, saved, where)
    with torch.no_grad():
        for key, value in saved.items():
            own[key].copy_(value)
    step = next((content[key] for key in ("steps", "step") if type(content.get(key)) is int), None)
    return LoadReport(source, entry, left_out, step)


def choose_entry(content: Mapping[str, Any], weights: str, where: str) -> tuple[str | None, Mapping[str, Any]]:
    """The name of the entry that holds the asked weights, None if ``content`` is a state dict itself, and the entry."""
    entries = [key for key in ("ema", "model", "state_dict") if isinstance(content.get(key), Mapping)]
    if not entries:
        others = [f"{str(key)[:50]} ({type(v).__name__})" for key, v in content.items() if not isinstance(v, Tensor)]
        if others or not content:
            raise CheckpointError(
                f"{where} is no state dict and has no entry 'ema', 'model' or 'state_dict' that is one.\n"
                f"Not tensors: {some_of(others, quote=False)}.\n"
                "Pass the dictionary of the weights itself as the checkpoint."
            )
        return None, content
    wanted = [key for key in entries if (key == "ema") == (weights == "ema")]
    if len(wanted) != 1:
        other = "model" if weights == "ema" else "ema"
        advice = f"pass weights={other!r}" if not wanted else f"pass the dictionary of one of {quoted(wanted)} itself"
        reason = f"but no {weights!r}" if not wanted else "and it is open which is meant"
        raise CheckpointError(f"{where} has {some_of([str(key) for key in content])} {reason}: {advice}.")
    return wanted[0], content[wanted[0]]


def plain_keys(state: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """``state`` by keys without wrappers' prefixes, once every value is known to be a plain tensor backed by data.

    Without an ``AveragedModel``'s counter too.
    """
    plain: dict[str, Tensor] = {}
    averaged = all(str(key).startswith("module.") for key in state if key != _COUNTER)
    for key, value in state.items():
        if not isinstance(key, str):
            raise CheckpointError(
                f"{where} has the key {str(key)[:100]!r}, a {type(key).__name__}; a state dict's are strings."
            )
        problem = defect(value)
        if problem:
            raise CheckpointError(f"{where} has under {key[:100]!r} {problem}; weights are dense tensors with data.")
        if averaged and key == _COUNTER:
            continue
        name = plain_key(key)
        if name in plain:
            raise CheckpointError(
                f"{where} has the weights {name[:100]!r} twice, under different prefixes of wrappers."
            )
        plain[name] = value
    if not plain:
        raise CheckpointError(f"{where} holds no weights at all.")
    return plain


def plain_key(key: str) -> str:
    """``key`` without the prefixes that wrappers put into it."""
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def defect(value: object) -> str | None:
    """What keeps ``value`` from being weights, in words."""
    if type(value) not in (Tensor, nn.Parameter):
        return f"a {type(value).__name__}"
    assert isinstance(value, Tensor)
    if value.is_nested or value.is_quantized or value.layout is not torch.strided:
        return "a nested, quantised or sparse tensor"
    if value.is_meta:
        return "a tensor on the meta device"
    described, stored = value.numel() * value.element_size(), value.untyped_storage().nbytes()
    if described > stored:
        return f"a tensor of shape {tuple(value.shape)} that needs {described} bytes but stores {stored}"
    return None


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's own parameters and persistent buffers, by keys without wrappers' prefixes."""
    kind = type(model).__name__
    owned = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    own: dict[str, Tensor] = {}
    for key, value in model.state_dict(keep_vars=True).items():
        if is_lazy(value) or (isinstance(value, Tensor) and value.is_meta):
            problem = "has no data yet: materialise the model first (model.to_empty(device='cpu'), or a first forward)"
        elif id(value) not in owned or type(value) not in (Tensor, nn.Parameter):
            # Copying into what a hook of state_dict() made up, or into one rank's shard, would load nothing or a part.
            problem = "is no plain tensor of its own: load the weights before the model is sharded or converted"
        elif plain_key(key) in own:
            problem = "has the same name as another once the wrappers' prefixes are gone: rename the module"
        else:
            own[plain_key(key)] = value
            continue
        raise CheckpointError(f"{kind} cannot take weights: its {key!r} {problem}.")
    return own


def check_fit(model: nn.Module, own: Mapping[str, Tensor], saved: Mapping[str, Tensor], where: str) -> None:
    """Refuse unless the keys are the same, tied ones once at least, and shapes and kinds of dtype agree."""
    buffers = {id(buffer) for buffer in model.buffers()}
    loaded = {id(own[key]) for key in saved if key in own}
    missing = [key for key, tensor in own.items() if key not in saved and id(tensor) not in loaded]
    extra = [key for key in saved if key not in own]
    shared = [key for key in saved if key in own]
    shapes = [key for key in shared if saved[key].shape != own[key].shape]
    dtypes = [key for key in shared if not _convertible(saved[key].dtype, own[key].dtype)]

    def line(key: str, candidates: Sequence[str], tensor: Tensor) -> str:
        note = ", a buffer" if id(tensor) in buffers else ""
        return f"{key[:100]} {tuple(tensor.shape)}{note}; nearest: {_nearest(key, candidates)}"

    sections = [
        (f"Missing, of the model's {len(own)}", missing, lambda key: line(key, extra, own[key])),
        ("Extra, not in the model", extra, lambda key: line(key, missing, saved[key])),
        (
            "Of another shape",
            shapes,
            lambda key: f"{key}: saved {tuple(saved[key].shape)}, model {tuple(own[key].shape)}",
        ),
        ("Of another dtype", dtypes, lambda key: f"{key}: saved {saved[key].dtype}, model {own[key].dtype}"),
    ]
    problems = []
    for title, keys, describe in sections:
        if keys:
            more = [f"... and {len(keys) - _LISTED} more"] if len(keys) > _LISTED else []
            problems.append("\n  ".join([f"{title} ({len(keys)}):", *map(describe, keys[:_LISTED]), *more]))
    if problems:
        raise CheckpointError(
            "\n".join([f"{where} does not fit {type(model).__name__}; nothing was loaded.", *problems])
            + "\nBuild the model with the settings of the run that saved it, or pass a state dict with renamed keys."
        )


def _convertible(saved: torch.dtype, own: torch.dtype) -> bool:
    """Floating point converts; 8-bit floats do not, being quantised; integers and booleans have to be the same."""
    return (saved in _FLOATS and own in _FLOATS) or (saved == own and not saved.is_floating_point)


def _nearest(key: str, candidates: Sequence[str]) -> str:
    # difflib takes time quadratic in the names' length and linear in their number, and the file chooses both.
    return quoted(nearest(key[:100], [name for name in candidates[:300] if len(name) <= 100])) or "none"


def check_values(own: Mapping[str, Tensor], saved: Mapping[str, Tensor], where: str) -> None:
    """Refuse weights that are not finite in the model's dtype, and tied weights that were saved with other values."""
    first: dict[int, str] = {}
    for key, value in saved.items():
        dtype = own[key].dtype
        # In parts, as the mask of a large tensor, whole, would add to the memory that loading takes.
        parts: Sequence[Tensor] = torch.split(value.detach().flatten(), 1 << 20)
        bad = value.numel() - sum(int(part.to(dtype).isfinite().sum()) for part in parts)
        if bad:
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
