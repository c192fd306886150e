"""Settings, calls and uses that cannot be meant: an error of our own that says what was found and what to do.

Errors that a page of the docs shows are executed there, by ``docs/errors.md``.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from backbones import PATHS, Backbone
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from lookalikes import LOOKALIKES
from loops import new_criterion, new_teacher, noisy_batch, student, toy
from plain import refused
from small_diffusers import attached
from torch import nn

import selftrans_reg as st
from selftrans_reg.settings import Settings

NO_WEIGHT = (-0.1, 1e7, math.nan, math.inf, "0.5", True, None)
NO_WINDOW = ((0.7, 0.4), (0.4, 0.4), (-0.1, 0.5), (0.4, 1.1), 0.4, (0.4,), "al", (400, 700), (math.nan, 0.5), (True, 1))
NO_ROWS = (0, -1, True, 0.0, 1.0, 1.5, "2")
NO_COUNT = (0, -1, True, 1.5, "2")
SETTINGS: list[tuple[str, tuple[Any, ...], str]] = [
    ("weight", NO_WEIGHT, "weight must be a number from 0 to 1000000; got"),
    ("window", NO_WINDOW, "window must be None or (low, high) in noise fraction"),
    ("teacher_rows", NO_ROWS, "teacher_rows must be None, a whole number of rows from 1, or a share"),
    *((name, NO_COUNT, f"{name} must be a") for name in ("teacher_chunk", "check_interval", "health_interval")),
    ("target", ("noise", None, []), "target must be one of 'latents', 'velocity'; got"),
    ("gating", ("hard",), "gating must be one of 'per-sample', 'released'; got"),
    ("distance", ("l2", None), "distance must be one of 'mse', 'cosine', 'smooth_l1'; got"),
    ("schedule", ("exponential",), "schedule must be one of 'constant', 'linear', 'cosine'; got"),
    ("schedule", ("linear",), "schedule='linear' decays to 0 at stop_step: give a stop_step"),
    ("stop_step", (-1, 1e5, True, 2**63), "stop_step must be None or an integer, 0 or more; got"),
    ("stop_when", (True, 100), "stop_when must be a Plateau or None, such as st.Plateau(); got"),
    ("forward", ("second",), "forward must be one of None, 'first', 'last'; got"),
    ("eval_mode", (None, "yes"), "eval_mode must be one of False, True; got"),
    ("select", (1.5, True), "select must be an index, a key or a callable; got"),
    ("tokens", (4,), "tokens must be a slice, "),
]


@pytest.mark.parametrize(("name", "values", "message"), SETTINGS)
def test_a_setting_that_makes_no_sense(name: str, values: tuple[Any, ...], message: str) -> None:
    for value in values:
        with refused(st.SettingError, message, repr(value)):
            Settings(**({"stage": 1, "layers": ("a",), "time": st.TimeConvention.named("sit")} | {name: value}))


B = noisy_batch([0.35, 0.5, 0.1, 0.45])


def step(model: nn.Module, criterion: nn.Module, t: float | None = None, **call: Any) -> st.LossTerms:
    """A step of a loop; ``call`` replaces the criterion's arguments."""
    loss = model(B.x_t, B.t if t is None else torch.full((4,), t), B.y).square().mean()
    return criterion(**{"denoising": loss, "latents": B.latents} | call)


ONE = B.latents[:, :1]  # would be broadcast
CALLS: list[tuple[int, dict[str, Any], dict[str, Any], list[str]]] = [
    (1, {}, {"latents": None}, ["Stage 1 aligns with the clean latents: call criterion(loss, latents=...)"]),
    (2, {}, {"latents": B.latents[:2]}, ["There are 2 latents, but the model's last call had 4 samples"]),
    (2, {}, {"latents": ONE}, ["latents (4, 1, 8, 8) and the captured x_t (4, 4, 8, 8) differ", "packed"]),
    (1, {"check_interval": None}, {"latents": ONE}, ["(4, 1, 8, 8) do not have, on axis 1, the 4 channels"]),
    (1, {"check_interval": None, "target": "velocity"}, {"latents": ONE}, ["(4, 1, 8, 8) do not have, on axis 1"]),
    (1, {}, {"latents": B.latents.numpy()}, ["got an ndarray of shape (4, 4, 8, 8)"]),
    (1, {}, {"latents": DiagonalGaussianDistribution(torch.zeros(4, 8, 8, 8))}, ["a DiagonalGaussianDistribution"]),
    (1, {}, {"latents": torch.zeros(())}, ["got a float32 tensor of shape ()"]),
    (1, {}, {"denoising": torch.zeros(4, 1)}, ["got a float32 tensor of shape (4, 1)"]),
    (1, {}, {"denoising": {"loss": torch.zeros(())}}, ["must be a floating tensor, a scalar or (N,); got a dict"]),
    (1, {}, {"denoising": torch.zeros(4, dtype=torch.long)}, ["got an int64"]),
    (1, {}, {"denoising": torch.zeros(8)}, ["The loop's loss has 8 values, but the model's last call had 4 samples"]),
]


@pytest.mark.parametrize("t", [0.5, 0.1], ids=["inside", "outside the window"])
@pytest.mark.parametrize(("stage", "settings", "call", "messages"), CALLS)
def test_loss_and_latents_that_do_not_belong_wherever_the_times_fell(
    stage: int, settings: dict[str, Any], call: dict[str, Any], messages: list[str], t: float
) -> None:
    model = student()
    with refused(st.ShapeError, *messages):
        step(model, new_criterion(model, stage, **settings), t, **call)


