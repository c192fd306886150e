"""Layer names: through wrappers, and what is said about a name that does not exist."""

from __future__ import annotations

from functools import partial
from typing import Any

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
    unwrap,
)

compiled = partial(torch.compile, backend="eager")
WRAPPERS = {
    "data parallel": nn.DataParallel,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "compiled": compiled,
    "data parallel compiled": lambda model: nn.DataParallel(compiled(model)),
    "checkpointed": checkpoint_wrapper,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_wrappers_are_looked_through_around_the_model_and_a_block(wrap: type) -> None:
    names = [name for name, _ in ToyDiT().named_modules() if name]
    model = wrap(ToyDiT())
    inner = unwrap(model)
    assert isinstance(inner, ToyDiT)
    assert find_layer(model, "blocks.1") is inner.blocks[1]
    assert list(named_layers(model)) == names
    inner.blocks[1] = wrap(inner.blocks[1])  # whose output is the one that the model goes on with
    assert find_layer(model, "blocks.1") is inner.blocks[1]
    assert isinstance(find_layer(model, "blocks.1.fc1"), nn.Linear)
    assert list(named_layers(model)) == names


def holding(child: str, name: str = "Own", package: str = "mine", bases: tuple[type, ...] = (nn.Module,)) -> nn.Module:
    """A module of a class of this name and package, whose only child is a model."""
    wrapper = type(name, bases, {"__module__": package})()
    wrapper.add_module(child, ToyDiT())
    return wrapper


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
def test_wrappers_are_known_by_their_class_and_its_subclasses_alone(package: str, name: str, child: str) -> None:
    for model in (holding(child, name, package), holding(child, bases=(type(holding(child, name, package)),))):
        assert unwrap(model) is getattr(model, child)
        assert plain_key(model, f"{child}.blocks.1.fc1.weight") == "blocks.1.fc1.weight"
    for model in (holding(child), holding(child, name)):  # of the child's name, and of the class's: no wrapper
        assert unwrap(model) is model
        assert find_layer(model, f"{child}.blocks.1") is model.get_submodule(f"{child}.blocks.1")
        block = nn.ModuleDict({"block": model})
        assert plain_key(block, f"block.{child}.blocks.1.fc1.weight") == f"block.{child}.blocks.1.fc1.weight"


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

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))


class OwnBlock(ToyBlock):
    """A block with norms of its own, which also normalises queries and keys by head."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.norm1, self.norm2, self.q_norm, self.k_norm = map(OwnNorm, (width, width, width // 4, width // 4))


@pytest.mark.parametrize(
    ("layer", "width"),
    [
        (OwnBlock(16), 16),
        (checkpoint_wrapper(OwnBlock(16)), 16),
        (nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)), 8),
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


LISTED = "Found: blocks.0 … blocks.3 (4 ToyBlock)"
FLAT = nn.ModuleDict({"stem": nn.Linear(2, 2), "body": nn.Linear(2, 2)})


@pytest.mark.parametrize(
    ("model", "name", "error", "part"),
    [
        *((nn.DataParallel(ToyDiT()), name, LayerNotFoundError, LISTED) for name in ("block.2", "", "module.blocks.1")),
        (FLAT, "sten", LayerNotFoundError, "Found: stem, body.\nNearest: 'stem'."),
        (nn.Linear(2, 2), "blocks.0", LayerNotFoundError, "Found: no layers at all"),
        (ToyDiT(), 7, SettingError, "got 7.\nNames count from 0: the eighth block"),
    ],
)
def test_an_unknown_name_is_answered_with_what_there_is(model: nn.Module, name: Any, error: Any, part: str) -> None:
    with plain.refused(error, part):
        find_layer(model, name)


def test_a_list_is_a_module_and_every_name_of_a_shared_one_is_known() -> None:
    block = nn.ModuleList([nn.Linear(2, 2)])
    model = nn.DataParallel(nn.ModuleDict({"blocks": nn.ModuleList([block] * 3)}))
    assert find_layer(model, "blocks") is unwrap(model)["blocks"]
    assert find_layer(model, "blocks.2") is block
    assert numbered_groups(named_layers(model)) == {"blocks": [block] * 3}  # the outermost list
