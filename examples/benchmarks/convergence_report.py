"""The convergence study's results as the tables, the plot and the verdict of docs/does-it-work.md."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.convergence_methods import METHODS, STUDIES, Method, parse
from benchmarks.recording import between

Line = dict[str, Any]
Cost = Literal["steps", "operations", "seconds"]

STEPS_GOAL, OPERATIONS_GOAL = 0.6, 0.75  # shares of the plain run in which its final distance should be reached
MAIN = [str(parse(text)) for study in ("reduced", "peers", "questions") for text in STUDIES[study]]
EXTERNAL = "repa"  # the one method that is not self-contained
BEST = "self guidance_scale=8.0 stop=1.0"  # found by the ablations, not fixed beforehand
EXPLORED = (0, 1, 2)  # the seeds that it was found on; what is said of it on any others is a confirmation
CONFIRMED = [str(parse(text)) for text in STUDIES["confirmation"]]
TAUGHT = [*(str(parse(text)) for text in ["self", *STUDIES["price"]]), BEST]
PLOTTED = [*(str(parse(text)) for study in ("reduced", "price") for text in STUDIES[study]), BEST]
NOT_RUN = "None of them has been run yet."
MEASURES = {
    "knn_clean": "k-NN, clean",
    "knn_noisy": "k-NN, noisy",
    "label_seen": "label seen",
    "held_out_loss": "held-out loss",
}


def title(method: Method) -> str:
    """A method in words: ``Self-Transcendence, guidance scale 8``."""
    changed = [part.partition("=") for part in str(method).split()[1:]]
    words = [f"{key.replace('_', ' ')} {value.removesuffix('.0')}" for key, _, value in changed]
    return ", ".join([method.title, *words])


@dataclass(frozen=True)
class Study:
    """The results of one protocol.

    Attributes:
        runs: By method and seed, the line of the run.
        seconds: By method, the parts of its run as (end, seconds of a step).
    """

    name: str
    runs: dict[str, dict[int, Line]]
    seconds: dict[str, list[tuple[int, float]]]

    @classmethod
    def of(cls, lines: Iterable[Line], name: str, *, explored: bool = True) -> Study:
        """The lines of one protocol; a later measurement of the seconds replaces an earlier one, method by method.

        Args:
            lines: Of the results file.
            name: The protocol.
            explored: Whether to take the runs of the seeds that settings were chosen on, or those of all others.
        """
        runs: dict[str, dict[int, Line]] = {}
        seconds: dict[str, list[tuple[int, float]]] = {}
        for line in lines:
            if line["protocol"]["name"] != name:
                continue
            if line["kind"] == "seconds":
                seconds |= line["parts"]
            elif (line["seed"] in EXPLORED) == explored:
                settings = dict(line["method"])
                method = METHODS[settings.pop("name")](**settings)
                runs.setdefault(str(method), {})[line["seed"]] = line
        return cls(name, runs, seconds)

    @property
    def any_line(self) -> Line:
        """A line, for what all have in common."""
        return next(iter(next(iter(self.runs.values())).values()))

    @property
    def steps(self) -> list[int]:
        """Where the runs were judged."""
        return list(self.any_line["protocol"]["evaluate_at"])

    def methods(self, wanted: Iterable[str]) -> list[str]:
        """Those of the methods that were run."""
        return [method for method in wanted if method in self.runs]

    def values(self, method: str, measure: str, step: int, seeds: Iterable[int] | None = None) -> list[float]:
        """A measure at a step, seed by seed."""
        runs = self.runs[method]
        return [
            measures[measure]
            for seed in (sorted(runs) if seeds is None else seeds)
            for measures in runs[seed]["measures"]
            if measures["step"] == step
        ]

    def differences(self, method: str, other: str, step: int) -> list[float]:
        """The distance of one method less that of another at a step, for each seed that both were run with."""
        seeds = sorted(self.runs[method].keys() & self.runs[other].keys())
        pairs = zip(*(self.values(m, "distance", step, seeds) for m in (method, other)), strict=True)
        return [a - b for a, b in pairs]

    def curve(self, method: str, seeds: Iterable[int] | None = None) -> list[float]:
        """The mean distance over the seeds, at each of the steps."""
        return [statistics.mean(self.values(method, "distance", step, seeds)) for step in self.steps]

    def cost(self, method: str, step: float, kind: Cost) -> float | None:
        """What a method has spent by a step, its teacher's run included; None where it was not measured."""
        if kind == "steps":
            return step
        line = next(iter(self.runs[method].values()))
        parts = line["operations"] if kind == "operations" else self.seconds.get(method)
        if parts is None:
            return None
        own = spent(parts, step)
        if line["teacher"] is None:
            return own
        taught_by = line["teacher"]["key"].split(" | ")[1]
        before = self.cost(taught_by, line["teacher"]["steps"], kind)
        return None if before is None else own + before


