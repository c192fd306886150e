"""The folders of saved teachers: where they are written, what is read of them, and what an interruption leaves."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_files import FAMILIES, case, good_files, judge
from huggingface_hub import ModelCard
from interrupted_saves import number_in, numbered
from safetensors.torch import load_file, save_file
from tiny_artefacts import FILES, TinyDiT, call, config_of, load_teacher, make_teacher, names_in, refused, rewrite
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import selftrans_reg as st
from selftrans_reg.errors import CheckpointError, SettingError


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    make_teacher().save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# --- Where it is written ---------------------------------------------------------------------------------------------


def test_a_teacher_is_replaced_and_everything_else_stays(saved: Path) -> None:
    (saved / "README.md").write_text("# My runs\n")
    (saved / "notes.txt").write_text("mine")
    make_teacher(guidance_scale=7.0).save_pretrained(saved)
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


def test_a_file_in_the_way_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(make_teacher().save_pretrained, tmp_path / "file", says="could not be written")
    refused(make_teacher().save_pretrained, tmp_path / ("a" * 5000), says="could not be written")


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and limits the size of files")
def test_a_save_that_is_killed_or_finds_the_disk_full_leaves_a_whole_teacher(tmp_path: Path) -> None:
    """A process for each operation on a file, killed there; and one for each of ever larger limits on files' sizes."""
    script = Path(__file__).parents[1] / "support" / "interrupted_saves.py"
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    for part, old in (("over", 1), ("first", 0)):
        before, after = report[part].count(old), report[part].count(2)
        assert before >= 8
        assert after >= 3
        assert report[part] == [old] * before + [2] * after  # from one moment on
    assert report["full"] >= 5


# --- What is read ----------------------------------------------------------------------------------------------------


def test_what_is_no_teachers_folder_is_refused(saved: Path, tmp_path: Path) -> None:
    refused(load_teacher, tmp_path / "none", TinyDiT(), says=("There is no folder", "owner/name"))
    (saved / "model.safetensors").unlink()
    refused(load_teacher, saved, TinyDiT(), says=("There is no saved teacher in", "'README.md', 'config.json'"))
    for name in (None, 7, b"teacher", ["a"], "a" * 5000, "a\0b", ""):
        refused(load_teacher, name, TinyDiT())


def test_a_later_version_is_named(saved: Path) -> None:
    says = (f"of which selftrans-reg {st.__version__} reads 1", "Install version 3.1.0 of selftrans-reg")
    rewrite(saved, format_version=2, library_version="3.1.0")
    refused(load_teacher, saved, TinyDiT(), says=("has format version 2", *says))
    rewrite(saved, format_version=1, heads=3)
    refused(load_teacher, saved, TinyDiT(), says=("entries that it does not know: 'heads'", *says))


def test_every_entry_is_needed(saved: Path) -> None:
    whole = config_of(saved)
    for key in whole:
        (saved / "config.json").write_text(json.dumps({k: v for k, v in whole.items() if k != key}))
        refused(load_teacher, saved, TinyDiT(), says=() if key == "format_version" else repr(key))


