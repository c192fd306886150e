"""SIGTERM and SIGINT as a wish to stop after the current step, on which all ranks agree."""

import multiprocessing
import os
import signal
from types import FrameType, TracebackType

import torch
from accelerate import Accelerator

_STOPPING = (signal.SIGTERM, signal.SIGINT)

# Agreeing makes the host wait for the device. Ten steps are seconds, within any scheduler's grace; one would be felt.
_AGREE_EVERY = 10


class ReaderSignals:
    """A loader's ``worker_init_fn``: its processes leave a signal that a whole job gets to the process that trains.

    Until `release`, that is. Afterwards a process that reads ends on a signal, so that the one that trains can end it.
    """

    def __init__(self) -> None:
        self._released = multiprocessing.Event()

    def __call__(self, worker: int) -> None:
        """Take the signals of the process that calls."""
        for number in _STOPPING:
            signal.signal(number, self._act)

    def release(self) -> None:
        """Let the readers be ended: those of a loop that an error has left are, when the process ends."""
        self._released.set()

    def _act(self, number: int, frame: FrameType | None) -> None:
        if self._released.is_set():
            os._exit(0)  # as torch's own handler does: any other code counts as a reader that failed


class StopSignals:
    """While open, SIGTERM and SIGINT are noted instead of ending the process; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.received = 0

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._note) for number in _STOPPING}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def agreed(self, accelerator: Accelerator, steps: int) -> int:
        """The number of a signal that any rank has got, 0 without one: the same on every rank.

        Several ranks look at every tenth step only. To be called by all of them after each step.

        Args:
            accelerator: Of the run.
            steps: Steps done so far, the same on every rank.
        """
        if accelerator.num_processes == 1:
            return self.received
        if steps % _AGREE_EVERY:
            return 0
        return int(accelerator.gather(torch.tensor([self.received], device=accelerator.device)).max())
