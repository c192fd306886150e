"""The long-run trainer against a plain loop; resuming, kills, several processes, and what it leaves."""

import copy
import itertools
import math
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from common.long_runs import new_accelerator
from common.options import Mistake
from common.run_folder import saved_checkpoints
from common.trainer import Denoise, Trainer, micro_batches
from interrupted import room_for, snapshots
from long_runs import Items, checkpoint, differences, fixed_loss, lines, new_sit, new_trainer, own_state, reset, trained
from ranks import RANKS, on_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_artefacts import names_in
from torch import Tensor, nn

from selftrans_reg import CheckpointError, NotFiniteError


@pytest.fixture(autouse=True)
def _no_state_left() -> Iterator[None]:
    with own_state():
        yield


def plain_run(
    data: Tensor, precision: str, *, steps: int, lr: float, warmup: int, clip: float, decay: float
) -> tuple[nn.Module, list[float]]:
    """The averaged model after some full-batch steps, written out, and the losses."""
    model = new_sit(class_dropout_prob=0.0)  # nothing is drawn
    averaged, parameters = copy.deepcopy(model), [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(parameters, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0), []

    def called(*inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return model(*inputs).float()

    for step in range(1, steps + 1):
        loss = fixed_loss(called, data, torch.arange(len(data)) % 5).mean()
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, parameters)
        norm = torch.cat([g.flatten() for g in gradients]).norm().item()
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g * min(1.0, clip / norm)
        optimizer.param_groups[0]["lr"] = lr * min(1.0, step / warmup)
        optimizer.step()
        for average, p in zip(averaged.parameters(), model.parameters(), strict=True):
            average.data.mul_(decay).add_((1 - decay) * p.data)
    return averaged, losses


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_steps_equal_a_plain_loop(tmp_path: Path, precision: str) -> None:
    data = Items(length=8, noise=0.0)
    settings = {"lr": 1e-2, "warmup_steps": 4, "clip": 0.05, "ema_decay": 0.8, "steps": 6, "precision": precision}
    model = new_sit(class_dropout_prob=0.0)
    trainer = trained(tmp_path, stage="baseline", dataset=data, denoise=fixed_loss, model=model, **settings)
    wanted, losses = plain_run(data.latents, precision, steps=6, lr=1e-2, warmup=4, clip=0.05, decay=0.8)
    close = {"rtol": 1e-3, "atol": 1e-5} if precision == "no" else {"rtol": 1e-2, "atol": 1e-3}
    for name, tensor in trainer.ema.state_dict().items():
        if precision == "no" or not name.endswith("qkv.bias"):  # the keys' has no gradient, but what rounding leaves
            torch.testing.assert_close(tensor, wanted.state_dict()[name], **close)
    assert lines(tmp_path)[0]["loss"] == pytest.approx(losses[0], rel=1e-6)  # in float32 it differs by much more
    assert [line["loss"] for line in lines(tmp_path)] == pytest.approx([losses[n - 1] for n in (1, 2, 4, 6)], rel=1e-3)
    assert [line["lr"] for line in lines(tmp_path)] == pytest.approx([0.0025, 0.005, 0.01, 0.01])
    assert all(line["gradient_norm"] > 0.05 for line in lines(tmp_path)), "nothing was clipped"
    assert not trainer.ema.training
    assert not any(p.requires_grad for p in trainer.ema.parameters())


def on_a_rank(rank: int, out: str, steps: int, signalled: int) -> Tensor:
    """Some steps with half of each batch, until rank ``signalled`` gets a SIGTERM; the noise that it drew."""
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS, "MASTER_ADDR": "none"}
    noise = []

    def loss(model: nn.Module, latents: Tensor, y: Tensor) -> Tensor:
        noise.append(torch.randn(3))
        if rank == signalled and len(noise) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return fixed_loss(model, latents, y)

    with patch.dict(os.environ, {name: str(value) for name, value in launched.items()} | {"OMP_NUM_THREADS": "1"}):
        model = new_sit(seed=rank, class_dropout_prob=1e-9)  # the weights of rank 0 count
        ends = pytest.raises(SystemExit, match="143") if signalled >= 0 else nullcontext()
        with ends:
            trained(Path(out), stage="2", steps=steps, dataset=Items(noise=0.0), denoise=loss, model=model)
    return torch.stack(noise)


