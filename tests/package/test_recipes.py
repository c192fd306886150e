"""Recipes: the published settings by name, and the published rule on models of many shapes."""

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from toys import ToyDiT

from selftrans_reg import SelfTransLoss, build_teacher
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


def layers_of(plan: Recipe) -> tuple[str, str, str]:
    return plan.stage1_layer, plan.student_layer, plan.teacher_layer


@pytest.mark.parametrize(
    ("name", "layers", "scale", "window", "stop_step", "stage1_steps"),
    [
        ("SiT-S/2", (1, 5, 7), 30, (0.4, 0.7), 100_000, 200_000),
        ("SiT-L/1", (1, 11, 15), 30, (0.4, 0.7), 50_000, 200_000),
        ("DiT-B/8", (1, 5, 7), 30, (0.4, 0.7), 100_000, 200_000),
        ("DiT-XL/2", (1, 13, 17), 30, (0.4, 0.7), 50_000, 200_000),
        ("LightningDiT-XL/1", (1, 13, 17), 10, (0.4, 0.7), 50_000, 200_000),
        ("MMDiT", (3, 11, 15), 5, None, 50_000, 150_000),
    ],
)
def test_published_settings(
    name: str,
    layers: tuple[int, int, int],
    scale: float,
    window: tuple[float, float] | None,
    stop_step: int,
    stage1_steps: int,
) -> None:
    plan = recipe(name)
    first, student, teacher = (f"{'joint_' if name == 'MMDiT' else ''}blocks.{layer}" for layer in layers)
    shared = {"weight": 0.5, "window": window, "gating": "per-sample", "distance": "mse"}
    assert plan.stage1() == {"layer": first, "target": "latents", **shared}
    assert plan.stage2() == {"layer": student, "stop_step": stop_step, **shared}
    assert plan.teacher() == {"layer": teacher, "guidance_scale": scale}
    assert (plan.name, plan.stage1_steps) == (name, stage1_steps)


@pytest.mark.parametrize("name", ["SiT-B/2", "MMDiT"])
def test_released_variant_differs_in_target_and_gating_alone(name: str) -> None:
    paper, released = recipe(name), recipe(name, variant="released")
    assert released.stage1() == {**paper.stage1(), "target": "velocity", "gating": "released"}
    assert released.stage2() == {**paper.stage2(), "gating": "released"}
    assert released.teacher() == paper.teacher()
    assert ("raw weights" in str(released)) == (name == "SiT-B/2")


def test_dictionaries_are_arguments_that_their_functions_take() -> None:
    plan, model = recipe("SiT-B/2"), ToyDiT(depth=12)
    stage1 = SelfTransLoss.stage1(model, time="sit", latent_channels=4, patch_size=2, hidden_size=16, **plan.stage1())
    teacher = build_teacher(ToyDiT(depth=12), None, null={"y": 10}, hidden_size=16, **plan.teacher())
    stage2 = SelfTransLoss.stage2(model, teacher=teacher, time="sit", hidden_size=16, **plan.stage2())
    assert (stage1.layers, stage2.layers, teacher.layer) == (("blocks.1",), ("blocks.5",), "blocks.7")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("SiT-B2",), ["No recipe is called 'SiT-B2'", "Known: 'SiT-S/1'", "'MMDiT'", "pass the model itself"]),
        (("sit-xl/2",), ["Nearest: 'SiT-XL/2'"]),
        (("Lightning-DiT-L/2",), ["Nearest: 'LightningDiT-L/2'"]),
        ((12,), ["No recipe is called 12"]),
        (("SiT-B/2", "code"), ["variant must be one of 'paper', 'released'; got 'code'"]),
        (("SiT-B/2", "paper", "blocks"), ["blocks names the lists of blocks of a live model; 'SiT-B/2' is a name"]),
    ],
)
def test_arguments_that_make_no_sense(arguments: tuple[Any, ...], parts: list[str]) -> None:
    with pytest.raises(SettingError) as raised:
        recipe(arguments[0], **dict(zip(("variant", "blocks"), arguments[1:], strict=False)))
    assert [part for part in parts if part not in str(raised.value)] == []


