"""The paper's runs at a tiny size: all stages, going on, the layouts on disk, and the published settings."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import sit_imagenet
import torch
from common import demo
from common.data import LabelledImages, digits
from common.loading import sit_from_checkpoint
from common.options import Mistake
from common.run_folder import locked
from common.sit import SiT
from common.trainer import Trainer
from long_runs import checkpoint, lines, own_state

import selftrans_reg as st
from selftrans_reg import CheckpointError, SelfTransError

TINY = ["--data=demo", "--demo-vae-steps=3", "--cpu", "--batch-size=4", "--log-every=1", "--workers=0"]
ALIGNED = ["--head-features=8", "--window=0.1,0.9"]  # nearly every t, as a batch has four
STEPS = 3


@pytest.fixture(autouse=True, scope="module")
def small_demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The first digits alone, one VAE of a few steps for all, and a demo of a quarter of its width."""
    few = [LabelledImages(data.images[:48], data.labels[:48]) for data in digits(demo.IMAGE_SIZE)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "digits", lambda size: few)
        patch.setattr(sit_imagenet, "DEMO_SIZE", {"patch_size": 2, "hidden_size": 24, "depth": 6, "num_heads": 3})
        patch.setitem(globals(), "TINY", [*TINY, f"--demo-data={tmp_path_factory.mktemp('demo') / 'demo-vae'}"])
        yield


