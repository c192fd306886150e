"""Images on disk: which files of a folder are images, their pixels as a viewer shows them, and writing PNGs."""

import os
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.data_files import DataError, readable
from common.options import Mistake

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_FORMATS = ("PNG", "JPEG", "WEBP")
_PNG_BITS = 24  # the byte of a PNG that holds its bits a channel
_SHOWN = 3
DIGITS = "digits"
_ARRAY = "arr_0.npy"  # what numpy calls the first array of an .npz, where ADM's evaluator looks for the images


class ImageFiles(NamedTuple):
    """What a folder holds, relative to it, with slashes, sorted.

    Attributes:
        images: PNG, JPEG and WebP files, by their names.
        skipped: Everything else: files of other kinds, what is hidden, and folders that a link leads back to.
    """

    images: list[str]
    skipped: list[str]


def find_images(folder: Path) -> ImageFiles:
    """Find the images in a folder, at any depth; links are followed, nothing is opened."""
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}.")
    found, seen = ImageFiles([], []), {os.path.realpath(folder)}
    for parent, folders, files in os.walk(folder, onerror=_not_listed, followlinks=True):
        prefix = "" if Path(parent) == folder else f"{Path(parent).relative_to(folder).as_posix()}/"
        entered = []
        for name in sorted(folders):
            place = os.path.realpath(f"{parent}/{name}")
            if name.startswith(".") or place in seen:  # a link to a folder that was looked through, as to a parent
                found.skipped.append(f"{prefix}{name}/")
            else:
                seen.add(place)
                entered.append(name)
        folders[:] = entered
        for name in files:
            # Opening a pipe would wait for a writer; a link may lead nowhere.
            fine = name.lower().endswith(_SUFFIXES) and name[0] != "." and Path(parent, name).is_file()
            (found.images if fine else found.skipped).append(prefix + name)
    return ImageFiles(sorted(found.images), sorted(found.skipped))


