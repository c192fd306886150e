"""The ways to train that the benchmark of a step's cost compares, and the batches that they train on."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import selftrans_reg as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.paths import interpolate, linear_path
from common.sit import SIZES, SiT

WINDOW = (0.4, 0.7)
WEIGHT = 0.5
VARIANTS = ("no method", "taps only", "stage 1", "stage 2", "rows known", "released way", "swapped weights")


@dataclass(frozen=True)
class Shape:
    """The size of one comparison. Depths count blocks, as the paper does."""

    depth: int = 12
    width: int = 384
    heads: int = 6
    tokens_per_side: int = 8
    batch: int = 32
    student: int = 6
    teacher: int = 8
    window: tuple[float, float] = WINDOW

    def model(self) -> SiT:
        """A SiT of this size. Its gates are opened: at the initial zeros attention would see constant input."""
        model = SiT(2 * self.tokens_per_side, 2, 4, self.width, self.depth, self.heads, learn_sigma=False)
        for name, parameter in model.named_parameters():
            if "adaLN" in name or "final_layer" in name:
                nn.init.normal_(parameter, std=0.02)
        return model


def published(name: str, batch: int) -> Shape:
    """The shape of SiT-B/2, SiT-XL/2, ... at 256 tokens with the published layers."""
    depth, width, heads = SIZES[name.removeprefix("SiT-").removesuffix("/2")]
    return Shape(depth, width, heads, 16, batch, depth // 2, 2 * depth // 3)


@dataclass(frozen=True)
class Batch:
    """Noisy latents with times stratified over [0, 1], so that every batch has the window's share inside it.

    ``inside`` holds the indices of the rows in the default window, on the host.
    """

    latents: Tensor
    x_t: Tensor
    velocity: Tensor
    t: Tensor
    y: Tensor
    inside: Tensor

    @classmethod
    def draw(cls, shape: Shape, generator: torch.Generator, device: str) -> Batch:
        """The next batch of the generator."""
        n, side = shape.batch, 2 * shape.tokens_per_side
        latents, noise = torch.randn(2, n, 4, side, side, generator=generator).unbind()
        t = (torch.randperm(n, generator=generator) + 0.5) / n
        x_t, velocity = interpolate(linear_path, latents, noise, t)
        y = torch.randint(1000, (n,), generator=generator)
        inside = ((t >= WINDOW[0]) & (t <= WINDOW[1])).nonzero().squeeze(1)
        return cls(*(tensor.to(device) for tensor in (latents, x_t, velocity, t, y)), inside)


class Variant:
    """One way to train: a model that shares the base model's parameters, and what is added to its loss."""

    def __init__(self, name: str, base: nn.Module) -> None:
        self.name = name
        self.model = share(base)
        self.extra: list[nn.Parameter] = []
        self.teacher: nn.Module | None = None

    def loss(self, denoising: Tensor, batch: Batch) -> Tensor:
        """The loss to call backward on."""
        return denoising


class TapsOnly(Variant):
    """The hooks alone: the record is made and thrown away."""

    def __init__(self, name: str, base: nn.Module, shape: Shape) -> None:
        super().__init__(name, base)
        self.tap = st.FeatureTap(self.model, f"blocks.{shape.student - 1}")

    def loss(self, denoising: Tensor, batch: Batch) -> Tensor:
        """The denoising loss alone."""
        self.tap.discard()
        return denoising


class Ours(Variant):
    """The library's criterion."""

    def __init__(self, name: str, base: nn.Module, make: Callable[[nn.Module], st.SelfTransLoss]) -> None:
        super().__init__(name, base)
        self.criterion = make(self.model)
        self.extra = list(self.criterion.parameters())
        self.teacher = self.criterion.teacher

    def loss(self, denoising: Tensor, batch: Batch) -> Tensor:
        """Denoising and alignment."""
        return self.criterion(denoising, latents=batch.latents).total


class RowsKnown(Ours):
    """The same, told which rows are inside: on a GPU, what waiting for their number costs is the difference."""

    def loss(self, denoising: Tensor, batch: Batch) -> Tensor:
        """As the library's, without the wait."""
        with patch("selftrans_reg.alignment.Gated.rows", lambda gated: batch.inside):
            return super().loss(denoising, batch)


