"""Images for prompts from checkpoints of `mmdit_coco.py`: PNGs, and a picture with a row for each checkpoint.

The noise of an image depends on the seed and on its prompt's place in the list alone. What is finished in ``--out`` is
not done again.

    python examples/sample_prompts.py --checkpoint runs/coco/self --out samples/coco --cfg-scale 4 \
        --prompts "a cat asleep on a red sofa" "a kite above a beach"
    python examples/sample_prompts.py --checkpoint runs/t2i/self/checkpoints/*.pt --out samples/along-training
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from common.image_sets import write_png
from common.load_mmdit import MMDiTCheckpoint, mmdit_from_checkpoint
from common.load_sit import newest_checkpoint
from common.mmdit import MMDiT
from common.options import at_least
from common.prompts import PromptSampler, encoded_prompts, save_captioned
from common.run_folder import open_run_folder
from common.samplers import Guidance
from common.text_features import TextEncoder, load_text_encoder
from common.training import progress
from numpy.typing import NDArray
from PIL import Image
from sample import open_vae

from selftrans_reg.errors import SettingError
from selftrans_reg.modules import fingerprint

SHOWN = 16  # prompts in the picture


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=Path, nargs="+", required=True, help="files, or runs' folders: the newest of each")
    add("--out", type=Path, required=True, help="folder of the images")
    add("--prompts", nargs="+", help="by default those of the run's own pictures")
    add("--prompts-file", type=Path, help="one prompt a line, instead")
    add("--weights", choices=["ema", "model"], default="ema")
    add("--text-encoder", help="CLIP text model: folder or hub name; by default the run's own")
    add("--vae", help="folder or hub name of diffusers' AutoencoderKL; by default the run's own")
    add("--scale-factor", type=float, help="of the latents; by default the run's")
    add("--sampler", choices=["euler", "heun", "sde"], default="heun", help="two ODEs, or the SDE (default heun)")
    add("--steps", type=at_least(1), default=50, help="default 50")
    add("--cfg-scale", type=float, default=2.0, help="1 is the conditional model, unguided (default 2)")
    add("--guidance-low", type=float, default=0.0, help="smallest t, 1 being noise, with guidance")
    add("--guidance-high", type=float, default=1.0, help="largest t with guidance")
    add("--seed", type=at_least(0), default=0)
    add("--batch-size", type=at_least(1), default=32)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def prompts_of(run: argparse.Namespace, found: MMDiTCheckpoint) -> list[str]:
    """The prompts of the command line, of a file, or of the run's own pictures.

    Raises:
        SettingError: If there are none, or they are given twice.
    """
    if run.prompts is not None and run.prompts_file is not None:
        raise SettingError("--prompts and --prompts-file are two ways to give the same.\nPass one of them.")
    if run.prompts_file is not None and not run.prompts_file.is_file():
        raise SettingError(f"There is no file {run.prompts_file}.\nPass with --prompts-file one with a prompt a line.")
    if run.prompts_file is not None:
        texts = run.prompts_file.read_text().splitlines()
    else:
        texts = run.prompts or found.args.get("prompts")
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise SettingError(
            f"There are no prompts, or empty ones.\nFound: {texts!r:.200}.\nPass --prompts TEXT TEXT ..."
        )
    return texts


def encoder_of(run: argparse.Namespace, found: MMDiTCheckpoint, checkpoint: Path) -> TextEncoder:
    """The text encoder that is given, or the run's own.

    Raises:
        SettingError: If none is named, or its texts have another length than those that the model was trained on.
        ShapeError: If its features have another width.
    """
    name = run.text_encoder or found.args.get("text_encoder")
    if not isinstance(name, str):
        raise SettingError(f"{checkpoint} does not name its text encoder.\nFound: {name!r}.\nPass --text-encoder.")
    encoder = load_text_encoder(name, device=run.device)
    encoder.check_width(found.settings["context_size"], str(checkpoint))
    if encoder.length != found.args.get("context_length", encoder.length):
        raise SettingError(
            f"{name} gives {encoder.length} tokens a text; {checkpoint} was trained on "
            f"{found.args['context_length']}.\nPass with --text-encoder the one that its captions were encoded with."
        )
    return encoder


def run_of(checkpoint: Path) -> str:
    """The name of the run that left a checkpoint."""
    return checkpoint.parent.parent.name if checkpoint.parent.name == "checkpoints" else checkpoint.stem


class Job(NamedTuple):
    """A checkpoint's model, what samples from it, what decides its images, and what their row is called."""

    model: MMDiT
    sampler: PromptSampler
    identity: dict[str, object]
    heading: str