def test_micro_batches_and_processes_share_one_batch_and_draw_noise_of_their_own(tmp_path: Path) -> None:
    for name, parts in [("whole", 1), ("parts", 4)]:
        model, same = new_sit(class_dropout_prob=1e-9), {"stage": "2", "dataset": Items(noise=0.0), "steps": 3}
        trained(tmp_path / name, model=model, denoise=fixed_loss, micro_batches=parts, **same)
    assert not torch.equal(*on_ranks(on_a_rank, str(tmp_path / "ranks"), 3, -1))
    whole = torch.load(checkpoint(tmp_path / "whole", 3))
    for other in (tmp_path / "parts", tmp_path / "ranks"):
        found = torch.load(checkpoint(other, 3))
        for part in ("model", "ema", "criterion"):
            assert found[part].keys() == whole[part].keys()
            for name, tensor in whole[part].items():
                if tensor.is_floating_point():  # what was measured is each rank's own
                    torch.testing.assert_close(found[part][name], tensor, rtol=1e-3, atol=1e-4)
        for a, b in zip(lines(tmp_path / "whole"), lines(other), strict=True):
            for term in ("step", "loss", "denoising", "alignment", "in_window", "gradient_norm"):
                assert b[term] == pytest.approx(a[term], rel=1e-3)


def test_a_signal_to_one_of_the_ranks_stops_all_after_the_same_step(tmp_path: Path) -> None:
    assert [len(noise) for noise in on_ranks(on_a_rank, str(tmp_path), 30, 1)] == [10, 10]
    assert list(saved_checkpoints(tmp_path / "checkpoints")) == [10]


def test_a_signal_saves_the_step_and_the_same_command_goes_on(tmp_path: Path) -> None:
    handlers, others, calls = [signal.getsignal(n) for n in (15, 2)], multiprocessing.active_children(), []

    def signalled(*numbers: int) -> Denoise:
        def loss(model: nn.Module, latents: Tensor, y: Tensor) -> Tensor:
            calls.append(len(calls))
            if len(calls) == 3:
                readers = [child.pid for child in multiprocessing.active_children() if child not in others]
                assert len(readers) == 1
                for process, number in itertools.product([*readers, os.getpid()], numbers):
                    os.kill(process, number)  # as a scheduler or a terminal does
            return fixed_loss(model, latents, y)

        return loss

    trained(tmp_path / "once", steps=12, denoise=fixed_loss)
    with pytest.raises(SystemExit, match="143"):
        trained(tmp_path / "twice", steps=12, workers=1, denoise=signalled(signal.SIGTERM))
    assert list(saved_checkpoints(tmp_path / "twice" / "checkpoints")) == [10]
    trained(tmp_path / "twice", steps=12, denoise=fixed_loss)
    assert differences(*(checkpoint(tmp_path / name, 12) for name in ("once", "twice"))) == []
    assert lines(tmp_path / "once") == lines(tmp_path / "twice")
    calls.clear()
    with pytest.raises(KeyboardInterrupt):  # the second ends it at once
        trained(tmp_path / "never", steps=12, workers=1, denoise=signalled(signal.SIGINT, signal.SIGINT))
    assert saved_checkpoints(tmp_path / "never" / "checkpoints") == {}
    assert [signal.getsignal(n) for n in (15, 2)] == handlers


def test_the_log_holds_the_terms_and_tensorboard_the_same(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path, stage="2", steps=6)
    trainer.criterion.measures["old"] = torch.ones(())  # of an earlier call
    trainer.run()
    found = lines(tmp_path)
    assert [line["step"] for line in found] == [1, 2, 4, 6]
    for line in found:
        assert line["loss"] == pytest.approx(line["denoising"] + line["weight"] * line["alignment"])
    assert {"in_window", "gradient_norm", "lr", "student_norm", "target_norm", "contrast"} <= found[0].keys()
    # The fixture's guidance stops after five steps: then there is nothing to align, or to measure.
    assert found[2]["alignment"] > 0 == found[3]["alignment"]
    assert "contrast" not in found[3]
    assert "old" not in found[0]
    board = EventAccumulator(str(tmp_path / "trackers" / "selftrans-reg")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("denoising")] == [
        (line["step"], pytest.approx(line["denoising"])) for line in found
    ]


