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
REPA = {"time": "repa", "call": {"t": lambda arguments: 1 - arguments["t"]}}  # t = 1 is noise there
DDPM = {"time": "ddpm", "call": {"t": lambda arguments: (999 * (1 - arguments["t"])).round()}, "window": None}
LAYERS = {"layer": ["blocks.0", "blocks.2"]}
SETTINGS: list[dict[str, Any]] = [
    *({}, {"distance": "cosine"}, {"distance": "smooth_l1"}, {"gating": "released"}, LAYERS),
    *(LAYERS | {"gating": "released", "distance": "cosine"}, {"window": None}, {"window": (0.5, 0.95), "weight": 2}),
    REPA,
]
OF_STAGE_1: list[dict[str, Any]] = [
    *({"target": "velocity"}, {"target": "velocity", "gating": "released", "distance": "smooth_l1"}),
    *({"target": "velocity"} | REPA, {"target": "velocity"} | DDPM),
]


# Named by place: with a function in it the text of a setting differs between processes.
@pytest.mark.parametrize(("stage", "settings"), [*((1, s) for s in SETTINGS + OF_STAGE_1), *((2, s) for s in SETTINGS)])
def test_a_step_equals_the_plain_formula(stage: int, settings: dict[str, Any]) -> None:
    model, taught_by, b = student(), toy(2), B
    if "ddpm" in settings.values():  # on a curved path the velocity is noise minus latents all the same
        levels = st.TimeConvention.named("ddpm").noise(DDPM["call"]["t"]({"t": B.t}))
        alpha, sigma = (level.reshape(-1, 1, 1, 1) for level in ((1 - levels**2).sqrt(), levels))
        b = B._replace(x_t=alpha * B.latents + sigma * (B.latents - B.velocity))
    if stage == 2:  # the student drops labels that the teacher is shown
        model.dropout = taught_by.dropout = 0.5
    criterion = new_criterion(model, stage, new_teacher(taught_by), **{"weight": 0.7} | settings)
    with plain.global_seed(0):
        loss = denoising(model, b)
    terms = criterion(loss.mean() if stage == 1 else loss, latents=b.latents)  # the loop's own loss may be either
    terms.total.backward()
    found = gradients(model, criterion)
    model.zero_grad(), criterion.zero_grad()

    seen = b.y if stage == 1 else torch.where(model.dropped, 10, b.y)
    formula = {name: settings[name] for name in ("target", "distance", "gating", "window") if name in settings}
    layers = (0, 2) if "layer" in settings else (1,)
    wanted, alignment = plain_terms(model, criterion, toy(2) if stage == 2 else None, b, seen, layers=layers, **formula)
    weight = torch.tensor(settings.get("weight", 0.7))
    in_window = plain.inside(1 - b.t, settings.get("window", (0.4, 0.7))).mean()
    expected = (wanted + weight * alignment, wanted, alignment, weight.float(), in_window)
    torch.testing.assert_close(tuple(terms), expected, **plain.TOLERANCE)
    assert [term.requires_grad for term in terms] == [True, False, False, False, False]
    expected[0].backward()
    assert_same(found, gradients(model, criterion), tolerance=1e-5)
    assert alignment > 0.1


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    ("fraction", "settings", "step"),
    [
        *((fraction, {"gating": "released"}, None) for fraction in (0.1, 1.0)),
        *((fraction, {}, None) for fraction in (0.1, 0.39999, 0.70001, 1.0)),
        *((0.55, {"stop_step": 5}, step) for step in (5, 1000)),
        (0.55, {"weight": 0.0}, None),
    ],
)
def test_where_nothing_is_to_be_aligned_a_step_is_bit_equal_to_one_without(
    fraction: float, settings: dict[str, Any], step: int | None, stage: int
) -> None:
    """And runs no teacher and, where the alignment is measured with weight 0, makes no graph."""
    model, reference, teacher, b = student(), student(), new_teacher(), noisy_batch([1 - fraction] * 4)
    model.dropout = reference.dropout = 0.5
    measured, graphs = "weight" in settings, []
    if not measured:
        teacher.model.register_forward_pre_hook(lambda module, args: pytest.fail("the teacher ran"))
    criterion = new_criterion(model, stage, teacher, **settings)
    criterion.heads[0].register_forward_hook(lambda module, args, output: graphs.append(output.requires_grad))
    with plain.global_seed(0):
        terms = criterion(denoising(model, b), latents=b.latents, step=step)
    with plain.global_seed(0):
        loss = denoising(reference, b).mean()
    terms.total.backward(), loss.backward()
    assert terms.total.item() == terms.denoising.item() == loss.item()
    assert (terms.alignment.item() > 0, graphs[0]) == (measured, not measured)
    assert (terms.weight.item(), terms.in_window.item()) == (0.5 * (fraction != 0.55), float(measured))
    assert_same(gradients(model), gradients(reference), tolerance=0.0)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in criterion.parameters())  # DDP waits for each


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("constant", [1, 1, 1, 1, 0]),
        ("linear", [1, 0.75, 0.5, 0.25, 0]),
        ("cosine", [1, (1 + 2**-0.5) / 2, 0.5, (1 - 2**-0.5) / 2, 0]),
    ],
)
def test_the_weight_falls_from_the_first_step_to_the_stop_step(schedule: str, factors: list[float]) -> None:
    model = student()
    criterion = new_criterion(model, schedule=schedule, stop_step=40, weight=0.8)
    for step, factor in zip([0, 10, 20, 30, 40], factors, strict=True):
        terms = criterion(denoising(model, B), step=step)
        assert terms.weight.item() == pytest.approx(0.8 * factor)
        torch.testing.assert_close(terms.total, terms.denoising + 0.8 * factor * terms.alignment, **plain.TOLERANCE)
        assert (terms.alignment.item() > 0) == (step < 40)
