"""The reader of Fashion-MNIST's files, on small files of the same format."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from common.data import fashion
from common.options import Mistake
from idx_files import write_idx, write_small_fashion


def test_images_are_padded_scaled_and_keep_their_labels(tmp_path: Path) -> None:
    images, labels = write_small_fashion(tmp_path, train=5, held_out=3)
    packed = tmp_path / "train-images-idx3-ubyte.gz"  # one is unpacked, as the package may leave it
    packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()
    for part, raw, wanted in zip(fashion(tmp_path), images, labels, strict=True):
        assert part.labels.tolist() == wanted.tolist()
        expected = torch.full((len(raw), 1, 32, 32), -1.0)  # black, the background
        expected[:, 0, 2:30, 2:30] = torch.from_numpy(raw).float() / 127.5 - 1
        assert torch.equal(part.images, expected)
    assert fashion(tmp_path, size=28)[0].images.shape == (5, 1, 28, 28)
    for size in (27, 29, 0):
        with pytest.raises(Mistake, match=f"got {size}"):
            fashion(tmp_path, size)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.zeros(3, dtype=np.uint8))
    with pytest.raises(Mistake, match="5 images and 3 labels"):
        fashion(tmp_path)


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_a_file_that_is_missing_or_none_or_not_whole_is_named(tmp_path: Path, name: str) -> None:
    write_small_fashion(tmp_path, train=4, held_out=2)
    packed = tmp_path / f"{name}.gz"
    whole = packed.read_bytes()
    for content in (b"", b"no gzip", whole[:-9]):
        packed.write_bytes(content)
        with pytest.raises(Mistake, match=rf"{name}.gz (cannot be read|is not the original file)(.|\n)*opy it again"):
            fashion(tmp_path)
    packed.unlink()
    with pytest.raises(Mistake, match=f"no {name} or {name}.gz in"):
        fashion(tmp_path)
    raw = gzip.decompress(whole)
    for content in (b"", b"\x89PNG....", raw[:-1], raw + b"\0", raw[:6], raw[:2] + b"\x09" + raw[3:]):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(Mistake, match=f"{name} is not the original file"):
            fashion(tmp_path)
