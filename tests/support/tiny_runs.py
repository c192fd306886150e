"""Checkpoints and VAEs of a tiny size, as the trainer and others leave them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common.demo import TEXT_WIDTH
from common.mmdit import MMDiT
from common.sit import SiT
from common.vae import new_vae
from numpy.typing import NDArray
from PIL import Image

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SIZES = {
    "input_size": 4, "patch_size": 1, "in_channels": 4, "hidden_size": 16, "depth": 2, "num_heads": 2, "num_classes": 5,
    "class_dropout_prob": 0.1, "learn_sigma": False, "qk_norm": False,
}  # fmt: skip
MMDIT_SIZES = {
    "input_size": 4, "patch_size": 2, "in_channels": 4, "hidden_size": 16, "depth": 1, "num_heads": 2,
    "context_size": TEXT_WIDTH,
}  # fmt: skip
ARGS = SIZES | {"model": "demo", "time": "repa", "path": "linear", "data": "x", "vae": "vae"}
SCALE = 0.8
FAST = ["--steps=3", "--batch-size=4", "--num-samples=10", "--device=cpu"]


def write_checkpoint(
    path: Path, steps: int, args: dict[str, Any] | None = None, kind: type[SiT | MMDiT] = SiT, **settings: Any
) -> Path:
    """Raw and averaged weights without a zero among them, so that labels and times matter; the steps decide them."""
    with torch.random.fork_rng():
        shapes = kind(**((SIZES if kind is SiT else MMDIT_SIZES) | settings)).state_dict()
    generator = torch.Generator().manual_seed(steps)
    content: dict[str, Any] = {"steps": steps} if args is None else {"steps": steps, "args": args}
    for entry in ("model", "ema"):
        content[entry] = {name: 0.3 * torch.randn(v.shape, generator=generator) for name, v in shapes.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def write_vae(folder: Path, scale: float = SCALE, **config: Any) -> Path:
    """A VAE of grey images of 16x16; the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = new_vae(16, 1, widths=(8, 8, 8))
    vae.register_to_config(scaling_factor=scale, **config)
    vae.save_pretrained(folder)
    return folder


def write_run(folder: Path, *steps: int) -> Path:
    """A run's folder: a checkpoint after each number of steps, and the VAE that they name."""
    for step in steps:
        write_checkpoint(folder / f"checkpoints/{step:07d}.pt", step, ARGS | {"scale_factor": SCALE})
    if not (folder / "vae").exists():
        write_vae(folder / "vae")
    return folder


def torchrun(script: str, *arguments: str) -> str:
    """What an example prints in two processes of one thread each, on the CPU even where there is a GPU."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    order = [*launch, str(EXAMPLES / script), *arguments]
    run = subprocess.run(order, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def images_of(out: Path) -> NDArray[np.uint8]:
    return np.stack([np.asarray(Image.open(path)) for path in sorted((out / "images").glob("*.png"))])
