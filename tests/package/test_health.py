"""Health: what is measured is right, a healthy run is left in peace, and a fault is named in time.

Every message and its cause run on the page of errors; here is what the page cannot show.
"""

import copy
import json
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loops import (
    GUIDANCE_SCALE,
    LAYER,
    NULL_CLASS,
    TEACHER_LAYER,
    Batch,
    denoising,
    new_criterion,
    new_teacher,
    noisy_batch,
    plain_tokens,
    student,
    toy,
)
from torch import Tensor, nn
from toys import ToyDiT

import selftrans_reg as st
from selftrans_reg import health as health_module
from selftrans_reg.errors import NotFiniteError
from selftrans_reg.health import Health

# t of SiT, where 1 is data: three of the four are inside the default window.
TIMES = [0.35, 0.5, 0.58, 0.9]
OUTSIDE = [0.9, 0.95, 0.8, 0.99]


class Run:
    """A loop of a toy model, with a new batch at each step.

    Args:
        loss: What backward() is called on, from the terms and the loop's own loss.
        own: What the criterion is given of the loop's own loss, times this.
        labels: The batch's labels, from the number of the step and those of the batch.
    """

    def __init__(self, stage: int = 2, model: nn.Module | None = None, **settings: Any) -> None:
        self.loss: Callable[[st.LossTerms, Tensor], Tensor] = settings.pop("loss", lambda terms, own: terms.total)
        self.labels: Callable[[int, Tensor], Tensor] = settings.pop("labels", lambda step, y: y)
        self.lr, self.own, self.done = settings.pop("lr", 1e-2), settings.pop("own", 1.0), 0
        self.model = student() if model is None else model
        self.criterion = new_criterion(self.model, stage, **{"health_interval": 5} | settings)
        self.parameters = [*self.model.parameters(), *self.criterion.parameters()]
        self.said: list[Warning] = []

    def batch(self, times: list[float] = TIMES) -> Batch:
        b = noisy_batch(times, seed=self.done)
        return b._replace(y=self.labels(self.done, b.y))

    def steps(self, count: int, times: list[float] = TIMES, accumulate: int = 1) -> list[Warning]:
        """Train for so many steps, and return what was warned of so far."""
        optimizer = torch.optim.AdamW(self.parameters, lr=self.lr)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(count):
                b = self.batch(times)
                own = self.own * denoising(self.model, b)
                self.loss(self.criterion(own, latents=b.latents), own.mean()).backward()
                self.done += 1
                if self.done % accumulate == 0:
                    optimizer.step()
                    optimizer.zero_grad()
        self.said += [warning.message for warning in caught]
        return self.said

    def warned(self, kind: str, *parts: str) -> None:
        """Assert that there was one warning, of this kind, that says these things."""
        assert [getattr(message, "kind", message) for message in self.said] == [kind]
        assert [part for part in (f"{kind}: ", *parts) if part not in str(self.said[0])] == []


def own_loss(terms: st.LossTerms, own: Tensor) -> Tensor:
    return own


