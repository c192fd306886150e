"""inspect_features on every kind of checkpoint, at a tiny size: the folder it leaves, going on, wrong use."""

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
from tiny_runs import ARGS, SCALE, write_checkpoint, write_run, write_vae

FAST = ["--noise-fractions=0.5", "--scales=1,4", "--samples=40", "--batch-size=20", "--k=3", "--device=cpu"]
FILES = {"settings.json", "report.json", "report.txt", "report.png", "features.png"}
DEMO = {"depth": 4, "num_classes": 10, "input_size": 8}


def subject_of(path: Path, *options: str) -> inspect_features.Subject:
    run = inspect_features.options([str(path), *FAST, *options])
    args = torch.load(path, weights_only=False).get("args", {})
    return inspect_features.of_mmdit(run) if "context_size" in args else inspect_features.of_sit(run)


@pytest.fixture(autouse=True)
def few_digits(monkeypatch: pytest.MonkeyPatch) -> list[LabelledImages]:
    few = [LabelledImages(part.images[:30], part.labels[:30]) for part in digits(32)]
    monkeypatch.setattr("common.demo.digits", lambda size: few)
    return few


@pytest.fixture(scope="module")
def quickstart_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of the quickstart leaves that is read here: a VAE, and checkpoints."""
    folder = tmp_path_factory.mktemp("runs") / "quickstart"
    write_vae(folder / "vae")
    for way in ("baseline", "stage1"):
        write_checkpoint(folder / f"{way}.pt", 3, ARGS | DEMO | {"data": "demo"}, **DEMO)
    return folder


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """REPA's layout: sixty posteriors (4, 4, 4) of five classes."""
    folder, generator = tmp_path_factory.mktemp("data") / "vae-sd", torch.Generator().manual_seed(0)
    (folder / "00000").mkdir(parents=True)
    entries = []
    for index in range(60):
        name = f"00000/img-mean-std-{index:08d}.npy"
        mean = torch.randn(4, 4, 4, generator=generator)
        np.save(folder / name, torch.cat([mean, torch.full_like(mean, 0.1)]).numpy())
        entries.append([name, index % 5])
    (folder / "dataset.json").write_text(json.dumps({"labels": entries}))
    return folder


def files_of(out: Path) -> set[str]:
    return {entry.name for entry in out.iterdir()}


def test_a_quickstart_run_is_measured(quickstart_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    call = [str(quickstart_run / "stage1.pt"), f"--out={out}", *FAST]
    report = inspect_features.main(call)
    assert files_of(out) == FILES
    assert (report.layers, report.classes) == (tuple(f"blocks.{i}" for i in range(4)), 10)
    assert {row.guidance_scale for row in report.rows} == {0, 1, 4, report.recipe.guidance_scale}
    assert max(row.contrast for row in report.rows) > 0.01  # the model's own null class was used
    assert str(report) in (out / "report.txt").read_text()

    with pytest.raises(Mistake, match=r"other settings.*\n.*k: 3 there, 5 now"):
        inspect_features.main([*call, "--k=5"])


def test_the_batches_are_the_latents_that_the_model_was_trained_on(
    quickstart_run: Path, few_digits: list[LabelledImages]
) -> None:
    subject = subject_of(quickstart_run / "baseline.pt")
    assert subject.measured == {"time": "repa", "null": {"y": 10}}
    x, y = (torch.cat(parts) for parts in zip(*subject.batches(20), strict=True))
    assert torch.equal(x, torch.cat([x for x, _ in subject.batches(20)]))
    assert x.shape == (40, 4, 8, 8)
    vae = load_vae(quickstart_run / "vae")
    images, labels = (torch.cat(parts) for parts in zip(*few_digits, strict=True))
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
    assert files_of(out) == FILES
    assert (len(report.layers), report.classes, report.samples) == (2, 5, 40)


@pytest.mark.parametrize(
    ("options", "time"),
    [(["--time=sit"], "sit"), (["--time=sit", "--path=cosine"], "sit-gvp"), (["--time=repa"], "repa")],
)
def test_a_foreign_sit_needs_to_be_told_its_time_and_data(
    options: list[str], time: str, tmp_path: Path, latents: Path
) -> None:
    path = write_checkpoint(tmp_path / "foreign.pt", 3, class_dropout_prob=0.0)
    sizes = {"num_heads": 2, "num_classes": 5, "class_dropout_prob": 0.0}
    torch.save(torch.load(path, weights_only=True) | {"args": argparse.Namespace(**sizes)}, path)
    run = [str(path), f"--data={latents}"]
    with pytest.raises(Mistake, match="--time repa if t = 1 was noise"):
        inspect_features.of_sit(inspect_features.options(run))
    with pytest.raises(Mistake, match="pass --data FOLDER"):
        inspect_features.of_sit(inspect_features.options([run[0], *options]))
    subject = inspect_features.of_sit(inspect_features.options([*run, *options]))
    assert subject.measured == {"time": time, "null": None}  # without label dropout there is no null class
    assert subject.decode is None


def test_other_latents_than_the_models_are_refused(tmp_path: Path, latents: Path) -> None:
    known, vae = f"--data={latents}", str(write_vae(tmp_path / "vae", scale=0.18215))
    changes = {"scale_factor": 0.18215, "shift_factor": 3.0}
    path = write_checkpoint(tmp_path / "a.pt", 1, ARGS | {"vae": vae} | changes)
    with pytest.raises(Mistake, match=r"other latents than these(.|\n)*scale 0.18215, shift 0.0; .* shift 3.0"):
        subject_of(path, known)
    shifted = write_vae(tmp_path / "shifted", scale=0.18215, shift_factor=3.0)
    path = write_checkpoint(tmp_path / "a.pt", 1, ARGS | {"vae": vae})
    with pytest.raises(Mistake, match="is not the one that the latents of"):
        subject_of(path, known, f"--vae={shifted}")
    lost = write_checkpoint(tmp_path / "b.pt", 1, ARGS | DEMO | {"data": "demo", "vae": "elsewhere"}, **DEMO)
    with pytest.raises(Mistake, match="The demo's VAE is not at elsewhere"):
        subject_of(lost)
    with pytest.raises(Mistake, match=r"no file nothing\.pt"):
        inspect_features.main(["nothing.pt"])


def test_an_mmdit_is_measured_without_labels(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    items = [
        (torch.randn(4, 4, 4, generator=g), torch.full((4, 4, 4), 0.1), torch.randn(2, 3, 6, generator=g))
        for _ in range(30)
    ]
    write_coco_features(tmp_path / "features", "train", items, torch.zeros(3, 6), scaling=Scaling(0.5))
    sizes = {"input_size": 4, "patch_size": 2, "in_channels": 4, "hidden_size": 16, "depth": 3, "num_heads": 2}
    sizes |= {"context_size": 6}
    with torch.random.fork_rng():
        state = {key: 0.3 * torch.randn_like(value) for key, value in MMDiT(**sizes).state_dict().items()}
    content = {"model": state, "ema": state, "steps": 5}
    torch.save(content | {"args": sizes | {"data": str(tmp_path / "features"), "vae": None}}, tmp_path / "t2i.pt")
    report = inspect_features.main([str(tmp_path / "t2i.pt"), f"--out={tmp_path / 'report'}", *FAST])
    assert files_of(tmp_path / "report") == FILES
    assert report.layers == tuple(f"joint_blocks.{i}" for i in range(3))
    assert (report.classes, report.samples, report.recipe.depth) == (None, 30, 3)
    assert min(row.contrast for row in report.rows) > 0
