"""Read the weights that people have, and load them whole or not at all."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickletools
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING  # what pickle's protocol 2 calls Python 3's modules
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .errors import CheckpointError, SettingError
from .modules import nearest, quoted, some_of

# What `torch.save` writes for dictionaries of tensors and plain values. Much shorter than torch's own list, whose
# `bytearray`, `torch.Tensor` or `_codecs.encode` can be asked for gigabytes by a file of a few bytes.
_SAFE_GLOBALS = frozenset(
    [
        "argparse Namespace",
        "collections OrderedDict",
        "torch device",
        "torch._utils _rebuild_parameter",
        "torch._utils _rebuild_tensor_v2",
        *(f"torch {dtype}" for dtype in ("float64", "float32", "float16", "bfloat16")),
        *(
            f"torch {kind}Storage"
            for kind in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
        ),
    ]
)
# fmt: off
_SAFE_OPCODES = frozenset([
    "PROTO", "MARK", "STOP", "GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID",
    "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET",
    "EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "APPEND", "APPENDS",
    "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE",
])
# fmt: on

# Classes that an error message names.
_REFUSED = 8

# One byte of a pickle, of JSON or of a zip's directory can cost a hundred bytes of memory once read. Each limit holds
# ten times what a diffusion transformer of a thousand parameter tensors needs with EMA and optimiser, and keeps the
# cost of the worst file below 64 MiB.
_MAX_PICKLE = 4 << 20  # of a zip archive's directory too
_MAX_OPCODES = 400_000
_MAX_CALLS = 40_000  # two a tensor
_MAX_JSON = 2 << 20  # of a safetensors header too
_MAX_TUPLE_DEPTH = 32  # hashing a tuple nested a million deep overflows the interpreter's stack
_MAX_LONG = 1 << 72  # longer integers can be chosen to collide in a dictionary, which then takes quadratic time


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The dictionary that a checkpoint file or folder holds; its tensors are views of the file, not yet read.

    Raises:
        CheckpointError: If the file is missing, broken, unsafe, or of another format.
    """
    with _wrapped_errors(path):
        file = Path(path)
        if file.is_dir():
            file = _weights_in(file)
        if not file.is_file():
            found = [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []
            raise CheckpointError(
                f"There is no file {str(file)!r}.\n"
                f"Nearest in its folder: {quoted(nearest(file.name, found)) or 'none'}.\n"
                "A checkpoint on the hub has to be downloaded first (huggingface_hub.hf_hub_download)."
            )
        if file.name.endswith(".safetensors.index.json"):
            return read_sharded_safetensors(file)
        if file.suffix == ".safetensors":
            return read_safetensors(file)
        return read_torch(file)


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The tensors of one safetensors file, as views of the mapped file.

    Raises:
        CheckpointError: If the header is too long, or anything in it contradicts the file.
    """
    with _wrapped_errors(path):
        file = Path(path)
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
        if length > size - 8:
            raise CheckpointError(
                f"{file} is no whole safetensors file: it has {size} bytes and announces a header of {length}. "
                "Copy or download it again."
            )
        if length > _MAX_JSON:
            raise CheckpointError(
                f"{file} has a header of {length} bytes; at most {_MAX_JSON} are read. "
                "Save the weights alone, without long metadata."
            )
        return safetensors.torch.load_file(file)


def read_sharded_safetensors(index: str | os.PathLike[str]) -> dict[str, Any]:
    """The tensors of all shards that a ``*.safetensors.index.json`` names, each from the shard it is said to be in.

    Raises:
        CheckpointError: If the index is malformed or leaves its folder, or if the shards do not hold what it says.
    """
    with _wrapped_errors(index):
        file = Path(index)
        content = read_json(file)
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{file} has no 'weight_map' from keys to file names, so it is no index of shards.")
        shards: dict[str, set[str]] = {}
        for key, name in weight_map.items():
            shards.setdefault(name, set()).add(key)
        merged: dict[str, Any] = {}
        for name, keys in shards.items():
            tensors = read_safetensors(_shard(file.parent, name))
            if tensors.keys() != keys:
                raise CheckpointError(
                    f"{file} and its shard {name!r} disagree.\n"
                    f"In the index only: {some_of(sorted(keys - tensors.keys()))}.\n"
                    f"In the shard only: {some_of(sorted(tensors.keys() - keys))}.\n"
                    "Download or convert the whole set again."
                )
            merged.update(tensors)
        return merged


def read_json(path: str | os.PathLike[str]) -> Any:
    """The content of a small JSON file, in which no key may occur twice.

    Raises:
        CheckpointError: If it is longer than 2 MiB, is not JSON, or repeats a key.
    """
    with _wrapped_errors(path):
        file = Path(path)
        with file.open("rb") as stream:
            text = stream.read(_MAX_JSON + 1)
        if len(text) > _MAX_JSON:
            raise CheckpointError(f"{file} is longer than {_MAX_JSON} bytes, the most that is read of a JSON file.")
        return json.loads(text.decode("utf-8"), object_pairs_hook=_unique_pairs)


def read_torch(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The dictionary in a file of ``torch.save``, its tensors as views of the mapped file; no code of the file runs.

    The files that torch wrote before 1.6, which are no zip archives, are refused: they state how much memory to
    allocate before they show any data.

    Raises:
        CheckpointError: If the file is broken, would call anything but what rebuilds tensors, or is no dictionary.
    """
    with _wrapped_errors(path):
        file = Path(path)
        _check_pickle(_pickle_in_archive(file), file)
        # Leaving the context also removes what was allowed before it, so nothing is listed that already was.
        before = torch.serialization.get_safe_globals()
        with torch.serialization.safe_globals([c for c in (argparse.Namespace,) if c not in before]):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(content, dict):
            raise CheckpointError(
                f"{file} holds a {type(content).__name__}; a checkpoint is a dictionary: a state dict, or one with the "
                "entries 'ema' or 'model'."
            )
        return content


@contextmanager
def _wrapped_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn whatever torch, zipfile, pickletools, json, safetensors and the system raise into CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        # torch puts advice to load without weights_only around what went wrong.
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].partition("\n")[0][:300]
        raise CheckpointError(
            f"{os.fspath(path)!r} cannot be read as a checkpoint: {type(error).__name__}: {reason}\n"
            "It is damaged, incomplete or of another format. Copy or download it again, or save the weights anew."
        ) from error


