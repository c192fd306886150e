"""Read the files that people have: of torch.save, safetensors, shards, folders. No code of a file runs."""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import pathlib
import pickle
import threading
import types
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .errors import CheckpointError
from .modules import nearest, quoted, some_of

# One byte of JSON can cost fifty bytes of memory once read. Ten times what a transformer of a thousand parameter
# tensors needs.
MAX_JSON = 2 << 20  # of a safetensors header too
_MAX_SHARDS = 1024  # of the largest models on the hub, under 300
_MAX_AXES = 64  # more than torch computes with

# By the names of safetensors.
DTYPES = {
    **{f"F{size}": getattr(torch, f"float{size}") for size in (64, 32, 16)},
    "BF16": torch.bfloat16,
    **{f"I{size}": getattr(torch, f"int{size}") for size in (64, 32, 16, 8)},
    **{f"U{size}": getattr(torch, f"uint{size}") for size in (64, 32, 16, 8)},
    **{"BOOL": torch.bool, "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}

# --- Reading files ---------------------------------------------------------------------------------------------------


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The dictionary that a checkpoint holds, read into memory; no code of the file runs.

    A ``.pt`` file keeps its entries (``"model"``, ``"ema"``, ``"args"``, …). Safetensors files, sharded ones too, are
    one dictionary of tensors. From strangers take safetensors: a ``.pt`` runs no code here, but it can be made to
    exhaust the memory.

    Args:
        path: A file of ``torch.save`` of any version of torch; a ``.safetensors`` file; a ``.safetensors.index.json``
            beside its shards; or a folder that holds weights under the name of diffusers, transformers or PEFT.

    Raises:
        CheckpointError: If the file is missing, damaged, or of another format; if it changes while it is read; or if
            it asks for classes that are no data. The message then has the lines that save its weights anew.
    """
    file = local_path(path)
    with wrapped_errors(file):
        if file.is_dir():
            file = _weights_in(file)
        if not file.is_file():
            found = [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []
            raise CheckpointError(
                f"There is no file {str(file)[:300]!r}.\n"
                f"Nearest in its folder: {quoted(nearest(file.name, found)) or 'none'}.\n"
                "A checkpoint on the hub has to be downloaded first (huggingface_hub.hf_hub_download)."
            )
    if file.name.endswith(".safetensors.index.json"):
        return _read_shards(file)
    return read_safetensors(file)[0] if file.suffix == ".safetensors" else _read_torch(file)


def local_path(path: object) -> Path:
    """``path`` as a Path.

    Raises:
        CheckpointError: If it is none.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str) or "\0" in os.fspath(path):
        raise CheckpointError(f"A path is a string or a pathlib.Path; got {type(path).__name__}.")
    return Path(path)


def read_json(path: str | os.PathLike[str]) -> Any:
    """The content of a small JSON file, in which no key may occur twice.

    Raises:
        CheckpointError: If it is longer than 2 MiB, is not JSON, or repeats a key.
    """
    with opened(path) as stream:
        text = stream.read(MAX_JSON + 1)
        if len(text) > MAX_JSON:
            raise CheckpointError(f"{path} is longer than {MAX_JSON} bytes, the most that is read of a JSON file.")
        return parsed(text)


def parsed(text: bytes | str) -> Any:
    """The value that JSON text holds.

    Raises:
        CheckpointError: If an object in it has a key twice.
        ValueError: If it is no JSON.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise CheckpointError(f"The JSON has the key {twice[:100]!r} twice, so its meaning is open. Write it anew.")
        return result

    return json.loads(text if isinstance(text, str) else text.decode("utf-8"), object_pairs_hook=unique)


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of one safetensors file.

    The file is opened once and read into memory once. It is not mapped: a training loop that writes its file anew in
    place would end a process that has it mapped.

    Raises:
        CheckpointError: If the header is too long, or anything in it contradicts the file.
    """
    with opened(path) as stream:
        header = read_header(stream)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("the metadata is no mapping to strings")
        size = os.fstat(stream.fileno()).st_size - stream.tell()
        data = memoryview(bytearray(size))
        if stream.readinto(data) != size:  # type: ignore[attr-defined]
            raise ValueError("the file ends before its tensors do")
        end = 0
        tensors: dict[str, Tensor] = {}
        for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, (start, stop) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            sizes_fit = len(shape) <= _MAX_AXES and all(type(n) is int and n >= 0 for n in (*shape, start, stop))
            if not sizes_fit or start != end or stop - start != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"the bytes of {key[:100]!r} are not those of its dtype and shape")
            end = stop
            if stop > size:
                raise ValueError(f"{key[:100]!r} lies beyond the end of the file")
            own = data[start:stop] if start % dtype.itemsize == 0 else bytearray(data[start:stop])
            flat = torch.frombuffer(own, dtype=dtype) if len(own) else torch.empty(0, dtype=dtype)
            tensors[key] = flat.reshape(shape)
        if end != size:
            raise ValueError(f"{size - end} bytes belong to no tensor")
        return tensors, metadata


