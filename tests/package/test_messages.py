"""Bad input to the combined loss: an error of our own that says what was wrong, what was found and what to do."""

from __future__ import annotations

import copy
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

B = batch(16)
F = B["t"][:, None, None, None]
X_T = (1 - F) * B["x"] + F * B["noise"]
SIZES = {"latent_channels": 4, "patch_size": 2}


def stage1(model: nn.Module, **settings: Any) -> st.SelfTransLoss:
    defaults = {"layer": "blocks.1", "time": "repa", "hidden_size": 16, "hidden_features": 8}
    return st.SelfTransLoss.stage1(model, **(SIZES | defaults | settings))


def teacher_of(model: nn.Module | None = None, **settings: Any) -> st.CFGFeatureTeacher:
    defaults = {"layer": "blocks.2", "guidance_scale": 3.0, "null": {"y": 10}}
    return st.build_teacher(ToyDiT(seed=1) if model is None else model, None, **(defaults | settings))


def stage2(model: nn.Module, **settings: Any) -> st.SelfTransLoss:
    defaults = {"layer": "blocks.1", "time": "repa", "hidden_size": 16, "hidden_features": 8}
    teacher = settings.pop("teacher") if "teacher" in settings else teacher_of()
    return st.SelfTransLoss.stage2(model, teacher=teacher, **(defaults | settings))


def step(model: nn.Module, criterion: nn.Module, **call: Any) -> st.LossTerms:
    """A step of a REPA loop; ``call`` replaces the criterion's arguments."""
    loss = model(X_T, B["t"], B["y"]).square().mean()
    return criterion(call.pop("denoising", loss), **({"latents": B["x"]} | call))


def check(error: pytest.ExceptionInfo[BaseException], *parts: str) -> None:
    message = str(error.value)
    for part in parts:
        assert re.search(part, message), f"{part!r} is not in:\n{message}"


