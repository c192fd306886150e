"""The examples' MMDiT: the reference's names and shapes, a plain formula of the whole function, its image stream."""

import math

import pytest
import torch
from common.mmdit import MMDiT
from common.options import Mistake
from plain_transformers import check_initial_weights, decoded, embedded, gelu, linear, modulated, perturbed, silu
from torch import Tensor

TINY = {
    "input_size": 8, "patch_size": 2, "in_channels": 3, "hidden_size": 16, "depth": 3, "num_heads": 2,
    "context_size": 6,
}  # fmt: skip


def tiny_mmdit(generator: torch.Generator, **settings: object) -> MMDiT:
    return perturbed(MMDiT(**(TINY | settings)), generator)


def inputs(generator: torch.Generator, rows: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(rows, 3, 8, 8, generator=generator)
    return x, torch.rand(rows, generator=generator), torch.randn(rows, 5, 6, generator=generator)


def plain_joint_block(
    weights: dict[str, Tensor], prefix: str, context: Tensor, x: Tensor, c: Tensor, *, heads: int
) -> tuple[Tensor | None, Tensor]:
    """A joint block head by head and query by query, from the state dict alone; the last block's text ends in it."""
    streams = {"context_block": context, "x_block": x}
    width = x.shape[-1]
    size = width // heads
    parts, projected = {}, {}
    for name, tokens in streams.items():
        parts[name] = linear(weights, f"{prefix}{name}.adaLN_modulation.1", silu(c)).split(width, dim=1)
        shift, scale = parts[name][:2]
        normed = modulated(tokens, shift, scale)
        projected[name] = linear(weights, f"{prefix}{name}.attn.qkv", normed).split(width, dim=-1)
    results: list[Tensor | None] = []
    for name, tokens in streams.items():
        if len(parts[name]) == 2:
            results.append(None)
            continue
        queries = projected[name][0]
        attended = torch.zeros_like(tokens)
        for h in range(heads):
            own = slice(h * size, (h + 1) * size)
            keys = torch.cat([projected[stream][1][..., own] for stream in streams], dim=1)
            values = torch.cat([projected[stream][2][..., own] for stream in streams], dim=1)
            for i in range(tokens.shape[1]):
                logits = (keys * queries[:, i : i + 1, own]).sum(-1) / math.sqrt(size)  # (N, L + T)
                odds = torch.exp(logits - logits.max(1, keepdim=True).values)
                attended[:, i, own] = (odds[..., None] * values).sum(1) / odds.sum(1, keepdim=True)
        _, _, gate, shift, scale, mlp_gate = parts[name]
        tokens = tokens + gate[:, None] * linear(weights, f"{prefix}{name}.attn.proj", attended)
        hidden = gelu(linear(weights, f"{prefix}{name}.mlp.fc1", modulated(tokens, shift, scale)))
        results.append(tokens + mlp_gate[:, None] * linear(weights, f"{prefix}{name}.mlp.fc2", hidden))
    return results[0], results[1]


def plain_forward(weights: dict[str, Tensor], x: Tensor, t: Tensor, context: Tensor, *, heads: int) -> Tensor:
    """The whole model from its state dict."""
    tokens, c = embedded(weights, x, t)
    text = linear(weights, "context_embedder", context)
    for i in range(TINY["depth"]):
        text, tokens = plain_joint_block(weights, f"joint_blocks.{i}.", text, tokens, c, heads=heads)
    return decoded(weights, tokens, c, x)


def test_forward_equals_the_plain_formula(generator: torch.Generator) -> None:
    model = tiny_mmdit(generator)
    x, t, context = inputs(generator)
    output = model(x, t, context=context)
    assert output.shape == x.shape
    torch.testing.assert_close(output, plain_forward(model.state_dict(), x, t, context, heads=2), rtol=1e-4, atol=1e-4)


def test_parameter_names_and_shapes_of_the_published_size_are_the_references() -> None:
    with torch.device("meta"):
        model = MMDiT()
    weights = {"t_embedder.mlp.0": (768, 256), "t_embedder.mlp.2": (768, 768), "context_embedder": (768, 768)}
    weights |= {"final_layer.linear": (16, 768), "final_layer.adaLN_modulation.1": (1536, 768)}
    for i in range(24):
        for stream in ("context_block", "x_block"):
            last_text = i == 23 and stream == "context_block"
            sizes = {"attn.qkv": (2304, 768), "adaLN_modulation.1": (1536 if last_text else 4608, 768)}
            if not last_text:
                sizes |= {"attn.proj": (768, 768), "mlp.fc1": (3072, 768), "mlp.fc2": (768, 3072)}
            weights |= {f"joint_blocks.{i}.{stream}.{name}": size for name, size in sizes.items()}
    expected = {f"{name}.weight": size for name, size in weights.items()}
    expected |= {f"{name}.bias": size[:1] for name, size in weights.items()}
    expected |= {"pos_embed": (1, 256, 768), "x_embedder.proj.weight": (768, 4, 2, 2), "x_embedder.proj.bias": (768,)}
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == expected
    assert model.joint_blocks[0].num_heads == 24
    assert "pos_embed" not in dict(model.named_parameters())  # fixed, as in the reference


def test_initial_weights(generator: torch.Generator) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MMDiT(**(TINY | {"hidden_size": 128, "context_size": 64}))
    rest = check_initial_weights(model.state_dict(), ["t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight"])
    assert {"context_embedder.weight", "joint_blocks.2.context_block.attn.qkv.weight"} <= rest
    assert not MMDiT(**TINY)(*inputs(generator)).any()  # so an untrained model predicts zero


def test_every_parameter_has_a_gradient(generator: torch.Generator) -> None:
    # The last block's text stops before its attention's output, or DDP would wait for parameters that nothing reads.
    model = tiny_mmdit(generator)
    model(*inputs(generator)).square().mean().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_what_does_not_fit_is_named(generator: torch.Generator) -> None:
    x, t, _ = inputs(generator)
    with pytest.raises(Mistake, match=r"takes text features \(N, L, 6\).\nFound: .3, 5, 7(.|\n)*context_size"):
        tiny_mmdit(generator)(x, t, torch.zeros(3, 5, 7))
    with pytest.raises(Mistake, match="divisible by patch_size"):
        MMDiT(**(TINY | {"input_size": 9}))
