"""What a saved teacher and a saved criterion have in common.

What JSON can hold is saved. Functions are not: their names are, and loading asks for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from .calls import CallSpec
from .errors import ArtefactError, CheckpointError, SelfTransError, SettingError, TeacherError, TimeConventionError
from .fields import is_text, is_unsaved
from .names import unwrap
from .time import TimeConvention
from .tokens import Select, Tokens


def shared_settings(spec: CallSpec, select: Select, tokens: Tokens, time: TimeConvention | None) -> dict[str, Any]:
    """The settings that name the model's arguments, outputs and times, as JSON."""
    call = {"x": spec.x, "t": spec.t, "shared": sorted(spec.shared), "fixed": spec.fixed}
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
    """Raise ``ArtefactError`` if functions are still asked for."""
    if asked:
        raise ArtefactError(f"{where} was saved with functions, which no file can hold. Pass them: {'; '.join(asked)}.")


@contextmanager
def fitting(where: str, model: nn.Module, origin: str = "") -> Iterator[None]:
    """Say that an artefact does not fit, and ``origin``, where a model refuses its settings or weights."""
    try:
        yield
    except (ArtefactError, TeacherError, TimeConventionError):
        raise
    except CheckpointError as error:  # which says so already
        raise ArtefactError(f"{error}\n{origin}") from error
    except SelfTransError as error:
        name = type(unwrap(model)).__name__
        raise ArtefactError(f"{where} does not fit {name}; nothing was loaded.\n{error}\n{origin}".rstrip()) from error
