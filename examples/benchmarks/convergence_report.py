"""The convergence study's results as the tables, the picture and the verdict of docs/does-it-work.md.

Everything is paired by seed, and every interval is Student's at 95 %. Operations are counted in plain runs.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

from scipy.special import stdtrit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.convergence_methods import (
    CONFIRMATION_SEEDS,
    LONG_SEEDS,
    SCREEN_SEEDS,
    STUDIES,
    described_method,
    parse,
)  # fmt: skip
from benchmarks.convergence_setting import COOLDOWN, LONG, SHORT
from benchmarks.recording import between, table

Line = dict[str, Any]

EARLIER = "cpu-1"  # the first round: its teachers had their students' seeds
PLOTTED = ["none", "own refresh=250 schedule=linear", "self teacher_width=32 teacher_depth=5"]
MISSING = "not measured"
NOTHING = "Nothing of this has been run yet."
MEASURES = {
    "distance_all": ("distance", 1),
    "kid": ("KID", 1),
    "precision": ("precision", 3),
    "recall": ("recall", 3),
    "label_seen": ("label seen", 3),
    "held_out_loss": ("held-out loss", 4),
}


def title(text: str) -> str:
    """A method in words: ``teacher 48 × 8, rows 0.25``."""
    method = parse(text)
    settings = dict(part.split("=") for part in str(method).split()[1:] if not part.startswith("share="))
    words = [method.title]
    if method.name == "self":
        width, depth, share = (settings.pop(f"teacher_{name}", "") for name in ("width", "depth", "share"))
        own = f"{width} × {depth or SHORT.depth}" if width else "whole"
        words = [f"{method.title} {own}", *([f"{share} of the steps"] if share else [])]
    words += [f"{key.replace('_', ' ')} {value.removesuffix('.0')}" for key, value in settings.items()]
    return ", ".join(words).replace(" True", "")


class Interval(NamedTuple):
    """A mean and the ends of its 95 % interval; both are NaN where one seed gives none, infinite if not reached."""

    mean: float
    low: float
    high: float

    def text(self, digits: int, sign: Literal["", "+"] = "") -> str:
        """``1.23 ± 0.45``."""
        mean = f"{round(self.mean, digits) + 0:{sign}.{digits}f}"  # no -0.0
        return mean if math.isnan(self.high) else f"{mean} ± {self.high - self.mean:.{digits}f}"


def interval(values: list[float]) -> Interval:
    """Student's interval of the mean."""
    mean, n = statistics.mean(values), len(values)
    half = stdtrit(n - 1, 0.975) * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return Interval(mean, mean - half, mean + half)


def crossing(steps: list[int], above: list[float]) -> float:
    """Where a curve first comes down to 0, linear between the steps; infinity if it does not."""
    if above[0] <= 0:
        return steps[0]
    for (a, high), (b, low) in pairwise(zip(steps, above, strict=True)):
        if low <= 0:
            return a + (b - a) * high / (high - low)
    return math.inf


def spent(parts: Iterable[tuple[int, float]], step: float) -> float:
    """The cost of the steps up to ``step``, from the cost of a step in each part of the run."""
    total, begin = 0.0, 0
    for end, each in parts:
        total += max(0.0, min(step, end) - begin) * each
        begin = end
    return total