_PATH = {"path": ["text"], "tensor": "null_condition.1"}
_CALL = {"x": "x", "t": "t", "shared": [], "fixed": {}}
FORGED: list[tuple[dict[str, Any], str]] = [
    *[({"layer": value}, "") for value in (None, 3, ["a"])],
    ({"layer": "block.1"}, "has no layer 'block.1'"),
    *[({"guidance_scale": value}, "") for value in (None, "3", True, -1, float("nan"), float("inf"), 10**400)],
    *[({"null": value}, "") for value in ([], {"y": 5}, [5], [{"path": [], "value": 1}], [{"path": ["y"]}], None)],
    ({"null": [{"path": ["z"], "value": 5}]}, "null_condition.1"),
    ({"null": [_PATH, {"path": ["z"], "value": 5}]}, "names 'z', which TinyDiT.forward does not take"),
    ({"null": [_PATH, {"path": ["text", "a"], "value": 1}]}, "null condition has"),
    ({"null": [_PATH, {"path": ["y"], "tensor": "null_condition.1"}]}, "lacks its null condition's tensor"),
    ({"null": [_PATH, {"path": ["y"], "tensor": "pos_embed"}]}, "lacks its null condition's tensor"),
    ({"null": [_PATH, {"path": ["y"], "value": [1]}]}, "must be a number"),
    *[({"call": value}, "") for value in (None, {}, _CALL | {"x": ["x"]}, _CALL | {"rows": {"y": 0.5}})],
    ({"call": _CALL | {"t": "x"}}, "cannot both be"),
    ({"call": _CALL | {"other": 1}}, "call= takes"),
    *[({"select": value}, "") for value in ([], {"unsaved": 3}, 1.5, True)],
    *[({"tokens": value}, "") for value in (3, {"start": 1}, {"start": 0, "stop": "a", "step": None})],
    ({"tokens": {"start": 0, "stop": 1, "step": 0}}, ""),
    *[({"time": value}, "") for value in ("SIT", 3, ["repa"])],
    *[({"hidden_size": value}, "") for value in (0, -4, 2.0, "4")],
    ({"hidden_size": 2**30}, "'hidden_size' is 1073741824, and no axis of the weights is longer than"),
    *[({"dropped": value}, "") for value in (None, "blocks.2", [3], [], ["blocks"])],
    ({"dropped": ["x_embedder"]}, "Extra, not in the model (2):"),
    *[({"fingerprint": value}, "") for value in (None, "g" * 64, 0)],
    *[({"kind": value}, "was not written by selftrans-reg") for value in ("Teacher", None)],
    *[({"format_version": value}, "has format version") for value in (0, "1", None)],
    *[({"sha256": value}, "its weights and settings are not those that were saved") for value in (None, "0" * 64)],
    ({"layer": "a" * 10**6, "backbone": "b" * 10**6}, ""),
]


@pytest.mark.parametrize(
    ("entries", "says"), FORGED, ids=[f"{i}-{next(iter(forged))}" for i, (forged, _) in enumerate(FORGED)]
)
def test_settings_that_no_teacher_has_are_refused(saved: Path, entries: dict[str, Any], says: str) -> None:
    refused(load_teacher, rewrite(saved, **entries), TinyDiT(), says=says)


