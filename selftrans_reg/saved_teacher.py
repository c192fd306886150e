"""A teacher to its saved artefact and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from .artefacts import fits, nested, read_artefact, write_artefact
from .calls import CallSpec
from .checkpoints import check_fit, check_values, own_tensors
from .errors import CheckpointError, SelfTransError, SettingError, TeacherError, TimeConventionError
from .modules import unwrap
from .null import Null
from .teacher import CFGFeatureTeacher, check_settings
from .time import TimeConvention
from .tokens import Select, Tokens
from .truncate import drop, dropped_names

_SLICE = ("start", "stop", "step")
_NULL_PREFIX = "null_condition."  # of the keys of the null condition's tensors


class Details(TypedDict, total=False):
    """What a teacher cannot know of itself; :meth:`CFGFeatureTeacher.save_pretrained` describes each."""

    source: str | None
    step: int | None
    latent_scale: float | None
    latent_shape: Sequence[int] | None
    licence: str | None


def save_teacher(teacher: CFGFeatureTeacher, folder: Path, details: Details, name: str) -> None:
    """Write a teacher; ``name`` is what its card calls it."""
    own = own_tensors(teacher.model, "be saved")
    first: dict[int, str] = {}  # of tied weights one is saved: loading ties them as the model does
    tensors = {key: value for key, value in own.items() if first.setdefault(id(value), key) == key}
    check_values(own, tensors, "This teacher cannot be saved: it")
    if taken := [key for key in tensors if key.startswith(_NULL_PREFIX)]:
        raise CheckpointError(
            f"The model has weights under {taken[0]!r}, a name kept for the null condition: rename it."
        )
    null: list[dict[str, Any]] = []
    for index, (path, value) in enumerate(_leaves(teacher.null)):
        key = f"{_NULL_PREFIX}{index}"
        if isinstance(value, Tensor):
            tensors[key] = teacher.null_condition.get_buffer(f"value_{index}")
            null.append({"path": list(path), "tensor": key})
        else:
            plain = value is None or isinstance(value, bool | int | float)
            null.append({"path": list(path), **({"value": value} if plain else unsaved(value))})
    known: dict[str, Any] = dict.fromkeys(Details.__annotations__)
    known |= teacher.provenance | {key: value for key, value in details.items() if value is not None}
    if isinstance(known["latent_shape"], Sequence):
        known["latent_shape"] = list(known["latent_shape"])
    settings = {
        "layer": teacher.layer,
        "guidance_scale": teacher.guidance_scale,
        "null": null,
        **shared_settings(teacher.spec, teacher.select, teacher.tokens, teacher.time),
        "hidden_size": teacher.hidden_size,
        "dropped": dropped_names(teacher.model),
        "backbone": type(unwrap(teacher.model)).__name__,
        "fingerprint": bytes(teacher.fingerprint.tolist()).hex(),
        **known,
    }
    write_artefact(folder, settings, tensors, name)


def load_teacher(
    cls: type[CFGFeatureTeacher],
    folder: Path,
    model: nn.Module | Callable[[], nn.Module],
    null: Null | None,
    select: Select,
    tokens: Tokens,
    time: TimeConvention | None,
    compile: bool,  # noqa: A002
) -> CFGFeatureTeacher:
    """Read a teacher into ``model``, or into what it makes; nothing of it is touched unless everything fits."""
    config, saved = read_artefact(folder)
    where = f"The teacher in {str(folder)!r}"
    asked: list[str] = []
    settings = restored_settings(config, {"select": select, "tokens": tokens, "time": time}, asked, where)
    condition = _restored_null(config["null"], saved, null, asked, where)
    ask(asked, where)
    dropped: list[str] = config["dropped"]
    if cut := [name for name in (config["layer"], *saved) if any(_is_in(name, gone) for gone in dropped)]:
        raise CheckpointError(f"{where} contradicts itself: it needs {cut[0][:100]!r}, which it says was dropped.")

    made = model if isinstance(model, nn.Module) else model()
    if not isinstance(made, nn.Module):
        raise SettingError(f"model= takes a model, or a function that makes one; it made {type(made).__name__}.")
    origin = f"It was saved from {config['backbone']}."
    put_back = drop(made, dropped)
    with fitting(where, made, origin, put_back):
        own = own_tensors(made)
        check_fit(made, own, saved, where)
        check_values(own, saved, where)
        check_settings(
            made, layer=config["layer"], guidance_scale=config["guidance_scale"], null=condition, call=config["call"]
        )
    _assign(made, saved)
    with fitting(where, made, origin):
        teacher = cls(
            made,
            layer=config["layer"],
            guidance_scale=config["guidance_scale"],
            null=condition,
            call=config["call"],
            hidden_size=config["hidden_size"],
            compile=compile,
            **settings,
        )
    teacher.fingerprint = torch.tensor(list(bytes.fromhex(config["fingerprint"])), dtype=torch.uint8)
    teacher.provenance = {key: config[key] for key in Details.__annotations__ if config[key] is not None}
    return teacher


def _assign(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Give the model the saved weights in the dtypes in which they were saved, so that it computes the same."""
    dtypes = {value.dtype for value in saved.values() if value.is_floating_point()}
    if len(dtypes) == 1:
        model.to(dtypes.pop())  # for what is in no state dict, such as a table of positions
    own = own_tensors(model)
    for key, value in saved.items():
        own[key].data = value.to(own[key].device, copy=True)


