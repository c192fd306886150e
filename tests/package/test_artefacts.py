"""The folders of saved teachers: where they are written, what is read of them, and what an interruption leaves."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from interrupted import room_for, snapshots
from safetensors.torch import load_file, save_file
from tiny_artefacts import FILES, TinyDiT, call, config_of, load_teacher, make_teacher, names_in, refused, rewrite
from torch import Tensor, nn

import selftrans_reg as st
from selftrans_reg.errors import SettingError


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    make_teacher().save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def numbered(number: int) -> st.CFGFeatureTeacher:
    """A teacher with weights and a setting of its own."""
    return make_teacher(seed=number, guidance_scale=float(number))


def number_in(folder: Path) -> int:
    """Which teacher is in ``folder``, once its features are known to be those of that number; 0 if there is none."""
    if not (folder / "model.safetensors").exists():
        refused(load_teacher, folder, says="There is no")
        return 0
    teacher = load_teacher(folder)
    number = int(teacher.guidance_scale)
    assert torch.equal(teacher(**call(3)), numbered(number)(**call(3)))
    return number


# --- Where it is written ---------------------------------------------------------------------------------------------


def test_a_teacher_is_replaced_and_everything_else_stays(saved: Path) -> None:
    (saved / "README.md").write_text("# My runs\n")
    (saved / "notes.txt").write_text("mine")
    before = contents(saved)["model.safetensors"]
    with (saved / "model.safetensors").open("rb") as reader:
        make_teacher(guidance_scale=7.0).save_pretrained(saved)
        assert reader.read() == before  # a new file in its place
    assert names_in(saved) == sorted([*FILES, "notes.txt"])
    assert [(saved / name).read_text() for name in ("README.md", "notes.txt")] == ["# My runs\n", "mine"]
    assert load_teacher(saved).guidance_scale == 7.0
    assert len({path.stat().st_mode for path in saved.iterdir()}) == 1  # who may read one may read all


@pytest.mark.parametrize(
    ("name", "write", "says"),
    [
        ("config.json", lambda path: path.write_text('{"_class_name": "DiT"}'), "was not written by selftrans-reg"),
        ("config.json", lambda path: path.write_text("{"), "cannot be read"),
        ("model.safetensors", lambda path: save_file({"a": torch.ones(1)}, path), "was not written by selftrans-reg"),
        ("config.json", os.mkfifo, "There is no file"),  # which does not hang
        ("model.safetensors", os.mkfifo, "There is no file"),
    ],
)
def test_what_is_no_teacher_is_neither_replaced_nor_read(
    saved: Path, name: str, write: Callable[[Path], object], says: str
) -> None:
    (saved / name).unlink()
    write(saved / name)
    before = contents(saved)
    says_where = f"holds a {name} that is no saved teacher's; it was not touched. Save elsewhere"
    refused(make_teacher().save_pretrained, saved, says=(says_where, says))
    assert contents(saved) == before
    assert names_in(saved) == FILES
    refused(load_teacher, saved, TinyDiT(), says=says)
    refused(make_teacher().save_pretrained, saved / "README.md", says="could not be written")


@pytest.mark.parametrize("name", ["over", "first"])
def test_a_save_that_is_killed_leaves_a_whole_teacher(name: str, tmp_path: Path) -> None:
    folder, new, later, old = tmp_path / name, numbered(2), numbered(3), int(name == "over")
    numbered(1).save_pretrained(tmp_path / "over")
    with snapshots(folder, tmp_path / "killed") as taken:
        new.save_pretrained(folder)
    found = [number_in(place) for place in taken]
    before, after = found.count(old), found.count(2)
    assert before >= 8
    assert after >= 3
    assert found == [old] * before + [2] * after  # from one moment on
    for place in taken:
        later.save_pretrained(place)
        assert (number_in(place), names_in(place)) == (3, FILES)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files as Linux does")
def test_a_save_that_finds_the_disk_full_leaves_the_older_teacher(saved: Path) -> None:
    before, new = contents(saved), make_teacher(seed=2)
    for room in range(0, len(before["model.safetensors"]), 300):
        with room_for(room):
            refused(new.save_pretrained, saved, says=("could not be written", "still whole"))
        assert contents(saved) == before
        assert names_in(saved) == FILES


# --- What is read ----------------------------------------------------------------------------------------------------


def test_what_is_no_teachers_folder_is_refused(saved: Path, tmp_path: Path) -> None:
    refused(load_teacher, tmp_path / "none", TinyDiT(), says=("There is no folder", "owner/name"))
    for name in (None, 7, b"teacher", ["a"], "a" * 5000, "a\0b", ""):
        refused(load_teacher, name, TinyDiT())
    whole = config_of(saved)
    for key in whole:
        (saved / "config.json").write_text(json.dumps({k: v for k, v in whole.items() if k != key}))
        refused(load_teacher, saved, TinyDiT(), says=() if key == "format_version" else repr(key))
    (saved / "model.safetensors").unlink()
    refused(load_teacher, saved, TinyDiT(), says=("There is no saved teacher in", "'README.md', 'config.json'"))


def test_a_later_version_is_named(saved: Path) -> None:
    says = (f"of which selftrans-reg {st.__version__} reads 1", "Install version 3.1.0 of selftrans-reg")
    rewrite(saved, format_version=2, library_version="3.1.0")
    refused(load_teacher, saved, TinyDiT(), says=("has format version 2", *says))
    rewrite(saved, format_version=1, heads=3)
    refused(load_teacher, saved, TinyDiT(), says=("entries that it does not know: 'heads'", *says))


_PATH = {"path": ["text"], "tensor": "null_condition.1"}
_CALL = {"x": "x", "t": "t", "shared": [], "fixed": {}}
FORGED: dict[str, list[Any]] = {
    "layer": [None, 3, ["a"], "block.1", "a" * 10**6],
    "guidance_scale": [None, "3", True, -1, float("nan"), float("inf"), 10**400],
    "null": [
        *([], {"y": 5}, [5], [{"path": [], "value": 1}], [{"path": ["y"]}], None, [{"path": ["z"], "value": 5}]),
        *([_PATH, {"path": path, "value": value}] for path, value in ((["z"], 5), (["text", "a"], 1), (["y"], [1]))),
        *([_PATH, {"path": ["y"], "tensor": name}] for name in ("null_condition.1", "null_condition.7")),
    ],
    "call": [None, {}, _CALL | {"x": ["x"]}, _CALL | {"rows": {"y": 0.5}}, _CALL | {"t": "x"}, _CALL | {"other": 1}],
    "select": [[], {"unsaved": 3}, 1.5, True],
    "tokens": [3, {"start": 1}, {"start": 0, "stop": "a", "step": None}, {"start": 0, "stop": 1, "step": 0}],
    "time": ["SIT", 3, ["repa"]],
    "hidden_size": [0, -4, 2.0, "4", 2**30],
    "dropped": [None, "blocks.2", [3], [], ["blocks"], ["x_embedder"]],
    "fingerprint": [None, "g" * 64, 0],
    "kind": ["Teacher", None],
    "format_version": [0, "1", None],
    "sha256": [None, "0" * 64],
}


@pytest.mark.parametrize("entry", FORGED)
def test_settings_that_no_teacher_has_are_refused(saved: Path, entry: str) -> None:
    for value in FORGED[entry]:
        refused(load_teacher, rewrite(saved, **{entry: value}), TinyDiT())


def test_weights_other_than_those_of_the_settings_are_refused(saved: Path) -> None:
    path, tensors = saved / "model.safetensors", load_file(saved / "model.safetensors")
    whole = path.read_bytes()
    for at in (*range(0, len(whole), 23), len(whole) - 1):  # a bit of each
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        refused(load_teacher, saved, TinyDiT())
    refused(load_teacher, saved, TinyDiT(), says=("is damaged", "not those that were saved"))
    path.write_bytes(whole)
    for name in ("null_condition.7", "blocks.2.0.weight", "a"):
        rewrite(saved, tensors | {name: torch.ones(4, 4)})
        refused(load_teacher, saved, TinyDiT(), says=name)
    tensors["y_embedder.weight"][2, 1] = torch.inf
    refused(load_teacher, rewrite(saved, tensors), TinyDiT(), says="1 of 24 values under 'y_embedder.weight'")
    rewrite(saved, null=[_PATH, {"path": ["y"], "tensor": "pos_embed"}])
    refused(load_teacher, saved, TinyDiT(), says="lacks its null condition's tensor")


# --- Readers and writers at once -------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="other systems lock no folders")
def test_a_writer_waits_for_another(saved: Path) -> None:
    import fcntl

    other = os.open(saved, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    writer = threading.Thread(target=make_teacher(guidance_scale=7.0).save_pretrained, args=(saved,))
    writer.start()
    writer.join(0.5)
    assert names_in(saved) == FILES
    assert load_teacher(saved).guidance_scale == 3.0
    os.close(other)
    writer.join()
    assert load_teacher(saved).guidance_scale == 7.0


def test_the_weights_decide_and_an_edited_config_is_refused(tmp_path: Path) -> None:
    for number in (1, 2):
        numbered(number).save_pretrained(tmp_path / str(number))
    shutil.copy(tmp_path / "2" / "config.json", tmp_path / "1" / "config.json")  # as between the two renames of a save
    assert number_in(tmp_path / "1") == 1
    text = (tmp_path / "2" / "config.json").read_text()
    (tmp_path / "2" / "config.json").write_text(text.replace('"guidance_scale": 2.0', '"guidance_scale": 3.0'))
    says = "config.json differs in 'guidance_scale' from the settings"
    refused(load_teacher, tmp_path / "2", TinyDiT(), says=says)


# --- What could not be loaded is refused when saving -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda p: p[0].fill_(-torch.inf), "not finite"),
        (lambda p: p.to(torch.float8_e4m3fn), "a tensor of torch.float8_e4m3fn, which could not be loaded again"),
        (lambda p: p.to(torch.complex128), "a tensor of torch.complex128"),
        (lambda p: p.to("meta"), "has no data here"),
    ],
)
def test_weights_that_could_not_be_loaded_leave_the_old_teacher(
    saved: Path, change: Callable[[Tensor], Tensor], says: str
) -> None:
    before, teacher = contents(saved), make_teacher(seed=2)
    layer = teacher.model.blocks[0][0]
    layer.weight = nn.Parameter(change(layer.weight.detach().clone()), requires_grad=False)
    refused(teacher.save_pretrained, saved, says=("cannot be saved", "'blocks.0.0.weight'", says))
    assert contents(saved) == before


@pytest.mark.parametrize(
    ("settings", "details", "says"),
    [
        ({"call": {"fixed": {"text": torch.ones(4, 3)}}, "null": {"y": 5}}, {}, "'call' is more than JSON can hold"),
        ({"null": {"y": float("nan")}, "example": None}, {}, "'null' is more than JSON can hold"),
        ({"null": {"y": {(1, 2): 5}}, "example": None}, {}, "'null' is more than JSON can hold, [{'path': ['y', (1, "),
        ({"hidden_size": 400_000, "example": None}, {}, "'hidden_size' is 400000, and no axis of the weights is long"),
        ({}, {"latent_scale": torch.ones(3)}, "'latent_scale' is more than JSON can hold"),
        ({}, {"source": "a" * (3 << 20)}, "its names and settings take over 2097152 bytes"),
    ],
)
def test_settings_that_could_not_be_loaded_are_refused(
    tmp_path: Path, settings: dict[str, Any], details: dict[str, Any], says: str
) -> None:
    teacher = make_teacher(**settings)
    refused(teacher.save_pretrained, tmp_path / "new", **details, says=("This teacher cannot be saved: ", says))
    with pytest.raises(SettingError, match="A saved teacher has no 'licens'"):
        teacher.save_pretrained(tmp_path / "new", licens="mit")
    teacher.model.null_condition = nn.Linear(1, 1)
    says = "'null_condition.weight', a name kept for the null condition"
    refused(teacher.save_pretrained, tmp_path / "new", says=says)
    assert not (tmp_path / "new").exists()


# --- The card, and export --------------------------------------------------------------------------------------------


def test_the_card_shows_the_settings_and_its_code_loads_the_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, licence = make_teacher(), "CC BY-NC 4.0 ``` \ud800"
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")) if sys.platform == "linux" else tmp_path / "mine"
    teacher.save_pretrained(folder, source="<!-- | ```\n`", licence=licence)
    make_teacher(null={"y": len}, select=nn.Identity(), example=None).save_pretrained(tmp_path / "functions")
    asked = "from_pretrained(\"functions\", model=TinyDiT, null={'y': ...}, select=...)"
    assert asked in (tmp_path / "functions" / "README.md").read_text()
    card = (folder / "README.md").read_text()
    settings = json.loads(card.split("```json\n")[1].split("```")[0])
    assert settings == {key: value for key, value in config_of(folder).items() if value is not None}
    assert "arXiv:2601.07773" in card
    data = ModelCard(card).data
    assert (data.license, data.license_name, data.library_name) == ("other", licence, "selftrans-reg")
    folder.rename(tmp_path / "again")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"TinyDiT": TinyDiT}
    code = card.split("```python\n")[1].split("```")[0]
    exec(code.replace("caf\ufffd", "again").replace("caf\\ufffd", "again"), namespace)
    assert torch.equal(namespace["teacher"].fingerprint, teacher.fingerprint)


def test_stripped_weights_are_the_models_own_without_wrappers_and_criterion() -> None:
    model, expected = TinyDiT(seed=4), TinyDiT(seed=4).state_dict()
    settings = {"layer": "blocks.0", "time": "repa", "hidden_size": 4, "check_interval": None}
    criterion = st.SelfTransLoss.stage2(model, teacher=make_teacher(), **settings)
    criterion(model(**call()).square().mean()).total.backward()
    for wrap in (nn.DataParallel, torch.optim.swa_utils.AveragedModel, torch.compile):
        stripped = st.strip(wrap(model))
        assert list(stripped) == list(expected)
        assert all(torch.equal(stripped[key], expected[key]) for key in expected)
