"""From a layer's raw output to tokens (N, T, D)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from plain import refused
from torch import Tensor, nn

from selftrans_reg import ShapeError
from selftrans_reg.errors import CallError
from selftrans_reg.modules import Layout
from selftrans_reg.tokens import as_tokens, check_grid, grid_of, tensors_in, walk

TEXT, IMAGE, MAP = torch.randn(2, 5, 8), torch.randn(2, 16, 8), torch.randn(2, 8, 3, 5)


@dataclass
class Output:
    hidden_states: Tensor | None
    context: Tensor | None = None


def tokens_of(output: Any, select: Any = None, tokens: Any = None, of: nn.Module | int = 8) -> Tensor:
    """The tokens of a layer, or of one that tells no more than its width."""
    layout = Layout(None, frozenset([of])) if isinstance(of, int) else Layout.of(of)
    return as_tokens(output, select, tokens, layer="blocks.1", layout=layout, arguments=lambda: {"length": 5})


@pytest.mark.parametrize(
    ("output", "select"),
    [
        *((output, None) for output in (IMAGE, [None, IMAGE], Output(IMAGE), ({"deep": [IMAGE]}, "text"))),
        ((TEXT, IMAGE), -1),
        ({"text": TEXT, "image": IMAGE}, "image"),
        ({0: TEXT, 1: IMAGE}, 1),
        (Output(IMAGE, TEXT), "hidden_states"),
        ((TEXT, [IMAGE]), lambda output: output[1][0]),
    ],
)
def test_select_picks_by_index_key_field_or_callable_unless_there_is_one_tensor(output: Any, select: Any) -> None:
    assert tokens_of(output, select) is IMAGE


def test_tokens_slices_the_second_axis_or_is_called_with_the_tensor_and_the_calls_arguments() -> None:
    torch.testing.assert_close(tokens_of(IMAGE, tokens=slice(1, None)), IMAGE[:, 1:])
    grid = torch.randn(2, 4, 4, 8)  # channels last: the callable knows
    torch.testing.assert_close(tokens_of(grid, tokens=lambda x: x.flatten(1, 2)), grid.reshape(2, 16, 8))
    torch.testing.assert_close(tokens_of(IMAGE, tokens=lambda x, start=3: x[:, start:]), IMAGE[:, 3:])
    found = tokens_of(torch.cat([TEXT, IMAGE], 1), tokens=lambda x, arguments: x[:, arguments["length"] :])
    torch.testing.assert_close(found, IMAGE)


class Swin(nn.Module):
    """A window attention's parts: the width of queries, keys and values, and a table by head, beside the layer's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.table = nn.Parameter(torch.zeros(169, 4))


DEEP = ({"text": TEXT}, [IMAGE, "x"], Output(IMAGE))
NOT_GUESSED = "'blocks.1' returns a tuple with 3 tensors, and nothing is guessed:\n"
LISTED = "  [0]['text']: (2, 5, 8)\n  [1][0]: (2, 16, 8)\n  [2]['hidden_states']: (2, 16, 8)\nSay which with select="


@pytest.mark.parametrize(
    ("output", "more", "error", "part"),
    [
        (DEEP, {}, CallError, NOT_GUESSED + LISTED),
        ((), {}, CallError, "with 0 tensors, and nothing is guessed:\n  no tensor at all\n"),
        (DEEP, {"select": 3}, CallError, "select=3 does not fit the output of layer 'blocks.1', a tuple"),
        (DEEP, {"select": "image"}, CallError, "select='image' does not fit"),
        (DEEP, {"select": lambda output: output["a"]}, CallError, "select=<lambda> does not fit"),
        (DEEP, {"select": lambda output: len(output)}, CallError, "select=<lambda> picks 3 from"),
        (IMAGE[:, 0], {}, ShapeError, "tensor of shape (2, 8), not tokens (N, T, D).\nTap a block"),
        (IMAGE, {"tokens": slice(16, None)}, ShapeError, "tokens=slice(16, None, None) leaves none of the 16"),
        (IMAGE, {"tokens": lambda x: [x]}, CallError, "tokens= returned list for layer 'blocks.1'"),
        (MAP, {"of": nn.Identity()}, ShapeError, "(2, 8, 3, 5), and which axis is D is open: its width is not known"),
        (MAP, {"of": Swin(7)}, ShapeError, "its width is one of 7, 21, 169, and no axis fits"),
        (MAP[..., 0], {}, ShapeError, "its width is 8, and only axis 1 fits"),
    ],
)
def test_what_does_not_fit_is_refused(output: Any, more: dict[str, Any], error: Any, part: str) -> None:
    with refused(error, part):
        tokens_of(output, **more)


