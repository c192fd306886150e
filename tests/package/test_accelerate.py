"""``accelerator.prepare(model, criterion, optimizer, loader)``: on one process, and on two over gloo."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
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


def prepare(
    accelerator: Accelerator, batch_size: int
) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer, DataLoader]:
    model = student()
    criterion = new_criterion(model)
    optimizer = torch.optim.SGD([*model.parameters(), *criterion.parameters()], lr=0.0)
    loader = DataLoader(TensorDataset(*noisy_batch(TIMES)), batch_size=batch_size)
    return accelerator.prepare(model, criterion, optimizer, loader)


def epoch(accelerator: Accelerator, batch_size: int) -> dict[str, Tensor]:
    """One pass over the eight rows as a single optimiser step; the gradients that it would have used."""
    model, criterion, optimizer, loader = prepare(accelerator, batch_size)
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
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=steps)
    assert_same(epoch(accelerator, len(TIMES) // steps), plain_gradients(noisy_batch(TIMES)))


def on_a_rank(rank: int, steps: int) -> dict[str, Tensor]:
    # What a launcher sets. The group has been formed, so nobody meets at the address.
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS, "MASTER_ADDR": "none"}
    launched["OMP_NUM_THREADS"] = 1
    with patch.dict(os.environ, {name: str(value) for name, value in launched.items()}):
        try:
            accelerator = Accelerator(cpu=True, gradient_accumulation_steps=steps)
            assert accelerator.num_processes == RANKS
            return epoch(accelerator, len(TIMES) // steps // RANKS)
        finally:
            reset()


@pytest.mark.parametrize("steps", [1, 2])
def test_two_processes_equal_one_also_with_accumulation(steps: int) -> None:
    for found in on_ranks(on_a_rank, steps):
        assert_same(found, plain_gradients(noisy_batch(TIMES)))


def test_mixed_precision_keeps_the_loss_in_float32() -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model, criterion, _, loader = prepare(accelerator, len(TIMES))
    inner = accelerator.unwrap_model(model)
    seen: list[torch.dtype] = []
    for module in (inner.blocks[0].fc1, criterion.heads[0][0], criterion.teacher.model.blocks[0].fc1):
        module.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    b = Batch(*next(iter(loader)))
    terms = criterion(denoising(model, b), latents=b.latents)
    assert isinstance(terms, LossTerms)
    assert set(seen) == {torch.bfloat16}, "autocast reached not all of student, head and teacher"
    assert {term.dtype for term in terms} == {torch.float32}
    assert terms.in_window == 0.5
    accelerator.backward(terms.total)
    found, wanted = gradients(model, criterion), plain_gradients(noisy_batch(TIMES))
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0.05 * tensor.abs().max().item() + 1e-6)


def test_save_state_where_a_script_saves_models_by_itself(tmp_path: Path) -> None:
    """As diffusers' scripts do: their hook raises on a prepared model that it does not know."""

    def begin() -> tuple[Accelerator, nn.Module, nn.Module]:
        accelerator = Accelerator(cpu=True)
        model = student()
        criterion = new_criterion(model)
        optimizer = torch.optim.SGD([*model.parameters(), *criterion.parameters()], lr=0.1)
        model, optimizer = accelerator.prepare(model, optimizer)
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
        for parameter in criterion.parameters():
            parameter.add_(1.0)
    accelerator.save_state(str(tmp_path))
    wanted = criterion.state_dict()
    reset()
    accelerator, model, criterion = begin()
    accelerator.load_state(str(tmp_path))
    assert [name for name, tensor in criterion.state_dict().items() if not torch.equal(tensor, wanted[name])] == []


def test_save_state_and_load_state_hold_model_and_criterion(tmp_path: Path) -> None:
    def begin() -> tuple[Accelerator, nn.Module, nn.Module]:
        accelerator = Accelerator(cpu=True)
        return accelerator, *prepare(accelerator, 4)[:2]

    accelerator, model, criterion = begin()
    b = noisy_batch(TIMES)
    criterion(denoising(model, b), latents=b.latents, step=7)
    with torch.no_grad():
        for parameter in [*model.parameters(), *criterion.parameters()]:
            parameter.add_(1.0)
    accelerator.save_state(str(tmp_path))
    wanted = {**model.state_dict(), **criterion.state_dict()}
    reset()
    accelerator, model, criterion = begin()
    accelerator.load_state(str(tmp_path))
    found = {**model.state_dict(), **criterion.state_dict()}
    assert [name for name, tensor in wanted.items() if not torch.equal(found[name], tensor)] == []
    assert int(json.loads(bytes(criterion.state_dict()["_extra_state"].tolist()))["step"]) == 7
