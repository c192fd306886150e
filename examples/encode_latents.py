"""Encode a folder of class folders of images as VAE posteriors, once and for all: the data of ``sit_imagenet.py``.

Each image is cropped to a square, and its posterior's mean and standard deviation are kept, in shards of safetensors
files. Stopped at any time, the same command goes on where it was. Several processes share the work.

    python examples/encode_latents.py imagenet/train --out latents --vae stabilityai/sd-vae-ft-mse
    torchrun --nproc_per_node 8 examples/encode_latents.py imagenet/train --out latents
"""
# ruff: noqa: E402

import argparse
import hashlib
import os
import time
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from common.options import Mistake, Parser, at_least, run_script


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("images", type=Path, help="folder that holds a folder of PNG, JPEG or WebP images for each class")
    add("--out", type=Path, required=True, help="folder of the shards")
    add("--vae", default="stabilityai/sd-vae-ft-mse", help="an AutoencoderKL: folder or name on the hub")
    add("--size", type=at_least(1), default=256, help="pixels a side")
    add("--flip", action="store_true", help="encode every image mirrored, too")
    add("--precision", choices=["fp32", "tf32", "fp16", "bf16"], default="fp32", help="of the VAE")
    add("--store", choices=["float32", "float16"], default="float32", help="dtype in the shards")
    add("--shard-images", type=at_least(1), default=1024, help="images a shard")
    add("--skip-bad", action="store_true", help="leave out images that cannot be read")
    add("--batch-size", type=at_least(1), default=32, help="images at a time")
    add("--workers", type=at_least(0), default=min(8, os.cpu_count() or 1), help="processes that read images")
    add("--device", help="of the VAE (default: cuda where there is one)")
    run = parser.parse_args(argv)
    if run.out.resolve().is_relative_to(run.images.resolve()):
        parser.error(f"--out {run.out} lies in {run.images}, and would be taken for images")
    return run


if __name__ == "__main__":
    options()  # --help and wrong options end here, before the imports below take their seconds

import torch
from common.data_files import DataError, first_ones
from common.images import find_images, image_batches, skipped_line
from common.latents import INDEX, Index, OpenShard, moment_names, read_index, shard_name, write_index, write_shard
from common.processes import Processes
from common.tf32 import tf32
from common.training import progress
from common.vae import encode_moments, load_encoder, scaling_of, weights_digest
from torch import Tensor

import selftrans_reg as st

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


STORED = {"float32": torch.float32, "float16": torch.float16}
WAIT_SECONDS = 600.0  # for the process that writes the index


class ImageFolder(NamedTuple):
    """What a folder of class folders holds.

    Attributes:
        classes: The names of the class folders, sorted; a label is a place in this list.
        images: Relative to the folder, with slashes, sorted within each class.
        labels: One for each image.
        skipped: What is no image.
    """

    classes: list[str]
    images: list[str]
    labels: list[int]
    skipped: list[str]


def list_classes(folder: Path) -> ImageFolder:
    """Find the images of each class; nothing is opened."""
    images, skipped = find_images(folder)
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    by_class: dict[str, list[str]] = {name: [] for name in classes}
    problems = [(name, "an image in no class folder") for name in images if "/" not in name]
    for name in images:
        if "/" in name:
            by_class[name.partition("/")[0]].append(name)
    problems += [(name, "a class folder without images") for name in classes if not by_class[name]]
    if problems or not classes:
        raise DataError(
            f"{folder} should hold a folder for each class, and in each of them PNG, JPEG or WebP images.\n"
            f"{first_ones(problems) or 'Found: no folders.'}\n"
            "Move images into the folders of their classes, and folders without images away."
        )
    labels = [label for label, name in enumerate(classes) for _ in by_class[name]]
    return ImageFolder(classes, [image for name in classes for image in by_class[name]], labels, skipped)


