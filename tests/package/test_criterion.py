"""The combined loss: values and every gradient against the method written out plainly."""

from __future__ import annotations

import copy
from typing import Any

import plain
import pytest
import torch
import torch.nn.functional as F
from plain import TOLERANCE
from torch import Tensor, nn
from toys import ToyDiT, batch

import selftrans_reg as st

SIZES = {"latent_channels": 4, "patch_size": 2, "hidden_features": 24}

# Noise fractions around the edges of the published window (0.4, 0.7), closed with 1e-6 of slack, and what is inside.
FRACTIONS = [0.1, 0.4, 0.55, 0.7, 0.4 - 5e-7, 0.7 + 5e-7, 0.4 - 3e-6, 0.7 + 3e-6, 0.95]
INSIDE = [0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0]


class InSiTTime(nn.Module):
    """A REPA model for a SiT loop: there t = 1 is data, and the velocity points to the data."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return -self.net(x, 1 - t, y)


def noised(b: dict[str, Tensor], fraction: Tensor) -> Tensor:
    f = fraction[:, None, None, None]
    return (1 - f) * b["x"] + f * b["noise"]


def repa_loss(model: nn.Module, b: dict[str, Tensor], fraction: Tensor) -> Tensor:
    """REPA's loop: t = 1 is noise, the model gives noise − latents. (N,)"""
    output = model(noised(b, fraction), fraction, b["y"])
    return (output - (b["noise"] - b["x"])).square().mean((1, 2, 3))


def sit_loss(model: nn.Module, b: dict[str, Tensor], fraction: Tensor) -> Tensor:
    """SiT's loop: t = 1 is data, the model gives latents − noise. (N,)"""
    output = model(noised(b, fraction), 1 - fraction, b["y"])
    return (output - (b["x"] - b["noise"])).square().mean((1, 2, 3))


def plain_stage1(
    model: nn.Module,
    p: dict[str, Tensor],
    b: dict[str, Tensor],
    fraction: Tensor,
    inside: Tensor,
    target: str = "latents",
    distance: str = "mse",
) -> tuple[Tensor, Tensor]:
    """(denoising, alignment), both scalars, with gradients to the model and to the head's parameters ``p``."""
    output, tokens = plain.tapped(model, "blocks.1", noised(b, fraction), fraction, b["y"])
    velocity = b["noise"] - b["x"]
    goal = b["x"] if target == "latents" else velocity
    image = plain.predict_latents(p, tokens, channels=4, patch=2, prefix="heads.0.")
    patches = [F.unfold(i, 2, stride=2).transpose(1, 2) for i in (image, goal)]
    per_sample = plain.distance(*patches, kind=distance)
    return (output - velocity).square().mean(), (inside * per_sample).sum() / len(inside)


def sit_criterion(model: nn.Module, **settings: Any) -> st.SelfTransLoss:
    return st.SelfTransLoss.stage1(model, layer="net.blocks.1", time="sit", hidden_size=16, **SIZES, **settings)


def repa_criterion(model: nn.Module, **settings: Any) -> st.SelfTransLoss:
    return st.SelfTransLoss.stage1(model, layer="blocks.1", time="repa", hidden_size=16, **SIZES, **settings)


def run_stage1(
    convention: str, model: nn.Module, b: dict[str, Tensor], fraction: Tensor, **settings: Any
) -> tuple[st.SelfTransLoss, st.LossTerms]:
    """One step of the named loop on ``model`` itself, backward included."""
    if convention == "repa":
        criterion = repa_criterion(model, **settings)
        terms = criterion(repa_loss(model, b, fraction), latents=b["x"])
    else:
        wrapped = InSiTTime(model)
        criterion = sit_criterion(wrapped, **settings)
        terms = criterion(sit_loss(wrapped, b, fraction), latents=b["x"])
    terms.total.backward()
    return criterion, terms


