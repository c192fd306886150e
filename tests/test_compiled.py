"""A teacher whose blocks are compiled."""

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from toys import ToyBlock, ToyDiT, batch

import selftrans_reg as st
from selftrans_reg.compiled import pad_rows


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """Counts graphs and runs them eagerly: what a graph computes is the backend's business."""
    counter = CompileCounterWithBackend("eager")
    compile_with_torch = torch.compile

    @functools.wraps(compile_with_torch)  # the options that this version knows are read off the signature
    def compile_and_count(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        return compile_with_torch(function, backend=counter, **options)

    monkeypatch.setattr(torch, "compile", compile_and_count)
    torch._dynamo.reset()
    return counter


def new_teacher(model: ToyDiT, **settings: bool) -> st.CFGFeatureTeacher:
    return st.build_teacher(
        copy.deepcopy(model), None, layer="blocks.2", guidance_scale=3.0, null={"y": 10}, **settings
    )


def test_compiled_teacher_gives_the_same_features_from_few_graphs(counter: CompileCounterWithBackend) -> None:
    model = ToyDiT(depth=6)
    eager, compiled = new_teacher(model), new_teacher(model, compile=True)
    b = batch(32)
    for rows in (32, 9, 10, 11, 3, 30, 5, 7, 13, 1, 17, 25):
        call = [b[name][:rows] for name in ("x", "t", "y")]
        features = compiled(*call)
        assert len(features) == rows
        torch.testing.assert_close(features, eager(*call), rtol=1e-5, atol=1e-5)
    # One graph for all blocks at the first size, and those of changing size; six blocks would need many more alone.
    assert 1 <= counter.frame_count <= 3


def test_compiled_teacher_leaves_the_students_cache_alone(counter: CompileCounterWithBackend) -> None:
    """The blocks of both share one class, and with it a cache of eight graphs: the teacher's are kept elsewhere."""
    if "isolate_recompiles" not in inspect.signature(torch.compile).parameters:
        pytest.skip("this PyTorch keeps one cache for each function")
    teacher = new_teacher(ToyDiT(depth=4), compile=True)
    b = batch(16)
    for rows in (16, 9, 3, 13):
        teacher(b["x"][:rows], b["t"][:rows], b["y"][:rows])
    assert counter.frame_count > 0
    assert not torch._dynamo.eval_frame._get_cache_entries_for_region(ToyBlock.forward, -1)


@pytest.mark.parametrize(("rows", "padded"), [(1, 1), (18, 18), (32, 32), (33, 34), (61, 62), (129, 136), (500, 512)])
def test_padding_repeats_the_last_row(rows: int, padded: int) -> None:
    tensor = torch.arange(rows * 2.0).reshape(rows, 2)
    result = pad_rows(tensor)
    assert len(result) == padded
    assert torch.equal(result[:rows], tensor)
    assert (result[rows:] == tensor[-1]).all()


def test_padding_costs_little_and_leaves_few_sizes() -> None:
    padded = {rows: len(pad_rows(torch.empty(rows, 0))) for rows in range(1, 2049)}
    assert all(rows <= size <= rows * (1 + 1 / 16) for rows, size in padded.items())
    for octave in (32, 64, 512, 1024):
        assert len({padded[rows] for rows in range(octave + 1, 2 * octave + 1)}) == 16


def test_a_block_whose_forward_was_patched_keeps_it(counter: CompileCounterWithBackend) -> None:
    """As accelerate's hooks patch it: compiling the class's forward would undo that after the first call."""
    teachers = [new_teacher(ToyDiT(depth=3), compile=compiled) for compiled in (False, True)]
    for teacher in teachers:
        block = teacher.model.blocks[1]
        block.forward = functools.partial(lambda inner, x, c: 2 * inner(x, c), block.forward)
    b = batch(8)
    for _ in range(2):
        expected, found = (teacher(b["x"], b["t"], b["y"]) for teacher in teachers)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert counter.frame_count > 0
