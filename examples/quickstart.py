"""Self-Transcendence end to end on real handwritten digits: one command, no download, two CPU cores, a few minutes.

Trains a small VAE and a small classifier, then one SiT three ways from the same initial weights, on the same batches
with the same noise for the same number of steps: as it is (the baseline), with stage 1, and with stage 2, whose
teacher is the stage-1 run. Writes a table, a picture and every checkpoint to ``--out``; what is finished there is not
done again.

    python examples/quickstart.py
"""
# ruff: noqa: E402

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from common.options import Parser, at_least, finite, positive, run_script, within


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; everything but the folder and the device belongs to the run's settings."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/quickstart"), help="folder of the results")
    add("--device", default="cpu", help="as cuda")
    add("--seed", type=at_least(0), default=0, help="of weights, data order and noise")
    add("--steps", type=at_least(1), default=700, help="of each of the three runs")
    add("--batch-size", type=at_least(1), default=16, help="of a step")
    add("--lr", type=positive, default=3e-3, help="high, because the steps are few")
    add("--hidden-size", type=at_least(4), default=96, help="width of the SiT")
    add("--depth", type=at_least(3), default=6, help="its blocks")
    add("--num-heads", type=at_least(1), default=3, help="its attention heads")
    recipe = "(default: what selftrans_reg.recipe says of the model)"
    add("--stage1-layer", help=f"aligned with the latents {recipe}")
    add("--student-layer", help=f"aligned with the teacher {recipe}")
    add("--teacher-layer", help=f"of the stage-1 model {recipe}")
    add("--guidance-scale", type=finite, help=f"of the teacher's features {recipe}")
    add("--weight", type=finite, help=f"of the alignment, in both stages {recipe}")
    add("--stop-fraction", type=within(0, 1), default=0.5, help="of stage 2's steps, after which guidance ends")
    add("--head-features", type=at_least(1), default=256, help="width inside the projection head")
    add("--vae-steps", type=at_least(2), default=150, help="training of the VAE")
    add("--classifier-steps", type=at_least(2), default=300, help="training of the classifier")
    add("--samples", type=at_least(2), default=1000, help="for the Fréchet distance, of each way")
    add("--sampler-steps", type=at_least(1), default=12, help="Euler steps, without guidance")
    return parser.parse_args(argv)


if __name__ == "__main__":
    options()  # --help and wrong options end here, before the imports below take their seconds

from functools import partial
from typing import Any

import numpy as np
import torch
from common.data import NUM_DIGIT_CLASSES, LabelledImages, LatentData, digits
from common.images import save_panels, tile
from common.metrics import accuracy, classifier_features, feature_statistics, frechet_distance, trained_classifier
from common.paths import denoising_loss, interpolate, linear_path
from common.run_folder import finished_or_made, locked, open_run_folder, write_json
from common.samplers import sample_ode
from common.sit import SiT
from common.training import Training, TrainSettings, progress, timed_in_turns, train
from common.vae import DOWNSAMPLING, LATENT_CHANNELS, decode, encode_moments, trained_vae
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor

import selftrans_reg as st
from selftrans_reg.analysis.draw import ColourBasis

IMAGE_SIZE = 32
TIME = "repa"  # t = 1 is noise
WARMUP_STEPS = 50
EMA_DECAY = 0.99  # short, because the steps are few
PICTURE_TIME = 0.5  # the middle of the window
SAMPLE_BATCH = 250
TIMED_ROUNDS = 15
WAYS = {"baseline": "baseline", "stage1": "stage 1", "stage2": "stage 2"}


def grey_to_rgb(images: Tensor) -> Tensor:
    """Images (N, 1, H, W) in [-1, 1] as dark ink on white, (N, H, W, 3) in [0, 1]."""
    return (0.5 - images.permute(0, 2, 3, 1).expand(-1, -1, -1, 3) / 2).clamp(0, 1).cpu()


def new_sit(run: argparse.Namespace) -> SiT:
    """A SiT of 64 tokens; the seed decides its initial weights."""
    torch.manual_seed(run.seed)
    return SiT(**sizes(run)).to(run.device)


