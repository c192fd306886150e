"""The convergence study's results as tables, plots and numbers of docs/does-it-work.md."""

from pathlib import Path


def write_page(lines: list, root: Path) -> None: ...
