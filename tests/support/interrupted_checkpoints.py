"""Kill a run while it saves, or let its disk run full: older checkpoints stay whole, and the run goes on from them.

    PYTHONPATH=examples python tests/support/interrupted_checkpoints.py FOLDER

A parent that has imported everything forks one process for each interruption: SIGKILL at the n-th operation on a file,
SIGKILL after the n-th byte of a checkpoint, or RLIMIT_FSIZE. The last line printed is a JSON summary.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
from pathlib import Path
from typing import IO, Any

import torch
from common.options import Mistake
from common.run_folder import saved_checkpoints
from interrupted_saves import die_at, in_a_child
from long_runs import differences, trained

FIRST, LAST = 2, 4
EVERY = {"checkpoint_every": FIRST, "keep": 1}


class Killing:
    """A file of which only so many bytes are written before the process is killed."""

    def __init__(self, file: IO[bytes], room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        written = self.file.write(data[: self.room])
        self.room -= written
        if written < len(data):
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return written

    def flush(self) -> None:
        self.file.flush()


def after_interruption(before: Path, place: Path, whole: Path, interrupt: Any) -> tuple[int, list[int]]:
    """The exit code of a run that goes on until it is interrupted, and what is saved; then the run is finished."""
    shutil.copytree(before, place)

    def go_on() -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        interrupt()
        trained(place, steps=LAST, **EVERY)

    code = os.waitstatus_to_exitcode(in_a_child(go_on))
    saved = list(saved_checkpoints(place / "checkpoints"))
    trained(place, steps=LAST, **EVERY)
    # Killed between the rename and the removal of the old one, both are there, and the run has nothing to train.
    names = {path.name for path in (place / "checkpoints").iterdir()} - {
        f"{FIRST:07d}.pt" for steps in saved if steps == LAST
    }
    assert names == {f"{LAST:07d}.pt"}, names
    last = Path("checkpoints", f"{LAST:07d}.pt")
    assert differences(place / last, whole / last) == []
    return code, saved


def killed_at_operations(before: Path, folder: Path, whole: Path) -> list[list[int]]:
    """What is saved after a kill at the first operation on a file of the save, the second, ... until none is left."""
    outcomes = []

    def at(operation: int) -> None:
        real = torch.save

        def save(content: Any, file: Any) -> None:
            die_at(operation)  # counted from the moment at which the partial file is open
            real(content, file)

        torch.save = save

    for operation in range(1, 100):
        code, saved = after_interruption(before, folder / str(operation), whole, lambda n=operation: at(n))
        outcomes.append(saved)
        if code == 0:
            return outcomes
        assert code == -signal.SIGKILL, code
    raise AssertionError("the save never ended")


def killed_at_bytes(before: Path, folder: Path, whole: Path, size: int) -> list[list[int]]:
    """What is saved after a kill within the checkpoint's bytes."""
    outcomes = []
    for room in (0, 1, size // 2, size - 1):

        def at(room: int = room) -> None:
            real = torch.save
            torch.save = lambda content, file: real(content, Killing(file, room))

        code, saved = after_interruption(before, folder / str(room), whole, at)
        assert code == -signal.SIGKILL, code
        outcomes.append(saved)
    return outcomes


def full_disk(before: Path, place: Path, size: int) -> str:
    """What is said when there is no room for the checkpoint."""
    shutil.copytree(before, place)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
    try:
        trained(place, steps=LAST, **EVERY)
    except Mistake as error:
        assert [path.name for path in (place / "checkpoints").iterdir()] == [f"{FIRST:07d}.pt"]
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    raise AssertionError("nothing was refused")


def main(folder: Path) -> dict[str, object]:
    whole, before = folder / "whole", folder / "before"
    trained(whole, steps=LAST, **EVERY)
    trained(before, steps=FIRST, **EVERY)
    size = (before / "checkpoints" / f"{FIRST:07d}.pt").stat().st_size
    return {
        "operations": killed_at_operations(before, folder / "operations", whole),
        "bytes": killed_at_bytes(before, folder / "bytes", whole, size),
        "full": full_disk(before, folder / "full", size),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(Path(sys.argv[1]))))
