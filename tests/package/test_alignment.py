"""Rows inside the window, and the random part of them that the teacher is shown."""

import copy
from itertools import combinations
from math import comb

import plain
import pytest
import torch
import torch.nn.functional as F
from benchmarks.overhead_variants import Batch, Shape
from loops import LAYER, new_criterion, new_teacher, noisy_batch, student, total

import selftrans_reg as st
from selftrans_reg.alignment import sample_rows

# In SiT's convention the default window is t in [0.3, 0.6]: rows 1, 2, 4 and 6 are inside.
TIMES = [0.1, 0.4, 0.5, 0.9, 0.35, 0.95, 0.55, 0.05]
INSIDE = [1, 2, 4, 6]


def gradients(model: torch.nn.Module, criterion: st.SelfTransLoss) -> list[torch.Tensor]:
    return [p.grad.clone() for p in [*model.parameters(), *criterion.parameters()] if p.grad is not None]


def seeds_by_subset(n: int, k: int) -> dict[tuple[int, ...], int]:
    """For every subset of ``range(n)`` with k elements a seed that draws it."""
    found: dict[tuple[int, ...], int] = {}
    for seed in range(1000):
        found.setdefault(tuple(sample_rows(torch.arange(n), k, seed).tolist()), seed)
    assert sorted(found) == list(combinations(range(n), k))
    return found


def test_teacher_sees_only_the_rows_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = new_teacher()
    model = student()
    criterion = new_criterion(model, teacher=teacher)
    b = noisy_batch(TIMES)
    total(model, criterion, b)  # the first call runs the teacher several times, to truncate it
    seen: list[torch.Tensor] = []
    teacher.model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    total(model, criterion, b)
    (doubled,) = seen
    torch.testing.assert_close(doubled, b.x_t[INSIDE].repeat(2, 1, 1, 1), rtol=0, atol=0)


@pytest.mark.parametrize("seed", [0, 1])
def test_loss_and_gradients_are_those_of_the_masked_whole_batch(seed: int) -> None:
    """To 1e-5, relative, for every parameter: with the published layers, scale and window, in the field's SiT."""
    torch.manual_seed(seed)
    shape = Shape(width=64, heads=4, tokens_per_side=4)
    model, taught_by = shape.model(), shape.model()
    b = Batch.draw(shape, torch.Generator().manual_seed(seed), "cpu")
    teacher = st.build_teacher(copy.deepcopy(taught_by), None, layer="blocks.7", guidance_scale=30.0, null={"y": 1000})
    model.y_embedder.dropout_prob = 0.0
    with st.SelfTransLoss.stage2(model, layer="blocks.5", teacher=teacher, time="repa") as criterion:
        found = criterion(F.mse_loss(model(b.x_t, b.t, b.y), b.velocity)).total
    found.backward()
    parameters = dict(model.named_parameters()) | dict(criterion.named_parameters())
    gradients = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    model.zero_grad(), criterion.zero_grad()

    prediction, tokens = plain.tapped(model, "blocks.5", b.x_t, b.t, b.y)
    null = torch.full_like(b.y, 1000)
    target = plain.guided(taught_by, "blocks.7", 30.0, (b.x_t, b.t, b.y), (b.x_t, b.t, null))
    head = dict(criterion.heads[0].named_parameters())
    alignment = (plain.inside(b.t) * plain.distance(plain.project(head, tokens), target)).mean()
    wanted = F.mse_loss(prediction, b.velocity) + 0.5 * alignment
    wanted.backward()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    assert alignment > 0
    assert len(gradients) > 12 * 8
    for name, gradient in gradients.items():
        expected = parameters[name].grad
        assert (gradient - expected).norm() <= 1e-5 * expected.norm(), name


@pytest.mark.parametrize("gating", ["per-sample", "released"])
def test_sampled_rows_give_the_same_loss_and_gradient_in_expectation(gating: str) -> None:
    """The average over every subset, each drawn equally often, is the value without sampling."""
    model, teacher, b = student(), new_teacher(), noisy_batch(TIMES)
    with new_criterion(model, teacher=teacher, gating=gating) as criterion:
        whole = total(model, criterion, b)
        whole.backward()
        expected = gradients(model, criterion)
    population = len(TIMES) if gating == "released" else len(INSIDE)
    subsets = seeds_by_subset(population, 2)
    model.zero_grad()
    values = []
    with new_criterion(model, teacher=teacher, gating=gating, teacher_rows=2) as criterion:
        for seed in subsets.values():
            criterion._calls = seed - 1  # the number of the call is what the choice depends on
            loss = total(model, criterion, b)
            (loss / comb(population, 2)).backward()
            values.append(loss.detach())
        found = gradients(model, criterion)
    torch.testing.assert_close(torch.stack(values).mean(), whole.detach(), rtol=1e-5, atol=1e-6)
    assert torch.stack(values).std() > 0.01 * whole.detach()  # the draws do differ
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_sampled_rows_are_drawn_alike_often() -> None:
    counts = torch.zeros(6)
    for seed in range(6000):
        counts[sample_rows(torch.arange(6), 2, seed)] += 1
    # Binomial with p = 1/3: a standard deviation of 36.5 around 2000.
    assert ((counts - 2000).abs() < 5 * 36.5).all()


@pytest.mark.parametrize(("rows", "count"), [(None, 10), (3, 3), (20, 10), (0.25, 3), (0.3, 3), (0.99, 10)])
def test_count_or_share_of_rows(rows: int | float | None, count: int) -> None:
    chosen = sample_rows(torch.arange(100, 110), rows, seed=3)
    assert len(chosen) == len(set(chosen.tolist())) == count
    assert chosen.tolist() == sorted(chosen.tolist())
    assert set(chosen.tolist()) <= set(range(100, 110))


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 100])
def test_chunks_give_what_one_pass_gives(chunk: int) -> None:
    b = noisy_batch(TIMES)
    results = []
    for teacher_chunk in (None, chunk):
        model = student()
        criterion = new_criterion(model, teacher_chunk=teacher_chunk)
        loss = total(model, criterion, b)
        loss.backward()
        results.append((loss.detach(), gradients(model, criterion)))
    (want, want_gradients), (got, got_gradients) = results
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    for a, e in zip(got_gradients, want_gradients, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)


def test_chunks_bound_the_teachers_batch() -> None:
    teacher = new_teacher()
    model = student()
    criterion = new_criterion(model, teacher=teacher, teacher_chunk=3)
    total(model, criterion, noisy_batch(TIMES))
    sizes: list[int] = []
    teacher.model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    total(model, criterion, noisy_batch(TIMES))
    assert sizes == [3, 3, 2]  # four rows, doubled


@pytest.mark.parametrize("gating", ["per-sample", "released"])
def test_no_row_inside_means_no_teacher_call_and_an_exact_zero(gating: str) -> None:
    teacher = new_teacher()
    model = student()
    criterion = new_criterion(model, teacher=teacher, gating=gating)
    teacher.model.register_forward_pre_hook(lambda module, args: pytest.fail("the teacher ran"))
    b = noisy_batch([0.9, 0.95, 0.05])
    terms = criterion(torch.tensor(1.0) + 0 * model(b.x_t, b.t, b.y).sum(), latents=b.latents)
    assert terms.alignment == 0
    assert terms.in_window == 0
    assert terms.weight == 0.5
    terms.total.backward()
    for parameter in criterion.parameters():  # DDP waits for a gradient of each
        assert parameter.grad is not None
        assert parameter.grad.abs().max() == 0
    assert LAYER == 1
