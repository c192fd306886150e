"""Counts the calls inside the package in one ordinary step of stage 2: what a batch goes through, and which files.

PYTHONPATH=tests/support python tests/support/count_calls.py
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType

from loops import Batch, new_criterion, noisy_batch, student, total
from torch import nn

import selftrans_reg as st

PACKAGE = str(Path(st.__file__).parent)
TIMES = [0.1, 0.35, 0.5, 0.9]  # inside and outside of the window
FIRST_CALLS = 5  # which also check and measure


def count_calls(model: nn.Module, criterion: nn.Module, b: Batch) -> Counter[tuple[str, str]]:
    """How often each function of the package is called in one forward, its criterion call and the backward pass."""
    calls: Counter[tuple[str, str]] = Counter()

    def note(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE):
            calls[Path(code.co_filename).stem, code.co_qualname] += 1

    for _ in range(FIRST_CALLS):
        total(model, criterion, b).backward()
    sys.setprofile(note)
    try:
        total(model, criterion, b).backward()
    finally:
        sys.setprofile(None)
    return calls


if __name__ == "__main__":
    student_model = student()
    found = count_calls(student_model, new_criterion(student_model), noisy_batch(TIMES))
    for (file, function), count in sorted(found.items()):
        print(f"{count:4} {file}.{function}")
    print(f"{sum(found.values())} calls over {len({file for file, _ in found})} files")
