"""Checkpoints and VAEs of a tiny size, as the trainer and others leave them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from common.demo import TEXT_LENGTH, TEXT_WIDTH, save_text_encoder
from common.mmdit import MMDiT
from common.sit import SiT
from common.vae import new_vae
from numpy.typing import NDArray
from PIL import Image

SIZES = {
    "input_size": 4, "patch_size": 1, "in_channels": 4, "hidden_size": 16, "depth": 2, "num_heads": 2, "num_classes": 5,
    "class_dropout_prob": 0.1, "learn_sigma": False, "qk_norm": False,
}  # fmt: skip
ARGS = SIZES | {"model": "demo", "time": "repa", "path": "linear", "data": "x", "vae": "vae"}
SCALE = 0.8
FAST = ["--steps=3", "--batch-size=4", "--num-samples=10", "--device=cpu"]


def weights(seed: int, **settings: Any) -> dict[str, torch.Tensor]:
    """Of a SiT without a zero among them, so that labels and times matter."""
    generator = torch.Generator().manual_seed(seed)
    state = SiT(**(SIZES | settings)).state_dict()
    return {key: 0.3 * torch.randn(value.shape, generator=generator) for key, value in state.items()}


def write_checkpoint(path: Path, steps: int, args: dict[str, Any] | None = None, **settings: Any) -> Path:
    content = {"model": weights(2 * steps, **settings), "ema": weights(2 * steps + 1, **settings), "steps": steps}
    if args is not None:
        content["args"] = args
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
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for step in steps:
            write_checkpoint(folder / f"checkpoints/{step:07d}.pt", step, ARGS | {"scale_factor": SCALE})
        if not (folder / "vae").exists():
            write_vae(folder / "vae")
    return folder


def write_prompt_run(folder: Path, *steps: int) -> Path:
    """A text-to-image run's folder: checkpoints of an MMDiT, the VAE and the text encoder that they name."""
    sizes = {"input_size": 4, "patch_size": 2, "in_channels": 4, "hidden_size": 16, "depth": 1, "num_heads": 2}
    sizes["context_size"] = TEXT_WIDTH
    vae, encoder = write_vae(folder / "vae"), folder / "text_encoder"
    save_text_encoder(encoder, seed=0)
    args = {"vae": str(vae), "text_encoder": str(encoder), "scale_factor": SCALE, "context_length": TEXT_LENGTH}
    args |= sizes | {"path": "linear"}
    (folder / "checkpoints").mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for step in steps:
            entries = {name: {k: 0.3 * torch.randn_like(v) for k, v in MMDiT(**sizes).state_dict().items()}
                       for name in ("model", "ema")}  # fmt: skip
            torch.save(entries | {"steps": step, "args": args}, folder / f"checkpoints/{step:07d}.pt")
    return folder


def images_of(out: Path) -> NDArray[np.uint8]:
    return np.stack([np.asarray(Image.open(path)) for path in sorted((out / "images").glob("*.png"))])
