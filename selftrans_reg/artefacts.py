"""Our own format: a folder with ``config.json``, ``model.safetensors`` and ``README.md``, whole at every moment.

``model.safetensors`` decides. Its header carries the settings too, and one SHA-256 over settings and weights, so that
they belong together by construction; one rename puts it in the place of an older one. ``config.json`` shows the same
settings to people and to the hub.
"""

from __future__ import annotations

import hashlib
import html
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoints import (
    DTYPES,
    MAX_JSON,
    opened,
    parsed,
    read_header,
    read_json,
    read_safetensors,
    wrapped_errors,
)
from .errors import CheckpointError, SettingError
from .modules import plain_key, quoted, some_of, unwrap
from .time import TimeConvention
from .weights import defect

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
FORMAT_VERSION = 1

_METADATA = "selftrans_reg"  # the settings' key in the header of the weights
_STAGING = ".selftrans_reg-"  # begins the name of a folder in which a save is under way, or was interrupted
_LONGEST = 2000  # characters of a line of text


def strip(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the plain model, under the keys that it has without wrappers, for export.

    What DDP, ``torch.compile``, checkpoint wrappers, FSDP and ``AveragedModel`` put around a model is looked through.
    The library itself leaves nothing in a model's state dict. As in ``model.state_dict()``, the tensors are the
    model's own, not copies; sharded weights have to be gathered first.

    Example:
        >>> import torch, selftrans_reg as st
        >>> ema = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(2, 2))
        >>> list(st.strip(ema))
        ['weight', 'bias']
    """
    plain = unwrap(model)
    return {plain_key(plain, key): value for key, value in plain.state_dict().items()}


# --- What the settings have to be ------------------------------------------------------------------------------------

# A schema is plain data: `str` is one line of text, a range whole numbers, a slice the numbers from its start to its
# stop, a pattern text that matches, a list things of one kind (and how many at least), {str: ...} things by any names,
# another dict exactly its names (but for those with a question mark), a tuple one of several, anything else itself.
Schema = Any

_COUNT, _WIDTH, _INDEX = range(1 << 53), range(1, (1 << 20) + 1), range(-(1 << 20), (1 << 20) + 1)
_REAL = slice(-1e15, 1e15)
_UNSAVED = {"unsaved": str}  # stands for a function: its name
_PLAIN = (None, bool, str, _REAL)
_DIGEST = re.compile("[0-9a-f]{64}")
_PATH = [(str, _COUNT), 1]

_COMMON: dict[str, Schema] = {
    "kind": "teacher",
    "format_version": range(1, 1 << 20),
    "library_version": re.compile(r"[0-9A-Za-z.+!-]{1,40}"),
    "sha256": _DIGEST,
}
TEACHER: dict[str, Schema] = {
    "layer": str,
    "guidance_scale": slice(0.0, 1e9),
    "null": [
        ({"path": _PATH, "value": (None, bool, _REAL)}, {"path": _PATH, "tensor": str}, {"path": _PATH} | _UNSAVED),
        1,
    ],
    "call": {"x": (str, _UNSAVED), "t": (str, _UNSAVED), "shared": [str], "fixed": {str: _PLAIN}, "rows?": {str: str}},
    "select": (None, str, _INDEX, _UNSAVED),
    "tokens": (None, {"start": (None, _INDEX), "stop": (None, _INDEX), "step": (None, _WIDTH)}, _UNSAVED),
    "time": (None, *TimeConvention.names(), _UNSAVED),
    "hidden_size": (None, _WIDTH),
    "dropped": [str],
    "backbone": str,
    "fingerprint": _DIGEST,
    "source": (None, str),
    "step": (None, _COUNT),
    "latent_scale": (None, slice(1e-9, 1e9)),
    "latent_shape": (None, [_WIDTH, 1]),
    "licence": (None, str),
}


def fits(value: Any, schema: Schema) -> bool:
    """Whether a value that JSON can hold is what the schema says."""
    match schema:
        case range():
            return type(value) is int and value in schema
        case slice():
            return type(value) in (int, float) and schema.start <= value <= schema.stop
        case list():
            least = (schema[1:] or [0])[0]
            return isinstance(value, list) and len(value) >= least and all(fits(item, schema[0]) for item in value)
        case tuple():
            return any(fits(value, one) for one in schema)
        case dict():
            known = {str(name).rstrip("?"): one for name, one in schema.items()}
            needed = {name for name in schema if name is not str and not name.endswith("?")}
            if not isinstance(value, dict) or not needed <= value.keys():
                return False
            if str in schema:
                return all(fits(name, str) and fits(item, schema[str]) for name, item in value.items())
            return value.keys() <= known.keys() and all(fits(item, known[name]) for name, item in value.items())
        case re.Pattern():
            return isinstance(value, str) and schema.fullmatch(value) is not None
    if schema is str:
        return isinstance(value, str) and 0 < len(value) <= _LONGEST and value.isprintable()
    return isinstance(value, bool) if schema is bool else type(value) is type(schema) and value == schema


def in_words(schema: Schema) -> str:
    """What the schema says, for messages."""
    match schema:
        case range():
            return f"a whole number from {schema[0]} to {schema[-1]}"
        case slice():
            return f"a number from {schema.start:g} to {schema.stop:g}"
        case list():
            return f"a list, each {in_words(schema[0])}"
        case tuple():
            return " or ".join(map(in_words, schema))
        case dict():
            return f"an object with {', '.join(map(str, schema))}"
        case re.Pattern():
            return f"text like {schema.pattern}"
    return {str: "one line of text", bool: "true or false", None: "null"}.get(schema, repr(schema))


def _check(config: Mapping[str, Any], schema: Mapping[str, Schema], where: str) -> None:
    for name, wanted in schema.items():
        if not fits(config[name], wanted):
            raise CheckpointError(f"{where}: {name!r} should be {in_words(wanted)}; found {str(config[name])[:100]!r}.")


# --- Reading ---------------------------------------------------------------------------------------------------------


def read_artefact(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings and the weights of a saved teacher, from one reading of one file.

    Raises:
        CheckpointError: If a file is missing, damaged, of another format or edited; if a setting is unknown, missing or
            of the wrong type; or if the weights are not those that were saved with the settings.
    """
    for name in (CONFIG, WEIGHTS):
        with wrapped_errors(folder):
            if not (folder / name).is_file():  # opening a pipe would wait for ever
                there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
                raise CheckpointError(
                    f"There is no saved teacher in {str(folder)!r}: it has no {name}.\nFound: {some_of(there)}."
                )
    tensors, metadata = read_safetensors(folder / WEIGHTS)
    config = _config(metadata.get(_METADATA), folder / WEIGHTS)
    beside = _config(json.dumps(read_json(folder / CONFIG)), folder / CONFIG)
    # It is another save's for a moment while a teacher is replaced, and for longer if that was interrupted.
    if beside["sha256"] == config["sha256"] and beside != config:
        edited = quoted(key for key in config if config[key] != beside[key])
        raise CheckpointError(
            f"{folder / CONFIG} differs in {edited} from the settings that were saved with the weights, in {WEIGHTS}.\n"
            "It only shows them: build a teacher with other settings and save that, or copy the two files again."
        )
    if config["sha256"] != _digest(config, tensors):
        raise CheckpointError(
            f"{folder / WEIGHTS} is damaged: its weights and settings are not those that were saved (SHA-256 "
            f"{config['sha256'][:16]}…).\nCopy or download it again."
        )
    _check_sizes(config, tensors, str(folder / WEIGHTS))
    return {name: config[name] for name in TEACHER}, tensors


