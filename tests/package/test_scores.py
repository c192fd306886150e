"""The measures of a report against scikit-learn and numpy; CKA is written out in the test of the report."""

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
    features = 3 + torch.randn(5, width, generator=generator)[labels]
    features += spread * torch.randn(n, width, generator=generator)
    return features.double() * torch.linspace(0.1, 5, width, dtype=torch.float64), labels


@pytest.mark.parametrize(("n", "width", "spread"), [(300, 12, 1.0), (80, 12, 2.0), (80, 150, 3.0)])
@pytest.mark.parametrize("k", [1, 10])
def test_accuracies_are_sklearns_and_leave_one_out_chooses_the_probes_ridge(
    n: int, width: int, spread: float, k: int, generator: torch.Generator
) -> None:
    x, y = classes(n, width, spread, generator)
    train, test = slice(0, 3 * n // 4), slice(3 * n // 4, None)
    x = x - x[train].mean(0)
    neighbours = KNeighborsClassifier(k, metric="cosine").fit(x[train], y[train])
    scaled, count = x / x[train].std(0, correction=0), len(x[train])
    ridge = RidgeClassifierCV(alphas=[count * a for a in (1e-4, 1e-3, 1e-2, 1e-1, 1.0)]).fit(scaled[train], y[train])
    expected = neighbours.score(x[test], y[test]), ridge.score(scaled[test], y[test])
    parts = x[train] + 3, y[train], x[test] + 3, y[test]
    assert 0.2 < min(expected) < 1
    assert (knn_accuracy(*parts, k), probe_accuracy(*parts)) == pytest.approx(expected)


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
    shares = singular[singular > 1e-9] / singular.sum()
    assert effective_rank(x) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-5)
    assert effective_rank(torch.ones_like(x)) == 0


def test_cka_is_near_0_for_unrelated_features(generator: torch.Generator) -> None:
    x, other = torch.randn(2, 60, 400, generator=generator, dtype=torch.float64)
    assert abs((similarities(x) @ similarities(other)).item()) < 0.1  # the biased one would be above 0.8
    assert (similarities(torch.ones(60, 4, dtype=torch.float64)) == 0).all()
