"""Hooks come and go without a trace: detaching, memory over many steps, copies and files of a hooked model."""

import copy
import gc
import io
from collections import Counter
from collections.abc import Callable, Iterator

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


def tap(model: nn.Module) -> st.FeatureTap:
    return st.FeatureTap(model, ["blocks.0", "blocks.1"])


@pytest.mark.parametrize("attach", [tap, new_criterion])
def test_no_hook_remains(attach: Callable[[nn.Module], st.FeatureTap]) -> None:
    model = student()
    watcher = attach(model)
    assert hooks_of(model) > 0
    with pytest.raises(KeyError), watcher:
        raise KeyError
    assert hooks_of(model) == 0


def test_attaching_again_does_not_add_up() -> None:
    model = student()
    criterion = new_criterion(model)
    once = hooks_of(model)
    criterion.attach(model)
    assert hooks_of(model) == once
    total(model, criterion, B).backward()
    assert_same(gradients(model, criterion), plain_gradients(B))


@pytest.fixture
def _only_new_objects() -> Iterator[None]:
    """The garbage collector sees what the test makes, not what the suite has left."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def living() -> tuple[Counter[str], tuple[int, int]]:
    """How many objects of each type there are, and how many tensors of how many elements."""
    gc.collect()
    things = gc.get_objects()
    tensors = [thing for thing in things if issubclass(type(thing), Tensor)]  # isinstance would wake up proxies
    return Counter(type(thing).__name__ for thing in things), (len(tensors), sum(t.numel() for t in tensors))


@pytest.mark.usefixtures("_only_new_objects")
@pytest.mark.parametrize("stage", [1, 2])
def test_hundreds_of_steps_leave_memory_flat(stage: int) -> None:
    """Steps of everything that a loop does: train, sample, skip a batch, use a tap of its own."""
    model, b = student(), B.rows(slice(0, 2))
    criterion = new_criterion(model, stage)
    tap = st.FeatureTap(model, "blocks.0")

    def steps(count: int) -> tuple[Counter[str], tuple[int, int]]:
        for _ in range(count):
            model.zero_grad()
            criterion.zero_grad()
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

    before, tensors = steps(5)
    after, tensors_after = steps(200)
    assert tensors_after == tensors
    # PyTorch fills a cache now and then; what the steps leave would be 200 of a kind.
    assert not {name: count - before[name] for name, count in after.items() if count - before[name] >= 100}


@pytest.mark.usefixtures("_only_new_objects")
def test_what_nobody_consumes_does_not_pile_up() -> None:
    model = student()
    criterion = new_criterion(model)
    denoising(model, B)
    _, before = living()
    for _ in range(20):
        denoising(model, B)
    assert living()[1] == before
    criterion.discard()
    assert living()[1] < before


def by_torch(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


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
