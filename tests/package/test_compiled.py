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
from selftrans_reg.truncate import pad_rows


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


class Nested(ToyDiT):
    """Blocks in other containers than a list."""

    def __init__(self, container: str) -> None:
        super().__init__(depth=6)
        blocks = list(self.blocks)
        if container == "lists":
            self.stages = torch.nn.ModuleList([torch.nn.ModuleList(blocks[:3]), torch.nn.ModuleList(blocks[3:])])
        elif container == "dict":
            self.stages = torch.nn.ModuleDict({f"s{i}": block for i, block in enumerate(blocks)})
        elif container == "sequential":  # as timm's, which take one argument: here they are iterated
            self.stages = torch.nn.Sequential(*blocks)
        del self.blocks

    def through_blocks(self, tokens: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        for block in (m for m in self.stages.modules() if isinstance(m, ToyBlock)):
            tokens = block(tokens, c)
        return tokens


@pytest.mark.parametrize(("container", "layer"), [("lists", "1.0"), ("dict", "s3"), ("sequential", "3")])
def test_blocks_in_other_containers_are_compiled(
    container: str, layer: str, counter: CompileCounterWithBackend
) -> None:
    model = Nested(container)
    settings = {"layer": f"stages.{layer}", "guidance_scale": 3.0, "null": {"y": 10}}
    eager, compiled = (st.build_teacher(copy.deepcopy(model), None, **settings, compile=c) for c in (False, True))
    b = batch(4)
    for _ in range(3):
        found, wanted = (teacher(b["x"], b["t"], b["y"]) for teacher in (compiled, eager))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1
    assert counter.op_count > 0


def test_a_model_without_blocks_to_compile_is_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.SiLU(), torch.nn.Linear(2, 2))
    model.forward = lambda x, t, y: x  # so that x, t and y have names
    settings = {"layer": "0", "guidance_scale": 3.0, "null": {"y": 10}}
    with pytest.raises(st.SettingError, match=r"compile=True compiles the blocks of an nn\.ModuleList") as error:
        st.build_teacher(model, None, **settings, compile=True)
    assert error.match("Sequential has none")
    assert error.match("Leave compile=True out, and compile the model's parts yourself")


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
    model = ToyDiT(depth=12, block=KnowsItsPlace)
    settings = {"layer": "blocks.10", "guidance_scale": 3.0, "null": {"y": 10}}
    eager, compiled = (st.build_teacher(copy.deepcopy(model), None, **settings, compile=c) for c in (False, True))
    b = batch(8)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for rows in (8, 5, 3, 8):
            call = [b[name][:rows] for name in ("x", "t", "y")]
            torch.testing.assert_close(compiled(*call), eager(*call), rtol=1e-4, atol=1e-5)
    assert counter.frame_count >= 11


class WithTable(ToyBlock):
    """Looks something up, as the blocks of diffusers' DiT do."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.table = torch.nn.Embedding(4, width)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return super().forward(x, c) + self.table(torch.ones(len(x), dtype=torch.long))[:, None]


def test_checking_indices_compiles_nothing_more(counter: CompileCounterWithBackend) -> None:
    b = batch(4)
    graphs = []
    for checks in ([False] * 5, [True, True, True, False, False]):
        torch._dynamo.reset()
        counter.frame_count = 0
        teacher = st.build_teacher(
            ToyDiT(block=WithTable), None, layer="blocks.2", guidance_scale=3.0, null={"y": 10}, compile=True
        )
        for check in checks:
            teacher.features(teacher.spec.bind((b["x"], b["t"], b["y"]), {}), check_indices=check)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[1] > 0


def compiled_whole(model: ToyDiT) -> torch.nn.Module:
    return torch.compile(model)


def compiled_blocks(model: ToyDiT) -> torch.nn.Module:
    model.blocks = torch.nn.ModuleList(torch.compile(block, fullgraph=True) for block in model.blocks)
    return model


@pytest.mark.parametrize("way", [compiled_whole, compiled_blocks])
def test_a_teacher_may_be_compiled_already(
    way: Callable[[ToyDiT], torch.nn.Module], counter: CompileCounterWithBackend
) -> None:
    model = ToyDiT(depth=4)
    settings = {"layer": "blocks.2", "guidance_scale": 3.0, "null": {"y": 10}}
    eager = st.build_teacher(copy.deepcopy(model), None, **settings)
    compiled = st.build_teacher(way(copy.deepcopy(model)), None, **settings)
    b = batch(4)
    for _ in range(3):
        found, expected = (teacher(b["x"], b["t"], b["y"]) for teacher in (compiled, eager))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert counter.frame_count > 0


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