@dataclass(frozen=True)
class Study:
    """The results of one protocol on some seeds.

    Attributes:
        steps: Length of the plain run.
        runs: By method and seed, the line of the run.
        keys: By key, every run, the teachers' too.
        guidance: By method, seed and scale of guidance in sampling, the measures at the run's end; "1" is without.
        wanted: The seeds that were asked for.
    """

    steps: int
    runs: dict[str, dict[int, Line]]
    keys: dict[str, Line]
    guidance: dict[str, dict[int, dict[str, dict[str, float]]]]
    wanted: Sequence[int]

    @classmethod
    def of(cls, lines: Iterable[Line], name: str, seeds: Sequence[int]) -> Study:
        """The lines of one protocol on these seeds."""
        runs: dict[str, dict[int, Line]] = {}
        guidance: dict[str, dict[int, dict[str, dict[str, float]]]] = {}
        keys, steps = {}, 0
        for line in (line for line in lines if "protocol" in line and line["protocol"]["name"] == name):
            steps = line["protocol"]["steps"]
            method = str(described_method(line["method"]))
            if line["kind"] == "guidance":
                if line["step"] <= steps and line["seed"] in seeds:
                    alone = [m["distance"] for m in runs[method][line["seed"]]["measures"] if m["step"] == line["step"]]
                    known = guidance.setdefault(method, {}).setdefault(line["seed"], {"1": {"distance_all": alone[0]}})
                    known.update(line["guided"])
                continue
            keys[line["key"]] = line
            if line["seed"] in seeds:
                runs.setdefault(method, {})[line["seed"]] = line
        plain_first = sorted(guidance.items(), key=lambda item: item[0] != "none")
        return cls(steps, runs, keys, dict(plain_first), seeds)

    def methods(self, wanted: Iterable[str]) -> list[str]:
        """Those of the methods that were run on a seed that the plain run was run on too, without repetition."""
        found = dict.fromkeys(str(parse(text)) for text in wanted)
        return [method for method in found if method in self.runs and self.seeds(method)]

    def seeds(self, method: str) -> list[int]:
        """The seeds that both the method and the plain run were run with."""
        return sorted(self.runs[method].keys() & self.runs.get("none", {}).keys())

    def judged(self, method: str) -> list[int]:
        """The steps at which every seed was judged."""
        found = [{m["step"] for m in self.runs[method][seed]["measures"]} for seed in self.seeds(method)]
        return sorted(set.intersection(*found))

    def values(self, method: str, measure: str, step: int, seeds: list[int] | None = None) -> list[float]:
        """A measure at a step, seed by seed."""
        lines = [self.runs[method][seed] for seed in (self.seeds(method) if seeds is None else seeds)]
        return [m[measure] for line in lines for m in line["measures"] if m["step"] == step and measure in m]

    def differences(self, method: str, step: int, measure: str = "distance", plain_step: int = 0) -> Interval:
        """A measure at a step, less that of the plain run of the same seed at the same step, or at another."""
        plain = self.values("none", measure, plain_step or step, self.seeds(method))
        return interval([a - b for a, b in zip(self.values(method, measure, step), plain, strict=True)])

    def plain_run(self) -> float:
        """The operations of a plain run."""
        line = next(iter(self.runs["none"].values()))
        return spent(line["operations"], self.steps)

    def teacher_price(self, method: str) -> float:
        """T: what the runs before it cost, in plain runs."""
        total, line = 0.0, self.runs[method][self.seeds(method)[0]]
        while line["teacher"] is not None:
            line = self.keys[line["teacher"]]
            total += spent(line["operations"], math.inf)
        return total / self.plain_run()

    def step_price(self, method: str, step: float) -> float:
        """What the first steps of its own run cost, in plain runs: c · s."""
        return spent(self.runs[method][self.seeds(method)[0]]["operations"], step) / self.plain_run()

    def total(self, method: str, step: float) -> float:
        """T + c · s."""
        return math.inf if math.isinf(step) else self.teacher_price(method) + self.step_price(method, step)

    def reached(self, method: str) -> Interval:
        """The steps to the plain run's final distance.

        At each step the distance is compared with that of the plain run's end, seed by seed; where the mean of these
        differences, and where the ends of its interval, come down to 0 are the step and the ends of its interval.
        """
        steps = self.judged(method)
        goals = self.values("none", "distance", self.steps, self.seeds(method))
        found = [
            interval([d - goal for d, goal in zip(self.values(method, "distance", step), goals, strict=True)])
            for step in steps
        ]
        mean = crossing(steps, [each.mean for each in found])
        if math.isnan(found[0].high):
            return Interval(mean, math.nan, math.nan)
        low, high = (crossing(steps, [getattr(each, end) for each in found]) for end in ("low", "high"))
        return Interval(mean, low, high)


