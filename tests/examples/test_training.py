"""The examples' trainer: its step, its average, its log, and that a criterion changes nothing but the loss."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from common.options import Mistake
from common.paths import denoising_loss
from common.sit import SiT
from common.training import Training, TrainSettings, endless, train
from torch import Tensor, nn

import selftrans_reg as st

SETTINGS = TrainSettings(steps=22, lr=1e-3, warmup_steps=4, ema_decay=0.9)


def tiny_sit() -> SiT:
    torch.manual_seed(0)
    sizes = {"input_size": 4, "patch_size": 1, "in_channels": 2, "hidden_size": 16, "depth": 3, "num_heads": 2}
    return SiT(**sizes, num_classes=3, learn_sigma=False)


def stage1(model: SiT, **settings: object) -> st.SelfTransLoss:
    same = {"latent_channels": 2, "patch_size": 1, "hidden_features": 8, "window": None}
    return st.SelfTransLoss.stage1(model, layer="blocks.1", time="repa", **same, **settings)


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

    class Scalar(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor(5.0))

    model = Scalar()
    settings = TrainSettings(steps=3, lr=0.1, warmup_steps=2, clip=1.0, ema_decay=0.8)
    result = train(model, endless([(torch.ones(2), torch.zeros(2))]), lambda m, x, y: m.w**2 * x, settings)

    w, average, m, v = 5.0, None, 0.0, 0.0
    for step in range(3):
        gradient = min(2 * w, 1.0)  # clipped to norm 1
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        lr = 0.1 * min(1.0, (step + 1) / 2)
        w -= lr * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))) ** 0.5 + 1e-8)
        average = w if average is None else 0.8 * average + 0.2 * w
    assert model.w.item() == pytest.approx(w, rel=1e-5)
    assert result.ema.module.w.item() == pytest.approx(average, rel=1e-5)
    assert not result.ema.module.w.requires_grad
    assert [entry["step"] for entry in result.log] == [0, 2]
    assert result.log[0]["denoising"] == pytest.approx(25)


def test_a_criterion_of_weight_zero_leaves_the_run_as_it_is() -> None:
    runs = []
    for with_criterion in (False, True):
        model = tiny_sit()
        criterion = stage1(model, weight=0.0) if with_criterion else None
        torch.manual_seed(2)
        result = train(model, batches(), denoising_loss, SETTINGS, criterion=criterion)
        runs.append({**model.state_dict(), **result.ema.state_dict()})
    plain, watched = runs
    assert [name for name in plain if not torch.equal(plain[name], watched[name])] == []


def test_a_criterion_adds_its_terms_to_the_log_and_its_head_is_trained() -> None:
    model = tiny_sit()
    criterion, told = stage1(model), []
    before = [parameter.clone() for parameter in criterion.parameters()]
    result = train(
        model, batches(), denoising_loss, SETTINGS, criterion=criterion, after_step=lambda run: told.append(run.steps)
    )
    assert told == [*range(1, 23)]
    assert [sorted(entry) for entry in result.log] == [["alignment", "denoising", "in_window", "step"]] * 3
    assert [entry["step"] for entry in result.log] == [0, 20, 21]
    assert result.log[-1]["alignment"] < result.log[0]["alignment"]
    assert not any(torch.equal(*pair) for pair in zip(before, criterion.parameters(), strict=True))


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    saved = tmp_path / "state.pt"

    def save(run: Training) -> None:
        if run.steps == 9:
            torch.save(run.state_dict(), saved)

    ends = []
    for resume in (False, True):
        model = tiny_sit()
        criterion = stage1(model)
        torch.manual_seed(5 if resume else 2)  # a resumed run takes the generator's state from the file
        state = torch.load(saved, weights_only=True) if resume else None
        result = train(model, batches(), denoising_loss, SETTINGS, criterion=criterion, resume=state, after_step=save)
        ends.append(
            (
                {**model.state_dict(), **result.ema.module.state_dict(), **criterion.state_dict()},
                result.log,
                torch.rand(1),
            )
        )
    (whole, log, drawn), (resumed, resumed_log, drawn_again) = ends
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert resumed_log == log
    assert torch.equal(drawn, drawn_again)


def test_epochs_follow_each_other_and_one_without_a_batch_is_an_error() -> None:
    found = endless("ab")
    assert [next(found) for _ in range(5)] == [*"ababa"]
    used_up = endless(iter("a"))
    assert next(used_up) == "a"
    for empty in (endless([]), used_up):
        with pytest.raises(Mistake, match="no batch"):
            next(empty)
