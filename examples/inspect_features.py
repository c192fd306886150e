"""Look into a model: which layer sees what, whether guidance has an effect, and which settings that speaks for.

Writes a folder with one page to look at (`index.html`), the table, the numbers as JSON and the pictures. What was
measured there is not measured again. Any checkpoint of the examples is read as it is; a model of your own is made by a
function of yours, and its batches too, as `layer_report` takes them:

    python examples/inspect_features.py runs/quickstart/stage1.pt --out runs/inspect/stage1
    python examples/inspect_features.py runs/b2/vae --out runs/inspect/b2 --device cuda
    python examples/inspect_features.py mine.pt --model my_model:build --data my_data:batches --time sit --null y=1000 \
        --out runs/inspect/mine
"""

import argparse
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from common.inspect_sources import Subject, open_subject
from common.load_sit import newest_checkpoint
from common.options import at_least
from common.report_page import Section, write_page
from common.run_folder import open_run_folder
from common.training import progress

import selftrans_reg as st
from selftrans_reg.analysis.draw import draw_curves, draw_features
from selftrans_reg.errors import ShapeError

MOST_ROWS = 6  # layers in the picture of tokens
PICTURE_SCALES = (0.0, 1.0, 4.0)  # and the proposed one
MOST_PICTURED = 128  # samples that the colours are taken from


def numbers(text: str) -> list[float]:
    """An argparse type: numbers with commas between."""
    return [float(part) for part in text.split(",")]


def token_range(text: str) -> slice:
    """An argparse type: a slice such as ``1:`` or ``0:256``."""
    first, last = text.split(":")
    return slice(int(first) if first else None, int(last) if last else None)


def index_or_key(text: str) -> int | str:
    """An argparse type: an index, or a name."""
    return int(text) if text.lstrip("-").isdecimal() else text


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    kinds = "quickstart, sit_imagenet, mmdit_coco, SiT or REPA"
    add("checkpoint", type=Path, help=f"a file of {kinds}, or of your own with --model; or a run's folder: its newest")
    add("--out", type=Path, default=Path("runs/inspect"), help="folder of the report (default runs/inspect)")
    add("--weights", choices=["ema", "model"], default="ema", help="which of the checkpoint's (default ema)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")

    group = parser.add_argument_group("what is measured").add_argument
    group("--layers", help="names with commas between (default: all blocks)")
    group("--scales", type=numbers, default=[1, 2, 4, 8, 16, 30], help="guidance scales (default 1,2,4,8,16,30)")
    group("--noise-fractions", type=numbers, default=[0.4, 0.55, 0.7], help="0 is data (default 0.4,0.55,0.7)")
    group("--samples", type=at_least(8), default=2000, help="default 2000")
    group("--batch-size", type=at_least(1), default=32, help="doubled by the null condition (default 32)")
    group("--k", type=at_least(1), default=10, help="nearest neighbours (default 10)")
    group("--seed", type=int, default=0)

    group = parser.add_argument_group("what the checkpoint does not say").add_argument
    group("--data", help="folder of latents; with --model module:function, which returns batches")
    group("--time", choices=st.TimeConvention.names(), metavar="NAME", help="what the model calls t, as sit or repa")
    group("--path", choices=["linear", "cosine"], help="of a SiT's file that does not say it")
    group("--vae", help="AutoencoderKL that decodes the pictures: folder or hub name")
    group("--log", type=Path, help="log.jsonl of its training, for the curves")

    group = parser.add_argument_group("a model of your own").add_argument
    group("--model", metavar="MODULE:FUNCTION", help="function of no arguments that builds it")
    group("--null", action="append", metavar="NAME=NUMBER", help="null condition; or module:function that returns it")
    group("--select", type=index_or_key, help="which tensor of a layer's output: an index or a key")
    group("--tokens", type=token_range, metavar="FIRST:LAST", help="which tokens are the image's, as 1:")
    return parser.parse_args(argv)


def measured(run: argparse.Namespace, subject: Subject) -> st.LayerReport:
    """The report: read if it is there, else measured and saved."""
    path = run.out / "report.json"
    if path.exists():
        print(f"{path}: measured before")
        return st.LayerReport.load(path)
    report = st.layer_report(
        subject.model,
        subject.batches(),
        run.layers.split(",") if run.layers else None,
        run.scales,
        noise_fractions=run.noise_fractions,
        samples=run.samples,
        k=run.k,
        seed=run.seed,
        progress=progress,
        **subject.measured,
    )
    report.save(path)
    return report


def pictured_layers(report: st.LayerReport) -> list[str]:
    """Layers evenly over the depth, the proposed ones among them."""
    last = len(report.layers) - 1
    count = min(MOST_ROWS, len(report.layers))
    chosen = {report.layers[round(index * last / max(1, count - 1))] for index in range(count)}
    proposed = (report.recipe.student_layer, report.recipe.teacher_layer) if report.recipe else ()
    return [layer for layer in report.layers if layer in chosen or layer in proposed]


def first_samples(subject: Subject) -> Any:
    """The first batches as one, if they are plain tensors; else the first batch."""
    first, *rest = islice(subject.batches(), MOST_PICTURED)
    if not isinstance(first, tuple | list) or not all(isinstance(part, torch.Tensor) for part in first):
        return first
    count, taken = 0, []
    for batch in (first, *rest):
        taken.append(batch)
        count += len(batch[0])
        if count >= MOST_PICTURED:
            break
    return tuple(torch.cat(parts) for parts in zip(*taken, strict=True))


def token_section(run: argparse.Namespace, subject: Subject, report: st.LayerReport) -> Section:
    """The picture of the tokens; where there can be none, why."""
    scales = PICTURE_SCALES
    if report.recipe is not None:
        scales = tuple(sorted({*scales, report.recipe.guidance_scale}))
    path = run.out / "features.png"
    try:
        draw_features(
            subject.model,
            first_samples(subject),
            path,
            pictured_layers(report),
            scales,
            noise_fraction=run.noise_fractions[len(run.noise_fractions) // 2],
            decode=subject.decode,
            seed=run.seed,
            **subject.measured,
        )
    except ShapeError as error:
        return Section("Tokens as colours", f"Not drawn: {error}")
    return Section("Tokens as colours", "Rows are layers, columns are guidance scales.", picture=path)


def main(argv: Sequence[str] | None = None) -> st.LayerReport:
    """Measure, draw, and write the page."""
    run = options(argv)
    if run.checkpoint.is_dir():
        run.checkpoint = newest_checkpoint(run.checkpoint)
    subject = open_subject(run)
    settings = {
        name: str(value) if isinstance(value, Path | slice) else value
        for name, value in vars(run).items()
        if name not in ("out", "device")
    }
    open_run_folder(run.out, settings)
    report = measured(run, subject)
    text = str(report)
    (run.out / "report.txt").write_text(text + "\n", "utf-8")
    report.draw(run.out / "report.png")
    sections = [
        Section("Layers and guidance scales", fragment=report._repr_html_()),
        Section("Over the layers", picture=run.out / "report.png"),
        token_section(run, subject, report),
    ]
    if subject.log:
        draw_curves(subject.log, run.out / "curves.png")
        sections.append(Section("Training", picture=run.out / "curves.png"))
    write_page(run.out / "index.html", subject.title, sections)
    print(f"\n{text}\n\nThe page to look at: {run.out / 'index.html'}")
    return report


if __name__ == "__main__":
    main()