class TestMeasures:
    def test_norms_and_contrast_are_those_of_the_formulas(self) -> None:
        run, b = Run(), noisy_batch(TIMES)
        run.criterion(denoising(run.model, b), latents=b.latents)
        inside = b.rows(slice(0, 3))
        tokens, _ = plain_tokens(run.model, b, b.y, LAYER)
        f_c, _ = plain_tokens(toy(2), inside, inside.y, TEACHER_LAYER)
        f_u, _ = plain_tokens(toy(2), inside, torch.full_like(inside.y, NULL_CLASS), TEACHER_LAYER)
        guided = f_u + GUIDANCE_SCALE * (f_c - f_u)
        wanted = {
            "student_norm": tokens.square().sum(-1).sqrt().mean().detach(),
            "target_norm": guided.square().sum(-1).sqrt().mean(),
            "contrast": (f_c - f_u).square().sum().sqrt() / f_c.square().sum().sqrt(),
        }
        torch.testing.assert_close(run.criterion.measures, wanted, rtol=1e-5, atol=1e-6)
        assert not any(value.requires_grad for value in run.criterion.measures.values())

    def test_in_float16_the_norm_of_all_features_does_not_overflow(self) -> None:
        f_u, health = torch.full((8, 64, 64), 900.0), Health(1)
        health.measure(SimpleNamespace(tokens=[f_u.half()], features=((1.25 * f_u).half(), f_u.half()), target=f_u))
        assert health.measures["contrast"].item() == pytest.approx(0.2, rel=1e-3)

    @pytest.mark.parametrize("scaled", [1.0, 1024.0], ids=["", "as a gradient scaler scales"])
    @pytest.mark.parametrize(
        ("stage", "layers", "tokens"), [(1, [LAYER], None), (2, [LAYER], slice(3, 9)), (1, [2, 0], None)]
    )
    def test_the_gradients_are_those_of_the_two_terms_at_the_deepest_layer(
        self, stage: int, layers: list[int], scaled: float, tokens: slice | None
    ) -> None:
        """At another one the denoising loss's gradient cannot be told from the deeper layer's alignment."""
        model, seen, b = student(), [], noisy_batch(TIMES)
        teacher = new_teacher(tokens=tokens) if stage == 2 else None
        names = [f"blocks.{layer}" for layer in layers]
        criterion = new_criterion(model, stage, teacher, layer=names, tokens=tokens, weight=0.3)
        model.blocks[layers[0]].register_forward_hook(lambda module, args, output: seen.append(output))
        terms = criterion(denoising(model, b), latents=b.latents)
        (scaled * terms.total).backward(retain_graph=True)
        (whole,) = torch.autograd.grad(terms.total, seen[0], retain_graph=True)
        (own,) = torch.autograd.grad(denoising(model, b).mean(), seen[1])
        compared = (slice(0, 3), slice(None) if tokens is None else tokens)  # inside the window, and aligned
        aligned, own = (whole - own)[compared].flatten(), own[compared].flatten()
        found, cosine = criterion.measures, F.cosine_similarity(aligned, own, dim=0)
        assert 0.001 < abs(cosine) < 0.999
        torch.testing.assert_close(found["gradient_cosine"], cosine, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["gradient_ratio"], aligned.norm() / own.norm(), rtol=1e-4, atol=1e-5)


@pytest.fixture
def judged_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """The alignment is judged after 60 calls, so that a test needs no 2,000."""
    monkeypatch.setattr(health_module, "_LEARNED", 60)
    monkeypatch.setattr(health_module, "_AVERAGED", 10)


def dropped(step: int, y: Tensor) -> Tensor:
    """Every condition dropped by the loop, but for one batch."""
    return y if step == 2 else torch.full_like(y, NULL_CLASS)


