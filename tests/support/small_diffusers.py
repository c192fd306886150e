"""Twelve real models of diffusers, at the smallest sizes at which they still do everything, ready to be attached to.

Weights are drawn anew, since several models start with zeros that would let a check of a gradient pass for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import torch
from backbones import Backbone
from torch import Tensor, nn

TEXT = 7  # tokens of a caption; neither a number of image tokens nor a divisor of one
EMPTY_TEXT = torch.linspace(-1, 1, TEXT * 24).reshape(TEXT, 24)
EMPTY_MASK = (torch.arange(TEXT) < 2).long()


def small(kind: str, **settings: Any) -> Callable[[int], nn.Module]:
    """From a seed to a model of diffusers, in train mode, with weights that are nowhere zero."""

    def build(seed: int) -> nn.Module:
        with torch.random.fork_rng():
            model = getattr(diffusers, kind)(**settings)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim == 1 else 0.7 * parameter[0].numel() ** -0.5
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)
        return model.train()

    return build


_HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16}
_BLOCKS: dict[str, Any] = {"num_layers": 4} | _HEADS
_SAME: dict[str, Any] = {"in_channels": 4, "out_channels": 4}
_IMAGE: dict[str, Any] = {"sample_size": 8, "patch_size": 2}


def _text(n: int, g: torch.Generator, length: int = TEXT, width: int = 24) -> Tensor:
    return torch.randn(n, length, width, generator=g)


def _mask(n: int, length: int = TEXT) -> Tensor:
    """Captions of different lengths, the first of them over the whole length."""
    return (torch.arange(length) < length - torch.arange(n)[:, None] % 4).long()


def _rotary(places: int, width: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(places)[:, None] / (1 + torch.arange(width))
    return angles.cos(), angles.sin()


def _labels(n: int, g: torch.Generator) -> dict[str, Any]:
    return {"class_labels": torch.randint(10, (n,), generator=g)}


def _caption(n: int, g: torch.Generator) -> dict[str, Any]:
    return {"encoder_hidden_states": _text(n, g)}


def _masked(n: int, g: torch.Generator) -> dict[str, Any]:
    return _caption(n, g) | {"encoder_attention_mask": _mask(n)}


def _pixart(n: int, g: torch.Generator) -> dict[str, Any]:
    return _masked(n, g) | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


def _pooled(n: int, g: torch.Generator) -> dict[str, Any]:
    return _caption(n, g) | {"pooled_projections": torch.randn(n, 20, generator=g)}


def _flux(n: int, g: torch.Generator) -> dict[str, Any]:
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    return _pooled(n, g) | {"guidance": torch.ones(n), "img_ids": places, "txt_ids": torch.zeros(TEXT, 3)}


def _hunyuan(n: int, g: torch.Generator) -> dict[str, Any]:
    return {
        "encoder_hidden_states": _text(n, g, 4, 8),
        "text_embedding_mask": _mask(n, 4),
        "encoder_hidden_states_t5": _text(n, g, 4, 8),
        "text_embedding_mask_t5": _mask(n, 4),
        "image_rotary_emb": _rotary(16, 16),
    }


def _wan(n: int, g: torch.Generator) -> dict[str, Any]:
    return {"encoder_hidden_states": _text(n, g, TEXT, 16)}


def _ltx(n: int, g: torch.Generator) -> dict[str, Any]:
    return _masked(n, g) | {"num_frames": 2, "height": 4, "width": 4}


def _audio(n: int, g: torch.Generator) -> dict[str, Any]:
    return {
        "encoder_hidden_states": _text(n, g, TEXT, 16),
        "global_hidden_states": torch.randn(n, 1, 8, generator=g),
        "rotary_embedding": _rotary(17, 8),
    }


def image_behind_caption(joint: Tensor, call: Mapping[str, Any]) -> Tensor:
    """Lumina2 puts each image right behind its own caption, whose length the mask tells."""
    first = call["encoder_attention_mask"].sum(1)
    places = first[:, None] + torch.arange(16)  # (N, T)
    return joint.gather(1, places[:, :, None].expand(-1, -1, joint.shape[2]))


def _plain_image_behind_caption(joint: Tensor, call: Mapping[str, Any]) -> Tensor:
    lengths = call["encoder_attention_mask"].sum(1).tolist()
    return torch.stack([row[length : length + 16] for row, length in zip(joint, lengths, strict=True)])


def _second(output: tuple[Tensor, Tensor], arguments: Mapping[str, Any]) -> Tensor:
    return output[1]


def _attached(
    build: Callable[[int], nn.Module],
    shape: tuple[int, ...],
    time: str,
    conditions: Callable[[int, torch.Generator], dict[str, Any]],
    blocks: str = "transformer_blocks",
    **more: Any,
) -> Backbone:
    names = {"x": "hidden_states", "t": "timestep", "positional": 0, "image": lambda output: output[0]}
    layers = {"shallow": f"{blocks}.1", "student": f"{blocks}.1", "teacher": f"{blocks}.2"}
    return Backbone(
        build=build,
        shape=shape,
        time=time,
        conditions=lambda n, g: conditions(n, g) | {"return_dict": False},
        **names | layers | more,
    )


_EMPTY = {"encoder_hidden_states": EMPTY_TEXT}
_EMPTY_MASKED = _EMPTY | {"encoder_attention_mask": EMPTY_MASK}
_EMPTY_POOLED = _EMPTY | {"pooled_projections": torch.zeros(20)}

_dit = small("DiTTransformer2DModel", **_BLOCKS, **_IMAGE, in_channels=4, out_channels=8, num_embeds_ada_norm=10)


def _dropping_dit(seed: int) -> nn.Module:
    """Each block drops labels on its own; here so often that one batch shows it."""
    model = _dit(seed)
    for block in model.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.5
    return model


def _mean(output: tuple[Tensor]) -> Tensor:
    """Of an output that holds a variance too."""
    return output[0][:, :4]


_STEPS: dict[str, Any] = {"t_dtype": torch.int64, "image": _mean}

# fmt: off
SMALL_DIFFUSERS = {
    "DiT": _attached(_dropping_dit, (4, 8, 8), "ddpm", _labels, null={"class_labels": 10}, **_STEPS),
    "PixArt": _attached(
        small("PixArtTransformer2DModel", **_BLOCKS, **_IMAGE, in_channels=4, out_channels=8, cross_attention_dim=32,
              caption_channels=24, use_additional_conditions=False),
        (4, 8, 8), "ddpm", _pixart, null=_EMPTY_MASKED, **_STEPS,
    ),
    "SD3": _attached(
        small("SD3Transformer2DModel", **_BLOCKS, **_SAME, **_IMAGE, joint_attention_dim=24, caption_projection_dim=32,
              pooled_projection_dim=20, pos_embed_max_size=8, qk_norm="rms_norm"),
        (4, 8, 8), "flow", _pooled, null=_EMPTY_POOLED, reads={"select": 1}, pick=_second,
    ),
    "Flux": _attached(
        small("FluxTransformer2DModel", **_HEADS, num_layers=2, num_single_layers=3, patch_size=1, in_channels=16,
              joint_attention_dim=24, pooled_projection_dim=20, guidance_embeds=True, axes_dims_rope=(4, 6, 6)),
        (16, 16), "flow-unit", _flux, null=_EMPTY_POOLED, teacher="single_transformer_blocks.0",
        patch_size=(1,), channel_axis=2, reads={"call": {"shared": ["img_ids", "txt_ids"]}, "select": 1}, pick=_second,
    ),
    "Sana": _attached(
        small("SanaTransformer2DModel", **_BLOCKS, **_SAME, num_cross_attention_heads=2, cross_attention_head_dim=16,
              cross_attention_dim=32, caption_channels=24, sample_size=8, patch_size=1),
        (4, 8, 8), "flow", _masked, null=_EMPTY_MASKED, patch_size=(1, 1),
    ),
    "Lumina2": _attached(
        small("Lumina2Transformer2DModel", **_IMAGE, in_channels=4, hidden_size=24, num_layers=4, num_refiner_layers=1,
              num_attention_heads=3, num_kv_heads=1, multiple_of=2, axes_dim_rope=(4, 2, 2), axes_lens=(32, 16, 16),
              cap_feat_dim=24),
        (4, 8, 8), "sit", _masked, "layers", null=_EMPTY_MASKED, reads={"tokens": image_behind_caption},
        pick=_plain_image_behind_caption,
    ),
    "HunyuanDiT": _attached(
        small("HunyuanDiT2DModel", **_BLOCKS, **_IMAGE, in_channels=4, hidden_size=32, cross_attention_dim=8,
              cross_attention_dim_t5=8, pooled_projection_dim=4, text_len=4, text_len_t5=4,
              activation_fn="gelu-approximate", use_style_cond_and_image_meta_size=False),
        (4, 8, 8), "hunyuandit-1.2", _hunyuan, "blocks", image=_mean, reads={"call": {"shared": ["image_rotary_emb"]}},
        null={"encoder_hidden_states": 0, "text_embedding_mask": torch.tensor([1, 1, 0, 0]),
              "encoder_hidden_states_t5": 0, "text_embedding_mask_t5": torch.tensor([1, 0, 0, 0])},
    ),
    "AuraFlow": _attached(
        small("AuraFlowTransformer2DModel", **_HEADS, **_SAME, **_IMAGE, num_mmdit_layers=2, num_single_dit_layers=3,
              caption_projection_dim=32, joint_attention_dim=24, pos_embed_max_size=64),
        (4, 8, 8), "flow-unit", _caption, "joint_transformer_blocks", null=_EMPTY,
        teacher="single_transformer_blocks.0", reads={"select": 1}, pick=_second,
        teacher_reads={"tokens": slice(8 + TEXT, None)},  # 8 registers and the caption come first
        teacher_pick=lambda output, arguments: output[:, -16:],
    ),
    "Wan": _attached(
        small("WanTransformer3DModel", **_SAME, num_layers=4, num_attention_heads=2, attention_head_dim=12,
              patch_size=(1, 2, 2), text_dim=16, freq_dim=256, ffn_dim=32, cross_attn_norm=True,
              qk_norm="rms_norm_across_heads", rope_max_seq_len=32),
        (4, 2, 8, 8), "flow", _wan, "blocks", null={"encoder_hidden_states": 0}, patch_size=(1, 2, 2),
    ),
    "CogVideoX": _attached(
        small("CogVideoXTransformer3DModel", **_BLOCKS, **_SAME, time_embed_dim=8, text_embed_dim=24, sample_width=8,
              sample_height=8, sample_frames=5, patch_size=2, temporal_compression_ratio=4, max_text_seq_length=TEXT),
        (2, 4, 8, 8), "cogvideox", _caption, null=_EMPTY, patch_size=(1, 2, 2), channel_axis=2, t_dtype=torch.int64,
        reads={"select": 0}, pick=lambda output, arguments: output[0],
    ),
    "LTX": _attached(
        small("LTXVideoTransformer3DModel", **_BLOCKS, **_SAME, cross_attention_dim=32, caption_channels=24),
        (32, 4), "flow", _ltx, null=_EMPTY_MASKED, patch_size=(1,), channel_axis=2,
    ),
    "StableAudio": _attached(
        small("StableAudioDiTModel", **_BLOCKS, **_SAME, sample_size=16, num_key_value_attention_heads=1,
              cross_attention_dim=16, time_proj_dim=8, global_states_input_dim=8, cross_attention_input_dim=16),
        (4, 16), "stable-audio", _audio, null={"encoder_hidden_states": 0, "global_hidden_states": 0}, patch_size=(1,),
        reads={"tokens": slice(1, None), "call": {"shared": ["rotary_embedding"]}},
        pick=lambda output, arguments: output[:, 1:],
    ),
}
# fmt: on
