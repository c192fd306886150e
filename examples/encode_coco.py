"""Encode captioned images as VAE posteriors and CLIP text features, in U-ViT's layout: the data of ``mmdit_coco.py``.

The captions come as COCO's own JSON: ``images`` with ``id`` and ``file_name``, ``annotations`` with ``image_id`` and
``caption``. Stopped at any time, the same command goes on where it was.

    python examples/encode_coco.py train2014 annotations/captions_train2014.json --out coco-256
    python examples/encode_coco.py val2014 annotations/captions_val2014.json --out coco-256 --split val
"""
# ruff: noqa: E402

import argparse
import hashlib
import os
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

from common.options import Parser, at_least, run_script


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("images", type=Path, help="folder of the images")
    add("captions", type=Path, help="COCO's captions_*.json")
    add("--out", type=Path, required=True, help="folder of the features, of all splits")
    add("--split", default="train", help="folder in it")
    add("--vae", default="stabilityai/sd-vae-ft-mse", help="an AutoencoderKL: folder or name on the hub")
    add("--text-encoder", default="openai/clip-vit-large-patch14", help="CLIP text model: folder or name on the hub")
    add("--size", type=at_least(1), default=256, help="pixels a side")
    add("--precision", choices=["fp32", "tf32", "fp16", "bf16"], default="fp32", help="of the VAE")
    add("--cut-long", action="store_true", help="use the beginning of captions that are too long for the text model")
    add("--batch-size", type=at_least(1), default=32, help="images at a time")
    add("--workers", type=at_least(0), default=min(8, os.cpu_count() or 1), help="processes that read images")
    add("--device", help="of both models (default: cuda where there is one)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    options()  # --help and wrong options end here, before the imports below take their seconds

from common.coco_features import CocoWriter
from common.data_files import DataError, first_ones, read_json, readable
from common.images import image_batches
from common.processes import default_device, tf32
from common.text import load_text_encoder
from common.training import progress
from common.vae import encode_moments, load_encoder, scaling_of, weights_digest


def read_captions(path: Path, folder: Path) -> tuple[list[str], list[list[str]]]:
    """The images, in the order of COCO's ids, and the captions of each."""
    content = read_json(path)
    with readable(path, "COCO's captions"):
        images = [(image["id"], image["file_name"]) for image in content["images"]]
        texts = [(annotation["image_id"], annotation["caption"]) for annotation in content["annotations"]]
        ids = Counter(i for i, _ in images)
        captions: dict[Any, list[Any]] = {i: [] for i in ids}
        for i, text in texts:
            captions.setdefault(i, []).append(text)
        images.sort()
    problems = [(f"id {i!r}", f"is that of {n} images") for i, n in ids.items() if n > 1]
    problems += [(f"id {i!r}", f"has {len(some)} captions and no image") for i, some in captions.items() if not ids[i]]
    problems += [(f"{file} (id {i!r})", "has no captions") for i, file in images if not captions[i]]
    problems += [(str(file), f"is not in {folder}") for _, file in images if not (folder / str(file)).is_file()]
    if problems or not images:
        raise DataError(
            f"The captions in {path} and the images in {folder} do not fit: {len(problems)} problems in {len(images)} "
            f"images.\n{first_ones(problems)}\n"
            "Every image needs an id of its own, its file, and at least one caption."
        )
    return [file for _, file in images], [captions[i] for i, _ in images]


def main(argv: list[str] | None = None) -> None:
    """Encode what is not encoded yet."""
    run = options(argv)
    run.device = default_device(run.device)
    images, captions = read_captions(run.captions, run.images)
    vae, _ = load_encoder(run.vae, run.precision, run.size)
    encoder = load_text_encoder(run.text_encoder, device=run.device)
    settings = {name: getattr(run, name) for name in ("text_encoder", "size", "precision", "cut_long")} | {
        "vae_weights": weights_digest(vae),
        "captions": hashlib.sha256(repr((images, captions)).encode()).hexdigest(),
    }
    empty, scaling = encoder.encode([""])[0], scaling_of(vae.config, f"The VAE {run.vae!r}")
    writer = CocoWriter(run.out, run.split, empty, scaling=scaling, vae=run.vae, settings=settings)
    vae.to(run.device)
    todo = [index for index in range(len(images)) if not writer.has(index)]
    batches = [todo[start : start + run.batch_size] for start in range(0, len(todo), run.batch_size)]
    loader = image_batches(run.images, images, batches, size=run.size, workers=run.workers)
    bad: list[tuple[str, str]] = []
    with tf32(run.precision == "tf32"):
        for rows, pixels, unreadable in progress(loader, "encoding"):
            bad += unreadable
            if not rows:
                continue
            texts = [captions[row] for row in rows]
            features = encoder.encode([*chain(*texts)], cut_long=run.cut_long)
            contexts = features.split([*map(len, texts)])
            for row, mean, std, context in zip(rows, *encode_moments(vae, pixels / 127.5 - 1), contexts, strict=True):
                writer.write(row, mean, std, context)
    if bad:
        raise DataError(
            f"{len(bad)} of {len(images)} images cannot be read; the others are written.\n{first_ones(bad)}\n"
            "Put whole images in their place and run the same command again, or leave them out of the captions' file."
        )
    writer.finish(len(images))
    print(f"{run.out / run.split}: {len(images)} images with {sum(map(len, captions))} captions")


if __name__ == "__main__":
    run_script(main)
