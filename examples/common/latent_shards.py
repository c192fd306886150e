"""Our own layout of posterior moments: an ``index.json`` beside safetensors files of some thousand images each.

A shard holds ``mean`` and ``std`` (n, C, h, w), in float32 or float16, and ``labels`` (n,); with mirrored images also
``mean_mirrored`` and ``std_mirrored``. Its metadata names the images, and those left out because they could not be
read. It is complete in itself and written under another name first: what is there is finished.
"""

import hashlib
import json
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.data_files import DataError, first_ones, readable
from common.moments import check_moments
from common.shard_index import Index, read_index

_MAX_HEADER = 64 << 20  # holds the names of the images
_MOMENTS = ("mean", "std")
_MIRRORED = "_mirrored"


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"latents-{number:05d}.safetensors"


class Shard(NamedTuple):
    """The content of one shard.

    Attributes:
        moments: ``mean`` and ``std`` (n, C, h, w), perhaps ``mean_mirrored`` and ``std_mirrored`` too.
        labels: (n,), int64.
        images: The n images' names.
        left_out: (name, reason) of the images that could not be read.
    """

    moments: dict[str, Tensor]
    labels: Tensor
    images: list[str]
    left_out: list[tuple[str, str]]


def moment_names(mirrored: bool) -> tuple[str, ...]:
    """The names of a shard's moments."""
    return (*_MOMENTS, *(name + _MIRRORED for name in _MOMENTS if mirrored))


def write_shard(folder: Path, number: int, shard: Shard) -> None:
    """Write a shard under another name and then rename it."""
    path = folder / shard_name(number)
    partial = path.with_name(path.name + ".partial")
    metadata = {"images": json.dumps(shard.images), "left_out": json.dumps(shard.left_out)}
    save_file({**shard.moments, "labels": shard.labels}, partial, metadata=metadata)
    partial.replace(path)


class OpenShard:
    """One finished shard, its header checked; its tensors stay on the disk until asked for.

    Attributes:
        labels: (n,), int64.
        images: The n images' names.
        left_out: (name, reason) of the images that could not be read when it was made.

    Raises:
        DataError: If it is no whole safetensors file, or not of the index's shape.
    """

    def __init__(self, path: Path, index: Index) -> None:
        self._path = path
        with readable(path, "a shard", _MAKE_AGAIN):
            with path.open("rb") as stream:
                header = int.from_bytes(stream.read(8), "little")
            if header > _MAX_HEADER:
                raise DataError(f"{path} announces a header of {header} bytes: it is damaged. {_MAKE_AGAIN}")
            self._file = safe_open(path, "pt")
            found = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118 (no mapping)
            shapes = {name: (part.get_dtype(), part.get_shape()) for name, part in found.items()}
            metadata = self._file.metadata() or {}
            self.images: list[str] = json.loads(metadata["images"])
            self.left_out: list[tuple[str, str]] = [(name, why) for name, why in json.loads(metadata["left_out"])]
        dtype = shapes.get("mean", ("F32",))[0]
        wanted = {name: (dtype, [len(self.images), *index.shape]) for name in moment_names(index.mirrored)}
        wanted["labels"] = ("I64", [len(self.images)])
        if shapes != wanted or dtype not in ("F32", "F16"):
            raise DataError(f"{path} does not fit its index.\nFound: {shapes}.\nExpected: {wanted}.\n{_MAKE_AGAIN}")
        self.labels = self._file.get_tensor("labels").clone()
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < len(index.classes):
            raise DataError(f"{path} has labels beyond the {len(index.classes)} classes of its index. {_MAKE_AGAIN}")

    def read(self, row: int, mirrored: bool) -> tuple[Tensor, Tensor]:
        """Mean and std of an image, twice (C, h, w), float32.

        Raises:
            DataError: If they are none.
        """
        suffix = _MIRRORED * mirrored
        # Cloned: a part of a mapped file would be passed between processes as the whole file.
        mean, std = (self._file.get_slice(name + suffix)[row].float().clone() for name in _MOMENTS)
        check_moments(mean, std, f"{self.images[row]} in {self._path}")
        return mean, std


_MAKE_AGAIN = "Delete it and run encode_latents.py again: it makes what is missing."


class ShardFolder:
    """The images in a folder of `encode_latents.py`, in the order of the shards; then all once more, mirrored.

    Attributes:
        labels: (N,), int64.
        num_classes: The number of class folders that were encoded.
        shape: (C, h, w) of a latent.
        scale: The VAE's scale factor.
        vae: The VAE's path or name on the hub.
        problems: Shards that cannot be used, as (file, reason); their images are not among the labels.

    Raises:
        DataError: If the index cannot be read, shards are missing, or there is no image in any.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._index = index = read_index(folder)
        self.num_classes = len(index.classes)
        self.shape = torch.Size(index.shape)
        self.scale = float(index.scale)
        self.vae: str = index.settings["vae"]
        self.problems: list[tuple[str, str]] = []
        missing = [name for name in map(shard_name, range(index.shards)) if not (folder / name).exists()]
        if missing:
            raise DataError(
                f"The latents in {folder} are not finished: {len(missing)} of {index.shards} shards are missing, "
                f"{missing[0]} for one.\nRun encode_latents.py again as before: it makes what is missing."
            )
        self._shards: dict[int, OpenShard] = {}
        labels = []
        for number in range(index.shards):
            try:
                labels.append(self._shard(number).labels)
            except DataError as error:
                self.problems.append((shard_name(number), str(error)))
                labels.append(torch.empty(0, dtype=torch.int64))
        self._ends = list(accumulate(map(len, labels)))
        self.labels = torch.cat(labels * (1 + index.mirrored))
        if not len(self.labels):
            raise DataError(f"There is no image in the shards of {folder}.\n{first_ones(self.problems)}")

    def __getstate__(self) -> dict[str, Any]:
        """Without the open files: each process of a loader opens its own."""
        return {**self.__dict__, "_shards": {}}

    @property
    def digest(self) -> str:
        """SHA-256 of the index and the labels."""
        return hashlib.sha256(repr(self._index).encode() + self.labels.numpy().tobytes()).hexdigest()

    def name(self, index: int) -> str:
        """The image's file, relative to the folder that was encoded."""
        number, row, mirrored = self._place(index)
        return self._shard(number).images[row] + " (mirrored)" * mirrored

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """Mean and std of an image, twice (C, h, w), float32.

        Raises:
            DataError: If the shard or the moments cannot be used.
        """
        number, row, mirrored = self._place(index)
        return self._shard(number).read(row, mirrored)

    def _place(self, index: int) -> tuple[int, int, bool]:
        """Shard, row in it, and whether the mirrored image is meant."""
        mirrored, place = divmod(index, self._ends[-1])
        number = bisect_right(self._ends, place)
        return number, place - (self._ends[number - 1] if number else 0), bool(mirrored)

    def _shard(self, number: int) -> OpenShard:
        if number not in self._shards:
            self._shards[number] = OpenShard(self._folder / shard_name(number), self._index)
        return self._shards[number]
