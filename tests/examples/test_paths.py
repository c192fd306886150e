"""The examples' paths and losses: their formulas, and both repositories' conventions of time."""

import math

import pytest
import torch
from common.paths import PATHS, Transport, denoising_loss, velocity_loss
from torch import Tensor, nn


class Affine(nn.Module):
    """A model that uses each of its arguments and remembers what it was called with."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.seen = (x, t, y)
        return 0.5 * x + t[:, None, None, None] - y[:, None, None, None]


def plain(name: str, latents: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The noisy latents and their velocity; both lead to the noise, at t = 1."""
    t = t[:, None, None, None]
    if name == "linear":
        return (1 - t) * latents + t * noise, noise - latents
    a, b = torch.cos(math.pi * t / 2), torch.sin(math.pi * t / 2)
    return a * latents + b * noise, math.pi / 2 * (a * noise - b * latents)


@pytest.mark.parametrize("name", PATHS)
def test_losses_equal_the_plain_formula(name: str, generator: torch.Generator) -> None:
    latents, y = torch.randn(64, 2, 4, 4, generator=generator), torch.arange(64) % 3
    model = Affine()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = denoising_loss(model, latents, y, PATHS[name])
        torch.manual_seed(0)
        t, noise = torch.rand(64), torch.randn_like(latents)
        torch.manual_seed(0)
        sit = Transport(name).training_losses(model, latents, {"y": y})
        x_s, s, seen_y = model.seen
        torch.manual_seed(0)
        sits_noise = torch.randn_like(latents)  # drawn first, and then the times
    x_t, velocity = plain(name, latents, noise, t)
    expected = (model(x_t, t, y) - velocity).square().mean((1, 2, 3))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(velocity_loss(model, latents, y, t, noise, PATHS[name]), expected)

    expected_x, velocity = plain(name, latents, sits_noise, 1 - s)  # in SiT t = 1 is data, and the velocity leads there
    assert seen_y is y
    assert 0 <= s.min() < 0.2 < 0.8 < s.max() < 1  # of 64 uniform draws
    torch.testing.assert_close(x_s, expected_x)
    torch.testing.assert_close(sit["pred"], model(x_s, s, y))
    torch.testing.assert_close(sit["loss"], (sit["pred"] + velocity).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-5)
