"""Sharing by the hub, against a stand-in that answers huggingface_hub over HTTP; nothing of ours is replaced."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from hub_stand_in import TOKEN, Hub, running_hub
from tiny_artefacts import FILES, assert_says, call, load_teacher, make_teacher, names_in

from selftrans_reg.errors import CheckpointError


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with running_hub(tmp_path / "cache") as running:
        yield running


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    make_teacher().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def fails(name: str, *parts: str, **source: object) -> None:
    with pytest.raises(CheckpointError) as error:
        load_teacher(name, **source)
    assert_says(error, *parts)


def test_a_teacher_goes_to_the_hub_and_comes_back(hub: Hub) -> None:
    teacher = make_teacher()
    address = teacher.push_to_hub("me/teacher", token=TOKEN, source="run 17", licence="mit", step=9)
    repository = hub.repositories["me/teacher"]
    assert address == f"{hub.endpoint}/me/teacher/commit/{repository.branches['main']}"
    files = repository.commits[repository.branches["main"]]
    assert sorted(files) == FILES
    card = files["README.md"].decode()
    assert 'st.CFGFeatureTeacher.from_pretrained("me/teacher", model=TinyDiT)' in card
    assert "license: mit" in card
    loaded = load_teacher("me/teacher")
    assert torch.equal(loaded(**call(1)), teacher(**call(1)))
    assert torch.equal(loaded.fingerprint, teacher.fingerprint)
    assert loaded.provenance == {"source": "run 17", "step": 9, "licence": "mit"}


def test_only_the_two_files_of_the_format_are_downloaded(hub: Hub, saved: Path, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in saved.iterdir()}
    others = ("modeling.py", "setup.py", "weights.pt", "tokenizer.json", "sub/config.json", "sub/model.safetensors")
    hub.add("me/teacher", files | dict.fromkeys(others, b"raise SystemExit('ran')"))
    load_teacher("me/teacher")
    assert hub.downloads() == ["config.json", "model.safetensors"]
    (snapshot,) = (tmp_path / "cache" / "models--me--teacher" / "snapshots").iterdir()
    assert names_in(snapshot) == ["config.json", "model.safetensors"]


def test_a_second_load_downloads_nothing_and_a_new_commit_is_seen(hub: Hub, saved: Path) -> None:
    hub.add("me/teacher", saved)
    load_teacher("me/teacher")
    hub.requests.clear()
    load_teacher("me/teacher")
    assert hub.downloads() == []
    make_teacher(guidance_scale=7.0).save_pretrained(saved)
    hub.add("me/teacher", saved)
    assert load_teacher("me/teacher").guidance_scale == 7.0


def test_revisions_are_branches_and_commits(hub: Hub, saved: Path) -> None:
    first = hub.add("me/teacher", saved)
    make_teacher(guidance_scale=7.0).push_to_hub("me/teacher", token=TOKEN, revision="strong")
    scales = [load_teacher("me/teacher", revision=r).guidance_scale for r in (None, "main", first, "strong")]
    assert scales == [3.0, 3.0, 3.0, 7.0]
    make_teacher(guidance_scale=8.0).push_to_hub("me/teacher", token=TOKEN, revision="strong")
    assert load_teacher("me/teacher", revision="strong").guidance_scale == 8.0
    fails("me/teacher", "'me/teacher' cannot be read from the hub: RevisionNotFoundError", revision="weak")


def test_private_repositories_need_a_token(hub: Hub) -> None:
    make_teacher().push_to_hub("me/secret", token=TOKEN, private=True)
    assert hub.repositories["me/secret"].private
    fails("me/secret", "'me/secret' cannot be read from the hub: RepositoryNotFoundError", "authenticated")
    fails("me/secret", "RepositoryNotFoundError", token="wrong")
    load_teacher("me/secret", token=TOKEN)


def test_the_token_of_the_environment_is_used(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    make_teacher().push_to_hub("me/secret", private=True)
    load_teacher("me/secret")


def test_no_message_carries_a_token(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_teacher().push_to_hub("me/secret", token=f"{TOKEN}\n", private=True)  # as read from a file
    load_teacher("me/secret", token=f" {TOKEN}\r\n")
    for token in (f"hf_other\n{TOKEN}", f"{TOKEN}é", "\n", f"{TOKEN}x"):
        for act in (
            partial(make_teacher().push_to_hub, "me/a"),
            partial(load_teacher, "me/secret", cache_dir=tmp_path),
        ):
            with pytest.raises(CheckpointError) as error:
                act(token=token)
            shown = "".join(traceback.format_exception(error.value))
            assert "hf_other" not in shown
            assert TOKEN not in shown

    def leaks(*args: object, **kwargs: object) -> None:
        raise ValueError(f"Illegal header value b'Bearer {TOKEN}\\n'")

    monkeypatch.setattr("huggingface_hub.HfApi.snapshot_download", leaks)
    with pytest.raises(CheckpointError, match="Illegal header value b'Bearer …") as error:
        load_teacher("me/secret")
    assert TOKEN not in "".join(traceback.format_exception(error.value))


def test_an_upload_without_the_right_token_fails(hub: Hub) -> None:
    for token in ("wrong", False):
        with pytest.raises(CheckpointError) as error:
            make_teacher().push_to_hub("me/teacher", token=token)
        assert_says(error, "The upload to 'me/teacher' failed", "401")
    assert hub.repositories == {}


def test_an_upload_that_cannot_be_saved_asks_the_hub_nothing(hub: Hub) -> None:
    with pytest.raises(CheckpointError, match="'step' should be"):
        make_teacher().push_to_hub("me/teacher", token=TOKEN, step=-1)
    assert hub.requests == []


def test_the_card_of_a_repository_stays(hub: Hub) -> None:
    hub.add("me/teacher", {"README.md": b"# Mine\n", "notes.txt": b"mine"})
    make_teacher().push_to_hub("me/teacher", token=TOKEN)
    repository = hub.repositories["me/teacher"]
    files = repository.commits[repository.branches["main"]]
    assert sorted(files) == sorted([*FILES, "notes.txt"])
    assert files["README.md"] == b"# Mine\n"


def test_without_the_hub_the_copy_in_the_cache_is_read(hub: Hub, saved: Path, tmp_path: Path) -> None:
    hub.add("me/teacher", saved)
    fails("me/teacher", "cannot be read from the hub", "LocalEntryNotFoundError", local_files_only=True)
    assert hub.requests == []
    load_teacher("me/teacher", cache_dir=tmp_path / "other")
    fails("me/teacher", "LocalEntryNotFoundError", local_files_only=True)
    hub.requests.clear()
    load_teacher("me/teacher", cache_dir=tmp_path / "other", local_files_only=True)
    assert hub.requests == []


def test_a_repository_that_is_missing_empty_or_broken(hub: Hub, saved: Path) -> None:
    fails("me/nothing", "'me/nothing' cannot be read from the hub: RepositoryNotFoundError")
    hub.add("me/empty", {"README.md": b"# Soon\n"})
    fails("me/empty", "There is no saved teacher")
    files = {path.name: path.read_bytes() for path in saved.iterdir()}
    hub.add("me/cut", files | {"model.safetensors": files["model.safetensors"][:-1]})
    fails("me/cut", "cannot be read as a checkpoint")
    hub.add("me/later", files | {"config.json": json.dumps(json.loads(files["config.json"]) | {"a": 1}).encode()})
    fails("me/later", "does not know: 'a'", "Install version")
    hub.add("me/other", files | {"config.json": b'{"architectures": ["BertModel"]}'})
    fails("me/other", "was not written by selftrans-reg")


@pytest.mark.parametrize("name", ["teacher", "a/b/c", "../teacher", "/me/teacher", "me/te acher", "hf://me/teacher"])
def test_what_is_no_repositorys_name_is_asked_of_nobody(name: str, hub: Hub) -> None:
    fails(name, "There is no folder", "'owner/name'")
    assert hub.requests == []


def test_a_local_folder_comes_first_and_a_path_never_means_a_repository(
    hub: Hub, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_teacher(guidance_scale=7.0).save_pretrained("elsewhere")
    hub.add("me/teacher", Path("elsewhere"))
    fails("run/teacher", "cannot be read from the hub")  # no folder is called run: it could be anybody's
    with pytest.raises(CheckpointError, match="There is no folder"):
        load_teacher(Path("me/teacher"))
    Path("me").mkdir()
    fails("me/teacher", "There is no folder 'me/teacher'", "revision='main'")  # as after a typo in a path
    assert load_teacher("me/teacher", revision="main").guidance_scale == 7.0
    shutil.copytree(saved, "me/teacher")
    hub.requests.clear()
    assert load_teacher("me/teacher").guidance_scale == 3.0
    assert hub.requests == []
    fails("me/teacher", "local folder, which has no revision 'main'", revision="main")


def test_the_environment_variables_of_huggingface_hub_hold(hub: Hub, saved: Path, tmp_path: Path) -> None:
    """In a process of its own, since they are read when huggingface_hub is imported."""
    hub.add("me/secret", saved, private=True)
    code = """
import sys
from tiny_artefacts import TinyDiT
import selftrans_reg as st
assert "huggingface_hub" not in sys.modules
try:
    print(st.CFGFeatureTeacher.from_pretrained("me/secret", model=TinyDiT).guidance_scale)
except st.CheckpointError as error:
    print(str(error).replace("\\n", " "))
"""

    def loaded(**variables: str) -> str:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        home = {
            "HF_HOME": str(tmp_path / "home"),
            "HF_ENDPOINT": hub.endpoint,
            "PYTHONPATH": str(Path(__file__).parents[1] / "support"),
        }
        done = subprocess.run(
            [sys.executable, "-c", code], env=kept | home | variables, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert loaded(HF_TOKEN=TOKEN) == "3.0"
    assert hub.downloads() == ["config.json", "model.safetensors"]
    hub.requests.clear()
    assert loaded(HF_HUB_OFFLINE="1") == "3.0"
    assert hub.requests == []
