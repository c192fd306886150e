"""The combined loss: values and every gradient against the method written out plainly."""

from __future__ import annotations

from typing import Any

import plain
import pytest
import torch
from loops import assert_same, denoising, gradients, new_criterion, new_teacher, noisy_batch, plain_terms, student, toy

import selftrans_reg as st

# Noise fractions around the edges of the published window (0.4, 0.7), closed with 1e-6 of slack; five are inside.
FRACTIONS = [0.1, 0.4, 0.55, 0.7, 0.4 - 5e-7, 0.7 + 5e-7, 0.4 - 3e-6, 0.7 + 3e-6, 0.95]
B = noisy_batch([1 - fraction for fraction in FRACTIONS])
INSIDE = noisy_batch([0.35, 0.4, 0.45, 0.5, 0.55, 0.59])
SETTINGS: list[dict[str, Any]] = [
    {},
    {"distance": "cosine"},
    {"distance": "smooth_l1"},
    {"gating": "released"},
    {"gating": "released", "distance": "cosine", "layer": ["blocks.0", "blocks.2"]},
    {"layer": ["blocks.0", "blocks.2"]},
    {"window": None},
    {"window": (0.5, 0.95), "weight": 2},
    {"time": "repa", "call": {"t": lambda arguments: 1 - arguments["t"]}},  # t = 1 is noise there
]
OF_STAGE_1: list[dict[str, Any]] = [
    {"target": "velocity"},
    {"target": "velocity", "gating": "released", "distance": "smooth_l1"},
    {"target": "velocity", "time": "repa", "call": {"t": lambda arguments: 1 - arguments["t"]}},
]


# Named by place: with a function in it the text of a setting differs between processes.
@pytest.mark.parametrize(("stage", "settings"), [*((1, s) for s in SETTINGS + OF_STAGE_1), *((2, s) for s in SETTINGS)])
def test_a_step_equals_the_plain_formula(stage: int, settings: dict[str, Any]) -> None:
    model, taught_by = student(), toy(2)
    if stage == 2:  # the student drops labels that the teacher is shown
        model.dropout = taught_by.dropout = 0.5
    criterion = new_criterion(model, stage, new_teacher(taught_by), **{"weight": 0.7} | settings)
    with plain.global_seed(0):
        terms = criterion(denoising(model, B), latents=B.latents)
    terms.total.backward()
    found = gradients(model, criterion)
    model.zero_grad(), criterion.zero_grad()

    seen = B.y if stage == 1 else torch.where(model.dropped, 10, B.y)
    formula = {name: settings[name] for name in ("target", "distance", "gating", "window") if name in settings}
    layers = (0, 2) if "layer" in settings else (1,)
    wanted, alignment = plain_terms(model, criterion, toy(2) if stage == 2 else None, B, seen, layers=layers, **formula)
    weight = settings.get("weight", 0.7)
    (wanted + weight * alignment).backward()
    torch.testing.assert_close(terms.denoising, wanted.detach(), **plain.TOLERANCE)
    torch.testing.assert_close(terms.alignment, alignment.detach(), **plain.TOLERANCE)
    torch.testing.assert_close(terms.total, (wanted + weight * alignment), **plain.TOLERANCE)
    torch.testing.assert_close(terms.in_window, plain.inside(1 - B.t, settings.get("window", (0.4, 0.7))).mean())
    assert terms.weight.item() == pytest.approx(weight)
    assert_same(found, gradients(model, criterion), tolerance=1e-5)
    assert alignment > 0.1


def test_the_velocity_is_noise_minus_latents_on_a_curved_path() -> None:
    """Also where the noise is next to nothing: it is finite."""
    t = torch.tensor([0, 0, 100, 300, 500, 999])
    path = st.TimeConvention.named("ddpm")
    alpha, sigma = (level.reshape(-1, 1, 1, 1) for level in (path.signal(t), path.noise(t)))
    noise = INSIDE.latents - INSIDE.velocity
    b = INSIDE._replace(x_t=alpha * INSIDE.latents + sigma * noise, t=t)
    model = student()
    criterion = new_criterion(model, 1, time="ddpm", window=None, target="velocity")
    output, tokens = plain.tapped(model, "blocks.1", b.x_t, b.t, b.y)
    found = criterion(output.mean(), latents=b.latents).alignment
    predicted = plain.predict(dict(criterion.named_parameters()), tokens, "heads.0.")
    wanted = plain.distance(predicted, plain.patches(noise - b.latents)).mean()
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("gating", ["per-sample", "released"])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("fraction", [0.1, 0.39999, 0.70001, 1.0])
def test_a_batch_outside_the_window_adds_an_exact_zero_and_runs_no_teacher(
    fraction: float, stage: int, gating: str
) -> None:
    model, reference, teacher = student(), student(), new_teacher()
    teacher.model.register_forward_pre_hook(lambda module, args: pytest.fail("the teacher ran"))
    criterion, b = new_criterion(model, stage, teacher, gating=gating), noisy_batch([1 - fraction] * 4)
    terms = criterion(denoising(model, b), latents=b.latents)
    terms.total.backward()
    denoising(reference, b).mean().backward()
    assert terms.total.item() == terms.denoising.item()
    assert (terms.alignment.item(), terms.weight.item(), terms.in_window.item()) == (0.0, 0.5, 0.0)
    assert_same(gradients(model), gradients(reference), tolerance=0.0)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in criterion.parameters())  # DDP waits for each


def test_terms_are_scalars_of_which_only_the_total_has_a_graph() -> None:
    model = student()
    criterion = new_criterion(model, 1)
    for average in (False, True):  # the loop's own loss may be either
        loss = denoising(model, B)
        terms = criterion(loss.mean() if average else loss, latents=B.latents)
        assert [(term.shape, term.requires_grad) for term in terms] == [((), True)] + [((), False)] * 4
        assert terms.alignment.dtype == torch.float32
        assert terms.denoising == loss.mean()


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("constant", [1, 1, 1, 1, 0, 0]),
        ("linear", [1, 0.75, 0.5, 0.25, 0, 0]),
        ("cosine", [1, (1 + 2**-0.5) / 2, 0.5, (1 - 2**-0.5) / 2, 0, 0]),
    ],
)
def test_the_weight_falls_from_the_first_step_to_the_stop_step(schedule: str, factors: list[float]) -> None:
    model, teacher = student(), new_teacher()
    criterion = new_criterion(model, 2, teacher, schedule=schedule, stop_step=40, weight=0.8)
    teacher(B.x_t, B.t, B.y)  # the first call drops what never runs, in passes of its own
    runs: list[int] = []
    teacher.model.register_forward_pre_hook(lambda module, args: runs.append(len(args[0])))
    for step, factor in zip([0, 10, 20, 30, 40, 1000], factors, strict=True):
        terms = criterion(denoising(model, INSIDE), step=step)
        assert terms.weight.item() == pytest.approx(0.8 * factor)
        torch.testing.assert_close(terms.total, terms.denoising + 0.8 * factor * terms.alignment, **plain.TOLERANCE)
        assert (terms.alignment.item() > 0) == (step < 40)
    assert len(runs) == 4
    terms.total.backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in criterion.parameters())
