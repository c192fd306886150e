"""Small files in the format of MNIST and its successors."""

import gzip
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def write_small_fashion(folder: Path, train: int, held_out: int) -> tuple[list[NDArray[np.uint8]], ...]:
    """Four files of random images and labels; returns the images and the labels of both parts."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (count, 28, 28), dtype=np.uint8) for count in (train, held_out)]
    labels = [(np.arange(count) % 10).astype(np.uint8) for count in (train, held_out)]
    for kind, arrays in {"images-idx3": images, "labels-idx1": labels}.items():
        for part, array in zip(("train", "t10k"), arrays, strict=True):
            head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))
    return images, labels
