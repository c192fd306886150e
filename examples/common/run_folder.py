"""A run's folder: one set of settings, one process at a time, files that are whole, and its checkpoints and log.

Nothing here needs torch but what saves tensors, so that scripts look at a folder before they load anything.
"""

import contextlib
import json
import math
import os
import re
import socket
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from common.options import Mistake

if TYPE_CHECKING:
    from accelerate import Accelerator

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
        Mistake: If a process is at work there; it is named.
    """
    lock, holder = FileLock(folder / _LOCK), folder / _HOLDER
    try:
        lock.acquire(timeout=_AFTER_A_KILL if _is_dead(holder) else 0)
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


def _is_dead(holder: Path) -> bool:
    """Whether the process that is named as the holder is gone, as far as can be seen from this machine."""
    found = re.fullmatch(r"process (\d+) on (.*)", holder.read_text()) if holder.exists() else None
    if found is None or found[2] != socket.gethostname():
        return False
    try:
        os.kill(int(found[1]), 0)
    except ProcessLookupError:
        return True
    except OSError:  # it lives, and belongs to somebody else
        pass
    return False


def open_run_folder(
    folder: Path,
    settings: dict[str, Any],
    *,
    folders: Sequence[str] = (),
    saved: Callable[[], dict[str, Any] | None] = lambda: None,
) -> None:
    """Make the folder of a run, or make sure that the one that is there was made with the same settings.

    Args:
        folder: Of the run.
        settings: What decides what it will hold.
        folders: What the run will make folders of.
        saved: The settings as another file of the folder has them, if one does: should `settings.json` be damaged.

    Raises:
        Mistake: If the folder holds something else: another run, or files that no run made; or it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise Mistake(f"--out {folder} is a file, and a run needs a folder.\nName another with --out.")
    for name in folders:
        if (folder / name).exists() and not (folder / name).is_dir():
            raise Mistake(f"{folder / name} is a file, and a run needs a folder of that name.\nMove it away.")
    settings = json.loads(json.dumps(settings))  # tuples become lists, as in the file
    path = folder / _SETTINGS
    if not path.exists():
        there = [] if not folder.exists() else [e.name for e in folder.iterdir() if not e.name.startswith(".lock")]
        if there:
            raise Mistake(
                f"The folder {folder} is not empty, and no run made it.\n"
                f"Found: {', '.join(sorted(there)[:5])}, but no {_SETTINGS}.\nName another folder with --out."
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_json(settings, path)
        return
    found = _settings_in(path, settings, saved)
    differences = [
        f"{name}: {found.get(name)!r} there, {settings.get(name)!r} now"
        for name in sorted(settings.keys() | found.keys())
        if found.get(name) != settings.get(name)
    ]
    if differences:
        raise Mistake(
            f"The folder {folder} holds a run with other settings.\nFound: {'; '.join(differences)}.\n"
            "Name another folder with --out, or delete this one."
        )


def _settings_in(path: Path, settings: dict[str, Any], saved: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
    """What the file holds; if it is damaged it is written anew, from what else says it."""
    try:
        found = json.loads(path.read_bytes())
        if isinstance(found, dict):
            return found
        reason = f"it holds a {type(found).__name__}"
    except (OSError, ValueError) as error:
        reason = str(error)
    recovered = saved() if path.is_file() else None
    if recovered is None:
        raise Mistake(
            f"{path} is damaged: {reason}.\n"
            f"Delete the folder {path.parent} if nothing in it is needed, or name another with --out."
        )
    found = {name: recovered[name] for name in settings.keys() & recovered.keys()}
    write_json(found, path)
    print(f"{path} was damaged, and is written anew from what the newest checkpoint says.")
    return found


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
    """The complete checkpoints of a folder by their steps, oldest first; none if there is no folder.

    Raises:
        Mistake: If the folder is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise Mistake(f"{folder} is a file, and a run keeps its checkpoints in a folder of that name.\nMove it away.")
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


# --- The log: a JSON object a line -----------------------------------------------------------------------------------


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log, without a last line that was cut off; none if there is no such file.

    Raises:
        Mistake: If it is damaged elsewhere, as no process that was stopped leaves it.
    """
    if path.exists() and not path.is_file():
        raise Mistake(f"{path} is no file, and a run keeps its log in a file of that name.\nMove it away.")
    lines = path.read_bytes().splitlines() if path.exists() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or type(record.get("step")) is not int:
                raise ValueError("no record of a step")  # noqa: TRY301
            records.append(record)
        except ValueError as error:
            if number < len(lines):
                raise Mistake(
                    f"Line {number} of {path} is damaged: {error}.\nRemove that line, or move the file away: "
                    "the run goes on without it."
                ) from error
    return records


class RunLog:
    """A run's log: one JSON object a line in `log.jsonl`, and the same numbers to accelerate's trackers.

    Lines after the step that the run goes on from were written by a process that was stopped without a checkpoint;
    those steps run again, so their lines are dropped, as is a line that was cut off.

    Args:
        accelerator: Of the run, with its trackers named.
        folder: The run's.
        steps: Steps that are done: 0 at the start, the checkpoint's on resuming.
        config: What the trackers show beside the curves.
    """

    def __init__(self, accelerator: "Accelerator", folder: Path, steps: int, config: dict[str, Any]) -> None:
        self.accelerator = accelerator
        if not accelerator.is_main_process:
            return
        path = folder / "log.jsonl"
        kept = [json.dumps(line) + "\n" for line in read_log(path) if line["step"] <= steps]
        write_whole(path, lambda file: file.write("".join(kept).encode()))
        self._file = path.open("a")
        name = folder.resolve().name
        same = {"name": name, "resume": "allow"}  # a run that goes on continues its curves
        identity = uuid.uuid5(uuid.NAMESPACE_URL, str(folder.resolve())).hex
        accelerator.init_trackers(
            "selftrans-reg",
            init_kwargs={
                "tensorboard": {"purge_step": steps + 1},
                "wandb": {**same, "id": identity, "dir": str(folder)},
                "trackio": same,
            },
        )
        for tracker in accelerator.trackers:
            if tracker.name != "tensorboard":  # whose table of settings is a run of its own at each call
                tracker.store_init_configuration(config)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add the values after a step; one that is not finite becomes null, as JSON has no other word for it."""
        if not self.accelerator.is_main_process:
            return
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self._file.write(json.dumps({"step": step, **dict.fromkeys(values), **finite}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.accelerator.log(finite, step=step)

    def close(self) -> None:
        """Close the file and the trackers."""
        if self.accelerator.is_main_process:
            self._file.close()
            for tracker in self.accelerator.trackers:
                tracker.finish()
            self.accelerator.trackers = []
