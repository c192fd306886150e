"""The toy, called in the ways that loops have: batches, threads, transforms; beside the plain formula."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import loops
import pytest
import torch
from loops import assert_same, gradients, new_criterion, noisy_batch, plain_gradients, student, total
from torch import Tensor, nn
from toys import ToyDiT

import selftrans_reg as st
from selftrans_reg.errors import CaptureError

B = noisy_batch([0.35, 0.5, 0.1, 0.9])


class Padded(ToyDiT):
    """Cosmos': a mask (1, 1, H, W) that the model repeats for every sample. Else as :func:`student`."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor, padding_mask: Tensor) -> Tensor:
        return super().forward(x * padding_mask.repeat(len(x), 1, 1, 1), t, y)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("training", [True, False])  # sd-scripts' loop never calls ``train()``
def test_batches_of_any_size_give_the_gradients_of_the_formula(training: bool, stage: int) -> None:
    model, other = (Padded(depth=3, seed=seed).train(training) for seed in (1, 2))
    model.dropout = 0.0
    criterion = new_criterion(model, stage, loops.new_teacher(other), eval_mode=not training)
    for b in (B.rows(slice(0, 1)), B, B.rows(slice(0, 3)), B.rows(slice(0, 1))):
        model.zero_grad()
        criterion.zero_grad()
        output = model(b.x_t, b.t, b.y, torch.ones(1, 1, 8, 8))
        criterion((output - b.velocity).square().mean((1, 2, 3)), latents=b.latents).total.backward()
        assert_same(gradients(model, criterion), plain_gradients(b, stage))


def in_threads(*functions: Callable[[], Any]) -> None:
    """Run them at once, and raise what one of them raised."""
    with ThreadPoolExecutor(len(functions)) as pool:
        for running in [pool.submit(function) for function in functions]:
            running.result(60)


@pytest.mark.parametrize("gradients_too", [False, True])
def test_threads_share_a_teacher_and_sample_from_the_model(gradients_too: bool) -> None:
    teacher, expected, done = loops.new_teacher(), plain_gradients(B), threading.Event()
    teacher(B.x_t, B.t, B.y)  # the first call truncates it
    sampled = student()

    def train(model: nn.Module) -> None:
        criterion = new_criterion(model, teacher=teacher, check_interval=None, health_interval=None)
        tap = st.FeatureTap(model, "blocks.0")
        try:
            for _ in range(20):
                model.zero_grad()
                criterion.zero_grad()
                total(model, criterion, B).backward()
                tap.pop()
                assert_same(gradients(model, criterion), expected)
        finally:
            done.set()

    def sample() -> None:
        while not done.is_set():
            with torch.set_grad_enabled(gradients_too):
                sampled(B.x_t[:2], B.t[:2], B.y[:2])

    in_threads(lambda: train(sampled), lambda: train(student()), sample)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("in a thread", "no forward of the model to work on: the last one ran in another thread"),
        ("as a replica", r"it ran as replicas of nn\.DataParallel(?s:.*)use DDP"),
        ("transformed", r"carry no gradient(?s:.*)inside a function transform \(torch.func.jvp"),
        ("traced", None),
    ],
)
@pytest.mark.parametrize("stage", [1, 2])
def test_a_forward_that_cannot_be_watched_is_named_and_leaves_nothing_behind(
    how: str, message: str | None, stage: int
) -> None:
    model = student()
    criterion, tap = new_criterion(model, stage, forward="last"), st.FeatureTap(model, "blocks.0")
    output = torch.zeros(())
    if how == "in a thread":
        in_threads(lambda: model(B.x_t, B.t, B.y).sum())
    elif how == "as a replica":
        replica = model._replicate_for_data_parallel()
        replica._modules = model._modules
        replica(B.x_t, B.t, B.y)
    elif how == "transformed":
        output, _ = torch.func.jvp(lambda x: model(x, B.t, B.y), (B.x_t,), (torch.ones_like(B.x_t),))
    else:
        torch.jit.trace(model, (B.x_t, B.t, B.y))
    if message is not None:
        for call in (lambda: criterion(output.square().mean(), latents=B.latents), tap.pop):
            with pytest.raises(CaptureError, match=message):
                call()
    if how == "transformed":
        torch.func.jvp(lambda x: model(x, B.t, B.y), (B.x_t,), (torch.ones_like(B.x_t),))
    total(model, criterion, B).backward()  # as the message advises
    assert_same(gradients(model, criterion), plain_gradients(B, stage))
