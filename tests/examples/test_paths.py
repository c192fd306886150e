"""The examples' paths and losses: derivatives by autograd, and both repositories' conventions of time."""

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


@pytest.mark.parametrize("name", PATHS)
def test_derivatives_are_those_of_the_coefficients(name: str) -> None:
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    coefficients = PATHS[name](t)
    for i in range(2):
        derivative = torch.func.vmap(torch.func.grad(lambda s, i=i: PATHS[name](s)[i]))(t)
        torch.testing.assert_close(coefficients[2 + i], derivative)


@pytest.mark.parametrize("name", PATHS)
def test_velocity_loss_equals_the_plain_formula(name: str, generator: torch.Generator) -> None:
    latents, noise = torch.randn(2, 3, 2, 4, 4, generator=generator)
    t, y = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 1, 2])
    actual = velocity_loss(Affine(), latents, y, t, noise, PATHS[name])
    assert actual.shape == (3,)
    for i in range(3):
        s = t[i].item()
        if name == "linear":
            x_t, velocity = (1 - s) * latents[i] + s * noise[i], noise[i] - latents[i]
        else:
            a, b = math.cos(math.pi * s / 2), math.sin(math.pi * s / 2)
            x_t, velocity = a * latents[i] + b * noise[i], math.pi / 2 * (a * noise[i] - b * latents[i])
        expected = ((0.5 * x_t + s - i - velocity) ** 2).sum() / velocity.numel()
        torch.testing.assert_close(actual[i], expected)


def test_denoising_loss_draws_uniform_times_then_the_noise(generator: torch.Generator) -> None:
    latents, y = torch.randn(64, 2, 4, 4, generator=generator), torch.arange(64) % 3
    with torch.random.fork_rng():
        torch.manual_seed(0)
        actual = denoising_loss(Affine(), latents, y, PATHS["cosine"])
        torch.manual_seed(0)
        t, noise = torch.rand(64), torch.randn_like(latents)
    torch.testing.assert_close(actual, velocity_loss(Affine(), latents, y, t, noise, PATHS["cosine"]))


@pytest.mark.parametrize("name", PATHS)
def test_transport_draws_inside_and_speaks_sits_convention(name: str, generator: torch.Generator) -> None:
    latents, y = torch.randn(64, 2, 4, 4, generator=generator), torch.arange(64) % 3
    model = Affine()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        losses = Transport(name).training_losses(model, latents, {"y": y})
        torch.manual_seed(0)
        noise = torch.randn_like(latents)
    x_t, t, seen_y = model.seen
    assert seen_y is y
    assert 0 <= t.min() < 0.2 < 0.8 < t.max() < 1  # of 64 uniform draws
    s = t[:, None, None, None]
    if name == "linear":  # t = 1 is data
        expected_x, target = s * latents + (1 - s) * noise, latents - noise
    else:
        angle = math.pi / 2 * s
        expected_x = angle.sin() * latents + angle.cos() * noise
        target = math.pi / 2 * (angle.cos() * latents - angle.sin() * noise)
    torch.testing.assert_close(x_t, expected_x)
    torch.testing.assert_close(losses["pred"], model(x_t, t, y))
    expected_loss = ((losses["pred"] - target) ** 2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(losses["loss"], expected_loss, rtol=1e-4, atol=1e-5)
