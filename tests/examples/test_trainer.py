"""The long-run trainer against a plain loop; resuming, signals, kills, several processes, and what it leaves."""

import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from common.long_runs import new_accelerator
from common.options import Mistake
from common.run_folder import saved_checkpoints
from common.trainer import Trainer, micro_batches
from interrupted import room_for, snapshots
from long_runs import (
    Items,
    differences,
    fixed_loss,
    lines,
    new_sit,
    new_trainer,
    own_state,
    reset,
    trained,
)
from ranks import RANKS, on_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_artefacts import names_in
from torch import Tensor, nn

from selftrans_reg import CheckpointError, NotFiniteError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _no_state_left() -> Iterator[None]:
    with own_state():
        yield


def checkpoint(out: Path, steps: int) -> Path:
    return out / "checkpoints" / f"{steps:07d}.pt"


# --- What a step computes --------------------------------------------------------------------------------------------


def plain_run(
    data: Tensor, precision: str, *, steps: int, lr: float, warmup: int, clip: float, decay: float
) -> tuple[nn.Module, list[float]]:
    """The averaged model after some full-batch steps of AdamW, written out, and the losses."""
    model = new_sit(class_dropout_prob=0.0)  # nothing is drawn
    parameters = [p for p in model.parameters() if p.requires_grad]
    averages = [p.detach().clone() for p in parameters]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    losses = []

    def called(*inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return model(*inputs).float()

    for step in range(1, steps + 1):
        loss = fixed_loss(called, data, torch.arange(len(data)) % 5).mean()
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, parameters)
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        for p, g, (m, v) in zip(parameters, gradients, moments, strict=True):
            g = g * min(1.0, clip / norm.item())
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.999).add_(0.001 * g * g)
            update = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
            p.data -= lr * min(1.0, step / warmup) * update
        for average, p in zip(averages, parameters, strict=True):
            average.mul_(decay).add_((1 - decay) * p.detach())
    for average, p in zip(averages, parameters, strict=True):
        p.data.copy_(average)
    return model, losses


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


def test_micro_batches_add_up_to_the_batch(tmp_path: Path) -> None:
    same = {"stage": "2", "dataset": Items(noise=0.0), "denoise": fixed_loss, "steps": 3}
    trained(tmp_path / "whole", model=new_sit(class_dropout_prob=1e-9), **same)
    trained(tmp_path / "parts", model=new_sit(class_dropout_prob=1e-9), micro_batches=4, **same)
    whole, parts = (torch.load(checkpoint(tmp_path / name, 3))["model"] for name in ("whole", "parts"))
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-3, atol=1e-4)
    for one, other in zip(lines(tmp_path / "whole"), lines(tmp_path / "parts"), strict=True):
        for term in ("loss", "denoising", "alignment", "in_window", "gradient_norm"):
            assert other[term] == pytest.approx(one[term], rel=1e-3)


def test_the_log_holds_the_terms_and_tensorboard_the_same(tmp_path: Path) -> None:
    trained(tmp_path, stage="2", steps=6)
    found = lines(tmp_path)
    assert [line["step"] for line in found] == [1, 2, 4, 6]
    for line in found:
        assert line["loss"] == pytest.approx(line["denoising"] + line["weight"] * line["alignment"])
    assert {"in_window", "gradient_norm", "lr", "student_norm", "target_norm", "contrast"} <= found[0].keys()
    # The fixture's guidance stops after five steps: then there is nothing to align, or to measure.
    assert found[2]["alignment"] > 0
    assert found[3]["alignment"] == 0
    assert "contrast" not in found[3]
    board = EventAccumulator(str(tmp_path / "trackers" / "selftrans-reg"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("denoising")] == [
        (line["step"], pytest.approx(line["denoising"])) for line in found
    ]
    assert all(json.loads(text)["samples_per_second"] > 0 for text in (tmp_path / "log.jsonl").read_text().splitlines())


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
    assert moments["blocks.0.mlp.fc1.weight"].shape == model.blocks[0].mlp.fc1.weight.shape


# --- Going on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "micro_batches"), [("baseline", 1), ("2", 2)])
def test_a_resumed_run_is_bit_equal(tmp_path: Path, stage: str, micro_batches: int) -> None:
    """Label dropout, noise, times, what items draw and the teacher's rows included; over the end of an epoch."""
    same = {"stage": stage, "micro_batches": micro_batches}
    trained(tmp_path / "once", steps=7, **same)
    for steps in (1, 3, 7):
        trained(tmp_path / "often", steps=steps, workers=int(steps == 3), **same)
    assert differences(checkpoint(tmp_path / "once", 7), checkpoint(tmp_path / "often", 7)) == []
    often = [line for line in lines(tmp_path / "often") if line["step"] != 3]  # that was the last of a shorter run
    assert often == lines(tmp_path / "once")


@pytest.mark.parametrize("tail", [b'{"step": 6, "lo', b"\x00\x00\n", b"4\n", b"{}\n"])
def test_what_a_stopped_process_wrote_beyond_its_checkpoint_is_not_doubled(tmp_path: Path, tail: bytes) -> None:
    trained(tmp_path, steps=2)
    log = tmp_path / "log.jsonl"
    log.write_bytes(log.read_bytes() + b'{"step": 4, "loss": 0.5}\n' + tail)
    damaged = log.read_bytes() + b"\n{}"
    trained(tmp_path, steps=4)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 4]
    assert lines(tmp_path)[-1]["loss"] != 0.5
    log.write_bytes(damaged)  # elsewhere than in its last line
    with pytest.raises(Mistake, match=r"Line 4 of .*log.jsonl is damaged(.|\n)*Remove that line"):
        trained(tmp_path, steps=5)