def test_a_layer_with_another_batch_or_width_than_the_head_is_for() -> None:
    model = student()
    with refused(st.ShapeError, "tokens of width 16, but the head reads 24", "hidden_size=16"):
        step(model, new_criterion(model, hidden_size=24))
    model.blocks[1].register_forward_hook(lambda module, args, output: torch.cat([output, output]))
    model.blocks[2].register_forward_pre_hook(lambda module, args: (args[0][:4], args[1]))
    with refused(st.ShapeError, "'blocks.1' gave 8 rows in a call of 4 samples", "one row for each sample"):
        step(model, new_criterion(model))


def test_a_teacher_that_is_missing_or_is_another_than_the_head_is_for() -> None:
    with refused(st.SettingError, "Stage 2 needs a teacher; only a run past its stop_step"):
        st.SelfTransLoss.stage2(student(), layer="blocks.1", time="sit", teacher=None)
    teacher = st.build_teacher(toy(2), None, layer="x_embedder", guidance_scale=3.0, null={"y": 10})
    with refused(st.SettingError, "width of the teacher's features is not known", "example=", "target_size="):
        new_criterion(student(), 2, teacher)
    mine, other = (st.TimeConvention("mine", alpha=lambda t: 1 - t, sigma=lambda t: t) for _ in range(2))
    new_criterion(student(), 2, new_teacher(time=mine), time=mine)
    with refused(st.TimeConventionError, "'mine', the student's is 'mine'", "two of one name: pass one object"):
        new_criterion(student(), 2, new_teacher(time=other), time=mine)
    model = student()
    criterion = new_criterion(model, stop_step=10)
    criterion.release_teacher()
    with refused(st.TeacherError, "still on (step 3, stop_step 10), but there is no teacher"):
        step(model, criterion, 0.1, step=3)  # though none is inside the window


def test_what_an_optimiser_does_not_hold_is_named() -> None:
    model = student()
    criterion = new_criterion(model, 1)
    held = [p for name, p in criterion.named_parameters() if not name.endswith("linear.bias")]
    criterion.check_optimizer(torch.optim.AdamW([{"params": model.parameters()}, {"params": criterion.parameters()}]))
    with refused(st.SettingError, "does not hold 1 of the criterion's 8 parameters: 'heads.0.linear.bias'"):
        criterion.check_optimizer(torch.optim.AdamW([*model.parameters(), *held]))
    with refused(st.SettingError, "does not hold 8"):  # of equal values, but others
        criterion.check_optimizer(torch.optim.AdamW(new_criterion(student(), 1).parameters()))


MODELS = LOOKALIKES | {name: attached(f"{name}Transformer2DModel") for name in ("SD3", "Flux")}


def use(
    backbone: Backbone, stage: int, settings: dict[str, Any], teacher: dict[str, Any], **changes: Any
) -> st.LossTerms:
    """A step of either stage, with settings of criterion and teacher, and arguments of the model's call, changed."""
    model, batch = backbone.build(0), backbone.batch(16)
    if stage == 1:
        criterion = backbone.stage1(model, **settings)
    else:
        criterion = backbone.stage2(model, backbone.make_teacher(backbone.build(1), **teacher), **settings)
    batch.arguments.update(changes)
    return criterion(backbone.losses(model, batch).mean(), latents=batch.latents)


# Of a noise level (EDM2, MaskDiT) there is no direction to mistake.
@pytest.mark.parametrize("name", [name for name, backbone in MODELS.items() if backbone.t != "sigma"])
def test_the_loop_gives_the_times_that_the_convention_would_call_the_opposite(name: str) -> None:
    backbone = MODELS[name]
    low, high = PATHS[backbone.time][:2]
    reversed_t = low + high - backbone.batch(16).arguments[backbone.t]
    with refused(st.TimeConventionError, f"time='{backbone.time}' contradicts", "slope of x_t"):
        use(backbone, 1, {}, {}, **{backbone.t: reversed_t})


ALL, NOT_PATCHES = {"tokens": None}, ["tokens, which cannot be the patches of x_t", "the text's", "tokens=slice(None)"]


@pytest.mark.parametrize(
    ("name", "stage", "settings", "teacher", "error", "parts"),
    [
        ("MMDiT", 1, {"select": 0}, {}, st.ShapeError, ["tokens do not fit the latent grid", "the text's"]),
        ("MMDiT", 2, {"select": 0}, {"select": 0}, st.ShapeError, NOT_PATCHES),
        ("U-ViT", 2, ALL, ALL, st.ShapeError, ["18 tokens, which cannot be", *NOT_PATCHES[1:]]),
        ("SiT", 1, {"layer": 8}, {}, st.SettingError, ["dotted module name", "encoder_depth=8", "'blocks.7'"]),
    ],
)
def test_a_use_that_cannot_be_meant(
    name: str, stage: int, settings: Any, teacher: Any, error: Any, parts: list[str]
) -> None:
    with refused(error, *parts):
        use(MODELS[name], stage, settings, teacher)


@pytest.mark.parametrize("named_by", [0, 1], ids=["criterion", "teacher"])
def test_either_side_may_say_what_is_shared_and_all_tokens_may_be_aligned_on_purpose(named_by: int) -> None:
    calls: list[dict[str, Any]] = [{"t": "timestep"}, {"t": "timestep"}]
    calls[named_by]["shared"] = ["img_ids", "txt_ids"]
    assert use(MODELS["Flux"], 2, {"call": calls[0]}, {"call": calls[1]}).alignment > 0
    everything = {"tokens": slice(None)}
    assert use(MODELS["U-ViT"], 2, everything, everything).alignment > 0
