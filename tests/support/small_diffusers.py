"""Every transformer class of diffusers at a tiny size: how it is called and attached to, or why it is not.

Run as a script it prints the table in docs/backbones.md.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import diffusers
import torch
from backbones import Backbone
from torch import Tensor, nn

import selftrans_reg as st
from selftrans_reg.recipes import find_blocks

TEXT = 7  # tokens of a caption; neither a number of image tokens nor a divisor of one
Made: TypeAlias = Callable[[int, torch.Generator], Any]  # by a batch of n samples
s = dict


class Mask(NamedTuple):
    """Of captions of different lengths, the first of them over the whole length."""

    length: int = TEXT
    dtype: torch.dtype = torch.long


def made(value: Any, n: int, g: torch.Generator) -> Any:
    """What a batch of n samples gives the model for a shape, a mask, or a function; the rest as it is."""
    if isinstance(value, Mask):
        return (torch.arange(value.length) < value.length - torch.arange(n)[:, None] % 4).to(value.dtype)
    if is_condition(value):
        return torch.randn(n, *value, generator=g)
    return value(n, g) if callable(value) else value


def is_condition(value: Any) -> bool:
    """Whether it is a shape or a mask, whose place the null condition takes."""
    return isinstance(value, tuple) and isinstance(value[0], int)


def empty(value: Any) -> Tensor:
    """What an empty prompt gives, for a shape or a mask."""
    if isinstance(value, Mask):
        return (torch.arange(value.length) < 2).to(value.dtype)
    return torch.linspace(-1, 1, math.prod(value)).reshape(value)


def randn(*shape: int) -> Made:
    return lambda n, g: torch.randn(n, *shape, generator=g)


def same(value: Tensor) -> Made:
    return lambda n, g: value.expand(n, *value.shape).clone()


def image_behind_caption(joint: Tensor, call: Mapping[str, Any]) -> Tensor:
    """Lumina2 puts each image right behind its own caption, whose length the mask tells."""
    lengths = call["encoder_attention_mask"].sum(1).tolist()
    return torch.stack([row[length : length + 16] for row, length in zip(joint, lengths, strict=True)])


def _rotary(places: int, width: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(places)[:, None] / (1 + torch.arange(width))
    return angles.cos(), angles.sin()


# fmt: off
_GRID = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
_SIZE = same(torch.full((2,), 64.0))
# What a class is built with, and called with, where it has such a name and its entry says nothing else.
SIZES = s(in_channels=4, out_channels=4, latent_dim=4, sample_size=8, sample_height=8, sample_width=8, num_layers=3,
    num_single_layers=3, n_layers=3, depth=3, num_visual_blocks=3, num_refiner_layers=1, n_refiner_layers=1,
    num_text_blocks=1, num_attention_heads=2, num_heads=2, num_cross_attention_heads=2, num_kv_heads=1,
    attention_head_dim=8, cross_attention_head_dim=8, hidden_size=16, model_dim=16, cross_attention_dim=16,
    caption_projection_dim=16, intermediate_size=32, ffn_dim=32, ff_dim=32, mlp_width_ratio=2.0, multiple_of=2,
    joint_attention_dim=24, text_embed_dim=24, text_dim=24, caption_channels=24, cap_feat_dim=24, context_in_dim=24,
    in_text_dim=24, in_text_dim2=20, pooled_projection_dim=20, time_embed_dim=8, time_dim=16, freq_dim=16,
    condition_dim=4, pos_embed_max_size=8, max_text_seq_length=TEXT, rope_max_seq_len=32, axes_lens=(32, 16, 16),
    axes_dims=(4, 2, 2), axes_dims_rope=(4, 2, 2), rope_axes_dim=(4, 2, 2), rope_dim_list=[4, 2, 2],
    audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4,
    audio_cross_attention_dim=8, rope_double_precision=False)
ARGUMENTS = s(return_dict=False, encoder_hidden_states=(TEXT, 24), encoder_hidden_states_mask=Mask(),
    pooled_projections=(20,), img_ids=_GRID, txt_ids=torch.zeros(TEXT, 3), original_size=_SIZE, target_size=_SIZE,
    crop_coords=_SIZE, num_frames=2, height=4, width=4)

_IMAGE, _VIDEO, _FRAMES, _PACKED = (4, 8, 8), (4, 2, 8, 8), (2, 4, 8, 8), (16, 4)
_MASKED, _BOOL = s(encoder_attention_mask=Mask()), s(encoder_attention_mask=Mask(dtype=torch.bool))
_LABELS = s(class_labels=lambda n, g: torch.randint(10, (n,), generator=g), null=s(class_labels=10))
_FLUX = s(select=1, call=s(shared=["img_ids", "txt_ids"]))
_FLUX_SINGLE = _FLUX | s(teacher_reads=s(tokens=slice(TEXT, None), call=_FLUX["call"]))
_LLAMA = s(rows=s(encoder_hidden_states_llama3=1))
_FRAME_TIME = s(give_t=lambda t: t[:, None].repeat(1, 2), call=s(t=lambda call: call["timestep"].flatten(1).amax(1)))

# A model: its latents, its time, and what differs from the above, whether the class takes it when built or called, or
# Backbone does; ``patch`` is Backbone's patch_size, and ``blocks`` is for ``recipe``.
Entry: TypeAlias = tuple[tuple[int, ...], str, dict[str, Any]]


def at(shape: tuple[int, ...], time: str, **own: Any) -> Entry:
    return shape, time, own


TABLE: dict[str, Entry | str] = {
    "AceStepTransformer1DModel": at(_PACKED, "flow-unit", encoder_hidden_states=(TEXT, 16), timestep_r=randn(),
        context_latents=randn(16, 8), num_hidden_layers=3, head_dim=8, num_key_value_heads=1, in_channels=12,
        audio_acoustic_hidden_dim=4, sliding_window=16, patch=(2,), call=s(t="timestep")),
    "AllegroTransformer3DModel": at(_VIDEO, "scheduler", sample_frames=2),
    "AnyFlowFARTransformer3DModel": "its attention (flex) has no backward pass on a CPU",
    "AnyFlowTransformer3DModel": at(_FRAMES, "flow", r_timestep=lambda n, g: 500 * torch.rand(n, 2, generator=g),
        channel_axis=2, **_FRAME_TIME),
    "AuraFlowTransformer2DModel": at(_IMAGE, "flow-unit", num_mmdit_layers=2, num_single_dit_layers=3,
        pos_embed_max_size=64, select=1, teacher_reads=s(tokens=slice(8 + TEXT, None))),
    "BriaFibo2Transformer2DModel": at(_IMAGE, "flow-unit", encoder_hidden_states=(2, TEXT, 24), **_BOOL, dim=24,
        n_heads=3, injection_layer_ids=(1,), perceiver_num_layers=1, min_num_gist_tokens=3, max_num_gist_tokens=3,
        gist_step=1, gist_min_text_len=1, gist_max_text_len=8, tokens=slice(3, None)),
    "BriaFiboTransformer2DModel": at(_PACKED, "flow",
        text_encoder_layers=lambda n, g: [torch.randn(n, TEXT, 8, generator=g) for _ in range(6)],
        pooled_projections=None, text_encoder_dim=8, null=s(text_encoder_layers={i:
        empty((TEXT, 8)) for i in range(6)}), **_FLUX_SINGLE),
    "BriaTransformer2DModel": at(_PACKED, "flow", pooled_projections=None, **_FLUX),
    "ChromaTransformer2DModel": at(_PACKED, "flow-unit", approximator_num_channels=8, approximator_hidden_dim=16,
        approximator_layers=1, **_FLUX_SINGLE),
    "ChronoEditTransformer3DModel": at(_VIDEO, "flow"),
    "CogVideoXTransformer3DModel": at(_FRAMES, "cogvideox", sample_frames=5, channel_axis=2, select=0),
    "CogView3PlusTransformer2DModel": at(_IMAGE, "scheduler", condition_dim=2, select=0),
    "CogView4Transformer2DModel": at(_IMAGE, "flow", rope_axes_dim=(8, 8), select=0),
    "ConsisIDTransformer3DModel": at(_FRAMES, "scheduler", id_cond=randn(2),
        id_vit_hidden=lambda n, g: [torch.randn(n, 2, 2, generator=g)], sample_frames=5, is_train_face=True,
        cross_attn_interval=3, cross_attn_dim_head=1, cross_attn_num_heads=1, LFE_id_dim=2, LFE_vit_dim=2, LFE_depth=1,
        LFE_dim_head=8, LFE_num_heads=2, LFE_num_id_token=1, LFE_num_querie=1, LFE_output_dim=10, LFE_ff_mult=1,
        LFE_num_scale=1, channel_axis=2, select=0),
    "Cosmos3OmniTransformer": "its samples are packed into one sequence, without a batch axis",
    "CosmosTransformer3DModel": at(_VIDEO, "flow-unit", fps=30, attention_head_dim=12, mlp_ratio=2, adaln_lora_dim=4,
        max_size=(4, 32, 32), concat_padding_mask=False),
    "DiTTransformer2DModel": at(_IMAGE, "ddpm", **_LABELS, out_channels=8, num_embeds_ada_norm=10),
    "DreamLiteTransformer2DModel": "a part of a UNet, which is not called with a time",
    "EasyAnimateTransformer3DModel": at(_VIDEO, "flow", attention_head_dim=16, mmdit_layers=3, patch_size=2, select=0),
    "ErnieImageTransformer2DModel": at((4, 4, 4), "flow", text_bth=(TEXT, 24),
        text_lens=lambda n, g: TEXT - torch.arange(n) % 4, ffn_hidden_size=32, text_in_dim=24, patch=(1, 1),
        null=s(text_lens=2), tokens=lambda joint, call: joint.transpose(0, 1)[:, :16]),
    "Flux2Transformer2DModel": at(_PACKED, "flow-unit", img_ids=torch.cat([_GRID, torch.zeros(16, 1)], 1),
        txt_ids=torch.zeros(TEXT, 4), guidance=same(torch.ones(())), timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2), **_FLUX_SINGLE, asks=16),
    "Flux3Transformer2DModel": at(_PACKED, "flow-unit", img_ids=torch.cat([_GRID, torch.zeros(16, 1)], 1),
        txt_ids=torch.zeros(TEXT, 4), num_layers=1, num_single_layers=6, cond_in_channels=4, timestep_channels=16,
        axes_dims_rope=(2, 2, 2, 2), **_FLUX),
    "FluxTransformer2DModel": at((16, 16), "flow-unit", guidance=same(torch.ones(())), in_channels=16,
        out_channels=16, guidance_embeds=True, **_FLUX),
    "GlmImageTransformer2DModel": at(_IMAGE, "flow", prior_token_id=lambda n, g: torch.randint(64, (n, 16),
        generator=g), prior_token_drop=same(torch.zeros(16, dtype=torch.bool)), prior_vq_quantizer_codebook_size=64,
        select=0, null=s(prior_token_drop=1)),
    "HeliosTransformer3DModel": at(_VIDEO, "flow", rope_dim=(4, 2, 2), has_multi_term_memory_patch=False,
        guidance_cross_attn=False, zero_history_timestep=False),
    "HiDreamImageTransformer2DModel": at(_IMAGE, "flow", pooled_embeds=(8,), encoder_hidden_states_t5=(TEXT, 24),
        encoder_hidden_states_llama3=lambda n, g: torch.randn(2, n, TEXT, 8, generator=g), img_ids=None, patch_size=2,
        caption_channels=[24, 8], text_emb_dim=8, num_routed_experts=2, max_resolution=(8, 8), llama_layers=(0, 1) * 3,
        force_inference_output=True, t="timesteps", null=s(pooled_embeds=0, encoder_hidden_states_t5=0,
        encoder_hidden_states_llama3=0), call=_LLAMA, select=0, teacher_reads=s(tokens=slice(None, 16), call=_LLAMA)),
    "HunyuanDiT2DModel": at(_IMAGE, "hunyuandit-1.2", encoder_hidden_states=(4, 8), text_embedding_mask=Mask(4),
        encoder_hidden_states_t5=(4, 8), text_embedding_mask_t5=Mask(4), image_rotary_emb=_rotary(16, 8), num_layers=4,
        patch_size=2, cross_attention_dim=8, cross_attention_dim_t5=8, pooled_projection_dim=4, text_len=4,
        text_len_t5=4, use_style_cond_and_image_meta_size=False, call=s(shared=["image_rotary_emb"]),
        give_t=Tensor.float),
    "HunyuanImageTransformer2DModel": at((4, 4, 4), "flow", **_MASKED, rope_axes_dim=(4, 4), patch=(1, 1), select=0),
    "HunyuanVideo15Transformer3DModel": at((4, 1, 4, 4), "flow", **_MASKED, encoder_hidden_states_2=(4, 12),
        encoder_attention_mask_2=Mask(4), image_embeds=same(torch.zeros(3, 6)), text_embed_2_dim=12, image_embed_dim=6,
        target_size=8, task_type="t2v", patch=(1, 1, 1), select=0),
    "HunyuanVideoFramepackTransformer3DModel": at(_VIDEO, "flow", **_MASKED, guidance=same(torch.ones(())),
        image_embeds=randn(3, 12), indices_latents=torch.arange(2.0), latents_clean=randn(4, 1, 8, 8),
        indices_latents_clean=torch.zeros(1), latents_history_2x=randn(4, 2, 8, 8),
        indices_latents_history_2x=torch.arange(2.0), latents_history_4x=randn(4, 4, 8, 8),
        indices_latents_history_4x=torch.arange(4.0), has_image_proj=True, image_proj_dim=12, has_clean_x_embedder=True,
        select=lambda output: output[0][:, -32:]),
    "HunyuanVideoTransformer3DModel": at(_VIDEO, "flow", **_MASKED, guidance=same(torch.ones(())), select=0),
    "Ideogram4Transformer2DModel": at(_PACKED, "sit", encoder_hidden_states=(TEXT + 16, 24),
        position_ids=same(torch.arange(23)[:, None].repeat(1, 3)), segment_ids=same(torch.ones(23).long()),
        indicator=same(torch.tensor([3] * TEXT + [2] * 16)), adaln_dim=16, llm_features_dim=24, mrope_section=(2, 1, 1),
        give_x=lambda x: torch.cat([torch.zeros(len(x), TEXT, 4), x], 1), t="timestep", tokens=slice(TEXT, None),
        call=s(x=lambda call: call["hidden_states"][:, TEXT:])),
    "JoyImageEditPlusTransformer3DModel": at((4, 4, 2, 2), "flow", shape_list=lambda n, g: [[(1, 2, 2)]] * n,
        encoder_hidden_states_mask=None, channel_axis=2, give_x=lambda x: x[:, :, :, None], select=0,
        call=s(x=lambda call: call["hidden_states"][:, :, :, 0], rows=s(shape_list="list"))),
    "JoyImageEditTransformer3DModel": at(_VIDEO, "flow", select=0),
    "Kandinsky5Transformer3DModel": at((2, 8, 8, 4), "flow", visual_rope_pos=[torch.arange(2), torch.arange(4),
        torch.arange(4)], text_rope_pos=torch.arange(TEXT), channel_axis=4),
    "Kandinsky6SRTransformer3DModel": "its attention (flex) has no backward pass on a CPU",
    "Kandinsky6Transformer3DModel": at((2, 8, 8, 4), "flow", in_visual_dim=4, out_visual_dim=4, visual_cond=False,
        in_audio_dim=4, channel_axis=4),
    "Krea2Transformer2DModel": at(_PACKED, "flow-unit", encoder_hidden_states=(TEXT, 2, 24), **_BOOL,
        position_ids=torch.cat([torch.zeros(TEXT, 3), _GRID]), num_key_value_heads=1, timestep_embed_dim=8,
        text_hidden_dim=24, num_text_layers=2, text_num_attention_heads=2, text_num_key_value_heads=1,
        text_intermediate_size=16, num_layerwise_text_blocks=1, num_refiner_text_blocks=1, tokens=slice(TEXT, None)),
    "LTX2VideoTransformer3DModel": at((32, 4), "flow", **_MASKED, audio_hidden_states=randn(5, 4),
        audio_encoder_hidden_states=(TEXT, 24), audio_num_frames=5, select=0, asks=16, call=s(t="timestep")),
    "LTXVideoTransformer3DModel": at((32, 4), "flow", **_MASKED),
    "LatteTransformer3DModel": at(_VIDEO, "scheduler", patch_size=2, out_channels=8, num_embeds_ada_norm=1000,
        norm_type="ada_norm_single", norm_elementwise_affine=False, video_length=2,
        tokens=lambda x, call: x.reshape(len(call["hidden_states"]), -1, x.shape[2])),
    "LongCatAudioDiTTransformer": at(_PACKED, "sit", **_BOOL, dit_dim=16, dit_depth=3, dit_heads=2, dit_text_dim=24,
        text_conv=False, use_latent_condition=False),
    "LongCatImageTransformer2DModel": at(_PACKED, "flow-unit", **_FLUX),
    "Lumina2Transformer2DModel": at(_IMAGE, "sit", **_MASKED, hidden_size=24, num_attention_heads=3,
        axes_dim_rope=(4, 2, 2), tokens=image_behind_caption),
    "LuminaNextDiT2DModel": at(_IMAGE, "sit", encoder_hidden_states=(TEXT, 12), encoder_mask=Mask(),
        image_rotary_emb=torch.polar(torch.ones(384, 384, 4), torch.linspace(0, 9, 384 ** 2 * 4).view(384, 384, 4)),
        cross_attention_kwargs={}, hidden_size=24, num_attention_heads=3, cross_attention_dim=12,
        call=s(shared=["image_rotary_emb"])),
    "MiniMaxH3Transformer3DModel": "its times hold for the whole batch, not for a sample",
    "MiniMaxMusic3RVQDepthDecoder": "it predicts codes: there is no noise and no time",
    "MiniMaxMusic3Transformer1DModel": at((4, 16), "sit", encoder_hidden_states=(16, 12), condition_dim=12,
        ff_inner_dim=32, rotary_dim=4, fourier_embedding_dim=8, channel_axis=1, tokens=slice(1, None)),
    "MochiTransformer3DModel": at(_VIDEO, "mochi", **_BOOL, pooled_projection_dim=16, time_embed_dim=4,
        max_sequence_length=TEXT, select=0, asks=16),
    "MotifVideoTransformer3DModel": at(_VIDEO, "flow", **_MASKED, select=0),
    "NucleusMoEImageTransformer2DModel": at(_PACKED, "flow-unit", img_shapes=lambda n, g: [(1, 4, 4)] * n,
        num_attention_heads=6, out_channels=1, moe_enabled=False, capacity_factors=[8.0] * 3,
        call=s(rows=s(img_shapes="list"))),
    "OmniGenTransformer2DModel": at(_IMAGE, "sit", input_ids=lambda n, g: torch.randint(1, 10, (n, TEXT), generator=g),
        input_img_latents=[], input_image_sizes={}, attention_mask=same(torch.ones(24, 24)),
        position_ids=same(torch.arange(24)), num_key_value_heads=2, pad_token_id=0, vocab_size=32, time_step_dim=4,
        rope_scaling=s(long_factor=[1] * 4, short_factor=[1] * 4), null=s(input_ids=0), tokens=slice(TEXT + 1, None)),
    "OvisImageTransformer2DModel": at(_PACKED, "flow-unit", **_FLUX),
    "PRXTransformer2DModel": at(_IMAGE, "flow-unit", attention_mask=Mask(), mlp_ratio=2.0, axes_dim=[4, 4]),
    "PixArtTransformer2DModel": at(_IMAGE, "ddpm", **_MASKED, added_cond_kwargs=s(resolution=None, aspect_ratio=None),
        out_channels=8, use_additional_conditions=False),
    "PriorTransformer": at((12, 1), "scheduler", encoder_hidden_states=(TEXT, 12), proj_embedding=(12,),
        embedding_dim=12, num_embeddings=TEXT, channel_axis=1, give_x=lambda x: x[:, :, 0],
        call=s(x=lambda call: call["hidden_states"][:, :, None]), tokens=slice(-2, -1)),
    "QwenImage21Transformer2DModel": at(_PACKED, "flow-unit", img_shapes=lambda n, g: [[(1, 4, 4)]] * n,
        img_mask=same(torch.tensor([False] * TEXT + [True] * 4)), call=s(rows=s(img_shapes="list")),
        tokens=slice(TEXT, None)),
    "QwenImageTransformer2DModel": at(_PACKED, "flow-unit", img_shapes=lambda n, g: [[(1, 4, 4)]] * n, out_channels=1,
        select=1, call=s(rows=s(img_shapes="list"))),
    "RFD4ProteinaTransformer": "its samples are proteins, with two x_t and a time for each",
    "SD3Transformer2DModel": at(_IMAGE, "flow", qk_norm="rms_norm", select=1),
    "SanaTransformer2DModel": at(_IMAGE, "flow", **_MASKED, patch=(1, 1)),
    "SanaVideoTransformer3DModel": at(_VIDEO, "flow", **_MASKED),
    "SanaWMLTX2RefinerTransformer3DModel": at((32, 4), "flow", **_MASKED, video_rotary_emb=_rotary(32, 16), asks=16,
        call=s(shared=["video_rotary_emb"])),
    "SanaWMTransformer3DModel": at((4, 2, 4, 4), "flow", encoder_hidden_states=(1, TEXT, 24), **_MASKED, hidden_size=32,
        linear_head_dim=16, chunk_plucker_post_attn_blocks=3, chunk_plucker_channels=4, image_size=256, patch=(1, 1, 1),
        **_FRAME_TIME | s(give_t=lambda t: t[:, None, None].repeat(1, 1, 2))),
    "SkyReelsV2Transformer3DModel": at(_VIDEO, "flow"),
    "StableAudio3DiTModel": at((4, 16), "flow-unit", encoder_hidden_states=(TEXT, 12), global_hidden_states=(8,),
        io_channels=4, embed_dim=16, cond_token_dim=12, global_cond_dim=8, local_add_cond_dim=5,
        timestep_features_dim=8, num_memory_tokens=3, channel_axis=1, tokens=slice(3, None)),
    "StableAudioDiTModel": at((4, 16), "stable-audio", encoder_hidden_states=(TEXT, 16), global_hidden_states=(1, 8),
        rotary_embedding=_rotary(17, 4), sample_size=16, num_key_value_attention_heads=1, cross_attention_dim=8,
        time_proj_dim=8, global_states_input_dim=8, cross_attention_input_dim=16, null=s(encoder_hidden_states=0,
        global_hidden_states=0), channel_axis=1, tokens=slice(1, None), call=s(shared=["rotary_embedding"])),
    "T5FilmDecoder": at(_PACKED, "scheduler", encodings_and_masks=lambda n, g: [(torch.randn(n, TEXT, 16, generator=g),
        made(Mask(), n, g))], input_dims=4, targets_length=16, d_model=16, d_kv=8, d_ff=32,
        null=s(encodings_and_masks={0: {0: empty((TEXT, 16))}}), x="decoder_input_tokens", t="decoder_noise_time",
        give_t=lambda t: t / 1000, call=s(x="decoder_input_tokens", t=lambda call: 1000 * call["decoder_noise_time"])),
    "Transformer2DModel": at(_IMAGE, "scheduler", encoder_hidden_states=None, **_LABELS, patch_size=2, out_channels=8,
        num_embeds_ada_norm=10, norm_type="ada_norm_zero", norm_elementwise_affine=False, caption_channels=None,
        cross_attention_dim=None),
    "TransformerTemporalModel": "a part of a UNet, which is not called with a time",
    "WanAnimate2Transformer3DModel": "its attention (flex) has no backward pass on a CPU",
    "WanAnimateTransformer3DModel": at((4, 3, 8, 8), "flow", encoder_hidden_states_image=randn(3, 12),
        pose_hidden_states=randn(4, 2, 8, 8), face_pixel_values=randn(3, 5, 16, 16), in_channels=12, latent_channels=4,
        image_dim=12, motion_encoder_size=16, motion_encoder_channel_sizes={"4": 4, "8": 4, "16": 4},
        motion_style_dim=8, motion_dim=4, motion_encoder_dim=8, face_encoder_hidden_dim=8, face_encoder_num_heads=2,
        inject_face_latents_blocks=3, blocks="blocks", give_x=lambda x: torch.cat([x, torch.ones(len(x), 8, 3, 8, 8)],
        1), call=s(x=lambda call: call["hidden_states"][:, :4])),
    "WanTransformer3DModel": at(_VIDEO, "flow"),
    "WanVACETransformer3DModel": at(_VIDEO, "flow", control_hidden_states=randn(6, 2, 8, 8), vace_layers=[0, 2],
        vace_in_channels=6),
    "ZImageTransformer2DModel": at((4, 1, 8, 8), "sit", cap_feats=lambda n, g: [torch.randn(TEXT - i % 4, 24,
        generator=g) for i in range(n)], dim=16, n_heads=2, n_kv_heads=2, axes_dims=[4, 2, 2], axes_lens=[256, 32, 32],
        x="x", t="t", null=s(cap_feats=empty((1, 24))), give_x=lambda x: list(x),
        call=s(x=lambda call: torch.stack(call["x"])), tokens=slice(None, 16)),
}
# fmt: on
KINDS = [kind for kind, entry in TABLE.items() if not isinstance(entry, str)]
_READS = ("call", "select", "tokens")
_FIELDS = {"patch", "blocks", *_READS, *(field.name for field in dataclasses.fields(Backbone))} - {"patch_size"}
_TIMES = {"scheduler": "its scheduler's", "mochi": "0 is noise, 1000 data"}


@functools.cache
def attached(kind: str) -> Backbone:
    """A model of the table as a user would attach to it, at the layers that ``recipe`` names.

    Weights are drawn anew, since several models start with zeros that would let a check of a gradient pass for nothing.
    """
    shape, time, own = TABLE[kind]
    cls, fields = getattr(diffusers, kind), {name: own[name] for name in own if name in _FIELDS}
    own = {name: own[name] for name in own if name not in _FIELDS}
    config, given = (
        {name: value for name, value in (usual | own).items() if name in inspect.signature(function).parameters}
        for usual, function in ((SIZES, cls.__init__), (ARGUMENTS, cls.forward))
    )
    assert own.keys() <= {*config, *given}

    def build(seed: int) -> nn.Module:
        with torch.random.fork_rng():
            model = cls(**config)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim == 1 else 0.7 * parameter[0].numel() ** -0.5
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)
        return model.train()

    plan = st.recipe(build(0), blocks=fields.pop("blocks", None))
    usual = s(shallow=plan.stage1_layer, student=plan.student_layer, teacher=plan.teacher_layer)
    usual |= s(x="hidden_states", t="timestep", positional=0, channel_axis=2 if len(shape) == 2 else 1)
    usual["patch_size"] = fields.pop("patch", {2: (1,), 3: (2, 2), 4: (1, 2, 2)}[len(shape)])
    usual["reads"] = {key: fields.pop(key) for key in _READS if key in fields}
    null = {name: empty(value) for name, value in given.items() if is_condition(value)} | fields.pop("null", {})

    def conditions(n: int, g: torch.Generator) -> dict[str, Any]:
        return {name: made(value, n, g) for name, value in given.items()}

    return Backbone(build=build, shape=shape, time=time, conditions=conditions, null=null, **usual | fields)


def row(kind: str) -> str:
    """The model's row in docs/backbones.md, where a note of the image's place may stand behind it."""
    entry = TABLE[kind]
    if isinstance(entry, str):
        return f"| `{kind}` | | | | {entry} |"
    backbone = attached(kind)
    blocks = find_blocks(backbone.build(0), entry[-1].get("blocks"))
    layers = ", ".join(f"`{name}.i`" for name in dict.fromkeys(block.rpartition(".")[0] for block in blocks))
    null = ", ".join(f"`{name}`" for name in backbone.null)
    reads = {key: value if isinstance(value, int) else "..." for key, value in backbone.reads.items() if key != "call"}
    call = backbone.reads.get("call", {}).items()
    call = ", ".join(f"{key}={'...' if callable(value) else repr(value)}" for key, value in call)
    reads |= {"call": f"dict({call})"} if call else {}
    reads |= {"hidden_size": "..."} if backbone.asks else {}
    reads |= {"channel_axis": backbone.channel_axis} if backbone.channel_axis != 1 else {}
    needs = ", ".join(f"`{key}={value}`" for key, value in reads.items()).replace("'", '"')
    time = _TIMES.get(backbone.time, f'`"{backbone.time}"`')
    return f"| `{kind}` | {layers} | {time} | {null} | {needs} |"


if __name__ == "__main__":
    print("\n".join(map(row, TABLE)))
