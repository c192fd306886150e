"""The measures of a report against scikit-learn, numpy and formulas written out."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeClassifierCV
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from selftrans_reg.analysis.scores import effective_rank, knn_accuracy, probe_accuracy, similarities


def classes(n: int, width: int, spread: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Five clouds around random centres, off the origin and of unequal scales."""
    labels = torch.randint(5, (n,), generator=generator)
    centres = torch.randn(5, width, generator=generator)
    features = 3 + centres[labels] + spread * torch.randn(n, width, generator=generator)
    return features.double() * torch.linspace(0.1, 5, width, dtype=torch.float64), labels


@pytest.mark.parametrize(("width", "spread", "k"), [(6, 1.0, 1), (6, 1.5, 10), (200, 4.0, 7)])
def test_knn_is_sklearns(width: int, spread: float, k: int, generator: torch.Generator) -> None:
    x, y = classes(160, width, spread, generator)
    train, test = slice(0, 120), slice(120, None)
    neighbours = KNeighborsClassifier(k, metric="cosine").fit(x[train] - x[train].mean(0), y[train])
    expected = neighbours.score(x[test] - x[train].mean(0), y[test])
    assert 0.2 < expected <= 1
    assert knn_accuracy(x[train], y[train], x[test], y[test], k) == pytest.approx(expected)


@pytest.mark.parametrize(("n", "width", "spread"), [(300, 12, 1.0), (80, 12, 2.0), (80, 150, 3.0)])
def test_the_probe_is_ridge_regression_that_leave_one_out_chooses(
    n: int, width: int, spread: float, generator: torch.Generator
) -> None:
    x, y = classes(n, width, spread, generator)
    train, test = slice(0, 3 * n // 4), slice(3 * n // 4, None)
    scaled = (x - x[train].mean(0)) / x[train].std(0, correction=0)
    count = len(x[train])
    ridge = RidgeClassifierCV(alphas=[count * a for a in (1e-4, 1e-3, 1e-2, 1e-1, 1.0)]).fit(scaled[train], y[train])
    expected = ridge.score(scaled[test], y[test])
    assert 0.2 < expected < 1
    assert probe_accuracy(x[train], y[train], x[test], y[test]) == pytest.approx(expected)


def test_the_probe_ignores_what_is_constant(generator: torch.Generator) -> None:
    x, y = classes(100, 8, 1.0, generator)
    rounding = 1e7 + torch.rand(100, 3, generator=generator, dtype=torch.float64)
    expected = probe_accuracy(x[:70], y[:70], x[70:], y[70:])
    wider = torch.cat([x, rounding], dim=1)
    assert probe_accuracy(wider[:70], y[:70], wider[70:], y[70:]) == expected
    flat = torch.ones_like(x)
    assert probe_accuracy(flat[:70], y[:70], flat[70:], y[70:]) == (y[70:] == y[:70].mode().values).double().mean()


@pytest.mark.parametrize("shape", [(40, 7), (12, 30)])
def test_effective_rank_is_the_entropy_of_the_singular_values(
    shape: tuple[int, int], generator: torch.Generator
) -> None:
    x = torch.randn(shape, generator=generator, dtype=torch.float64) + 5
    singular = np.linalg.svd(x.numpy() - x.numpy().mean(0), compute_uv=False)
    singular = singular[singular > 1e-9]
    shares = singular / singular.sum()
    assert effective_rank(x) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-5)


def test_effective_rank_counts_directions() -> None:
    line = torch.arange(8.0, dtype=torch.float64)[:, None] * torch.tensor([1.0, 2.0, -1.0])
    assert effective_rank(line) == pytest.approx(1, abs=1e-6)
    assert effective_rank(torch.eye(3, dtype=torch.float64).repeat(4, 1)) == pytest.approx(2)  # a plane: less the mean
    assert effective_rank(torch.ones(5, 3, dtype=torch.float64)) == 0


def hsic(k: np.ndarray, m: np.ndarray) -> float:
    """The unbiased estimate as its definition has it: means over tuples of distinct indices (Song et al., 2012)."""
    n = len(k)

    def mean(count: int, term: Callable[..., float]) -> float:
        return float(np.mean([term(*index) for index in itertools.permutations(range(n), count)]))

    return (
        mean(2, lambda i, j: k[i, j] * m[i, j])
        + mean(4, lambda i, j, q, r: k[i, j] * m[q, r])
        - 2 * mean(3, lambda i, j, q: k[i, j] * m[i, q])
    )


def test_the_cosine_of_similarities_is_unbiased_linear_cka(generator: torch.Generator) -> None:
    x = torch.randn(7, 3, generator=generator, dtype=torch.float64) + 2
    y = x @ torch.randn(3, 5, generator=generator, dtype=torch.float64)
    y = y + torch.randn(7, 5, generator=generator, dtype=torch.float64)
    k, m = (x @ x.T).numpy(), (y @ y.T).numpy()
    expected = hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))
    assert 0.1 < expected < 1
    assert (similarities(x) @ similarities(y)).item() == pytest.approx(expected)


def test_cka_is_blind_to_rotation_scale_and_shift_and_near_0_for_unrelated_features(generator: torch.Generator) -> None:
    x = torch.randn(60, 400, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(400, 400, generator=generator, dtype=torch.float64)).Q
    assert (similarities(x) @ similarities(7 * x @ rotation + 3)).item() == pytest.approx(1)
    other = torch.randn(60, 400, generator=generator, dtype=torch.float64)
    assert abs((similarities(x) @ similarities(other)).item()) < 0.1  # the biased one would be above 0.8
    assert (similarities(torch.ones(60, 4, dtype=torch.float64)) == 0).all()
