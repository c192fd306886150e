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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common.options import Mistake
from common.run_folder import saved_checkpoints
from interrupted_saves import die_at, in_a_child
from long_runs import differences, trained

FIRST, LAST = 2, 4
EVERY = {"checkpoint_every": FIRST, "keep": 1}
SAVE = torch.save


def dying_at(operation: int) -> Callable[[Any, Any], None]:
    """A ``torch.save`` that dies at an operation on a file, counted from when the partial file is open."""

    def save(content: Any, file: Any) -> None:
        die_at(operation)
        SAVE(content, file)

    return save


def dying_after(room: int) -> Callable[[Any, Any], None]:
    """A ``torch.save`` that dies after so many bytes."""

    def save(content: Any, file: Any) -> None:
        SAVE(content, file)
        file.flush()
        os.truncate(file.fileno(), room)
        os.kill(os.getpid(), signal.SIGKILL)

    return save


def after_interruption(
    before: Path, place: Path, whole: Path, save: Callable[[Any, Any], None]
) -> tuple[int, list[int]]:
    """The exit code of a run that goes on until it is interrupted, and what is saved; then the run is finished."""
    shutil.copytree(before, place)

    def go_on() -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        torch.save = save
        trained(place, steps=LAST, **EVERY)

    code = in_a_child(go_on)
    saved = list(saved_checkpoints(place / "checkpoints"))
    trained(place, steps=LAST, **EVERY)
    # Killed between the rename and the removal of the old one, both are there, and the run has nothing to train.
    names = {path.name for path in (place / "checkpoints").iterdir()}
    assert names - {f"{FIRST:07d}.pt" for steps in saved if steps == LAST} == {f"{LAST:07d}.pt"}, names
    last = Path("checkpoints", f"{LAST:07d}.pt")
    assert differences(place / last, whole / last) == []
    return code, saved


def full_disk(before: Path, place: Path, size: int) -> str:
    """What is said when there is no room for the checkpoint."""
    shutil.copytree(before, place)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, resource.RLIM_INFINITY))
    try:
        trained(place, steps=LAST, **EVERY)
    except Mistake as error:
        assert [path.name for path in (place / "checkpoints").iterdir()] == [f"{FIRST:07d}.pt"]
        return str(error)
    raise AssertionError("nothing was refused")


def main(folder: Path) -> dict[str, object]:
    whole, before, killed = folder / "whole", folder / "before", -signal.SIGKILL
    trained(whole, steps=LAST, **EVERY)
    trained(before, steps=FIRST, **EVERY)
    size = (before / "checkpoints" / f"{FIRST:07d}.pt").stat().st_size
    code, operations, parts = killed, [], []
    while code == killed:
        place = folder / f"operation-{len(operations)}"
        code, saved = after_interruption(before, place, whole, dying_at(len(operations) + 1))
        operations.append(saved)
    assert code == 0, code
    for room in (0, 1, size // 2, size - 1):
        code, saved = after_interruption(before, folder / f"bytes-{room}", whole, dying_after(room))
        assert code == killed, code
        parts.append(saved)
    return {"operations": operations, "bytes": parts, "full": full_disk(before, folder / "full", size)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(Path(sys.argv[1]))))
