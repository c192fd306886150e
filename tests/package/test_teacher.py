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
from torch._dynamo.testing import CompileCounter
from toys import ToyDiT, batch

import selftrans_reg as st
from selftrans_reg.errors import CallError, CaptureError, LayerNotFoundError, SettingError, ShapeError, TeacherError

B = batch(6)
CALL = (B["x"], B["t"], B["y"])
NULL_CALL = (B["x"], B["t"], torch.full((6,), 10))


def teacher_of(model: nn.Module, **settings: Any) -> st.CFGFeatureTeacher:
    return st.build_teacher(model, None, **{"layer": "blocks.2", "guidance_scale": 3.0, "null": {"y": 10}} | settings)


@pytest.mark.parametrize("scale", [0, 1.5, 30.0])
def test_features_are_f_u_plus_w_times_the_difference(scale: float) -> None:
    model = ToyDiT(dropout=0.9)  # no label is dropped in eval mode
    expected = plain.guided(model, "blocks.2", scale, CALL, NULL_CALL)
    sides = [plain.guided(model, "blocks.2", w, CALL, NULL_CALL) for w in (1, 0)]
    teacher = teacher_of(model, guidance_scale=scale)
    for _ in range(2):  # the first call drops modules
        found = teacher(*CALL)
        assert found.dtype == torch.float32
        assert not found.requires_grad
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * max(1, scale))
    torch.testing.assert_close(list(teacher.pair(y=B["y"], t=B["t"], x=B["x"])), sides, **TOLERANCE)
    assert (sides[0] - sides[1]).abs().max() > 0.1


@pytest.mark.parametrize("chunk", [1, 5, 12, 100])
@pytest.mark.parametrize("rows", [None, [4, 1]])
def test_some_rows_in_passes_of_any_size_are_those_of_the_whole(chunk: int, rows: list[int] | None) -> None:
    teacher = teacher_of(ToyDiT())
    expected = [side[rows or slice(None)] for side in teacher.pair(*CALL)]
    sizes: list[int] = []
    teacher.model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    found = teacher.features(teacher.spec.bind(CALL, {}), None if rows is None else torch.tensor(rows), chunk)
    torch.testing.assert_close(list(found), expected, **TOLERANCE)
    assert sum(sizes) == 2 * len(rows or CALL[0])
    assert max(sizes) == min(chunk, sum(sizes))


def test_a_scalar_time_is_shared() -> None:
    class Scalar(ToyDiT):
        def forward(self, x: Tensor, t: float, y: Tensor) -> Tensor:
            return super().forward(x, torch.full((len(x),), t), y)

    rows = torch.full((6,), 0.3)
    expected = plain.guided(ToyDiT(), "blocks.2", 3.0, (B["x"], rows, B["y"]), (B["x"], rows, NULL_CALL[2]))
    torch.testing.assert_close(teacher_of(Scalar())(B["x"], 0.3, B["y"]), expected, **TOLERANCE)


