"""Every backbone that people train, as a look-alike, through one step of both stages."""

from __future__ import annotations

import pytest
from backbones import assert_step_is_plain
from lookalikes import LOOKALIKES


# What PyTorch says of reentrant checkpointing without gradients, as fast-DiT's sampling does too.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", LOOKALIKES)
def test_a_step_equals_the_plain_formula(name: str, stage: int) -> None:
    assert_step_is_plain(LOOKALIKES[name], stage)
