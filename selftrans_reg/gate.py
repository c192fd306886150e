"""Which rows of a batch take part: inside the window, and which of them the teacher is shown."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .calls import Call, CallSpec
from .errors import SelfTransError, SettingError
from .taps import Record
from .time import TimeConvention, window_mask

# Devices of which a copy to or from pinned memory is left to itself; on others it is waited for.
ASYNCHRONOUS = ("cuda",)


@dataclass(frozen=True)
class Gated:
    """A call and its rows inside the window.

    Attributes:
        call: The model's call by names.
        inside: (N,), bool, on the batch's device.
        on_host: (N,), the same on the host, once ``ready`` has happened.
        ready: The end of the copy; None where there was nothing to wait for.
    """

    call: Call
    inside: Tensor
    on_host: Tensor
    ready: torch.cuda.Event | None

    def rows(self) -> Tensor:
        """(n,), the indices of the rows inside, on the host. Waits only for what was queued before the forward."""
        if self.ready is not None:
            self.ready.synchronize()
        return self.on_host.nonzero().squeeze(1)


class Gate:
    """Finds the rows inside the window when the model is called, so that the loss need not wait for the forward.

    On CUDA the mask is copied to the host asynchronously before the forward is queued; the number of rows, on which
    shapes depend, is then known while the forward still runs.
    """

    def __init__(self, spec: CallSpec, time: TimeConvention, window: tuple[float, float] | None) -> None:
        self.spec = spec
        self.time = time
        self.window = window

    @torch.no_grad()
    def __call__(self, record: Record) -> Gated:
        """Bind the record's call and see which rows are inside.

        Raises:
            CallError: If x_t or t cannot be told from the call.
        """
        call = self.spec.bind(record.args, record.kwargs)
        inside = window_mask(self.time.noise_fraction(call.t), self.window)
        if inside.device.type not in ASYNCHRONOUS:
            return Gated(call, inside, inside.cpu(), None)
        on_host = torch.empty(inside.shape, dtype=torch.bool, pin_memory=True)
        on_host.copy_(inside, non_blocking=True)
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        # The copy is in the stream of the batch's device, which need not be the current one.
        ready.record(torch.cuda.current_stream(inside.device))
        return Gated(call, inside, on_host, ready)

    def early(self, record: Record) -> Gated | SelfTransError:
        """The same at the moment of the call; an error is kept for the loss, where the user expects it."""
        try:
            return self(record)
        except SelfTransError as error:
            return error.with_traceback(None)  # whose frames hold the record, and with it the graph


def check_teacher_rows(teacher_rows: object) -> None:
    """Raise ``SettingError`` unless ``teacher_rows`` is None, a count of at least 1, or a share in (0, 1)."""
    count = isinstance(teacher_rows, int) and not isinstance(teacher_rows, bool) and teacher_rows >= 1
    share = isinstance(teacher_rows, float) and 0.0 < teacher_rows < 1.0
    if not (teacher_rows is None or count or share):
        raise SettingError(
            f"teacher_rows must be None, a whole number of rows from 1, or a share between 0 and 1; got "
            f"{teacher_rows!r}."
        )


def sample_rows(rows: Tensor, teacher_rows: int | float | None, seed: int) -> Tensor:
    """A random part of ``rows``: at most a count, or a share (rounded up), each subset as likely as any other.

    Args:
        rows: (n,), indices on the host.
        teacher_rows: The count or the share; None for all.
        seed: What the choice depends on, and nothing else: no random number generator is advanced.

    Shape:
        returns: (k,), in ascending order
    """
    if teacher_rows is None:
        return rows
    wanted = math.ceil(teacher_rows * len(rows)) if isinstance(teacher_rows, float) else teacher_rows
    if wanted >= len(rows):
        return rows
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:wanted]
    return rows[chosen.sort().values]


def to_device(rows: Tensor, device: torch.device) -> Tensor:
    """Indices on ``device``, without waiting for it."""
    return rows.pin_memory().to(device, non_blocking=True) if device.type in ASYNCHRONOUS else rows.to(device)
