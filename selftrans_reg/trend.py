"""Whether the alignment falls: averages over many calls, the latest compared with the first."""

from __future__ import annotations

import math
from statistics import mean

from torch import Tensor

# The alignment is averaged over at least so many calls, and so many averages are compared with the first.
_AVERAGED, _RECENT = 100, 5
# Within so many calls of a run any head learns at least the mean of what it is to predict.
_LEARNED = 2000


class Trend:
    """The alignment of the samples inside the window, averaged over stretches of the run.

    Attributes:
        sum: Of the alignments since the last stretch ended; a 0-d tensor on the device once a sample was inside.
        first: The average over the run's first stretch; inf where that was before the run was watched.
        recent: Those over the latest ones, oldest first.
    """

    def __init__(self) -> None:
        self.sum: Tensor | float = 0.0
        self.first = math.nan
        self.recent: list[float] = []
        self._inside = 0.0
        self._calls = 0

    def add(self, alignment: Tensor, inside: float) -> None:
        """Take in one call: its alignment and the share of its samples that were inside. Nothing is read."""
        self._calls += 1
        self._inside += inside
        if inside:
            self.sum = self.sum + alignment.detach()

    def close(self, total: float, calls: int) -> bool:
        """End a stretch if it is long enough, and say whether the alignment should have fallen and has not.

        Args:
            total: The value of ``sum``.
            calls: The number of this call in the run.
        """
        if self._calls < _AVERAGED or not self._inside:
            return False
        average = total / self._inside
        if math.isnan(self.first):
            self.first = average if calls - self._calls < _AVERAGED else math.inf
        else:
            self.recent = [*self.recent, average][-_RECENT:]
        self.sum, self._inside, self._calls = 0.0, 0.0, 0
        return calls >= _LEARNED and len(self.recent) == _RECENT and mean(self.recent) >= self.first

    def state(self) -> list[float]:
        """What a resumed run needs, as floating numbers."""
        recent = [*self.recent, *[math.nan] * (_RECENT - len(self.recent))]
        return [float(self.sum), self._inside, self._calls, self.first, *recent]

    def load(self, state: list[float]) -> None:
        """Go on from what :meth:`state` gave."""
        self.sum, self._inside, calls, self.first, *recent = state
        self._calls = int(calls)
        self.recent = [value for value in recent if not math.isnan(value)]
