"""The backbones that people train, as variations of the toy: how each is called, tapped and guided."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from backbones import Backbone
from torch import Tensor, nn
from toys import ToyDiT, ToyEDM2, ToyMaskDiT, ToyMDT, ToyMMDiT, ToyPixArt, ToyREPA, ToySRA, ToyUViT


def labels(n: int, g: torch.Generator) -> dict[str, Tensor]:
    return {"y": torch.randint(10, (n,), generator=g)}


def one_hot(n: int, g: torch.Generator) -> dict[str, Tensor]:
    """Labels of which the loop has dropped the second."""
    vectors = F.one_hot(torch.randint(10, (n,), generator=g), 10).float()
    vectors[1] = 0
    return {"class_labels": vectors}


def caption(n: int, g: torch.Generator) -> dict[str, Tensor]:
    lengths = torch.randint(1, 6, (n, 1), generator=g)
    return {"y": torch.randn(n, 1, 5, 6, generator=g), "mask": (torch.arange(5) < lengths).float()}


def toy(kind: Callable[..., nn.Module] = ToyDiT, **settings: Any) -> Callable[[int], nn.Module]:
    return lambda seed: kind(seed=seed, **settings).train()


def _like(
    build: Callable[[int], nn.Module], time: str, layers: str = "blocks.1 blocks.1 blocks.2", **more: Any
) -> Backbone:
    """With labels, unless ``more`` says otherwise; ``layers`` are stage 1's, the student's and the teacher's."""
    named = dict(zip(("shallow", "student", "teacher"), layers.split(), strict=True))
    usual = {"shape": (4, 8, 8), "conditions": labels, "null": {"y": 10}}
    return Backbone(build=build, time=time, **usual | named | more)


# sigma comes as (N, 1, 1, 1)
_SIGMA: dict[str, Any] = {"t": "sigma", "give_t": lambda sigma: sigma.reshape(-1, 1, 1, 1), "null": {"class_labels": 0}}

# fmt: off
LOOKALIKES = {
    "SiT": _like(toy(dropout=0.5), "sit"),
    "DiT": _like(toy(dropout=0.5, t_max=1000.0, out_channels=8), "ddpm"),
    "fast-DiT": _like(toy(t_max=1000.0, out_channels=8, checkpointing=True), "ddpm"),
    "REPA": _like(toy(ToyREPA, dropout=0.5), "repa"),
    "SRA": _like(toy(ToySRA), "repa", conditions=lambda n, g: labels(n, g) | {"ad": 3}),
    "MMDiT": _like(toy(ToyMMDiT), "repa", "joint_blocks.1 joint_blocks.1 joint_blocks.2", reads={"select": 1},
                   conditions=lambda n, g: {"context": torch.randn(n, 5, 6, generator=g)},
                   null={"context": torch.linspace(0, 1, 30).reshape(5, 6)}),
    "LightningDiT": _like(toy(patch_size=1, channels=8, dropout=0.5), "sit", shape=(8, 4, 4), patch_size=(1, 1),
                          positional=3),
    "U-ViT": _like(toy(ToyUViT), "uvit", "in_blocks.1 in_blocks.1 mid_block",
                   conditions=lambda n, g: {"y": labels(n, g)["y"].index_fill(0, torch.tensor([1]), 10)},
                   t="timesteps", reads={"tokens": slice(2, None)}),
    "MDT": _like(toy(ToyMDT), "ddpm", "en_inblocks.1 en_inblocks.1 en_outblocks.1", settings={"forward": "first"},
                 second_call={"enable_mask": True}),
    "MaskDiT": _like(toy(ToyMaskDiT), "maskdit", "model.decoder_blocks.0 model.decoder_blocks.0 model.decoder_blocks.1",
                     conditions=lambda n, g: one_hot(n, g) | {"mask_ratio": 0.5}, **_SIGMA,
                     teacher_reads={"call": {"fixed": {"mask_ratio": 0.0}}}),
    "EDM2": _like(toy(ToyEDM2), "edm", "unet.enc.16x16_block1 unet.enc.16x16_block1 unet.enc.16x16_block2", **_SIGMA,
                  conditions=one_hot, asks=16),
    "PixArt": _like(toy(ToyPixArt, t_max=1000.0), "ddpm", conditions=caption, t="timestep",
                    null={"y": torch.linspace(-1, 1, 30).reshape(1, 5, 6), "mask": torch.ones(5)}),
}
# fmt: on
