"""The heads and their distances; what they compute in a criterion, every gradient included, is in test_criterion."""

from __future__ import annotations

import math
from typing import Any

import plain
import pytest
import torch
from backbones import patches
from plain import TOLERANCE, refused

import selftrans_reg as st
from selftrans_reg import SettingError, ShapeError


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def vae_loss(**changed: Any) -> st.VAEAlignmentLoss:
    return st.VAEAlignmentLoss(**{"hidden_size": 8, "latent_channels": 3, "patch_size": 2} | changed)


def test_the_initial_weights_are_xavier_uniform_and_the_biases_zero() -> None:
    head = st.ProjectionHead(96, 64, 128)
    for index, (fan_in, fan_out) in {0: (96, 128), 2: (128, 128), 4: (128, 64)}.items():
        weight, bound = head[index].weight, math.sqrt(6 / (fan_in + fan_out))
        assert weight.shape == (fan_out, fan_in)
        assert 0.99 * bound < weight.abs().max() <= bound
        assert weight.mean().abs() < 5 * bound / math.sqrt(3 * weight.numel())
        assert weight.var().item() == pytest.approx(bound**2 / 3, rel=0.05)
        assert not head[index].bias.any()


@pytest.mark.usefixtures("global_rng_untouched")
def test_weights_come_from_the_generator_alone_under_the_released_projectors_names() -> None:
    seeds = [{}, {}, *({"generator": torch.Generator().manual_seed(seed)} for seed in (0, 1))]
    one, same, seeded, other = (st.ProjectionHead(6, 5, 12, **seed).state_dict() for seed in seeds)
    assert list(one) == [f"{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")]
    assert all(torch.equal(one[name], same[name]) and torch.equal(one[name], seeded[name]) for name in one)
    assert not torch.equal(one["0.weight"], other["0.weight"])
    assert all(torch.equal(p, q) for p, q in zip(vae_loss().parameters(), vae_loss().parameters(), strict=True))


@pytest.mark.parametrize("distance", ["mse", "cosine", "smooth_l1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
def test_value_and_gradient_are_the_formulas_in_float32_also_under_autocast(
    weighted: bool, dtype: torch.dtype, distance: Any
) -> None:
    prediction = (1.5 * normal(3, 5, 8)).to(dtype).requires_grad_()
    target, copy = normal(3, 5, 8, seed=1).to(dtype).requires_grad_(), prediction.detach().clone().requires_grad_()
    weights = (normal(3, 5, seed=2) > 0).float()  # what a token counts
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = st.feature_alignment(prediction, target, distance, weights if weighted else None)
    pairs = zip(copy.float().split(1, 1), target.detach().float().split(1, 1), strict=True)
    tokens = torch.stack([plain.distance(*pair, distance) for pair in pairs], 1)  # (N, T)
    expected = (tokens * weights if weighted else tokens).mean(1)
    assert (found.shape, found.dtype) == ((3,), torch.float32)
    torch.testing.assert_close(found, expected, **TOLERANCE)
    found.sum().backward(), expected.sum().backward()
    torch.testing.assert_close(prediction.grad, copy.grad, **TOLERANCE)
    assert target.grad is None


@pytest.mark.parametrize(
    ("shape", "patch", "axis"),
    [
        *[((2, 3, 6), (2,), 1), ((2, 4, 3), (1,), 2), ((2, 3, 4, 6), (2, 3), 1)],
        *[((2, 3, 2, 4, 6), (1, 2, 3), 1), ((2, 2, 3, 4, 6), (2, 2, 3), 2)],
    ],
)
def test_every_token_is_compared_with_its_own_patch(shape: Any, patch: Any, axis: int) -> None:
    loss = vae_loss(patch_size=patch, channel_axis=axis)
    latents = torch.arange(float(math.prod(shape))).reshape(shape)
    wanted = patches(latents, patch, axis)
    torch.testing.assert_close(loss.patchify(latents, torch.zeros(2, wanted.shape[1], 8)), wanted)


@pytest.mark.parametrize(
    ("tokens", "shape", "part"),
    [
        *((16, shape, "do not have, on axis 1, the 3 channels") for shape in ((2, 4, 8, 8), (8, 8), (2, 1, 8, 8))),
        *((16, shape, "do not divide into patches of") for shape in ((2, 3, 9, 8), (2, 3, 8))),
        (17, (2, 3, 8, 8), "17 tokens do not fit the latent grid 4×4, which has 16"),
        (16, (1, 3, 8, 8), "1 latents for the tokens of 2 samples"),
        *(((2, 4, 8), shape, f"and target {shape} must both be (N, T, D)") for shape in ((2, 1, 8), (1, 4, 8))),
    ],
)
def test_latents_and_features_that_do_not_fit_are_never_broadcast(tokens: Any, shape: Any, part: str) -> None:
    with refused(ShapeError, part):
        if isinstance(tokens, int):
            vae_loss()(torch.zeros(2, tokens, 8), torch.zeros(shape))
        st.feature_alignment(torch.zeros(tokens), torch.zeros(shape))


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        *(({name: 0}, f"{name} must be a positive") for name in ("latent_channels", "patch_size", "channel_axis")),
        *(({"patch_size": value}, f"1 to 3 axes; got {value}") for value in (2.0, (), (1, 1, 1, 1))),
        ({"channel_axis": 4}, "channel_axis=4 is no axis of latents with 2 spatial axes"),
    ],
)
def test_a_size_that_makes_no_sense_is_refused(changed: dict[str, Any], part: str) -> None:
    with refused(SettingError, part):
        vae_loss(**changed)
