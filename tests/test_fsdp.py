"""Two gloo processes under FSDP2 against the formula in one process on the joined batch: every gradient."""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from common.sit import SiT
from distributed import RANKS, on_ranks
from loops import (
    LAYER,
    Batch,
    assert_same,
    denoising,
    gradients,
    new_criterion,
    new_teacher,
    noisy_batch,
    plain_gradients,
    student,
    total,
    toy,
)
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from toys import ToyBlock

# Rank 0 has the first four rows. The window is 0.3 to 0.6.
TIMES = [0.35, 0.45, 0.55, 0.9, 0.1, 0.5, 0.8, 0.95]
NONE_ON_ONE_RANK = [0.35, 0.45, 0.55, 0.9, 0.1, 0.2, 0.8, 0.95]


def mine(rank: int, times: list[float]) -> Batch:
    return noisy_batch(times).rows(slice(4 * rank, 4 * rank + 4))


def shard(model: nn.Module, **options: object) -> None:
    """Each block and the rest, as people do."""
    mesh = init_device_mesh("cpu", (RANKS,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)


def shard_whole(module: nn.Module, **options: object) -> None:
    fully_shard(module, mesh=init_device_mesh("cpu", (RANKS,)), **options)


def one_step(rank: int, times: list[float], how: str) -> dict[str, Tensor]:
    model = student()
    criterion = new_criterion(model) if how == "attached before" else None
    if how == "checkpointed":
        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, ToyBlock))
    if how == "compiled blocks":
        for block in model.blocks:
            block.compile(backend="aot_eager")
    shard(model, reshard_after_forward=how != "kept whole after forward")
    criterion = criterion or new_criterion(model)
    shard_whole(criterion)
    if how != "accumulated":
        total(model, criterion, mine(rank, times)).backward()
        return gradients(model, criterion)
    for last in (False, True):
        for module in (model, criterion):
            module.set_requires_gradient_sync(last)
        b = mine(rank, times).rows(slice(2, 4) if last else slice(0, 2))
        (total(model, criterion, b) / 2).backward()
    return gradients(model, criterion)


@pytest.mark.parametrize("times", [TIMES, NONE_ON_ONE_RANK], ids=["", "none on one rank"])
@pytest.mark.parametrize(
    "how", ["attached before", "attached after", "kept whole after forward", "checkpointed", "compiled blocks", "accumulated"]
)
def test_ranks_together_equal_one_process(how: str, times: list[float]) -> None:
    wanted = plain_gradients(noisy_batch(times))
    for found in on_ranks(one_step, times, how):
        assert_same(found, wanted)


def with_sharded_teacher(rank: int, times: list[float], when: str) -> dict[str, Tensor]:
    b = mine(rank, times)
    if when == "before":
        whole = toy(2)
        shard(whole)
        teacher = new_teacher(whole)
    else:
        teacher = new_teacher(example=(b.x_t, b.t, b.y))
        shard(teacher.model)
    model = student()
    shard(model)
    criterion = new_criterion(model, teacher=teacher)
    shard_whole(criterion)
    for _ in range(3):
        model.zero_grad()
        criterion.zero_grad()
        total(model, criterion, b).backward()
        for name, parameter in teacher.model.blocks.named_parameters():  # the rest stays whole in plain FSDP2 too
            assert isinstance(parameter, DTensor), f"{name} was left unsharded"
    assert torch.equal(teacher.fingerprint, new_teacher().fingerprint)
    return gradients(model, criterion)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_teacher_sharded_before_or_after_it_was_built(when: str) -> None:
    wanted = plain_gradients(noisy_batch(TIMES))
    for found in on_ranks(with_sharded_teacher, TIMES, when):
        assert_same(found, wanted)
