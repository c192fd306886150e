"""A report as a table of text, and as HTML in which every value is escaped."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import NamedTuple

from .proposal import one_error
from .result import LayerReport, Measure


class _Group(NamedTuple):
    """Some columns under one heading; a row of cells for each layer."""

    heading: str
    columns: list[str]
    cells: list[list[str]]


def as_text(report: LayerReport) -> str:
    """Head, tables, notes and proposal, in lines."""
    parts = ["\n".join(_head(report)), *(_text_table(groups) for groups in _tables(report))]
    if report.notes:
        parts.append("\n".join(f"Note: {note}" for note in report.notes))
    if report.recipe is not None:
        parts.append(f"Proposal for {report.recipe}")
    return "\n\n".join(parts)


def _text_table(groups: list[_Group]) -> str:
    columns = []
    for group in groups:
        justify = str.ljust if group is groups[0] else str.rjust
        widths = [max(len(name), *(len(row[i]) for row in group.cells)) + 2 for i, name in enumerate(group.columns)]
        widths[0] += max(0, len(group.heading) + 2 - sum(widths))
        lines = ["".join(map(justify, line, widths)) for line in (group.columns, *group.cells)]
        columns.append([justify(group.heading, sum(widths)), *lines])
    return "\n".join(" ".join(line).rstrip() for line in zip(*columns, strict=True))


def as_html(report: LayerReport) -> str:
    """The same as a fragment of HTML, with every measurement to unfold. Values are escaped."""
    parts = [f"<p>{'<br>'.join(map(_escaped, _head(report)))}</p>", *map(_html_table, _tables(report))]
    if report.notes:
        parts.append("<ul>" + "".join(f"<li>{_escaped(note)}</li>" for note in report.notes) + "</ul>")
    if report.recipe is not None:
        plan = report.recipe
        rows = [[key, str(getattr(plan, key)), reason] for key, reason in plan.reasons.items()]
        parts.append(f"<h3>Proposal for {_escaped(plan.name)}, {plan.depth} blocks</h3>")
        parts.append(f"<table class='plan'><tbody>{''.join(_row('td', row) for row in rows)}</tbody></table>")
        parts.append("<ul>" + "".join(f"<li>{_escaped(note)}</li>" for note in plan.notes) + "</ul>")
    parts.append(_every_row(report))
    return f'<div class="layer-report">{"".join(parts)}</div>'


def _html_table(groups: list[_Group]) -> str:
    top = "".join(f'<th colspan="{len(group.columns)}">{_escaped(group.heading)}</th>' for group in groups)
    names = _row("th", [name for group in groups for name in group.columns])
    lines = zip(*(group.cells for group in groups), strict=True)
    body = "".join(_row("td", [cell for cells in line for cell in cells]) for line in lines)
    return f"<table><thead><tr>{top}</tr>{names}</thead><tbody>{body}</tbody></table>"


def _head(report: LayerReport) -> list[str]:
    fractions = ", ".join(f"{fraction:g}" for fraction in report.noise_fractions)
    head = [
        f"{report.model}: {len(report.layers)} layers on {report.samples:,} samples at noise fractions {fractions}; "
        "means over these"
    ]
    if report.chance is not None:
        head.append(
            f"Accuracies in % on {report.held_out:,} held-out samples of {report.classes} classes: chance "
            f"{100 * report.chance:.1f}, standard error at most {100 * one_error(0.5, report.held_out):.1f}"
        )
    return head


def _tables(report: LayerReport) -> list[list[_Group]]:
    """What the layers are by themselves, and what guidance makes of them."""
    layers, scales = report.layers, report.guidance_scales
    first = scales[0]
    guided = [scale for scale in scales if scale >= 1]
    labelled = report.chance is not None and report.classes != 1

    def column(measure: Measure, scale: float, form: str) -> list[str]:
        return [_shown(report.mean(measure, layer, scale), form) for layer in layers]

    def group(heading: str, columns: dict[str, list[str]]) -> _Group:
        return _Group(heading, list(columns), [list(row) for row in zip(*columns.values(), strict=True)])

    names = group("", {"layer": list(layers)})
    own = {"probe": column("probe", first, "%"), "k-NN": column("knn", first, "%")} if labelled else {}
    own |= {"rank": column("effective_rank", first, ".1f"), "norm": column("norm", first, ".2f")}
    table = [names, group("null condition alone" if first == 0 else "", own)]
    if len(scales) > 1:
        table.append(group("", {"contrast": column("contrast", 1.0, ".3f")}))
    if report.recipe is not None and report.recipe.teacher_layer in layers:
        teacher, scale = report.recipe.teacher_layer, report.recipe.guidance_scale
        scale = scale if scale in scales else 1.0
        row = report.alignment[scales.index(scale)]
        cka = [_shown(student[layers.index(teacher)], ".2f") for student in row]
        table.append(group(f"CKA with {teacher}", {f"at w = {scale:g}": cka}))
    if len(scales) == 1:
        return [table]
    shown = [names]
    if labelled:
        shown.append(group("k-NN at w", {f"{scale:g}": column("knn", scale, "%") for scale in guided}))
    shown.append(group("rank at w", {f"{scale:g}": column("effective_rank", scale, ".1f") for scale in guided}))
    growth = {f"{scale:g}": _growth(report, scale) for scale in guided if scale > 1}
    return [table, [*shown, group("norm at w over that at 1", growth)] if growth else shown]


def _growth(report: LayerReport, scale: float) -> list[str]:
    pairs = [(report.mean("norm", layer, scale), report.mean("norm", layer, 1.0)) for layer in report.layers]
    return [_shown(norm / plain if norm is not None and plain else None, ".2f") for norm, plain in pairs]


def _shown(value: float | None, form: str) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f}" if form == "%" else f"{value:{form}}"


def _every_row(report: LayerReport) -> str:
    names = ["layer", "noise fraction", "w", "contrast", "norm", "rank", "k-NN %", "probe %"]
    rows = [
        [
            row.layer,
            f"{row.noise_fraction:g}",
            f"{row.guidance_scale:g}",
            _shown(row.contrast, ".4f"),
            _shown(row.norm, ".4g"),
            _shown(row.effective_rank, ".2f"),
            _shown(row.knn, "%"),
            _shown(row.probe, "%"),
        ]
        for row in report.rows
    ]
    body = "".join(_row("td", row) for row in rows)
    table = f"<table><thead>{_row('th', names)}</thead><tbody>{body}</tbody></table>"
    return f"<details><summary>All {len(rows)} measurements</summary>{table}</details>"


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{_escaped(cell)}</{tag}>" for cell in cells) + "</tr>"


def _escaped(value: str) -> str:
    return html.escape(value, quote=True)
