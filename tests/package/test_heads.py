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

DISTANCES = pytest.mark.parametrize("distance", ["mse", "cosine", "smooth_l1"])


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class TestProjectionHead:
    def test_the_initial_weights_are_xavier_uniform_and_the_biases_zero(self) -> None:
        head = st.ProjectionHead(96, 64, 128)
        for index, (fan_in, fan_out) in {0: (96, 128), 2: (128, 128), 4: (128, 64)}.items():
            weight, bound = head[index].weight, math.sqrt(6 / (fan_in + fan_out))
            assert weight.shape == (fan_out, fan_in)
            assert 0.99 * bound < weight.abs().max() <= bound
            assert weight.mean().abs() < 5 * bound / math.sqrt(3 * weight.numel())
            assert weight.var().item() == pytest.approx(bound**2 / 3, rel=0.05)
            assert not head[index].bias.any()

    @pytest.mark.usefixtures("global_rng_untouched")
    def test_weights_come_from_the_generator_alone_under_the_released_projectors_names(self) -> None:
        seeds = [{}, {}, *({"generator": torch.Generator().manual_seed(seed)} for seed in (0, 1))]
        one, same, seeded, other = (st.ProjectionHead(6, 5, 12, **seed).state_dict() for seed in seeds)
        assert list(one) == [f"{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")]
        assert all(torch.equal(one[name], same[name]) and torch.equal(one[name], seeded[name]) for name in one)
        assert not torch.equal(one["0.weight"], other["0.weight"])
        stage1 = [st.VAEAlignmentLoss(8, 3, 2, hidden_features=4) for _ in range(2)]
        assert all(torch.equal(p, q) for p, q in zip(*(loss.parameters() for loss in stage1), strict=True))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_tokens_of_another_precision_are_cast_to_the_heads(self, dtype: torch.dtype) -> None:
        head, tokens = st.ProjectionHead(6, 5, 12), normal(2, 7, 6).to(dtype)
        assert head(tokens).dtype == torch.float32
        torch.testing.assert_close(head(tokens), head(tokens.float()))

    def test_it_is_made_where_it_is_asked_for(self, device: torch.device) -> None:
        for place in (device, torch.device("meta")):
            assert {p.device.type for p in st.ProjectionHead(6, 5, 12, device=place).parameters()} == {place.type}

    def test_tokens_of_another_width_are_refused(self) -> None:
        with refused(ShapeError, "reads tokens of width 6, but got (2, 7, 8)", "hidden_size=8, or tap the layer"):
            st.ProjectionHead(6, 5, 12)(torch.zeros(2, 7, 8))


class TestFeatureAlignment:
    @DISTANCES
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_value_and_gradient_are_the_formulas_in_float32_also_under_autocast(
        self, dtype: torch.dtype, distance: Any
    ) -> None:
        prediction = normal(3, 5, 8, scale=1.5).to(dtype).requires_grad_()
        target, copy = normal(3, 5, 8, seed=1).to(dtype).requires_grad_(), prediction.detach().clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = st.feature_alignment(prediction, target, distance)
        expected = plain.distance(copy.float(), target.detach().float(), distance)
        assert (found.shape, found.dtype) == ((3,), torch.float32)
        torch.testing.assert_close(found, expected, **TOLERANCE)
        found.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(prediction.grad, copy.grad, **TOLERANCE)
        assert target.grad is None

    @DISTANCES
    def test_a_zero_feature_gives_no_nan(self, distance: Any) -> None:
        prediction = torch.zeros(1, 2, 4, requires_grad=True)
        st.feature_alignment(prediction, torch.zeros(1, 2, 4), distance).sum().backward()
        assert prediction.grad.isfinite().all()

    @pytest.mark.parametrize("shapes", [((2, 4, 8), (2, 1, 8)), ((2, 4, 8), (1, 4, 8)), ((4, 8), (4, 8))])
    def test_shapes_are_never_broadcast(self, shapes: tuple[tuple[int, ...], ...]) -> None:
        message = f"Prediction {shapes[0]} and target {shapes[1]} must both be (N, T, D) and alike"
        with refused(ShapeError, message, "at the image's tokens"):
            st.feature_alignment(*(torch.zeros(shape) for shape in shapes))

    @DISTANCES
    def test_weights_say_what_a_token_counts(self, distance: Any) -> None:
        prediction, target = normal(3, 5, 8), normal(3, 5, 8, seed=1)
        weights = (normal(3, 5, seed=2) > 0).float()
        tokens = [plain.distance(prediction[:, [i]], target[:, [i]], distance) * weights[:, i] for i in range(5)]
        found = st.feature_alignment(prediction, target, distance, weights)
        torch.testing.assert_close(found, torch.stack(tokens).mean(0), **TOLERANCE)


