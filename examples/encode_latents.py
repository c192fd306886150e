"""Encode a folder of class folders of images as VAE posteriors, once and for all: the data of ``sit_imagenet.py``.

Each image is cropped to a square, and its posterior's mean and standard deviation are kept, in shards of safetensors
files. Stopped at any time, the same command goes on where it was. Several processes share the work.

    python examples/encode_latents.py imagenet/train --out latents --vae stabilityai/sd-vae-ft-mse
    torchrun --nproc_per_node 8 examples/encode_latents.py imagenet/train --out latents
"""

import argparse
import hashlib
import os
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from common.data_files import DataError, first_ones
from common.encoding import PRECISIONS, Images, collate, latent_side, load_encoder, posterior, weights_digest
from common.image_folder import ImageFolder, list_images
from common.latent_shards import OpenShard, Shard, moment_names, shard_name, write_shard
from common.options import at_least
from common.shard_index import Index, open_folder
from common.tf32 import tf32
from common.training import progress
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.data import DataLoader

import selftrans_reg as st
from selftrans_reg.errors import SettingError

STORED = {"float32": torch.float32, "float16": torch.float16}

_ALONE = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "images", type=Path, help="folder that holds a folder of PNG, JPEG or WebP images for each class"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument(
        "--vae", default="stabilityai/sd-vae-ft-mse", help="an AutoencoderKL: folder or name on the hub"
    )
    parser.add_argument("--size", type=at_least(1), default=256, help="pixels a side; default 256")
    parser.add_argument("--flip", action="store_true", help="encode every image mirrored, too")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the VAE; default fp32")
    parser.add_argument("--store", choices=STORED, default="float32", help="dtype in the shards; default float32")
    parser.add_argument("--shard-images", type=at_least(1), default=1024, help="images a shard; default 1024")
    parser.add_argument("--skip-bad", action="store_true", help="leave out images that cannot be read")
    parser.add_argument("--batch-size", type=at_least(1), default=32)
    parser.add_argument("--workers", type=at_least(0), default=min(8, os.cpu_count() or 1), help="that read images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


class Processes(NamedTuple):
    """This process among those that torchrun or accelerate launched."""

    rank: int
    world_size: int
    local_rank: int

    @classmethod
    def here(cls) -> "Processes":
        """As the environment says; alone without it."""
        return cls(*(int(os.environ.get(name, alone)) for name, alone in _ALONE.items()))


def planned_index(run: argparse.Namespace, vae: AutoencoderKL, found: ImageFolder) -> Index:
    """What the folder of shards will hold.

    Raises:
        SettingError: If the VAE cannot halve the size as often as it does.
    """
    side = latent_side(vae, run.size)
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
        scale=vae.config.scaling_factor,
        shape=[vae.config.latent_channels, side, side],
        mirrored=run.flip,
        shards=-(-len(found.images) // run.shard_images),
        classes=found.classes,
        library=st.__version__,
    )


def batches_of(shards: list[int], shard_images: int, images: int, batch_size: int) -> list[tuple[int, list[int]]]:
    """The shards' images in batches, none of which reaches into another shard: (shard, images)."""
    ranges = [(shard, shard * shard_images, min((shard + 1) * shard_images, images)) for shard in shards]
    return [
        (shard, list(range(begin, min(begin + batch_size, end))))
        for shard, start, end in ranges
        for begin in range(start, end, batch_size)
    ]


def unfinished(folder: Path, index: Index, shards: list[int]) -> list[int]:
    """Those of the shards that are not there.

    Raises:
        DataError: If one is there, but damaged.
    """
    there = [shard for shard in shards if (folder / shard_name(shard)).exists()]
    for shard in there:
        OpenShard(folder / shard_name(shard), index)
    return sorted({*shards} - {*there})


def encoded(run: argparse.Namespace, vae: AutoencoderKL, pixels: Tensor) -> list[Tensor]:
    """What a shard stores of a batch, in the order of `moment_names`.

    Raises:
        SettingError: If a precision is too narrow for it.
    """
    moments = [*posterior(vae, pixels), *(posterior(vae, pixels.flip(-1)) if run.flip else ())]
    stored = [part.to(STORED[run.store]) for part in moments]
    if not all(part.isfinite().all() for part in stored):
        raise SettingError(
            f"The VAE's posteriors are not finite with --precision {run.precision} --store {run.store}.\n"
            "Take fp32 or bf16, and float32, into another folder."
        )
    return stored


def encode(
    run: argparse.Namespace, vae: AutoencoderKL, found: ImageFolder, index: Index, shards: list[int], *, show: bool
) -> list[tuple[str, str]]:
    """Make the shards. One with images that cannot be read is not written, unless they may be left out.

    Returns:
        (name, reason) of the images that cannot be read.
    """
    plan = batches_of(shards, run.shard_images, len(found.images), run.batch_size)
    images = Images(run.images, found.images, run.size)
    batches = DataLoader(images, batch_sampler=[rows for _, rows in plan], num_workers=run.workers, collate_fn=collate)
    work = zip(plan, progress(batches, "encoding") if show and plan else batches, strict=True)
    bad: list[tuple[str, str]] = []
    for shard, group in groupby(work, key=lambda item: item[0][0]):
        parts = [[torch.empty(0, *index.shape, dtype=STORED[run.store])] for _ in moment_names(run.flip)]
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
            moments = dict(zip(moment_names(run.flip), map(torch.cat, parts), strict=True))
            labels = torch.tensor([found.labels[row] for row in kept], dtype=torch.int64)
            write_shard(run.out, shard, Shard(moments, labels, [found.images[row] for row in kept], left_out))
    return bad


def report(folder: Path, index: Index) -> None:
    """Say what the folder holds, if all of it is there."""
    missing = sum(not (folder / shard_name(number)).exists() for number in range(index.shards))
    if missing:
        print(f"{folder}: {missing} of {index.shards} shards are still to be made, by the other processes")
        return
    shards = [OpenShard(folder / shard_name(number), index) for number in range(index.shards)]
    left_out = [entry for shard in shards for entry in shard.left_out]
    images = sum(len(shard.images) for shard in shards)
    gigabytes = sum((folder / shard_name(number)).stat().st_size for number in range(index.shards)) / 1e9
    print(
        f"{folder}: {images} images of {len(index.classes)} classes{', and mirrored' * index.mirrored}, as latents "
        f"{'x'.join(map(str, index.shape))} in {index.shards} shards, {gigabytes:.2f} GB"
    )
    if left_out:
        print(f"{len(left_out)} images that cannot be read were left out:\n{first_ones(left_out)}")


def main(argv: list[str] | None = None) -> None:
    """Encode what is not encoded yet.

    Raises:
        DataError: If images cannot be read and may not be left out; everything else is encoded then.
    """
    run = options(argv)
    here = Processes.here()
    if run.out.resolve().is_relative_to(run.images.resolve()):
        raise SettingError(f"--out {run.out} lies in {run.images}, and would be taken for images. Name another folder.")
    found = list_images(run.images)
    vae = load_encoder(run.vae, PRECISIONS[run.precision])
    index = planned_index(run, vae, found)
    open_folder(run.out, index, here.rank)
    shards = unfinished(run.out, index, list(range(here.rank, index.shards, here.world_size)))
    if here.rank == 0 and found.others:
        print(f"{run.images}: not encoded are {len(found.others)} files of other kinds, such as {found.others[0]}")
    device = f"cuda:{here.local_rank}" if run.device == "cuda" else run.device
    with tf32(run.precision == "tf32"):
        bad = encode(run, vae.to(device), found, index, shards, show=here.rank == 0)
    if bad and not run.skip_bad:
        raise DataError(
            f"{len(bad)} of {len(found.images)} images cannot be read, and the shards that they belong to are not "
            f"written; all others are.\n{first_ones(bad)}\n"
            "Put whole images in their place and run the same command again, or leave them out with --skip-bad."
        )
    report(run.out, index)


if __name__ == "__main__":
    main()
