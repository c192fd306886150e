"""Distances against closed forms and plain definitions, and the extractors that turn images into features."""

import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from common import metrics
from common.data import digits
from common.images import ImageSet
from common.metrics import Extractor, FeatureStatistics, classifier_features, extractor_named, feature_statistics
from common.options import Mistake


@pytest.mark.parametrize("rank", [5, 3])
def test_the_frechet_distance_equals_the_formula_for_singular_covariances_too(rank: int) -> None:
    factors = np.random.default_rng(0).normal(size=(2, 5, rank))
    a, b = (FeatureStatistics(np.arange(5.0) * i, factor @ factor.T) for i, factor in enumerate(factors))
    root = np.sqrt(np.linalg.eigvals(a.covariance @ b.covariance).astype(complex)).real.sum()
    expected = 30 + np.trace(a.covariance + b.covariance) - 2 * root
    assert metrics.frechet_distance(a, b) == pytest.approx(expected)
    assert metrics.frechet_distance(b, a) == pytest.approx(expected)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_statistics_are_those_of_deviations_from_the_mean() -> None:
    # Far from zero, where a mean of squares less a squared mean would keep no digit.
    features = 1e8 + np.random.default_rng(0).normal(size=(7, 3))
    found, apart = feature_statistics(features), features - features.mean(0)
    np.testing.assert_allclose(found.mean, features.sum(0) / 7, rtol=1e-14)
    np.testing.assert_allclose(found.covariance, apart.T @ apart / 6, rtol=1e-6)
    with pytest.raises(Mistake, match=r"at least two images.\nFound: \(1, 3\)"):
        feature_statistics(features[:1])


def test_the_spread_is_that_of_new_samples() -> None:
    """In one dimension the distance of n samples of N(3, 1) from N(0, 1) is near (m^2): deviation 2 * 3 / sqrt(n)."""
    law, features = FeatureStatistics(np.zeros(1), np.eye(1)), 3 + np.random.default_rng(0).normal(size=(500, 1))
    spread = metrics.frechet_spread(law, features, draws=200)
    assert spread == pytest.approx(6 / 500**0.5, rel=0.2)
    assert spread == metrics.frechet_spread(law, features, draws=200)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_equal_the_definition(k: int) -> None:
    def share(points: np.ndarray, others: np.ndarray) -> float:
        radii = [sorted(np.linalg.norm(other - o) for o in others)[k] for other in others]  # the nearest is itself
        return np.mean([any(np.linalg.norm(p - o) <= r for o, r in zip(others, radii, strict=True)) for p in points])

    rng = np.random.default_rng(0)
    data, samples = rng.normal(size=(23, 2)), 1.5 * rng.normal(size=(17, 2)) + 2
    expected = (share(samples, data), share(data, samples))
    assert 0 < min(expected) <= max(expected) < 1
    assert tuple(metrics.precision_recall(data, samples, neighbours=k)) == expected
    far = 1e8  # the squares of what is subtracted are 16 orders larger than the distances
    assert tuple(metrics.precision_recall(data + far, samples + far, neighbours=k)) == expected


def test_the_kernel_distance_is_the_mean_over_pairs_of_different_points() -> None:
    rng = np.random.default_rng(0)
    data, samples = rng.normal(size=(7, 3)), rng.normal(size=(5, 3)) + 0.5

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        return np.mean([(x @ y / 3 + 1) ** 3 for i, x in enumerate(a) for j, y in enumerate(b) if a is not b or i != j])

    expected = mean(data, data) + mean(samples, samples) - 2 * mean(data, samples)
    assert metrics.kernel_distance(data, samples) == pytest.approx(expected)


def test_the_classifier_learns_the_digits_and_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, held_out = digits(16)
    with torch.random.fork_rng():
        path = tmp_path / "classifier.pt"
        classifier = metrics.trained_classifier(path, train, steps=100, seed=0, device="cpu")
        again = metrics.trained_classifier(path, train, steps=0, seed=0, device="cpu")
    found, features = metrics.accuracy(classifier, *held_out), classifier_features(classifier, held_out.images)
    assert found > 0.9
    assert not any(parameter.requires_grad for parameter in classifier.parameters())
    monkeypatch.setattr(metrics, "_FEATURE_BATCH", 7)
    assert metrics.accuracy(again, *held_out) == found
    np.testing.assert_allclose(classifier_features(again, held_out.images), features, atol=1e-5)


def test_few_of_many_features_are_held_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_PAIRED", 5)
    assert metrics.evenly(4).tolist() == [0, 1, 2, 3]
    grey = np.arange(13, dtype=np.uint8).reshape(13, 1, 1, 1) * np.ones((1, 2, 2, 3), np.uint8)
    np.savez(tmp_path / "grey.npz", grey)
    extractor = Extractor("first", lambda batch: batch[:, 0, 0, :1].float())
    found = metrics.reference_of(ImageSet(tmp_path / "grey.npz"), None, extractor, batch_size=4)
    assert found.features[:, 0].tolist() == [0, 3, 6, 9, 12]
    assert found.count == 13
    assert found.statistics == FeatureStatistics(pytest.approx(np.array([6.0])), pytest.approx(np.array([[91 / 6]])))


def test_what_is_no_features_is_named() -> None:
    for function, match in [
        (lambda images: images.float().mean((1, 2, 3)), r"features \(N, D\) of N images.\nFound: float32 \(2,\) for 2"),
        (lambda images: images.flatten(1).numpy(), r"Found: uint8 \(2, 48\) for 2 images"),
        (lambda images: torch.full((len(images), 2), float("inf")), "made features that are not finite"),
    ]:
        with pytest.raises(Mistake, match=match):
            Extractor("mine", function)(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))


def test_an_extractor_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("nothing", "sys:nothing", "no_such_module:f", ":f"):
        with pytest.raises(Mistake, match=rf"--features '{name}' is no module:callable"):
            extractor_named(name, "cpu")


def test_inception_is_torch_fidelitys(monkeypatch: pytest.MonkeyPatch) -> None:
    class Inception(torch.nn.Module):  # the same call, and a single weight
        def __init__(self, name: str, features_list: list[str]) -> None:
            super().__init__()
            assert (name, features_list) == ("inception-v3-compat", ["2048"])
            self.weight = torch.nn.Parameter(torch.tensor(2.0))

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
            assert images.dtype == torch.uint8
            return (self.weight * images.float().mean((2, 3)),)

    name = "torch_fidelity.feature_extractor_inceptionv3"
    monkeypatch.setitem(sys.modules, name, None)  # not importable
    with pytest.raises(Mistake, match=r"needs torch-fidelity(.|\n)*pip install torch-fidelity"):
        extractor_named("inception", "cpu")
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(FeatureExtractorInceptionV3=Inception))
    images = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    np.testing.assert_allclose(extractor_named("inception", "cpu")(images), 2 * images.float().mean((2, 3)).numpy())
