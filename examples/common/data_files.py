"""Reading a data set's files, and the error that names the one that cannot be used."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.options import Mistake

_LOGVAR_RANGE = (-30.0, 20.0)  # as in latent diffusion's and diffusers' DiagonalGaussianDistribution
_SHOWN = 5


class DataError(Mistake):
    """Files that are unreadable, mislabelled, missing, or not what they are taken for: what all readers here raise."""


def first_ones(problems: Sequence[tuple[str, str]]) -> str:
    """Lines that name the first few of ``(name, what is wrong with it)``, and count the others."""
    lines = [f"  {name}: {' '.join(reason.split())}" for name, reason in problems[:_SHOWN]]
    return "\n".join([*lines, *([f"  and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else [])])


@contextmanager
def readable(path: Path, kind: str, advice: str = "Copy or make it again.") -> Iterator[None]:
    """Turn whatever reading a damaged file raises into a `DataError` that names the file and says what to do."""
    if path.exists() and not path.is_file():  # opening a pipe would wait for a writer
        raise DataError(f"{path} cannot be read as {kind}: it is no regular file. {advice}")
    try:
        yield
    except Mistake:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing. {advice}") from error
    except Exception as error:  # decoders and parsers raise whatever a damaged file makes them stumble over
        raise DataError(f"{path} cannot be read as {kind}: {type(error).__name__}: {error}. {advice}") from error


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    with readable(path, "JSON"):
        return json.loads(path.read_bytes())


def read_npy(path: Path) -> NDArray[np.float32]:
    """The array of floating-point numbers in a ``.npy`` file."""
    with readable(path, ".npy"):
        array = np.lib.format.open_memmap(path, mode="r")  # which maps no more than the file has
        if array.dtype.kind != "f":
            raise ValueError(f"it holds {array.dtype}; floating-point numbers are needed")
        return np.array(array, np.float32)


def read_moments(
    path: Path, *, second: Literal["std", "logvar"] = "std", shape: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and std of an image's posterior, twice (C, h, w), from a ``.npy`` (2C, h, w) or (1, 2C, h, w).

    Args:
        path: The file.
        second: What is behind the mean: the std, or the log-variance, from which the std is then computed.
        shape: (C, h, w), if that is known.
    """
    array = read_npy(path)
    moments = torch.from_numpy(array[0] if array.ndim == 4 and len(array) == 1 else array)
    if moments.ndim != 3 or len(moments) % 2 or moments.shape[1] != moments.shape[2] or not moments.numel():
        raise DataError(
            f"{path} holds an array {array.shape}; mean and std of a square latent are (2C, h, h) or (1, 2C, h, h)."
        )
    mean, std = moments.chunk(2)
    if shape is not None and mean.shape != shape:
        raise DataError(
            f"{path} holds a latent {tuple(mean.shape)}; the first is {tuple(shape)}. Encode all images alike."
        )
    if second == "logvar":
        if (std >= 0).all():
            raise DataError(f"{path} holds no log-variance behind the mean: none of it is negative. It may be the std.")
        std = (0.5 * std.clamp(*_LOGVAR_RANGE)).exp()
    check_moments(mean, std, str(path))
    return mean, std


def check_moments(mean: Tensor, std: Tensor, name: str) -> None:
    """Make sure that these can be a mean and a standard deviation.

    A log-variance, which is what diffusers' ``latent_dist.parameters`` holds, is negative wherever the posterior is
    narrower than 1, which a trained VAE's is nearly everywhere. A standard deviation never is.
    """
    if not (mean.isfinite().all() and std.isfinite().all()):
        raise DataError(f"{name} holds values that are not finite. Encode the image again, in float32 if it was not.")
    if (std < 0).any():
        raise DataError(
            f"{name} holds no standard deviation behind the mean: {(std < 0).float().mean().item():.0%} of it is "
            f"negative, from {std.min().item():.3g} to {std.max().item():.3g}.\n"
            "It looks like the log-variance of diffusers' latent_dist.parameters: store torch.cat([latent_dist.mean, "
            "latent_dist.std], dim=1).\nU-ViT's own script stores it: pass second='logvar' to CocoFeatures."
        )
