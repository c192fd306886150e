"""How far samples are from data, in features of an extractor that has a name, and statistics kept in a file with it.

A small classifier serves as the extractor where the images are small.
"""

import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from common.data import LabelledImages, digits, fit
from common.data_files import DataError, readable
from common.images import DIGITS, ImageSet
from common.options import Mistake
from common.run_folder import finished_or_made, write_whole
from common.training import progress
from common.vae import weights_digest

_BATCH_SIZE = 64
_FEATURE_BATCH = 512
INCEPTION = "inception"
_CLASSIFIER = Path("runs/digits_classifier.pt")
_CLASSIFIER_STEPS = 300  # what the quickstart gives it
_PAIRED = 10_000


class SmallClassifier(nn.Module):
    """A classifier of images (N, C, H, W) in [-1, 1], small ones; its features feed the Fréchet distance."""

    def __init__(self, num_classes: int, image_channels: int = 1, feature_size: int = 64) -> None:
        super().__init__()
        widths, layers = (image_channels, 16, 32, 64), []
        for i, o in pairwise(widths):
            layers += [nn.Conv2d(i, o, 3, stride=2, padding=1), nn.SiLU()]
        layers += [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * widths[-1], feature_size), nn.SiLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(feature_size, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, num_classes)."""
        return self.head(self.features(images))


def trained_classifier(path: Path, data: LabelledImages, *, steps: int, seed: int, device: str) -> SmallClassifier:
    """The classifier saved at the path; if there is none yet, one is trained on the data, from the seed, and saved."""
    torch.manual_seed(seed)
    classifier = SmallClassifier(int(data.labels.max()) + 1, data.images.shape[1]).to(device)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(classifier(images), labels)

    def make() -> dict[str, Any]:
        fit(classifier, loss, data, steps=steps, batch_size=_BATCH_SIZE, lr=2e-3, seed=seed, title="classifier")
        return classifier.state_dict()

    classifier.load_state_dict(finished_or_made(path, make))
    return classifier.eval().requires_grad_(False)


@torch.no_grad()
def accuracy(classifier: SmallClassifier, images: Tensor, labels: Tensor) -> float:
    """Fraction of the images that get their label."""
    device = classifier.head.weight.device
    found = torch.cat([classifier(chunk.to(device)).argmax(1).cpu() for chunk in images.split(_FEATURE_BATCH)])
    return (found == labels.cpu()).double().mean().item()


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
    if features.ndim != 2 or len(features) < 2:
        raise Mistake(f"Statistics need features (N, D) of at least two images.\nFound: {features.shape}.")
    covariance = np.cov(features, rowvar=False, dtype=np.float64)
    return FeatureStatistics(features.mean(0, dtype=np.float64), np.atleast_2d(covariance))


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Squared 2-Wasserstein distance of two Gaussians: ``|m - n|^2 + tr(A + B - 2 (A B)^(1/2))``.

    Reference: Dowson and Landau, 1982; Heusel et al., 2017, https://arxiv.org/abs/1706.08500
    """
    return _distance(a, _root(a.covariance), b)


