"""A run's folder: it belongs to one set of settings, and what is finished in it is not done again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from selftrans_reg.errors import SettingError

_SETTINGS = "settings.json"


def write_json(content: Any, path: Path) -> None:
    """Write indented JSON under another name, then rename: the file is always whole."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(path)


def open_run_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Make the folder of a run, or make sure that the one that is there was made with the same settings.

    Raises:
        SettingError: If the folder holds something else: another run, or files that no run made; or it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise SettingError(f"--out {folder} is a file, and a run needs a folder.\nName another with --out.")
    settings = json.loads(json.dumps(settings))  # tuples become lists, as in the file
    path = folder / _SETTINGS
    if path.exists():
        found = json.loads(path.read_text())
        names = sorted(settings.keys() | found.keys())
        differences = [
            f"{name}: {found.get(name)!r} there, {settings.get(name)!r} now"
            for name in names
            if found.get(name) != settings.get(name)
        ]
        if differences:
            raise SettingError(
                f"The folder {folder} holds a run with other settings.\n"
                f"Found: {'; '.join(differences)}.\n"
                "Name another folder with --out, or delete this one."
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise SettingError(
            f"The folder {folder} is not empty, and no run made it.\n"
            f"Found: {', '.join(sorted(entry.name for entry in folder.iterdir())[:5])}, but no {_SETTINGS}.\n"
            "Name another folder with --out."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(settings, path)


def finished_or_made(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the file at ``path`` holds, on the CPU; if it is not there yet, ``make()`` does the work and it is written.

    The content is tensors, numbers, strings and containers of them: the file is read with ``weights_only``.
    """
    if path.exists():
        print(f"{path}: finished before")
    else:
        partial = path.with_name(path.name + ".partial")
        torch.save(make(), partial)
        partial.replace(path)
    return torch.load(path, map_location="cpu", weights_only=True)
