"""accelerate, on one process and on two over gloo, and Lightning: the gradients of the formula, and what is saved."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from lightning.pytorch import LightningModule, Trainer
from loops import Batch, assert_same, denoising, gradients, new_criterion, noisy_batch, plain_gradients, student, total
from ranks import RANKS, on_ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

# Rows in batches of two go to the ranks in turn, so that rank 1's second batch has none inside the window, 0.3 to 0.6.
TIMES = [0.35, 0.45, 0.55, 0.9, 0.5, 0.2, 0.8, 0.95]


@pytest.fixture(autouse=True)
def _no_state_left() -> Iterator[None]:
    yield
    reset()


def reset() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def prepare(accelerator: Accelerator, batch_size: int) -> list[Any]:
    """Model, criterion, optimiser and loader."""
    model = student()
    criterion = new_criterion(model)
    optimizer = torch.optim.SGD([*model.parameters(), *criterion.parameters()], lr=0.0)
    loader = DataLoader(TensorDataset(*noisy_batch(TIMES)), batch_size=batch_size)
    return accelerator.prepare(model, criterion, optimizer, loader)


def epoch(steps: int, processes: int) -> dict[str, Tensor]:
    """One pass over the eight rows as a single optimiser step; the gradients that it would have used."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=steps)
    assert accelerator.num_processes == processes
    model, criterion, optimizer, loader = prepare(accelerator, len(TIMES) // steps // processes)
    found = []
    for rows in loader:
        with accelerator.accumulate(model, criterion):
            accelerator.backward(total(model, criterion, Batch(*rows)))
            if accelerator.sync_gradients:
                found.append(gradients(model, criterion))
            optimizer.step()
            optimizer.zero_grad()
    (only,) = found
    return only


def on_a_rank(rank: int, steps: int) -> dict[str, Tensor]:
    # What a launcher sets. The group has been formed, so nobody meets at the address.
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS, "MASTER_ADDR": "none"}
    launched["OMP_NUM_THREADS"] = 1
    with patch.dict(os.environ, {name: str(value) for name, value in launched.items()}):
        try:
            return epoch(steps, RANKS)
        finally:
            reset()


@pytest.mark.parametrize("steps", [1, 2])
def test_two_processes_equal_one_also_with_accumulation(steps: int) -> None:
    for found in on_ranks(on_a_rank, steps):
        assert_same(found, plain_gradients(noisy_batch(TIMES)))


def test_mixed_precision_reaches_head_and_teacher_and_not_the_loss() -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model, criterion, _, loader = prepare(accelerator, len(TIMES))
    seen: list[torch.dtype] = []
    for module in (accelerator.unwrap_model(model).blocks[0], criterion.heads[0], criterion.teacher.model.blocks[0]):
        linear = next(part for part in module.modules() if isinstance(part, nn.Linear))
        linear.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    b = Batch(*next(iter(loader)))
    terms = criterion(denoising(model, b), latents=b.latents)
    assert len(seen) > 2
    assert {*seen} == {torch.bfloat16}
    assert {term.dtype for term in terms} == {torch.float32}
    accelerator.backward(terms.total)
    assert_same(gradients(model, criterion), plain_gradients(noisy_batch(TIMES)), tolerance=0.05)


def test_save_state_and_load_state_hold_model_and_criterion(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model, criterion, *_ = prepare(accelerator, 4)
    total(model, criterion, noisy_batch(TIMES), step=7)
    for parameter in [*model.parameters(), *criterion.parameters()]:
        parameter.data += 1.0
    accelerator.save_state(str(tmp_path))
    wanted = {**model.state_dict(), **criterion.state_dict()}
    reset()
    accelerator = Accelerator(cpu=True)
    model, criterion, *_ = prepare(accelerator, 4)
    accelerator.load_state(str(tmp_path))
    found = {**model.state_dict(), **criterion.state_dict()}
    assert [name for name, tensor in wanted.items() if not torch.equal(found[name], tensor)] == []
    assert json.loads(bytes(found["_extra_state"].tolist()))["step"] == 7


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model, self.criterion, self.found = student(), None, {}

    def configure_model(self) -> None:
        if self.criterion is None:  # Lightning calls this before each of fit, validate and test
            self.criterion = new_criterion(self.model, stop_step=100)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return total(self.model, self.criterion, Batch(*batch), step=self.global_step)

    def on_after_backward(self) -> None:
        self.found = self.found or gradients(self.model, self.criterion)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")  # said on machines with more than a few processors
def test_in_lightning_it_is_attached_in_configure_model(tmp_path: Path) -> None:
    module = Module()
    quiet: dict[str, Any] = dict.fromkeys(["logger", "enable_progress_bar", "enable_model_summary"], False)
    trainer = Trainer(max_steps=3, accelerator="cpu", enable_checkpointing=False, default_root_dir=tmp_path, **quiet)
    trainer.fit(module, DataLoader(TensorDataset(*noisy_batch(TIMES)), batch_size=8))
    assert_same(module.found, plain_gradients(noisy_batch(TIMES)))
    assert module.criterion._step == 2
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt")["state_dict"]
    assert {"model.blocks.0.fc1.weight", "criterion.heads.0.0.weight", "criterion._extra_state"} <= saved.keys()
    assert not [key for key in saved if "teacher" in key]
