"""COCO features in U-ViT's layout: an image's posterior, and text features of each of its captions.

    data = CocoFeatures(Path("coco256_features"))            # train/; CocoFeatures(folder, "val", dropout=0.0)
    mean, std, context = data[0]                             # a random caption; now and then the empty prompt
    latent = data.scaling.drawn(mean, std, torch.randn_like(mean))

On the disk: ``empty_context.npy`` (L, D), ``train/{i}.npy`` (2C, h, w) and ``train/{i}_{k}.npy`` (L, D) for the k-th
caption of image i; both count from 0. CLIP ViT-L/14 has L = 77 and D = 768. Source: https://github.com/baofff/U-ViT.
"""

import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from common.data_files import DataError, check_moments, first_ones, read_json, read_moments, read_npy, readable
from common.options import Mistake
from common.run_folder import open_run_folder, write_json, write_whole
from common.text import same_features
from common.vae import Scaling, checked_scaling

EMPTY = "empty_context.npy"
_FACTS = "features.json"  # not U-ViT's: what its layout leaves to the code
_UNFINISHED = "unfinished.npy"
_SCALE = 0.18215  # what U-ViT's code multiplies by


class CocoFeatures(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Images with captions: ``data[i]`` is mean and std, twice (C, h, w), and a caption's features (L, D), float32.

    The caption is one of the image's, at random, or, as often as ``dropout`` says, the empty prompt: both are drawn
    from the global generator, which in a loader's workers is another in every worker and epoch. ``second`` is what is
    behind the mean in ``{i}.npy``: REPA's code and `CocoWriter` store the std, U-ViT's own script the log-variance.

    Attributes:
        captions: (N,), int64: how many captions each image has.
        empty: (L, D), the features of the empty prompt, which are the null condition.
        channels: C.
        size: h, which is w.
        scaling: From latents to what a model sees.
        vae: Path or name of the VAE, where `CocoWriter` recorded it.
    """

    def __init__(
        self, folder: Path, split: str = "train", *, dropout: float = 0.1, second: Literal["std", "logvar"] = "std"
    ) -> None:
        self._folder, self._dropout, self._second = folder / split, dropout, second
        self.captions = _caption_counts(self._folder)
        self.empty = _read_context(folder / EMPTY)
        self._shape: Sequence[int] | None = None  # until the first is read
        self.channels, self.size, _ = self._shape = self._moments(0)[0].shape
        self.scaling, self.vae = _facts(folder / _FACTS)
        self._context(0, 0)

    def __len__(self) -> int:
        """Images."""
        return len(self.captions)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, std, context."""
        index = range(len(self))[index]
        caption, dropped = int(torch.randint(int(self.captions[index]), ())), bool(torch.rand(()) < self._dropout)
        return *self._moments(index), self.empty.clone() if dropped else self._context(index, caption)

    def _moments(self, index: int) -> tuple[Tensor, Tensor]:
        return read_moments(self._folder / f"{index}.npy", second=self._second, shape=self._shape)

    def _context(self, index: int, caption: int) -> Tensor:
        context = _read_context(path := self._folder / f"{index}_{caption}.npy")
        if context.shape != self.empty.shape:
            raise DataError(
                f"{path} holds text features {tuple(context.shape)}; those of {EMPTY} are {tuple(self.empty.shape)}. "
                "Encode all texts with one text encoder."
            )
        return context


class CocoWriter:
    """Writes a split image by image, under another name; only `finish` gives it its own. What is there is whole.

    A second split goes into the same folder, if it has the same VAE, scaling and features (L, D) of the empty prompt; a
    split that is there is never replaced. One that was begun with these settings goes on; without any it begins anew.
    """

    def __init__(
        self, folder: Path, split: str, empty: Tensor, *, scaling: Scaling, vae: str | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self._folder, self._split, self._empty = folder, split, empty.float().cpu()
        self._facts = scaling._asdict() | {"vae": vae}
        self._partial = folder / f"{split}.partial"
        if (folder / split).exists():
            raise Mistake(f"{folder / split} is there already. Name another folder, or delete this one.")
        if (folder / _FACTS).exists() and (found := read_json(folder / _FACTS)) != self._facts:
            raise Mistake(
                f"{folder} holds features of another VAE.\nFound: {found}; now: {self._facts}.\nName another folder."
            )
        if (folder / EMPTY).exists() and not same_features(_read_context(folder / EMPTY), self._empty):
            raise Mistake(f"{folder / EMPTY} has other features than the empty prompt has now. Name another folder.")
        if settings is None:
            shutil.rmtree(self._partial, ignore_errors=True)
        open_run_folder(self._partial, settings or {})

    def has(self, index: int) -> bool:
        """Whether an image is written, with its captions."""
        return (self._partial / f"{index}.npy").exists()

    def write(self, index: int, mean: Tensor, std: Tensor, contexts: Tensor) -> None:
        """Write an image: mean and std, twice (C, h, w), and its captions' features (K, L, D)."""
        check_moments(mean, std, f"image {index}")
        if mean.shape != std.shape or contexts.shape[1:] != self._empty.shape or not len(contexts):
            wanted = ", ".join(map(str, self._empty.shape))
            raise DataError(
                f"Image {index} has mean {tuple(mean.shape)}, std {tuple(std.shape)} and captions "
                f"{tuple(contexts.shape)}; needed are (C, h, h) twice, and (K, {wanted})."
            )
        for k, context in enumerate(contexts):
            np.save(self._partial / f"{index}_{k}.npy", context.float().cpu().numpy())
        # Last, and at once: an image that has its moments has its captions.
        np.save(self._partial / _UNFINISHED, torch.cat([mean, std]).float().cpu().numpy())
        (self._partial / _UNFINISHED).replace(self._partial / f"{index}.npy")

    def finish(self, images: int) -> None:
        """Give the split its name, if all of its images are written."""
        missing = [index for index in range(images) if not self.has(index)]
        if missing or not images:
            raise DataError(
                f"{self._partial} is not finished: {len(missing)} of {images} images are missing. Write them first."
            )
        write_whole(self._folder / EMPTY, lambda file: np.save(file, self._empty.numpy()))
        write_json(self._facts, self._folder / _FACTS)
        self._partial.rename(self._folder / self._split)


def write_coco_features(
    folder: Path, split: str, items: Iterable[tuple[Tensor, Tensor, Tensor]], empty: Tensor, **notes: Any
) -> None:
    """Write a whole split by a `CocoWriter`, of ``items`` of mean, std and captions' features, taken one at a time."""
    writer, images = CocoWriter(folder, split, empty, **notes), 0
    for mean, std, contexts in items:
        writer.write(images, mean, std, contexts)
        images += 1
    writer.finish(images)


def _facts(path: Path) -> tuple[Scaling, str | None]:
    """Scaling and VAE, from the file or, without it, as U-ViT's code has them."""
    if not path.exists():
        return Scaling(_SCALE), None
    content = read_json(path)
    with readable(path, "notes on features", "Make it again."):
        return checked_scaling(content["scale"], content["shift"], path), content["vae"]


def _read_context(path: Path) -> Tensor:
    context = torch.from_numpy(read_npy(path).astype(np.float32))
    if context.ndim != 2 or not context.isfinite().all():
        raise DataError(
            f"{path} holds no text features: (L, D) finite numbers are needed; found {tuple(context.shape)}."
        )
    return context


def _caption_counts(folder: Path) -> Tensor:
    """The number of captions of each image, from the names of the files."""
    if not folder.is_dir():
        begun = folder.with_name(f"{folder.name}.partial").exists()
        advice = f"finish {folder.name}.partial" if begun else f"name the one that holds {folder.name}/ and {EMPTY}"
        raise DataError(f"There is no folder {folder}: {advice}.")
    there = {path.name for path in folder.glob("*.npy")}  # U-ViT keeps the images there, too
    captions = Counter(name.partition("_")[0] for name in there if "_" in name)
    counts = [captions[str(i)] for i in range(len(there) - captions.total())]
    expected = {f"{i}.npy" for i in range(len(counts))}
    expected |= {f"{i}_{k}.npy" for i, count in enumerate(counts) for k in range(max(1, count))}
    problems = [(name, "missing") for name in sorted(expected - there)]
    problems += [(name, "there, but no image's or caption's next number") for name in sorted(there - expected)]
    if problems or not counts:
        raise DataError(
            f"The features in {folder} are not complete: {len(problems)} files.\n{first_ones(problems)}\n"
            "Images, '7.npy', and their captions, '7_0.npy', count from 0 without gaps. Copy or make them again."
        )
    return torch.tensor(counts)