class TestStage1:
    @pytest.mark.parametrize("convention", ["repa", "sit"])
    @pytest.mark.parametrize("target", ["latents", "velocity"])
    @pytest.mark.parametrize("distance", ["mse", "cosine", "smooth_l1"])
    def test_equals_the_plain_formula_on_both_sides_of_the_windows_edges(
        self, convention: str, target: str, distance: str
    ) -> None:
        model, b = ToyDiT(dropout=0.0), batch(len(FRACTIONS))
        reference, fraction, inside = copy.deepcopy(model), torch.tensor(FRACTIONS), torch.tensor(INSIDE)
        criterion, terms = run_stage1(convention, model, b, fraction, target=target, distance=distance, weight=0.7)

        p = plain.leaves(criterion)
        denoising, alignment = plain_stage1(reference, p, b, fraction, inside, target, distance)
        (denoising + 0.7 * alignment).backward()
        torch.testing.assert_close(terms.denoising, denoising.detach(), **TOLERANCE)
        torch.testing.assert_close(terms.alignment, alignment.detach(), **TOLERANCE)
        torch.testing.assert_close(terms.total, (denoising + 0.7 * alignment), **TOLERANCE)
        assert terms.weight.item() == pytest.approx(0.7)
        assert terms.in_window.item() == pytest.approx(5 / 9)
        plain.assert_same_gradients(model, reference)
        plain.assert_same_gradients(criterion, p)

    @pytest.mark.parametrize("target", ["latents", "velocity"])
    def test_the_same_model_and_noise_give_one_loss_through_both_conventions(self, target: str) -> None:
        b, fraction = batch(len(FRACTIONS)), torch.tensor(FRACTIONS)
        models = {name: ToyDiT(dropout=0.0) for name in ("repa", "sit")}
        runs = {name: run_stage1(name, model, b, fraction, target=target) for name, model in models.items()}
        for repa, sit in zip(runs["repa"][1], runs["sit"][1], strict=True):
            torch.testing.assert_close(sit, repa, **TOLERANCE)
        plain.assert_same_gradients(models["sit"], models["repa"])
        plain.assert_same_gradients(runs["sit"][0], runs["repa"][0])

    @pytest.mark.parametrize("fraction", [0.1, 0.39999, 0.70001, 1.0])
    def test_a_batch_outside_the_window_adds_an_exact_zero_with_gradients_of_zero(self, fraction: float) -> None:
        model, b = ToyDiT(dropout=0.0), batch(4)
        reference, fractions = copy.deepcopy(model), torch.full((4,), fraction)
        criterion, terms = run_stage1("repa", model, b, fractions)
        repa_loss(reference, b, fractions).mean().backward()
        assert terms.total.item() == terms.denoising.item()
        assert (terms.alignment.item(), terms.in_window.item()) == (0.0, 0.0)
        assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in criterion.parameters())
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), reference.parameters(), strict=True))

    def test_without_a_window_every_sample_counts(self) -> None:
        model, b = ToyDiT(dropout=0.0), batch(len(FRACTIONS))
        reference, fraction = copy.deepcopy(model), torch.tensor(FRACTIONS)
        criterion, terms = run_stage1("repa", model, b, fraction, window=None)
        _, alignment = plain_stage1(reference, plain.leaves(criterion), b, fraction, torch.ones(len(FRACTIONS)))
        torch.testing.assert_close(terms.alignment, alignment.detach(), **TOLERANCE)
        assert terms.in_window.item() == 1.0

    @pytest.mark.parametrize("target", ["latents", "velocity"])
    def test_released_gating_is_mean_of_mask_times_mean_of_loss(self, target: str) -> None:
        model, b = ToyDiT(dropout=0.0), batch(len(FRACTIONS))
        reference, fraction, everyone = copy.deepcopy(model), torch.tensor(FRACTIONS), torch.ones(len(FRACTIONS))
        criterion, terms = run_stage1("sit", model, b, fraction, gating="released", target=target)
        p = plain.leaves(criterion)
        denoising, mean_loss = plain_stage1(reference, p, b, fraction, everyone, target)
        (denoising + 0.5 * (5 / 9) * mean_loss).backward()
        torch.testing.assert_close(terms.alignment, (5 / 9) * mean_loss.detach(), **TOLERANCE)
        plain.assert_same_gradients(model, reference)
        plain.assert_same_gradients(criterion, p)

    def test_released_gating_is_the_broadcast_of_the_released_code(self) -> None:
        """There a (B,) loss meets a (B, 1, 1, 1) mask."""
        model, b = ToyDiT(dropout=0.0), batch(len(FRACTIONS))
        reference, fraction = copy.deepcopy(model), torch.tensor(FRACTIONS)
        criterion, terms = run_stage1("repa", model, b, fraction, gating="released")
        _, tokens = plain.tapped(reference, "blocks.1", noised(b, fraction), fraction, b["y"])
        image = plain.predict_latents(plain.leaves(criterion), tokens, channels=4, patch=2, prefix="heads.0.")
        loss, mask = (image - b["x"]).square().mean((1, 2, 3)), torch.tensor(INSIDE)[:, None, None, None]
        torch.testing.assert_close(terms.alignment, (loss * mask).mean().detach(), **TOLERANCE)

    @pytest.mark.parametrize("gating", ["per-sample", "released"])
    def test_several_layers_are_averaged(self, gating: str) -> None:
        model, b = ToyDiT(dropout=0.0), batch(len(FRACTIONS))
        reference, fraction = copy.deepcopy(model), torch.tensor(FRACTIONS)
        criterion = st.SelfTransLoss.stage1(
            model, layer=["blocks.0", "blocks.2"], time="repa", hidden_size=16, gating=gating, **SIZES
        )
        alignment = criterion(repa_loss(model, b, fraction), latents=b["x"]).alignment
        p, expected = plain.leaves(criterion), torch.zeros(())
        for index, layer in enumerate(["blocks.0", "blocks.2"]):
            _, tokens = plain.tapped(reference, layer, noised(b, fraction), fraction, b["y"])
            image = plain.predict_latents(p, tokens, channels=4, patch=2, prefix=f"heads.{index}.")
            loss, mask = plain.distance(image, b["x"]), torch.tensor(INSIDE)
            expected = expected + ((loss * mask).mean() if gating == "per-sample" else loss.mean() * mask.mean()) / 2
        torch.testing.assert_close(alignment, expected.detach(), **TOLERANCE)
        assert not torch.equal(p["heads.0.linear.weight"], p["heads.1.linear.weight"])

    @pytest.mark.parametrize("target", ["latents", "velocity"])
    @pytest.mark.parametrize("gating", ["per-sample", "released"])
    def test_halves_of_a_batch_averaged_equal_the_batch(self, target: str, gating: str) -> None:
        """Where the halves hold different numbers inside the window; the released product holds for equal ones."""
        fractions = [0.5, 0.6, 0.5, 0.1] + ([0.9, 0.2, 0.5, 0.1] if gating == "per-sample" else [0.9, 0.5, 0.5, 0.5])
        whole, halved, b = ToyDiT(dropout=0.0), ToyDiT(dropout=0.0), batch(8)
        one, terms = run_stage1("repa", whole, b, torch.tensor(fractions), target=target, gating=gating)
        two = repa_criterion(halved, target=target, gating=gating)
        alignment = torch.zeros(())
        for half in (slice(0, 4), slice(4, 8)):
            part = {name: value[half] for name, value in b.items()}
            found = two(repa_loss(halved, part, torch.tensor(fractions[half])), latents=part["x"])
            (found.total / 2).backward()
            alignment += found.alignment / 2
        torch.testing.assert_close(alignment, terms.alignment, **TOLERANCE)
        plain.assert_same_gradients(halved, whole)
        plain.assert_same_gradients(two, one)

    @pytest.mark.parametrize("scalar", [True, False])
    def test_the_loops_own_loss_may_be_a_scalar_or_one_value_a_sample(self, scalar: bool) -> None:
        model, b = ToyDiT(dropout=0.0), batch(8)
        criterion = repa_criterion(model)
        own = repa_loss(model, b, b["t"])
        terms = criterion(own.mean() if scalar else own, latents=b["x"])
        torch.testing.assert_close(terms.denoising, own.mean().detach(), **TOLERANCE)
        torch.testing.assert_close(terms.total, terms.denoising + 0.5 * terms.alignment, **TOLERANCE)

    def test_terms_are_scalars_of_which_only_the_total_has_a_graph(self) -> None:
        model, b = ToyDiT(dropout=0.0), batch(8)
        terms = repa_criterion(model)(repa_loss(model, b, b["t"]), latents=b["x"])
        assert [term.shape for term in terms] == [torch.Size()] * 5
        assert [term.requires_grad for term in terms] == [True, False, False, False, False]
        assert terms.alignment.dtype == torch.float32