class TestBuilding:
    def test_an_unknown_layer(self) -> None:
        for make in (stage1, stage2):
            with pytest.raises(st.LayerNotFoundError) as error:
                make(ToyDiT(), layer="block.1")
            check(
                error,
                r"ToyDiT has no layer 'block\.1'",
                r"blocks\.0 … blocks\.3 \(4 ToyBlock\)",
                r"Nearest: 'blocks\.1'",
            )

    @pytest.mark.parametrize("weight", [-0.1, 1e7, float("nan"), float("inf"), "0.5", True, None])
    def test_a_weight(self, weight: Any) -> None:
        with pytest.raises(st.SettingError) as error:
            stage1(ToyDiT(), weight=weight)
        check(error, "weight must be a number from 0 to 1000000", f"got {re.escape(repr(weight))}")

    @pytest.mark.parametrize(
        "window", [(0.7, 0.4), (0.4, 0.4), (-0.1, 0.5), (0.4, 1.1), 0.4, (0.4,), "all", (400, 700)]
    )
    def test_a_window(self, window: Any) -> None:
        with pytest.raises(st.SettingError) as error:
            stage1(ToyDiT(), window=window)
        check(error, r"window must be None or \(low, high\)", re.escape(repr(window)), "in noise fraction")

    @pytest.mark.parametrize("scale", [-1, float("nan"), "30"])
    def test_a_guidance_scale(self, scale: Any) -> None:
        with pytest.raises(st.SettingError) as error:
            teacher_of(guidance_scale=scale)
        check(error, "guidance_scale must be a finite number", f"got {re.escape(repr(scale))}")

    @pytest.mark.parametrize(
        ("setting", "value", "parts"),
        [
            ("target", "noise", ["target must be one of 'latents', 'velocity'; got 'noise'"]),
            ("gating", "hard", ["gating must be one of 'per-sample', 'released'; got 'hard'"]),
            ("distance", "l2", ["distance must be one of mse, cosine, smooth_l1; got 'l2'"]),
            ("schedule", "step", ["schedule must be one of 'constant', 'linear', 'cosine'; got 'step'"]),
            ("schedule", "linear", ["schedule='linear' decays to 0 at stop_step: give a stop_step"]),
            ("stop_step", -1, ["stop_step must be None or an integer, 0 or more; got -1"]),
            ("forward", "second", ["forward must be one of None, 'first', 'last'; got 'second'"]),
            ("check_interval", 0, ["check_interval must be a positive integer; got 0"]),
            ("time", None, ["time has no default", r"t = 1 is data in SiT \(time='sit'\) and noise in REPA"]),
            ("time", "rapa", ["Unknown time convention 'rapa'", "Known: 'repa'", "Nearest: 'repa'"]),
            ("time", 1, ["time must be a name or a TimeConvention; got 1"]),
            ("hidden_size", -16, ["hidden_size must be a positive integer; got -16"]),
            ("hidden_features", 0, ["hidden_features must be a positive integer; got 0"]),
            ("select", 1.5, ["select must be an index, a key or a callable; got 1.5"]),
            ("tokens", 4, ["tokens must be a slice", "got 4"]),
            ("call", {"xt": "x"}, ["call= takes 'x', 't'", "got 'xt'"]),
            ("layer", [], ["Name at least one layer, and none twice; got none"]),
            ("patch_size", "2", ["patch_size must be a positive integer; got '2'"]),
        ],
    )
    def test_any_other_setting(self, setting: str, value: Any, parts: list[str]) -> None:
        with pytest.raises(st.SettingError) as error:
            stage1(ToyDiT(), **{setting: value})
        check(error, *parts)

    @pytest.mark.parametrize("make", [stage1, stage2])
    def test_a_width_that_is_not_certain(self, make: Any) -> None:
        with pytest.raises(st.SettingError) as error:
            make(ToyDiT(), layer="x_embedder", hidden_size=None)
        check(error, r"layer 'x_embedder' \(Conv2d\) cannot be read off with certainty", "Pass hidden_size=")

    def test_a_teacher_whose_width_is_not_known(self) -> None:
        with pytest.raises(st.SettingError) as error:
            stage2(ToyDiT(), teacher=teacher_of(layer="x_embedder"))
        check(error, "width of the teacher's features is not known", "hidden_size= or example=", "pass target_size=")

    def test_no_teacher(self) -> None:
        with pytest.raises(st.SettingError, match="Stage 2 needs a teacher; only a run past its stop_step"):
            stage2(ToyDiT(), teacher=None)

    def test_the_student_as_its_own_teacher(self) -> None:
        model = ToyDiT()
        with pytest.raises(st.TeacherError) as error:
            stage2(nn.DataParallel(model), teacher=teacher_of(model))
        check(error, "The teacher holds the student itself", "build it from a copy")

    def test_a_teacher_of_another_time_convention(self) -> None:
        with pytest.raises(st.TimeConventionError) as error:
            stage2(ToyDiT(), teacher=teacher_of(time="sit"))
        check(error, "teacher was built for the time convention 'sit', the student's is 'repa'", "they must agree")
        assert "one name" not in str(error.value)

    def test_two_time_conventions_of_one_name(self) -> None:
        mine, other = (st.TimeConvention("mine", alpha=lambda t: 1 - t, sigma=lambda t: t) for _ in range(2))
        stage2(ToyDiT(), teacher=teacher_of(time=mine), time=mine)
        with pytest.raises(st.TimeConventionError) as error:
            stage2(ToyDiT(), teacher=teacher_of(time=other), time=mine)
        check(error, "'mine', the student's is 'mine'", "two of one name: pass one object to both")

    def test_an_unknown_recipe(self) -> None:
        with pytest.raises(st.SettingError) as error:
            st.recipe("SiT-B2")
        check(error, "SiT-B2", "SiT-B/2")


