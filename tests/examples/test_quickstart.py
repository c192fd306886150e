"""The quickstart at a tiny size: every phase, its files, and going on where it stopped."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import quickstart
import torch
from common.data import LabelledImages, digits

from selftrans_reg.errors import LayerNotFoundError

TINY = [
    "--steps=6", "--samples=20", "--sampler-steps=2", "--vae-steps=3", "--classifier-steps=3", "--depth=4",
    "--hidden-size=12", "--head-features=8", "--stage1-layer=blocks.0", "--student-layer=blocks.1",
    "--teacher-layer=blocks.2",
]  # fmt: skip
FILES = {
    "settings.json", "vae", "classifier.pt", "plain.pt", "stage1.pt", "self.pt", "plain_samples.pt",
    "stage1_samples.pt", "self_samples.pt", "results.json", "quickstart.png",
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def few_digits() -> Iterator[None]:
    """The first digits alone: encoding all of them is most of a tiny run."""
    train, held_out = digits(quickstart.IMAGE_SIZE)
    few = [LabelledImages(data.images[:64], data.labels[:64]) for data in (train, held_out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart, "digits", lambda size: few)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quickstart") / "run"
    with torch.random.fork_rng():
        quickstart.main([*TINY, f"--out={out}"])
    return out


def checkpoint(out: Path, way: str) -> dict[str, object]:
    return torch.load(out / f"{way}.pt", weights_only=True)


def test_every_phase_leaves_its_file(finished: Path) -> None:
    assert {entry.name for entry in finished.iterdir()} == FILES
    results = json.loads((finished / "results.json").read_text())
    assert list(results["rows"]) == [
        "as is", "stage 1", "Self-Transcendence", "held-out digits through the VAE", "held-out digits: the floor",
    ]  # fmt: skip
    rows = results["rows"]
    stage1, own = (checkpoint(finished, way)["seconds"] for way in ("stage1", "self"))
    assert rows["Self-Transcendence"]["seconds"] == pytest.approx(stage1 + own)  # stage 1 is part of the price
    assert rows["Self-Transcendence"]["seconds_per_step"] == pytest.approx(own / 6)
    assert torch.load(finished / "self_samples.pt", weights_only=True)["images"].shape == (20, 1, 32, 32)


def test_the_three_begin_alike_and_see_the_same(finished: Path) -> None:
    first = {way: checkpoint(finished, way)["log"][0]["denoising"] for way in quickstart.WAYS}
    assert first["plain"] == first["stage1"] == first["self"]
    weights = [checkpoint(finished, way)["model"]["blocks.0.mlp.fc1.weight"] for way in quickstart.WAYS]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_guidance_ends_at_its_stop_step(finished: Path) -> None:
    log = checkpoint(finished, "self")["log"]
    assert log[0]["alignment"] > 0
    assert log[-1]["alignment"] == 0


def test_going_on_does_only_what_is_missing(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    times = {name: (finished / name).stat().st_mtime_ns for name in FILES}
    samples = torch.load(finished / "self_samples.pt", weights_only=True)["images"]
    (finished / "self_samples.pt").unlink()
    with torch.random.fork_rng():
        quickstart.main([*TINY, f"--out={finished}"])
    kept = FILES - {"self_samples.pt", "results.json", "quickstart.png"}
    assert {name: (finished / name).stat().st_mtime_ns for name in kept} == {name: times[name] for name in kept}
    assert torch.equal(torch.load(finished / "self_samples.pt", weights_only=True)["images"], samples)
    printed = capsys.readouterr().out
    for expected in ["Fréchet distance", "s / step", "held-out digits: the floor", "finished before", "than as is"]:
        assert expected in printed


def test_another_run_is_never_written_over(finished: Path) -> None:
    for match in ["other settings", "steps: 6 there, 7 now"]:
        with pytest.raises(ValueError, match=match):
            quickstart.main([*TINY, "--steps=7", f"--out={finished}"])


def test_a_wrong_layer_is_found_before_anything_is_trained(tmp_path: Path) -> None:
    for match in ["no layer 'blocks.9'", "blocks.0"]:
        with pytest.raises(LayerNotFoundError, match=match):
            quickstart.main([*TINY, "--teacher-layer=blocks.9", f"--out={tmp_path / 'run'}"])
    assert not os.path.exists(tmp_path / "run")  # noqa: PTH110


@pytest.mark.parametrize(("worse", "verdict"), [(2.0, "100% higher (worse)"), (0.5, "50% lower (better)")])
def test_the_verdict_says_which_is_better(worse: float, verdict: str) -> None:
    plain = {"frechet_distance": 10.0, "seconds": 4.0}
    sentence = quickstart.compared("it", {"frechet_distance": 10.0 * worse, "seconds": 10.0}, plain)
    assert verdict in sentence
    assert "2.50 times its seconds" in sentence
