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

from common.options import Parser, at_least, run_script


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; everything but the folder and the device belongs to the run's settings."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/quickstart"), help="folder of the results")
    add("--device", default="cpu", help="as cuda")
    add("--seed", type=at_least(0), default=0, help="of weights, data order and noise")
    add("--steps", type=at_least(1), default=700, help="of each of the three runs")
    add("--hidden-size", type=at_least(4), default=96, help="width of the SiT, a multiple of 12")
    add("--depth", type=at_least(3), default=6, help="its blocks; selftrans_reg.recipe chooses among them")
    add("--head-features", type=at_least(1), default=256, help="width inside the projection head")
    add("--vae-steps", type=at_least(2), default=150, help="training of the VAE")
    add("--classifier-steps", type=at_least(2), default=300, help="training of the classifier")
    add("--samples", type=at_least(2), default=1000, help="for the Fréchet distance, of each way")
    add("--sampler-steps", type=at_least(1), default=12, help="Euler steps, without guidance")
    return parser.parse_args(argv)


if __name__ == "__main__":
    options()  # --help and wrong options end here, before the imports below take their seconds

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
from common.training import TrainSettings, progress, train
from common.vae import DOWNSAMPLING, LATENT_CHANNELS, decode, encode_moments, trained_vae
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor

import selftrans_reg as st
from selftrans_reg.analysis.draw import ColourBasis

IMAGE_SIZE = 32
TIME = "repa"  # t = 1 is noise
BATCH_SIZE = 16
LEARNING = {"lr": 3e-3, "warmup_steps": 50, "ema_decay": 0.99}  # fast and short, because the steps are few
PICTURE_TIME = 0.5  # the middle of the window
SAMPLE_BATCH = 250
WAYS = {"baseline": "baseline", "stage1": "stage 1", "stage2": "stage 2"}


def grey_to_rgb(images: Tensor) -> Tensor:
    """Images (N, 1, H, W) in [-1, 1] as dark ink on white, (N, H, W, 3) in [0, 1]."""
    return (0.5 - images.permute(0, 2, 3, 1).expand(-1, -1, -1, 3) / 2).clamp(0, 1).cpu()


def sizes(run: argparse.Namespace) -> dict[str, Any]:
    """The arguments of the SiT, which has 64 tokens."""
    return {
        "input_size": IMAGE_SIZE // DOWNSAMPLING, "patch_size": 1, "in_channels": LATENT_CHANNELS,
        "hidden_size": run.hidden_size, "depth": run.depth, "num_heads": 3, "num_classes": NUM_DIGIT_CLASSES,
        "class_dropout_prob": 0.1, "learn_sigma": False, "qk_norm": False,
    }  # fmt: skip


def new_sit(run: argparse.Namespace) -> SiT:
    """A SiT; the seed decides its initial weights."""
    torch.manual_seed(run.seed)
    return SiT(**sizes(run)).to(run.device)


def new_teacher(run: argparse.Namespace) -> st.CFGFeatureTeacher:
    """The teacher of stage 2: the averaged model of the stage-1 run."""
    model = new_sit(run)
    null = {"y": NUM_DIGIT_CLASSES}
    return st.build_teacher(model, run.out / "stage1.pt", **st.recipe(model).teacher(), null=null, time=TIME)


def criterion_of(
    run: argparse.Namespace, way: str, model: SiT, teacher: st.CFGFeatureTeacher | None = None
) -> st.SelfTransLoss | None:
    """What a way of training adds to the loss; layers, weight and scale are the recipe's for the depth."""
    plan, same = st.recipe(model), {"time": TIME, "hidden_features": run.head_features}
    if way == "stage1":  # a shallow layer against the clean latents
        return st.SelfTransLoss.stage1(model, **plan.stage1(), latent_channels=LATENT_CHANNELS, patch_size=1, **same)
    if way == "stage2":  # a layer of a new model against the teacher's guided features, in the first half of the steps
        settings = plan.stage2() | {"stop_step": round(run.steps / 2)} | same
        return st.SelfTransLoss.stage2(model, teacher=teacher or new_teacher(run), **settings)
    return None


def trained(run: argparse.Namespace, way: str, data: LatentData) -> dict[str, Any]:
    """One of the three runs, trained now if it is not there: weights, averaged weights, head, log and settings."""

    def make() -> dict[str, Any]:
        model = new_sit(run)
        criterion = criterion_of(run, way, model)
        batches = data.batches(batch_size=BATCH_SIZE, seed=run.seed)
        torch.manual_seed(run.seed)  # from here on the three draw the same times, noise and dropped labels
        settings = TrainSettings(steps=run.steps, **LEARNING)
        done = train(model, batches, denoising_loss, settings, criterion=criterion, title=WAYS[way])
        says = {"family": "SiT", "time": TIME, "path": "linear", "prediction": "velocity", "scale_factor": data.scale}
        return {
            "model": model.state_dict(),
            "ema": done.ema.module.state_dict(),
            "criterion": {} if criterion is None else criterion.state_dict(),
            "steps": run.steps,
            "log": done.log,
            "args": {"model": "demo", "data": "demo", "vae": "vae", **sizes(run), **says},
        }

    return finished_or_made(run.out / f"{way}.pt", make)