def test_what_a_checkpoint_holds(tmp_path: Path) -> None:
    trained(tmp_path, stage="baseline", steps=2, model=new_sit(learn_sigma=True))
    content = torch.load(checkpoint(tmp_path, 2), weights_only=True)
    assert content.keys() == {"model", "ema", "opt", "criterion", "scaler", "steps", "args"}
    assert (content["steps"], content["args"], content["criterion"]) == (2, {"model": "tiny"}, {})
    # As the SiT and REPA repositories load them.
    model = new_sit(learn_sigma=True)
    model.load_state_dict(content["model"])
    model.load_state_dict(content["ema"])
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.load_state_dict(content["opt"])
    moments = {name: optimizer.state[p]["exp_avg"] for name, p in model.named_parameters() if p in optimizer.state}
    assert moments.keys() == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("stage", "micro_batches"), [("baseline", 1), ("2", 2)])
def test_a_resumed_run_is_bit_equal(tmp_path: Path, stage: str, micro_batches: int) -> None:
    """Label dropout, noise, times, what items draw and the teacher's rows included; over the end of an epoch."""
    same = {"stage": stage, "micro_batches": micro_batches}
    trained(tmp_path / "once", steps=7, **same)
    for steps in (1, 3, 7):
        trained(tmp_path / "often", steps=steps, workers=int(steps == 3), **same)
    for start in (checkpoint(tmp_path / "often", 3), tmp_path / "gone.pt"):  # which is not read: the run has its own
        trained(tmp_path / "other", resume=start, steps=7, **same)
    for name in ("often", "other"):
        assert differences(checkpoint(tmp_path / "once", 7), checkpoint(tmp_path / name, 7)) == []
    assert lines(tmp_path / "often") == lines(tmp_path / "once")
    assert lines(tmp_path / "other") == lines(tmp_path / "once")[2:]


def test_what_a_stopped_process_wrote_beyond_its_checkpoint_is_not_doubled(tmp_path: Path) -> None:
    trained(tmp_path, steps=2)
    with (tmp_path / "log.jsonl").open("ab") as log:
        log.write(b'{"step": 4, "loss": 0.5}\n\x00\x00\n4\n{}\n{"step": 1, "lo')
    trained(tmp_path, steps=4)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 4]
    assert lines(tmp_path)[-1]["loss"] != 0.5


