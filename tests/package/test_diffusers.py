"""Twelve real models of diffusers through both stages."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import plain
import pytest
import torch
from backbones import Backbone, assert_step_is_plain
from small_diffusers import SMALL_DIFFUSERS
from torch import Tensor, nn

import selftrans_reg as st
from selftrans_reg.modules import infer_width, named_layers


@pytest.fixture(params=SMALL_DIFFUSERS, scope="module")
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return SMALL_DIFFUSERS[request.param]


@pytest.fixture(scope="module")
def built(backbone: Backbone) -> nn.Module:
    """A model that no test changes."""
    return backbone.build(0)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_equals_the_plain_formula(backbone: Backbone, stage: int) -> None:
    assert_step_is_plain(backbone, stage)


def test_a_truncated_teacher_gives_exactly_what_the_whole_one_gives(backbone: Backbone, built: nn.Module) -> None:
    whole = copy.deepcopy(built)
    teacher = backbone.make_teacher(copy.deepcopy(built))
    for seed, n in [(0, 8), (1, 3)]:
        arguments = backbone.batch(n, seed).arguments
        torch.testing.assert_close(teacher(**arguments), backbone.plain_guided(whole, arguments), rtol=1e-4, atol=1e-4)
    before, after = (sum(p.numel() for p in model.parameters()) for model in (whole, teacher))
    assert after < 0.9 * before
    first = backbone.make_teacher(copy.deepcopy(built))  # its first call runs the whole model
    assert torch.equal(first(**arguments), teacher(**arguments))


def outputs_of(model: nn.Module, arguments: Mapping[str, Any]) -> dict[nn.Module, Any]:
    seen: dict[nn.Module, Any] = {}
    handles = [
        module.register_forward_hook(lambda module, args, output: seen.update({module: output}))
        for module in model.modules()
    ]
    model(**arguments)
    for handle in handles:
        handle.remove()
    return seen


def test_a_width_is_right_or_asked_for_at_every_layer(backbone: Backbone, built: nn.Module) -> None:
    outputs = outputs_of(built, backbone.batch(2).arguments)
    widths = {}
    for name, layer in named_layers(built).items():
        output = outputs.get(layer)
        tensors = output if isinstance(output, tuple) else (output,)
        found = {tensor.shape[-1] for tensor in tensors if isinstance(tensor, Tensor) and tensor.ndim == 3}
        if found and infer_width(layer) is not None:
            widths[name] = (infer_width(layer), found)
    assert {name: pair for name, pair in widths.items() if pair[1] != {pair[0]}} == {}
    asked = {layer for layer in (backbone.shallow, backbone.student, backbone.teacher) if layer not in widths}
    assert bool(asked) == (backbone.asks is not None)
    if asked:
        with pytest.raises(st.SelfTransError, match=r"cannot be read off(?s:.*)Pass hidden_size="):
            backbone.stage1(built, hidden_size=None)


def test_a_tap_alone_gives_the_images_tokens(backbone: Backbone, built: nn.Module) -> None:
    arguments = backbone.batch(3).arguments
    reads = {key: value for key, value in backbone.reads.items() if key in ("select", "tokens")}
    with st.FeatureTap(built, backbone.shallow, **reads) as tap, torch.random.fork_rng():
        torch.manual_seed(0)
        backbone.call(built, arguments)
        found = tap.pop()
        torch.manual_seed(0)
        _, captured = plain.tapped(built, backbone.shallow, **arguments)
    assert torch.equal(found, backbone.pick(captured, arguments))
    assert found.requires_grad
