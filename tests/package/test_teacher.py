"""The frozen teacher: guided features, null conditions, its fingerprint."""

from __future__ import annotations

import copy
import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import plain
import pytest
import torch
from plain import TOLERANCE
from torch import Tensor, nn
from toys import ToyDiT, batch

import selftrans_reg as st
from selftrans_reg.errors import CallError, CaptureError, LayerNotFoundError, SettingError, ShapeError

B = batch(6)
CALL = (B["x"], B["t"], B["y"])
NULL_CALL = (B["x"], B["t"], torch.full((6,), 10))


def teacher_of(model: nn.Module, **settings: Any) -> st.CFGFeatureTeacher:
    return st.build_teacher(model, None, **{"layer": "blocks.2", "guidance_scale": 3.0, "null": {"y": 10}} | settings)


class TestGuidance:
    @pytest.mark.parametrize("scale", [0, 1, 1.5, 30.0])
    def test_features_are_f_u_plus_w_times_the_difference(self, scale: float) -> None:
        model = ToyDiT()
        expected = plain.guided(model, "blocks.2", scale, CALL, NULL_CALL)
        teacher = teacher_of(model, guidance_scale=scale)
        for _ in range(2):  # the first call drops modules
            found = teacher(*CALL)
            assert found.dtype == torch.float32
            assert not found.requires_grad
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * max(1, scale))

    def test_pair_gives_both_sides_and_guide_combines_them(self) -> None:
        model = ToyDiT()
        reference = copy.deepcopy(model).eval()
        teacher = teacher_of(model)
        conditional, unconditional = teacher.pair(*CALL)
        torch.testing.assert_close(conditional, plain.tapped(reference, "blocks.2", *CALL)[1].detach(), **TOLERANCE)
        torch.testing.assert_close(
            unconditional, plain.tapped(reference, "blocks.2", *NULL_CALL)[1].detach(), **TOLERANCE
        )
        assert (conditional - unconditional).abs().max() > 0.1
        torch.testing.assert_close(teacher.guide(conditional, unconditional), teacher(*CALL), **TOLERANCE)

    @pytest.mark.parametrize("chunk", [1, 5, 6, 12, 100])
    def test_one_doubled_batch_equals_passes_of_any_size(self, chunk: int) -> None:
        teacher = teacher_of(ToyDiT())
        expected = teacher.pair(*CALL)
        sizes: list[int] = []
        teacher.model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
        found = teacher.features(teacher.spec.bind(CALL, {}), chunk=chunk)
        torch.testing.assert_close(found, expected, **TOLERANCE)
        assert sum(sizes) == 12
        assert max(sizes) == min(chunk, 12)

    @pytest.mark.parametrize("rows", [[0], [4, 1], [0, 1, 2, 3, 4, 5]])
    def test_rows_of_a_batch_are_those_of_the_whole(self, rows: list[int]) -> None:
        teacher = teacher_of(ToyDiT())
        expected = [side[rows] for side in teacher.pair(*CALL)]
        found = teacher.features(teacher.spec.bind(CALL, {}), torch.tensor(rows))
        torch.testing.assert_close(list(found), expected, **TOLERANCE)

    def test_keyword_arguments_are_the_same_call(self) -> None:
        teacher = teacher_of(ToyDiT())
        expected = teacher(*CALL)
        torch.testing.assert_close(teacher(y=B["y"], t=B["t"], x=B["x"]), expected, rtol=0, atol=0)
        torch.testing.assert_close(teacher(B["x"], B["t"], y=B["y"]), expected, rtol=0, atol=0)

    def test_a_scalar_time_is_shared(self) -> None:
        class Scalar(ToyDiT):
            def forward(self, x: Tensor, t: float, y: Tensor) -> Tensor:
                return super().forward(x, torch.full((len(x),), t), y)

        rows = torch.full((6,), 0.3)
        expected = plain.guided(ToyDiT(), "blocks.2", 3.0, (B["x"], rows, B["y"]), (B["x"], rows, NULL_CALL[2]))
        torch.testing.assert_close(teacher_of(Scalar())(B["x"], 0.3, B["y"]), expected, **TOLERANCE)

    def test_it_runs_under_the_autocast_that_is_active(self) -> None:
        teacher = teacher_of(ToyDiT())
        expected = teacher(*CALL)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = teacher(*CALL)
        assert found.dtype == torch.float32
        assert not torch.equal(found, expected)
        assert (found - expected).norm() < 0.03 * expected.norm()


