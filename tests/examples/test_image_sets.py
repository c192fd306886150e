"""The examples' sets of images: written one by one or into one file, read in batches, and broken ones named."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from common.data_files import DataError
from common.image_sets import HeldImages, ImageSet, to_uint8, write_npz, write_png
from numpy.typing import NDArray
from PIL import Image

from selftrans_reg.errors import ShapeError


@pytest.fixture
def images() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(256, size=(5, 4, 6, 3), dtype=np.uint8)


def written(images: NDArray[np.uint8], folder: Path) -> list[Path]:
    folder.mkdir(parents=True)
    paths = [folder / f"{i:06d}.png" for i in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        write_png(image, path)
    return paths


def test_pixels_follow_the_rule() -> None:
    grey = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.999, 1.0]).reshape(1, 1, 1, 6)
    assert to_uint8(grey)[0, 0, :, 0].tolist() == [0, 0, 64, 128, 255, 255]
    colour = torch.tensor([-1.0, 0.0, 1.0]).reshape(1, 3, 1, 1)
    assert to_uint8(colour).tolist() == [[[[0, 128, 255]]]]
    for match in [r"one channel or three", r"Found: \(2, 4, 8, 8\)"]:
        with pytest.raises(ShapeError, match=match):
            to_uint8(torch.zeros(2, 4, 8, 8))


@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_folders_and_npz_give_the_images_in_order(tmp_path: Path, images: NDArray[np.uint8], size: int) -> None:
    paths = written(images, tmp_path / "set/images")
    write_npz(paths, np.arange(5), tmp_path / "set.npz")
    np.savez_compressed(tmp_path / "compressed.npz", images)
    held = HeldImages("held", torch.from_numpy(images).permute(0, 3, 1, 2))
    sources = [ImageSet(tmp_path / name) for name in ("set", "set/images", "set.npz", "compressed.npz")]
    for source in [*sources, held]:
        batches = list(source.batches(size))
        assert len(source) == 5
        assert max(len(batch) for batch in batches) == min(size, 5)
        assert torch.equal(torch.cat(batches), held.images)
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_the_npz_is_what_numpy_writes(tmp_path: Path, images: NDArray[np.uint8]) -> None:
    write_npz(written(images, tmp_path / "set"), np.array([3, 1, 4, 1, 5]), tmp_path / "set.npz")
    with np.load(tmp_path / "set.npz", allow_pickle=False) as archive:
        assert archive.files == ["arr_0", "arr_1"]
        assert np.array_equal(archive["arr_0"], images)
        assert archive["arr_0"].dtype == np.uint8
        assert archive["arr_1"].tolist() == [3, 1, 4, 1, 5]


def test_images_of_two_sizes_are_named(tmp_path: Path, images: NDArray[np.uint8]) -> None:
    paths = written(images, tmp_path / "set")
    write_png(images[0, :3], paths[3])
    for match in ["images of a set have one size", r"Found: 6x4, and .*000003.png with 6x3"]:
        with pytest.raises(ShapeError, match=match):
            list(ImageSet(tmp_path / "set").batches(2))
        with pytest.raises(ShapeError, match=match):
            write_npz(paths, np.arange(5), tmp_path / "set.npz")
    assert not (tmp_path / "set.npz").exists()


def test_what_holds_no_images_is_named(tmp_path: Path, images: NDArray[np.uint8]) -> None:
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(2))
    np.savez(tmp_path / "floats.npz", images / 255)
    np.savez(tmp_path / "pickled.npz", np.array([{}], dtype=object))
    (tmp_path / "text.npz").write_text("no archive")
    for name, error, match in [
        ("nowhere", DataError, r"There are no images at .*nowhere"),
        ("empty", DataError, "empty holds no image"),
        ("statistics.npz", DataError, r"no images under 'arr_0'.\nFound: mu.npy.\nStatistics are passed"),
        ("floats.npz", ShapeError, r"uint8 \(N, H, W, 3\).\nFound: float64 \(5, 4, 6, 3\)"),
        ("pickled.npz", ShapeError, r"uint8 \(N, H, W, 3\).\nFound: object"),
        ("text.npz", DataError, "text.npz cannot be read as .npz"),
    ]:
        with pytest.raises(error, match=match):
            ImageSet(tmp_path / name)


def test_broken_files_are_named(tmp_path: Path, images: NDArray[np.uint8]) -> None:
    paths = written(images, tmp_path / "set")
    paths[2].write_bytes(paths[2].read_bytes()[:40])
    with pytest.raises(DataError, match=r"000002.png cannot be read as an image"):
        list(ImageSet(tmp_path / "set").batches(2))

    whole = tmp_path / "whole.npz"
    np.savez(whole, images)
    content = bytearray(whole.read_bytes())
    content[200] ^= 1  # one pixel: the archive's checksum tells
    (tmp_path / "flipped.npz").write_bytes(content)
    (tmp_path / "short.npz").write_bytes(content[:300])
    for name in ("flipped.npz", "short.npz"):
        with pytest.raises(DataError, match=rf"{name} cannot be read as .npz"):
            list(ImageSet(tmp_path / name).batches(2))


def test_a_header_that_announces_too_much_costs_no_memory(tmp_path: Path, images: NDArray[np.uint8]) -> None:
    with zipfile.ZipFile(tmp_path / "lying.npz", "w") as archive, archive.open("arr_0.npy", "w") as stream:
        header = {"descr": "|u1", "fortran_order": False, "shape": (10**9, 256, 256, 3)}
        np.lib.format.write_array_header_1_0(stream, header)
        stream.write(images.tobytes())
    source = ImageSet(tmp_path / "lying.npz")
    with pytest.raises(DataError, match="ends in the middle of its images"):
        next(source.batches(2))


def test_a_png_that_is_replaced_is_always_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Image.Image, path: Path, **settings: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", broken)
    with pytest.raises(KeyboardInterrupt):
        write_png(np.zeros((2, 2, 3), np.uint8), tmp_path / "000000.png")
    assert not (tmp_path / "000000.png").exists()
