"""SIGTERM and SIGINT as a wish to stop after the current step, on which all ranks agree."""

import signal
from types import FrameType, TracebackType

import torch
from accelerate import Accelerator

_STOPPING = (signal.SIGTERM, signal.SIGINT)

# Agreeing makes the host wait for the device. Ten steps are seconds, within any scheduler's grace; one would be felt.
_AGREE_EVERY = 10


def ignore_stop_signals(worker: int = 0) -> None:
    """For a process that reads data: what is sent to all of a run's processes is for the one that trains to act on."""
    for number in _STOPPING:
        signal.signal(number, signal.SIG_IGN)


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
