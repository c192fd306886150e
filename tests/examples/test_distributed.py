"""The distributed example in two processes over gloo, as torchrun starts them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from common.sit import SiT

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TERMS = r"denoising (\d+\.\d+), alignment (\d+\.\d+)"


def test_two_processes_run_both_stages(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run = subprocess.run(
        [*launch, EXAMPLES / "distributed.py", "--steps=2", "--batch-size=4", f"--out={tmp_path}"],
        # Two processes of one thread each, on the CPU even where there is a GPU: there may be only one.
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    for stage in ("stage1", "stage2"):
        for step in range(2):  # one rank alone reports
            assert len(re.findall(f"{stage}, step {step}: {TERMS}", run.stdout)) == 1
        saved = torch.load(tmp_path / f"{stage}.pt")
        assert {name.split(".")[0] for name in saved["criterion"]} == {"_extra_state", "heads"}  # as without DDP
        SiT(input_size=16, in_channels=1, hidden_size=64, depth=6, num_heads=2, num_classes=10).load_state_dict(
            saved["model"]
        )
