"""The distributed example in two processes over gloo, as torchrun starts them."""

import re
from pathlib import Path

import torch
import wrap_sit_loop
from tiny_runs import torchrun


def test_two_processes_run_both_stages(tmp_path: Path) -> None:
    printed = torchrun("distributed.py", "--steps=2", "--batch-size=4", f"--out={tmp_path}")
    for stage in ("stage1", "stage2"):
        reported = re.findall(rf"{stage}, step (\d): denoising \d+\.\d+, alignment \d+\.\d+", printed)
        assert reported == ["0", "1"]  # by one rank alone
        saved = torch.load(tmp_path / f"{stage}.pt")
        assert {name.split(".")[0] for name in saved["criterion"]} == {"_extra_state", "heads"}  # as without DDP
        with torch.random.fork_rng():
            wrap_sit_loop.new_model().load_state_dict(saved["model"])
