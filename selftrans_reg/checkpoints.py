"""Read the files that people have: of torch.save, safetensors, shards, folders. No code of a file runs."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import re
import threading
import types
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from .errors import CheckpointError, SelfTransError
from .modules import nearest, quoted, some_of

# One byte of JSON can cost fifty bytes of memory once read. Ten times what a model of a thousand tensors needs.
MAX_JSON = 2 << 20  # of a safetensors header too


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The dictionary that a checkpoint holds, read into memory; no code of the file runs.

    A ``.pt`` file keeps its entries (``"model"``, ``"ema"``, ``"args"``, …). Safetensors files, sharded ones too, are
    one dictionary of tensors. From strangers take safetensors: a ``.pt`` runs no code here, but can exhaust the memory.

    Args:
        path: A file of ``torch.save`` of any version of torch; a ``.safetensors`` file; a ``.safetensors.index.json``
            beside its shards; or a folder that holds weights under the name of diffusers, transformers or PEFT.

    Raises:
        CheckpointError: If the file is missing, damaged, or of another format; if it changes while it is read; or if
            it asks for classes that are no data. The message then has the lines that save its weights anew.
    """
    file = local_path(path)
    with wrapped_errors(file):
        file = _weights_in(file) if file.is_dir() else file
    if file.name.endswith(".safetensors.index.json"):
        return _read_shards(file)
    return read_safetensors(file)[0] if file.suffix == ".safetensors" else _read_torch(file)


def local_path(path: object) -> Path:
    """``path`` as a Path, if it is one."""
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str) or "\0" in os.fspath(path):
        raise CheckpointError(f"A path is a string or a pathlib.Path; got {type(path).__name__}.")
    return Path(path)


def read_json(path: str | os.PathLike[str]) -> Any:
    """The content of a small JSON file, in which no key may occur twice."""
    with opened(path) as stream:
        text = stream.read(MAX_JSON + 1)
        if len(text) > MAX_JSON:
            raise CheckpointError(f"{path} is longer than {MAX_JSON} bytes, the most that is read of a JSON file.")
        return parsed(text)


def parsed(text: bytes | str) -> Any:
    """The value that JSON text in UTF-8 holds, in which no key may occur twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise CheckpointError(f"The JSON has the key {twice[:100]!r} twice, so its meaning is open. Write it anew.")
        return result

    return json.loads(text if isinstance(text, str) else text.decode("utf-8"), object_pairs_hook=unique)


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of one safetensors file, opened and read once.

    It is not mapped: a training loop that writes its file anew in place would end a process that has it mapped.
    """
    with opened(path) as stream:
        metadata = read_metadata(stream)
        stream.seek(0)
        return safetensors.torch.load(stream.read()), metadata


def read_metadata(stream: BinaryIO) -> dict[str, str]:
    """The metadata of a safetensors file, whose header is known to be short from then on."""
    length = int.from_bytes(stream.read(8), "little")
    if length > MAX_JSON:
        raise CheckpointError(
            f"{stream.name} announces a header of {length} bytes; at most {MAX_JSON} are read.\n"
            "It is damaged: copy or download it again. Or it has long metadata: save the weights alone."
        )
    metadata: dict[str, str] = parsed(stream.read(length)).get("__metadata__", {})
    return metadata


def _read_shards(index: Path) -> dict[str, Any]:
    """The tensors of all shards that a ``*.safetensors.index.json`` names, each from the shard it is said to be in."""
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} has no 'weight_map' from keys to file names, so it is no index of shards.")
    shards: dict[str, set[str]] = {}
    for key, name in weight_map.items():
        shards.setdefault(name, set()).add(key)
    merged: dict[str, Any] = {}
    for name, keys in shards.items():
        tensors, _ = read_safetensors(_shard(index.parent, name))
        if tensors.keys() != keys:
            raise CheckpointError(
                f"{index} and its shard {name!r} disagree. Download or convert the whole set again.\n"
                f"In the index only: {some_of(sorted(keys - tensors.keys()))}.\n"
                f"In the shard only: {some_of(sorted(tensors.keys() - keys))}."
            )
        merged.update(tensors)
    return merged


