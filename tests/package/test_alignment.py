"""Rows inside the window, and the random part of them that the teacher is shown."""

from itertools import combinations
from math import comb

import pytest
import torch
from loops import assert_same, gradients, new_criterion, new_teacher, noisy_batch, plain_gradients, student, total

from selftrans_reg.alignment import sample_rows

# In SiT's convention the default window is t in [0.3, 0.6]: rows 1, 2, 4 and 6 are inside.
B = noisy_batch([0.1, 0.4, 0.5, 0.9, 0.35, 0.95, 0.55, 0.05])
INSIDE = [1, 2, 4, 6]


@pytest.mark.parametrize(("chunk", "sizes"), [(None, [8]), (1, [1] * 8), (3, [3, 3, 2]), (5, [5, 3]), (100, [8])])
def test_the_teacher_sees_only_the_rows_inside_and_so_many_at_once(chunk: int | None, sizes: list[int]) -> None:
    teacher, model = new_teacher(), student()
    teacher(B.x_t, B.t, B.y)  # the first call runs the teacher several times, to truncate it
    seen: list[torch.Tensor] = []
    teacher.model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    criterion = new_criterion(model, teacher=teacher, teacher_chunk=chunk)
    total(model, criterion, B).backward()
    assert [len(x_t) for x_t in seen] == sizes
    assert torch.equal(torch.cat(seen), B.x_t[INSIDE].repeat(2, 1, 1, 1))
    assert_same(gradients(model, criterion), plain_gradients(B))


@pytest.mark.parametrize("gating", ["per-sample", "released"])
def test_sampled_rows_give_the_same_loss_and_gradient_in_expectation(gating: str) -> None:
    """The average over every subset, each drawn equally often, is the value without sampling."""
    model, teacher = student(), new_teacher()
    with new_criterion(model, teacher=teacher, gating=gating) as criterion:
        whole = total(model, criterion, B)
        whole.backward()
        expected = gradients(model, criterion)
    n = len(B.t) if gating == "released" else len(INSIDE)
    seeds = {tuple(sample_rows(torch.arange(n), 2, seed).tolist()): seed for seed in range(1000)}
    assert sorted(seeds) == list(combinations(range(n), 2))
    model.zero_grad()
    values = []
    with new_criterion(model, teacher=teacher, gating=gating, teacher_rows=2) as criterion:
        for seed in seeds.values():
            criterion._calls = seed - 1  # the number of the call is what the choice depends on
            values.append(total(model, criterion, B) / comb(n, 2))
            values[-1].backward()
        assert_same(gradients(model, criterion), expected, tolerance=1e-5)
    torch.testing.assert_close(sum(values), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("rows", "count"), [(None, 10), (3, 3), (20, 10), (0.25, 3), (0.3, 3), (0.99, 10)])
def test_so_many_rows_or_such_a_share_are_drawn_each_alike_often(rows: int | float | None, count: int) -> None:
    draws = torch.stack([sample_rows(torch.arange(100, 110), rows, seed) for seed in range(1000)])
    assert draws.shape == (1000, count)
    assert (draws.diff() > 0).all()
    counts, share = draws.flatten().bincount(minlength=110)[100:], count / 10
    # Binomial: five standard deviations.
    assert ((counts - 1000 * share).abs() <= 5 * (1000 * share * (1 - share)) ** 0.5).all()
