"""Measure the layers of a model: which could teach, which could be taught, and with how much guidance."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SettingError
from ..modules import check_positive, unwrap
from ..null import Null
from ..recipes import Recipe, recipe
from ..teacher import check_guidance_scale
from ..time import TimeConvention
from ..tokens import Select, Tokens
from .proposal import NO_CONTRAST, propose
from .report import LayerMeasures, LayerReport
from .scores import effective_rank, knn_accuracy, probe_accuracy, similarities
from .survey import LayerReader, Progress, Survey, survey

_HELD_OUT = 0.25
# Layers are compared by a matrix of this many samples squared; more would hardly change it.
_MOST_COMPARED = 512
# Fewer have no unbiased similarity, and nothing else of worth either.
_FEWEST = 8


def layer_report(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Sequence[str] | None = None,
    guidance_scales: Sequence[float] = (1, 2, 4, 8, 16, 30),
    *,
    time: str | TimeConvention,
    null: Null | None = None,
    noise_fractions: Sequence[float] = (0.4, 0.55, 0.7),
    call: Mapping[str, Any] | None = None,
    select: Select = None,
    tokens: Tokens = None,
    samples: int = 2000,
    k: int = 10,
    seed: int = 0,
    progress: Progress = None,
) -> LayerReport:
    """Measure the layers of a model on noisy inputs, and propose student layer, teacher layer and guidance scale.

    Measure a stage-1 model: the teacher is proposed among its layers. It runs once for each batch and noise fraction,
    on condition and null condition as one doubled batch: without gradients, uncompiled, in eval mode and under the
    autocast that is active. Afterwards its mode and the global random state are as they were. Kept are, of each sample,
    the means over each layer's tokens, on the CPU: 8 bytes × samples × layers × noise fractions × D.

    Args:
        model: Any backbone, wrapped or not.
        batches: ``(latents, *condition)``, the condition in the order of the model's arguments, whole numbers (N,)
            being labels as well; or mappings of ``latents``, ``labels`` (N,) if there are any, and the model's other
            arguments by name. Latents are clean, scaled as the model sees them.
        layers: Names, as the unwrapped model prints them; by default all blocks.
        guidance_scales: w of ``f_u + w (f_c − f_u)``; 0, 1 and the published one are always measured too.
        time: What the model's t means: a name or a `TimeConvention`.
        null: The null condition, as :func:`build_teacher` takes it. Without it guidance is not measured.
        noise_fractions: Noise fractions; by default the ends and the middle of the published window.
        call: Where x_t and t are, as for :func:`build_teacher`.
        select: Which tensor of a layer's output.
        tokens: Which tokens are the image's.
        samples: Stop after the batch that reaches so many.
        k: Of the nearest neighbours.
        seed: Of the noise, and of which quarter of the samples is held out.
        progress: ``progress(items, title)`` iterates over the items and shows how far it is.

    Raises:
        SettingError: If an argument makes no sense, there are too few samples, or the null condition does not fit the
            call; or if ``layers`` is None and the model's blocks are not certain.
        LayerNotFoundError: If the model has no such layer.
        CaptureError: If a layer does not run in every forward, or runs more than once.
        CallError: If a layer's output holds several tensors and ``select`` was not given.
    """
    reader = LayerReader(model, layers, time=time, null=null, call=call, select=select, tokens=tokens)
    for scale in guidance_scales:
        check_guidance_scale(scale)
    fractions = tuple(sorted({float(fraction) for fraction in noise_fractions}))
    if not fractions:
        raise SettingError("noise_fractions is empty: name at least one, such as 0.5.")
    check_positive("samples", samples)
    check_positive("k", k)
    found = survey(reader, batches, fractions, samples, seed, progress)
    if found.samples < max(_FEWEST, k / (1 - _HELD_OUT) + 1):
        raise SettingError(f"{found.samples} samples are too few for k = {k}, a quarter of them held out: give more.")
    device = reader.device if reader.device.type == "cuda" else torch.device("cpu")  # others may have no float64
    order = torch.randperm(found.samples, generator=torch.Generator("cpu").manual_seed(seed), device="cpu").to(device)
    test, train = order.tensor_split([round(_HELD_OUT * found.samples)])
    counts = None if found.labels is None else found.labels.bincount()
    published = _published(model, found.layers)
    scales = {1.0}
    if null is not None:
        scales |= {0.0, *map(float, guidance_scales), *([published.guidance_scale] if published else [])}
    report = LayerReport(
        model=type(unwrap(model)).__name__,
        layers=found.layers,
        noise_fractions=fractions,
        guidance_scales=tuple(sorted(scales)),
        conditioned=found.conditioned,
        samples=found.samples,
        held_out=len(test),
        classes=None if counts is None else len(counts),
        chance=None if counts is None else int(counts.max()) / found.samples,
    )
    rows, alignment = _measures(report, found, train, test, k, progress)
    report = dataclasses.replace(report, rows=rows, alignment=alignment)
    plan = None if published is None else propose(report, published)
    return dataclasses.replace(report, notes=tuple(_notes(report, found)), recipe=plan)


def _measures(
    report: LayerReport, found: Survey, train: Tensor, test: Tensor, k: int, progress: Progress
) -> tuple[tuple[LayerMeasures, ...], tuple[tuple[tuple[float | None, ...], ...], ...]]:
    """The report's rows, and its alignment."""
    rows, layers, scales, device = [], report.layers, report.guidance_scales, train.device
    labels = found.labels.to(device) if found.labels is not None and report.labelled else None
    alignment = torch.zeros(len(scales), len(layers), len(layers), dtype=torch.float64, device=device)
    for fraction in report.noise_fractions if progress is None else progress(report.noise_fractions, "measures"):
        cells = [found.cells[layer, fraction] for layer in layers]
        students = torch.stack([similarities(cell.pooled(1.0, device)[:_MOST_COMPARED]) for cell in cells])
        for column, (layer, cell) in enumerate(zip(layers, cells, strict=True)):
            for index, scale in enumerate(scales):
                features = cell.pooled(scale, device)
                cka = students @ similarities(features[:_MOST_COMPARED])  # (layers,)
                alignment[index, :, column] += cka / len(report.noise_fractions)
                values: list[float | None] = []
                if not cell.broken:
                    contrast, norm = cell.sizes(scale)
                    values = [contrast if len(scales) > 1 else None, norm, effective_rank(features)]
                    if labels is not None:
                        parts = features[train], labels[train], features[test], labels[test]
                        values += [knn_accuracy(*parts, k), probe_accuracy(*parts)]
                rows.append(LayerMeasures(layer, fraction, scale, *values))
    known = tuple(tuple(tuple(None if v != v else v for v in row) for row in matrix) for matrix in alignment.tolist())
    return tuple(rows), known


