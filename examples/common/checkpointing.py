"""A run's checkpoint files: written whole or not at all, found again, and cleared of all but the newest.

`{steps:07d}.pt` holds what `torch.save` wrote. A save goes to `….pt.partial`, is flushed to the disk and then renamed,
so that a file without that ending is complete at whatever instant the process was killed.
"""

import os
import re
from pathlib import Path
from typing import Any

import torch

from selftrans_reg.checkpoints import read_checkpoint
from selftrans_reg.errors import CheckpointError, SettingError

PARTIAL = ".partial"
_NAME = re.compile(r"(\d{7,})\.pt")


def checkpoint_path(folder: Path, steps: int) -> Path:
    """The file of the checkpoint after so many steps."""
    return folder / f"{steps:07d}.pt"


def saved_checkpoints(folder: Path) -> dict[int, Path]:
    """The complete checkpoints of a folder by their steps, oldest first; none if there is no folder."""
    entries = folder.iterdir() if folder.is_dir() else ()
    found = {int(match[1]): entry for entry in entries if (match := _NAME.fullmatch(entry.name))}
    return dict(sorted(found.items()))


def save_checkpoint(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint that is not there yet, atomically.

    Raises:
        CheckpointError: If it cannot be written, as on a full disk; whatever was saved before is untouched.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
        _flush_names(path.parent)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
        partial.unlink(missing_ok=True)
        raise CheckpointError(
            f"{path} could not be written: {error}\n"
            "The checkpoints before it are whole. Make room, then run the same command again to go on from the newest."
        ) from error


def clear_old(folder: Path, *, keep: int, keep_every: int | None) -> None:
    """Remove all checkpoints but the newest ``keep`` and those at multiples of ``keep_every`` steps.

    What killed saves have left goes too.
    """
    saved = saved_checkpoints(folder)
    for steps in list(saved)[:-keep]:
        if not keep_every or steps % keep_every:
            saved[steps].unlink()
    for partial in folder.glob(f"*.pt{PARTIAL}"):
        partial.unlink()


def resume_point(folder: Path, resume: str) -> Path | None:
    """The checkpoint to go on from, None for a fresh start.

    Args:
        folder: Where the run's checkpoints are.
        resume: "auto" for the newest one if there is any, "never", or the path of a file.

    Raises:
        SettingError: If checkpoints that are there would be written over.
        CheckpointError: If there is no such file.
    """
    saved = saved_checkpoints(folder)
    if resume == "auto":
        return saved[max(saved)] if saved else None
    if resume == "never":
        if saved:
            raise SettingError(
                f"A fresh start would write over what is in {folder}.\n"
                f"Found: {len(saved)} checkpoints, the newest after {max(saved)} steps.\n"
                "Go on from it with --resume auto, or name another folder with --out."
            )
        return None
    path = Path(resume)
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint {resume!r} to resume from.\nFound in {folder}: {list(saved)}.")
    return path


def read_training_state(path: Path, keys: set[str]) -> dict[str, Any]:
    """The content of a checkpoint that training can go on from, its tensors as views of the file.

    Args:
        path: The file.
        keys: What it has to hold; steps among them.

    Raises:
        CheckpointError: If it is damaged, or holds something else.
    """
    content = read_checkpoint(path)
    missing = sorted(keys - content.keys())
    if missing or type(content["steps"]) is not int or content["steps"] < 0:
        raise CheckpointError(
            f"{path} is no checkpoint that training can go on from.\n"
            f"Found: {sorted(map(str, content))}{f', without {missing}' if missing else ', with no number of steps'}.\n"
            "For a new run that starts from its weights, pass it as --init."
        )
    return content


def _flush_names(folder: Path) -> None:
    """Make a rename survive a power cut, which flushing the file alone does not."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
