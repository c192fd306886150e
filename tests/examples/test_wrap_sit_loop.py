"""The wrapped loop runs both stages, and the lines marked new are all that the method adds."""

from pathlib import Path

import pytest
import torch
import wrap_sit_loop
from common.data import LabelledImages, digits


def test_both_stages_run_and_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train, held_out = digits(16)
    few = LabelledImages(train.images[:64], train.labels[:64])  # two batches
    monkeypatch.setattr(wrap_sit_loop, "digits", lambda size: (few, held_out))
    with torch.random.fork_rng():
        wrap_sit_loop.main(["--epochs=1", f"--out={tmp_path / 'run'}"])
    assert {entry.name for entry in (tmp_path / "run").iterdir()} == {"stage1.pt", "stage2.pt"}
    for name in ("stage1", "stage2"):
        saved = torch.load(tmp_path / f"run/{name}.pt", weights_only=True)
        wrap_sit_loop.new_model().load_state_dict(saved["ema"])
    printed = capsys.readouterr().out
    assert "stage1, epoch 0: denoising" in printed
    assert "stage2, epoch 0: denoising" in printed
