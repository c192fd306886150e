"""Recipes: the published settings by name, and the published rule on models of many shapes."""

from typing import Any

import diffusers
import pytest
import torch
from plain import refused
from torch import nn

from selftrans_reg.errors import SelfTransError
from selftrans_reg.recipes import Recipe, find_blocks, recipe


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)


class CaptionEmbedder(Block):
    """PixArt's, behind an argument that is called y."""


def model_of(**parts: int | nn.Module) -> nn.Module:
    """A model with lists of so many blocks, or other modules, under these names."""
    model = nn.Module()
    for name, part in parts.items():
        setattr(model, name, part if isinstance(part, nn.Module) else nn.ModuleList(Block() for _ in range(part)))
    return model


def layers_of(plan: Recipe) -> str:
    return f"{plan.stage1_layer} {plan.student_layer} {plan.teacher_layer}"


@pytest.mark.parametrize(
    ("name", "layers", "scale", "window", "steps"),
    [  # steps of stage 2 with the alignment, and of stage 1, in thousands
        ("SiT-B/2", "blocks.1 blocks.5 blocks.7", 30, (0.4, 0.7), (100, 200)),
        ("SiT-L/1", "blocks.1 blocks.11 blocks.15", 30, (0.4, 0.7), (50, 200)),
        ("DiT-XL/2", "blocks.1 blocks.13 blocks.17", 30, (0.4, 0.7), (50, 200)),
        ("LightningDiT-XL/1", "blocks.1 blocks.13 blocks.17", 10, (0.4, 0.7), (50, 200)),
        ("MMDiT", "joint_blocks.3 joint_blocks.11 joint_blocks.15", 5, None, (50, 150)),
    ],
)
def test_published_settings(
    name: str, layers: str, scale: float, window: tuple[float, float] | None, steps: tuple[int, int]
) -> None:
    plan, released = recipe(name), recipe(name, variant="released")
    first, student, teacher = layers.split()
    shared = {"weight": 0.5, "window": window, "gating": "per-sample", "distance": "mse"}
    assert plan.stage1() == {"layer": first, "target": "latents", **shared}
    assert plan.stage2() == {"layer": student, "stop_step": 1000 * steps[0], **shared}
    assert plan.teacher() == released.teacher() == {"layer": teacher, "guidance_scale": scale}
    assert (plan.name, plan.stage1_steps) == (name, 1000 * steps[1])
    assert released.stage1() == plan.stage1() | {"target": "velocity", "gating": "released"}
    assert released.stage2() == plan.stage2() | {"gating": "released"}


@pytest.mark.parametrize(
    ("model", "arguments", "error"),
    [
        ("sit-xl/2", {}, "Nearest: 'SiT-XL/2'"),
        ("SiT-B/2", {"variant": "code"}, "variant must be one of 'paper', 'released'; got 'code'"),
        ("SiT-B/2", {"blocks": "blocks"}, "blocks names the lists of blocks of a live model; 'SiT-B/2' is a name"),
        (model_of(blocks=12, refiner=8), {"blocks": "refiners"}, "no layer 'refiners'"),
        (model_of(blocks=2), {}, "at least 3 blocks that see the whole image; Module has 2: 'blocks.0'"),
        # blocks that are not certain
        (model_of(linear=nn.Linear(2, 2)), {}, "Seen: no numbered layers"),
        (model_of(a=model_of(blocks=6), b=model_of(blocks=6)), {}, "a.blocks (6 Block), b.blocks (6 Block)"),
        (model_of(blocks=12, refiner=8), {}, "blocks (12 Block), refiner (8 Block)"),
        (model_of(layers=nn.ModuleList([Block(), Block(), CaptionEmbedder()])), {}, "(3 Block / CaptionEmbedder)"),
        (model_of(mlp=nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))), {}, "mlp (2 Linear)"),
    ],
)
def test_what_has_no_recipe_is_an_error(model: Any, arguments: dict[str, Any], error: str) -> None:
    with refused(SelfTransError, error):
        recipe(model, **arguments)