def _not_listed(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be looked through: {error.strerror}.") from error


def skipped_line(folder: Path, skipped: list[str]) -> str:
    """What a script says of the files that it does not take for images."""
    more = f" and {len(skipped) - _SHOWN:,} more" if len(skipped) > _SHOWN else ""
    return f"{folder}: {len(skipped):,} entries are no images and are skipped: {', '.join(skipped[:_SHOWN])}{more}"


def read_image(path: Path) -> Image.Image:
    """An image as a viewer shows it: RGB, upright as its EXIF data say, on white where it is transparent.

    Grey, palette and CMYK images become RGB as Pillow converts them; 16 bits a channel become 8.
    """
    try:
        with readable(path, "an image"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with path.open("rb") as stream:
                head = stream.read(_PNG_BITS + 1)
            with Image.open(path, formats=_FORMATS) as image:
                frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # a camera's other views
                if frames > 1:
                    raise DataError(f"{path} has {frames} frames, and one of them would have to be chosen.")  # noqa: TRY301
                return _on_white(ImageOps.exif_transpose(image), head[_PNG_BITS] if image.format == "PNG" else 8)
    except DataError:
        raise
    except Exception as error:  # a decoder raises whatever a damaged file makes it stumble over
        raise DataError(f"{path} cannot be read as an image: {type(error).__name__}: {error}.") from error


def _on_white(image: Image.Image, bits: int) -> Image.Image:
    # A PNG may name one grey or colour as transparent, with the file's own bits, which Pillow leaves as they are.
    key = image.info.get("transparency")
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip, not scale
        values = np.asarray(image)
        image = Image.fromarray((values / 257).round().astype(np.uint8))
        if key is not None:
            image.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    elif image.mode == "L" and isinstance(key, int):
        most = 2**bits - 1
        image.info["transparency"] = (key & most) * 255 // most
    elif image.mode == "RGB" and isinstance(key, tuple) and bits == 16:
        image.info["transparency"] = tuple(value >> 8 for value in key)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_square(path: Path, size: int) -> Tensor:
    """An image as uint8 (3, size, size): as `read_image` reads it, cropped as `centre_crop` does."""
    image = read_image(path)
    scale = size / min(image.size)
    scaled = round(image.width * scale) * round(image.height * scale)
    if Image.MAX_IMAGE_PIXELS is not None and scaled > Image.MAX_IMAGE_PIXELS:
        raise DataError(
            f"{path}: {image.width}x{image.height} pixels become {scaled} when the shorter side is {size}, more than "
            "Pillow's limit against decompression bombs."
        )
    return torch.from_numpy(np.array(centre_crop(image, size))).permute(2, 0, 1)


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


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """Images in [-1, 1] as bytes, by DiT's and SiT's rule: ``127.5 x + 128``, cut to 0 .. 255. Grey ones become RGB.

    Shape:
        images: (N, C, H, W), C = 1 or 3; returns: (N, H, W, 3)
    """
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise Mistake(
            f"Images have one channel or three: (N, 1 or 3, H, W).\nFound: {tuple(images.shape)}.\n"
            "Decode with a VAE of images."
        )
    rgb = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
    return (127.5 * rgb.float() + 128).clamp(0, 255).byte().cpu().numpy()


def write_png(image: NDArray[np.uint8], path: Path) -> None:
    """Write an image (H, W, 3) under another name, then rename: the file is always whole."""
    partial = path.with_name(path.name + ".partial")
    Image.fromarray(image).save(partial, format="PNG")
    partial.replace(path)


def save_panels(rows: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Write rows of pictures, (H, W, 3) in [0, 1], as one: a heading for each row, and a title for each picture."""
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
    count, height, width, _ = images.shape
    rows, white = -(-count // columns), 255 if images.dtype == np.uint8 else 1
    grid = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), white, images.dtype)
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        grid[top : top + height, left : left + width] = image
    return grid


class _Images(Dataset[tuple[Tensor | None, str]]):
    def __init__(self, folder: Path, names: list[str], size: int) -> None:
        self._folder, self._size = folder, size
        # One array: a list of strings would be copied into every worker, page by page.
        self._names = np.array([os.fsencode(name) for name in names])

    def __getitem__(self, index: int) -> tuple[Tensor | None, str]:
        try:
            return read_square(self._folder / os.fsdecode(self._names[index]), self._size), ""
        except DataError as error:
            return None, str(error)


def image_batches(
    folder: Path, names: list[str], batches: list[list[int]], *, size: int, workers: int
) -> DataLoader[tuple[Tensor | None, list[str]]]:
    """Batches of cropped images: uint8 (n, 3, size, size) of those that can be read, or None without any; and reasons.

    The reasons are one for each image of the batch, empty where it can be read.

    Args:
        folder: Of the images.
        names: Their files, relative to it.
        batches: Which of them, batch by batch.
        size: Pixels a side.
        workers: Processes that read; 0 reads in this one.
    """
    return DataLoader(_Images(folder, names, size), batch_sampler=batches, num_workers=workers, collate_fn=_collate)


def _collate(items: list[tuple[Tensor | None, str]]) -> tuple[Tensor | None, list[str]]:
    good = [pixels for pixels, _ in items if pixels is not None]
    return torch.stack(good) if good else None, [reason for _, reason in items]


class ImageSet:
    """Images in order, as often as asked: of a folder, at any depth, of the ``arr_0`` of an ``.npz``, or the digits.

    Args:
        source: The file, the folder, or "digits"; a folder with a folder ``images`` in it, such as that of
            ``sample.py``, means that.
    """

    def __init__(self, source: str | Path) -> None:
        path = Path(source)
        self.path = (path / "images" if (path / "images").is_dir() else path).resolve()
        self.name, self._files, self._held = str(self.path), [], None
        if str(source) == DIGITS:
            from common.data import digits

            self.name, self._held = DIGITS, to_uint8(digits(32)[0].images)
            self._length = len(self._held)
        elif self.path.is_dir():
            self._files, skipped = find_images(self.path)
            self._length = len(self._files)
            if skipped:
                print(skipped_line(self.path, skipped))
        elif self.path.suffix == ".npz" and self.path.exists():
            with _array_stream(self.path) as (_, shape):
                self._length = shape[0]
        else:
            raise DataError(f"There are no images at {path}.\nPass a folder of images, or an .npz of ADM's layout.")
        if not self._length:
            raise DataError(f"{self.path} holds no image.\nPass a folder of images, or an .npz of ADM's layout.")

    def __len__(self) -> int:
        return self._length

    def batches(self, size: int) -> Iterator[Tensor]:
        """Batches (N, 3, H, W), uint8, of ``size`` images and a smaller last one."""
        for images in self._rows(size):
            yield torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()

    def _rows(self, size: int) -> Iterator[NDArray[np.uint8]]:
        starts = range(0, self._length, size)
        if self._held is not None:
            yield from (self._held[start : start + size] for start in starts)
        elif self._files:
            width, height = read_image(self.path / self._files[0]).size
            for start in starts:
                yield np.stack([self._image(name, width, height) for name in self._files[start : start + size]])
        else:
            with _array_stream(self.path) as (stream, shape):
                row = int(np.prod(shape[1:]))
                for start in starts:
                    count = min(size, self._length - start)
                    raw = stream.read(count * row)
                    if len(raw) != count * row:
                        raise DataError(f"{self.path} ends in the middle of its images. Copy or make it again.")
                    yield np.frombuffer(raw, np.uint8).reshape(count, *shape[1:]).copy()

    def _image(self, name: str, width: int, height: int) -> NDArray[np.uint8]:
        image = read_image(self.path / name)
        if image.size != (width, height):
            raise DataError(
                f"The images of a set have one size.\nFound: {width}x{height}, and {self.path / name} with "
                f"{image.width}x{image.height}.\nCrop and resize them alike, or name the folder of one size."
            )
        return np.asarray(image)


@contextmanager
def _array_stream(path: Path) -> Iterator[tuple[IO[bytes], tuple[int, ...]]]:
    """The ``arr_0`` of an ``.npz``, opened and read up to its data, and its shape."""
    with readable(path, ".npz"), zipfile.ZipFile(path) as archive:
        if _ARRAY not in archive.namelist():
            raise DataError(
                f"{path} holds no images under 'arr_0'.\nFound: {', '.join(archive.namelist()[:8])}.\n"
                "Statistics are passed with --statistics."
            )
        with archive.open(_ARRAY) as stream:
            version = np.lib.format.read_magic(stream)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
            if version != (1, 0) or fortran or dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
                raise DataError(
                    f"{path} holds no images: 'arr_0' has to be uint8 (N, H, W, 3).\nFound: {dtype} {shape}.\n"
                    "Pass images as sample.py or ADM's scripts write them."
                )
            yield stream, shape
