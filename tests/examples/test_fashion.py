"""The reader of Fashion-MNIST's files, on small files of the same format."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from common.fashion import fashion, read_idx
from idx_files import write_idx, write_small_fashion

from selftrans_reg.errors import SettingError, ShapeError


def test_an_idx_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    for name in ("plain", "packed.gz"):
        write_idx(tmp_path / name, values)
        assert np.array_equal(read_idx(tmp_path / name), values)


def test_images_are_padded_scaled_and_keep_their_labels(tmp_path: Path) -> None:
    images, labels = write_small_fashion(tmp_path, train=5, held_out=3)
    parts = fashion(tmp_path)
    for part, raw, wanted in zip(parts, images, labels, strict=True):
        assert part.images.shape == (len(raw), 1, 32, 32)
        assert part.labels.tolist() == wanted.tolist()
        inner = part.images[:, 0, 2:30, 2:30]
        assert torch.equal(inner, torch.from_numpy(raw).float() / 127.5 - 1)
        border = part.images.clone()
        border[:, 0, 2:30, 2:30] = -1  # black, the background
        assert (border == -1).all()
    assert fashion(tmp_path, size=28)[0].images.shape == (5, 1, 28, 28)


def test_packed_and_unpacked_files_are_found(tmp_path: Path) -> None:
    write_small_fashion(tmp_path, train=2, held_out=2)
    packed = tmp_path / "train-images-idx3-ubyte.gz"
    expected = fashion(tmp_path)[0].images
    packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()
    assert torch.equal(fashion(tmp_path)[0].images, expected)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for match in ["train-images-idx3-ubyte or train-images-idx3-ubyte.gz", "dataset-fashion-mnist"]:
        with pytest.raises(SettingError, match=match):
            fashion(tmp_path)


@pytest.mark.parametrize("size", [27, 29, 0])
def test_a_size_that_cannot_be_padded_to_is_refused(tmp_path: Path, size: int) -> None:
    with pytest.raises(SettingError, match=f"got {size}"):
        fashion(tmp_path, size)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "it begins with nothing"),
        (b"\x89PNG....", "it begins with 89 50 4e 47"),
        (bytes([0, 0, 8, 1]) + struct.pack(">I", 5) + b"abc", r"3 bytes for the shape \(5,\)"),
        (bytes([0, 0, 8, 1]) + struct.pack(">I", 2) + b"abc", r"3 bytes for the shape \(2,\)"),
        (bytes([0, 0, 8, 3]) + struct.pack(">I", 2), r"0 bytes for the shape \(2,\)"),
    ],
)
def test_a_file_that_is_none_or_not_whole_is_refused(tmp_path: Path, content: bytes, match: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ShapeError, match=match):
        read_idx(path)


@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_half_a_gzip_file_is_refused(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "file.gz"
    write_idx(path, np.random.default_rng(0).integers(0, 255, (20, 20), dtype=np.uint8))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))] or b"no gzip")
    with pytest.raises(ShapeError, match="no whole gzip file"):
        read_idx(path)


def test_images_without_their_labels_are_refused(tmp_path: Path) -> None:
    write_small_fashion(tmp_path, train=4, held_out=2)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.zeros(3, dtype=np.uint8))
    with pytest.raises(ShapeError, match=r"images \(4, 28, 28\), labels \(3,\)"):
        fashion(tmp_path)
