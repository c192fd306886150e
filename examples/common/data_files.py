"""Reading a data set's files within limits, and the error that names the one that cannot be used."""

import io
import json
import threading
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from common.options import Mistake

_MAX_JSON = 1 << 30  # ImageNet's list of labels has about 60 MB
_MAX_NPY = 64 << 20  # a posterior of 1024x1024 pixels with 16 channels has 2 MiB
_LOGVAR_RANGE = (-30.0, 20.0)  # as in latent diffusion's and diffusers' DiagonalGaussianDistribution
_SHOWN = 5
# What reading a damaged file raises; an entry of JSON that is of another type fails in many ways.
_UNREADABLE = (
    OSError, EOFError, ValueError, TypeError, LookupError, SyntaxError, RecursionError, MemoryError, SafetensorError,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip
_PARSING = threading.Lock()  # numpy reads a header by ast.literal_eval, which in Python 3.11 fails at times in threads


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
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing. {advice}") from error
    except _UNREADABLE as error:
        raise DataError(f"{path} cannot be read as {kind}: {type(error).__name__}: {error}. {advice}") from error


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    with readable(path, "JSON"):
        if path.stat().st_size > _MAX_JSON:
            raise DataError(f"{path} is longer than {_MAX_JSON} bytes, the most that is read of a JSON file.")
        return json.loads(path.read_bytes())


def read_npy(path: Path) -> NDArray[Any]:
    """The array of floating-point numbers in a ``.npy`` file."""
    with readable(path, ".npy"):
        size = path.stat().st_size
        if size > _MAX_NPY:
            raise DataError(f"{path} has {size} bytes; at most {_MAX_NPY} are read of a file for one image.")
        stream = io.BytesIO(path.read_bytes())
        with _PARSING:
            array = np.load(stream, allow_pickle=False)
        if not isinstance(array, np.ndarray) or stream.read(1):
            raise ValueError("it holds more than one array")
    if array.dtype.kind != "f":
        raise DataError(f"{path} holds {array.dtype}; floating-point numbers are needed.")
    return array


def read_moments(path: Path, *, second: Literal["std", "logvar"] = "std") -> tuple[Tensor, Tensor]:
    """Mean and std of an image's posterior from a ``.npy`` of mean, then std: (2C, h, w), or (1, 2C, h, w).

    Args:
        path: The file.
        second: What is behind the mean: the std, or the log-variance, from which the std is then computed.

    Returns:
        Twice (C, h, w), float32.
    """
    array = read_npy(path)
    found = array.shape
    if array.ndim == 4 and found[0] == 1:
        array = array[0]
    if array.ndim != 3 or array.shape[0] % 2 or array.shape[1] != array.shape[2] or not array.size:
        raise DataError(
            f"{path} holds an array {found}; mean and std of a square latent are (2C, h, h) or (1, 2C, h, h)."
        )
    mean, std = torch.from_numpy(array.astype(np.float32)).chunk(2)
    if second == "logvar":
        if (std >= 0).all():
            raise DataError(
                f"{path} holds no log-variance behind the mean: nothing in it is negative. It may be the std."
            )
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
            "It looks like the log-variance of diffusers' latent_dist.parameters.\n"
            "Store torch.cat([latent_dist.mean, latent_dist.std], dim=1). Features of U-ViT's own script hold it on "
            "purpose: open them with CocoFeatures(second='logvar')."
        )