class TestTheCall:
    def test_no_forward_before_it(self) -> None:
        model = ToyDiT()
        with pytest.raises(st.CaptureError) as error:
            stage1(model)(torch.zeros(()), latents=B["x"])
        check(error, "no forward of the model to work on", "Call the model itself", "train mode with gradients enabled")

    def test_a_second_call_for_one_forward(self) -> None:
        model = ToyDiT()
        criterion = stage1(model)
        step(model, criterion)
        with pytest.raises(st.CaptureError, match="no forward of the model to work on"):
            criterion(torch.zeros(()), latents=B["x"])

    def test_two_forwards_before_it(self) -> None:
        model = ToyDiT()
        criterion = stage1(model)
        model(X_T, B["t"], B["y"])
        with pytest.raises(st.CaptureError) as error:
            step(model, criterion)
        check(error, "ran 2 forwards since the last call", "forward='first' or 'last'", r"discard\(\)")
        step(model, criterion)

    def test_a_layer_that_did_not_run(self) -> None:
        class Skipping(ToyDiT):
            def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
                return self.x_embedder(x)

        model = Skipping()
        with pytest.raises(st.CaptureError) as error:
            step(model, stage1(model))
        check(error, r"'blocks\.1' did not run in the last forward", r"_dynamo\.reset\(\)", "tap one that runs")

    def test_an_output_that_is_a_tuple(self) -> None:
        class Pair(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc1 = nn.Linear(16, 16)

            def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
                return x, self.fc1(x)

        class TwoStream(ToyDiT):
            def __init__(self) -> None:
                super().__init__()
                self.pair = Pair()

            def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
                tokens = self.x_embedder(x).flatten(2).transpose(1, 2)
                return self.pair(tokens, t)[1]

        model = TwoStream()
        criterion = stage1(model, layer="pair")
        with pytest.raises(errors.CallError) as error:
            step(model, criterion)
        check(error, "'pair' returns a tuple with 2 tensors", r"\[1\]: \(16, 16, 16\)", "Say which with select=")
        criterion.detach()
        step(model, stage1(model, layer="pair", select=1))

    def test_tokens_that_do_not_fit_the_latent_grid(self) -> None:
        model = ToyDiT()
        with pytest.raises(st.ShapeError) as error:
            step(model, stage1(model, tokens=slice(1, None)))
        check(error, "15 tokens do not fit the latent grid 4×4, which has 16")
        assert error.value.__notes__ == ["tokens=slice(1, None, None) was given: these are the tokens that it leaves."]
        model = ToyDiT()
        with pytest.raises(st.ShapeError) as error:
            step(model, stage1(model, patch_size=4))
        assert not hasattr(error.value, "__notes__")
        check(error, "16 tokens do not fit the latent grid 2×2, which has 4", r"tokens=slice\(12, None\)", "patch_size")

    @pytest.mark.parametrize(
        ("latents", "parts"),
        [
            (None, ["Stage 1 aligns with the clean latents", r"criterion\(loss, latents=\.\.\.\)"]),
            (B["x"][:4], ["There are 4 latents, but the model's last call had 16 samples", "pass the same batch"]),
            (B["x"][:, :3], [r"latents \(16, 3, 8, 8\) and the captured x_t \(16, 4, 8, 8\) differ in shape"]),
            (
                torch.zeros(16, 3, 256, 256),
                [r"latents \(16, 3, 256, 256\) and the captured x_t", "Pass the clean latents"],
            ),
        ],
    )
    def test_latents_that_do_not_belong(self, latents: Tensor | None, parts: list[str]) -> None:
        model = ToyDiT()
        with pytest.raises(st.ShapeError) as error:
            step(model, stage1(model), latents=latents)
        check(error, *parts)

    @pytest.mark.parametrize("call", ["first", "later"])
    def test_latents_of_the_wrong_channels_without_the_check(self, call: str) -> None:
        """Also where the shapes are not compared any more: never a silent broadcast."""
        model = ToyDiT()
        criterion = stage1(model, check_interval=None if call == "first" else 1000, window=None)
        for _ in range(0 if call == "first" else 4):
            step(model, criterion)
        with pytest.raises(st.ShapeError) as error:
            step(model, criterion, latents=B["x"][:, :1])
        check(error, r"\(16, 1, 8, 8\) do not have, on axis 1, the 4 channels", "latent_channels")

    @pytest.mark.parametrize("target", ["latents", "velocity"])
    def test_wrong_latents_outside_the_window(self, target: str) -> None:
        """What is wrong must not depend on where the times fell."""
        model = ToyDiT()
        criterion = stage1(model, check_interval=None, target=target)
        loss = model(X_T, torch.full((16,), 0.9), B["y"]).mean()
        with pytest.raises(st.ShapeError):
            criterion(loss, latents=B["x"][:, :1])

    @pytest.mark.parametrize(("stage", "time"), [(stage1, "sit"), (stage2, "sit"), (stage2, "repa-cosine")])
    def test_a_time_convention_that_contradicts_x_t(self, stage: Any, time: str) -> None:
        model = ToyDiT()
        with pytest.raises(st.TimeConventionError) as error:
            step(model, stage(model, time=time))
        check(error, f"time='{time}' contradicts what the model was given", "These conventions fit: 'repa'")

    def test_steps_for_a_convention_of_fractions(self) -> None:
        model = ToyDiT()
        criterion = stage2(model)
        loss = model(X_T, 1000 * B["t"], B["y"]).mean()
        with pytest.raises(st.TimeConventionError) as error:
            criterion(loss)
        check(error, "t does not fit time='repa': values from 0 to 1 are expected", "'flow'")

    @pytest.mark.parametrize(
        ("denoising", "parts"),
        [
            (
                torch.zeros(16, 4, 8, 8),
                [r"\(N,\); got a float32 tensor of shape \(16, 4, 8, 8\)", "Average it over channels and pixels"],
            ),
            (
                torch.zeros(16, 1),
                [r"got a float32 tensor of shape \(16, 1\)", r"criterion\(loss, latents=x, step="],
            ),
            (1.0, ["must be a floating tensor", "got 1.0"]),
            ({"loss": torch.zeros(())}, ["got a dict"]),
            (torch.zeros(16, dtype=torch.long), ["must be a floating tensor", "got an int64 tensor"]),
            (torch.zeros(8), ["The loop's loss has 8 values, but the model's last call had 16 samples"]),
        ],
    )
    def test_a_loss_that_is_none(self, denoising: Any, parts: list[str]) -> None:
        model = ToyDiT()
        with pytest.raises(st.ShapeError) as error:
            step(model, stage1(model), denoising=denoising)
        check(error, *parts)

    @pytest.mark.parametrize("value", [None, -1, 2.0, True, torch.tensor(3)])
    def test_a_step(self, value: Any) -> None:
        model = ToyDiT()
        with pytest.raises(st.SettingError) as error:
            step(model, stage1(model, stop_step=10), step=value)
        if value is None:
            check(error, "stops at step 10, so every call needs the step", r"criterion\(loss, \.\.\., step=step\)")
        else:
            found = r"an int64 tensor of shape \(\)" if isinstance(value, torch.Tensor) else value
            check(error, "step must be an integer, 0 or more", f"got {found}")

    @pytest.mark.parametrize(
        ("latents", "found"),
        [
            (B["x"].numpy(), r"an ndarray of shape \(16, 4, 8, 8\)"),
            ([B["x"]], "a list"),
            (DiagonalGaussianDistribution(torch.zeros(16, 8, 8, 8)), "a DiagonalGaussianDistribution"),
            (torch.zeros(()), r"a float32 tensor of shape \(\)"),
        ],
    )
    def test_latents_that_are_none(self, latents: Any, found: str) -> None:
        model = ToyDiT()
        with pytest.raises(st.ShapeError) as error:
            step(model, stage1(model), latents=latents)
        check(error, f"clean latents, a tensor .*; got {found}", "the sample that the loop adds noise to")

    def test_a_frozen_student(self) -> None:
        model = ToyDiT()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(("blocks.0", "blocks.1", "x_", "t_", "y_")))
        with pytest.raises(st.CaptureError) as error:
            step(model, stage1(model))
        check(error, r"tokens of layer 'blocks\.1' carry no gradient", "frozen: tap a later one", "use_reentrant=False")

    def test_the_call_could_not_be_read(self) -> None:
        model = ToyDiT()
        with pytest.raises(st.CallError) as error:
            step(model, stage1(model, call={"x": "y"}))
        check(error, "Argument 'y' of ToyDiT should be x_t, a floating tensor", "int64", r"call=dict\(x=\.\.\.\)")