def read_header(stream: BinaryIO) -> dict[str, Any]:
    """The header of a safetensors file; the stream then stands at the first tensor's bytes."""
    size, length = os.fstat(stream.fileno()).st_size, int.from_bytes(stream.read(8), "little")
    if length > size - 8:
        raise CheckpointError(
            f"{stream.name} is no whole safetensors file: it has {size} bytes and announces a header of {length}. "
            "Copy or download it again."
        )
    if length > MAX_JSON:
        raise CheckpointError(
            f"{stream.name} has a header of {length} bytes; at most {MAX_JSON} are read. "
            "Save the weights alone, without long metadata."
        )
    header = parsed(stream.read(length))
    if not isinstance(header, dict):
        raise CheckpointError(f"{stream.name} has a header that is no mapping.")
    return header


def _read_shards(index: Path) -> dict[str, Any]:
    """The tensors of all shards that a ``*.safetensors.index.json`` names, each from the shard it is said to be in."""
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} has no 'weight_map' from keys to file names, so it is no index of shards.")
    shards: dict[str, set[str]] = {}
    for key, name in weight_map.items():
        shards.setdefault(name, set()).add(key)
    if len(shards) > _MAX_SHARDS:
        raise CheckpointError(f"{index} names {len(shards)} shards; at most {_MAX_SHARDS} are read. Merge them first.")
    merged: dict[str, Any] = {}
    for name, keys in shards.items():
        tensors, _ = read_safetensors(_shard(index.parent, name))
        if tensors.keys() != keys:
            raise CheckpointError(
                f"{index} and its shard {name!r} disagree.\n"
                f"In the index only: {some_of(sorted(keys - tensors.keys()))}.\n"
                f"In the shard only: {some_of(sorted(tensors.keys() - keys))}.\n"
                "Download or convert the whole set again."
            )
        merged.update(tensors)
    return merged


def _shard(folder: Path, name: str) -> Path:
    """The file of a shard, which neither its name nor a link may move out of the folder."""
    if not name.endswith(".safetensors") or Path(name).name != name or "\\" in name or "\0" in name:
        raise CheckpointError(
            f"The index in {folder} names the shard {name[:100]!r}, which is no plain name of a .safetensors file."
        )
    with wrapped_errors(folder):
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


