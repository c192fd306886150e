"""Every transformer of diffusers through both stages, in the table that docs/backbones.md shows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from backbones import assert_step_is_plain
from diffusers.models import transformers
from small_diffusers import KINDS, TABLE, attached, empty, row
from torch import Tensor

from selftrans_reg.modules import infer_width, named_layers

pytest.importorskip("diffusers", minversion="0.42", reason="the table is that of a version with all of its classes")
# Chroma and Mochi have these from diffusers itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.FluxPosEmbed. is deprecated"),
    pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype is not supported"),
]


def test_the_table_has_every_class() -> None:
    classes = {name for name, kind in vars(transformers).items() if isinstance(kind, type)}
    assert classes & set(dir(diffusers)) == TABLE.keys()


def test_the_docs_have_the_table() -> None:
    """Where this fails, ``PYTHONPATH=.:tests/support python tests/support/small_diffusers.py`` prints the rows."""
    page = (Path(__file__).parents[2] / "docs" / "backbones.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `") and line.split("`")[1] in TABLE]
    assert rows == [row(kind) for kind in TABLE]


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_equals_the_plain_formula(kind: str, stage: int) -> None:
    assert_step_is_plain(attached(kind), stage)


@pytest.mark.parametrize("kind", KINDS)
def test_a_width_is_right_or_asked_for_at_every_layer(kind: str) -> None:
    backbone = attached(kind)
    model, outputs = backbone.build(0), {}
    for layer in model.modules():
        layer.register_forward_hook(lambda layer, args, output: outputs.update({layer: output}))
    backbone.losses(model, backbone.batch(2))
    widths = {}
    for name, layer in named_layers(model).items():
        tensors = outputs[layer] if isinstance(outputs.get(layer), tuple) else (outputs.get(layer),)
        found = {tensor.shape[-1] for tensor in tensors if isinstance(tensor, Tensor) and tensor.ndim == 3}
        if found and infer_width(layer) is not None:
            widths[name] = (infer_width(layer), found)
    wrong = {name.rpartition(".")[2] for name, pair in widths.items() if pair[1] != {pair[0]}}
    # Of parts beside the blocks, or between two streams, it is a first call that tells.
    assert wrong <= {"local_facial_extractor", "audio_to_video_attn"}
    asked = {layer for layer in (backbone.shallow, backbone.student, backbone.teacher) if layer not in widths}
    assert bool(asked) == (backbone.asks is not None)


_SHORT = {"encoder_hidden_states": empty((3, 24))}
_POOLED = _SHORT | {"pooled_projections": torch.ones(20)}
_LONG = {"encoder_hidden_states": empty((9, 24)), "encoder_attention_mask": (torch.arange(9) < 2).long()}
OWN_LENGTH: dict[str, dict[str, Any]] = {
    "SD3Transformer2DModel": _POOLED,
    "FluxTransformer2DModel": _POOLED | {"txt_ids": torch.zeros(3, 3)},
    "HunyuanVideoTransformer3DModel": _POOLED | {"encoder_attention_mask": torch.ones(3).long()},
    "LTXVideoTransformer3DModel": _LONG,
    "SanaTransformer2DModel": _SHORT | {"encoder_attention_mask": None},
    "WanTransformer3DModel": _SHORT,
}


@pytest.mark.parametrize("kind", OWN_LENGTH)
def test_two_passes_with_a_null_of_its_own_length_equal_the_plain_formula(kind: str) -> None:
    backbone = replace(attached(kind), null=OWN_LENGTH[kind])
    assert_step_is_plain(backbone, 2, loop=0.0, tolerance={"rtol": 1e-6, "atol": 1e-7})