@pytest.mark.parametrize("depth", [3, 9, 12, 17, 18, 28])
def test_rule_on_a_live_model(depth: int) -> None:
    plan = recipe(model_of(blocks=depth))
    one_based = (2, depth // 2, int(2 * depth / 3))
    assert layers_of(plan) == tuple(f"blocks.{layer - 1}" for layer in one_based)
    assert plan.depth == depth
    assert plan.stop_step == (100_000 if depth < 18 else 50_000)
    assert plan.guidance_scale == (8 if depth < 12 else 30)
    assert ("Does it work?" in str(plan)) == (depth < 12)
    assert "see recipe('MMDiT')" in str(plan)


@pytest.mark.parametrize("wrap", ["data parallel", "compiled", "checkpointed"])
def test_names_are_those_of_the_unwrapped_model(wrap: str) -> None:
    model = model_of(blocks=6)
    if wrap == "data parallel":
        model = nn.DataParallel(model)
    elif wrap == "compiled":
        model = torch.compile(model, backend="eager")
    else:  # every other block, as selective checkpointing does
        for index in range(0, 6, 2):
            model.blocks[index] = checkpoint_wrapper(model.blocks[index])
    plan = recipe(model)
    assert (plan.name, layers_of(plan)) == ("Module", ("blocks.1", "blocks.2", "blocks.3"))


@pytest.mark.parametrize(
    ("parts", "layers"),
    [  # U-ViT, 13 deep: the student's layer 6, the teacher's 8; MDTv2, 12 deep: the side block runs while it masks
        ({"in_blocks": 6, "mid_block": Block(), "out_blocks": 6}, "in_blocks.1 in_blocks.5 out_blocks.0"),
        ({"in_blocks": 1, "mid_block": Block(), "out_blocks": 1}, "mid_block in_blocks.0 mid_block"),
        (
            {"en_inblocks": 4, "en_outblocks": 4, "de_blocks": 4, "sideblocks": 1},
            "en_inblocks.1 en_outblocks.1 en_outblocks.3",
        ),
        # MaskDiT, of whose blocks the first see a masked image
        (
            {"model": model_of(blocks=28, decoder_blocks=8)},
            "model.decoder_blocks.1 model.decoder_blocks.3 model.decoder_blocks.4",
        ),
        # HiDream; BriaFibo and ConsisID; Latte, whose temporal blocks run in turn with the others
        (
            {"double_stream_blocks": 2, "single_stream_blocks": 4, "caption_projection": 6},
            "double_stream_blocks.1 single_stream_blocks.0 single_stream_blocks.1",
        ),
        ({"layers": 6, "perceiver_cross_attention": 3}, "layers.1 layers.2 layers.3"),
        ({"layers": 6, "temporal_transformer_blocks": 6}, "layers.1 layers.2 layers.3"),
        ({"double_blocks": 2, "single_blocks": 4}, "double_blocks.1 single_blocks.0 single_blocks.1"),
        # refiners, heads and norms beside the blocks
        ({"layers": 26, "noise_refiner": 2, "context_refiner": 2}, "layers.1 layers.12 layers.16"),
        (
            {
                "blocks": 4,
                "norms": nn.ModuleList(nn.LayerNorm(2) for _ in range(4)),
                "head": nn.Sequential(Block(), Block()),
            },
            "blocks.1 blocks.1 blocks.1",
        ),
    ],
)
def test_blocks_are_found_in_running_order(parts: dict[str, int | nn.Module], layers: str) -> None:
    assert " ".join(layers_of(recipe(model_of(**parts)))) == layers


def edm2(per_level: int = 3) -> nn.Module:
    """EDM2's encoder and decoder by the names of its networks for 64×64 latents."""
    enc, dec = nn.ModuleDict({"64x64_conv": nn.Conv2d(4, 2, 3)}), nn.ModuleDict()
    for size in (64, 32, 16, 8):
        enc.update({f"{size}x{size}_down": Block()} if size < 64 else {})
        enc.update({f"{size}x{size}_block{i}": Block() for i in range(per_level)})
    for size in (8, 16, 32, 64):
        dec.update({f"8x8_in{i}": Block() for i in range(2)} if size == 8 else {f"{size}x{size}_up": Block()})
        dec.update({f"{size}x{size}_block{i}": Block() for i in range(per_level + 1)})
    return model_of(unet=model_of(enc=enc, dec=dec, out_conv=nn.Conv2d(2, 4, 3)))


def test_in_a_unet_student_and_teacher_have_one_resolution() -> None:
    plan = recipe(edm2())
    assert plan.depth == 36
    assert layers_of(plan) == ("unet.enc.64x64_block1", "unet.enc.16x16_block2", "unet.dec.16x16_block1")
    assert plan.reasons["student_layer"] == "layer 11, the last up to depth // 2 of the teacher's resolution"


class Captioned(nn.Module):
    """A model that is given text, as an argument of its forward or by a part that embeds it."""

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
    assert (plan.guidance_scale, plan.window, plan.stage1_steps) == (5.0, None, 150_000)
    assert layers_of(plan) == tuple(f"blocks.{i - 1}" for i in (first, depth // 2, 2 * depth // 3))
    assert plan.stop_step == 50_000


@pytest.mark.parametrize(
    ("parts", "seen"),
    [
        ({"linear": nn.Linear(2, 2)}, "Seen: no numbered layers"),
        (
            {"encoder": model_of(blocks=6), "decoder": model_of(blocks=6)},
            "encoder.blocks (6 Block), decoder.blocks (6 Block)",
        ),
        ({"blocks": 12, "refiner": 8}, "blocks (12 Block), refiner (8 Block)"),
        ({"layers": nn.ModuleList([Block(), OtherBlock(), Block(), OtherBlock()])}, "layers (4 Block / OtherBlock)"),
        ({"mlp": nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))}, "mlp (4 Linear)"),
    ],
)
def test_uncertain_blocks_are_listed_and_asked_for(parts: dict[str, int | nn.Module], seen: str) -> None:
    with pytest.raises(SettingError, match="It is not certain which layers of Module are its blocks") as raised:
        recipe(model_of(**parts))
    assert seen in str(raised.value)
    assert "recipe(model, blocks='layers') or blocks=['first', 'second']" in str(raised.value)


def test_blocks_may_be_named() -> None:
    model = model_of(blocks=12, refiner=8, stem=Block())
    assert layers_of(recipe(model, blocks="refiner")) == ("refiner.1", "refiner.3", "refiner.4")
    plan = recipe(model, blocks=["stem", "refiner", "blocks"])
    assert plan.depth == 21
    assert layers_of(plan) == ("refiner.0", "blocks.0", "blocks.4")
    with pytest.raises(LayerNotFoundError, match="no layer 'refiners'"):
        recipe(model, blocks="refiners")


def test_too_few_blocks_for_the_rule() -> None:
    with pytest.raises(SettingError, match=r"at least 3 blocks that see the whole image; Module has 2: 'blocks\.0'"):
        recipe(model_of(blocks=2))


@pytest.mark.parametrize(
    ("name", "settings", "lists", "scale"),
    [
        ("DiTTransformer2DModel", {}, {"transformer_blocks": 28}, 30),
        ("FluxTransformer2DModel", {}, {"transformer_blocks": 19, "single_transformer_blocks": 38}, 5),
        ("AuraFlowTransformer2DModel", {}, {"joint_transformer_blocks": 4, "single_transformer_blocks": 32}, 5),
        ("Lumina2Transformer2DModel", {}, {"layers": 26}, 5),
        ("ConsisIDTransformer3DModel", {}, {"transformer_blocks": 30}, 5),
        ("Kandinsky5Transformer3DModel", {}, {"visual_transformer_blocks": 32}, 5),
        ("LatteTransformer3DModel",
         {"in_channels": 4, "num_layers": 28, "caption_channels": 32, "patch_size": 2, "sample_size": 16},
         {"transformer_blocks": 28}, 5),
    ],
)  # fmt: skip
def test_diffusers_models(name: str, settings: dict[str, object], lists: dict[str, int], scale: float) -> None:
    with torch.device("meta"):
        model = getattr(diffusers, name)(**settings)
    blocks = [f"{name}.{index}" for name, depth in lists.items() for index in range(depth)]
    assert find_blocks(model, None) == blocks
    assert recipe(model).guidance_scale == scale
