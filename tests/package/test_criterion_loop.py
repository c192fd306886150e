"""The combined loss in a training loop: what it leaves alone, and what must not disturb it."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import loops
import plain
import pytest
import torch
from loops import assert_same, denoising, gradients, new_criterion, noisy_batch, plain_gradients, student, total
from plain import refused
from torch import Tensor, nn

import selftrans_reg as st

B = noisy_batch([0.35, 0.5, 0.1, 0.45])
OTHER = noisy_batch([0.4, 0.5, 0.55], seed=9)


def hooks_of(model: nn.Module) -> int:
    return sum(len(value) for m in model.modules() for name, value in vars(m).items() if "hook" in name and value)


def test_it_adds_to_a_model_nothing_but_hooks_and_takes_them_back() -> None:
    """Attached to another one, or dropped; and neither keeps the other alive."""
    first, second, bare = student(), student(), student()
    criterion = new_criterion(first, 1)
    assert [name for name, _ in first.named_modules()] == [name for name, _ in bare.named_modules()]
    torch.testing.assert_close(first.state_dict(), bare.state_dict(), rtol=0, atol=0)
    assert hooks_of(first) > 0
    criterion.attach(second)
    assert hooks_of(first) == 0
    total(second, criterion, B).backward()
    assert_same(gradients(second, criterion), plain_gradients(B, 1))
    there = weakref.ref(second)
    del second
    gc.collect()
    assert there() is None
    criterion.attach(first)
    del criterion
    gc.collect()
    assert hooks_of(first) == 0


@pytest.mark.usefixtures("global_rng_untouched")
def test_nothing_advances_the_global_generator() -> None:
    with plain.global_seed(0):  # the models' own layers draw from it
        model, teacher = student(), loops.new_teacher()
    for stage, settings in ((1, {}), (2, {}), (2, {"teacher_rows": 3})):
        with new_criterion(model, stage, teacher, **settings) as criterion:
            total(model, criterion, B).backward()


# --- Disturbances: each runs the model on B as the loop does, disturbed, and gives the loss.


def sampling(model: nn.Module, criterion: st.SelfTransLoss) -> Tensor:
    loss = denoising(model, B)
    with torch.no_grad():
        denoising(model, OTHER)
    denoising(model.eval(), OTHER)
    model.train()
    return loss


def forwards_that_raise(model: nn.Module, criterion: st.SelfTransLoss) -> Tensor:
    def fail(module: nn.Module, args: tuple[object, ...]) -> None:
        raise failure

    for failure in (ValueError, KeyboardInterrupt):
        for block in (model.blocks[0], model.blocks[2]):  # before the layer, and after it
            handle = block.register_forward_pre_hook(fail)
            with contextlib.suppress(failure):
                denoising(model, OTHER)
            handle.remove()
    return denoising(model, B)


def a_forward_that_raises_before_the_loss(model: nn.Module, criterion: st.SelfTransLoss) -> Tensor:
    loss = denoising(model, B)
    with contextlib.suppress(RuntimeError):
        model(torch.zeros(2, 3, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.long))
    return loss


def a_skipped_batch_and_refused_calls(model: nn.Module, criterion: st.SelfTransLoss) -> Tensor:
    """In a notebook the cell is corrected and run again, forward included."""
    denoising(model, OTHER)
    criterion.discard()
    for loss, more in ((torch.zeros(1, 1), {}), (None, {"latents": None}), (None, {"step": -1})):
        own = denoising(model, OTHER)
        with pytest.raises(st.SelfTransError):
            criterion(own if loss is None else loss, **{"latents": OTHER.latents} | more)
    return denoising(model, B)


def evaluation(model: nn.Module, criterion: st.SelfTransLoss) -> Tensor:
    loss = denoising(model, OTHER).mean()
    terms = criterion.eval()(loss)
    assert [term.item() for term in terms] == [loss.item(), loss.item(), 0.0, 0.0, 0.0]
    assert terms.total.requires_grad
    criterion.train()
    return denoising(model, B)


DISTURBANCES = [sampling, forwards_that_raise, a_forward_that_raises_before_the_loss]
DISTURBANCES += [a_skipped_batch_and_refused_calls, evaluation]


@pytest.fixture
def _no_garbage_collector() -> Iterator[None]:
    """Only reference counts free memory, as between two collections of a real run."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_garbage_collector")
@pytest.mark.parametrize("disturbed", DISTURBANCES, ids=lambda function: function.__name__)
def test_a_disturbance_leaves_every_gradient_as_it_is_without_it_and_no_graph(disturbed: Callable[..., Any]) -> None:
    model, outputs = student(), []
    model.blocks[1].register_forward_hook(lambda module, args, output: outputs.append(weakref.ref(output)))
    criterion = new_criterion(model, 1)
    loss = disturbed(model, criterion)
    criterion(loss, latents=B.latents).total.backward()
    assert_same(gradients(model, criterion), plain_gradients(B, 1))
    del loss
    assert not any(output() is not None for output in outputs)


def test_two_forwards_each_with_its_call_before_one_backward() -> None:
    model = student()
    criterion = new_criterion(model, 1)
    (total(model, criterion, B) + total(model, criterion, OTHER)).backward()
    one, two = plain_gradients(B, 1), plain_gradients(OTHER, 1)
    assert_same(gradients(model, criterion), {name: one[name] + two[name] for name in one})


def test_labels_that_are_dropped_in_place_are_refused() -> None:
    """The teacher is shown the call that the student was shown, or none."""
    model, b = student(), B._replace(y=B.y.clone())
    criterion, loss = new_criterion(model), denoising(model, b)
    b.y[:2] = 10
    with refused(st.CaptureError, "changed in place after the call began", "as a label that is dropped"):
        criterion(loss)
