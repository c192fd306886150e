"""The examples' MMDiT: the reference's names and shapes, a plain formula of the whole function."""

import plain_transformers as plain
import pytest
import torch
from common.mmdit import MMDiT
from common.options import Mistake
from torch import Tensor

TINY = {
    "input_size": 8, "patch_size": 2, "in_channels": 3, "hidden_size": 16, "depth": 3, "num_heads": 2,
    "context_size": 6,
}  # fmt: skip


def inputs(generator: torch.Generator, rows: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(rows, 3, 8, 8, generator=generator)
    return x, torch.rand(rows, generator=generator), torch.randn(rows, 5, 6, generator=generator)


def plain_forward(weights: plain.Weights, x: Tensor, t: Tensor, context: Tensor, *, heads: int) -> Tensor:
    """MMDiT from its state dict alone; the last block's text ends in its attention."""
    tokens, c = plain.embedded(weights, x, t)
    streams = {"context_block": plain.linear(weights, "context_embedder", context), "x_block": tokens}
    for i in range(TINY["depth"]):
        found = {name: plain.projected(weights, f"joint_blocks.{i}.{name}", streams[name], c) for name in streams}
        keys, values = (torch.cat([qkv[j] for _, qkv in found.values()], dim=1) for j in (1, 2))
        for name, (parts, qkv) in found.items():
            if len(parts) == 6:
                attention = plain.attended(qkv[0], keys, values, heads)
                streams[name] = plain.completed(weights, f"joint_blocks.{i}.{name}", streams[name], attention, parts)
    return plain.decoded(weights, streams["x_block"], c, x)


def test_forward_equals_the_plain_formula(generator: torch.Generator) -> None:
    model = plain.perturbed(MMDiT(**TINY), generator)
    x, t, context = inputs(generator)
    output = model(x, t, context=context)
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
    rest = plain.check_initial_weights(model.state_dict(), ["t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight"])
    assert {"context_embedder.weight", "joint_blocks.2.context_block.attn.qkv.weight"} <= rest
    assert not MMDiT(**TINY)(*inputs(generator)).any()  # so an untrained model predicts zero


def test_text_of_another_width_is_named(generator: torch.Generator) -> None:
    x, t, _ = inputs(generator)
    with pytest.raises(Mistake, match=r"takes text features \(N, L, 6\).\nFound: .3, 5, 7(.|\n)*context_size"):
        MMDiT(**TINY)(x, t, torch.zeros(3, 5, 7))
