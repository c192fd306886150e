"""The folders of saved artefacts: where they are written, what is read of them, and what an interruption leaves."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_files import FAMILIES, Corpus, judge
from safetensors.torch import load_file, save_file
from tiny_artefacts import (
    FILES,
    TinyDiT,
    assert_says,
    call,
    config_of,
    load_teacher,
    make_criterion,
    make_teacher,
    names_in,
    refusal,
    rewrite,
)
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import selftrans_reg as st
from selftrans_reg.artefacts import FORMAT_VERSION
from selftrans_reg.errors import CheckpointError


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    make_teacher().save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


# --- Where it is written ---------------------------------------------------------------------------------------------


def test_an_artefact_of_the_same_kind_is_replaced_and_other_files_stay(saved: Path) -> None:
    (saved / "notes.txt").write_text("mine")
    (saved / "sub").mkdir()
    make_teacher(guidance_scale=7.0).save_pretrained(saved)
    assert names_in(saved) == sorted([*FILES, "notes.txt", "sub"])
    assert (saved / "notes.txt").read_text() == "mine"
    assert load_teacher(saved).guidance_scale == 7.0


def test_a_card_that_was_there_before_stays(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# My runs\n")
    make_teacher().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# My runs\n"
    assert names_in(tmp_path) == FILES


def test_what_is_no_artefact_of_this_kind_is_not_replaced(saved: Path, tmp_path: Path) -> None:
    def stays(folder: Path, *parts: str) -> None:
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(CheckpointError) as error:
            make_teacher().save_pretrained(folder)
        assert_says(error, "it was not touched. Save elsewhere", *parts)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    diffusers = tmp_path / "diffusers"
    diffusers.mkdir()
    (diffusers / "config.json").write_text('{"_class_name": "DiTTransformer2DModel"}')
    stays(diffusers, "holds a config.json that is no saved teacher's", "was not written by selftrans-reg")
    (diffusers / "config.json").write_text("{")
    stays(diffusers, "cannot be read")
    weights = tmp_path / "weights"
    weights.mkdir()
    save_file({"a": torch.ones(1)}, weights / "model.safetensors")
    stays(weights, "holds a model.safetensors that is no saved teacher's")


def test_a_file_in_the_way_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not be written") as error:
        make_teacher().save_pretrained(tmp_path / "file")
    assert isinstance(error.value.__cause__, OSError)


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and limits the size of files")
def test_a_save_that_is_killed_or_finds_the_disk_full_leaves_a_whole_artefact(tmp_path: Path) -> None:
    """A process for each operation on a file, killed there; and one for each of ever larger limits on files' sizes."""
    script = Path(__file__).parents[1] / "support" / "interrupted_saves.py"
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    for part, old in (("kill", "old"), ("twice", "old"), ("first", "none")):
        outcomes = report[part]["outcomes"]
        assert outcomes.count(old) >= 8
        assert outcomes.count("new") >= 3
        assert outcomes == [old] * outcomes.count(old) + ["new"] * outcomes.count("new")  # from one moment on
    assert report["full"]["refused"] >= 5
    assert [part["files"] for part in report.values()] == [FILES] * 4


def test_whoever_may_read_one_file_may_read_the_others(saved: Path) -> None:
    modes = {(saved / name).stat().st_mode for name in FILES}
    assert len(modes) == 1


# --- What is read ----------------------------------------------------------------------------------------------------


def test_a_missing_folder_and_an_empty_one(tmp_path: Path) -> None:
    assert_says(refusal(tmp_path / "none", TinyDiT()), "There is no folder", "owner/name")
    (tmp_path / "weights.pt").write_text("")
    assert_says(refusal(tmp_path, TinyDiT()), "There is no saved teacher in", "no config.json", "'weights.pt'")


def test_a_later_format_names_the_version_to_install(saved: Path) -> None:
    rewrite(saved, format_version=FORMAT_VERSION + 1, library_version="3.1.0")
    assert_says(
        refusal(saved, TinyDiT()),
        *(
            "has format version 2",
            f"selftrans-reg {st.__version__} reads up to 1",
            "Install version 3.1.0 of selftrans-reg from its repository",
        ),
    )


