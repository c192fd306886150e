"""Layer names: through wrappers, and what is said about a name that does not exist."""

from __future__ import annotations

from functools import partial

import plain
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from toys import ToyBlock, ToyDiT

from selftrans_reg import LayerNotFoundError, SettingError
from selftrans_reg.modules import (
    find_layer,
    infer_width,
    named_layers,
    numbered_groups,
    plain_key,
    resolve_width,
    unwrap,
)

compiled = partial(torch.compile, backend="eager")
WRAPPERS = {
    "plain": lambda model: model,
    "data parallel": nn.DataParallel,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "compiled": compiled,
    "compiled data parallel": lambda model: compiled(nn.DataParallel(model)),
    "data parallel compiled": lambda model: nn.DataParallel(compiled(model)),
    "checkpointed": checkpoint_wrapper,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_wrappers_are_looked_through(wrap: type) -> None:
    model = wrap(ToyDiT())
    inner = unwrap(model)
    assert isinstance(inner, ToyDiT)
    assert find_layer(model, "blocks.1") is inner.blocks[1]
    assert list(named_layers(model)) == [name for name, _ in ToyDiT().named_modules() if name]


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, compiled], ids=["checkpointed", "compiled"])
def test_a_wrapped_block_is_meant_as_a_whole(wrap: type) -> None:
    """The wrapper's output is the one that the model goes on with."""
    model = ToyDiT()
    model.blocks[1] = wrap(model.blocks[1])
    assert find_layer(model, "blocks.1") is model.blocks[1]
    assert isinstance(find_layer(model, "blocks.1.fc1"), nn.Linear)
    assert list(named_layers(model)) == [name for name, _ in ToyDiT().named_modules() if name]


def holding(child: str, name: str = "Own", package: str = "mine", bases: tuple[type, ...] = (nn.Module,)) -> nn.Module:
    """A module of a class of this name and package, whose only child is a model."""
    wrapper = type(name, bases, {"__module__": package})()
    wrapper.add_module(child, ToyDiT())
    return wrapper


@pytest.mark.parametrize("child", ["module", "_orig_mod", "_checkpoint_wrapped_module", "base_model", "model"])
@pytest.mark.parametrize("name", ["Own", "DataParallel"])
def test_a_childs_name_alone_makes_no_wrapper(child: str, name: str) -> None:
    model = holding(child, name)
    assert unwrap(model) is model
    assert find_layer(model, f"{child}.blocks.1") is model.get_submodule(f"{child}.blocks.1")
    block = nn.ModuleDict({"block": holding(child, name)})
    assert plain_key(block, f"block.{child}.blocks.1.fc1.weight") == f"block.{child}.blocks.1.fc1.weight"


@pytest.mark.parametrize(
    ("package", "name", "child"),
    [
        ("deepspeed.runtime.engine", "DeepSpeedEngine", "module"),
        ("torch.distributed.fsdp", "FullyShardedDataParallel", "_fsdp_wrapped_module"),
        ("lightning.fabric.wrappers", "_FabricModule", "_forward_module"),
        ("peft.tuners.lora.model", "LoraModel", "model"),
        ("timm.utils.model_ema", "ModelEmaV3", "module"),
    ],
)
def test_wrappers_are_known_by_their_class_and_its_subclasses(package: str, name: str, child: str) -> None:
    for model in (holding(child, name, package), holding(child, bases=(type(holding(child, name, package)),))):
        assert unwrap(model) is getattr(model, child)
        assert plain_key(model, f"{child}.blocks.1.fc1.weight") == "blocks.1.fc1.weight"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_keys_are_plain_under_every_wrapper_at_once() -> None:
    peft = pytest.importorskip("peft")
    model = ToyDiT(depth=2)
    expected = list(model.state_dict())
    model.blocks[1] = checkpoint_wrapper(compiled(model.blocks[1]))
    wrapped = compiled(nn.DataParallel(model))
    assert [plain_key(wrapped, key) for key in wrapped.state_dict()] == expected
    assert [plain_key(wrapped, name) for name, _ in wrapped.named_parameters()] == expected
    adapted = peft.get_peft_model(ToyDiT(depth=2), peft.LoraConfig(target_modules=["fc1"]))
    assert isinstance(unwrap(compiled(adapted)), ToyDiT)
    assert plain_key(adapted, "base_model.model.blocks.1.fc1.base_layer.bias") == "blocks.1.fc1.base_layer.bias"