def spent(parts: Iterable[tuple[int, float]], step: float) -> float:
    """The cost of the steps up to ``step``, from the cost of a step in each part of the run."""
    total, begin = 0.0, 0
    for end, each in parts:
        total += max(0.0, min(step, end) - begin) * each
        begin = end
    return total


def crossing(steps: list[int], distances: list[float], target: float) -> float | None:
    """The step at which a curve first comes down to the target: its logarithm is taken as linear between judgements.

    None if it never does; the first step if it is there already.
    """
    if distances[0] <= target:
        return steps[0]
    for (a, high), (b, low) in pairwise(zip(steps, distances, strict=True)):
        if low <= target:
            return a + (b - a) * math.log(high / target) / math.log(high / low)
    return None


def spread(values: list[float], digits: int, sign: Literal["", "+"] = "") -> str:
    """Mean, and the standard deviation over the seeds where there are several."""
    mean = f"{statistics.mean(values):{sign}.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def distance_table(study: Study, methods: list[str]) -> str:
    """Distance at every judged step."""
    header = ["", "seeds", *(f"{step:,} steps" for step in study.steps)]
    return table(
        header,
        (
            [
                title(parse(m)),
                str(len(study.runs[m])),
                *(spread(study.values(m, "distance", s), 1) for s in study.steps),
            ]
            for m in methods
        ),
    )


def difference_table(study: Study, methods: list[str]) -> str:
    """Distance less that of the plain run of the same seed, at every judged step."""
    rows = (
        [title(parse(m)), *(spread(study.differences(m, "none", step), 1, "+") for step in study.steps)]
        for m in methods
        if m != "none"
    )
    return table(["", *(f"{step:,} steps" for step in study.steps)], rows)


def measure_table(study: Study, methods: list[str]) -> str:
    """The other measures at the end."""
    end = study.steps[-1]
    rows = (
        [
            title(parse(m)),
            *(spread(study.values(m, measure, end), 4 if "loss" in measure else 3) for measure in MEASURES),
        ]
        for m in methods
    )
    return table(["", *MEASURES.values()], rows)


def lead_table(study: Study) -> str:
    """What Self-Transcendence has at a step, when the plain run has it, and what it spent of that one's operations."""
    rows = []
    for method in study.methods(TAUGHT):
        own = study.runs[method].values()
        for step, found in zip(study.steps, study.curve(method), strict=True):
            plain = crossing(study.steps, study.curve("none"), found)
            row = [title(parse(method)), f"{step:,}", f"{found:.1f}"]
            if plain is None:
                rows.append([*row, "later than its end", "", ""])
                continue
            there = study.cost("none", plain, "operations")
            alone = spent(next(iter(own))["operations"], step)
            rows.append([
                *row, f"{plain:,.0f}", f"{alone / there:.2f}", f"{study.cost(method, step, 'operations') / there:.2f}",
            ])  # fmt: skip
    header = ["", "its steps", "distance", "steps of the plain run", "operations, teacher at hand", "operations, all"]
    return table(header, rows)


