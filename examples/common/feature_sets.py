"""Sets of images on disk, their features through an extractor that has a name, and statistics kept in a file with it.

A set may be larger than the memory: nothing here holds more of it than a batch.
"""

import importlib
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.data_files import DataError, readable
from common.images import find_images, read_image, skipped_line, to_uint8
from common.metrics import FeatureStatistics, classifier_features, streamed_statistics, trained_classifier
from common.options import Mistake
from common.run_folder import write_whole
from common.training import progress
from common.vae import weights_digest

DIGITS = "digits"
INCEPTION = "inception"
_CLASSIFIER_STEPS = 300  # what the quickstart gives it
_PAIRED = 10_000
_ARRAY = "arr_0.npy"  # what numpy calls the first array of an .npz, where ADM's evaluator looks for the images


class ImageSet:
    """Images in order, as often as asked: of a folder, at any depth, of the ``arr_0`` of an ``.npz``, or the digits.

    Args:
        source: The file, the folder, or "digits"; a folder with a folder ``images`` in it, such as that of
            ``sample.py``, means that.
    """

    def __init__(self, source: str | Path) -> None:
        path = Path(source)
        self.path = (path / "images" if (path / "images").is_dir() else path).resolve()
        self.name, self._files, self._held = str(self.path), [], None
        if str(source) == DIGITS:
            from common.data import digits

            self.name, self._held = DIGITS, to_uint8(digits(32)[0].images)
            self._length = len(self._held)
        elif self.path.is_dir():
            self._files, skipped = find_images(self.path)
            self._length = len(self._files)
            if skipped:
                print(skipped_line(self.path, skipped))
        elif self.path.suffix == ".npz" and self.path.exists():
            with _array_stream(self.path) as (_, shape):
                self._length = shape[0]
        else:
            raise DataError(f"There are no images at {path}.\nPass a folder of images, or an .npz of ADM's layout.")
        if not self._length:
            raise DataError(f"{self.path} holds no image.\nPass a folder of images, or an .npz of ADM's layout.")

    def __len__(self) -> int:
        return self._length

    def batches(self, size: int) -> Iterator[Tensor]:
        """Batches (N, 3, H, W), uint8, of ``size`` images and a smaller last one."""
        for images in self._rows(size):
            yield torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()

    def _rows(self, size: int) -> Iterator[NDArray[np.uint8]]:
        starts = range(0, self._length, size)
        if self._held is not None:
            yield from (self._held[start : start + size] for start in starts)
        elif self._files:
            width, height = read_image(self.path / self._files[0]).size
            for start in starts:
                yield np.stack([self._image(name, width, height) for name in self._files[start : start + size]])
        else:
            with _array_stream(self.path) as (stream, shape):
                row = int(np.prod(shape[1:]))
                for start in starts:
                    count = min(size, self._length - start)
                    raw = stream.read(count * row)
                    if len(raw) != count * row:
                        raise DataError(f"{self.path} ends in the middle of its images. Copy or make it again.")
                    yield np.frombuffer(raw, np.uint8).reshape(count, *shape[1:]).copy()

    def _image(self, name: str, width: int, height: int) -> NDArray[np.uint8]:
        image = read_image(self.path / name)
        if image.size != (width, height):
            raise DataError(
                f"The images of a set have one size.\nFound: {width}x{height}, and {self.path / name} with "
                f"{image.width}x{image.height}.\nCrop and resize them alike, or name the folder of one size."
            )
        return np.asarray(image)


@contextmanager
def _array_stream(path: Path) -> Iterator[tuple[IO[bytes], tuple[int, ...]]]:
    """The ``arr_0`` of an ``.npz``, opened and read up to its data, and its shape."""
    with readable(path, ".npz"), zipfile.ZipFile(path) as archive:
        if _ARRAY not in archive.namelist():
            raise DataError(
                f"{path} holds no images under 'arr_0'.\nFound: {', '.join(archive.namelist()[:8])}.\n"
                "Statistics are passed with --statistics."
            )
        with archive.open(_ARRAY) as stream:
            version = np.lib.format.read_magic(stream)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
            if version != (1, 0) or fortran or dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
                raise DataError(
                    f"{path} holds no images: 'arr_0' has to be uint8 (N, H, W, 3).\nFound: {dtype} {shape}.\n"
                    "Pass images as sample.py or ADM's scripts write them."
                )
            yield stream, shape


