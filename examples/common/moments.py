"""An image's posterior as its moments, mean and standard deviation, which a log-variance must never be taken for."""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from common.data_files import DataError, read_npy

_LOGVAR_RANGE = (-30.0, 20.0)  # as in latent diffusion's and diffusers' DiagonalGaussianDistribution


def read_moments(path: Path, *, second: Literal["std", "logvar"] = "std") -> tuple[Tensor, Tensor]:
    """Mean and std of an image's posterior from a ``.npy`` of mean, then std: (2C, h, w), or (1, 2C, h, w).

    Args:
        path: The file.
        second: What is behind the mean: the std, or the log-variance, from which the std is then computed.

    Returns:
        Twice (C, h, w), float32.

    Raises:
        DataError: As `read_npy` and `check_moments`, or for another shape.
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

    Raises:
        DataError: If a value is not finite, or the std negative.
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
