"""Every transformer class of diffusers at a tiny size: how it is called and attached to, or why it is not.

Run as a script it prints the table in docs/backbones.md.
"""

from __future__ import annotations

import functools
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


# A model: its latents, its time, what it is called with besides, its settings, and more fields of a Backbone. What is
# given as a shape, and each mask, is a condition, whose place the null condition takes. Among the fields may also be a
# ``note`` of where the image is, and the ``blocks`` that ``recipe`` has to be told.
Entry: TypeAlias = tuple[tuple[int, ...], str, dict[str, Any], dict[str, Any], dict[str, Any]]


def at(shape: Any, time: str, given: Any, config: Any, **more: Any) -> Entry:
    return shape, time, given, config, more


def s(**settings: Any) -> dict[str, Any]:
    return settings


class Mask(NamedTuple):
    """Of captions of different lengths, the first of them over the whole length."""

    length: int = TEXT
    dtype: torch.dtype = torch.long


def made(value: Any, n: int, g: torch.Generator) -> Any:
    """What a batch of n samples gives the model for a shape, a mask, or a function; the rest as it is."""
    if isinstance(value, Mask):
        return (torch.arange(value.length) < value.length - torch.arange(n)[:, None] % 4).to(value.dtype)
    if isinstance(value, tuple) and isinstance(value[0], int):
        return torch.randn(n, *value, generator=g)
    return value(n, g) if callable(value) else value


def empty(value: Any) -> Tensor:
    """What an empty prompt gives, for a shape or a mask."""
    if isinstance(value, Mask):
        return (torch.arange(value.length) < 2).to(value.dtype)
    return torch.linspace(-1, 1, math.prod(value)).reshape(value)


def randn(*shape: int) -> Callable[[int, torch.Generator], Tensor]:
    return lambda n, g: torch.randn(n, *shape, generator=g)


def same(value: Tensor) -> Callable[[int, torch.Generator], Tensor]:
    return lambda n, g: value.expand(n, *value.shape).clone()


def small(kind: str, **settings: Any) -> Callable[[int], nn.Module]:
    """From a seed to a model of diffusers, in train mode.

    Weights are drawn anew, since several models start with zeros that would let a check of a gradient pass for nothing.
    """

    def build(seed: int) -> nn.Module:
        with torch.random.fork_rng():
            model = getattr(diffusers, kind)(**settings)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim == 1 else 0.7 * parameter[0].numel() ** -0.5
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)
        return model.train()

    return build


@functools.cache
def attached(kind: str) -> Backbone:
    """A model of the table as a user would attach to it, at the layers that ``recipe`` names."""
    shape, time, given, config, more = TABLE[kind]
    build = small(kind, **config)
    plan = st.recipe(build(0), blocks=more.get("blocks"))
    fields = s(shallow=plan.stage1_layer, student=plan.student_layer, teacher=plan.teacher_layer)
    fields |= s(x="hidden_states", t="timestep", positional=0, channel_axis=2 if len(shape) == 2 else 1)
    fields["patch_size"] = {2: (1,), 3: (2, 2), 4: (1, 2, 2)}[len(shape)]
    fields["reads"] = {key: more[key] for key in ("call", "select", "tokens") if key in more}
    conditions = {name for name, value in given.items() if isinstance(value, tuple) and isinstance(value[0], int)}
    fields["null"] = {name: empty(value) for name, value in given.items() if name in conditions}
    last = {} if kind == "T5FilmDecoder" else {"return_dict": False}

    def arguments(n: int, g: torch.Generator) -> dict[str, Any]:
        return {name: made(value, n, g) for name, value in given.items()} | last

    fields |= {key: value for key, value in more.items() if key not in {*fields["reads"], "blocks", "note"}}
    return Backbone(build=build, shape=shape, time=time, conditions=arguments, **fields)


def image_behind_caption(joint: Tensor, call: Mapping[str, Any]) -> Tensor:
    """Lumina2 puts each image right behind its own caption, whose length the mask tells."""
    places = call["encoder_attention_mask"].sum(1)[:, None] + torch.arange(16)  # (N, T)
    return joint.gather(1, places[:, :, None].expand(-1, -1, joint.shape[2]))


def _plain_image_behind_caption(joint: Tensor, call: Mapping[str, Any]) -> Tensor:
    lengths = call["encoder_attention_mask"].sum(1).tolist()
    return torch.stack([row[length : length + 16] for row, length in zip(joint, lengths, strict=True)])