class Extractor(NamedTuple):
    """What turns images into features.

    Attributes:
        name: Features of another name are never compared with its own.
        function: From (N, 3, H, W), uint8 on the CPU, to (N, D), an array or a tensor.
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

    def of(self, images: ImageSet, batch_size: int) -> Iterator[NDArray[np.float32]]:
        """Features of a whole set, batch by batch."""
        with progress(range(len(images)), f"features of {Path(images.name).name}") as bar:
            for batch in images.batches(batch_size):
                yield self(batch)
                bar.update(len(batch))


def extractor_named(name: str, *, classifier: Path, device: str) -> Extractor:
    """The extractor "digits" or "inception", or that of an import path ``module:callable``.

    Args:
        name: Of the extractor.
        classifier: Where the digits' classifier is; trained now, in seconds, if it is not there.
        device: Of a network that is made here; a callable of one's own chooses its device itself.
    """
    if name == DIGITS:
        return _digits(classifier, device)
    return _inception(device) if name == INCEPTION else Extractor(name, imported(name, "--features"))


def _digits(path: Path, device: str) -> Extractor:
    """A small classifier of the handwritten digits."""
    from common.data import digits

    path.parent.mkdir(parents=True, exist_ok=True)
    model = trained_classifier(path, digits(32)[0], steps=_CLASSIFIER_STEPS, seed=0, device=device)

    def features(images: Tensor) -> NDArray[np.float64]:
        if images.shape[1:] != (3, 32, 32):
            raise Mistake(
                f"The digits' classifier takes images of 32x32.\nFound: {tuple(images.shape)}.\n"
                "Name another extractor: inception, or module:callable."
            )
        return classifier_features(model, images.float().mean(1, keepdim=True) / 127.5 - 1)

    return Extractor(f"{DIGITS}-{weights_digest(model)[:8]}", features)  # another training's features are others


def _inception(device: str) -> Extractor:
    """The Inception of published FIDs, with TensorFlow's weights and resizing, as torch-fidelity has ported it."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise Mistake(
            f"--features inception needs torch-fidelity, which cannot be imported: {error}.\n"
            "Install it with pip install torch-fidelity; it downloads the weights (91 MB) when it first runs."
        ) from error
    model = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(device)
    return Extractor(f"{INCEPTION}-{weights_digest(model)[:8]}", lambda images: model(images.to(device))[0])


def imported(name: str, option: str) -> Callable[..., Any]:
    """What ``module:callable`` names; modules of the working directory are found too."""
    module, _, attribute = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise Mistake(f"{option} {name!r} is no module:callable that can be imported: {error}.") from error
    if not callable(found):
        raise Mistake(f"{option} {name!r} is a {type(found).__name__}, which cannot be called.")
    return found


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


def reference_of(images: ImageSet, extractor: Extractor, *, batch_size: int) -> Reference:
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
    """Write statistics, held features and where they come from as ``.npz``."""
    (mean, covariance), count, features = reference
    content = {"mean": mean, "covariance": covariance, "features": features, "count": count}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: np.savez(file, **content, extractor=extractor.name, source=source))


def load_reference(path: Path, extractor: Extractor, source: str | None) -> Reference:
    """Statistics of `save_reference`, or the ``mu`` and ``sigma`` of an ADM reference ``.npz``.

    The latter do not say whose features they are: only that they are as wide as the extractor's can be checked, later.

    Args:
        path: The file.
        extractor: With which the samples are compared.
        source: The name of the images that are the reference, if they are named.
    """
    advice = "Pass a file that --statistics wrote, or an ADM reference batch with 'mu' and 'sigma'."
    with readable(path, "statistics of features", advice), np.load(path, allow_pickle=False) as archive:
        ours = {"mean", "covariance", "features", "count", "extractor", "source"} <= set(archive.files)
        names = ("mean", "covariance") if ours else ("mu", "sigma")
        mean, covariance = (archive[name].astype(np.float64) for name in names)
        extra = {name: archive[name] for name in ("features", "count", "extractor", "source") if ours}
        if mean.ndim != 1 or covariance.shape != mean.shape * 2:
            raise ValueError(f"no mean (D,) and covariance (D, D), but {mean.shape} and {covariance.shape}")
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise ValueError("they are not finite")
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
