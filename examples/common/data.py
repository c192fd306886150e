"""Small real images that need no download: scikit-learn's 1,797 handwritten digits."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from common.training import endless

NUM_DIGIT_CLASSES = 10

# A quarter is enough to judge the classifier and to see the floor of the distance; the rest is little to train on.
_HELD_OUT_FRACTION = 0.25


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
