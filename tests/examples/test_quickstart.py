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
FILES = {
    "settings.json", "vae", "classifier.pt", "baseline.pt", "stage1.pt", "stage2.pt", "baseline_samples.pt",
    "stage1_samples.pt", "stage2_samples.pt", "results.json", "quickstart.png", ".lock",
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def few_digits() -> Iterator[None]:
    """The first digits alone: encoding all of them is most of a tiny run."""
    few = [LabelledImages(data.images[:64], data.labels[:64]) for data in digits(quickstart.IMAGE_SIZE)]
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.setattr(quickstart, "digits", lambda size: few)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quickstart") / "run"
    quickstart.main([*TINY, f"--out={out}"])
    return out


def checkpoint(out: Path, way: str) -> dict[str, object]:
    return torch.load(out / f"{way}.pt", weights_only=True)


def test_every_phase_leaves_its_file(finished: Path) -> None:
    assert {entry.name for entry in finished.iterdir()} == FILES
    results = json.loads((finished / "results.json").read_text())
    real = ["held-out digits through the VAE", "held-out digits: the floor"]
    assert list(results["rows"]) == ["baseline", "stage 1", "stage 2", *real]
    assert checkpoint(finished, "stage2_samples")["images"].shape == (20, 1, 32, 32)
    _, found = sit_from_checkpoint(finished / "stage2.pt")
    assert (*found.conventions(), found.steps) == ("repa", "linear", 6)


def test_the_three_begin_alike_and_guidance_ends_at_its_stop_step(finished: Path) -> None:
    log = {way: checkpoint(finished, way)["log"] for way in quickstart.WAYS}
    assert log["baseline"][0]["denoising"] == log["stage1"][0]["denoising"] == log["stage2"][0]["denoising"]
    plain, *others = [checkpoint(finished, way)["model"]["blocks.0.mlp.fc1.weight"] for way in quickstart.WAYS]
    assert not any(torch.equal(plain, other) for other in others)
    assert log["stage1"][-1]["alignment"] > 0
    assert log["stage2"][0]["alignment"] > 0
    assert log["stage2"][-1]["alignment"] == 0


def test_going_on_does_only_what_is_missing(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    times = {name: (finished / name).stat().st_mtime_ns for name in FILES}
    samples = checkpoint(finished, "stage2_samples")["images"]
    (finished / "stage2_samples.pt").unlink()
    quickstart.main([*TINY, f"--out={finished}"])
    kept = FILES - {"stage2_samples.pt", "results.json", "quickstart.png"}
    assert {name: (finished / name).stat().st_mtime_ns for name in kept} == {name: times[name] for name in kept}
    assert torch.equal(checkpoint(finished, "stage2_samples")["images"], samples)
    printed = capsys.readouterr().out
    for expected in ["Fréchet distance", "held-out digits: the floor", "finished before"]:
        assert expected in printed
    with pytest.raises(Mistake, match=r"other settings.\n.*steps: 6 there, 7 now"):
        quickstart.main([*TINY, "--steps=7", f"--out={finished}"])
