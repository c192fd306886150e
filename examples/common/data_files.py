"""Reading a data set's files within limits, and the error that names the one that cannot be used."""

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from selftrans_reg.errors import SelfTransError

# ImageNet's list of labels has about 60 MB.
_MAX_JSON = 1 << 30
# A posterior of 1024x1024 pixels with 16 channels has 2 MiB. A file of this size costs no harm, whatever it holds.
_MAX_NPY = 64 << 20
# By a .npy's first bytes, how many more hold the header's length. Versions 1 and 2; 3 is for names of fields only.
_LENGTH_BYTES = {b"\x93NUMPY\x01\x00": 2, b"\x93NUMPY\x02\x00": 4}
# Not numpy's own parser: it takes ast.literal_eval, which is slow, and in Python 3.11 fails at times in threads.
_HEADER = re.compile(
    rb"\{'descr': '(?P<dtype>[<>|][a-zA-Z]\d{0,2})', 'fortran_order': (?P<by_column>True|False), "
    rb"'shape': \((?P<shape>(?:\d{1,12}(?:, ?\d{1,12})*,?)?)\),? ?\}\s*"
)
_SHOWN = 5


class DataError(SelfTransError, ValueError):
    """Files of a data set that are unreadable, mislabelled, missing, or not what they are taken for."""


def first_ones(problems: Sequence[tuple[str, str]]) -> str:
    """Lines that name the first few of ``(name, what is wrong with it)``, and count the others."""
    lines = [f"  {name}: {' '.join(reason.split())}" for name, reason in problems[:_SHOWN]]
    return "\n".join([*lines, *([f"  and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else [])])


@contextmanager
def readable(path: Path, kind: str, advice: str = "Copy or make it again.") -> Iterator[None]:
    """Turn whatever reading a damaged file raises into a `DataError` that names the file and says what to do."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing. {advice}") from error
    # An entry of JSON that is of another type fails in many ways.
    except (OSError, ValueError, TypeError, KeyError, RecursionError, SafetensorError) as error:
        raise DataError(f"{path} cannot be read as {kind}: {type(error).__name__}: {error}. {advice}") from error


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        DataError: If the file is missing, longer than 1 GiB, or no JSON.
    """
    with readable(path, "JSON"):
        if path.stat().st_size > _MAX_JSON:
            raise DataError(f"{path} is longer than {_MAX_JSON} bytes, the most that is read of a JSON file.")
        return json.loads(path.read_bytes())


def read_npy(path: Path) -> NDArray[Any]:
    """The array of real numbers in a ``.npy`` file; nothing is read that its size and its header disagree about.

    Raises:
        DataError: If the file is missing, broken, truncated, larger than 64 MiB, or holds anything but floats.
    """
    with readable(path, ".npy"), path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > _MAX_NPY:
            raise DataError(f"{path} has {size} bytes; at most {_MAX_NPY} are read of a file for one image.")
        length_bytes = _LENGTH_BYTES.get(stream.read(8), 0)
        header = stream.read(int.from_bytes(stream.read(length_bytes), "little"))
        match = _HEADER.fullmatch(header)
        if not match:
            raise DataError(
                f"{path} cannot be read as .npy: its header is none that np.save writes for an array of numbers.\n"
                f"Found: {header[:80]!r}. Copy or make it again."
            )
        dtype, shape = np.dtype(match["dtype"].decode()), tuple(map(int, re.findall(rb"\d+", match["shape"])))
        if dtype.kind != "f":
            raise DataError(f"{path} holds {dtype}; floating-point numbers are needed.")
        announced = stream.tell() + math.prod(shape) * dtype.itemsize
        if announced != size:
            raise DataError(
                f"{path} has {size} bytes, but an array {shape} of {dtype} takes {announced}: it is truncated or "
                "damaged. Copy or make it again."
            )
        return np.fromfile(stream, dtype).reshape(shape, order="F" if match["by_column"] == b"True" else "C")