def _notes(report: LayerReport, found: Survey) -> list[str]:
    """The first layer with features that are not finite, for each noise fraction; what to mind about conditions."""
    notes = []
    for fraction in report.noise_fractions:
        if broken := [layer for layer in report.layers if found.cells[layer, fraction].broken]:
            notes.append(
                f"Layer {broken[0]!r} gives NaN or infinite features at noise fraction {fraction:g}, for "
                f"{found.cells[broken[0], fraction].broken} of {report.samples} samples; {len(broken)} layers do. "
                "Nothing is measured there. Its weights may be broken, or half precision overflows."
            )
    contrast = max((row.contrast for row in report.rows if row.contrast is not None), default=1.0)
    if len(report.guidance_scales) == 1:
        notes.append("Without null= there is no guidance to measure: the features are those of the condition.")
    elif contrast < NO_CONTRAST:
        notes.append(
            f"Condition and null condition give the same features: |f_c − f_u| / |f_c| is {contrast:.1g} at most, and "
            "guidance would do nothing. The model ignores what null= replaces, null= is no other than the condition, "
            "or the model was hardly trained with it."
        )
    if report.classes == 1:
        notes.append("All labels are the same: there is nothing to tell apart, and accuracies are not measured.")
    elif report.labelled and report.conditioned:
        notes.append(
            "Features of the condition (w = 1 and above) may carry the label because the model was given it; those of "
            "the null condition (w = 0) know it from the image alone."
        )
    return notes


def _published(model: nn.Module, layers: Sequence[str]) -> Recipe | None:
    """The published rule for the model's blocks or, where these are not certain, for the layers as its blocks."""
    for blocks in (None, layers):
        with contextlib.suppress(SettingError):
            return recipe(model, blocks=blocks)
    return None  # fewer layers than the rule needs
