"""Our own layout of posterior moments: an ``index.json`` beside safetensors files of some thousand images each.

A shard holds ``mean`` and ``std`` (n, C, h, w), in float32 or float16, and ``labels`` (n,); with mirrored images also
``mean_mirrored`` and ``std_mirrored``. Its metadata names the images, and those left out because they could not be
read. It is complete in itself and written under another name first: what is there is finished.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.data_files import DataError, check_moments, read_json, readable
from common.run_folder import write_json
from common.scaling import Scaling, checked_scaling

INDEX = "index.json"
_FORMAT = 1
_KIND = "mean and std of VAE posteriors"
_MAX_HEADER = 64 << 20  # holds the names of the images


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
