"""A data set of VAE posteriors on disk: REPA's layout, or the shards of ``encode_latents.py``, told apart by looking.

    data = open_latents(Path("imagenet/vae-sd"))
    mean, std, label = data[0]
    latent = data.scaling.drawn(mean, std, torch.randn_like(mean))

What the lists of files and labels show is checked when a folder is opened; a file is checked whenever it is read, since
reading all of ImageNet first takes its time.
"""

import json
import os
from bisect import bisect_right
from glob import glob
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import Dataset

from common.data_files import DataError, check_moments, first_ones, read_json, read_moments, readable
from common.run_folder import write_json, write_whole
from common.vae import Scaling, checked_scaling

REPA_INDEX = "dataset.json"
REPA_SCALE = 0.18215  # REPA's files do not say; its code multiplies by this
INDEX = "index.json"

_KIND = {"kind": "mean and std of VAE posteriors", "format": 1}
_MAX_CLASSES = 1 << 20  # every class takes a row of the model's table
_SAMPLED = 16


class LatentFolder(Dataset[tuple[Tensor, Tensor, int]]):
    """Posteriors with labels: ``data[i]`` is mean and std, twice (C, h, h) float32 and unscaled, and a label.

    Attributes:
        labels: (N,), int64, of every item, in 0 .. num_classes - 1.
        channels: C; likewise ``size``, h.
        scaling: From latents to what a model sees.
        vae: Path or name of the VAE, where the folder records it.
    """

    labels: Tensor
    num_classes: int
    channels: int
    size: int
    scaling: Scaling
    vae: str | None = None

    def __len__(self) -> int:
        """Items."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        """Mean, std, label; a `DataError` names the file that cannot be used."""
        place = range(len(self))[index]
        return *self.read(place), int(self.labels[place])

    def read(self, place: int) -> tuple[Tensor, Tensor]:
        """Mean and std of an item."""
        raise NotImplementedError


def open_latents(folder: Path, *, num_classes: int | None = None) -> LatentFolder:
    """Open a folder of posteriors; a `DataError` says what is wrong with it.

    Args:
        folder: One with REPA's ``dataset.json``, its parent, or one that ``encode_latents.py`` wrote.
        num_classes: Labels are below it; None takes the number that the folder records or its labels show.
    """
    candidates = [folder / REPA_INDEX, folder / "vae-sd" / REPA_INDEX, folder / INDEX]
    found = [path for path in candidates if path.is_file()]
    if len(found) != 1:
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) if folder.is_dir() else "no such folder"
        raise DataError(
            f"{folder} holds {len(found)} data sets of latents; exactly one is needed.\n"
            f"Found: {', '.join(map(str, found)) or there or 'an empty folder'}.\n"
            f"Name a folder with {REPA_INDEX} (REPA's vae-sd/) or with the {INDEX} that encode_latents.py writes."
        )
    data = RepaFolder(found[0].parent, num_classes) if found[0].name == REPA_INDEX else ShardFolder(folder)
    if num_classes is not None and data.num_classes > num_classes:
        raise DataError(f"{folder} has {data.num_classes} classes; the model has {num_classes}.")
    for index in range(0, len(data), max(1, len(data) // _SAMPLED)):  # a wrong data set shows now, not in an hour
        data[index]
    return data


class RepaFolder(LatentFolder):
    """The images that REPA's ``dataset.json`` lists, in its order, each a ``.npy`` of mean and std.

    The layout does not record its VAE (REPA encoded with sd-vae-ft-mse).
    """

    def __init__(self, folder: Path, num_classes: int | None = None) -> None:
        path, end = folder / REPA_INDEX, _MAX_CLASSES if num_classes is None else num_classes
        labels: dict[str, int] = {}
        problems: list[tuple[str, str]] = []
        with readable(path, 'a list {"labels": [["00000/img-mean-std-00000000.npy", 3], …]} of files and labels'):
            for name, label in read_json(path)["labels"]:
                if name in labels:
                    problems.append((name, "listed twice"))
                elif type(label) is not int or not 0 <= label < end:  # True is an int, too
                    problems.append((name, f"the label {label!r:.50} is not in 0 .. {end - 1}"))
                labels[name] = label
        there = set(glob("**/*.npy", root_dir=folder, recursive=True))  # noqa: PTH207 (rglob follows no links)
        problems += [(name, "listed, but not there") for name in labels if name not in there]
        problems += [(name, f"there, but without a label in {REPA_INDEX}") for name in sorted(there - labels.keys())]
        if problems or not labels:
            raise DataError(
                f"{path} and the .npy files beside it do not fit: {len(problems)} problems.\n"
                f"{first_ones(problems)}\n"
                "Copy what is missing, or take such files and their entries out."
            )
        self.folder, self.labels = folder, torch.tensor(list(labels.values()))
        # One array: a list of strings would be copied into every worker of a loader, page by page, as it is counted.
        self._names = np.array([os.fsencode(name) for name in labels])
        self.num_classes = int(self.labels.max()) + 1 if num_classes is None else num_classes
        self.scaling = Scaling(REPA_SCALE)
        self.channels, self.size, _ = self._shape = read_moments(folder / next(iter(labels)))[0].shape

    def read(self, place: int) -> tuple[Tensor, Tensor]:  # noqa: D102
        return read_moments(self.folder / os.fsdecode(self._names[place]), shape=self._shape)


class ShardFolder(LatentFolder):
    """The items in a folder of `encode_latents.py`, shard by shard."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._index = folder, (index := read_index(folder))
        self._shards = {number: OpenShard(folder, number, index) for number in range(index.shards)}
        labels = [shard.labels for shard in self._shards.values()]
        self._ends = [0, *accumulate(map(len, labels))]
        if not self._ends[-1]:
            raise DataError(f"There is no image in the shards of {folder}.")
        self.labels = torch.cat(labels)
        self.num_classes, self.scaling, self.vae = len(index.classes), index.scaling, index.vae
        self.channels, self.size, _ = index.shape

    def __getstate__(self) -> dict[str, Any]:
        """Without the open files: each process of a loader opens its own."""
        return {**self.__dict__, "_shards": {}}

    def read(self, place: int) -> tuple[Tensor, Tensor]:  # noqa: D102
        shard = bisect_right(self._ends, place) - 1
        if shard not in self._shards:
            self._shards[shard] = OpenShard(self.folder, shard, self._index)
        return self._shards[shard].read(place - self._ends[shard])