TEACHER = {"layer": "blocks.2", "guidance_scale": 7.5, "null": {"y": 10}}


def make_teacher(model: nn.Module, **settings: Any) -> st.CFGFeatureTeacher:
    return st.build_teacher(copy.deepcopy(model), None, **{"hidden_size": 16, **TEACHER, **settings})


def stage2(model: nn.Module, teacher: st.CFGFeatureTeacher | None, **settings: Any) -> st.SelfTransLoss:
    return st.SelfTransLoss.stage2(
        model, teacher=teacher, **{"layer": "blocks.1", "time": "repa", "hidden_size": 16, **settings}
    )


def calls_of(teacher: st.CFGFeatureTeacher) -> list[int]:
    """The batch size of every pass through the teacher's model from here on, as they come."""
    sizes: list[int] = []
    teacher.model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    return sizes


class TestStage2:
    @pytest.mark.parametrize("distance", ["mse", "cosine", "smooth_l1"])
    @pytest.mark.parametrize("gating", ["per-sample", "released"])
    def test_equals_the_plain_formula_while_the_student_drops_labels(self, distance: str, gating: str) -> None:
        model, taught_by, b = ToyDiT(dropout=0.5), ToyDiT(seed=1), batch(len(FRACTIONS))
        reference, fraction, mask = copy.deepcopy(model), torch.tensor(FRACTIONS), torch.tensor(INSIDE)
        criterion = stage2(model, make_teacher(taught_by), distance=distance, gating=gating, weight=0.3)
        with plain.global_seed(0):
            terms = criterion(repa_loss(model, b, fraction), latents=b["x"])
        terms.total.backward()

        dropped = model.dropped
        assert dropped is not None
        assert dropped[mask.bool()].any()
        assert not dropped[mask.bool()].all()
        x_t, seen = noised(b, fraction), torch.where(dropped, 10, b["y"])  # the student's labels; the teacher's are y
        output, tokens = plain.tapped(reference.eval(), "blocks.1", x_t, fraction, seen)
        null = torch.full_like(b["y"], 10)
        goal = plain.guided(taught_by, "blocks.2", 7.5, (x_t, fraction, b["y"]), (x_t, fraction, null))
        p = plain.leaves(criterion)
        per_sample = plain.distance(plain.project(p, tokens, "heads.0."), goal, distance)
        alignment = (mask * per_sample).mean() if gating == "per-sample" else mask.mean() * per_sample.mean()
        denoising = (output - (b["noise"] - b["x"])).square().mean()
        (denoising + 0.3 * alignment).backward()
        torch.testing.assert_close(terms.alignment, alignment.detach(), **TOLERANCE)
        torch.testing.assert_close(terms.total, denoising + 0.3 * alignment, **TOLERANCE)
        plain.assert_same_gradients(model, reference)
        plain.assert_same_gradients(criterion, p)

    def test_halves_of_a_batch_averaged_equal_the_batch(self) -> None:
        whole, halved = ToyDiT(dropout=0.0, num_classes=11), ToyDiT(dropout=0.0, num_classes=11)
        b, fraction = batch(8), torch.tensor([0.5, 0.6, 0.5, 0.1, 0.9, 0.2, 0.5, 0.1])
        one, two = (stage2(model, make_teacher(ToyDiT(seed=1))) for model in (whole, halved))
        terms = one(repa_loss(whole, b, fraction))
        terms.total.backward()
        alignment = torch.zeros(())
        for half in (slice(0, 4), slice(4, 8)):
            part = {name: value[half] for name, value in b.items()}
            found = two(repa_loss(halved, part, fraction[half]))
            (found.total / 2).backward()
            alignment += found.alignment / 2
        torch.testing.assert_close(alignment, terms.alignment, **TOLERANCE)
        plain.assert_same_gradients(halved, whole)
        plain.assert_same_gradients(two, one)

    def test_the_teacher_sees_only_the_rows_inside_the_window_and_is_skipped_without_any(self) -> None:
        model, teacher, b = ToyDiT(), make_teacher(ToyDiT(seed=1)), batch(len(FRACTIONS))
        teacher(b["x"], b["t"], b["y"])  # the first call drops what never runs, in passes of its own
        sizes, criterion = calls_of(teacher), stage2(model, teacher)
        criterion(repa_loss(model, b, torch.tensor(FRACTIONS)))
        assert sizes == [2 * 5]
        terms = criterion(repa_loss(model, b, torch.full((9,), 0.9)))
        assert sizes == [2 * 5]
        assert terms.in_window.item() == 0.0

    @pytest.mark.parametrize("call", ["positional", "keyword"])
    def test_the_teachers_argument_names_may_differ_for_x_t_and_t(self, call: str) -> None:
        class Renamed(nn.Module):
            def __init__(self, net: nn.Module) -> None:
                super().__init__()
                self.net = net

            def forward(self, y: Tensor, sample: Tensor, timestep: Tensor) -> Tensor:
                return self.net(sample, timestep, y)

        model, taught_by, b = ToyDiT(dropout=0.0), ToyDiT(seed=1), batch(6)
        names = {"x": "sample", "t": "timestep"}
        renamed = make_teacher(Renamed(taught_by), layer="net.blocks.2", call=names)
        usual = stage2(model, make_teacher(taught_by), window=None)
        other = stage2(model, renamed, window=None)
        x_t = noised(b, b["t"])
        output = model(x_t, b["t"], b["y"]) if call == "positional" else model(y=b["y"], t=b["t"], x=x_t)
        torch.testing.assert_close(other(output.mean()).alignment, usual(output.mean()).alignment, **TOLERANCE)

    def test_guidance_of_one_is_the_conditional_feature(self) -> None:
        model, taught_by, b = ToyDiT(dropout=0.0), ToyDiT(seed=1), batch(6)
        criterion = stage2(model, make_teacher(taught_by, guidance_scale=1), window=None)
        x_t = noised(b, b["t"])
        output, tokens = plain.tapped(model, "blocks.1", x_t, b["t"], b["y"])
        terms = criterion(output.mean())
        _, goal = plain.tapped(taught_by.eval(), "blocks.2", x_t, b["t"], b["y"])
        expected = plain.distance(plain.project(plain.leaves(criterion), tokens, "heads.0."), goal).mean()
        torch.testing.assert_close(terms.alignment, expected.detach(), **TOLERANCE)

    def test_the_teacher_gets_no_gradient_and_keeps_its_weights(self) -> None:
        model, teacher, b = ToyDiT(), make_teacher(ToyDiT(seed=1)), batch(6)
        criterion = stage2(model, teacher, window=None)
        criterion(repa_loss(model, b, b["t"])).total.backward()
        kept = dict(ToyDiT(seed=1).named_parameters())
        assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
        assert all(torch.equal(p, kept[name]) for name, p in teacher.model.named_parameters())

    def test_a_permuted_teacher_changes_the_loss(self) -> None:
        """The features belong to their own samples and tokens."""
        model, b = ToyDiT(dropout=0.0), batch(6)
        teacher = make_teacher(ToyDiT(seed=1), tokens=lambda tokens: tokens.flip(1))
        plain_order = stage2(model, make_teacher(ToyDiT(seed=1)), window=None)
        flipped = stage2(model, teacher, window=None)
        own = repa_loss(model, b, b["t"])
        assert (plain_order(own).alignment - flipped(own).alignment).abs() > 1e-3