def test_what_cannot_be_is_named_and_nothing_written(tmp_path: Path) -> None:
    trained(tmp_path / "a", steps=4, checkpoint_every=2)
    content = torch.load(checkpoint(tmp_path / "a", 4))
    torch.save({"model": content["model"], "ema": content["ema"], "steps": 3}, tmp_path / "theirs")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.pt")}
    for out, kind, settings, match in [
        ("b", Mistake, {"resume": tmp_path / "theirs"}, "or no checkpoint to go on from: .*criterion(.|\n)*--init"),
        ("b", CheckpointError, {"resume": tmp_path / "none.pt"}, "none.pt"),
        ("b", Mistake, {"micro_batches": 3}, "batch of 8 cannot(.|\n)*1 processes, each with 3 .*a multiple of 3"),
        ("b", Mistake, {"batch_size": 64}, "batch of 64 cannot(.|\n)*20 samples"),
        ("a", Mistake, {"resume": checkpoint(tmp_path / "a", 2)}, "0000002.pt is of this very run(.|\n)*--out"),
        ("a", Mistake, {"stage": "2"}, "0000004.pt is of another stage"),
        ("a", Mistake, {"stage": "baseline"}, "0000004.pt is of another stage"),
        ("a", CheckpointError, {"model": new_sit(depth=3)}, "does not fit SiT(.|\n)*blocks.3.attn.qkv.weight"),
    ]:
        with pytest.raises(kind, match=match):
            trained(tmp_path / out, steps=6, **settings)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.pt")} == before


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files as Linux does")
def test_an_interrupted_save_loses_nothing_older(tmp_path: Path) -> None:
    whole, run, every = tmp_path / "whole", tmp_path / "run", {"checkpoint_every": 2, "keep": 1}
    trained(whole, steps=4, **every)
    trained(run, steps=2, **every)
    full = shutil.copytree(run, tmp_path / "full")
    said = r"0000004.pt could not be written(.|\n)*File too large(.|\n)*are whole(.|\n)*same command again"
    with room_for(checkpoint(run, 2).stat().st_size // 2), pytest.raises(Mistake, match=said):
        trained(full, steps=4, **every)
    with snapshots(run, tmp_path / "killed") as taken:
        trained(run, steps=4, **every)
    left = [full, *{tuple(names_in(folder / "checkpoints")): folder for folder in taken}.values()]
    saved = [list(saved_checkpoints(folder / "checkpoints")) for folder in left]
    assert saved == [[2], [2], [2], [2, 4], [4]]  # before the rename the old one alone, then both, then the new one
    for folder, steps in zip(left, saved, strict=True):
        for part in (folder / "checkpoints").glob("*.partial"):
            part.rename(f"{part}.host-1.partial")  # another process's, by then
        trained(folder, steps=4, **every)
        assert differences(checkpoint(folder, 4), checkpoint(whole, 4)) == []
        assert names_in(folder / "checkpoints") == [f"{step:07d}.pt" for step in (*steps[:-1], 4)]


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_what_is_no_number_stops_the_run_before_anything_is_saved(tmp_path: Path, broken: str) -> None:
    def breaking(model: nn.Module, latents: Tensor, y: Tensor) -> Tensor:
        loss = fixed_loss(model, latents, y)
        # The loss is no number, or the gradient of a term that is 0.
        bad = loss * math.nan if broken == "loss" else 0 * (loss.detach() - loss).abs().sqrt()
        return loss + bad if trainer.steps == 4 else loss

    trainer = new_trainer(tmp_path, stage="baseline", denoise=breaking, steps=50, log_every=50, checkpoint_every=2)
    with pytest.raises(NotFiniteError, match=r"not finite any more at step 6(.|\n)*0000004.pt(.|\n)*learning rate"):
        trainer.run()
    assert list(saved_checkpoints(tmp_path / "checkpoints")) == [2, 4]


def scaled(out: Path, overflows: range, **settings: object) -> Trainer:
    """A trainer with gradient scaling, which accelerate has on CUDA only; in some steps the gradient overflows."""

    def loss(model: nn.Module, latents: Tensor, y: Tensor) -> Tensor:
        return fixed_loss(model, latents, y) * (math.inf if trainer.steps in overflows else 1.0)

    accelerator = new_accelerator("no", micro_batches=1, cpu=True, out=out)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with patch("long_runs.new_accelerator", lambda *_, **__: accelerator):
        trainer = new_trainer(out, stage="baseline", denoise=loss, **settings)
    return trainer


def test_steps_that_overflow_under_gradient_scaling_are_skipped_but_not_without_end(tmp_path: Path) -> None:
    scaled(tmp_path, range(2, 4), clip=math.inf).run()
    reset()
    resumed = scaled(tmp_path, range(0), steps=8)
    resumed.resume()
    assert resumed.accelerator.scaler.get_scale() == 2.0**8
    reset()
    with pytest.raises(NotFiniteError, match="at step 39"):  # after 35 halvings from 2 ** 10, at the next checkpoint
        scaled(tmp_path / "endless", range(3, 100), steps=100, checkpoint_every=3, log_every=50).run()


def test_the_newest_checkpoints_and_the_milestones_stay(tmp_path: Path) -> None:
    trained(tmp_path, stage="baseline", checkpoint_every=1, keep=2, keep_every=3)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [f"{n:07d}.pt" for n in (3, 6, 7)]


def batches(count: int, **settings: int) -> list[list[int]]:
    found = micro_batches(22, **({"batch_size": 8, "parts": 1, "rank": 0, "ranks": 1, "seed": 3} | settings))
    return [indices for (indices, _), _ in zip(found, range(count), strict=False)]


def test_every_epoch_is_a_permutation_of_its_own_whose_batches_ranks_and_micro_batches_cut() -> None:
    first, second = ([index for batch in epoch for index in batch] for epoch in (batches(4)[:2], batches(4)[2:]))
    assert len({*first}) == len({*second}) == 16
    assert first != second
    assert {*first} | {*second} <= {*range(22)}
    assert batches(4, seed=4) != batches(4)
    for first_step in (1, 2, 3, 4):  # the order begins in the middle as it would have gone on
        assert batches(3, first_step=first_step) == batches(first_step + 3)[first_step:]
    parts = [batches(8, parts=2, rank=rank, ranks=2) for rank in range(2)]
    for step, batch in enumerate(batches(4)):
        assert [i for part in (0, 1) for rank in parts for i in rank[2 * step + part]] == batch


def test_a_tracker_that_is_not_installed_is_not_left_out_in_silence(tmp_path: Path) -> None:
    left = patch("accelerate.accelerator.filter_trackers", lambda *_: [])  # what it gives where none is installed
    with left, pytest.raises(Mistake, match="--log-with wandb"), pytest.warns(UserWarning, match="no supported"):
        new_accelerator("no", micro_batches=1, cpu=True, out=tmp_path, trackers=["wandb"])
