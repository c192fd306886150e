"""Health: what is measured is right, a healthy run is left in peace, and every planted fault is named."""

import copy
import json
import pickle
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
from selftrans_reg.errors import (
    HealthWarning,
    NotFiniteError,
)
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

    def __init__(
        self,
        stage: int = 2,
        model: ToyDiT | None = None,
        *,
        lr: float = 1e-2,
        seed: int = 0,
        loss: Callable[[st.LossTerms, Tensor], Tensor] = lambda terms, own: terms.total,
        own: float = 1.0,
        labels: Callable[[int, Tensor], Tensor] = lambda step, y: y,
        **settings: Any,
    ) -> None:
        self.model = student() if model is None else model
        self.criterion = new_criterion(self.model, stage, **{"health_interval": 5} | settings)
        self.parameters = [*self.model.parameters(), *self.criterion.parameters()]
        self.lr, self.seed, self.loss, self.own, self.labels, self.done = lr, seed, loss, own, labels, 0
        self.said: list[Warning] = []

    def batch(self, times: list[float] = TIMES) -> Batch:
        b = noisy_batch(times, seed=1000 * self.seed + self.done)
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
        assert str(self.said[0]).startswith(f"{kind}: ")
        for part in parts:
            assert part in str(self.said[0])


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
            "student_norm": tokens.square().sum(-1).sqrt().mean(),
            "target_norm": guided.square().sum(-1).sqrt().mean(),
            "contrast": (f_c - f_u).square().sum().sqrt() / f_c.square().sum().sqrt(),
        }
        measures = run.criterion.measures
        assert measures.keys() == wanted.keys()  # the gradients come with the backward pass
        for name, value in wanted.items():
            assert measures[name].shape == ()
            assert not measures[name].requires_grad
            torch.testing.assert_close(measures[name], value.detach(), rtol=1e-5, atol=1e-6)

    def test_in_float16_the_norm_of_all_features_does_not_overflow(self) -> None:
        f_u = torch.full((8, 64, 64), 900.0)
        look = SimpleNamespace(tokens=[f_u.half()], features=((1.25 * f_u).half(), f_u.half()), target=f_u)
        health = Health(1)
        health.measure(look)
        assert health.measures["contrast"].item() == pytest.approx(0.2, rel=1e-3)
        assert health.measures["target_norm"].item() == pytest.approx(900 * 8)

    @pytest.mark.parametrize("scaled", [1.0, 1024.0], ids=["", "as a gradient scaler scales"])
    @pytest.mark.parametrize(("stage", "tokens"), [(1, None), (2, None), (2, slice(3, 9))])
    def test_the_gradients_are_those_of_the_two_terms_at_the_tapped_tokens(
        self, stage: int, scaled: float, tokens: slice | None
    ) -> None:
        model = student()
        teacher = new_teacher(tokens=tokens) if stage == 2 else None
        criterion = new_criterion(model, stage, teacher, tokens=tokens, weight=0.3)
        seen: list[Tensor] = []
        model.blocks[LAYER].register_forward_hook(lambda module, args, output: seen.append(output))
        b = noisy_batch(TIMES)
        terms = criterion(denoising(model, b), latents=b.latents)
        (scaled * terms.total).backward(retain_graph=True)
        found = criterion.measures
        (whole,) = torch.autograd.grad(terms.total, seen[0], retain_graph=True)
        (own,) = torch.autograd.grad(denoising(model, b).mean(), seen[1])
        compared = (slice(0, 3), slice(None) if tokens is None else tokens)  # inside the window, and aligned
        aligned, own = (whole - own)[compared].flatten(), own[compared].flatten()
        cosine = aligned @ own / (aligned.norm() * own.norm())
        assert 0.001 < abs(cosine) < 0.999
        torch.testing.assert_close(found["gradient_cosine"], cosine, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["gradient_ratio"], aligned.norm() / own.norm(), rtol=1e-4, atol=1e-5)

    def test_of_several_layers_it_is_the_deepest(self) -> None:
        """At the other one the denoising loss's gradient cannot be told from the deeper layer's alignment."""
        model = student()
        criterion = new_criterion(model, 1, layer=["blocks.2", "blocks.0"])
        seen: list[Tensor] = []
        model.blocks[2].register_forward_hook(lambda module, args, output: seen.append(output))
        b = noisy_batch(TIMES[:3])
        own = denoising(model, b)
        terms = criterion(own, latents=b.latents)
        terms.total.backward(retain_graph=True)
        (whole,) = torch.autograd.grad(terms.total, seen, retain_graph=True)
        (d,) = torch.autograd.grad(own.mean(), seen)
        cosine = F.cosine_similarity((whole - d).flatten(), d.flatten(), dim=0)
        torch.testing.assert_close(criterion.measures["gradient_cosine"], cosine, rtol=1e-4, atol=1e-5)

    def test_they_are_taken_in_the_first_three_calls_and_then_at_the_interval(self) -> None:
        run, changed = Run(health_interval=4), []
        last: Tensor | None = None
        for _ in range(12):
            run.steps(1)
            now = run.criterion.measures["student_norm"]
            changed.append(now is not last)
            last = now
        assert [call for call, new in enumerate(changed, 1) if new] == [1, 2, 3, 4, 8, 12]

    def test_they_are_gone_once_the_alignment_has_stopped_and_with_the_interval_switched_off(self) -> None:
        model, b = student(), noisy_batch(TIMES)
        criterion = new_criterion(model, stop_step=1)
        criterion(denoising(model, b), step=0)
        assert criterion.measures
        criterion(denoising(model, b), step=1)
        assert criterion.measures == {}
        off = Run(health_interval=None)
        off.steps(3)
        assert off.criterion.measures == {}

    @pytest.mark.parametrize(
        ("stage", "weight", "names"),
        [(1, 0.5, "student_norm gradient_cosine gradient_ratio"), (2, 0.0, "student_norm target_norm contrast")],
    )
    def test_what_there_is_not_is_not_measured(self, stage: int, weight: float, names: str) -> None:
        run = Run(stage, weight=weight)
        run.steps(2)
        assert run.criterion.measures.keys() == set(names.split())


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
    @pytest.mark.parametrize("seed", range(2))
    @pytest.mark.parametrize("stage", [1, 2])
    def test_in_a_healthy_run(self, stage: int, seed: int) -> None:
        model = ToyDiT(depth=3, seed=10 + seed)  # drops labels too
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            assert Run(stage, model, seed=seed, lr=3e-3).steps(80) == []

    @pytest.mark.parametrize(
        ("settings", "steps"),
        [
            ({"distance": "cosine"}, 70),
            ({"distance": "smooth_l1"}, 70),
            ({"labels": dropped, "health_interval": 1}, 40),  # and the batch has no other condition inside
            ({"weight": 0.0, "loss": own_loss}, 40),
            ({"health_interval": None, "loss": own_loss}, 40),
        ],
        ids=["cosine", "smooth_l1", "conditions dropped", "weight 0", "switched off"],
    )
    def test_where_it_is_meant(self, settings: dict[str, Any], steps: int) -> None:
        assert Run(**settings).steps(steps) == []

    def test_while_a_learning_rate_warms_up_from_0(self) -> None:
        run = Run(lr=0.0)
        run.steps(30)
        run.lr = 1e-3
        assert run.steps(30) == []

    def test_where_gradients_are_accumulated(self) -> None:
        assert Run().steps(70, accumulate=32) == []

    def test_where_only_some_batches_reach_into_the_window(self) -> None:
        run = Run()
        for _ in range(15):
            run.steps(4, OUTSIDE)
            run.steps(1)
        assert run.said == []

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