class TestWeightOverSteps:
    @pytest.mark.parametrize(
        ("schedule", "factors"),
        [
            ("constant", [1, 1, 1, 1, 0, 0]),
            ("linear", [1, 0.75, 0.5, 0.25, 0, 0]),
            ("cosine", [1, (1 + 2**-0.5) / 2, 0.5, (1 - 2**-0.5) / 2, 0, 0]),
        ],
    )
    def test_it_falls_from_the_first_step_to_the_stop_step(self, schedule: str, factors: list[float]) -> None:
        model, teacher, b = ToyDiT(dropout=0.0), make_teacher(ToyDiT(seed=1)), batch(6)
        criterion = stage2(model, teacher, schedule=schedule, stop_step=40, weight=0.8, window=None)
        teacher(b["x"], b["t"], b["y"])
        sizes = calls_of(teacher)
        for step, factor in zip([0, 10, 20, 30, 40, 1000], factors, strict=True):
            terms = criterion(repa_loss(model, b, b["t"]), step=step)
            assert terms.weight.item() == pytest.approx(0.8 * factor)
            expected = terms.denoising + 0.8 * factor * terms.alignment
            torch.testing.assert_close(terms.total, expected, **TOLERANCE)
            assert (terms.alignment.item() > 0) == (step < 40)
        assert len(sizes) == 4

    def test_from_the_stop_step_on_the_heads_gradients_are_zero_and_the_models_its_own(self) -> None:
        model, b = ToyDiT(dropout=0.0), batch(6)
        reference = copy.deepcopy(model)
        criterion = repa_criterion(model, stop_step=3)
        terms = criterion(repa_loss(model, b, b["t"]), latents=b["x"], step=3)
        terms.total.backward()
        repa_loss(reference, b, b["t"]).mean().backward()
        assert [term.item() for term in terms[2:]] == [0.0, 0.0, 0.0]
        assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in criterion.parameters())
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), reference.parameters(), strict=True))

    def test_past_the_stop_step_the_teacher_may_be_released(self) -> None:
        model, b = ToyDiT(), batch(6)
        criterion = stage2(model, make_teacher(ToyDiT(seed=1)), stop_step=1)
        criterion(repa_loss(model, b, b["t"]), step=0)
        criterion.release_teacher()
        assert criterion.teacher is None
        assert criterion(repa_loss(model, b, b["t"]), step=1).weight.item() == 0.0

    def test_without_a_stop_step_the_step_is_optional(self) -> None:
        model, b = ToyDiT(), batch(6)
        criterion = repa_criterion(model)
        for step in (None, 10**9):
            assert criterion(repa_loss(model, b, b["t"]), latents=b["x"], step=step).weight.item() == 0.5


