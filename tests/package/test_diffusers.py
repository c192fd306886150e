"""Every transformer of diffusers through both stages, in the table that docs/backbones.md shows."""

from __future__ import annotations

import re
from pathlib import Path

import diffusers
import pytest
from backbones import assert_step_is_plain
from diffusers.models import transformers
from small_diffusers import KINDS, TABLE, attached, row

pytest.importorskip("diffusers", minversion="0.42", reason="the table is that of a version with all of its classes")
# Chroma and Mochi have these from diffusers itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.FluxPosEmbed. is deprecated"),
    pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype is not supported"),
]


def test_the_docs_have_the_table_of_every_class() -> None:
    """Where this fails, ``PYTHONPATH=.:tests/support python tests/support/small_diffusers.py`` prints the rows."""
    classes = {name for name, kind in vars(transformers).items() if isinstance(kind, type)}
    assert classes & set(dir(diffusers)) == TABLE.keys()
    page = (Path(__file__).parents[2] / "docs" / "backbones.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("| `") and line.split("`")[1] in TABLE]
    rows = [re.sub(r"` \(.*\) \|$", "` |", line) for line in lines]  # without the notes
    assert rows == [row(kind) for kind in TABLE]


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_equals_the_plain_formula(kind: str, stage: int) -> None:
    assert_step_is_plain(attached(kind), stage)
