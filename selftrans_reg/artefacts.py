"""Our own format: a folder with ``config.json``, ``model.safetensors`` and ``README.md``, written atomically.

``config.json`` states the SHA-256 of the weights that belong to it. A save first writes all three files into a folder
of its own inside; the one rename that replaces ``config.json`` is then the moment at which the new artefact takes the
old one's place; and the weights follow. At every moment in between there is one artefact, whole: readers take
whichever file of weights has the stated hash.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from .checkpoints import defect, plain_key
from .errors import ArtefactError, CheckpointError, SettingError
from .fields import COMMON_FIELDS, REQUIRED, Field
from .names import quoted, unwrap
from .weight_files import read_json, read_safetensors

Kind: TypeAlias = Literal["teacher", "criterion"]

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
FORMAT_VERSION = 1

_STAGING = ".selftrans_reg_save"  # there while a save is under way, or after one that was interrupted
_MAX_CARD = 1 << 20
# The last line of a card. While the digest is that of the lines above it, nobody has edited the card.
_SEAL = "<!-- Written by selftrans-reg, and replaced by its next save unless edited. sha256: {} -->\n"


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
    return {plain_key(key): value for key, value in unwrap(model).state_dict().items()}


def _check_config(config: Mapping[str, Any], fields: Mapping[str, Field], where: str) -> None:
    for name, field in fields.items():
        if not field.fits(config[name]):
            raise ArtefactError(f"{where}: {name!r} should be {field.wanted}; found {str(config[name])[:100]!r}.")


# --- Reading ---------------------------------------------------------------------------------------------------------


def read_artefact(folder: Path, kind: Kind, fields: Mapping[str, Field]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The entries of ``config.json`` and the tensors; the tensors are views of the file.

    Raises:
        ArtefactError: If a file is missing, broken, from another version or of another kind, if an entry is unknown,
            missing or of the wrong type, or if the weights are not those that ``config.json`` was written for.
    """
    with _artefact_errors():
        if not (folder / CONFIG).is_file():
            there = sorted(p.name for p in folder.iterdir())[:20] if folder.is_dir() else []
            raise ArtefactError(
                f"There is no saved {kind} in {str(folder)!r}: it has no {CONFIG}.\n"
                f"Found: {quoted(there) or 'nothing'}."
            )
        config = _read_config(folder, kind, fields)
        return config, read_safetensors(_weights_with(folder, config["sha256"]))


def _read_config(folder: Path, kind: Kind, fields: Mapping[str, Field]) -> dict[str, Any]:
    path = folder / CONFIG
    config = _read_header(folder)
    version = config["library_version"]
    install = f"It was written by selftrans-reg {version}: pip install 'selftrans-reg>={version}'."
    if config["format_version"] > FORMAT_VERSION:
        raise ArtefactError(
            f"{path} has format version {config['format_version']}; selftrans-reg {library_version()} reads up to "
            f"{FORMAT_VERSION}.\n{install}"
        )
    if config["kind"] != kind:
        raise ArtefactError(f"{path} is a saved {config['kind']}, not a {kind}: load it with that class.")
    if unknown := sorted(config.keys() - COMMON_FIELDS.keys() - fields.keys()):
        names = quoted([name[:100] for name in unknown[:8]])
        known = f"selftrans-reg {library_version()}"
        raise ArtefactError(f"{path} has entries that {known} does not know: {names}.\n{install}")
    config = {name: field.before for name, field in fields.items() if field.before is not REQUIRED} | config
    if missing := sorted(fields.keys() - config.keys()):
        raise ArtefactError(f"{path} lacks {quoted(missing)}: it is incomplete. Copy or download it again.")
    _check_config(config, fields, str(path))
    return config


def _read_header(folder: Path) -> dict[str, Any]:
    """``config.json`` once it is known to be one of ours, of whatever version."""
    if not (folder / CONFIG).is_file():
        raise ArtefactError(f"{folder / CONFIG} is no file.")  # opening a pipe would wait for ever
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or not COMMON_FIELDS.keys() <= config.keys():
        raise ArtefactError(
            f"{folder / CONFIG} was not written by selftrans-reg: it needs the entries {quoted(COMMON_FIELDS)}.\n"
            "Weights of a training loop or of diffusers are read by build_teacher."
        )
    _check_config(config, COMMON_FIELDS, str(folder / CONFIG))
    return config


def _weights_with(folder: Path, sha256: str) -> Path:
    # The usual place twice: a save beside this one may move the new weights there between the first two looks.
    for path in (folder / WEIGHTS, folder / _STAGING / WEIGHTS, folder / WEIGHTS):
        if path.is_file() and _digest(path) == sha256:
            return path
    raise ArtefactError(
        f"{folder / WEIGHTS} {'is not the file' if (folder / WEIGHTS).is_file() else 'is missing, the file'} that "
        f"{CONFIG} was written for (SHA-256 {sha256[:16]}…).\nCopy or download the two together again."
    )


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def _artefact_errors() -> Iterator[None]:
    """Say of what the readers of foreign files find wrong that it is wrong in an artefact."""
    try:
        yield
    except CheckpointError as error:
        raise ArtefactError(str(error)) from error
    except OSError as error:
        raise ArtefactError(f"The artefact cannot be read: {error}.") from error