def sampled(run: argparse.Namespace, way: str, ema: dict[str, Tensor], vae: AutoencoderKL, labels: Tensor) -> Tensor:
    """Images (N, 1, H, W) of an averaged model, from noise that is the same for all three ways."""

    def make() -> dict[str, Any]:
        model = new_sit(run).eval()
        model.load_state_dict(ema)
        shape, generator = (LATENT_CHANNELS, *[IMAGE_SIZE // DOWNSAMPLING] * 2), torch.Generator().manual_seed(run.seed)
        noise = torch.randn(len(labels), *shape, generator=generator).to(run.device)
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
    teacher, student = new_teacher(run), new_sit(run).eval()
    student.load_state_dict(checkpoint["ema"])
    criterion = criterion_of(run, "stage2", student, teacher)
    criterion.load_state_dict(checkpoint["criterion"])

    latents = encode_moments(vae, data.images)[0].to(run.device) * vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(run.seed)).to(run.device)
    t, y = torch.full((len(latents),), PICTURE_TIME, device=run.device), data.labels.to(run.device)
    x_t, _ = interpolate(linear_path, latents, noise, t)
    f_c, f_u = teacher.pair(x_t, t, y=y)  # (N, T, D)
    with torch.no_grad(), st.FeatureTap(student, criterion.layers[0]) as tap:
        student(x_t, t, y)
        projected = criterion.heads[0](tap.pop())  # (N, T, D)

    rows = torch.stack([(data.labels == label).nonzero()[0, 0] for label in range(9)])
    f_g = teacher.guide(f_c, f_u)
    basis = ColourBasis(f_g)
    tokens = {
        f"teacher's $f_c$ ({teacher.layer})": f_c,
        "teacher's $f_u$": f_u,
        f"$f_g = f_u + {teacher.guidance_scale:g}\\,(f_c - f_u)$": f_g,
        f"student ({criterion.layers[0]}), projected": projected,
    }
    return {
        "held-out digits": tile(grey_to_rgb(data.images[rows]), 3, gap=6),
        f"the same at t = {PICTURE_TIME}, decoded": tile(grey_to_rgb(decode(vae, x_t[rows])), 3, gap=6),
        **{heading: tile(basis.colours(found)[rows], 3) for heading, found in tokens.items()},
    }


def report(results: dict[str, Any]) -> str:
    """The results as the script prints them, whoever wins."""
    rows = results["rows"]
    lines = ["", f"{'':<36}{'Fréchet distance':>17}{'label seen':>12}"]
    lines += [f"{name:<36}{row['frechet_distance']:>17.2f}{row['accuracy']:>12.1%}" for name, row in rows.items()]
    lines += [
        "",
        f"{results['steps']:,} steps and {results['samples']:,} samples each; distances are from the training digits, "
        "in a classifier's features.",
        "Lower is better; one seed only. Label seen: how often that classifier finds the class that was asked for.",
        "Stage 2 needs stage 1's run, and a step with a teacher costs more: docs/cost.md.",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run every phase that is not finished; return what `results.json` holds."""
    run = options(argv)
    criterion_of(run, "stage1", new_sit(run)).detach()  # what cannot be built is named at once
    open_run_folder(run.out, {name: value for name, value in vars(run).items() if name not in ("out", "device")})
    with locked(run.out):
        return work(run)


def work(run: argparse.Namespace) -> dict[str, Any]:
    """As `main`, in a folder of its own."""
    begin = time.perf_counter()
    train_set, held_out = digits(IMAGE_SIZE)
    vae = trained_vae(run.out / "vae", train_set.images, steps=run.vae_steps, seed=run.seed, device=run.device)
    classifier = trained_classifier(
        run.out / "classifier.pt", train_set, steps=run.classifier_steps, seed=run.seed, device=run.device
    )
    mean, std = (moment.to(run.device) for moment in encode_moments(vae, train_set.images))
    data = LatentData(mean, std, train_set.labels.to(run.device), vae.config.scaling_factor)
    reference = feature_statistics(classifier_features(classifier, train_set.images))

    def score(images: Tensor, labels: Tensor) -> dict[str, float]:
        distance = frechet_distance(reference, feature_statistics(classifier_features(classifier, images)))
        return {"frechet_distance": distance, "accuracy": accuracy(classifier, images, labels)}

    labels = torch.arange(run.samples) % NUM_DIGIT_CLASSES
    rows, top, runs = {}, {}, {}
    for way, name in WAYS.items():
        runs[way] = trained(run, way, data)
        samples = sampled(run, way, runs[way]["ema"], vae, labels)
        rows[name], top[name] = score(samples, labels), tile(grey_to_rgb(samples[:50]), 10, gap=6)
    through_vae = decode(vae, encode_moments(vae, held_out.images)[0] * vae.config.scaling_factor)
    rows["held-out digits through the VAE"] = score(through_vae, held_out.labels)
    rows["held-out digits: the floor"] = score(held_out.images, held_out.labels)

    samples_heading = f"Samples after {run.steps} steps: the same noise and the same labels for all three"
    tokens_heading = (
        f"Tokens as colours: three principal components of $f_g$ over {len(held_out.labels)} noisy digits, each map "
        "less its mean at each position. One basis and one range for all four"
    )
    picture = {samples_heading: top, tokens_heading: feature_panels(run, runs["stage2"], vae, held_out)}
    save_panels(picture, run.out / "quickstart.png")
    results = {"rows": rows, "steps": run.steps, "samples": run.samples}
    write_json(results, run.out / "results.json")
    print(report(results))
    print(f"This call took {time.perf_counter() - begin:.0f} s. Everything is in {run.out}.")
    return results


if __name__ == "__main__":
    run_script(main)
