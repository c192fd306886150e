"""Our own format: a folder with ``config.json``, ``model.safetensors`` and ``README.md``, whole at every moment.

``model.safetensors`` decides. Its header carries the settings too, and one SHA-256 over settings and weights, so that
they belong together; one rename puts it in the place of an older one. ``config.json`` shows people the settings.
"""

from __future__ import annotations

import functools
import hashlib
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
from .weights import defect

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
FORMAT_VERSION = 1

_METADATA = "selftrans_reg"  # the settings' key in the header of the weights
_STAGING = ".selftrans_reg-"  # begins the name of a folder in which a save is under way, or was interrupted
_KIND = "teacher"
_COMMON = ("kind", "format_version", "library_version", "sha256")
_TEACHER = (  # what each means, the teacher knows
    *("layer", "guidance_scale", "null", "call", "select", "tokens", "time", "hidden_size", "dropped", "backbone"),
    *("fingerprint", "source", "step", "latent_scale", "latent_shift", "latent_shape", "licence"),
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


def read_artefact(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings and the weights of a saved teacher, from one reading of one file."""
    with wrapped_errors(folder):
        there = sorted(path.name for path in folder.iterdir())
        if not {CONFIG, WEIGHTS} <= set(there):
            raise CheckpointError(
                f"There is no saved teacher in {str(folder)!r}: it lacks {CONFIG} or {WEIGHTS}.\n"
                f"Found: {some_of(there)}."
            )
        tensors, metadata = read_safetensors(folder / WEIGHTS)
        config = _checked(parsed(metadata.get(_METADATA, "null")), folder / WEIGHTS)
        shown = _checked(read_json(folder / CONFIG), folder / CONFIG)
        # It is another save's for a moment while a teacher is replaced, and for longer if that was interrupted.
        if shown["sha256"] == config["sha256"] and shown != config:
            raise CheckpointError(
                f"{folder / CONFIG} differs in {quoted(key for key in config if config[key] != shown[key])} from the "
                f"settings that were saved with the weights, in {WEIGHTS}.\n"
                "It only shows them: build a teacher with other settings and save that, or copy the two files again."
            )
        if config["sha256"] != _digest(config, tensors):
            raise CheckpointError(
                f"{folder / WEIGHTS} is damaged: its weights and settings are not those that were saved, by their "
                "SHA-256.\nCopy or download it again."
            )
        _check_width(config, tensors, str(folder / WEIGHTS))
        return {name: config[name] for name in _TEACHER}, tensors


def _checked(config: Any, path: Path) -> dict[str, Any]:
    """The settings, once they are known to be those of a teacher in this format."""
    if not isinstance(config, dict) or config.get("kind") != _KIND:
        raise CheckpointError(
            f"{path} was not written by selftrans-reg: it lacks 'kind': {_KIND!r}.\n"
            "Weights of a training loop or of diffusers are read by build_teacher."
        )
    version, unknown = config.get("format_version"), sorted(config.keys() - {*_COMMON, *_TEACHER})
    if version != FORMAT_VERSION or unknown:
        raise CheckpointError(
            f"{path} has format version {version!r:.40}, of which selftrans-reg {library_version()} reads "
            f"{FORMAT_VERSION}; entries that it does not know: {some_of(unknown)}.\n"
            f"Install version {config.get('library_version')!s:.40} of selftrans-reg from its repository, or later."
        )
    if missing := [name for name in (*_COMMON, *_TEACHER) if name not in config]:
        raise CheckpointError(f"{path} lacks {quoted(missing)}: it is incomplete. Copy or download it again.")
    return config


def _check_width(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse a width that no tensor has room for: heads are built at it."""
    largest = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    if (config["hidden_size"] or 0) > largest:
        raise CheckpointError(
            f"{where}: 'hidden_size' is {config['hidden_size']}, and no axis of the weights is longer than {largest}."
        )


def _digest(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of all that a teacher is made from: the settings, and each tensor's name, dtype, shape and bytes."""
    settings = {key: value for key, value in config.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for key, value in sorted(tensors.items()):
        digest.update(f"\n{key} {value.dtype} {tuple(value.shape)}\n".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(memoryview(flat.view(torch.uint8).numpy().data))
    return digest.hexdigest()


def write_artefact(folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str) -> None:
    """Write a teacher, in the place of an older one or beside whatever else the folder holds.

    All that reading would refuse is refused before anything is written. Until the new weights are whole and on the
    disk, an older teacher stays as it is, whatever happens to the process or the disk. Of several writers each has its
    own place to write, and the last one's teacher stays. ``name`` is what the model card calls it.
    """
    if unknown := sorted(settings.keys() - {*_TEACHER}):
        raise SettingError(f"A saved teacher has no {quoted(unknown)}; it has {quoted(_TEACHER)}.")
    refused = "This teacher cannot be saved"
    config = {"kind": _KIND, "format_version": FORMAT_VERSION, "library_version": library_version(), **settings}
    for key, value in config.items():
        try:
            same = json.loads(json.dumps(value, allow_nan=False)) == value
        except (TypeError, ValueError):
            same = False
        if not same:
            raise CheckpointError(f"{refused}: {key!r} is more than JSON can hold, {str(value)[:200]}.")
    for key, value in tensors.items():
        strange = value.dtype == torch.complex128 or (value.is_floating_point() and value.dtype.itemsize == 1)
        if problem := defect(value) or (f"a tensor of {value.dtype}" if strange else None):
            raise CheckpointError(
                f"{refused}: its {key!r} is {problem}, which could not be loaded again.\n"
                "Save it before it is sharded, quantised or offloaded, or gather the whole weights first."
            )
    _check_width(config, tensors, refused)
    config["sha256"] = _digest(config, tensors)
    text = json.dumps(config, indent=2, allow_nan=False) + "\n"
    # Copies, as safetensors takes no tensors that share memory.
    own = {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
    weights = safetensors.torch.save(own, metadata={_METADATA: text})  # one entry: of several the order is random
    if int.from_bytes(weights[:8], "little") > MAX_JSON:
        raise CheckpointError(f"{refused}: its names and settings take over {MAX_JSON} bytes.")
    # The weights last: with them the new teacher is the folder's.
    files = {CARD: card(config, name).encode(), CONFIG: text.encode(), WEIGHTS: weights}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _one_writer(folder), tempfile.TemporaryDirectory(prefix=_STAGING, dir=folder) as staging:
            _check_place(folder)
            for file, data in files.items():
                with Path(staging, file).open("wb") as stream:
                    stream.write(data)
                    stream.flush()
                    os.fsync(stream.fileno())  # its bytes are on the disk
            for file in files:
                if file != CARD or not os.path.lexists(folder / CARD):
                    Path(staging, file).replace(folder / file)
    except OSError as error:
        raise CheckpointError(
            f"The teacher could not be written to {str(folder)[:300]!r}: {error.strerror}.\n"
            "What was saved there before, if anything, is still whole."
        ) from error


@contextmanager
def _one_writer(folder: Path) -> Iterator[None]:
    """Wait for whoever writes into the folder, then clear away what interrupted saves left."""
    if os.name != "posix":  # folders cannot be locked: writers do not wait, and nothing is cleared away
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # of a network's file system that has no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            for left in folder.glob(f"{_STAGING}*"):
                shutil.rmtree(left, ignore_errors=True)
        yield
        os.fsync(descriptor)  # the new names are on the disk
    finally:
        os.close(descriptor)


def _check_place(folder: Path) -> None:
    """Refuse to write over anything but a saved teacher."""
    for path in (folder / CONFIG, folder / WEIGHTS):
        try:
            if os.path.lexists(path) and path.name == CONFIG:
                _checked(read_json(path), path)
            elif os.path.lexists(path):
                with opened(path) as stream:
                    _checked(parsed(read_metadata(stream).get(_METADATA, "null")), path)
        except CheckpointError as error:
            raise CheckpointError(
                f"{str(folder)!r} holds a {path.name} that is no saved teacher's; it was not touched. Save elsewhere.\n"
                f"{error}"
            ) from error


_CARD = """\
---
{header}
---
# Self-Transcendence teacher

The frozen teacher of stage 2: one layer of a diffusion transformer, guided as f_u + w (f_c − f_u) by condition and null
condition.

```python
import selftrans_reg as st

teacher = st.CFGFeatureTeacher.from_pretrained({name}, model={backbone}{arguments})
```

`{backbone}` is the class that the weights were trained with, which is not part of this repository. The settings:

```json
{settings}
```

Method: Lingchen Sun, Rongyuan Wu, Zhengqiang Zhang, Ruibin Li, Yujing Sun, Shuaizheng Liu and Lei Zhang,
*Self-Transcendence: Is External Feature Guidance Indispensable for Accelerating Diffusion Transformer Training?*,
2026, [arXiv:2601.07773](https://arxiv.org/abs/2601.07773).
"""


def card(config: Mapping[str, Any], name: str) -> str:
    """The model card of a saved teacher that its users load as ``name``."""
    from huggingface_hub import ModelCard, ModelCardData

    licence = config["licence"]
    # The hub knows licences by short names, and refuses a card with any other than "other".
    known = licence is None or re.fullmatch(r"[a-z0-9.-]+", str(licence))
    licences = {"license": licence} if known else {"license": "other", "license_name": licence}
    asked = [f", null={nested(entry['path'])}" for entry in config["null"] if "unsaved" in entry]
    asked += [f", {key}=..." for key, value in config.items() if isinstance(value, dict) and "unsaved" in value]
    text = _CARD.format(
        header=ModelCardData(**licences, library_name="selftrans-reg", tags=["self-transcendence", "diffusion"]),
        name=_quoted(os.fsencode(name).decode("utf-8", "replace")),
        backbone=config["backbone"],
        arguments="".join(asked),
        settings=_quoted({key: value for key, value in config.items() if value is not None}),
    )
    return str(ModelCard(text))  # which reads the header back


def _quoted(value: object) -> str:
    """JSON that ends no block of code in Markdown."""
    return json.dumps(value, indent=2).replace("`", "\\u0060")


def nested(path: Sequence[str | int]) -> str:
    """How a null condition with a function at ``path`` is written: ``{'y': ...}``."""
    return functools.reduce(lambda text, key: f"{{{key!r}: {text}}}", reversed(path), "...")


def library_version() -> str:
    """The version of this library."""
    from . import __version__  # not at the top: the package's own import leads here

    return __version__
