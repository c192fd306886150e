"""The folders of saved artefacts: where they are written, what is read of them, and what an interruption leaves."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_files import FAMILIES, Corpus, judge
from huggingface_hub import ModelCard
from interrupted_saves import number_in, numbered
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
from torch import Tensor, nn
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
        ({"dropped": ["blocks"]}, "Extra, not in the model"),
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


# --- Readers and writers at once -------------------------------------------------------------------------------------

_WRITER = """
import sys, torch
from interrupted_saves import numbered
torch.set_num_threads(1)
teachers = [numbered(int(n)) for n in sys.argv[2].split(",")]
for round in range(int(sys.argv[3])):
    teachers[round % len(teachers)].save_pretrained(sys.argv[1])
"""


def writers(folder: Path, rounds: int, *numbers: str) -> list[subprocess.Popen[str]]:
    support = str(Path(__file__).parents[1] / "support")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([support, str(Path(st.__file__).parents[1])])}
    command = [sys.executable, "-c", _WRITER, str(folder)]
    return [subprocess.Popen([*command, n, str(rounds)], env=environment, stderr=2, text=True) for n in numbers]


@pytest.mark.parametrize("numbers", [("1,2",), ("1", "2")], ids=["one writer", "two writers"])
def test_whoever_reads_while_others_write_gets_one_whole_teacher(tmp_path: Path, numbers: tuple[str, ...]) -> None:
    numbered(1).save_pretrained(tmp_path)
    running = writers(tmp_path, 60, *numbers)
    read = [number_in(tmp_path)]
    while any(process.poll() is None for process in running):
        read.append(number_in(tmp_path))  # which compares the features with those of the number
    assert [process.returncode for process in running] == [0] * len(running)
    assert {1, 2} <= set(read)
    assert names_in(tmp_path) == FILES
    assert config_of(tmp_path)["guidance_scale"] == number_in(tmp_path)


def test_the_weights_decide_and_an_edited_config_is_refused(tmp_path: Path) -> None:
    for number in (1, 2):
        numbered(number).save_pretrained(tmp_path / str(number))
    shutil.copy(tmp_path / "2" / "config.json", tmp_path / "1" / "config.json")  # as between the two renames of a save
    assert number_in(tmp_path / "1") == 1
    text = (tmp_path / "2" / "config.json").read_text()
    (tmp_path / "2" / "config.json").write_text(text.replace('"guidance_scale": 2.0', '"guidance_scale": 3.0'))
    assert_says(refusal(tmp_path / "2", TinyDiT()), "config.json differs in 'guidance_scale' from the settings")


# --- What is saved can be loaded -------------------------------------------------------------------------------------


class Masked(TinyDiT):
    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))
        self.register_buffer("table", torch.arange(4.0).expand(3, 4))


def test_masks_and_expanded_buffers_are_saved_and_come_back(tmp_path: Path) -> None:
    teacher = st.build_teacher(Masked(), None, layer="blocks.1", guidance_scale=2.0, null={"y": 5}, hidden_size=4)
    teacher.save_pretrained(tmp_path)
    loaded = load_teacher(tmp_path, Masked)
    assert torch.equal(loaded.model.mask, Masked().mask)
    assert torch.equal(loaded.model.table, Masked().table)
    assert torch.equal(loaded(**call(1)), teacher(**call(1)))


def quantised(tensor: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: p.fill_(torch.nan), "not finite"),
        (lambda p: p[0].fill_(torch.inf), "not finite"),
        (lambda p: p[0].fill_(-torch.inf), "not finite"),
        (lambda p: p.to(torch.float8_e4m3fn), "a tensor of torch.float8_e4m3fn, which could not be loaded again"),
        (lambda p: p.to(torch.complex128), "a tensor of torch.complex128"),
        (lambda p: p.to("meta"), "has no data here"),
        (quantised, "quantised"),
    ],
)
def test_what_could_not_be_loaded_is_refused_before_the_old_teacher_is_touched(
    saved: Path, change: Callable[[Tensor], Tensor], said: str
) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    teacher = make_teacher(seed=2)
    layer = teacher.model.blocks[0][0]
    with torch.no_grad():
        layer.weight = nn.Parameter(change(layer.weight.detach().clone()), requires_grad=False)
    with pytest.raises(CheckpointError) as error:
        teacher.save_pretrained(saved)
    assert_says(error, "cannot be saved", "'blocks.0.0.weight'", said)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_folders_name_may_be_any_that_the_system_has(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    make_teacher().save_pretrained(folder)
    assert names_in(folder) == FILES
    load_teacher(folder)


@pytest.mark.parametrize("name", [None, 7, b"teacher", ["a"], "a" * 5000, "a\0b", ""])
def test_what_names_no_folder_is_refused(name: Any) -> None:
    assert_says(refusal(name, TinyDiT()), "")
    if name != "":
        with pytest.raises(CheckpointError):
            make_teacher().save_pretrained(name)


@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may do everything")
def test_a_folder_without_permission_is_refused(saved: Path) -> None:
    saved.chmod(0)
    try:
        refusal(saved, TinyDiT())
        with pytest.raises(CheckpointError):
            make_teacher().save_pretrained(saved)
    finally:
        saved.chmod(0o700)


@pytest.mark.parametrize("size", [400_000, 1 << 20])
def test_a_width_that_the_weights_do_not_have_is_not_believed(saved: Path, size: int) -> None:
    assert_says(refusal(rewrite(saved, hidden_size=size), TinyDiT()), f"'hidden_size' is {size}", "longer than")


def test_nothing_hides_the_rest_of_a_card(tmp_path: Path) -> None:
    make_teacher().save_pretrained(tmp_path, source="<!-- | `", licence="mine & <b>theirs</b>")
    text = (tmp_path / "README.md").read_text()
    assert "| trained in | &lt;!-- &#124; ` |" in text
    assert "mine &amp; &lt;b&gt;theirs&lt;/b&gt; |" in text
    assert "<" not in text.split("---")[2]
    data = ModelCard(text).data
    assert (data.license, data.license_name, data.library_name) == ("other", "mine & <b>theirs</b>", "selftrans-reg")


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