def test_weights_other_than_those_of_the_settings_are_refused(saved: Path) -> None:
    tensors, data = load_file(saved / "model.safetensors"), bytearray((saved / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (saved / "model.safetensors").write_bytes(data)
    refused(load_teacher, saved, TinyDiT(), says=("is damaged", "not those that were saved"))
    for name in ("null_condition.7", "blocks.2.0.weight", "a"):
        rewrite(saved, tensors | {name: torch.ones(4, 4)})
        refused(load_teacher, saved, TinyDiT(), says=name)
    tensors["y_embedder.weight"][2, 1] = torch.inf
    refused(load_teacher, rewrite(saved, tensors), TinyDiT(), says="1 of 24 values under 'y_embedder.weight'")


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux does")
@pytest.mark.parametrize("family", FAMILIES)
def test_damaged_files_are_loaded_whole_or_refused(family: str, tmp_path: Path) -> None:
    good = good_files(tmp_path)
    assert sum(judge(case(family, good, random.Random(number))) for number in range(80)) > 30


# --- Readers and writers at once -------------------------------------------------------------------------------------

_WRITER = """
import sys, torch
from interrupted_saves import numbered
torch.set_num_threads(1)
teacher = numbered(int(sys.argv[2]))
for _ in range(20):
    teacher.save_pretrained(sys.argv[1])
"""


def test_whoever_reads_while_two_write_gets_one_whole_teacher(tmp_path: Path) -> None:
    numbered(1).save_pretrained(tmp_path)
    paths = [str(Path(__file__).parents[1] / "support"), str(Path(st.__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", _WRITER, str(tmp_path)]
    running = [subprocess.Popen([*command, number], env=environment) for number in "12"]
    read = [number_in(tmp_path)]
    while any(process.poll() is None for process in running):
        read.append(number_in(tmp_path))  # which compares the features with those of the number
    assert [process.returncode for process in running] == [0, 0]
    assert {1, 2} <= set(read)
    assert names_in(tmp_path) == FILES
    assert config_of(tmp_path)["guidance_scale"] == number_in(tmp_path)


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


def quantised(tensor: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda p: p.fill_(torch.nan), "not finite"),
        (lambda p: p[0].fill_(-torch.inf), "not finite"),
        (lambda p: p.to(torch.float8_e4m3fn), "a tensor of torch.float8_e4m3fn, which could not be loaded again"),
        (lambda p: p.to(torch.complex128), "a tensor of torch.complex128"),
        (lambda p: p.to("meta"), "has no data here"),
        (quantised, "quantised"),
    ],
)
def test_weights_that_could_not_be_loaded_leave_the_old_teacher(
    saved: Path, change: Callable[[Tensor], Tensor], says: str
) -> None:
    before, teacher = contents(saved), make_teacher(seed=2)
    layer = teacher.model.blocks[0][0]
    with torch.no_grad():
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
    assert not (tmp_path / "new").exists()
    with pytest.raises(SettingError, match="A saved teacher has no 'licens'"):
        teacher.save_pretrained(tmp_path / "new", licens="mit")


def test_a_name_of_the_null_conditions_is_refused(tmp_path: Path) -> None:
    model = TinyDiT()
    model.null_condition = nn.Linear(1, 1)
    with pytest.raises(CheckpointError, match="'null_condition\\.weight', a name kept for the null condition"):
        make_teacher(model=model, example=None).save_pretrained(tmp_path)


# --- The card --------------------------------------------------------------------------------------------------------


def first_label(arguments: dict[str, Any]) -> Tensor:
    return torch.zeros_like(arguments["y"])


def test_the_card_shows_the_settings_and_its_code_loads_the_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, licence = make_teacher(), "CC BY-NC 4.0 ``` \ud800"
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")) if sys.platform == "linux" else tmp_path / "mine"
    teacher.save_pretrained(folder, source="<!-- | ```\n`", licence=licence)
    make_teacher(null={"y": first_label}, select=nn.Identity()).save_pretrained(tmp_path / "functions")
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
    exec(
        card.split("```python\n")[1].split("```")[0].replace("caf\ufffd", "again").replace("caf\\ufffd", "again"),
        namespace,
    )
    assert torch.equal(namespace["teacher"].fingerprint, teacher.fingerprint)


# --- Export ----------------------------------------------------------------------------------------------------------


def averaged(model: nn.Module) -> nn.Module:
    return torch.optim.swa_utils.AveragedModel(model)


def checkpointed(model: nn.Module) -> nn.Module:
    model.blocks[1] = checkpoint_wrapper(model.blocks[1])
    return model


@pytest.mark.parametrize("wrap", [checkpointed, averaged, nn.DataParallel, lambda m: nn.DataParallel(checkpointed(m))])
@pytest.mark.parametrize("stage", [1, 2])
def test_stripped_weights_are_the_models_own_without_wrappers_and_criterion(
    wrap: Callable[[nn.Module], nn.Module], stage: int
) -> None:
    model = TinyDiT(seed=4)
    settings = {"layer": "blocks.0", "time": "repa", "hidden_size": 4, "check_interval": None}
    if stage == 1:
        criterion = st.SelfTransLoss.stage1(model, latent_channels=2, patch_size=2, **settings)
    else:
        criterion = st.SelfTransLoss.stage2(model, teacher=make_teacher(), **settings)
    criterion(model(**call()).square().mean(), latents=call()["x"] if stage == 1 else None).total.backward()
    stripped, expected = st.strip(wrap(model)), TinyDiT(seed=4).state_dict()
    assert list(stripped) == list(expected)
    assert all(torch.equal(stripped[key], expected[key]) for key in expected)
