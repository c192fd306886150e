"""The examples' Fréchet distance against closed forms, and their classifier on the digits."""

import numpy as np
import pytest
import torch
from common.data import digits
from common.metrics import (
    FeatureStatistics,
    SmallClassifier,
    accuracy,
    classifier_features,
    feature_statistics,
    frechet_distance,
    train_classifier,
)
from scipy.linalg import sqrtm
from scipy.stats import ortho_group

from selftrans_reg.errors import ShapeError


def random_covariance(seed: int, width: int = 5, rank: int = 5) -> np.ndarray:
    factor = np.random.default_rng(seed).normal(size=(width, rank))
    return factor @ factor.T


def test_one_dimension_is_the_textbook_formula() -> None:
    a = FeatureStatistics(np.array([1.0]), np.array([[4.0]]))
    b = FeatureStatistics(np.array([3.0]), np.array([[9.0]]))
    assert frechet_distance(a, b) == pytest.approx((1 - 3) ** 2 + (2 - 3) ** 2)


def test_commuting_covariances_add_up_over_their_common_axes() -> None:
    axes = ortho_group.rvs(4, random_state=0)
    first, second = np.array([1.0, 4.0, 9.0, 0.0]), np.array([4.0, 1.0, 0.0, 16.0])  # two of them singular
    a = FeatureStatistics(np.zeros(4), axes @ np.diag(first) @ axes.T)
    b = FeatureStatistics(np.ones(4), axes @ np.diag(second) @ axes.T)
    expected = 4 + ((np.sqrt(first) - np.sqrt(second)) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected)


def test_general_covariances_equal_the_matrix_root() -> None:
    a = FeatureStatistics(np.zeros(5), random_covariance(0))
    b = FeatureStatistics(np.arange(5.0), random_covariance(1))
    root = sqrtm(a.covariance @ b.covariance)
    expected = 30 + np.trace(a.covariance + b.covariance - 2 * root.real)
    assert frechet_distance(a, b) == pytest.approx(expected)
    assert frechet_distance(b, a) == pytest.approx(expected)


def test_the_distance_to_itself_is_zero_even_when_singular() -> None:
    a = FeatureStatistics(np.ones(5), random_covariance(2, rank=2))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_statistics_are_the_mean_and_the_unbiased_covariance() -> None:
    features = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    found = feature_statistics(features)
    mean = features.astype(np.float64).sum(0) / 7
    centred = features - mean
    np.testing.assert_allclose(found.mean, mean)
    np.testing.assert_allclose(found.covariance, centred.T @ centred / 6)


def test_shapes_that_do_not_fit_are_named() -> None:
    for match in [r"N >= 2", r"Found: \(1, 3\)", "one row of features"]:
        with pytest.raises(ShapeError, match=match):
            feature_statistics(np.zeros((1, 3)))
    a, b = (FeatureStatistics(np.zeros(n), np.eye(n)) for n in (2, 3))
    for match in ["features of one width", "Found: 2 and 3", "one extractor"]:
        with pytest.raises(ShapeError, match=match):
            frechet_distance(a, b)


def test_the_classifier_learns_the_digits_and_its_features_tell_noise_from_digits(generator: torch.Generator) -> None:
    train, held_out = digits(16)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = SmallClassifier(10)
        before = accuracy(classifier, held_out.images, held_out.labels)
        train_classifier(classifier, train.images, train.labels, steps=100)
    assert before < 0.3
    assert accuracy(classifier, held_out.images, held_out.labels) > 0.9
    assert not any(parameter.requires_grad for parameter in classifier.parameters())

    real = feature_statistics(classifier_features(classifier, train.images))

    def distance(images: torch.Tensor) -> float:
        return frechet_distance(real, feature_statistics(classifier_features(classifier, images)))

    noise = torch.randn(held_out.images.shape, generator=generator)
    slightly, pure = (held_out.images + 0.5 * noise).clamp(-1, 1), noise.clamp(-1, 1)
    assert distance(held_out.images) < distance(slightly) < distance(pure)


def test_features_and_accuracy_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = digits(16)[1]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = SmallClassifier(10).eval()
    with torch.no_grad():
        logits, features = classifier(images), classifier.features(images)
    monkeypatch.setattr("common.metrics._FEATURE_BATCH", 7)
    np.testing.assert_allclose(classifier_features(classifier, images), features.numpy(), atol=1e-5)
    assert accuracy(classifier, images, labels) == pytest.approx((logits.argmax(1) == labels).float().mean().item())
