"""Counts the calls inside the package in one ordinary step of stage 2: what a batch goes through, and which files.

PYTHONPATH=tests/support python tests/support/count_calls.py
"""

import sys
from collections import Counter
from pathlib import Path
from types import FrameType

from loops import new_criterion, noisy_batch, student, total

import selftrans_reg as st

PACKAGE = str(Path(st.__file__).parent)
TIMES = [0.1, 0.35, 0.5, 0.9]  # inside and outside of the window
FIRST_CALLS = 5  # which also check and measure


def count_calls() -> Counter[tuple[str, str]]:
    """How often each function of the package is called in one forward, its criterion call and the backward pass."""
    calls: Counter[tuple[str, str]] = Counter()
    model, b = student(), noisy_batch(TIMES)
    criterion = new_criterion(model)

    def note(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE):
            calls[Path(code.co_filename).stem, getattr(code, "co_qualname", code.co_name)] += 1

    for step in range(FIRST_CALLS + 1):
        sys.setprofile(note if step == FIRST_CALLS else None)
        total(model, criterion, b).backward()
    sys.setprofile(None)
    return calls


if __name__ == "__main__":
    for (file, function), count in sorted(count_calls().items()):
        print(f"{count:4} {file}.{function}")
