"""Folders of class folders of images: what is in them, and one image of them, cropped to a square."""

import os
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from common.data_files import DataError, first_ones

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_FORMATS = ("PNG", "JPEG", "WEBP")


class ImageFolder(NamedTuple):
    """What a folder of class folders holds.

    Attributes:
        classes: The names of the class folders, sorted; a label is a place in this list.
        images: Relative to the folder, with slashes, sorted within each class.
        labels: One for each image.
        others: What is no image: neither PNG, JPEG nor WebP, or hidden.
    """

    classes: list[str]
    images: list[str]
    labels: list[int]
    others: list[str]


def list_images(folder: Path) -> ImageFolder:
    """Find the images; nothing is opened.

    Raises:
        DataError: If there are none, a class folder holds none, or some lie in no class folder.
    """
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}. Name one that holds a folder of images for each class.")
    names = {entry.name: entry.is_dir() for entry in sorted(folder.iterdir())}
    classes = [name for name, is_dir in names.items() if is_dir and not name.startswith(".")]
    loose = [name for name in names if name not in classes]
    problems = [(name, "an image in no class folder") for name in loose if _is_image(name)]
    found = ImageFolder(classes, [], [], [name for name in loose if not _is_image(name)])
    for label, name in enumerate(classes):
        files = sorted(
            f"{prefix}/{file}"
            for parent, _, files in os.walk(folder / name, followlinks=True)
            for prefix in [Path(parent).relative_to(folder).as_posix()]
            for file in files
        )
        images = [file for file in files if _is_image(file)]
        found.images.extend(images)
        found.labels.extend([label] * len(images))
        found.others.extend(file for file in files if not _is_image(file))
        if not images:
            problems.append((name, "a class folder without images"))
    if problems or not classes:
        raise DataError(
            f"{folder} should hold a folder for each class, and in each of them PNG, JPEG or WebP images.\n"
            f"{first_ones(problems) or 'Found: no folders.'}\n"
            "Move images into the folders of their classes, and folders without images away."
        )
    return found


def _is_image(name: str) -> bool:
    return name.lower().endswith(_SUFFIXES) and not name.rpartition("/")[2].startswith(".")


def read_image(path: Path, size: int) -> Tensor:
    """An image as uint8 RGB (3, size, size): upright as its EXIF data say, cropped as `centre_crop` does.

    Grey, palette and CMYK images become RGB as Pillow converts them, 16 bits a channel become 8, and what is
    transparent shows white behind it.

    Raises:
        DataError: If the file is damaged, truncated, animated, or larger than Pillow's limit against decompression
            bombs allows, before or after scaling.
    """
    try:
        with warnings.catch_warnings(), Image.open(path, formats=_FORMATS) as image:
            warnings.simplefilter("ignore")  # of odd metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            _check_header(image, size)
            return torch.from_numpy(np.array(centre_crop(_rgb(image), size))).permute(2, 0, 1)
    except Exception as error:  # a decoder raises whatever a damaged file makes it stumble over
        raise DataError(f"{path.name} cannot be used: {type(error).__name__}: {error}") from error


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Scale the shorter side to ``size`` and cut the longer one evenly, as ADM's data loader does.

    Halved by box filtering while at least twice too large, then scaled bicubically. Source followed:
    https://github.com/openai/guided-diffusion (``center_crop_arr``).
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _check_header(image: Image.Image, size: int) -> None:
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # a camera's second view of the same
        raise ValueError(f"it has {image.n_frames} frames, and one of them would have to be chosen")
    scale = size / min(image.size)
    scaled = round(image.width * scale) * round(image.height * scale)
    if Image.MAX_IMAGE_PIXELS is not None and scaled > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels become {scaled} when the shorter side is {size}")


def _rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip, not scale
        image = Image.fromarray((np.asarray(image).astype(np.float32) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
