"""Dropping what a teacher never uses: exact, or an error; and its memory is free."""

from __future__ import annotations

import contextlib
import copy
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plain
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import ToyDiT, batch

import selftrans_reg as st
from selftrans_reg.errors import PrunedModuleError
from selftrans_reg.truncate import dropped_names

B = batch(4)
CALL = (B["x"], B["t"], B["y"])
USUAL = {"blocks.2", "blocks.3", "final_layer"}


def teacher_of(model: nn.Module, layer: str = "blocks.1", **settings: Any) -> st.CFGFeatureTeacher:
    return st.build_teacher(model, None, layer=layer, guidance_scale=3.0, null={"y": 10}, hidden_size=16, **settings)


def truncated(model: nn.Module, layer: str = "blocks.1") -> set[str]:
    """What a teacher drops at its first call, once its features are known to be those of the whole model."""
    null = torch.full_like(B["y"], 10)
    expected = plain.guided(model, layer, 3.0, CALL, (B["x"], B["t"], null))
    teacher = teacher_of(model, layer)
    for _ in range(3):
        torch.testing.assert_close(teacher(*CALL), expected, **plain.TOLERANCE)
    return set(dropped_names(teacher.model))


@pytest.mark.parametrize("example", [None, dict(zip("xty", CALL, strict=True))], ids=["at the first call", "example="])
def test_what_never_runs_is_dropped_and_its_memory_is_free(example: Any, tmp_path: Path) -> None:
    model = ToyDiT(depth=6)
    memory = [weakref.ref(p) for p in model.blocks[3].parameters()]
    names, whole = set(model.state_dict()), sum(p.nbytes for p in model.parameters())
    teacher = teacher_of(model, example=example)
    if example is None:
        with pytest.raises(RuntimeError):
            teacher(B["x"][:, :3], B["t"], B["y"])
        assert set(teacher.model.state_dict()) == names
        teacher(*CALL)
    assert set(dropped_names(model)) == {"blocks.2", "blocks.3", "blocks.4", "blocks.5", "final_layer"}
    assert set(teacher.model.state_dict()) == {n for n in names if not n.startswith(tuple(dropped_names(model)))}
    assert not any(reference() is not None for reference in memory)
    teacher.save_pretrained(tmp_path / "teacher")
    kept = sum(p.nbytes for p in teacher.parameters())
    assert kept <= 0.4 * whole
    assert (tmp_path / "teacher" / "model.safetensors").stat().st_size <= kept + 5000  # names and settings


@pytest.mark.parametrize("truncate", [True, False])
def test_later_blocks_run_once_to_see_whether_the_layer_runs_again_or_always(truncate: bool) -> None:
    model = ToyDiT()
    expected = teacher_of(copy.deepcopy(model))(*CALL)
    later: list[int] = []
    model.blocks[3].register_forward_pre_hook(lambda module, args: later.append(len(args[0])))
    teacher = teacher_of(model, truncate=truncate)
    for _ in range(3):
        torch.testing.assert_close(teacher(*CALL), expected)
    assert later == ([4] if truncate else [8, 4, 1, 8, 8])
    assert bool(dropped_names(model)) is truncate


@pytest.mark.parametrize(
    ("layer", "gone"),
    [("blocks.3", {"final_layer"}), ("blocks.1.fc1", {"blocks.1.fc2", *USUAL}), ("blocks.0", {"blocks.1", *USUAL})],
)
def test_any_module_may_be_tapped(layer: str, gone: set[str]) -> None:
    assert truncated(ToyDiT(), layer) == gone


ONES = torch.ones(1, 16)
USES: dict[str, Callable[[Any], Any]] = {  # what a model does with what lies behind its layer, or nowhere in its path
    "": lambda model: 0.0,
    "attention": lambda model: model.attention(ONES, ONES, ONES)[0].mean(),  # uses its out_proj without calling it
    "closure": lambda model: model.held(ONES).mean(),
    "attribute": lambda model: model.blocks[3].fc1.bias.mean(),
    "operator": lambda model: (torch.ones(32) * model.blocks[3].fc1.bias).mean(),
    "call": lambda model: model.blocks[3](torch.zeros(1, 4, 16), torch.zeros(1, 16)).mean(),
    "looks": lambda model: (len(model.blocks) + hasattr(model.blocks[3], "no") + sum(1 for _ in model.blocks)) / 10,
    "counts its weights": lambda model: len(list(model.parameters())) / 100,
}


class Unusual(ToyDiT):
    """Uses something in a way that no call of a module shows; or in some calls only."""

    def __init__(self, how: str = "", seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.how = how
        self.extra = extra = nn.Linear(16, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        if how == "closure":
            self.held = lambda x: F.linear(x, extra.weight)
        if how == "tied":
            self.final_layer.weight = self.blocks[0].proj.weight
        if how == "shared part":
            for block in self.blocks:
                block.table = extra
                block.register_forward_hook(lambda block, args, output: block.table(output))
        if how == "many names":
            self.tail = nn.ModuleList([self.blocks[3]] * 3)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, use: str = "", careful: bool = False) -> Tensor:
        with contextlib.suppress(Exception if careful else ()):
            t = t + USES.get(use or self.how, USES[""])(self)
        return super().forward(x, t, y)


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        ("closure", {"extra"}),
        ("attention", {"attention"}),
        ("attribute", {"blocks.3"}),
        ("looks", set()),
        ("tied", {"final_layer"}),
        ("shared part", {"extra", "blocks.2", "blocks.3"}),  # by the shared part's names alone
        ("many names", set()),
    ],
)
def test_what_is_used_without_being_called_is_kept_and_saved(how: str, kept: set[str], tmp_path: Path) -> None:
    model = Unusual(how)
    truncated(model)
    left = {".".join(key.split(".")[: 2 if key.startswith("blocks") else 1]) for key in model.state_dict()}
    assert left - {"x_embedder", "t_embedder", "y_embedder", "blocks.0", "blocks.1"} == kept
    if how in ("attribute", "shared part"):
        assert not any(key.startswith("blocks.3.qkv") for key in model.state_dict())
    teacher = teacher_of(Unusual(how))
    expected = teacher(*CALL)
    teacher.save_pretrained(tmp_path / "teacher")
    loaded = st.CFGFeatureTeacher.from_pretrained(tmp_path / "teacher", model=lambda: Unusual(how, seed=1))
    torch.testing.assert_close(loaded(*CALL), expected, **plain.TOLERANCE)


def test_a_model_that_changes_when_weights_go_is_kept_whole_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="was kept whole"):
        assert truncated(Unusual("counts its weights")) == set()


@pytest.mark.parametrize("careful", [False, True])  # a model that goes on without what fails
@pytest.mark.parametrize("how", ["call", "attribute", "operator"])
def test_what_was_dropped_says_its_name_when_a_later_call_uses_it(how: str, careful: bool) -> None:
    teacher = teacher_of(Unusual())
    expected = teacher(*CALL)
    for copied in (teacher, copy.deepcopy(teacher), pickle.loads(pickle.dumps(teacher))) * 2:
        with pytest.raises(PrunedModuleError, match=r"Module 'blocks\.3' of the teacher was used, but"):
            copied(*CALL, how, careful)
        torch.testing.assert_close(copied(*CALL), expected, rtol=0, atol=0)
    taught = teacher_of(Unusual(), example=(*CALL, how))  # as the message says
    assert taught(*CALL, how).shape == taught(*CALL).shape == (4, 16, 16)
