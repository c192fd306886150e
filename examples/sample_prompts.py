r"""Images for prompts from checkpoints of `mmdit_coco.py`: PNGs, and a picture with a row for each checkpoint.

The noise of an image depends on the seed and on its prompt's place in the list alone. What is finished in ``--out`` is
not done again.

    python examples/sample_prompts.py --checkpoint runs/coco/stage2 --out samples/coco --cfg-scale 4 \
        --text-encoder openai/clip-vit-large-patch14 --prompts "a cat asleep on a red sofa" "a kite above a beach"
    python examples/sample_prompts.py --checkpoint runs/t2i/stage2/checkpoints/*.pt --out samples/along-training \
        --prompts "a red circle on a blue ground"
"""
# ruff: noqa: E402

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from common.options import Mistake, Parser, add_image_options, run_script


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, nargs="+", required=True, help="files, or runs' folders: the newest of each")
    add("--out", type=Path, required=True, help="folder of the images")
    texts = parser.add_mutually_exclusive_group(required=True)
    texts.add_argument("--prompts", nargs="+", help="the texts")
    texts.add_argument("--prompts-file", type=Path, help="one prompt a line, instead")
    add("--text-encoder", help="CLIP text model: folder or hub name (default: the demo's own)")
    add_image_options(parser, sampler="heun", steps=50, cfg_scale=2.0, batch_size=32)
    run = parser.parse_args(argv)
    if run.prompts_file is not None:
        if not run.prompts_file.is_file():
            parser.error(f"there is no file {run.prompts_file}; --prompts-file holds a prompt a line")
        run.prompts = run.prompts_file.read_text().splitlines()
    if not run.prompts or not all(text.strip() for text in run.prompts):
        parser.error("there are no prompts, or empty ones")
    return run


if __name__ == "__main__":
    options()  # --help and wrong options end here, before the imports below take their seconds

import numpy as np
import torch
from common.images import read_image
from common.loading import Checkpoint, mmdit_from_checkpoint
from common.mmdit import MMDiT
from common.processes import default_device
from common.run_folder import newest_checkpoint, open_run_folder
from common.samplers import ImageSampler, batches_left, deciding, new_sampler, png_of, write_missing
from common.text import Prompts, encoded_prompts, load_text_encoder, numbers_of, same_features, save_captioned
from common.training import progress
from common.vae import weights_digest

SHOWN = 16  # prompts in the picture


def run_of(checkpoint: Path) -> str:
    """The name of the run that left a checkpoint."""
    return checkpoint.parent.parent.name if checkpoint.parent.name == "checkpoints" else checkpoint.stem


class Job(NamedTuple):
    """A checkpoint's model, what samples from it, what identifies its weights, and what their row is called."""

    model: MMDiT
    prompts: Prompts
    sampler: ImageSampler
    identity: dict[str, object]
    heading: str


def new_job(run: argparse.Namespace, model: MMDiT, found: Checkpoint) -> Job:
    """Put together what a checkpoint needs; what does not fit together is named now."""
    name = run.text_encoder or found.args.get("text_encoder")
    if not isinstance(name, str):
        raise Mistake(f"{found.source} does not name its text encoder.\nFound: {name!r}.\nPass --text-encoder.")
    encoder = load_text_encoder(name, device=run.device)
    shape = found.args.get("context_length", encoder.length), found.settings["context_size"]
    prompts = encoded_prompts(encoder, run.prompts, shape, found.source)
    empty = found.args.get("empty_prompt")
    if empty is not None and not same_features(prompts.features[prompts.null, 0, : len(empty)], torch.tensor(empty)):
        raise Mistake(
            f"{encoder.name} is not the text encoder of {found.source}: the empty prompt has other features.\n"
            "Pass with --text-encoder the one that the captions were encoded with."
        )
    sampler, identity = new_sampler(run, found, numbers_of, prompts.null)
    identity |= {"weights": weights_digest(model)[:16], "text_encoder_weights": weights_digest(encoder.model)[:16]}
    return Job(model, prompts, sampler, identity, f"{run_of(Path(found.source))}, {found.steps} steps")


def main(argv: Sequence[str] | None = None) -> Path:
    """Make the images that are missing; return the picture."""
    run = options(argv)
    run.device = default_device(run.device)
    loaded = [mmdit_from_checkpoint(newest_checkpoint(path), weights=run.weights) for path in run.checkpoint]
    names = [f"{run_of(Path(found.source))}-{found.steps}" for _, found in loaded]
    if len(set(names)) < len(names):
        raise Mistake(f"The checkpoints are not told apart by their runs' names and steps.\nFound: {names}.")
    texts = run.prompts
    jobs = {name: new_job(run, *found) for name, found in zip(names, loaded, strict=True)}
    identities = {name: job.identity for name, job in jobs.items()}
    open_run_folder(run.out, {"checkpoints": identities, "prompts": texts, **deciding(run)})
    rows = {}
    for name, job in jobs.items():
        folder, model = run.out / name, job.prompts.conditioned(job.model.to(run.device))
        folder.mkdir(exist_ok=True)
        batches = batches_left(folder, len(texts), run.batch_size)
        write_missing(folder, progress(batches, name), job.sampler, model, run.device)
        rows[job.heading] = np.stack([read_image(png_of(folder, n)) for n in range(len(texts[:SHOWN]))])
        job.model.cpu()
    picture = run.out / "prompts.png"
    save_captioned(rows, texts[:SHOWN], picture)
    print(f"{len(texts)} images of each of {len(rows)} checkpoints, and {picture}.")
    return picture


if __name__ == "__main__":
    run_script(main)