@pytest.mark.usefixtures("judged_soon")
class TestNoFalseAlarm:
    @pytest.mark.parametrize("stage", [1, 2])
    def test_in_a_healthy_run(self, stage: int) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(stage)
            assert Run(stage, ToyDiT(depth=3, seed=10), lr=3e-3).steps(120) == []  # it drops labels too

    @pytest.mark.parametrize(
        ("settings", "parts"),
        [  # parts of the run: steps, times, steps accumulated, learning rate
            ({"distance": "cosine"}, [(70, TIMES, 1, 1e-2)]),
            ({"labels": dropped, "health_interval": 1}, [(40, TIMES, 1, 1e-2)]),  # no other batch has a condition
            ({"weight": 0.0, "loss": own_loss}, [(40, TIMES, 1, 1e-2)]),
            ({"health_interval": None, "loss": own_loss}, [(40, TIMES, 1, 1e-2)]),
            ({}, [(30, TIMES, 1, 0.0), (30, TIMES, 1, 1e-3)]),
            ({}, [(70, TIMES, 32, 1e-2)]),
            ({}, [(4, OUTSIDE, 1, 1e-2), (1, TIMES, 1, 1e-2)] * 15),
        ],
        ids=["cosine", "dropped", "weight 0", "switched off", "a warm-up from 0", "accumulation", "few are inside"],
    )
    def test_where_it_is_meant(self, settings: dict[str, Any], parts: list[Any]) -> None:
        run = Run(**settings)
        for count, times, accumulate, run.lr in parts:
            assert run.steps(count, times, accumulate) == []

    def test_in_a_run_that_was_resumed_late_without_its_history(self) -> None:
        """As where health was switched off before: the first stretch that is seen is not the run's first."""
        run = Run(lr=0.0)
        run.criterion._calls = 100_000
        assert run.steps(80) == []

    def test_of_a_base_that_student_and_teacher_share_frozen(self) -> None:
        model = student()
        model.blocks[LAYER].requires_grad_(False)  # its adapter lies elsewhere
        assert Run(model=model, teacher=new_teacher(copy.deepcopy(model))).steps(3) == []
        model.blocks[LAYER].fc2.weight.requires_grad_(True)
        run = Run(model=model, teacher=new_teacher(copy.deepcopy(model)))
        run.steps(1)
        run.warned("same_weights")


def leave_out_the_head(run: Run) -> None:
    first = Run()
    first.steps(25)
    run.criterion.load_state_dict(first.criterion.state_dict())  # resumed
    run.parameters = [*run.model.parameters()]


def cut_the_gradient(run: Run) -> None:
    last = run.criterion.heads[0][4]
    last.weight.data.zero_()
    last.weight.register_hook(torch.zeros_like)


def all_dropped(step: int, y: Tensor) -> Tensor:
    return torch.full_like(y, NULL_CLASS)


class TestFaults:
    @pytest.mark.parametrize(
        ("settings", "plant", "quiet", "steps", "kind", "said"),
        [
            ({}, leave_out_the_head, 19, 40, "head_not_trained", "in 20 calls, while layer 'blocks.1' has"),
            # the head does not move either, but that is no other fault
            ({"loss": own_loss}, None, 1, 40, "no_gradient", "without the alignment's gradient"),
            ({}, cut_the_gradient, 19, 20, "no_gradient", "gradient is exactly 0 at layer 'blocks.1'"),
            ({"own": 256.0}, None, 19, 11, "loss_scale", "a sum over the 256 values of a sample"),
            ({"own": 1e-5}, None, 59, 11, "loss_scale", "so the loss hardly counts"),
            (
                {"loss": lambda terms, own: 2 * own - terms.total, "lr": 1e-4},
                None, 59, 11, "alignment_not_falling", "After 60 calls the alignment is",
            ),
            # contrast is not judged by a few samples: three of each look in the calls 1, 2, 3, 25 and 50
            ({"labels": all_dropped, "health_interval": 25}, None, 74, 1, "no_contrast", "Null condition: y = 10."),
        ],
    )  # fmt: skip
    @pytest.mark.usefixtures("judged_soon")
    def test_it_is_named_once_and_not_too_early(
        self, settings: dict[str, Any], plant: Any, quiet: int, steps: int, kind: str, said: str
    ) -> None:
        run = Run(**settings)
        if plant is not None:
            plant(run)
        assert run.steps(quiet) == []
        run.steps(steps)
        run.warned(kind, said)
        run.steps(15)
        assert [warning.kind for warning in run.said].count(kind) == 1

    def test_a_window_that_nothing_enters(self) -> None:
        run = Run(health_interval=50)
        assert run.steps(99, OUTSIDE * 5) == []
        run.steps(1, OUTSIDE * 5)
        run.warned("empty_window", "None of the 2000 samples of the last 100 calls was inside the window (0.4, 0.7)")

    def test_a_criterion_left_in_eval_mode_while_the_model_trains(self) -> None:
        run = Run()
        run.criterion.eval()
        assert run.steps(19) == []
        with torch.no_grad():
            for _ in range(30):  # validation is as it should be
                run.criterion(denoising(run.model, run.batch()))
        run.steps(3)
        run.warned("eval_mode", "in eval mode for 20 calls in a row")

    def test_steps_may_be_repeated_left_out_and_gone_back_to_with_the_state(self) -> None:
        run = Run(stop_step=1000)
        advance, state = run.criterion.forward, run.criterion.state_dict()
        for steps in (0, 0, 3, 3, 900), (0, 1, 2):
            run.criterion.load_state_dict(state)
            for step in steps:
                run.criterion.forward = lambda own, latents, step=step: advance(own, latents, step=step)
                assert run.steps(1) == []

    def test_what_was_observed_is_resumed_to_the_bit(self) -> None:
        def observed(run: Run) -> list[float]:
            return json.loads(bytes(run.criterion.state_dict()["_extra_state"].tolist()))["health"]

        through, resumed = Run(), Run()
        through.steps(7)
        norm, total, inside, calls, _ = observed(through)
        assert (inside, calls) == (7 * 0.75, 7)
        assert min(norm, total) > 0
        resumed.criterion.load_state_dict(through.criterion.state_dict())
        assert str(observed(resumed)) == str(observed(through))  # NaN is in it


