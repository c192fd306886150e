"""Dropping what a teacher never runs."""

from __future__ import annotations

import contextlib
import copy
import io
from pathlib import Path

import plain
import pytest
import torch
import torch.nn.functional as F
from benchmarks.overhead_variants import Batch, Shape
from safetensors.torch import load_file
from torch import Tensor, nn
from toys import ToyDiT, batch

import selftrans_reg as st
from selftrans_reg.errors import PrunedModuleError
from selftrans_reg.truncate import Pruned

B = batch(4)
CALL = (B["x"], B["t"], B["y"])


def teacher_of(model: nn.Module, layer: str = "blocks.1", **settings: object) -> st.CFGFeatureTeacher:
    return st.build_teacher(
        model, None, **{"layer": layer, "guidance_scale": 3.0, "null": {"y": 10}, "hidden_size": 16} | settings
    )


def assert_as_before(teacher: st.CFGFeatureTeacher, model: nn.Module, layer: str = "blocks.1") -> None:
    """Features of several calls are those of the whole model."""
    null = torch.full_like(B["y"], 10)
    expected = plain.guided(model, layer, 3.0, CALL, (B["x"], B["t"], null))
    for _ in range(3):
        torch.testing.assert_close(teacher(*CALL), expected, **plain.TOLERANCE)


def pruned(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, Pruned)}


@pytest.mark.parametrize("at", ["first call", "once"])
def test_what_never_runs_is_dropped_for_good(at: str) -> None:
    model = ToyDiT(depth=6)
    whole, kept = copy.deepcopy(model), [p for name, p in model.named_parameters() if "blocks" not in name]
    teacher = teacher_of(model, example=CALL if at == "once" else None)
    if at == "first call":
        assert len(list(teacher.parameters())) == len(list(whole.parameters()))
        teacher(*CALL)
    assert pruned(model) == {"blocks.2", "blocks.3", "blocks.4", "blocks.5", "final_layer"}
    count = sum(p.numel() for p in teacher.parameters())
    blocks = sum(p.numel() for block in whole.blocks[:2] for p in block.parameters())
    assert count == sum(p.numel() for p in kept) - sum(p.numel() for p in whole.final_layer.parameters()) + blocks
    assert count < 0.5 * sum(p.numel() for p in whole.parameters())
    names = {name for name in whole.state_dict() if not name.startswith(tuple(pruned(model)))}
    assert set(teacher.model.state_dict()) == names
    assert_as_before(teacher, whole)


def test_two_thirds_of_the_blocks_are_at_most_seven_tenths_in_memory_and_on_disk(tmp_path: Path) -> None:
    model = Shape(width=64, heads=4).model()
    bytes_whole = sum(p.nbytes for p in model.parameters())
    b = Batch.draw(Shape(batch=2), torch.Generator().manual_seed(0), "cpu")
    teacher = teacher_of(model, "blocks.7", null={"y": 1000}, hidden_size=64, example=(b.x_t, b.t, b.y))
    assert sum(p.nbytes for p in teacher.parameters()) <= 0.7 * bytes_whole
    teacher.save_pretrained(tmp_path / "teacher")
    assert sum(file.stat().st_size for file in (tmp_path / "teacher").iterdir()) <= 0.7 * bytes_whole


def test_an_example_may_be_given_by_name() -> None:
    model = ToyDiT()
    teacher = teacher_of(model, example=dict(zip("xty", CALL, strict=True)), hidden_size=None)
    assert "blocks.2" in pruned(model)
    assert teacher.hidden_size == 16


def test_later_blocks_run_once_to_see_whether_the_layer_runs_again_and_never_after() -> None:
    model = ToyDiT()
    later: list[int] = []
    for block in model.blocks[2:]:
        block.register_forward_pre_hook(lambda module, args: later.append(1))
    teacher = teacher_of(model)
    teacher(*CALL)
    assert later == [1, 1]  # each of them once
    teacher(*CALL)
    assert later == [1, 1]


def test_tapping_the_last_block_drops_only_what_follows() -> None:
    model = ToyDiT()
    whole = copy.deepcopy(model)
    teacher = teacher_of(model, "blocks.3")
    teacher(*CALL)
    assert pruned(model) == {"final_layer"}
    assert_as_before(teacher, whole, "blocks.3")


@pytest.mark.parametrize("layer", ["blocks.1.fc1", "blocks.1"])
def test_an_inner_module_may_be_tapped(layer: str) -> None:
    model = ToyDiT()
    whole = copy.deepcopy(model)
    teacher = teacher_of(model, layer)
    teacher(*CALL)
    assert ("blocks.1.fc2" in pruned(model)) == (layer == "blocks.1.fc1")
    assert_as_before(teacher, whole, layer)


