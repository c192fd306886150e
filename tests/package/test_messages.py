"""Bad input to the combined loss: an error of our own that says what was wrong, what was found and what to do.

Errors that a page of the docs shows are executed there, by ``docs/errors.md``.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from loops import new_criterion, new_teacher, noisy_batch, student, toy
from plain import refused
from torch import Tensor, nn
from toys import ToyDiT

import selftrans_reg as st
from selftrans_reg import errors
from selftrans_reg.settings import Settings

B = noisy_batch([0.35, 0.5, 0.1, 0.45])


def step(model: nn.Module, criterion: nn.Module, t: float | None = None, **call: Any) -> st.LossTerms:
    """A step of a loop; ``call`` replaces the criterion's arguments."""
    loss = model(B.x_t, B.t if t is None else torch.full((4,), t), B.y).square().mean()
    return criterion(**{"denoising": loss, "latents": B.latents} | call)


NO_WEIGHT = (-0.1, 1e7, math.nan, math.inf, "0.5", True, None)
NO_WINDOW = ((0.7, 0.4), (0.4, 0.4), (-0.1, 0.5), (0.4, 1.1), 0.4, (0.4,), "al", (400, 700), (math.nan, 0.5), (True, 1))
NO_ROWS = (0, -1, True, 0.0, 1.0, 1.5, "2")
NO_COUNT = (0, -1, True, 1.5, "2")
SETTINGS: list[tuple[str, tuple[Any, ...], str]] = [
    ("weight", NO_WEIGHT, "weight must be a number from 0 to 1000000; got"),
    ("window", NO_WINDOW, "window must be None or (low, high) in noise fraction"),
    ("teacher_rows", NO_ROWS, "teacher_rows must be None, a whole number of rows from 1, or a share"),
    ("teacher_chunk", NO_COUNT, "teacher_chunk must be a positive integer; got"),
    ("check_interval", NO_COUNT, "check_interval must be a positive integer; got"),
    ("health_interval", NO_COUNT, "health_interval must be a positive integer; got"),
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


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("layer", [], "Name at least one layer, and none twice; got none"),
        ("time", None, "time has no default"),
        ("hidden_size", -16, "hidden_size must be a positive integer; got -16"),
        ("call", {"xt": "x"}, "call= takes 'x', 't'"),
        ("wieght", 0.5, "unexpected keyword argument 'wieght'"),
    ],
)
@pytest.mark.parametrize("stage", [1, 2])
def test_a_setting_of_a_stage(stage: int, setting: str, value: Any, message: str) -> None:
    with refused(Exception, message):
        new_criterion(student(), stage, **{setting: value})


class TestTheTeacher:
    def test_none_or_one_of_unknown_width(self) -> None:
        with refused(st.SettingError, "Stage 2 needs a teacher; only a run past its stop_step"):
            st.SelfTransLoss.stage2(student(), layer="blocks.1", time="sit", teacher=None)
        teacher = st.build_teacher(toy(2), None, layer="x_embedder", guidance_scale=3.0, null={"y": 10})
        with refused(st.SettingError, "width of the teacher's features is not known", "example=", "target_size="):
            new_criterion(student(), 2, teacher)

    def test_of_another_convention_of_the_same_name(self) -> None:
        mine, other = (st.TimeConvention("mine", alpha=lambda t: 1 - t, sigma=lambda t: t) for _ in range(2))
        new_criterion(student(), 2, new_teacher(time=mine), time=mine)
        with refused(st.TimeConventionError, "'mine', the student's is 'mine'", "two of one name: pass one object"):
            new_criterion(student(), 2, new_teacher(time=other), time=mine)

    def test_of_another_width_than_the_head_was_built_for(self) -> None:
        model = student()
        criterion = new_criterion(model, window=None, target_size=24)
        with refused(st.ShapeError, "Prediction (4, 16, 24) and target (4, 16, 16)", "this teacher's layer"):
            step(model, criterion)

    def test_of_other_arguments(self) -> None:
        class Text(ToyDiT):
            def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
                return super().forward(x, t, context)

        model = student()
        teacher = st.build_teacher(Text(), None, layer="blocks.2", guidance_scale=3.0, null={"context": 10})
        with refused(st.CallError, "called with 'y', which Text.forward does not take", "under the same names"):
            step(model, new_criterion(model, 2, teacher))

    @pytest.mark.parametrize("t", [0.5, 0.1], ids=["inside", "outside the window"])
    def test_released_too_early(self, t: float) -> None:
        """What is wrong must not depend on where the times fell."""
        model = student()
        criterion = new_criterion(model, stop_step=10, check_interval=None)
        criterion.release_teacher()
        with refused(st.TeacherError, "still on (step 3, stop_step 10), but there is no teacher: it was released"):
            step(model, criterion, t, step=3)


