"""What each image of a set begins with, as a function of the seed and its number alone: label, noise, generator."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from selftrans_reg.errors import SettingError


def classes_of(text: str, num_classes: int) -> list[int] | None:
    """The classes that images take in turn; None to draw them.

    Raises:
        SettingError: If a class is none of the model's.
    """
    if text == "random":
        return None
    if text == "balanced":
        return list(range(num_classes))
    names = text.split(",")
    if not all(name.strip().isdecimal() and int(name) < num_classes for name in names):
        raise SettingError(
            f"--labels is 'random', 'balanced', or classes with commas between, each below {num_classes}; got {text!r}."
        )
    return [int(name) for name in names]


def image_generator(seed: int, index: int) -> torch.Generator:
    """The random numbers of one image: its label, its first noise, and the noise of the SDE's steps, in this order.

    torch's CPU generator takes 32 bits of a seed. Seeds that count up keep all images of a run apart; among 50,000
    hashes of 32 bits, two would be equal one time in four.
    """
    first = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return torch.Generator().manual_seed((first + index) % 2**32)


class Drawn(NamedTuple):
    """What images begin with.

    Attributes:
        labels: (N,), int64.
        noise: (N, C, H, W), float32.
        generators: One for each image, in the state after both.
    """

    labels: Tensor
    noise: Tensor
    generators: list[torch.Generator]


def draw(seed: int, indices: Sequence[int], classes: list[int] | None, settings: dict[str, int]) -> Drawn:
    """Labels and noise of some images, each from its own generator."""
    generators = [image_generator(seed, index) for index in indices]
    # Drawn in any case, so that an image's noise is the same whatever its label comes from.
    labels = torch.stack([torch.randint(settings["num_classes"], (), generator=g) for g in generators])
    shape = (settings["in_channels"], settings["input_size"], settings["input_size"])
    noise = torch.stack([torch.randn(shape, generator=g) for g in generators])
    if classes is not None:
        labels = torch.tensor([classes[index % len(classes)] for index in indices])
    return Drawn(labels, noise, generators)
