"""Hooks come and go without a trace: detaching, memory over many steps, copies and files of a hooked model."""

import copy
import gc
import io
import pickle
import weakref
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from loops import Batch, assert_same, denoising, gradients, new_criterion, noisy_batch, plain_gradients, student, total
from torch import Tensor, nn

import selftrans_reg as st
from selftrans_reg.errors import CaptureError

B = noisy_batch([0.35, 0.5, 0.1, 0.9])


def hooks_of(model: nn.Module) -> int:
    """How many hooks of any kind are on the model's modules, and what torch notes beside them."""
    return sum(len(value) for m in model.modules() for name, value in vars(m).items() if "hook" in name and value)


def attach_tap(model: nn.Module) -> st.FeatureTap:
    return st.FeatureTap(model, ["blocks.0", "blocks.1"])


@pytest.mark.parametrize("attach", [attach_tap, new_criterion], ids=["tap", "criterion"])
@pytest.mark.parametrize("leave", ["detach", "with", "exception"])
def test_no_hook_remains(attach: Callable[[nn.Module], st.FeatureTap], leave: str) -> None:
    model = student()
    assert hooks_of(model) == 0
    watcher = attach(model)
    assert hooks_of(model) > 0
    if leave == "detach":
        watcher.detach()
    elif leave == "with":
        with watcher:
            denoising(model, B)
    else:
        with pytest.raises(KeyError), watcher:
            raise KeyError
    assert hooks_of(model) == 0


def test_attaching_again_does_not_add_up() -> None:
    model = student()
    criterion = new_criterion(model)
    once = hooks_of(model)
    for _ in range(3):
        criterion.attach(model)
    assert hooks_of(model) == once
    total(model, criterion, B).backward()
    assert_same(gradients(model, criterion), plain_gradients(B))


def test_the_state_dict_keeps_its_keys() -> None:
    model = student()
    criterion = new_criterion(model)
    assert model.state_dict().keys() == student().state_dict().keys()
    assert not [key for key in criterion.state_dict() if "block" in key or "model" in key]


def test_model_and_criterion_do_not_keep_each_other_alive() -> None:
    model = student()
    criterion = new_criterion(model)
    total(model, criterion, B).backward()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None

    model = student()
    criterion = new_criterion(model)
    total(model, criterion, B).backward()
    gone = weakref.ref(criterion)
    del criterion
    gc.collect()
    assert gone() is None
    denoising(model, B)  # the hooks of what is gone do nothing


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


def small_loop(stage: int) -> Callable[[], None]:
    """A step of everything that a loop does: train, sample, skip a batch, use a tap of its own."""
    model, b = student(), B.rows(slice(0, 2))
    criterion = new_criterion(model, stage)
    tap = st.FeatureTap(model, "blocks.0")

    def step() -> None:
        model.zero_grad()
        criterion.zero_grad()
        total(model, criterion, b).backward()
        tap.pop()
        model.eval()
        with torch.no_grad():
            model(b.x_t, b.t, b.y)
        model.train()
        tap.discard()
        denoising(model, b)  # skipped: its graph must not stay
        criterion.discard()
        tap.discard()

    return step


@pytest.mark.usefixtures("_only_new_objects")
@pytest.mark.parametrize("stage", [1, 2])
def test_a_thousand_steps_leave_memory_flat(stage: int) -> None:
    step = small_loop(stage)
    for _ in range(5):
        step()
    before, tensors = living()
    assert tensors[0] > 0
    for _ in range(500):  # of two forwards each
        step()
    after, tensors_after = living()
    assert tensors_after == tensors
    # PyTorch fills a cache now and then; what the steps leave would be 500 of a kind.
    grown = {name: count - before[name] for name, count in after.items() if count - before[name] >= 250}
    assert not grown, "more of these than before, by so many"


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


def by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def by_torch(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("through", [copy.deepcopy, by_pickle, by_torch])
def test_a_copy_of_a_hooked_model_works_and_leaves_the_original_alone(through: Callable[..., nn.Module]) -> None:
    model = student()
    criterion = new_criterion(model)
    other = through(model)
    torch.testing.assert_close(other(B.x_t, B.t, B.y), student()(B.x_t, B.t, B.y), rtol=0, atol=0)
    with pytest.raises(CaptureError, match="There is no forward of the model"):
        criterion(torch.zeros(()), latents=B.latents)
    loss = denoising(model, B)
    other(B.x_t, B.t, B.y)  # as an EMA copy between the forward and the loss
    criterion(loss, latents=B.latents).total.backward()
    assert_same(gradients(model, criterion), plain_gradients(B))
    own = new_criterion(other)
    total(other, own, B).backward()
    assert_same(gradients(other, own), plain_gradients(B))


@pytest.mark.parametrize("through", [copy.deepcopy, by_pickle, by_torch])
def test_a_copy_in_the_middle_of_a_step_takes_no_record_along(through: Callable[..., nn.Module]) -> None:
    model = student()
    criterion = new_criterion(model)
    loss = denoising(model, B)
    other = through(criterion)  # the record holds a graph, which could not be copied
    with pytest.raises(CaptureError, match="watches no model"):
        other(loss.detach(), latents=B.latents)
    other.attach(twin := student())
    total(twin, other, B).backward()
    assert_same(gradients(twin, other), plain_gradients(B))
    criterion(loss, latents=B.latents).total.backward()
    assert_same(gradients(model, criterion), plain_gradients(B))


def test_a_batch_whose_forward_failed_leaves_nothing() -> None:
    model = student()
    criterion = new_criterion(model)
    with pytest.raises(IndexError):
        denoising(model, Batch(*B)._replace(y=torch.full_like(B.y, 99)))
    total(model, criterion, B).backward()
    assert_same(gradients(model, criterion), plain_gradients(B))