class TestTheTeachersSide:
    @pytest.mark.parametrize(
        ("null", "parts"),
        [
            ({"label": 10}, ["null= names 'label', which ToyDiT.forward does not take", "It takes 'x', 't', 'y'"]),
            ({"x": 0}, ["null= names 'x', which is x_t or t, not a condition"]),
            ({}, ["null= maps argument names to the null condition"]),
        ],
    )
    def test_a_missing_or_misnamed_null_condition(self, null: dict[str, Any], parts: list[str]) -> None:
        with pytest.raises(st.SettingError) as error:
            teacher_of(null=null)
        check(error, *parts)

    def test_a_null_label_outside_the_embedding(self) -> None:
        model = ToyDiT()
        criterion = stage2(model, teacher=teacher_of(ToyDiT(dropout=0.0, seed=1)), window=None)
        with pytest.raises(st.SettingError) as error:
            step(model, criterion)
        check(error, r"Index 10 would reach embedding 'y_embedder', which has 10 rows \(0 to 9\)", "no null row")

    def test_other_tokens_than_the_students(self) -> None:
        model = ToyDiT()
        criterion = stage2(model, teacher=teacher_of(ToyDiT(patch_size=4, seed=1)), window=None)
        with pytest.raises(st.ShapeError) as error:
            step(model, criterion)
        check(
            error,
            r"teacher gives features \(16, 4, 16\), the student's head \(16, 16, 16\)",
            "same samples, tokens and",
        )

    def test_another_width_than_the_head_was_built_for(self) -> None:
        model = ToyDiT()
        criterion = stage2(model, teacher=teacher_of(hidden_size=24), window=None)
        with pytest.raises(st.ShapeError) as error:
            step(model, criterion)
        check(error, r"features \(16, 16, 16\), the student's head \(16, 16, 24\)", "built for this teacher's layer")

    def test_other_arguments_than_the_students(self) -> None:
        class Text(ToyDiT):
            def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
                return super().forward(x, t, context)

        model = ToyDiT()
        criterion = stage2(model, teacher=teacher_of(Text(seed=1), null={"context": 10}), window=None)
        with pytest.raises(st.CallError) as error:
            step(model, criterion)
        check(error, "student was called with 'y', which Text.forward does not take", "under the same names")

    def test_a_layer_with_another_batch(self) -> None:
        model = ToyDiT()
        model.blocks[1].register_forward_hook(lambda module, args, output: torch.cat([output, output]))
        model.blocks[2].register_forward_pre_hook(lambda module, args: (args[0][:16], args[1]))
        criterion = stage2(model)
        with pytest.raises(st.ShapeError) as error:
            step(model, criterion)
        check(error, r"'blocks\.1' gave 32 rows in a call of 16 samples", "keeps one row for each sample")

    def test_a_teacher_that_was_released_too_early(self) -> None:
        model = ToyDiT()
        criterion = stage2(model, stop_step=10, window=None)
        criterion.release_teacher()
        with pytest.raises(st.TeacherError) as error:
            step(model, criterion, step=3)
        check(
            error, r"still on \(step 3, stop_step 10\), but there is no teacher: it was released", "Build the criterion"
        )

    def test_a_released_teacher_outside_the_window(self) -> None:
        """What is wrong must not depend on where the times fell."""
        model = ToyDiT()
        criterion = stage2(model, stop_step=10)
        criterion.release_teacher()
        loss = model(X_T, torch.full((16,), 0.9), B["y"]).mean()
        with pytest.raises(st.TeacherError):
            criterion(loss, step=3)