def sizes(run: argparse.Namespace) -> dict[str, Any]:
    """The arguments of the SiT."""
    return {
        "input_size": IMAGE_SIZE // DOWNSAMPLING,
        "patch_size": 1,
        "in_channels": LATENT_CHANNELS,
        "hidden_size": run.hidden_size,
        "depth": run.depth,
        "num_heads": run.num_heads,
        "num_classes": NUM_DIGIT_CLASSES,
        "class_dropout_prob": 0.1,
        "learn_sigma": False,
        "qk_norm": False,
    }


def new_teacher(run: argparse.Namespace, checkpoint: Path | None) -> st.CFGFeatureTeacher:
    """The teacher of stage 2: the averaged model of a checkpoint."""
    null = {"y": NUM_DIGIT_CLASSES}
    settings = {"layer": run.teacher_layer, "guidance_scale": run.guidance_scale, "null": null, "time": TIME}
    return st.build_teacher(new_sit(run), checkpoint, **settings)


def criterion_of(
    run: argparse.Namespace, way: str, model: SiT, teacher: st.CFGFeatureTeacher | None = None
) -> st.SelfTransLoss | None:
    """What a way of training adds to the loss; stage 2 has the stage-1 run as its teacher, if no other is given."""
    same = {"time": TIME, "hidden_features": run.head_features, "weight": run.weight}
    if way == "stage1":  # a shallow layer against the clean latents
        return st.SelfTransLoss.stage1(
            model, layer=run.stage1_layer, latent_channels=LATENT_CHANNELS, patch_size=1, **same
        )
    if way == "stage2":  # a layer of a new model against the teacher's guided features
        teacher = teacher or new_teacher(run, run.out / "stage1.pt")
        stop = round(run.stop_fraction * run.steps)
        return st.SelfTransLoss.stage2(model, layer=run.student_layer, teacher=teacher, stop_step=stop, **same)
    return None


def settle(run: argparse.Namespace) -> None:
    """Take the recipe's values where none were given, and build everything once: a wrong one is named at once."""
    model = new_sit(run)
    plan = st.recipe(model)
    for name in ("stage1_layer", "student_layer", "teacher_layer", "guidance_scale", "weight"):
        if getattr(run, name) is None:
            setattr(run, name, getattr(plan, name))
    criterion_of(run, "stage1", model).detach()
    criterion_of(run, "stage2", model, new_teacher(run, checkpoint=None)).detach()


def train_settings(run: argparse.Namespace) -> TrainSettings:
    """Those of all three runs."""
    return TrainSettings(steps=run.steps, lr=run.lr, warmup_steps=WARMUP_STEPS, ema_decay=EMA_DECAY)


def trained(run: argparse.Namespace, way: str, data: LatentData) -> dict[str, Any]:
    """One of the three runs, trained now if it is not there: weights, averaged weights, head, log and settings."""

    def make() -> dict[str, Any]:
        model = new_sit(run)
        criterion = criterion_of(run, way, model)
        batches = data.batches(batch_size=run.batch_size, seed=run.seed)
        torch.manual_seed(run.seed)  # from here on the three draw the same times, noise and dropped labels
        done = train(model, batches, denoising_loss, train_settings(run), criterion=criterion, title=WAYS[way])
        says = {"family": "SiT", "time": TIME, "path": "linear", "prediction": "velocity", "scale_factor": data.scale}
        return {
            "model": model.state_dict(),
            "ema": done.ema.module.state_dict(),
            "criterion": {} if criterion is None else criterion.state_dict(),
            "steps": run.steps,
            "log": done.log,
            "args": {"model": "demo", "vae": "vae", **sizes(run), **says},
        }

    return finished_or_made(run.out / f"{way}.pt", make)


def seconds_per_step(run: argparse.Namespace, data: LatentData) -> dict[str, float]:
    """What a step of each way takes, the three in turns; stage 2's with and without its teacher, by their shares."""

    def make() -> dict[str, Any]:
        trainings = {}
        for way in WAYS:
            model = new_sit(run).train()
            trainings[way] = Training(model, train_settings(run), criterion_of(run, way, model))
        batch = next(data.batches(batch_size=run.batch_size, seed=run.seed))

        def step(training: Training) -> None:
            training.steps = 1  # early, so that stage 2 has its teacher
            training.step(denoising_loss, *batch)

        found = timed_in_turns({way: partial(step, t) for way, t in trainings.items()}, rounds=TIMED_ROUNDS)
        taught = run.stop_fraction
        return found | {"stage2": taught * found["stage2"] + (1 - taught) * found["baseline"]}

    return finished_or_made(run.out / "seconds.pt", make)


