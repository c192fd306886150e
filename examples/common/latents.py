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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
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

INDEX = "index.json"
_FORMAT = 1
_KIND = "mean and std of VAE posteriors"
_MAX_HEADER = 64 << 20  # holds the names of the images

REPA_INDEX = "dataset.json"
REPA_SCALE = 0.18215  # REPA's files do not say; its code multiplies by this

_MAX_CLASSES = 1 << 20  # every class takes a row of the model's table
_THREADS = 8
_CHUNK = 1024
_SAMPLED = 16
_SKIP = "To go on without what cannot be used, open the folder with skip_bad (--skip-bad): it reads every file first."


class LatentFolder(Dataset[tuple[Tensor, Tensor, int]]):
    """Posteriors with labels: ``data[i]`` is mean and std, twice (C, h, w) float32 and unscaled, and a label.

    Attributes:
        labels: (N,), int64, of every item.
        num_classes: Labels are in 0 .. num_classes - 1.
        channels: C.
        size: h, which is w.
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
        """Items, mirrored ones included."""
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

    def leave_out(self, bad: list[tuple[int, str]]) -> None:
        """Drop what cannot be read, as (number, reason), from the items."""
        self.problems += [(self.name(number), reason) for number, reason in bad]
        good = torch.ones(len(self), dtype=torch.bool)
        good[[number for number, _ in bad]] = False
        self._kept, self.labels = self._kept[good], self.labels[good]


def open_latents(
    folder: Path, *, num_classes: int | None = None, skip_bad: bool = False, bad_list: Path | None = None
) -> LatentFolder:
    """Open a folder of posteriors; a `DataError` says what is wrong with it.

    Args:
        folder: One with REPA's ``dataset.json``, its parent, or one that ``encode_latents.py`` wrote.
        num_classes: Larger labels are wrong; None takes the number that the folder records or its labels show.
        skip_bad: Leave out what cannot be used, and print what it is. Every file is read once to know.
        bad_list: With ``skip_bad``, a JSON file that keeps what was found, and from which it is read the next time. Of
            several processes one should open the folder first, so that the others agree with it.
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
    data.leave_out(_bad_items(data, bad_list))
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
    data = ShardFolder(found[0].parent)
    if num_classes is not None and data.num_classes > num_classes:
        raise DataError(f"{folder} has {data.num_classes} classes; the model has {num_classes}.")
    return data


def _bad_items(data: LatentFolder, bad_list: Path | None) -> list[tuple[int, str]]:
    """What cannot be read, and why: from the list, or by reading everything."""
    if bad_list is not None and bad_list.exists():
        content = read_json(bad_list)
        with readable(bad_list, "a list of bad items", "Delete it and have every file read again."):
            if content["digest"] != data.digest():
                raise DataError(
                    f"{bad_list} lists what is bad in {content['folder']} as it was; {data.folder} holds other files "
                    "now.\nName another file, or delete this one and have every file read again."
                )
            for number, name, reason in content["bad"]:
                fine = type(number) is int and 0 <= number < len(data) and isinstance(reason, str)
                if not fine or data.name(number) != name:
                    raise ValueError(f"item {str(number)[:50]} of the folder is not {str(name)[:100]!r}")
            return [(number, reason) for number, _, reason in content["bad"]]
    bad = list(_unreadable(data))
    if bad_list is not None:
        named = [(number, data.name(number), reason) for number, reason in bad]
        bad_list.parent.mkdir(parents=True, exist_ok=True)
        write_json({"folder": str(data.folder), "digest": data.digest(), "bad": named}, bad_list)
    return bad


def _unreadable(data: LatentFolder) -> Iterator[tuple[int, str]]:
    def reason(number: int) -> str:
        try:
            data.read(number)
        except DataError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(_THREADS) as pool:
        numbers = iter(progress(range(len(data)), f"checking {data.folder.name}"))
        while chunk := list(islice(numbers, _CHUNK)):  # the pool would queue every file of a data set at once
            yield from ((i, why) for i, why in zip(chunk, pool.map(reason, chunk), strict=True) if why)


class RepaFolder(LatentFolder):
    """The images that REPA's ``dataset.json`` lists, in its order, each a ``.npy`` of mean and std.

    The layout does not record its VAE (REPA encoded with sd-vae-ft-mse).
    """

    def __init__(self, folder: Path, num_classes: int | None = None) -> None:
        labels, problems = _listed_labels(folder / REPA_INDEX, num_classes)
        fine = {name: label for name, label in labels.items() if label is not None}
        there = _npy_files(folder, {name.rpartition("/")[0] for name in fine})
        problems += [(name, "listed, but not there") for name in sorted(fine.keys() - there)]
        problems += [(n, f"there, but without a label in {REPA_INDEX}") for n in sorted(there - labels.keys())]
        usable = {name: label for name, label in fine.items() if name in there}
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
        shapes, last = Counter[torch.Size](), None
        count = min(_SAMPLED, len(self))
        for number in np.linspace(0, len(self) - 1, count).astype(int):
            try:
                shapes[read_moments(self.folder / self.name(number))[0].shape] += 1
            except DataError as error:
                last = error
        if not shapes:
            raise DataError(f"Not one of {count} files of {self.folder} can be used.\nThe last: {last}")
        return shapes.most_common(1)[0][0]


