"""Health: what is measured is right, a healthy run is left in peace, and a fault is named in time.

Every message and its cause run on the page of errors; here is what the page cannot show.
"""

import copy
import json
import warnings
from types import SimpleNamespace
from typing import Any

import loops
import plain
import pytest
import torch
import torch.nn.functional as F
from loops import Batch, denoising, new_criterion, new_teacher, noisy_batch, plain_tokens, student, toy
from ranks import on_ranks
from sharded import mine, shard, shard_whole
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from selftrans_reg import health as health_module
from selftrans_reg.errors import HealthWarning, NotFiniteError
from selftrans_reg.health import Health

# t of SiT, where 1 is data: three of the four are inside the default window.
TIMES = [0.35, 0.5, 0.58, 0.9]
OUTSIDE = [0.9, 0.95, 0.8, 0.99]


class Run:
    """A loop of a toy model, with a new batch at each step.

    ``loss`` is how often the total and the loop's own loss are in what backward() is called on; ``own`` multiplies it;
    ``kept`` is the only step whose conditions are not dropped, None for all; other settings are the criterion's.
    """

    def __init__(self, stage: int = 2, model: nn.Module | None = None, **settings: Any) -> None:
        usual = {"lr": 1e-2, "own": 1.0, "kept": None, "accumulate": 1, "times": TIMES, "loss": (1, 0), "step": None}
        vars(self).update({name: settings.pop(name, value) for name, value in usual.items()})
        self.model = student() if model is None else model
        self.model.dropout = settings.pop("dropout", 0.0)
        self.criterion = new_criterion(self.model, stage, **{"health_interval": 5} | settings)
        self.said, self.done = [], 0

    def batch(self) -> Batch:
        b = noisy_batch(self.times, seed=self.done)
        return b if self.kept in (None, self.done) else b._replace(y=torch.full_like(b.y, loops.NULL_CLASS))

    def steps(self, count: int) -> list[Warning]:
        """Train for so many steps, and return what was warned of so far."""
        optimizer = torch.optim.AdamW([*self.model.parameters(), *self.criterion.parameters()], lr=self.lr)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(count):
                b = self.batch()
                own = self.own * denoising(self.model, b)
                both = self.criterion(own, latents=b.latents, step=self.step).total, own.mean()
                sum(n * loss for n, loss in zip(self.loss, both, strict=True) if n).backward()
                self.done += 1
                if self.done % self.accumulate == 0:
                    optimizer.step()
                    optimizer.zero_grad()
        self.said += [warning.message for warning in caught]
        return self.said


class TestMeasures:
    def test_norms_and_contrast_are_those_of_the_formulas(self) -> None:
        run, b = Run(), noisy_batch(TIMES)
        run.criterion(denoising(run.model, b), latents=b.latents)
        inside = b.rows(slice(0, 3))
        tokens, _ = plain_tokens(run.model, b, b.y, loops.LAYER)
        f_c, _ = plain_tokens(toy(2), inside, inside.y, loops.TEACHER_LAYER)
        f_u, _ = plain_tokens(toy(2), inside, torch.full_like(inside.y, loops.NULL_CLASS), loops.TEACHER_LAYER)
        guided = f_u + loops.GUIDANCE_SCALE * (f_c - f_u)
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

    @pytest.mark.parametrize(
        ("stage", "layers", "tokens"), [(1, [loops.LAYER], None), (2, [loops.LAYER], slice(3, 9)), (1, [2, 0], None)]
    )
    def test_the_gradients_are_those_of_the_two_terms_at_the_deepest_layer(
        self, stage: int, layers: list[int], tokens: slice | None
    ) -> None:
        """At another one the denoising loss's gradient cannot be told from the deeper layer's alignment."""
        model, seen, b = student(), [], noisy_batch(TIMES)
        teacher = new_teacher(tokens=tokens) if stage == 2 else None
        names = [f"blocks.{layer}" for layer in layers]
        criterion = new_criterion(model, stage, teacher, layer=names, tokens=tokens, weight=0.3)
        model.blocks[layers[0]].register_forward_hook(lambda module, args, output: seen.append(output))
        terms = criterion(denoising(model, b), latents=b.latents)
        (1024 * terms.total).backward(retain_graph=True)  # as a gradient scaler scales
        (whole,) = torch.autograd.grad(terms.total, seen[0], retain_graph=True)
        (own,) = torch.autograd.grad(denoising(model, b).mean(), seen[1])
        compared = (slice(0, 3), slice(None) if tokens is None else tokens)  # inside the window, and aligned
        aligned, own = (whole - own)[compared].flatten(), own[compared].flatten()
        cosine = F.cosine_similarity(aligned, own, dim=0)
        assert 0.001 < abs(cosine) < 0.999
        found = [criterion.measures["gradient_cosine"], criterion.measures["gradient_ratio"]]
        torch.testing.assert_close(found, [cosine, aligned.norm() / own.norm()], rtol=1e-4, atol=1e-5)


