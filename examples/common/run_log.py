"""A run's log: one JSON object a line in `log.jsonl`, and the same numbers for TensorBoard."""

import json
import math
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter


class RunLog:
    """Appends records to a run's log.

    Lines after the step that the run goes on from were written by a process that was stopped without a checkpoint;
    those steps run again, so their lines are dropped, as is a line that was cut off.

    Args:
        folder: The run's.
        steps: Steps that are done: 0 at the start, the checkpoint's on resuming.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        path = folder / "log.jsonl"
        kept = [line for line in read_lines(path) if line["step"] <= steps]
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        partial.replace(path)
        self._file = path.open("a")
        self._board = SummaryWriter(folder / "tensorboard", purge_step=steps + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add the values after a step; one that is not finite becomes null, as JSON has no other word for it."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self._file.write(json.dumps({"step": step, **dict.fromkeys(values), **finite}) + "\n")
        self._file.flush()
        for name, value in finite.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()

    def close(self) -> None:
        """Close both files."""
        self._file.close()
        self._board.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a `log.jsonl`, without a last line that was cut off; none if there is no such file."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
