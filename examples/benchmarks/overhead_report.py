"""The results of the benchmark of a step's cost as the tables and the plot of docs/cost.md."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.recording import ROOT, between, table

RESULTS = Path(__file__).parent / "results" / "overhead.jsonl"
COUNTED = ("no method", "stage 1", "stage 2", "released way")


def ratios(result: dict[str, Any]) -> list[tuple[str, float, float, float]]:
    """(variant, measured ratio, counted ratio, measured over counted) of one result."""
    found = result["variants"]
    base = found["no method"]
    rows = []
    for name, values in found.items():
        counted = values["operations"] / base["operations"]
        rows.append((name, values["ratio"], counted, values["ratio"] / counted))
    return rows


def step_table(result: dict[str, Any]) -> str:
    """One result as a Markdown table."""
    peaks = {name: f"{values['peak_bytes'] / 2**30:.2f} GiB" for name, values in result["variants"].items()}
    rows = [[name, *map("{:.2f}".format, numbers), peaks[name]] for name, *numbers in ratios(result)]
    return table(["step", "measured", "counted", "measured / counted", "peak memory"], rows)


def how(result: dict[str, Any]) -> str:
    """In which precision, and whether compiled."""
    precision = "bfloat16 autocast" if result["autocast"] else "float32"
    return f"{precision}{', compiled' if result['compiled'] else ''}"


def glance_table(results: list[dict[str, Any]]) -> str:
    """Stage 2 of every result in one Markdown table."""
    rows = []
    for result in results:
        numbers = {name: numbers for name, *numbers in ratios(result)}["stage 2"]
        where = f"{result['shape']['depth']}, {result['shape']['width']}", how(result), result["hardware"]
        rows.append([result["name"], *where, *map("{:.2f}".format, numbers)])
    header = ["size", "blocks, width", "", "machine", "measured", "counted", "measured / counted"]
    return table(header, rows) + "\n"


def describe(result: dict[str, Any]) -> str:
    """One result with what a reader needs to take it again."""
    shape, size = result["shape"], result["parameters"]
    base = result["variants"]["no method"]["seconds"]
    return (
        f"**{result['name']}**: {shape['depth']} blocks, width {shape['width']}, {shape['tokens_per_side'] ** 2} "
        f"tokens, batch {shape['batch']}, student layer {shape['student']}, teacher layer {shape['teacher']}; "
        f"{how(result)}. {result['hardware']}, PyTorch {result['torch']}, commit {result['commit']}, "
        f"{result['repeats']} repeats, {base * 1000:.0f} ms a step without the method. A `FeatureTap` by itself takes "
        f"{result['tap_seconds'] * 1e6:.0f} µs a call. The truncated teacher keeps "
        f"{size['teacher'] / size['model']:.2f} of the model's parameters.\n\n"
        f"```bash\n{result['command']}\n```\n\n{step_table(result)}\n"
    )


def counted_table(results: list[dict[str, Any]]) -> str:
    """Counted operations at the published sizes, as a Markdown table."""
    rows = []
    for result in results:
        base, *others = (result["variants"][name]["operations"] for name in COUNTED)
        size = result["name"].removeprefix("counted "), f"{result['shape']['depth']}, {result['shape']['width']}"
        rows.append([*size, *(f"{operations / base:.2f}" for operations in others)])
    found = table(["size", "blocks, width", *COUNTED[1:]], rows)
    return f"```bash\n{results[0]['command']}\n```\n\n{found}\n"


def row_table(results: list[dict[str, Any]]) -> str:
    """The variance that sampling rows adds, as a Markdown table."""
    rows = [[f"{r['rows']} of {r['inside']}", f"{r['measured']:.3f}", f"{r['formula']:.3f}"] for r in results]
    first, found = results[0], table(["rows of those inside", "measured", "formula"], rows)
    return (
        "Mean squared distance of the alignment's gradient from that of all rows inside, over the squared norm of the "
        f"latter; {first['repeats']} draws, a model at its start, commit {first['commit']}:\n\n"
        f"```bash\n{first['command']}\n```\n\n{found}\n"
    )


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """The sweep as a picture: measured and counted ratio along each axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    axes: dict[str, Callable[[dict[str, Any]], float]] = {
        "depth": lambda shape: shape["depth"],
        "tokens": lambda shape: shape["tokens_per_side"] ** 2,
        "batch": lambda shape: shape["batch"],
        "window": lambda shape: shape["window"][1] - shape["window"][0],
    }
    labels = {"depth": "blocks", "tokens": "tokens", "batch": "batch", "window": "width of the window"}
    figure, panels = plt.subplots(1, 4, figsize=(13, 3.2), sharey=True, layout="constrained")
    for panel, (axis, value) in zip(panels, axes.items(), strict=True):
        rows = [(value(r["shape"]), *ratios(r)[1][1:3]) for r in results if r["name"] == f"sweep {axis}"]
        x, measured, counted = zip(*sorted(rows), strict=True)
        panel.plot(x, counted, "--", color="0.5", label="counted")
        panel.plot(x, measured, "o-", color="tab:blue", label="measured")
        panel.set_xlabel(labels[axis])
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("stage 2 step / step without")
    panels[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def report(results_file: Path) -> None:
    """Write the latest result of each kind that there is into docs/cost.md, and draw the sweep."""
    latest: dict[str, dict[str, Any]] = {}
    for line in results_file.read_text().splitlines():
        result = json.loads(line)
        kind = [result.get(key) for key in ("name", "shape", "rows", "autocast", "compiled", "hardware")]
        latest[json.dumps(kind)] = result
    found: dict[str, list[dict[str, Any]]] = {"teacher_rows": [], "sweep": [], "counted": [], "step": []}
    for result in latest.values():
        kind = result["name"].split()[0]
        found[kind if kind in found else "step"].append(result)
    found["step"].sort(key=lambda result: (result["parameters"]["model"], result["autocast"], result["compiled"]))
    page = ROOT / "docs" / "cost.md"
    text = page.read_text()
    for part, kind, written in (
        ("glance", "step", glance_table),
        ("overhead", "step", lambda results: "\n".join(map(describe, results))),
        ("counted", "counted", counted_table),
        ("rows", "teacher_rows", row_table),
    ):
        if found[kind]:
            text = between(text, part, written(found[kind]))
    page.write_text(text)
    if found["sweep"]:
        draw(found["sweep"], ROOT / "docs" / "images" / "overhead.png")