def test_an_unknown_entry_names_the_version_to_install(saved: Path) -> None:
    rewrite(saved, heads=3, library_version="0.2.0")
    assert_says(refusal(saved, TinyDiT()), "entries that", "does not know: 'heads'", "Install version 0.2.0 of")


def test_every_entry_is_needed(saved: Path) -> None:
    whole = config_of(saved)
    for key in whole:
        (saved / "config.json").write_text(json.dumps({k: v for k, v in whole.items() if k != key}))
        assert_says(refusal(saved, TinyDiT()), repr(key))


WRONG: list[tuple[str, Any]] = [
    *[("layer", value) for value in (None, 3, "", "a" * 2001, "blocks.1\n", "\ud800")],
    *[("guidance_scale", value) for value in (None, "3", True, -1, 1e10, float("nan"), float("inf"), 10**400)],
    *[("null", value) for value in ([], {"y": 5}, [5], [{"path": [], "value": 1}], [{"path": ["y"], "value": "a"}])],
    *[("null", value) for value in ([{"path": ["y"]}], [{"path": ["y"], "value": 1, "tensor": "a"}])],
    *[("call", value) for value in (None, {}, {"x": "x", "t": "t", "shared": "y", "fixed": {}})],
    *[("call", value) for value in ({"x": "x", "t": "t", "shared": [], "fixed": {"y": [1]}},)],
    *[("select", value) for value in ([], {"unsaved": 3}, 1.5, 2**40)],
    *[("tokens", value) for value in (3, "1:", {"start": 1}, {"start": 0, "stop": 1, "step": 0})],
    *[("time", value) for value in ("SIT", 3, ["repa"], {"unsaved": ""})],
    *[("hidden_size", value) for value in (0, -4, 2.0, 2**30, "4")],
    *[("dropped", value) for value in (None, "blocks.2", [3], [""])],
    *[("backbone", value) for value in (None, {"class": "A"}, "")],
    *[("fingerprint", value) for value in (None, "", "g" * 64, "0" * 63, 0)],
    *[("step", value) for value in (-1, 2.5, "3", True)],
    *[("latent_shape", value) for value in ([], [0], "4")],
    *[("kind", value) for value in ("Teacher", None)],
    *[("format_version", value) for value in (0, "1", 1.0, True)],
    *[("library_version", value) for value in (1, "", "1;rm -rf /", "9" * 50)],
    *[("sha256", value) for value in (None, "0" * 10)],
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), WRONG, ids=[f"{key}-{i}" for i, (key, _) in enumerate(WRONG)])
def test_an_entry_of_a_wrong_type_or_size_is_refused(saved: Path, key: str, value: object) -> None:
    assert_says(refusal(rewrite(saved, **{key: value}), TinyDiT()), f"'{key}' should be", "found")


def test_entries_that_contradict_each_other_are_refused(saved: Path) -> None:
    original = {key: value for key, value in config_of(saved).items() if key != "sha256"}
    for entries, part in (
        ({"dropped": ["blocks"]}, "it needs 'blocks.1', which it says was dropped"),
        ({"dropped": ["x_embedder"]}, "it needs 'x_embedder.bias', which it says was dropped"),
        ({"dropped": []}, "Missing"),
        ({"layer": "block.1"}, "has no layer 'block.1'"),
        ({"null": [{"path": ["z"], "value": 5}]}, "null_condition.1"),
        (
            {"null": [{"path": ["z"], "value": 5}, original["null"][1]]},
            "names 'z', which TinyDiT.forward does not take",
        ),
        ({"null": [original["null"][1], {"path": ["text", "a"], "value": 1}]}, "null condition has"),
        ({"null": [original["null"][1], {"path": ["y"], "tensor": "null_condition.1"}]}, "lacks its null condition's"),
        ({"null": [original["null"][1], {"path": ["y"], "tensor": "pos_embed"}]}, "lacks its null condition's"),
        ({"call": {**original["call"], "t": "x"}}, "cannot both be"),
    ):
        assert_says(refusal(rewrite(saved, **(original | entries)), TinyDiT()), part)


