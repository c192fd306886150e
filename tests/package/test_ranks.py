"""Two gloo processes under DDP or FSDP2 against the formula in one process on the joined batch: every gradient."""

import contextlib
import functools
import warnings
from dataclasses import replace
from pathlib import Path

import loops
import pytest
import torch
import torch.distributed.checkpoint as dcp
from loops import assert_same, denoising, gradients, new_criterion, new_teacher, noisy_batch, student, total
from plain import refused
from ranks import RANKS, on_ranks
from sharded import mine, shard, shard_whole
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.nn import parallel
from toys import ToyBlock

from selftrans_reg import HealthWarning, LossTerms
from selftrans_reg.errors import CaptureError, SettingError

DDP = parallel.DistributedDataParallel
# Times of the eight rows of the joined batch; rank 0 has the first four. The window is 0.3 to 0.6.
TIMES = {
    "different numbers": [0.35, 0.45, 0.55, 0.9, 0.1, 0.5, 0.8, 0.95],
    "none on one rank": [0.35, 0.45, 0.55, 0.9, 0.1, 0.2, 0.8, 0.95],
    "none on any rank": [0.05, 0.15, 0.25, 0.9, 0.1, 0.2, 0.8, 0.95],
    "none in one micro-batch": [0.35, 0.45, 0.55, 0.9, 0.1, 0.2, 0.5, 0.95],
}


def wrapped(how: str, stage: int = 2, **settings: object) -> tuple[nn.Module, nn.Module]:
    """Model and criterion, in DDP or FSDP2."""
    model, unused = student(), {"find_unused_parameters": "find_unused" in how}
    criterion = new_criterion(model, stage, **settings) if "attached before" in how else None
    if "checkpointed" in how:
        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, ToyBlock))
    for block in model.blocks if "compiled blocks" in how else []:
        block.compile(backend="aot_eager")
    if "FSDP2" in how:
        shard(model, reshard_after_forward="kept whole" not in how)
    else:
        model = DDP(torch.compile(model, backend="aot_eager") if "DDP(compile" in how else model, **unused)
    if "compile(DDP" in how:
        model = torch.compile(model, backend="aot_eager")
    criterion = criterion or new_criterion(model, stage, **settings)
    if "FSDP2" in how:
        shard_whole(criterion)
        return model, criterion
    return model, DDP(criterion, **unused)


def one_step(rank: int, how: str, times: list[float], stage: int) -> dict[str, Tensor]:
    model, criterion = wrapped(how, stage)
    b = mine(rank, times)
    parts = [b.rows(slice(0, 2)), b.rows(slice(2, 4))] if "accumulated" in how else [b]
    silent = [module for name, module in (("model", model), ("criterion", criterion)) if f"without {name}" in how]
    for part in parts:
        last = part is parts[-1]
        with contextlib.ExitStack() as stack:
            for module in silent:
                if "FSDP2" in how:
                    module.set_requires_gradient_sync(last)
                elif not last:
                    stack.enter_context(module.no_sync())
            terms = criterion(denoising(model, part), latents=part.latents)
            (terms.total / len(parts)).backward()
    assert isinstance(terms, LossTerms)
    return gradients(model, criterion)


def with_sharded_teacher(rank: int, how: str, times: list[float], stage: int) -> dict[str, Tensor]:
    b, model = mine(rank, times), student()
    if "before" in how:
        whole = loops.toy(2)
        shard(whole)
        teacher = new_teacher(whole)
    else:
        teacher = new_teacher(example=(b.x_t, b.t, b.y))
        shard(teacher.model)
    chunked = new_criterion(model, teacher=teacher, teacher_chunk=4)
    with chunked, refused(SettingError, "teacher_chunk=4 does not go with a sharded teacher"):
        total(model, chunked, b)
    shard(model)
    criterion = new_criterion(model, teacher=teacher)
    shard_whole(criterion)
    for _ in range(3):
        model.zero_grad(), criterion.zero_grad()
        total(model, criterion, b).backward()
        for name, parameter in teacher.model.blocks.named_parameters():  # the rest stays whole in plain FSDP2 too
            assert isinstance(parameter, DTensor), f"{name} was left unsharded"
    assert torch.equal(teacher.fingerprint, new_teacher().fingerprint)
    return gradients(model, criterion)


SILENT = ["", " without model", " without model without criterion"]
ONE_RANK = ["DDP(compile(model))", "compile(DDP(model))", "attached before compile(DDP(model))"]
FSDP2 = [
    *("attached before", "attached after", "kept whole", "checkpointed", "compiled blocks", f"accumulated{SILENT[2]}"),
    *("teacher sharded before it was built", "teacher sharded after it was built"),
]
CASES = [
    *((how, rows, 2) for rows in list(TIMES)[:3] for how in ("DDP", "DDP, find_unused")),
    *(("DDP", rows, 1) for rows in list(TIMES)[:3]),
    *((how, "none on one rank", 2) for how in ONE_RANK),
    *((f"DDP, accumulated{silent}", "none in one micro-batch", 2) for silent in SILENT),
    *((f"FSDP2, {how}", rows, 2) for how in FSDP2 for rows in list(TIMES)[:2]),
]