def price_table(study: Study, methods: list[str]) -> str:
    """What everything costs, in plain runs, and what it brings."""
    if not methods:
        return NOTHING
    rows = []
    for method in methods:
        at = study.reached(method)
        end = study.judged(method)[-1]
        costs = [study.total(method, step) for step in at]
        limit = f"> {study.total(method, end):.2f}"
        words = [limit if math.isinf(cost) else f"{cost:.2f}" for cost in costs]
        whole = words[0] if math.isnan(at.high) else f"{words[0]} ({words[1]} to {words[2]})"
        rows.append([
            title(method), str(len(study.seeds(method))), f"{study.teacher_price(method):.2f}",
            f"{study.step_price(method, end) * study.steps / end:.2f}",
            f"> {end / study.steps:.2f}" if math.isinf(at.mean) else f"{at.mean / study.steps:.2f}", whole,
            study.differences(method, study.steps).text(1, "+"),
        ])  # fmt: skip
    header = ["", "seeds", "T", "c", "s", "T + c · s", "distance, equal steps"]
    return table(header, rows)


def distance_table(study: Study, methods: list[str]) -> str:
    """The plain run's distance at every judged step, and how far from it the others of the same seeds are."""
    steps = [step for step in study.judged("none") if step <= study.steps]
    rows = [["plain: distance", *(interval(study.values("none", "distance", s)).text(1) for s in steps)]]
    for method in (each for each in methods if each != "none"):
        known = study.judged(method)
        rows.append(
            [title(method), *(study.differences(method, s).text(1, "+") if s in known else MISSING for s in steps)]
        )
    return table(["", *(f"{step:,}" for step in steps)], rows)


def guided(study: Study, method: str, scale: str, measure: str = "distance_all") -> dict[int, float]:
    """By seed, a measure of samples with guidance of one scale."""
    found = study.guidance.get(method, {}).items()
    return {seed: scales[scale][measure] for seed, scales in found if measure in scales.get(scale, {})}


def best_scale(study: Study, method: str, seeds: Iterable[int]) -> str:
    """The scale at which the mean distance is lowest, of those that all of the seeds have."""
    found = [study.guidance[method][seed] for seed in seeds]
    scales = sorted(set.intersection(*map(set, found)))
    return min(scales, key=lambda scale: statistics.mean(each[scale]["distance_all"] for each in found))


def guided_row(study: Study, method: str, cells: Iterable[tuple[str, str, str]]) -> list[str]:
    """Measures at a scale, each less the plain run's at another; the plain run's as they are."""
    row = [title(method), str(len(study.guidance[method].keys() & study.guidance["none"].keys()))]
    for measure, scale, plain_scale in cells:
        found, plain = guided(study, method, scale, measure), guided(study, "none", plain_scale, measure)
        values = [*found.values()] if method == "none" else [found[s] - plain[s] for s in found if s in plain]
        row.append(interval(values).text(MEASURES[measure][1], "" if method == "none" else "+") if values else MISSING)
    return row


def guidance_table(study: Study) -> str:
    """The plain run's distance with guidance in sampling, and by how much the others differ at the same scale."""
    scales = sorted(
        {scale for seeds in study.guidance.values() for each in seeds.values() for scale in each}, key=float
    )
    cells = [("distance_all", scale, scale) for scale in scales]
    rows = [guided_row(study, method, cells) for method in study.guidance]
    return table(["", "seeds", *scales], rows) if rows else NOTHING


def best_guidance_table(study: Study) -> str:
    """The measures with guidance in sampling, each method's at its own best scale."""
    rows, measures = [], [each for each in MEASURES if each != "held_out_loss"]
    for method in study.guidance:
        scale, plain_scale = (best_scale(study, each, study.guidance[each]) for each in (method, "none"))
        name, seeds, *values = guided_row(study, method, [(each, scale, plain_scale) for each in measures])
        rows.append([name, seeds, scale, *values])
    return table(["", "seeds", "guidance", *(MEASURES[each][0] for each in measures)], rows) if rows else NOTHING


def internal_guidance_table(study: Study) -> str:
    """The distance of Internal Guidance without and with its own guidance in sampling, and the plain run's."""
    rows = []
    for method in study.methods(STUDIES["peers"]):
        end, seeds = study.judged(method)[-1], study.seeds(method)
        if guided := study.values(method, "distance_internally_guided", end):
            values = guided, study.values(method, "distance", end), study.values("none", "distance", study.steps, seeds)
            rows.append([title(method), str(len(seeds)), *(interval(each).text(1) for each in values)])
    return table(["", "seeds", "with its guidance", "without", "plain"], rows) if rows else NOTHING


