r"""Images for prompts from a checkpoint of `mmdit_coco.py`: PNGs, and a picture of them with their texts.

The noise of an image depends on the seed and on its prompt's place in the list alone. What is finished in ``--out`` is
not done again.

    python examples/sample_prompts.py --checkpoint runs/coco/stage2 --out samples/coco --cfg-scale 4 \
        --text-encoder openai/clip-vit-large-patch14 --prompts "a cat asleep on a red sofa" "a kite above a beach"
"""
# ruff: noqa: E402

import argparse
from collections.abc import Sequence
from pathlib import Path

from common.options import Mistake, Parser, add_image_options, run_script


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="a file, or a run's folder: its newest")
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
from common.loading import mmdit_from_checkpoint
from common.processes import default_device
from common.run_folder import newest_checkpoint, open_run_folder
from common.samplers import batches_left, deciding, new_sampler, png_of, write_missing
from common.text import encoded_prompts, load_text_encoder, numbers_of, same_features, save_captioned
from common.training import progress
from common.vae import weights_digest

SHOWN = 16  # prompts in the picture


def main(argv: Sequence[str] | None = None) -> Path:
    """Make the images that are missing; return the picture."""
    run = options(argv)
    run.device = default_device(run.device)
    model, found = mmdit_from_checkpoint(newest_checkpoint(run.checkpoint), weights=run.weights)
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
    open_run_folder(run.out, {**identity, "steps_trained": found.steps, "prompts": run.prompts, **deciding(run)})
    folder, picture = run.out / "images", run.out / "prompts.png"
    folder.mkdir(exist_ok=True)
    batches = progress(batches_left(folder, len(run.prompts), run.batch_size), "batches")
    write_missing(folder, batches, sampler, prompts.conditioned(model.to(run.device)), run.device)
    shown = run.prompts[:SHOWN]
    save_captioned({"": np.stack([read_image(png_of(folder, n)) for n in range(len(shown))])}, shown, picture)
    print(f"{len(run.prompts)} images by {found.source} after {found.steps} steps: {folder} and {picture}.")
    return picture


if __name__ == "__main__":
    run_script(main)
