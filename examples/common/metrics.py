"""How far samples are from data, in features: the Fréchet distance, its spread, and precision and recall.

Also a classifier of small images, whose features serve where the data is small too.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from common.options import Mistake
from common.run_folder import finished_or_made
from common.training import endless, progress

if TYPE_CHECKING:
    from common.data import LabelledImages

_BATCH_SIZE = 64
_FEATURE_BATCH = 512
_DISTANCE_ROWS = 1024


class SmallClassifier(nn.Module):
    """A convolutional classifier of small grey or colour images; its features feed the Fréchet distance.

    Shape:
        images: (N, C, H, W) in [-1, 1]; returns: (N, num_classes) logits
    """

    def __init__(self, num_classes: int, image_channels: int = 1, feature_size: int = 64) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(image_channels, 16, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(64 * 16, feature_size),
            nn.SiLU(),
        )
        self.head = nn.Linear(feature_size, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Classify the images."""
        return self.head(self.features(images))


def train_classifier(
    classifier: SmallClassifier, images: Tensor, labels: Tensor, *, steps: int, lr: float = 2e-3, seed: int = 0
) -> None:
    """Train by cross-entropy with a one-cycle learning rate; the classifier ends in eval mode, frozen."""
    from common.data import shuffled_batches

    device = classifier.head.weight.device
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    batches = endless(shuffled_batches(images, labels, batch_size=_BATCH_SIZE, seed=seed))
    classifier.train()
    for _ in progress(range(steps), "classifier"):
        batch, target = next(batches)
        loss = F.cross_entropy(classifier(batch.to(device)), target.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    classifier.eval().requires_grad_(False)


def trained_classifier(path: Path, data: "LabelledImages", *, steps: int, seed: int, device: str) -> SmallClassifier:
    """The classifier saved at the path; if there is none yet, one is trained on the data, from the seed, and saved."""
    torch.manual_seed(seed)
    classifier = SmallClassifier(int(data.labels.max()) + 1, data.images.shape[1]).to(device)

    def make() -> dict[str, Any]:
        train_classifier(classifier, data.images, data.labels, steps=steps, seed=seed)
        return classifier.state_dict()

    classifier.load_state_dict(finished_or_made(path, make))
    return classifier.eval().requires_grad_(False)


@torch.no_grad()
def accuracy(classifier: SmallClassifier, images: Tensor, labels: Tensor) -> float:
    """Fraction of the images that get their label."""
    device = classifier.head.weight.device
    hits = [
        (classifier(chunk.to(device)).argmax(1).cpu() == target.cpu()).sum()
        for chunk, target in zip(images.split(_FEATURE_BATCH), labels.split(_FEATURE_BATCH), strict=True)
    ]
    return int(torch.stack(hits).sum()) / len(labels)


@torch.no_grad()
def classifier_features(classifier: SmallClassifier, images: Tensor) -> NDArray[np.float64]:
    """The classifier's last hidden layer, (N, feature_size), float64."""
    device = classifier.head.weight.device
    chunks = [classifier.features(chunk.to(device)).cpu() for chunk in images.split(_FEATURE_BATCH)]
    return torch.cat(chunks).double().numpy()


class FeatureStatistics(NamedTuple):
    """Mean (D,) and covariance (D, D) of a set of features, float64."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]


def feature_statistics(features: NDArray[np.floating]) -> FeatureStatistics:
    """Mean and covariance (with N - 1 below) of features (N, D)."""
    return streamed_statistics([features])


def streamed_statistics(batches: Iterable[NDArray[np.floating]]) -> FeatureStatistics:
    """As `feature_statistics` of all batches (N_i, D) together, of which only one is held at a time.

    Mean and scatter of what came before and of the new batch are joined by Chan's formula, which does not cancel.

    Reference: Chan, Golub and LeVeque, 1983
    """
    count, mean, scatter = 0, np.zeros(0), np.zeros((0, 0))
    for batch in batches:
        rows = np.asarray(batch, np.float64)
        if rows.ndim != 2:
            raise Mistake(f"Features are (N, D), one row an image.\nFound: {rows.shape}.")
        if not count:
            mean, scatter = np.zeros(rows.shape[1]), np.zeros((rows.shape[1], rows.shape[1]))
        own_mean = rows.mean(0)
        apart = own_mean - mean
        scatter += (rows - own_mean).T @ (rows - own_mean)
        scatter += np.outer(apart, apart) * (count * len(rows) / (count + len(rows)))
        mean = mean + apart * (len(rows) / (count + len(rows)))
        count += len(rows)
    if count < 2:
        raise Mistake(f"Statistics need features of at least two images.\nFound: {count}.")
    return FeatureStatistics(mean, scatter / (count - 1))


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Squared 2-Wasserstein distance of two Gaussians: ``|m - n|^2 + tr(A + B - 2 (A B)^(1/2))``.

    The trace of the root is the sum of the roots of the eigenvalues of ``A^(1/2) B A^(1/2)``, which is symmetric: no
    complex root and no failure on a singular covariance.

    Reference: Dowson and Landau, 1982; Heusel et al., 2017, https://arxiv.org/abs/1706.08500
    """
    return _distance(a, _root(a.covariance), b)


def frechet_spread(reference: FeatureStatistics, features: NDArray[np.floating], *, draws: int, seed: int = 0) -> float:
    """Standard deviation of the Fréchet distance over bootstrap draws: as many features again, with replacement.

    How far the distance would move with other samples. A draw's own distance is larger than that of all samples, since
    it holds fewer different ones: only their spread is of use.

    Shape:
        features: (N, D), of the samples
    """
    rng = np.random.default_rng(seed)
    root = _root(reference.covariance)
    drawn = (features[rng.integers(len(features), size=len(features))] for _ in range(draws))
    return float(np.std([_distance(reference, root, feature_statistics(again)) for again in drawn], ddof=1))


def _root(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    from scipy.linalg import eigh

    values, vectors = eigh(covariance)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def _distance(a: FeatureStatistics, root: NDArray[np.float64], b: FeatureStatistics) -> float:
    if a.mean.shape != b.mean.shape:
        raise Mistake(
            f"The Fréchet distance needs features of one width.\nFound: {len(a.mean)} and {len(b.mean)}.\n"
            "Compute both sets of statistics with one extractor."
        )
    from scipy.linalg import eigvalsh

    cross = np.sqrt(eigvalsh(root @ b.covariance @ root).clip(0)).sum()
    return float(((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)


class PrecisionRecall(NamedTuple):
    """Share of the samples that lie on the data's manifold, and of the data on the samples' manifold."""

    precision: float
    recall: float


def precision_recall(
    data: NDArray[np.floating], samples: NDArray[np.floating], *, neighbours: int = 3
) -> PrecisionRecall:
    """Improved precision and recall.

    A set's manifold is the union of a ball around each of its points, that reaches its k-th nearest other point.

    Args:
        data: Features (N, D) of the data.
        samples: Features (M, D) of the samples.
        neighbours: k.

    Reference: Kynkäänniemi et al., 2019, https://arxiv.org/abs/1904.06991
    """
    fewest = min(len(data), len(samples))
    if data.ndim != 2 or samples.ndim != 2 or data.shape[1] != samples.shape[1] or fewest <= neighbours:
        raise Mistake(
            f"Precision and recall need two sets of more than {neighbours} features of one width.\n"
            f"Found: {data.shape} and {samples.shape}.\nPass more images, through one extractor."
        )
    # Around the data's mean, or squares of large features would cancel in the distances.
    centre = data.mean(0, dtype=np.float64)
    data, samples = data - centre, samples - centre
    return PrecisionRecall(_share_inside(samples, data, neighbours), _share_inside(data, samples, neighbours))


def _share_inside(points: NDArray[np.float64], others: NDArray[np.float64], neighbours: int) -> float:
    """Share of the points within a ball of the others."""
    radii = np.concatenate(
        [np.partition(rows, neighbours, axis=1)[:, neighbours] for rows in _squared_distances(others, others)]
    )  # a point's nearest is itself: index k is its k-th other
    inside = [(rows <= radii).any(1) for rows in _squared_distances(points, others)]
    return float(np.concatenate(inside).mean())


def _squared_distances(a: NDArray[np.float64], b: NDArray[np.float64]) -> Iterator[NDArray[np.float64]]:
    """``|a_i - b_j|^2``, some rows i at a time."""
    norms = (b**2).sum(1)
    for start in range(0, len(a), _DISTANCE_ROWS):
        rows = a[start : start + _DISTANCE_ROWS]
        yield ((rows**2).sum(1, keepdims=True) + norms - 2 * rows @ b.T).clip(0)


def kernel_distance(data: NDArray[np.float64], samples: NDArray[np.float64]) -> float:
    """The kernel (Inception) distance: an unbiased squared MMD with the kernel ``(x · y / D + 1)^3``.

    Shape:
        data: (N, D); samples: (M, D)

    Reference: Binkowski et al., 2018, https://arxiv.org/abs/1801.01401
    """

    def total(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
        return sum(float(((rows @ b.T / a.shape[1] + 1) ** 3).sum()) for rows in np.array_split(a, len(a) // 500 + 1))

    def within(a: NDArray[np.float64]) -> float:
        own = (((a**2).sum(1) / a.shape[1] + 1) ** 3).sum()
        return float((total(a, a) - own) / (len(a) * (len(a) - 1)))

    return within(data) + within(samples) - 2 * total(data, samples) / (len(data) * len(samples))