def _rotary(places: int, width: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(places)[:, None] / (1 + torch.arange(width))
    return angles.cos(), angles.sin()


# fmt: off
_H = s(num_attention_heads=2, attention_head_dim=8)
_B, _JOINT = s(num_layers=3) | _H, s(num_layers=2, num_single_layers=3) | _H
_C = s(in_channels=4, out_channels=4)
_S = s(sample_size=8, patch_size=2)
_AXES = s(axes_dims_rope=(4, 2, 2))
_IMAGE, _VIDEO, _FRAMES, _PACKED = (4, 8, 8), (4, 2, 8, 8), (2, 4, 8, 8), (16, 4)
_TEXT = s(encoder_hidden_states=(TEXT, 24))
_MASKED = _TEXT | s(encoder_attention_mask=Mask())
_BOOL = _TEXT | s(encoder_attention_mask=Mask(dtype=torch.bool))
_POOLED = s(pooled_projections=(20,))
_GRID = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
_IDS = s(img_ids=_GRID, txt_ids=torch.zeros(TEXT, 3))
_IDS4 = s(img_ids=torch.cat([_GRID, torch.zeros(16, 1)], 1), txt_ids=torch.zeros(TEXT, 4))
_ONE = s(guidance=same(torch.ones(())))
_SIZE = same(torch.full((2,), 64.0))
_SIZES = s(target_size=_SIZE, crop_coords=_SIZE)
_LABELS = s(class_labels=lambda n, g: torch.randint(10, (n,), generator=g))
_FLUX = s(select=1, call=s(shared=["img_ids", "txt_ids"]))
_BEHIND = s(tokens=slice(TEXT, None), note="the text comes first")
_TEXT_FIRST = "in single blocks `tokens=...` instead: the text comes first"
_SINGLE = s(tokens=slice(TEXT, None), call=s(shared=["img_ids", "txt_ids"]))
_WAN = _B | _C | s(patch_size=(1, 2, 2), text_dim=24, freq_dim=16, ffn_dim=32)
_ROPE = s(rope_max_seq_len=32)
_TRANSFORMER = s(sample_size=8, patch_size=2, in_channels=4, out_channels=8)
_HUNYUAN = _JOINT | _C | s(num_refiner_layers=1, text_embed_dim=24)
_VIDEO_HUNYUAN = _HUNYUAN | s(patch_size=2, pooled_projection_dim=20, rope_axes_dim=(4, 2, 2))
_JOY = s(in_channels=4, hidden_size=16, num_attention_heads=2, text_dim=24, num_layers=3, mlp_width_ratio=2.0,
    rope_dim_list=[4, 2, 2])
_KANDINSKY = s(time_dim=16, model_dim=16, ff_dim=32, num_visual_blocks=3, num_text_blocks=1, in_text_dim=24,
    in_text_dim2=20)
_LTX2 = _B | _C | s(cross_attention_dim=16, caption_channels=24, audio_in_channels=4, audio_out_channels=4,
    audio_num_attention_heads=2, audio_attention_head_dim=4, audio_cross_attention_dim=8, rope_double_precision=False)
_LLAMA = s(rows=s(encoder_hidden_states_llama3=1))
_FRAME_TIME = s(give_t=lambda t: t[:, None].repeat(1, 2), call=s(t=lambda call: call["timestep"].flatten(1).amax(1)))

TABLE: dict[str, Entry | str] = {
    "AceStepTransformer1DModel": at(_PACKED, "flow-unit", s(encoder_hidden_states=(TEXT, 16), timestep_r=randn(),
        context_latents=randn(16, 8)), s(hidden_size=16, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=2, head_dim=8, num_key_value_heads=1, in_channels=12, audio_acoustic_hidden_dim=4,
        sliding_window=16), patch_size=(2,), call=s(t="timestep")),
    "AllegroTransformer3DModel": at(_VIDEO, "scheduler", _TEXT, _B | _C | s(cross_attention_dim=16, caption_channels=24,
        sample_width=8, sample_height=8, sample_frames=2)),
    "AnyFlowFARTransformer3DModel": "its attention (flex) has no backward pass on a CPU",
    "AnyFlowTransformer3DModel": at(_FRAMES, "flow", _TEXT |
        s(r_timestep=lambda n, g: 500 * torch.rand(n, 2, generator=g)), _WAN | _ROPE, channel_axis=2, **_FRAME_TIME),
    "AuraFlowTransformer2DModel": at(_IMAGE, "flow-unit", _TEXT, _H | _C | _S | s(num_mmdit_layers=2,
        num_single_dit_layers=3, caption_projection_dim=16, joint_attention_dim=24, pos_embed_max_size=64), select=1,
        teacher_reads=s(tokens=slice(8 + TEXT, None)),
        note="in single blocks `tokens=...` instead: 8 registers and the text come first"),
    "BriaFibo2Transformer2DModel": at(_IMAGE, "flow-unit", _BOOL | s(encoder_hidden_states=(2, TEXT, 24)),
        s(in_channels=4, dim=24, n_layers=3, n_refiner_layers=1, n_heads=3, cap_feat_dim=24, injection_layer_ids=(1,),
        perceiver_num_layers=1, min_num_gist_tokens=3, max_num_gist_tokens=3, gist_step=1, gist_min_text_len=1,
        gist_max_text_len=8, axes_dims=(4, 2, 2), axes_lens=(32, 16, 16)), tokens=slice(3, None),
        note="the gist tokens come first where all captions have as many, else last"),
    "BriaFiboTransformer2DModel": at(_PACKED, "flow", _TEXT | _IDS |
        s(text_encoder_layers=lambda n, g: [torch.randn(n, TEXT, 8, generator=g) for _ in range(5)]), _JOINT | _AXES |
        s(in_channels=4, joint_attention_dim=24, text_encoder_dim=8), null=s(encoder_hidden_states=empty((TEXT, 24)),
        text_encoder_layers={i: empty((TEXT, 8)) for i in range(5)}), **_FLUX, teacher_reads=_SINGLE,
        note=_TEXT_FIRST),
    "BriaTransformer2DModel": at(_PACKED, "flow", _TEXT | _IDS, _JOINT | _AXES |
        s(in_channels=4, joint_attention_dim=24), **_FLUX),
    "ChromaTransformer2DModel": at(_PACKED, "flow-unit", _TEXT | _IDS, _JOINT | _AXES | s(in_channels=4,
        joint_attention_dim=24, approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1),
        **_FLUX, teacher_reads=_SINGLE, note=_TEXT_FIRST),
    "ChronoEditTransformer3DModel": at(_VIDEO, "flow", _TEXT, _WAN | _ROPE),
    "CogVideoXTransformer3DModel": at(_FRAMES, "cogvideox", _TEXT, _B | _C | s(time_embed_dim=8, text_embed_dim=24,
        sample_width=8, sample_height=8, sample_frames=5, patch_size=2, max_text_seq_length=TEXT), channel_axis=2,
        select=0),
    "CogView3PlusTransformer2DModel": at(_IMAGE, "scheduler", _TEXT | _SIZES |
        s(original_size=_SIZE), _B | _C | _S | s(text_embed_dim=24, time_embed_dim=8,
        condition_dim=2, pos_embed_max_size=8), select=0),
    "CogView4Transformer2DModel": at(_IMAGE, "flow", _TEXT | _SIZES | s(original_size=_SIZE),
        _B | _C | s(text_embed_dim=24, time_embed_dim=8, condition_dim=4, rope_axes_dim=(8, 8)), select=0),
    "ConsisIDTransformer3DModel": at(_FRAMES, "scheduler", _TEXT | s(id_cond=randn(2),
        id_vit_hidden=lambda n, g: [torch.randn(n, 2, 2, generator=g)]), _B | _C | s(time_embed_dim=8,
        text_embed_dim=24, sample_width=8, sample_height=8, sample_frames=5, max_text_seq_length=TEXT,
        is_train_face=True, cross_attn_interval=3, cross_attn_dim_head=1, cross_attn_num_heads=1, LFE_id_dim=2,
        LFE_vit_dim=2, LFE_depth=1, LFE_dim_head=8, LFE_num_heads=2, LFE_num_id_token=1, LFE_num_querie=1,
        LFE_output_dim=10, LFE_ff_mult=1, LFE_num_scale=1), channel_axis=2, select=0),
    "Cosmos3OmniTransformer": "its samples are packed into one sequence, without a batch axis",
    "CosmosTransformer3DModel": at(_VIDEO, "flow-unit", _TEXT | s(fps=30), _B | _C | s(attention_head_dim=12,
        mlp_ratio=2, text_embed_dim=24, adaln_lora_dim=4, max_size=(4, 32, 32), patch_size=(1, 2, 2),
        concat_padding_mask=False)),
    "DiTTransformer2DModel": at(_IMAGE, "ddpm", _LABELS, _B | _TRANSFORMER | s(num_embeds_ada_norm=10),
        null=s(class_labels=10)),
    "DreamLiteTransformer2DModel": "a part of a UNet, which is not called with a time",
    "EasyAnimateTransformer3DModel": at(_VIDEO, "flow", _TEXT, _C | s(num_attention_heads=2, attention_head_dim=16,
        mmdit_layers=3, num_layers=3, patch_size=2, text_embed_dim=24, time_embed_dim=8), select=0),
    "ErnieImageTransformer2DModel": at((4, 4, 4), "flow", s(text_bth=(TEXT, 24),
        text_lens=lambda n, g: TEXT - torch.arange(n) % 4), _C | s(hidden_size=16, num_attention_heads=2, num_layers=3,
        ffn_hidden_size=32, text_in_dim=24, rope_axes_dim=(4, 2, 2)), patch_size=(1, 1),
        null=s(text_bth=empty((TEXT, 24)), text_lens=2), tokens=lambda joint: joint.transpose(0, 1)[:, :16],
        pick=lambda joint, call: torch.stack([joint[:16, i] for i in range(joint.shape[1])]),
        note="of (image and text, N, D) the image comes first"),
    "Flux2Transformer2DModel": at(_PACKED, "flow-unit", _TEXT | _IDS4 | _ONE, _JOINT | s(in_channels=4,
        joint_attention_dim=24, timestep_guidance_channels=16, axes_dims_rope=(2, 2, 2, 2)), **_FLUX, asks=16,
        teacher_reads=_SINGLE, note=_TEXT_FIRST),
    "Flux3Transformer2DModel": at(_PACKED, "flow-unit", _TEXT | _IDS4, _H | s(num_layers=1, num_single_layers=6,
        in_channels=4, cond_in_channels=4, timestep_channels=16, joint_attention_dim=24, axes_dims_rope=(2, 2, 2, 2)),
        **_FLUX),
    "FluxTransformer2DModel": at((16, 16), "flow-unit", _TEXT | _POOLED | _IDS | _ONE, _JOINT | _AXES |
        s(in_channels=16, joint_attention_dim=24, pooled_projection_dim=20, guidance_embeds=True), **_FLUX),
    "GlmImageTransformer2DModel": at(_IMAGE, "flow", _TEXT | _SIZES |
        s(prior_token_id=lambda n, g: torch.randint(64, (n, 16), generator=g),
        prior_token_drop=same(torch.zeros(16, dtype=torch.bool))), _B | _C | s(text_embed_dim=24, time_embed_dim=8,
        condition_dim=4, prior_vq_quantizer_codebook_size=64), select=0, null=s(encoder_hidden_states=empty((TEXT, 24)),
        prior_token_drop=1)),
    "HeliosTransformer3DModel": at(_VIDEO, "flow", _TEXT, _WAN | s(rope_dim=(4, 2, 2),
        has_multi_term_memory_patch=False, guidance_cross_attn=False, zero_history_timestep=False)),
    "HiDreamImageTransformer2DModel": at(_IMAGE, "flow", s(pooled_embeds=(8,), encoder_hidden_states_t5=(TEXT, 24),
        encoder_hidden_states_llama3=lambda n, g: torch.randn(2, n, TEXT, 8, generator=g)), _JOINT | _C |
        s(patch_size=2, caption_channels=[24, 8], text_emb_dim=8, num_routed_experts=2, num_activated_experts=2,
        axes_dims_rope=(4, 2, 2), max_resolution=(8, 8), llama_layers=(0, 1, 0, 1, 0), force_inference_output=True),
        t="timesteps", null=s(pooled_embeds=0, encoder_hidden_states_t5=0, encoder_hidden_states_llama3=0), call=_LLAMA,
        select=0, teacher_reads=s(tokens=slice(None, 16), call=_LLAMA),
        note="in single blocks `tokens=...` instead: the image comes first"),
    "HunyuanDiT2DModel": at(_IMAGE, "hunyuandit-1.2", s(encoder_hidden_states=(4, 8), text_embedding_mask=Mask(4),
        encoder_hidden_states_t5=(4, 8), text_embedding_mask_t5=Mask(4), image_rotary_emb=_rotary(16, 8)), _B | _S |
        s(num_layers=4, in_channels=4, hidden_size=16, cross_attention_dim=8, cross_attention_dim_t5=8,
        pooled_projection_dim=4, text_len=4, text_len_t5=4, activation_fn="gelu-approximate",
        use_style_cond_and_image_meta_size=False), call=s(shared=["image_rotary_emb"]), give_t=Tensor.float),
    "HunyuanImageTransformer2DModel": at((4, 4, 4), "flow", _MASKED, _HUNYUAN |
        s(patch_size=(1, 1), rope_axes_dim=(4, 4)), patch_size=(1, 1), select=0),
    "HunyuanVideo15Transformer3DModel": at((4, 1, 4, 4), "flow", _MASKED | s(encoder_hidden_states_2=(4, 12),
        encoder_attention_mask_2=Mask(4), image_embeds=same(torch.zeros(3, 6))), _B | _C | s(num_refiner_layers=1,
        text_embed_dim=24, text_embed_2_dim=12, image_embed_dim=6, rope_axes_dim=(4, 2, 2), target_size=8,
        task_type="t2v"), patch_size=(1, 1, 1), select=0),
    "HunyuanVideoFramepackTransformer3DModel": at(_VIDEO, "flow", _MASKED | _POOLED | _ONE |
        s(image_embeds=randn(3, 12), indices_latents=torch.arange(2.0), latents_clean=randn(4, 1, 8, 8),
        indices_latents_clean=torch.zeros(1), latents_history_2x=randn(4, 2, 8, 8),
        indices_latents_history_2x=torch.arange(2.0), latents_history_4x=randn(4, 4, 8, 8),
        indices_latents_history_4x=torch.arange(4.0)), _VIDEO_HUNYUAN | s(has_image_proj=True, image_proj_dim=12,
        has_clean_x_embedder=True), select=lambda output: output[0][:, -32:],
        pick=lambda output, call: output[0][:, -32:], note="the history comes first"),
    "HunyuanVideoTransformer3DModel": at(_VIDEO, "flow", _MASKED | _POOLED | _ONE, _VIDEO_HUNYUAN, select=0),
    "Ideogram4Transformer2DModel": at(_PACKED, "sit", s(encoder_hidden_states=(TEXT + 16, 24),
        position_ids=same(torch.arange(23)[:, None].repeat(1, 3)), segment_ids=same(torch.ones(23).long()),
        indicator=same(torch.tensor([3] * TEXT + [2] * 16))), _B | s(in_channels=4, intermediate_size=32, adaln_dim=16,
        llm_features_dim=24, mrope_section=(2, 1, 1)), give_x=lambda x: torch.cat([torch.zeros(len(x), TEXT, 4), x], 1),
        t="timestep", tokens=slice(TEXT, None), call=s(x=lambda call: call["hidden_states"][:, TEXT:]),
        note="the text comes first, in x_t too"),
    "JoyImageEditPlusTransformer3DModel": at((4, 4, 2, 2), "flow", _TEXT | s(shape_list=lambda n, g: [[(1, 2, 2)]] * n),
        _JOY, channel_axis=2, give_x=lambda x: x[:, :, :, None], select=0,
        call=s(x=lambda call: call["hidden_states"][:, :, :, 0], rows=s(shape_list="list"))),
    "JoyImageEditTransformer3DModel": at(_VIDEO, "flow", _TEXT, _JOY, select=0),
    "Kandinsky5Transformer3DModel": at((2, 8, 8, 4), "flow", _TEXT | _POOLED | s(visual_rope_pos=[torch.arange(2),
        torch.arange(4), torch.arange(4)], text_rope_pos=torch.arange(TEXT)), _KANDINSKY | s(axes_dims=(4, 2, 2)),
        channel_axis=4),
    "Kandinsky6SRTransformer3DModel": "its attention (flex) has no backward pass on a CPU",
    "Kandinsky6Transformer3DModel": at((2, 8, 8, 4), "flow", _TEXT | _POOLED, _KANDINSKY | s(axes_dims=(4, 2, 2),
        in_visual_dim=4, out_visual_dim=4, visual_cond=False, in_audio_dim=4), channel_axis=4),
    "Krea2Transformer2DModel": at(_PACKED, "flow-unit", s(encoder_hidden_states=(TEXT, 2, 24),
        encoder_attention_mask=Mask(dtype=torch.bool), position_ids=torch.cat([torch.zeros(TEXT, 3), _GRID])), _B |
        _AXES | s(in_channels=4, num_key_value_heads=1, intermediate_size=32, timestep_embed_dim=8, text_hidden_dim=24,
        num_text_layers=2, text_num_attention_heads=2, text_num_key_value_heads=1, text_intermediate_size=16,
        num_layerwise_text_blocks=1, num_refiner_text_blocks=1), **_BEHIND),
    "LTX2VideoTransformer3DModel": at((32, 4), "flow", _MASKED | s(audio_hidden_states=randn(5, 4),
        audio_encoder_hidden_states=(TEXT, 24), num_frames=2, height=4, width=4, audio_num_frames=5), _LTX2, select=0,
        asks=16, call=s(t="timestep")),
    "LTXVideoTransformer3DModel": at((32, 4), "flow", _MASKED | s(num_frames=2, height=4, width=4), _B | _C |
        s(cross_attention_dim=16, caption_channels=24)),
    "LatteTransformer3DModel": at(_VIDEO, "scheduler", _TEXT, _B | _TRANSFORMER | s(caption_channels=24,
        cross_attention_dim=16, num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False,
        video_length=2), tokens=lambda x, call: x.reshape(len(call["hidden_states"]), -1, x.shape[2]),
        pick=lambda x, call: torch.stack([torch.cat(list(frames)) for frames in x.split(2)]),
        note="blocks have one row a frame"),
    "LongCatAudioDiTTransformer": at(_PACKED, "sit", _BOOL, s(dit_dim=16, dit_depth=3, dit_heads=2, dit_text_dim=24,
        latent_dim=4, text_conv=False, use_latent_condition=False)),
    "LongCatImageTransformer2DModel": at(_PACKED, "flow-unit", _TEXT | _IDS, _JOINT | _AXES |
        s(in_channels=4, joint_attention_dim=24), **_FLUX),
    "Lumina2Transformer2DModel": at(_IMAGE, "sit", _MASKED, _S | s(in_channels=4, hidden_size=24, num_layers=3,
        num_refiner_layers=1, num_attention_heads=3, num_kv_heads=1, multiple_of=2, axes_dim_rope=(4, 2, 2),
        axes_lens=(32, 16, 16), cap_feat_dim=24), tokens=image_behind_caption,
        pick=_plain_image_behind_caption, note="each image comes right behind its own caption"),
    "LuminaNextDiT2DModel": at(_IMAGE, "sit", s(encoder_hidden_states=(TEXT, 12), encoder_mask=Mask(),
        image_rotary_emb=torch.polar(torch.ones(384, 384, 4), torch.linspace(0, 9, 384 ** 2 * 4).view(384, 384, 4)),
        cross_attention_kwargs={}), s(sample_size=8, in_channels=4, hidden_size=24, num_layers=3, num_attention_heads=3,
        num_kv_heads=1, multiple_of=2, cross_attention_dim=12), call=s(shared=["image_rotary_emb"])),
    "MiniMaxH3Transformer3DModel": "its times hold for the whole batch, not for a sample",
    "MiniMaxMusic3RVQDepthDecoder": "it predicts codes: there is no noise and no time",
    "MiniMaxMusic3Transformer1DModel": at((4, 16), "sit", s(encoder_hidden_states=(16, 12)), _B | s(in_channels=4,
        condition_dim=12, ff_inner_dim=32, rotary_dim=4, fourier_embedding_dim=8), channel_axis=1,
        tokens=slice(1, None), note="the time comes first"),
    "MochiTransformer3DModel": at(_VIDEO, "mochi", _BOOL, _B | s(in_channels=4, pooled_projection_dim=16,
        text_embed_dim=24, time_embed_dim=4, max_sequence_length=TEXT), select=0, asks=16),
    "MotifVideoTransformer3DModel": at(_VIDEO, "flow", _MASKED, _JOINT | _C |
        s(text_embed_dim=24, rope_axes_dim=(4, 2, 2)), select=0),
    "NucleusMoEImageTransformer2DModel": at(_PACKED, "flow-unit", _TEXT | s(encoder_hidden_states_mask=Mask(),
        img_shapes=lambda n, g: [(1, 4, 4)] * n), _B | _AXES | s(num_attention_heads=6, in_channels=4, out_channels=1,
        joint_attention_dim=24, moe_enabled=False, capacity_factors=[8.0] * 3), call=s(rows=s(img_shapes="list"))),
    "OmniGenTransformer2DModel": at(_IMAGE, "sit",
        s(input_ids=lambda n, g: torch.randint(1, 10, (n, TEXT), generator=g), input_img_latents=[],
        input_image_sizes={}, attention_mask=same(torch.ones(24, 24)), position_ids=same(torch.arange(24))),
        s(hidden_size=16, num_attention_heads=2, num_key_value_heads=2, intermediate_size=32, in_channels=4,
        num_layers=3, pad_token_id=0, vocab_size=32, time_step_dim=4, pos_embed_max_size=8,
        rope_scaling=s(long_factor=[1] * 4, short_factor=[1] * 4)), null=s(input_ids=0), tokens=slice(TEXT + 1, None),
        note="the text and the time come first"),
    "OvisImageTransformer2DModel": at(_PACKED, "flow-unit", _TEXT | _IDS, _JOINT | _AXES | _C |
        s(joint_attention_dim=24), **_FLUX),
    "PRXTransformer2DModel": at(_IMAGE, "flow-unit", _TEXT | s(attention_mask=Mask()), s(in_channels=4,
        context_in_dim=24, hidden_size=16, mlp_ratio=2.0, num_heads=2, depth=3, axes_dim=[4, 4])),
    "PixArtTransformer2DModel": at(_IMAGE, "ddpm", _MASKED | s(added_cond_kwargs=s(resolution=None, aspect_ratio=None)),
        _B | _TRANSFORMER | s(cross_attention_dim=16, caption_channels=24, use_additional_conditions=False)),
    "PriorTransformer": at((12, 1), "scheduler", s(encoder_hidden_states=(TEXT, 12), proj_embedding=(12,)), _B |
        s(embedding_dim=12, num_embeddings=TEXT), channel_axis=1, give_x=lambda x: x[:, :, 0],
        call=s(x=lambda call: call["hidden_states"][:, :, None]), tokens=slice(-2, -1),
        pick=lambda output, call: output[:, TEXT + 2:TEXT + 3], note="x_t is one token, the last but one"),
    "QwenImage21Transformer2DModel": at(_PACKED, "flow-unit", _TEXT | s(encoder_hidden_states_mask=Mask(),
        img_shapes=lambda n, g: [[(1, 4, 4)]] * n, img_mask=same(torch.tensor([False] * TEXT + [True] * 4))), _B |
        _AXES | _C | s(context_in_dim=24), call=s(rows=s(img_shapes="list")), **_BEHIND),
    "QwenImageTransformer2DModel": at(_PACKED, "flow-unit", _TEXT | s(encoder_hidden_states_mask=Mask(),
        img_shapes=lambda n, g: [[(1, 4, 4)]] * n), _B | _AXES | s(in_channels=4, out_channels=1,
        joint_attention_dim=24), select=1, call=s(rows=s(img_shapes="list"))),
    "RFD4ProteinaTransformer": at(_PACKED, "sit", s(bb_ca=randn(16, 3),
        bb_ca_time=lambda n, g: torch.rand(n, generator=g), padding_mask=same(torch.ones(16, dtype=torch.bool)),
        token_type=same(torch.arange(16) % 7),
        conditioning=lambda n, g: s(is_in_context_conditioning=torch.zeros(n, 16, dtype=torch.bool),
        supports_local_latent=torch.ones(n, 16, dtype=torch.bool))), s(nlayers=3, token_dim=16, nheads=2, dim_cond=8,
        pair_repr_dim=6, latent_dim=4, t_emb_dim=8, token_type_emb_dim=4, xt_pair_dist_dim=5,
        feats_seq=("xt_bb_ca", "xt_local_latents", "token_type"),
        feats_cond_seq=("time_emb_bb_ca", "time_emb_local_latents"), feats_pair_repr=("xt_bb_ca_pair_dists",),
        feats_pair_cond=(), tri_mult_c=4, num_sequence_classes=5), null=s(token_type=0), x="local_latents",
        t="local_latents_time", call=s(x="local_latents", t="local_latents_time"),
        note="of its two x_t the local latents"),
    "SD3Transformer2DModel": at(_IMAGE, "flow", _TEXT | _POOLED, _B | _C | _S | s(joint_attention_dim=24,
        caption_projection_dim=16, pooled_projection_dim=20, pos_embed_max_size=8, qk_norm="rms_norm"), select=1),
    "SanaTransformer2DModel": at(_IMAGE, "flow", _MASKED, _B | _C | s(num_cross_attention_heads=2,
        cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=24, sample_size=8, patch_size=1),
        patch_size=(1, 1)),
    "SanaVideoTransformer3DModel": at(_VIDEO, "flow", _MASKED, _B | _C | _ROPE | s(num_cross_attention_heads=2,
        cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=24, sample_size=8)),
    "SanaWMLTX2RefinerTransformer3DModel": at((32, 4), "flow", _MASKED | s(video_rotary_emb=_rotary(32, 16)), _LTX2,
        asks=16, call=s(shared=["video_rotary_emb"])),
    "SanaWMTransformer3DModel": at((4, 2, 4, 4), "flow", s(encoder_hidden_states=(1, TEXT, 24),
        encoder_attention_mask=Mask()), s(in_channels=4, num_layers=3, hidden_size=32, num_attention_heads=2,
        linear_head_dim=16, chunk_plucker_post_attn_blocks=3, chunk_plucker_channels=4, image_size=256,
        caption_channels=24), patch_size=(1, 1, 1), **_FRAME_TIME |
        s(give_t=lambda t: t[:, None, None].repeat(1, 1, 2))),
    "SkyReelsV2Transformer3DModel": at(_VIDEO, "flow", _TEXT, _WAN | _ROPE),
    "StableAudio3DiTModel": at((4, 16), "flow-unit", s(encoder_hidden_states=(TEXT, 12), global_hidden_states=(8,)),
        s(io_channels=4, embed_dim=16, depth=3, num_heads=2, cond_token_dim=12, global_cond_dim=8, local_add_cond_dim=5,
        timestep_features_dim=8, num_memory_tokens=3), channel_axis=1, tokens=slice(3, None),
        note="the memory tokens come first"),
    "StableAudioDiTModel": at((4, 16), "stable-audio", s(encoder_hidden_states=(TEXT, 16), global_hidden_states=(1, 8),
        rotary_embedding=_rotary(17, 4)), _B | _C | s(sample_size=16, num_key_value_attention_heads=1,
        cross_attention_dim=8, time_proj_dim=8, global_states_input_dim=8, cross_attention_input_dim=16),
        null=s(encoder_hidden_states=0, global_hidden_states=0), channel_axis=1, tokens=slice(1, None),
        call=s(shared=["rotary_embedding"]), note="a global token comes first"),
    "T5FilmDecoder": at(_PACKED, "scheduler",
        s(encodings_and_masks=lambda n, g: [(torch.randn(n, TEXT, 16, generator=g), made(Mask(), n, g))]),
        s(input_dims=4, targets_length=16, d_model=16, num_layers=3, num_heads=2, d_kv=8, d_ff=32),
        null=s(encodings_and_masks={0: {0: empty((TEXT, 16))}}), x="decoder_input_tokens", t="decoder_noise_time",
        give_t=lambda t: t / 1000, call=s(x="decoder_input_tokens", t=lambda call: 1000 * call["decoder_noise_time"])),
    "Transformer2DModel": at(_IMAGE, "scheduler", _LABELS, _B | _TRANSFORMER | s(num_embeds_ada_norm=10,
        norm_type="ada_norm_zero", norm_elementwise_affine=False), null=s(class_labels=10)),
    "TransformerTemporalModel": "a part of a UNet, which is not called with a time",
    "WanAnimate2Transformer3DModel": "its attention (flex) has no backward pass on a CPU",
    "WanAnimateTransformer3DModel": at((4, 3, 8, 8), "flow", _TEXT | s(encoder_hidden_states_image=randn(3, 12),
        pose_hidden_states=randn(4, 2, 8, 8), face_pixel_values=randn(3, 5, 16, 16)), _WAN | _ROPE | s(in_channels=12,
        latent_channels=4, image_dim=12, motion_encoder_size=16, motion_encoder_channel_sizes={"4": 4, "8": 4, "16": 4},
        motion_style_dim=8, motion_dim=4, motion_encoder_dim=8, face_encoder_hidden_dim=8, face_encoder_num_heads=2,
        inject_face_latents_blocks=3), blocks="blocks",
        give_x=lambda x: torch.cat([x, torch.ones(len(x), 8, 3, 8, 8)], 1),
        call=s(x=lambda call: call["hidden_states"][:, :4]), note="x_t has other channels behind its own"),
    "WanTransformer3DModel": at(_VIDEO, "flow", _TEXT, _WAN | _ROPE),
    "WanVACETransformer3DModel": at(_VIDEO, "flow", _TEXT | s(control_hidden_states=randn(6, 2, 8, 8)), _WAN | _ROPE |
        s(vace_layers=[0, 2], vace_in_channels=6)),
    "ZImageTransformer2DModel": at((4, 1, 8, 8), "sit",
        s(cap_feats=lambda n, g: [torch.randn(TEXT - i % 4, 24, generator=g) for i in range(n)]), s(in_channels=4,
        dim=16, n_layers=3, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=24, axes_dims=[4, 2, 2],
        axes_lens=[256, 32, 32]), x="x", t="t", null=s(cap_feats=empty((1, 24))), give_x=lambda x: list(x),
        call=s(x=lambda call: torch.stack(call["x"])), tokens=slice(None, 16),
        note="the image comes first, both padded"),
}
# fmt: on
KINDS = [kind for kind, entry in TABLE.items() if not isinstance(entry, str)]
_TIMES = {"scheduler": "its scheduler's", "mochi": "0 is noise, 1000 data"}


def row(kind: str) -> str:
    """The model's row in docs/backbones.md."""
    entry = TABLE[kind]
    if isinstance(entry, str):
        return f"| `{kind}` | | | | {entry} |"
    backbone, note = attached(kind), entry[-1].get("note")
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
    return f"| `{kind}` | {layers} | {time} | {null} | {needs}{f' ({note})' if note else ''} |"


if __name__ == "__main__":
    print("\n".join(map(row, TABLE)))