@pytest.fixture(autouse=True)
def _judged_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """The alignment is judged after 60 calls, so that a test needs no 2,000."""
    monkeypatch.setattr(health_module, "_LEARNED", 60)
    monkeypatch.setattr(health_module, "_AVERAGED", 10)


class TestNoFalseAlarm:
    @pytest.mark.parametrize(
        ("settings", "parts"),
        [  # parts of the run: steps, and what changes
            ({"stage": 1, "dropout": 0.1}, [(120, {"lr": 3e-3})]),
            ({"stage": 2, "dropout": 0.1}, [(120, {"lr": 3e-3})]),
            ({"distance": "cosine"}, [(70, {})]),
            ({"kept": 2, "health_interval": 1}, [(40, {})]),  # no other batch has a condition
            ({"weight": 0.0, "loss": (0, 1)}, [(40, {})]),
            ({"health_interval": None, "loss": (0, 1)}, [(40, {})]),
            ({}, [(30, {"lr": 0.0}), (30, {"lr": 1e-3})]),  # a warm-up
            ({"accumulate": 32}, [(70, {})]),
            ({}, [(4, {"times": OUTSIDE}), (1, {"times": TIMES})] * 15),
            ({"stop_step": 1000}, [(1, {"step": step}) for step in (0, 0, 3, 3, 900)]),  # repeated, and left out
        ],
    )
    def test_in_a_healthy_run_and_where_it_is_meant(self, settings: dict[str, Any], parts: list[Any]) -> None:
        run = Run(**settings)
        with plain.global_seed(0):
            for count, changes in parts:
                vars(run).update(changes)
                assert run.steps(count) == []

    def test_in_a_run_that_was_resumed_late_without_its_history(self) -> None:
        """As where health was switched off before: the first stretch that is seen is not the run's first."""
        run = Run(lr=0.0)
        run.criterion._calls = 100_000
        assert run.steps(80) == []

    def test_of_an_alignment_with_features_that_change_as_the_run_goes_on(self) -> None:
        run = Run(loss=(-1, 2), lr=1e-4)  # which lets it grow
        run.criterion.teacher.refresh(toy(2).state_dict())
        assert run.steps(75) == []

    def test_of_a_base_that_student_and_teacher_share_frozen(self) -> None:
        model = student()
        model.blocks[loops.LAYER].requires_grad_(False)  # its adapter lies elsewhere
        assert Run(model=model, teacher=new_teacher(copy.deepcopy(model))).steps(3) == []
        model.blocks[loops.LAYER].fc2.weight.requires_grad_(True)
        (said,) = Run(model=model, teacher=new_teacher(copy.deepcopy(model))).steps(1)
        assert said.kind == "same_weights"


def cut_the_gradient(run: Run) -> None:
    last = run.criterion.heads[0][4]
    last.weight.data.zero_()
    last.weight.register_hook(torch.zeros_like)


def leave_in_eval_mode(run: Run) -> None:
    run.criterion.eval()
    with torch.no_grad():
        for _ in range(30):  # validation is as it should be
            run.criterion(denoising(run.model, run.batch()))


@pytest.mark.parametrize(
    ("settings", "plant", "quiet", "steps", "kind", "said"),
    [
        # the head does not move either, but that is no other fault
        ({"loss": (0, 1)}, None, 1, 40, "no_gradient", "without the alignment's gradient"),
        ({}, cut_the_gradient, 19, 20, "no_gradient", "gradient is exactly 0 at layer 'blocks.1'"),
        ({"own": 256.0}, None, 19, 11, "loss_scale", "a sum over the 256 values of a sample"),
        ({"own": 1e-5}, None, 59, 11, "loss_scale", "so the loss hardly counts"),
        ({"loss": (-1, 2), "lr": 1e-4}, None, 59, 11, "alignment_not_falling", "After 60 calls the alignment is"),
        # contrast is not judged by a few samples: three of each look in the calls 1, 2, 3, 25 and 50
        ({"kept": -1, "health_interval": 25}, None, 74, 1, "no_contrast", "Null condition: y = 10."),
        ({"times": OUTSIDE * 5, "health_interval": 50}, None, 99, 1, "empty_window", "2000 samples of the last 100"),
        ({}, leave_in_eval_mode, 19, 3, "eval_mode", "in eval mode for 20 calls in a row"),
    ],
)
def test_a_fault_is_named_once_and_not_too_early(
    settings: dict[str, Any], plant: Any, quiet: int, steps: int, kind: str, said: str
) -> None:
    run = Run(**settings)
    if plant is not None:
        plant(run)
    assert run.steps(quiet) == []
    run.steps(steps)
    assert [warning.kind for warning in run.said] == [kind]
    assert str(run.said[0]).startswith(f"{kind}: ")
    assert said in str(run.said[0])
    assert [warning.kind for warning in run.steps(15)].count(kind) == 1


