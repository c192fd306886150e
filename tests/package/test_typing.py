"""What a user's type checker sees of the calls: their results, and typos in them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """\
import torch
import selftrans_reg as st

model, latents = torch.nn.Linear(4, 4), torch.zeros(2, 4, 8, 8)
teacher = st.build_teacher(model, None, layer="blocks.2", guidance_scale=3.0, null={"y": 10})
criterion = st.SelfTransLoss.stage2(model, layer="blocks.1", teacher=teacher, time="sit")
terms = criterion(torch.zeros(()), latents=latents, step=3)
terms.total.backward()
value: float = terms.alignment.item()
features: torch.Tensor = teacher(latents)
print(terms.alignement)
criterion(torch.zeros(()), latent=latents)
st.SelfTransLoss.stage1(model, layer="a", time="sit", latent_channels=4, patch_size=2, wieght=0.5)
"""
TYPOS = {"11": "alignement", "12": "latent", "13": "wieght"}
CHECKERS = {
    "mypy": ["--no-color-output", "--cache-dir", str(ROOT / ".mypy_cache")],
    "basedpyright": ["--pythonpath", sys.executable],  # pyright with its own Node.js: pyright fetches one
}


@pytest.mark.parametrize("checker", CHECKERS)
def test_a_call_gives_loss_terms_and_typos_are_errors(checker: str, tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(SCRIPT)
    settings = {"typeCheckingMode": "standard", "extraPaths": [str(ROOT)]}  # pyright's own rules
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", checker, *CHECKERS[checker], "user.py"]
    environment = os.environ | {"MYPYPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    errors = dict(re.findall(r"user\.py:(\d+)\b.* error: (.*)", done.stdout))
    assert errors.keys() == TYPOS.keys(), done.stdout + done.stderr
    assert all(f'"{typo}"' in errors[line] for line, typo in TYPOS.items())