def test_weights_other_than_those_of_the_config_are_refused(saved: Path, tmp_path: Path) -> None:
    path = saved / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert_says(refusal(saved, TinyDiT()), "is damaged", "not those that were saved")
    path.unlink()
    assert_says(refusal(saved, TinyDiT()), "it has no model.safetensors")


def test_a_tensor_too_many_is_refused(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    for name in ("null_condition.7", "blocks.2.0.weight", "a"):
        assert_says(refusal(rewrite(saved, tensors | {name: torch.ones(4, 4)}), TinyDiT()), name)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "README.md"])
def test_a_pipe_in_a_files_place_does_not_hang(name: str, saved: Path) -> None:
    (saved / name).unlink()
    os.mkfifo(saved / name)
    if name == "README.md":
        make_teacher().save_pretrained(saved)
        load_teacher(saved)
        return
    refusal(saved, TinyDiT())
    with pytest.raises(CheckpointError, match="no saved teacher's"):
        make_teacher().save_pretrained(saved)


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux does")
@pytest.mark.parametrize("family", ["config_on_disk", "config_as_saved", "weights_of_teacher"])
def test_damaged_artefacts_are_loaded_whole_or_refused(family: str, tmp_path: Path) -> None:
    corpus = Corpus(tmp_path)
    messages = [judge(FAMILIES[family](corpus, random.Random(case))) for case in range(60)]
    assert sum(message is not None for message in messages) > 30


# --- Export ----------------------------------------------------------------------------------------------------------


def train(model: nn.Module, criterion: st.SelfTransLoss | None, ema: nn.Module | None = None) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(3):
        loss = model(**call(step)).square().mean()
        if criterion is not None:
            loss = criterion(loss, latents=None if criterion.stage == 2 else call(step)["x"], step=step).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if ema is not None:
            ema.update_parameters(model)  # type: ignore[operator]


def averaged(model: nn.Module) -> nn.Module:
    return torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))


@pytest.mark.parametrize("stage", [1, 2])
def test_stripped_weights_are_those_of_a_run_that_never_saw_the_library(stage: int) -> None:
    """With weight 0 the criterion only measures, so both runs take the same steps; the keys are the plain model's."""
    plain = TinyDiT()
    plain_ema = averaged(plain)
    train(plain, None, plain_ema)
    model = TinyDiT()
    ema = averaged(model)
    teacher = make_teacher() if stage == 2 else None
    criterion = make_criterion(stage, model, teacher, weight=0.0, check_interval=None)
    train(model, criterion, ema)
    for mine, theirs in ((model, plain), (ema, plain_ema.module)):
        stripped = st.strip(mine)
        assert list(stripped) == list(TinyDiT().state_dict())
        assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in stripped.items())
    assert not all(torch.equal(value, st.strip(model)[key]) for key, value in st.strip(ema).items())


def checkpointed(model: nn.Module) -> nn.Module:
    model.blocks[1] = checkpoint_wrapper(model.blocks[1])
    return model


@pytest.mark.parametrize(
    "wrap",
    [checkpointed, averaged, nn.DataParallel, lambda m: nn.DataParallel(checkpointed(m))],
    ids=["checkpointed", "averaged", "data-parallel", "both"],
)
def test_wrappers_leave_no_trace_in_stripped_weights(wrap: Callable[[nn.Module], nn.Module]) -> None:
    stripped = st.strip(wrap(TinyDiT(seed=4)))
    expected = TinyDiT(seed=4).state_dict()
    assert list(stripped) == list(expected)
    assert all(torch.equal(stripped[key], expected[key]) for key in expected)
    TinyDiT().load_state_dict(stripped)
