"""The heads and their distances against plain formulas."""

from __future__ import annotations

import math
from typing import Any

import plain
import pytest
import torch
import torch.nn.functional as F
from plain import TOLERANCE

import selftrans_reg as st
from selftrans_reg import SettingError, ShapeError
from selftrans_reg.alignment import velocity_target


def test_it_is_linear_silu_linear_silu_linear(generator: torch.Generator) -> None:
    head, tokens = st.ProjectionHead(6, 5, 12), torch.randn(2, 7, 6, generator=generator)
    p = plain.leaves(head)
    found, expected = head(tokens), plain.project(p, tokens)
    torch.testing.assert_close(found, expected, **TOLERANCE)
    found.square().sum().backward()
    expected.square().sum().backward()
    plain.assert_same_gradients(head, p)


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
def test_weights_come_from_the_generator_alone() -> None:
    default, same = st.ProjectionHead(6, 5, 12), st.ProjectionHead(6, 5, 12)
    seeded = st.ProjectionHead(6, 5, 12, generator=torch.Generator().manual_seed(0))
    other = st.ProjectionHead(6, 5, 12, generator=torch.Generator().manual_seed(1))
    for name, value in default.state_dict().items():
        assert torch.equal(value, same.state_dict()[name])
        assert torch.equal(value, seeded.state_dict()[name])
    assert not torch.equal(default[0].weight, other[0].weight)


def test_the_parameters_names_are_those_of_the_released_projectors() -> None:
    assert list(st.ProjectionHead(6, 5).state_dict()) == [
        f"{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")
    ]
    assert st.ProjectionHead(6, 5)[0].out_features == 2048


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_tokens_of_another_precision_are_cast_to_the_heads(dtype: torch.dtype) -> None:
    tokens = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    head = st.ProjectionHead(6, 5, 12)
    assert head(tokens).dtype == torch.float32
    torch.testing.assert_close(head(tokens), head(tokens.float()))


def test_no_rows_give_an_empty_result_with_gradients_of_zero() -> None:
    head = st.ProjectionHead(6, 5, 12)
    head(torch.zeros(0, 7, 6)).sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in head.parameters())


def test_it_is_made_where_it_is_asked_for(device: torch.device) -> None:
    assert {p.device.type for p in st.ProjectionHead(6, 5, 12, device=device).parameters()} == {device.type}
    assert {p.device.type for p in st.ProjectionHead(6, 5, 12, device="meta").parameters()} == {"meta"}


def test_tokens_of_another_width_are_refused() -> None:
    with pytest.raises(st.SelfTransError) as error:
        st.ProjectionHead(6, 5, 12)(torch.zeros(2, 7, 8))
    assert "reads tokens of width 6, but got (2, 7, 8)" in str(error.value)
    assert "hidden_size=8, or tap the layer" in str(error.value)


