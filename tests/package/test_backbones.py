"""Every backbone that people train, as a look-alike, through both stages; and what differs from loop to loop."""

from __future__ import annotations

from dataclasses import replace

import peft
import plain
import pytest
from backbones import assert_step_is_plain
from lookalikes import LOOKALIKES
from loops import toy
from torch import nn

SIZES = [(8, (4, 8, 8)), (5, (4, 16, 16)), (12, (4, 8, 8)), (6, (4, 12, 4))]


STEADY = replace(LOOKALIKES["SiT"], build=toy)


def adapted(seed: int) -> nn.Module:
    """A student that is frozen but for an adapter before its layer, which does something."""
    if seed:  # the teacher
        return toy(seed)
    config = peft.LoraConfig(r=2, target_modules=["blocks.0.qkv"], init_lora_weights=False)
    with plain.global_seed(1):
        return peft.get_peft_model(toy(0), config)


# What PyTorch says of reentrant checkpointing without gradients, as fast-DiT's sampling does too.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", [*LOOKALIKES, "resolutions", "adapter"])
def test_a_step_equals_the_plain_formula(name: str, stage: int) -> None:
    backbone = {"resolutions": STEADY, "adapter": replace(STEADY, build=adapted)}.get(name) or LOOKALIKES[name]
    assert_step_is_plain(backbone, stage, SIZES if name == "resolutions" else ())
