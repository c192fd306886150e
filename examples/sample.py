"""Images from a SiT's checkpoint: PNGs, a grid to look at, and the ``.npz`` that ADM's evaluator reads.

Noise and label of image i depend on the seed and on i alone: how many processes share the work, how it is cut into
batches and where it was interrupted does not matter. What is finished in ``--out`` is not done again, and asking for
more images later adds them.

    python examples/sample.py --checkpoint runs/sit --out samples/sit --num-samples 1000
    torchrun --nproc_per_node=8 examples/sample.py --checkpoint runs/sit --out samples/paper --cfg-scale 1.9 \
        --guidance-high 0.65
"""

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from common.image_seeds import Drawn, classes_of, draw
from common.image_sets import to_uint8, write_npz, write_png
from common.load_sit import SiTCheckpoint, newest_checkpoint, sit_from_checkpoint
from common.options import at_least
from common.paths import PATHS, path_named
from common.pictures import tile
from common.processes import Processes
from common.run_folder import open_run_folder
from common.samplers import Guidance, Model, reversed_time, sample_ode, sample_sde
from common.sit import SiT
from common.sit_conventions import path_of, time_of
from common.tf32 import tf32
from common.training import progress
from common.vae import decode, load_vae
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from selftrans_reg.errors import CheckpointError, SettingError, ShapeError
from selftrans_reg.modules import fingerprint

GRID_COLUMNS, GRID_ROWS = 10, 4
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
SCALE_TOLERANCE = 1e-4  # relative: scale factors are written with five digits


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """What decides the images, and with what speed they come; `evaluate.py` takes the same."""
    add = parser.add_argument_group("the model").add_argument
    add("--weights", choices=["ema", "model"], default="ema", help="averaged (default) or raw")
    add("--model", help="the published name that the weights must have, as SiT-B/2")
    add("--num-heads", type=at_least(1), help="for files that do not say it")
    add("--num-classes", type=at_least(1), help="for files that do not say it")
    add(
        "--time",
        choices=["repa", "sit"],
        help="what training called t: repa, t = 1 is noise; sit, t = 1 is data, as for the published SiT. Needed for "
        "all files but those of this repository's trainer",
    )
    add("--path", choices=list(PATHS), help="for files that do not say it (default linear)")
    add("--vae", help="folder or hub name of diffusers' AutoencoderKL (default the run's own)")
    add("--scale-factor", type=float, help="of the latents (default the run's, or the VAE's)")
    add = parser.add_argument_group("the sampler").add_argument
    add("--sampler", choices=["euler", "heun", "sde"], default="sde", help="two ODEs, or the SDE (default)")
    add("--steps", type=at_least(1), default=250, help="default 250")
    add("--cfg-scale", type=float, default=1.0, help="default 1: the conditional model, unguided")
    add("--guidance-low", type=float, default=0.0, help="smallest t, 1 being noise, with guidance (default 0)")
    add("--guidance-high", type=float, default=1.0, help="largest t with guidance (default 1)")
    add("--num-samples", type=at_least(1), default=50_000, help="default 50,000")
    add(
        "--labels",
        default="random",
        help="random (default), balanced (0, 1, 2, ...), or classes to go through, as 207,360",
    )
    add("--seed", type=at_least(0), default=0, help="of noise and random labels")
    add("--batch-size", type=at_least(1), default=64, help="of each process (default 64)")
    add("--precision", choices=["fp32", "tf32", *HALF], default="fp32", help="of the model (default fp32)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default cuda where there is one")


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a file, or a run's folder: its newest")
    parser.add_argument("--out", type=Path, required=True, help="folder of the images")
    add_sampling_options(parser)
    return parser.parse_args(argv)


