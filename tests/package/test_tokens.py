"""From a layer's raw output to tokens (N, T, D)."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import plain
import pytest
import torch
from torch import Tensor, nn

from selftrans_reg import SettingError, ShapeError
from selftrans_reg.errors import CallError
from selftrans_reg.modules import Layout
from selftrans_reg.tokens import as_tokens, check_choice, check_grid, grid_of, tensors_in, walk

TEXT, IMAGE = torch.randn(2, 5, 8), torch.randn(2, 16, 8)


@dataclass
class Output:
    hidden_states: Tensor
    context: Tensor | None = None


def tokens_of(output: Any, select: Any = None, tokens: Any = None, of: nn.Module | int = 8) -> Tensor:
    """The tokens of a layer, or of one that tells no more than its width."""
    layout = Layout(None, frozenset([of])) if isinstance(of, int) else Layout.of(of)
    return as_tokens(output, select, tokens, layer="blocks.1", layout=layout, arguments=lambda: {"length": 5})


@pytest.mark.parametrize(
    "output", [IMAGE, (IMAGE,), [None, IMAGE], {"a": IMAGE, "b": 3}, Output(IMAGE), ({"deep": [IMAGE]}, "text")]
)
def test_an_output_with_one_tensor_needs_no_select(output: Any) -> None:
    assert tokens_of(output) is IMAGE


@pytest.mark.parametrize(
    ("output", "select"),
    [
        ((TEXT, IMAGE), 1),
        ((TEXT, IMAGE), -1),
        ({"text": TEXT, "image": IMAGE}, "image"),
        ({0: TEXT, 1: IMAGE}, 1),
        (Output(IMAGE, TEXT), "hidden_states"),
        ((TEXT, [IMAGE]), lambda output: output[1][0]),
    ],
)
def test_select_picks_by_index_key_field_or_callable(output: Any, select: Any) -> None:
    assert tokens_of(output, select) is IMAGE


def test_an_ambiguous_output_is_listed_as_one_would_index_it() -> None:
    with plain.refused(
        CallError,
        "Layer 'blocks.1' returns a tuple with 3 tensors, and nothing is guessed:\n",
        "  [0]['text']: (2, 5, 8)\n",
        "  [1][0]: (2, 16, 8)\n",
        "  [2]['hidden_states']: (2, 16, 8)\n",
        "Say which with select= (an index, a key, or a callable).",
    ):
        tokens_of(({"text": TEXT}, [IMAGE, "x"], Output(IMAGE)))


@pytest.mark.parametrize("output", [None, (), "text", ({},)])
def test_an_output_without_a_tensor_says_so(output: Any) -> None:
    with pytest.raises(CallError, match=r"with 0 tensors, and nothing is guessed:\n  no tensor at all\n"):
        tokens_of(output)


@pytest.mark.parametrize(
    ("select", "parts"),
    [
        (2, ["select=2 does not fit the output of layer 'blocks.1', a tuple", "out of range", "[1]: (2, 16, 8)"]),
        ("image", ["select='image' does not fit", "It holds:\n  [0]: (2, 5, 8)"]),
        (lambda output: output["a"], ["select=<lambda> does not fit"]),
        (lambda output: len(output), ["select=<lambda> picks 2 from", "not a tensor"]),
    ],
)
def test_a_select_that_does_not_fit_is_refused(select: Any, parts: list[str]) -> None:
    with plain.refused(CallError, *parts):
        tokens_of((TEXT, IMAGE), select)


class Swin(nn.Module):
    """A window attention's parts: the width of queries, keys and values, and a table by head, beside the layer's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.table = nn.Parameter(torch.zeros(169, 4))


LAYOUTS = ["ndl", "ndhw", "nhwd", "ndfhw", "nfdhw", "nfhwd"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "of", [8, Swin(8), nn.ModuleList([nn.Conv3d(4, 8, 1)])], ids=["width", "attention", "convolution"]
)
def test_the_layers_width_says_which_axis_of_a_map_it_is(layout: str, of: nn.Module | int) -> None:
    sizes = {"n": 2, "d": 8, "f": 3, "h": 4, "w": 5, "l": 6}
    value = torch.randn([sizes[axis] for axis in layout])
    if layout == "ndl":
        if of == 8:
            with pytest.raises(
                ShapeError, match=r"shape \(2, 8, 6\), and which axis is D is open: its width is 8, and only"
            ):
                tokens_of(value, of=of)
        return
    spatial = layout.replace("n", "").replace("d", "")
    expected = torch.einsum(f"{layout}->n{spatial}d", value).reshape(2, -1, 8)
    torch.testing.assert_close(tokens_of(value, of=of), expected, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(2, 8, 8, 8), (2, 8, 4, 8), (2, 8, 8, 4, 4), (2, 3, 8, 4, 8), (2, 8, 3, 4, 8)])
