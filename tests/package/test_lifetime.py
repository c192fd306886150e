"""Hooks come and go without a trace: detaching, memory over many steps, copies and files of a hooked model."""

import copy
import gc
import io
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from loops import assert_same, denoising, gradients, new_criterion, noisy_batch, plain_gradients, student, total
from torch import Tensor, nn

import selftrans_reg as st
from selftrans_reg.errors import CaptureError

B = noisy_batch([0.35, 0.5, 0.1, 0.9])


def hooks_of(model: nn.Module) -> int:
    """How many hooks of any kind are on the model's modules, and what torch notes beside them."""
    return sum(len(value) for m in model.modules() for name, value in vars(m).items() if "hook" in name and value)


@pytest.mark.parametrize("attach", [partial(st.FeatureTap, layer=["blocks.0", "blocks.1"]), new_criterion])
def test_no_hook_remains_and_attaching_again_does_not_add_up(attach: Callable[[nn.Module], Any]) -> None:
    model = student()
    with attach(model) as watcher:
        once = hooks_of(model)
        if attach is new_criterion:
            watcher.attach(model)
        assert hooks_of(model) == once > 0
    assert hooks_of(model) == 0
    attach(model)  # nobody holds it
    gc.collect()
    assert hooks_of(model) == 0


@pytest.fixture
def _only_new_objects() -> Iterator[None]:
    """The garbage collector sees what the test makes, not what the suite has left."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def living() -> tuple[Counter[str], int]:
    """How many objects of each type there are, and how many elements the tensors have."""
    gc.collect()
    things = gc.get_objects()
    tensors = [thing for thing in things if issubclass(type(thing), Tensor)]  # isinstance would wake up proxies
    return Counter(type(thing).__name__ for thing in things), sum(t.numel() for t in tensors)


@pytest.mark.usefixtures("_only_new_objects")
@pytest.mark.parametrize("stage", [1, 2])
def test_hundreds_of_steps_leave_memory_flat(stage: int) -> None:
    """Steps of everything that a loop does: train, sample, skip a batch, use a tap of its own."""
    model, b = student(), B.rows(slice(0, 2))
    criterion = new_criterion(model, stage)
    tap = st.FeatureTap(model, "blocks.0")

    def steps(count: int) -> tuple[Counter[str], int]:
        for _ in range(count):
            model.zero_grad(), criterion.zero_grad()
            total(model, criterion, b).backward()
            tap.pop()
            with torch.no_grad():
                model.eval()(b.x_t, b.t, b.y)
            model.train()
            tap.discard()
            denoising(model, b)  # skipped: its graph must not stay
            criterion.discard()
            tap.discard()
        return living()

    (before, elements), (after, elements_after) = steps(5), steps(200)
    assert elements_after == elements
    # PyTorch fills a cache now and then; what the steps leave would be 200 of a kind.
    assert not {name: count - before[name] for name, count in after.items() if count - before[name] >= 100}
    held = []
    for _ in range(20):  # what nobody consumes does not pile up
        denoising(model, b)
        held.append(living()[1])
    assert held == held[:1] * 20
    criterion.discard(), tap.discard()
    assert living()[1] == elements < held[0]


def by_torch(model: nn.Module) -> nn.Module:
    torch.save(model, file := io.BytesIO())
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("through", [copy.deepcopy, by_torch])
def test_copies_take_nothing_along_and_leave_the_original_alone(through: Callable[..., nn.Module]) -> None:
    model = student()
    criterion = new_criterion(model)
    loss = denoising(model, B)
    other, detached = through(model), through(criterion)  # in the middle of a step: the record holds a graph
    torch.testing.assert_close(other(B.x_t, B.t, B.y), student()(B.x_t, B.t, B.y), rtol=0, atol=0)  # as an EMA copy
    with pytest.raises(CaptureError, match="watches no model"):
        detached(loss.detach(), latents=B.latents)
    criterion(loss, latents=B.latents).total.backward()
    assert_same(gradients(model, criterion), plain_gradients(B))
    with pytest.raises(CaptureError, match="There is no forward of the model"):
        criterion(denoising(other, B), latents=B.latents)
    detached.attach(other)
    total(other, detached, B).backward()
    assert_same(gradients(other, detached), plain_gradients(B))
