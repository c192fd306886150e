"""A report on the layers of a model: the numbers, and how they are shown and kept."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Literal, TypeAlias

from ..errors import SettingError
from ..modules import quoted
from ..recipes import Recipe

Measure: TypeAlias = Literal["contrast", "norm", "effective_rank", "knn", "probe"]


@dataclass(frozen=True)
class LayerMeasures:
    """One layer at one noise fraction and guidance scale: f_g = f_u + w (f_c − f_u).

    None stands for what could not be measured: accuracies without labels, contrast without a null condition, anything
    where features are not finite.

    Attributes:
        layer: Its name.
        noise_fraction: σ / (σ + α), 0 is data.
        guidance_scale: w; 0 is the null condition alone, 1 the condition alone.
        contrast: ``|f_c − f_u| / |f_c|`` over all tokens, the same at every w.
        norm: Root mean square of the norm of a token's f_g.
        effective_rank: Of the pooled f_g, at most the smaller of their width and the number of samples.
        knn: Accuracy of k nearest neighbours on held-out samples, from the pooled f_g.
        probe: Accuracy of a linear probe, likewise.
    """

    layer: str
    noise_fraction: float
    guidance_scale: float
    contrast: float | None = None
    norm: float | None = None
    effective_rank: float | None = None
    knn: float | None = None
    probe: float | None = None


@dataclass(frozen=True)
class LayerReport:
    """What :func:`layer_report` measured: ``print(report)`` shows a table, a notebook too.

    Attributes:
        model: The model's class.
        layers: In the order in which they ran.
        noise_fractions: At which it was measured.
        guidance_scales: At which it was measured, rising: 0, 1 and the published one among them, or 1 alone without a
            null condition.
        conditioned: Whether the model was given anything beside x_t and t.
        samples: How many.
        held_out: How many of them the accuracies were counted on.
        classes: How many labels there are; None without labels.
        chance: Share of the most frequent label.
        rows: Every measurement.
        alignment: Linear CKA, without bias, of the pooled f_c of one layer with the pooled f_g of another, mean over
            the noise fractions: ``alignment[w][student][teacher]`` by position.
        notes: What else was seen.
        recipe: The proposed plan with its reasons; None if the model's depth is not certain.
    """

    model: str
    layers: tuple[str, ...]
    noise_fractions: tuple[float, ...]
    guidance_scales: tuple[float, ...]
    conditioned: bool
    samples: int
    held_out: int
    classes: int | None
    chance: float | None
    rows: tuple[LayerMeasures, ...]
    alignment: tuple[tuple[tuple[float | None, ...], ...], ...]
    notes: tuple[str, ...]
    recipe: Recipe | None

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
        from .files import save_report

        save_report(self, Path(path))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> LayerReport:
        """The report that was saved.

        Raises:
            CheckpointError: If the file holds none, or one that a later version wrote.
        """
        from .files import load_report

        return load_report(Path(path))

    def draw(self, path: str | PathLike[str]) -> None:
        """Draw the report as one picture; the ending names the format, such as ``.png``.

        Raises:
            MissingDependencyError: If matplotlib is not installed.
        """
        from .report_picture import draw_report

        draw_report(self, path)

    def __str__(self) -> str:
        from .tables import as_text

        return as_text(self)

    def _repr_html_(self) -> str:
        from .tables import as_html

        return as_html(self)
