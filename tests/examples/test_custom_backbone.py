"""The two-stream backbone: both stages run; other tokens than the image's would not fit its grid."""

import re

import custom_backbone
import pytest
import torch


def test_both_stages_run(capsys: pytest.CaptureFixture[str]) -> None:
    with torch.random.fork_rng():
        custom_backbone.main(["--steps=2"])
    assert re.findall(r"(stage \d, step 1): denoising", capsys.readouterr().out) == [
        "stage 1, step 1",
        "stage 2, step 1",
    ]
