"""The plateau rule: gradients of a known cosine, stops where they say so, on all ranks, and after a resumption."""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkpointed import MODELS
from loops import LAYER, denoising, new_criterion, new_teacher, noisy_batch, student, total
from ranks import on_ranks
from torch import Tensor, nn

import selftrans_reg as st
from selftrans_reg.errors import CaptureError

# Dynamo looks at the .grad of every tensor, and hides the warning of its own looking in a way that pytest undoes.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

TIMES = [0.35, 0.5, 0.58, 0.9]
EVERY_CALL = st.Plateau(interval=1, patience=3, threshold=0.2, smoothing=0.5)


class Planted(nn.Module):
    """A layer whose tokens are the output, so that a loss can have any gradient there."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(4, 8, 2, 2)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layer(x)


class PlantedRun:
    """A loop in which the cosine of each call is chosen."""

    def __init__(self, rule: st.Plateau | None, **settings: Any) -> None:
        self.model = Planted()
        shape = {"latent_channels": 4, "patch_size": 2, "hidden_size": 8, "hidden_features": 8}
        settings = shape | {"time": "sit", "check_interval": None, "stop_when": rule} | settings
        self.criterion = st.SelfTransLoss.stage1(self.model, layer="layer", **settings)

    def call(
        self, cosine: float, *, factor: float = 1.0, seed: int = 0, times: Sequence[float] = TIMES
    ) -> st.LossTerms:
        """One call and its backward pass; the denoising loss's gradient at the tokens has this cosine and factor."""
        b = noisy_batch(list(times), seed=seed)
        output = self.model(b.x_t, b.t)
        tokens = output.detach().flatten(2).transpose(1, 2).requires_grad_()
        inside = ((b.t >= 0.3) & (b.t <= 0.6)).float()
        alignment = (inside * self.criterion.heads[0](tokens, b.latents)).sum() / len(b.t)
        (a,) = torch.autograd.grad(alignment, tokens)
        other = torch.randn(a.shape, generator=torch.Generator().manual_seed(seed + 1)) * inside[:, None, None]
        other -= (other * a).sum() / a.square().sum().clamp(min=1e-30) * a
        wanted = factor * (
            cosine * F.normalize(a.flatten(), dim=0) + (1 - cosine**2) ** 0.5 * F.normalize(other.flatten(), dim=0)
        )
        # Outside the window the loop's loss may have any gradient: only where there is an alignment is it compared.
        wanted = wanted.reshape(a.shape) + 3 * (1 - inside)[:, None, None]
        terms = self.criterion((output.flatten(2).transpose(1, 2) * wanted).sum(), latents=b.latents)
        terms.total.backward()
        return terms

    def stops_at(self, cosines: Sequence[float]) -> int | None:
        """The number of the first call without alignment, counted from 1; None if all have one."""
        weights = [self.call(cosine, seed=i).weight.item() for i, cosine in enumerate(cosines)]
        on = sum(weight > 0 for weight in weights)
        assert weights == [0.5] * on + [0.0] * (len(weights) - on)
        return None if on == len(weights) else on + 1


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


FALLING = [0.9, 0.6, 0.5, 0.3, 0.35, 0.1, 0.3, 0.05, -0.1, 0.0, -0.3, -0.2, -0.4, 0.0, -0.1]
STEADY = [0.5, 0.1, 0.4, 0.3, 0.1, 0.1, 0.5, 0.3, 0.4, 0.1, 0.2, 0.6, 0.3, 0.2, 0.3]


@pytest.mark.parametrize(("cosine", "factor"), [(-0.9, 1e-4), (0.0, 1e3), (0.99, 1.0)])
def test_a_planted_cosine_is_measured(cosine: float, factor: float) -> None:
    run = PlantedRun(EVERY_CALL)
    run.call(cosine, factor=factor)
    assert run.criterion.measures["gradient_cosine"].item() == pytest.approx(cosine, abs=2e-3)


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
def test_it_stops_where_the_rule_says(changes: dict[str, Any], cosines: list[float], stops: bool) -> None:
    rule = dataclasses.replace(EVERY_CALL, **changes)
    wanted, run = plain_stop(cosines, rule), PlantedRun(rule)
    assert (wanted is not None) == stops
    assert run.stops_at(cosines) == run.criterion.stopped_at == wanted


def test_a_call_without_a_sample_inside_and_one_that_overflowed_measure_nothing() -> None:
    run = PlantedRun(EVERY_CALL)
    for seed in range(6):
        run.call(-0.5, seed=seed, times=[0.9, 0.95])
        run.call(-0.5, seed=seed, factor=torch.inf)
    assert run.criterion.stopped_at is None
    assert run.stops_at([-0.5] * 6) == 4