def planned_index(run: argparse.Namespace, vae: "AutoencoderKL", side: int, found: ImageFolder) -> Index:
    """What the folder of shards will hold."""
    settings = {
        "vae": run.vae,
        "vae_weights": weights_digest(vae),
        "size": run.size,
        "precision": run.precision,
        "store": run.store,
        "shard_images": run.shard_images,
        "images": len(found.images),
        "image_names": hashlib.sha256("\0".join(found.images).encode("utf-8", "surrogateescape")).hexdigest(),
    }
    return Index(
        settings=settings,
        scaling=scaling_of(vae.config, f"The VAE {run.vae!r}"),
        shape=[vae.config.latent_channels, side, side],
        mirrored=run.flip,
        shards=-(-len(found.images) // run.shard_images),
        classes=found.classes,
        library=st.__version__,
    )


def open_folder(folder: Path, index: Index, rank: int) -> None:
    """Write the index, or make sure that the one that is there says the same. The first process does the writing."""
    path = folder / INDEX
    if not path.exists() and rank == 0:
        if folder.exists() and any(folder.iterdir()):
            there = ", ".join(sorted(entry.name for entry in folder.iterdir())[:5])
            raise Mistake(f"{folder} is not empty, and holds no latents.\nFound: {there}.\nName another with --out.")
        folder.mkdir(parents=True, exist_ok=True)
        write_index(index, folder)
    waited_since = time.monotonic()
    while not path.exists():
        if time.monotonic() - waited_since > WAIT_SECONDS:
            raise Mistake(f"Process 0 has not written {path} in {WAIT_SECONDS:.0f} seconds. Is {folder} shared?")
        time.sleep(0.2)
    there, now = (_compared(index) for index in (read_index(folder), index))
    differences = [
        f"{name}: {str(there.get(name))[:80]} there, {str(now.get(name))[:80]} now"
        for name in sorted(there.keys() | now.keys())
        if there.get(name) != now.get(name)
    ]
    if differences:
        raise Mistake(
            f"{folder} holds latents of another kind.\nFound: {'; '.join(differences)}.\n"
            "Name another folder with --out, or the same settings and images as before."
        )


def _compared(index: Index) -> dict[str, Any]:
    """What must be the same when work goes on; the VAE's weights count, not the path to them."""
    entries = {**index._asdict(), **index.settings}
    return {name: value for name, value in entries.items() if name not in ("settings", "vae", "library")}


def unfinished(folder: Path, index: Index, shards: range) -> list[int]:
    """Those of the shards that are not there."""
    there = [shard for shard in shards if (folder / shard_name(shard)).exists()]
    for shard in there:
        OpenShard(folder, shard, index)
    return sorted({*shards} - {*there})


def batches_of(shards: list[int], shard_images: int, images: int, batch_size: int) -> list[tuple[int, list[int]]]:
    """The shards' images in batches, none of which reaches into another shard: (shard, images)."""
    ranges = [(shard, shard * shard_images, min((shard + 1) * shard_images, images)) for shard in shards]
    return [
        (shard, list(range(begin, min(begin + batch_size, end))))
        for shard, start, end in ranges
        for begin in range(start, end, batch_size)
    ]


def encoded(run: argparse.Namespace, vae: "AutoencoderKL", pixels: Tensor) -> list[Tensor]:
    """What a shard stores of a batch, in the order of `moment_names`."""
    images = pixels / 127.5 - 1
    moments = [*encode_moments(vae, images), *(encode_moments(vae, images.flip(-1)) if run.flip else ())]
    stored = [part.to(STORED[run.store]) for part in moments]
    if not all(part.isfinite().all() for part in stored):
        raise Mistake(
            f"The VAE's posteriors are not finite with --precision {run.precision} --store {run.store}.\n"
            "Take fp32 or bf16, and float32, into another folder."
        )
    return stored


def encode(
    run: argparse.Namespace, vae: "AutoencoderKL", found: ImageFolder, index: Index, shards: list[int], *, show: bool
) -> list[tuple[str, str]]:
    """Make the shards. One with images that cannot be read is not written, unless they may be left out.

    Returns:
        (name, reason) of the images that cannot be read.
    """
    plan = batches_of(shards, run.shard_images, len(found.images), run.batch_size)
    batches = image_batches(run.images, found.images, [rows for _, rows in plan], size=run.size, workers=run.workers)
    work = zip(plan, progress(batches, "encoding") if show and plan else batches, strict=True)
    bad: list[tuple[str, str]] = []
    for shard, group in groupby(work, key=lambda item: item[0][0]):
        parts = [[torch.empty(0, *index.shape, dtype=STORED[run.store])] for _ in moment_names(mirrored=run.flip)]
        kept: list[int] = []
        left_out: list[tuple[str, str]] = []
        for (_, rows), (pixels, reasons) in group:
            left_out += [(found.images[row], reason) for row, reason in zip(rows, reasons, strict=True) if reason]
            if pixels is not None and (run.skip_bad or not left_out):
                kept += [row for row, reason in zip(rows, reasons, strict=True) if not reason]
                for part, moment in zip(parts, encoded(run, vae, pixels), strict=True):
                    part.append(moment)
        bad += left_out
        if run.skip_bad or not left_out:
            labels = torch.tensor([found.labels[row] for row in kept], dtype=torch.int64)
            images = [found.images[row] for row in kept]
            write_shard(run.out, shard, [torch.cat(part) for part in parts], labels, images, left_out)
    return bad


def report(folder: Path, index: Index) -> None:
    """Say what the folder holds, if all of it is there."""
    files = [folder / shard_name(number) for number in range(index.shards)]
    if missing := sum(not path.exists() for path in files):
        print(f"{folder}: {missing} of {index.shards} shards are still to be made, by the other processes")
        return
    shards = [OpenShard(folder, number, index) for number in range(index.shards)]
    left_out = [entry for shard in shards for entry in shard.left_out]
    print(
        f"{folder}: {sum(len(shard.images) for shard in shards)} images of {len(index.classes)} classes"
        f"{', and mirrored' * index.mirrored}, as latents {'x'.join(map(str, index.shape))} in {index.shards} shards, "
        f"{sum(path.stat().st_size for path in files) / 1e9:.2f} GB"
    )
    if left_out:
        print(f"{len(left_out)} images that cannot be read were left out:\n{first_ones(left_out)}")


def main(argv: list[str] | None = None) -> None:
    """Encode what is not encoded yet."""
    run = options(argv)
    here = Processes()
    found = list_classes(run.images)
    vae, side = load_encoder(run.vae, run.precision, run.size)
    index = planned_index(run, vae, side, found)
    open_folder(run.out, index, here.rank)
    shards = unfinished(run.out, index, range(here.rank, index.shards, here.count))
    if here.rank == 0 and found.skipped:
        print(skipped_line(run.images, found.skipped))
    with tf32(run.precision == "tf32"):
        bad = encode(run, vae.to(here.device(run.device)), found, index, shards, show=here.rank == 0)
    if bad and not run.skip_bad:
        raise DataError(
            f"{len(bad)} of {len(found.images)} images cannot be read, and the shards that they belong to are not "
            f"written; all others are.\n{first_ones(bad)}\n"
            "Put whole images in their place and run the same command again, or leave them out with --skip-bad."
        )
    report(run.out, index)


if __name__ == "__main__":
    run_script(main)
