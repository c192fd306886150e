"""REPA's preprocessed ImageNet: ``vae-sd/dataset.json`` with the labels, beside folders of one ``.npy`` an image."""

import hashlib
import os
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.data_files import DataError, first_ones, read_json
from common.moments import read_moments

INDEX = "dataset.json"
SCALE = 0.18215  # REPA's files do not say; its code multiplies by this

# Every class takes a row of the model's table.
_MAX_CLASSES = 1 << 20
_SAMPLED = 16


class RepaFolder:
    """The images that ``dataset.json`` lists, in its order, each a file of mean and std.

    Attributes:
        labels: (N,), int64.
        num_classes: As given, or one more than the largest label.
        shape: (C, h, w) of a latent: the most frequent among 16 files spread over the list.
        scale: 0.18215.
        vae: None: the layout does not record it (REPA encoded with sd-vae-ft-mse).
        problems: What is wrong with the list, as (file, reason); these files are not among the labels.

    Args:
        folder: The one that holds ``dataset.json``.
        num_classes: Labels from there on are wrong; None takes every label for right.

    Raises:
        DataError: If the list itself cannot be read, or nothing in it can be used.
    """

    scale = SCALE
    vae = None

    def __init__(self, folder: Path, *, num_classes: int | None = None) -> None:
        self._folder = folder
        self.problems: list[tuple[str, str]] = []
        labels = self._checked_labels(_entries(folder / INDEX), num_classes)
        fine = {name: label for name, label in labels.items() if label is not None}
        there = _files(folder, {name.rpartition("/")[0] for name in fine})
        self.problems += [(name, "listed, but not there") for name in sorted(fine.keys() - there)]
        self.problems += [(name, f"there, but without a label in {INDEX}") for name in sorted(there - labels.keys())]
        usable = {name: label for name, label in fine.items() if name in there}
        if not usable:
            raise DataError(
                f"None of the files that {folder / INDEX} lists can be used.\n{first_ones(self.problems)}\n"
                "The .npy files belong beside it, under the names that it lists."
            )
        # One array: a list of strings would be copied into every worker of a loader, page by page, as it is counted.
        self._names = np.array([os.fsencode(name) for name in usable])
        self.labels = torch.tensor(list(usable.values()))
        self.num_classes = int(self.labels.max()) + 1 if num_classes is None else num_classes
        self.shape = self._usual_shape()

    @property
    def digest(self) -> str:
        """SHA-256 of names and labels."""
        return hashlib.sha256(self._names.tobytes() + self.labels.numpy().tobytes()).hexdigest()

    def name(self, index: int) -> str:
        """The file of an image, relative to the folder."""
        return os.fsdecode(self._names[index])

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """Mean and std of an image, twice (C, h, w).

        Raises:
            DataError: If the file cannot be used.
        """
        path = self._folder / self.name(index)
        mean, std = read_moments(path)
        if mean.shape != self.shape:
            raise DataError(
                f"{path} holds a latent {tuple(mean.shape)}; the others of its folder are {tuple(self.shape)}. "
                "Encode the image again with the settings of the others."
            )
        return mean, std

    def _usual_shape(self) -> torch.Size:
        shapes, last = Counter[torch.Size](), None
        for index in np.linspace(0, len(self.labels) - 1, min(_SAMPLED, len(self.labels))).astype(int):
            try:
                shapes[read_moments(self._folder / self.name(index))[0].shape] += 1
            except DataError as error:
                last = error
        if not shapes:
            raise DataError(
                f"Not one of {min(_SAMPLED, len(self.labels))} files of {self._folder} can be used.\nThe last: {last}"
            )
        return shapes.most_common(1)[0][0]

    def _checked_labels(self, entries: list[Any], num_classes: int | None) -> dict[str, int | None]:
        """Labels by file; None where the entry is wrong, which is also one of the problems."""
        labels: dict[str, int | None] = {}
        for entry in entries:
            match entry:
                case [str(name), label]:
                    reason = "listed twice" if name in labels else _wrong_name(name) or _wrong_label(label, num_classes)
                    labels[name] = None if reason else label
                case _:
                    name, reason = str(entry)[:100], "no pair of file and label"
            if reason:
                self.problems.append((name, reason))
        return labels


def _wrong_name(name: str) -> str:
    fine = name.endswith(".npy") and not {"", ".", ".."} & {*name.split("/")} and "\0" not in name
    return "" if fine else "no name of a .npy file in this folder"


def _wrong_label(label: Any, num_classes: int | None) -> str:
    if type(label) is not int:  # True is an int, too
        return f"the label {str(label)[:50]!r} is no whole number"
    if 0 <= label < (_MAX_CLASSES if num_classes is None else num_classes):
        return ""
    return f"the label {str(label)[:50]} is not in 0 .. {(_MAX_CLASSES if num_classes is None else num_classes) - 1}"


def _entries(path: Path) -> list[Any]:
    content = read_json(path)
    entries = content.get("labels") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise DataError(
            f'{path} has no list of labels. It should be {{"labels": [["00000/img-mean-std-00000000.npy", 3], …]}}.'
        )
    return entries


def _files(folder: Path, parents: set[str]) -> set[str]:
    """The ``.npy`` files, with slashes, in the folder, in those inside it and in ``parents``; nothing is opened."""
    found: set[str] = set()
    with os.scandir(folder) as entries:
        parents = parents | {"", *(entry.name for entry in entries if entry.is_dir())}
    for parent in parents:
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder / parent) as entries:
            prefix = f"{parent}/" if parent else ""
            found.update(prefix + entry.name for entry in entries if entry.name.endswith(".npy"))
    return found
