"""Reading a data set's files: whatever is wrong with one is an error that names it, and none runs code."""

import io
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from common.data_files import DataError, check_moments, first_ones, read_json, read_moments, read_npy
from numpy.typing import NDArray


def npy(array: NDArray[np.generic]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


WHOLE = npy(np.ones((8, 2, 2), np.float32))
BROKEN = {
    "pickled": npy(np.array([Path()])),
    "huge": WHOLE.replace(b"(8, 2, 2), }         ", b"(8, 2, 2000000000), }"),
    "negative": WHOLE.replace(b"(8, 2, 2), }  ", b"(8,-2,-2), }  "),
    "deep": WHOLE[:8] + b"\xff\xff" + WHOLE[10:60] + b"(" * 65_500,
    "cut": WHOLE[:-4],
    "empty": b"",
    "zipped": b"PK\x03\x04",
    "integers": npy(np.ones((8, 2, 2), np.int32)),
}


def test_what_is_no_whole_file_of_numbers_is_named(tmp_path: Path) -> None:
    assert set(BROKEN.values()) & {WHOLE} == set()
    for name, content in BROKEN.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name} cannot be read as .npy: (.|\n)*Copy or make it again"):
            read_npy(tmp_path / name)
    (tmp_path / "deep.json").write_bytes(b"[" * 100_000)
    with pytest.raises(DataError, match=r"deep.json cannot be read as JSON"):
        read_json(tmp_path / "deep.json")
    os.mkfifo(tmp_path / "pipe")  # opened, it would wait for a writer
    for name, match in {"pipe": "no regular file", ".": "no regular file", "nothing": "missing"}.items():
        with pytest.raises(DataError, match=f"{re.escape(str(tmp_path / name))} .*{match}"):
            read_npy(tmp_path / name)


def test_arrays_are_read_as_they_were_saved(tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(size=(8, 2, 2))
    for kind in [array, np.asfortranarray(array), array.astype(">f4"), array.astype(np.float16), array[0, 0]]:
        np.save(tmp_path / "a.npy", kind)
        found = read_npy(tmp_path / "a.npy")
        assert (type(found), found.dtype) == (np.ndarray, np.float32)
        assert np.array_equal(found, kind.astype(np.float32))


def test_the_first_few_are_named_and_the_others_counted() -> None:
    problems = [(f"{i}.npy", "broken\nin two") for i in range(7)]
    lines = first_ones(problems).splitlines()
    assert lines == [*(f"  {i}.npy: broken in two" for i in range(5)), "  and 2 more"]
    assert first_ones(problems[:5]).splitlines() == lines[:5]


def test_moments_of_another_kind_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    for shape in [(8, 2, 3), (7, 2, 2), (2, 8, 2, 2), (8, 2), (0, 2, 2)]:
        np.save(path, np.ones(shape, np.float32))
        with pytest.raises(DataError, match=re.escape(f"an array {shape}")):
            read_moments(path)
    mean, infinite, negative = torch.ones(4, 2, 2), torch.full((4, 2, 2), float("inf")), torch.ones(4, 2, 2)
    negative[0, 0, 0] = -0.01
    for pair, match in [
        ((infinite, mean), "not finite"), ((mean, infinite), "not finite"), ((mean, negative), "no standard deviation")
    ]:  # fmt: skip
        with pytest.raises(DataError, match=rf"image 3 holds .*{match}"):
            check_moments(*pair, "image 3")
