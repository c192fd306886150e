"""A data set of VAE posteriors on disk: REPA's layout, or the shards of ``encode_latents.py``, told apart by looking.

    data = open_latents(Path("imagenet/vae-sd"))
    mean, std, label = data[0]
    latent = data.scaling.drawn(mean, std, torch.randn_like(mean))

What the lists of files and labels show is checked when a folder is opened; a file is checked whenever it is read, since
reading all of ImageNet first takes its time.
"""

import hashlib
import json
import os
from bisect import bisect_right
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from common.data_files import DataError, check_moments, first_ones, read_json, read_moments, readable
from common.run_folder import write_json
from common.training import progress
from common.vae import Scaling, checked_scaling

REPA_INDEX = "dataset.json"
REPA_SCALE = 0.18215  # REPA's files do not say; its code multiplies by this
INDEX = "index.json"

_KIND = {"kind": "mean and std of VAE posteriors", "format": 1}
_MAX_CLASSES = 1 << 20  # every class takes a row of the model's table
_THREADS = 8
_CHUNK = 1024
_SAMPLED = 16
_SKIP = "To go on without what cannot be used, open the folder with skip_bad (--skip-bad): it reads every file first."


class LatentFolder(Dataset[tuple[Tensor, Tensor, int]]):
    """Posteriors with labels: ``data[i]`` is mean and std, twice (C, h, h) float32 and unscaled, and a label.

    Attributes:
        labels: (N,), int64, of every item, in 0 .. num_classes - 1.
        channels: C; likewise ``size``, h.
        scaling: From latents to what a model sees.
        vae: Path or name of the VAE, where the folder records it.
        problems: What cannot be used of the folder, as (file, reason): it is not among the items.
    """

    num_classes: int
    channels: int
    size: int
    scaling: Scaling
    vae: str | None = None

    def __init__(self, folder: Path, names: list[str], labels: Tensor, problems: list[tuple[str, str]]) -> None:
        self.folder, self.labels, self.problems = folder, labels, problems
        # One array: a list of strings would be copied into every worker of a loader, page by page, as it is counted.
        self._names = np.array([os.fsencode(name) for name in names])
        self._kept = torch.arange(len(labels))

    def __len__(self) -> int:
        """Items."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        """Mean, std, label; a `DataError` names the file that cannot be used."""
        place = range(len(self))[index]
        try:
            return *self.read(int(self._kept[place])), int(self.labels[place])
        except DataError as error:
            raise DataError(f"{error}\n{_SKIP}") from error

    def read(self, number: int) -> tuple[Tensor, Tensor]:
        """Mean and std of what the folder lists under a number, whether it is among the items or not."""
        raise NotImplementedError

    def name(self, number: int) -> str:
        """Its file, relative to the folder."""
        return os.fsdecode(self._names[number])

    def digest(self) -> str:
        """SHA-256 of names and labels."""
        return hashlib.sha256(self._names.tobytes() + self.labels.numpy().tobytes()).hexdigest()

    def leave_out(self, bad: dict[str, str]) -> None:
        """Drop what cannot be read, reasons by name, from the items.

        Raises:
            ValueError: If the folder has no such names.
        """
        good = ~np.isin(self._names, np.array([os.fsencode(name) for name in bad], "S"))
        if len(bad) != len(good) - good.sum():
            raise ValueError(f"it names {len(bad)} files, of which {len(good) - good.sum()} are there")
        self.problems += bad.items()
        self._kept, self.labels = self._kept[good], self.labels[good]


def open_latents(
    folder: Path, *, num_classes: int | None = None, skip_bad: bool = False, bad_list: Path | None = None
) -> LatentFolder:
    """Open a folder of posteriors; a `DataError` says what is wrong with it.

    Args:
        folder: One with REPA's ``dataset.json``, its parent, or one that ``encode_latents.py`` wrote.
        num_classes: Labels are below it; None takes the number that the folder records or its labels show.
        skip_bad: Leave out what cannot be used, and print what it is. Every file is read once to know.
        bad_list: A JSON file that keeps what ``skip_bad`` found, for the next time. Of several processes one should
            open the folder first, so that the others agree with it.
    """
    data = _opened(folder, num_classes)
    if not skip_bad:
        if data.problems:
            raise DataError(
                f"{len(data.problems)} entries of {folder} cannot be used:\n{first_ones(data.problems)}\n{_SKIP}"
            )
        for index in range(0, len(data), max(1, len(data) // _SAMPLED)):  # a wrong data set shows now, not in an hour
            data[index]
        return data
    if bad_list is None or not bad_list.exists():
        bad = _unreadable(data)
        if bad_list is not None:
            bad_list.parent.mkdir(parents=True, exist_ok=True)
            write_json({"folder": str(data.folder), "digest": data.digest(), "bad": bad}, bad_list)
        data.leave_out(bad)
    else:
        content = read_json(bad_list)
        with readable(bad_list, "a list of bad items", "Delete it and have every file read again."):
            if content["digest"] != data.digest():
                raise DataError(
                    f"{bad_list} lists what is bad in {content['folder']} as it was; {data.folder} holds other files "
                    "now.\nName another file, or delete this one and have every file read again."
                )
            data.leave_out({str(name): str(reason) for name, reason in content["bad"].items()})
    if not len(data):
        raise DataError(f"Nothing in {folder} can be used:\n{first_ones(data.problems)}")
    if data.problems:
        print(f"{folder}: {len(data.problems)} entries left out, {len(data)} items used\n{first_ones(data.problems)}")
    return data


def _opened(folder: Path, num_classes: int | None) -> LatentFolder:
    candidates = [folder / REPA_INDEX, folder / "vae-sd" / REPA_INDEX, folder / INDEX]
    found = [path for path in candidates if path.is_file()]
    if len(found) != 1:
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) if folder.is_dir() else "no such folder"
        raise DataError(
            f"{folder} holds {len(found)} data sets of latents; exactly one is needed.\n"
            f"Found: {', '.join(map(str, found)) or there or 'an empty folder'}.\n"
            f"Name a folder with {REPA_INDEX} (REPA's vae-sd/) or with the {INDEX} that encode_latents.py writes."
        )
    if found[0].name == REPA_INDEX:
        return RepaFolder(found[0].parent, num_classes)
    data = ShardFolder(folder)
    if num_classes is not None and data.num_classes > num_classes:
        raise DataError(f"{folder} has {data.num_classes} classes; the model has {num_classes}.")
    return data


def _unreadable(data: LatentFolder) -> dict[str, str]:
    """What cannot be read, by name, and why: everything is read."""

    def reason(number: int) -> str:
        try:
            data.read(number)
        except DataError as error:
            return str(error)
        return ""

    bad: dict[str, str] = {}
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in progress(range(0, len(data), _CHUNK), f"checking {data.folder.name}"):
            # In chunks: the pool would queue every file of a data set at once.
            chunk = range(start, min(start + _CHUNK, len(data)))
            bad |= {data.name(i): why for i, why in zip(chunk, pool.map(reason, chunk), strict=True) if why}
    return bad


class RepaFolder(LatentFolder):
    """The images that REPA's ``dataset.json`` lists, in its order, each a ``.npy`` of mean and std.

    The layout does not record its VAE (REPA encoded with sd-vae-ft-mse).
    """

    def __init__(self, folder: Path, num_classes: int | None = None) -> None:
        labels, problems = _listed_labels(folder / REPA_INDEX, _MAX_CLASSES if num_classes is None else num_classes)
        there: set[str] = set()
        for parent, _, files in os.walk(folder, followlinks=True):
            prefix = Path(parent).relative_to(folder).as_posix() + "/"
            there.update((prefix + name).removeprefix("./") for name in files if name.endswith(".npy"))
        fine = {name: label for name, label in labels.items() if label is not None}
        usable = {name: label for name, label in fine.items() if name in there}
        problems += [(name, "listed, but not there") for name in fine if name not in there]
        problems += [(name, f"there, but without a label in {REPA_INDEX}") for name in sorted(there - labels.keys())]
        if not usable:
            raise DataError(
                f"None of the files that {folder / REPA_INDEX} lists can be used.\n{first_ones(problems)}\n"
                "The .npy files belong beside it, under the names that it lists."
            )
        super().__init__(folder, list(usable), torch.tensor(list(usable.values())), problems)
        self.num_classes = int(self.labels.max()) + 1 if num_classes is None else num_classes
        self.scaling = Scaling(REPA_SCALE)
        self.channels, self.size, _ = self._shape = self._usual_shape()

    def read(self, number: int) -> tuple[Tensor, Tensor]:  # noqa: D102
        path = self.folder / self.name(number)
        mean, std = read_moments(path)
        if mean.shape != self._shape:
            raise DataError(
                f"{path} holds a latent {tuple(mean.shape)}; the others of its folder are {tuple(self._shape)}. "
                "Encode the image again with the settings of the others."
            )
        return mean, std

    def _usual_shape(self) -> torch.Size:
        """The most frequent among 16 files spread over the list."""
        shapes = Counter[torch.Size]()
        for number in np.linspace(0, len(self) - 1, min(_SAMPLED, len(self))).astype(int):
            with suppress(DataError):
                shapes[read_moments(self.folder / self.name(number))[0].shape] += 1
        return shapes.most_common(1)[0][0] if shapes else read_moments(self.folder / self.name(0))[0].shape


def _listed_labels(path: Path, end: int) -> tuple[dict[str, int | None], list[tuple[str, str]]]:
    """Labels below an end by file, None where the entry is wrong; and what is wrong."""
    content = read_json(path)
    entries = content.get("labels") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise DataError(
            f'{path} has no list of labels. It should be {{"labels": [["00000/img-mean-std-00000000.npy", 3], …]}}.'
        )
    labels: dict[str, int | None] = {}
    problems: list[tuple[str, str]] = []
    for entry in entries:
        name, label = entry if isinstance(entry, list) and len(entry) == 2 else (entry, None)
        if not isinstance(name, str) or not name.endswith(".npy") or {"", ".", ".."} & {*name.split("/")}:
            problems.append((str(entry)[:100], "no name of a .npy file in this folder, with a label"))
            continue
        fine = type(label) is int and 0 <= label < end  # True is an int, too
        if name in labels or not fine:
            reason = "listed twice" if name in labels else f"the label {label!r:.50} is not in 0 .. {end - 1}"
            problems.append((name, reason))
        labels[name] = None if name in labels or not fine else label
    return labels, problems


class ShardFolder(LatentFolder):
    """The items in a folder of `encode_latents.py`, shard by shard; ``left_out`` are images that could not be read."""

    def __init__(self, folder: Path) -> None:
        self._index = index = read_index(folder)
        missing = next((name for name in map(shard_name, range(index.shards)) if not (folder / name).exists()), None)
        if missing is not None:
            raise DataError(
                f"The latents in {folder} are not finished: of {index.shards} shards, {missing} is missing.\n"
                "Run encode_latents.py again as before: it makes what is missing."
            )
        self._shards: dict[int, OpenShard] = {}
        self.left_out: list[tuple[str, str]] = []
        self._ends, names, labels, problems = [0], [], [torch.empty(0, dtype=torch.int64)], []
        for number in range(index.shards):
            try:
                shard = self._shards[number] = OpenShard(folder, number, index)
                names += shard.images
                labels.append(shard.labels)
                self.left_out += shard.left_out
            except DataError as error:
                problems.append((shard_name(number), str(error)))
            self._ends.append(len(names))
        if not names:
            raise DataError(f"There is no image in the shards of {folder}.\n{first_ones(problems)}")
        super().__init__(folder, names, torch.cat(labels), problems)
        self.num_classes, self.scaling, self.vae = len(index.classes), index.scaling, index.vae
        self.channels, self.size, _ = index.shape

    def __getstate__(self) -> dict[str, Any]:
        """Without the open files: each process of a loader opens its own."""
        return {**self.__dict__, "_shards": {}}

    def read(self, number: int) -> tuple[Tensor, Tensor]:  # noqa: D102
        shard = bisect_right(self._ends, number) - 1
        if shard not in self._shards:
            self._shards[shard] = OpenShard(self.folder, shard, self._index)
        return self._shards[shard].read(number - self._ends[shard])


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
        channels, height, width = index.shape
        if height != width or not isinstance(index.vae, str) or not isinstance(index.classes, list):
            raise ValueError(f"it holds what encode_latents.py never writes: {content}")
        return index._replace(scaling=checked_scaling(**index.scaling, channels=channels))


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"latents-{number:05d}.safetensors"


def write_shard(
    folder: Path, number: int, moments: Tensor, labels: Tensor, images: list[str], left_out: list[tuple[str, str]]
) -> None:
    """Write a shard under another name and then rename it: what is there is finished.

    It holds the moments (2, n, C, h, w), in float32 or float16, and labels (n,), int64, of n images by name; and, as
    (name, reason), those that could not be read.
    """
    path = folder / shard_name(number)
    partial = path.with_name(path.name + ".partial")
    metadata = {"items": json.dumps({"images": images, "left_out": left_out})}
    save_file({"mean": moments[0], "std": moments[1], "labels": labels}, partial, metadata=metadata)
    partial.replace(path)


class OpenShard:
    """One finished shard, as `write_shard` was given it; its moments stay on the disk until asked for."""

    def __init__(self, folder: Path, number: int, index: Index) -> None:
        self._path = path = folder / shard_name(number)
        with readable(path, "a shard", "Delete it and run encode_latents.py again: it makes what is missing."):
            self._file = safe_open(path, "pt")
            found = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118 (no mapping)
            shapes = {name: (part.get_dtype(), part.get_shape()) for name, part in found.items()}
            items = json.loads(self._file.metadata()["items"])
            self.images: list[str] = items["images"]
            self.left_out: list[tuple[str, str]] = [(name, reason) for name, reason in items["left_out"]]
            moments = (shapes.get("mean", ("F32",))[0], [len(self.images), *index.shape])
            wanted = {"mean": moments, "std": moments, "labels": ("I64", [len(self.images)])}
            if shapes != wanted or moments[0] not in ("F32", "F16"):
                raise ValueError(f"it does not fit its index. Found: {shapes}; expected: {wanted}")
            self.labels = self._file.get_tensor("labels").clone()
            if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < len(index.classes):
                raise ValueError(f"it has labels beyond the {len(index.classes)} classes of its index")

    def read(self, row: int) -> tuple[Tensor, Tensor]:
        """Mean and std of an item, twice (C, h, w), float32; a `DataError` if they are none."""
        # Cloned: a part of a mapped file would be passed between processes as the whole file.
        mean, std = (self._file.get_slice(name)[row].float().clone() for name in ("mean", "std"))
        check_moments(mean, std, f"{self.images[row]} in {self._path}")
        return mean, std
