"""Images on disk: files and sets of them, their pixels as a viewer shows them, batches of crops, and writing PNGs."""

import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.data_files import DataError, readable
from common.options import Mistake

DIGITS = "digits"
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_FORMATS = ("PNG", "JPEG", "WEBP")


def find_images(folder: Path) -> list[str]:
    """The PNG, JPEG and WebP files of a folder, at any depth, sorted, relative to it with slashes.

    Links are followed, nothing is opened. What is skipped is counted in a line: other files, what is hidden, and
    folders that a link leads back to.
    """
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}.")
    images: list[str] = []
    skipped: list[str] = []
    seen: set[str] = set()
    for parent, folders, files in os.walk(folder, onerror=_not_listed, followlinks=True):
        prefix = "" if Path(parent) == folder else f"{Path(parent).relative_to(folder).as_posix()}/"
        if (place := os.path.realpath(parent)) in seen:  # a link to a folder that was looked through, as to a parent
            skipped.append(prefix)
            folders.clear()
            continue
        seen.add(place)
        skipped += [f"{prefix}{name}/" for name in folders if name.startswith(".")]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            # Opening a pipe would wait for a writer; a link may lead nowhere.
            fine = name.lower().endswith(_SUFFIXES) and name[0] != "." and Path(parent, name).is_file()
            (images if fine else skipped).append(prefix + name)
    if skipped:
        print(f"{folder}: {len(skipped):,} entries are no images and are skipped, such as {min(skipped)}")
    return sorted(images)


def _not_listed(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be looked through: {error.strerror}.") from error


def read_image(path: Path) -> Image.Image:
    """An image as a viewer shows it: RGB, upright as its EXIF data say, on white where it is transparent.

    Grey, palette and CMYK images become RGB as Pillow converts them; 16 bits a channel become 8.
    """
    with readable(path, "an image"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=_FORMATS) as image:
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # a camera's other views
            if frames > 1:
                raise ValueError(f"it has {frames} frames, and one of them would have to be chosen")
            # A PNG may name a colour as transparent, in bits of the file, such as "L;4", which Pillow takes for 8.
            if "transparency" in image.info and image.mode != "P" and ";" in image.tile[0][3]:
                raise ValueError("a colour of it is transparent, in other than 8 bits: save it with an alpha channel")
            return _on_white(ImageOps.exif_transpose(image))


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip, not scale
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


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


class ImageBatch(NamedTuple):
    """The places of the images that can be read, their pixels (n, 3, S, S), uint8, and (name, reason) of the others."""

    rows: list[int]
    pixels: Tensor
    bad: list[tuple[str, str]]


class _Crops(Dataset[ImageBatch]):
    def __init__(self, folder: Path, names: list[str], size: int) -> None:
        self._folder, self._size = folder, size
        # One array: a list of strings would be copied into every worker, page by page.
        self._names = np.array([os.fsencode(name) for name in names])

    def __getitem__(self, places: list[int]) -> ImageBatch:
        rows, pixels, bad = [], [np.empty((0, self._size, self._size, 3), np.uint8)], []
        for row in places:
            name = os.fsdecode(self._names[row])
            try:
                pixels.append(np.asarray(centre_crop(read_image(self._folder / name), self._size))[None])
                rows.append(row)
            except DataError as error:
                bad.append((name, str(error)))
        return ImageBatch(rows, torch.from_numpy(np.concatenate(pixels)).permute(0, 3, 1, 2).contiguous(), bad)


def image_batches(
    folder: Path, names: list[str], batches: list[list[int]], *, size: int, workers: int
) -> DataLoader[ImageBatch]:
    """The named images of a folder, cropped, batch by batch as ``batches`` lists their places."""
    crops = _Crops(folder, names, size)
    return DataLoader(crops, batch_size=None, sampler=batches, num_workers=workers, collate_fn=ImageBatch._make)


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """Images in [-1, 1] as bytes, by DiT's and SiT's rule: ``127.5 x + 128``, cut to 0 .. 255. Grey ones become RGB.

    Shape:
        images: (N, C, H, W), C = 1 or 3; returns: (N, H, W, 3)
    """
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise Mistake(
            f"Images are (N, 1 or 3, H, W).\nFound: {tuple(images.shape)}. Decode with a VAE of grey or colour images."
        )
    rgb = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
    return (127.5 * rgb.float() + 128).clamp(0, 255).byte().cpu().numpy()


def write_png(image: NDArray[np.uint8], path: Path) -> None:
    """Write an image (H, W, 3) under another name, then rename: the file is always whole."""
    partial = path.with_name(path.name + ".partial")
    Image.fromarray(image).save(partial, format="PNG")
    partial.replace(path)


def save_panels(rows: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Write rows of pictures, (H, W, 3), as one: a heading for each row, and a title for each picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 2.7 * len(rows)), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)  # or white borders would run together
    for part, (heading, row) in zip(figure.subfigures(len(rows), 1, squeeze=False)[:, 0], rows.items(), strict=True):
        part.suptitle(heading, fontsize=10)
        for axes, (title, picture) in zip(part.subplots(1, len(row), squeeze=False)[0], row.items(), strict=True):
            axes.imshow(picture, interpolation="nearest")
            axes.set_title(title, fontsize=9)
            axes.set_axis_off()
    figure.savefig(path, dpi=150)


