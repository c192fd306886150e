"""A report on the layers of a model: the numbers, how they are shown, and their file."""

from __future__ import annotations

import contextlib
import dataclasses
import html
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

from ..artefacts import fits, library_version
from ..checkpoints import read_json
from ..errors import CheckpointError, SettingError
from ..modules import quoted, some_of
from ..recipes import Recipe
from .scores import standard_error

Measure: TypeAlias = Literal["contrast", "norm", "effective_rank", "knn", "probe"]
# Some columns under one heading, by name: a cell for each layer.
_Group: TypeAlias = tuple[str, dict[str, list[str]]]

_KIND, _FORMAT = "layer report", 1


@dataclass(frozen=True)
class LayerMeasures:
    """One layer at one noise fraction and guidance scale w; None is what could not be measured.

    That is accuracies without labels, contrast without a null condition, anything where features are not finite.
    """

    layer: str  #: its name
    noise_fraction: float  #: σ / (σ + α), 0 is data
    guidance_scale: float  #: w of f_g = f_u + w (f_c − f_u): 0 is the null condition alone, 1 the condition alone
    contrast: float | None = None  #: ``|f_c − f_u| / |f_c|`` over all tokens, the same at every w
    norm: float | None = None  #: root mean square of the norm of a token's f_g
    effective_rank: float | None = None  #: of the pooled f_g, at most their width and the number of samples
    knn: float | None = None  #: accuracy of k nearest neighbours on held-out samples, from the pooled f_g
    probe: float | None = None  #: accuracy of a linear probe, likewise