@pytest.mark.parametrize("width", [0, -4, 2.0, True, None, "16"])
@pytest.mark.parametrize("name", ["in_features", "out_features", "hidden_features"])
def test_a_width_that_makes_no_sense_is_refused(name: str, width: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a positive integer; got {width!r}"):
        st.ProjectionHead(**({"in_features": 6, "out_features": 5, "hidden_features": 12} | {name: width}))


DISTANCES = ["mse", "cosine", "smooth_l1"]


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class TestFeatureAlignment:
    @pytest.mark.parametrize("distance", DISTANCES)
    def test_value_and_gradient_equal_the_plain_formula(self, distance: Any) -> None:
        prediction, target = normal(3, 5, 8, scale=1.5).requires_grad_(), normal(3, 5, 8, seed=1)
        copy = prediction.detach().clone().requires_grad_()
        found, expected = st.feature_alignment(prediction, target, distance), plain.distance(copy, target, distance)
        assert found.shape == (3,)
        torch.testing.assert_close(found, expected, **TOLERANCE)
        found.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(prediction.grad, copy.grad, **TOLERANCE)

    @pytest.mark.parametrize("distance", DISTANCES)
    def test_equal_features_are_at_distance_zero_and_samples_do_not_mix(self, distance: Any) -> None:
        target = normal(3, 5, 8)
        other = target.clone()
        other[1] = normal(5, 8, seed=2)
        found = st.feature_alignment(other, target, distance)
        torch.testing.assert_close(found[[0, 2]], torch.zeros(2), rtol=0, atol=1e-6)
        assert found[1] > 0.1

    def test_the_cosine_ignores_the_length_of_features(self) -> None:
        a, b = normal(3, 5, 8), normal(3, 5, 8, seed=1)
        torch.testing.assert_close(
            st.feature_alignment(100 * a, 0.01 * b, "cosine"), st.feature_alignment(a, b, "cosine"), **TOLERANCE
        )
        torch.testing.assert_close(st.feature_alignment(a, -a, "cosine"), torch.full((3,), 2.0))

    @pytest.mark.parametrize("distance", DISTANCES)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_it_computes_in_float32_also_under_autocast(self, distance: Any, dtype: torch.dtype) -> None:
        prediction, target = normal(3, 5, 8, scale=300).to(dtype), normal(3, 5, 8, seed=1, scale=300).to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = st.feature_alignment(prediction, target, distance)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, plain.distance(prediction.float(), target.float(), distance), **TOLERANCE)

    @pytest.mark.parametrize("distance", DISTANCES)
    def test_the_target_gets_no_gradient(self, distance: Any) -> None:
        prediction, target = normal(3, 5, 8).requires_grad_(), normal(3, 5, 8, seed=1).requires_grad_()
        st.feature_alignment(prediction, target, distance).sum().backward()
        assert target.grad is None
        assert prediction.grad is not None

    @pytest.mark.parametrize("distance", DISTANCES)
    def test_a_zero_feature_gives_no_nan(self, distance: Any) -> None:
        prediction = torch.zeros(1, 2, 4, requires_grad=True)
        loss = st.feature_alignment(prediction, torch.zeros(1, 2, 4), distance)
        loss.sum().backward()
        assert loss.isfinite().all()
        assert prediction.grad is not None
        assert prediction.grad.isfinite().all()

    @pytest.mark.parametrize(
        "shapes", [((2, 4, 8), (2, 4, 6)), ((2, 4, 8), (2, 1, 8)), ((2, 4, 8), (1, 4, 8)), ((4, 8), (4, 8))]
    )
    def test_shapes_are_never_broadcast(self, shapes: tuple[tuple[int, ...], ...]) -> None:
        with pytest.raises(ShapeError) as error:
            st.feature_alignment(*(torch.zeros(shape) for shape in shapes))
        assert f"Prediction {shapes[0]} and target {shapes[1]} must both be (N, T, D) and alike" in str(error.value)

    @pytest.mark.parametrize("distance", DISTANCES)
    def test_weights_say_what_a_token_counts(self, distance: Any) -> None:
        prediction, target = normal(3, 5, 8), normal(3, 5, 8, seed=1)
        weights = (normal(3, 5, seed=2) > 0).float()
        tokens = [plain.distance(prediction[:, [i]], target[:, [i]], distance) * weights[:, i] for i in range(5)]
        found = st.feature_alignment(prediction, target, distance, weights)
        torch.testing.assert_close(found, torch.stack(tokens).mean(0), **TOLERANCE)


