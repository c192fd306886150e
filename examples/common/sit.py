"""The field's SiT: the same parameter names, function and initial weights as the SiT and REPA repositories.

Checkpoints of either load strictly, once heads that are no part of the backbone (``projectors.*``) are left out.
Source followed: Ma et al., 2024, "SiT", https://arxiv.org/abs/2401.08740 and the block of DiT (Peebles and Xie, 2023).
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from common.options import Mistake

# Size letter -> depth, hidden_size, num_heads, as published; each with a patch of 2, 4 or 8.
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens by a strided convolution: (N, C, H, W) to (N, T, D), row by row."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        """Cut latents into tokens."""
        return rearrange(self.proj(latents), "n d h w -> n (h w) d")


class TimestepEmbedder(nn.Module):
    """256 cosines and sines of t itself (in [0, 1], not times 1000), then a two-layer MLP: (N,) to (N, D)."""

    frequency_channels = 256

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(self.frequency_channels, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        """Embed the times."""
        half = self.frequency_channels // 2
        k = torch.arange(half, dtype=torch.float32, device=t.device)
        angles = t.float()[:, None] * torch.exp(-math.log(10_000) * k / half)  # (N, 128)
        embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)  # (N, 256)
        return self.mlp(embedding.to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Class table whose last row is the null class; in training mode labels become it with ``dropout_prob``.

    Built with dropout 0 there is no null row, and the table has ``num_classes`` rows. (N,) integers to (N, D).
    """

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob
        self.embedding_table = nn.Embedding(num_classes + int(dropout_prob > 0), hidden_size)

    def forward(self, labels: Tensor) -> Tensor:
        """Embed the labels, some of them dropped in training mode."""
        if self.training and self.dropout_prob > 0:
            dropped = torch.rand(labels.shape[0], device=labels.device) < self.dropout_prob
            labels = torch.where(dropped, self.num_classes, labels)
        return self.embedding_table(labels)


class Attention(nn.Module):
    """Multi-head self-attention; ``qk_norm`` adds a LayerNorm over each head's channels of q and of k."""

    def __init__(self, hidden_size: int, num_heads: int, *, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        head_size = hidden_size // num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm: nn.Module = nn.LayerNorm(head_size) if qk_norm else nn.Identity()
        self.k_norm: nn.Module = nn.LayerNorm(head_size) if qk_norm else nn.Identity()
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over the tokens."""
        q, k, v = rearrange(self.qkv(x), "n t (qkv h d) -> qkv n h t d", qkv=3, h=self.num_heads)
        x = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(rearrange(x, "n h t d -> n t (h d)"))


class Mlp(nn.Module):
    """Linear, GELU (tanh approximation), Linear."""

    def __init__(self, hidden_size: int, mlp_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_size)
        self.fc2 = nn.Linear(mlp_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to each token alone."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``x (1 + scale) + shift``, one shift and scale a sample: (N, T, D) and twice (N, D) -> (N, T, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class SiTBlock(nn.Module):
    """Transformer block, norms modulated and branches gated by the condition (adaLN-Zero): (N, T, D), (N, D)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, *, qk_norm: bool) -> None:
        super().__init__()
        norm = partial(nn.LayerNorm, hidden_size, elementwise_affine=False, eps=1e-6)
        self.norm1 = norm()
        self.attn = Attention(hidden_size, num_heads, qk_norm=qk_norm)
        self.norm2 = norm()
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Apply attention and MLP, modulated by c."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_a.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_a, scale_a))
        return x + gate_m.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_m, scale_m))