class Plain(Variant):
    """The method written out without the library: every row, guidance from whole batches."""

    teacher: nn.Module

    def __init__(self, name: str, base: nn.Module, shape: Shape, teacher: nn.Module) -> None:
        super().__init__(name, base)
        self.shape = shape
        self.teacher = teacher
        device = next(base.parameters()).device
        self.head = st.ProjectionHead(shape.width, shape.width, device=device)
        self.extra = list(self.head.parameters())
        self.tokens: dict[int, Tensor] = {}
        self.keep(shape.student)

    def keep(self, depth: int) -> None:
        """Have the tokens behind a block of the live model kept until the loss is computed."""

        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            self.tokens[depth] = output

        self.model.blocks[depth - 1].register_forward_hook(hook)

    def guided(self, batch: Batch) -> Tensor:
        """f_u + w (f_c − f_u) for every row."""
        raise NotImplementedError

    def loss(self, denoising: Tensor, batch: Batch) -> Tensor:
        """Denoising, and mean(mask) · mean(loss) over every sample."""
        tokens = self.tokens[self.shape.student]
        with torch.no_grad():
            target = self.guided(batch)
        self.tokens.clear()
        return denoising + WEIGHT * len(batch.inside) / len(batch.t) * F.mse_loss(
            self.head(tokens).float(), target.float()
        )


class Released(Plain):
    """As the released code: one doubled batch of every row, left after the teacher's block."""

    def guided(self, batch: Batch) -> Tensor:
        """Runs the blocks by hand, as far as the teacher's."""
        x, t = batch.x_t.repeat(2, 1, 1, 1), batch.t.repeat(2)
        y = torch.cat([batch.y, torch.full_like(batch.y, 1000)])
        tokens = self.teacher.x_embedder(x) + self.teacher.pos_embed
        c = self.teacher.t_embedder(t) + self.teacher.y_embedder(y)
        for block in self.teacher.blocks[: self.shape.teacher]:
            tokens = block(tokens, c)
        conditional, unconditional = tokens.chunk(2)
        return unconditional + 30.0 * (conditional - unconditional)


class Swapped(Plain):
    """Teacher weights copied into the live model and back, two whole forwards in between."""

    def __init__(self, name: str, base: nn.Module, shape: Shape, teacher: nn.Module) -> None:
        super().__init__(name, base, shape, teacher)
        self.keep(shape.teacher)

    def guided(self, batch: Batch) -> Tensor:
        """Runs the live model twice with the teacher's weights."""
        live = [p.detach().clone() for p in self.model.parameters()]
        self._copy(self.teacher.parameters())
        self.model.eval()
        features = []
        for y in (batch.y, torch.full_like(batch.y, 1000)):
            self.model(batch.x_t, batch.t, y)
            features.append(self.tokens[self.shape.teacher])
        self.model.train()
        self._copy(iter(live))
        conditional, unconditional = features
        return unconditional + 30.0 * (conditional - unconditional)

    def _copy(self, source: Iterator[Tensor]) -> None:
        for parameter, value in zip(self.model.parameters(), source, strict=True):
            parameter.data.copy_(value)
        torch.clear_autocast_cache()  # it holds what the weights were before, in half precision


def share(model: nn.Module) -> nn.Module:
    """A copy of the modules around the same parameters: hooks and compiled code of its own, no memory."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def variants(shape: Shape, base: nn.Module, chosen: set[str], compile_teacher: bool) -> list[Variant]:
    """The ways to compare, those chosen. Every teacher has the same weights, which are not the base model's."""
    window, trained = shape.window, shape.model().to(next(base.parameters()).device)

    def stage1(model: nn.Module) -> st.SelfTransLoss:
        return st.SelfTransLoss.stage1(
            model, layer="blocks.1", time="repa", latent_channels=4, patch_size=2, window=window
        )

    def stage2(model: nn.Module) -> st.SelfTransLoss:
        teacher = st.build_teacher(
            copy.deepcopy(trained),
            None,
            layer=f"blocks.{shape.teacher - 1}",
            guidance_scale=30.0,
            null={"y": 1000},
            compile=compile_teacher,
        )
        return st.SelfTransLoss.stage2(
            model, layer=f"blocks.{shape.student - 1}", teacher=teacher, time="repa", window=window
        )

    def whole_teacher() -> nn.Module:
        return copy.deepcopy(trained).eval().requires_grad_(False)

    def run_by_hand() -> nn.Module:
        teacher = whole_teacher()
        if compile_teacher:  # as the library's; swapping runs the live model, which is compiled as a whole
            for block in teacher.blocks:
                block.compile()
        return teacher

    makers: dict[str, Callable[[str], Variant]] = {
        "no method": lambda name: Variant(name, base),
        "taps only": lambda name: TapsOnly(name, base, shape),
        "stage 1": lambda name: Ours(name, base, stage1),
        "stage 2": lambda name: Ours(name, base, stage2),
        "rows known": lambda name: RowsKnown(name, base, stage2),
        "released way": lambda name: Released(name, base, shape, run_by_hand()),
        "swapped weights": lambda name: Swapped(name, base, shape, whole_teacher()),
    }
    return [make(name) for name, make in makers.items() if name in chosen]
