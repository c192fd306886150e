"""Sets of images on disk, uint8: PNGs written one by one, and the ADM evaluator's ``.npz``; both are read in batches.

A set may be larger than the memory: nothing here holds more of it than a batch.
"""

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from common.data_files import DataError
from common.training import progress
from selftrans_reg.errors import ShapeError

_ARRAY = "arr_0.npy"  # what numpy calls the first array of an .npz, where ADM's evaluator looks for the images
_LABELS = "arr_1.npy"  # and where ADM's own sampling scripts put the labels


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """Images in [-1, 1] as bytes, by DiT's and SiT's rule: ``127.5 x + 128``, cut to 0 .. 255. Grey ones become RGB.

    Shape:
        images: (N, C, H, W), C = 1 or 3; returns: (N, H, W, 3)

    Raises:
        ShapeError: If there are neither one nor three channels.
    """
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ShapeError(
            f"Images have one channel or three: (N, 1 or 3, H, W).\nFound: {tuple(images.shape)}.\n"
            "Decode with a VAE of images."
        )
    rgb = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
    return (127.5 * rgb.float() + 128).clamp(0, 255).byte().cpu().numpy()


def write_png(image: NDArray[np.uint8], path: Path) -> None:
    """Write an image (H, W, 3) under another name, then rename: the file is always whole."""
    partial = path.with_name(path.name + ".partial")
    Image.fromarray(image).save(partial, format="PNG")
    partial.replace(path)


def write_npz(pngs: Sequence[Path], labels: NDArray[np.int64], path: Path) -> None:
    """Put PNGs and their labels into one ``.npz`` as ADM's evaluator reads it: ``arr_0``, uint8 (N, H, W, 3).

    Raises:
        DataError: If a file is no image.
        ShapeError: If the images have different sizes.
    """
    first = _read_image(pngs[0])
    partial = path.with_name(path.name + ".partial")
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(pngs), *first.shape)}
    with zipfile.ZipFile(partial, "w") as archive:
        with archive.open(_ARRAY, "w", force_zip64=True) as stream:
            np.lib.format.write_array_header_1_0(stream, header)
            for png in progress(pngs, path.name):
                stream.write(_of_one_size(_read_image(png), first.shape, png).tobytes())
        with archive.open(_LABELS, "w") as stream:
            np.lib.format.write_array(stream, labels)
    partial.replace(path)


class Images(Protocol):
    """Images in order, as often as asked, under a name."""

    name: str

    def __len__(self) -> int:
        """How many."""

    def batches(self, size: int) -> Iterator[Tensor]:
        """Batches (N, 3, H, W), uint8, of ``size`` images and a smaller last one."""


class HeldImages(NamedTuple):
    """Images in memory: (N, 3, H, W), uint8."""

    name: str
    images: Tensor

    def __len__(self) -> int:
        """How many."""
        return len(self.images)

    def batches(self, size: int) -> Iterator[Tensor]:
        """Batches of ``size`` images and a smaller last one."""
        yield from self.images.split(size)


class ImageSet:
    """The images of a folder of PNGs, at any depth, or of the ``arr_0`` of an ``.npz``; in order, as often as asked.

    Args:
        path: The file, or the folder; one with a folder ``images`` in it, such as that of ``sample.py``, means that.

    Raises:
        DataError: If there is nothing of the kind, or the file is broken.
        ShapeError: If ``arr_0`` is no set of images.
    """

    def __init__(self, path: Path) -> None:
        self.path = (path / "images" if (path / "images").is_dir() else path).resolve()
        self.name = str(self.path)
        self._pngs: list[Path] = []
        if self.path.is_dir():
            self._pngs = sorted(self.path.rglob("*.png"))
            self._length = len(self._pngs)
        elif self.path.suffix == ".npz" and self.path.is_file():
            with _array_stream(self.path) as (_, shape):
                self._length = shape[0]
        else:
            raise DataError(f"There are no images at {path}.\nPass a folder of PNGs, or an .npz of ADM's layout.")
        if not self._length:
            raise DataError(f"{self.path} holds no image.\nPass a folder of PNGs, or an .npz of ADM's layout.")

    def __len__(self) -> int:
        return self._length

    def batches(self, size: int) -> Iterator[Tensor]:
        """Batches (N, 3, H, W), uint8, of ``size`` images and a smaller last one.

        Raises:
            DataError: If a file is broken or no image.
            ShapeError: If the images have different sizes.
        """
        rows = self._npz_rows(size) if self.path.suffix == ".npz" else self._png_rows(size)
        for images in rows:
            yield torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()

    def _png_rows(self, size: int) -> Iterator[NDArray[np.uint8]]:
        shape = _read_image(self._pngs[0]).shape
        for start in range(0, self._length, size):
            chunk = self._pngs[start : start + size]
            yield np.stack([_of_one_size(_read_image(png), shape, png) for png in chunk])

    def _npz_rows(self, size: int) -> Iterator[NDArray[np.uint8]]:
        with _array_stream(self.path) as (stream, shape):
            row = int(np.prod(shape[1:]))
            for start in range(0, self._length, size):
                count = min(size, self._length - start)
                raw = stream.read(count * row)
                if len(raw) != count * row:
                    raise DataError(f"{self.path} ends in the middle of its images. Copy or make it again.")
                yield np.frombuffer(raw, np.uint8).reshape(count, *shape[1:]).copy()


@contextmanager
def _array_stream(path: Path) -> Iterator[tuple[IO[bytes], tuple[int, ...]]]:
    """The ``arr_0`` of an ``.npz``, opened and read up to its data, and its shape."""
    with _readable(path), zipfile.ZipFile(path) as archive:
        if _ARRAY not in archive.namelist():
            raise DataError(
                f"{path} holds no images under 'arr_0'.\nFound: {', '.join(archive.namelist()[:8])}.\n"
                "Statistics are passed with --statistics."
            )
        with archive.open(_ARRAY) as stream:
            version = np.lib.format.read_magic(stream)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
            if version != (1, 0) or fortran or dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
                raise ShapeError(
                    f"{path} holds no images: 'arr_0' has to be uint8 (N, H, W, 3).\nFound: {dtype} {shape}.\n"
                    "Pass images as sample.py or ADM's scripts write them."
                )
            yield stream, shape


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn whatever zipfile and numpy raise on a broken file into a DataError that names it."""
    try:
        yield
    except (DataError, ShapeError):
        raise
    except (OSError, EOFError, ValueError, SyntaxError, RecursionError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} cannot be read as .npz: {error}. Copy or make it again.") from error


def _read_image(path: Path) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as image:  # Pillow's limit against decompression bombs stays on
            return np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as an image: {error}. Make it again.") from error


def _of_one_size(image: NDArray[np.uint8], shape: tuple[int, ...], path: Path) -> NDArray[np.uint8]:
    if image.shape != shape:
        raise ShapeError(
            f"The images of a set have one size.\nFound: {shape[1]}x{shape[0]}, and {path} with "
            f"{image.shape[1]}x{image.shape[0]}.\nCrop and resize them alike, or name the folder of one size."
        )
    return image