_FOLDER_NAMES = tuple(
    stem + suffix
    for stem in ("diffusion_pytorch_model", "model")
    for suffix in (".safetensors", ".safetensors.index.json")
)


def _weights_in(folder: Path) -> Path:
    found = [folder / name for name in _FOLDER_NAMES if (folder / name).is_file()]
    if len(found) != 1:
        there = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir())
        raise CheckpointError(
            f"The folder {str(folder)!r} holds {len(found)} of {quoted(_FOLDER_NAMES)}; exactly one is needed.\n"
            f"Found: {some_of(there)}.\nPass the path of the file that holds the weights."
        )
    return found[0]


def _shard(folder: Path, name: str) -> Path:
    """The file of a shard, which neither its name nor a link may move out of the folder."""
    if not name.endswith(".safetensors") or Path(name).name != name or "\\" in name or "\0" in name:
        raise CheckpointError(
            f"The index in {folder} names the shard {name[:100]!r}, which is no plain name of a .safetensors file."
        )
    if not (folder / name).is_file():
        raise CheckpointError(
            f"The index in {folder} names the shard {name[:100]!r}, which is not there. Download it too."
        )
    target = (folder / name).resolve()
    # In the hub's cache, snapshots/<revision>/ is a folder of links to the files in blobs/.
    blobs = [parent.parent / "blobs" for parent in folder.resolve().parents if parent.name == "snapshots"]
    if target.parent not in (folder.resolve(), *blobs):
        raise CheckpointError(
            f"The shard {name!r} in {folder} is a link out of its folder. Copy the file itself there."
        )
    return target


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise CheckpointError(f"A JSON file has the key {twice[:100]!r} twice, so its meaning is open. Write it anew.")
    return result


