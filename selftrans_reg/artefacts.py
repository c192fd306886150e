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
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from .calls import CallSpec
from .checkpoints import defect, plain_key, read_json, read_safetensors
from .errors import CheckpointError, SelfTransError, SettingError, TeacherError, TimeConventionError
from .heads import Distance
from .modules import quoted, unwrap
from .settings import Gating, Schedule, Target
from .time import TimeConvention
from .tokens import Select, Tokens

_MAX_WIDTH = 1 << 20

REQUIRED = object()


class Field(NamedTuple):
    """What one entry of ``config.json`` has to be."""

    fits: Callable[[Any], bool]
    wanted: str  # in words, for messages
    before: Any = REQUIRED  # what its absence means, in artefacts from before the entry existed


def is_text(value: object, longest: int = 500) -> bool:
    """Whether it is a string of one line that can be printed, and not empty."""
    return isinstance(value, str) and 0 < len(value) <= longest and value.isprintable()


def is_whole(value: object, low: int = 0, high: int = 1 << 53) -> bool:
    """Whether it is an integer from ``low`` to ``high``, by default what every reader of JSON gets right."""
    return type(value) is int and low <= value <= high


def is_real(value: object, low: float = 0.0, high: float = 1e9) -> bool:
    """Whether it is a number from ``low`` to ``high``."""
    return type(value) in (int, float) and low <= value <= high  # type: ignore[operator]


def is_list(value: object, fits: Callable[[Any], bool], *, shortest: int = 0, longest: int = 4096) -> bool:
    """Whether it is a list of entries that fit."""
    return isinstance(value, list) and shortest <= len(value) <= longest and all(map(fits, value))


def is_digest(value: object) -> bool:
    """Whether it is a SHA-256 in hexadecimal."""
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def is_record(value: object, fields: Mapping[str, Callable[[Any], bool]]) -> bool:
    """Whether it is an object with exactly these entries."""
    return isinstance(value, dict) and value.keys() == fields.keys() and all(f(value[k]) for k, f in fields.items())


def _optional(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


def is_unsaved(value: object) -> bool:
    """Whether it stands for a function, of which the name was saved."""
    return is_record(value, {"unsaved": is_text})


def _is_index(value: object) -> bool:
    return is_whole(value, -_MAX_WIDTH, _MAX_WIDTH)


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, bool) or is_text(value) or is_real(value, -1e15, 1e15)


def _is_slice(value: object) -> bool:
    return is_list(value, _optional(_is_index), shortest=3, longest=3) and value[2] not in range(-_MAX_WIDTH, 1)  # type: ignore[index]


def _is_null_entry(value: object) -> bool:
    def is_path(path: object) -> bool:
        return is_list(path, lambda key: is_text(key) or is_whole(key), shortest=1, longest=8)

    def is_number(number: object) -> bool:
        return isinstance(number, bool) or is_real(number, -1e15, 1e15)

    kinds: dict[str, Callable[[Any], bool]] = {"value": is_number, "tensor": is_text, "unsaved": is_text}
    return any(is_record(value, {"path": is_path, kind: fits}) for kind, fits in kinds.items())


def _is_call(value: object) -> bool:
    def is_fixed(fixed: object) -> bool:
        return isinstance(fixed, dict) and all(is_text(name) and _is_plain(v) for name, v in fixed.items())

    return is_record(value, {"x": is_text, "t": is_text, "shared": lambda v: is_list(v, is_text), "fixed": is_fixed})


def _is_plateau(value: object) -> bool:
    def is_count(count: object) -> bool:
        return is_whole(count, 1)

    kinds = {"interval": is_count, "patience": is_count}
    return is_record(
        value, {**kinds, "threshold": lambda v: is_real(v, -1.0, 1.0), "smoothing": lambda v: is_real(v, 0.0, 1.0)}
    )


def _choice(*choices: str | None) -> Field:
    return Field(lambda value: value in choices, f"one of {quoted(map(str, choices))}")


