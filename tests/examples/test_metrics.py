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
    frechet_spread,
    kernel_distance,
    precision_recall,
    streamed_statistics,
    train_classifier,
)
from common.options import Mistake
from scipy.linalg import sqrtm
from scipy.stats import ortho_group


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


def test_shapes_that_do_not_fit_are_named() -> None:
    for features, match in [(np.zeros((1, 3)), "at least two images.\nFound: 1"), (np.zeros(3), r"Found: \(3,\)")]:
        with pytest.raises(Mistake, match=match):
            feature_statistics(features)
    a, b = (FeatureStatistics(np.zeros(n), np.eye(n)) for n in (2, 3))
    for match in ["features of one width", "Found: 2 and 3", "one extractor"]:
        with pytest.raises(Mistake, match=match):
            frechet_distance(a, b)


@pytest.mark.parametrize("sizes", [[7], [1, 6], [3, 1, 1, 2]])
def test_streamed_statistics_equal_those_of_all_rows(sizes: list[int]) -> None:
    # Far from zero, where a mean of squares less a squared mean would keep no digit.
    features = 1e8 + np.random.default_rng(0).normal(size=(7, 3))
    found = streamed_statistics(np.split(features, np.cumsum(sizes)[:-1]))
    expected = feature_statistics(features)
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-14)
    np.testing.assert_allclose(found.covariance, expected.covariance, rtol=1e-6)
    with pytest.raises(Mistake, match=r"at least two images.\nFound: 1"):
        streamed_statistics([features[:1]])


def test_the_spread_is_that_of_new_samples() -> None:
    """In one dimension the distance of n samples of N(3, 1) from N(0, 1) is near (m^2): deviation 2 * 3 / sqrt(n)."""
    rng = np.random.default_rng(0)
    law = FeatureStatistics(np.zeros(1), np.eye(1))
    anew = [frechet_distance(law, feature_statistics(3 + rng.normal(size=(500, 1)))) for _ in range(200)]
    spread = frechet_spread(law, 3 + rng.normal(size=(500, 1)), draws=200)
    assert spread == pytest.approx(6 / 500**0.5, rel=0.2)
    assert spread == pytest.approx(np.std(anew), rel=0.25)
    features = rng.normal(size=(20, 2))
    law = FeatureStatistics(np.zeros(2), np.eye(2))
    assert frechet_spread(law, features, draws=5) == frechet_spread(law, features, draws=5)
    assert frechet_spread(law, features, draws=5) != frechet_spread(law, features, draws=5, seed=1)


def test_precision_and_recall_of_points_on_a_line() -> None:
    data = np.array([[0.0], [1.0], [10.0], [12.0]])  # with k = 1, balls [-1, 1], [0, 2], [8, 12], [10, 14]
    samples = np.array([[0.5], [2.5], [3.0], [13.0]])  # balls [-1.5, 2.5], [2, 3], [2.5, 3.5], [3, 23]
    assert precision_recall(data, samples, neighbours=1) == (2 / 4, 4 / 4)  # 0.5 and 13; all
    # With k = 2 the data's are [-10, 10], [-8, 10], [1, 19], [1, 23]; the samples' [-2, 3], [0.5, 4.5], [0.5, 5.5], ...
    assert precision_recall(data, samples, neighbours=2) == (1, 1)
    assert precision_recall(data, samples[[0, 1, 2]], neighbours=1) == (1 / 3, 2 / 4)  # 13's ball held 10 and 12


def plain_share(points: np.ndarray, others: np.ndarray, k: int) -> float:
    """The definition, point by point."""
    inside = 0
    for point in points:
        for i, other in enumerate(others):
            radius = sorted(np.linalg.norm(other - o) for j, o in enumerate(others) if j != i)[k - 1]
            if np.linalg.norm(point - other) <= radius:
                inside += 1
                break
    return inside / len(points)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_equal_the_definition(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    data, samples = rng.normal(size=(23, 2)), 1.5 * rng.normal(size=(17, 2)) + 2
    expected = (plain_share(samples, data, k), plain_share(data, samples, k))
    assert 0 < expected[0] < 1
    assert 0 < expected[1] < 1
    assert tuple(precision_recall(data, samples, neighbours=k)) == expected
    far = 1e6  # the squares of what is subtracted are a trillion times larger than the distances
    assert tuple(precision_recall(data + far, samples + far, neighbours=k)) == expected
    monkeypatch.setattr("common.metrics._DISTANCE_ROWS", 5)
    assert tuple(precision_recall(data, samples, neighbours=k)) == expected


def test_the_kernel_distance_is_the_mean_over_pairs_of_different_points() -> None:
    rng = np.random.default_rng(0)
    data, samples = rng.normal(size=(7, 3)), rng.normal(size=(5, 3)) + 0.5

    def mean(a: np.ndarray, b: np.ndarray, *, same: bool) -> float:
        pairs = [(x @ y / 3 + 1) ** 3 for i, x in enumerate(a) for j, y in enumerate(b) if not (same and i == j)]
        return float(np.mean(pairs))

    expected = mean(data, data, same=True) + mean(samples, samples, same=True) - 2 * mean(data, samples, same=False)
    assert kernel_distance(data, samples) == pytest.approx(expected)


def test_sets_without_neighbours_are_named() -> None:
    for data, samples in [((3, 2), (9, 2)), ((9, 2), (3, 2)), ((9, 2), (9, 3))]:
        for match in ["more than 3 features of one width", rf"Found: \({data[0]}, {data[1]}\) and "]:
            with pytest.raises(Mistake, match=match):
                precision_recall(np.zeros(data), np.zeros(samples))


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