class OwnNorm(nn.Module):
    """As each repository writes its own RMSNorm."""

    def __init__(self, width: int, weight: str = "weight") -> None:
        super().__init__()
        self.register_parameter(weight, nn.Parameter(torch.ones(width)))


class OwnBlock(ToyBlock):
    """A block with norms of its own, which also normalises queries and keys by head."""

    def __init__(self, width: int, **options: str) -> None:
        super().__init__(width)
        self.norm1, self.norm2 = OwnNorm(width, **options), OwnNorm(width, **options)
        self.q_norm, self.k_norm = OwnNorm(width // 4, **options), OwnNorm(width // 4, **options)


@pytest.mark.parametrize(
    ("layer", "width"),
    [
        (OwnBlock(16), 16),
        (OwnBlock(16, weight="scale"), 16),
        (checkpoint_wrapper(OwnBlock(16)), 16),
        (nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)), 8),
        (nn.Conv2d(4, 6, 1), None),
        (nn.GroupNorm(2, 6), 6),
        (nn.LazyLinear(5), 5),
        (nn.Sequential(nn.Linear(4, 16), nn.SiLU()), None),
        (nn.MultiheadAttention(8, 2), None),
        (nn.TransformerEncoderLayer(16, 2, 16), 16),
        (nn.TransformerDecoderLayer(16, 2, 32), 16),
        (nn.ModuleDict({"image": ToyBlock(16), "text": ToyBlock(16)}), 16),
        (nn.ModuleDict({"image": ToyBlock(16), "text": ToyBlock(24)}), None),
        (nn.ModuleDict({"norm": nn.LayerNorm(16), "condition": nn.Linear(8, 16), "final": nn.Linear(16, 4)}), None),
    ],
)
def test_a_width_is_read_off_where_that_is_certain(layer: nn.Module, width: int | None) -> None:
    assert infer_width(layer) == width


def test_a_width_that_is_not_certain_is_asked_for() -> None:
    with pytest.raises(SettingError, match=r"width of layer 'a' \(SiLU\) cannot be read off(?s:.*)Pass hidden_size="):
        resolve_width(nn.SiLU(), "a", None)
    with pytest.raises(SettingError, match=r"or run the model once, as some of its parameters are not initialised yet"):
        resolve_width(nn.ModuleList([nn.LazyLinear(4)]), "a", None)


def test_groups_are_the_outermost_lists() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList(nn.ModuleList([nn.Linear(2, 2)]) for _ in range(3))})
    assert {group: len(members) for group, members in numbered_groups(named_layers(model)).items()} == {"blocks": 3}


@pytest.mark.parametrize("name", ["block.2", "blocks.12", "blocks.2.", "", "module.blocks.1"])
def test_an_unknown_name_is_answered_with_groups_and_nearest_names(name: str) -> None:
    model = nn.DataParallel(ToyDiT())
    assert find_layer(model, "blocks") is unwrap(model).blocks  # a list is a module, though it never runs
    with pytest.raises(
        LookupError, match=rf"ToyDiT has no layer '{name}'\.\nFound: blocks\.0 … blocks\.3 \(4 ToyBlock\)"
    ):
        find_layer(model, name)


def test_a_model_without_lists_names_its_own_layers() -> None:
    with plain.refused(LayerNotFoundError, "Found: stem, body.\nNearest: 'stem'."):
        find_layer(nn.ModuleDict({"stem": nn.Linear(2, 2), "body": nn.Linear(2, 2)}), "sten")
    with plain.refused(LayerNotFoundError, "Found: no layers at all"):
        find_layer(nn.Linear(2, 2), "blocks.0")
    block = nn.Linear(2, 2)
    shared = nn.ModuleDict({"blocks": nn.ModuleList([block] * 3)})  # every name of a shared module is known
    assert find_layer(shared, "blocks.2") is block


@pytest.mark.parametrize("name", [7, None])
def test_a_depth_in_place_of_a_name_is_explained(name: object) -> None:
    with plain.refused(SettingError, f"such as 'blocks.7'; got {name!r}.\n", "count from 0: the eighth block"):
        find_layer(ToyDiT(), name)