class Loops(ToyDiT):
    """Goes through its blocks twice."""

    def through_blocks(self, tokens: Tensor, c: Tensor) -> Tensor:
        return super().through_blocks(super().through_blocks(tokens, c), c)


class Shares(ToyDiT):
    """All blocks are one."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([self.blocks[0]] * 4)


class TestLayer:
    @pytest.mark.parametrize(("model", "times"), [(Loops(), 2), (Shares(), 4)], ids=["loops", "shares"])
    def test_a_layer_that_runs_several_times_is_refused(self, model: ToyDiT, times: int) -> None:
        teacher = teacher_of(model, layer="blocks.2")
        for _ in range(2):
            with pytest.raises(CaptureError, match=rf"Layer 'blocks\.2' ran {times} times in one forward") as error:
                teacher(*CALL)
            assert error.match("nothing is guessed")
            assert error.match("Tap a layer that runs once")

    def test_what_lies_behind_the_layer_may_fail(self) -> None:
        model = ToyDiT()
        expected = plain.guided(model, "blocks.2", 3.0, CALL, NULL_CALL)
        model.final_layer = nn.Linear(3, 3)  # does not fit
        torch.testing.assert_close(teacher_of(model)(*CALL), expected, **TOLERANCE)

    def test_a_batch_of_no_rows_is_refused_in_words(self) -> None:
        teacher = teacher_of(ToyDiT())
        with pytest.raises(ShapeError, match=r"x_t \(0, .* has no rows"):
            teacher(*(tensor[:0] for tensor in CALL))


class TestFrozen:
    def test_it_takes_the_model_over_frozen_and_in_eval_mode_for_good(self) -> None:
        model = ToyDiT().train()
        teacher = teacher_of(model)
        assert teacher.model is model
        nn.ModuleDict({"trainer": teacher}).train()
        teacher.train(True)
        assert not any(module.training for module in teacher.modules())
        assert not any(p.requires_grad for p in teacher.parameters())

    def test_labels_are_not_dropped_and_calls_are_repeatable(self) -> None:
        teacher = teacher_of(ToyDiT(dropout=0.9))
        torch.testing.assert_close(teacher(*CALL), teacher(*CALL), rtol=0, atol=0)
        assert teacher.model.dropped is None

    @pytest.mark.usefixtures("global_rng_untouched")
    def test_building_and_calling_draw_nothing_from_the_global_generator(self) -> None:
        with plain.global_seed(0):
            model = ToyDiT()
        teacher_of(model)(*CALL)

    def test_a_model_that_is_random_in_eval_mode_is_refused(self) -> None:
        class Masked(ToyDiT):
            def forward(self, x: Tensor, t: Tensor, y: Tensor, mask_ratio: float = 0.5) -> Tensor:
                return super().forward(x * (torch.rand(x.shape) >= mask_ratio), t, y)

        with plain.global_seed(0), pytest.raises(st.SelfTransError) as error:
            teacher_of(Masked())(*CALL)
        assert "gives other features at layer 'blocks.2' each time" in str(error.value)
        assert "call=dict(fixed=dict(mask_ratio=0.0))" in str(error.value)
        with plain.global_seed(0):
            fixed = teacher_of(Masked(), call={"fixed": {"mask_ratio": 0.0}})(*CALL)
        torch.testing.assert_close(fixed, plain.guided(ToyDiT(), "blocks.2", 3.0, CALL, NULL_CALL), **TOLERANCE)

    @pytest.mark.parametrize("how", ["deepcopy", "pickle"])
    @pytest.mark.parametrize("after", ["building", "its first call"])
    def test_a_copy_works_by_itself(self, how: str, after: str) -> None:
        teacher = teacher_of(ToyDiT())
        expected = copy.deepcopy(teacher)(*CALL)
        if after == "its first call":
            teacher(*CALL)
        if how == "deepcopy":
            other = copy.deepcopy(teacher)
        else:
            file = io.BytesIO()
            torch.save(teacher, file)
            other = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
        del teacher
        torch.testing.assert_close(other(*CALL), expected, **TOLERANCE)
        assert not other.train().training
        assert not list(other.model.blocks[3].parameters())  # truncated too

    def test_it_moves_as_a_module(self, device: torch.device) -> None:
        teacher = teacher_of(ToyDiT(), null={"y": torch.tensor(10)})
        expected = teacher(*CALL)
        found = teacher.to(device)(*(value.to(device) for value in CALL))
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-3)


class TestSettings:
    def test_it_prints_its_settings(self) -> None:
        teacher = teacher_of(ToyDiT(), time="sit", tokens=slice(1, None))
        for part in ("layer='blocks.2', guidance_scale=3, null: y = 10, time='sit'", "tokens=slice(1, None, None)"):
            assert part in repr(teacher)

    @pytest.mark.parametrize("scale", [-1, float("nan"), float("inf"), "30", None, True])
    def test_a_guidance_scale_that_makes_no_sense_is_refused(self, scale: Any) -> None:
        with pytest.raises(SettingError) as error:
            teacher_of(ToyDiT(), guidance_scale=scale)
        assert "guidance_scale must be a finite number, 0 or more (1 is the conditional feature)" in str(error.value)
        assert f"got {scale!r}." in str(error.value)

    @pytest.mark.parametrize(
        ("settings", "error", "part"),
        [
            ({"layer": "block.2"}, LayerNotFoundError, "ToyDiT has no layer 'block.2'"),
            ({"layer": 8}, SettingError, "got 8"),
            ({"hidden_size": 0}, SettingError, "hidden_size must be a positive integer; got 0"),
            ({"weights": ""}, SettingError, "weights names the entry of the checkpoint to take, such as 'ema'; got ''"),
            ({"time": "siT"}, SettingError, "Unknown time convention 'siT'"),
            ({"call": {"x": "image"}}, SettingError, "names 'image'"),
            ({"select": 0.5}, SettingError, "select must be"),
            ({"tokens": 16}, SettingError, "tokens must be"),
        ],
    )
    def test_other_settings_too(self, settings: dict[str, Any], error: type[Exception], part: str) -> None:
        with pytest.raises(error) as caught:
            teacher_of(ToyDiT(), **settings)
        assert part in str(caught.value)

    def test_the_settings_are_checked_before_anything_is_loaded(self) -> None:
        with pytest.raises(SettingError, match="guidance_scale"):
            st.build_teacher(ToyDiT(), "no/such/file.pt", layer="blocks.2", guidance_scale=-1, null={"y": 10})

    def test_a_wrong_width_is_found_with_an_example(self) -> None:
        with pytest.raises(ShapeError, match=r"hidden_size=24, but layer 'blocks\.2' gives \(6, 16, 16\)"):
            teacher_of(ToyDiT(), hidden_size=24, example=CALL)

    def test_a_layer_with_other_rows_is_refused(self) -> None:
        class Doubling(ToyDiT):
            def __init__(self) -> None:
                super().__init__()
                self.blocks[2].register_forward_hook(lambda module, args, output: torch.cat([output, output]))

        with pytest.raises(ShapeError) as error:
            teacher_of(Doubling())(*CALL)
        assert "layer 'blocks.2' gives 24 rows for a batch of 12" in str(error.value)

    def test_a_layer_that_never_runs_is_refused(self) -> None:
        class Shallow(ToyDiT):
            def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
                return x

        with pytest.raises(CaptureError, match=r"ended without running layer 'blocks\.2'"):
            teacher_of(Shallow())(*CALL)

    def test_a_state_dict_is_loaded_strictly(self) -> None:
        other = ToyDiT(seed=3)
        teacher = st.build_teacher(ToyDiT(), other.state_dict(), layer="blocks.2", guidance_scale=3.0, null={"y": 10})
        torch.testing.assert_close(teacher(*CALL), plain.guided(other, "blocks.2", 3.0, CALL, NULL_CALL), **TOLERANCE)
        state = {name: value for name, value in other.state_dict().items() if "blocks.1" not in name}
        with pytest.raises(st.SelfTransError, match=r"blocks\.1\.qkv\.weight"):
            st.build_teacher(ToyDiT(), state, layer="blocks.2", guidance_scale=3.0, null={"y": 10})


class TestFingerprint:
    def test_equal_teachers_have_equal_fingerprints_whatever_happens_to_them(self) -> None:
        one, two = teacher_of(ToyDiT()), teacher_of(ToyDiT())
        assert one.fingerprint.shape == (32,)
        assert torch.equal(one.fingerprint, two.fingerprint)
        two(*CALL)
        assert torch.equal(one.fingerprint, copy.deepcopy(two).to(torch.bfloat16).fingerprint)
        assert torch.equal(one.fingerprint, teacher_of(torch.compile(ToyDiT(), backend="eager")).fingerprint)

    @pytest.mark.parametrize(
        "changed",
        [
            {"layer": "blocks.1"},
            {"guidance_scale": 3.5},
            {"null": {"y": 9}},
            {"null": {"y": torch.tensor(10)}},
            {"null": {"y": lambda call: call["y"]}},
        ],
    )
    def test_other_settings_give_another(self, changed: dict[str, Any]) -> None:
        assert not torch.equal(teacher_of(ToyDiT()).fingerprint, teacher_of(ToyDiT(), **changed).fingerprint)

    @pytest.mark.parametrize("name", [name for name, _ in ToyDiT(depth=1).named_parameters()])
    def test_the_smallest_change_of_any_weight_gives_another(self, name: str) -> None:
        model = ToyDiT(depth=1)
        before = teacher_of(copy.deepcopy(model), layer="blocks.0").fingerprint
        with torch.no_grad():
            flat = model.get_parameter(name).view(-1)
            flat[-1] = torch.nextafter(flat[-1], torch.tensor(9.0))
        assert not torch.equal(before, teacher_of(model, layer="blocks.0").fingerprint)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_any_precision_and_scalar_or_empty_buffers_can_be_hashed(self, dtype: torch.dtype) -> None:
        model = ToyDiT().to(dtype)
        model.register_buffer("scale", torch.tensor(0.18215))
        model.register_buffer("empty", torch.zeros(0, 4))
        assert teacher_of(model).fingerprint.any()

    def test_state_that_is_no_tensor_is_left_out(self) -> None:
        class WithExtra(ToyDiT):
            def get_extra_state(self) -> dict[str, int]:
                return {"version": 1}

            def set_extra_state(self, state: dict[str, int]) -> None: ...

        assert torch.equal(teacher_of(WithExtra()).fingerprint, teacher_of(ToyDiT()).fingerprint)


def test_state_holds_the_models_weights_only() -> None:
    teacher = teacher_of(ToyDiT(), null={"y": torch.tensor(10)})
    assert set(teacher.state_dict()) == {f"model.{name}" for name in ToyDiT().state_dict()}


def test_keys_of_projection_heads_are_left_out_by_name(caplog: pytest.LogCaptureFixture) -> None:
    weights = ToyDiT(seed=3).state_dict()
    heads = {"projectors.0.weight": torch.ones(2, 2), "projectors.0.bias": torch.ones(2)}
    settings = {"layer": "blocks.2", "guidance_scale": 3.0, "null": {"y": 10}}
    st.build_teacher(ToyDiT(), weights, **settings)
    assert not caplog.records
    st.build_teacher(ToyDiT(), weights | heads, **settings)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "2 keys of" in record.message
    assert "left out: 'projectors.0.weight', 'projectors.0.bias'" in record.message


class TestRowsAreProved:
    """At the first call, by the features of a row alone beside those that it has in the whole batch."""

    class Takes(ToyDiT):
        """Reads its condition in a way that no shape shows."""

        def __init__(self, how: str) -> None:
            super().__init__()
            self.how = how

        def forward(self, x: Tensor, t: Tensor, y: Tensor, cond: Any = None) -> Tensor:
            if self.how == "a table":  # as many entries as samples
                t = t + cond[(torch.arange(len(t)) * 0 + y) % len(cond)] / 10
            elif self.how == "by place":
                t = t + torch.arange(len(t)) / 10
            elif self.how == "a mean":
                t = t + cond.mean()
            elif self.how == "whole":  # said to be shared, and taken by sample
                t = t + cond["size"][: len(t)] / 10
            return super().forward(x, t, y)

    @pytest.mark.parametrize(
        ("how", "cond", "call", "named"),
        [
            ("a table", torch.arange(6.0), None, "look at 'y', 'cond'"),
            ("by place", None, None, "look at 'y'"),
            ("a mean", torch.arange(6.0), None, "look at 'y', 'cond'"),
            ("whole", {"size": torch.arange(6.0)}, {"shared": ["cond"]}, "look at \"cond['size']\""),
        ],
    )
    @pytest.mark.parametrize("rows", [None, [1, 4, 5]])
    def test_rows_that_are_not_what_they_look_like_are_named(
        self, how: str, cond: Any, call: Any, named: str, rows: list[int] | None
    ) -> None:
        teacher = teacher_of(self.Takes(how), call=call)
        chosen = None if rows is None else torch.tensor(rows)
        with pytest.raises((CallError, RuntimeError)) as error:
            teacher.features(teacher.spec.bind((*CALL, cond), {}), chosen)
        if how == "whole" and rows is None:  # 12 rows are too many for the model itself
            assert "Left whole: \"cond['size']\" (6,)" in str(error.value)
            return
        for part in (named, "gives other features at the teacher's layer 'blocks.2'", "call=dict(shared=[...])"):
            assert part in str(error.value)

    def test_a_table_that_is_named_is_shared(self) -> None:
        table = torch.arange(6.0)
        teacher = teacher_of(self.Takes("a table"), call={"shared": ["cond"]})
        args = (B["x"], B["t"] + table[B["y"] % 6] / 10, B["y"]), (B["x"], B["t"] + table[10 % 6] / 10, NULL_CALL[2])
        expected = plain.guided(ToyDiT(), "blocks.2", 3.0, *args)
        torch.testing.assert_close(teacher(*CALL, table), expected, **TOLERANCE)


class MixedDiT(ToyDiT):
    """In bfloat16, but for a table in float32 that comes first, as in Wan."""

    def __init__(self) -> None:
        super().__init__()
        self.bfloat16().table = nn.Parameter(torch.ones(2))
        assert next(self.parameters()) is self.table

    def embed_t(self, t: Tensor) -> Tensor:
        t = t * self.table.mean()
        return self.t_embedder(torch.stack([torch.cos(3 * t), torch.sin(3 * t)], dim=1).bfloat16())


@pytest.mark.parametrize("student", ["like the teacher", "in float32"])
def test_nothing_is_cast_that_the_student_was_given(student: str) -> None:
    x = B["x"].bfloat16() if student == "like the teacher" else B["x"]
    model = MixedDiT() if student == "like the teacher" else MixedDiT().bfloat16()
    seen: list[tuple[torch.dtype, ...]] = []
    teacher = teacher_of(model)
    teacher.model.register_forward_pre_hook(lambda module, args: seen.append((args[0].dtype, args[1].dtype)))
    half = plain.guided(model, "blocks.2", 3.0, (x.bfloat16(), *CALL[1:]), (x.bfloat16(), *NULL_CALL[1:]))
    torch.testing.assert_close(teacher(x, *CALL[1:]), half.float(), rtol=0.05, atol=0.5)
    assert set(seen) == {(torch.bfloat16, torch.float32)}


def test_two_threads_share_a_teacher_from_its_first_call_on() -> None:
    teacher, expected = teacher_of(ToyDiT()), plain.guided(ToyDiT(), "blocks.2", 3.0, CALL, NULL_CALL)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda i: teacher(*CALL), range(40)):
            torch.testing.assert_close(found, expected, **TOLERANCE)