def ignored_by(what: str) -> st.CFGFeatureTeacher:
    """A teacher without contrast: its model, or its null condition, ignores the condition."""
    model = toy(2)
    if what == "model":
        model.y_embedder.weight.data[:] = model.y_embedder.weight.data[0]
    null = NULL_CLASS if what == "model" else lambda call: call["y"]
    return st.build_teacher(model, None, layer="blocks.2", guidance_scale=3.0, hidden_size=16, null={"y": null})


def leave_out_the_head(run: Run) -> None:
    run.parameters = [*run.model.parameters()]


def freeze_the_head(run: Run) -> None:
    run.criterion.requires_grad_(False)


def cut_the_gradient(run: Run) -> None:
    last = run.criterion.heads[0][4]
    last.weight.data.zero_()
    last.weight.register_hook(torch.zeros_like)


def explode(run: Run) -> None:
    with torch.no_grad():
        run.model.blocks[LAYER].fc2.weight.mul_(1e5)


def reset_the_step(run: Run) -> None:
    advance = run.criterion.forward
    run.criterion.forward = lambda own, latents: advance(own, latents, step=run.done % 12)


def all_dropped(step: int, y: Tensor) -> Tensor:
    return torch.full_like(y, NULL_CLASS)


AWAY: dict[str, Any] = {"loss": lambda terms, own: 2 * own - terms.total, "lr": 1e-4}


