"""Recipes: the published settings by name, and the published rule on models of many shapes."""

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from selftrans_reg.errors import LayerNotFoundError, SettingError
from selftrans_reg.recipes import Recipe, find_blocks, recipe


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)


class OtherBlock(Block):
    pass


def model_of(**parts: int | nn.Module) -> nn.Module:
    """A model with lists of so many blocks, or other modules, under these names."""
    model = nn.Module()
    for name, part in parts.items():
        setattr(model, name, part if isinstance(part, nn.Module) else nn.ModuleList(Block() for _ in range(part)))
    return model


def layers_of(plan: Recipe) -> str:
    return f"{plan.stage1_layer} {plan.student_layer} {plan.teacher_layer}"


@pytest.mark.parametrize(
    ("name", "layers", "scale", "window", "stop_step", "stage1_steps"),
    [
        ("SiT-B/2", "blocks.1 blocks.5 blocks.7", 30, (0.4, 0.7), 100_000, 200_000),
        ("SiT-L/1", "blocks.1 blocks.11 blocks.15", 30, (0.4, 0.7), 50_000, 200_000),
        ("DiT-XL/2", "blocks.1 blocks.13 blocks.17", 30, (0.4, 0.7), 50_000, 200_000),
        ("LightningDiT-XL/1", "blocks.1 blocks.13 blocks.17", 10, (0.4, 0.7), 50_000, 200_000),
        ("MMDiT", "joint_blocks.3 joint_blocks.11 joint_blocks.15", 5, None, 50_000, 150_000),
    ],
)
def test_published_settings(
    name: str, layers: str, scale: float, window: tuple[float, float] | None, stop_step: int, stage1_steps: int
) -> None:
    plan, released = recipe(name), recipe(name, variant="released")
    first, student, teacher = layers.split()
    shared = {"weight": 0.5, "window": window, "gating": "per-sample", "distance": "mse"}
    assert plan.stage1() == {"layer": first, "target": "latents", **shared}
    assert plan.stage2() == {"layer": student, "stop_step": stop_step, **shared}
    assert plan.teacher() == released.teacher() == {"layer": teacher, "guidance_scale": scale}
    assert (plan.name, plan.stage1_steps) == (name, stage1_steps)
    assert released.stage1() == plan.stage1() | {"target": "velocity", "gating": "released"}
    assert released.stage2() == plan.stage2() | {"gating": "released"}


@pytest.mark.parametrize(
    ("model", "arguments", "error"),
    [
        ("SiT-B2", {}, "No recipe is called 'SiT-B2'.\nKnown: 'SiT-S/1', "),
        ("sit-xl/2", {}, "Nearest: 'SiT-XL/2'"),
        (12, {}, "No recipe is called 12"),
        ("SiT-B/2", {"variant": "code"}, "variant must be one of 'paper', 'released'; got 'code'"),
        ("SiT-B/2", {"blocks": "blocks"}, "blocks names the lists of blocks of a live model; 'SiT-B/2' is a name"),
        (model_of(blocks=2), {}, "at least 3 blocks that see the whole image; Module has 2: 'blocks.0'"),
        # blocks that are not certain
        (model_of(linear=nn.Linear(2, 2)), {}, "Seen: no numbered layers"),
        (model_of(a=model_of(blocks=6), b=model_of(blocks=6)), {}, "a.blocks (6 Block), b.blocks (6 Block)"),
        (model_of(blocks=12, refiner=8), {}, "blocks (12 Block), refiner (8 Block)"),
        (model_of(layers=nn.ModuleList([Block(), OtherBlock(), Block()])), {}, "layers (3 Block / OtherBlock)"),
        (model_of(mlp=nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))), {}, "mlp (2 Linear)"),
    ],
)
def test_what_has_no_recipe_is_an_error(model: Any, arguments: dict[str, Any], error: str) -> None:
    with pytest.raises(SettingError) as raised:
        recipe(model, **arguments)
    assert error in str(raised.value)


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
            model_of(en_inblocks=4, en_outblocks=4, de_blocks=4, sideblocks=1),
            "en_inblocks.1 en_outblocks.1 en_outblocks.3",
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
    with pytest.raises(LayerNotFoundError, match="no layer 'refiners'"):
        recipe(model, blocks="refiners")


def test_in_a_unet_student_and_teacher_have_one_resolution() -> None:
    """EDM2's encoder and decoder by the names of its networks for 64×64 latents."""
    enc, dec = nn.ModuleDict({"64x64_conv": nn.Conv2d(4, 2, 3)}), nn.ModuleDict()
    for size in (64, 32, 16, 8):
        enc.update({f"{size}x{size}_down": Block()} if size < 64 else {})
        enc.update({f"{size}x{size}_block{i}": Block() for i in range(3)})
    for size in (8, 16, 32, 64):
        dec.update({f"8x8_in{i}": Block() for i in range(2)} if size == 8 else {f"{size}x{size}_up": Block()})
        dec.update({f"{size}x{size}_block{i}": Block() for i in range(4)})
    plan = recipe(model_of(unet=model_of(enc=enc, dec=dec, out_conv=nn.Conv2d(2, 4, 3))))
    assert (plan.depth, layers_of(plan)) == (36, "unet.enc.64x64_block1 unet.enc.16x16_block2 unet.dec.16x16_block1")
    assert plan.reasons["student_layer"] == "layer 11, the last up to depth // 2 of the teacher's resolution"


class Captioned(nn.Module):
    """A model that is given text, as an argument of its forward."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return x


class CaptionEmbedder(Block):
    """PixArt's, behind an argument that is called y."""


@pytest.mark.parametrize(("depth", "first"), [(4, 2), (24, 4), (60, 10)])
@pytest.mark.parametrize("by", ["argument", "part"])
def test_a_model_of_text_gets_the_guidance_of_text_to_image(depth: int, first: int, by: str) -> None:
    plan = recipe(Captioned(depth) if by == "argument" else model_of(blocks=depth, y_embedder=CaptionEmbedder()))
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