class TestVAEAlignment:
    @pytest.mark.parametrize(
        ("shape", "patch", "axis"),
        [
            *[((2, 3, 6), (2,), 1), ((2, 4, 3), (1,), 2), ((2, 3, 4, 6), (2, 3), 1)],
            *[((2, 3, 2, 4, 6), (1, 2, 3), 1), ((2, 2, 3, 4, 6), (2, 2, 3), 2)],
        ],
    )
    def test_every_token_is_compared_with_its_own_patch(self, shape: Any, patch: Any, axis: int) -> None:
        loss = st.VAEAlignmentLoss(8, latent_channels=3, patch_size=patch, hidden_features=4, channel_axis=axis)
        latents = torch.arange(float(math.prod(shape))).reshape(shape)
        wanted = patches(latents, patch, axis)
        torch.testing.assert_close(loss.patchify(latents, torch.zeros(2, wanted.shape[1], 8)), wanted)

    @pytest.mark.parametrize(
        ("tokens", "shape", "parts"),
        [
            (
                16,
                (2, 4, 8, 8),
                ["Latents of shape (2, 4, 8, 8) do not have, on axis 1, the 3 channels", "channel_axis="],
            ),
            (16, (8, 8), ["Latents of shape (8, 8) do not have"]),
            (16, (2, 1, 8, 8), ["do not have, on axis 1, the 3 channels"]),
            (16, (2, 3, 9, 8), ["do not divide into patches of"]),
            (16, (2, 3, 8), ["do not divide into patches of"]),
            (17, (2, 3, 8, 8), ["17 tokens do not fit the latent grid 4×4, which has 16"]),
            (16, (1, 3, 8, 8), ["1 latents for the tokens of 2 samples: pass the same batch"]),
        ],
    )
    def test_latents_that_do_not_fit_are_refused(self, tokens: int, shape: Any, parts: list[str]) -> None:
        with refused(ShapeError, *parts):
            st.VAEAlignmentLoss(8, 3, 2, hidden_features=4)(torch.zeros(2, tokens, 8), torch.zeros(shape))

    @pytest.mark.parametrize(
        ("settings", "part"),
        [
            ({"latent_channels": 0}, "latent_channels must be a positive integer; got 0"),
            ({"patch_size": 0}, "patch_size must be a positive integer; got 0"),
            ({"patch_size": 2.0}, "patch_size must be an int, or one for each of 1 to 3 axes; got 2.0"),
            ({"patch_size": (1, 1, 1, 1)}, "one for each of 1 to 3 axes; got (1, 1, 1, 1)"),
            ({"patch_size": ()}, "one for each of 1 to 3 axes; got ()"),
            ({"patch_size": (2, 2.0)}, "patch_size must be a positive integer; got 2.0"),
            ({"hidden_size": 0}, "in_features must be a positive integer; got 0"),
            ({"distance": "mae"}, "distance must be one of 'mse', 'cosine', 'smooth_l1'; got 'mae'"),
            ({"channel_axis": 0}, "channel_axis must be a positive integer; got 0"),
            ({"channel_axis": 4}, "channel_axis=4 is no axis of latents with 2 spatial axes"),
        ],
    )
    def test_a_size_that_makes_no_sense_is_refused(self, settings: dict[str, Any], part: str) -> None:
        with refused(SettingError, part):
            st.VAEAlignmentLoss(**({"hidden_size": 8, "latent_channels": 3, "patch_size": 2} | settings))
