"""torch.compile in every way that people use it: right gradients, no graph more than without the library."""

import functools
import inspect
from collections.abc import Callable, Iterator

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
from toys import ToyDiT

from selftrans_reg import FeatureTap, SelfTransLoss
from selftrans_reg.errors import CaptureError

TIMES = [0.35, 0.5, 0.1, 0.9]

OPTIONS = {"backend": "aot_eager", "fullgraph": True}

# Dynamo looks at the .grad of every tensor, and hides the warning of its own looking in a way that pytest undoes.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def in_place(model: ToyDiT, **options: object) -> nn.Module:
    model.compile(**options)
    return model


def per_block(model: ToyDiT, **options: object) -> nn.Module:
    for block in model.blocks:
        block.compile(**options)
    return model


WAYS = {"whole": torch.compile, "in place": in_place, "per block": per_block}


@pytest.mark.parametrize("way", WAYS)
def test_gradients_and_graphs(way: str, device: torch.device) -> None:
    """A step trains and then samples; there are as many graphs as without the library, from the first step on."""
    b, graphs, found = noisy_batch(TIMES).to(device), [], []
    wanted = {name: tensor for name, tensor in plain_gradients(b).items() if name.startswith("0.")}
    for attached in (None, "before", "after"):
        torch.compiler.reset()
        counters.clear()
        model = student(device)
        criterion = new_criterion(model) if attached == "before" else None
        compiled = WAYS[way](model, **OPTIONS)
        criterion = new_criterion(compiled) if attached == "after" else criterion
        for step in range(10):
            compiled.zero_grad()
            loss = denoising(compiled, b).mean() if criterion is None else total(compiled, criterion, b)
            loss.backward()
            compiled.eval()
            with torch.no_grad():
                compiled(b.x_t, b.t, b.y)
            compiled.train()
            graphs.append(counters["stats"]["unique_graphs"])
            if criterion is not None and step == 4:
                assert_same(gradients(compiled), wanted)
                criterion.weight = 0.0  # it only measures: the gradients are, to the bit, what they were without it
        found.append(gradients(compiled))
    assert_same(found[1], found[0], tolerance=0.0)
    assert_same(found[2], found[0], tolerance=0.0)
    assert graphs == graphs[:1] * 30


def test_blocks_compiled_one_by_one_may_be_tapped_at_any_time() -> None:
    b = noisy_batch(TIMES)
    model = per_block(student(), backend="eager")
    denoising(model, b)
    criterion = new_criterion(model)
    total(model, criterion, b).backward()
    assert_same(gradients(model, criterion), plain_gradients(b))


class Through(nn.ModuleList):
    """Blocks that a model's loop finds inside a function."""

    def __init__(self, blocks: nn.ModuleList, function: Callable[..., Tensor]) -> None:
        super().__init__(blocks._modules.values())
        self.function = function

    def __iter__(self) -> Iterator[Callable[..., Tensor]]:
        return iter([lambda x, c, block=block: self.function(block, x, c) for block in self._modules.values()])


def watched(case: str) -> tuple[nn.Module, SelfTransLoss]:
    """A model and its criterion, whose code was compiled without the hook, or for another layer's."""
    model = student()
    if case == "one function for all blocks":
        model.blocks = Through(model.blocks, torch.compile(lambda block, x, c: block(x, c), backend="eager"))
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
    model, criterion = watched(case)
    with pytest.raises(CaptureError, match=r"Layer 'blocks\.1' did not run in the last forward") as error:
        total(model, criterion, b)
    assert error.match("it may have run code that was compiled without the hook: before this library was attached, for")
    assert error.match(
        r"after torch\._dynamo\.config\.skip_nnmodule_hook_guards = False; call torch\._dynamo\.reset\(\)"
    )
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        torch._dynamo.reset()
        for again, its_criterion in ((model, criterion), watched(case)):  # in a session that goes on; in a new one
            again.zero_grad()
            total(again, its_criterion, b).backward()
            assert_same(gradients(again, its_criterion), plain_gradients(b))


def test_a_compiled_function_around_the_models_call() -> None:
    b = noisy_batch(TIMES)
    model = student()
    criterion = new_criterion(model)
    loss = torch.compile(lambda b: denoising(model, b), backend="eager")
    for _ in range(2):
        model.zero_grad()
        criterion.zero_grad()
        criterion(loss(b), latents=b.latents).total.backward()
        assert_same(gradients(model, criterion), plain_gradients(b))


@pytest.mark.skipif(
    "isolate_recompiles" not in inspect.signature(torch.compile).parameters, reason="one cache for both there"
)
def test_a_compiled_teacher_leaves_the_students_cache_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Student and teacher share a class, so a code object, and what PyTorch caches for it; here two graphs at most."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    model = per_block(student())
    criterion = new_criterion(model, teacher=new_teacher(compile=True))
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        for inside in (4, 1, 3, 0, 2):  # the teacher's batch has another size each time
            b = noisy_batch([0.4] * inside + [0.9] * (4 - inside))
            model.zero_grad()
            criterion.zero_grad()
            total(model, criterion, b).backward()
            assert_same(gradients(model, criterion), plain_gradients(b))
            with torch.no_grad():
                model.eval()(b.x_t, b.t, b.y)
            model.train()


INDUCTORS_OWN_WARNING = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


class TwoLayers(nn.Module):
    """The smallest model with a layer to tap: inductor takes a minute of the CPU for three transformer blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.sin(self.first(x)))


@INDUCTORS_OWN_WARNING
@pytest.mark.parametrize("way", ["whole", "in place", "per layer"])
def test_inductor(way: str, device: torch.device) -> None:
    model: nn.Module = TwoLayers().to(device)
    x = torch.randn(2, 3, 4, device=device)
    (model(x).square().mean() + model.first(x).pow(3).mean()).backward()
    wanted = gradients(model)
    model.zero_grad()
    if way == "per layer":
        model.first.compile(fullgraph=True)
    else:
        model = WAYS[way](model, fullgraph=True)
    with FeatureTap(model, "first") as tap:
        (model(x).square().mean() + tap.pop().pow(3).mean()).backward()
    assert_same(gradients(model), wanted)


@INDUCTORS_OWN_WARNING
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_reduce_overhead() -> None:
    b = noisy_batch(TIMES).to("cuda")
    model = torch.compile(student("cuda"), mode="reduce-overhead", fullgraph=True)
    criterion = new_criterion(model)
    for _ in range(4):  # two warm-ups, one recording, one replay
        torch.compiler.cudagraph_mark_step_begin()
        model.zero_grad()
        criterion.zero_grad()
        total(model, criterion, b).backward()
        assert_same(gradients(model, criterion), plain_gradients(b), tolerance=1e-5)
