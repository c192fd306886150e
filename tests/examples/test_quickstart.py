"""The quickstart at a tiny size: every phase, its files, and going on where it stopped."""

import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import quickstart
import torch
from common.data import LabelledImages, digits
from common.loading import sit_from_checkpoint
from common.training import timed_in_turns

import selftrans_reg as st
from selftrans_reg import LayerNotFoundError

TINY = [
    "--steps=6", "--samples=20", "--sampler-steps=2", "--vae-steps=3", "--classifier-steps=3", "--depth=4",
    "--hidden-size=12", "--head-features=8", "--stage1-layer=blocks.0", "--student-layer=blocks.1",
    "--teacher-layer=blocks.2",
]  # fmt: skip
FILES = {
    "settings.json", "vae", "classifier.pt", "baseline.pt", "stage1.pt", "stage2.pt", "baseline_samples.pt",
    "stage1_samples.pt", "stage2_samples.pt", "seconds.pt", "results.json", "quickstart.png", ".lock",
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
        "baseline", "stage 1", "stage 2", "held-out digits through the VAE", "held-out digits: the floor",
    ]  # fmt: skip
    rows, seconds = results["rows"], checkpoint(finished, "seconds")
    assert rows["stage 2"]["seconds"] == pytest.approx(6 * (seconds["stage1"] + seconds["stage2"]))  # part of the price
    assert rows["stage 2"]["seconds_per_step"] == pytest.approx(seconds["stage2"])
    assert checkpoint(finished, "stage2_samples")["images"].shape == (20, 1, 32, 32)
    _, found = sit_from_checkpoint(finished / "stage2.pt")
    assert (*found.conventions(), found.steps) == ("repa", "linear", 6)


def test_the_recipe_decides_what_is_not_given(finished: Path) -> None:
    settings = json.loads((finished / "settings.json").read_text())
    plan = st.recipe(quickstart.new_sit(quickstart.options(TINY)))
    assert (settings["guidance_scale"], settings["weight"]) == (plan.guidance_scale, plan.weight) == (8.0, 0.5)


def test_steps_are_timed_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is busy for some rounds makes all ways slower then, and no ratio wrong."""
    now, order = [0.0], []

    def step(name: str, seconds: float) -> None:
        order.append(name)
        now[0] += seconds * (20 if 15 <= len(order) < 30 else 1)

    monkeypatch.setattr("common.training.time.perf_counter", lambda: now[0])
    costs = {"baseline": 1.0, "stage1": 1.1, "stage2": 1.3}
    steps = {name: partial(step, name, cost) for name, cost in costs.items()}
    assert timed_in_turns(steps, rounds=15) == pytest.approx(costs)
    turns = [order[start : start + 3] for start in range(0, len(order), 3)]
    assert all({*turn} == {*costs} for turn in turns)
    assert {turn[0] for turn in turns} == {*costs}  # nobody is always first


def test_the_three_begin_alike_and_see_the_same(finished: Path) -> None:
    first = {way: checkpoint(finished, way)["log"][0]["denoising"] for way in quickstart.WAYS}
    assert first["baseline"] == first["stage1"] == first["stage2"]
    weights = [checkpoint(finished, way)["model"]["blocks.0.mlp.fc1.weight"] for way in quickstart.WAYS]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_guidance_ends_at_its_stop_step(finished: Path) -> None:
    log = checkpoint(finished, "stage2")["log"]
    assert log[0]["alignment"] > 0
    assert log[-1]["alignment"] == 0


def test_going_on_does_only_what_is_missing(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    times = {name: (finished / name).stat().st_mtime_ns for name in FILES}
    samples = torch.load(finished / "stage2_samples.pt", weights_only=True)["images"]
    (finished / "stage2_samples.pt").unlink()
    with torch.random.fork_rng():
        quickstart.main([*TINY, f"--out={finished}"])
    kept = FILES - {"stage2_samples.pt", "results.json", "quickstart.png"}
    assert {name: (finished / name).stat().st_mtime_ns for name in kept} == {name: times[name] for name in kept}
    assert torch.equal(torch.load(finished / "stage2_samples.pt", weights_only=True)["images"], samples)
    printed = capsys.readouterr().out
    for expected in [
        "Fréchet distance",
        "s / step",
        "held-out digits: the floor",
        "finished before",
        "than the baseline's",
    ]:
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
