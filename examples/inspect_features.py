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
from collections.abc import Callable, Iterator, Sequence
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
from common.loading import mmdit_from_checkpoint, saved_args, sit_from_checkpoint
from common.processes import default_device
from common.run_folder import newest_checkpoint, open_run_folder
from common.samplers import matching_vae, vae_place
from common.training import progress
from common.vae import decode, load_vae
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

import selftrans_reg as st
from selftrans_reg.analysis.draw import draw_features, draw_report

MOST_ROWS = 6  # layers in the picture of tokens
PICTURE_SCALES = (0.0, 1.0, 4.0)  # and the proposed one
MOST_PICTURED = 128  # samples that the colours are taken from
COSINE = {"repa": "repa-cosine", "sit": "sit-gvp"}  # what the library calls a time on the cosine path


class Subject(NamedTuple):
    """A model in eval mode, its latents, how the library is to call it, and how to see latents, if there is a VAE."""

    model: nn.Module
    data: Any
    measured: dict[str, Any]
    decode: Callable[[Tensor], Tensor] | None


def opened(run: argparse.Namespace) -> Subject:
    """A model on the latents that it was trained on, with its run's VAE where it is within reach."""
    mmdit = "context_size" in saved_args(st.read_checkpoint(run.checkpoint), run.checkpoint)
    load = mmdit_from_checkpoint if mmdit else sit_from_checkpoint
    model, found = load(run.checkpoint, weights=run.weights)
    args, place = found.args, vae_place(found.args.get("vae"), run.checkpoint) or ""
    name = run.data or args.get("demo_data" if mmdit else "data") or args.get("data")
    if name in (None, "random"):
        raise Mistake(f"{run.checkpoint} does not name the latents that it was trained on: pass --data FOLDER.")
    data: Any
    if mmdit:
        from common.coco_features import CocoFeatures

        data = CocoFeatures(Path(name), dropout=0.0, second=args.get("moments", "std"))
    elif name == "demo":
        from common.demo import digit_latents

        data = digit_latents(load_vae(place), place, held_out=True)
    else:
        from common.latents import open_latents

        data = open_latents(Path(name), num_classes=found.settings["num_classes"])
    time, path = found.conventions(said_time=run.time, said_path=run.path, scaling=data.scaling)
    measured: dict[str, Any] = {"time": time if path == "linear" else COSINE[time], "null": None}
    if mmdit:  # captions are no labels, so what needs labels is not measured
        measured |= {"null": {"context": data.empty}, "select": 1}
    elif found.settings["class_dropout_prob"]:
        measured["null"] = {"y": found.settings["num_classes"]}
    near = run.vae is not None or Path(place, "config.json").is_file()  # no download for a picture
    vae = matching_vae(run.vae or place, data.scaling, data.channels, run.checkpoint)[0] if near else None

    def decoded(latents: Tensor) -> Tensor:  # grey images as ink on paper
        return (-1 if vae.config.out_channels == 1 else 1) * decode(vae.to(run.device), latents, data.scaling)

    return Subject(model.to(run.device), data, measured, vae and decoded)


def latent_batches(data: Any, samples: int, seed: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Latents as the model sees them, drawn from their posteriors, and conditions: as many at random as are wanted."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data), generator=generator)[:samples]
    for mean, std, condition in DataLoader(Subset(data, order.tolist()), size):
        yield data.scaling.drawn(mean, std, torch.randn(mean.shape, generator=generator)), condition


def main(argv: Sequence[str] | None = None) -> st.LayerReport:
    """Measure and draw."""
    run = options(argv)
    run.device = default_device(run.device)
    if not run.checkpoint.exists():
        raise Mistake(f"There is no file {run.checkpoint}. Name a checkpoint, or a run's folder.")
    run.checkpoint = newest_checkpoint(run.checkpoint)
    model, data, measured, decode = opened(run)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(run).items()}
    open_run_folder(run.out, {name: value for name, value in settings.items() if name not in ("out", "device")})
    report = st.layer_report(
        model,
        latent_batches(data, run.samples, run.seed, run.batch_size),
        run.layers.split(",") if run.layers else None,
        run.scales,
        noise_fractions=run.noise_fractions,
        samples=run.samples,
        k=run.k,
        seed=run.seed,
        progress=progress,
        **measured,
    )
    (run.out / "report.json").write_text(json.dumps(dataclasses.asdict(report), indent=1), "utf-8")
    (run.out / "report.txt").write_text(f"{report}\n", "utf-8")
    draw_report(report, run.out / "report.png")

    count, scales, plan = len(report.layers), {*PICTURE_SCALES}, report.recipe
    shown = {report.layers[round(row * (count - 1) / (MOST_ROWS - 1))] for row in range(MOST_ROWS)}
    if plan is not None:
        scales.add(plan.guidance_scale)
        shown |= {plan.student_layer, plan.teacher_layer}
    draw_features(
        model,
        next(latent_batches(data, run.samples, run.seed, MOST_PICTURED)),
        run.out / "features.png",
        [layer for layer in report.layers if layer in shown],
        sorted(scales),
        noise_fraction=run.noise_fractions[len(run.noise_fractions) // 2],
        decode=decode,
        seed=run.seed,
        **measured,
    )
    print(f"\n{report}\n\nThe report and its pictures: {run.out}")
    return report


if __name__ == "__main__":
    run_script(main)