def price_table(study: Study, methods: list[str]) -> str:
    """What the whole run cost, and where the plain run's final distance was reached, as shares of the plain run."""
    end = study.steps[-1]
    target = study.curve("none")[-1]
    rows = []
    for method in methods:
        at = crossing(study.steps, study.curve(method), target)
        whole = [ratio(study, method, end, kind) for kind in ("operations", "seconds")]
        reached = [
            None if at is None else ratio(study, method, at, kind) for kind in ("steps", "operations", "seconds")
        ]
        rows.append([title(parse(method)), *(share(x) for x in whole), *(share(x) for x in reached)])
    header = ["", "operations", "seconds", "steps to the plain run's end", "operations to it", "seconds to it"]
    return table(header, rows)


def ratio(study: Study, method: str, step: float, kind: Cost) -> float | None:
    """A cost over that of the whole plain run."""
    cost, plain = study.cost(method, step, kind), study.cost("none", study.steps[-1], kind)
    return None if cost is None or plain is None else cost / plain


def share(value: float | None) -> str:
    """A share, or "no" for what was not reached or not measured."""
    return "no" if value is None else f"{value:.2f}"


def ablation_table(study: Study, methods: list[str]) -> str:
    """Variants against Self-Transcendence as it was set beforehand, on the seeds that both were run with."""
    end = study.steps[-1]
    rows = []
    for method in methods:
        seeds = sorted(study.runs[method].keys() & study.runs["self"].keys())
        if not seeds:
            continue
        distances = [spread(study.values(method, "distance", step, seeds), 1) for step in study.steps]
        rows.append(
            [title(parse(method)), str(len(seeds)), *distances, spread(study.differences(method, "self", end), 1, "+")]
        )
    return table(["", "seeds", *(f"{step:,} steps" for step in study.steps), "against the default"], rows)


def verdict(study: Study) -> str:
    """Whether the goal was met, in sentences."""
    own, end = study.curve("self"), study.steps[-1]
    peers = [m for m in study.methods(MAIN) if m != EXTERNAL and not m.startswith(("self", "own-ema"))]
    sentences = []
    for step, found in zip(study.steps, own, strict=True):
        best = min(peers, key=lambda m: statistics.mean(study.values(m, "distance", step)))
        other = statistics.mean(study.values(best, "distance", step))
        sentences.append(
            f"- At {step:,} steps: {found:.2f}; the best of the others is {title(parse(best))}, {other:.2f}: "
            f"{'met' if found < other else 'not met'}. Seed by seed the difference is "
            f"{spread(study.differences('self', best, step), 2, '+')}."
        )
    at = crossing(study.steps, own, study.curve("none")[-1])
    if at is None:
        return "\n".join([*sentences, f"- It does not reach the plain run's final distance in {end:,} steps."])
    for kind, goal in ("steps", STEPS_GOAL), ("operations", OPERATIONS_GOAL):
        needed = ratio(study, "self", at, kind)
        word = "met" if needed <= goal else "not met"
        sentences.append(
            f"- It reaches the plain run's final distance in {needed:.2f} of its {kind}: {word}, the goal was {goal}."
        )
    return "\n".join(sentences)


def confirmation(study: Study) -> str:
    """Distances, differences from the plain run and price, on seeds that nothing was chosen on."""
    methods = study.methods(CONFIRMED)
    if not methods:
        return NOT_RUN
    tables = [make(study, methods) for make in (distance_table, difference_table, price_table)]
    return "\n\n".join([*tables, f"{taken_on(study)} {floor(study)}"])


