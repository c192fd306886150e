"""The projection head, and how the width of a layer is read off."""

from __future__ import annotations

import math
from typing import Any

import plain
import pytest
import torch
from plain import TOLERANCE
from torch import nn
from toys import ToyBlock, ToyDiT, batch

import selftrans_reg as st
from selftrans_reg.modules import infer_width, resolve_width


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


class WithQKNorm(ToyBlock):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.q_norm, self.k_norm = nn.RMSNorm(width // 2), nn.RMSNorm(width // 2)


class WithSkip(ToyBlock):
    """U-ViT's: a Linear joins the long skip connection first."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.skip_linear = nn.Linear(2 * width, width)


class TwoStreams(nn.Module):
    def __init__(self, image: int, text: int) -> None:
        super().__init__()
        self.image, self.text = ToyBlock(image), ToyBlock(text)


@pytest.mark.parametrize(
    ("layer", "width"),
    [
        (ToyBlock(16), 16),
        (WithQKNorm(16), 16),
        (WithSkip(16), 16),
        (TwoStreams(16, 16), 16),
        (nn.TransformerEncoderLayer(16, 2, 32), 16),
        (nn.TransformerEncoderLayer(16, 2, 16), 16),
        (nn.TransformerDecoderLayer(16, 2, 32), 16),
        (nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 2, enable_nested_tensor=False), 16),
        (nn.Linear(16, 24), 24),
        (nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 32)), 32),
    ],
)
def test_the_width_is_read_off_where_it_is_certain(layer: nn.Module, width: int) -> None:
    assert infer_width(layer) == width
    assert resolve_width(layer, "blocks.1", None) == width


@pytest.mark.parametrize(
    "layer",
    [
        TwoStreams(16, 24),
        nn.Conv2d(4, 16, 2),
        nn.Identity(),
        nn.MultiheadAttention(16, 2),
        nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 32), nn.SiLU()),
        nn.ModuleList([ToyBlock(16), ToyBlock(24)]),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_the_width_is_asked_for_where_it_is_not(layer: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"width of layer 'blocks\.1'") as error:
        resolve_width(layer, "blocks.1", None)
    for part in (f"({type(layer).__name__}) cannot be read off with certainty", "Pass hidden_size=, the last axis"):
        assert part in str(error.value)
    assert resolve_width(layer, "blocks.1", 24) == 24


def test_a_given_width_is_believed_and_found_wrong_at_the_first_call() -> None:
    model, b = ToyDiT(dropout=0.0), batch()
    criterion = st.SelfTransLoss.stage1(
        model, layer="blocks.1", time="repa", latent_channels=4, patch_size=2, hidden_size=24, check_interval=None
    )
    loss = model(b["x"], b["t"], b["y"]).mean()
    with pytest.raises(st.SelfTransError, match=r"tokens of width 16, but the head reads 24"):
        criterion(loss, latents=b["x"])
