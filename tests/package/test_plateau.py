"""The plateau rule: it stops where it says so, on all ranks, after a resumption, and whatever wraps the model."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkpointed import MODELS
from loops import LAYER, denoising, new_criterion, new_teacher, noisy_batch, student, total
from plain import refused
from ranks import on_ranks
from torch import Tensor, nn

import selftrans_reg as st
from selftrans_reg.errors import CaptureError
from selftrans_reg.plateau import GradientProbe, PlateauRule

# Dynamo looks at the .grad of every tensor, and hides the warning of its own looking in a way that pytest undoes.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture(autouse=True)
def _forget_what_was_compiled() -> Iterator[None]:
    yield
    torch.compiler.reset()


TIMES = [0.35, 0.5, 0.58, 0.9]
CPU = torch.device("cpu")
EVERY_CALL = st.Plateau(interval=1, patience=3, threshold=0.2, smoothing=0.5)
FALLING = [0.9, 0.6, 0.5, 0.3, 0.35, 0.1, 0.3, 0.05, -0.1, 0.0, -0.3, -0.2, -0.4, 0.0, -0.1]
STEADY = [0.5, 0.1, 0.4, 0.3, 0.1, 0.1, 0.5, 0.3, 0.4, 0.1, 0.2, 0.6, 0.3, 0.2, 0.3]


def plain_stop(cosines: Sequence[float], rule: st.Plateau) -> int | None:
    """The rule written out: the mean of all measurements, older ones weighing less, compared in a row."""
    below, seen = 0, []
    for call in range(1, len(cosines) + 1):
        if call % rule.interval:
            continue
        if seen:  # what the last measured call gave is read in this one
            weights = [rule.smoothing**age for age in range(len(seen))][::-1]
            mean = sum(w * c for w, c in zip(weights, seen, strict=True)) / sum(weights)
            below = below + 1 if mean < rule.threshold else 0
            if below == rule.patience:
                return call
        seen.append(cosines[call - 1])
    return None


@pytest.mark.parametrize("resumed", [False, True], ids=["", "resumed after each call"])
@pytest.mark.parametrize(
    ("changes", "cosines", "stops"),
    [
        ({}, FALLING, True),
        ({"interval": 2, "patience": 1}, FALLING, True),
        ({"smoothing": 0.0, "patience": 2}, FALLING, True),
        ({"smoothing": 0.9, "threshold": 0.4}, FALLING, True),
        ({}, STEADY, False),
    ],
)
def test_it_stops_where_the_rule_says(
    changes: dict[str, Any], cosines: list[float], stops: bool, resumed: bool
) -> None:
    plateau = dataclasses.replace(EVERY_CALL, **changes)
    rule = PlateauRule(plateau)
    for calls, cosine in enumerate(cosines, 1):
        rule.decide(calls, None, CPU)
        if rule.stopped_at is not None:
            break
        rule.arm(GradientProbe(sums=torch.tensor([2 * cosine, 1.0, 4.0])), calls)  # d·a, d², a²
        if resumed:
            state = json.loads(json.dumps(rule.state()))
            rule = PlateauRule(plateau)
            rule.load(state)
    assert (rule.stopped_at is not None) == stops
    assert rule.stopped_at == plain_stop(cosines, plateau)


@pytest.mark.parametrize("trouble", [None, "no sample inside", "overflow"])
def test_from_the_stop_on_the_teacher_is_not_run_nor_needed(trouble: str | None) -> None:
    model, teacher, ran = student(), new_teacher(), []
    teacher.model.register_forward_pre_hook(lambda module, args: ran.append(1))
    rule, stop = st.Plateau(interval=2, patience=2, threshold=0.99), 17 if trouble else 15
    criterion = new_criterion(model, teacher=teacher, stop_when=rule)
    for step in range(10, 20):
        troubled = trouble if step == 11 else None  # then nothing is measured
        ran.clear()
        b = noisy_batch([0.9] * 4 if troubled == "no sample inside" else TIMES)
        terms = criterion(denoising(model, b), latents=b.latents, step=step)
        (terms.total * (torch.inf if troubled == "overflow" else 1)).backward()
        assert (terms.weight > 0) == (step < stop)
        assert (len(ran) > 0) == (step < stop and troubled != "no sample inside")
        if step == stop - 2:
            found = criterion.measures["gradient_cosine_smoothed"], criterion.measures["gradient_cosine"]
            torch.testing.assert_close(*found)  # each call has the same
    assert criterion.stopped_at == stop
    assert criterion.measures == {}
    other, settings = student(), {"time": "sit", "target_size": 16, "hidden_features": 24, "stop_when": rule}
    resumed = st.SelfTransLoss.stage2(other, layer=f"blocks.{LAYER}", teacher=None, **settings)
    resumed.load_state_dict(criterion.state_dict())
    assert resumed.stopped_at == stop
    assert total(other, resumed, b) == denoising(other, b).mean()
    with refused(st.SettingError, "'patience': 2, ", "has stopped; this criterion has none"):
        new_criterion(student()).load_state_dict(criterion.state_dict())


def test_settings_that_make_no_sense() -> None:
    for name, value in (("interval", 0), ("patience", 2.0), ("threshold", float("nan")), ("smoothing", True)):
        with refused(st.SettingError, f"Plateau's {name} must be a ", f"; got {value!r}"):
            st.Plateau(**{name: value})


def measured(model: nn.Module, run: nn.Module | None = None) -> tuple[Tensor, Tensor]:
    """The cosine that the criterion finds on ``run``, or ``model``, and that of a plain model beside it."""
    b = noisy_batch(TIMES)
    criterion = new_criterion(model, stop_when=st.Plateau(interval=1))
    total(model if run is None else run, criterion, b).backward()
    reference, seen = student(), []
    plain = new_criterion(reference)
    reference.blocks[LAYER].register_forward_hook(lambda module, args, output: seen.append(output))
    (g,) = torch.autograd.grad(total(reference, plain, b), seen[0])
    (d,) = torch.autograd.grad(denoising(reference, b).mean(), seen[1])
    return criterion.measures["gradient_cosine"], F.cosine_similarity((g - d)[:3].flatten(), d[:3].flatten(), dim=0)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_checkpointing_changes_nothing(kind: str, reentrant: bool) -> None:
    torch.testing.assert_close(*measured(MODELS[kind](reentrant, CPU)), rtol=1e-4, atol=1e-6)


def test_compiled_blocks_change_nothing() -> None:
    model = student()
    for block in model.blocks:
        block.compile(backend="aot_eager")
    torch.testing.assert_close(*measured(model), rtol=1e-4, atol=1e-6)


def test_what_hides_the_gradient_is_an_error_for_the_rule_and_no_alarm_without() -> None:
    first, model, b = student(), student(), noisy_batch(TIMES)
    with refused(CaptureError, "PyTorch's graph hides"):  # a detached loss is on the page of errors
        measured(first, torch.compile(first, backend="aot_eager"))
    torch.compiler.reset()
    criterion, compiled = new_criterion(model, health_interval=1), torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.SGD([*model.parameters(), *criterion.parameters()], lr=1e-3)
    for _ in range(25):
        total(compiled, criterion, b).backward()
        optimizer.step()
    assert criterion.measures.keys() == {"student_norm", "target_norm", "contrast"}


def smoothed(rank: int, sums: Tensor) -> Tensor:
    """What the rule has read in each call, from this rank's own sums (calls, ranks, 3)."""
    rule, found = PlateauRule(EVERY_CALL), []
    for calls, own in enumerate(sums[:, rank], 1):
        found.append(rule.decide(calls, None, CPU).get("gradient_cosine_smoothed", torch.zeros(())))
        rule.arm(GradientProbe(sums=own), calls)
    return torch.stack(found)


def test_ranks_read_the_sums_of_all_though_they_see_different_cosines() -> None:
    cosines = torch.tensor([[0.9, 0.9], [0.6, -0.6], [-0.9, 0.7], [-0.8, 0.0], [-0.9, 0.2]])
    sums = torch.stack([2 * cosines, torch.ones(5, 2), torch.full((5, 2), 4.0)], dim=2)
    sums[1, 0] = 0  # no sample inside
    wanted = smoothed(0, sums.sum(1, keepdim=True))
    assert wanted[1:].abs().min() > 0.01
    for found in on_ranks(smoothed, sums):
        torch.testing.assert_close(found, wanted)
