"""A data set of VAE posteriors on disk: REPA's layout, or the shards of ``encode_latents.py``, told apart by looking.

    data = open_latents(Path("imagenet/vae-sd"))
    mean, std, label = data[0]
    latent = data.scale * (mean + std * torch.randn_like(mean))

What the lists of files and labels show is checked when a folder is opened; a file is checked whenever it is read, since
reading all of ImageNet first takes its time.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from common import repa_layout, shard_index
from common.data_files import DataError, first_ones, read_json
from common.latent_shards import ShardFolder
from common.repa_layout import RepaFolder
from common.run_folder import write_json
from common.training import progress

_THREADS = 8
_CHUNK = 1024
_SAMPLED = 16


class LatentSource(Protocol):
    """What a layout has to offer; `RepaFolder` and `ShardFolder` say what each means."""

    labels: Tensor
    num_classes: int
    shape: torch.Size
    scale: float
    vae: str | None
    problems: list[tuple[str, str]]

    @property
    def digest(self) -> str: ...  # noqa: D102

    def name(self, index: int) -> str: ...  # noqa: D102

    def read(self, index: int) -> tuple[Tensor, Tensor]: ...  # noqa: D102


class LatentFolder(Dataset[tuple[Tensor, Tensor, int]]):
    """Posteriors with labels: ``data[i]`` is mean and std, twice (C, h, w) float32 and unscaled, and a label.

    Attributes:
        labels: (N,), int64, of every item.
        num_classes: Labels are in 0 .. num_classes - 1.
        channels: C.
        size: h, which is w.
        scale: The scale factor: what a model sees is ``scale (mean + std noise)``.
        vae: Path or name of the VAE, where the folder records it.

    Args:
        source: Where they come from.
        kept: (N,), the items of the source to use; all of them without it.
    """

    def __init__(self, source: LatentSource, kept: Tensor | None = None) -> None:
        self._source = source
        self._kept = kept
        self.labels = source.labels if kept is None else source.labels[kept]
        self.num_classes = source.num_classes
        self.channels, self.size, _ = source.shape
        self.scale = source.scale
        self.vae = source.vae

    def __len__(self) -> int:
        """Items, mirrored ones included."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        """Mean, std, label.

        Raises:
            DataError: If the file is missing or damaged, or holds anything but a mean and a std; it names the file.
        """
        place = range(len(self))[index]
        try:
            mean, std = self._source.read(place if self._kept is None else int(self._kept[place]))
        except DataError as error:
            raise DataError(f"{error}\n{_SKIP}") from error
        return mean, std, int(self.labels[place])


_SKIP = "To go on without what cannot be used, open the folder with skip_bad (--skip-bad): it reads every file first."


def open_latents(
    folder: Path, *, num_classes: int | None = None, skip_bad: bool = False, bad_list: Path | None = None
) -> LatentFolder:
    """Open a folder of posteriors.

    Args:
        folder: One with REPA's ``dataset.json``, its parent, or one that ``encode_latents.py`` wrote.
        num_classes: Larger labels are wrong; None takes the number that the folder records or its labels show.
        skip_bad: Leave out what cannot be used, and print what it is. Every file is read once to know.
        bad_list: With ``skip_bad``, a JSON file that keeps what was found, and from which it is read the next time. Of
            several processes one should open the folder first, so that the others agree with it.

    Raises:
        DataError: If the folder is of neither layout, or anything in it cannot be used and ``skip_bad`` is off.
    """
    source = _source(folder, num_classes)
    if not skip_bad:
        if source.problems:
            raise DataError(
                f"{len(source.problems)} entries of {folder} cannot be used:\n{first_ones(source.problems)}\n{_SKIP}"
            )
        data = LatentFolder(source)
        for index in range(0, len(data), max(1, len(data) // _SAMPLED)):  # a wrong data set shows now, not in an hour
            data[index]
        return data
    bad = _bad_items(source, folder, bad_list)
    kept = torch.ones(len(source.labels), dtype=torch.bool)
    kept[[index for index, _ in bad]] = False
    problems = source.problems + [(source.name(index), reason) for index, reason in bad]
    if not kept.any():
        raise DataError(f"Nothing in {folder} can be used:\n{first_ones(problems)}")
    if problems:
        print(f"{folder}: {len(problems)} entries left out, {int(kept.sum())} items used\n{first_ones(problems)}")
    return LatentFolder(source, kept.nonzero().flatten())


def _source(folder: Path, num_classes: int | None) -> LatentSource:
    candidates = [folder / repa_layout.INDEX, folder / "vae-sd" / repa_layout.INDEX, folder / shard_index.INDEX]
    found = [path for path in candidates if path.is_file()]
    if len(found) != 1:
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) if folder.is_dir() else "no such folder"
        raise DataError(
            f"{folder} holds {len(found)} data sets of latents; exactly one is needed.\n"
            f"Found: {', '.join(map(str, found)) or there or 'an empty folder'}.\n"
            f"Name a folder with {repa_layout.INDEX} (REPA's vae-sd/) or with the {shard_index.INDEX} that "
            "encode_latents.py writes."
        )
    if found[0].name == repa_layout.INDEX:
        return RepaFolder(found[0].parent, num_classes=num_classes)
    source = ShardFolder(found[0].parent)
    if num_classes is not None and source.num_classes > num_classes:
        raise DataError(f"{folder} has {source.num_classes} classes; the model has {num_classes}.")
    return source


def _bad_items(source: LatentSource, folder: Path, bad_list: Path | None) -> list[tuple[int, str]]:
    """Which items of the source cannot be read, and why: from the list, or by reading all of them."""
    if bad_list is not None and bad_list.exists():
        content = read_json(bad_list)
        if content["digest"] != source.digest:
            raise DataError(
                f"{bad_list} lists what is bad in {content['folder']} as it was; {folder} holds other files now.\n"
                "Name another file, or delete this one and have every file read again."
            )
        return [(index, reason) for index, _, reason in content["bad"]]
    bad = list(_read_all(source, f"checking {folder.name}"))
    if bad_list is not None:
        named = [(index, source.name(index), reason) for index, reason in bad]
        bad_list.parent.mkdir(parents=True, exist_ok=True)
        write_json({"folder": str(folder), "digest": source.digest, "bad": named}, bad_list)
    return bad


def _read_all(source: LatentSource, title: str) -> Iterator[tuple[int, str]]:
    def reason(index: int) -> str:
        try:
            source.read(index)
        except DataError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(_THREADS) as pool:
        indices = iter(progress(range(len(source.labels)), title))
        while chunk := list(islice(indices, _CHUNK)):  # the pool would queue every file of a data set at once
            yield from ((i, why) for i, why in zip(chunk, pool.map(reason, chunk), strict=True) if why)