def test_where_two_axes_may_be_the_width_the_layers_class_decides_or_it_is_asked_for(shape: tuple[int, ...]) -> None:
    value = torch.randn(shape)
    for of in (8, nn.ModuleList([nn.Linear(4, 8)])):
        with plain.refused(
            ShapeError,
            f"shape {shape}",
            "its width is 8, and axes [",
            "Pass tokens=lambda",
            "lambda x: x.flatten(1, -2)",
            "select=",
        ):
            tokens_of(value, of=of)
    for last in (nn.Linear(4, 8), nn.LayerNorm(8), nn.Sequential(nn.Conv2d(4, 4, 1), nn.LayerNorm(8))):
        torch.testing.assert_close(tokens_of(value, of=last), value.flatten(1, -2))
    for first in (nn.Conv2d(4, 8, 1), nn.GroupNorm(2, 8), nn.Sequential(nn.Linear(4, 4), nn.Conv3d(4, 8, 1))):
        torch.testing.assert_close(tokens_of(value, of=first), value.flatten(2).transpose(1, 2))


def test_a_map_none_of_whose_axes_is_the_width_is_asked_about() -> None:
    for of, width in ((nn.Identity(), "its width is not known"), (Swin(7), "its width is one of 7, 21, 169")):
        with pytest.raises(ShapeError, match=f"shape \\(2, 8, 3, 5\\)(?s:.*){width}, and no axis fits"):
            tokens_of(torch.zeros(2, 8, 3, 5), of=of)


def test_three_axes_are_tokens_unless_the_layer_is_a_convolution() -> None:
    value = torch.randn(2, 8, 8)
    assert tokens_of(value) is value
    assert tokens_of(value, of=nn.Identity()) is value
    assert tokens_of(TEXT, of=99) is not None  # of another stream: the caller compares the widths
    torch.testing.assert_close(tokens_of(value, of=nn.Conv1d(4, 8, 1)), value.transpose(1, 2))


def test_tokens_slices_the_second_axis_or_is_called_with_the_tensor_as_it_is() -> None:
    torch.testing.assert_close(tokens_of(IMAGE, tokens=slice(1, None)), IMAGE[:, 1:])
    torch.testing.assert_close(tokens_of(IMAGE, tokens=lambda x: x[:, ::2]), IMAGE[:, ::2])
    grid = torch.randn(2, 4, 4, 8)  # channels last: the callable knows
    torch.testing.assert_close(tokens_of(grid, tokens=lambda x: x.flatten(1, 2)), grid.reshape(2, 16, 8))


def test_a_callable_with_two_parameters_gets_the_calls_arguments() -> None:
    found = tokens_of(torch.cat([TEXT, IMAGE], 1), tokens=lambda x, arguments: x[:, arguments["length"] :])
    torch.testing.assert_close(found, IMAGE)
    torch.testing.assert_close(tokens_of(IMAGE, tokens=lambda x, start=3: x[:, start:]), IMAGE[:, 3:])


@pytest.mark.parametrize(
    ("tensor", "tokens", "error", "parts"),
    [
        (
            IMAGE[0, 0],
            None,
            ShapeError,
            ["'blocks.1' gives a tensor of shape (8,), not tokens (N, T, D)", "Tap a block"],
        ),
        (IMAGE[:, 0], None, ShapeError, ["shape (2, 8)", "a callable that turns the tensor into (N, T, D)"]),
        (IMAGE, slice(16, None), ShapeError, ["tokens=slice(16, None, None) leaves none of the 16 tokens of layer"]),
        (IMAGE, lambda x: x[:, 0], ShapeError, ["shape (2, 8)"]),
        (IMAGE, lambda x: [x], CallError, ["tokens= returned list for layer 'blocks.1'; it must return a tensor"]),
    ],
)
def test_what_is_left_must_be_tokens(tensor: Tensor, tokens: Any, error: type[Exception], parts: list[str]) -> None:
    with plain.refused(error, *parts):
        tokens_of(tensor, tokens=tokens)


