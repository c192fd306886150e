"""torch.compile in every way that people use it, and a teacher's compiled blocks: right values, no graph too many."""

import copy
import functools
import inspect
import itertools
from collections.abc import Iterator

import pytest
import torch
from loops import (
    assert_same,
    denoising,
    gradients,
    new_criterion,
    new_teacher,
    noisy_batch,
    plain_gradients,
    student,
    total,
)
from torch import Tensor, nn
from torch._dynamo.utils import counters
from toys import ToyBlock, ToyDiT, batch

import selftrans_reg as st
from selftrans_reg.errors import CaptureError
from selftrans_reg.truncate import blocks_of, pad_rows

TIMES = [0.35, 0.5, 0.1, 0.9]
KNOWN = inspect.signature(torch.compile).parameters

# Dynamo looks at the .grad of every tensor, and hides the warning of its own looking in a way that pytest undoes.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def in_place(model: nn.Module, **options: object) -> nn.Module:
    model.compile(**options)
    return model


def per_block(model: nn.Module, **options: object) -> nn.Module:
    for block in getattr(model, "blocks", model):
        block.compile(**options)
    return model


WAYS = {"whole": torch.compile, "in place": in_place, "per block": per_block}


@pytest.mark.parametrize("way", WAYS)
def test_gradients_and_graphs(way: str, device: torch.device) -> None:
    """A step trains and then samples; there are as many graphs as without the library, from the first step on."""
    b, counted, found = noisy_batch(TIMES).to(device), [], []
    wanted = {name: tensor for name, tensor in plain_gradients(b).items() if name.startswith("0.")}
    for attached in (None, "before", "after"):
        torch.compiler.reset()
        counters.clear()
        model = student(device)
        criterion = new_criterion(model) if attached == "before" else None
        compiled = WAYS[way](model, backend="aot_eager", fullgraph=True)
        criterion = new_criterion(compiled) if attached == "after" else criterion
        for step in range(10):
            compiled.zero_grad()
            loss = denoising(compiled, b).mean() if criterion is None else total(compiled, criterion, b)
            loss.backward()
            compiled.eval()
            with torch.no_grad():
                compiled(b.x_t, b.t, b.y)
            compiled.train()
            counted.append(graphs())
            if criterion is not None and step == 4:
                assert_same(gradients(compiled), wanted)
                criterion.weight = 0.0  # it only measures: the gradients are, to the bit, what they were without it
        found.append(gradients(compiled))
    assert_same(found[1], found[0], tolerance=0.0)
    assert_same(found[2], found[0], tolerance=0.0)
    assert counted == counted[:1] * 30


def attached_late(case: str) -> tuple[nn.Module, st.SelfTransLoss]:
    """A model and its criterion, whose code was compiled without the hook, or for another layer's."""
    model = student()
    if case == "one function for all blocks":
        function = torch.compile(lambda block, x, c: block(x, c), backend="eager")
        blocks = list(model.blocks)
        model.through_blocks = lambda tokens, c: functools.reduce(lambda x, b: function(b, x, c), blocks, tokens)
        return model, new_criterion(model)
    if case == "beside another model":  # of its class, such as a baseline
        baseline, model = torch.compile(student(), backend="eager"), torch.compile(model, backend="eager")
        denoising(baseline, noisy_batch(TIMES)).mean().backward()
        criterion = new_criterion(model)
        denoising(baseline, noisy_batch(TIMES)).mean().backward()
        return model, criterion
    model = WAYS[case](model, backend="eager")
    denoising(model, noisy_batch(TIMES))
    return model, new_criterion(model)


@pytest.mark.parametrize("case", ["whole", "in place", "beside another model", "one function for all blocks"])
def test_code_compiled_without_the_hook_is_an_error_and_the_advice_works(case: str) -> None:
    b = noisy_batch(TIMES)
    model, criterion = attached_late(case)
    with pytest.raises(CaptureError, match=r"Layer 'blocks\.1' did not run in the last forward"):
        total(model, criterion, b)
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        torch._dynamo.reset()
        for again, its_criterion in (
            (model, criterion),
            attached_late(case),
        ):  # as the session goes on; in a new one
            again.zero_grad()
            total(again, its_criterion, b).backward()
            assert_same(gradients(again, its_criterion), plain_gradients(b))


