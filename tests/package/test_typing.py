"""What a user's type checker sees of the calls: their results, and typos in them."""

import os
import subprocess
import sys
from pathlib import Path

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
TYPOS = {11: "alignement", 12: "latent", 13: "wieght"}


def test_a_call_gives_loss_terms_and_typos_are_errors(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(SCRIPT)
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "mypy", "--no-color-output", "--cache-dir", str(root / ".mypy_cache"), "user.py"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"MYPYPATH": str(root)}, check=False
    )
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert [int(line.split(":")[1]) for line in errors] == list(TYPOS), done.stdout + done.stderr
    assert all(f'"{typo}"' in line for line, typo in zip(errors, TYPOS.values(), strict=True))