@dataclass(frozen=True)
class LayerReport:
    """What :func:`layer_report` measured: ``print(report)`` shows a table, a notebook too."""

    model: str  #: the model's class
    layers: tuple[str, ...]  #: in the order in which they ran
    noise_fractions: tuple[float, ...]  #: at which it was measured, rising
    guidance_scales: tuple[float, ...]  #: rising, 0, 1 and the published one among them; 1 alone without ``null=``
    conditioned: bool  #: whether the model was given anything beside x_t and t
    samples: int  #: how many
    held_out: int  #: how many of them the accuracies were counted on
    classes: int | None  #: how many labels there are; None without labels
    chance: float | None  #: share of the most frequent label
    rows: tuple[LayerMeasures, ...] = ()  #: every measurement
    #: ``alignment[w][student][teacher]`` by position: unbiased linear CKA of the student layer's pooled f_c with the
    #: teacher layer's pooled f_g, mean over the noise fractions
    alignment: tuple[tuple[tuple[float | None, ...], ...], ...] = ()
    notes: tuple[str, ...] = ()  #: what else was seen
    recipe: Recipe | None = None  #: the proposed plan with its reasons; None if the model's depth is not certain

    @property
    def labelled(self) -> bool:
        """Whether accuracies were measured."""
        return self.chance is not None and self.classes != 1

    def mean(self, measure: Measure, layer: str, guidance_scale: float) -> float | None:
        """A measure's mean over the noise fractions; None if one of them has none.

        Raises:
            SettingError: If there is no such layer or scale in the report.
        """
        rows = [row for row in self.rows if row.layer == layer and row.guidance_scale == guidance_scale]
        values = [getattr(row, measure) for row in rows]
        if not values:
            raise SettingError(
                f"The report has no layer {layer!r} at guidance scale {guidance_scale!r}.\n"
                f"Layers: {quoted(self.layers)}. Scales: {', '.join(f'{scale:g}' for scale in self.guidance_scales)}."
            )
        return None if None in values else sum(values) / len(values)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the report as JSON, for :meth:`load`; a file that is there is replaced, whole."""
        content = {"kind": _KIND, "format_version": _FORMAT, "library_version": library_version()}
        text = json.dumps(content | dataclasses.asdict(self), indent=1, allow_nan=False, ensure_ascii=False)
        with replaced(path) as partial:
            partial.write_text(text + "\n", "utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> LayerReport:
        """The report that was saved.

        Raises:
            CheckpointError: If the file holds none, or one that a later version wrote.
        """
        content = read_json(path)
        if not isinstance(content, dict) or content.pop("kind", None) != _KIND:
            raise CheckpointError(f"{path} is no layer report: it lacks 'kind': {_KIND!r}.")
        version, library = content.pop("format_version", None), content.pop("library_version", None)
        if version != _FORMAT:
            raise CheckpointError(
                f"{path} is a layer report of format {version!r:.40}, written by selftrans-reg {library!r:.40}: "
                f"install that version. This one reads format {_FORMAT}."
            )
        schema = _schema(cls)
        wrong = content.keys() ^ schema.keys()
        wrong |= {name for name in schema.keys() - wrong if not fits(content[name], schema[name])}
        if not wrong:
            values = _tuples(content)
            values["rows"] = tuple(LayerMeasures(**row) for row in values["rows"])
            report = cls(**values | {"recipe": values["recipe"] and Recipe(**values["recipe"])})
            if report._is_complete():
                return report
        found = some_of(sorted(wrong)) if wrong else "rows or alignment, which do not fit the layers"
        raise CheckpointError(
            f"{path} is no layer report as this version writes it; missing, unknown or malformed: {found}."
        )

    def _is_complete(self) -> bool:
        """Whether there is a row for each layer, fraction and scale, and an alignment for each scale and two layers."""
        axes = self.layers, self.noise_fractions, self.guidance_scales
        rows = {(row.layer, row.noise_fraction, row.guidance_scale) for row in self.rows}
        sizes = {len(row) for matrix in self.alignment for row in (matrix, *matrix)}
        return (
            0 < len(rows) == len(self.rows) == math.prod(map(len, axes))  # first, as a file may claim any sizes
            and rows == set(itertools.product(*axes))
            and (len(self.alignment), sizes) == (len(self.guidance_scales), {len(self.layers)})
        )

    def __str__(self) -> str:
        fractions = ", ".join(f"{fraction:g}" for fraction in self.noise_fractions)
        head = f"{self.model}: {len(self.layers)} layers on {self.samples:,} samples at noise fractions {fractions}"
        head += "; means over these"
        if self.chance is not None:
            head += (
                f"\nAccuracies in % on {self.held_out:,} held-out samples of {self.classes} classes: chance "
                f"{100 * self.chance:.1f}, standard error at most {100 * standard_error(0.5, self.held_out):.1f}"
            )
        parts = [head, *map(_shown_table, _tables(self))]
        parts += ["\n".join(f"Note: {note}" for note in self.notes)] if self.notes else []
        parts += [f"Proposal for {self.recipe}"] if self.recipe is not None else []
        return "\n\n".join(parts)

    def _repr_html_(self) -> str:
        names = [field.name for field in dataclasses.fields(LayerMeasures)]
        lines = [names, *([getattr(row, name) for name in names] for row in self.rows)]
        cells = [["-" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in line] for line in lines]
        body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in line)}</tr>" for line in cells)
        return (
            f'<div class="layer-report"><pre>{html.escape(str(self))}</pre><details><summary>All {len(self.rows)} '
            f"measurements</summary><table>{body}</table></details></div>"
        )


def _tables(report: LayerReport) -> list[list[_Group]]:
    """What the layers are by themselves, and what guidance makes of them."""
    layers, scales, plan = report.layers, report.guidance_scales, report.recipe
    first, guided = scales[0], [scale for scale in scales if scale >= 1]

    def column(measure: Measure, scale: float, form: str, over: float | None = None) -> list[str]:
        values = [report.mean(measure, layer, scale) for layer in layers]
        bases = [1.0 if over is None else report.mean(measure, layer, over) for layer in layers]
        return _shown(
            [v / base if v is not None and base else None for v, base in zip(values, bases, strict=True)], form
        )

    names: _Group = ("", {"layer": list(layers)})
    own = {"probe": column("probe", first, ".1%"), "k-NN": column("knn", first, ".1%")} if report.labelled else {}
    own |= {"rank": column("effective_rank", first, ".1f"), "norm": column("norm", first, ".2f")}
    tables: list[list[_Group]] = [[names, ("null condition alone" if first == 0 else "", own)]]
    if len(scales) > 1:
        tables[0].append(("", {"contrast": column("contrast", 1.0, ".3f")}))
        shown = [("k-NN at w", {f"{w:g}": column("knn", w, ".1%") for w in guided})] if report.labelled else []
        shown.append(("rank at w", {f"{w:g}": column("effective_rank", w, ".1f") for w in guided}))
        growth = {f"{w:g}": column("norm", w, ".2f", over=1.0) for w in guided if w > 1}
        tables.append([names, *shown, *([("norm at w over that at 1", growth)] if growth else [])])
    if plan is not None and plan.teacher_layer in layers:
        scale = plan.guidance_scale if plan.guidance_scale in scales else 1.0
        cka = [row[layers.index(plan.teacher_layer)] for row in report.alignment[scales.index(scale)]]
        tables[0].append((f"CKA with {plan.teacher_layer}", {f"at w = {scale:g}": _shown(cka, ".2f")}))
    return tables


def _shown(values: Sequence[float | None], form: str) -> list[str]:
    return ["-" if value is None else f"{value:{form}}".rstrip("%") for value in values]


def _shown_table(table: Sequence[_Group]) -> str:
    blocks = []
    for index, (heading, columns) in enumerate(table):
        justify = str.rjust if index else str.ljust
        cells = [[name, *column] for name, column in columns.items()]
        widths = [max(map(len, column)) + 2 for column in cells]
        widths[0] += max(0, len(heading) + 2 - sum(widths))
        lines = ["".join(map(justify, line, widths)) for line in zip(*cells, strict=True)]
        blocks.append([justify(heading, sum(widths)), *lines])
    return "\n".join(" ".join(line).rstrip() for line in zip(*blocks, strict=True))


@contextlib.contextmanager
def replaced(path: str | PathLike[str]) -> Iterator[Path]:
    """Another path of the same ending to write to, which then becomes ``path``: always whole; its folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    yield partial
    partial.replace(path)


def _schema(wanted: Any) -> Any:
    """An annotation as :func:`fits` reads it."""
    kind, parts = get_origin(wanted), get_args(wanted)
    if dataclasses.is_dataclass(wanted):
        return {name: _schema(hint) for name, hint in get_type_hints(wanted).items()}
    if NoneType in parts:
        return (None, _schema(parts[0]))
    if kind in (tuple, dict):
        return [_schema(parts[0])] if kind is tuple else {str: _schema(parts[1])}
    return parts or {int: range(1 << 53), float: slice(-1e30, 1e30)}.get(wanted, wanted)


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _tuples(item) for name, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