@pytest.mark.parametrize("depth", [3, 9, 12, 17, 18, 28])
def test_rule_on_a_live_model(depth: int) -> None:
    plan = recipe(model_of(blocks=depth))
    assert layers_of(plan) == " ".join(f"blocks.{layer - 1}" for layer in (2, depth // 2, int(2 * depth / 3)))
    assert (plan.depth, plan.stop_step) == (depth, 100_000 if depth < 18 else 50_000)
    assert plan.guidance_scale == (8 if depth < 12 else 30)
    assert ("Does it work?" in str(plan)) == (depth < 12)


NORMS, HEAD = nn.ModuleList(nn.LayerNorm(2) for _ in range(4)), nn.Sequential(Block(), Block())


@pytest.mark.parametrize(
    ("model", "layers"),
    [  # U-ViT, 13 deep: the student's layer 6, the teacher's 8
        (model_of(in_blocks=6, mid_block=Block(), out_blocks=6), "in_blocks.1 in_blocks.5 out_blocks.0"),
        (model_of(in_blocks=1, mid_block=Block(), out_blocks=1), "mid_block in_blocks.0 mid_block"),
        # MDTv2, whose side block runs only while it masks; MaskDiT, of whose blocks the first see a masked image
        (
            model_of(en_inblocks=2, en_outblocks=1, de_blocks=2, sideblocks=1),
            "en_inblocks.1 en_inblocks.1 en_outblocks.0",
        ),
        (model_of(blocks=28, decoder_blocks=8), "decoder_blocks.1 decoder_blocks.3 decoder_blocks.4"),
        # HiDream, and Latte, whose temporal blocks run in turn with the others
        (
            model_of(double_stream_blocks=2, single_stream_blocks=4, caption_projection=6),
            "double_stream_blocks.1 single_stream_blocks.0 single_stream_blocks.1",
        ),
        (model_of(layers=6, temporal_transformer_blocks=6), "layers.1 layers.2 layers.3"),
        (model_of(layers=26, noise_refiner=2, context_refiner=2), "layers.1 layers.12 layers.16"),
        (model_of(blocks=4, norms=NORMS, head=HEAD), "blocks.1 blocks.1 blocks.1"),
    ],
)
def test_blocks_are_found_in_running_order(model: nn.Module, layers: str) -> None:
    assert layers_of(recipe(model)) == layers


def test_blocks_may_be_named() -> None:
    model = model_of(blocks=12, refiner=8, stem=Block())
    assert layers_of(recipe(model, blocks="refiner")) == "refiner.1 refiner.3 refiner.4"
    assert layers_of(recipe(model, blocks=["stem", "refiner", "blocks"])) == "refiner.0 blocks.0 blocks.4"


def test_in_a_unet_student_and_teacher_have_one_resolution() -> None:
    """As in EDM2, whose encoder and decoder hold their blocks in dictionaries."""
    enc = {f"{size}x{size}_block{i}": Block() for size in (64, 32, 16, 8) for i in range(3)}
    dec = {f"{size}x{size}_block{i}": Block() for size in (8, 16, 32, 64) for i in range(4)}
    unet = model_of(enc=nn.ModuleDict({"64x64_conv": nn.Conv2d(4, 2, 3)} | enc), dec=nn.ModuleDict(dec))
    plan = recipe(model_of(unet=unet))
    assert (plan.depth, layers_of(plan)) == (28, "unet.enc.64x64_block1 unet.enc.16x16_block2 unet.dec.16x16_block1")
    assert plan.reasons["student_layer"] == "layer 9, the last up to depth // 2 of the teacher's resolution"


@pytest.mark.parametrize(("depth", "first"), [(4, 2), (24, 4), (60, 10)])
@pytest.mark.parametrize("by", ["argument", "part"])
def test_a_model_of_text_gets_the_guidance_of_text_to_image(depth: int, first: int, by: str) -> None:
    model = model_of(blocks=depth, **({"y_embedder": CaptionEmbedder()} if by == "part" else {}))
    if by == "argument":
        model.forward = lambda x, timestep, encoder_hidden_states: x
    plan = recipe(model)
    assert (plan.guidance_scale, plan.window, plan.stop_step, plan.stage1_steps) == (5.0, None, 50_000, 150_000)
    assert layers_of(plan) == " ".join(f"blocks.{i - 1}" for i in (first, depth // 2, 2 * depth // 3))


@pytest.mark.parametrize(
    ("name", "lists", "scale"),
    [
        ("DiTTransformer2DModel", {"transformer_blocks": 28}, 30),
        ("FluxTransformer2DModel", {"transformer_blocks": 19, "single_transformer_blocks": 38}, 5),
        ("AuraFlowTransformer2DModel", {"joint_transformer_blocks": 4, "single_transformer_blocks": 32}, 5),
        ("ConsisIDTransformer3DModel", {"transformer_blocks": 30}, 5),
        ("Kandinsky5Transformer3DModel", {"visual_transformer_blocks": 32}, 5),
    ],
)
def test_diffusers_models(name: str, lists: dict[str, int], scale: float) -> None:
    with torch.device("meta"):
        model = getattr(diffusers, name)()
    assert find_blocks(model, None) == [f"{name}.{index}" for name, depth in lists.items() for index in range(depth)]
    assert recipe(model).guidance_scale == scale
