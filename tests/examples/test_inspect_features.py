"""inspect_features on every kind of checkpoint, at a tiny size: what is measured, on what, and the folder it leaves."""

import argparse
import json
from pathlib import Path

import inspect_features
import numpy as np
import pytest
import torch
from common.coco_features import write_coco_features
from common.data import LabelledImages, digits
from common.mmdit import MMDiT
from common.options import Mistake
from common.vae import Scaling, load_vae
from tiny_runs import ARGS, MMDIT_SIZES, SCALE, write_checkpoint, write_run, write_vae

FAST = ["--noise-fractions=0.5", "--scales=1,4", "--samples=40", "--batch-size=20", "--k=3", "--device=cpu"]
FILES = {"settings.json", "report.json", "report.txt", "report.png", "features.png"}


def opened(*arguments: object) -> inspect_features.Subject:
    return inspect_features.opened(inspect_features.options([*map(str, arguments), *FAST]))


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """REPA's layout: sixty posteriors (4, 4, 4) of five classes."""
    folder, rng = tmp_path_factory.mktemp("data") / "vae-sd", np.random.default_rng(0)
    names = [f"00000/img-mean-std-{index:08d}.npy" for index in range(60)]
    (folder / "00000").mkdir(parents=True)
    for name in names:
        np.save(folder / name, rng.uniform(0.1, 1, (8, 4, 4)).astype(np.float32))
    (folder / "dataset.json").write_text(json.dumps({"labels": [[name, i % 5] for i, name in enumerate(names)]}))
    return folder


def test_a_quickstart_run_is_measured_on_its_own_latents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = [LabelledImages(part.images[:30], part.labels[:30]) for part in digits(32)]
    monkeypatch.setattr("common.demo.digits", lambda size: few)
    vae, sizes = load_vae(write_vae(tmp_path / "vae")), {"depth": 4, "num_classes": 10, "input_size": 8}
    path, out = write_checkpoint(tmp_path / "stage1.pt", 3, ARGS | sizes | {"data": "demo"}, **sizes), tmp_path / "out"
    report = inspect_features.main([str(path), f"--out={out}", *FAST])
    assert {entry.name for entry in out.iterdir()} == FILES
    assert (report.layers, report.classes) == (tuple(f"blocks.{i}" for i in range(4)), 10)
    assert {row.guidance_scale for row in report.rows} == {0, 1, 4, report.recipe.guidance_scale}
    assert max(row.contrast for row in report.rows) > 0.01  # the model's own null class was used
    assert str(report) in (out / "report.txt").read_text()
    with pytest.raises(Mistake, match=r"other settings.*\n.*k: 3 there, 5 now"):
        inspect_features.main([str(path), f"--out={out}", *FAST, "--k=5"])

    subject = opened(path)
    assert subject.measured == {"time": "repa", "null": {"y": 10}}
    x, y = (torch.cat(parts) for parts in zip(*inspect_features.latent_batches(subject.data, 40, 0, 20), strict=True))
    images, labels = (torch.cat(parts) for parts in zip(*few, strict=True))
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))[:40]
    posterior = vae.encode(images[order]).latent_dist
    assert torch.equal(y, labels[order])
    assert ((x / SCALE - posterior.mean) / posterior.std).std() == pytest.approx(1, abs=0.05)
    ink = subject.decode(x[:2])  # dark ink on white paper
    torch.testing.assert_close(ink, -vae.decode(x[:2] / SCALE).sample.clamp(-1, 1))


def test_a_run_of_sit_imagenet_says_all_by_itself(tmp_path: Path, latents: Path) -> None:
    run, out = write_run(tmp_path / "run", 7), tmp_path / "report"
    args = ARGS | {"data": str(latents), "depth": 4, "vae": str(write_vae(tmp_path / "vae", scale=0.18215))}
    write_checkpoint(run / "checkpoints/0000009.pt", 9, args, depth=4)
    report = inspect_features.main([str(run), f"--out={out}", *FAST, "--layers=blocks.0,blocks.3"])
    assert {entry.name for entry in out.iterdir()} == FILES
    assert (len(report.layers), report.classes, report.samples) == (2, 5, 40)


def test_a_foreign_sit_needs_to_be_told_its_time_and_data(tmp_path: Path, latents: Path) -> None:
    args = argparse.Namespace(num_heads=2, num_classes=5, class_dropout_prob=0.0)
    path = write_checkpoint(tmp_path / "foreign.pt", 3, args, class_dropout_prob=0.0)
    with pytest.raises(Mistake, match="--time repa if t = 1 was noise"):
        opened(path, f"--data={latents}")
    with pytest.raises(Mistake, match="pass --data FOLDER"):
        opened(path, "--time=sit")
    for said, on, time in [("sit", "linear", "sit"), ("sit", "cosine", "sit-gvp"), ("repa", "linear", "repa")]:
        subject = opened(path, f"--data={latents}", f"--time={said}", f"--path={on}")
        assert subject.measured == {"time": time, "null": None}  # without label dropout there is no null class
        assert subject.decode is None
    # What a file does say has to hold.
    shifted = write_checkpoint(tmp_path / "a.pt", 1, ARGS | {"scale_factor": 0.18215, "shift_factor": 3.0})
    with pytest.raises(Mistake, match=r"latents of scale 0.18215, shift 3.0; here they have scale 0.18215, shift 0.0"):
        opened(shifted, f"--data={latents}")


def test_an_mmdit_is_measured_without_labels(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    shapes = (4, 4, 4), (4, 4, 4), (2, 3, 6)
    items = [tuple(torch.rand(shape, generator=g) for shape in shapes) for _ in range(30)]
    write_coco_features(tmp_path / "features", "train", items, torch.zeros(3, 6), scaling=Scaling(0.5))
    sizes = {"depth": 3, "context_size": 6}
    args = MMDIT_SIZES | sizes | {"data": str(tmp_path / "features"), "vae": None}
    path, out = write_checkpoint(tmp_path / "t2i.pt", 5, args, MMDiT, **sizes), tmp_path / "report"
    report = inspect_features.main([str(path), f"--out={out}", *FAST])
    assert {entry.name for entry in out.iterdir()} == FILES
    assert report.layers == tuple(f"joint_blocks.{i}" for i in range(3))
    assert (report.classes, report.samples, report.recipe.depth) == (None, 30, 3)
    assert min(row.contrast for row in report.rows) > 0
