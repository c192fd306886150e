"""Distances against closed forms and plain definitions, and the extractors that turn images into features."""

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import metrics
from common.data import digits
from common.images import ImageSet
from common.metrics import (
    Extractor,
    FeatureStatistics,
    accuracy,
    classifier_features,
    evenly,
    extractor_named,
    feature_statistics,
    frechet_distance,
    frechet_spread,
    kernel_distance,
    precision_recall,
    reference_of,
    trained_classifier,
)
from common.options import Mistake, imported
from scipy.linalg import sqrtm
from scipy.stats import ortho_group

# --- distances


def random_covariance(seed: int, width: int = 5, rank: int = 5) -> np.ndarray:
    factor = np.random.default_rng(seed).normal(size=(width, rank))
    return factor @ factor.T


def test_commuting_covariances_add_up_over_their_common_axes() -> None:
    axes = ortho_group.rvs(4, random_state=0)
    first, second = np.array([1.0, 4.0, 9.0, 0.0]), np.array([4.0, 1.0, 0.0, 16.0])  # two of them singular
    a = FeatureStatistics(np.zeros(4), axes @ np.diag(first) @ axes.T)
    b = FeatureStatistics(np.ones(4), axes @ np.diag(second) @ axes.T)
    expected = 4 + ((np.sqrt(first) - np.sqrt(second)) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_general_covariances_equal_the_matrix_root() -> None:
    a = FeatureStatistics(np.zeros(5), random_covariance(0))
    b = FeatureStatistics(np.arange(5.0), random_covariance(1))
    root = sqrtm(a.covariance @ b.covariance)
    expected = 30 + np.trace(a.covariance + b.covariance - 2 * root.real)
    assert frechet_distance(a, b) == pytest.approx(expected)
    assert frechet_distance(b, a) == pytest.approx(expected)


def test_statistics_are_those_of_deviations_from_the_mean() -> None:
    # Far from zero, where a mean of squares less a squared mean would keep no digit.
    features = 1e8 + np.random.default_rng(0).normal(size=(7, 3))
    found, apart = feature_statistics(features), features - features.mean(0)
    np.testing.assert_allclose(found.mean, features.sum(0) / 7, rtol=1e-14)
    np.testing.assert_allclose(found.covariance, apart.T @ apart / 6, rtol=1e-6)


def test_the_spread_is_that_of_new_samples() -> None:
    """In one dimension the distance of n samples of N(3, 1) from N(0, 1) is near (m^2): deviation 2 * 3 / sqrt(n)."""
    rng = np.random.default_rng(0)
    law = FeatureStatistics(np.zeros(1), np.eye(1))
    features = 3 + rng.normal(size=(500, 1))
    spread = frechet_spread(law, features, draws=200)
    assert spread == pytest.approx(6 / 500**0.5, rel=0.2)
    assert spread == frechet_spread(law, features, draws=200)
    assert spread != frechet_spread(law, features, draws=200, seed=1)


def plain_share(points: np.ndarray, others: np.ndarray, k: int) -> float:
    """The definition, point by point."""
    radii = [sorted(np.linalg.norm(other - o) for o in others)[k] for other in others]  # the nearest is itself
    inside = [any(np.linalg.norm(p - o) <= r for o, r in zip(others, radii, strict=True)) for p in points]
    return float(np.mean(inside))


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_equal_the_definition(k: int) -> None:
    rng = np.random.default_rng(0)
    data, samples = rng.normal(size=(23, 2)), 1.5 * rng.normal(size=(17, 2)) + 2
    expected = (plain_share(samples, data, k), plain_share(data, samples, k))
    assert 0 < min(expected) <= max(expected) < 1
    assert tuple(precision_recall(data, samples, neighbours=k)) == expected
    far = 1e8  # the squares of what is subtracted are 16 orders larger than the distances
    assert tuple(precision_recall(data + far, samples + far, neighbours=k)) == expected


def test_the_kernel_distance_is_the_mean_over_pairs_of_different_points() -> None:
    rng = np.random.default_rng(0)
    data, samples = rng.normal(size=(7, 3)), rng.normal(size=(5, 3)) + 0.5

    def mean(a: np.ndarray, b: np.ndarray, *, same: bool) -> float:
        pairs = [(x @ y / 3 + 1) ** 3 for i, x in enumerate(a) for j, y in enumerate(b) if not (same and i == j)]
        return float(np.mean(pairs))

    expected = mean(data, data, same=True) + mean(samples, samples, same=True) - 2 * mean(data, samples, same=False)
    assert kernel_distance(data, samples) == pytest.approx(expected)


def test_features_that_do_not_fit_are_named() -> None:
    with pytest.raises(Mistake, match=r"at least two images.\nFound: \(1, 3\)"):
        feature_statistics(np.zeros((1, 3)))
    with pytest.raises(Mistake, match="Found: 2 and 3"):
        frechet_distance(*(FeatureStatistics(np.zeros(n), np.eye(n)) for n in (2, 3)))
    for shapes in [((3, 2), (9, 2)), ((9, 2), (3, 2)), ((9, 2), (9, 3))]:
        with pytest.raises(Mistake, match="two sets of more than 3 features of one width"):
            precision_recall(*map(np.zeros, shapes))


# --- the classifier


def test_the_classifier_learns_the_digits_and_its_features_tell_noise_from_digits(
    tmp_path: Path, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, held_out = digits(16)
    with torch.random.fork_rng():
        path = tmp_path / "classifier.pt"
        classifier = trained_classifier(path, train, steps=100, seed=0, device="cpu")
        again = trained_classifier(path, train, steps=0, seed=0, device="cpu")  # is read
    assert accuracy(classifier, held_out.images, held_out.labels) > 0.9
    assert accuracy(again, *held_out) == accuracy(classifier, *held_out)
    assert not any(parameter.requires_grad for parameter in classifier.parameters())
    features = classifier_features(classifier, held_out.images)
    monkeypatch.setattr(metrics, "_FEATURE_BATCH", 7)
    np.testing.assert_allclose(classifier_features(classifier, held_out.images), features, atol=1e-5)
    assert accuracy(again, *held_out) == accuracy(classifier, *held_out)

    real = feature_statistics(classifier_features(classifier, train.images))

    def distance(images: torch.Tensor) -> float:
        return frechet_distance(real, feature_statistics(classifier_features(classifier, images)))

    noise = torch.randn(held_out.images.shape, generator=generator)
    slightly, pure = (held_out.images + 0.5 * noise).clamp(-1, 1), noise.clamp(-1, 1)
    assert distance(held_out.images) < distance(slightly) < distance(pure)


# --- extractors


def test_few_of_many_features_are_held_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_PAIRED", 5)
    assert evenly(4).tolist() == [0, 1, 2, 3]
    grey = np.arange(13, dtype=np.uint8).reshape(13, 1, 1, 1) * np.ones((1, 2, 2, 3), np.uint8)
    np.savez(tmp_path / "grey.npz", grey)
    extractor = Extractor("first", lambda batch: batch[:, 0, 0, :1].float())
    found = reference_of(ImageSet(tmp_path / "grey.npz"), None, extractor, batch_size=4)
    assert found.features[:, 0].tolist() == [0, 3, 6, 9, 12]
    assert found.count == 13
    assert found.statistics == FeatureStatistics(pytest.approx(np.array([6.0])), pytest.approx(np.array([[91 / 6]])))


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (lambda images: images.float().mean((1, 2, 3)), r"features \(N, D\) of N images.\nFound: float32 \(2,\) for 2"),
        (lambda images: images.flatten(1).numpy(), r"Found: uint8 \(2, 48\) for 2 images"),
        (lambda images: torch.full((len(images), 2), float("inf")), "made features that are not finite"),
    ],
)
def test_what_is_no_features_is_named(function: Any, match: str) -> None:
    with pytest.raises(Mistake, match=match):
        Extractor("mine", function)(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))


