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
from selftrans_reg.truncate import blocks_of, pad_rows

B = batch(40)
CALL = (B["x"], B["t"], B["y"])


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


def features_agree(model: ToyDiT, layer: str = "blocks.2", sizes: tuple[int, ...] = (4, 4, 3)) -> None:
    """Of a compiled teacher and an eager one, at batches of several sizes."""
    settings = {"layer": layer, "guidance_scale": 3.0, "null": {"y": 10}}
    eager, compiled = (st.build_teacher(copy.deepcopy(model), None, **settings, compile=c) for c in (False, True))
    for rows in sizes:
        call = [tensor[:rows] for tensor in CALL]
        features = compiled(*call)
        assert len(features) == rows
        torch.testing.assert_close(features, eager(*call), rtol=1e-4, atol=1e-4)


def test_compiled_teacher_gives_the_same_features_from_few_graphs(counter: CompileCounterWithBackend) -> None:
    features_agree(ToyDiT(depth=6), sizes=(40, 9, 10, 33, 3, 35, 5, 37, 13, 1, 17, 25))  # twice 33 are padded to 68
    # One graph for all blocks at the first size, and those of changing size; six blocks would need many more alone.
    assert 1 <= counter.frame_count <= 3
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:  # student and teacher share a class
        assert not torch._dynamo.eval_frame._get_cache_entries_for_region(ToyBlock.forward, -1)


def test_blocks_are_found_in_other_containers() -> None:
    blocks = list(ToyDiT(depth=6).blocks)
    nested = torch.nn.ModuleList([torch.nn.ModuleList(blocks[:3]), torch.nn.ModuleList(blocks[3:])])
    named = torch.nn.ModuleDict({f"s{i}": block for i, block in enumerate(blocks)})
    for container in (nested, named, torch.nn.Sequential(*blocks)):  # the last as timm's
        model = torch.nn.Module()
        model.head, model.stages = torch.nn.Linear(2, 2), container
        assert blocks_of(model) == blocks


def test_a_model_without_blocks_to_compile_is_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.SiLU(), torch.nn.Linear(2, 2))
    model.forward = lambda x, t, y: x  # so that x, t and y have names
    with pytest.raises(st.SettingError, match=r"compile=True compiles the blocks of an nn\.ModuleList") as error:
        st.build_teacher(model, None, layer="0", guidance_scale=3.0, null={"y": 10}, compile=True)
    assert error.match("Sequential has none(?s:.*)Leave compile=True out, and compile the model's parts yourself")


class KnowsItsPlace(ToyBlock):
    """Computes with a number of its own, which each graph holds as a constant."""

    made = 0

    def __init__(self, width: int) -> None:
        super().__init__(width)
        KnowsItsPlace.made += 1
        self.place = KnowsItsPlace.made

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return super().forward(x, c) / self.place


@pytest.mark.skipif(
    "recompile_limit" not in inspect.signature(torch.compile).parameters, reason="one limit for all code there"
)
def test_blocks_that_differ_in_a_number_are_all_compiled(counter: CompileCounterWithBackend) -> None:
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        features_agree(ToyDiT(depth=12, block=KnowsItsPlace), "blocks.10", sizes=(8, 5, 3, 8))
    assert counter.frame_count >= 11


class WithTable(ToyBlock):
    """Looks something up, as the blocks of diffusers' DiT do."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.table = torch.nn.Embedding(4, width)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return super().forward(x, c) + self.table(torch.ones(len(x), dtype=torch.long))[:, None]


def test_checking_indices_compiles_nothing_more(counter: CompileCounterWithBackend) -> None:
    graphs = []
    for checks in ([False] * 5, [True, True, True, False, False]):
        torch._dynamo.reset()
        counter.frame_count = 0
        teacher = st.build_teacher(
            ToyDiT(block=WithTable), None, layer="blocks.2", guidance_scale=3.0, null={"y": 10}, compile=True
        )
        for check in checks:
            teacher.features(teacher.spec.bind(CALL, {}), check_indices=check)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[1] > 0


@pytest.mark.parametrize("way", ["whole", "blocks"])
def test_a_teacher_may_be_compiled_already(way: str, counter: CompileCounterWithBackend) -> None:
    eager, model = ToyDiT(), ToyDiT()
    if way == "blocks":
        model.blocks = torch.nn.ModuleList(torch.compile(block, fullgraph=True) for block in model.blocks)
    settings = {"layer": "blocks.2", "guidance_scale": 3.0, "null": {"y": 10}}
    teachers = [
        st.build_teacher(m, None, **settings) for m in (eager, torch.compile(model) if way == "whole" else model)
    ]
    for _ in range(3):
        torch.testing.assert_close(*(teacher(*CALL) for teacher in teachers), rtol=1e-5, atol=1e-5)
    assert counter.frame_count > 0


def test_padding_repeats_the_last_row_costs_little_and_leaves_few_sizes() -> None:
    tensor = torch.arange(33 * 2.0).reshape(33, 2)
    assert torch.equal(pad_rows(tensor), torch.cat([tensor, tensor[-1:]]))
    padded = {rows: len(pad_rows(torch.empty(rows, 0))) for rows in range(1, 2049)}
    assert all(rows <= size <= rows * (1 + 1 / 16) for rows, size in padded.items())
    for octave in (32, 64, 512, 1024):
        assert len({padded[rows] for rows in range(octave + 1, 2 * octave + 1)}) == 16


def test_a_block_whose_forward_was_patched_keeps_it(counter: CompileCounterWithBackend) -> None:
    """As accelerate's hooks patch it: compiling the class's forward would undo that after the first call."""
    model = ToyDiT(depth=3)
    settings = {"layer": "blocks.2", "guidance_scale": 3.0, "null": {"y": 10}}
    teachers = [st.build_teacher(copy.deepcopy(model), None, **settings, compile=c) for c in (False, True)]
    for teacher in teachers:
        block = teacher.model.blocks[1]
        block.forward = functools.partial(lambda inner, x, c: 2 * inner(x, c), block.forward)
    for _ in range(2):
        torch.testing.assert_close(*(teacher(*CALL) for teacher in teachers), rtol=1e-5, atol=1e-5)
    assert counter.frame_count > 0
