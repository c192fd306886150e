"""Bad input to the combined loss: an error of our own that says what was wrong, what was found and what to do.

Errors that a page of the docs shows are executed there, by ``docs/errors.md``.
"""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn
from toys import ToyDiT, batch

import selftrans_reg as st
from selftrans_reg import errors
from selftrans_reg.settings import Settings

B = batch(16)
F = B["t"][:, None, None, None]
X_T = (1 - F) * B["x"] + F * B["noise"]
DEFAULTS = {"layer": "blocks.1", "time": "repa", "hidden_size": 16, "hidden_features": 8}


def stage1(model: nn.Module, **settings: Any) -> st.SelfTransLoss:
    return st.SelfTransLoss.stage1(model, **({"latent_channels": 4, "patch_size": 2} | DEFAULTS | settings))


def teacher_of(model: nn.Module | None = None, **settings: Any) -> st.CFGFeatureTeacher:
    defaults = {"layer": "blocks.2", "guidance_scale": 3.0, "null": {"y": 10}}
    return st.build_teacher(ToyDiT(seed=1) if model is None else model, None, **(defaults | settings))


def stage2(model: nn.Module, **settings: Any) -> st.SelfTransLoss:
    teacher = settings.pop("teacher") if "teacher" in settings else teacher_of()
    return st.SelfTransLoss.stage2(model, teacher=teacher, **(DEFAULTS | settings))


def refused(error: type[Exception], *parts: str) -> Any:
    """The block raises ``error``, and its message holds all ``parts`` in this order."""
    return pytest.raises(error, match="(?s)" + ".*".join(parts))


def step(model: nn.Module, criterion: nn.Module, **call: Any) -> st.LossTerms:
    """A step of a REPA loop; ``call`` replaces the criterion's arguments."""
    loss = model(call.pop("x_t", X_T), call.pop("t", B["t"]), B["y"]).square().mean()
    return criterion(call.pop("denoising", loss), **({"latents": B["x"]} | call))


NO_WEIGHT = (-0.1, 1e7, math.nan, math.inf, "0.5", True, None)
NO_WINDOW = ((0.7, 0.4), (0.4, 0.4), (-0.1, 0.5), (0.4, 1.1), 0.4, (0.4,), "all", (400, 700), (math.nan, 0.5))
NO_ROWS = (0, -1, True, 0.0, 1.0, 1.5, "2")
NO_COUNT = (0, -1, True, 1.5, "2")
SETTINGS: list[tuple[str, tuple[Any, ...], str]] = [
    ("weight", NO_WEIGHT, "weight must be a number from 0 to 1000000; got"),
    ("window", NO_WINDOW, r"window must be None or \(low, high\) .*; got .*\nIt is in noise fraction"),
    ("teacher_rows", NO_ROWS, "teacher_rows must be None, a whole number of rows from 1, or a share .*; got"),
    ("teacher_chunk", NO_COUNT, "teacher_chunk must be a positive integer; got"),
    ("check_interval", NO_COUNT, "check_interval must be a positive integer; got"),
    ("health_interval", NO_COUNT, "health_interval must be a positive integer; got"),
    ("target", ("noise", None, []), "target must be one of 'latents', 'velocity'; got"),
    ("gating", ("hard",), "gating must be one of 'per-sample', 'released'; got"),
    ("distance", ("l2", None), "distance must be one of 'mse', 'cosine', 'smooth_l1'; got"),
    ("schedule", ("exponential",), "schedule must be one of 'constant', 'linear', 'cosine'; got"),
    ("schedule", ("linear",), "schedule='linear' decays to 0 at stop_step: give a stop_step"),
    ("stop_step", (-1, 1e5, True, 2**63), "stop_step must be None or an integer, 0 or more; got"),
    ("stop_when", (True, 100), r"stop_when must be a Plateau or None, such as st.Plateau\(\); got"),
    ("forward", ("second",), "forward must be one of None, 'first', 'last'; got"),
    ("eval_mode", (None, "yes"), "eval_mode must be one of False, True; got"),
    ("select", (1.5, True), "select must be an index, a key or a callable; got"),
    ("tokens", (4,), "tokens must be a slice, .*; got"),
]


@pytest.mark.parametrize(("name", "values", "message"), SETTINGS, ids=[name for name, _, _ in SETTINGS])
def test_a_setting_that_makes_no_sense(name: str, values: tuple[Any, ...], message: str) -> None:
    for value in values:
        with refused(st.SettingError, message):
            Settings(**({"stage": 1, "layers": ("a",), "time": st.TimeConvention.named("sit")} | {name: value}))