def test_an_extractor_that_is_none_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("nothing", "sys:nothing", "no_such_module:f", ":f", "sys:"):
        with pytest.raises(Mistake, match=rf"--features '{name}' is no module:callable"):
            extractor_named(name, "cpu")
    with pytest.raises(Mistake, match="--features 'sys:maxsize' is a int, which cannot be called"):
        imported("sys:maxsize", "--features")


class Inception(torch.nn.Module):
    """Stands in for torch-fidelity's: the same call, a single weight."""

    start = 2.0

    def __init__(self, name: str, features_list: list[str]) -> None:
        super().__init__()
        assert (name, features_list) == ("inception-v3-compat", ["2048"])
        self.weight = torch.nn.Parameter(torch.tensor(self.start))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
        assert images.dtype == torch.uint8
        return (self.weight * images.float().mean((2, 3)),)


def test_inception_is_torch_fidelitys(monkeypatch: pytest.MonkeyPatch) -> None:
    def named() -> Extractor:
        return extractor_named("inception", "cpu")

    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)  # not importable
    with pytest.raises(Mistake, match=r"needs torch-fidelity(.|\n)*pip install torch-fidelity"):
        named()
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    monkeypatch.setattr(module, "FeatureExtractorInceptionV3", Inception, raising=False)
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)
    images = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    found = named()
    np.testing.assert_allclose(found(images), 2 * images.float().mean((2, 3)).numpy())
    monkeypatch.setattr(Inception, "start", 3.0)
    assert named().name != found.name  # other weights make other features