def test_a_checkpoint_of_another_folder_is_gone_on_from(tmp_path: Path) -> None:
    trained(tmp_path / "a", steps=4, checkpoint_every=2)
    trained(tmp_path / "b", resume=str(checkpoint(tmp_path / "a", 2)), steps=4)
    assert differences(*(checkpoint(tmp_path / name, 4) for name in "ab")) == []


def test_what_cannot_be_resumed_is_named_and_nothing_written(tmp_path: Path) -> None:
    trained(tmp_path, steps=4, checkpoint_every=2)
    torch.save({"model": new_sit().state_dict(), "steps": 3}, tmp_path / "theirs")
    (tmp_path / "cut.pt").write_bytes(checkpoint(tmp_path, 4).read_bytes()[:1000])
    cases = [
        (Mistake, {"resume": str(tmp_path / "theirs")}, ["can go on from", "without ['args', 'crit", "--init"]),
        (Mistake, {"resume": str(checkpoint(tmp_path, 2))}, ["over newer checkpoints", "0000004.pt", "--out"]),
        (Mistake, {"resume": str(tmp_path / "none.pt")}, ["There is no checkpoint", "none.pt"]),
        (Mistake, {"stage": "2"}, ["criterion or optimiser does not fit", "0000004.pt"]),
        (Mistake, {"stage": "baseline"}, ["another stage", "holds a criterion", "this run has none"]),
        (CheckpointError, {"model": new_sit(depth=3)}, ["does not fit SiT", "blocks.3.attn.qkv.weight"]),
        (CheckpointError, {"resume": str(tmp_path / "cut.pt")}, ["cut.pt"]),
    ]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.pt")}
    for kind, settings, texts in cases:
        with pytest.raises(kind) as caught:
            trained(tmp_path, steps=6, **settings)
        assert all(text in str(caught.value) for text in texts), caught.value
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.pt")} == before


# --- Being stopped ---------------------------------------------------------------------------------------------------


class Stopping:
    """The fixed loss, which in its n-th call gets its process and those that read data for it signals."""

    def __init__(self, at: int, *numbers: int) -> None:
        self.left, self.numbers = at, numbers
        self.readers: list[Any] = []
        self.others = multiprocessing.active_children()  # those of other tests are left alone

    def __call__(self, model: nn.Module, latents: Tensor, y: Tensor) -> Tensor:
        self.left -= 1
        if self.left == 0:
            self.readers = [child for child in multiprocessing.active_children() if child not in self.others]
            for number in self.numbers:
                for process in [*(reader.pid for reader in self.readers), os.getpid()]:
                    os.kill(process, number)
        return fixed_loss(model, latents, y)


def test_a_signal_saves_the_step_and_stops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    number = signal.SIGTERM
    handler = signal.getsignal(number)
    trained(tmp_path / "once", denoise=fixed_loss)
    loss = Stopping(3, number)
    with pytest.raises(SystemExit) as caught:
        trained(tmp_path / "twice", denoise=loss, workers=1)
    assert len(loss.readers) == 1
    for reader in loss.readers:  # as when the process ends
        reader.terminate()
        reader.join(timeout=30)
        assert reader.exitcode == 0
    assert caught.value.code == 128 + number
    assert f"Stopped by {number.name} after 3 steps" in capsys.readouterr().out
    assert list(saved_checkpoints(tmp_path / "twice" / "checkpoints")) == [3]
    assert signal.getsignal(number) == handler
    trained(tmp_path / "twice", denoise=fixed_loss)
    assert differences(*(checkpoint(tmp_path / name, 7) for name in ("once", "twice"))) == []
    assert lines(tmp_path / "once") == lines(tmp_path / "twice")


