"""The mistakes that are easiest to make with each backbone: every one ends in an error that says what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbones import PATHS, Backbone
from lookalikes import LOOKALIKES
from plain import refused
from small_diffusers import attached

import selftrans_reg as st

MODELS = LOOKALIKES | {name: attached(f"{name}Transformer2DModel") for name in ("SD3", "Flux", "Lumina2")}
MODELS["CogVideoX"] = attached("CogVideoXTransformer3DModel")


def step(
    backbone: Backbone, stage: int, settings: dict[str, Any], teacher: dict[str, Any], n: int = 16, **changes: Any
) -> st.LossTerms:
    """A step of either stage, with settings of criterion and teacher, and arguments of the model's call, changed."""
    model, batch = backbone.build(0), backbone.batch(n)
    if stage == 1:
        criterion = backbone.stage1(model, **settings)
    else:
        criterion = backbone.stage2(model, backbone.make_teacher(backbone.build(1), **teacher), **settings)
    latents = changes.pop("latents", batch.latents)
    batch.arguments.update(changes)
    return criterion(backbone.losses(model, batch).mean(), latents=latents)


# Of a noise level (EDM2, MaskDiT) there is no direction to mistake.
@pytest.mark.parametrize("name", [name for name, backbone in MODELS.items() if backbone.t != "sigma"])
def test_the_loop_gives_the_times_that_the_convention_would_call_the_opposite(name: str) -> None:
    backbone = MODELS[name]
    low, high = PATHS[backbone.time][:2]
    reversed_t = low + high - backbone.batch(16).arguments[backbone.t]
    with refused(st.TimeConventionError, f"time='{backbone.time}' contradicts", "slope of x_t"):
        step(backbone, 1, {}, {}, **{backbone.t: reversed_t})


NOT_PATCHES = ["tokens, which cannot be the patches of x_t", "the text's", "tokens=slice(None)"]
ANOTHER_SHAPE = ["Prediction (", "and target (", "at the image's tokens"]
USES: list[tuple[str, int, dict[str, Any], dict[str, Any], type[Exception], list[str]]] = [
    ("MMDiT", 1, {"select": 0}, {}, st.ShapeError, ["tokens do not fit the latent grid", "the text's", "select="]),
    ("CogVideoX", 1, {"select": 1}, {}, st.ShapeError, ["tokens do not fit the latent grid", "the text's", "select="]),
    ("SD3", 2, {"select": 0}, {}, st.ShapeError, NOT_PATCHES),
    ("MMDiT", 2, {"select": 0}, {"select": 0}, st.ShapeError, NOT_PATCHES),
    ("CogVideoX", 2, {}, {"select": 1}, st.ShapeError, ANOTHER_SHAPE),
    ("U-ViT", 1, {"tokens": None}, {}, st.ShapeError, ["18 tokens do not fit", "slice(2, None)", "slice(k, k + 16)"]),
    ("U-ViT", 2, {"tokens": None}, {"tokens": None}, st.ShapeError, ["18 tokens, which cannot be", *NOT_PATCHES[1:]]),
    ("U-ViT", 2, {}, {"tokens": None}, st.ShapeError, [", 16, 16)", ", 18, 16)", *ANOTHER_SHAPE]),
    ("Lumina2", 1, {"tokens": None}, {}, st.ShapeError, ["23 tokens do not fit", "differs by sample", "a callable"]),
    ("MDT", 1, {"forward": "last"}, {}, st.ShapeError, ["8 tokens do not fit the latent grid 4×4", "masked encoder"]),
    ("MDT", 2, {"forward": None}, {}, st.CaptureError, ["ran 2 forwards", "forward='first' or 'last'"]),
    (
        "MDT",
        1,
        {"layer": "sideblocks.0"},
        {},
        st.CaptureError,
        ["'sideblocks.0' did not run", "skips this layer"],
    ),
    ("MaskDiT", 1, {"layer": "model.blocks.1"}, {}, st.ShapeError, ["9 tokens do not fit", "masked encoder"]),
    ("MaskDiT", 2, {}, {"call": {"fixed": {"ratio": 0.0}}}, st.SettingError, ["names 'ratio'", "'mask_ratio'"]),
    ("MaskDiT", 2, {}, {"call": {"fixed": {"sigma": 1.0}}}, st.SettingError, ["x_t or t"]),
    ("EDM2", 1, {"hidden_size": None}, {}, st.SettingError, ["'unet.enc.16x16_block1' (ConvBlock)", "hidden_size="]),
    ("SiT", 1, {"layer": 8}, {}, st.SettingError, ["dotted module name", "encoder_depth=8", "'blocks.7'"]),
    ("SiT", 2, {}, {"null": {"y": lambda call: torch.tensor([10])}}, st.SettingError, ["returned (1,)", "(16,)"]),
    ("Flux", 1, {"channel_axis": 3}, {}, st.SettingError, ["channel_axis=3 is no axis of latents with 1 spatial axes"]),
    ("CogVideoX", 1, {"channel_axis": 1, "latent_channels": 4}, {}, st.ShapeError, ["on axis 1, the 4 channels"]),
]


@pytest.mark.parametrize(("name", "stage", "settings", "teacher", "error", "parts"), USES)
def test_a_use_that_cannot_be_meant(
    name: str, stage: int, settings: Any, teacher: Any, error: Any, parts: list[str]
) -> None:
    with refused(error, *parts):
        step(MODELS[name], stage, settings, teacher)


def test_latents_that_are_not_packed_as_x_t_is() -> None:
    unpacked = MODELS["Flux"].batch(16).latents.reshape(16, 4, 8, 8)
    with refused(st.ShapeError, "(16, 4, 8, 8)", "(16, 16, 16) differ in shape", "packed", "channel_axis="):
        step(MODELS["Flux"], 1, {}, {}, latents=unpacked)


def test_places_that_look_packed() -> None:
    """As many image tokens as twice the batch."""
    with refused(st.CallError, "'img_ids' has shape (16, 3)", "shared=['img_ids']"):
        step(MODELS["Flux"], 2, {"call": {"t": "timestep"}}, {"call": {"t": "timestep"}}, n=8)


@pytest.mark.parametrize("named_by", [0, 1], ids=["criterion", "teacher"])
def test_either_side_may_say_what_is_shared(named_by: int) -> None:
    calls: list[dict[str, Any]] = [{"t": "timestep"}, {"t": "timestep"}]
    calls[named_by]["shared"] = ["img_ids", "txt_ids"]
    assert step(MODELS["Flux"], 2, {"call": calls[0]}, {"call": calls[1]}).alignment > 0


def test_all_tokens_may_be_aligned_on_purpose() -> None:
    everything = {"tokens": slice(None)}
    assert step(MODELS["U-ViT"], 2, everything, everything).alignment > 0
