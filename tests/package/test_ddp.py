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
from sharded import shard
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from selftrans_reg import HealthWarning

# Times of the eight rows of the joined batch; rank 0 has the first four. The window is 0.3 to 0.6.
TIMES = {
    "different numbers": [0.35, 0.45, 0.55, 0.9, 0.1, 0.5, 0.8, 0.95],
    "none on one rank": [0.35, 0.45, 0.55, 0.9, 0.1, 0.2, 0.8, 0.95],
    "none on any rank": [0.05, 0.15, 0.25, 0.9, 0.1, 0.2, 0.8, 0.95],
}


def mine(rank: int, times: list[float]) -> Batch:
    return noisy_batch(times).rows(slice(4 * rank, 4 * rank + 4))


def one_step(rank: int, times: list[float], stage: int, find_unused: bool) -> dict[str, Tensor]:
    model = DistributedDataParallel(student(), find_unused_parameters=find_unused)
    criterion = DistributedDataParallel(new_criterion(model, stage), find_unused_parameters=find_unused)
    total(model, criterion, mine(rank, times)).backward()
    return gradients(model, criterion)


@pytest.mark.parametrize("find_unused", [False, True], ids=["", "find_unused"])
@pytest.mark.parametrize("rows", TIMES)
@pytest.mark.parametrize("stage", [1, 2])
def test_ranks_together_equal_one_process(stage: int, rows: str, find_unused: bool) -> None:
    wanted = plain_gradients(noisy_batch(TIMES[rows]), stage)
    for found in on_ranks(one_step, TIMES[rows], stage, find_unused):
        assert_same(found, wanted)


def two_micro_batches(rank: int, times: list[float], no_sync_on: str) -> dict[str, Tensor]:
    model = DistributedDataParallel(student())
    criterion = DistributedDataParallel(new_criterion(model))
    b = mine(rank, times)
    silent = {"neither": [], "model": [model], "both": [model, criterion]}[no_sync_on]
    with contextlib.ExitStack() as stack:
        for wrapped in silent:
            stack.enter_context(wrapped.no_sync())
        (total(model, criterion, b.rows(slice(0, 2))) / 2).backward()
    (total(model, criterion, b.rows(slice(2, 4))) / 2).backward()
    return gradients(model, criterion)


@pytest.mark.parametrize("no_sync_on", ["neither", "model", "both"])
def test_accumulated_gradients_equal_those_of_the_joined_batch(no_sync_on: str) -> None:
    # Rank 1's first micro-batch has no row inside the window, its second has one.
    times = [0.35, 0.45, 0.55, 0.9, 0.1, 0.2, 0.5, 0.95]
    wanted = plain_gradients(noisy_batch(times))
    for found in on_ranks(two_micro_batches, times, no_sync_on):
        assert_same(found, wanted)


def compiled(rank: int, times: list[float], order: str) -> dict[str, Tensor]:
    model: nn.Module = student()
    criterion = None
    if order == "DDP(compile(model))":
        model = DistributedDataParallel(torch.compile(model, backend="aot_eager"))
    elif order == "compile(DDP(model))":
        model = torch.compile(DistributedDataParallel(model), backend="aot_eager")
    else:
        criterion = DistributedDataParallel(new_criterion(model))
        model = torch.compile(DistributedDataParallel(model), backend="aot_eager")
    criterion = criterion or DistributedDataParallel(new_criterion(model))
    total(model, criterion, mine(rank, times)).backward()
    return gradients(model, criterion)


@pytest.mark.parametrize("order", ["DDP(compile(model))", "compile(DDP(model))", "attached before compile(DDP(model))"])
def test_compiled_and_wrapped_in_either_order(order: str) -> None:
    times = TIMES["none on one rank"]
    for found in on_ranks(compiled, times, order):
        assert_same(found, plain_gradients(noisy_batch(times)))


def past_the_stop_step(rank: int, times: list[float]) -> tuple[dict[str, Tensor], list[Tensor]]:
    model = DistributedDataParallel(student())
    criterion = DistributedDataParallel(new_criterion(model, stop_step=5))
    b = mine(rank, times)
    terms = criterion(denoising(model, b), latents=b.latents, step=5)
    terms.total.backward()
    return gradients(model, criterion), list(terms)


def test_past_the_stop_step_only_the_denoising_loss_trains() -> None:
    b = noisy_batch(TIMES["different numbers"])
    model = student()
    denoising(model, b).mean().backward()
    for found, (_, _, alignment, weight, _) in on_ranks(past_the_stop_step, TIMES["different numbers"]):
        assert_same({k: v for k, v in found.items() if k[0] == "0"}, gradients(model))
        assert not any(v.any() for k, v in found.items() if k[0] == "1")
        assert alignment == 0
        assert weight == 0


def reported(rank: int, times: list[float]) -> list[Tensor]:
    model = DistributedDataParallel(student())
    criterion = DistributedDataParallel(new_criterion(model), find_unused_parameters=True)
    b = mine(rank, times)
    terms = criterion(denoising(model, b), latents=b.latents)
    assert type(terms).__name__ == "LossTerms"
    assert [term.requires_grad for term in terms] == [True, False, False, False, False]
    return [term.detach() for term in terms]


def test_the_average_over_ranks_is_the_value_of_the_joined_batch() -> None:
    times = TIMES["different numbers"]
    ranks = [torch.stack(terms) for terms in on_ranks(reported, times)]
    assert not torch.allclose(*ranks)
    model = student()
    b = noisy_batch(times)
    terms = new_criterion(model)(denoising(model, b), latents=b.latents)
    torch.testing.assert_close(torch.stack(ranks).mean(0), torch.stack(list(terms)).detach(), rtol=1e-6, atol=1e-6)


def with_a_bare_criterion(rank: int, wrap: str, handed: str) -> list[str]:
    """The kinds of warning in three steps."""
    inner = student()
    model: nn.Module = inner
    if wrap == "DDP":
        model = DistributedDataParallel(inner)
    elif wrap == "FSDP2":
        shard(inner)
    criterion = new_criterion(model if handed == "the wrapper" else inner)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", HealthWarning)
        for _ in range(3):
            total(model, criterion, mine(rank, TIMES["different numbers"])).backward()
    return [warning.message.kind for warning in caught]


@pytest.mark.parametrize("handed", ["the wrapper", "the model inside"])
@pytest.mark.parametrize("wrap", ["DDP", "FSDP2", "nothing"])
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

    DistributedDataParallel(Training())(mine(rank, TIMES["different numbers"])).backward()  # a warning is an error
    return []


def test_model_and_criterion_in_one_wrapper_need_no_other() -> None:
    assert on_ranks(held_together) == [[]] * RANKS


def saved_by_the_wrapper(rank: int) -> dict[str, Tensor]:
    criterion = DistributedDataParallel(new_criterion(student()))
    return criterion.state_dict()


def test_the_wrappers_state_loads_into_a_bare_criterion() -> None:
    state = on_ranks(saved_by_the_wrapper)[0]
    assert all(key.startswith("module.") for key in state)
    new_criterion(student()).load_state_dict(state)


def fails_on(rank: int, failing: int) -> None:
    if rank == failing:
        raise ValueError(f"rank {rank} failed")
    torch.distributed.barrier()


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_on_one_rank_is_reported(failing: int) -> None:
    with pytest.raises(RuntimeError, match=f"ValueError: rank {failing} failed"):
        on_ranks(fails_on, failing)