def new_job(
    run: argparse.Namespace, checkpoint: Path, model: MMDiT, found: MMDiTCheckpoint, texts: Sequence[str]
) -> Job:
    """Put together what a checkpoint needs, as far as nothing is written."""
    vae = open_vae(argparse.Namespace(**(vars(run) | {"checkpoint": checkpoint})), found)
    encoder = encoder_of(run, found, checkpoint)
    sizes, scale = found.settings, vae.config.scaling_factor
    sampler = PromptSampler(
        vae,
        encoded_prompts(encoder, texts),
        shape=(sizes["in_channels"], sizes["input_size"], sizes["input_size"]),
        scale=scale,
        steps=run.steps,
        guidance=Guidance(run.cfg_scale, None, run.guidance_low, run.guidance_high),
        seed=run.seed,
        method=run.sampler,
    )
    parts = {"weights": model, "vae_weights": vae, "text_encoder_weights": encoder.model}
    identity = {name: bytes(fingerprint(part, {})[:8].tolist()).hex() for name, part in parts.items()}
    return Job(model, sampler, {**identity, "scale_factor": scale}, f"{run_of(checkpoint)}, {found.steps} steps")


def finished(
    folder: Path, sampler: PromptSampler, model: MMDiT, batch_size: int, count: int
) -> list[NDArray[np.uint8]]:
    """Write the images that are missing; the first ones of all, as far as they are shown."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{number:06d}.png" for number in range(count)]
    # Cut at the same places whatever is there: rounding differs with the rows of a batch.
    starts = [start for start in range(0, count, batch_size) if not all(p.exists() for p in paths[start:][:batch_size])]
    for start in progress(starts, folder.name):
        numbers = range(start, min(start + batch_size, count))
        for number, image in zip(numbers, sampler.images(model, numbers), strict=True):
            if not paths[number].exists():
                write_png(image, paths[number])
    return [np.asarray(Image.open(path)) for path in paths[:SHOWN]]


def main(argv: Sequence[str] | None = None) -> Path:
    """Make the images that are missing; return the picture."""
    run = options(argv)
    checkpoints = [newest_checkpoint(path) for path in run.checkpoint]
    loaded = [mmdit_from_checkpoint(path, weights=run.weights) for path in checkpoints]
    names = [f"{run_of(path)}-{found.steps}" for path, (_, found) in zip(checkpoints, loaded, strict=True)]
    if len(set(names)) < len(names):
        raise SettingError(f"The checkpoints are not told apart by their runs' names and steps.\nFound: {names}.")
    texts = prompts_of(run, loaded[0][1])
    jobs = {
        name: new_job(run, checkpoint, model, found, texts)
        for name, checkpoint, (model, found) in zip(names, checkpoints, loaded, strict=True)
    }
    decided = ("sampler", "steps", "cfg_scale", "guidance_low", "guidance_high", "seed")
    settings = {"checkpoints": {name: job.identity for name, job in jobs.items()}, "prompts": texts}
    open_run_folder(run.out, settings | {name: getattr(run, name) for name in decided})
    rows = {}
    for name, job in jobs.items():
        images = finished(run.out / name, job.sampler, job.model.to(run.device), run.batch_size, len(texts))
        rows[job.heading] = np.stack(images)
        job.model.cpu()
    picture = run.out / "prompts.png"
    save_captioned(rows, texts[:SHOWN], picture)
    print(f"{len(texts)} images of each of {len(rows)} checkpoints, and {picture}.")
    return picture


if __name__ == "__main__":
    main()
