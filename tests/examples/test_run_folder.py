"""The examples' run folders: finished work is kept, and no run writes into another's."""

import json
from pathlib import Path

import pytest
import torch
from common.run_folder import finished_or_made, open_run_folder, write_json


def test_the_same_settings_open_the_folder_again(tmp_path: Path) -> None:
    for _ in range(2):
        open_run_folder(tmp_path / "run", {"steps": 3, "window": (0.4, 0.7)})
    assert json.loads((tmp_path / "run/settings.json").read_text()) == {"steps": 3, "window": [0.4, 0.7]}


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    open_run_folder(tmp_path, {"steps": 3, "seed": 0, "old": 1})
    for match in ["other settings", "steps: 3 there, 4 now", "old: 1 there, None now", "--out"]:
        with pytest.raises(ValueError, match=match):
            open_run_folder(tmp_path, {"steps": 4, "seed": 0})
    with pytest.raises(ValueError, match="there") as error:
        open_run_folder(tmp_path, {"steps": 4, "seed": 0, "old": 1})
    assert "seed" not in str(error.value)
    assert json.loads((tmp_path / "settings.json").read_text())["steps"] == 3


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").touch()
    for match in ["not empty, and no run made it", "holiday.jpg", "Name another folder"]:
        with pytest.raises(ValueError, match=match):
            open_run_folder(tmp_path, {})
    assert [entry.name for entry in tmp_path.iterdir()] == ["holiday.jpg"]
    with pytest.raises(ValueError, match="is a file, and a run needs a folder"):
        open_run_folder(tmp_path / "holiday.jpg", {})


def test_work_is_done_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls = []

    def make() -> dict[str, object]:
        calls.append(1)
        return {"weights": torch.ones(2), "seconds": 1.5, "log": [{"step": 0}]}

    first, second = (finished_or_made(tmp_path / "a.pt", make) for _ in range(2))
    assert len(calls) == 1
    assert "finished before" in capsys.readouterr().out
    assert torch.equal(first["weights"], second["weights"])
    assert second["log"] == [{"step": 0}]
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.pt"]


def test_work_that_breaks_off_leaves_no_result(tmp_path: Path) -> None:
    def broken() -> dict[str, object]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finished_or_made(tmp_path / "a.pt", broken)
    assert not (tmp_path / "a.pt").exists()


def test_json_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_json({"a": 1.5}, path)
    with pytest.raises(TypeError):
        write_json({"a": object()}, path)
    assert json.loads(path.read_text()) == {"a": 1.5}