def sampled(run: argparse.Namespace, way: str, ema: dict[str, Tensor], vae: AutoencoderKL, labels: Tensor) -> Tensor:
    """Images (N, 1, H, W) of an averaged model, from noise that is the same for all three ways."""

    def make() -> dict[str, Any]:
        model = new_sit(run).eval()
        model.load_state_dict(ema)
        side = IMAGE_SIZE // DOWNSAMPLING
        generator = torch.Generator().manual_seed(run.seed)
        noise = torch.randn(len(labels), LATENT_CHANNELS, side, side, generator=generator).to(run.device)
        chunks = zip(noise.split(SAMPLE_BATCH), labels.to(run.device).split(SAMPLE_BATCH), strict=True)
        latents = [sample_ode(model, x, y, steps=run.sampler_steps) for x, y in progress(list(chunks), "sampling")]
        return {"images": decode(vae, torch.cat(latents)).cpu()}

    return finished_or_made(run.out / f"{way}_samples.pt", make)["images"]


def feature_panels(
    run: argparse.Namespace, checkpoint: dict[str, Any], vae: AutoencoderKL, data: LabelledImages
) -> dict[str, NDArray[np.float32]]:
    """What teacher and student see in nine noisy digits: three principal components of their tokens as colours.

    One basis for all four: the components of f_g over all the given images. The student's tokens pass through its
    projection head, which brings them into the teacher's space.
    """
    teacher, student = new_teacher(run, run.out / "stage1.pt"), new_sit(run).eval()
    student.load_state_dict(checkpoint["ema"])
    criterion = criterion_of(run, "stage2", student, teacher)
    criterion.load_state_dict(checkpoint["criterion"])

    latents = encode_moments(vae, data.images)[0].to(run.device) * vae.config.scaling_factor
    generator = torch.Generator().manual_seed(run.seed)
    noise = torch.randn(latents.shape, generator=generator).to(run.device)
    t = torch.full((len(latents),), PICTURE_TIME, device=run.device)
    x_t, _ = interpolate(linear_path, latents, noise, t)
    y = data.labels.to(run.device)
    f_c, f_u = teacher.pair(x_t, t, y=y)  # (N, T, D)
    with torch.no_grad(), st.FeatureTap(student, run.student_layer) as tap:
        student(x_t, t, y)
        projected = criterion.heads[0](tap.pop())  # (N, T, D)

    rows = torch.stack([(data.labels == label).nonzero()[0, 0] for label in range(9)])
    f_g = teacher.guide(f_c, f_u)
    basis = ColourBasis(f_g)
    guided = f"$f_g = f_u + {run.guidance_scale:g}\\,(f_c - f_u)$"
    return {
        "held-out digits": tile(grey_to_rgb(data.images[rows]), 3, gap=6),
        f"the same at t = {PICTURE_TIME}, decoded": tile(grey_to_rgb(decode(vae, x_t[rows])), 3, gap=6),
        f"teacher's $f_c$ ({run.teacher_layer})": tile(basis.colours(f_c)[rows], 3),
        "teacher's $f_u$": tile(basis.colours(f_u)[rows], 3),
        guided: tile(basis.colours(f_g)[rows], 3),
        f"student ({run.student_layer}), projected": tile(basis.colours(projected)[rows], 3),
    }


def compared(name: str, row: dict[str, float], baseline: dict[str, float]) -> str:
    """One sentence on a way of training against the baseline, whichever is better."""
    change = row["frechet_distance"] / baseline["frechet_distance"] - 1
    verdict = "higher (worse)" if change > 0 else "lower (better)"
    times = row["seconds"] / baseline["seconds"]
    than = f"{abs(change):.0%} {verdict} than the baseline's"
    return f"{name}: distance {than}, at {times:.2f} times its seconds. One seed only."


