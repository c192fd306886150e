"""The paper's runs at a tiny size: all stages, going on, the layouts on disk, and the published settings."""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import encode_latents
import numpy as np
import pytest
import sit_imagenet
import torch
from common import demo_latents
from common.data import LabelledImages, digits
from common.load_sit import sit_from_checkpoint
from common.sit_settings import options, settle
from common.trainer import Trainer
from common.vae import new_vae
from long_runs import differences, lines, own_state
from PIL import Image

import selftrans_reg as st
from selftrans_reg.errors import CheckpointError, LayerNotFoundError, SelfTransError, SettingError

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TINY = ["--data=demo", "--cpu", "--batch-size=4", "--log-every=1"]
ALIGNED = ["--head-features=8", "--window=0.1,0.9"]  # nearly every t, as a batch has four
STEPS = 3


def run(out: Path, *arguments: str, stage: str, steps: int = STEPS) -> Trainer:
    tiny = TINY if stage == "baseline" else [*TINY, *ALIGNED]
    with own_state():
        return sit_imagenet.main([f"--stage={stage}", f"--out={out}", f"--steps={steps}", *tiny, *arguments])


def checkpoint(out: Path, steps: int = STEPS) -> Path:
    return out / "checkpoints" / f"{steps:07d}.pt"


@pytest.fixture(autouse=True, scope="module")
def few_digits() -> Iterator[None]:
    """The first digits alone, a VAE of a few steps, and a demo of a quarter of its width."""
    few = [LabelledImages(data.images[:48], data.labels[:48]) for data in digits(demo_latents.IMAGE_SIZE)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_latents, "digits", lambda size: few)
        patch.setattr(
            "common.sit_settings._DEMO_SIZE", {"patch_size": 2, "hidden_size": 24, "depth": 6, "num_heads": 3}
        )
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each stage, side by side."""
    folder = tmp_path_factory.mktemp("runs")
    run(folder / "baseline", "--demo-vae-steps=3", "--sample-every=2", "--sample-steps=1", stage="baseline")
    run(folder / "vae", "--demo-vae-steps=3", stage="vae")
    run(folder / "self", "--demo-vae-steps=3", f"--teacher={folder / 'vae' / 'teacher'}", stage="self")
    return folder


# --- What a run leaves -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "more"), [("baseline", {"samples"}), ("vae", {"teacher"}), ("self", set())])
def test_every_stage_leaves_its_files(runs: Path, stage: str, more: set[str]) -> None:
    found = {entry.name for entry in (runs / stage).iterdir()}
    assert found == {"settings.json", "checkpoints", "log.jsonl", "tensorboard"} | more
    assert [path.name for path in (runs / stage / "checkpoints").iterdir()] == [f"{STEPS:07d}.pt"]
    assert [line["step"] for line in lines(runs / stage)] == [1, 2, 3]
    assert all(math.isfinite(line["loss"]) for line in lines(runs / stage))
    assert {entry.name for entry in runs.iterdir()} == {"baseline", "vae", "self", "demo-vae"}  # made once, for all


def test_the_stages_begin_alike_and_see_the_same(runs: Path) -> None:
    first = {stage: lines(runs / stage)[0]["denoising"] for stage in ("baseline", "vae", "self")}
    assert first["baseline"] == first["vae"] == first["self"]
    assert lines(runs / "baseline")[-1]["denoising"] != lines(runs / "vae")[-1]["denoising"]
    assert lines(runs / "vae")[0]["loss"] > first["vae"]


def test_the_picture_has_a_column_for_each_class(runs: Path) -> None:
    assert [path.name for path in (runs / "baseline" / "samples").iterdir()] == ["0000002.png"]
    with Image.open(runs / "baseline" / "samples" / "0000002.png") as picture:
        assert picture.size == (10 * (32 + 2) - 2, 4 * (32 + 2) - 2)
        assert len(picture.getcolors(100_000)) > 10


def test_a_checkpoint_says_what_its_readers_need(runs: Path) -> None:
    args = torch.load(checkpoint(runs / "self"), weights_only=True)["args"]
    expected = {
        "model": "demo", "input_size": 8, "in_channels": 4, "patch_size": 2, "hidden_size": 24, "depth": 6,
        "num_heads": 3, "num_classes": 10, "learn_sigma": False, "qk_norm": False, "class_dropout_prob": 0.1,
        "path": "linear", "data": "demo", "vae": str(runs / "demo-vae"), "stage": "self", "recipe": "paper",
    }  # fmt: skip
    assert {name: args[name] for name in expected} == expected
    scale = json.loads((runs / "demo-vae" / "config.json").read_text())["scaling_factor"]
    assert args["scale_factor"] == scale
    model, found = sit_from_checkpoint(checkpoint(runs / "self"))
    assert (found.time, found.steps, model.num_classes) == ("repa", STEPS, 10)


def test_the_teacher_is_the_average_of_stage_1(runs: Path) -> None:
    content = torch.load(checkpoint(runs / "vae"), weights_only=True)
    model = sit_from_checkpoint(checkpoint(runs / "vae"))[0]
    teacher = st.CFGFeatureTeacher.from_pretrained(runs / "vae" / "teacher", model=model)
    for name, weight in teacher.model.state_dict().items():
        assert torch.equal(weight, content["ema"][name])
    assert (teacher.layer, teacher.guidance_scale, teacher.null) == ("blocks.3", 3.0, {"y": 10})
    assert (teacher.provenance["step"], teacher.provenance["latent_shape"]) == (STEPS, [4, 8, 8])
    assert teacher.provenance["latent_scale"] == content["args"]["scale_factor"]


def test_latents_are_drawn_from_their_posteriors() -> None:
    mean, std = torch.tensor([3.0, -1.0]).view(2, 1, 1, 1), torch.tensor([0.5, 0.1]).view(2, 1, 1, 1)
    labels = torch.tensor([4, 5])
    batch = (mean.expand(2, 4, 50, 50), std.expand(2, 4, 50, 50), labels)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        latents, found = sit_imagenet.latents_of(batch, scale=2.0)
    assert found is labels
    # 10,000 values each: the mean is good to 1 % of the deviation, the deviation to 0.7 %.
    torch.testing.assert_close(latents.mean((1, 2, 3)), torch.tensor([6.0, -2.0]), rtol=0, atol=0.04)
    torch.testing.assert_close(latents.std((1, 2, 3)), torch.tensor([1.0, 0.2]), rtol=0.03, atol=0)


# --- Going on --------------------------------------------------------------------------------------------------------


def test_the_same_command_goes_on_to_more_steps_bit_equal(tmp_path: Path, runs: Path) -> None:
    same = ["--demo-vae-steps=3", f"--demo-vae={runs / 'demo-vae'}", f"--teacher={runs / 'vae' / 'teacher'}"]
    for steps in (2, 5):
        run(tmp_path / "twice", *same, stage="self", steps=steps)
    run(tmp_path / "once", *same, stage="self", steps=5)
    changed = differences(checkpoint(tmp_path / "once", 5), checkpoint(tmp_path / "twice", 5))
    assert changed == ["/args/out"]
    assert lines(tmp_path / "once") == lines(tmp_path / "twice")


def test_a_folder_belongs_to_its_settings(runs: Path) -> None:
    for match in ["other settings", "lr: 0.003 there, 0.001 now", "--out"]:
        with pytest.raises(ValueError, match=match):
            run(runs / "baseline", "--demo-vae-steps=3", "--lr=1e-3", stage="baseline")


def test_a_run_that_has_left_its_teacher_does_not_make_another(runs: Path) -> None:
    before = (runs / "vae" / "teacher" / "model.safetensors").read_bytes()
    run(runs / "vae", "--demo-vae-steps=3", stage="vae")
    for match in ["has left its teacher", "3 steps done, 5 asked for", "--resume .*0000003.pt"]:
        with pytest.raises(SettingError, match=match):
            run(runs / "vae", "--demo-vae-steps=3", stage="vae", steps=5)
    assert (runs / "vae" / "teacher" / "model.safetensors").read_bytes() == before


def test_a_finished_run_whose_teacher_is_missing_leaves_it(tmp_path: Path, runs: Path) -> None:
    """As after a kill between the last checkpoint and the teacher."""
    arguments = ["--demo-vae-steps=3", f"--demo-vae={runs / 'demo-vae'}"]
    shutil.copytree(runs / "vae", tmp_path / "vae", ignore=lambda *_: ["teacher"])
    run(tmp_path / "vae", *arguments, stage="vae")
    theirs, ours = (folder / "teacher" / "model.safetensors" for folder in (runs / "vae", tmp_path / "vae"))
    assert ours.read_bytes() == theirs.read_bytes()


# Dynamo looks at the .grad of every tensor, and hides the warning of its own looking in a way that pytest undoes.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_run_starts_from_the_weights_of_another(
    tmp_path: Path, runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # the usual one takes its time
    weights = torch.load(checkpoint(runs / "vae"), weights_only=True)["ema"]
    theirs = {"ema": weights | {f"projectors.0.{i}.weight": torch.ones(2, 2) for i in (0, 2, 4)}, "steps": 9}
    torch.save(theirs, tmp_path / "repa.pt")
    arguments = ["--demo-vae-steps=3", f"--demo-vae={runs / 'demo-vae'}", f"--init={tmp_path / 'repa.pt'}"]
    run(tmp_path / "new", *arguments, "--lr=0", "--compile", stage="baseline", steps=1)
    torch.compiler.reset()
    printed = capsys.readouterr().out
    assert f"the ema weights in {tmp_path / 'repa.pt'}; 3 weights of projection heads are left out." in printed
    found = torch.load(checkpoint(tmp_path / "new", 1), weights_only=True)["model"]
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())


# --- The teacher -----------------------------------------------------------------------------------------------------


def with_teacher(runs: Path, out: Path, teacher: Path, *arguments: str) -> st.SelfTransLoss:
    same = ["--demo-vae-steps=3", f"--demo-vae={runs / 'demo-vae'}", f"--teacher={teacher}"]
    return run(out, *same, *arguments, stage="self", steps=1).criterion


def test_an_artefact_and_its_checkpoint_are_the_same_teacher(runs: Path, tmp_path: Path) -> None:
    artefact = with_teacher(runs, tmp_path / "a", runs / "vae" / "teacher").teacher
    raw = with_teacher(runs, tmp_path / "b", checkpoint(runs / "vae")).teacher
    assert torch.equal(artefact.fingerprint, raw.fingerprint)
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    other = with_teacher(runs, tmp_path / "c", checkpoint(runs / "vae"), "--teacher-weights=model").teacher
    assert not torch.equal(other.fingerprint, raw.fingerprint)


def test_a_saved_teacher_is_used_at_another_layer_and_scale(runs: Path, tmp_path: Path) -> None:
    folder = runs / "vae" / "teacher"
    found = with_teacher(runs, tmp_path / "a", folder, "--guidance-scale=7").teacher
    assert (found.layer, found.guidance_scale) == ("blocks.3", 7.0)
    found = with_teacher(runs, tmp_path / "b", folder, "--teacher-layer=blocks.4").teacher
    assert (found.layer, found.guidance_scale) == ("blocks.4", 3.0)


def test_a_teacher_that_does_not_fit_is_named_before_anything_is_made(runs: Path, tmp_path: Path) -> None:
    cases: list[tuple[type[SelfTransError], Path, list[str], str]] = [
        (CheckpointError, runs / "vae" / "teacher", ["--qk-norm"], "q_norm"),
        (CheckpointError, checkpoint(runs / "vae"), ["--qk-norm"], "q_norm"),
        (CheckpointError, tmp_path / "none", [], "There is no folder"),
        (LayerNotFoundError, checkpoint(runs / "vae"), ["--teacher-layer=blocks.9"], "blocks.9"),
        (LayerNotFoundError, runs / "vae" / "teacher", ["--layer=blocks.7"], "blocks.7"),
        (SettingError, runs / "vae" / "teacher", ["--teacher-weights=model"], "was saved with one kind"),
        (SelfTransError, runs / "vae" / "teacher", ["--path=cosine"], "time convention"),
    ]
    for kind, teacher, arguments, text in cases:
        with pytest.raises(kind, match=text):
            with_teacher(runs, tmp_path / "run", teacher, *arguments)
        assert not (tmp_path / "run").exists()


def test_a_teacher_of_other_latents_is_named(runs: Path, tmp_path: Path) -> None:
    teacher = st.build_teacher(
        sit_from_checkpoint(checkpoint(runs / "vae"))[0], None, layer="blocks.3", guidance_scale=3.0, null={"y": 10}
    )
    teacher.save_pretrained(tmp_path / "teacher", latent_scale=0.5)
    for match in ["trained on latents times 0.5", "Found: the scale factor", "same latents"]:
        with pytest.raises(SettingError, match=match):
            with_teacher(runs, tmp_path / "run", tmp_path / "teacher")


# --- Data ------------------------------------------------------------------------------------------------------------


def repa_layout(folder: Path, *, size: int = 8, images: int = 12) -> Path:
    """`vae-sd/` as REPA's preprocessing leaves it: mean then std, twelve images of three classes."""
    generator = np.random.default_rng(0)
    labels = []
    for index in range(images):
        name = f"{index // 5:05d}/img-mean-std-{index:08d}.npy"
        (folder / "vae-sd" / name).parent.mkdir(parents=True, exist_ok=True)
        mean, std = generator.normal(size=(4, size, size)), generator.uniform(0.1, 0.2, size=(4, size, size))
        np.save(folder / "vae-sd" / name, np.concatenate([mean, std]).astype(np.float32))
        labels.append([name, index % 3])
    (folder / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": labels}))
    return folder / "vae-sd"


def test_repas_layout_trains_and_bad_files_are_left_out_on_request(tmp_path: Path) -> None:
    data = repa_layout(tmp_path)
    arguments = [f"--data={data}", "--model=demo", "--workers=0"]
    run(tmp_path / "a", *arguments, stage="vae", steps=1)
    args = torch.load(checkpoint(tmp_path / "a", 1), weights_only=True)["args"]
    assert (args["num_classes"], args["scale_factor"], args["input_size"]) == (3, 0.18215, 8)
    (data / "00000" / "img-mean-std-00000000.npy").write_bytes(b"broken")
    with pytest.raises(SelfTransError, match=r"img-mean-std-00000000\.npy"):
        run(tmp_path / "b", *arguments, stage="vae", steps=1)
    run(tmp_path / "b", *arguments, "--skip-bad", stage="vae", steps=1)
    with pytest.raises(SettingError, match="latents of 32 pixels a side"):
        run(tmp_path / "c", *arguments, "--skip-bad", "--resolution=256", stage="vae")
    with pytest.raises(SelfTransError, match=r"the label 2 is not in 0 \.\. 1"):
        run(tmp_path / "d", *arguments, "--num-classes=2", stage="vae")


def test_encoded_images_train_and_their_vae_draws_the_samples(tmp_path: Path) -> None:
    for index in range(6):
        path = tmp_path / "images" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).integers(256, size=(16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    with torch.random.fork_rng():
        vae = new_vae(image_size=16, image_channels=3, widths=(8, 8, 8))
    vae.register_to_config(scaling_factor=0.3)
    vae.save_pretrained(tmp_path / "vae")
    latents = tmp_path / "latents"
    encode_latents.main([
        str(tmp_path / "images"), f"--out={latents}", f"--vae={tmp_path / 'vae'}", "--size=16", "--flip",
        "--shard-images=4", "--workers=0", "--device=cpu",
    ])  # fmt: skip
    arguments = [f"--data={latents}", f"--vae={tmp_path / 'vae'}", "--model=demo", "--workers=0", "--batch-size=12"]
    run(tmp_path / "run", *arguments, "--sample-every=1", "--sample-steps=1", stage="vae", steps=1)  # mirrored, too
    args = torch.load(checkpoint(tmp_path / "run", 1), weights_only=True)["args"]
    assert (args["num_classes"], args["scale_factor"], args["input_size"]) == (2, 0.3, 4)
    assert args["vae"] == str(tmp_path / "vae")
    with Image.open(tmp_path / "run" / "samples" / "0000001.png") as picture:
        assert picture.mode == "RGB"
    latents.joinpath("latents-00001.safetensors").unlink()
    with pytest.raises(SelfTransError, match="1 of 2 shards are missing"):
        run(tmp_path / "other", *arguments, stage="vae", steps=1)
    assert not (tmp_path / "other").exists()


def test_random_latents_of_either_resolution(tmp_path: Path) -> None:
    for resolution, side in ((256, 32), (512, 64)):
        arguments = ["--data=random", "--model=demo", "--workers=0", f"--resolution={resolution}", "--batch-size=1"]
        trainer = run(tmp_path / str(resolution), *arguments, stage="baseline", steps=1)
        assert (trainer.ema.num_classes, trainer.ema.pos_embed.shape) == (1000, (1, (side // 2) ** 2, 24))
    with pytest.raises(SettingError, match="--num-classes 10 is too few"):
        run(tmp_path / "few", "--data=random", "--model=demo", "--num-classes=10", stage="baseline")


# --- Settings --------------------------------------------------------------------------------------------------------


def settled(*arguments: str, stage: str = "self", data: str = "latents") -> argparse.Namespace:
    teacher = [f"--teacher={__file__}"] if stage == "self" else []  # any file: it is not read here
    found = options([f"--stage={stage}", "--out=o", f"--data={data}", *teacher, *arguments], None)
    settle(found, num_classes=1000, channels=4, size=32)
    return found


@pytest.mark.parametrize(
    ("model", "student", "teacher", "stop"),
    [
        ("SiT-S/2", "blocks.5", "blocks.7", 100_000),
        ("SiT-B/2", "blocks.5", "blocks.7", 100_000),
        ("SiT-L/2", "blocks.11", "blocks.15", 50_000),
        ("SiT-XL/2", "blocks.13", "blocks.17", 50_000),
    ],
)
def test_the_published_settings(model: str, student: str, teacher: str, stop: int) -> None:
    run = settled(f"--model={model}")
    assert (run.layer, run.teacher_layer, run.guidance_scale, run.stop_step) == (student, teacher, 30.0, stop)
    assert (run.window, run.weight, run.gating, run.teacher_weights, run.qk_norm) == (
        (0.4, 0.7), 0.5, "per-sample", "ema", False,
    )  # fmt: skip
    assert (run.steps, run.batch_size, run.lr, run.ema_decay, run.warmup_steps) == (400_000, 256, 1e-4, 0.9999, 0)
    assert (run.betas, run.weight_decay, run.clip, run.class_dropout) == ([0.9, 0.999], 0.0, 1.0, 0.1)
    assert (run.head_features, run.path, run.learn_sigma) == (2048, "linear", False)
    stage1 = settled(f"--model={model}", stage="vae")
    assert (stage1.layer, stage1.target, stage1.steps, stage1.stop_step) == ("blocks.1", "latents", 200_000, 0)
    baseline = settled(f"--model={model}", stage="baseline")
    assert (baseline.layer, baseline.teacher_layer, baseline.stop_step, baseline.steps) == (None, None, None, 400_000)


def test_the_released_recipe() -> None:
    run = settled("--recipe=released", "--model=SiT-B/2")
    assert (run.gating, run.teacher_weights, run.qk_norm, run.layer) == ("released", "model", True, "blocks.5")
    stage1 = settled("--recipe=released", "--model=SiT-B/2", stage="vae")
    assert (stage1.target, stage1.gating, stage1.qk_norm) == ("velocity", "released", True)
    assert not settled("--recipe=released", "--no-qk-norm", "--model=SiT-B/2").qk_norm


def test_what_is_given_goes_before_the_recipe() -> None:
    given = {"layer": "blocks.3", "teacher_layer": "blocks.4", "guidance_scale": 5.0, "weight": 0.1, "stop_step": 9}
    given |= {"steps": 10, "lr": 0.5, "batch_size": 8, "ema_decay": 0.5, "head_features": 16, "gating": "released"}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    run = settled("--model=SiT-B/2", "--window=0.1,0.9", *arguments)
    assert {name: getattr(run, name) for name in given} == given
    assert run.window == (0.1, 0.9)
    assert settled("--window=all").window == "all"
    assert settled().model == "SiT-XL/2"
    assert settled(data="demo").model == "demo"


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["--stage=baseline", "--layer=blocks.1"], ["Stage baseline has no use for --layer"]),
        (["--stage=vae", "--teacher=x"], ["Stage vae has no use for --teacher"]),
        (["--stage=self", "--teacher=x", "--target=latents"], ["Stage self has no use for --target"]),
        (["--stage=self"], ["Stage self needs --teacher", "--stage vae left"]),
        (["--stage=vae", "--class-dropout=0"], ["null class", "--class-dropout 0"]),
    ],
)
def test_options_that_a_stage_would_ignore_are_refused(arguments: list[str], texts: list[str], tmp_path: Path) -> None:
    for text in texts:
        with pytest.raises(SettingError, match=text):
            sit_imagenet.main([*arguments, "--data=demo", f"--out={tmp_path / 'out'}"])
    assert list(tmp_path.iterdir()) == []


def test_pictures_need_the_vae_of_the_data(tmp_path: Path, runs: Path) -> None:
    arguments = [f"--data={repa_layout(tmp_path)}", "--model=demo", "--workers=0", f"--vae={runs / 'demo-vae'}"]
    for match in ["not the one that the latents came from", "0.18215", "--vae"]:
        with pytest.raises(SettingError, match=match):
            run(tmp_path / "run", *arguments, stage="vae")


# --- Several processes -----------------------------------------------------------------------------------------------


def test_torchrun_runs_it_with_half_of_the_batch_each(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
            *(EXAMPLES / "sit_imagenet.py", "--stage=vae", f"--data={repa_layout(tmp_path)}", "--model=demo"),
            *("--batch-size=4", "--steps=2", "--log-every=1", "--micro-batches=2", f"--out={tmp_path / 'run'}"),
            "--workers=0",
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2]  # one process writes
    assert done.stdout.count("The teacher for --stage self") == 1
    content = torch.load(checkpoint(tmp_path / "run", 2), weights_only=True)
    assert content["criterion"]["calls"] == 4
    assert (tmp_path / "run" / "teacher" / "config.json").exists()
