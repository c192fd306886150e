"""From a report to a recipe: which layers and which scale the measurements speak for, and where they do not tell.

Heuristics, each named in the reasons that it gives. The published rule holds unless something measured contradicts it:

- teacher layer: the one that knows the labels best, of the image alone where there is a null condition;
- student layer: one before it that knows them less, so that there is something to learn, and none before stage 1's;
- guidance scale: the smallest whose guided features fall into classes as well as those of any.
"""

from __future__ import annotations

import dataclasses

from ..recipes import Recipe
from .report import LayerReport
from .scores import standard_error

# Below this part of |f_c| a difference is rounding, in bfloat16 too, or as good as none.
NO_CONTRAST = 1e-2
# Targets of the default distance, a squared error, grow by its square.
_MUCH_LARGER = 4.0


def propose(report: LayerReport, published: Recipe) -> Recipe:
    """The published plan with the layers and the scale that the report speaks for, each with its reason."""
    teacher, why_teacher = _teacher(report, published)
    student, why_student = _student(report, published, teacher)
    scale, why_scale = _scale(report, published, teacher)
    reasons = {"student_layer": why_student, "teacher_layer": why_teacher, "guidance_scale": why_scale}
    notes = [
        f"Student layer, teacher layer and guidance scale are heuristics on {report.samples:,} samples of one "
        "checkpoint, not results of training; the rest is the published rule. Measurable are two standard errors.",
        *_size_notes(report, teacher, scale),
        *published.notes,
    ]
    return dataclasses.replace(
        published,
        student_layer=student,
        teacher_layer=teacher,
        guidance_scale=scale,
        reasons=published.reasons | reasons,
        notes=tuple(notes),
    )


def _teacher(report: LayerReport, published: Recipe) -> tuple[str, str]:
    scores, rule = _recognition(report), published.reasons["teacher_layer"]
    # The first layer has none before it that it could teach.
    candidates = {layer: score for layer, score in scores.items() if layer != report.layers[0]}
    if not candidates:
        why = "no layer but the first is finite at every noise fraction"
        if report.classes in (None, 1):
            why = "no labels to tell apart"
        elif report.conditioned and report.guidance_scales[0] != 0:
            why = "without null= the condition may tell the label"
        return published.teacher_layer, f"not measured, {why}: {rule}"
    assert report.chance is not None
    best = max(candidates.values())
    margin = _margin(best, report)
    if best < report.chance + margin:
        why = f"no layer tells the labels apart, best {_source(report)} {best:.0%}"
        return published.teacher_layer, f"not measured, {why}: {rule}"
    held = candidates.get(published.teacher_layer)
    if held is not None and held >= best - margin:
        return published.teacher_layer, f"{rule}; {_source(report)} {held:.0%}, no layer is measurably above it"
    layer = next(layer for layer, score in candidates.items() if score >= best - margin)
    why = f"the first that is not measurably below the best, {best:.0%}"
    return layer, f"measured: {_source(report)} {candidates[layer]:.0%}, {why}"


def _student(report: LayerReport, published: Recipe, teacher: str) -> tuple[str, str]:
    scores, rule = _recognition(report), published.reasons["student_layer"]
    first, last = (report.layers.index(x) if x in report.layers else 0 for x in (published.stage1_layer, teacher))
    before = [layer for layer in report.layers[first:last] if layer in scores]
    if teacher not in scores or not before:
        return published.student_layer, f"not measured: {rule}"
    behind = [layer for layer in before if scores[layer] < scores[teacher] - _margin(scores[teacher], report)]
    held = published.student_layer
    if held in before and (held in behind or not behind):
        there = f"{'measurably below' if behind else 'not measurably below'} {teacher}"
        return held, f"{rule}; {_source(report)} {scores[held]:.0%}, {there}"
    if behind:
        why = f"the last before {teacher} that is measurably below it"
        return behind[-1], f"measured: {_source(report)} {scores[behind[-1]]:.0%}, {why}"
    return before[-1], f"the layer before {teacher}: the published one is not before it, and none is measurably below"


def _scale(report: LayerReport, published: Recipe, teacher: str) -> tuple[float, str]:
    rule = published.reasons["guidance_scale"]
    contrast = report.mean("contrast", teacher, 1.0) if teacher in report.layers else None
    if contrast is None:
        return published.guidance_scale, f"not measured: {rule}"
    if contrast < NO_CONTRAST:
        return published.guidance_scale, f"not measurable, no contrast at {teacher} ({contrast:.1g}): {rule}"
    found = {scale: report.mean("knn", teacher, scale) for scale in report.guidance_scales if scale >= 1}
    known = {scale: accuracy for scale, accuracy in found.items() if accuracy is not None}
    if not known:
        return published.guidance_scale, f"not measurable without labels: {rule}"
    best = max(known.values())
    margin = _margin(best, report)
    scale = next(scale for scale, accuracy in known.items() if accuracy >= best - margin)
    if scale == 1:
        why = f"k-NN of f_g is {known[1]:.0%} at w = 1 and not measurably higher above"
        return published.guidance_scale, f"not told apart, {why}: {rule}"
    why = f"the first that is not measurably below the best, {best:.0%}; {known[1]:.0%} at w = 1"
    return scale, f"measured: k-NN of f_g {known[scale]:.0%}, {why}"


def _margin(accuracy: float, report: LayerReport) -> float:
    """What is measurable: two standard errors."""
    return 2 * standard_error(accuracy, report.held_out)


def _recognition(report: LayerReport) -> dict[str, float]:
    """Each layer's probe accuracy by the image alone, in order of depth."""
    if report.conditioned and report.guidance_scales[0] != 0:
        return {}
    found = {layer: report.mean("probe", layer, report.guidance_scales[0]) for layer in report.layers}
    return {layer: score for layer, score in found.items() if score is not None}


def _source(report: LayerReport) -> str:
    return "probe of f_u" if report.guidance_scales[0] == 0 else "probe"


def _size_notes(report: LayerReport, teacher: str, scale: float) -> list[str]:
    """What the guided features' size and rank at the proposed scale give to mind, if that was measured."""
    if teacher not in report.layers or scale not in report.guidance_scales:
        return []
    notes = []
    norm, rank = (report.mean(measure, teacher, scale) for measure in ("norm", "effective_rank"))
    plain, plain_rank = (report.mean(measure, teacher, 1.0) for measure in ("norm", "effective_rank"))
    if norm and plain and norm > _MUCH_LARGER * plain:
        notes.append(
            f"At w = {scale:g} the targets of {teacher} are {norm / plain:.1f} times as long as f_c, and the default "
            "distance is a squared error: distance='cosine' or a smaller scale may suit better."
        )
    if rank and plain_rank and rank < plain_rank / 2:
        notes.append(f"At w = {scale:g} the effective rank at {teacher} is {rank:.1f}, against {plain_rank:.1f} at 1.")
    return notes
