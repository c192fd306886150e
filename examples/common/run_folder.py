"""A run's folder: one set of settings, one process at a time, files that are whole, and its checkpoints.

Nothing here needs torch but what saves tensors, so that scripts look at a folder before they load anything.
"""

import contextlib
import json
import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from common.options import Mistake

_SETTINGS = "settings.json"
_LOCK, _HOLDER = ".lock", ".lock-holder"
_PARTIAL = ".partial"
_CHECKPOINT = re.compile(r"(\d{7,})\.pt")
# What a killed process has started, such as those that read data for it, may hold its lock for this long, in seconds.
_AFTER_A_KILL = 10.0


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file whole or not at all: under a name of this process's own, flushed to the disk, then renamed."""
    partial = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}{_PARTIAL}")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    # The rename, too, has to survive a power cut, which flushing the file alone does not give.
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(content: Any, path: Path) -> None:
    """Write indented JSON, as `write_whole` does."""
    write_whole(path, lambda file: file.write((json.dumps(content, indent=2) + "\n").encode()))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep every other process out of a run's folder while inside; the system frees what a killed process held.

    Raises:
        Mistake: If a process is at work there, after ten seconds; it is named.
    """
    lock, holder = FileLock(folder / _LOCK), folder / _HOLDER
    try:
        lock.acquire(timeout=_AFTER_A_KILL)
    except Timeout:
        who = holder.read_text() if holder.exists() else "a process that has only just begun"
        raise Mistake(
            f"Another process is at work in {folder}: {who}.\n"
            "Wait for its end or stop it, then run the same command again; or name another folder with --out."
        ) from None
    except NotImplementedError:
        print(f"The file system of {folder} has no locks: see to it that a single job works there.")
    try:
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def open_run_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Make the folder of a run, or make sure that the one that is there was made with the same settings.

    Raises:
        Mistake: If the folder holds something else: another run, or files that no run made; or it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise Mistake(f"--out {folder} is a file, and a run needs a folder.\nName another with --out.")
    settings = json.loads(json.dumps(settings))  # tuples become lists, as in the file
    path = folder / _SETTINGS
    if not path.exists():
        others = [] if not folder.exists() else [e.name for e in folder.iterdir() if not e.name.startswith(".lock")]
        if others:
            raise Mistake(
                f"The folder {folder} is not empty, and no run made it.\n"
                f"Found: {', '.join(sorted(others)[:5])}, but no {_SETTINGS}.\nName another folder with --out."
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_json(settings, path)
    try:
        there = dict(json.loads(path.read_bytes()))
    except (TypeError, ValueError) as error:
        raise Mistake(
            f"{path} is damaged: {error}.\nName another folder with --out: nothing in this one is then lost."
        ) from error
    names = [name for name in sorted(there.keys() | settings.keys()) if there.get(name) != settings.get(name)]
    if names:
        found = "; ".join(f"{name}: {there.get(name)!r} there, {settings.get(name)!r} now" for name in names)
        raise Mistake(
            f"The folder {folder} holds a run with other settings.\nFound: {found}.\n"
            "Name another folder with --out, or delete this one."
        )


def finished_or_made(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the file at ``path`` holds, on the CPU; if it is not there yet, ``make()`` does the work and it is written.

    The content is tensors, numbers, strings and containers of them: the file is read with ``weights_only``.
    """
    import torch

    if path.exists():
        print(f"{path}: finished before")
    else:
        content = make()
        write_whole(path, lambda file: torch.save(content, file))
    return torch.load(path, map_location="cpu", weights_only=True)


# --- Checkpoints: `{steps:07d}.pt` -----------------------------------------------------------------------------------


def checkpoint_path(folder: Path, steps: int) -> Path:
    """The file of the checkpoint after so many steps."""
    return folder / f"{steps:07d}.pt"


def saved_checkpoints(folder: Path) -> dict[int, Path]:
    """The complete checkpoints of a folder by their steps, oldest first; none if there is no folder."""
    entries = folder.iterdir() if folder.exists() else ()
    found = {int(match[1]): path for path in entries if (match := _CHECKPOINT.fullmatch(path.name))}
    return dict(sorted(found.items()))


def checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoints of a run, by their steps: ``checkpoints/0050000.pt`` and so on, or the same in the folder itself.

    Raises:
        Mistake: If there is none.
    """
    inside = folder / "checkpoints" if (folder / "checkpoints").exists() else folder
    found = list(saved_checkpoints(inside).values())
    if not found:
        there = sorted(path.name for path in inside.iterdir())[:5] if inside.is_dir() else []
        raise Mistake(
            f"There is no checkpoint of a run in {inside}.\nFound: {', '.join(there) or 'nothing'}.\n"
            "Its name is the number of steps, as 0050000.pt: pass another file by its path."
        )
    return found


def newest_checkpoint(path: Path) -> Path:
    """The file itself, or a run's checkpoint of the most steps.

    Raises:
        Mistake: If a folder holds none.
    """
    return path if path.is_file() else checkpoints_of(path)[-1]


def clear_old(folder: Path, *, keep: int, keep_every: int | None) -> None:
    """Remove all checkpoints but the newest ``keep`` and those at multiples of ``keep_every`` steps.

    What killed saves have left goes too.
    """
    saved = saved_checkpoints(folder)
    for steps in list(saved)[:-keep]:
        if not keep_every or steps % keep_every:
            saved[steps].unlink()
    for partial in folder.glob(f"*.pt*{_PARTIAL}"):
        partial.unlink()


def trimmed_log(path: Path, steps: int) -> IO[str]:
    """A log, one JSON object a line, opened to go on after so many steps.

    Lines after that step are dropped, since those steps run again, as is what a process that was stopped cut off.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    found = [(line, re.fullmatch(rb'\{"step": (\d+),.*\}\n', line)) for line in lines]
    write_whole(path, lambda file: file.writelines(line for line, whole in found if whole and int(whole[1]) <= steps))
    return path.open("a")