class OverflowingDiT(ToyDiT):
    """A model whose second block gives inf where t is above a bound."""

    def __init__(self, seed: int) -> None:
        super().__init__(depth=3, seed=seed)
        self.dropout = 0.0

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        overflow = self.blocks[1].fc2.register_forward_hook(
            lambda module, args, out: torch.where((t > 0.55)[:, None, None], torch.inf, out)
        )
        with overflow:
            return super().forward(x, t, y)


def teacher_without_a_null_row() -> st.CFGFeatureTeacher:
    model = toy(2)
    model.y_embedder.weight.data[NULL_CLASS] = torch.nan
    return new_teacher(model)


def break_the_head(run: Run, b: Batch) -> None:
    run.steps(3)
    run.criterion.heads[0][2].bias.data[0] = torch.nan
    run.criterion(denoising(run.model, b), latents=b.latents)  # not looked at before the interval


@pytest.mark.parametrize(
    ("settings", "plant", "said"),
    [
        (
            lambda: {"model": OverflowingDiT(1)}, None,
            "student's layer 'blocks.1' .* 2 of 4 samples, at noise fractions from 0.10 to 0.42.*value overflowed",
        ),
        (
            lambda: {"stage": 1}, lambda run, b: b.x_t[2, 0, 0, 0].fill_(torch.nan),
            "in 1 of 4 samples, at noise fraction 0.42.*The model was called with NaN or inf in 'x': look at",
        ),
        (
            lambda: {"teacher": new_teacher(OverflowingDiT(2))}, None,
            "teacher's layer 'blocks.2' gave .* with the condition and with the null condition in 1 of 3 samples",
        ),
        (
            lambda: {"teacher": teacher_without_a_null_row()}, None,
            "gave NaN or inf with the null condition in 3 of 3 samples.*'y_embedder.weight'.*A teacher does not train",
        ),
        (dict, break_the_head, "The alignment is NaN or inf, although.*'heads.0.2.bias'"),
        (
            lambda: {"stage": 1}, lambda run, b: b.latents[0].fill_(torch.inf),
            "The latents to align with hold NaN or inf in 1 of 3 samples, at noise fraction 0.65.",
        ),
    ],
)  # fmt: skip
def test_the_place_and_cause_of_what_is_not_finite_are_named(settings: Any, plant: Any, said: str) -> None:
    run, b = Run(check_interval=None, **settings()), noisy_batch(TIMES)
    if plant is not None:
        plant(run, b)
    with pytest.raises(NotFiniteError, match=f"(?s){said}"):
        run.criterion(denoising(run.model, b), latents=b.latents)
