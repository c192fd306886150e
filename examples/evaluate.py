"""How far images are from the data: Fréchet distance with its spread, precision and recall, in features that you name.

The second form samples every checkpoint of some runs as `sample.py` does, and draws the distance against the steps.
What is finished in ``--out`` is not done again: as the runs go on, the same command adds their new checkpoints.

    python examples/evaluate.py --samples samples/sit --reference data/images --features inception
    python examples/evaluate.py --run runs/baseline runs/stage2 --out runs/curve --reference digits --features digits
"""
# ruff: noqa: E402

import argparse
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.options import Parser, add_sampling_options, run_script


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--samples", type=Path, help="a folder of images, such as that of sample.py, or an .npz")
    what.add_argument("--run", type=Path, nargs="+", help="runs' folders: each checkpoint is sampled and measured")
    add = parser.add_argument
    add("--out", type=Path, help="folder of the samples, results and curve of --run")
    add("--reference", required=True, help="the data: a folder of images, an .npz, or 'digits'")
    add("--statistics", type=Path, help="file of the reference's statistics: written, or read if there")
    add(
        "--features",
        required=True,
        help="'inception', by torch-fidelity; module:callable; or 'digits', a small classifier of them",
    )
    add_sampling_options(parser)
    run = parser.parse_args(argv)
    if (run.run is None) != (run.out is None):
        parser.error("--run and --out belong together")
    if run.run is not None and len({path.name for path in run.run}) < len(run.run):
        parser.error("the folders of --run need different names")
    return run


if __name__ == "__main__":
    options()  # --help and wrong options end here, before the imports below take their seconds

import sample
from common.data_files import read_json
from common.images import ImageSet
from common.metrics import (
    Extractor,
    Reference,
    evenly,
    extractor_named,
    feature_statistics,
    frechet_distance,
    frechet_spread,
    precision_recall,
    reference_of,
)
from common.processes import Processes, default_device
from common.run_folder import checkpoints_of, open_run_folder, write_json, write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure


BOOTSTRAP_DRAWS = 20
WIDTHS = {"frechet_distance": 19, "spread": 9, "precision": 11, "recall": 9}  # of the table's columns
MARKERS = "os^Dv"  # hollow, so that of two curves in one place both are seen

Row = dict[str, Any]


def measured(run: argparse.Namespace, images: ImageSet, extractor: Extractor, reference: Reference) -> Row:
    """Distance, spread, precision and recall of a set of images."""
    features = extractor.of(images, run.batch_size)
    return {
        "samples": len(features),
        "frechet_distance": frechet_distance(reference.statistics, feature_statistics(features)),
        "spread": frechet_spread(reference.statistics, features, draws=BOOTSTRAP_DRAWS),
        **precision_recall(reference.features, features[evenly(len(features))])._asdict(),
    }


def report(rows: dict[str, Row], extractor: Extractor, reference: Reference) -> str:
    """The rows as a table, and what they are."""
    lines = ["", f"{'':<24}{'images':>9}{'Fréchet distance':>19}{'spread':>9}{'precision':>11}{'recall':>9}"]
    for name, row in rows.items():
        cells = [f"{row[key]:>{width}.3f}" for key, width in WIDTHS.items()]
        lines.append(f"{name:<24}{row['samples']:>9,}{''.join(cells)}")
    lines += [
        "",
        f"Features: {extractor.name}. Reference: {reference.count:,} images. "
        f"Spread: over {BOOTSTRAP_DRAWS} bootstrap draws.",
        "Distances are comparable at one number of images, in one extractor's features only.",
    ]
    return "\n".join(lines)


def curve(run: argparse.Namespace, folder: Path, extractor: Extractor, reference: Reference) -> dict[str, Row]:
    """A row for each checkpoint of a run, by its steps; those that are finished are read.

    Trainers keep their newest checkpoints: what was measured before a checkpoint was removed stays in the curve.
    """
    scores = run.out / "scores" / folder.name
    scores.mkdir(parents=True, exist_ok=True)
    for checkpoint in checkpoints_of(folder):
        out = run.out / "samples" / folder.name / checkpoint.stem
        # The samples are opened even when the score is there: weights under the name of others would be found.
        npz = sample.sample(argparse.Namespace(**vars(run) | {"checkpoint": checkpoint, "out": out}), Processes())
        path = scores / f"{checkpoint.stem}.json"
        if not path.exists():
            write_json(measured(run, ImageSet(npz), extractor, reference), path)
    finished = sorted(scores.glob("*.json"), key=lambda path: int(path.stem))
    return {path.stem: read_json(path) for path in finished}


def drawn_curves(curves: dict[str, dict[str, Row]]) -> "Figure":
    """Distance against steps, with bars of two spreads on either side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for (name, rows), marker in zip(curves.items(), cycle(MARKERS), strict=False):
        steps = [int(step) for step in rows]
        distances, spreads = ([row[key] for row in rows.values()] for key in ("frechet_distance", "spread"))
        bars = [2 * spread for spread in spreads]
        axes.errorbar(steps, distances, bars, marker=marker, ms=7, mfc="none", lw=1.2, capsize=3, label=name)
    samples = max(row["samples"] for rows in curves.values() for row in rows.values())
    axes.set(xlabel="training steps", ylabel=f"Fréchet distance, {samples:,} samples", xlim=(0, None))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def main(argv: Sequence[str] | None = None) -> dict[str, Row]:
    """Measure the samples, or the runs' checkpoints; return the table's rows."""
    run = options(argv)
    run.device = default_device(run.device)
    extractor = extractor_named(run.features, run.device)
    data = ImageSet(run.reference)
    if run.samples is not None:
        images = ImageSet(run.samples)
        reference = reference_of(data, run.statistics, extractor, batch_size=run.batch_size)
        rows = {run.samples.name: measured(run, images, extractor, reference)}
    else:
        apart = {"run", "out", "samples", "device", "batch_size"}
        settings = {name: value for name, value in vars(run).items() if name not in apart}
        statistics = None if run.statistics is None else str(run.statistics)
        open_run_folder(run.out, settings | {"features": extractor.name, "statistics": statistics})
        path = run.statistics or run.out / "statistics.npz"
        reference = reference_of(data, path, extractor, batch_size=run.batch_size)
        curves = {folder.name: curve(run, folder, extractor, reference) for folder in run.run}
        write_json(curves, run.out / "results.json")
        figure = drawn_curves(curves)
        write_whole(run.out / "distance.png", lambda file: figure.savefig(file, dpi=120, format="png"))
        rows = {f"{name} {int(step):,}": row for name, found in curves.items() for step, row in found.items()}
        print(f"Everything is in {run.out}; look at distance.png, and at the samples.")
    print(report(rows, extractor, reference))
    return rows


if __name__ == "__main__":
    run_script(main)
