"""Kill a save at every point where it touches the disk, or let the disk run full: the older teacher has to be whole.

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
from tiny_artefacts import FILES, call, load_teacher, make_teacher, names_in

import selftrans_reg as st

OPERATIONS = ("open", "os.chmod", "os.mkdir", "os.remove", "os.rename", "os.rmdir")  # reported before they happen


def in_a_child(action: Callable[[], None]) -> int:
    """Run ``action`` in a forked process; its exit code."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


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
    """Which teacher is in ``folder``, once its features are known to be those of that number; 0 if there is none."""
    try:
        teacher = load_teacher(folder)
    except st.CheckpointError as error:
        if "There is no" not in str(error):
            raise
        return 0
    number = int(teacher.guidance_scale)
    assert torch.equal(teacher(**call(3)), numbered(number)(**call(3)))
    return number


def killed(folder: Path, before: Path | None) -> list[int]:
    """Which teacher is there after a save was killed at its first operation, second, ..., until it got to its end.

    After each, another save ends, and leaves its own teacher alone.
    """
    new, later, outcomes = numbered(2), numbered(3), []
    for operation in range(1, 100):
        place = folder / str(operation)
        if before is not None:
            shutil.copytree(before, place)

        def save(operation: int = operation, place: Path = place) -> None:
            die_at(operation)
            new.save_pretrained(place)

        code = in_a_child(save)
        outcomes.append(number_in(place))
        later.save_pretrained(place)
        assert (number_in(place), names_in(place)) == (3, FILES), names_in(place)
        if code == 0:
            return outcomes
        assert code == -signal.SIGKILL, code
    raise AssertionError("the save never ended")


def full(folder: Path) -> int:
    """Save over an older teacher with ever more room for each file; how often there was not enough."""
    largest, new = max(path.stat().st_size for path in folder.iterdir()), numbered(2)
    for refused, limit in enumerate(range(0, 2 * largest, 200)):

        def save(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                new.save_pretrained(folder)
            except st.CheckpointError as error:
                os._exit(3 if "could not be written" in str(error) and "still whole" in str(error) else 4)

        code = in_a_child(save)
        assert (code, number_in(folder)) in ((0, 2), (3, 1)), code
        assert names_in(folder) == FILES, names_in(folder)
        if code == 0:
            return refused
    raise AssertionError("the save never fitted")


if __name__ == "__main__":
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    numbered(1).save_pretrained(place / "old")
    over, first = killed(place / "over", place / "old"), killed(place / "first", None)
    print(json.dumps({"over": over, "first": first, "full": full(place / "old")}))