def _listed_labels(path: Path, num_classes: int | None) -> tuple[dict[str, int | None], list[tuple[str, str]]]:
    """Labels by file, None where the entry is wrong; and what is wrong."""
    content = read_json(path)
    entries = content.get("labels") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise DataError(
            f'{path} has no list of labels. It should be {{"labels": [["00000/img-mean-std-00000000.npy", 3], …]}}.'
        )
    labels: dict[str, int | None] = {}
    problems: list[tuple[str, str]] = []
    end = _MAX_CLASSES if num_classes is None else num_classes
    for entry in entries:
        match entry:
            case [str(name), _] if name in labels:
                reason = "listed twice"
            case [str(name), _] if not name.endswith(".npy") or {"", ".", ".."} & {*name.split("/")} or "\0" in name:
                reason = "no name of a .npy file in this folder"
            case [str(name), label] if type(label) is not int:  # True is an int, too
                reason = f"the label {str(label)[:50]!r} is no whole number"
            case [str(name), label]:
                reason = "" if 0 <= label < end else f"the label {str(label)[:50]} is not in 0 .. {end - 1}"
            case _:
                problems.append((str(entry)[:100], "no pair of file and label"))
                continue
        labels[name] = None if reason else entry[1]
        problems += [(name, reason)] if reason else []
    return labels, problems


def _npy_files(folder: Path, parents: set[str]) -> set[str]:
    """The ``.npy`` files, with slashes, in the folder, in those inside it and in ``parents``; nothing is opened."""
    found: set[str] = set()
    with os.scandir(folder) as entries:
        parents = parents | {"", *(entry.name for entry in entries if entry.is_dir())}
    for parent in parents:
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder / parent) as entries:
            prefix = f"{parent}/" if parent else ""
            found.update(prefix + entry.name for entry in entries if entry.name.endswith(".npy"))
    return found


class ShardFolder(LatentFolder):
    """The images in a folder of `encode_latents.py`, in the order of the shards; then all once more, mirrored."""

    def __init__(self, folder: Path) -> None:
        self._index = index = read_index(folder)
        missing = [name for name in map(shard_name, range(index.shards)) if not (folder / name).exists()]
        if missing:
            raise DataError(
                f"The latents in {folder} are not finished: {len(missing)} of {index.shards} shards are missing, "
                f"{missing[0]} for one.\nRun encode_latents.py again as before: it makes what is missing."
            )
        self._shards: dict[int, OpenShard] = {}
        self._ends, names, labels, problems = [0], [], [torch.empty(0, dtype=torch.int64)], []
        for number in range(index.shards):
            try:
                shard = self._shards[number] = OpenShard(folder, number, index)
                names += shard.images
                labels.append(shard.labels)
            except DataError as error:
                problems.append((shard_name(number), str(error)))
            self._ends.append(len(names))
        if not names:
            raise DataError(f"There is no image in the shards of {folder}.\n{first_ones(problems)}")
        mirrored = [f"{name} (mirrored)" for name in names if index.mirrored]
        super().__init__(folder, names + mirrored, torch.cat(labels * (1 + index.mirrored)), problems)
        self.num_classes, self.scaling, self.vae = len(index.classes), index.scaling, index.settings["vae"]
        self.channels, self.size, _ = index.shape

    def __getstate__(self) -> dict[str, Any]:
        """Without the open files: each process of a loader opens its own."""
        return {**self.__dict__, "_shards": {}}

    def read(self, number: int) -> tuple[Tensor, Tensor]:  # noqa: D102
        mirrored, place = divmod(number, self._ends[-1])
        shard = bisect_right(self._ends, place) - 1
        if shard not in self._shards:
            self._shards[shard] = OpenShard(self.folder, shard, self._index)
        return self._shards[shard].read(place - self._ends[shard], mirrored=bool(mirrored))


# --- Shards: what encode_latents.py writes


class Index(NamedTuple):
    """What ``index.json`` says: what every shard was made from, and with which settings.

    Attributes:
        settings: What decides the moments: ``vae``, ``size``, ``precision`` and so on; they are equal in every shard.
        scaling: The VAE's: a latent is ``(mean + std noise - shift) * scale``.
        shape: (C, h, w) of a latent.
        mirrored: Whether every image is there a second time, mirrored.
        shards: How many there are in the end.
        classes: Their names; a label is a place in this list.
        library: The version of selftrans_reg that wrote it.
    """

    settings: dict[str, Any]
    scaling: Scaling
    shape: list[int]
    mirrored: bool
    shards: int
    classes: list[str]
    library: str


