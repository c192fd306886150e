"""What every benchmark writes down: where its numbers were taken, the file that they go to, their place in the docs."""

from __future__ import annotations

import fcntl
import functools
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


def hardware(device: str) -> str:
    """What the numbers were taken on, in words."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    known = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", known.read_text() if known.exists() else "")
    return f"{model[1] if model else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


@functools.cache
def commit() -> str:
    """The commit that the numbers belong to, marked if the working tree differs from it in more than results.

    Asked once: a process runs the code that was there when it began, whatever is edited meanwhile.
    """
    found = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!examples/benchmarks/results")
    return f"{found}{'-dirty' if changed else ''}" if found else "unknown"


def _git(*command: str) -> str:
    try:
        done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return ""
    return done.stdout.strip()


def append(path: Path, result: dict[str, Any]) -> None:
    """Add one result to the results file, as a whole line, whoever else does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(result) + "\n")
        file.flush()
        os.fsync(file.fileno())  # what a run was resumed from is deleted afterwards


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def between(text: str, name: str, content: str) -> str:
    """``text`` with ``content`` between its marks ``<!-- name: begin -->`` and ``<!-- name: end -->``."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n\n{content}\n{end}{rest.partition(end)[2]}"
