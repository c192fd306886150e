"""Small files in the format of MNIST and its successors."""

import gzip
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def write_idx(path: Path, values: NDArray[np.uint8]) -> None:
    """Write unsigned bytes as an idx file, gzipped if its name says so."""
    raw = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def write_small_fashion(
    folder: Path, train: int, held_out: int
) -> tuple[list[NDArray[np.uint8]], list[NDArray[np.uint8]]]:
    """Four files of random images and labels; returns the images and the labels of both parts."""
    rng = np.random.default_rng(0)
    images, labels = [], []
    for part, count in (("train", train), ("t10k", held_out)):
        images.append(rng.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        labels.append((np.arange(count) % 10).astype(np.uint8))
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", images[-1])
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", labels[-1])
    return images, labels
