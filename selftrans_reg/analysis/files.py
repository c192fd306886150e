"""A report as a JSON file, read back with the care that a file from elsewhere asks for."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..artefacts import is_list, is_record, is_text, is_whole, library_version
from ..checkpoints import read_json
from ..errors import CheckpointError
from ..recipes import Recipe
from .result import LayerMeasures, LayerReport

_FORMAT = 1
_Fits = Callable[[Any], bool]
_LONGEST = 1 << 16


def save_report(report: LayerReport, path: Path) -> None:
    """Write under another name, then rename: the file is always whole. Its folder is made if there is none."""
    content = {"kind": "layer report", "format_version": _FORMAT, "library_version": library_version()}
    content |= dataclasses.asdict(report)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(_rounded(content), indent=1, allow_nan=False, ensure_ascii=False) + "\n", "utf-8")
    partial.replace(path)


def load_report(path: Path) -> LayerReport:
    """The report in a file.

    Raises:
        CheckpointError: If it is none, or of a later version.
    """
    try:
        content = read_json(path)
    except CheckpointError as error:
        raise CheckpointError(f"{path} cannot be read as a layer report: {error}") from error
    if not isinstance(content, dict) or content.get("kind") != "layer report":
        raise CheckpointError(
            f"{path} is no layer report: it lacks 'kind': 'layer report'. Save one with report.save()."
        )
    if content.get("format_version") != _FORMAT:
        raise CheckpointError(
            f"{path} is a layer report of format {content.get('format_version')!r}, written by selftrans-reg "
            f"{content.get('library_version')!r}; this version reads format {_FORMAT}. Install that version."
        )
    values = {key: value for key, value in content.items() if key not in ("kind", "format_version", "library_version")}
    wrong = sorted(_REPORT.keys() ^ values.keys()) or [key for key, fits in _REPORT.items() if not fits(values[key])]
    if wrong or not _complete(values):
        raise CheckpointError(
            f"{path} is no layer report as this version writes it; missing, unknown or malformed: "
            f"{', '.join(map(repr, wrong)) or 'rows or alignment, which do not fit the layers'}. Measure again."
        )
    values["rows"] = tuple(LayerMeasures(**row) for row in values["rows"])
    values["recipe"] = None if values["recipe"] is None else _recipe(values["recipe"])
    values["alignment"] = tuple(tuple(tuple(row) for row in matrix) for matrix in values["alignment"])
    fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
    return LayerReport(**fields)


def _rounded(value: Any) -> Any:
    """Seven digits are more than any of the numbers means."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value


def _complete(values: Mapping[str, Any]) -> bool:
    """Whether there is a row for each layer, fraction and scale, and an alignment for each scale and two layers."""
    wanted = {
        (layer, f, w)
        for layer in values["layers"]
        for f in values["noise_fractions"]
        for w in values["guidance_scales"]
    }
    found = [(row["layer"], row["noise_fraction"], row["guidance_scale"]) for row in values["rows"]]
    count = len(values["layers"])
    matrices = values["alignment"]
    square = all(len(matrix) == count and all(len(row) == count for row in matrix) for matrix in matrices)
    return (
        set(found) == wanted
        and len(found) == len(wanted)
        and square
        and len(matrices) == len(values["guidance_scales"])
    )


def _recipe(value: Mapping[str, Any]) -> Recipe:
    window = value["window"]
    return Recipe(**{**value, "window": window and tuple(window), "notes": tuple(value["notes"])})


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _or_none(fits: _Fits) -> _Fits:
    return lambda value: value is None or fits(value)


def _list_of(fits: _Fits) -> _Fits:
    return lambda value: is_list(value, fits, longest=_LONGEST)


def _is_line(value: object) -> bool:
    return is_text(value, longest=2000)


_NUMBER = _or_none(_is_number)
_ROW: dict[str, _Fits] = {
    "layer": is_text,
    "noise_fraction": _is_number,
    "guidance_scale": _is_number,
    **dict.fromkeys(("contrast", "norm", "effective_rank", "knn", "probe"), _NUMBER),
}
_RECIPE: dict[str, _Fits] = {
    **dict.fromkeys(("name", "stage1_layer", "student_layer", "teacher_layer", "target", "gating"), is_text),
    **dict.fromkeys(("depth", "stop_step", "stage1_steps"), is_whole),
    **dict.fromkeys(("guidance_scale", "weight"), _is_number),
    "window": _or_none(lambda value: is_list(value, _is_number, shortest=2, longest=2)),
    "reasons": lambda value: (
        isinstance(value, dict) and value.keys() <= _RECIPE.keys() and all(map(_is_line, value.values()))
    ),
    "notes": _list_of(_is_line),
}
_REPORT: dict[str, _Fits] = {
    "model": is_text,
    "layers": lambda value: is_list(value, is_text, shortest=1),
    "noise_fractions": lambda value: is_list(value, _is_number, shortest=1),
    "guidance_scales": lambda value: is_list(value, _is_number, shortest=1),
    "conditioned": lambda value: isinstance(value, bool),
    "samples": is_whole,
    "held_out": is_whole,
    "classes": _or_none(is_whole),
    "chance": _NUMBER,
    "rows": _list_of(lambda value: is_record(value, _ROW)),
    "alignment": _list_of(_list_of(_list_of(_NUMBER))),
    "notes": _list_of(_is_line),
    "recipe": _or_none(lambda value: is_record(value, _RECIPE)),
}
