"""Where a job runs: its device, the arithmetic there, and the processes that share it by its files."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist


def default_device(name: str | None) -> str:
    """The device that was named; else a GPU, where there is one."""
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32, in matrix products and in convolutions alike; by itself torch uses it in the latter."""
    matmul, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolutions


class Processes:
    """The processes that torchrun or accelerate started, or this one alone. They share files, no tensor."""

    def __init__(self) -> None:
        self.rank, self.count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

    def __enter__(self) -> "Processes":
        if self.count > 1:
            # A process waits for the slowest one's last batch, and the others for the first one's look at the folder.
            dist.init_process_group("gloo", timeout=timedelta(days=1))
        return self

    def __exit__(self, *exception: object) -> None:
        if self.count > 1:
            dist.destroy_process_group()

    def meet(self) -> None:
        """Wait for all."""
        if self.count > 1:
            dist.barrier()

    def device(self, name: str | None) -> str:
        """The device of this process: with "cuda", the one that it was given."""
        name = default_device(name)
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name


_STOPPING = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """While open, SIGTERM and Ctrl-C are noted instead of ending the process; a second Ctrl-C interrupts at once."""
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in noted:
            raise KeyboardInterrupt
        noted.append(number)

    before = {number: signal.signal(number, note) for number in _STOPPING}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_signals(worker: int) -> None:
    """In a process that reads data: leave a signal that a whole job gets to the process that trains."""
    for number in _STOPPING:
        signal.signal(number, signal.SIG_IGN)