def _restored_null(
    entries: Sequence[Mapping[str, Any]],
    tensors: dict[str, Tensor],
    given: Null | None,
    asked: list[str],
    where: str,
) -> dict[str, Any]:
    """The null condition, nested as it was; its tensors are taken out of ``tensors``."""
    if given is not None and not isinstance(given, Mapping):
        raise SettingError(f"null= maps argument names to functions that could not be saved; got {given!r}.")
    extra = dict(_leaves(given or {}))
    null: dict[str, Any] = {}
    for entry in entries:
        *above, last = entry["path"]
        value = entry.get("value")
        if "tensor" in entry:
            if not entry["tensor"].startswith(_NULL_PREFIX) or entry["tensor"] not in tensors:
                raise CheckpointError(f"{where} lacks its null condition's tensor {entry['tensor'][:100]!r}.")
            value = tensors.pop(entry["tensor"]).clone()
        elif "unsaved" in entry:
            value = extra.pop((*above, last), None)
            if value is None:
                asked.append(f"null={nested(entry['path'])} (it was {entry['unsaved']!r})")
        level: Any = null
        for key in above:
            level = level.setdefault(key, {}) if isinstance(level, dict) else None
        if not isinstance(level, dict) or last in level:
            raise CheckpointError(f"{where} is broken: its null condition has {entry['path']} twice.")
        level[last] = value
    if extra:
        raise SettingError(f"{where} holds its null condition but for functions; null= also names {sorted(extra)}.")
    return null


def _leaves(null: Mapping[Any, Any], above: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every value of a null condition with its path, in the order in which the teacher numbers them."""
    for key, value in null.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*above, key))
        else:
            yield (*above, key), value


def _is_in(key: str, module: str) -> bool:
    return key == module or key.startswith(f"{module}.")


def shared_settings(spec: CallSpec, select: Select, tokens: Tokens, time: TimeConvention | None) -> dict[str, Any]:
    """The settings that name the model's arguments, outputs and times, as JSON."""
    call = {key: unsaved(value) if callable(value) else value for key, value in spec.config.items()}
    cut = {name: getattr(tokens, name) for name in _SLICE} if isinstance(tokens, slice) else None
    return {
        "call": call,
        "select": unsaved(select) if callable(select) else select,
        "tokens": unsaved(tokens) if callable(tokens) else cut,
        "time": time.name if time and time.is_named else time and {"unsaved": time.name},
    }


def unsaved(function: object) -> dict[str, str]:
    """What stands for a function: its name, for whoever has to find it again."""
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return {"unsaved": name if fits(name, str) else "a function"}


def restored_settings(
    config: Mapping[str, Any], given: Mapping[str, Any], asked: list[str], where: str
) -> dict[str, Any]:
    """``select``, ``tokens`` and ``time``: as saved, or as given where they could not be saved."""
    settings: dict[str, Any] = {}
    for name, value in given.items():
        saved = config[name]
        if isinstance(saved, dict) and "unsaved" in saved:
            if value is None:
                asked.append(f"{name}=... (it was {saved['unsaved']!r})")
            elif isinstance(value, TimeConvention) and value.name != saved["unsaved"]:
                raise SettingError(f"{where} was saved with another time convention: {saved['unsaved']!r}.")
            settings[name] = value
            continue
        settings[name] = slice(*map(saved.get, _SLICE)) if isinstance(saved, dict) else saved
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