class TestFaults:
    @pytest.mark.parametrize(
        ("settings", "plant", "quiet", "steps", "kind", "said"),
        [  # what else they say is on the page of errors
            ({}, leave_out_the_head, 19, 40, "head_not_trained", "in 20 calls, while layer 'blocks.1' has"),
            ({}, freeze_the_head, 19, 5, "head_not_trained", "the head is frozen or its learning rate is 0"),
            # the head does not move either, but that is no other fault
            ({"loss": own_loss}, None, 1, 40, "no_gradient", "without the alignment's gradient"),
            ({}, cut_the_gradient, 19, 20, "no_gradient", "gradient is exactly 0 at layer 'blocks.1'"),
            ({"own": 256.0}, None, 19, 11, "loss_scale", "a sum over the 256 values of a sample"),
            ({"own": 256.0, "stage": 1}, None, 19, 11, "loss_scale", "so it has next to no effect"),
            ({"own": 1e-5}, None, 59, 11, "loss_scale", "so the loss hardly counts"),
            (AWAY, None, 59, 11, "alignment_not_falling", "After 60 calls the alignment is"),
            (AWAY | {"stage": 1}, None, 59, 11, "alignment_not_falling", "at first: it does not fall"),
            ({}, explode, 0, 10, "exploding_features", "The tokens of layer 'blocks.1' have a mean norm of"),
            ({"teacher": "model"}, None, 19, 20, "no_contrast", "by only 0 of their norm"),
            ({"teacher": "null condition"}, None, 19, 20, "no_contrast", "Null condition: y = function."),
            # contrast is not judged by a few samples: three of each look in the calls 1, 2, 3, 25 and 50
            ({"labels": all_dropped, "health_interval": 25}, None, 74, 1, "no_contrast", "Null condition: y = 10."),
            ({"stop_step": 1000}, reset_the_step, 12, 20, "step_went_back", "from 11 to 0, and the alignment stops"),
        ],
    )
    @pytest.mark.usefixtures("judged_soon")
    def test_it_is_named_once_and_not_too_early(
        self,
        settings: dict[str, Any],
        plant: Callable[[Run], None] | None,
        quiet: int,
        steps: int,
        kind: str,
        said: str,
    ) -> None:
        if "teacher" in settings:
            settings = settings | {"teacher": ignored_by(settings["teacher"])}
        run = Run(**settings)
        if plant is explode:
            run.steps(10)
        if plant is not None:
            plant(run)
        assert run.steps(quiet) == []
        run.steps(steps)
        run.warned(kind, said)
        run.steps(15)
        assert [warning.kind for warning in run.said].count(kind) == 1

    def test_a_head_left_out_is_seen_after_a_resumption_too(self) -> None:
        first, run = Run(), Run()
        first.steps(25)
        run.criterion.load_state_dict(first.criterion.state_dict())
        leave_out_the_head(run)
        run.steps(40)
        run.warned("head_not_trained")

    @pytest.mark.parametrize("gating", ["per-sample", "released"])
    def test_a_window_that_nothing_enters(self, gating: str) -> None:
        run = Run(gating=gating, health_interval=50)
        assert run.steps(99, OUTSIDE * 5) == []
        run.steps(1, OUTSIDE * 5)
        run.warned(
            "empty_window",
            "None of the 2000 samples of the last 100 calls was inside the window (0.4, 0.7)",
            "those of this call range from 0.01 to 0.2",
            "time=",
        )

    def test_a_criterion_left_in_eval_mode(self) -> None:
        run = Run()
        run.steps(5)
        run.criterion.eval()
        run.steps(19)
        run.criterion.train()
        run.steps(1)
        run.criterion.eval()
        assert run.steps(19) == []
        run.steps(3)
        run.warned("eval_mode", "in eval mode for 20 calls in a row", "Call criterion.train()")

    def test_validation_in_eval_mode_is_as_it_should_be(self) -> None:
        run = Run()
        run.steps(2)
        run.criterion.eval()
        for mode in True, False:
            run.model.train(mode)
            with warnings.catch_warnings(), torch.set_grad_enabled(not mode):
                warnings.simplefilter("error")
                for _ in range(30):
                    run.criterion(denoising(run.model, run.batch()))

    def test_steps_may_be_repeated_left_out_and_gone_back_to_with_the_state(self) -> None:
        run = Run(stop_step=1000)
        advance, state = run.criterion.forward, run.criterion.state_dict()
        for steps in (0, 0, 3, 3, 900), (0, 1, 2):
            run.criterion.load_state_dict(state)
            for step in steps:
                run.criterion.forward = lambda own, latents, step=step: advance(own, latents, step=step)
                assert run.steps(1) == []

    def test_one_kind_is_silenced_by_its_name(self) -> None:
        warning = pickle.loads(pickle.dumps(HealthWarning("same_weights: the text")))
        assert (warning.kind, str(warning)) == ("same_weights", "same_weights: the text")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warnings.filterwarnings("ignore", "same_weights", HealthWarning)
            for kind in ("same_weights", "no_contrast"):
                warnings.warn(HealthWarning(f"{kind}: the text"), stacklevel=1)
        assert [warning.message.kind for warning in caught] == ["no_contrast"]


