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
from torch.optim.swa_utils import AveragedModel
from toys import ToyDiT, batch, teacher_of

from selftrans_reg.errors import CallError, CaptureError, CheckpointError, SettingError, ShapeError, TeacherError
from selftrans_reg.truncate import dropped_names

B = batch(6)
CALL = (B["x"], B["t"], B["y"])
NULL_CALL = (B["x"], B["t"], torch.full((6,), 10))


def expected_of(model: nn.Module, *calls: Any) -> Tensor:
    return plain.guided(model, "blocks.2", 3.0, *(calls or (CALL, NULL_CALL)))


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


def test_it_runs_under_the_autocast_that_is_active() -> None:
    teacher = teacher_of(ToyDiT())
    expected = teacher(*CALL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = teacher(*CALL)
    assert found.dtype == torch.float32
    assert not torch.equal(found, expected)
    assert (found - expected).norm() < 0.03 * expected.norm()


def test_what_lies_behind_the_layer_may_fail_or_work_in_place() -> None:
    model = ToyDiT()
    expected = expected_of(model)
    model.blocks[3].forward = lambda x, c: x.mul_(2)
    model.final_layer = nn.Linear(3, 3)  # does not fit
    torch.testing.assert_close(teacher_of(model)(*CALL), expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("how", "error", "part"),
    [
        ("twice", CaptureError, "Layer 'blocks.2' ran 2 times in one forward of the teacher"),
        ("never", CaptureError, "ended without running layer 'blocks.2'"),
        ("more rows", ShapeError, "layer 'blocks.2' gives 24 rows for a batch of 12"),
    ],
)
def test_a_layer_with_other_rows_or_that_does_not_run_once_is_refused(
    how: str, error: type[Exception], part: str
) -> None:
    model = ToyDiT()
    if how == "twice":
        model.blocks[3] = model.blocks[2]
    elif how == "never":
        model.forward = lambda x, t, y: x
    else:
        model.blocks[2].register_forward_hook(lambda module, args, output: torch.cat([output, output]))
    teacher = teacher_of(model)
    for _ in range(2):
        with plain.refused(error, part):
            teacher(*CALL)


@pytest.mark.usefixtures("global_rng_untouched")
def test_it_takes_the_model_over_frozen_and_in_eval_mode_for_good() -> None:
    with plain.global_seed(0):
        model, other = ToyDiT().train(), ToyDiT()
    teacher = teacher_of(model, null={"y": torch.tensor(10)})
    teacher(*CALL)
    assert teacher.model is model
    nn.ModuleDict({"trainer": teacher}).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert "layer='blocks.2', guidance_scale=3, null: y = Tensor, time=None" in repr(teacher)
    assert set(teacher.state_dict()) < {f"model.{name}" for name in other.state_dict()}


def test_a_model_that_is_random_in_eval_mode_is_refused() -> None:
    class Masked(ToyDiT):
        def forward(self, x: Tensor, t: Tensor, y: Tensor, mask_ratio: float = 0.5) -> Tensor:
            return super().forward(x * (torch.rand(x.shape) >= mask_ratio), t, y)

    advice = "call=dict(fixed=dict(mask_ratio=0.0))"
    with plain.global_seed(0), plain.refused(TeacherError, "other features at layer 'blocks.2' each time", advice):
        teacher_of(Masked())(*CALL)
    with plain.global_seed(0):
        fixed = teacher_of(Masked(), call={"fixed": {"mask_ratio": 0.0}})(*CALL)
    torch.testing.assert_close(fixed, expected_of(ToyDiT()), **TOLERANCE)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("called", [False, True])
def test_a_copy_works_by_itself(how: str, called: bool, device: torch.device) -> None:
    teacher, call = teacher_of(ToyDiT(), null={"y": torch.tensor(10)}), [value.to(device) for value in CALL]
    if called:
        teacher(*CALL)
    if how == "deepcopy":
        other = copy.deepcopy(teacher)
    else:
        torch.save(teacher, file := io.BytesIO())
        other = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    del teacher
    torch.testing.assert_close(other.to(device)(*call).cpu(), expected_of(ToyDiT()), rtol=1e-4, atol=1e-4)
    assert not other.train().training
    assert not list(other.model.blocks[3].parameters())  # truncated too


@pytest.mark.parametrize(
    ("settings", "error", "part"),
    [
        *(({"guidance_scale": scale}, SettingError, "a finite number") for scale in (-1, float("nan"), "30", True)),
        ({"call": {"x": "image"}}, SettingError, "names 'image'"),
        ({"select": 0.5}, SettingError, "select must be"),
        ({"example": CALL, "hidden_size": 24}, ShapeError, r"hidden_size=24, but .* gives \(6, 16, 16"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_before_anything_is_loaded(
    settings: dict[str, Any], error: type[Exception], part: str
) -> None:
    with pytest.raises(error, match=part):
        teacher_of(ToyDiT(), None if "example" in settings else "no/such/file.pt", **settings)


class TestFingerprint:
    def test_equal_teachers_have_equal_fingerprints_whatever_happens_to_them(self) -> None:
        one, two = (teacher_of(ToyDiT(), null={"y": torch.tensor(10)}) for _ in "ab")
        assert one.fingerprint.shape == (32,)
        assert torch.equal(one.fingerprint, two.fingerprint)
        two(*CALL)
        assert torch.equal(one.fingerprint, copy.deepcopy(two).to(torch.bfloat16).fingerprint)
        compiled = teacher_of(torch.compile(ToyDiT(), backend="eager"), null={"y": torch.tensor(10)})
        assert torch.equal(one.fingerprint, compiled.fingerprint)

    def test_other_settings_or_precisions_give_another(self) -> None:
        nulls = [10, 9, torch.tensor(10), lambda call: call["y"], *map(torch.zeros, ((3, 5), (5, 3))), torch.ones(3, 5)]
        changed: list[Any] = [{"layer": "blocks.1"}, {"guidance_scale": 3.5}, *({"null": {"y": y}} for y in nulls)]
        changed += [{"dtype": dtype} for dtype in (torch.bfloat16, torch.float16, torch.float64)]
        prints = set()
        for settings in changed:
            model = ToyDiT().to(settings.pop("dtype", torch.float32))
            model.register_buffer("scale", torch.tensor(0.18215))
            model.register_buffer("empty", torch.zeros(0, 4))
            prints.add(bytes(teacher_of(model, **settings).fingerprint.tolist()))
        assert len(prints) == len(changed)

    @pytest.mark.parametrize("name", [name for name, _ in ToyDiT(depth=1).named_parameters()])
    def test_the_smallest_change_of_any_weight_gives_another(self, name: str) -> None:
        model = ToyDiT(depth=1)
        before = teacher_of(copy.deepcopy(model), layer="blocks.0").fingerprint
        with torch.no_grad():
            flat = model.get_parameter(name).view(-1)
            flat[-1] = torch.nextafter(flat[-1], torch.tensor(9.0))
        assert not torch.equal(before, teacher_of(model, layer="blocks.0").fingerprint)


class TestRefresh:
    @pytest.mark.parametrize("prepared", [False, True])
    def test_it_teaches_as_one_built_from_the_new_weights(self, prepared: bool) -> None:
        teacher, model = teacher_of(ToyDiT()), ToyDiT(seed=7)
        expected = expected_of(model)
        if prepared:
            teacher(*CALL)
        dropped = dropped_names(teacher.model)
        assert bool(dropped) == prepared
        teacher.refresh(AveragedModel(model).state_dict())  # all weights, and the average's own counter
        torch.testing.assert_close(teacher(*CALL), expected, **TOLERANCE)
        with torch.no_grad():
            model.blocks[0].fc1.weight.add_(1.0)  # a copy was taken
        torch.testing.assert_close(teacher(*CALL), expected, **TOLERANCE)
        assert not prepared or dropped_names(teacher.model) == dropped

    def test_what_does_not_fit_changes_nothing(self) -> None:
        teacher, other = teacher_of(ToyDiT()), ToyDiT(seed=7).state_dict()
        expected, own = teacher(*CALL), teacher.fingerprint
        del other["blocks.1.fc1.weight"]
        for state, match in ((other, "Missing"), (ToyDiT(width=32).state_dict(), "Of another shape")):
            with pytest.raises(CheckpointError, match=match):
                teacher.refresh(state)
        assert torch.equal(teacher(*CALL), expected)
        assert torch.equal(teacher.fingerprint, own)
        assert not teacher.refreshed

    def test_its_fingerprint_is_that_of_its_settings_alone(self) -> None:
        teachers = [teacher_of(ToyDiT(seed=seed), guidance_scale=w) for seed, w in ((1, 3.0), (2, 3.0), (2, 4.0))]
        for seed, teacher in enumerate(teachers):
            teacher.refresh(ToyDiT(seed=seed).state_dict())
        one, two, other = (teacher.fingerprint for teacher in teachers)
        assert torch.equal(one, two)
        assert not torch.equal(two, other)


class Takes(ToyDiT):
    """Reads its condition in a way that no shape shows."""

    how: str

    def forward(self, x: Tensor, t: Tensor, y: Tensor, cond: Any = None) -> Tensor:
        if self.how == "a table":  # as many entries as samples
            t = t + cond[(torch.arange(len(t)) * 0 + y) % len(cond)] / 10
        else:
            t = t + torch.arange(len(t)) / 10
        return super().forward(x, t, y)


@pytest.mark.parametrize("rows", [None, [1, 4, 5]])
@pytest.mark.parametrize(
    ("how", "cond", "named"), [("a table", torch.arange(6.0), "look at 'y', 'cond'"), ("by place", None, "look at 'y'")]
)
def test_rows_that_are_not_what_they_look_like_are_named(how: str, cond: Any, named: str, rows: Any) -> None:
    """Proved at the first call, by the features of a row alone beside those that it has in the whole batch."""
    model = Takes()
    model.how = how
    teacher = teacher_of(model)
    with plain.refused(CallError, named, "gives other features at the teacher's layer 'blocks.2'"):
        teacher.features(teacher.spec.bind((*CALL, cond), {}), None if rows is None else torch.tensor(rows))


class MixedDiT(ToyDiT):
    """In bfloat16, but for a table in float32 that comes first, as in Wan."""

    def __init__(self) -> None:
        super().__init__()
        self.bfloat16().table = nn.Parameter(torch.ones(2))
        assert next(self.parameters()) is self.table

    def embed_t(self, t: Tensor) -> Tensor:
        t = t * self.table.mean()
        return self.t_embedder(torch.stack([torch.cos(3 * t), torch.sin(3 * t)], dim=1).bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nothing_is_cast_that_the_student_was_given(dtype: torch.dtype) -> None:
    model, x = MixedDiT() if dtype == torch.bfloat16 else MixedDiT().bfloat16(), B["x"].bfloat16()
    seen: set[tuple[torch.dtype, ...]] = set()
    half = expected_of(model, (x, *CALL[1:]), (x, *NULL_CALL[1:]))
    model.register_forward_pre_hook(lambda module, args: seen.add((args[0].dtype, args[1].dtype)))
    found = teacher_of(model)(B["x"].to(dtype), *CALL[1:])
    torch.testing.assert_close(found, half.float(), rtol=0.05, atol=0.5)
    assert seen == {(torch.bfloat16, torch.float32)}


def test_threads_share_teachers_from_their_first_calls_on_and_leave_the_compiler_as_it_was() -> None:
    teachers, expected = [teacher_of(ToyDiT()) for _ in "ab"], expected_of(ToyDiT())
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda i: teachers[i % 2](*CALL), range(40)):
            torch.testing.assert_close(found, expected, **TOLERANCE)
    counter = CompileCounter()
    torch.compile(lambda x: x + 1, backend=counter)(torch.zeros(1))
    assert counter.frame_count == 1