def open_vae(run: argparse.Namespace, found: SiTCheckpoint) -> AutoencoderKL:
    """The VAE that is given, or else the run's own, with the scale factor of the run's latents in its config.

    Raises:
        SettingError: If no VAE is named, or if its scale factor is not the one that the model was trained with.
        CheckpointError: If there is no VAE there, or its latents have other channels than the model's.
    """
    if run.scale_factor is not None and not run.scale_factor > 0:
        raise SettingError(f"--scale-factor is above 0; got {run.scale_factor}.")
    recorded = found.args.get("vae")
    name = run.vae or recorded
    if not isinstance(name, str):
        raise SettingError(
            f"{run.checkpoint} does not name its VAE.\nFound: vae={recorded!r}.\n"
            "Pass --vae: a folder of diffusers' AutoencoderKL, or its name on the hub, as stabilityai/sd-vae-ft-mse."
        )
    beside = run.checkpoint.parent.parent / name  # a run names its VAE from where it was started, or from its folder
    folder = Path(name) if Path(name).exists() or not beside.exists() else beside
    try:
        vae = load_vae(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"There is no VAE of diffusers' AutoencoderKL at {name!r}.\nFound: {str(error).splitlines()[0]}\n"
            "Pass --vae: its folder, or its name on the hub, downloaded or within reach."
        ) from error
    channels, needed = vae.config.latent_channels, found.settings["in_channels"]
    if channels != needed:
        raise CheckpointError(
            f"The VAE at {name!r} decodes latents of {channels} channels; {run.checkpoint} makes {needed}.\n"
            "Pass with --vae the one that the model's latents came from."
        )
    scale, own = run.scale_factor or found.args.get("scale_factor"), vae.config.scaling_factor
    if run.scale_factor is None and scale is not None and abs(scale / own - 1) > SCALE_TOLERANCE:
        raise SettingError(
            f"The VAE at {name!r} scales its latents by {own}; the model was trained on latents times {scale}.\n"
            "Pass with --vae the one that they came from, or --scale-factor to decode with another factor."
        )
    vae.register_to_config(scaling_factor=scale or own)
    return vae


@contextmanager
def precision(name: str, device_type: str) -> Iterator[None]:
    """The arithmetic of the model: float32, with or without TF32 in its products, or autocast to 16 bits."""
    with tf32(name == "tf32"), torch.autocast(device_type, HALF.get(name), enabled=name in HALF):
        yield