def write_index(index: Index, folder: Path) -> None:
    """Write ``index.json``."""
    entries = index._asdict() | index.scaling._asdict()
    del entries["scaling"]
    write_json({"kind": _KIND, "format": _FORMAT, **entries}, folder / INDEX)


def read_index(folder: Path) -> Index:
    """The index of a folder of shards; a `DataError` if it cannot be read, or is of another format."""
    path = folder / INDEX
    content = read_json(path)
    if not isinstance(content, dict) or content.get("kind") != _KIND:
        raise DataError(f"{path} is no index of latents: it has no entry 'kind' that says {_KIND!r}.")
    if content.get("format") != _FORMAT:
        raise DataError(
            f"{path} has format {content.get('format')!r}, written by version {content.get('library')!r} of "
            f"selftrans_reg; this version reads {_FORMAT}. Install the one that wrote it, or a later one."
        )
    with readable(path, "an index of latents", "Make it again."):
        channels, height, width = shape = content["shape"]
        scaling = checked_scaling(content["scale"], content.get("shift", 0.0), channels)
        index = Index(scaling=scaling, **{name: content[name] for name in Index._fields if name != "scaling"})
        right = {
            "settings": isinstance(index.settings, dict) and isinstance(index.settings.get("vae"), str),
            "shape": all(type(n) is int and 0 < n < 1 << 16 for n in shape) and height == width,
            "mirrored": type(index.mirrored) is bool,
            "shards": type(index.shards) is int and 0 < index.shards < 1 << 20,
            "classes": isinstance(index.classes, list) and bool(index.classes),
        }
        wrong = [f"{name}: {str(content[name])[:100]}" for name, fine in right.items() if not fine]
        if wrong:
            raise ValueError(f"it holds what encode_latents.py never writes, {'; '.join(wrong)}")
        return index


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"latents-{number:05d}.safetensors"


def moment_names(*, mirrored: bool) -> tuple[str, ...]:
    """The names of a shard's moments."""
    return ("mean", "std", "mean_mirrored", "std_mirrored") if mirrored else ("mean", "std")


def write_shard(
    folder: Path,
    number: int,
    moments: list[Tensor],
    labels: Tensor,
    images: list[str],
    left_out: list[tuple[str, str]],
) -> None:
    """Write a shard under another name and then rename it.

    Args:
        folder: Of the shards.
        number: Of this one.
        moments: (n, C, h, w) each: mean and std, and those of the mirrored images if these are encoded, too.
        labels: (n,), int64.
        images: The n images' names.
        left_out: (name, reason) of the images that could not be read.
    """
    path = folder / shard_name(number)
    partial = path.with_name(path.name + ".partial")
    tensors = dict(zip(moment_names(mirrored=len(moments) > 2), moments, strict=True))
    metadata = {"images": json.dumps(images), "left_out": json.dumps(left_out)}
    save_file({**tensors, "labels": labels}, partial, metadata=metadata)
    partial.replace(path)


class OpenShard:
    """One finished shard, its header checked; its tensors stay on the disk until asked for.

    Attributes:
        labels: (n,), int64.
        images: The n images' names.
        left_out: (name, reason) of the images that could not be read when it was made.
    """

    def __init__(self, folder: Path, number: int, index: Index) -> None:
        self._path = path = folder / shard_name(number)
        with readable(path, "a shard", "Delete it and run encode_latents.py again: it makes what is missing."):
            with path.open("rb") as stream:
                header = int.from_bytes(stream.read(8), "little")
            if header > _MAX_HEADER:
                raise ValueError(f"it announces a header of {header} bytes")
            self._file = safe_open(path, "pt")
            found = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118 (no mapping)
            shapes = {name: (part.get_dtype(), part.get_shape()) for name, part in found.items()}
            metadata = self._file.metadata() or {}
            self.images: list[str] = json.loads(metadata["images"])
            self.left_out: list[tuple[str, str]] = [(name, why) for name, why in json.loads(metadata["left_out"])]
            dtype = shapes.get("mean", ("F32",))[0]
            wanted = {name: (dtype, [len(self.images), *index.shape]) for name in moment_names(mirrored=index.mirrored)}
            wanted["labels"] = ("I64", [len(self.images)])
            if shapes != wanted or dtype not in ("F32", "F16"):
                raise ValueError(f"it does not fit its index. Found: {shapes}; expected: {wanted}")
            self.labels = self._file.get_tensor("labels").clone()
            if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < len(index.classes):
                raise ValueError(f"it has labels beyond the {len(index.classes)} classes of its index")

    def read(self, row: int, *, mirrored: bool) -> tuple[Tensor, Tensor]:
        """Mean and std of an image, twice (C, h, w), float32; a `DataError` if they are none."""
        names = moment_names(mirrored=mirrored)[-2:]
        # Cloned: a part of a mapped file would be passed between processes as the whole file.
        mean, std = (self._file.get_slice(name)[row].float().clone() for name in names)
        check_moments(mean, std, f"{self.images[row]} in {self._path}")
        return mean, std
