"""Self-Transcendence end to end on real handwritten digits: one command, no download, two CPU cores, a few minutes.

Trains a small VAE and a small classifier, then one SiT three ways from the same initial weights, on the same batches
with the same noise for the same number of steps: as it is, with stage 1, and with Self-Transcendence, whose teacher is
the stage-1 run. Writes a table, a picture and every checkpoint to ``--out``; what is finished there is not done again.

    python examples/quickstart.py
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common.data import NUM_DIGIT_CLASSES, LabelledImages, LatentData, digits
from common.images import tile
from common.metrics import accuracy, classifier_features, feature_statistics, frechet_distance, trained_classifier
from common.options import at_least
from common.paths import denoising_loss, interpolate, linear_path
from common.run_folder import finished_or_made, open_run_folder, write_json
from common.samplers import sample_ode
from common.sit import SiT
from common.training import TrainSettings, progress, train
from common.vae import DOWNSAMPLING, LATENT_CHANNELS, decode, encode_moments, trained_vae
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor

import selftrans_reg as st
from selftrans_reg.analysis.draw import ColourBasis, save_panels

IMAGE_SIZE = 32
TIME = "repa"  # t = 1 is noise
WARMUP_STEPS = 50
EMA_DECAY = 0.99  # short, because the steps are few
PICTURE_TIME = 0.5  # the middle of the window
SAMPLE_BATCH = 250
STAGE1_FILE = "stage1.pt"
WAYS = {"plain": "as is", "stage1": "stage 1", "self": "Self-Transcendence"}


def grey_to_rgb(images: Tensor) -> Tensor:
    """Images (N, 1, H, W) in [-1, 1] as dark ink on white, (N, H, W, 3) in [0, 1]."""
    return (0.5 - images.permute(0, 2, 3, 1).expand(-1, -1, -1, 3) / 2).clamp(0, 1).cpu()


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; everything but the folder and the device belongs to the run's settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder of the results")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=at_least(1), default=700, help="of each of the three runs")
    parser.add_argument("--batch-size", type=at_least(1), default=16)
    parser.add_argument("--lr", type=float, default=3e-3, help="high, because the steps are few")
    parser.add_argument("--hidden-size", type=int, default=96)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--num-heads", type=int, default=3)
    parser.add_argument("--stage1-layer", default="blocks.1")
    parser.add_argument("--student-layer", default="blocks.2")
    parser.add_argument("--teacher-layer", default="blocks.3")
    parser.add_argument("--guidance-scale", type=float, default=3.0, help="of the teacher's features")
    parser.add_argument("--weight", type=float, default=0.5, help="of the alignment, in both stages")
    parser.add_argument(
        "--stop-fraction", type=float, default=0.5, help="of stage 2's steps, after which guidance ends"
    )
    parser.add_argument("--head-features", type=int, default=256, help="width inside the projection head")
    parser.add_argument("--vae-steps", type=at_least(2), default=150)
    parser.add_argument("--classifier-steps", type=at_least(2), default=300)
    parser.add_argument("--samples", type=at_least(2), default=1000, help="for the Fréchet distance, of each way")
    parser.add_argument("--sampler-steps", type=at_least(1), default=12, help="Euler steps, without guidance")
    return parser.parse_args(argv)


def new_sit(run: argparse.Namespace) -> SiT:
    """A SiT of 64 tokens; the seed decides its initial weights."""
    torch.manual_seed(run.seed)
    return SiT(
        input_size=IMAGE_SIZE // DOWNSAMPLING,
        patch_size=1,
        in_channels=LATENT_CHANNELS,
        hidden_size=run.hidden_size,
        depth=run.depth,
        num_heads=run.num_heads,
        num_classes=NUM_DIGIT_CLASSES,
        learn_sigma=False,
    ).to(run.device)


def stage1_criterion(run: argparse.Namespace, model: SiT) -> st.SelfTransLoss:
    """Stage 1: a shallow layer against the clean latents."""
    return st.SelfTransLoss.stage1(
        model,
        layer=run.stage1_layer,
        time=TIME,
        latent_channels=LATENT_CHANNELS,
        patch_size=1,
        hidden_features=run.head_features,
        weight=run.weight,
    )


def new_teacher(run: argparse.Namespace, checkpoint: Path | None) -> st.CFGFeatureTeacher:
    """The teacher of stage 2: the averaged model of a checkpoint."""
    return st.build_teacher(
        new_sit(run),
        checkpoint,
        layer=run.teacher_layer,
        guidance_scale=run.guidance_scale,
        null={"y": NUM_DIGIT_CLASSES},
        time=TIME,
    )


def stage2_criterion(run: argparse.Namespace, model: SiT, teacher: st.CFGFeatureTeacher) -> st.SelfTransLoss:
    """Stage 2: a layer of a new model against the teacher's guided features."""
    return st.SelfTransLoss.stage2(
        model,
        layer=run.student_layer,
        teacher=teacher,
        time=TIME,
        hidden_features=run.head_features,
        weight=run.weight,
        stop_step=round(run.stop_fraction * run.steps),
    )


