"""Two gloo processes under DDP against the formula in one process on the joined batch: every gradient."""

import contextlib
import warnings

import pytest
import torch
from loops import (
    Batch,
    assert_same,
    denoising,
    gradients,
    new_criterion,
    noisy_batch,
    plain_gradients,
    student,
    total,
)
from ranks import RANKS, on_ranks
from sharded import mine, shard
from torch import Tensor, nn
from torch.nn import parallel

from selftrans_reg import HealthWarning, LossTerms

DDP = parallel.DistributedDataParallel
# Times of the eight rows of the joined batch; rank 0 has the first four. The window is 0.3 to 0.6.
TIMES = {
    "different numbers": [0.35, 0.45, 0.55, 0.9, 0.1, 0.5, 0.8, 0.95],
    "none on one rank": [0.35, 0.45, 0.55, 0.9, 0.1, 0.2, 0.8, 0.95],
    "none on any rank": [0.05, 0.15, 0.25, 0.9, 0.1, 0.2, 0.8, 0.95],
    "none in one micro-batch": [0.35, 0.45, 0.55, 0.9, 0.1, 0.2, 0.5, 0.95],
}
HOW = ["DDP", "find_unused", "DDP(compile(model))", "compile(DDP(model))", "attached before compile(DDP(model))"]


def one_step(
    rank: int, times: list[float], stage: int, how: str, step: int = 0, no_sync_on: str = ""
) -> dict[str, Tensor]:
    inner = model = student()
    unused = {"find_unused_parameters": how == "find_unused"}
    early = new_criterion(inner, stage) if how.startswith("attached before") else None
    if how == "DDP(compile(model))":
        inner = torch.compile(inner, backend="aot_eager")
    model = DDP(inner, **unused)
    if how.endswith("compile(DDP(model))"):
        model = torch.compile(model, backend="aot_eager")
    criterion = DDP(early or new_criterion(model, stage, stop_step=5), **unused)
    b = mine(rank, times)
    batches = [b.rows(slice(0, 2)), b.rows(slice(2, 4))] if no_sync_on else [b]
    silent = {"model": [model], "both": [model, criterion]}.get(no_sync_on, [])
    for i, part in enumerate(batches):
        with contextlib.ExitStack() as stack:
            for wrapped in silent if i == 0 else []:
                stack.enter_context(wrapped.no_sync())
            terms = criterion(denoising(model, part), latents=part.latents, step=step)
            (terms.total / len(batches)).backward()
    assert isinstance(terms, LossTerms)
    return gradients(model, criterion)


@pytest.mark.parametrize(
    ("stage", "rows", "how"),
    [(stage, rows, how) for rows in list(TIMES)[:3] for stage, how in ((1, "DDP"), (2, "DDP"), (2, "find_unused"))]
    + [(2, "none on one rank", how) for how in HOW[2:]],
)
def test_ranks_together_equal_one_process(stage: int, rows: str, how: str) -> None:
    wanted = plain_gradients(noisy_batch(TIMES[rows]), stage)
    for found in on_ranks(one_step, TIMES[rows], stage, how):
        assert_same(found, wanted)


@pytest.mark.parametrize("no_sync_on", ["neither", "model", "both"])
def test_accumulated_gradients_equal_those_of_the_joined_batch(no_sync_on: str) -> None:
    times = TIMES["none in one micro-batch"]
    for found in on_ranks(one_step, times, 2, "DDP", 0, no_sync_on):
        assert_same(found, plain_gradients(noisy_batch(times)))


def test_past_the_stop_step_only_the_denoising_loss_trains() -> None:
    model, times = student(), TIMES["different numbers"]
    denoising(model, noisy_batch(times)).mean().backward()
    for found in on_ranks(one_step, times, 2, "DDP", 5):
        assert_same({k: v for k, v in found.items() if k[0] == "0"}, gradients(model))
        assert not any(v.any() for k, v in found.items() if k[0] == "1")


def with_a_bare_criterion(rank: int, wrap: str, handed: str) -> list[str]:
    """The kinds of warning in three steps."""
    inner = student()
    model: nn.Module = DDP(inner) if wrap == "DDP" else inner
    if wrap == "FSDP2":
        shard(inner)
    criterion = new_criterion(model if handed == "the wrapper" else inner)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", HealthWarning)
        for _ in range(3):
            total(model, criterion, mine(rank, TIMES["different numbers"])).backward()
    return [warning.message.kind for warning in caught]


@pytest.mark.parametrize(
    ("wrap", "handed"),
    [("DDP", "the wrapper"), ("DDP", "the model"), ("FSDP2", "the model"), ("nothing", "the model")],
)
def test_a_head_that_is_left_out_of_the_ranks_average_is_warned_of(wrap: str, handed: str) -> None:
    expected = [] if wrap == "nothing" else ["head_not_synchronised"]
    assert on_ranks(with_a_bare_criterion, wrap, handed) == [expected] * RANKS


def held_together(rank: int) -> list[str]:
    """As Lightning has them: one module, of which DDP wraps the whole."""

    class Training(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = student()
            self.criterion = new_criterion(self.model)

        def forward(self, b: Batch) -> Tensor:
            return total(self.model, self.criterion, b)

    DDP(Training())(mine(rank, TIMES["different numbers"])).backward()  # a warning is an error
    return []


def test_model_and_criterion_in_one_wrapper_need_no_other() -> None:
    assert on_ranks(held_together) == [[]] * RANKS