def origin(study: Study) -> str:
    """What was run and judged, on what, and how good the judge is."""
    p, judge = study.any_line["protocol"], study.any_line["judge"]
    return (
        f"{sum(map(len, study.runs.values()))} runs of {study.steps[-1]:,} steps at batch {p['batch_size']}: "
        f"{p['depth']} blocks of width {p['hidden_size']}, 16 tokens, learning rate {p['lr']:g}, average of decay "
        f"{p['ema_decay']:g}. {p['samples']:,} samples at {p['sampler_steps']} evaluations of the averaged model, "
        f"without guidance. {taken_on(study)}\n\n{floor(study)} All {p['images'][1]:,} have {judge['real_all']:.1f}: "
        "most of the floor comes from the small number, and is the same for every method."
    )


def taken_on(study: Study) -> str:
    """Hardware, PyTorch and commit of the runs."""
    lines = [line for runs in study.runs.values() for line in runs.values()]
    said = {key: ", ".join(sorted({line[key] for line in lines})) for key in ("hardware", "torch", "commit")}
    return f"{said['hardware']}; PyTorch {said['torch']}; commit {said['commit']}."


def floor(study: Study) -> str:
    """How good the judge is, and what it says of real images."""
    p, judge = study.any_line["protocol"], study.any_line["judge"]
    return (
        f"The judge is a classifier, {judge['accuracy']:.3f} right on held-out images. {p['samples']:,} of these, "
        f"which are real, have a distance of {judge['real']:.1f}, and of {judge['real_through_vae']:.1f} once they "
        "went through the VAE: the floor."
    )


def draw(study: Study, path: Path) -> None:
    """Distance against steps, operations and seconds, and its difference from the plain run: means and ranges."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels: dict[Cost, str] = {"steps": "steps", "operations": "operations, 10¹²", "seconds": "seconds"}
    figure, panels = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for panel, (kind, label) in zip(panels.flat[[0, 2, 3]], labels.items(), strict=True):
        panel.set(xlabel=label, ylabel="Fréchet distance", yscale="log")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter("{x:g}")
        for i, method in enumerate(study.methods(PLOTTED)):
            costs = [study.cost(method, step, kind) for step in study.steps]
            if None not in costs:
                x = [cost / 1e12 if kind == "operations" else cost for cost in costs]
                _plot(panel, x, [study.values(method, "distance", step) for step in study.steps], method, i)
        panel.set_xlim(left=0)
    panels[0, 1].set(xlabel="steps", ylabel="distance less that of the plain run")
    for i, method in enumerate(study.methods(PLOTTED)):
        _plot(panels[0, 1], study.steps, [study.differences(method, "none", step) for step in study.steps], method, i)
    for panel in panels.flat:
        panel.grid(alpha=0.3, which="both")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _plot(panel: Any, x: list[float], found: list[list[float]], method: str, i: int) -> None:
    style = "--" if "share" in method else "-"
    mean = [statistics.mean(values) for values in found]
    panel.plot(x, mean, style, marker="o", ms=3.5, color=f"C{i}", label=title(parse(method)))
    panel.fill_between(x, [min(v) for v in found], [max(v) for v in found], color=f"C{i}", alpha=0.15, lw=0)


def write_page(lines: list[Line], root: Path, name: str = "cpu") -> None:
    """Write tables and verdict of a protocol into docs/does-it-work.md, and draw its curves."""
    study = Study.of(lines, name)
    main = study.methods(MAIN)
    ablations = [m for m in study.runs if m == "self" or (m.startswith("self") and m not in MAIN)]
    parts = {
        "origin": origin(study),
        "verdict": verdict(study),
        "distances": distance_table(study, main),
        "differences": difference_table(study, main),
        "measures": measure_table(study, main),
        "price": price_table(study, [*main, *(m for m in study.methods(PLOTTED) if m not in main)]),
        "lead": lead_table(study),
        "ablations": ablation_table(study, ablations) if len(ablations) > 1 else NOT_RUN,
        "confirmation": confirmation(Study.of(lines, name, explored=False)),
    }
    page = root / "docs" / "does-it-work.md"
    text = page.read_text()
    for part, content in parts.items():
        text = between(text, part, content + "\n")
    page.write_text(text)
    draw(study, root / "docs" / "images" / "convergence.png")