class Overflows(nn.Module):
    """Gives inf where the samples' t is above a bound, which the model has left in ``now``."""

    now: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return torch.where((self.now > 0.55)[:, None, None], torch.inf, x)


class OverflowingDiT(ToyDiT):
    """A model of which one module overflows at one noise level, in its second block."""

    def __init__(self, seed: int) -> None:
        super().__init__(depth=3, seed=seed)
        self.dropout = 0.0
        self.blocks[1].fc2 = nn.Sequential(self.blocks[1].fc2, Overflows())

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.blocks[1].fc2[1].now = t
        return super().forward(x, t, y)


class TestNotFinite:
    def refused(self, run: Run, *parts: str, b: Batch | None = None) -> None:
        b = run.batch() if b is None else b
        with pytest.raises(NotFiniteError) as error:
            run.criterion(denoising(run.model, b), latents=b.latents)
        for part in parts:
            assert part in str(error.value)

    def test_a_student_that_overflows_at_one_noise_level(self) -> None:
        self.refused(
            Run(model=OverflowingDiT(1)),
            "The student's layer 'blocks.1' gave NaN or inf in 2 of 4 samples, at noise fractions from 0.10 to 0.42.",
            "all weights are finite, so a value overflowed up to there",
            "Use bfloat16, float32 or autocast",
        )

    def test_a_student_whose_weights_are_gone(self) -> None:
        run = Run(1)
        run.steps(1)
        run.model.blocks[0].fc1.weight.data[0, 0] = torch.nan
        self.refused(
            run,
            "The student's layer 'blocks.1' gave NaN or inf in 4 of 4 samples",
            "in 1 of its parameters already: 'blocks.0.fc1.weight'",
            "Go back to an earlier checkpoint and set health_interval=1",
        )

    def test_a_student_that_is_called_with_nan(self) -> None:
        run, b = Run(1, check_interval=None), noisy_batch(TIMES)
        b.x_t[2, 0, 0, 0] = torch.nan
        self.refused(
            run,
            "gave NaN or inf in 1 of 4 samples, at noise fraction 0.42.",
            "The model was called with NaN or inf in 'x': look at what the loop makes it of.",
            b=b,
        )

    def test_a_teacher_that_overflows_at_one_noise_level(self) -> None:
        run = Run(teacher=new_teacher(OverflowingDiT(2)))
        self.refused(
            run,
            "The teacher's layer 'blocks.2' gave NaN or inf with the condition and with the null condition in 1 of 3 "
            "samples, at noise fraction 0.42.",
            "a value overflowed in 'blocks.1.fc2.1'",
        )

    def test_a_teacher_whose_null_row_is_gone(self) -> None:
        model = toy(2)
        model.y_embedder.weight.data[NULL_CLASS] = torch.nan
        self.refused(
            Run(teacher=new_teacher(model)),
            "The teacher's layer 'blocks.2' gave NaN or inf with the null condition in 3 of 3 samples, at noise "
            "fractions from 0.42 to 0.65.",
            "'y_embedder.weight'",
            "A teacher does not train, so its checkpoint or a cast made them",
        )

    def test_a_head_whose_weights_are_gone(self) -> None:
        run = Run()
        run.criterion.heads[0][2].bias.data[0] = torch.nan
        self.refused(run, "The alignment is NaN or inf, although", "'heads.0.2.bias'")

    def test_latents_that_hold_nan(self) -> None:
        run, b = Run(1, check_interval=None), noisy_batch(TIMES)
        b.latents[0] = torch.inf
        self.refused(run, "The latents to align with hold NaN or inf in 1 of 3 samples, at noise fraction 0.65.", b=b)

    def test_what_begins_between_two_looks_is_found_where_the_advice_says(self) -> None:
        """By the next look the student's weights are gone too; looked at in every call, the teacher is named."""
        for interval, expected in (
            (10, "The student's layer 'blocks.1'"),
            (1, "The teacher's layer 'blocks.2' gave NaN"),
        ):
            run = Run(teacher=new_teacher(OverflowingDiT(2)), health_interval=interval)
            run.steps(3, times=[0.35, 0.5, 0.52])  # none of them overflows
            with pytest.raises(NotFiniteError, match=expected):
                run.steps(7)

    def test_it_is_found_at_the_interval(self) -> None:
        run = Run(health_interval=5)
        run.steps(3)
        run.criterion.heads[0][2].bias.data[0] = torch.nan
        b = run.batch()
        run.criterion(denoising(run.model, b), latents=b.latents)
        self.refused(run, "The alignment is NaN or inf")


@pytest.mark.usefixtures("judged_soon")
class TestState:
    def test_what_was_observed_is_resumed_to_the_bit(self) -> None:
        def observed(run: Run) -> list[str]:
            return json.loads(bytes(run.criterion.state_dict()["_extra_state"].tolist()))["health"]

        through = Run(health_interval=10)
        through.steps(7)
        resumed = Run(health_interval=10, model=copy.deepcopy(through.model))
        resumed.criterion.load_state_dict(through.criterion.state_dict())
        resumed.done = through.done
        through.lr = resumed.lr = 0.0
        through.steps(25)
        resumed.steps(25)
        assert observed(resumed) == observed(through) != observed(Run())