class _BoundedFile(io.FileIO):
    """A file that refuses long reads: zipfile reads a whole directory at once, as long as the file says it is."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _MAX_PICKLE:
            raise CheckpointError(
                f"{self.name} is an archive with a directory of {size} bytes; at most {_MAX_PICKLE} are read." + _RESAVE
            )
        return super().read(size)


def _pickle_in_archive(file: Path) -> bytes:
    """The pickle in an archive that is what ``torch.save`` writes: entries stored one after another."""
    with file.open("rb") as stream:
        if stream.read(4) != b"PK\x03\x04":
            raise CheckpointError(
                f"{file} is no zip archive, which is what torch.save has written since version 1.6.\n"
                "If it is an older file that you trust, save it anew:\n"
                f"    torch.save(torch.load({str(file)!r}, map_location='cpu', weights_only=True), 'weights.pt')"
            )
    size = file.stat().st_size
    with _BoundedFile(file) as bounded, zipfile.ZipFile(bounded) as archive:
        entries = archive.infolist()
        names = {entry.filename.casefold() for entry in entries}  # torch's reader ignores the case
        root = entries[0].filename.partition("/")[0] if entries else ""
        if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
            raise CheckpointError(
                f"{file} is a compressed or encrypted archive, which torch.save never writes: unpack it first."
            )
        if len(names) != len(entries) or sum(max(e.file_size, e.compress_size) for e in entries) > size:
            raise CheckpointError(f"{file} is an archive whose entries overlap, which torch.save never writes.")
        if f"{root}/constants.pkl".casefold() in names:
            raise CheckpointError(
                f"{file} is a TorchScript archive, which is a program: save the model's state_dict() instead."
            )
        pickled = next((entry for entry in entries if entry.filename == f"{root}/data.pkl"), None)
        if pickled is None:
            raise CheckpointError(f"{file} is a zip archive without data.pkl, so torch.save did not write it.")
        if pickled.file_size > _MAX_PICKLE:
            raise CheckpointError(
                f"{file} holds {pickled.file_size} bytes beside its tensors; at most {_MAX_PICKLE} are read.{_RESAVE}"
            )
        return archive.read(pickled)


_RESAVE = (
    "\nIf you trust the file, save its weights alone, where it was made:\n"
    "    state = torch.load(path, map_location='cpu', weights_only=False)['ema']  # or ['model']; runs its code\n"
    "    torch.save(state, 'weights.pt')"
)


def _check_pickle(pickled: bytes, file: Path) -> None:
    """Walk a pickle's opcodes, running none, and refuse what ``torch.save`` does not write for weights.

    ``weights_only=True`` then keeps the file from running code; the walk keeps it from taking memory, time or the
    interpreter's stack. It simulates the stack with one number a value: how deeply tuples are nested in it.
    """
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[int, int] = {}
    refused: list[list[str]] = []
    calls = 0
    argument: Any
    for count, (opcode, argument, _) in enumerate(pickletools.genops(pickled)):
        name = opcode.name
        if name not in _SAFE_OPCODES or (name == "PROTO" and argument != 2):
            what = f"pickle protocol {argument}" if name == "PROTO" else f"the pickle opcode {name}"
            raise CheckpointError(f"{file} is refused: it uses {what}, and torch.save by default protocol 2.{_RESAVE}")
        if name == "GLOBAL" and argument not in _SAFE_GLOBALS and len(refused) < _REFUSED:
            refused.append(argument.split(" ", 1))
        calls += name in ("REDUCE", "NEWOBJ")
        if count > _MAX_OPCODES or calls > _MAX_CALLS or (name == "LONG1" and abs(argument) > _MAX_LONG):
            raise CheckpointError(f"{file} is refused: it holds far more than tensors and plain values.{_RESAVE}")
        if name == "MARK":
            marks.append(len(stack))
            continue
        if name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
            continue
        before = opcode.stack_before
        if pickletools.markobject in before:
            taken = stack[marks.pop() :]
            del stack[len(stack) - len(taken) - before.index(pickletools.markobject) :]
        else:
            taken = stack[len(stack) - len(before) :]
            del stack[len(stack) - len(before) :]
        keys = taken[::2] if name == "SETITEMS" else taken[1:2] if name == "SETITEM" else []
        depth = 0
        if name in ("BINGET", "LONG_BINGET"):
            depth = memo[argument]
        elif "TUPLE" in name:
            depth = 1 + max(taken, default=0)
        if any(keys) or depth > _MAX_TUPLE_DEPTH:
            raise CheckpointError(f"{file} is refused: it has tuples for keys, or too deeply nested ones.{_RESAVE}")
        stack.extend([depth] * len(opcode.stack_after))
    if refused:
        names = dict.fromkeys(f"{IMPORT_MAPPING.get(module, module)}.{name}"[:100] for module, name in refused)
        raise CheckpointError(
            f"{file} is refused, and nothing of it was run: it asks for {', '.join(names)}, which weights never need."
            + _RESAVE
        )


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