def run(out: Path, *arguments: str, stage: str, steps: int = STEPS) -> Trainer:
    tiny = TINY if stage == "baseline" else [*TINY, *ALIGNED]
    with own_state():
        return sit_imagenet.main([f"--stage={stage}", f"--out={out}", f"--steps={steps}", *tiny, *arguments])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each stage, side by side."""
    folder = tmp_path_factory.mktemp("runs")
    run(folder / "baseline", stage="baseline")
    run(folder / "1", stage="1")
    run(folder / "2", f"--teacher={folder / '1' / 'teacher'}", stage="2")
    return folder


def test_every_stage_leaves_its_files_and_begins_alike(runs: Path) -> None:
    for stage, more in {"baseline": set(), "1": {"teacher"}, "2": set()}.items():
        found = {entry.name for entry in (runs / stage).iterdir()}
        assert found == {"settings.json", "checkpoints", "log.jsonl", "trackers", ".lock"} | more
        assert [path.name for path in (runs / stage / "checkpoints").iterdir()] == [f"{STEPS:07d}.pt"]
        assert [line["step"] for line in lines(runs / stage)] == [1, 2, 3]
    first = {stage: lines(runs / stage)[0] for stage in ("baseline", "1", "2")}
    assert first["baseline"]["denoising"] == first["1"]["denoising"] == first["2"]["denoising"]
    assert lines(runs / "baseline")[-1]["denoising"] != lines(runs / "1")[-1]["denoising"]
    assert first["1"]["loss"] > first["1"]["denoising"]


def test_the_teacher_is_the_average_of_stage_1(runs: Path) -> None:
    content = torch.load(checkpoint(runs / "1"), weights_only=True)
    model = sit_from_checkpoint(checkpoint(runs / "1"))[0]
    teacher = st.CFGFeatureTeacher.from_pretrained(runs / "1" / "teacher", model=model)
    for name, weight in teacher.model.state_dict().items():
        assert torch.equal(weight, content["ema"][name])
    assert (teacher.layer, teacher.guidance_scale, teacher.null) == ("blocks.3", 8.0, {"y": 10})
    assert (teacher.provenance["step"], teacher.provenance["latent_shape"]) == (STEPS, [4, 8, 8])
    assert teacher.provenance["latent_scale"] == content["args"]["scale_factor"]


def test_a_folder_has_one_process_and_one_teacher(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.run_folder._AFTER_A_KILL", 0)
    out, saved = tmp_path / "1", runs / "1" / "teacher" / "model.safetensors"
    before = saved.read_bytes()
    shutil.copytree(runs / "1", out, ignore=lambda *_: ["teacher"])  # as after a kill before it is written
    with pytest.raises(Mistake, match=r"lr: 0\.003 there, 0\.001 now"):
        run(out, "--lr=1e-3", stage="1")
    with locked(out), pytest.raises(Mistake, match="Another process is at work in"):
        run(out, stage="1", steps=4)
    assert lines(out) == lines(runs / "1")
    for folder in (out, runs / "1"):
        run(folder, "--log-with", stage="1")
        assert (folder / "teacher" / "model.safetensors").read_bytes() == before
    with pytest.raises(Mistake, match=r"left its teacher after 3 steps(.|\n)*--resume .*0000003.pt"):
        run(runs / "1", stage="1", steps=5)
    assert saved.read_bytes() == before


# Dynamo looks at the .grad of every tensor, and hides the warning of its own looking in a way that pytest undoes.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_run_starts_from_the_weights_of_another(tmp_path: Path, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # the usual one takes its time
    weights = torch.load(checkpoint(runs / "1"), weights_only=True)["ema"]
    theirs = {"ema": weights | {"projectors.0.0.weight": torch.ones(2, 2)}, "steps": 9}
    torch.save(theirs, tmp_path / "repa.pt")
    arguments = [f"--init={tmp_path / 'repa.pt'}", "--file-time=repa", "--lr=0", "--compile"]
    run(tmp_path / "new", *arguments, stage="baseline", steps=1)
    torch.compiler.reset()
    found = torch.load(checkpoint(tmp_path / "new", 1), weights_only=True)["model"]
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())


def test_what_a_run_records_is_enough_to_read_its_checkpoint(tmp_path: Path) -> None:
    settings = ["--path=cosine", "--qk-norm", "--learn-sigma", "--class-dropout=0"]
    trainer = run(tmp_path / "run", *settings, stage="baseline", steps=1)
    model, found = sit_from_checkpoint(checkpoint(tmp_path / "run", 1))
    own = trainer.ema.state_dict()
    assert all(torch.equal(weight, own[name]) for name, weight in model.state_dict().items())
    assert (*found.conventions(time="repa", path="cosine"), found.steps) == ("repa", "cosine", 1)
    assert f"--demo-data={found.args['vae']}" in TINY
    assert found.settings["class_dropout_prob"] == 0.0


@pytest.mark.parametrize("entry", ["--init", "--teacher", "--resume"])
def test_what_a_checkpoint_says_of_itself_is_compared(runs: Path, tmp_path: Path, entry: str) -> None:
    stage, path = "2" if entry == "--teacher" else "1", tmp_path / "theirs.pt"
    content = torch.load(checkpoint(runs / "1"), weights_only=True)

    def go_on(*arguments: str) -> None:
        run(tmp_path / "run", f"{entry}={path}", *arguments, stage=stage, steps=1)

    for said, match in [
        ({"path": "cosine"}, "trained on the cosine path; this run is on the linear path"),
        ({"scale_factor": 0.13025}, "latents of scale 0.13025, shift 0.0; here they have scale"),
        ({"time": "sit"}, "the time of 'sit' .t = 1 is data."),
        ({"num_heads": 6}, "num_heads: 6 there, 3 here"),
    ]:
        torch.save(content | {"args": content["args"] | said}, path)
        with pytest.raises(Mistake, match=match):
            go_on()
    torch.save(content | {"args": {}}, path)
    with pytest.raises(Mistake, match=r"does not say what its training called t(.|\n)*--file-time repa"):
        go_on()
    assert not (tmp_path / "run" / "checkpoints").exists()
    if entry != "--resume":
        go_on("--file-time=repa")  # the user's word


def test_an_artefact_and_its_checkpoint_are_one_teacher_at_any_layer_and_scale(runs: Path, tmp_path: Path) -> None:
    def taught_by(name: str, teacher: Path, *arguments: str) -> tuple[str, float, list[float]]:
        trainer = run(tmp_path / name, f"--teacher={teacher}", *arguments, stage="2", steps=1)
        found = trainer.criterion.teacher
        return found.layer, found.guidance_scale, found.fingerprint.tolist()

    folder, raw = runs / "1" / "teacher", checkpoint(runs / "1")
    layer, scale, fingerprint = taught_by("a", folder)
    assert (layer, scale, fingerprint) == taught_by("b", raw) == ("blocks.3", 8.0, fingerprint)
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    assert taught_by("c", raw, "--teacher-weights=model")[2] != fingerprint
    assert taught_by("d", folder, "--guidance-scale=7")[:2] == ("blocks.3", 7.0)
    assert taught_by("e", folder, "--teacher-layer=blocks.4")[:2] == ("blocks.4", 8.0)


def test_a_teacher_that_does_not_fit_is_named_before_anything_is_made(runs: Path, tmp_path: Path) -> None:
    model, folder = sit_from_checkpoint(checkpoint(runs / "1"))[0], runs / "1" / "teacher"
    scale = json.loads((folder / "config.json").read_text())["latent_scale"]
    other = st.build_teacher(model, None, layer="blocks.3", guidance_scale=3.0, null={"y": 10})
    other.save_pretrained(tmp_path / "shifted", latent_scale=scale, latent_shift=0.5)
    for kind, teacher, argument, text in [
        (CheckpointError, folder, "--qk-norm", "q_norm"),
        (Mistake, folder, "--teacher-weights=model", "was saved with one kind"),
        (SelfTransError, folder, "--path=cosine", "time convention"),
        (Mistake, tmp_path / "shifted", "--cpu", r"other data(.|\n)*, shift 0\.5, and here "),
    ]:
        with pytest.raises(kind, match=text):
            run(tmp_path / "run", f"--teacher={teacher}", argument, stage="2", steps=1)
        assert not (tmp_path / "run").exists()


def test_repas_layout_trains_in_two_processes(tmp_path: Path) -> None:
    data, out = tmp_path / "vae-sd", tmp_path / "run"
    (data / "00000").mkdir(parents=True)
    labels = [(f"00000/img-mean-std-{index:08d}.npy", index % 3) for index in range(12)]
    for index, (name, _) in enumerate(labels):
        np.save(data / name, np.random.default_rng(index).uniform(0.1, 0.2, size=(8, 8, 8)).astype(np.float32))
    (data / "dataset.json").write_text(json.dumps({"labels": labels}))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    given = [f"--data={data}", "--model=demo", "--batch-size=4", "--steps=2", "--log-every=1", "--micro-batches=2"]
    done = subprocess.run(
        [*launch, sit_imagenet.__file__, "--stage=1", f"--out={out}", "--workers=0", *given],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in lines(out)] == [1, 2]  # one process writes
    assert done.stdout.count("The teacher for --stage 2") == 1
    assert (out / "teacher" / "config.json").exists()
    args = torch.load(checkpoint(out, 2), weights_only=True)["args"]
    assert (args["num_classes"], args["scale_factor"], args["input_size"]) == (3, 0.18215, 8)


def test_random_latents(tmp_path: Path) -> None:
    arguments = ["--data=random-512", "--model=demo", "--batch-size=1"]
    trainer = run(tmp_path / "run", *arguments, stage="baseline", steps=1)
    assert (trainer.ema.num_classes, trainer.ema.pos_embed.shape) == (1000, (1, 32**2, 24))


def settled(*arguments: str, stage: str = "2") -> argparse.Namespace:
    teacher = [f"--teacher={__file__}"] if stage == "2" else []  # any file: it is not read here
    found = sit_imagenet.options([f"--stage={stage}", "--out=o", "--data=latents", *teacher, *arguments])
    sit_imagenet.settle_sit(found, partial(SiT, **sit_imagenet.DEMO_SIZE))
    return found


def test_the_published_settings() -> None:
    for model, student, teacher, stop in [
        ("SiT-B/2", "blocks.5", "blocks.7", 100_000), ("SiT-XL/2", "blocks.13", "blocks.17", 50_000)
    ]:  # fmt: skip
        run = settled(f"--model={model}")
        assert (run.layer, run.teacher_layer, run.guidance_scale, run.stop_step) == (student, teacher, 30.0, stop)
        assert (run.window, run.weight, run.gating, run.teacher_weights) == ((0.4, 0.7), 0.5, "per-sample", "ema")
        assert (run.steps, run.batch_size, run.lr, run.ema_decay, run.warmup_steps) == (400_000, 256, 1e-4, 0.9999, 0)
        assert (run.betas, run.weight_decay, run.clip, run.class_dropout) == ([0.9, 0.999], 0.0, 1.0, 0.1)
        assert (run.head_features, run.path, run.learn_sigma, run.qk_norm) == (2048, "linear", False, False)
    one, none = (settled("--model=SiT-B/2", stage=stage) for stage in ("1", "baseline"))
    assert (one.layer, one.target, one.steps, one.stop_step) == ("blocks.1", "latents", 200_000, 0)
    assert (none.layer, none.teacher_layer, none.stop_step, none.steps) == (None, None, None, 400_000)
    released = settled("--recipe=released", "--model=SiT-B/2", stage="1")
    assert (released.target, released.gating, released.teacher_weights) == ("velocity", "released", "model")
    assert (released.qk_norm, released.layer) == (True, "blocks.1")
    given = settled("--recipe=released", "--no-qk-norm", "--layer=blocks.3", "--window=0.1,0.9", "--lr=0.5")
    assert (given.qk_norm, given.layer, given.window, given.lr) == (False, "blocks.3", (0.1, 0.9), 0.5)


def test_wrong_options_end_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, text in [
        (["--stage=baseline", "--layer=blocks.1"], "--layer: not an option of baseline"),
        (["--stage=1", "--teacher=x"], "--teacher: not an option of stage 1"),
        (["--stage=2"], "stage 2 needs --teacher: the folder that a run of --stage 1 left"),
        (["--stage=1", "--class-dropout=0"], "null class, which --class-dropout 0"),
    ]:
        with pytest.raises(SystemExit, match="2"):
            sit_imagenet.main([*arguments, "--data=demo", f"--out={tmp_path / 'out'}"])
        (line,) = capsys.readouterr().err.splitlines()
        assert text in line
