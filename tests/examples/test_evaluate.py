"""Evaluation at a tiny size: features that a file names, statistics that are kept, and a run's curve."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from common import metrics
from common.data import LabelledImages, digits
from common.data_files import DataError
from common.images import to_uint8, write_png
from common.metrics import extractor_named, feature_statistics, frechet_distance, precision_recall
from common.options import Mistake
from numpy.typing import NDArray
from PIL import Image
from tiny_runs import FAST, write_run

FEATURES = '''
import torch
calls = []

def colours(images):
    """Mean and corner of each colour, (N, 6): features that somebody wrote beside their data."""
    calls.append(len(images))
    return torch.cat([images.float().mean((2, 3)), images[:, :, 0, 0].float()], dim=1)

def brightness(images):
    return colours(images)[:, :2].numpy()
'''


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a module of features, 40 images of the data and 30 samples."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_features.py").write_text(FEATURES)
    rng = np.random.default_rng(0)
    for name, count, low in [("data", 40, 0), ("samples", 30, 60)]:
        (tmp_path / name).mkdir()
        for i in range(count):
            write_png(rng.integers(low, 256, size=(4, 4, 3), dtype=np.uint8), tmp_path / name / f"{i:03d}.png")
    yield tmp_path
    sys.modules.pop("my_features", None)


def plain_features(folder: Path) -> NDArray[np.float64]:
    images = np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]).astype(float)
    return np.concatenate([images.mean((1, 2)), images[:, 0, 0]], axis=1)


COLOURS = ["--features=my_features:colours", "--device=cpu", "--batch-size=7"]


def test_the_row_is_what_the_metrics_give_of_the_images(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = evaluate.main(["--samples=samples", "--reference=data", *COLOURS])["samples"]
    data, samples = plain_features(here / "data"), plain_features(here / "samples")
    distance = frechet_distance(feature_statistics(data), feature_statistics(samples))
    assert (row["samples"], row["frechet_distance"]) == (30, pytest.approx(distance, rel=1e-5))
    assert (row["precision"], row["recall"]) == precision_recall(data, samples)
    assert 0 < row["spread"] < row["frechet_distance"]
    assert "Features: my_features:colours. Reference: 40 images." in capsys.readouterr().out


def test_statistics_are_kept_and_serve_their_features_and_images_alone(here: Path) -> None:
    arguments = ["--samples=samples", "--reference=data", "--statistics=cache/data.npz", *COLOURS]
    first = evaluate.main(arguments)
    before = (here / "cache/data.npz").read_bytes()
    calls = sys.modules["my_features"].calls
    calls.clear()
    assert evaluate.main(arguments) == first
    assert sum(calls) == 30  # the samples alone
    for option, other in [("--features", "my_features:brightness"), ("--reference", "samples")]:
        with pytest.raises(DataError, match=rf"other features or images(.|\n)*:colours.* asked for: .*{other}"):
            evaluate.main([*arguments, option, other])
    assert [path.name for path in (here / "cache").iterdir()] == ["data.npz"]
    assert (here / "cache/data.npz").read_bytes() == before
    np.savez(here / "VIRTUAL.npz", mu=np.zeros(6), sigma=np.eye(6))
    with pytest.raises(DataError, match=r"VIRTUAL.npz cannot be read as statistics of features: KeyError"):
        evaluate.main(["--samples=samples", "--reference=data", "--statistics=VIRTUAL.npz", *COLOURS])


def test_the_digits_need_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out digits are nearer to the training digits than the same digits inverted, by the demo's own classifier."""
    train, held_out = (LabelledImages(d.images[:200], d.labels[:200]) for d in digits(32))
    monkeypatch.setattr("common.data.digits", lambda size: (train, held_out))
    monkeypatch.setattr(metrics, "digits", lambda size: (train, held_out))
    monkeypatch.setattr(metrics, "_CLASSIFIER_STEPS", 30)
    monkeypatch.chdir(tmp_path)
    rows = {}
    for name, sign in [("held_out", 1), ("inverted", -1)]:
        np.savez(tmp_path / f"{name}.npz", to_uint8(sign * held_out.images))
        rows |= evaluate.main([f"--samples={name}.npz", "--reference=digits", "--features=digits", "--device=cpu"])
    assert rows["held_out.npz"]["frechet_distance"] < 0.2 * rows["inverted.npz"]["frechet_distance"]
    assert rows["held_out.npz"]["precision"] > 0.6 > 0.2 > rows["inverted.npz"]["precision"]

    extractor = extractor_named("digits", "cpu")
    (tmp_path / "runs/digits_classifier.pt").unlink()
    monkeypatch.setattr(metrics, "_CLASSIFIER_STEPS", 31)
    assert extractor_named("digits", "cpu").name != extractor.name  # features of another training are other features
    with pytest.raises(Mistake, match=r"images of 32x32.\nFound: \(2, 3, 16, 16\)"):
        extractor(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))


def test_runs_become_curves_to_which_new_checkpoints_are_added(here: Path) -> None:
    write_run(here / "run", 4, 12)
    fast = [argument for argument in FAST if "batch" not in argument]
    curve, out = ["--run=run", "--out=curve", "--reference=data", *COLOURS, *fast], here / "curve"
    rows = evaluate.main(curve)
    assert {path.name for path in out.iterdir()} == {
        "settings.json", "statistics.npz", "samples", "scores", "results.json", "distance.png",
    }  # fmt: skip
    assert list(rows) == ["run 4", "run 12"]
    assert json.loads((out / "results.json").read_text()) == {
        "run": {"0000004": rows["run 4"], "0000012": rows["run 12"]}
    }
    alone = evaluate.main(["--samples=curve/samples/run/0000012", "--reference=data", *COLOURS])
    assert alone["0000012"] == rows["run 12"]

    kept = [*out.glob("samples/**/*.png"), *out.glob("samples/**/*.npz"), *out.glob("scores/**/*.json")]
    kept = [path for path in kept if path.name != "grid.png"]
    assert len(kept) == 2 * (10 + 1 + 1)
    times = {path: path.stat().st_mtime_ns for path in kept}
    write_run(here / "other", 20, 24)
    (here / "other/checkpoints/0000020.pt").rename(here / "run/checkpoints/0000020.pt")
    (here / "run/checkpoints/0000004.pt").unlink()  # as a trainer does that keeps its newest
    more = evaluate.main([*curve, "--run", "run", "other"])
    assert list(more) == ["run 4", "run 12", "run 20", "other 24"]
    assert {name: more[name] for name in rows} == rows
    assert {path: path.stat().st_mtime_ns for path in kept} == times
    with pytest.raises(Mistake, match="num_samples: 10 there, 9 now"):
        evaluate.main([*curve, "--num-samples=9"])
    (here / "run/checkpoints/0000012.pt").write_bytes((here / "run/checkpoints/0000020.pt").read_bytes())
    with pytest.raises(Mistake, match="checkpoint_weights: "):
        evaluate.main(curve)


@pytest.mark.parametrize("arguments", [["--run=b"], ["--run", "a/b", "c/b", "--out=b"]])
def test_options_that_do_not_go_together(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        evaluate.options([*arguments, "--reference=c", "--features=digits"])