# --- Writing ---------------------------------------------------------------------------------------------------------


def write_artefact(
    folder: Path,
    kind: Kind,
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    fields: Mapping[str, Field],
    card: Callable[[], str],
) -> None:
    """Write an artefact, in the place of an older one of the same kind or beside whatever else the folder holds.

    Until all is written and flushed, an older artefact stays as it is, whatever happens to the process or the disk.
    Only files of the three names are ever replaced: the first two if they are a saved ``kind``, the card if it is as
    it was written.

    Raises:
        ArtefactError: If a setting or a tensor cannot be saved, if the folder holds other files under these names, or
            if they cannot be written.
        SettingError: If a setting is not one of the fields.
    """
    if unknown := sorted(settings.keys() - fields.keys()):
        raise SettingError(f"A saved {kind} has no {quoted(unknown)}; it has {quoted(sorted(fields))}.")
    _check_config(settings, fields, f"This {kind} cannot be saved")
    plain = _independent(tensors, kind)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_place(folder, kind)
        staging = folder / _STAGING
        if staging.exists():
            shutil.rmtree(staging)
        try:
            staging.mkdir()
            save_file(plain, staging / WEIGHTS, metadata={"format": "pt"})
            config = {"kind": kind, "format_version": FORMAT_VERSION, "library_version": library_version()}
            config |= {"sha256": _digest(staging / WEIGHTS), **settings}
            (staging / CONFIG).write_text(json.dumps(config, indent=2, allow_nan=False) + "\n", encoding="utf-8")
            text = card()
            (staging / CARD).write_text(text + _SEAL.format(_text_digest(text)), encoding="utf-8")
            (staging / WEIGHTS).chmod((staging / CONFIG).stat().st_mode)  # safetensors lets nobody else read its file
            for path in (*staging.iterdir(), staging, folder):
                _flush(path)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        (staging / CONFIG).replace(folder / CONFIG)  # the new artefact is the folder's from here on
        _flush(folder)
        (staging / WEIGHTS).replace(folder / WEIGHTS)
        if _is_ours(folder / CARD):
            (staging / CARD).replace(folder / CARD)
        _flush(folder)
        shutil.rmtree(staging)
    except (OSError, SafetensorError) as error:
        raise ArtefactError(
            f"The {kind} could not be written to {str(folder)!r}: {error}.\n"
            "What was saved there before, if anything, is still whole."
        ) from error


def _independent(tensors: Mapping[str, Tensor], kind: Kind) -> dict[str, Tensor]:
    """The tensors on the CPU, none sharing memory with another, as safetensors wants them."""
    result: dict[str, Tensor] = {}
    storages: set[int] = set()
    for key, value in tensors.items():
        if problem := defect(value):
            raise ArtefactError(
                f"This {kind} cannot be saved: its {key!r} is {problem}.\n"
                "Save it before it is sharded or quantised, or gather the whole weights first."
            )
        plain = value.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != plain.numel() * plain.element_size():
            plain = plain.clone()
        storages.add(plain.untyped_storage().data_ptr())
        result[key] = plain
    return result


def _check_place(folder: Path, kind: Kind) -> None:
    """Refuse to write over anything but an artefact of this kind, and finish what an interrupted save left to do."""
    if not (folder / CONFIG).exists():
        if (folder / WEIGHTS).exists():
            raise ArtefactError(
                f"{str(folder)!r} holds a {WEIGHTS} that is no saved {kind}'s; it was not touched. Save elsewhere."
            )
        return
    try:
        config = _read_header(folder)
    except (ArtefactError, CheckpointError) as error:
        raise ArtefactError(
            f"{str(folder)!r} holds a {CONFIG} that is no saved {kind}'s; it was not touched. Save elsewhere.\n{error}"
        ) from error
    if config["kind"] != kind:
        raise ArtefactError(f"{str(folder)!r} holds a saved {config['kind']}; it was not touched. Save elsewhere.")
    staged = folder / _STAGING / WEIGHTS
    if staged.is_file() and _digest(staged) == config["sha256"]:
        staged.replace(folder / WEIGHTS)


def _is_ours(card: Path) -> bool:
    """Whether there is no card, or one that nobody has edited."""
    if not card.is_file():
        return not card.exists()
    with card.open("rb") as stream:
        text = stream.read(_MAX_CARD).decode("utf-8", errors="replace")
    above, newline, last = text.rstrip("\n").rpartition("\n")
    return last + "\n" == _SEAL.format(_text_digest(above + newline))


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name != "posix":
        return  # other systems cannot open folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def library_version() -> str:
    """The version of this library."""
    from . import __version__  # not at the top: the package's own import leads here

    return __version__
