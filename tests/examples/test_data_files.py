"""Reading a data set's files: whatever is wrong with one is an error that names it, and none costs memory or time."""

import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common.data_files import DataError, check_moments, first_ones, read_json, read_moments, read_npy


class Hostile:
    """Unpickled, it would leave a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.trace,)


def test_no_npy_runs_code_or_takes_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.array([Hostile(tmp_path / "trace")], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"cannot be read as .npy: ValueError: Object arrays"):
        read_npy(path)
    assert not (tmp_path / "trace").exists()
    np.save(path, np.ones((8, 2, 2), np.float32))
    whole = path.read_bytes()
    huge = whole.replace(b"(8, 2, 2), }         ", b"(8, 2, 2000000000), }")
    assert len(huge) == len(whole)
    for content in [
        huge,
        whole.replace(b"(8, 2, 2), }            ", b"(2, 2000000000000000), }"),
        whole[:-4],
        whole + b"\0",
        whole[:30],
        b"",
        b"PK\x03\x04",
        whole.replace(b"(8, 2, 2), }  ", b"(8,-2,-2), }  "),
        whole.replace(b"'<f4', ", b"1+1,   "),
        whole[:8] + b"\xff\xff" + whole[10:60] + b"(" * 60_000,
    ]:
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a.npy cannot be read as .npy: (.|\n)*Copy or make it again"):
            read_npy(path)
    path.write_bytes(whole.replace(b"<f4", b"<i4"))
    with pytest.raises(DataError, match="holds int32; floating-point numbers are needed"):
        read_npy(path)
    with path.open("wb") as stream:
        stream.truncate((64 << 20) + 1)  # a sparse file takes no room
    with pytest.raises(DataError, match="at most 67108864 are read"):
        read_npy(path)


@pytest.mark.parametrize("read", [read_npy, read_json])
def test_what_is_no_file_is_named_and_waited_for_by_nobody(read: Callable[[Path], Any], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, match in [("pipe", "no regular file"), ("folder", "no regular file"), ("nothing", "is missing")]:
        with pytest.raises(DataError, match=rf"{name} .*{match}"):
            read(tmp_path / name)


def test_arrays_are_read_as_they_were_saved_in_threads_too(tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(size=(8, 2, 2))
    kinds = [
        array,
        np.asfortranarray(array),
        array.astype(">f4"),
        array.astype(np.float16),
        array[0, 0],
        array[0, 0, 0],
    ]
    for i, kind in enumerate(kinds):
        np.save(tmp_path / f"{i}.npy", kind)
    start = threading.Barrier(6)

    def read(i: int) -> bool:
        start.wait()
        return all(np.array_equal(read_npy(tmp_path / f"{i}.npy"), kinds[i]) for _ in range(100))

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(read, range(6)))


def test_no_json_takes_memory_or_overflows_the_stack(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for content in (b"{", b"\xff", b"[" * 100_000, b"1" * 5000):
        path.write_bytes(content)
        with pytest.raises(DataError, match="cannot be read as JSON"):
            read_json(path)
    with path.open("wb") as stream:
        stream.truncate((1 << 30) + 1)
    with pytest.raises(DataError, match="longer than 1073741824 bytes"):
        read_json(path)


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
    mean = torch.ones(4, 2, 2)
    for bad in (float("nan"), float("inf")):
        for pair in [(mean * bad, mean), (mean, mean * bad)]:
            with pytest.raises(DataError, match=r"image 3 holds values that are not finite"):
                check_moments(*pair, "image 3")
    with pytest.raises(DataError, match=r"image 3 holds no standard deviation(.|\n)*log-variance(.|\n)*dist.std"):
        check_moments(mean, -mean, "image 3")
