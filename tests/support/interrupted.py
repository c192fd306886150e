"""What an interrupted write leaves: copies of a folder from every moment of it, and a disk without room."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

OPERATIONS = ("open", "os.chmod", "os.mkdir", "os.remove", "os.rename", "os.rmdir")  # reported before they happen
_watching: list[Callable[[], None]] = []


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if event in OPERATIONS and _watching:
        act = _watching.pop()  # which touches the disk itself
        act()
        _watching.append(act)


sys.addaudithook(_hook)  # for good: none can be taken out again


@contextmanager
def snapshots(folder: Path, into: Path) -> Iterator[list[Path]]:
    """Copies of ``folder`` before each operation on a file, and at the end: what a kill at that moment leaves."""
    taken: list[Path] = []

    def copy() -> None:
        taken.append(into / str(len(taken)))
        if folder.exists():
            shutil.copytree(folder, taken[-1])

    _watching.append(copy)
    try:
        yield taken
    finally:
        _watching.clear()
    copy()


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """Let no file grow beyond so many bytes while inside: a write fails there, as it does on a full disk."""
    import resource  # there is none on Windows

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
