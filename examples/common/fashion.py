"""Fashion-MNIST from its four original files: 70,000 grey images of clothes in ten classes, no download.

Debian and Ubuntu have them as the package ``dataset-fashion-mnist``.
Source: Xiao et al., 2017, https://arxiv.org/abs/1708.07747
"""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from common.data import LabelledImages
from selftrans_reg.errors import SettingError, ShapeError

NUM_FASHION_CLASSES = 10
PACKAGED = Path("/usr/share/datasets/fashion-mnist")

_SIZE = 28
# The third byte of an idx file's magic number: unsigned bytes, the only type among the four files.
_UNSIGNED_BYTE = 0x08


def read_idx(path: Path) -> NDArray[np.uint8]:
    """An idx file of unsigned bytes, gzipped or not: a magic number, each axis as a big-endian uint32, the bytes.

    Raises:
        ShapeError: If the file is no such file, or is not as long as its header says.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ShapeError(f"{path} is no whole gzip file: {error}.\nCopy it again.") from error
    if len(raw) < 4 or raw[:3] != bytes([0, 0, _UNSIGNED_BYTE]):
        raise ShapeError(
            f"{path} is no idx file of unsigned bytes.\nFound: it begins with {raw[:4].hex(' ') or 'nothing'}, not "
            "with 00 00 08.\nPass one of the four original files."
        )
    axes, start = raw[3], 4 + 4 * raw[3]
    shape = tuple(np.frombuffer(raw[4:start], dtype=">u4").tolist())
    if len(shape) != axes or len(raw) - start != math.prod(shape):
        raise ShapeError(
            f"{path} is not as long as its header says.\n"
            f"Found: {max(0, len(raw) - start):,} bytes for the shape {shape}.\nCopy it again."
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def fashion(folder: Path = PACKAGED, size: int = 32) -> tuple[LabelledImages, LabelledImages]:
    """The images, padded with background from 28x28 to ``size``, in [-1, 1]: 60,000 to train on and 10,000 held out.

    Args:
        folder: Where the four files lie, gzipped or not.
        size: Side of the padded images, 28 or more, even.

    Raises:
        SettingError: If a file is missing, or the size is none.
        ShapeError: If a file is broken, or images and labels do not fit.
    """
    if size < _SIZE or size % 2:
        raise SettingError(f"The images are padded evenly from {_SIZE}: size must be even and no less; got {size}.")
    train, held_out = (_read_part(folder, part, size) for part in ("train", "t10k"))
    return train, held_out


def _read_part(folder: Path, part: str, size: int) -> LabelledImages:
    images = read_idx(_find(folder, f"{part}-images-idx3-ubyte"))
    labels = read_idx(_find(folder, f"{part}-labels-idx1-ubyte"))
    if images.shape[1:] != (_SIZE, _SIZE) or images.shape[:1] != labels.shape:
        raise ShapeError(
            f"The '{part}' files in {folder} are not images of {_SIZE}x{_SIZE} with one label each.\n"
            f"Found: images {images.shape}, labels {labels.shape}."
        )
    pixels = torch.from_numpy(images.copy()).float().unsqueeze(1) / 127.5 - 1
    margin = (size - _SIZE) // 2
    return LabelledImages(F.pad(pixels, [margin] * 4, value=-1.0), torch.from_numpy(labels.copy()).long())


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.exists():
            return path
    raise SettingError(
        f"There is no {name} or {name}.gz in {folder}.\n"
        "Name the folder of the four original files with --data, or install the package dataset-fashion-mnist."
    )