def test_tied_weights_survive() -> None:
    model = ToyDiT()
    model.final_layer.weight = model.blocks[0].proj.weight  # dropped there, kept here
    whole = copy.deepcopy(model)
    teacher = teacher_of(model)
    teacher(*CALL)
    assert "final_layer" in pruned(model)
    assert_as_before(teacher, whole)


class WithAttention(ToyDiT):
    """Its attention's output projection is used without being called."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.blocks[0].register_forward_hook(lambda module, args, output: output + self.attend(output))

    def attend(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


def test_the_output_projection_of_multihead_attention_survives() -> None:
    model = WithAttention()
    teacher = teacher_of(model)
    expected = teacher(*CALL)
    assert not any("attention" in name for name in pruned(model))
    assert "attention.out_proj.weight" in teacher.model.state_dict()
    torch.testing.assert_close(teacher(*CALL), expected)


class LooksAhead(ToyDiT):
    """Reads later modules before the tap without calling them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        for block in self.blocks:
            block._gain = 0.3

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if self.how == "attribute":
            t = t * (1 + 0.1 * self.blocks[3].fc1.bias.mean())
        elif self.how == "swallowed":
            try:
                t = t * (1 + 0.1 * self.blocks[3].fc1.bias.mean())
            except RuntimeError:
                t = 0 * t
        elif self.how == "private":
            t = t * (1 + 0.1 * sum(block._gain for block in self.blocks))
        elif self.how == "hasattr":
            t = t * (0.5 if hasattr(self.blocks[3], "nothing") else 0.7)
        elif self.how == "length":
            t = t * len(self.blocks) / 10
        elif self.how == "iterated":
            t = t * sum(1 for _ in self.blocks) / 10
        return super().forward(x, t, y)


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        ("attribute", {"blocks.3"}),
        ("swallowed", {"blocks.3"}),
        ("hasattr", {"blocks.3"}),
        ("private", {"blocks.2", "blocks.3"}),
        ("length", set()),
        ("iterated", set()),
    ],
)
def test_a_model_that_looks_at_a_later_module_gets_it_back(how: str, kept: set[str]) -> None:
    model = LooksAhead(how)
    whole = copy.deepcopy(model)
    teacher = teacher_of(model)
    teacher(*CALL)
    assert pruned(model) == {"blocks.2", "blocks.3", "final_layer"} - kept
    assert_as_before(teacher, whole)