class TestPrecision:
    @pytest.mark.parametrize("stage", [1, 2])
    def test_under_autocast_the_alignment_is_float32_and_every_parameter_gets_a_gradient(self, stage: int) -> None:
        model, b = ToyDiT(dropout=0.0, num_classes=11), batch(8)
        criterion = (
            repa_criterion(model, window=None)
            if stage == 1
            else stage2(model, make_teacher(ToyDiT(seed=1)), window=None)
        )
        full = criterion(repa_loss(model, b, b["t"]), latents=b["x"]).alignment
        with torch.autocast("cpu", dtype=torch.bfloat16):
            own = repa_loss(model, b, b["t"])
        terms = criterion(own, latents=b["x"])  # outside: accelerate leaves its autocast with the forward
        terms.total.backward()
        assert terms.alignment.dtype == torch.float32
        assert not torch.equal(terms.alignment, full)  # head and teacher ran under the layer's autocast
        torch.testing.assert_close(terms.alignment, full, rtol=0.05, atol=0.0)
        gradients = [p.grad for p in criterion.parameters()] + [p.grad for p in model.blocks[0].parameters()]
        assert all(g is not None and g.isfinite().all() and g.abs().max() > 0 for g in gradients)

    def test_a_bfloat16_time_is_read_in_float32(self) -> None:
        """t is rounded once, when the loop casts it; the velocity is not rounded again."""
        model, b = ToyDiT(dropout=0.0), batch(6)
        reference, t = copy.deepcopy(model), torch.linspace(0.42, 0.68, 6).bfloat16()
        criterion = repa_criterion(model, target="velocity")
        x_t = noised(b, t.float())
        terms = criterion(model(x_t, t, b["y"]).mean(), latents=b["x"])
        _, tokens = plain.tapped(reference, "blocks.1", x_t, t, b["y"])
        image = plain.predict_latents(plain.leaves(criterion), tokens, channels=4, patch=2, prefix="heads.0.")
        expected = plain.distance(image, b["noise"] - b["x"]).mean()
        torch.testing.assert_close(terms.alignment, expected.detach(), **TOLERANCE)
