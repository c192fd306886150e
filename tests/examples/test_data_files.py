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
        whole[:-4],
        whole + b"\0",
        b"",
        b"PK\x03\x04",
        whole.replace(b"(8, 2, 2), }  ", b"(8,-2,-2), }  "),
        whole.replace(b"<f4", b"<i4"),
        whole[:8] + b"\xff\xff" + whole[10:60] + b"(" * 60_000,
    ]:
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a.npy cannot be read as .npy: (.|\n)*Copy or make it again"):
            read_npy(path)
    with path.open("wb") as stream:
        stream.truncate((64 << 20) + 1)  # a sparse file takes no room
    with pytest.raises(DataError, match="at most 67108864 are read"):
        read_npy(path)


@pytest.mark.parametrize("read", [read_npy, read_json])
def test_what_is_no_file_is_named_and_waited_for_by_nobody(read: Callable[[Path], Any], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, match in [(tmp_path / "pipe", "no regular file"), (tmp_path, "no regular"), (tmp_path / "a", "missing")]:
        with pytest.raises(DataError, match=rf"{path} .*{match}"):
            read(path)


def test_arrays_are_read_as_they_were_saved_in_threads_too(tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(size=(8, 2, 2))
    kinds = [array, np.asfortranarray(array), array.astype(">f4"), array.astype(np.float16), array[0, 0]]
    for i, kind in enumerate(kinds):
        np.save(tmp_path / f"{i}.npy", kind)
    start = threading.Barrier(len(kinds))

    def read(i: int) -> bool:
        start.wait()
        expected = kinds[i].astype(np.float32)
        return all(np.array_equal(read_npy(tmp_path / f"{i}.npy"), expected) for _ in range(100))

    with ThreadPoolExecutor(len(kinds)) as pool:
        assert all(pool.map(read, range(len(kinds))))


def test_no_json_overflows_the_stack(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"[" * 100_000)
    with pytest.raises(DataError, match="cannot be read as JSON"):
        read_json(tmp_path / "a.json")


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
    mean, bad = torch.ones(4, 2, 2), torch.full((4, 2, 2), float("inf"))
    for pair in [(bad, mean), (mean, bad)]:
        with pytest.raises(DataError, match=r"image 3 holds values that are not finite"):
            check_moments(*pair, "image 3")
    bad = mean.clone()
    bad[0, 0, 0] = -0.01
    with pytest.raises(DataError, match=r"image 3 holds no standard deviation(.|\n)*log-variance(.|\n)*dist.std"):
        check_moments(mean, bad, "image 3")
