"""The examples' run folders: finished work is kept, no run writes into another's, and what is damaged is named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common.options import Mistake
from common.run_folder import (
    checkpoints_of,
    finished_or_made,
    locked,
    newest_checkpoint,
    open_run_folder,
    write_json,
    write_whole,
)


def test_the_same_settings_open_the_folder_again_and_others_are_refused(tmp_path: Path) -> None:
    settings = tmp_path / "run/settings.json"
    for _ in range(2):
        open_run_folder(tmp_path / "run", {"steps": 3, "window": (0.4, 0.7), "old": 1})
    saved = settings.read_bytes()
    assert json.loads(saved) == {"steps": 3, "window": [0.4, 0.7], "old": 1}
    with pytest.raises(
        Mistake, match=r"other settings.\nFound: old: 1 there, None now; steps: 3 there, 4 now.\n.*--out"
    ):
        open_run_folder(tmp_path / "run", {"steps": 4, "window": (0.4, 0.7)})
    assert settings.read_bytes() == saved
    for damaged in (b"", b'{"steps": 3', b"[1]", b"3", b"\xff\xfe"):
        settings.write_bytes(damaged)
        with pytest.raises(Mistake, match=r"settings.json is damaged(.|\n)*--out"):
            open_run_folder(tmp_path / "run", {"steps": 3})
        assert settings.read_bytes() == damaged
    with pytest.raises(Mistake, match=r"not empty, and no run made it.\nFound: run(.|\n)*another folder"):
        open_run_folder(tmp_path, {})
    with pytest.raises(Mistake, match="is a file, and a run needs a folder"):
        open_run_folder(settings, {})


def test_work_is_done_once_and_written_whole(tmp_path: Path) -> None:
    made = iter([{"weights": torch.ones(2), "seconds": 1.5}, {"x": lambda: None}])  # which cannot be pickled
    first, second = (finished_or_made(tmp_path / "a.pt", lambda: next(made)) for _ in range(2))
    assert torch.equal(first["weights"], second["weights"])
    with pytest.raises(AttributeError):
        finished_or_made(tmp_path / "c.pt", lambda: next(made))
    write_json({"a": 1.5}, tmp_path / "b.json")
    assert json.loads((tmp_path / "b.json").read_text()) == {"a": 1.5}
    assert {entry.name for entry in tmp_path.iterdir()} == {"a.pt", "b.json"}


def test_what_is_written_is_flushed_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, fsync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda *args: (done.append("fsync"), fsync(*args)))
    monkeypatch.setattr(os, "rename", lambda *args: (done.append("rename"), rename(*args)))
    write_whole(tmp_path / "a", lambda file: file.write(b"x"))
    assert done == ["fsync", "rename", "fsync"]  # the file, its name, the folder


HOLD = "import sys, time; from pathlib import Path; from common.run_folder import locked\n"
HOLD += "with locked(Path(sys.argv[1])): print('in', flush=True); time.sleep(60)"


def test_a_second_process_is_kept_out_until_the_first_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.run_folder._AFTER_A_KILL", 0.2)
    command, where = [sys.executable, "-c", HOLD, tmp_path], os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, env=where, stdout=subprocess.PIPE) as first:
        assert first.stdout.readline() == b"in\n"
        with pytest.raises(Mistake, match=rf"at work in {tmp_path}: process {first.pid} on "), locked(tmp_path):
            pass
        first.kill()
    for _ in range(2):  # what the dead one has left is no obstacle
        with locked(tmp_path):
            pass


def test_checkpoints_are_found_by_their_steps(tmp_path: Path) -> None:
    for place in (tmp_path / "run/checkpoints", tmp_path / "bare"):
        place.mkdir(parents=True)
        for name in ("0000002.pt", "12345678.pt", "0000010.pt", "0000011.pt.partial", "last.pt"):
            (place / name).touch()
    for run, place in [(tmp_path / "run", tmp_path / "run/checkpoints"), (tmp_path / "bare", tmp_path / "bare")]:
        assert checkpoints_of(run) == [place / name for name in ("0000002.pt", "0000010.pt", "12345678.pt")]
        assert newest_checkpoint(run) == place / "12345678.pt"
    assert newest_checkpoint(tmp_path / "bare/last.pt") == tmp_path / "bare/last.pt"
    with pytest.raises(Mistake, match=r"no checkpoint of a run in .*\nFound: bare, run"):
        newest_checkpoint(tmp_path)
