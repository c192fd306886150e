"""Layer names: through wrappers, and what is said about a name that does not exist."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from toys import ToyDiT

from selftrans_reg import LayerNotFoundError, SettingError
from selftrans_reg.modules import find_layer, named_layers, numbered_groups, unwrap

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


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_the_names_are_those_of_the_unwrapped_model(wrap: type) -> None:
    expected = [name for name, _ in ToyDiT().named_modules() if name]
    assert list(named_layers(wrap(ToyDiT()))) == expected


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, compiled], ids=["checkpointed", "compiled"])
def test_a_wrapped_block_is_meant_as_a_whole(wrap: type) -> None:
    """The wrapper's output is the one that the model goes on with."""
    model = ToyDiT()
    model.blocks[1] = wrap(model.blocks[1])
    assert find_layer(model, "blocks.1") is model.blocks[1]
    assert isinstance(find_layer(model, "blocks.1.fc1"), nn.Linear)
    assert list(named_layers(model)) == [name for name, _ in ToyDiT().named_modules() if name]


def test_a_models_own_child_called_module_is_no_wrapper_if_it_has_siblings() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module, self.head = nn.Linear(2, 2), nn.Linear(2, 2)

    model = Own()
    assert unwrap(model) is model
    assert find_layer(model, "module") is model.module


def test_every_name_of_a_shared_module_is_known() -> None:
    block = nn.Linear(2, 2)
    model = nn.ModuleDict({"blocks": nn.ModuleList([block] * 3)})
    assert find_layer(model, "blocks.2") is block
    with pytest.raises(LayerNotFoundError, match=r"blocks\.0 … blocks\.2 \(3 Linear\)"):
        find_layer(model, "blocks.3")


def test_groups_are_the_outermost_lists() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList(nn.ModuleList([nn.Linear(2, 2)]) for _ in range(3))})
    assert {group: len(members) for group, members in numbered_groups(named_layers(model)).items()} == {"blocks": 3}


@pytest.mark.parametrize("name", ["block.2", "blocks.12", "Blocks.2", "blocks.2.", "blocks", "", "module.blocks.1"])
def test_an_unknown_name_is_answered_with_groups_and_nearest_names(name: str) -> None:
    model = nn.DataParallel(ToyDiT())
    if name == "blocks":  # a list is a module, though it never runs
        assert find_layer(model, name) is unwrap(model).blocks
        return
    with pytest.raises(LayerNotFoundError) as error:
        find_layer(model, name)
    message = str(error.value)
    assert f"ToyDiT has no layer {name!r}.\n" in message
    assert "Found: blocks.0 … blocks.3 (4 ToyBlock).\n" in message
    assert "Nearest: 'blocks." in message or name == ""
    assert isinstance(error.value, LookupError)


def test_a_model_without_lists_names_its_own_layers() -> None:
    with pytest.raises(LayerNotFoundError) as error:
        find_layer(nn.ModuleDict({"stem": nn.Linear(2, 2), "body": nn.Linear(2, 2)}), "sten")
    assert "Found: stem, body.\nNearest: 'stem'." in str(error.value)


def test_a_model_without_any_layer_says_so() -> None:
    with pytest.raises(LayerNotFoundError, match="Found: no layers at all"):
        find_layer(nn.Linear(2, 2), "blocks.0")


@pytest.mark.parametrize("name", [7, None, ("blocks", 7)])
def test_a_depth_in_place_of_a_name_is_explained(name: object) -> None:
    with pytest.raises(SettingError) as error:
        find_layer(ToyDiT(), name)
    assert f"such as 'blocks.7'; got {name!r}.\n" in str(error.value)
    assert "count from 0: the eighth block (REPA's encoder_depth=8) is 'blocks.7'" in str(error.value)
