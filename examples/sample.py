r"""Images from a SiT's checkpoint: PNGs, a grid to look at, and the ``.npz`` that ADM's evaluator reads.

Noise and label of image i depend on the seed and on i alone: how many processes share the work, how it is cut into
batches and where it was interrupted does not matter. What is finished in ``--out`` is not done again, and asking for
more images later adds them.

    python examples/sample.py --checkpoint runs/sit --out samples/sit --num-samples 1000
    torchrun --nproc_per_node=8 examples/sample.py --checkpoint runs/sit --out samples/paper --cfg-scale 1.9 \
        --guidance-high 0.65
"""
# ruff: noqa: E402

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from common.options import Mistake, Parser, add_sampling_options, run_script


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a file, or a run's folder: its newest")
    parser.add_argument("--out", type=Path, required=True, help="folder of the images")
    add_sampling_options(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    options()  # --help and wrong options end here, before the imports below take their seconds

import numpy as np
import torch
from common.images import read_image, tile, write_png
from common.loading import sit_from_checkpoint
from common.processes import Processes, tf32
from common.run_folder import newest_checkpoint, open_run_folder, write_whole
from common.samplers import (
    ImageSampler,
    Labels,
    Model,
    batches_left,
    image_generator,
    new_sampler,
    png_of,
    reversed_time,
    write_missing,
)
from common.training import progress
from common.vae import weights_digest
from torch import Tensor

GRID_COLUMNS, GRID_ROWS = 10, 4
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


def labels_named(text: str, num_classes: int) -> Labels:
    """The labels that images take: in turn, or drawn."""
    names = [str(label) for label in range(num_classes)] if text == "balanced" else text.split(",")
    if text != "random" and not all(name.strip().isdecimal() and int(name) < num_classes for name in names):
        raise Mistake(
            f"--labels is 'random', 'balanced', or classes with commas between, each below {num_classes}; got {text!r}."
        )

    def labels(numbers: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
        # Drawn in any case, so that an image's noise is the same whatever its label comes from.
        drawn = torch.stack([torch.randint(num_classes, (), generator=generator) for generator in generators])
        return drawn if text == "random" else torch.tensor([int(names[number % len(names)]) for number in numbers])

    return labels


def in_precision(model: Model, name: str, device: str) -> Model:
    """The model in float32, with or without TF32 in its products, or in autocast to 16 bits."""

    def call(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with tf32(name == "tf32"), torch.autocast(torch.device(device).type, HALF.get(name), enabled=name in HALF):
            return model(x, t, y)

    return call


class Job(NamedTuple):
    """A checkpoint's model, what makes its images, and the settings that decide them: those of their folder."""

    model: Model
    sampler: ImageSampler
    decided: dict[str, object]


def new_job(run: argparse.Namespace) -> Job:
    """Put together what the images of a command line need; what does not fit together is named now."""
    run.checkpoint = newest_checkpoint(run.checkpoint)
    sit, found = sit_from_checkpoint(run.checkpoint, weights=run.weights)
    run.weights = found.entry or "bare"  # a state dict alone does not say which they are
    convention, path = found.conventions(said_time=run.time, said_path=run.path)
    null = sit.num_classes if found.settings["class_dropout_prob"] else None
    sampler, decided = new_sampler(run, found, labels_named(run.labels, sit.num_classes), null, path)
    decided |= {"checkpoint": run.checkpoint.name, "checkpoint_weights": weights_digest(sit)[:16]}
    decided |= {"time": convention, "path": path, "labels": run.labels, "precision": run.precision}
    model = sit.to(run.device)
    return Job(
        in_precision(model if convention == "repa" else reversed_time(model), run.precision, run.device),
        sampler,
        decided,
    )


def main(argv: Sequence[str] | None = None) -> Path:
    """Make the images that are missing; return the ``.npz`` of all."""
    run = options(argv)
    with Processes() as processes:
        return sample(run, processes)


def sample(run: argparse.Namespace, processes: Processes) -> Path:
    """As `main`, in these processes."""
    run.device = processes.device(run.device)
    model, sampler, decided = new_job(run)
    folder = run.out / "images"
    if processes.rank == 0:
        open_run_folder(run.out, decided)
        folder.mkdir(exist_ok=True)
    processes.meet()
    open_run_folder(run.out, decided)  # of a run that goes on, a slower process may have found a newer checkpoint
    left = batches_left(folder, run.num_samples, run.batch_size)
    processes.meet()  # or a slower process would find a faster one's images, and count the batches differently
    mine = left[processes.rank :: processes.count]
    start = time.perf_counter()
    write_missing(folder, progress(mine, "batches") if processes.rank == 0 else mine, sampler, model, run.device)
    processes.meet()
    made, seconds = sum(map(len, left)), time.perf_counter() - start
    npz = run.out / f"samples_{run.num_samples}.npz"
    if processes.rank == 0:
        if made:
            where = f"{processes.count} x {run.device}" if processes.count > 1 else run.device
            print(f"{made:,} images in {seconds:.0f} s on {where}: {made / seconds:.2f} images/s")
        finish(run, sampler, folder, npz)
    return npz


def finish(run: argparse.Namespace, sampler: ImageSampler, folder: Path, npz: Path) -> None:
    """The grid and the ``.npz`` of all images."""
    numbers = range(run.num_samples)
    pngs = [png_of(folder, number) for number in numbers]
    if npz.exists():
        print(f"{npz}: finished before")
    else:
        labels = torch.cat([sampler.labels([n], [image_generator(run.seed, n)]) for n in numbers]).numpy()
        with tempfile.TemporaryFile(dir=run.out) as disk:  # 50,000 images of 256 pixels are 10 GB
            images = np.memmap(disk, np.uint8, "w+", shape=(len(pngs), *np.asarray(read_image(pngs[0])).shape))
            for image, png in zip(images, progress(pngs, npz.name), strict=True):
                image[...] = read_image(png)
            write_whole(npz, lambda file: np.savez(file, arr_0=images, arr_1=labels))  # uint8 (N, H, W, 3), int64 (N,)
    shown = np.stack([np.asarray(read_image(png)) for png in pngs[: GRID_COLUMNS * GRID_ROWS]])
    write_png(tile(shown, GRID_COLUMNS, gap=2), run.out / "grid.png")
    made = f"{run.num_samples:,} images of {run.checkpoint} ({run.weights} weights)"
    print(f"{made}: {folder}, {npz} and {run.out / 'grid.png'}.")


if __name__ == "__main__":
    run_script(main)