# --- Shards: an `index.json`, and safetensors files of some thousand items each ---------------------------------------


class Index(NamedTuple):
    """What ``index.json`` says of the shards: how many there are in the end, and of what.

    The scaling is the VAE's own, the shape (C, h, w) that of a latent; a label is a place in the list of classes.
    """

    vae: str
    scaling: Scaling
    shape: list[int]
    shards: int
    classes: list[str]
    library: str


def write_index(index: Index, folder: Path) -> None:
    """Write ``index.json``."""
    write_json(_KIND | index._asdict() | {"scaling": index.scaling._asdict()}, folder / INDEX)


def read_index(folder: Path) -> Index:
    """The index of a folder of shards; a `DataError` if it cannot be read, or is of another format."""
    content = read_json(folder / INDEX)
    with readable(folder / INDEX, "an index of latents", "Make it again with encode_latents.py."):
        kind = {name: content.pop(name) for name in _KIND}
        if kind != _KIND:
            raise ValueError(f"it holds {kind}, written by version {content['library']} of selftrans_reg, not {_KIND}")
        index = Index(**content)
        _, height, width = index.shape
        if height != width or not isinstance(index.vae, str) or not isinstance(index.classes, list):
            raise ValueError(f"it holds what encode_latents.py never writes: {content}")
        return index._replace(scaling=checked_scaling(**index.scaling, where=folder / INDEX))


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"latents-{number:05d}.safetensors"


def write_shard(folder: Path, number: int, moments: Tensor, labels: Tensor, images: list[str]) -> None:
    """Write a shard, whole or not at all: what is there is finished.

    It holds the moments (2, n, C, h, w), in float32 or float16, and labels (n,), int64, of n images by name.
    """
    metadata = {"items": json.dumps({"images": images})}
    content = save({"mean": moments[0], "std": moments[1], "labels": labels}, metadata)
    write_whole(folder / shard_name(number), lambda file: file.write(content))


class OpenShard:
    """One finished shard, as `write_shard` was given it; its moments stay on the disk until asked for."""

    def __init__(self, folder: Path, number: int, index: Index) -> None:
        self._path = path = folder / shard_name(number)
        advice = (
            f"Have encode_latents.py make what is missing of {index.shards} shards: run it again, without this file."
        )
        with readable(path, "a shard", advice):
            file = safe_open(path, "pt")
            self.images: list[str] = json.loads(file.metadata()["items"])["images"]
            self.labels = file.get_tensor("labels").clone()
            self._moments = [file.get_slice(name) for name in ("mean", "std")]
            shapes = [[*self.labels.shape], *(moment.get_shape() for moment in self._moments)]
            wanted = [(count := [len(self.images)]), count + index.shape, count + index.shape]
            if shapes != wanted:
                raise ValueError(f"it does not fit its index. Found: {shapes}; expected: {wanted}")
            if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < len(index.classes):
                raise ValueError(f"it has labels beyond the {len(index.classes)} classes of its index")

    def read(self, row: int) -> tuple[Tensor, Tensor]:
        """Mean and std of an item, twice (C, h, w), float32; a `DataError` if they are none."""
        # Cloned: a part of a mapped file would be passed between processes as the whole file.
        mean, std = (moment[row].float().clone() for moment in self._moments)
        check_moments(mean, std, f"{self.images[row]} in {self._path}")
        return mean, std