COMMON_FIELDS = {
    "kind": Field(lambda v: v in ("teacher", "criterion"), "'teacher' or 'criterion'"),
    "format_version": Field(lambda v: is_whole(v, 1), "an integer from 1"),
    "library_version": Field(
        lambda v: is_text(v, 40) and re.fullmatch(r"[0-9A-Za-z.+!-]+", v) is not None, "a version"
    ),
    "sha256": Field(is_digest, "a SHA-256 in hexadecimal"),
}
_WIDTH = Field(lambda v: is_whole(v, 1, _MAX_WIDTH), "a positive integer")
_COUNT = Field(_optional(lambda v: is_whole(v, 1)), "a positive integer or null")
_NOTE = Field(_optional(lambda v: is_text(v, 2000)), "one line of text or null")
_TIME = Field(lambda v: v in TimeConvention.names() or is_unsaved(v), "a known time convention")
_SHARED: dict[str, Field] = {  # by both kinds
    "call": Field(_is_call, "names of arguments, with plain values under 'fixed'"),
    "select": Field(_optional(lambda v: is_text(v) or _is_index(v) or is_unsaved(v)), "an index or a key"),
    "tokens": Field(_optional(lambda v: is_record(v, {"slice": _is_slice}) or is_unsaved(v)), "a slice"),
    "time": _TIME,
    "source": _NOTE,
    "licence": _NOTE,
}
TEACHER_FIELDS: dict[str, Field] = {
    **_SHARED,
    "time": Field(_optional(_TIME.fits), _TIME.wanted + " or null"),
    "layer": Field(is_text, "a layer's name"),
    "guidance_scale": Field(is_real, "a number, 0 or more"),
    "null": Field(lambda v: is_list(v, _is_null_entry, shortest=1, longest=64), "a list of paths with values"),
    "hidden_size": Field(_optional(_WIDTH.fits), "a positive integer or null"),
    "dropped": Field(lambda v: is_list(v, is_text), "a list of modules' names"),
    "backbone": Field(lambda v: is_record(v, {"class": is_text, "fingerprint": is_digest}), "class and fingerprint"),
    "fingerprint": Field(is_digest, "a SHA-256 in hexadecimal"),
    "step": Field(_optional(is_whole), "an integer, 0 or more, or null"),
    "latent_scale": Field(_optional(lambda v: is_real(v, 1e-9)), "a number above 0 or null"),
    "latent_shape": Field(_optional(lambda v: is_list(v, _WIDTH.fits, shortest=1, longest=5)), "positive integers"),
}
CRITERION_FIELDS: dict[str, Field] = {
    **_SHARED,
    "stage": Field(lambda v: is_whole(v, 1, 2), "1 or 2"),
    "layers": Field(lambda v: is_list(v, is_text, shortest=1, longest=64), "a list of layers' names"),
    "hidden_sizes": Field(lambda v: is_list(v, _WIDTH.fits, shortest=1, longest=64), "a list of positive integers"),
    "hidden_features": _WIDTH,
    "target_size": Field(_optional(_WIDTH.fits), "a positive integer, null in stage 1"),
    "latent_channels": Field(_optional(_WIDTH.fits), "a positive integer, null in stage 2"),
    "patch_size": Field(_optional(lambda v: is_list(v, _WIDTH.fits, shortest=1, longest=3)), "positive integers"),
    "channel_axis": Field(_optional(lambda v: is_whole(v, 1, 4)), "an axis, null in stage 2"),
    "target": _choice(*get_args(Target)),
    "distance": _choice(*get_args(Distance)),
    "weight": Field(is_real, "a number, 0 or more"),
    "window": Field(_optional(lambda v: is_list(v, is_real, shortest=2, longest=2)), "two numbers or null"),
    "gating": _choice(*get_args(Gating)),
    "schedule": _choice(*get_args(Schedule)),
    "stop_step": Field(_optional(is_whole), "an integer, 0 or more, or null"),
    "stop_when": Field(_optional(_is_plateau), "the four settings of a Plateau or null", before=None),
    "forward": _choice(None, "first", "last"),
    "check_interval": _COUNT,
    "health_interval": _COUNT._replace(before=100),
    "teacher_chunk": _COUNT,
    "teacher_rows": Field(
        lambda v: _COUNT.fits(v) or (type(v) is float and 0.0 < v < 1.0), "a positive integer, a share or null"
    ),
}


def shared_settings(spec: CallSpec, select: Select, tokens: Tokens, time: TimeConvention | None) -> dict[str, Any]:
    """The settings that name the model's arguments, outputs and times, as JSON."""
    call = {key: unsaved(value) if callable(value) else value for key, value in spec.config.items()}
    cut = {"slice": [tokens.start, tokens.stop, tokens.step]} if isinstance(tokens, slice) else None
    return {
        "call": call,
        "select": unsaved(select) if callable(select) else select,
        "tokens": unsaved(tokens) if callable(tokens) else cut,
        "time": time.name if time and time.is_named else time and {"unsaved": time.name},
    }


def unsaved(function: object) -> dict[str, str]:
    """What stands for a function: its name, for whoever has to find it again."""
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return {"unsaved": name if is_text(name) else "a function"}


