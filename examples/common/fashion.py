"""Fashion-MNIST from its four original files: 70,000 grey images of clothes in ten classes, no download.

Debian and Ubuntu have them as the package ``dataset-fashion-mnist``.
Source: Xiao et al., 2017, https://arxiv.org/abs/1708.07747
"""

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from common.data import LabelledImages
from common.options import Mistake

NUM_FASHION_CLASSES = 10
PACKAGED = Path("/usr/share/datasets/fashion-mnist")

_SIZE = 28


def fashion(folder: Path = PACKAGED, size: int = 32) -> tuple[LabelledImages, LabelledImages]:
    """The images, padded with background from 28x28 to ``size``, in [-1, 1]: 60,000 to train on and 10,000 held out.

    Args:
        folder: Where the four files lie, gzipped or not.
        size: Side of the padded images, 28 or more, even.

    Raises:
        Mistake: If a file is missing or broken, or the size is none.
    """
    if size < _SIZE or size % 2:
        raise Mistake(f"The images are padded evenly from {_SIZE}: size must be even and no less; got {size}.")
    margin, parts = (size - _SIZE) // 2, []
    for part in ("train", "t10k"):
        labels = _read(folder, f"{part}-labels-idx1-ubyte", ())
        images = _read(folder, f"{part}-images-idx3-ubyte", (_SIZE, _SIZE))
        if len(images) != len(labels):
            raise Mistake(f"The '{part}' files in {folder} have {len(images)} images and {len(labels)} labels.")
        pixels = torch.from_numpy(images.copy()).float().unsqueeze(1) / 127.5 - 1
        padded = F.pad(pixels, [margin] * 4, value=-1.0)
        parts.append(LabelledImages(padded, torch.from_numpy(labels.copy()).long()))
    train, held_out = parts
    return train, held_out


def _read(folder: Path, name: str, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """An idx file of unsigned bytes: 0, 0, 8 and the number of axes, each axis as a big-endian uint32, the bytes."""
    path = next((path for path in (folder / name, folder / f"{name}.gz") if path.exists()), None)
    if path is None:
        raise Mistake(
            f"There is no {name} or {name}.gz in {folder}.\n"
            "Name the folder of the four original files with --data, or install the package dataset-fashion-mnist."
        )
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise Mistake(f"{path} cannot be read: {error}.\nCopy it again.") from error
    start = 4 * (2 + len(shape))
    count, *found = np.frombuffer(raw[4:start].ljust(start - 4, b"\0"), ">u4").tolist()
    whole = len(raw) == start + count * int(np.prod(shape))
    if raw[:4] != bytes([0, 0, 8, 1 + len(shape)]) or tuple(found) != shape or not whole:
        raise Mistake(f"{path} is not the original file {name}, or not whole: copy it again.")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(count, *shape)
