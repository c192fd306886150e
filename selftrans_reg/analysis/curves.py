"""The curves of a training log, one panel for each term."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

from ..errors import SettingError
from ..modules import quoted
from .figures import new_figure, save_figure

Log: TypeAlias = str | PathLike[str] | Sequence[Mapping[str, Any]]

_STEPS = ("step", "steps")


def draw_curves(log: Log | Mapping[str, Log], path: str | PathLike[str]) -> None:
    """Draw every term of a training log over the steps, one panel a term; values that are not finite are marked.

    Args:
        log: A file of JSON lines, or the lines as mappings, each with ``step`` (or ``steps``); or several logs by name,
            to be compared. A last line without its end, as a run that is still going leaves it, is left out.
        path: The picture; its ending names the format.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
        SettingError: If a line is not JSON, names no step, or nothing was logged.
    """
    logs = dict(log) if isinstance(log, Mapping) else {"": log}
    lines = {name: _lines(one) for name, one in logs.items()}
    terms = list(dict.fromkeys(key for entries in lines.values() for entry in entries for key in _numbers(entry)))
    if not terms:
        raise SettingError(f"There is no curve to draw: no number was logged in {quoted(map(str, logs))}.")
    columns = min(3, len(terms))
    rows = math.ceil(len(terms) / columns)
    figure = new_figure(4 * columns, 2.6 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, term in zip(panels, terms, strict=False):
        for index, (name, entries) in enumerate(lines.items()):
            points = [(_step(entry, name), _numbers(entry)[term]) for entry in entries if term in _numbers(entry)]
            colour = f"C{index}"
            steps, values = [s for s, _ in points], [v if math.isfinite(v) else math.nan for _, v in points]
            axes.plot(steps, values, color=colour, linewidth=1.2, marker="." if len(points) < 3 else None)
            broken = [s for s, v in points if not math.isfinite(v)]
            axes.plot(broken, [0.03] * len(broken), "x", color="red", transform=axes.get_xaxis_transform())
            if broken:
                axes.set_title(f"{term} (x: not finite)", fontsize=10)
        axes.set_title(axes.get_title() or term, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    for axes in panels[len(terms) :]:
        axes.set_axis_off()
    if len(logs) > 1:
        handles = [panels[0].plot([], [], color=f"C{index}", label=name)[0] for index, name in enumerate(logs)]
        figure.legend(handles=handles, loc="outside upper center", ncols=len(logs), fontsize=9)
    save_figure(figure, path)


def _lines(log: Log) -> list[Mapping[str, Any]]:
    if not isinstance(log, str | PathLike):
        return list(log)
    *whole, _ = Path(log).read_text("utf-8").split("\n")
    entries: list[Mapping[str, Any]] = []
    for number, line in enumerate(whole, 1):
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise SettingError(f"Line {number} of {log} is not JSON: {line[:80]!r}.") from error
        if not isinstance(entry, dict):
            raise SettingError(f"Line {number} of {log} is no JSON object: {line[:80]!r}.")
        entries.append(entry)
    return entries


def _numbers(entry: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in entry.items() if type(value) in (int, float) and key not in _STEPS}


def _step(entry: Mapping[str, Any], name: str) -> float:
    for key in _STEPS:
        if type(entry.get(key)) in (int, float):
            return float(entry[key])
    raise SettingError(f"An entry of the log {name!r} has no step: {dict(entry)!r:.120}.")
