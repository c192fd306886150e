"""A two-stream transformer for text to image: text and image tokens keep weights of their own and attend together.

Parameter names and function are those of Stable Diffusion 3's reference code without its pooled text vector and its
qk-norm, at the width of REPA's text-to-image runs (32 a head, not 64); the time enters as in SiT, in [0, 1].
Sources followed: Esser et al., 2024, "Scaling Rectified Flow Transformers", https://arxiv.org/abs/2403.03206, and
https://github.com/Stability-AI/sd3-ref for the names.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from common.options import Mistake
from common.sit import (
    FinalLayer,
    Mlp,
    PatchEmbed,
    TimestepEmbedder,
    check_sizes,
    initialize,
    modulate,
    sincos_position_embedding,
)


class StreamAttention(nn.Module):
    """One stream's projections into and out of an attention that both streams share; ``pre_only`` has no way out."""

    def __init__(self, hidden_size: int, *, pre_only: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        if not pre_only:
            self.proj = nn.Linear(hidden_size, hidden_size)


class StreamBlock(nn.Module):
    """One stream's half of a joint block, in two parts: what precedes the shared attention and what follows it.

    Args:
        hidden_size: Width D of the stream.
        mlp_ratio: Width of the MLP over ``hidden_size``.
        pre_only: The stream is only looked at, and ends here: no output projection, no MLP, no gates.
    """

    def __init__(self, hidden_size: int, mlp_ratio: float, *, pre_only: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = StreamAttention(hidden_size, pre_only=pre_only)
        if not pre_only:
            self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
            self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.parts = 2 if pre_only else 6
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, self.parts * hidden_size))

    def before_attention(self, x: Tensor, c: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Queries, keys and values (N, T, 3 D) of the modulated tokens; the modulation of what follows, if it does."""
        shift, scale, *rest = self.adaLN_modulation(c).chunk(self.parts, dim=1)  # each (N, D)
        return self.attn.qkv(modulate(self.norm1(x), shift, scale)), rest

    def after_attention(self, x: Tensor, attended: Tensor, modulation: list[Tensor]) -> Tensor:
        """Add the gated attention, then the gated MLP: (N, T, D)."""
        gate_attention, shift, scale, gate_mlp = modulation
        x = x + gate_attention.unsqueeze(1) * self.attn.proj(attended)
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift, scale))


class JointBlock(nn.Module):
    """Text and image attend over both, each with weights of its own: ``(context, x, c) -> (context, x)``.

    Args:
        hidden_size: Width D of both streams.
        num_heads: Attention heads.
        mlp_ratio: Width of the MLPs over ``hidden_size``.
        context_pre_only: The text is only looked at, and the returned context is None: the last block, after which
            nothing reads the text.

    Shape:
        context: (N, L, D); x: (N, T, D); c: (N, D); returns: (N, L, D) or None, and (N, T, D)
    """

    def __init__(
        self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0, *, context_pre_only: bool = False
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.context_block = StreamBlock(hidden_size, mlp_ratio, pre_only=context_pre_only)
        self.x_block = StreamBlock(hidden_size, mlp_ratio, pre_only=False)

    def forward(self, context: Tensor, x: Tensor, c: Tensor) -> tuple[Tensor | None, Tensor]:
        """Attend jointly, text first, then go on apart."""
        context_qkv, context_rest = self.context_block.before_attention(context, c)
        x_qkv, x_rest = self.x_block.before_attention(x, c)
        joint = torch.cat([context_qkv, x_qkv], dim=1)  # (N, L + T, 3 D)
        q, k, v = rearrange(joint, "n t (qkv h d) -> qkv n h t d", qkv=3, h=self.num_heads)
        attended = rearrange(F.scaled_dot_product_attention(q, k, v), "n h t d -> n t (h d)")
        of_context, of_x = attended.split([context.shape[1], x.shape[1]], dim=1)
        text = self.context_block.after_attention(context, of_context, context_rest) if context_rest else None
        return text, self.x_block.after_attention(x, of_x, x_rest)


class MMDiT(nn.Module):
    """Two-stream diffusion transformer on latents, conditioned on the time and on text features.

    The defaults are the published text-to-image model, of width 32 x depth, with CLIP ViT-L/14's text.
    The image's tokens are the second of the two that a block returns: tap it with ``select=1``.

    Args:
        input_size: Side of the square latent, in latent pixels.
        patch_size: Latent pixels per token side.
        in_channels: Channels of the latents.
        hidden_size: Width D of both streams, a multiple of 4 and of ``num_heads``.
        depth: Number of blocks, ``joint_blocks.0`` to ``joint_blocks.{depth - 1}``.
        num_heads: Attention heads.
        mlp_ratio: Width of the MLPs over ``hidden_size``.
        context_size: Width of the text features.

    Shape:
        x: (N, C, H, W) noisy latents; t: (N,) times in [0, 1]; context: (N, L, context_size) text features;
        returns: (N, C, H, W)

    Raises:
        Mistake: If the sizes do not divide.
        Mistake: From a call, if the text features have another width.
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 768,
        depth: int = 24,
        num_heads: int = 24,
        mlp_ratio: float = 4.0,
        context_size: int = 768,
    ) -> None:
        super().__init__()
        check_sizes("MMDiT", input_size, patch_size, hidden_size, num_heads)
        self.patch_size, self.grid_size, self.context_size = patch_size, input_size // patch_size, context_size
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.context_embedder = nn.Linear(context_size, hidden_size)
        self.register_buffer("pos_embed", sincos_position_embedding(hidden_size, self.grid_size))
        self.joint_blocks = nn.ModuleList(
            [JointBlock(hidden_size, num_heads, mlp_ratio, context_pre_only=i == depth - 1) for i in range(depth)]
        )
        self.final_layer = FinalLayer(hidden_size, patch_size, in_channels)
        initialize(self, [half for block in self.joint_blocks for half in (block.context_block, block.x_block)])

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """Predict the velocity of the noisy latents x at times t for texts with these features."""
        if context.dim() != 3 or context.shape[-1] != self.context_size:
            raise Mistake(
                f"This MMDiT takes text features (N, L, {self.context_size}).\nFound: {tuple(context.shape)}.\n"
                "Encode the captions with the text encoder that it was trained with, or build it with that width as "
                "context_size."
            )
        x = self.x_embedder(x) + self.pos_embed  # (N, T, D)
        c = self.t_embedder(t)  # (N, D)
        context = self.context_embedder(context)  # (N, L, D)
        for block in self.joint_blocks:
            context, x = block(context, x, c)
        x = self.final_layer(x, c)  # (N, T, p * p * C)
        p, h = self.patch_size, self.grid_size
        return rearrange(x, "n (h w) (p q c) -> n c (h p) (w q)", h=h, p=p, q=p)
