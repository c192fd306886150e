"""The parts that SiT and MMDiT share, written out from a state dict."""

import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Weights = dict[str, Tensor]


def norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, False, keepdim=True) + eps).sqrt()


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return norm(x) * (1 + scale[:, None]) + shift[:, None]


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def embedded(weights: Weights, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens of noisy latents, and the embedding of the times."""
    kernel, bias = weights["x_embedder.proj.weight"], weights["x_embedder.proj.bias"]
    patches = F.unfold(x, kernel.shape[-1], stride=kernel.shape[-1]).mT  # (N, T, C p p)
    angles = torch.stack([t * 10_000 ** (-k / 128) for k in range(128)], dim=1)
    waves = torch.cat([angles.cos(), angles.sin()], dim=1)
    c = linear(weights, "t_embedder.mlp.2", silu(linear(weights, "t_embedder.mlp.0", waves)))
    return patches @ kernel.flatten(1).T + bias + weights["pos_embed"], c


def decoded(weights: Weights, tokens: Tensor, c: Tensor, like: Tensor) -> Tensor:
    """The last layer, and its patches put together; of doubled channels the first half."""
    shift, scale = linear(weights, "final_layer.adaLN_modulation.1", silu(c)).split(tokens.shape[-1], dim=1)
    flat = linear(weights, "final_layer.linear", modulated(tokens, shift, scale))
    p = weights["x_embedder.proj.weight"].shape[-1]
    patches = flat.unflatten(2, (p * p, -1)).mT.flatten(2)  # (N, T, C p p), of pixels with their channels innermost
    return F.fold(patches.mT, like.shape[2:], p, stride=p)[:, : like.shape[1]]


def projected(weights: Weights, block: str, tokens: Tensor, c: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The modulation of a block, or of one stream of it, and its queries, keys and values."""
    parts = linear(weights, f"{block}.adaLN_modulation.1", silu(c)).split(tokens.shape[-1], dim=1)
    return parts, linear(weights, f"{block}.attn.qkv", modulated(tokens, *parts[:2])).split(tokens.shape[-1], dim=-1)


def attended(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Head by head."""
    size = q.shape[-1] // heads
    parts = zip(*(part.split(size, dim=-1) for part in (q, k, v)), strict=True)
    return torch.cat([(qh @ kh.mT / math.sqrt(size)).softmax(-1) @ vh for qh, kh, vh in parts], dim=-1)


def completed(weights: Weights, block: str, tokens: Tensor, attention: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """What follows the attention."""
    gate, shift, scale, mlp_gate = parts[2:]
    tokens = tokens + gate[:, None] * linear(weights, f"{block}.attn.proj", attention)
    hidden = gelu(linear(weights, f"{block}.mlp.fc1", modulated(tokens, shift, scale)))
    return tokens + mlp_gate[:, None] * linear(weights, f"{block}.mlp.fc2", hidden)


def perturbed(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """The model with no zero-initialised parameter, so that no term of the formula vanishes."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model


def check_initial_weights(state: Weights, normal: list[str]) -> set[str]:
    """Zero, normal or Xavier-uniform, each where the field has it; the names of the last kind."""
    zero = [name for name in state if "adaLN" in name or name.startswith("final_layer.linear")]
    zero += [name for name in state if name.endswith(".bias")]
    for name in zero:
        assert not state[name].any(), name
    for name in normal:  # thousands of draws: the estimate of the deviation is good to a few per cent
        assert state[name].std().item() == pytest.approx(0.02, rel=0.05), name
        assert abs(state[name].mean().item()) < 1e-3, name
    rest = {name for name in state if name not in {*zero, *normal, "pos_embed"}}
    for name in rest:
        weight = state[name].flatten(1)
        bound = math.sqrt(6 / (weight.shape[0] + weight.shape[1]))  # Xavier-uniform
        assert weight.abs().max().item() <= bound, name
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.06), name
    return rest