def criterion_of(run: argparse.Namespace, way: str, model: SiT) -> st.SelfTransLoss | None:
    """What a way of training adds to the loss."""
    if way == "plain":
        return None
    if way == "stage1":
        return stage1_criterion(run, model)
    return stage2_criterion(run, model, new_teacher(run, run.out / STAGE1_FILE))


def check_settings(run: argparse.Namespace) -> None:
    """Build everything once, so that a wrong layer or scale is named before minutes have gone."""
    model = new_sit(run)
    stage1_criterion(run, model).detach()
    stage2_criterion(run, model, new_teacher(run, checkpoint=None)).detach()


def trained(run: argparse.Namespace, way: str, data: LatentData) -> dict[str, Any]:
    """One of the three runs, trained now if it is not there: weights, averaged weights, head, seconds and log."""

    def make() -> dict[str, Any]:
        model = new_sit(run)
        criterion = criterion_of(run, way, model)
        settings = TrainSettings(steps=run.steps, lr=run.lr, warmup_steps=WARMUP_STEPS, ema_decay=EMA_DECAY)
        batches = data.batches(batch_size=run.batch_size, seed=run.seed)
        torch.manual_seed(run.seed)  # from here on the three draw the same times, noise and dropped labels
        result = train(model, batches, denoising_loss, settings, criterion=criterion, title=WAYS[way])
        return {
            "model": model.state_dict(),
            "ema": result.ema.state_dict(),
            "criterion": {} if criterion is None else criterion.state_dict(),
            "seconds": result.seconds,
            "log": result.log,
        }

    return finished_or_made(run.out / f"{way}.pt", make)


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
    teacher, student = new_teacher(run, run.out / STAGE1_FILE), new_sit(run).eval()
    student.load_state_dict(checkpoint["ema"])
    criterion = stage2_criterion(run, student, teacher)
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


def compared(name: str, row: dict[str, float], plain: dict[str, float]) -> str:
    """One sentence on a way of training against the plain one, whichever is better."""
    change = row["frechet_distance"] / plain["frechet_distance"] - 1
    verdict = "higher (worse)" if change > 0 else "lower (better)"
    times = row["seconds"] / plain["seconds"]
    return f"{name}: distance {abs(change):.0%} {verdict} than as is, at {times:.2f} times its seconds. One seed only."


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
        "Label seen: how often that classifier finds the class that was asked for. Seconds in all include stage 1.",
    ]
    lines += [compared(WAYS[way], rows[WAYS[way]], rows[WAYS["plain"]]) for way in ("stage1", "self")]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run every phase that is not finished; return what `results.json` holds."""
    begin = time.perf_counter(), time.process_time()
    run = options(argv)
    check_settings(run)
    open_run_folder(run.out, {name: value for name, value in vars(run).items() if name not in ("out", "device")})
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
    for way, name in WAYS.items():
        runs[way] = trained(run, way, data)
        samples[way] = sampled(run, way, runs[way]["ema"], vae, labels)
        seconds = runs[way]["seconds"] + (runs["stage1"]["seconds"] if way == "self" else 0)
        per_step = runs[way]["seconds"] / run.steps
        rows[name] = {**score(samples[way], labels), "seconds_per_step": per_step, "seconds": seconds}
    through_vae = decode(vae, encode_moments(vae, held_out.images)[0] * vae.config.scaling_factor)
    rows["held-out digits through the VAE"] = score(through_vae, held_out.labels)
    rows["held-out digits: the floor"] = score(held_out.images, held_out.labels)

    top = {name: tile(grey_to_rgb(samples[way][:50]), 10, gap=6) for way, name in WAYS.items()}
    samples_heading = f"Samples after {run.steps} steps: the same noise and the same labels for all three"
    tokens_heading = (
        f"Tokens as colours: three principal components of $f_g$ over {len(held_out.labels)} noisy digits, each map "
        "less its mean at each position. One basis and one range for all four"
    )
    picture = {samples_heading: top, tokens_heading: feature_panels(run, runs["self"], vae, held_out)}
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
    main()
