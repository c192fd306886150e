r"""Images for prompts from checkpoints of `mmdit_coco.py`: PNGs, and a picture with a row for each checkpoint.

The noise of an image depends on the seed and on its prompt's place in the list alone. What is finished in ``--out`` is
not done again.

    python examples/sample_prompts.py --checkpoint runs/coco/stage2 --out samples/coco --cfg-scale 4 \
        --prompts "a cat asleep on a red sofa" "a kite above a beach"
    python examples/sample_prompts.py --checkpoint runs/t2i/stage2/checkpoints/*.pt --out samples/along-training
"""
# ruff: noqa: E402

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from common.options import Mistake, Parser, at_least, finite, positive, run_script, within


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, nargs="+", required=True, help="files, or runs' folders: the newest of each")
    add("--out", type=Path, required=True, help="folder of the images")
    texts = parser.add_mutually_exclusive_group()
    texts.add_argument("--prompts", nargs="+", help="the texts (default: those of the run's own pictures)")
    texts.add_argument("--prompts-file", type=Path, help="one prompt a line, instead")
    add("--weights", choices=["ema", "model"], default="ema", help="averaged or raw")
    add("--text-encoder", help="CLIP text model: folder or hub name (default: the run's own)")
    add("--vae", help="folder or hub name of diffusers' AutoencoderKL (default: the run's own)")
    add("--scale-factor", type=positive, help="of the latents (default: the run's)")
    add("--sampler", choices=["euler", "heun", "sde"], default="heun", help="two ODEs, or the SDE")
    add("--steps", type=at_least(1), default=50, help="of the sampler")
    add("--cfg-scale", type=finite, default=2.0, help="1 is the conditional model, unguided")
    add("--guidance-low", type=within(0, 1), default=0.0, help="smallest t, 1 being noise, with guidance")
    add("--guidance-high", type=within(0, 1), default=1.0, help="largest t with guidance")
    add("--seed", type=at_least(0), default=0, help="of the noise")
    add("--batch-size", type=at_least(1), default=32, help="images at a time")
    add("--device", help="of all models (default: cuda where there is one)")
    run = parser.parse_args(argv)
    if run.prompts_file is not None:
        if not run.prompts_file.is_file():
            parser.error(f"there is no file {run.prompts_file}; --prompts-file holds a prompt a line")
        run.prompts = run.prompts_file.read_text().splitlines()
    if run.prompts is not None and not (run.prompts and all(text.strip() for text in run.prompts)):
        parser.error("there are no prompts, or empty ones")
    return run


if __name__ == "__main__":
    options()  # --help and wrong options end here, before the imports below take their seconds

import numpy as np
from common.images import read_image
from common.loading import Checkpoint, mmdit_from_checkpoint
from common.mmdit import MMDiT
from common.processes import default_device
from common.run_folder import newest_checkpoint, open_run_folder
from common.samplers import Guidance
from common.sampling import ImageSampler, matching_vae, vae_place
from common.text import Prompts, encoded_prompts, load_text_encoder, numbers_of, save_captioned
from common.training import progress
from common.vae import recorded_scaling, weights_digest
from sample import batches_left, png_name, write_missing

SHOWN = 16  # prompts in the picture


def run_of(checkpoint: Path) -> str:
    """The name of the run that left a checkpoint."""
    return checkpoint.parent.parent.name if checkpoint.parent.name == "checkpoints" else checkpoint.stem


class Job(NamedTuple):
    """A checkpoint's model, what samples from it, what decides its images, and what their row is called."""

    model: MMDiT
    prompts: Prompts
    sampler: ImageSampler
    identity: dict[str, object]
    heading: str


def new_job(run: argparse.Namespace, model: MMDiT, found: Checkpoint, texts: Sequence[str]) -> Job:
    """Put together what a checkpoint needs; what does not fit together is named now."""
    path, sizes = Path(found.source), found.settings
    vae, scaling = matching_vae(
        run.vae or vae_place(found.args.get("vae"), path),
        recorded_scaling(found.args, path),
        sizes["in_channels"],
        path,
        scale_factor=run.scale_factor,
    )
    name = run.text_encoder or found.args.get("text_encoder")
    if not isinstance(name, str):
        raise Mistake(f"{path} does not name its text encoder.\nFound: {name!r}.\nPass --text-encoder.")
    encoder = load_text_encoder(name, device=run.device)
    length = found.args.get("context_length", encoder.length)
    prompts = encoded_prompts(encoder, texts, (length, sizes["context_size"]), str(path))
    sampler = ImageSampler(
        vae,
        scaling,
        (sizes["in_channels"], sizes["input_size"], sizes["input_size"]),
        numbers_of,
        steps=run.steps,
        guidance=Guidance(run.cfg_scale, prompts.null, run.guidance_low, run.guidance_high),
        seed=run.seed,
        method=run.sampler,
    )
    parts = {"weights": model, "vae_weights": vae, "text_encoder_weights": encoder.model}
    identity = {name: weights_digest(part)[:16] for name, part in parts.items()}
    identity |= {"scale_factor": scaling.scale, "shift_factor": scaling.shift}
    return Job(model, prompts, sampler, identity, f"{run_of(path)}, {found.steps} steps")


def main(argv: Sequence[str] | None = None) -> Path:
    """Make the images that are missing; return the picture."""
    run = options(argv)
    run.device = default_device(run.device)
    loaded = [mmdit_from_checkpoint(newest_checkpoint(path), weights=run.weights) for path in run.checkpoint]
    names = [f"{run_of(Path(found.source))}-{found.steps}" for _, found in loaded]
    if len(set(names)) < len(names):
        raise Mistake(f"The checkpoints are not told apart by their runs' names and steps.\nFound: {names}.")
    texts = run.prompts or loaded[0][1].args.get("prompts")
    if not texts:
        raise Mistake(f"{loaded[0][1].source} names no prompts of its own pictures.\nPass --prompts TEXT TEXT ...")
    jobs = {name: new_job(run, *found, texts) for name, found in zip(names, loaded, strict=True)}
    decided = ("sampler", "steps", "cfg_scale", "guidance_low", "guidance_high", "seed")
    settings = {"checkpoints": {name: job.identity for name, job in jobs.items()}, "prompts": texts}
    open_run_folder(run.out, settings | {name: getattr(run, name) for name in decided})
    rows = {}
    for name, job in jobs.items():
        folder, model = run.out / name, job.prompts.conditioned(job.model.to(run.device))
        folder.mkdir(exist_ok=True)
        for numbers in progress(batches_left(folder, len(texts), run.batch_size), name):
            write_missing(folder, numbers, job.sampler.images(model, numbers, run.device))
        rows[job.heading] = np.stack([read_image(folder / png_name(n)) for n in range(len(texts[:SHOWN]))])
        job.model.cpu()
    picture = run.out / "prompts.png"
    save_captioned(rows, texts[:SHOWN], picture)
    print(f"{len(texts)} images of each of {len(rows)} checkpoints, and {picture}.")
    return picture


if __name__ == "__main__":
    run_script(main)