def restored_settings(
    config: Mapping[str, Any], given: Mapping[str, Any], asked: list[str], where: str
) -> dict[str, Any]:
    """``select``, ``tokens`` and ``time``: as saved, or as given where they could not be saved."""
    settings: dict[str, Any] = {}
    for name, value in given.items():
        saved = config[name]
        if is_unsaved(saved):
            if value is None:
                asked.append(f"{name}=... (it was {saved['unsaved']!r})")
            elif isinstance(value, TimeConvention) and value.name != saved["unsaved"]:
                raise SettingError(f"{where} was saved with another time convention: {saved['unsaved']!r}.")
            settings[name] = value
            continue
        settings[name] = slice(*saved["slice"]) if isinstance(saved, dict) else saved
        if value is not None and value != settings[name]:
            raise SettingError(f"{where} was saved with {name}={settings[name]!r}, which is kept: leave {name}= out.")
    return settings


def ask(asked: Sequence[str], where: str) -> None:
    """Raise ``CheckpointError`` if functions are still asked for."""
    if asked:
        raise CheckpointError(
            f"{where} was saved with functions, which no file can hold. Pass them: {'; '.join(asked)}."
        )


@contextmanager
def fitting(where: str, model: nn.Module, origin: str, undo: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Say that an artefact does not fit, and ``origin``, where a model refuses its settings or weights."""
    try:
        yield
    except (TeacherError, TimeConventionError):
        raise
    except CheckpointError as error:  # which says so already
        undo()
        raise CheckpointError(f"{error}\n{origin}") from error
    except SelfTransError as error:
        undo()
        name = type(unwrap(model)).__name__
        raise CheckpointError(
            f"{where} does not fit {name}; nothing was loaded.\n{error}\n{origin}".rstrip()
        ) from error


_CITATION = """\
```bibtex
@misc{sun2026selftranscendence,
  author = {Sun and others}, title = {Self-Transcendence}, year = {2026}, eprint = {2601.07773}, archivePrefix = {arXiv}
}
```
"""


def teacher_card(settings: Mapping[str, Any], name: str) -> str:
    """The card of a saved teacher."""
    backbone = settings["backbone"]["class"]
    null = {".".join(map(str, entry["path"])): _shown_null(entry) for entry in settings["null"]}
    rows = {
        "backbone": backbone,
        "layer": settings["layer"],
        "guidance scale": settings["guidance_scale"],
        "null condition": ", ".join(f"{path}: {value}" for path, value in null.items()),
        "feature width": settings["hidden_size"],
        "time convention": _shown(settings["time"]),
        "latent scale": settings["latent_scale"],
        "latent shape": settings["latent_shape"],
        "training step": settings["step"],
        "whole": "yes" if not settings["dropped"] else "no, up to the layer only",
    }
    arguments = "".join(
        [
            "".join(f", null={_nested(e['path'])}" for e in settings["null"] if "unsaved" in e),
            *(f", {key}=..." for key in ("select", "tokens", "time") if is_unsaved(settings[key])),
        ]
    )
    use = f"teacher = st.CFGFeatureTeacher.from_pretrained({json.dumps(name)}, model={backbone}{arguments})"
    about = (
        f"The frozen teacher of stage 2: layer `{settings['layer']}` of a {backbone}, guided as "
        "f_u + w (f_c − f_u) by condition and null condition."
    )
    then = (
        f"`{backbone}` is the class that the weights were trained with, or a function that builds the model with the "
        "same settings; the class is not part of this artefact. The criterion `st.SelfTransLoss.stage2(model, "
        "teacher=teacher, ...)` then runs it."
    )
    return _card("Self-Transcendence teacher", about, rows, use, then, settings)


def criterion_card(settings: Mapping[str, Any], name: str) -> str:
    """The card of a saved criterion."""
    keys = ["stage", "layers", "target", "distance", "weight", "window", "gating", "schedule", "stop_step"]
    keys += ["hidden_sizes", "hidden_features", "target_size", "latent_channels", "patch_size"]
    rows = {key.replace("_", " "): "none" if settings[key] is None else settings[key] for key in keys}
    rows["time convention"] = _shown(settings["time"])
    arguments = ", teacher=teacher" if settings["stage"] == 2 else ""
    arguments += "".join(f", {key}=..." for key in ("select", "tokens", "time") if is_unsaved(settings[key]))
    use = f"criterion = st.SelfTransLoss.from_pretrained({json.dumps(name)}, model=model{arguments})"
    about = f"Head, settings and counters of the loss of stage {settings['stage']}, to go on with a run."
    then = "`model` is the model in training; its own weights, and the optimiser's state, are kept by the loop."
    return _card("Self-Transcendence criterion", about, rows, use, then, settings)


def _card(title: str, about: str, rows: Mapping[str, object], use: str, then: str, settings: Mapping[str, Any]) -> str:
    licence, source = settings["licence"], settings["source"]
    # The hub knows licences by short names, and refuses a card with any other than "other".
    short = licence if licence and re.fullmatch(r"[a-z0-9.-]+", licence) else "other"
    header = ["library_name: selftrans-reg", *([f"license: {json.dumps(short)}"] if licence else [])]
    header += ["tags:", "- self-transcendence", "- diffusion"]
    table = [f"| {key} | {_cell(value)} |" for key, value in rows.items()]
    return "\n".join(
        [
            *("---", *header, "---", f"# {title}", "", about, ""),
            *("| setting | value |", "|---|---|", *table, ""),
            *("## Use", "", "```python", "import selftrans_reg as st", "", use, "```", "", then, ""),
            *("## Source", "", f"Trained in: {_plain(source)}." if source else "The source run was not stated.", ""),
            *("## Licence", "", f"{_plain(licence)}." if licence else "The licence of these weights was not stated."),
            *(
                "",
                "## Citation",
                "",
                "The method is by Sun et al., 2026, https://arxiv.org/abs/2601.07773",
                "",
                _CITATION,
            ),
        ]
    )


def _shown(value: object) -> object:
    return f"{value['unsaved']}, not saved" if isinstance(value, dict) else value


def _shown_null(entry: Mapping[str, Any]) -> object:
    return "a tensor" if "tensor" in entry else entry.get("value", f"{entry.get('unsaved')}, not saved")


def _nested(path: list[str | int]) -> str:
    text = "..."
    for key in reversed(path):
        text = f"{{{json.dumps(key)}: {text}}}"
    return text


def _plain(text: str) -> str:
    return text.rstrip(".")


def _cell(value: object) -> str:
    return "not stated" if value is None else str(value).replace("|", "\\|")


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
            raise CheckpointError(f"{where}: {name!r} should be {field.wanted}; found {str(config[name])[:100]!r}.")


# --- Reading ---------------------------------------------------------------------------------------------------------


def read_artefact(folder: Path, kind: Kind, fields: Mapping[str, Field]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The entries of ``config.json`` and the tensors; the tensors are views of the file.

    Raises:
        CheckpointError: If a file is missing, broken, from another version or of another kind, if an entry is unknown,
            missing or of the wrong type, or if the weights are not those that ``config.json`` was written for.
    """
    with _artefact_errors():
        if not (folder / CONFIG).is_file():
            there = sorted(p.name for p in folder.iterdir())[:20] if folder.is_dir() else []
            raise CheckpointError(
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
        raise CheckpointError(
            f"{path} has format version {config['format_version']}; selftrans-reg {library_version()} reads up to "
            f"{FORMAT_VERSION}.\n{install}"
        )
    if config["kind"] != kind:
        raise CheckpointError(f"{path} is a saved {config['kind']}, not a {kind}: load it with that class.")
    if unknown := sorted(config.keys() - COMMON_FIELDS.keys() - fields.keys()):
        names = quoted([name[:100] for name in unknown[:8]])
        known = f"selftrans-reg {library_version()}"
        raise CheckpointError(f"{path} has entries that {known} does not know: {names}.\n{install}")
    config = {name: field.before for name, field in fields.items() if field.before is not REQUIRED} | config
    if missing := sorted(fields.keys() - config.keys()):
        raise CheckpointError(f"{path} lacks {quoted(missing)}: it is incomplete. Copy or download it again.")
    _check_config(config, fields, str(path))
    return config


def _read_header(folder: Path) -> dict[str, Any]:
    """``config.json`` once it is known to be one of ours, of whatever version."""
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder / CONFIG} is no file.")  # opening a pipe would wait for ever
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or not COMMON_FIELDS.keys() <= config.keys():
        raise CheckpointError(
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
    raise CheckpointError(
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
        raise CheckpointError(str(error)) from error
    except OSError as error:
        raise CheckpointError(f"The artefact cannot be read: {error}.") from error


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
        CheckpointError: If a setting or a tensor cannot be saved, if the folder holds other files under these names, or
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
        raise CheckpointError(
            f"The {kind} could not be written to {str(folder)!r}: {error}.\n"
            "What was saved there before, if anything, is still whole."
        ) from error


def _independent(tensors: Mapping[str, Tensor], kind: Kind) -> dict[str, Tensor]:
    """The tensors on the CPU, none sharing memory with another, as safetensors wants them."""
    result: dict[str, Tensor] = {}
    storages: set[int] = set()
    for key, value in tensors.items():
        if problem := defect(value):
            raise CheckpointError(
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
            raise CheckpointError(
                f"{str(folder)!r} holds a {WEIGHTS} that is no saved {kind}'s; it was not touched. Save elsewhere."
            )
        return
    try:
        config = _read_header(folder)
    except CheckpointError as error:
        raise CheckpointError(
            f"{str(folder)!r} holds a {CONFIG} that is no saved {kind}'s; it was not touched. Save elsewhere.\n{error}"
        ) from error
    if config["kind"] != kind:
        raise CheckpointError(f"{str(folder)!r} holds a saved {config['kind']}; it was not touched. Save elsewhere.")
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