@pytest.mark.parametrize("layout", ["ndhw", "nhwd", "ndfhw", "nfdhw", "nfhwd"])
@pytest.mark.parametrize(
    "of", [8, Swin(8), nn.ModuleList([nn.Conv3d(4, 8, 1)])], ids=["width", "attention", "convolution"]
)
def test_the_layers_width_says_which_axis_of_a_map_it_is(layout: str, of: nn.Module | int) -> None:
    sizes = {"n": 2, "d": 8, "f": 3, "h": 4, "w": 5}
    value = torch.randn([sizes[axis] for axis in layout])
    spatial = layout.replace("n", "").replace("d", "")
    expected = torch.einsum(f"{layout}->n{spatial}d", value).reshape(2, -1, 8)
    torch.testing.assert_close(tokens_of(value, of=of), expected, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(2, 8, 8, 8), (2, 8, 4, 8), (2, 8, 8, 4, 4), (2, 3, 8, 4, 8), (2, 8, 3, 4, 8)])
def test_where_two_axes_may_be_the_width_the_layers_class_decides_or_it_is_asked_for(shape: tuple[int, ...]) -> None:
    value = torch.randn(shape)
    for of in (8, nn.ModuleList([nn.Linear(4, 8)])):
        with refused(ShapeError, f"shape {shape}", "its width is 8, and axes [", "Pass tokens=lambda"):
            tokens_of(value, of=of)
    for last in (nn.Linear(4, 8), nn.LayerNorm(8), nn.Sequential(nn.Conv2d(4, 4, 1), nn.LayerNorm(8))):
        torch.testing.assert_close(tokens_of(value, of=last), value.flatten(1, -2))
    for first in (nn.Conv2d(4, 8, 1), nn.GroupNorm(2, 8), nn.Sequential(nn.Linear(4, 4), nn.Conv3d(4, 8, 1))):
        torch.testing.assert_close(tokens_of(value, of=first), value.flatten(2).transpose(1, 2))


def test_three_axes_are_tokens_unless_the_layer_is_a_convolution() -> None:
    value = torch.randn(2, 8, 8)
    for of in (8, nn.Identity(), 99):  # of another stream: the caller compares the widths
        torch.testing.assert_close(tokens_of(value, of=of), value)
    torch.testing.assert_close(tokens_of(value, of=nn.Conv1d(4, 8, 1)), value.transpose(1, 2))


def test_the_grid_counts_patches_along_each_axis() -> None:
    assert grid_of(torch.zeros(2, 4, 8, 6), (2, 2)) == (4, 3)
    assert grid_of(torch.zeros(2, 4, 3, 8, 6), (1, 2, 2)) == (3, 4, 3)
    for shape in ((2, 4, 8, 7), (2, 4, 8), (2, 4, 3, 8, 8)):
        with refused(ShapeError, f"Latents of shape {shape} do not divide into patches of (2, 2)."):
            grid_of(torch.zeros(shape), (2, 2))
    with refused(ShapeError, "8 tokens do not fit the latent grid 4×4, which has 16.\nThis may be another stream"):
        check_grid(torch.zeros(2, 8, 8), (4, 4))


def test_the_walk_copies_what_changes_and_shares_no_fresh_container() -> None:
    value = {"empty": {}, "list": [[]], "pair": (IMAGE, {}), "own": Output(IMAGE), "settings": Output(None), "n": 1}
    assert walk(value, lambda tensor, path: tensor) is value
    assert [path for path, _ in tensors_in(value, "y")] == ["y['pair'][0]", "y['own']['hidden_states']"]
    found = walk(value, lambda tensor, path: tensor, fresh=True)
    assert found.keys() == value.keys()
    assert all(found[key] is not value[key] for key in ("empty", "list", "pair", "own"))
    assert found["list"][0] is not value["list"][0]
    assert found["pair"][1] is not value["pair"][1]
    assert found["pair"][0] is IMAGE
    assert found["settings"] is value["settings"]
