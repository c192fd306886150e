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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from .checkpoints import MAX_JSON, opened, parsed, read_json, read_metadata, read_safetensors, wrapped_errors
from .errors import CheckpointError, SettingError
from .modules import plain_key, quoted, some_of, unwrap
from .time import TimeConvention
from .weights import defect

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
FORMAT_VERSION = 1

_METADATA = "selftrans_reg"  # the settings' key in the header of the weights
_STAGING = ".selftrans_reg-"  # begins the name of a folder in which a save is under way, or was interrupted
_LONGEST = 2000  # characters of a line of text
_DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
)


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

# Plain data: `str` is one line of text, a range whole numbers, a slice the numbers from start to stop, a pattern text
# that matches, a list things of one kind (and how many at least), {str: ...} things by any names, another dict exactly
# its names (but for those with a question mark), a tuple one of several, anything else itself.
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
    """The settings and the weights of a saved teacher, from one reading of one file."""
    for name in (CONFIG, WEIGHTS):
        with wrapped_errors(folder):
            if not (folder / name).is_file():  # opening a pipe would wait for ever
                there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
                raise CheckpointError(
                    f"There is no saved teacher in {str(folder)!r}: it has no {name}.\nFound: {some_of(there)}."
                )
    tensors, metadata = read_safetensors(folder / WEIGHTS)
    with wrapped_errors(folder / WEIGHTS):
        stated = parsed(metadata.get(_METADATA, "null"))
    config = _config(stated, folder / WEIGHTS)
    beside = _config(read_json(folder / CONFIG), folder / CONFIG)
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


def _config(config: Any, path: Path) -> dict[str, Any]:
    """The settings, once they are known to be those of a teacher in this format."""
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
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(memoryview(flat.view(torch.uint8).numpy().data))
    return digest.hexdigest()


# --- Writing ---------------------------------------------------------------------------------------------------------


def write_artefact(folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str) -> None:
    """Write a teacher, in the place of an older one or beside whatever else the folder holds.

    All that reading would refuse is refused before anything is written. Until the new weights are whole and on the
    disk, an older teacher stays as it is, whatever happens to the process or the disk. Of several writers each has its
    own place to write, and the last one's teacher stays. ``name`` is what the model card calls it.
    """
    if unknown := sorted(settings.keys() - TEACHER.keys()):
        raise SettingError(f"A saved teacher has no {quoted(unknown)}; it has {quoted(sorted(TEACHER))}.")
    config = {"kind": "teacher", "format_version": FORMAT_VERSION, "library_version": library_version(), **settings}
    _check(config, TEACHER, "This teacher cannot be saved")
    for key, value in tensors.items():
        if problem := defect(value) or (f"a tensor of {value.dtype}" if value.dtype not in _DTYPES else None):
            raise CheckpointError(
                f"This teacher cannot be saved: its {key!r} is {problem}, which could not be loaded again.\n"
                "Save it before it is sharded, quantised or offloaded, or gather the whole weights first."
            )
    _check_sizes(config, tensors, "This teacher cannot be saved")
    config["sha256"] = _digest(config, tensors)
    text = json.dumps(config, indent=2, allow_nan=False) + "\n"
    # Copies, as safetensors takes no tensors that share memory.
    own = {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
    weights = safetensors.torch.save(own, metadata={_METADATA: text})  # one entry: of several the order is random
    if int.from_bytes(weights[:8], "little") > MAX_JSON:
        raise CheckpointError(f"This teacher cannot be saved: its names and settings take over {MAX_JSON} bytes.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _one_writer(folder) as descriptor:
            _check_place(folder)
            with tempfile.TemporaryDirectory(prefix=_STAGING, dir=folder) as staging:
                new = Path(staging)
                for file, data in ((CARD, card(config, name).encode()), (CONFIG, text.encode()), (WEIGHTS, weights)):
                    with (new / file).open("wb") as stream:
                        stream.write(data)
                        stream.flush()
                        os.fsync(stream.fileno())  # its bytes are on the disk
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
                text = stream.read(MAX_JSON) if path.name == CONFIG else read_metadata(stream).get(_METADATA, "null")
                _config(parsed(text), path)
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

## Citation

```bibtex
@misc{{sun2026selftranscendence,
  title = {{Self-Transcendence: Is External Feature Guidance Indispensable for Accelerating Diffusion Transformer
           Training?}},
  author = {{Lingchen Sun and Rongyuan Wu and Zhengqiang Zhang and Ruibin Li and Yujing Sun and Shuaizheng Liu and
            Lei Zhang}},
  year = {{2026}}, eprint = {{2601.07773}}, archivePrefix = {{arXiv}}
}}
```
"""


def card(config: Mapping[str, Any], name: str) -> str:
    """The model card of a saved teacher that its users load as ``name``."""
    from huggingface_hub import ModelCard, ModelCardData

    licence = config["licence"]
    # The hub knows licences by short names, and refuses a card with any other than "other".
    licences = {"license": licence}
    if licence and not re.fullmatch(r"[a-z0-9.-]+", licence):
        licences = {"license": "other", "license_name": licence}
    header = ModelCardData(**licences, library_name="selftrans-reg", tags=["self-transcendence", "diffusion"])
    null = {".".join(map(str, entry["path"])): entry for entry in config["null"]}
    rows = {
        **{row: config[row.replace(" ", "_")] for row in ("backbone", "layer", "guidance scale")},
        "null condition": ", ".join(f"{path}: {_value(entry)}" for path, entry in null.items()),
        "feature width": config["hidden_size"],
        "time convention": _value(config["time"]) if isinstance(config["time"], dict) else config["time"],
        **{row: config[row.replace(" ", "_")] for row in ("latent scale", "latent shape")},
        "training step": config["step"],
        "whole": "no, up to the layer only" if config["dropped"] else "yes",
        "trained in": config["source"],
        "licence": licence,
    }
    asked = [f", null={nested(entry['path'])}" for entry in config["null"] if "unsaved" in entry]
    asked += [f", {key}=..." for key in ("select", "tokens", "time") if fits(config[key], _UNSAVED)]
    text = _CARD.format(
        header=header.to_yaml(),
        layer=_escaped(config["layer"]),
        backbone=_escaped(config["backbone"]),
        table="\n".join(f"| {key} | {'not stated' if v is None else _escaped(v)} |" for key, v in rows.items()),
        name=json.dumps(os.fsencode(name).decode("utf-8", "replace")),
        arguments="".join(asked),
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