CALLS: list[tuple[dict[str, Any], str]] = [
    ({"latents": None}, "Stage 1 aligns with the clean latents: call criterion(loss, latents=...)"),
    ({"latents": B.latents[:2]}, "There are 2 latents, but the model's last call had 4 samples: pass the same batch"),
    ({"latents": B.latents[:, :3]}, "latents (4, 3, 8, 8) and the captured x_t (4, 4, 8, 8) differ in shape"),
    ({"latents": B.latents.numpy()}, "got an ndarray of shape (4, 4, 8, 8)"),
    ({"latents": [B.latents]}, "got a list"),
    ({"latents": DiagonalGaussianDistribution(torch.zeros(4, 8, 8, 8))}, "got a DiagonalGaussianDistribution"),
    ({"latents": torch.zeros(())}, "got a float32 tensor of shape ()"),
    ({"denoising": torch.zeros(4, 1)}, "got a float32 tensor of shape (4, 1)"),
    ({"denoising": 1.0}, "must be a floating tensor, a scalar or (N,); got 1.0"),
    ({"denoising": {"loss": torch.zeros(())}}, "got a dict"),
    ({"denoising": torch.zeros(4, dtype=torch.long)}, "must be a floating tensor, a scalar or (N,); got an int64"),
    ({"denoising": torch.zeros(8)}, "The loop's loss has 8 values, but the model's last call had 4 samples"),
]


class TestTheCall:
    @pytest.mark.parametrize(("call", "message"), CALLS)
    def test_loss_and_latents_that_do_not_belong(self, call: dict[str, Any], message: str) -> None:
        model = student()
        with refused(st.ShapeError, message):
            step(model, new_criterion(model, 1), **call)

    @pytest.mark.parametrize("target", ["latents", "velocity"])
    @pytest.mark.parametrize("t", [0.5, 0.1], ids=["inside", "outside the window"])
    def test_latents_of_the_wrong_channels_without_the_check(self, t: float, target: str) -> None:
        """Also where the shapes are not compared: never a silent broadcast, wherever the times fell."""
        model = student()
        criterion = new_criterion(model, 1, check_interval=None, target=target)
        with refused(st.ShapeError, "(4, 1, 8, 8) do not have, on axis 1, the 4 channels"):
            step(model, criterion, t, latents=B.latents[:, :1])

    def test_a_layer_with_another_batch(self) -> None:
        model = student()
        model.blocks[1].register_forward_hook(lambda module, args, output: torch.cat([output, output]))
        model.blocks[2].register_forward_pre_hook(lambda module, args: (args[0][:4], args[1]))
        with refused(st.ShapeError, "'blocks.1' gave 8 rows in a call of 4 samples", "one row for each sample"):
            step(model, new_criterion(model))

    @pytest.mark.parametrize(
        ("stage", "settings", "messages"),
        [
            (2, {"hidden_size": 24}, ["tokens of width 16, but the head reads 24", "hidden_size=16"]),
            (
                1,
                {"tokens": slice(1, None)},
                ["15 tokens do not fit the latent grid", "slice(1, None, None) was given"],
            ),
        ],
    )
    def test_tokens_that_do_not_fit(self, stage: int, settings: dict[str, Any], messages: list[str]) -> None:
        model = student()
        with refused(st.ShapeError, *messages):
            step(model, new_criterion(model, stage, **settings))

    def test_a_frozen_student(self) -> None:
        model = student().requires_grad_(False)
        model.final_layer.requires_grad_(True)
        with refused(st.CaptureError, "'blocks.1' carry no gradient", "frozen: tap a later one", "use_reentrant=False"):
            step(model, new_criterion(model, 1))


def test_what_an_optimiser_does_not_hold_is_named() -> None:
    model = student()
    criterion = new_criterion(model, 1)
    held = [p for name, p in criterion.named_parameters() if not name.endswith("linear.bias")]
    groups = [{"params": model.parameters()}, {"params": criterion.parameters(), "lr": 1e-3}]
    criterion.check_optimizer(torch.optim.AdamW(groups, lr=1e-4))
    with refused(st.SettingError, "does not hold 1 of the criterion's 8 parameters: 'heads.0.linear.bias'"):
        criterion.check_optimizer(torch.optim.AdamW([*model.parameters(), *held]))
    with refused(st.SettingError, "does not hold 8"):  # of equal values, but others
        criterion.check_optimizer(torch.optim.AdamW(new_criterion(student(), 1).parameters()))


ERRORS = [value for value in vars(errors).values() if isinstance(value, type)]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_every_error_is_ours_and_the_builtin_that_fits(error: type[Exception]) -> None:
    assert issubclass(error, errors.SelfTransError)
    builtin = (ValueError, LookupError, TypeError, RuntimeError, ImportError, FloatingPointError, UserWarning)
    assert issubclass(error, builtin) or error is errors.SelfTransError
    assert getattr(st, error.__name__) is error


def test_joined_strings_keep_the_space_between_them() -> None:
    """Where a message goes on in the next line's string, one of the two brings the space."""
    for path in Path(st.__file__).parent.rglob("*.py"):
        assert re.findall(r"(?<!\\n)(?<=\S)\"\n\s*f?\"(?=[\w('{]).*", path.read_text()) == [], path.name