def report(results: dict[str, Any]) -> str:
    """The results as the script prints them, whoever wins."""
    rows = results["rows"]
    lines = ["", f"{'':<36}{'Fréchet distance':>17}{'label seen':>12}{'s / step':>10}{'s in all':>10}"]
    for name, row in rows.items():
        line = f"{name:<36}{row['frechet_distance']:>17.2f}{row['accuracy']:>12.1%}"
        if "seconds" in row:
            line += f"{row['seconds_per_step']:>10.3f}{row['seconds']:>10.1f}"
        lines.append(line)
    lines += [
        "",
        f"{results['steps']:,} steps and {results['samples']:,} samples each; distances are from the training digits, "
        "in a classifier's features.",
        "Label seen: how often that classifier finds the class that was asked for. Seconds are of training steps, "
        "which were timed in turns; in all, stage 2 includes stage 1.",
    ]
    lines += [compared(WAYS[way], rows[WAYS[way]], rows[WAYS["baseline"]]) for way in ("stage1", "stage2")]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run every phase that is not finished; return what `results.json` holds."""
    run = options(argv)
    settle(run)
    open_run_folder(run.out, {name: value for name, value in vars(run).items() if name not in ("out", "device")})
    with locked(run.out):
        return work(run)


def work(run: argparse.Namespace) -> dict[str, Any]:
    """As `main`, in a folder of its own."""
    begin = time.perf_counter(), time.process_time()
    train_set, held_out = digits(IMAGE_SIZE)
    vae = trained_vae(run.out / "vae", train_set.images, steps=run.vae_steps, seed=run.seed, device=run.device)
    classifier = trained_classifier(
        run.out / "classifier.pt", train_set, steps=run.classifier_steps, seed=run.seed, device=run.device
    )
    mean, std = (moment.to(run.device) for moment in encode_moments(vae, train_set.images))
    data = LatentData(mean, std, train_set.labels.to(run.device), vae.config.scaling_factor)
    reference = feature_statistics(classifier_features(classifier, train_set.images))

    def score(images: Tensor, labels: Tensor) -> dict[str, float]:
        statistics = feature_statistics(classifier_features(classifier, images))
        return {
            "frechet_distance": frechet_distance(reference, statistics),
            "accuracy": accuracy(classifier, images, labels),
        }

    labels = torch.arange(run.samples) % NUM_DIGIT_CLASSES
    runs, samples, rows = {}, {}, {}
    for way in WAYS:
        runs[way] = trained(run, way, data)
        samples[way] = sampled(run, way, runs[way]["ema"], vae, labels)
    per_step = seconds_per_step(run, data)
    for way, name in WAYS.items():
        seconds = run.steps * (per_step[way] + (per_step["stage1"] if way == "stage2" else 0))
        rows[name] = {**score(samples[way], labels), "seconds_per_step": per_step[way], "seconds": seconds}
    through_vae = decode(vae, encode_moments(vae, held_out.images)[0] * vae.config.scaling_factor)
    rows["held-out digits through the VAE"] = score(through_vae, held_out.labels)
    rows["held-out digits: the floor"] = score(held_out.images, held_out.labels)

    top = {name: tile(grey_to_rgb(samples[way][:50]), 10, gap=6) for way, name in WAYS.items()}
    samples_heading = f"Samples after {run.steps} steps: the same noise and the same labels for all three"
    tokens_heading = (
        f"Tokens as colours: three principal components of $f_g$ over {len(held_out.labels)} noisy digits, each map "
        "less its mean at each position. One basis and one range for all four"
    )
    picture = {samples_heading: top, tokens_heading: feature_panels(run, runs["stage2"], vae, held_out)}
    save_panels(picture, run.out / "quickstart.png")
    results = {
        "rows": rows,
        "steps": run.steps,
        "samples": run.samples,
        "this_call": {
            "wall_seconds": time.perf_counter() - begin[0],
            "cpu_seconds": time.process_time() - begin[1],
            "device": run.device,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
    }
    write_json(results, run.out / "results.json")
    print(report(results))
    print(f"This call took {results['this_call']['wall_seconds']:.0f} s. Everything is in {run.out}.")
    return results


if __name__ == "__main__":
    run_script(main)
