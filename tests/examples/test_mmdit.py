"""The examples' MMDiT: the reference's names and shapes, a plain formula of the whole function, its image stream."""

import math

import pytest
import torch
from common.mmdit import JointBlock, MMDiT
from common.options import Mistake
from torch import Tensor

import selftrans_reg as st

TINY = {
    "input_size": 8, "patch_size": 2, "in_channels": 3, "hidden_size": 16, "depth": 3, "num_heads": 2,
    "context_size": 6,
}  # fmt: skip


def perturbed(model: torch.nn.Module, generator: torch.Generator) -> torch.nn.Module:
    """The model with no zero-initialised parameter, so that no term of the formula vanishes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def tiny_mmdit(generator: torch.Generator, **settings: object) -> MMDiT:
    return perturbed(MMDiT(**(TINY | settings)), generator)


def inputs(generator: torch.Generator, rows: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(rows, 3, 8, 8, generator=generator)
    return x, torch.rand(rows, generator=generator), torch.randn(rows, 5, 6, generator=generator)


def plain_norm(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def plain_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def linear(weights: dict[str, Tensor], name: str, value: Tensor) -> Tensor:
    return value @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


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
        normed = plain_norm(tokens) * (1 + scale[:, None]) + shift[:, None]
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
        normed = plain_norm(tokens) * (1 + scale[:, None]) + shift[:, None]
        hidden = plain_gelu(linear(weights, f"{prefix}{name}.mlp.fc1", normed))
        results.append(tokens + mlp_gate[:, None] * linear(weights, f"{prefix}{name}.mlp.fc2", hidden))
    return results[0], results[1]


def plain_forward(weights: dict[str, Tensor], x: Tensor, t: Tensor, context: Tensor, *, heads: int) -> Tensor:
    """The whole model from its state dict."""
    n, channels, side, _ = x.shape
    kernel = weights["x_embedder.proj.weight"]
    p = kernel.shape[-1]
    grid = [(i, j) for i in range(side // p) for j in range(side // p)]
    patches = [x[:, :, p * i : p * i + p, p * j : p * j + p] for i, j in grid]
    tokens = torch.stack([torch.einsum("nchw,dchw->nd", patch, kernel) for patch in patches], dim=1)
    tokens = tokens + weights["x_embedder.proj.bias"] + weights["pos_embed"]
    angles = torch.stack([t * 10_000 ** (-k / 128) for k in range(128)], dim=1)
    embedded = torch.cat([angles.cos(), angles.sin()], dim=1)
    c = linear(weights, "t_embedder.mlp.2", silu(linear(weights, "t_embedder.mlp.0", embedded)))
    text = linear(weights, "context_embedder", context)
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("joint_blocks."))
    for i in range(depth):
        text, tokens = plain_joint_block(weights, f"joint_blocks.{i}.", text, tokens, c, heads=heads)
    shift, scale = linear(weights, "final_layer.adaLN_modulation.1", silu(c)).split(tokens.shape[-1], dim=1)
    flat = linear(weights, "final_layer.linear", plain_norm(tokens) * (1 + scale[:, None]) + shift[:, None])
    image = torch.empty_like(x)
    for number, (i, j) in enumerate(grid):
        patch = flat[:, number].reshape(n, p, p, channels)  # channel innermost
        image[:, :, p * i : p * i + p, p * j : p * j + p] = patch.permute(0, 3, 1, 2)
    return image


@pytest.mark.parametrize("context_pre_only", [False, True])
def test_a_joint_block_equals_the_plain_formula(generator: torch.Generator, context_pre_only: bool) -> None:
    block = perturbed(JointBlock(16, 2, context_pre_only=context_pre_only), generator)
    context, x, c = (torch.randn(2, *shape, generator=generator) for shape in [(5, 16), (9, 16), (16,)])
    text, image = block(context, x, c=c)
    expected_text, expected_image = plain_joint_block(block.state_dict(), "", context, x, c, heads=2)
    torch.testing.assert_close(image, expected_image, rtol=1e-4, atol=1e-5)
    if context_pre_only:
        assert text is None
    else:
        torch.testing.assert_close(text, expected_text, rtol=1e-4, atol=1e-5)


def test_forward_equals_the_plain_formula(generator: torch.Generator) -> None:
    model = tiny_mmdit(generator)
    x, t, context = inputs(generator)
    output = model(x, t, context=context)
    assert output.shape == x.shape
    torch.testing.assert_close(output, plain_forward(model.state_dict(), x, t, context, heads=2), rtol=1e-4, atol=1e-4)


def test_parameter_names_and_shapes_of_the_published_size_are_the_references() -> None:
    with torch.device("meta"):
        model = MMDiT()
    expected = {
        "pos_embed": (1, 256, 768),
        "x_embedder.proj.weight": (768, 4, 2, 2),
        "x_embedder.proj.bias": (768,),
        "t_embedder.mlp.0.weight": (768, 256),
        "t_embedder.mlp.0.bias": (768,),
        "t_embedder.mlp.2.weight": (768, 768),
        "t_embedder.mlp.2.bias": (768,),
        "context_embedder.weight": (768, 768),
        "context_embedder.bias": (768,),
        "final_layer.linear.weight": (16, 768),
        "final_layer.linear.bias": (16,),
        "final_layer.adaLN_modulation.1.weight": (1536, 768),
        "final_layer.adaLN_modulation.1.bias": (1536,),
    }
    for i in range(24):
        for stream in ("context_block", "x_block"):
            last_text = i == 23 and stream == "context_block"
            sizes = {"attn.qkv": (2304, 768), "adaLN_modulation.1": (1536 if last_text else 4608, 768)}
            if not last_text:
                sizes |= {"attn.proj": (768, 768), "mlp.fc1": (3072, 768), "mlp.fc2": (768, 3072)}
            for name, size in sizes.items():
                expected[f"joint_blocks.{i}.{stream}.{name}.weight"] = size
                expected[f"joint_blocks.{i}.{stream}.{name}.bias"] = size[:1]
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == expected
    assert model.joint_blocks[0].num_heads == 24
    assert "pos_embed" not in dict(model.named_parameters())  # fixed, as in the reference


def test_initial_weights(generator: torch.Generator) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MMDiT(**(TINY | {"hidden_size": 128, "context_size": 64}))
    state = {name: value for name, value in model.state_dict().items() if name != "pos_embed"}
    zero = [name for name in state if "adaLN" in name or name.startswith("final_layer.linear")]
    zero += [name for name in state if name.endswith(".bias")]
    normal = ["t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight"]
    for name in zero:
        assert not state[name].any(), name
    for name in normal:  # thousands of draws: the estimate of the deviation is good to a few per cent
        assert state[name].std().item() == pytest.approx(0.02, rel=0.05), name
    rest = [name for name in state if name not in {*zero, *normal}]
    assert {"context_embedder.weight", "joint_blocks.2.context_block.attn.qkv.weight"} <= set(rest)
    for name in rest:
        weight = state[name].flatten(1)
        bound = math.sqrt(6 / (weight.shape[0] + weight.shape[1]))  # Xavier-uniform
        assert weight.abs().max().item() <= bound, name
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.06), name
    x, t, context = inputs(generator)
    assert not MMDiT(**TINY)(x, t, context).any()  # so an untrained model predicts zero


def test_every_parameter_has_a_gradient(generator: torch.Generator) -> None:
    # The last block's text stops before its attention's output, or DDP would wait for parameters that nothing reads.
    model = tiny_mmdit(generator)
    model(*inputs(generator)).square().mean().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_the_published_settings_name_layers_of_this_model() -> None:
    plan = st.recipe("MMDiT")
    with torch.device("meta"):
        layers = dict(MMDiT().named_modules())
    for name in (plan.stage1_layer, plan.student_layer, plan.teacher_layer):
        assert isinstance(layers[name], JointBlock), name


def test_the_image_stream_is_what_both_stages_see(generator: torch.Generator) -> None:
    x, t, context = inputs(generator)
    empty = torch.randn(5, 6, generator=generator)
    student, source = tiny_mmdit(generator), tiny_mmdit(generator)
    teacher = st.build_teacher(
        MMDiT(**TINY),
        source.state_dict(),
        layer="joint_blocks.1",
        select=1,
        guidance_scale=5.0,
        null={"context": empty},
    )

    def image_tokens(text: Tensor) -> Tensor:
        seen: list[Tensor] = []
        hook = source.joint_blocks[1].register_forward_hook(lambda module, args, output: seen.append(output[1]))
        source(x, t, context=text)
        hook.remove()
        return seen[0].detach()

    conditional, unconditional = image_tokens(context), image_tokens(empty.expand(3, 5, 6))
    guided = teacher(x, t, context=context)
    expected = unconditional + 5 * (conditional - unconditional)
    # A difference of large features, five times: float32 leaves that much.
    torch.testing.assert_close(guided, expected, rtol=0, atol=1e-4 * expected.abs().max().item())

    criterion = st.SelfTransLoss.stage2(
        student, layer="joint_blocks.0", select=1, teacher=teacher, time="repa", window=None, hidden_features=8
    ).train()
    terms = criterion(student(x, t, context=context).square().mean(), step=0)
    with st.FeatureTap(student, "joint_blocks.0", select=1) as tap:
        student.eval()(x, t, context=context)
        tokens = tap.pop()
    plain = (criterion.heads[0](tokens) - guided).square().mean()
    torch.testing.assert_close(terms.alignment, plain.detach(), rtol=1e-4, atol=0)
    alignment = terms.total - terms.denoising
    (gradient,) = torch.autograd.grad(alignment, student.joint_blocks[0].x_block.attn.qkv.weight)
    assert gradient.any()


@pytest.mark.parametrize("shape", [(3, 5, 7), (3, 6)])
def test_text_features_of_another_width_are_named(generator: torch.Generator, shape: tuple[int, ...]) -> None:
    x, t, _ = inputs(generator)
    for match in [r"takes text features \(N, L, 6\)", f"Found: .{', '.join(map(str, shape))}", "context_size"]:
        with pytest.raises(Mistake, match=match):
            tiny_mmdit(generator)(x, t, torch.zeros(shape))


def test_sizes_that_do_not_divide_are_named() -> None:
    for match in ["divisible by patch_size", "input_size=9, patch_size=2, hidden_size=16, num_heads=2"]:
        with pytest.raises(Mistake, match=match):
            MMDiT(**(TINY | {"input_size": 9}))
