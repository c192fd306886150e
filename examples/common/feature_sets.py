"""Features of sets of images, through an extractor that has a name; and their statistics, kept in a file with it."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.data import digits
from common.data_files import DataError
from common.image_sets import Images
from common.metrics import (
    FeatureStatistics,
    SmallClassifier,
    classifier_features,
    streamed_statistics,
    trained_classifier,
)
from common.training import progress
from selftrans_reg.errors import SettingError, ShapeError
from selftrans_reg.modules import fingerprint

DIGITS = "digits"
_CLASSIFIER_STEPS = 300  # what the quickstart gives it
_PAIRED = 10_000


class Extractor(NamedTuple):
    """What turns images into features.

    Attributes:
        name: Features of another name are never compared with its own.
        function: From (N, 3, H, W), uint8 on the CPU, to (N, D), an array or a tensor.
    """

    name: str
    function: Callable[[Tensor], object]

    def __call__(self, images: Tensor) -> NDArray[np.float32]:
        """Features (N, D) of images (N, 3, H, W).

        Raises:
            ShapeError: If the function returned anything else, or numbers that are not finite.
        """
        with torch.no_grad():
            found = self.function(images)
        features = np.asarray(found.detach().cpu().float() if isinstance(found, Tensor) else found)
        if features.dtype.kind != "f" or features.ndim != 2 or len(features) != len(images):
            raise ShapeError(
                f"The extractor {self.name!r} has to make floating-point features (N, D) of N images.\n"
                f"Found: {features.dtype} {features.shape} for {len(images)} images."
            )
        if not np.isfinite(features).all():
            raise ShapeError(f"The extractor {self.name!r} made features that are not finite: look at its input range.")
        return features.astype(np.float32)

    def of(self, images: Images, batch_size: int) -> Iterator[NDArray[np.float32]]:
        """Features of a whole set, batch by batch."""
        with progress(range(len(images)), f"features of {Path(images.name).name}") as bar:
            for batch in images.batches(batch_size):
                yield self(batch)
                bar.update(len(batch))


def extractor_named(name: str, *, classifier: Path, device: str) -> Extractor:
    """The extractor of an import path ``module:callable``, or "digits": a small classifier of the handwritten digits.

    Modules are looked for in the working directory too.

    Args:
        name: Of the extractor.
        classifier: Where the digits' classifier is; trained now, in seconds, if it is not there.
        device: Of that classifier; a callable of one's own chooses its device itself.

    Raises:
        SettingError: If there is no such callable.
    """
    if name == DIGITS:
        classifier.parent.mkdir(parents=True, exist_ok=True)
        model = trained_classifier(classifier, digits(32)[0], steps=_CLASSIFIER_STEPS, seed=0, device=device)
        identity = bytes(fingerprint(model, {})[:4].tolist()).hex()  # another training's features are other features
        return Extractor(f"{DIGITS}-{identity}", lambda images: _digit_features(model, images))
    module, _, attribute = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise SettingError(
            f"There are no features named {name!r}: {error}.\n"
            f"Pass {DIGITS!r}, or module:callable, where the callable turns images (N, 3, H, W), uint8, into (N, D)."
        ) from error
    if not callable(function):
        raise SettingError(f"{name!r} is a {type(function).__name__}, which cannot be called with images.")
    return Extractor(name, function)


def _digit_features(model: SmallClassifier, images: Tensor) -> NDArray[np.float64]:
    if images.shape[1:] != (3, 32, 32):
        raise ShapeError(
            f"The digits' classifier takes images of 32x32.\nFound: {tuple(images.shape)}.\n"
            "Name another extractor: module:callable."
        )
    return classifier_features(model, images.float().mean(1, keepdim=True) / 127.5 - 1)


class Reference(NamedTuple):
    """The data's features, as far as distances need them.

    Attributes:
        statistics: Mean and covariance over all images.
        count: How many images; None if the file does not say.
        features: (M, D), those that `evenly` picks, for precision and recall; None if the file has none.
    """

    statistics: FeatureStatistics
    count: int | None
    features: NDArray[np.float32] | None


def evenly(count: int) -> NDArray[np.int64]:
    """Which of so many features precision and recall look at: all, or 10,000 evenly spread over them.

    They compare every pair; ADM's evaluator takes as many of the data.
    """
    return np.linspace(0, count - 1, min(_PAIRED, count)).round().astype(np.int64)


def reference_of(images: Images, extractor: Extractor, *, batch_size: int) -> Reference:
    """Features of the data, of which no more is held than statistics and `evenly` need."""
    wanted = evenly(len(images))
    held: list[NDArray[np.float32]] = []

    def batches() -> Iterator[NDArray[np.float32]]:
        start = 0
        for features in extractor.of(images, batch_size):
            here = wanted[(wanted >= start) & (wanted < start + len(features))]
            held.append(features[here - start])
            start += len(features)
            yield features

    return Reference(streamed_statistics(batches()), len(images), np.concatenate(held))


def save_reference(reference: Reference, extractor: Extractor, source: str, path: Path) -> None:
    """Write statistics, held features and where they come from as ``.npz``, under another name and then by a rename."""
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("wb") as stream:
        np.savez(
            stream,
            mean=reference.statistics.mean,
            covariance=reference.statistics.covariance,
            features=reference.features,
            count=reference.count,
            extractor=extractor.name,
            source=source,
        )
    partial.replace(path)


def load_reference(path: Path, extractor: Extractor, source: str | None) -> Reference:
    """Statistics of `save_reference`, or the ``mu`` and ``sigma`` of an ADM reference ``.npz``.

    The latter do not say whose features they are: only that they are as wide as the extractor's can be checked, later.

    Args:
        path: The file.
        extractor: With which the samples are compared.
        source: The name of the images that are the reference, if they are named.

    Raises:
        DataError: If the file is broken, or its statistics are of other features or of other images.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            ours = {"mean", "covariance", "features", "count", "extractor", "source"} <= set(archive.files)
            names = ("mean", "covariance") if ours else ("mu", "sigma")
            mean, covariance = (archive[name].astype(np.float64) for name in names)
            extra = {name: archive[name] for name in ("features", "count", "extractor", "source") if ours}
    except (OSError, EOFError, KeyError, ValueError) as error:
        raise DataError(
            f"{path} holds no statistics of features: {error}.\n"
            "Pass a file that --statistics wrote, or an ADM reference batch with 'mu' and 'sigma'."
        ) from error
    if mean.ndim != 1 or covariance.shape != mean.shape * 2:
        raise DataError(f"{path} holds no mean (D,) and covariance (D, D): {mean.shape} and {covariance.shape}.")
    statistics = FeatureStatistics(mean, covariance)
    if not ours:
        return Reference(statistics, None, None)
    for what, asked in [("extractor", extractor.name), ("source", source)]:
        if asked is not None and str(extra[what]) != asked:
            raise DataError(
                f"{path} holds statistics of other {'features' if what == 'extractor' else 'images'}.\n"
                f"Found: {what} {str(extra[what])!r} there, {asked!r} asked for.\n"
                "Name another file with --statistics, or remove this one."
            )
    return Reference(statistics, int(extra["count"]), extra["features"])