def test_it_runs_under_the_autocast_that_is_active() -> None:
    teacher = teacher_of(ToyDiT())
    expected = teacher(*CALL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = teacher(*CALL)
    assert found.dtype == torch.float32
    assert not torch.equal(found, expected)
    assert (found - expected).norm() < 0.03 * expected.norm()


class TestLayer:
    def test_a_layer_that_runs_several_times_is_refused(self) -> None:
        model = ToyDiT()
        model.blocks[3] = model.blocks[1]
        teacher = teacher_of(model, layer="blocks.1")
        for _ in range(2):
            with plain.refused(CaptureError, "Layer 'blocks.1' ran 2 times in one forward of the teacher, and nothing"):
                teacher(*CALL)

    def test_what_lies_behind_the_layer_may_fail_or_work_in_place(self) -> None:
        model = ToyDiT()
        expected = plain.guided(model, "blocks.2", 3.0, CALL, NULL_CALL)
        model.blocks[3].forward = lambda x, c: x.mul_(2)
        model.final_layer = nn.Linear(3, 3)  # does not fit
        torch.testing.assert_close(teacher_of(model)(*CALL), expected, **TOLERANCE)

    def test_a_layer_with_other_rows_or_that_never_runs_is_refused(self) -> None:
        class Shallow(ToyDiT):
            def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
                return x

        with pytest.raises(CaptureError, match=r"ended without running layer 'blocks\.2'"):
            teacher_of(Shallow())(*CALL)
        model = ToyDiT()
        model.blocks[2].register_forward_hook(lambda module, args, output: torch.cat([output, output]))
        with pytest.raises(ShapeError, match=r"layer 'blocks\.2' gives 24 rows for a batch of 12"):
            teacher_of(model)(*CALL)


class TestFrozen:
    @pytest.mark.usefixtures("global_rng_untouched")
    def test_it_takes_the_model_over_frozen_and_in_eval_mode_for_good(self) -> None:
        with plain.global_seed(0):
            model = ToyDiT().train()
        teacher = teacher_of(model)
        teacher(*CALL)
        assert teacher.model is model
        nn.ModuleDict({"trainer": teacher}).train()
        assert not any(module.training for module in teacher.modules())
        assert not any(p.requires_grad for p in teacher.parameters())
        assert "layer='blocks.2', guidance_scale=3, null: y = 10, time=None" in repr(teacher)

    def test_a_model_that_is_random_in_eval_mode_is_refused(self) -> None:
        class Masked(ToyDiT):
            def forward(self, x: Tensor, t: Tensor, y: Tensor, mask_ratio: float = 0.5) -> Tensor:
                return super().forward(x * (torch.rand(x.shape) >= mask_ratio), t, y)

        advice = "call=dict(fixed=dict(mask_ratio=0.0))"
        with plain.global_seed(0), plain.refused(TeacherError, "other features at layer 'blocks.2' each time", advice):
            teacher_of(Masked())(*CALL)
        with plain.global_seed(0):
            fixed = teacher_of(Masked(), call={"fixed": {"mask_ratio": 0.0}})(*CALL)
        torch.testing.assert_close(fixed, plain.guided(ToyDiT(), "blocks.2", 3.0, CALL, NULL_CALL), **TOLERANCE)

    @pytest.mark.parametrize("how", ["deepcopy", "pickle"])
    @pytest.mark.parametrize("called", [False, True])
    def test_a_copy_works_by_itself(self, how: str, called: bool) -> None:
        teacher, expected = teacher_of(ToyDiT()), teacher_of(ToyDiT())(*CALL)
        if called:
            teacher(*CALL)
        if how == "deepcopy":
            other = copy.deepcopy(teacher)
        else:
            torch.save(teacher, file := io.BytesIO())
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
    @pytest.mark.parametrize(
        ("settings", "error", "part"),
        [
            *(
                ({"guidance_scale": scale}, SettingError, f"a finite number, 0 or more .*; got {scale!r}")
                for scale in (-1, float("nan"), float("inf"), "30", None, True)
            ),
            ({"layer": "block.2"}, LayerNotFoundError, "ToyDiT has no layer 'block.2'"),
            ({"hidden_size": 0}, SettingError, "hidden_size must be a positive integer; got 0"),
            ({"weights": ""}, SettingError, "weights names the entry of the checkpoint to take, such as 'ema'; got ''"),
            ({"time": "siT"}, SettingError, "Unknown time convention 'siT'"),
            ({"call": {"x": "image"}}, SettingError, "names 'image'"),
            ({"select": 0.5}, SettingError, "select must be"),
            ({"example": CALL, "hidden_size": 24}, ShapeError, r"hidden_size=24, but .* gives \(6, 16, 16"),
        ],
    )
    def test_a_setting_that_makes_no_sense_is_refused(
        self, settings: dict[str, Any], error: type[Exception], part: str
    ) -> None:
        with pytest.raises(error, match=part):
            teacher_of(ToyDiT(), **settings)

    def test_the_settings_are_checked_before_anything_is_loaded(self) -> None:
        with pytest.raises(SettingError, match="guidance_scale"):
            st.build_teacher(ToyDiT(), "no/such/file.pt", layer="blocks.2", guidance_scale=-1, null={"y": 10})

    def test_a_state_dict_is_loaded_strictly_but_for_projection_heads(self, caplog: pytest.LogCaptureFixture) -> None:
        other, settings = ToyDiT(seed=3), {"layer": "blocks.2", "guidance_scale": 3.0, "null": {"y": 10}}
        state = other.state_dict()
        teacher = st.build_teacher(ToyDiT(), state, **settings)
        assert not caplog.records
        torch.testing.assert_close(teacher(*CALL), plain.guided(other, "blocks.2", 3.0, CALL, NULL_CALL), **TOLERANCE)
        st.build_teacher(ToyDiT(), state | {"projectors.0.weight": torch.ones(2, 2)}, **settings)
        assert "left out: 'projectors.0.weight'" in caplog.records[0].message
        del state["blocks.1.qkv.weight"]
        with pytest.raises(st.SelfTransError, match=r"blocks\.1\.qkv\.weight"):
            st.build_teacher(ToyDiT(), state, **settings)


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

    def test_any_precision_and_scalar_or_empty_buffers_can_be_hashed(self) -> None:
        prints = []
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            model = ToyDiT().to(dtype)
            model.register_buffer("scale", torch.tensor(0.18215))
            model.register_buffer("empty", torch.zeros(0, 4))
            prints.append(tuple(teacher_of(model).fingerprint.tolist()))
        assert len(set(prints)) == 3


def test_state_holds_the_models_weights_only() -> None:
    teacher = teacher_of(ToyDiT(), null={"y": torch.tensor(10)})
    assert set(teacher.state_dict()) == {f"model.{name}" for name in ToyDiT().state_dict()}


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
            elif self.how == "whole":  # said to be shared, and taken by sample
                t = t + cond["size"][: len(t)] / 10
            return super().forward(x, t, y)

    @pytest.mark.parametrize(
        ("how", "cond", "call", "named"),
        [
            ("a table", torch.arange(6.0), None, "look at 'y', 'cond'"),
            ("by place", None, None, "look at 'y'"),
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


def test_threads_share_teachers_from_their_first_calls_on_and_leave_the_compiler_as_it_was() -> None:
    teachers, expected = [teacher_of(ToyDiT()) for _ in "ab"], plain.guided(ToyDiT(), "blocks.2", 3.0, CALL, NULL_CALL)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda i: teachers[i % 2](*CALL), range(40)):
            torch.testing.assert_close(found, expected, **TOLERANCE)
    counter = CompileCounter()
    torch.compile(lambda x: x + 1, backend=counter)(torch.zeros(1))
    assert counter.frame_count == 1
