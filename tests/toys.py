"""One small diffusion transformer whose options make it look like the backbones that people have.

Its weights are not zero-initialised: adaLN-Zero would make every check of a gradient pass for nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


class ToyDiT(nn.Module):
    """SiT in small: ``(x, t, y)`` -> (N, C, H, W), labels dropped inside in train mode.

    Args:
        depth: Number of blocks.
        width: D.
        channels: Latent channels C.
        patch_size: Latent pixels per token side.
        num_classes: Classes; the null class is the last row of the table, present if ``dropout`` is above 0.
        dropout: Probability of the null class in train mode.
        seed: Of the weights.
    """

    def __init__(
        self,
        depth: int = 4,
        width: int = 16,
        channels: int = 4,
        patch_size: int = 2,
        num_classes: int = 10,
        dropout: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.channels, self.patch_size, self.num_classes, self.dropout = channels, patch_size, num_classes, dropout
        self.x_embedder = nn.Conv2d(channels, width, patch_size, patch_size)
        self.t_embedder = nn.Sequential(nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width))
        self.y_embedder = nn.Embedding(num_classes + (dropout > 0), width)
        self.blocks = nn.ModuleList(ToyBlock(width) for _ in range(depth))
        self.final_layer = nn.Linear(width, patch_size**2 * channels)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            scale = 0.5 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)
        self.dropped: Tensor | None = None  # which labels the last forward in train mode dropped

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        n, _, height, width = x.shape
        if self.training and self.dropout > 0:
            self.dropped = torch.rand(n, device=y.device) < self.dropout
            y = torch.where(self.dropped, self.num_classes, y)
        t = t.float()
        c = self.t_embedder(torch.stack([torch.cos(3 * t), torch.sin(3 * t)], dim=1)) + self.y_embedder(y)
        tokens = self.x_embedder(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens, c)
        p, q = self.patch_size, self.channels
        patches = self.final_layer(tokens).reshape(n, height // p, width // p, p, p, q)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(n, q, height, width)


def batch(n: int = 8, channels: int = 4, size: int = 8, num_classes: int = 10, seed: int = 0) -> dict[str, Tensor]:
    """Latents x, noise, times in [0, 1] and labels y of a small batch."""
    g = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(n, channels, size, size, generator=g),
        "noise": torch.randn(n, channels, size, size, generator=g),
        "t": torch.rand(n, generator=g),
        "y": torch.randint(num_classes, (n,), generator=g),
    }