def test_a_second_interrupt_stops_at_once(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, denoise=Stopping(3, signal.SIGINT, signal.SIGINT))
    assert saved_checkpoints(tmp_path / "checkpoints") == {}


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files as Linux does")
def test_an_interrupted_save_loses_nothing_older(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, run, every, save = tmp_path / "whole", tmp_path / "run", {"checkpoint_every": 2, "keep": 1}, torch.save
    trained(whole, steps=4, **every)
    trained(run, steps=2, **every)
    left, size = [shutil.copytree(run, tmp_path / "full")], checkpoint(run, 2).stat().st_size
    said = r"0000004.pt could not be written(.|\n)*File too large(.|\n)*are whole(.|\n)*same command again"
    with room_for(size // 2), pytest.raises(Mistake, match=said):
        trained(left[0], steps=4, **every)

    def saving(content: Any, file: Any) -> None:
        save(content, file)
        file.flush()
        for room in (0, 1, size // 2, size - 1):  # what a kill leaves after so many bytes
            left.append(shutil.copytree(run, tmp_path / f"{room}-bytes"))
            part = left[-1] / "checkpoints" / Path(file.name).name
            os.truncate(part, room)
            part.rename(part.with_name(part.name.replace(f"-{os.getpid()}.", "-1.")))  # another process's, by then

    monkeypatch.setattr(torch, "save", saving)
    with snapshots(run, tmp_path / "killed") as taken:
        trained(run, steps=4, **every)
    monkeypatch.undo()
    left += {tuple(names_in(folder / "checkpoints")): folder for folder in taken}.values()
    saved = [list(saved_checkpoints(folder / "checkpoints")) for folder in left]
    assert saved == [*[[2]] * 7, [2, 4], [4]]  # before the rename the old one alone, then both, then the new one alone
    for folder, steps in zip(left, saved, strict=True):
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
    with pytest.raises(NotFiniteError) as caught:
        trainer.run()
    for text in ("not been finite for the last 2 steps, up to step 6", "0000004.pt", "learning rate"):
        assert text in str(caught.value)
    assert list(saved_checkpoints(tmp_path / "checkpoints")) == [2, 4]
    for path in saved_checkpoints(tmp_path / "checkpoints").values():
        assert all(tensor.isfinite().all() for tensor in torch.load(path)["model"].values())


def scaled(out: Path, overflows: range, **settings: object) -> Trainer:
    """A trainer with gradient scaling, which accelerate has on CUDA only; in some steps the gradient overflows."""

    def loss(model: nn.Module, latents: Tensor, y: Tensor) -> Tensor:
        return fixed_loss(model, latents, y) * (1e38 if trainer.steps in overflows else 1.0)

    accelerator = new_accelerator("no", micro_batches=1, cpu=True, out=out)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with patch("long_runs.new_accelerator", lambda *_, **__: accelerator):
        trainer = new_trainer(out, stage="baseline", denoise=loss, **settings)
    return trainer


def test_steps_that_overflow_under_gradient_scaling_are_skipped_but_not_without_end(tmp_path: Path) -> None:
    scaled(tmp_path, range(2, 4), checkpoint_every=1, keep=9, clip=math.inf).run()
    weights = {n: torch.load(checkpoint(tmp_path, n))["model"]["blocks.0.mlp.fc1.weight"] for n in range(1, 8)}
    assert torch.equal(weights[2], weights[4])
    assert not torch.equal(weights[4], weights[5])
    reset()
    resumed = scaled(tmp_path, range(0), steps=8)
    resumed.resume()
    assert resumed.accelerator.scaler.get_scale() == 2.0**8
    reset()
    with pytest.raises(NotFiniteError, match="for the last 42 steps, up to step 45"):
        scaled(tmp_path / "endless", range(3, 100), steps=100, checkpoint_every=3, log_every=50).run()


# --- Schedules -------------------------------------------------------------------------------------------------------


def test_the_newest_checkpoints_and_the_milestones_stay(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "0000002.pt.host-1.partial").write_bytes(b"of a save that was killed")
    trained(tmp_path, stage="baseline", checkpoint_every=1, keep=2, keep_every=3)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [f"{n:07d}.pt" for n in (3, 6, 7)]


# --- Batches and processes -------------------------------------------------------------------------------------------


def batches(count: int, **settings: int) -> list[list[int]]:
    found = micro_batches(22, **({"batch_size": 8, "parts": 1, "rank": 0, "ranks": 1, "seed": 3} | settings))
    return [batch.indices for batch, _ in zip(found, range(count), strict=False)]


def test_every_epoch_is_a_permutation_of_its_own() -> None:
    first, second = ([index for batch in epoch for index in batch] for epoch in (batches(4)[:2], batches(4)[2:]))
    assert len({*first}) == len({*second}) == 16
    assert first != second
    assert {*first} | {*second} <= {*range(22)}
    assert batches(4, seed=4) != batches(4)
    for first_step in (1, 2, 3, 4):  # the order begins in the middle as it would have gone on
        assert batches(3, first_step=first_step) == batches(first_step + 3)[first_step:]


def test_ranks_and_micro_batches_cut_one_global_batch() -> None:
    parts = [batches(8, parts=2, rank=rank, ranks=2) for rank in range(2)]
    for step, batch in enumerate(batches(4)):
        assert [i for part in (0, 1) for rank in parts for i in rank[2 * step + part]] == batch


def test_settings_that_cannot_be_are_named(tmp_path: Path) -> None:
    for settings, match in [
        ({"micro_batches": 3}, r"batch of 8 cannot be cut evenly(.|\n)*1 processes, each with 3"),
        ({"batch_size": 64}, "20 samples, fewer than one batch of 64"),
        ({"precision": "fp16"}, r"fp16 with gradient scaling needs CUDA(.|\n)*bf16"),
    ]:
        with pytest.raises(Mistake, match=match):
            new_trainer(tmp_path, **settings)
        reset()
    with (
        patch("common.long_runs.get_available_trackers", list),
        pytest.raises(Mistake, match="pip install tensorboard"),
    ):
        new_trainer(tmp_path)


def on_a_rank(rank: int, out: str, stage: str, signalled: int) -> dict[str, Tensor]:
    """Three steps with half of each batch, or more until rank ``signalled`` gets a SIGTERM; the noise it drew."""
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS, "MASTER_ADDR": "none"}
    launched["OMP_NUM_THREADS"] = 1
    noise = []

    def loss(model: nn.Module, latents: Tensor, y: Tensor) -> Tensor:
        noise.append(torch.randn(3))
        if signalled == rank and len(noise) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return fixed_loss(model, latents, y)

    with patch.dict(os.environ, {name: str(value) for name, value in launched.items()}), own_state():
        trainer = new_trainer(
            Path(out),
            stage=stage,
            steps=3 if signalled < 0 else 30,
            dataset=Items(noise=0.0),
            denoise=loss,
            model=new_sit(seed=rank, class_dropout_prob=1e-9),  # those of rank 0 count
        )
        assert trainer.accelerator.num_processes == RANKS
        try:
            trainer.run()
            code = 0
        except SystemExit as stop:
            code = stop.code
        return {"noise": torch.stack(noise), "code": torch.tensor(code), "steps": torch.tensor(trainer.steps)}


def test_two_processes_equal_one_and_draw_noise_of_their_own(tmp_path: Path) -> None:
    same = {"stage": "2", "steps": 3, "dataset": Items(noise=0.0), "denoise": fixed_loss}
    trained(tmp_path / "one", model=new_sit(class_dropout_prob=1e-9), **same)
    ranks = on_ranks(on_a_rank, str(tmp_path / "two"), "2", -1)
    assert not torch.equal(ranks[0]["noise"], ranks[1]["noise"])
    one, two = (torch.load(checkpoint(tmp_path / name, 3)) for name in ("one", "two"))
    for part in ("model", "ema", "criterion"):
        assert one[part].keys() == two[part].keys()
        for name, tensor in one[part].items():
            if isinstance(tensor, Tensor) and tensor.is_floating_point():  # what was measured is each rank's own
                torch.testing.assert_close(two[part][name], tensor, rtol=1e-3, atol=1e-4)
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        for term in ("step", "loss", "alignment", "in_window", "gradient_norm"):
            assert b[term] == pytest.approx(a[term], rel=1e-3)


def test_ranks_agree_on_a_signal_that_one_of_them_got(tmp_path: Path) -> None:
    ranks = on_ranks(on_a_rank, str(tmp_path / "two"), "1", 1)
    assert [int(rank["code"]) for rank in ranks] == [128 + signal.SIGTERM] * 2
    assert [int(rank["steps"]) for rank in ranks] == [10, 10]
    assert list(saved_checkpoints(tmp_path / "two" / "checkpoints")) == [10]
