"""Paths between data and noise, and the velocity loss on them.

REPA's convention throughout, unless said otherwise: t = 0 is data and t = 1 is noise.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

# t -> alpha and sigma of ``x_t = alpha x + sigma noise`` and their derivatives in t, each of t's shape
Path = Callable[[Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]


def linear_path(t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``x_t = (1 - t) x + t noise``."""
    return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)


def cosine_path(t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``x_t = cos(pi t / 2) x + sin(pi t / 2) noise``: the variance stays 1 where the data's is 1."""
    quarter_turn = math.pi / 2
    alpha, sigma = torch.cos(quarter_turn * t), torch.sin(quarter_turn * t)
    return alpha, sigma, -quarter_turn * sigma, quarter_turn * alpha


PATHS: dict[str, Path] = {"linear": linear_path, "cosine": cosine_path}


def interpolate(path: Path, latents: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The noisy latents x_t and their velocity dx_t / dt.

    Shape:
        latents, noise: (N, C, H, W); t: (N,); returns: twice (N, C, H, W)
    """
    alpha, sigma, d_alpha, d_sigma = path(t.reshape(-1, *[1] * (latents.dim() - 1)))
    return alpha * latents + sigma * noise, d_alpha * latents + d_sigma * noise


def velocity_loss(
    model: nn.Module, latents: Tensor, y: Tensor, t: Tensor, noise: Tensor, path: Path = linear_path
) -> Tensor:
    """Squared error of the predicted velocity, one value a sample: the mean over channels and pixels.

    Shape:
        latents, noise: (N, C, H, W); y, t: (N,); returns: (N,)
    """
    x_t, velocity = interpolate(path, latents, noise, t)
    return (model(x_t, t, y) - velocity).square().flatten(1).mean(1)


def denoising_loss(model: nn.Module, latents: Tensor, y: Tensor, path: Path = linear_path) -> Tensor:
    """The loss of a REPA loop: t uniform in [0, 1] and the noise drawn here, then `velocity_loss`; (N,)."""
    t = torch.rand(len(latents), device=latents.device, dtype=latents.dtype)
    return velocity_loss(model, latents, y, t, torch.randn_like(latents), path)


class Transport:
    """The loss of a SiT loop, in SiT's own convention: t = 1 is data, and t and the noise are drawn inside.

    With ``s = 1 - t`` this is the path above run backwards: the same x_t, the velocity of opposite sign.

    Args:
        path: "linear" or "cosine" (SiT calls it "GVP").
    """

    def __init__(self, path: str = "linear") -> None:
        self.path = PATHS[path]

    def training_losses(
        self, model: nn.Module, x: Tensor, model_kwargs: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Draw t uniformly and the noise, and return ``{"loss": (N,), "pred": (N, C, H, W)}`` of the velocity."""
        noise = torch.randn_like(x)
        t = torch.rand(len(x), device=x.device, dtype=x.dtype)
        x_t, noiseward_velocity = interpolate(self.path, x, noise, 1 - t)
        prediction = model(x_t, t, **(model_kwargs or {}))
        return {"loss": (prediction + noiseward_velocity).square().flatten(1).mean(1), "pred": prediction}
