"""Read weight files safely: ``.pt`` files of training loops, safetensors, shards, diffusers folders, and JSON.

No file can run code, and none can take memory or time out of proportion to its size: every size that a file states is
checked before anything believes it.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pickletools
import zipfile
from _compat_pickle import IMPORT_MAPPING  # what pickle's protocol 2 calls Python 3's modules
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from .errors import CheckpointError
from .names import nearest, quoted, some_of

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
