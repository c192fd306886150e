"""The examples' SiT against the field's: names, shapes, initial weights, and a plain formula of the whole function."""

import math

import pytest
import torch
from common.options import Mistake
from common.sit import SIZES, SiT, build_sit, sincos_position_embedding
from torch import Tensor

TINY = {
    "input_size": 8, "patch_size": 2, "in_channels": 3, "hidden_size": 16, "depth": 2, "num_heads": 2, "num_classes": 5,
}  # fmt: skip


def tiny_sit(generator: torch.Generator, **settings: object) -> SiT:
    """A SiT with no zero-initialised parameter, so that no term of the formula vanishes."""
    model = SiT(**(TINY | settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def inputs(generator: torch.Generator, rows: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(rows, 3, 8, 8, generator=generator)
    return x, torch.rand(rows, generator=generator), torch.tensor([0, 4, 5])[:rows]


def plain_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def plain_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def plain_forward(weights: dict[str, Tensor], x: Tensor, t: Tensor, y: Tensor, *, heads: int, qk_norm: bool) -> Tensor:
    """SiT token by token and head by head, from the state dict alone."""

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def silu(value: Tensor) -> Tensor:
        return value / (1 + torch.exp(-value))

    n, channels, side, _ = x.shape
    kernel = weights["x_embedder.proj.weight"]
    p, width = kernel.shape[-1], kernel.shape[0]
    grid = side // p
    tokens = torch.stack(
        [
            torch.einsum("nchw,dchw->nd", x[:, :, p * i : p * i + p, p * j : p * j + p], kernel)
            for i in range(grid)
            for j in range(grid)
        ],
        dim=1,
    )
    tokens = tokens + weights["x_embedder.proj.bias"] + weights["pos_embed"]

    angles = torch.stack([t * 10_000 ** (-k / 128) for k in range(128)], dim=1)
    embedded = torch.cat([angles.cos(), angles.sin()], dim=1)
    c = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", embedded)))
    c = c + weights["y_embedder.embedding_table.weight"][y]

    def modulated(value: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return plain_norm(value) * (1 + scale[:, None]) + shift[:, None]

    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    for i in range(depth):
        parts = linear(f"blocks.{i}.adaLN_modulation.1", silu(c)).split(width, dim=1)
        qkv = linear(f"blocks.{i}.attn.qkv", modulated(tokens, parts[0], parts[1]))
        q, k, v = qkv.split(width, dim=-1)
        size = width // heads
        attended = []
        for h in range(heads):
            qh, kh, vh = (part[..., h * size : (h + 1) * size] for part in (q, k, v))
            if qk_norm:
                names = [f"blocks.{i}.attn.{which}_norm" for which in "qk"]
                qh, kh = (
                    plain_norm(part, eps=1e-5) * weights[f"{name}.weight"] + weights[f"{name}.bias"]
                    for part, name in zip((qh, kh), names, strict=True)
                )
            attended.append((qh @ kh.mT / math.sqrt(size)).softmax(-1) @ vh)
        tokens = tokens + parts[2][:, None] * linear(f"blocks.{i}.attn.proj", torch.cat(attended, dim=-1))
        hidden = plain_gelu(linear(f"blocks.{i}.mlp.fc1", modulated(tokens, parts[3], parts[4])))
        tokens = tokens + parts[5][:, None] * linear(f"blocks.{i}.mlp.fc2", hidden)

    shift, scale = linear("final_layer.adaLN_modulation.1", silu(c)).split(width, dim=1)
    patches = linear("final_layer.linear", modulated(tokens, shift, scale))
    out_channels = patches.shape[-1] // p**2
    image = torch.empty(n, out_channels, side, side)
    for i in range(grid):
        for j in range(grid):
            patch = patches[:, i * grid + j].reshape(n, p, p, out_channels)  # channel innermost
            image[:, :, p * i : p * i + p, p * j : p * j + p] = patch.permute(0, 3, 1, 2)
    return image[:, :channels]


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_forward_equals_the_plain_formula(generator: torch.Generator, learn_sigma: bool, qk_norm: bool) -> None:
    model = tiny_sit(generator, learn_sigma=learn_sigma, qk_norm=qk_norm).eval()
    x, t, y = inputs(generator)
    expected = plain_forward(model.state_dict(), x, t, y, heads=2, qk_norm=qk_norm)
    actual = model(x, t, y)
    assert actual.shape == x.shape
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("patch_size", [1, 4, 8])
def test_other_patches_equal_the_plain_formula(generator: torch.Generator, patch_size: int) -> None:
    model = tiny_sit(generator, patch_size=patch_size, qk_norm=True).eval()
    x, t, y = inputs(generator)
    expected = plain_forward(model.state_dict(), x, t, y, heads=2, qk_norm=True)
    torch.testing.assert_close(model(x, t, y), expected, rtol=1e-4, atol=1e-4)


def test_in_training_a_dropped_label_is_the_null_class(generator: torch.Generator) -> None:
    model = tiny_sit(generator, class_dropout_prob=1 - 1e-7)  # all but certain
    x, t, y = inputs(generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dropped = model.train()(x, t, y)
    expected = plain_forward(model.state_dict(), x, t, torch.full_like(y, 5), heads=2, qk_norm=False)
    torch.testing.assert_close(dropped, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("grid", "width"), [(4, 16), (3, 8)])
def test_position_embedding_equals_its_definition(grid: int, width: int) -> None:
    expected = torch.zeros(1, grid * grid, width)
    quarter = width // 4
    for row in range(grid):
        for column in range(grid):
            for k in range(quarter):
                frequency = 10_000 ** (-k / quarter)
                values = [math.sin(column * frequency), math.cos(column * frequency)]
                values += [math.sin(row * frequency), math.cos(row * frequency)]
                for part, value in enumerate(values):
                    expected[0, row * grid + column, part * quarter + k] = value
    torch.testing.assert_close(sincos_position_embedding(width, grid), expected)


def test_parameter_names_and_shapes_of_b2_are_the_fields() -> None:
    with torch.device("meta"):
        model = build_sit("SiT-B/2")
    assert sum(parameter.numel() for parameter in model.parameters()) == 130_512_416
    expected = {
        "pos_embed": (1, 256, 768),
        "x_embedder.proj.weight": (768, 4, 2, 2),
        "x_embedder.proj.bias": (768,),
        "t_embedder.mlp.0.weight": (768, 256),
        "t_embedder.mlp.0.bias": (768,),
        "t_embedder.mlp.2.weight": (768, 768),
        "t_embedder.mlp.2.bias": (768,),
        "y_embedder.embedding_table.weight": (1001, 768),
        "final_layer.linear.weight": (32, 768),
        "final_layer.linear.bias": (32,),
        "final_layer.adaLN_modulation.1.weight": (1536, 768),
        "final_layer.adaLN_modulation.1.bias": (1536,),
    }
    for i in range(12):
        expected |= {
            f"blocks.{i}.attn.qkv.weight": (2304, 768),
            f"blocks.{i}.attn.qkv.bias": (2304,),
            f"blocks.{i}.attn.proj.weight": (768, 768),
            f"blocks.{i}.attn.proj.bias": (768,),
            f"blocks.{i}.mlp.fc1.weight": (3072, 768),
            f"blocks.{i}.mlp.fc1.bias": (3072,),
            f"blocks.{i}.mlp.fc2.weight": (768, 3072),
            f"blocks.{i}.mlp.fc2.bias": (768,),
            f"blocks.{i}.adaLN_modulation.1.weight": (4608, 768),
            f"blocks.{i}.adaLN_modulation.1.bias": (4608,),
        }
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == expected


def test_qk_norm_repas_output_and_no_dropout_change_only_their_own_parameters() -> None:
    with torch.device("meta"):
        plain = build_sit("SiT-B/2").state_dict()
        other = build_sit("SiT-B/2", qk_norm=True, learn_sigma=False, class_dropout_prob=0.0).state_dict()
    norms = {f"blocks.{i}.attn.{q}_norm.{w}" for i in range(12) for q in "qk" for w in ("weight", "bias")}
    assert set(other) - set(plain) == norms
    assert {tuple(other[name].shape) for name in norms} == {(64,)}
    changed = {name: tuple(other[name].shape) for name in plain if other[name].shape != plain[name].shape}
    assert changed == {
        "final_layer.linear.weight": (16, 768),
        "final_layer.linear.bias": (16,),
        "y_embedder.embedding_table.weight": (1000, 768),
    }


@pytest.mark.parametrize(("size", "depth", "width", "heads"), [(k, *v) for k, v in SIZES.items()])
def test_published_sizes(size: str, depth: int, width: int, heads: int) -> None:
    published = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
    with torch.device("meta"):
        model = build_sit(f"SiT-{size}/4")
    found = (len(model.blocks), model.pos_embed.shape[-1], model.blocks[0].attn.num_heads)
    assert found == published[size] == (depth, width, heads)
    assert model.pos_embed.shape[1] == (32 // 4) ** 2


def test_initial_weights() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SiT(hidden_size=128, depth=2, num_heads=4, input_size=16)
    state = model.state_dict()
    zero = [name for name in state if "adaLN" in name or name.startswith("final_layer.linear")]
    zero += [name for name in state if name.endswith(".bias")]
    for name in zero:
        assert not state[name].any(), name
    normal = ["y_embedder.embedding_table.weight", "t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight"]
    for name in normal:  # thousands of draws: the estimate of the deviation is good to a few per cent
        assert state[name].std().item() == pytest.approx(0.02, rel=0.05), name
        assert abs(state[name].mean().item()) < 1e-3, name
    rest = [name for name in state if name not in {*zero, *normal, "pos_embed"}]
    assert "blocks.1.mlp.fc2.weight" in rest
    assert "x_embedder.proj.weight" in rest
    for name in rest:
        weight = state[name].flatten(1)
        bound = math.sqrt(6 / (weight.shape[0] + weight.shape[1]))  # Xavier-uniform
        assert weight.abs().max().item() <= bound, name
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.06), name
    assert not model.pos_embed.requires_grad


def test_labels_are_dropped_only_in_training_and_as_often_as_asked(generator: torch.Generator) -> None:
    embedder = tiny_sit(generator, class_dropout_prob=0.3).y_embedder
    labels = torch.arange(5).repeat(2_000)
    null_row = embedder.embedding_table.weight[5]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dropped = (embedder.train()(labels) == null_row).all(1)
    # 10,000 draws: the standard deviation of the fraction is 0.0046.
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.02)
    torch.testing.assert_close(embedder.eval()(labels), embedder.embedding_table.weight[labels])


def test_an_untrained_sit_predicts_zero(generator: torch.Generator) -> None:
    assert not SiT(**TINY)(*inputs(generator)).any()


def test_bad_settings_are_named() -> None:
    for match in ["divisible by patch_size", "input_size=9, patch_size=2"]:
        with pytest.raises(Mistake, match=match):
            SiT(**(TINY | {"input_size": 9}))
    for match in ["no SiT named 'SiT-H/2'", "Known: SiT-S/2, SiT-S/4", "SiT-XL/8"]:
        with pytest.raises(Mistake, match=match):
            build_sit("SiT-H/2")