@pytest.mark.parametrize("choice", [(True, None), (1.5, None), ([0], None), (None, 1), (None, "a"), (None, (1, None))])
def test_select_or_tokens_of_another_kind_is_refused(choice: Any) -> None:
    with pytest.raises(SettingError, match="select must be an index, a key" if choice[0] else "tokens must be a slice"):
        check_choice(*choice)


@pytest.mark.parametrize(
    ("shape", "patch", "grid"),
    [((2, 4, 8, 6), (2, 2), (4, 3)), ((2, 4, 9), (3,), (3,)), ((2, 4, 3, 8, 6), (1, 2, 2), (3, 4, 3))],
)
def test_the_grid_counts_patches_along_each_axis(
    shape: tuple[int, ...], patch: tuple[int, ...], grid: tuple[int, ...]
) -> None:
    assert grid_of(torch.zeros(shape), patch) == grid


@pytest.mark.parametrize(("shape", "patch"), [((2, 4, 8, 7), (2, 2)), ((2, 4, 8), (2, 2)), ((2, 4, 3, 8, 8), (2, 2))])
def test_latents_that_do_not_divide_into_patches_are_refused(shape: tuple[int, ...], patch: tuple[int, ...]) -> None:
    with plain.refused(
        ShapeError,
        f"Latents of shape {shape} do not divide into patches of {patch}.",
        "patch_size counts latent pixels per token",
    ):
        grid_of(torch.zeros(shape), patch)


@pytest.mark.parametrize(
    ("count", "parts"),
    [
        (18, ["tokens=slice(2, None)", "tokens=slice(None, 16)", "slice(k, k + 16)"]),
        (8, ["which has 16.\nThis may be another stream, such as the text's (select=)", "a masked", "patch_size"]),
    ],
)
def test_tokens_that_do_not_fit_the_grid_name_what_would_or_what_they_may_be(count: int, parts: list[str]) -> None:
    with plain.refused(ShapeError, f"{count} tokens do not fit the latent grid 4×4, which has 16", *parts):
        check_grid(torch.zeros(2, count, 8), (4, 4))


@dataclass
class Settings:
    """A container without a tensor."""

    size: int


class Attributes(dict):  # type: ignore[type-arg]
    def __getattr__(self, name: str) -> Any:
        return self[name] if name in self else self.__getattribute__(name)


class TestWalk:
    def test_every_tensor_comes_with_the_path_that_one_would_type(self) -> None:
        value = {"a": [IMAGE, None, (TEXT, "x")], 3: Output(IMAGE, TEXT), "n": 1}
        assert [path for path, _ in tensors_in(value, "y")] == [
            "y['a'][0]",
            "y['a'][2][0]",
            "y[3]['hidden_states']",
            "y[3]['context']",
        ]

    def test_only_what_changes_is_copied_and_each_container_keeps_its_kind(self) -> None:
        pair = namedtuple("pair", "left right")
        value = {"a": [IMAGE, 1], "b": pair(TEXT, 2), "c": Attributes(x=IMAGE), "d": Output(IMAGE), "e": (1, [2])}
        assert walk(value, lambda tensor, path: tensor) is value
        found = walk(value, lambda tensor, path: tensor[:1])
        assert [type(item) for item in found.values()] == [list, pair, Attributes, Output, tuple]
        assert found["c"].x.shape == found["d"].hidden_states.shape == found["b"].left.shape[:1] + IMAGE.shape[1:]
        assert found["e"] is value["e"]
        assert value["a"][0] is IMAGE

    def test_fresh_containers_are_shared_with_nobody(self) -> None:
        value = {"empty": {}, "list": [[]], "pair": (IMAGE, {}), "own": Output(IMAGE), "settings": Settings(3)}
        found = walk(value, lambda tensor, path: tensor, fresh=True)
        assert found.keys() == value.keys()
        assert all(found[key] is not value[key] for key in ("empty", "list", "pair", "own"))
        assert found["list"][0] is not value["list"][0]
        assert found["pair"][1] is not value["pair"][1]
        assert found["pair"][0] is IMAGE
        assert found["settings"] is value["settings"]