def test_what_was_observed_is_resumed_to_the_bit() -> None:
    def observed(run: Run) -> list[float]:
        return json.loads(bytes(run.criterion.state_dict()["_extra_state"].tolist()))["health"]

    through, resumed = Run(), Run()
    through.steps(7)
    norm, total, inside, calls, _ = observed(through)
    assert (inside, calls) == (7 * 0.75, 7)
    assert min(norm, total) > 0
    resumed.criterion.load_state_dict(through.criterion.state_dict())
    assert str(observed(resumed)) == str(observed(through))  # NaN is in it


def overflow(module: nn.Module, *rows: int) -> None:
    module.register_forward_hook(lambda module, args, output: output.index_fill(0, torch.tensor(rows), torch.inf))


def break_the_head(run: Run, b: Batch) -> None:
    run.steps(2)
    run.criterion.heads[0][2].bias.data[0] = torch.nan
    run.criterion(denoising(run.model, b), latents=b.latents)  # not looked at before the interval


@pytest.mark.parametrize(
    ("stage", "plant", "said"),
    [
        (2, lambda run, b: overflow(run.model.blocks[1].fc2, 2, 3),
         "student's layer 'blocks.1' .* 2 of 4 samples, at noise fractions from 0.10 to 0.42.*value overflowed"),
        (1, lambda run, b: b.x_t[2, 0, 0, 0].fill_(torch.nan),
         "in 1 of 4 samples, at noise fraction 0.42.*The model was called with NaN or inf in 'x': look at"),
        (2, lambda run, b: overflow(run.criterion.teacher.model.blocks[2].fc2, 2, 5),
         "teacher's layer 'blocks.2' gave .* with the condition and with the null condition in 1 of 3 samples"),
        (2, lambda run, b: run.criterion.teacher.model.y_embedder.weight.data[loops.NULL_CLASS].fill_(torch.nan),
         "gave NaN or inf with the null condition in 3 of 3 samples.*'y_embedder.weight'.*A teacher does not train"),
        (2, break_the_head, "The alignment is NaN or inf, although.*'heads.0.2.bias'"),
        (1, lambda run, b: b.latents[0].fill_(torch.inf),
         "The latents to align with hold NaN or inf in 1 of 3 samples, at noise fraction 0.65."),
    ],
)  # fmt: skip
def test_the_place_and_cause_of_what_is_not_finite_are_named(stage: int, plant: Any, said: str) -> None:
    run, b = Run(stage, check_interval=None), noisy_batch(TIMES)
    run.steps(1)
    plant(run, b)
    with pytest.raises(NotFiniteError, match=f"(?s){said}"):
        run.criterion(denoising(run.model, b), latents=b.latents)


def sharded_run(rank: int, in_bfloat16: bool, left_out: bool) -> tuple[list[str], list[str]]:
    """The warnings of 40 steps on this rank under FSDP2, and what was measured."""
    model = student()
    shard(model)
    criterion = new_criterion(model, health_interval=5)
    dtype = torch.bfloat16 if in_bfloat16 else None
    shard_whole(criterion, mp_policy=MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False))
    optimizer = torch.optim.AdamW([*model.parameters(), *([] if left_out else criterion.parameters())], lr=1e-3)
    b = mine(rank, [0.35, 0.45, 0.55, 0.9, 0.32, 0.5, 0.8, 0.95])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", HealthWarning)
        for _ in range(40):
            optimizer.zero_grad()
            criterion(denoising(model, b), latents=b.latents).total.backward()
            optimizer.step()
    return [w.message.kind for w in caught if isinstance(w.message, HealthWarning)], sorted(criterion.measures)


@pytest.mark.parametrize(("in_bfloat16", "left_out"), [(False, False), (True, False), (True, True)])
def test_sharded_on_two_ranks(in_bfloat16: bool, left_out: bool) -> None:
    for said, measured in on_ranks(sharded_run, in_bfloat16, left_out):
        assert said == ["head_not_trained"] * left_out
        assert measured == ["contrast", "gradient_cosine", "gradient_ratio", "student_norm", "target_norm"]
