"""From a report to a recipe: which layers and which scale the measurements speak for, and where they do not tell.

Heuristics, each named in the reasons that it gives. The published rule holds unless something measured contradicts it:

- teacher layer: the one that knows the labels best, of the image alone where there is a null condition;
- student layer: one before it that knows them less, so that there is something to learn, and none before stage 1's;
- guidance scale: the smallest whose guided features fall into classes as well as those of any.
"""

from __future__ import annotations

import dataclasses
import itertools

from ..recipes import Recipe
from .report import LayerReport
from .scores import standard_error

# Below this part of |f_c| a difference is rounding, in bfloat16 too, or as good as none.
NO_CONTRAST = 1e-2


def propose(report: LayerReport, published: Recipe) -> Recipe:
    """The published plan with the layers and the scale that the report speaks for, each with its reason."""
    first = report.guidance_scales[0]
    start = report.layers.index(published.stage1_layer) if published.stage1_layer in report.layers else 0
    scores = {layer: report.mean("probe", layer, first) for layer in report.layers[start:]}
    known = {layer: score for layer, score in scores.items() if score is not None}  # in order of depth
    told = report.conditioned and first != 0  # a probe finds the label that the model was told
    teacher, why_teacher = _teacher(report, published, known, told)
    student, why_student = _student(report, published, {} if told else known, teacher)
    scale, why_scale = _scale(report, published, teacher)
    heuristic = (
        f"Student layer, teacher layer and guidance scale are heuristics on {report.samples:,} samples of one "
        "checkpoint, not results of training; the rest is the published rule. Measurable are two standard errors."
    )
    reasons = {"student_layer": why_student, "teacher_layer": why_teacher, "guidance_scale": why_scale}
    return dataclasses.replace(
        published,
        student_layer=student,
        teacher_layer=teacher,
        guidance_scale=scale,
        reasons=published.reasons | reasons,
        notes=(heuristic, *published.notes),
    )


def _teacher(report: LayerReport, published: Recipe, scores: dict[str, float], told: bool) -> tuple[str, str]:
    # The first has none before it that it could teach.
    candidates = {layer: x for layer, x in scores.items() if layer not in (report.layers[0], published.stage1_layer)}
    best = max(candidates.values(), default=0.0)
    least, rule, held = _least(best, report), published.reasons["teacher_layer"], published.teacher_layer
    obstacles = {
        "no labels to tell apart": not report.labelled,
        "without null= the condition may tell the label": told,
        "no layer behind stage 1's is finite at every noise fraction": not candidates,
        f"no layer tells the labels apart, best {_probe(report, best)}": least < (report.chance or 0.0),
    }
    if why := [obstacle for obstacle, there in obstacles.items() if there]:
        return held, f"not measured, {why[0]}: {rule}"
    if candidates.get(held, -1.0) >= least:
        return held, f"{rule}; {_probe(report, candidates[held])}, no layer is measurably above it"
    layer = next(layer for layer, score in candidates.items() if score >= least)
    found = _probe(report, candidates[layer])
    return layer, f"measured: {found}, the first that is not measurably below the best, {best:.0%}"


def _student(report: LayerReport, published: Recipe, scores: dict[str, float], teacher: str) -> tuple[str, str]:
    rule, held = published.reasons["student_layer"], published.student_layer
    before = list(itertools.takewhile(lambda layer: layer != teacher, scores))
    if teacher not in scores or not before:
        return held, f"not measured: {rule}"
    behind = [layer for layer in before if scores[layer] < _least(scores[teacher], report)]
    layer = held if held in (behind or before) else (behind or before)[-1]
    found = _probe(report, scores[layer])
    if layer == held:
        return held, f"{rule}; {found}, {'' if behind else 'not '}measurably below {teacher}"
    if behind:
        return layer, f"measured: {found}, the last before {teacher} that is measurably below it"
    return layer, f"the layer before {teacher}: the published one is not before it, and none is measurably below"


def _scale(report: LayerReport, published: Recipe, teacher: str) -> tuple[float, str]:
    scales = [scale for scale in report.guidance_scales if scale >= 1 and teacher in report.layers]
    contrast = report.mean("contrast", teacher, 1.0) if scales else None
    known = {scale: knn for scale in scales if (knn := report.mean("knn", teacher, scale)) is not None}
    best = max(known.values(), default=0.0)
    scale = next((scale for scale, knn in known.items() if knn >= _least(best, report)), 1.0)
    if contrast is None:
        why = "not measured"
    elif contrast < NO_CONTRAST:
        why = f"not measurable, no contrast at {teacher} ({contrast:.1g})"
    elif not known:
        why = "not measurable without labels"
    elif scale == 1:
        why = f"not told apart, k-NN of f_g is {known[1]:.0%} at w = 1 and not measurably higher above"
    else:
        why = f"the first that is not measurably below the best, {best:.0%}; {known[1]:.0%} at w = 1"
        return scale, f"measured: k-NN of f_g {known[scale]:.0%}, {why}"
    return published.guidance_scale, f"{why}: {published.reasons['guidance_scale']}"


def _least(accuracy: float, report: LayerReport) -> float:
    """What is not measurably below an accuracy: two standard errors."""
    return accuracy - 2 * standard_error(accuracy, report.held_out)


def _probe(report: LayerReport, score: float) -> str:
    return f"probe{' of f_u' if report.guidance_scales[0] == 0 else ''} {score:.0%}"
