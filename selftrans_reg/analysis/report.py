"""A report on the layers of a model: the numbers, and how they are shown."""

from __future__ import annotations

import html
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from ..errors import SettingError
from ..modules import quoted
from ..recipes import Recipe
from .scores import standard_error

Measure: TypeAlias = Literal["contrast", "norm", "effective_rank", "knn", "probe"]

_COLUMNS: dict[str, tuple[Measure, str]] = {
    "probe": ("probe", ".1%"),
    "k-NN": ("knn", ".1%"),
    "rank": ("effective_rank", ".1f"),
    "norm": ("norm", ".2f"),
    "contrast": ("contrast", ".3f"),
}


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

    def __str__(self) -> str:
        fractions = ", ".join(f"{fraction:g}" for fraction in self.noise_fractions)
        head = f"{self.model}: {len(self.layers)} layers on {self.samples:,} samples at noise fractions {fractions}"
        head += "; means over these. @w: of f_u + w (f_c − f_u)"
        if self.chance is not None:
            head += (
                f"\nAccuracies in % on {self.held_out:,} held-out samples of {self.classes} classes: chance "
                f"{100 * self.chance:.1f}, standard error at most {100 * standard_error(0.5, self.held_out):.1f}"
            )
        parts = [head, *_tables(self)]
        parts += ["\n".join(f"Note: {note}" for note in self.notes)] if self.notes else []
        parts += [f"Proposal for {self.recipe}"] if self.recipe is not None else []
        return "\n\n".join(parts)

    def _repr_html_(self) -> str:
        return f'<pre class="layer-report">{html.escape(str(self))}</pre>'


def _tables(report: LayerReport) -> list[str]:
    """What the layers are by themselves, and what guidance makes of them."""
    layers, scales = report.layers, report.guidance_scales

    def measured(name: str, scale: float) -> list[str]:
        measure, form = _COLUMNS[name]
        return _column(f"{name}@{scale:g}", [report.mean(measure, layer, scale) for layer in layers], form)

    names, accuracies = _column("layer", layers, ""), ["probe", "k-NN"] if report.labelled else []
    tables = [[names, *(measured(name, scales[0]) for name in (*accuracies, "rank", "norm"))]]
    if len(scales) > 1:
        tables[0].append(measured("contrast", 1.0))
        guided = [(name, scale) for name in (*accuracies[1:], "rank", "norm") for scale in scales if scale >= 1]
        tables.append([names, *(measured(name, scale) for name, scale in guided)])
    if report.recipe is not None and report.recipe.teacher_layer in layers:
        teacher, scale = report.recipe.teacher_layer, report.recipe.guidance_scale if len(scales) > 1 else 1.0
        cka = [row[layers.index(teacher)] for row in report.alignment[scales.index(scale)]]
        tables[0].append(_column(f"CKA with {teacher}@{scale:g}", cka, ".2f"))
    return ["\n".join(map("  ".join, zip(*table, strict=True))) for table in tables]


def _column(heading: str, values: Iterable[Any], form: str) -> list[str]:
    """A heading and values as cells of one width."""
    cells = [heading, *("-" if value is None else f"{value:{form}}".rstrip("%") for value in values)]
    return [cell.rjust(max(map(len, cells))) for cell in cells]
