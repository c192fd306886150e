r"""Look into a model: which layer sees what, whether guidance has an effect, and which settings that speaks for.

Writes a folder with the table, the numbers as JSON and the pictures. Any checkpoint of the examples is read as it is;
for a model of your own, call `selftrans_reg.layer_report` with it (docs/inspecting.md).

    python examples/inspect_features.py runs/quickstart/stage1.pt --out runs/inspect/stage1
    python examples/inspect_features.py runs/b2/stage1 --out runs/inspect/b2 --device cuda
"""
# ruff: noqa: E402

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from common.options import Mistake, Parser, at_least, run_script


def numbers(text: str) -> list[float]:
    """An argparse type: numbers with commas between."""
    return [float(part) for part in text.split(",")]


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    kinds = "quickstart, sit_imagenet, mmdit_coco, SiT or REPA"
    add("checkpoint", type=Path, help=f"a file of {kinds}, or a run's folder: its newest")
    add("--out", type=Path, default=Path("runs/inspect"), help="folder of the report")
    add("--weights", choices=["ema", "model"], default="ema", help="which of the checkpoint's")
    add("--device", help="of the model (default: cuda where there is one)")

    add = parser.add_argument_group("what is measured").add_argument
    add("--layers", help="names with commas between (default: all blocks)")
    add("--scales", type=numbers, default=[1, 2, 4, 8, 16, 30], help="guidance scales (default: 1,2,4,8,16,30)")
    add("--noise-fractions", type=numbers, default=[0.4, 0.55, 0.7], help="0 is data (default: 0.4,0.55,0.7)")
    add("--samples", type=at_least(8), default=2000, help="how many")
    add("--batch-size", type=at_least(1), default=32, help="doubled by the null condition")
    add("--k", type=at_least(1), default=10, help="nearest neighbours")
    add("--seed", type=int, default=0, help="of the samples and their noise")

    add = parser.add_argument_group("what the checkpoint does not say").add_argument
    add("--data", help="folder of latents, or of features for an MMDiT")
    add("--time", choices=["repa", "sit"], help="what a SiT calls t: repa, t = 1 is noise; sit, t = 1 is data")
    add("--path", choices=["linear", "cosine"], help="of a SiT's file that does not say it")
    add("--vae", help="AutoencoderKL that decodes the pictures: folder or hub name")
    return parser.parse_args(argv)


if __name__ == "__main__":
    options()  # --help and wrong options end here, before the imports below take their seconds

import torch
from common.loading import Checkpoint, mmdit_from_checkpoint, saved_args, sit_from_checkpoint
from common.processes import default_device
from common.run_folder import newest_checkpoint, open_run_folder
from common.samplers import matching_vae, vae_place
from common.training import progress
from common.vae import decode, load_vae, recorded_scaling
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

import selftrans_reg as st
from selftrans_reg.analysis.draw import draw_features, draw_report

MOST_ROWS = 6  # layers in the picture of tokens
PICTURE_SCALES = (0.0, 1.0, 4.0)  # and the proposed one
MOST_PICTURED = 128  # samples that the colours are taken from


class Subject(NamedTuple):
    """A model with all that it takes to measure it.

    Attributes:
        model: On the device, in eval mode.
        batches: Batches of about a size, ``(latents, condition)``: the same each time.
        measured: How `layer_report` and `draw_features` are to call it: time, null, select.
        decode: From latents to images, if there is a VAE.
    """

    model: nn.Module
    batches: Callable[[int], Iterable[Any]]
    measured: dict[str, Any]
    decode: Callable[[Tensor], Tensor] | None


def of_sit(run: argparse.Namespace) -> Subject:
    """A SiT: of `sit_imagenet.py`, `quickstart.py`, of REPA or of the SiT repository."""
    model, found = sit_from_checkpoint(run.checkpoint, weights=run.weights)
    time, path = found.conventions(said_time=run.time, said_path=run.path)
    time = time if path == "linear" else {"repa": "repa-cosine", "sit": "sit-gvp"}[time]
    classes, name = found.settings["num_classes"], run.data or found.args.get("data")
    if name is None or name == "random":
        raise Mistake(f"{run.checkpoint} does not name the latents that it was trained on: pass --data FOLDER.")
    if name != "demo":
        from common.latents import open_latents

        data: Any = open_latents(Path(name), num_classes=classes)
    else:
        from common.demo import digit_latents

        place = vae_place(found.args.get("vae"), run.checkpoint)
        if place is None or not Path(place).is_dir():
            raise Mistake(f"The demo's VAE is not at {place}. Start this where the run was started.")
        data = digit_latents(load_vae(place), place, held_out=True)
    null = {"y": classes} if found.settings["class_dropout_prob"] else None
    return on_data(run, found, model, data, {"time": time, "null": null})


