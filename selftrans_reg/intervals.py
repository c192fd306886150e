"""Which calls look at what has to be read off the device: the others never wait for it."""

from __future__ import annotations

# A mistake in a new loop shows in the first calls of a process, and is cheap to find there.
_FIRST = 3


class Interval:
    """The first three looks of a process, and then every so many calls of the run.

    Args:
        every: The interval; None switches it off.
    """

    def __init__(self, every: int | None) -> None:
        self.every = every
        self._looks = 0  # of this process, not saved: a resumed run is looked at anew

    def regular(self, calls: int) -> bool:
        """Whether the interval ends with this call of the run, however often the run was resumed."""
        return self.every is not None and calls % self.every == 0

    def due(self, calls: int) -> bool:
        """Whether to look in this call, the ``calls``-th of the run; it then counts as looked at."""
        if self.every is None or not (self._looks < _FIRST or self.regular(calls)):
            return False
        self._looks += 1
        return True
