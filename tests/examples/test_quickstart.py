"""The quickstart at a tiny size: every phase, its files, and going on where it stopped."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import quickstart
import torch
from common.data import LabelledImages, digits
from common.loading import sit_from_checkpoint
from common.options import Mistake

TINY = [
    "--steps=6", "--samples=20", "--sampler-steps=2", "--vae-steps=3", "--classifier-steps=3", "--depth=4",
    "--hidden-size=12", "--head-features=8",
]  # fmt: skip
MADE_ANEW = {"stage2_samples.pt", "results.json", "quickstart.png"}
KEPT = {
    "settings.json", "vae", "classifier.pt", "baseline.pt", "stage1.pt", "stage2.pt", "baseline_samples.pt",
    "stage1_samples.pt", ".lock",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished run on the first digits alone: encoding all of them is most of a tiny run."""
    out = tmp_path_factory.mktemp("quickstart") / "run"
    few = [LabelledImages(data.images[:64], data.labels[:64]) for data in digits(quickstart.IMAGE_SIZE)]
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.setattr(quickstart, "digits", lambda size: few)
        quickstart.main([*TINY, f"--out={out}"])
        yield out


def test_the_three_begin_alike_and_guidance_ends_at_its_stop_step(finished: Path) -> None:
    _, found = sit_from_checkpoint(finished / "stage2.pt")
    assert (*found.conventions(), found.steps) == ("repa", "linear", 6)
    runs = {way: torch.load(finished / f"{way}.pt", weights_only=True) for way in quickstart.WAYS}
    first, last = ({way: run["log"][i] for way, run in runs.items()} for i in (0, -1))
    assert first["baseline"]["denoising"] == first["stage1"]["denoising"] == first["stage2"]["denoising"]
    plain, *others = [run["model"]["blocks.0.mlp.fc1.weight"] for run in runs.values()]
    assert not any(torch.equal(plain, other) for other in others)
    assert min(last["stage1"]["alignment"], first["stage2"]["alignment"]) > 0 == last["stage2"]["alignment"]


def test_going_on_does_only_what_is_missing(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert {entry.name for entry in finished.iterdir()} == KEPT | MADE_ANEW
    times = {name: (finished / name).stat().st_mtime_ns for name in KEPT}
    samples = torch.load(finished / "stage2_samples.pt")["images"]
    assert samples.shape == (20, 1, 32, 32)
    (finished / "stage2_samples.pt").unlink()
    quickstart.main([*TINY, f"--out={finished}"])
    assert {name: (finished / name).stat().st_mtime_ns for name in KEPT} == times
    assert torch.equal(torch.load(finished / "stage2_samples.pt")["images"], samples)
    rows = list(json.loads((finished / "results.json").read_text())["rows"])
    assert rows[:3] == ["baseline", "stage 1", "stage 2"]
    printed = capsys.readouterr().out
    assert all(row in printed for row in [*rows, "held-out digits: the floor", "Fréchet distance"])
    with pytest.raises(Mistake, match=r"other settings.\n.*steps: 6 there, 7 now"):
        quickstart.main([*TINY, "--steps=7", f"--out={finished}"])
