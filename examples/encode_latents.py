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
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

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
    return parser.parse_args(argv)


if __name__ == "__main__":
    options()  # --help and wrong options end here, before the imports below take their seconds

import torch
from common.data_files import DataError, first_ones
from common.images import find_images, image_batches
from common.latents import INDEX, Index, ShardFolder, shard_name, write_index, write_shard
from common.processes import Processes, tf32
from common.run_folder import open_run_folder
from common.training import progress
from common.vae import encode_moments, load_encoder, scaling_of, weights_digest
from torch import Tensor

import selftrans_reg as st

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


STORED = {"float32": torch.float32, "float16": torch.float16}


def list_classes(folder: Path) -> dict[str, list[str]]:
    """The images of each class, whose label is its place: by name, relative to the folder; nothing is opened."""
    images = find_images(folder)
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    classes: dict[str, list[str]] = {name: [] for name in names}
    problems = [(name, "an image in no class folder") for name in images if "/" not in name]
    for name in images:
        classes.get(name.partition("/")[0], []).append(name)
    problems += [(name, "a class folder without images") for name in names if not classes[name]]
    if problems or not classes:
        raise DataError(
            f"{folder} should hold a folder for each class, and in each of them PNG, JPEG or WebP images.\n"
            f"{first_ones(problems) or 'Found: no folders.'}\n"
            "Move images into the folders of their classes, and folders without images away."
        )
    return classes


def moments(run: argparse.Namespace, vae: "AutoencoderKL", pixels: Tensor) -> Tensor:
    """What a shard stores of a batch: (2, n, C, h, w), mean and std."""
    stored = torch.stack(encode_moments(vae, pixels / 127.5 - 1)).to(STORED[run.store])
    if not stored.isfinite().all():
        raise Mistake(
            f"The VAE's posteriors are not finite with --precision {run.precision} --store {run.store}.\n"
            "Take fp32 or bf16, and float32, into another folder."
        )
    return stored


def encode(
    run: argparse.Namespace, vae: "AutoencoderKL", images: list[tuple[str, int]], shape: list[int], shards: list[int],
    *, show: bool,
) -> list[tuple[str, str]]:  # fmt: skip
    """Make shards of images with labels. One with unreadable images is not written, unless they may be left out.

    Returns:
        (name, reason) of the images that cannot be read.
    """
    names = [name for name, _ in images]
    places = [range(len(names))[shard * run.shard_images :][: run.shard_images] for shard in shards]
    plan = [[[*rows[i : i + run.batch_size]] for i in range(0, len(rows), run.batch_size)] for rows in places]
    loader = image_batches(run.images, names, [*chain(*plan)], size=run.size, workers=run.workers)
    read = iter(progress(loader, "encoding") if show and plan else loader)
    bad: list[tuple[str, str]] = []
    for shard, batches in zip(shards, plan, strict=True):
        kept: list[tuple[str, int]] = []
        before = len(bad)
        plain, mirrored = [torch.empty(2, 0, *shape, dtype=STORED[run.store])], []
        for rows, pixels, unreadable in islice(read, len(batches)):
            bad += unreadable
            if rows and (run.skip_bad or len(bad) == before):
                kept += [images[row] for row in rows]
                plain.append(moments(run, vae, pixels))
                mirrored += [moments(run, vae, pixels.flip(-1))] if run.flip else []
        if run.skip_bad or len(bad) == before:
            kept += [(f"{name} (mirrored)", label) for name, label in kept if run.flip]
            labels = torch.tensor([label for _, label in kept], dtype=torch.int64)
            stored = torch.cat([*plain, *mirrored], dim=1)
            write_shard(run.out, shard, stored, labels, [name for name, _ in kept])
    return bad


def main(argv: list[str] | None = None) -> None:
    """Encode what is not encoded yet."""
    run = options(argv)
    classes = list_classes(run.images)
    images = [(name, label) for label, names in enumerate(classes.values()) for name in names]
    vae, side = load_encoder(run.vae, run.precision, run.size)
    scaling = scaling_of(vae.config, f"The VAE {run.vae!r}")
    shape, shards = [vae.config.latent_channels, side, side], -(-len(images) // run.shard_images)
    index = Index(run.vae, scaling, shape, shards, [*classes], st.__version__)
    settings = {name: getattr(run, name) for name in ("size", "flip", "precision", "store", "shard_images")}
    listed = "\0".join(name for name, _ in images).encode("utf-8", "surrogateescape")
    settings |= {"vae_weights": weights_digest(vae), "image_names": hashlib.sha256(listed).hexdigest()}
    settings |= scaling._asdict()
    with Processes() as here:
        if here.rank == 0:
            open_run_folder(run.out, settings)
            if not (run.out / INDEX).exists():
                write_index(index, run.out)
        here.meet()
        mine = range(here.rank, shards, here.count)
        todo = [number for number in mine if not (run.out / shard_name(number)).exists()]
        with tf32(run.precision == "tf32"):
            bad = encode(run, vae.to(here.device(run.device)), images, shape, todo, show=here.rank == 0)
        here.meet()
        if bad and not run.skip_bad:
            raise DataError(
                f"{len(bad)} of {len(images)} images cannot be read, and the shards that they belong to are not "
                f"written; all others are.\n{first_ones(bad)}\n"
                "Put whole images in their place and run the same command again, or leave them out with --skip-bad."
            )
        if bad:
            print(f"{len(bad)} images that cannot be read are left out:\n{first_ones(bad)}")
        if here.rank == 0:
            items = f"{len(ShardFolder(run.out))} items of {len(images)} images in {len(classes)} classes"
            print(f"{run.out}: {items}, as latents {'x'.join(map(str, shape))}")


if __name__ == "__main__":
    run_script(main)
