"""One small diffusion transformer whose options make it look like the backbones that people have.

:class:`ToyDiT` is the whole model. The classes below it change what a backbone's own code changes, and no more: the
names and the order of the arguments, what is returned, what its blocks are called and return, which tokens stand beside
the image's, how time and null condition are given.

Its weights are not zero-initialised: adaLN-Zero would make every check of a gradient pass for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import selftrans_reg as st


class ToyBlock(nn.Module):
    """A DiT block: attention and MLP, both modulated by the condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)
        self.modulation = nn.Linear(width, 4 * width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, shift2, scale2 = self.modulation(F.silu(c)).unsqueeze(1).chunk(4, dim=-1)
        q, k, v = self.qkv(self.norm1(x) * (1 + scale1) + shift1).chunk(3, dim=-1)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x) * (1 + scale2) + shift2)))


class JointBlock(ToyBlock):
    """A block over text and image together: ``(context, x, c)`` -> (context, x)."""

    def forward(self, context: Tensor, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        context, x = super().forward(torch.cat([context, x], dim=1), c).tensor_split([context.shape[1]], dim=1)
        return context, x


class ConvBlock(nn.Module):
    """A U-Net's block: maps (N, D, H, W) in and out, nothing normalised that would tell D."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.modulation = nn.Linear(width, width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(x)) * (1 + self.modulation(c)[:, :, None, None])))


class ToyDiT(nn.Module):
    """SiT in small: ``(x, t, y)`` -> (N, C, H, W), labels dropped inside in train mode.

    The null class is the last row of the table, present if ``dropout`` is above 0. ``lists`` gives, instead of
    ``blocks``, names of lists of blocks with their lengths, in the order in which they run; of length 0 is a single
    block. ``t_max`` is the largest t, and ``checkpointing`` recomputes every block in the backward pass, reentrantly.
    """

    block: type[nn.Module] = ToyBlock

    def __init__(
        self,
        depth: int = 4,
        width: int = 16,
        channels: int = 4,
        patch_size: int = 2,
        num_classes: int = 10,
        dropout: float = 0.1,
        seed: int = 0,
        *,
        lists: Mapping[str, int] | None = None,
        out_channels: int | None = None,
        t_max: float = 1.0,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.channels, self.patch_size, self.num_classes, self.dropout = channels, patch_size, num_classes, dropout
        self.out_channels, self.t_max, self.checkpointing = out_channels or channels, t_max, checkpointing
        self.lists = {"blocks": depth} if lists is None else dict(lists)
        self.x_embedder = nn.Conv2d(channels, width, patch_size, patch_size)
        self.t_embedder = nn.Sequential(nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width))
        self.add_condition(width)
        for name, length in self.lists.items():
            self.add_module(name, nn.ModuleList(map(self.block, [width] * length)) if length else self.block(width))
        self.final_layer = nn.Linear(width, patch_size**2 * self.out_channels)
        self.draw_weights(seed)
        self.dropped: Tensor | None = None  # which labels the last forward in train mode dropped

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.to_image(self.through_blocks(self.to_tokens(x), self.condition(t, y)), x)

    def add_condition(self, width: int) -> None:
        self.y_embedder = nn.Embedding(self.num_classes + (self.dropout > 0), width)

    def draw_weights(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            scale = 0.5 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)

    def to_tokens(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, T, D)."""
        return self.x_embedder(x).flatten(2).transpose(1, 2)

    def embed_t(self, t: Tensor) -> Tensor:
        t = t.float() / self.t_max
        return self.t_embedder(torch.stack([torch.cos(3 * t), torch.sin(3 * t)], dim=1))

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        """(N, D), from time and labels, some of them dropped in train mode."""
        if self.training and self.dropout > 0:
            self.dropped = torch.rand(len(y), device=y.device) < self.dropout
            y = torch.where(self.dropped, self.num_classes, y)
        return self.embed_t(t) + self.y_embedder(y)

    def named_blocks(self, *names: str) -> list[nn.Module]:
        """The blocks of these lists in order; of all of them by default."""
        members = [getattr(self, name) for name in names or self.lists]
        return [block for m in members for block in (m if isinstance(m, nn.ModuleList) else [m])]

    def through_blocks(self, tokens: Tensor, c: Tensor) -> Tensor:
        for block in self.named_blocks():
            tokens = checkpoint(block, tokens, c, use_reentrant=True) if self.checkpointing else block(tokens, c)
        return tokens

    def to_image(self, tokens: Tensor, x: Tensor) -> Tensor:
        """(N, T, D) -> (N, C', H, W), of the size of ``x``."""
        n, _, height, width = x.shape
        p, q = self.patch_size, self.out_channels
        patches = self.final_layer(tokens).reshape(n, height // p, width // p, p, p, q)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(n, q, height, width)


class ToyREPA(ToyDiT):
    """Returns its projected features besides: (output, [zs])."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
        tokens = self.through_blocks(self.to_tokens(x), self.condition(t, y))
        return self.to_image(tokens, x), [tokens[..., :3]]


class ToySRA(ToyDiT):
    """Takes one argument more, and returns (output, feature, labels)."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor, ad: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        tokens = self.through_blocks(self.to_tokens(x), self.condition(t, y))
        return self.to_image(tokens, x), tokens, y


class ToyMMDiT(ToyDiT):
    """Text to image: ``(x, t, context)``, joint blocks that return (text, image), text dropped in the dataset."""

    block = JointBlock

    def __init__(self, depth: int = 4, seed: int = 0) -> None:
        super().__init__(seed=seed, lists={"joint_blocks": depth})

    def add_condition(self, width: int) -> None:
        self.context_embedder = nn.Linear(6, width)

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        tokens, text, c = self.to_tokens(x), self.context_embedder(context), self.embed_t(t)
        for block in self.joint_blocks:
            text, tokens = block(text, tokens, c)
        return self.to_image(tokens, x)


class ToyPixArt(ToyDiT):
    """``(x, timestep, y, mask)``: captions (N, 1, L, D'); the null caption is a buffer, used inside in train mode."""

    def add_condition(self, width: int) -> None:
        self.y_embedder = nn.Module()
        self.y_embedder.register_buffer("y_embedding", torch.linspace(-1, 1, 30).reshape(5, 6))
        self.caption_embedder = nn.Linear(6, width)

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        if self.training:
            dropped = torch.rand(len(y), device=y.device) < self.dropout
            y = torch.where(dropped[:, None, None, None], self.y_embedder.y_embedding, y)
        weights = mask / mask.sum(1, keepdim=True)  # (N, L)
        caption = (weights[:, :, None] * self.caption_embedder(y[:, 0])).sum(1)
        return self.to_image(self.through_blocks(self.to_tokens(x), self.embed_t(timestep) + caption), x)


class ToyUViT(ToyDiT):
    """``(x, timesteps, y)``; long skips; the blocks see [label, time, image tokens]; the loop gives the null label."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed=seed, lists={"in_blocks": 2, "mid_block": 0, "out_blocks": 2}, t_max=999.0)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor) -> Tensor:
        time, label = self.embed_t(timesteps), self.y_embedder(y)
        tokens = torch.cat([label[:, None], time[:, None], self.to_tokens(x)], dim=1)
        skips = []
        for block in self.in_blocks:
            tokens = block(tokens, time)
            skips.append(tokens)
        tokens = self.mid_block(tokens, time)
        for block in self.out_blocks:
            tokens = block(tokens + skips.pop(), time)
        return self.to_image(tokens[:, 2:], x)


def some_of(tokens: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """A share of the tokens in random order, and their places."""
    order = torch.rand(tokens.shape[:2], device=tokens.device).argsort(1)[:, : round(tokens.shape[1] * share)]
    kept = order[:, :, None].expand(-1, -1, tokens.shape[2])
    return tokens.gather(1, kept), kept


class ToyMDT(ToyDiT):
    """``(x, t, y, enable_mask)``: with the mask the encoder sees some of the tokens, in random order."""

    def __init__(self, seed: int = 0) -> None:
        lists = {"en_inblocks": 2, "en_outblocks": 2, "de_blocks": 1, "sideblocks": 1}
        super().__init__(seed=seed, lists=lists, t_max=1000.0, out_channels=8)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, enable_mask: bool = False) -> Tensor:
        full, c = self.to_tokens(x), self.condition(t, y)
        tokens, kept = some_of(full, 0.5) if enable_mask else (full, None)
        for block in self.named_blocks("en_inblocks", "en_outblocks"):
            tokens = block(tokens, c)
        if kept is not None:
            tokens = self.sideblocks[0](full.scatter(1, kept, tokens), c)
        return self.to_image(self.de_blocks[0](tokens, c), x)


class ToyMaskDiTNet(ToyDiT):
    """The network inside MaskDiT: one-hot labels; the encoder sees [cls, some tokens], the decoder every token."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed=seed, lists={"blocks": 3, "decoder_blocks": 2})

    def add_condition(self, width: int) -> None:
        self.y_embedder = nn.Linear(self.num_classes, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))

    def forward(self, x: Tensor, c_noise: Tensor, class_labels: Tensor, mask_ratio: float) -> Tensor:
        tokens, c = self.to_tokens(x), self.embed_t(c_noise) + self.y_embedder(class_labels)
        seen, kept = some_of(tokens, 1 - mask_ratio)
        seen = torch.cat([self.cls_token.expand(len(x), -1, -1), seen], dim=1)
        for block in self.blocks:
            seen = block(seen, c)
        tokens = torch.zeros_like(tokens).scatter(1, kept, seen[:, 1:])
        for block in self.decoder_blocks:
            tokens = block(tokens, c)
        return self.to_image(tokens, x)


class ToyMaskDiT(nn.Module):
    """``(x, sigma, class_labels, mask_ratio)`` -> {"x": image}; the null condition is a zero vector."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.model = ToyMaskDiTNet(seed)

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor, mask_ratio: float = 0.0) -> dict[str, Tensor]:
        return {"x": self.model(x, sigma.flatten().log() / 4, class_labels, mask_ratio)}


class ToyUNet(ToyDiT):
    """The network inside EDM2: blocks in dictionaries, maps (N, D, H, W) between them, one-hot labels."""

    def __init__(self, seed: int = 0, patch_size: int = 2) -> None:
        super().__init__(seed=seed, patch_size=patch_size, lists={})

    def add_condition(self, width: int) -> None:
        self.y_embedder = nn.Linear(self.num_classes, width)
        self.enc = nn.ModuleDict({f"16x16_block{i}": ConvBlock(width) for i in range(3)})
        self.dec = nn.ModuleDict({f"16x16_block{i}": ConvBlock(width) for i in range(2)})

    def forward(self, x: Tensor, c_noise: Tensor, class_labels: Tensor) -> Tensor:
        maps, c = self.x_embedder(x), self.embed_t(c_noise) + self.y_embedder(class_labels)
        for block in [*self.enc.values(), *self.dec.values()]:
            maps = block(maps, c)
        return self.to_image(maps.flatten(2).mT, x)


class ToyEDM2(nn.Module):
    """``(x, sigma, class_labels)`` -> image; the null condition is a zero vector."""

    def __init__(self, seed: int = 0, patch_size: int = 2) -> None:
        super().__init__()
        self.unet = ToyUNet(seed, patch_size)

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor) -> Tensor:
        return self.unet(x, sigma.flatten().log() / 4, class_labels)


def teacher_of(model: nn.Module, checkpoint: Any = None, **settings: Any) -> st.CFGFeatureTeacher:
    """A teacher of a model like :class:`ToyDiT`."""
    usual = {"layer": "blocks.2", "guidance_scale": 3.0, "null": {"y": 10}}
    return st.build_teacher(model, checkpoint, **usual | settings)


def batch(n: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """Latents x, noise, times in [0, 1] and labels y of a small batch."""
    g = torch.Generator().manual_seed(seed)
    x, noise = (torch.randn(n, 4, 8, 8, generator=g) for _ in range(2))
    return {"x": x, "noise": noise, "t": torch.rand(n, generator=g), "y": torch.randint(10, (n,), generator=g)}
