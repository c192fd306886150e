"""Two gloo processes under FSDP2 against the formula in one process on the joined batch: every gradient."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from loops import (
    assert_same,
    denoising,
    gradients,
    new_criterion,
    new_teacher,
    noisy_batch,
    plain_gradients,
    small_sit,
    student,
    total,
    toy,
)
from plain import refused
from ranks import on_ranks
from sharded import mine, shard, shard_whole
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from toys import ToyBlock

from selftrans_reg.errors import CaptureError, SettingError

# Rank 0 has the first four rows. The window is 0.3 to 0.6.
TIMES = [0.35, 0.45, 0.55, 0.9, 0.1, 0.5, 0.8, 0.95]
NONE_ON_ONE_RANK = [0.35, 0.45, 0.55, 0.9, 0.1, 0.2, 0.8, 0.95]


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
    "how",
    ["attached before", "attached after", "kept whole after forward", "checkpointed", "compiled blocks", "accumulated"],
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


@pytest.mark.parametrize("times", [TIMES, NONE_ON_ONE_RANK], ids=["", "none on one rank"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_teacher_sharded_before_or_after_it_was_built(when: str, times: list[float]) -> None:
    wanted = plain_gradients(noisy_batch(times))
    for found in on_ranks(with_sharded_teacher, times, when):
        assert_same(found, wanted)


def chunked(rank: int) -> None:
    model, teacher = student(), new_teacher()
    shard(teacher.model)
    with refused(SettingError, "teacher_chunk=4 does not go with a sharded teacher", "keep the teacher whole on each"):
        total(model, new_criterion(model, teacher=teacher, teacher_chunk=4), mine(rank, TIMES))


def test_a_sharded_teacher_runs_in_one_pass() -> None:
    on_ranks(chunked)


BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def in_bfloat16(rank: int, early: bool) -> list[Tensor]:
    """The t that the criterion saw, its fraction inside, and the loop's loss before and after the sharded criterion."""
    b = mine(rank, 2 * [0.2999, 0.3001, 0.5999, 0.6001])  # in bfloat16: 0.2988, 0.3008, 0.6016, 0.6016
    model = small_sit(torch.Generator().manual_seed(0))
    criterion = new_criterion(model, stage=1) if early else None
    shard(model, mp_policy=BF16)
    if criterion is None:
        criterion = new_criterion(model, stage=1)
    else:
        advice = "call criterion.attach(model) after fully_shard"
        with refused(CaptureError, "arguments were torch.bfloat16", "rounds them, t too", advice):
            total(model, criterion, b)
        criterion.attach(model)
    shard_whole(criterion, mp_policy=replace(BF16, cast_forward_inputs=False))
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    loss = denoising(model, b)
    t = criterion._recorder.here.kept.note.call.t
    terms = criterion(loss, latents=b.latents)
    assert terms.total.dtype == terms.alignment.dtype == torch.float32
    terms.total.backward()
    assert gradients(model)["0.blocks.0.mlp.fc1.weight"].any()
    assert seen[0].dtype == torch.bfloat16, "the policy is not at work"
    return [t, b.t, terms.in_window, loss.mean().detach(), terms.denoising]


@pytest.mark.parametrize("early", [True, False], ids=["criterion first", "criterion second"])
def test_a_mixed_precision_policy_leaves_the_time_and_the_loss_as_they_are(early: bool) -> None:
    for t, true_t, in_window, loss, reported in on_ranks(in_bfloat16, early):
        assert torch.equal(t, true_t)
        assert in_window == 0.5
        assert torch.equal(loss, reported)


def saved_and_loaded(rank: int, folder: str) -> list[dict[str, Tensor]]:
    """The weights after four steps, run through, and saved and loaded after two."""
    b, results = mine(rank, TIMES), []
    for resume in (False, True):
        model = student()
        shard(model)
        criterion = new_criterion(model, stop_step=100)
        shard_whole(criterion)
        both = nn.ModuleDict({"model": model, "criterion": criterion})
        optimizer = torch.optim.AdamW(both.parameters(), lr=1e-2)
        for step in range(2 * resume, 4):
            if step == 2:
                states = dict(zip(("weights", "optimizer"), get_state_dict(both, optimizer), strict=True))
                if resume:
                    dcp.load(states, checkpoint_id=folder)
                    loaded = {"model_state_dict": states["weights"], "optim_state_dict": states["optimizer"]}
                    set_state_dict(both, optimizer, **loaded)
                else:
                    dcp.save(states, checkpoint_id=folder)
                assert criterion._step == 1
            optimizer.zero_grad()
            total(model, criterion, b, step=step).backward()
            optimizer.step()
        results.append({name: p.full_tensor().detach() for name, p in both.named_parameters()})
    return results


def test_saved_and_loaded_by_torch_distributed_checkpoint(tmp_path: Path) -> None:
    for through, resumed in on_ranks(saved_and_loaded, str(tmp_path)):
        assert_same(resumed, through, tolerance=0.0)
