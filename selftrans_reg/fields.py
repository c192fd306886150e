"""What ``config.json`` of a saved artefact may hold, entry by entry. All of it comes from a stranger."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, get_args

from .losses import DISTANCES
from .names import quoted
from .schedules import SCHEDULES
from .settings import Gating, Target
from .time import TimeConvention

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
    "distance": _choice(*DISTANCES),
    "weight": Field(is_real, "a number, 0 or more"),
    "window": Field(_optional(lambda v: is_list(v, is_real, shortest=2, longest=2)), "two numbers or null"),
    "gating": _choice(*get_args(Gating)),
    "schedule": _choice(*SCHEDULES),
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