def of_mmdit(run: argparse.Namespace) -> Subject:
    """An MMDiT of `mmdit_coco.py`: captions are no labels, so what needs labels is not measured."""
    from common.coco_features import CocoFeatures

    model, found = mmdit_from_checkpoint(run.checkpoint, weights=run.weights)
    folder = run.data or found.args.get("demo_data") or found.args.get("data")
    if folder is None:
        raise Mistake(f"{run.checkpoint} does not name the features that it was trained on: pass --data FOLDER.")
    data = CocoFeatures(Path(folder), dropout=0.0, second=found.args.get("moments", "std"))
    return on_data(run, found, model, data, {"time": "repa", "null": {"context": data.empty}, "select": 1})


def on_data(
    run: argparse.Namespace, found: Checkpoint, model: nn.Module, data: Any, measured: dict[str, Any]
) -> Subject:
    """A model on the latents that it was trained on, with its run's VAE and log where these are within reach."""
    sizes, trained = found.settings, recorded_scaling(found.args, run.checkpoint)
    if (sizes["in_channels"], sizes["input_size"]) != (data.channels, data.size) or not (
        trained is None or trained.equals(data.scaling)
    ):
        raise Mistake(
            f"{run.checkpoint} was trained on other latents than these.\nFound: {data.channels} channels, {data.size} "
            f"pixels a side, {data.scaling}; trained on {sizes['in_channels']}, {sizes['input_size']} and {trained}.\n"
            "Pass with --data those that it was trained on."
        )
    place = vae_place(found.args.get("vae"), run.checkpoint) or ""
    near = run.vae is not None or Path(place, "config.json").is_file()  # no download for a picture
    vae = matching_vae(run.vae or place, data.scaling, data.channels, run.checkpoint)[0] if near else None

    def decoded(latents: Tensor) -> Tensor:  # grey images as ink on paper
        return (-1 if vae.config.out_channels == 1 else 1) * decode(vae.to(run.device), latents, data.scaling)

    batches = partial(latent_batches, data, run.samples, run.seed)
    return Subject(model.to(run.device), batches, measured, vae and decoded)


def latent_batches(data: Any, samples: int, seed: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Latents as the model sees them, drawn from their posteriors, and conditions: as many at random as are wanted."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data), generator=generator)[:samples]
    for mean, std, condition in DataLoader(Subset(data, order.tolist()), size):
        yield data.scaling.drawn(mean, std, torch.randn(mean.shape, generator=generator)), condition


def measured_report(run: argparse.Namespace, subject: Subject) -> st.LayerReport:
    """The report, saved as JSON and as text."""
    report = st.layer_report(
        subject.model,
        subject.batches(run.batch_size),
        run.layers.split(",") if run.layers else None,
        run.scales,
        noise_fractions=run.noise_fractions,
        samples=run.samples,
        k=run.k,
        seed=run.seed,
        progress=progress,
        **subject.measured,
    )
    (run.out / "report.json").write_text(json.dumps(dataclasses.asdict(report), indent=1), "utf-8")
    (run.out / "report.txt").write_text(f"{report}\n", "utf-8")
    return report


def draw_tokens(run: argparse.Namespace, subject: Subject, report: st.LayerReport) -> None:
    """The picture of the tokens; where there can be none, why."""
    count, scales, proposed = len(report.layers), {*PICTURE_SCALES}, set()
    if report.recipe is not None:
        scales.add(report.recipe.guidance_scale)
        proposed = {report.recipe.student_layer, report.recipe.teacher_layer}
    shown = {report.layers[round(row * (count - 1) / (MOST_ROWS - 1))] for row in range(MOST_ROWS)} | proposed
    try:
        draw_features(
            subject.model,
            next(iter(subject.batches(MOST_PICTURED))),
            run.out / "features.png",
            [layer for layer in report.layers if layer in shown],
            sorted(scales),
            noise_fraction=run.noise_fractions[len(run.noise_fractions) // 2],
            decode=subject.decode,
            seed=run.seed,
            **subject.measured,
        )
    except st.ShapeError as error:
        print(f"Tokens are not drawn: {error}")


def main(argv: Sequence[str] | None = None) -> st.LayerReport:
    """Measure and draw."""
    run = options(argv)
    run.device = default_device(run.device)
    if not run.checkpoint.exists():
        raise Mistake(f"There is no file {run.checkpoint}. Name a checkpoint, or a run's folder.")
    run.checkpoint = newest_checkpoint(run.checkpoint)
    args = saved_args(st.read_checkpoint(run.checkpoint), run.checkpoint)
    subject = of_mmdit(run) if "context_size" in args else of_sit(run)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(run).items()}
    open_run_folder(run.out, {name: value for name, value in settings.items() if name not in ("out", "device")})
    report = measured_report(run, subject)
    draw_report(report, run.out / "report.png")
    draw_tokens(run, subject, report)
    print(f"\n{report}\n\nThe report and its pictures: {run.out}")
    return report


if __name__ == "__main__":
    run_script(main)
