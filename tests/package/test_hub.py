"""Sharing by the hub, against a stand-in for it."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_stand_in import TOKEN, Hub, running_hub
from tiny_artefacts import FILES, call, load_teacher, make_teacher, names_in, refused

from selftrans_reg.errors import CheckpointError


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("HF_TOKEN", "")  # none of whoever runs the tests
    with running_hub(tmp_path / "cache") as running:
        yield running


def test_a_teacher_goes_to_the_hub_and_its_two_files_come_back(hub: Hub, tmp_path: Path) -> None:
    teacher = make_teacher()
    teacher.push_to_hub("me/teacher", token=TOKEN, source="run 17", licence="mit", step=9)
    repository = hub.repositories["me/teacher"]
    assert sorted(repository.revisions["main"]) == FILES
    card = repository.revisions["main"]["README.md"].decode()
    assert 'st.CFGFeatureTeacher.from_pretrained("me/teacher", model=TinyDiT)' in card
    others = ("modeling.py", "weights.pt", "tokenizer.json", "sub/config.json", "sub/model.safetensors")
    hub.add("me/teacher", dict.fromkeys(others, b"raise SystemExit('ran')"))
    loaded = load_teacher("me/teacher")
    assert names_in(tmp_path / "cache" / "me--teacher" / "main") == ["config.json", "model.safetensors"]
    assert torch.equal(loaded(**call(1)), teacher(**call(1)))
    assert torch.equal(loaded.fingerprint, teacher.fingerprint)
    assert loaded.provenance == {"source": "run 17", "step": 9, "licence": "mit"}


def test_the_card_of_a_repository_stays(hub: Hub) -> None:
    make_teacher().push_to_hub("me/other", token=TOKEN, licence="CC BY-NC 4.0")  # whose name the hub does not know
    hub.add("me/teacher", {"README.md": b"# Mine\n", "notes.txt": b"mine"})
    make_teacher().push_to_hub("me/teacher", token=TOKEN)
    files = hub.repositories["me/teacher"].revisions["main"]
    assert sorted(files) == sorted([*FILES, "notes.txt"])
    assert files["README.md"] == b"# Mine\n"


def test_revisions_are_branches_and_commits(hub: Hub) -> None:
    first = make_teacher().push_to_hub("me/teacher", token=TOKEN).rpartition("/")[2]
    make_teacher(guidance_scale=7.0).push_to_hub("me/teacher", token=TOKEN, revision="strong")
    scales = [load_teacher("me/teacher", revision=r).guidance_scale for r in (None, "main", first, "strong")]
    assert scales == [3.0, 3.0, 3.0, 7.0]
    make_teacher(guidance_scale=8.0).push_to_hub("me/teacher", token=TOKEN, revision="strong")
    assert load_teacher("me/teacher", revision="strong").guidance_scale == 8.0
    says = "'me/teacher' cannot be read from the hub: HubError: 404"
    refused(load_teacher, "me/teacher", revision="weak", says=says)


def test_private_repositories_and_uploads_need_a_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    for token in ("wrong", False, None):
        says = "The upload to 'me/secret' failed: HubError: 401"
        refused(make_teacher().push_to_hub, "me/secret", token=token, says=says)
    assert hub.repositories == {}
    make_teacher().push_to_hub("me/secret", token=f"{TOKEN}\n", private=True)  # as read from a file
    assert hub.repositories["me/secret"].private
    for token in ("wrong", False, None):
        says = "'me/secret' cannot be read from the hub: HubError: 401"
        refused(load_teacher, "me/secret", token=token, says=says)
    load_teacher("me/secret", token=f" {TOKEN}\r\n")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    load_teacher("me/secret")


@pytest.mark.parametrize("token", [f"hf_other\n{TOKEN}", f"{TOKEN}é", "\n", ""])
def test_no_message_shows_a_token_that_cannot_be_one(hub: Hub, token: str) -> None:
    for act in (make_teacher().push_to_hub, load_teacher):
        with pytest.raises(CheckpointError, match="The token that was given is empty or has characters") as error:
            act("me/secret", token=token)
        shown = "".join(traceback.format_exception(error.value))
        assert "hf_other" not in shown
        assert TOKEN not in shown
    assert hub.requests == []


def test_without_the_hub_the_copy_in_the_cache_is_read(hub: Hub, tmp_path: Path) -> None:
    make_teacher().push_to_hub("me/teacher", token=TOKEN)
    load_teacher("me/teacher", cache_dir=tmp_path / "other")
    hub.requests.clear()
    refused(load_teacher, "me/teacher", local_files_only=True, says="cannot be read from the hub: HubError: no copy")
    load_teacher("me/teacher", cache_dir=tmp_path / "other", local_files_only=True)
    assert hub.requests == []


def test_what_is_missing_or_is_no_teacher_is_refused_and_what_names_no_repository_is_asked_of_nobody(hub: Hub) -> None:
    for name in ("teacher", "a/b/c", "../teacher", "/me/teacher", "me/te acher", "hf://me/teacher"):
        refused(load_teacher, name, says=("There is no folder", "'owner/name'"))
    refused(make_teacher().push_to_hub, "me/teacher", token=TOKEN, source=torch.ones(1), says="'source' is more than")
    assert hub.requests == []  # what cannot be saved asks the hub nothing
    refused(load_teacher, "me/nothing", says="'me/nothing' cannot be read from the hub: HubError: 401")
    hub.add("me/empty", {"README.md": b"# Soon\n"})
    refused(load_teacher, "me/empty", says="There is no saved teacher")


def test_a_local_folder_comes_first_and_a_path_never_means_a_repository(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_teacher(guidance_scale=7.0).push_to_hub("me/teacher", token=TOKEN)
    refused(load_teacher, Path("me/teacher"), says="There is no folder")
    Path("me").mkdir()
    says = ("There is no folder 'me/teacher'", "revision='main'")  # as after a typo in a path
    refused(load_teacher, "me/teacher", says=says)
    assert load_teacher("me/teacher", revision="main").guidance_scale == 7.0
    make_teacher().save_pretrained("me/teacher")
    hub.requests.clear()
    assert load_teacher("me/teacher").guidance_scale == 3.0
    assert hub.requests == []
    refused(load_teacher, "me/teacher", revision="main", says="a local folder, which has no revision 'main'")
