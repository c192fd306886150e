"""The examples' SiT against the field's: names, shapes, initial weights, and a plain formula of the whole function."""

import plain_transformers as plain
import pytest
import torch
from common.options import Mistake
from common.sit import SIZES, SiT, build_sit, sincos_position_embedding
from torch import Tensor

TINY = {
    "input_size": 8, "patch_size": 2, "in_channels": 3, "hidden_size": 16, "depth": 2, "num_heads": 2, "num_classes": 5,
}  # fmt: skip


def inputs(generator: torch.Generator, rows: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(rows, 3, 8, 8, generator=generator)
    return x, torch.rand(rows, generator=generator), torch.tensor([0, 4, 5])[:rows]


def plain_forward(weights: plain.Weights, x: Tensor, t: Tensor, y: Tensor, *, heads: int) -> Tensor:
    """SiT from the state dict alone."""
    tokens, c = plain.embedded(weights, x, t)
    c = c + weights["y_embedder.embedding_table.weight"][y]
    for block in sorted({name.rpartition(".attn.qkv.")[0] for name in weights if ".attn.qkv." in name}):
        parts, (*queries_and_keys, v) = plain.projected(weights, block, tokens, c)
        for i, name in enumerate(("q_norm", "k_norm")):
            if f"{block}.attn.{name}.weight" in weights:
                scale, shift = (weights[f"{block}.attn.{name}.{kind}"] for kind in ("weight", "bias"))
                by_head = plain.norm(queries_and_keys[i].unflatten(-1, (heads, -1)), eps=1e-5)
                queries_and_keys[i] = (by_head * scale + shift).flatten(-2)
        tokens = plain.completed(weights, block, tokens, plain.attended(*queries_and_keys, v, heads), parts)
    return plain.decoded(weights, tokens, c, x)


@pytest.mark.parametrize("settings", [{}, {"learn_sigma": False, "patch_size": 4}, {"qk_norm": True, "patch_size": 1}])
def test_forward_equals_the_plain_formula(generator: torch.Generator, settings: dict[str, object]) -> None:
    model = plain.perturbed(SiT(**(TINY | settings)), generator).eval()
    x, t, y = inputs(generator)
    expected = plain_forward(model.state_dict(), x, t, y, heads=2)
    torch.testing.assert_close(model(x, t, y), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("grid", "width"), [(4, 16), (3, 8)])
def test_position_embedding_equals_its_definition(grid: int, width: int) -> None:
    frequencies = torch.tensor([10_000 ** (-k / (width // 4)) for k in range(width // 4)], dtype=torch.float64)
    expected = torch.empty(1, grid * grid, width)
    for row in range(grid):
        for column in range(grid):
            parts = [f(place * frequencies) for place in (column, row) for f in (torch.sin, torch.cos)]
            expected[0, row * grid + column] = torch.cat(parts)
    torch.testing.assert_close(sincos_position_embedding(width, grid), expected)


def test_parameter_names_and_shapes_of_b2_are_the_fields() -> None:
    with torch.device("meta"):
        model = build_sit("SiT-B/2")
    assert sum(parameter.numel() for parameter in model.parameters()) == 130_512_416
    weights = {"t_embedder.mlp.0": (768, 256), "t_embedder.mlp.2": (768, 768), "final_layer.linear": (32, 768)}
    weights |= {"final_layer.adaLN_modulation.1": (1536, 768)}
    sizes = {"attn.qkv": (2304, 768), "attn.proj": (768, 768), "mlp.fc1": (3072, 768), "mlp.fc2": (768, 3072)}
    sizes |= {"adaLN_modulation.1": (4608, 768)}
    weights |= {f"blocks.{i}.{name}": size for i in range(12) for name, size in sizes.items()}
    expected = {f"{name}.weight": size for name, size in weights.items()}
    expected |= {f"{name}.bias": size[:1] for name, size in weights.items()}
    expected |= {"pos_embed": (1, 256, 768), "y_embedder.embedding_table.weight": (1001, 768)}
    expected |= {"x_embedder.proj.weight": (768, 4, 2, 2), "x_embedder.proj.bias": (768,)}
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == expected


def test_initial_weights(generator: torch.Generator) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SiT(hidden_size=128, depth=2, num_heads=4, input_size=16)
    normal = ["y_embedder.embedding_table.weight", "t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight"]
    rest = plain.check_initial_weights(model.state_dict(), normal)
    assert {"blocks.1.mlp.fc2.weight", "x_embedder.proj.weight"} <= rest
    assert not model.pos_embed.requires_grad
    assert not SiT(**TINY)(*inputs(generator)).any()  # so an untrained model predicts zero


def test_labels_become_the_null_class_only_in_training_and_as_often_as_asked(generator: torch.Generator) -> None:
    embedder = plain.perturbed(SiT(**TINY, class_dropout_prob=0.3), generator).y_embedder
    labels = torch.arange(5).repeat(2_000)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = embedder.train()(labels)
    dropped = (found == embedder.embedding_table.weight[5]).all(1)
    # 10,000 draws: the standard deviation of the fraction is 0.0046.
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert torch.equal(found[~dropped], embedder.embedding_table.weight[labels[~dropped]])
    torch.testing.assert_close(embedder.eval()(labels), embedder.embedding_table.weight[labels])


def test_the_sizes_are_the_published_ones_and_others_are_named() -> None:
    assert SIZES == {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
    with pytest.raises(Mistake, match=r"divisible by patch_size(.|\n)*input_size=9, patch_size=2"):
        SiT(**(TINY | {"input_size": 9}))
    with pytest.raises(Mistake, match=r"no SiT named 'SiT-H/2'.\nKnown: SiT-S/2, SiT-S/4(.|\n)*SiT-XL/8"):
        build_sit("SiT-H/2")
