"""The examples' trainer: its step, its average, its log, and that it goes on where it was."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from common.options import Mistake
from common.paths import denoising_loss
from common.training import Training, TrainSettings, endless, train
from long_runs import new_criterion, new_sit
from torch import Tensor, nn


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    while True:
        yield torch.randn(16, 2, 4, 4, generator=generator), torch.arange(16) % 3


@pytest.fixture(autouse=True)
def own_rng() -> Iterator[None]:
    with torch.random.fork_rng():
        yield


def test_one_plain_step_after_another() -> None:
    """AdamW, clipping, warm-up and the average, written out for one parameter."""
    model = nn.Module()
    model.w = nn.Parameter(torch.tensor(5.0))
    settings = TrainSettings(steps=3, lr=0.1, warmup_steps=2, decay_steps=2, clip=1.0, ema_decay=0.8)
    result = train(model, endless([(torch.ones(2), torch.zeros(2))]), lambda m, x, y: m.w**2 * x, settings)

    w, average, m, v = 5.0, None, 0.0, 0.0
    for step in range(3):
        gradient = min(2 * w, 1.0)  # clipped to norm 1
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        lr = 0.1 * (0.5, 1.0, 0.5)[step]  # up in two steps, and down in two: the last one has the last half
        w -= lr * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))) ** 0.5 + 1e-8)
        average = w if average is None else 0.8 * average + 0.2 * w
    assert model.w.item() == pytest.approx(w, rel=1e-5)
    assert result.ema.module.w.item() == pytest.approx(average, rel=1e-5)
    assert not result.ema.module.w.requires_grad
    assert [entry["step"] for entry in result.log] == [0, 2]
    assert result.log[0]["denoising"] == pytest.approx(25)


def test_a_resumed_run_is_the_uninterrupted_one_and_both_train_the_head(tmp_path: Path) -> None:
    settings, told, ends = TrainSettings(steps=22, lr=1e-3, warmup_steps=4, ema_decay=0.9), [], []

    def after(run: Training) -> None:
        told.append(run.steps)
        if run.steps == 9:
            torch.save(run.state_dict(), tmp_path / "state.pt")

    for resume in (False, True):
        model = new_sit()
        criterion = new_criterion("1", model, health_interval=20)
        before = [parameter.clone() for parameter in criterion.parameters()]
        torch.manual_seed(5 if resume else 2)  # a resumed run takes the generator's state from the file
        state = torch.load(tmp_path / "state.pt", weights_only=True) if resume else None
        same = {"criterion": criterion, "resume": state, "after_step": after}
        result = train(model, batches(), denoising_loss, settings, **same)
        assert not any(torch.equal(*pair) for pair in zip(before, criterion.parameters(), strict=True))
        tensors = {**model.state_dict(), **result.ema.module.state_dict(), **criterion.state_dict()}
        ends.append((tensors | {"drawn": torch.rand(1)}, result.log))
    assert told == [*range(1, 23), *range(10, 23)]
    (whole, log), (resumed, resumed_log) = ends
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    assert resumed_log == log
    assert [entry["step"] for entry in log] == [0, 20, 21]
    assert all(entry.keys() == {"step", "denoising", "alignment", "in_window"} for entry in log)


def test_epochs_follow_each_other_and_one_without_a_batch_is_an_error() -> None:
    found = endless("ab")
    assert [next(found) for _ in range(5)] == [*"ababa"]
    used_up = endless(iter("a"))
    assert next(used_up) == "a"
    for empty in (endless([]), used_up):
        with pytest.raises(Mistake, match="no batch"):
            next(empty)