def _shard(folder: Path, name: str) -> Path:
    """The file of a shard, which neither its name nor a link may move out of the folder."""
    with wrapped_errors(folder):
        # In the hub's cache, snapshots/<revision>/ is a folder of links to the files in blobs/.
        blobs = [parent.parent / "blobs" for parent in folder.resolve().parents if parent.name == "snapshots"]
        if Path(name).name != name or (folder / name).resolve().parent not in (folder.resolve(), *blobs):
            raise CheckpointError(
                f"The index in {folder} names the shard {name[:100]!r}, which is no file of that folder, or a link out "
                "of it: copy the file itself there, and name it alone."
            )
    return folder / name


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

    file = Path(path)
    with wrapped_errors(path):
        if not file.is_file():  # opening a pipe would wait for ever
            there = [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []
            raise CheckpointError(
                f"There is no file {str(file)[:300]!r}.\n"
                f"Nearest in its folder: {quoted(nearest(file.name, there)) or 'none'}.\n"
                "A checkpoint on the hub has to be downloaded first (huggingface_hub.hf_hub_download)."
            )
        with file.open("rb") as stream:
            before = state()
            try:
                yield stream
            finally:
                if state() != before:
                    raise CheckpointError(
                        f"{path} was written to while it was read, so what was read may be of two states.\n"
                        "Read it once its run has finished writing. A run that writes under another name and then "
                        "renames (os.replace) can be read at any time."
                    )


@contextmanager
def wrapped_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn whatever torch, pickle, json and the system raise into CheckpointError."""
    try:
        yield
    except SelfTransError:
        raise
    except Exception as error:
        # torch puts advice to load without weights_only around what went wrong.
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].partition("\n")[0][:300]
        raise CheckpointError(
            f"{os.fspath(path)[:300]!r} cannot be read as a checkpoint: {type(error).__name__}: {reason}\n"
            "It is damaged, incomplete or of another format. Copy or download it again, or save the weights anew."
        ) from error


# Plain data beside what torch itself allows; a path becomes one that cannot touch the disk.
_DATA: tuple[Any, ...] = (
    *(argparse.Namespace, types.SimpleNamespace, frozenset, range, slice),
    *(datetime.datetime, datetime.date, datetime.timedelta),
    *((pathlib.PurePosixPath, f"pathlib.{name}PosixPath") for name in ("", "Pure", "_local.", "_local.Pure")),
    *((pathlib.PureWindowsPath, f"pathlib.{name}WindowsPath") for name in ("", "Pure", "_local.", "_local.Pure")),
)
_MAGIC = torch.serialization.MAGIC_NUMBER.to_bytes(10, "little")  # in the head of what torch wrote before 1.6
_ALLOWING = threading.Lock()  # what is allowed, is allowed to the whole process


def _read_torch(file: Path) -> dict[str, Any]:
    if torch.__version__ < "2.10":  # which compares as versions, not as text
        warnings.warn(
            f"{file}: PyTorch {torch.__version__} can be made to run code by a crafted .pt file (CVE-2026-24747, fixed "
            "in 2.10). Load only files that you trust, or safetensors.",
            stacklevel=2,
        )
    with opened(file) as stream:
        before = torch.serialization.get_safe_globals()
        # Leaving the context also removes what was allowed before it, so nothing is listed that already was.
        allowed = torch.serialization.safe_globals([c for c in _DATA if c not in before])
        with _ALLOWING, allowed, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                content = torch.load(stream, map_location="cpu", weights_only=True)
            except Exception as error:
                stream.seek(0)
                if refused := _refusal(file, stream.read(20), error):
                    raise CheckpointError(refused) from error
                raise
        if not isinstance(content, dict):
            raise CheckpointError(
                f"{file} holds a {type(content).__name__}; a checkpoint is a dictionary: a state dict, or one with "
                "entries such as 'ema' or 'model'."
            )
        return content


_REMEDY = """\
If you trust the file, save its weights alone, in the repository that it was made with:
    import pathlib, pickle, torch
    content = {read}  # runs its code
    def weights(entry):
        entry = entry.state_dict() if hasattr(entry, 'state_dict') else entry
        if not isinstance(entry, dict):
            return entry if isinstance(entry, torch.Tensor) else None
        kept = {{k: weights(v) for k, v in entry.items()}}
        return {{k: v for k, v in kept.items() if v is not None}} or None
    torch.save(weights(content), 'weights.pt')"""


def _refusal(file: Path, head: bytes, error: Exception) -> str:
    """What a file that torch refuses asks for, and the lines that save its weights anew; empty if it is damaged."""
    read, asked = f"torch.load({str(file)!r}, map_location='cpu', weights_only=False)", ""
    if head.startswith(b"\x80") and _MAGIC not in head:
        asked, read = "what torch.save never writes", f"pickle.loads(pathlib.Path({str(file)!r}).read_bytes())"
    elif found := re.search(r"GLOBAL ([\w.]+)", str(error)):
        asked = found[1][:200]
    what = f"{file} is refused, and nothing of it was run: it asks for {asked}, not plain data."
    return f"{what}\n{_REMEDY.format(read=read)}" if asked else ""