def end_table(study: Study, methods: list[str]) -> str:
    """Every measure of the large sample at a run's own end: the plain run's, and by how much the others differ."""
    rows = []
    for method in methods:
        end, plain = study.judged(method)[-1], method == "none"
        prices = study.teacher_price(method), study.step_price(method, end)
        row = [title(method), str(len(study.seeds(method))), f"{end:,}", *(f"{price:.2f}" for price in prices)]
        for key, (_, digits) in MEASURES.items():
            alone, differing = study.values(method, key, end), study.differences(method, end, key, study.steps)
            row.append(interval(alone).text(digits) if plain else differing.text(digits, "+"))
        rows.append(row)
    header = ["", "seeds", "steps", "T", "c · s", *(name for name, _ in MEASURES.values())]
    return table(header, rows) if rows else NOTHING


def verdict(study: Study, asked: Iterable[str], criteria: list[Line]) -> str:
    """The criteria, and what became of them on the seeds that nothing was chosen on."""
    said = "".join(f"> {criterion['text']}\n\n" for criterion in criteria)
    sentences = []
    for method in (method for method in study.methods(asked) if method != "none"):
        end = study.judged(method)[-1]
        teacher, run = study.teacher_price(method), study.step_price(method, end)
        found = study.differences(method, end, "distance_all", study.steps)
        word = "met" if run <= 1 and found.high < 0 else "not met"
        where = " where the teacher exists" if teacher + run > 1 else ""
        price = f"{teacher + run:.2f} of the price" + (f", {run:.2f} without its teacher's run" if teacher else "")
        of = f"{len(study.seeds(method))} of {len(study.wanted)} seeds"
        sentences.append(f"- {title(method)}, on {of}: {word}{where}; {found.text(1, '+')} at {price}.")
    for line in (line for line in criteria if "guidance" in line):
        for method, seeds in line["asked"].items():
            ready = [seed for seed in seeds if all(seed in study.guidance.get(each, {}) for each in (method, "none"))]
            if ready:
                best = line["guidance"] == "best"
                scales = [best_scale(study, each, ready) if best else line["guidance"] for each in (method, "none")]
                taught, plain = (guided(study, *each) for each in zip((method, "none"), scales, strict=True))
                found = interval([taught[seed] - plain[seed] for seed in ready])
                at = f"guidance {scales[0]} in sampling" + (f" and {scales[1]} in the plain run's" if best else "")
                word, of = "met" if found.high < 0 else "not met", f"{len(ready)} of {len(seeds)} seeds"
                sentences.append(f"- {title(method)}, {at}, on {of}: {word}; {found.text(1, '+')}.")
    return said + "\n".join(sentences or ["The confirmation has not been run yet: nothing on this page is confirmed."])


def origin(lines: list[Line]) -> str:
    """What was run and judged, on what, and how good the judge is."""
    runs = [line for line in lines if line["kind"] == "run" and line["protocol"]["name"] == SHORT.name]
    p, judge = runs[0]["protocol"], runs[0]["judge"]
    said = {key: ", ".join(sorted({line[key] for line in runs})) for key in ("hardware", "torch", "commit")}
    return (
        f"{len(runs)} runs at batch {p['batch_size']}; the plain one has {p['steps']:,} steps. {p['depth']} blocks of "
        f"width {p['hidden_size']}, 16 tokens, learning rate {p['lr']:g}, average of decay {p['ema_decay']:g}. "
        f"{p['samples']:,} samples at each judgement, {p['final_samples']:,} at the end, from the averaged model at "
        f"{p['sampler_steps']} evaluations without guidance. The judge is a classifier, {judge['accuracy']:.3f} right "
        f"on held-out images; {p['samples']:,} of these have a distance of {judge['real']:.1f}, and of "
        f"{judge['real_through_vae']:.1f} once they went through the VAE. {said['hardware']}; PyTorch {said['torch']}; "
        f"commit {said['commit']}."
    )