@pytest.mark.parametrize(
    ("setting", "value", "parts"),
    [
        ("layer", "block.1", ["ToyDiT has no layer 'block.1'", r"blocks\.0 … blocks\.3 \(4 ToyBlock\)", r"blocks\.1"]),
        ("layer", [], ["Name at least one layer, and none twice; got none"]),
        ("time", None, ["time has no default", r"t = 1 is data in SiT \(time='sit'\) and noise in REPA"]),
        ("time", "rapa", ["Unknown time convention 'rapa'", "Known: 'repa'", "Nearest: 'repa'"]),
        ("time", 1, ["Unknown time convention 1."]),
        ("hidden_size", -16, ["hidden_size must be a positive integer; got -16"]),
        ("call", {"xt": "x"}, ["call= takes 'x', 't'", "got 'xt'"]),
        ("wieght", 0.5, ["unexpected keyword argument 'wieght'"]),
    ],
)
def test_a_setting_of_a_stage(setting: str, value: Any, parts: list[str]) -> None:
    for make in (stage1, stage2):
        with refused(Exception, *parts):
            make(ToyDiT(), **{setting: value})


@pytest.mark.parametrize("make", [stage1, stage2])
def test_a_width_that_is_not_certain(make: Any) -> None:
    with refused(st.SettingError, r"layer 'x_embedder' \(Conv2d\) cannot be read off", "Pass hidden_size="):
        make(ToyDiT(), layer="x_embedder", hidden_size=None)


class TestTheTeachersSide:
    def test_none(self) -> None:
        with refused(st.SettingError, "Stage 2 needs a teacher; only a run past its stop_step"):
            stage2(ToyDiT(), teacher=None)

    def test_of_unknown_width(self) -> None:
        with refused(st.SettingError, "width of the teacher's features is not known", "example=", "target_size="):
            stage2(ToyDiT(), teacher=teacher_of(layer="x_embedder"))

    def test_of_another_convention_also_of_the_same_name(self) -> None:
        with refused(st.TimeConventionError, "time convention 'sit', the student's is 'repa'", "must agree.$"):
            stage2(ToyDiT(), teacher=teacher_of(time="sit"))
        mine, other = (st.TimeConvention("mine", alpha=lambda t: 1 - t, sigma=lambda t: t) for _ in range(2))
        stage2(ToyDiT(), teacher=teacher_of(time=mine), time=mine)
        with refused(st.TimeConventionError, "'mine', the student's is 'mine'", "two of one name: pass one object"):
            stage2(ToyDiT(), teacher=teacher_of(time=other), time=mine)

    def test_of_another_width_than_the_head_was_built_for(self) -> None:
        model = ToyDiT()
        criterion = stage2(model, teacher=teacher_of(hidden_size=24), window=None)
        with refused(
            st.ShapeError, r"features \(16, 16, 16\), the student's head \(16, 16, 24\)", "this teacher's layer"
        ):
            step(model, criterion)

    def test_of_other_arguments(self) -> None:
        class Text(ToyDiT):
            def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
                return super().forward(x, t, context)

        model = ToyDiT()
        criterion = stage2(model, teacher=teacher_of(Text(seed=1), null={"context": 10}), window=None)
        with refused(st.CallError, "called with 'y', which Text.forward does not take", "under the same names"):
            step(model, criterion)

    @pytest.mark.parametrize("t", [0.5, 0.9], ids=["inside", "outside the window"])
    def test_released_too_early(self, t: float) -> None:
        """What is wrong must not depend on where the times fell."""
        model = ToyDiT()
        criterion = stage2(model, stop_step=10)
        criterion.release_teacher()
        with refused(st.TeacherError, r"still on \(step 3, stop_step 10\), but there is no teacher: it was released"):
            step(model, criterion, t=torch.full((16,), t), step=3)


