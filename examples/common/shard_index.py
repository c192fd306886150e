"""The ``index.json`` of a folder of latents: what every shard in it was made from, and with which settings."""

import time
from pathlib import Path
from typing import Any, NamedTuple

from common.data_files import DataError, read_json, readable
from common.run_folder import write_json
from selftrans_reg.errors import SettingError

INDEX = "index.json"
FORMAT = 1
KIND = "mean and std of VAE posteriors"

_WAIT_SECONDS = 600.0  # for the process that writes the index


class Index(NamedTuple):
    """What ``index.json`` says.

    Attributes:
        settings: What decides the moments: ``vae``, ``size``, ``precision`` and so on; they are equal in every shard.
        scale: The VAE's scale factor: a latent is ``scale (mean + std noise)``.
        shape: (C, h, w) of a latent.
        mirrored: Whether every image is there a second time, mirrored.
        shards: How many there are in the end.
        classes: Their names; a label is a place in this list.
        library: The version of selftrans_reg that wrote it.
    """

    settings: dict[str, Any]
    scale: float
    shape: list[int]
    mirrored: bool
    shards: int
    classes: list[str]
    library: str


def read_index(folder: Path) -> Index:
    """The index of a folder of shards.

    Raises:
        DataError: If it cannot be read, or is of another format.
    """
    path = folder / INDEX
    content = read_json(path)
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise DataError(f"{path} is no index of latents: it has no entry 'kind' that says {KIND!r}.")
    if content.get("format") != FORMAT:
        raise DataError(
            f"{path} has format {content.get('format')!r}, written by version {content.get('library')!r} of "
            f"selftrans_reg; this version reads {FORMAT}. Install the one that wrote it, or a later one."
        )
    with readable(path, "an index of latents"):
        index = Index(**{name: content[name] for name in Index._fields})
    _check_index(index, path)
    return index


def index_content(index: Index) -> dict[str, Any]:
    """What to write as ``index.json``."""
    return {"kind": KIND, "format": FORMAT, **index._asdict()}


def _check_index(index: Index, path: Path) -> None:
    right = {
        "settings": isinstance(index.settings, dict) and isinstance(index.settings.get("vae"), str),
        "scale": type(index.scale) in (int, float) and 0 < index.scale < float("inf"),
        "shape": isinstance(index.shape, list)
        and len(index.shape) == 3
        and all(type(length) is int and 0 < length < 1 << 16 for length in index.shape)
        and index.shape[1] == index.shape[2],
        "mirrored": type(index.mirrored) is bool,
        "shards": type(index.shards) is int and 0 < index.shards < 1 << 20,
        "classes": isinstance(index.classes, list) and bool(index.classes),
    }
    wrong = [f"{name}: {str(getattr(index, name))[:100]}" for name, fine in right.items() if not fine]
    if wrong:
        raise DataError(
            f"{path} holds what encode_latents.py never writes.\nFound: {'; '.join(wrong)}.\nMake it again."
        )


def open_folder(folder: Path, index: Index, rank: int) -> None:
    """Write the index, or make sure that the one that is there says the same. The first process does the writing.

    Raises:
        SettingError: If the folder holds something else: other latents, or files of another kind.
    """
    path = folder / INDEX
    if not path.exists() and rank == 0:
        if folder.exists() and any(folder.iterdir()):
            there = ", ".join(sorted(entry.name for entry in folder.iterdir())[:5])
            raise SettingError(
                f"{folder} is not empty, and holds no latents.\nFound: {there}.\nName another with --out."
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_json(index_content(index), path)
    waited_since = time.monotonic()
    while not path.exists():
        if time.monotonic() - waited_since > _WAIT_SECONDS:
            raise SettingError(f"Process 0 has not written {path} in {_WAIT_SECONDS:.0f} seconds. Is {folder} shared?")
        time.sleep(0.2)
    there, now = (_compared(index) for index in (read_index(folder), index))
    differences = [
        f"{name}: {str(there.get(name))[:80]} there, {str(now.get(name))[:80]} now"
        for name in sorted(there.keys() | now.keys())
        if there.get(name) != now.get(name)
    ]
    if differences:
        raise SettingError(
            f"{folder} holds latents of another kind.\nFound: {'; '.join(differences)}.\n"
            "Name another folder with --out, or the same settings and images as before."
        )


def _compared(index: Index) -> dict[str, Any]:
    """What must be the same when work goes on; the VAE's weights count, not the path to them."""
    entries = {**index._asdict(), **index.settings}
    return {name: value for name, value in entries.items() if name not in ("settings", "vae", "library")}