class TestACheckpoint:
    @pytest.mark.parametrize("key", ["blocks.2.qkv.weight", "final_layer.bias"])
    def test_a_missing_key(self, key: str) -> None:
        state = ToyDiT().state_dict()
        del state[key]
        with pytest.raises(st.CheckpointError) as error:
            st.build_teacher(ToyDiT(), state, layer="blocks.2", guidance_scale=3.0, null={"y": 10})
        check(error, "ToyDiT", re.escape(key), "(?i)missing")

    def test_an_extra_key(self) -> None:
        state = ToyDiT(depth=5).state_dict()
        with pytest.raises(st.CheckpointError) as error:
            st.build_teacher(ToyDiT(depth=4), state, layer="blocks.2", guidance_scale=3.0, null={"y": 10})
        check(error, "ToyDiT", r"blocks\.4\.qkv\.weight")

    def test_another_shape(self) -> None:
        with pytest.raises(st.CheckpointError) as error:
            st.build_teacher(
                ToyDiT(), ToyDiT(num_classes=7).state_dict(), layer="blocks.2", guidance_scale=3.0, null={"y": 10}
            )
        check(error, r"y_embedder\.weight", r"\(8, 16\)", r"\(11, 16\)")


class TestTheOptimizer:
    def test_a_head_that_is_not_in_it(self) -> None:
        model = ToyDiT()
        criterion = stage1(model)
        with pytest.raises(st.SettingError) as error:
            criterion.check_optimizer(torch.optim.AdamW(model.parameters()))
        check(
            error,
            r"does not hold 8 of the criterion's 8 parameters: 'heads\.0\.head\.0\.weight'",
            "…",
            r"Build it from \[\*model\.parameters\(\), \*criterion\.parameters\(\)\], after wrapping and moving both",
        )

    def test_a_part_of_a_head(self) -> None:
        model = ToyDiT()
        criterion = stage1(model)
        held = [p for name, p in criterion.named_parameters() if not name.endswith("linear.bias")]
        with pytest.raises(
            st.SettingError, match=r"does not hold 1 of the criterion's 8 parameters: 'heads\.0\.linear\.bi"
        ):
            criterion.check_optimizer(torch.optim.AdamW([*model.parameters(), *held]))

    def test_a_copys_head(self) -> None:
        criterion = stage1(ToyDiT())
        with pytest.raises(st.SettingError):
            criterion.check_optimizer(torch.optim.AdamW(copy.deepcopy(criterion).parameters()))

    def test_a_complete_one_passes_in_any_groups(self) -> None:
        model = ToyDiT()
        criterion = stage1(model)
        groups = [{"params": model.parameters()}, {"params": criterion.parameters(), "lr": 1e-3}]
        criterion.check_optimizer(torch.optim.AdamW(groups, lr=1e-4))


PACKAGE = Path(st.__file__).parent
ERRORS = [value for value in vars(errors).values() if isinstance(value, type)]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_every_error_is_ours_and_the_builtin_that_fits(error: type[Exception]) -> None:
    assert issubclass(error, errors.SelfTransError)
    builtin = (ValueError, LookupError, TypeError, RuntimeError, ImportError, FloatingPointError, UserWarning)
    assert issubclass(error, builtin) or error is errors.SelfTransError
    assert getattr(st, error.__name__) is error


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.name)
def test_joined_strings_keep_the_space_between_them(path: Path) -> None:
    """Where a message goes on in the next line's string, one of the two brings the space."""
    lost = re.findall(r"(?<!\\n)(?<=\S)\"\n\s*f?\"(?=[\w('{]).*", path.read_text())
    assert lost == []