def draw(study: Study, methods: list[str], confirmed: Study, path: Path) -> None:
    """Distance against total operations, and what was confirmed at the ends: means and 95 % intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (panel, ends) = plt.subplots(1, 2, figsize=(12, 4.8), width_ratios=(3, 2), layout="constrained")
    for i, method in enumerate(methods):
        steps = study.judged(method)
        x = [study.total(method, step) for step in steps]
        found = [interval(study.values(method, "distance", step)) for step in steps]
        n = len(study.seeds(method))
        panel.plot(
            x, [each.mean for each in found], marker="o", ms=3.5, color=f"C{i}", label=f"{title(method)} (n = {n})"
        )
        if n > 1:
            panel.fill_between(x, [e.low for e in found], [e.high for e in found], color=f"C{i}", alpha=0.15, lw=0)
    goal = statistics.mean(study.values("none", "distance", study.steps))
    panel.axhline(goal, color="0.4", lw=0.8, ls="--")
    panel.axvline(1, color="0.4", lw=0.8, ls="--")
    panel.set(
        xlabel="all operations, the teacher's run included, in plain runs", ylabel="Fréchet distance", yscale="log"
    )
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter("{x:g}")
    panel.set_xlim(left=0)
    panel.grid(alpha=0.3, which="both")
    panel.legend(frameon=False)
    rows = [method for method in confirmed.methods(STUDIES["confirmation"]) if method != "none"]
    for y, method in enumerate(reversed(rows)):
        found = confirmed.differences(method, confirmed.judged(method)[-1], "distance_all", confirmed.steps)
        ends.errorbar(found.mean, y, xerr=found.high - found.mean, fmt="o", color="C0", capsize=4)
        label = f"{title(method)} (n = {len(confirmed.seeds(method))})"
        ends.text(0.02, y + 0.15, label, transform=ends.get_yaxis_transform(), fontsize=9)
    ends.axvline(0, color="0.4", lw=0.8, ls="--")
    ends.set(xlabel="distance less the plain run's, after a cooldown", yticks=[], ylim=(-0.5, len(rows) - 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_page(lines: list[Line], root: Path) -> None:
    """Write tables and verdict into docs/does-it-work.md, and draw its picture."""
    curves = Study.of(lines, "cpu", SCREEN_SEEDS)
    cooled, short = (Study.of(lines, each.name, SCREEN_SEEDS) for each in (COOLDOWN, SHORT))
    confirmed = Study.of(lines, SHORT.name, CONFIRMATION_SEEDS)
    earlier = Study.of(lines, EARLIER, range(SCREEN_SEEDS[0]))
    screened, compared = (study.methods(study.runs) for study in (curves, earlier))
    long = Study.of(lines, LONG.name, LONG_SEEDS)
    criteria = [line for line in lines if line["kind"] == "criterion"][2:]  # no run was made for the first two
    of_long = [line for line in criteria if line.get("size") == LONG.name]
    parts = {
        "origin": origin(lines),
        "verdict": verdict(confirmed, STUDIES["confirmation"], [line for line in criteria if line not in of_long]),
        "long": end_table(long, long.methods(STUDIES["long"])),
        "long-guidance": guidance_table(long),
        "long-best": best_guidance_table(long),
        "long-verdict": verdict(long, [method for line in of_long for method in line["asked"]], of_long),
        "price": price_table(curves, screened),
        "distances": distance_table(curves, screened),
        "measures": end_table(curves, screened),
        "guidance": guidance_table(confirmed),
        "internal": internal_guidance_table(short),
        "cooldown": end_table(cooled, cooled.methods(cooled.runs)),
        "confirmation": end_table(confirmed, confirmed.methods(STUDIES["confirmation"])),
        **{part: end_table(short, short.methods(["none", *STUDIES[part]])) for part in ("screen", "peers", "controls")},
        "earlier": price_table(earlier, compared),
    }
    page = root / "docs" / "does-it-work.md"
    text = page.read_text()
    for part, content in parts.items():
        text = between(text, part, content + "\n")
    page.write_text(text)
    draw(curves, curves.methods(PLOTTED), confirmed, root / "docs" / "images" / "convergence.png")