@pytest.mark.parametrize(("how", "rows", "stage"), CASES)
def test_ranks_together_equal_one_process(how: str, rows: str, stage: int) -> None:
    wanted = loops.plain_gradients(noisy_batch(TIMES[rows]), stage)
    for found in on_ranks(with_sharded_teacher if "teacher" in how else one_step, how, TIMES[rows], stage):
        assert_same(found, wanted)


def with_a_bare_criterion(rank: int, how: str) -> list[str]:
    """The kinds of warning in three steps."""
    inner = student()
    model = DDP(inner) if how.startswith("DDP") else inner
    if how == "FSDP2":
        shard(inner)
    criterion = new_criterion(model if how == "DDP, and given the wrapper" else inner)
    run = functools.partial(total, model, criterion)
    if how == "both in one DDP":  # as Lightning has them
        both = nn.ModuleList([inner, criterion])
        both.forward = run
        run = DDP(both)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", HealthWarning)
        for _ in range(3):
            run(mine(rank, TIMES["different numbers"])).backward()
    return [warning.message.kind for warning in caught]


@pytest.mark.parametrize("how", ["DDP", "DDP, and given the wrapper", "FSDP2", "both in one DDP", "nothing"])
def test_a_head_that_is_left_out_of_the_ranks_average_is_warned_of(how: str) -> None:
    expected = ["head_not_synchronised"] if how.startswith(("DDP", "FSDP2")) else []
    assert on_ranks(with_a_bare_criterion, how) == [expected] * RANKS


BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def in_bfloat16(rank: int, early: bool) -> list[Tensor]:
    """The t that the criterion saw, its fraction inside, and the loop's loss before and after the sharded criterion."""
    b = mine(rank, 2 * [0.2999, 0.3001, 0.5999, 0.6001])  # in bfloat16: 0.2988, 0.3008, 0.6016, 0.6016
    model = loops.small_sit(torch.Generator().manual_seed(0))
    criterion = new_criterion(model, stage=1) if early else None
    shard(model, mp_policy=BF16)
    if criterion is None:
        criterion = new_criterion(model, stage=1)
    else:
        with refused(CaptureError, "arguments were torch.bfloat16", "call criterion.attach(model) after fully_shard"):
            total(model, criterion, b)
        criterion.attach(model)
    shard_whole(criterion, mp_policy=replace(BF16, cast_forward_inputs=False))
    loss = denoising(model, b)
    t = criterion._recorder.here.kept.note.call.t
    terms = criterion(loss, latents=b.latents)
    assert terms.total.dtype == terms.alignment.dtype == torch.float32
    terms.total.backward()
    assert gradients(model)["0.blocks.0.mlp.fc1.weight"].any()
    return [t, b.t, terms.in_window, loss.mean().detach(), terms.denoising]


@pytest.mark.parametrize("early", [True, False], ids=["criterion first", "criterion second"])
def test_fsdp2s_mixed_precision_policy_leaves_the_time_and_the_loss_as_they_are(early: bool) -> None:
    for t, true_t, in_window, loss, reported in on_ranks(in_bfloat16, early):
        assert torch.equal(t, true_t)
        assert in_window == 0.5
        assert torch.equal(loss, reported)


def saved_and_loaded(rank: int, folder: str, stage: int) -> list[dict[str, Tensor]]:
    """The weights after six steps, run through, and saved and loaded after two."""
    b, results = mine(rank, TIMES["different numbers"]), []
    settings = {"schedule": "cosine", "stop_step": 5} | ({"teacher_rows": 0.5} if stage == 2 else {})
    for resume in (False, True):
        model, criterion = wrapped("FSDP2", stage, **settings)
        both = nn.ModuleDict({"model": model, "criterion": criterion})
        optimizer = torch.optim.AdamW(both.parameters(), lr=1e-2)
        for step in range(2 * resume, 6):
            if step == 2:
                states = dict(zip(("weights", "optimizer"), get_state_dict(both, optimizer), strict=True))
                (dcp.load if resume else dcp.save)(states, checkpoint_id=folder)
                if resume:
                    loaded = {"model_state_dict": states["weights"], "optim_state_dict": states["optimizer"]}
                    set_state_dict(both, optimizer, **loaded)
                assert criterion._step == 1
            optimizer.zero_grad()
            total(model, criterion, b, step=step).backward()
            optimizer.step()
        results.append({name: p.full_tensor().detach() for name, p in both.named_parameters()})
    return results


@pytest.mark.parametrize("stage", [1, 2])
def test_an_fsdp2_run_goes_on_from_a_torch_distributed_checkpoint_as_if_it_had_not_stopped(
    stage: int, tmp_path: Path
) -> None:
    for through, resumed in on_ranks(saved_and_loaded, str(tmp_path), stage):
        assert_same(resumed, through, tolerance=0.0)