def test_blocks_compiled_one_by_one_may_be_tapped_at_any_time() -> None:
    model, criterion = attached_late("per block")
    total(model, criterion, noisy_batch(TIMES)).backward()
    assert_same(gradients(model, criterion), plain_gradients(noisy_batch(TIMES)))


@pytest.mark.parametrize("what", ["the model's call", "its call", "torch.compile(criterion)", "criterion.compile()"])
def test_a_compiled_function_may_call_the_model_or_the_criterion_which_makes_no_graph(what: str) -> None:
    model = student()
    criterion = run = new_criterion(model)
    loss = denoising
    if what == "the model's call":
        loss = torch.compile(denoising, backend="eager")
    elif what == "its call":
        run = torch.compile(lambda loss, latents: criterion(loss, latents=latents), backend="eager")
    elif what == "torch.compile(criterion)":
        run = torch.compile(criterion, backend="eager")
    else:
        criterion.compile(backend="eager")
    for n in (4, 3, 2, 1):
        b = noisy_batch(TIMES[:n])
        model.zero_grad(), criterion.zero_grad()
        run(loss(model, b), latents=b.latents).total.backward()
        assert_same(gradients(model, criterion), plain_gradients(b))
    assert what == "the model's call" or graphs() <= 1


class OneBlock(nn.Module):  # the smallest with a layer to tap: inductor takes a minute for three transformer blocks
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 8)])

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.blocks[0](x))


@pytest.mark.parametrize("way", WAYS)
def test_inductor(way: str, device: torch.device) -> None:
    model, x = OneBlock().to(device), torch.randn(2, 3, 4).to(device)
    (model(x).square().mean() + model.blocks[0](x).pow(3).mean()).backward()
    wanted = gradients(model)
    graphed = {"mode": "reduce-overhead"} if way == "whole" and device.type == "cuda" else {}
    model = WAYS[way](model, fullgraph=True, **graphed)
    with st.FeatureTap(model, "blocks.0") as tap:
        for _ in range(4):  # of CUDA graphs two warm-ups, one recording, one replay
            torch.compiler.cudagraph_mark_step_begin()
            model.zero_grad()
            (model(x).square().mean() + tap.pop().pow(3).mean()).backward()
            assert_same(gradients(model), wanted)