def frechet_spread(reference: FeatureStatistics, features: NDArray[np.floating], *, draws: int, seed: int = 0) -> float:
    """Standard deviation of the Fréchet distance of features (N, D) over bootstrap draws: N again, with replacement.

    How far the distance would move with other samples. A draw's own distance is larger than that of all samples, since
    it holds fewer different ones: only their spread is of use.
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
    from scipy.linalg import eigvalsh

    # The root's trace, from a symmetric product: no complex root, and no failure on a singular covariance.
    cross = np.sqrt(eigvalsh(root @ b.covariance @ root).clip(0)).sum()
    return float(((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)


class PrecisionRecall(NamedTuple):
    """Share of the samples that lie on the data's manifold, and of the data on the samples' manifold."""

    precision: float
    recall: float


def precision_recall(
    data: NDArray[np.floating], samples: NDArray[np.floating], *, neighbours: int = 3
) -> PrecisionRecall:
    """Improved precision and recall, of features (N, D) of the data and (M, D) of the samples.

    A set's manifold is the union of a ball around each of its points, that reaches its k-th nearest other point, k
    being ``neighbours``.

    Reference: Kynkäänniemi et al., 2019, https://arxiv.org/abs/1904.06991
    """
    # Around the data's mean, or squares of large features would cancel in the distances.
    centre = data.mean(0, dtype=np.float64)
    data, samples = data - centre, samples - centre
    return PrecisionRecall(_share_inside(samples, data, neighbours), _share_inside(data, samples, neighbours))


def _share_inside(points: NDArray[np.float64], others: NDArray[np.float64], neighbours: int) -> float:
    """Share of the points within a ball of the others."""
    from sklearn.metrics import pairwise_distances_chunked
    from sklearn.neighbors import NearestNeighbors

    nearest = NearestNeighbors(n_neighbors=neighbours, algorithm="brute").fit(others)
    radii = nearest.kneighbors()[0][:, -1]  # of the other points: itself is none of a point's neighbours
    inside = pairwise_distances_chunked(points, others, reduce_func=lambda rows, _: (rows <= radii).any(1))
    return float(np.concatenate([*inside]).mean())


def kernel_distance(data: NDArray[np.float64], samples: NDArray[np.float64]) -> float:
    """The kernel (Inception) distance of (N, D) and (M, D): an unbiased squared MMD with ``(x · y / D + 1)^3``.

    Reference: Binkowski et al., 2018, https://arxiv.org/abs/1801.01401
    """

    def total(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
        return sum(float(((rows @ b.T / a.shape[1] + 1) ** 3).sum()) for rows in np.array_split(a, len(a) // 500 + 1))

    def within(a: NDArray[np.float64]) -> float:
        own = (((a**2).sum(1) / a.shape[1] + 1) ** 3).sum()
        return float((total(a, a) - own) / (len(a) * (len(a) - 1)))

    return within(data) + within(samples) - 2 * total(data, samples) / (len(data) * len(samples))


class Extractor(NamedTuple):
    """What turns images (N, 3, H, W), uint8 on the CPU, into features (N, D), an array or a tensor.

    Features of another name are never compared with its own.
    """

    name: str
    function: Callable[[Tensor], object]

    def __call__(self, images: Tensor) -> NDArray[np.float32]:
        """Features (N, D) of images (N, 3, H, W)."""
        with torch.no_grad():
            found = self.function(images)
        features = np.asarray(found.detach().cpu().float() if isinstance(found, Tensor) else found)
        if features.dtype.kind != "f" or features.ndim != 2 or len(features) != len(images):
            raise Mistake(
                f"The extractor {self.name!r} has to make floating-point features (N, D) of N images.\n"
                f"Found: {features.dtype} {features.shape} for {len(images)} images."
            )
        if not np.isfinite(features).all():
            raise Mistake(f"The extractor {self.name!r} made features that are not finite: look at its input range.")
        return features.astype(np.float32)

    def of(self, images: ImageSet, batch_size: int) -> NDArray[np.float32]:
        """Features (N, D) of a whole set."""
        bar = progress(images.batches(batch_size), f"features of {Path(images.name).name}")
        return np.concatenate([self(batch) for batch in bar])


def extractor_named(name: str, device: str) -> Extractor:
    """The extractor "digits" or "inception", or that of an import path ``module:callable``.

    The digits' classifier is trained now, in seconds, if it is not in ``runs/``. The device is that of a network that
    is made here; a callable of one's own chooses its device itself.
    """
    if name == DIGITS:
        _CLASSIFIER.parent.mkdir(parents=True, exist_ok=True)
        model = trained_classifier(_CLASSIFIER, digits(32)[0], steps=_CLASSIFIER_STEPS, seed=0, device=device)
        function = partial(_digits_features, model)
    elif name == INCEPTION:  # of published FIDs, with TensorFlow's weights and resizing
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise Mistake(
                f"--features inception needs torch-fidelity, which cannot be imported: {error}.\n"
                "Install it with pip install torch-fidelity; it downloads the weights (91 MB) when it first runs."
            ) from error
        model = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(device)
        function = lambda images: model(images.to(device))[0]  # noqa: E731
    else:
        sys.path.append(str(Path.cwd()))  # a module of the working directory is found, too
        try:
            return Extractor(name, resolve_name(name))
        except (ImportError, AttributeError, ValueError) as error:
            raise Mistake(f"--features {name!r} is no module:callable that can be imported: {error}.") from error
    return Extractor(f"{name}-{weights_digest(model)[:8]}", function)  # another training's features are others


def _digits_features(model: SmallClassifier, images: Tensor) -> NDArray[np.float64]:
    if images.shape[1:] != (3, 32, 32):
        raise Mistake(
            f"The digits' classifier takes images of 32x32.\nFound: {tuple(images.shape)}.\n"
            "Name another extractor: inception, or module:callable."
        )
    return classifier_features(model, images.float().mean(1, keepdim=True) / 127.5 - 1)


class Reference(NamedTuple):
    """The data's statistics, over so many images, and the features (M, D) that `evenly` picks of them."""

    statistics: FeatureStatistics
    count: int
    features: NDArray[np.float32]


def evenly(count: int) -> NDArray[np.int64]:
    """Which of so many features precision and recall look at: all, or 10,000 evenly spread over them.

    They compare every pair; ADM's evaluator takes as many of the data.
    """
    return np.linspace(0, count - 1, min(_PAIRED, count)).round().astype(np.int64)


def reference_of(images: ImageSet, path: Path | None, extractor: Extractor, *, batch_size: int) -> Reference:
    """The data's features: from the ``.npz`` at the path if that is there, else computed and, with a path, written."""
    origin = {"extractor": extractor.name, "source": images.name}
    if path is None or not path.exists():
        features = extractor.of(images, batch_size)
        found = Reference(feature_statistics(features), len(features), features[evenly(len(features))])
        if path is not None:
            content = found.statistics._asdict() | {"count": found.count, "features": found.features, **origin}
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, lambda file: np.savez(file, **content))
        return found
    advice = "Pass a file that --statistics wrote, or remove this one."
    with readable(path, "statistics of features", advice), np.load(path, allow_pickle=False) as archive:
        there = {name: str(archive[name]) for name in origin}
        statistics = FeatureStatistics(archive["mean"], archive["covariance"])
        found = Reference(statistics, int(archive["count"]), archive["features"])
    if there != origin:
        raise DataError(
            f"{path} holds statistics of other features or images.\nFound: {there}; asked for: {origin}.\n"
            "Name another file with --statistics, or remove this one."
        )
    return found
