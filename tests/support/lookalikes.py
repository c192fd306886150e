"""The backbones that people train, as variations of the toy: how each is called, tapped and guided."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from backbones import Backbone
from torch import Tensor, nn
from toys import ToyDiT, ToyEDM2, ToyMaskDiT, ToyMDT, ToyMMDiT, ToyPixArt, ToyREPA, ToySRA, ToyUViT

_BLOCKS = {"shallow": "blocks.1", "student": "blocks.1", "teacher": "blocks.2"}
_LATENTS = (4, 8, 8)


def labels(n: int, g: torch.Generator) -> dict[str, Tensor]:
    return {"y": torch.randint(10, (n,), generator=g)}


def one_hot(n: int, g: torch.Generator) -> dict[str, Tensor]:
    """Labels of which the loop has dropped the second."""
    vectors = F.one_hot(torch.randint(10, (n,), generator=g), 10).float()
    vectors[1] = 0
    return {"class_labels": vectors}


def dropped_by_the_loop(n: int, g: torch.Generator) -> dict[str, Tensor]:
    return {"y": labels(n, g)["y"].index_fill(0, torch.tensor([1]), 10)}


def text(n: int, g: torch.Generator) -> dict[str, Tensor]:
    return {"context": torch.randn(n, 5, 6, generator=g)}


def caption(n: int, g: torch.Generator) -> dict[str, Tensor]:
    lengths = torch.randint(1, 6, (n, 1), generator=g)
    return {"y": torch.randn(n, 1, 5, 6, generator=g), "mask": (torch.arange(5) < lengths).float()}


def toy(kind: Callable[..., nn.Module] = ToyDiT, **settings: Any) -> Callable[[int], nn.Module]:
    return lambda seed: kind(seed=seed, **settings).train()


def _labelled(build: Callable[[int], nn.Module], time: str, **more: Any) -> Backbone:
    return Backbone(
        build=build, time=time, **{"shape": _LATENTS, "conditions": labels, "null": {"y": 10}} | _BLOCKS | more
    )


_STEPS: dict[str, Any] = {"t_dtype": torch.int64, "image": lambda output: output[:, :4]}

LOOKALIKES = {
    "SiT": _labelled(toy(dropout=0.5), "sit"),
    "DiT": _labelled(toy(dropout=0.5, t_max=1000.0, out_channels=8), "ddpm", **_STEPS),
    "fast-DiT": _labelled(toy(t_max=1000.0, out_channels=8, checkpointing=True), "ddpm", **_STEPS),
    "REPA": _labelled(toy(ToyREPA, dropout=0.5), "repa", image=lambda output: output[0]),
    "SRA": _labelled(
        toy(ToySRA),
        "repa",
        conditions=lambda n, g: labels(n, g) | {"ad": 3},
        image=lambda output: output[0],
    ),
    "MMDiT": _labelled(
        toy(ToyMMDiT),
        "repa",
        conditions=text,
        null={"context": torch.linspace(0, 1, 30).reshape(5, 6)},
        shallow="joint_blocks.1",
        student="joint_blocks.1",
        teacher="joint_blocks.2",
        reads={"select": 1},
        pick=lambda output, arguments: output[1],
    ),
    "LightningDiT": _labelled(
        toy(patch_size=1, channels=8, dropout=0.5), "sit", shape=(8, 4, 4), patch_size=(1, 1), positional=3
    ),
    "U-ViT": _labelled(
        toy(ToyUViT),
        "uvit",
        conditions=dropped_by_the_loop,
        shallow="in_blocks.1",
        student="in_blocks.1",
        teacher="mid_block",
        t="timesteps",
        reads={"tokens": slice(2, None)},
        pick=lambda output, arguments: output[:, 2:],
    ),
    "MDT": _labelled(
        toy(ToyMDT),
        "ddpm",
        shallow="en_inblocks.1",
        student="en_inblocks.1",
        teacher="en_outblocks.1",
        settings={"forward": "first"},
        second_call={"enable_mask": True},
        **_STEPS,
    ),
    "MaskDiT": _labelled(
        toy(ToyMaskDiT),
        "maskdit",
        conditions=lambda n, g: one_hot(n, g) | {"mask_ratio": 0.5},
        null={"class_labels": 0},
        shallow="model.decoder_blocks.0",
        student="model.decoder_blocks.0",
        teacher="model.decoder_blocks.1",
        t="sigma",
        t_axes=4,
        teacher_reads={"call": {"fixed": {"mask_ratio": 0.0}}},
        image=lambda output: output["x"],
    ),
    "EDM2": _labelled(
        toy(ToyEDM2),
        "edm",
        conditions=one_hot,
        null={"class_labels": 0},
        shallow="unet.enc.16x16_block1",
        student="unet.enc.16x16_block1",
        teacher="unet.enc.16x16_block2",
        t="sigma",
        t_axes=4,
        asks=16,
        pick=lambda output, arguments: output.flatten(2).transpose(1, 2),
    ),
    "PixArt": _labelled(
        toy(ToyPixArt, t_max=1000.0),
        "ddpm",
        conditions=caption,
        null={"y": torch.linspace(-1, 1, 30).reshape(1, 5, 6), "mask": torch.ones(5)},
        t="timestep",
        **_STEPS,
    ),
}