class OwnBlock(ToyBlock):
    """Holds a number of its own, a constant in its graph; and looks something up, as diffusers' blocks do."""

    numbers = itertools.count(1)

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.number, self.table = next(self.numbers), nn.Embedding(4, width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return super().forward(x, c) / self.number + self.table(torch.ones(len(x), dtype=torch.long))[:, None]


class OwnBlocks(ToyDiT):
    block = OwnBlock


class TestTeacher:
    """A teacher whose blocks are compiled."""

    @pytest.fixture(autouse=True)
    def _eager(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What a graph computes is the backend's business."""
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))

    def features_agree(
        self, eager: nn.Module, model: nn.Module, layer: str, sizes: tuple[int, ...], **more: bool
    ) -> st.CFGFeatureTeacher:
        """Of an eager teacher and a compiled one, which is returned, at batches of several sizes."""
        b, teachers = batch(40), (new_teacher(eager, layer=layer), new_teacher(model, layer=layer, **more))
        for rows in sizes:
            wanted, features = (teacher(b["x"][:rows], b["t"][:rows], b["y"][:rows]) for teacher in teachers)
            assert len(features) == rows
            torch.testing.assert_close(features, wanted, rtol=1e-4, atol=1e-4)
        return teachers[1]

    @pytest.mark.skipif("isolate_recompiles" not in KNOWN, reason="one cache for both there")
    def test_beside_a_compiled_student_the_gradients_are_right(self) -> None:
        model = per_block(student())
        criterion = new_criterion(model, teacher=new_teacher(compile=True))
        with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
            for inside in (4, 1, 3, 0, 2):  # the teacher's batch has another size each time
                b = noisy_batch([0.4] * inside + [0.9] * (4 - inside))
                model.zero_grad(), criterion.zero_grad()
                total(model, criterion, b).backward()
                assert_same(gradients(model, criterion), plain_gradients(b))

    @pytest.mark.skipif("recompile_limit" not in KNOWN, reason="one limit for all code there")
    @pytest.mark.parametrize(("kind", "least", "most"), [(ToyDiT, 1, 3), (OwnBlocks, 11, 33)])
    def test_the_same_features_from_few_graphs(self, kind: type[ToyDiT], least: int, most: int) -> None:
        """One graph for all blocks at the first size, and those of changing size; blocks that differ need their own."""
        model, sizes = kind(depth=12), (40, 9, 33, 3, 35, 1, 17)  # twice 33 are padded to 68
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            teacher = self.features_agree(copy.deepcopy(model), model, "blocks.10", sizes, compile=True)
        assert least <= graphs() <= most
        if "isolate_recompiles" in KNOWN:  # student and teacher share a class
            assert not torch._dynamo.eval_frame._get_cache_entries_for_region(kind.block.forward, -1)
        counted = []
        for first in (True, False):  # a call that also checks its indices compiles nothing for that
            torch.compiler.reset(), counters.clear()
            for check in (first, False):
                teacher.features(teacher.spec.bind(noisy_batch(TIMES)[1:4], {}), check_indices=check)
            counted.append(graphs())
        assert counted[0] == counted[1] > 0

    @pytest.mark.parametrize("way", ["whole", "blocks", "a block's forward is patched"])
    def test_the_model_may_be_compiled_already_or_have_a_patched_block(self, way: str) -> None:
        """As accelerate's hooks patch it: compiling the class's forward would undo that after the first call."""
        eager, model = ToyDiT(), ToyDiT()
        patched = way == "a block's forward is patched"
        if way == "whole":
            model = torch.compile(model)
        elif way == "blocks":
            model.blocks = nn.ModuleList(torch.compile(block, fullgraph=True) for block in model.blocks)
        else:
            for block in (eager.blocks[1], model.blocks[1]):
                block.forward = functools.partial(lambda inner, x, c: 2 * inner(x, c), block.forward)
        self.features_agree(eager, model, "blocks.2", (4, 4, 3), compile=patched)
        assert graphs() > 0

    def test_a_model_without_blocks_to_compile_is_refused(self) -> None:
        with pytest.raises(st.SettingError, match=r"compile=True compiles the blocks of an nn\.ModuleList"):
            new_teacher(ToyDiT(lists={"mid_block": 0}), layer="mid_block", compile=True)

    def test_blocks_are_found_in_other_containers(self) -> None:
        blocks = list(ToyDiT(depth=6).blocks)
        nested = nn.ModuleList([nn.ModuleList(blocks[:3]), nn.ModuleList(blocks[3:])])
        named = nn.ModuleDict({f"s{i}": block for i, block in enumerate(blocks)})
        for container in (nested, named, nn.Sequential(*blocks)):  # the last as timm's
            assert blocks_of(nn.ModuleDict({"head": nn.Linear(2, 2), "stages": container})) == blocks

    def test_padding_repeats_the_last_row_costs_little_and_leaves_few_sizes(self) -> None:
        tensor = torch.arange(33 * 2.0).reshape(33, 2)
        assert torch.equal(pad_rows(tensor), torch.cat([tensor, tensor[-1:]]))
        padded = {rows: len(pad_rows(torch.empty(rows, 0))) for rows in range(1, 2049)}
        assert all(rows <= size <= rows * (1 + 1 / 16) for rows, size in padded.items())
        for octave in (32, 64, 512, 1024):
            assert len({padded[rows] for rows in range(octave + 1, 2 * octave + 1)}) == 16
