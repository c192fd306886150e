"""Small real images that need no download: scikit-learn's 1,797 handwritten digits."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from common.options import Mistake
from common.training import endless

NUM_DIGIT_CLASSES = 10
NUM_FASHION_CLASSES = 10
PACKAGED = Path("/usr/share/datasets/fashion-mnist")

# A quarter is enough to judge the classifier and to see the floor of the distance; the rest is little to train on.
_HELD_OUT_FRACTION = 0.25
_SIZE = 28


class LabelledImages(NamedTuple):
    """Images (N, 1, H, W), float32 in [-1, 1], and labels (N,), int64."""

    images: Tensor
    labels: Tensor


def digits(size: int = 32) -> tuple[LabelledImages, LabelledImages]:
    """The digits, enlarged from 8x8 to ``size`` by bicubic interpolation: 1,347 to train on and 450 held out.

    The split is the same at every call, with every class in proportion.

    Returns:
        The training images and the held-out ones.
    """
    from sklearn.datasets import load_digits  # which takes a second
    from sklearn.model_selection import train_test_split

    raw = load_digits()
    images = torch.from_numpy(raw.images).float().unsqueeze(1) / 16  # grey levels are 0 .. 16
    images = F.interpolate(images, size=(size, size), mode="bicubic").clamp(0, 1) * 2 - 1
    labels = torch.from_numpy(raw.target).long()
    train, held_out = train_test_split(
        torch.arange(len(labels)).numpy(), test_size=_HELD_OUT_FRACTION, stratify=raw.target, random_state=0
    )
    return LabelledImages(images[train], labels[train]), LabelledImages(images[held_out], labels[held_out])


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


def shuffled_batches(*tensors: Tensor, batch_size: int, seed: int) -> DataLoader[tuple[Tensor, ...]]:
    """Batches of tensors that share their first axis, reshuffled each epoch in an order that the seed decides.

    The last, smaller batch of an epoch is left out: every step then weighs as many samples.
    """
    generator = torch.Generator().manual_seed(seed)
    dataset = TensorDataset(*tensors)
    return DataLoader(dataset, batch_size=batch_size, shuffle=True, drop_last=True, generator=generator)


class LatentData(NamedTuple):
    """Images as their VAE posteriors, with labels.

    Attributes:
        mean: (N, C, H, W), the posteriors' means.
        std: (N, C, H, W), their standard deviations (not log-variances).
        labels: (N,).
        scale: The VAE's scale factor.
    """

    mean: Tensor
    std: Tensor
    labels: Tensor
    scale: float

    def batches(self, *, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless batches of latents ``scale (mean + std noise)`` and labels.

        The order is the seed's; the noise is drawn from the global generator, anew each time.
        """
        batches = shuffled_batches(self.mean, self.std, self.labels, batch_size=batch_size, seed=seed)
        for mean, std, labels in endless(batches):
            yield self.scale * (mean + std * torch.randn_like(mean)), labels