class TestTheCall:
    def test_a_second_call_for_one_forward(self) -> None:
        model = ToyDiT()
        criterion = stage1(model)
        step(model, criterion)
        with refused(
            st.CaptureError, "no forward of the model to work on", "Call the model itself", "gradients enabled"
        ):
            criterion(torch.zeros(()), latents=B["x"])

    def test_two_forwards_before_it(self) -> None:
        model = ToyDiT()
        criterion = stage1(model)
        model(X_T, B["t"], B["y"])
        with refused(st.CaptureError, "ran 2 forwards since the last call", "'first' or 'last'", r"discard\(\)"):
            step(model, criterion)
        step(model, criterion)

    def test_a_layer_with_another_batch(self) -> None:
        model = ToyDiT()
        model.blocks[1].register_forward_hook(lambda module, args, output: torch.cat([output, output]))
        model.blocks[2].register_forward_pre_hook(lambda module, args: (args[0][:16], args[1]))
        criterion = stage2(model)
        with refused(st.ShapeError, r"'blocks\.1' gave 32 rows in a call of 16 samples", "one row for each sample"):
            step(model, criterion)

    def test_tokens_that_do_not_fit_the_latent_grid(self) -> None:
        for settings, noted in (({"tokens": slice(1, None)}, True), ({"patch_size": 4}, False)):
            model = ToyDiT()
            with refused(st.ShapeError, "tokens do not fit the latent grid") as error:
                step(model, stage1(model, **settings))
            assert ("these are the tokens that it leaves" in str(error.value)) == noted

    @pytest.mark.parametrize(
        ("latents", "part"),
        [
            (None, r"Stage 1 aligns with the clean latents: call criterion\(loss, latents=\.\.\.\)"),
            (B["x"][:4], "There are 4 latents, but the model's last call had 16 samples: pass the same batch"),
            (B["x"][:, :3], r"latents \(16, 3, 8, 8\) and the captured x_t \(16, 4, 8, 8\) differ in shape"),
            (B["x"].numpy(), r"got an ndarray of shape \(16, 4, 8, 8\)"),
            ([B["x"]], "got a list"),
            (DiagonalGaussianDistribution(torch.zeros(16, 8, 8, 8)), "got a DiagonalGaussianDistribution"),
            (torch.zeros(()), r"got a float32 tensor of shape \(\)"),
        ],
    )
    def test_latents_that_do_not_belong(self, latents: Any, part: str) -> None:
        model = ToyDiT()
        with refused(st.ShapeError, part):
            step(model, stage1(model), latents=latents)

    @pytest.mark.parametrize("target", ["latents", "velocity"])
    @pytest.mark.parametrize("t", [0.5, 0.9], ids=["inside", "outside the window"])
    def test_latents_of_the_wrong_channels_without_the_check(self, t: float, target: str) -> None:
        """Also where the shapes are not compared: never a silent broadcast, wherever the times fell."""
        model = ToyDiT()
        criterion = stage1(model, check_interval=None, target=target)
        with refused(st.ShapeError, r"\(16, 1, 8, 8\) do not have, on axis 1, the 4 channels"):
            step(model, criterion, latents=B["x"][:, :1], t=torch.full((16,), t))

    @pytest.mark.parametrize(
        ("denoising", "part"),
        [
            (torch.zeros(16, 4, 8, 8), r"\(N,\); got a float32 tensor of shape \(16, 4, 8, 8\).*Average it over"),
            (torch.zeros(16, 1), r"got a float32 tensor of shape \(16, 1\).*criterion\(loss, latents=x, step="),
            (1.0, "must be a floating tensor.* got 1.0"),
            ({"loss": torch.zeros(())}, "got a dict"),
            (torch.zeros(16, dtype=torch.long), "must be a floating tensor.* got an int64 tensor"),
            (torch.zeros(8), "The loop's loss has 8 values, but the model's last call had 16 samples"),
        ],
    )
    def test_a_loss_that_is_none(self, denoising: Any, part: str) -> None:
        model = ToyDiT()
        with refused(st.ShapeError, part):
            step(model, stage1(model), denoising=denoising)

    def test_a_stop_step_without_a_step(self) -> None:
        model = ToyDiT()
        with refused(
            st.SettingError, "stops at step 10, so every call needs the step", r"criterion\(loss, \.\.\., step="
        ):
            step(model, stage1(model, stop_step=10))

    def test_a_frozen_student(self) -> None:
        model = ToyDiT()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(("blocks.0", "blocks.1", "x_", "t_", "y_")))
        with refused(
            st.CaptureError, r"'blocks\.1' carry no gradient", "frozen: tap a later one", "use_reentrant=False"
        ):
            step(model, stage1(model))

    def test_a_call_that_cannot_be_read(self) -> None:
        model = ToyDiT()
        with refused(st.CallError, "(?i)argument 'y' of ToyDiT should be x_t, a floating tensor", r"call=dict\(x="):
            step(model, stage1(model, call={"x": "y"}))


class TestTheOptimizer:
    def test_what_it_does_not_hold_is_named(self) -> None:
        model = ToyDiT()
        criterion = stage1(model)
        advice = r"\[\*model\.parameters\(\), \*criterion\.parameters\(\)\], after wrapping and moving both"
        with refused(st.SettingError, r"not hold 8 of the criterion's 8 .*'heads\.0\.head\.0\.weight'", "…", advice):
            criterion.check_optimizer(torch.optim.AdamW(model.parameters()))
        held = [p for name, p in criterion.named_parameters() if not name.endswith("linear.bias")]
        with refused(st.SettingError, r"does not hold 1 of the criterion's 8 parameters: 'heads\.0\.linear\.bias'"):
            criterion.check_optimizer(torch.optim.AdamW([*model.parameters(), *held]))
        with refused(st.SettingError, "does not hold 8"):
            criterion.check_optimizer(torch.optim.AdamW(copy.deepcopy(criterion).parameters()))

    def test_a_complete_one_passes_in_any_groups(self) -> None:
        model = ToyDiT()
        criterion = stage1(model)
        groups = [{"params": model.parameters()}, {"params": criterion.parameters(), "lr": 1e-3}]
        criterion.check_optimizer(torch.optim.AdamW(groups, lr=1e-4))


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