def test_from_the_stop_on_the_teacher_is_not_run_nor_needed() -> None:
    model, teacher, ran = student(), new_teacher(), []
    teacher.model.register_forward_pre_hook(lambda module, args: ran.append(1))
    rule, b = st.Plateau(interval=2, patience=1, threshold=0.99), noisy_batch(TIMES)
    criterion = new_criterion(model, teacher=teacher, stop_when=rule)
    for step in range(10, 17):
        before = len(ran)
        terms = criterion(denoising(model, b), latents=b.latents, step=step)
        terms.total.backward()
        assert (len(ran) > before) == (terms.weight > 0) == (step < 13)
    assert criterion.stopped_at == 13
    assert criterion.measures == {}
    other, settings = student(), {"time": "sit", "target_size": 16, "hidden_features": 24, "stop_when": rule}
    resumed = st.SelfTransLoss.stage2(other, layer=f"blocks.{LAYER}", teacher=None, **settings)
    resumed.load_state_dict(criterion.state_dict())
    assert resumed.stopped_at == 13
    assert total(other, resumed, b) == denoising(other, b).mean()


@pytest.mark.parametrize("done", range(1, len(FALLING), 2))
def test_stopped_after_any_call_it_goes_on_as_if_it_had_not(done: int) -> None:
    rule = dataclasses.replace(EVERY_CALL, interval=2 if done % 4 == 1 else 1, patience=2)
    through, first, resumed = PlantedRun(rule), PlantedRun(rule), PlantedRun(rule)
    wanted = [through.call(cosine, seed=i).weight.item() for i, cosine in enumerate(FALLING)]
    assert wanted[0] > 0 == wanted[-1]
    found = [first.call(cosine, seed=i).weight.item() for i, cosine in enumerate(FALLING[:done])]
    resumed.criterion.load_state_dict(copy.deepcopy(first.criterion.state_dict()))
    found += [resumed.call(c, seed=i).weight.item() for i, c in enumerate(FALLING[done:], done)]
    assert found == wanted
    assert torch.equal(*(run.criterion.state_dict()["_extra_state"] for run in (resumed, through)))


def test_a_run_that_was_stopped_is_not_resumed_without_the_rule() -> None:
    run, without = PlantedRun(EVERY_CALL), PlantedRun(None)
    assert run.stops_at([-0.5] * 5) == 4
    with pytest.raises(st.SettingError, match=r"'patience': 3, .*has stopped; this criterion has none"):
        without.criterion.load_state_dict(run.criterion.state_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"interval": 0}, "Plateau's interval must be a positive integer; got 0"),
        ({"patience": 2.0}, "Plateau's patience must be a positive integer"),
        ({"threshold": float("nan")}, "Plateau's threshold must be a number from -1 to below 1; got nan"),
        ({"smoothing": True}, "Plateau's smoothing must be a number from 0 to below 1; got True"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(st.SettingError, match=message):
        st.Plateau(**settings)


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
    torch.testing.assert_close(*measured(MODELS[kind](reentrant, torch.device("cpu"))), rtol=1e-4, atol=1e-6)


def test_blocks_compiled_one_by_one_change_nothing() -> None:
    model = student()
    for block in model.blocks:
        block.compile(backend="aot_eager")
    torch.testing.assert_close(*measured(model), rtol=1e-4, atol=1e-6)
    torch.compiler.reset()


def test_what_hides_the_gradient_is_an_error_for_the_rule_and_no_alarm_without() -> None:
    model, b = student(), noisy_batch(TIMES)
    with pytest.raises(CaptureError, match="PyTorch's graph hides"):  # a detached loss is on the page of errors
        measured(model, torch.compile(model, backend="aot_eager"))
    torch.compiler.reset()
    criterion, compiled = new_criterion(model, health_interval=1), torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.SGD([*model.parameters(), *criterion.parameters()], lr=1e-3)
    for _ in range(25):
        total(compiled, criterion, b).backward()
        optimizer.step()
    assert criterion.measures.keys() == {"student_norm", "target_norm", "contrast"}
    torch.compiler.reset()


def distributed(rank: int, times: list[list[float]], cosines: list[list[float]]) -> tuple[Tensor, Tensor]:
    """Each rank's own batches and cosines; the weight of every call, and the smoothed cosines."""
    run, weights, smoothed = PlantedRun(EVERY_CALL), [], []
    for call, per_rank in enumerate(cosines):
        weights.append(run.call(per_rank[rank], seed=10 * call + rank, times=times[rank]).weight)
        smoothed.append(run.criterion.measures.get("gradient_cosine_smoothed", torch.zeros(())))
    return torch.stack(weights), torch.stack(smoothed)


@pytest.mark.parametrize("second", [TIMES, [0.9, 0.95, 0.8, 0.99]], ids=["", "one has no sample inside"])
def test_ranks_stop_at_the_same_call_though_they_see_different_cosines(second: list[float]) -> None:
    cosines = [[0.9, 0.9], [0.5, 0.3], [0.6, -0.6], [-0.9, 0.7], [-0.8, 0.1], [-0.8, 0.0], [-0.9, 0.2], [-0.9, 0.2]]
    (weights, smoothed), others = on_ranks(distributed, [TIMES, second], cosines)
    assert torch.equal(weights, others[0])
    assert torch.equal(smoothed, others[1])
    assert weights[0] > 0 == weights[-1]
    if second is not TIMES:  # what the other one sees is all there is
        assert weights.tolist().index(0.0) + 1 == plain_stop([c[0] for c in cosines], EVERY_CALL)