class HoldsElsewhere(ToyDiT):
    """Uses the weights of a module that it never calls, and that it holds beside its tree of modules too."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.extra = extra = nn.Linear(16, 16)
        self.held = {
            "tuple": (extra,),
            "bound method": extra.forward,
            "closure": lambda x: F.linear(x, extra.weight),
            "default": lambda x, inner=extra: F.linear(x, inner.weight),
            "keyword": lambda x, *, inner=extra: F.linear(x, inner.weight),
            "parameter": [extra.weight],
        }[how]

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if isinstance(self.held, tuple):
            t = t + F.linear(torch.ones(16), self.held[0].weight).mean()
        elif isinstance(self.held, list):
            t = t + self.held[0].mean()
        else:
            t = t + self.held(torch.ones(16)).mean()
        return super().forward(x, t, y)


@pytest.mark.parametrize("how", ["tuple", "bound method", "closure", "default", "keyword", "parameter"])
def test_a_module_that_the_model_holds_elsewhere_is_kept_and_saved(how: str, tmp_path: Path) -> None:
    model = HoldsElsewhere(how)
    teacher = teacher_of(model)
    expected = teacher(*CALL)
    assert pruned(model) == {"blocks.2", "blocks.3", "final_layer"}
    teacher.save_pretrained(tmp_path / "teacher")
    assert "extra.weight" in load_file(tmp_path / "teacher" / "model.safetensors")
    torch.testing.assert_close(teacher(*CALL), expected, rtol=0, atol=0)


def test_a_part_that_all_blocks_share_keeps_none_of_them() -> None:
    model = ToyDiT()
    table = nn.Linear(2, 2)  # never called, but used by blocks that are kept whole, such as one of rotary angles
    for block in model.blocks:
        block.table = table
    whole = copy.deepcopy(model)
    teacher = teacher_of(model)
    teacher(*CALL)
    assert pruned(model) == {"blocks.2", "blocks.3", "final_layer"}
    assert_as_before(teacher, whole)


def test_one_block_by_many_names_is_dropped_by_all_of_them() -> None:
    model = ToyDiT()
    model.tail = nn.ModuleList([model.blocks[3]] * 3)
    whole = copy.deepcopy(model)
    teacher = teacher_of(model)
    teacher(*CALL)
    assert pruned(model) == {"blocks.2", "blocks.3", "final_layer", "tail.0", "tail.1", "tail.2"}
    assert_as_before(teacher, whole)


class CountsItself(ToyDiT):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, t * len(list(self.parameters())) / 100, y)


def test_a_model_that_changes_when_modules_go_is_kept_whole_with_a_warning() -> None:
    model = CountsItself()
    whole = copy.deepcopy(model)
    teacher = teacher_of(model)
    with pytest.warns(UserWarning, match="was kept whole"):
        teacher(*CALL)
    assert pruned(model) == set()
    assert_as_before(teacher, whole)


class TwoPaths(ToyDiT):
    def forward(self, x: Tensor, t: Tensor, y: Tensor, extra: float = 0.0) -> Tensor:
        if extra:
            t = t + extra * self.blocks[3](torch.zeros(1, 4, 16), torch.zeros(1, 16)).mean()
        return super().forward(x, t, y)


def test_a_pruned_module_that_a_later_call_takes_says_its_name() -> None:
    model = TwoPaths()
    teacher = teacher_of(model)
    teacher(*CALL)
    with pytest.raises(PrunedModuleError) as error:
        teacher(*CALL, extra=1.0)
    for part in ("Module 'blocks.3' of the teacher was used, but it was dropped", "Give build_teacher an example="):
        assert part in str(error.value)
    taught = teacher_of(TwoPaths(), example=(*CALL, 1.0))  # as the message says
    assert taught(*CALL, extra=1.0).shape == (4, 16, 16)
    assert taught(*CALL).shape == (4, 16, 16)


class Swallows(ToyDiT):
    """Looks at a later module in some calls only, and goes on without it where that fails."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if t.mean() > 0.5 and self.how == "default":
            t = t * getattr(self.blocks[3], "gain", 1.0)
        elif t.mean() > 0.5:
            with contextlib.suppress(Exception):
                t = t + self.blocks[3](torch.zeros(1, 4, 16), torch.zeros(1, 16)).mean()
        return super().forward(x, t, y)


@pytest.mark.parametrize("how", ["default", "suppressed"])
def test_a_pruned_module_says_its_name_where_the_model_goes_on_without_it(how: str) -> None:
    teacher = teacher_of(Swallows(how))
    x, _, y = CALL
    expected = teacher(x, torch.full((4,), 0.2), y)
    for _ in range(2):
        with pytest.raises(PrunedModuleError, match=r"Module 'blocks\.3' of the teacher was used, but it was dropped"):
            teacher(x, torch.full((4,), 0.8), y)
    torch.testing.assert_close(teacher(x, torch.full((4,), 0.2), y), expected, rtol=0, atol=0)


def test_a_failing_first_call_leaves_the_teacher_as_it_was() -> None:
    model = ToyDiT()
    whole = copy.deepcopy(model)
    teacher = teacher_of(model)
    with pytest.raises(RuntimeError):
        teacher(B["x"][:, :3], B["t"], B["y"])
    assert pruned(model) == set()
    assert_as_before(teacher, whole)


@pytest.mark.parametrize("touch", [lambda p: p.weight, lambda p: p(1), lambda p: p[0], iter, len])
def test_whatever_touches_a_pruned_module_raises_and_is_noted(touch: type) -> None:
    module = Pruned("blocks.9")
    with pytest.raises(PrunedModuleError, match=r"Module 'blocks\.9' of the teacher was used"):
        touch(module)
    assert module.touched


def test_a_pruned_module_copies_pickles_and_prints() -> None:
    module = nn.Sequential(nn.Linear(2, 2), Pruned("1"))
    file = io.BytesIO()
    torch.save(module, file)
    for other in (copy.deepcopy(module), torch.load(io.BytesIO(file.getvalue()), weights_only=False)):
        assert pruned(other) == {"1"}
        assert "Pruned" in repr(other)
        assert list(other.state_dict()) == ["0.weight", "0.bias"]
        assert other.to(torch.float64).eval().requires_grad_(False) is other
        with pytest.raises(PrunedModuleError):
            other(torch.zeros(1, 2, dtype=torch.float64))