class Sampler(NamedTuple):
    """All that turns an image's number into the image."""

    run: argparse.Namespace
    model: Model
    vae: AutoencoderKL
    settings: dict[str, int]
    path: str
    classes: list[int] | None
    guidance: Guidance

    def check(self) -> None:
        """Go through all steps with a stand-in for the model, so that a setting without sense is named at once."""
        self._latents(lambda x, t, y: x, draw(0, [0], self.classes, self.settings))

    def images(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """The images (N, H, W, 3) of these numbers.

        Raises:
            ShapeError: If the model's latents are not finite.
        """
        run = self.run
        with precision(run.precision, torch.device(run.device).type):
            latents = self._latents(self.model, draw(run.seed, indices, self.classes, self.settings))
        broken = [index for index, image in zip(indices, latents, strict=True) if not image.isfinite().all()]
        if broken:
            raise ShapeError(
                f"The model's latents are not finite for {len(broken)} of {len(indices)} images.\n"
                f"Found: image {broken[0]}, with {run.sampler}, --steps {run.steps}, --precision {run.precision}.\n"
                "Take an earlier checkpoint, --precision fp32, or a smaller guidance scale."
            )
        return to_uint8(decode(self.vae, latents))

    def _latents(self, model: Model, drawn: Drawn) -> Tensor:
        run, noise, labels = self.run, drawn.noise.to(self.run.device), drawn.labels.to(self.run.device)
        settings = {"steps": run.steps, "guidance": self.guidance}
        if run.sampler == "sde":
            path = path_named(self.path)
            return sample_sde(model, noise, labels, generator=drawn.generators, path=path, **settings)
        return sample_ode(model, noise, labels, method=run.sampler, **settings)


def new_sampler(run: argparse.Namespace) -> tuple[Sampler, dict[str, object]]:
    """The sampler of a command line, and the settings that decide its images: those of the folder they lie in."""
    run.checkpoint = newest_checkpoint(run.checkpoint)
    sit, found = sit_from_checkpoint(
        run.checkpoint,
        weights=run.weights,
        model=run.model,
        num_heads=run.num_heads,
        num_classes=run.num_classes,
    )
    run.weights = found.entry or "bare"  # a state dict alone does not say which they are
    vae = open_vae(run, found)
    convention, path = time_of(run, found), path_of(run, found)
    null = sit.num_classes if found.settings["class_dropout_prob"] else None
    guidance = Guidance(run.cfg_scale, null, run.guidance_low, run.guidance_high)
    decided = {
        "checkpoint": run.checkpoint.name,
        "checkpoint_weights": _identity(sit),
        "vae_weights": _identity(vae),
        "scale_factor": vae.config.scaling_factor,
        "time": convention,
        "path": path,
        **{name: getattr(run, name) for name in ("sampler", "steps", "cfg_scale", "guidance_low", "guidance_high")},
        **{name: getattr(run, name) for name in ("labels", "seed", "precision")},
    }
    model = sit.to(run.device)
    sampler = Sampler(
        run,
        model if convention == "repa" else reversed_time(model),
        vae.to(run.device),
        found.settings,
        path,
        classes_of(run.labels, sit.num_classes),
        guidance,
    )
    sampler.check()
    return sampler, decided


def _identity(model: SiT | AutoencoderKL) -> str:
    return bytes(fingerprint(model, {})[:8].tolist()).hex()


def batches_left(folder: Path, run: argparse.Namespace) -> list[list[int]]:
    """Batches of image numbers, cut at the same places whatever is there, with an image missing in each."""
    there = {entry.name for entry in os.scandir(folder)}
    numbers = range(run.num_samples)
    cut = [list(numbers[start : start + run.batch_size]) for start in range(0, run.num_samples, run.batch_size)]
    return [batch for batch in cut if any(png_name(index) not in there for index in batch)]


def png_name(index: int) -> str:
    """The file of an image."""
    return f"{index:06d}.png"


def main(argv: Sequence[str] | None = None) -> Path:
    """Make the images that are missing; return the ``.npz`` of all."""
    run = options(argv)
    with Processes() as processes:
        return sample(run, processes)


def sample(run: argparse.Namespace, processes: Processes) -> Path:
    """As `main`, in these processes."""
    run.device = processes.device(run.device)
    sampler, decided = new_sampler(run)
    folder = run.out / "images"
    if processes.rank == 0:
        open_run_folder(run.out, decided)
        folder.mkdir(exist_ok=True)
    processes.meet()
    open_run_folder(run.out, decided)  # of a run that goes on, a slower process may have found a newer checkpoint
    left = batches_left(folder, run)
    processes.meet()  # or a slower process would find a faster one's images, and count the batches differently
    mine = left[processes.rank :: processes.count]
    start = time.perf_counter()
    for batch in progress(mine, "batches") if processes.rank == 0 else mine:
        for index, image in zip(batch, sampler.images(batch), strict=True):
            if not (folder / png_name(index)).exists():
                write_png(image, folder / png_name(index))
    processes.meet()
    made, seconds = sum(map(len, left)), time.perf_counter() - start
    if processes.rank == 0 and made:
        where = f"{processes.count} x {run.device}" if processes.count > 1 else run.device
        print(f"{made:,} images in {seconds:.0f} s on {where}: {made / seconds:.2f} images/s")
    npz = run.out / f"samples_{run.num_samples}.npz"
    if processes.rank == 0:
        finish(run, sampler, folder, npz)
    return npz


def finish(run: argparse.Namespace, sampler: Sampler, folder: Path, npz: Path) -> None:
    """The grid and the ``.npz`` of all images."""
    pngs = [folder / png_name(index) for index in range(run.num_samples)]
    if npz.exists():
        print(f"{npz}: finished before")
    else:
        labels = draw(run.seed, range(run.num_samples), sampler.classes, sampler.settings | {"in_channels": 0}).labels
        write_npz(pngs, labels.numpy(), npz)
    shown = [np.asarray(Image.open(png)) for png in pngs[: GRID_COLUMNS * GRID_ROWS]]
    grid = tile(torch.from_numpy(np.stack(shown)) / 255, GRID_COLUMNS, gap=2)
    write_png((grid * 255).round().astype(np.uint8), run.out / "grid.png")
    made = f"{run.num_samples:,} images of {run.checkpoint} ({run.weights} weights)"
    print(f"{made}: {folder}, {npz} and {run.out / 'grid.png'}.")


if __name__ == "__main__":
    main()