_FOLDER_NAMES = (
    *(f"{stem}.safetensors{end}" for stem in ("diffusion_pytorch_model", "model") for end in ("", ".index.json")),
    "adapter_model.safetensors",
    "pytorch_lora_weights.safetensors",
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


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to read; whatever goes wrong inside, and a file that is written to meanwhile, is a CheckpointError."""

    def state() -> tuple[int, int]:
        found = os.fstat(stream.fileno())
        return found.st_size, found.st_mtime_ns

    with wrapped_errors(path):
        if Path(path).exists() and not Path(path).is_file():
            raise CheckpointError(f"{path} is no file.")  # opening a pipe would wait for ever
    with wrapped_errors(path), Path(path).open("rb") as stream:
        before = state()
        try:
            yield stream
        finally:
            if state() != before:
                raise CheckpointError(
                    f"{path} was written to while it was read, so what was read may be of two states.\n"
                    "Read it once its run has finished writing. A run that writes under another name and then renames "
                    "(os.replace) can be read at any time."
                )


@contextmanager
def wrapped_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn whatever torch, pickle, json and the system raise into CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        # torch puts advice to load without weights_only around what went wrong.
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].partition("\n")[0][:300]
        raise CheckpointError(
            f"{os.fspath(path)[:300]!r} cannot be read as a checkpoint: {type(error).__name__}: {reason}\n"
            "It is damaged, incomplete or of another format. Copy or download it again, or save the weights anew."
        ) from error


# --- Files of torch.save ---------------------------------------------------------------------------------------------

# Plain data beside what torch itself allows; a path becomes one that cannot touch the disk.
_DATA: tuple[Any, ...] = (
    *(argparse.Namespace, types.SimpleNamespace, frozenset, range, slice),
    *(datetime.datetime, datetime.date, datetime.timedelta),
    *((pathlib.PurePosixPath, f"pathlib.{name}PosixPath") for name in ("", "Pure", "_local.", "_local.Pure")),
    *((pathlib.PureWindowsPath, f"pathlib.{name}WindowsPath") for name in ("", "Pure", "_local.", "_local.Pure")),
)
_ALLOWING = threading.Lock()  # what is allowed, is allowed to the whole process


def _read_torch(file: Path) -> dict[str, Any]:
    with opened(file) as stream:
        before = torch.serialization.get_safe_globals()
        # Leaving the context also removes what was allowed before it, so nothing is listed that already was.
        allowed = torch.serialization.safe_globals([c for c in _DATA if c not in before])
        with _ALLOWING, allowed, warnings.catch_warnings(action="ignore"):
            try:
                content = torch.load(stream, map_location="cpu", weights_only=True)
            except Exception as error:
                if refused := _refusal(file, stream):
                    raise CheckpointError(refused) from error
                raise
        if not isinstance(content, dict):
            raise CheckpointError(
                f"{file} holds a {type(content).__name__}; a checkpoint is a dictionary: a state dict, or one with "
                "entries such as 'ema' or 'model'."
            )
        return content


class _Inert:
    """Stands for whatever a pickle asks for: keeps what it is given, and does nothing."""

    def __new__(cls, *given: Any, **_: Any) -> _Inert:
        self = object.__new__(cls)
        self.given = given
        return self

    def __setstate__(self, state: Any) -> None:
        self.given = (*self.given, state)

    def append(self, *item: Any) -> None: ...

    extend = add = __setitem__ = append
    given: tuple[Any, ...]


class _Dict(dict[Any, Any]):
    """A dictionary that may have attributes, as the one of a state dict has."""


class _Outline(pickle.Unpickler):
    """What a pickle holds by its keys, with every class replaced by an inert one: no code runs."""

    asked: tuple[str, ...] = ()

    def find_class(self, module: str, name: str) -> Any:
        if not name.startswith("_rebuild") and not name.endswith("Storage"):
            self.asked += (f"{module}.{name}"[:100],)
        return _Dict if name in ("OrderedDict", "dict") else type(name, (_Inert,), {})

    def persistent_load(self, pid: Any) -> Any:
        return pid[1] if isinstance(pid, tuple) and pid[0] == "module" else None  # a class, as torch wrote before 1.6


def _refusal(file: Path, stream: BinaryIO) -> str:
    """What a file that torch refuses asks for, and the lines that save its weights anew; empty if it is damaged."""
    read = f"torch.load({str(file)!r}, map_location='cpu', weights_only=False)"
    stream.seek(0)
    try:
        if zipfile.is_zipfile(stream):
            archive = zipfile.ZipFile(stream)
            content = _Outline(archive.open(next(n for n in archive.namelist() if n.endswith("/data.pkl")))).load()
            stream.seek(0)
            asked = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(stream))
        else:
            stream.seek(0)
            outline = _Outline(stream)
            content = outline.load()
            if isinstance(content, int):  # as torch wrote before 1.6: a number, a version, the system, the content
                content = [outline.load() for _ in range(3)][-1]
            else:
                read = f"pickle.loads(pathlib.Path({str(file)!r}).read_bytes())"
            asked = sorted({*outline.asked} - {"collections.OrderedDict"})
    except Exception:
        return ""

    def is_weights(value: Any) -> bool:  # a state dict, an nn.Module, or what a repository saves in the place of one
        given = [v for v in getattr(value, "given", ()) if isinstance(v, dict)]
        given += [v for outer in given for v in outer.values() if isinstance(v, dict)]
        tensors = isinstance(value, dict) and any(type(v).__name__.startswith("_rebuild") for v in value.values())
        return tensors or any("_parameters" in v for v in given)

    names = ["content"] if is_weights(content) else []
    if not names and isinstance(content, dict):
        names = [f"content[{k!r}]" for k, value in content.items() if isinstance(k, str) and is_weights(value)]
    kept = ", ".join(f"{name[8:-1]}: weights({name})" for name in names)
    kept = f"{{{kept}}}" if len(names) > 1 else f"weights({names[0]})" if names else ""
    what = f"{file} is refused, and nothing of it was run: it asks for {some_of(asked, quote=False)}, not plain data.\n"
    how = "Save the model's state_dict() alone, where the file was made: torch.save(model.state_dict(), path)."
    if names:
        how = (
            "If you trust the file, save its weights alone, in the repository that it was made with:\n"
            f"    import pathlib, pickle, torch\n    content = {read}  # runs its code\n"
            "    def weights(entry):\n        state = entry.state_dict() if hasattr(entry, 'state_dict') else entry\n"
            "        return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}\n"
            f"    torch.save({kept}, 'weights.pt')"
        )
    return what + how if asked else ""