class FinalLayer(nn.Module):
    """Modulated norm and a Linear to the patch's pixels: (N, T, D), (N, D) -> (N, T, p * p * out_channels)."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size**2 * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Turn tokens into flat patches, modulated by c."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def sincos_position_embedding(hidden_size: int, grid_size: int) -> Tensor:
    """2-d sine-cosine positions: half the channels for the column first, half for the row, each sin then cos.

    Frequencies are ``10000**(-k / (D / 4))``, k = 0 .. D / 4 - 1, computed in float64.

    Returns:
        (1, grid_size**2, hidden_size), float32.
    """
    quarter = hidden_size // 4
    frequencies = 10_000 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    row, column = torch.meshgrid(*[torch.arange(grid_size, dtype=torch.float64)] * 2, indexing="ij")
    halves = []
    for position in (column, row):
        angles = position.reshape(-1, 1) * frequencies  # (T, D / 4)
        halves += [angles.sin(), angles.cos()]
    return torch.cat(halves, dim=1).float().unsqueeze(0)


def check_sizes(name: str, input_size: int, patch_size: int, hidden_size: int, num_heads: int) -> None:
    """Raise a `Mistake` if the sizes do not divide."""
    if input_size % patch_size or hidden_size % num_heads or hidden_size % 4:
        raise Mistake(
            f"{name} needs input_size divisible by patch_size, and hidden_size divisible by num_heads and by 4.\n"
            f"Found: {input_size=}, {patch_size=}, {hidden_size=}, {num_heads=}."
        )


def initialize(model: nn.Module, gated: Sequence[nn.Module]) -> None:
    """Draw the field's initial weights from the global generator; what modulates and the last layer begin at zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(model.x_embedder.proj.weight.flatten(1))  # a view: as a Linear on flat patches
    nn.init.zeros_(model.x_embedder.proj.bias)
    if hasattr(model, "y_embedder"):
        nn.init.normal_(model.y_embedder.embedding_table.weight, std=0.02)
    nn.init.normal_(model.t_embedder.mlp[0].weight, std=0.02)
    nn.init.normal_(model.t_embedder.mlp[2].weight, std=0.02)
    for module in [*gated, model.final_layer]:
        nn.init.zeros_(module.adaLN_modulation[1].weight)
    nn.init.zeros_(model.final_layer.linear.weight)


class SiT(nn.Module):
    """Scalable interpolant transformer on latents.

    Args:
        input_size: Side of the square latent, in latent pixels.
        patch_size: Latent pixels per token side.
        in_channels: Channels of the latents.
        hidden_size: Width D of the tokens, a multiple of 4 and of ``num_heads``.
        depth: Number of blocks, ``blocks.0`` to ``blocks.{depth - 1}``.
        num_heads: Attention heads.
        mlp_ratio: Width of the MLP over ``hidden_size``.
        class_dropout_prob: Probability that a label becomes the null class in training mode; 0 removes the null row.
        num_classes: Number of classes; this number is also the index of the null class.
        learn_sigma: The final layer has twice the channels and the second half is thrown away (SiT does, REPA not).
        qk_norm: LayerNorm on q and k (off in SiT and REPA; on in the released Self-Transcendence scripts).

    Shape:
        x: (N, C, H, W) noisy latents; t: (N,) times in [0, 1]; y: (N,) labels; returns: (N, C, H, W)

    Raises:
        Mistake: If the sizes do not divide.
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        check_sizes("SiT", input_size, patch_size, hidden_size, num_heads)
        self.patch_size, self.grid_size = patch_size, input_size // patch_size
        self.in_channels, self.num_classes, self.learn_sigma = in_channels, num_classes, learn_sigma
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.pos_embed = nn.Parameter(torch.empty(1, self.grid_size**2, hidden_size), requires_grad=False)
        self.blocks = nn.ModuleList(
            [SiTBlock(hidden_size, num_heads, mlp_ratio, qk_norm=qk_norm) for _ in range(depth)]
        )
        self.final_layer = FinalLayer(hidden_size, patch_size, in_channels * (2 if learn_sigma else 1))
        initialize(self, list(self.blocks))
        self.pos_embed.data.copy_(sincos_position_embedding(hidden_size, self.grid_size))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict the velocity of the noisy latents x at times t for labels y."""
        x = self.x_embedder(x) + self.pos_embed  # (N, T, D)
        c = self.t_embedder(t) + self.y_embedder(y)  # (N, D)
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer(x, c)  # (N, T, p * p * C)
        p, h = self.patch_size, self.grid_size
        x = rearrange(x, "n (h w) (p q c) -> n c (h p) (w q)", h=h, p=p, q=p)
        return x[:, : self.in_channels] if self.learn_sigma else x


def published_sizes(name: str) -> dict[str, int]:
    """What `SiT` is told for a published name, as "SiT-B/2": depth, hidden_size, num_heads and patch_size.

    Raises:
        Mistake: If the name is not a size S, B, L or XL with a patch of 2, 4 or 8.
    """
    known = {f"SiT-{size}/{patch}": (*SIZES[size], patch) for size in SIZES for patch in (2, 4, 8)}
    if name not in known:
        raise Mistake(f"There is no SiT named {name!r}.\nKnown: {', '.join(known)}.")
    return dict(zip(("depth", "hidden_size", "num_heads", "patch_size"), known[name], strict=True))


def build_sit(name: str, **settings: object) -> SiT:
    """A SiT by its published name, as "SiT-B/2", with other ``settings`` of `SiT`; errors as of `published_sizes`."""
    return SiT(**published_sizes(name), **settings)
