"""The wrapped loop runs both stages, and saves a model of each."""

from pathlib import Path

import pytest
import torch
import wrap_sit_loop
from common.data import LabelledImages, digits


def test_both_stages_run_and_save(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = LabelledImages(*(part[:64] for part in digits(16)[0]))
    monkeypatch.setattr(wrap_sit_loop, "digits", lambda size: (few, few))
    with torch.random.fork_rng():
        wrap_sit_loop.main(["--epochs=1", f"--out={tmp_path}"])
        printed = capsys.readouterr().out
        for stage in ("stage1", "stage2"):
            saved = torch.load(tmp_path / f"{stage}.pt", weights_only=True)
            wrap_sit_loop.new_model().load_state_dict(saved["ema"])
            assert f"{stage}, epoch 0: denoising" in printed
