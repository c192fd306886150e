"""Kill a save at every point where it touches the disk, or let the disk run full: the older artefact has to be whole.

    python tests/support/interrupted_saves.py FOLDER

A parent that has imported everything forks one process for each interruption, which is then a real one: SIGKILL at the
n-th file operation of the save, or RLIMIT_FSIZE in the middle of a file. The last line printed is a JSON summary.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tiny_artefacts import FILES, TinyDiT, call, config_of, make_teacher, names_in

import selftrans_reg as st
from selftrans_reg.errors import CheckpointError

OPERATIONS = ("open", "os.chmod", "os.mkdir", "os.remove", "os.rename", "os.rmdir")  # reported before they happen


def in_a_child(action: Callable[[], None]) -> int:
    """Run ``action`` in a forked process; its wait status."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def die_at(operation: int) -> None:
    """Kill this process at its n-th operation on a file, counted from now on."""
    seen = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if event in OPERATIONS:
            seen += 1
            if seen == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def numbered(number: int) -> st.CFGFeatureTeacher:
    """A teacher with weights and a setting of its own."""
    return make_teacher(seed=number, guidance_scale=float(number))


def number_in(folder: Path) -> int:
    """Which teacher is in ``folder``, once its features are known to be those of that number."""
    teacher = st.CFGFeatureTeacher.from_pretrained(folder, model=TinyDiT)
    number = int(teacher.guidance_scale)
    assert torch.equal(teacher(**call(3)), numbered(number)(**call(3)))
    return number


def kill(folder: Path) -> dict[str, object]:
    """Save over an older teacher, killed ever later, until the save gets to its end."""
    numbered(1).save_pretrained(folder / "before")
    return killed_ever_later(folder, folder / "before", 1)


def twice(folder: Path) -> dict[str, object]:
    """The same over what was killed between its last two renames: a new config.json, and the old weights."""
    kill(folder)
    half = next(path for path in folder.iterdir() if config_of(path)["guidance_scale"] == 2.0 and number_in(path) == 1)
    return killed_ever_later(folder / "again", half, 1, new=3)


def killed_ever_later(folder: Path, before: Path, old: int, new: int = 2) -> dict[str, object]:
    """Which teacher is there after a save over a copy of ``before`` was killed at its first operation, second, ..."""
    teacher, outcomes = numbered(new), []
    for operation in range(1, 100):
        place = Path(shutil.copytree(before, folder / str(operation)))
        exit_code = killed_save(teacher, place, operation)
        outcomes.append({old: "old", new: "new"}[number_in(place)])
        if exit_code == 0:
            return {"outcomes": outcomes, "files": names_in(place)}
        assert exit_code == -signal.SIGKILL, exit_code
    raise AssertionError("the save never ended")


def first(folder: Path) -> dict[str, object]:
    """The same with nothing there before, and a save to the end after each interruption."""
    teacher = numbered(2)
    outcomes = []
    for operation in range(1, 100):
        place = folder / str(operation)
        exit_code = killed_save(teacher, place, operation)
        try:
            assert number_in(place) == 2
            outcomes.append("new")
        except CheckpointError as error:
            outcomes.append("none" if "There is no" in str(error) else str(error))
        if exit_code == 0:
            return {"outcomes": outcomes, "files": names_in(place)}
        teacher.save_pretrained(place)
        assert number_in(place) == 2
        assert names_in(place) == FILES, names_in(place)
    raise AssertionError("the save never ended")


def killed_save(teacher: st.CFGFeatureTeacher, folder: Path, operation: int) -> int:
    """The exit code of a process that saves, and is killed at that operation if it has so many."""

    def save() -> None:
        die_at(operation)
        teacher.save_pretrained(folder)

    return os.waitstatus_to_exitcode(in_a_child(save))


def full(folder: Path) -> dict[str, object]:
    """Save over an older teacher with ever more room for each file, until there is enough."""
    numbered(1).save_pretrained(folder)
    largest = max(path.stat().st_size for path in folder.iterdir())
    new = numbered(2)
    for refused, limit in enumerate(range(0, 2 * largest, 200)):

        def save(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                new.save_pretrained(folder)
            except CheckpointError as error:
                said = "could not be written" in str(error) and "still whole" in str(error)
                os._exit(3 if said else 4)

        status = in_a_child(save)
        if status == 0:
            assert number_in(folder) == 2
            return {"refused": refused, "files": names_in(folder)}
        assert os.waitstatus_to_exitcode(status) == 3, status
        assert number_in(folder) == 1
        assert names_in(folder) == FILES, names_in(folder)
    raise AssertionError("the save never fitted")


if __name__ == "__main__":
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    print(json.dumps({part.__name__: part(place / part.__name__) for part in (kill, twice, first, full)}))