def _config(text: str | None, path: Path) -> dict[str, Any]:
    """The settings in JSON, once they are known to be those of a teacher in this format."""
    with wrapped_errors(path):
        config = None if text is None else parsed(text)
    if not isinstance(config, dict) or not config.keys() >= _COMMON.keys():
        raise CheckpointError(
            f"{path} was not written by selftrans-reg: it lacks its settings {quoted(_COMMON)}.\n"
            "Weights of a training loop or of diffusers are read by build_teacher."
        )
    _check(config, _COMMON, str(path))
    this, known = f"selftrans-reg {library_version()}", _COMMON | TEACHER
    install = f"Install version {config['library_version']} of selftrans-reg from its repository, or a later one."
    if config["format_version"] > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {config['format_version']}; {this} reads up to {FORMAT_VERSION}.\n{install}"
        )
    if unknown := sorted(config.keys() - known.keys()):
        names = quoted([name[:100] for name in unknown[:8]])
        raise CheckpointError(f"{path} has entries that {this} does not know: {names}.\n{install}")
    if missing := sorted(known.keys() - config.keys()):
        raise CheckpointError(f"{path} lacks {quoted(missing)}: it is incomplete. Copy or download it again.")
    _check(config, TEACHER, str(path))
    return config


def _check_sizes(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse a width that no tensor has room for: heads are built at it. And NaN, which is never meant."""
    largest = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    if (config["hidden_size"] or 0) > largest:
        raise CheckpointError(
            f"{where}: 'hidden_size' is {config['hidden_size']}, and no axis of the weights is longer than {largest}."
        )
    for key, value in tensors.items():
        if value.is_floating_point() and bool(value.isnan().any()):
            raise CheckpointError(f"{where}: {key[:100]!r} holds NaN.")


def _digest(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of all that a teacher is made from: the settings, and each tensor's name, dtype, shape and bytes."""
    settings = {key: value for key, value in config.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for key, value in sorted(tensors.items()):
        digest.update(f"\n{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data)


# --- Writing ---------------------------------------------------------------------------------------------------------


def write_artefact(folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str) -> None:
    """Write a teacher, in the place of an older one or beside whatever else the folder holds.

    All that reading would refuse is refused before anything is written. Until the new weights are whole and on the
    disk, an older teacher stays as it is, whatever happens to the process or the disk. Of several writers each has its
    own place to write, and the last one's teacher stays.

    Args:
        folder: Made if there is none.
        settings: By the names of the schema.
        tensors: The weights, in the dtypes of safetensors.
        name: What the model card calls the teacher.

    Raises:
        CheckpointError: If a setting or a tensor cannot be saved, if the folder holds other files under these names, or
            if they cannot be written.
        SettingError: If a setting is not one of the schema.
    """
    if unknown := sorted(settings.keys() - TEACHER.keys()):
        raise SettingError(f"A saved teacher has no {quoted(unknown)}; it has {quoted(sorted(TEACHER))}.")
    config = {"kind": "teacher", "format_version": FORMAT_VERSION, "library_version": library_version(), **settings}
    _check(config, TEACHER, "This teacher cannot be saved")
    names = {dtype: name for name, dtype in DTYPES.items() if not name.startswith("F8")}
    for key, value in tensors.items():
        if problem := defect(value) or (f"a tensor of {value.dtype}" if value.dtype not in names else None):
            raise CheckpointError(
                f"This teacher cannot be saved: its {key!r} is {problem}, which could not be loaded again.\n"
                "Save it before it is sharded, quantised or offloaded, or gather the whole weights first."
            )
    _check_sizes(config, tensors, "This teacher cannot be saved")
    config["sha256"] = _digest(config, tensors)
    text = json.dumps(config, indent=2, allow_nan=False) + "\n"
    header: dict[str, Any] = {"__metadata__": {"format": "pt", _METADATA: text}}
    end = 0
    # Large elements first, so that each tensor's bytes begin at a multiple of its element's size.
    ordered = sorted(tensors, key=lambda key: (-tensors[key].dtype.itemsize, key))
    for key in ordered:
        start, end = end, end + tensors[key].nbytes
        header[key] = {"dtype": names[tensors[key].dtype], "shape": list(tensors[key].shape)}
        header[key]["data_offsets"] = [start, end]
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    if len(head) > MAX_JSON:
        raise CheckpointError(f"This teacher cannot be saved: its names and settings take over {MAX_JSON} bytes.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _one_writer(folder) as descriptor:
            _check_place(folder)
            with tempfile.TemporaryDirectory(prefix=_STAGING, dir=folder) as staging:
                new = Path(staging)
                _write(new / CARD, [card(config, name).encode()])
                _write(new / CONFIG, [text.encode()])
                _write(
                    new / WEIGHTS,
                    chain([len(head).to_bytes(8, "little"), head], (_bytes(tensors[key]) for key in ordered)),
                )
                if not os.path.lexists(folder / CARD):
                    (new / CARD).replace(folder / CARD)
                (new / CONFIG).replace(folder / CONFIG)
                (new / WEIGHTS).replace(folder / WEIGHTS)  # the new teacher is the folder's from here on
                if descriptor is not None:
                    os.fsync(descriptor)
    except OSError as error:
        raise CheckpointError(
            f"The teacher could not be written to {str(folder)[:300]!r}: {error.strerror}.\n"
            "What was saved there before, if anything, is still whole."
        ) from error


def _write(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """A file whose bytes are on the disk."""
    with path.open("wb") as stream:
        stream.writelines(parts)
        stream.flush()
        os.fsync(stream.fileno())


@contextmanager
def _one_writer(folder: Path) -> Iterator[int | None]:
    """Wait for whoever writes into the folder, then clear away what interrupted saves left; the folder's descriptor.

    Where a system or a network's file system locks no folders, writers do not wait, and nothing is cleared away.
    """
    descriptor = os.open(folder, os.O_RDONLY) if os.name == "posix" else None
    try:
        with suppress(OSError, ImportError):
            import fcntl

            fcntl.flock(descriptor or -1, fcntl.LOCK_EX)
            for left in folder.glob(f"{_STAGING}*"):
                shutil.rmtree(left, ignore_errors=True)
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _check_place(folder: Path) -> None:
    """Refuse to write over anything but a saved teacher."""
    for path in (folder / CONFIG, folder / WEIGHTS):
        if not os.path.lexists(path):
            continue
        try:
            with opened(path) as stream:
                if path.name == CONFIG:
                    _config(json.dumps(read_json(path)), path)
                else:
                    _config(read_header(stream).get("__metadata__", {}).get(_METADATA), path)
        except CheckpointError as error:
            raise CheckpointError(
                f"{str(folder)!r} holds a {path.name} that is no saved teacher's; it was not touched. Save elsewhere.\n"
                f"{error}"
            ) from error


# --- The model card --------------------------------------------------------------------------------------------------

_CARD = """\
---
{header}
---
# Self-Transcendence teacher

The frozen teacher of stage 2: layer `{layer}` of a {backbone}, guided as f_u + w (f_c − f_u) by condition and null
condition.

| setting | value |
|---|---|
{table}

## Use

```python
import selftrans_reg as st

teacher = st.CFGFeatureTeacher.from_pretrained({name}, model={backbone}{arguments})
```

`{backbone}` is the class that the weights were trained with, or a function that builds the model with the same
settings; the class is not part of this repository. `st.SelfTransLoss.stage2(model, teacher=teacher, ...)` then runs it.

## Source

{source}

## Licence

{licence}

## Citation

```bibtex
@misc{{sun2026selftranscendence,
  title = {{Self-Transcendence: Is External Feature Guidance Indispensable for Accelerating Diffusion Transformer
           Training?}},
  author = {{Lingchen Sun and Rongyuan Wu and Zhengqiang Zhang and Ruibin Li and Yujing Sun and Shuaizheng Liu and
            Lei Zhang}},
  year = {{2026}}, eprint = {{2601.07773}}, archivePrefix = {{arXiv}},
  note = {{First version: Beyond External Guidance: Unleashing the Semantic Richness Inside Diffusion Transformers for
          Improved Training}}
}}
```
"""


def card(config: Mapping[str, Any], name: str) -> str:
    """The model card of a saved teacher that its users load as ``name``."""
    from huggingface_hub import ModelCard, ModelCardData

    licence, source = config["licence"], config["source"]
    # The hub knows licences by short names, and refuses a card with any other than "other".
    known = licence if licence and re.fullmatch(r"[a-z0-9.-]+", licence) else "other"
    header = ModelCardData(
        license=known if licence else None,
        license_name=licence if known == "other" and licence else None,
        library_name="selftrans-reg",
        tags=["self-transcendence", "diffusion"],
    )
    null = {".".join(map(str, entry["path"])): entry for entry in config["null"]}
    rows = {
        "backbone": config["backbone"],
        "layer": config["layer"],
        "guidance scale": config["guidance_scale"],
        "null condition": ", ".join(f"{path}: {_value(entry)}" for path, entry in null.items()),
        "feature width": config["hidden_size"],
        "time convention": _value(config["time"]) if isinstance(config["time"], dict) else config["time"],
        "latent scale": config["latent_scale"],
        "latent shape": config["latent_shape"],
        "training step": config["step"],
        "whole": "no, up to the layer only" if config["dropped"] else "yes",
    }
    asked = [f"null={nested(entry['path'])}" for entry in config["null"] if "unsaved" in entry]
    asked += [
        f"{key}=..."
        for key in ("select", "tokens", "time")
        if isinstance(config[key], dict) and "unsaved" in config[key]
    ]
    text = _CARD.format(
        header=header.to_yaml(),
        layer=_escaped(config["layer"]),
        backbone=_escaped(config["backbone"]),
        table="\n".join(f"| {key} | {'not stated' if v is None else _escaped(v)} |" for key, v in rows.items()),
        name=json.dumps(os.fsencode(name).decode("utf-8", "replace")),
        arguments="".join(f", {argument}" for argument in asked),
        source=f"Trained in: {_escaped(source).rstrip('.')}." if source else "The source run was not stated.",
        licence=f"{_escaped(licence).rstrip('.')}." if licence else "The licence of these weights was not stated.",
    )
    return str(ModelCard(text))  # which reads the header back


def nested(path: Sequence[str | int]) -> str:
    """How a null condition with a function at ``path`` is written: ``{'y': ...}``."""
    text = "..."
    for key in reversed(path):
        text = f"{{{key!r}: {text}}}"
    return text


def _value(entry: Mapping[str, Any]) -> object:
    return "a tensor" if "tensor" in entry else entry.get("value", f"{entry.get('unsaved')}, not saved")


def _escaped(value: object) -> str:
    """Text that is nothing else in Markdown: no comment that hides what follows, no cell of a table."""
    return html.escape(str(value), quote=False).replace("|", "&#124;")


def library_version() -> str:
    """The version of this library."""
    from . import __version__  # not at the top: the package's own import leads here

    return __version__
