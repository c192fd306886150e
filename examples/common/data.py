"""Small real images: scikit-learn's digits, and Fashion-MNIST from its files; and what small models of them take."""

import gzip
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from common.data_files import DataError, readable
from common.training import endless, progress

NUM_DIGIT_CLASSES = 10
NUM_FASHION_CLASSES = 10
PACKAGED = Path("/usr/share/datasets/fashion-mnist")

# A quarter is enough to judge the classifier and to see the floor of the distance; the rest is little to train on.
_HELD_OUT_FRACTION = 0.25
_FASHION_SIDE = 28


class LabelledImages(NamedTuple):
    """Images (N, 1, H, W), float32 in [-1, 1], and labels (N,), int64."""

    images: Tensor
    labels: Tensor


def digits(size: int = 32) -> tuple[LabelledImages, LabelledImages]:
    """The digits, enlarged from 8x8 to ``size`` by bicubic interpolation: 1,347 to train on and 450 held out.

    The split is the same at every call, with every class in proportion.
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
    """Fashion-MNIST: 60,000 grey images of clothes in ten classes to train on, and 10,000 held out.

    They are padded with background from 28x28 to ``size``. Debian and Ubuntu have the four original files, gzipped, as
    the package ``dataset-fashion-mnist``. Source: Xiao et al., 2017, https://arxiv.org/abs/1708.07747
    """
    assert size in range(_FASHION_SIDE, 1024, 2)
    margin, parts = (size - _FASHION_SIDE) // 2, []
    for part in ("train", "t10k"):
        images = _idx(folder / f"{part}-images-idx3-ubyte.gz", _FASHION_SIDE, _FASHION_SIDE)
        labels = _idx(folder / f"{part}-labels-idx1-ubyte.gz")
        if len(images) != len(labels):
            raise DataError(f"The '{part}' files in {folder} have {len(images)} images and {len(labels)} labels.")
        pixels = images.float().unsqueeze(1) / 127.5 - 1
        parts.append(LabelledImages(F.pad(pixels, [margin] * 4, value=-1.0), labels.long()))
    train, held_out = parts
    return train, held_out


def _idx(path: Path, *shape: int) -> Tensor:
    """The bytes of an idx file: behind four of its kind, and the length of each axis as a big-endian uint32."""
    advice = "Name the folder of the four original files with --data, or install the package dataset-fashion-mnist."
    with readable(path, "a file of Fashion-MNIST", advice):
        raw = bytearray(gzip.decompress(path.read_bytes()))
        return torch.frombuffer(raw, dtype=torch.uint8, offset=4 * (2 + len(shape))).reshape(-1, *shape)


def shuffled_batches(*tensors: Tensor, batch_size: int, seed: int) -> DataLoader[tuple[Tensor, ...]]:
    """Batches of tensors that share their first axis, reshuffled each epoch in an order that the seed decides.

    The last, smaller batch of an epoch is left out: every step then weighs as many samples.
    """
    generator = torch.Generator().manual_seed(seed)
    dataset = TensorDataset(*tensors)
    return DataLoader(dataset, batch_size=batch_size, shuffle=True, drop_last=True, generator=generator)


def fit(
    model: nn.Module, loss: Callable[..., Tensor], data: tuple[Tensor, ...], *, steps: int, batch_size: int, lr: float,
    seed: int, title: str,
) -> None:  # fmt: skip
    """Train on tensors that share their first axis; the model ends in eval mode, frozen.

    The learning rate is one cycle with ``lr`` as its peak; the seed decides the order of the data.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    batches = endless(shuffled_batches(*data, batch_size=batch_size, seed=seed))
    model.train()
    for _ in progress(range(steps), title):
        value = loss(*(part.to(device) for part in next(batches)))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
    model.eval().requires_grad_(False)


class LatentData(NamedTuple):
    """Images as their VAE posteriors: means and standard deviations (N, C, H, W), labels (N,), the VAE's scale."""

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