def tile(images: NDArray[Any] | Tensor, columns: int, *, gap: int = 1) -> NDArray[Any]:
    """Images (N, H, W, 3), bytes or numbers in [0, 1], as one: in rows of so many, with white between them."""
    images = np.asarray(images)
    lacking = [(0, -len(images) % columns), (0, gap), (0, gap), (0, 0)]
    padded = np.pad(images, lacking, constant_values=255 if images.dtype == np.uint8 else 1)
    return rearrange(padded, "(row column) h w rgb -> (row h) (column w) rgb", column=columns)[:-gap, :-gap]


class ImageSet:
    """Images in order, as often as asked.

    Args:
        source: A folder of images of one size, read batch by batch; an ``.npz`` with them in ``arr_0``, held whole; or
            "digits". A folder ``images`` in the folder, such as that of ``sample.py``, is taken in its place.
    """

    def __init__(self, source: str | Path) -> None:
        path = Path(source)
        self.path = (path / "images" if (path / "images").is_dir() else path).resolve()
        self.name, self._files, self._held = str(self.path), [], np.empty((0, 0, 0, 3), np.uint8)
        if str(source) == DIGITS:
            from common.data import digits

            self.name, self._held = DIGITS, to_uint8(digits(32)[0].images)
        elif self.path.is_dir():
            self._files = find_images(self.path)
        elif self.path.suffix == ".npz" and self.path.exists():
            with readable(self.path, "images in an .npz"), np.load(self.path, allow_pickle=False) as archive:
                self._held = images = archive["arr_0"]  # where ADM's evaluator looks for the images
                if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
                    raise ValueError(f"'arr_0' has to be uint8 (N, H, W, 3); it is {images.dtype} {images.shape}")
        if not len(self):
            raise DataError(f"There are no images at {path}.\nPass a folder of images, or an .npz of ADM's layout.")

    def __len__(self) -> int:
        return len(self._files) or len(self._held)

    def batches(self, size: int) -> Iterator[Tensor]:
        """Batches (N, 3, H, W), uint8, of ``size`` images and a smaller last one."""
        shown = read_image(self.path / self._files[0]).size if self._files else None
        for start in range(0, len(self), size):
            names, images = self._files[start : start + size], self._held[start : start + size]
            images = np.stack([self._pixels(name, shown) for name in names]) if names else images
            yield torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()

    def _pixels(self, name: str, size: tuple[int, int]) -> NDArray[np.uint8]:
        image = read_image(self.path / name)
        if image.size != size:
            raise DataError(
                f"The images of a set have one size.\nFound: {size}, and {image.size} of {self.path / name}.\n"
                "Crop and resize them alike, or name the folder of one size."
            )
        return np.asarray(image)
