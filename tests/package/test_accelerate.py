"""``accelerator.prepare(model, criterion, optimizer, loader)``: on one process, and on two over gloo."""

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
from loops import Batch, assert_same, denoising, gradients, new_criterion, noisy_batch, plain_gradients, student
from ranks import RANKS, on_ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from selftrans_reg import LossTerms

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
    found = {}
    for rows in loader:
        b = Batch(*rows)
        with accelerator.accumulate(model, criterion):
            terms = criterion(denoising(model, b), latents=b.latents)
            accelerator.backward(terms.total)
            if accelerator.sync_gradients:
                assert not found, "one step was expected"
                found = gradients(model, criterion)
            optimizer.step()
            optimizer.zero_grad()
    return found


@pytest.mark.parametrize("steps", [1, 4])
def test_one_process_also_with_accumulation(steps: int) -> None:
    assert_same(epoch(steps, 1), plain_gradients(noisy_batch(TIMES)))


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
    assert isinstance(terms, LossTerms)
    assert len(seen) > 2
    assert set(seen) == {torch.bfloat16}
    assert {term.dtype for term in terms} == {torch.float32}
    accelerator.backward(terms.total)
    found = gradients(model, criterion)
    assert_same(found, plain_gradients(noisy_batch(TIMES)), tolerance=0.05)


@pytest.mark.parametrize("prepared", [True, False], ids=["prepared", "registered"])
def test_save_state_and_load_state_hold_model_and_criterion(prepared: bool, tmp_path: Path) -> None:
    """Registered where a script saves models by itself: diffusers' hook raises on a prepared model it does not know."""

    def begin() -> tuple[Accelerator, nn.Module, nn.Module]:
        reset()
        accelerator = Accelerator(cpu=True)
        if prepared:
            return accelerator, *prepare(accelerator, 4)[:2]
        model = accelerator.prepare(student())
        criterion = new_criterion(model)
        accelerator.register_for_checkpointing(criterion)

        def save_model_hook(models: list[nn.Module], weights: list[object], folder: str) -> None:
            for held in models:
                if not isinstance(accelerator.unwrap_model(held), type(accelerator.unwrap_model(model))):
                    raise ValueError(f"unexpected save model: {held.__class__}")  # noqa: TRY004
                torch.save(held.state_dict(), Path(folder, "model.pt"))
                weights.pop()

        def load_model_hook(models: list[nn.Module], folder: str) -> None:
            models.pop().load_state_dict(torch.load(Path(folder, "model.pt")))

        accelerator.register_save_state_pre_hook(save_model_hook)
        accelerator.register_load_state_pre_hook(load_model_hook)
        return accelerator, model, criterion

    accelerator, model, criterion = begin()
    b = noisy_batch(TIMES)
    criterion(denoising(model, b), latents=b.latents, step=7)
    with torch.no_grad():
        for parameter in [*model.parameters(), *criterion.parameters()]:
            parameter.add_(1.0)
    accelerator.save_state(str(tmp_path))
    wanted = {**model.state_dict(), **criterion.state_dict()}
    accelerator, model, criterion = begin()
    accelerator.load_state(str(tmp_path))
    found = {**model.state_dict(), **criterion.state_dict()}
    assert [name for name, tensor in wanted.items() if not torch.equal(found[name], tensor)] == []
    assert json.loads(bytes(found["_extra_state"].tolist()))["step"] == 7
