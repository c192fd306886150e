r"""Images for prompts from a checkpoint of `mmdit_coco.py`: PNGs, and a picture of them with their texts.

The noise of an image depends on the seed and on its prompt's place in the list alone. What is finished in ``--out`` is
not done again.

    python examples/sample_prompts.py --checkpoint runs/coco/stage2 --out samples/coco --cfg-scale 4 \
        --text-encoder openai/clip-vit-large-patch14 --prompts "a cat asleep on a red sofa" "a kite above a beach"
"""
# ruff: noqa: E402

import argparse
import textwrap
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

import torch
from common.images import read_image, save_panels
from common.loading import mmdit_from_checkpoint
from common.processes import default_device
from common.run_folder import newest_checkpoint, open_run_folder
from common.samplers import batches_left, new_sampler, png_of, write_missing
from common.text import load_text_encoder, same_features
from common.training import progress
from common.vae import weights_digest
from torch import Tensor

SHOWN, COLUMNS = 16, 8  # prompts in the picture
CAPTION_WIDTH = 17  # letters that fit below an image


def main(argv: Sequence[str] | None = None) -> Path:
    """Make the images that are missing; return the picture."""
    run = options(argv)
    run.device = default_device(run.device)
    model, found = mmdit_from_checkpoint(newest_checkpoint(run.checkpoint), weights=run.weights)
    name = run.text_encoder or found.args.get("text_encoder")
    if not isinstance(name, str):
        raise Mistake(f"{found.source} does not name its text encoder.\nFound: {name!r}.\nPass --text-encoder.")
    encoder = load_text_encoder(name, device=run.device)
    length, width = found.args.get("context_length", encoder.length), found.settings["context_size"]
    contexts, empty = encoder.encode([*run.prompts, ""]), found.args.get("empty_prompt")  # the null condition is last
    if contexts.shape[1:] != (length, width) or not (
        empty is None or same_features(contexts[-1, 0, : len(empty)], torch.tensor(empty))
    ):
        raise Mistake(
            f"{encoder.name} is not the text encoder of {found.source}, or the empty prompt has other features.\n"
            f"Found: {encoder.length} tokens of width {encoder.width} a text; {found.source} has {length} of width "
            f"{width}.\nPass with --text-encoder the one that the captions were encoded with."
        )

    def numbers_of(numbers: Sequence[int], _: Sequence[torch.Generator]) -> Tensor:
        return torch.tensor(numbers)  # to a sampler, prompts are classes

    sampler, decided = new_sampler(run, found, numbers_of, len(run.prompts))
    decided |= {"weights": weights_digest(model)[:16], "text_encoder_weights": weights_digest(encoder.model)[:16]}
    open_run_folder(run.out, decided | {"steps_trained": found.steps, "prompts": run.prompts})
    folder, picture = run.out / "images", run.out / "prompts.png"
    folder.mkdir(exist_ok=True)
    batches = progress(batches_left(folder, len(run.prompts), run.batch_size), "batches")
    model, contexts = model.to(run.device), contexts.to(run.device)
    write_missing(folder, batches, sampler, lambda x, t, y: model(x, t, context=contexts[y]), run.device)
    titles = [textwrap.fill(f"{n}: {text}", CAPTION_WIDTH) for n, text in enumerate(run.prompts[:SHOWN])]
    shown = {title: read_image(png_of(folder, n)) for n, title in enumerate(titles)}
    rows = [titles[start : start + COLUMNS] for start in range(0, len(titles), COLUMNS)]
    save_panels({" " * n: {title: shown[title] for title in row} for n, row in enumerate(rows)}, picture)
    print(f"{len(run.prompts)} images by {found.source} after {found.steps} steps: {folder} and {picture}.")
    return picture


if __name__ == "__main__":
    run_script(main)