class TestVAEAlignment:
    @pytest.mark.parametrize("distance", DISTANCES)
    def test_value_and_every_gradient_equal_the_plain_formula(self, distance: Any) -> None:
        loss = st.VAEAlignmentLoss(12, latent_channels=3, patch_size=2, hidden_features=20, distance=distance)
        tokens, latents = normal(2, 16, 12).requires_grad_(), normal(2, 3, 8, 8, seed=1)
        copy, p = tokens.detach().clone().requires_grad_(), plain.leaves(loss)
        found = loss(tokens, latents)
        image = plain.predict_latents(p, copy, channels=3, patch=2)
        expected = plain.distance(*(F.unfold(i, 2, stride=2).transpose(1, 2) for i in (image, latents)), distance)
        torch.testing.assert_close(found, expected, **TOLERANCE)
        found.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(tokens.grad, copy.grad, **TOLERANCE)
        plain.assert_same_gradients(loss, p)

    @pytest.mark.parametrize(("shape", "patch"), [((2, 3, 6), 2), ((2, 3, 4, 6), (2, 3)), ((2, 3, 2, 4, 6), (1, 2, 3))])
    def test_every_token_sees_its_own_patch_and_nothing_else(self, shape: tuple[int, ...], patch: Any) -> None:
        """Moving one latent value changes the target of one token, in its place."""
        patch = (patch,) if isinstance(patch, int) else patch
        grid = [size // p for size, p in zip(shape[2:], patch, strict=True)]
        count = torch.tensor(grid).prod().item()
        loss = st.VAEAlignmentLoss(8, latent_channels=3, patch_size=patch, hidden_features=4)
        latents = torch.arange(float(torch.tensor(shape).prod())).reshape(shape)
        target = loss.patchify(latents, torch.zeros(2, count, 8))
        assert sorted(target.flatten().tolist()) == sorted(latents.flatten().tolist())
        for token in (0, 1, count - 1):
            place, rest = [], token
            for size in reversed(grid):
                place.insert(0, rest % size)
                rest //= size
            window = tuple(slice(i * p, (i + 1) * p) for i, p in zip(place, patch, strict=True))
            expected = latents[(slice(None), slice(None), *window)].movedim(1, -1).flatten(1)  # channels last: pqc
            torch.testing.assert_close(target[:, token], expected)

    def test_channels_may_be_on_another_axis(self) -> None:
        first = st.VAEAlignmentLoss(8, latent_channels=3, patch_size=(1, 2, 2), hidden_features=4)
        moved = st.VAEAlignmentLoss(8, latent_channels=3, patch_size=(1, 2, 2), hidden_features=4, channel_axis=2)
        tokens, latents = normal(2, 8, 8), normal(2, 3, 2, 4, 4, seed=1)
        torch.testing.assert_close(moved(tokens, latents.transpose(1, 2)), first(tokens, latents))

    @pytest.mark.usefixtures("global_rng_untouched")
    def test_it_is_made_without_the_global_generator(self) -> None:
        one, two = (st.VAEAlignmentLoss(8, 3, 2, hidden_features=4) for _ in range(2))
        assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
        assert not torch.equal(one.head[0].weight.flatten()[:8], one.head[2].weight.flatten()[:8])

    @pytest.mark.parametrize("shape", [(2, 4, 8, 8), (2, 8, 8, 3), (8, 8), (2, 1, 8, 8)])
    def test_latents_of_the_wrong_channels_are_refused(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ShapeError) as error:
            st.VAEAlignmentLoss(8, 3, 2, hidden_features=4)(torch.zeros(2, 16, 8), torch.zeros(shape))
        for part in (f"Latents of shape {shape} do not have, on axis 1, the 3 channels", "latent_channels"):
            assert part in str(error.value)

    @pytest.mark.parametrize("shape", [(2, 3, 9, 8), (2, 3, 8), (2, 3, 2, 8, 8)])
    def test_latents_of_the_wrong_axes_are_refused(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ShapeError, match="do not divide into patches of"):
            st.VAEAlignmentLoss(8, 3, 2, hidden_features=4)(torch.zeros(2, 16, 8), torch.zeros(shape))

    def test_tokens_that_do_not_fit_the_grid_are_refused(self) -> None:
        with pytest.raises(ShapeError, match=r"17 tokens do not fit the latent grid 4×4, which has 16"):
            st.VAEAlignmentLoss(8, 3, 2, hidden_features=4)(torch.zeros(2, 17, 8), torch.zeros(2, 3, 8, 8))

    def test_another_batch_is_refused(self) -> None:
        with pytest.raises(ShapeError, match="1 latents for the tokens of 2 samples: pass the same batch"):
            st.VAEAlignmentLoss(8, 3, 2, hidden_features=4)(torch.zeros(2, 16, 8), torch.zeros(1, 3, 8, 8))

    @pytest.mark.parametrize(
        ("settings", "part"),
        [
            ({"latent_channels": 0}, "latent_channels must be a positive integer; got 0"),
            ({"patch_size": 0}, "patch_size must be a positive integer; got 0"),
            ({"patch_size": 2.0}, "patch_size must be an int, or one for each of 1 to 3 axes; got 2.0"),
            ({"patch_size": None}, "patch_size must be an int, or one for each of 1 to 3 axes; got None"),
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
        with pytest.raises(SettingError) as error:
            st.VAEAlignmentLoss(**({"hidden_size": 8, "latent_channels": 3, "patch_size": 2} | settings))
        assert part in str(error.value)


@pytest.mark.parametrize(("alpha", "sigma"), [(0.0, 1.0), (0.5, 0.5), (0.8, 0.6), (1.0, 5.0), (0.999, 1e-3)])
def test_the_velocity_target_is_noise_minus_latents_on_every_path(alpha: float, sigma: float) -> None:
    x, noise = normal(4, 3, 8, 8), normal(4, 3, 8, 8, seed=1)
    found = velocity_target(alpha * x + sigma * noise, x, torch.full((4,), alpha), torch.full((4,), sigma))
    torch.testing.assert_close(found, noise - x, rtol=1e-5, atol=1e-6 / min(sigma, 1.0))


def test_the_velocity_target_without_any_noise_is_finite() -> None:
    x = normal(4, 3, 8, 8)
    assert velocity_target(x, x, torch.ones(4), torch.zeros(4)).isfinite().all()
