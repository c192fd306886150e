"""When to stop by itself: once the gradients of the two terms no longer agree at the tapped tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import CaptureError, SettingError
from .modules import check_positive


@dataclass(frozen=True)
class Plateau:
    """Stop the alignment once its gradient no longer agrees with that of the denoising loss.

    Every ``interval`` calls the cosine is measured between the gradients of the two terms at the tapped tokens. Once
    its smoothed value has been below ``threshold`` for ``patience`` measurements one after the other, the alignment
    is 0 and the teacher is not run, as from ``stop_step`` on. In a distributed run the sums behind the cosine are
    added up over all ranks, which must make the same calls, so that all stop at the same one.

    Args:
        interval: Calls of the criterion from one measurement to the next. What one call measures is read in the call
            of the next, so that nothing waits for the backward pass.
        patience: Measurements below the threshold, in a row.
        threshold: Of the smoothed cosine, between -1 and 1. At 0 the two terms neither help nor hinder each other;
            measured ones come near it and may never pass it.
        smoothing: The share of the older measurements in the exponential mean, from 0 to below 1.

    Reference: after the stage-wise termination of HASTE, Wang et al., 2025, https://arxiv.org/abs/2505.16792
    """

    interval: int = 100
    patience: int = 20
    threshold: float = 0.05
    smoothing: float = 0.9

    def __post_init__(self) -> None:
        check_positive("Plateau's interval", self.interval)
        check_positive("Plateau's patience", self.patience)
        for name, low in (("threshold", -1.0), ("smoothing", 0.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, float | int) or not low <= value < 1.0:
                raise SettingError(f"Plateau's {name} must be a number from {low:g} to below 1; got {value!r}.")


class PlateauRule:
    """A :class:`Plateau` at work: what it has seen of the run so far."""

    def __init__(self, plateau: Plateau) -> None:
        self.plateau = plateau
        self.stopped_at: int | None = None
        self._smoothed = 0.0  # the exponential mean before it is corrected for its start at 0
        self._count = self._below = 0  # measurements, and those below the threshold in a row
        self._probe: GradientProbe | None = None  # the last, not read yet

    def arm(self, probe: GradientProbe, calls: int) -> None:
        """Take ``probe`` for a measurement, if one is due: it will have measured after the backward pass.

        Raises:
            CaptureError: If it cannot measure.
        """
        if probe.hidden:
            raise CaptureError(
                "stop_when= needs the gradient of the loop's own loss at the tapped tokens, and PyTorch's graph hides "
                "it: the loss does not depend on the very tensor that was captured.\n"
                "If the whole model is compiled, compile its blocks one by one instead (block.compile()). If the loss "
                "was detached, or comes from another forward, pass the loss of this forward. Or give a stop_step."
            )
        if calls % self.plateau.interval == 0:
            self._probe = probe

    def decide(self, calls: int, step: int | None, device: torch.device) -> dict[str, Tensor]:
        """Read the last measurement where one is due, on all ranks at once, and stop if it is time.

        Gives the smoothed cosine by its name, on ``device``, where sums of all ranks can be added up; nothing where
        nothing was read. It stops at this step, or at this call of the run where the loop gives none.
        """
        if calls % self.plateau.interval or self._probe is None:
            return {}
        sums = self._probe.sums_on(device)
        self._probe = None
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        found = cosine(sums).item()
        if math.isnan(found):  # no sample inside the window on any rank, or gradients that overflowed
            return {}
        share = self.plateau.smoothing
        self._count += 1
        self._smoothed = share * self._smoothed + (1 - share) * found
        corrected = self._smoothed / (1 - share**self._count)
        self._below = self._below + 1 if corrected < self.plateau.threshold else 0
        if self._below >= self.plateau.patience:
            self.stopped_at = calls if step is None else step
        return {"gradient_cosine_smoothed": torch.full((), corrected, device=device)}

    def state(self) -> list[float]:
        """What a resumed run needs, as floating numbers; a measurement that was not read yet is part of it."""
        stopped_at = -1 if self.stopped_at is None else self.stopped_at
        sums = (self._probe or GradientProbe()).sums_on(torch.device("cpu")).tolist()
        return [stopped_at, self._smoothed, self._count, self._below, self._probe is not None, *sums]

    def load(self, state: Sequence[float]) -> None:
        """Go on from what :meth:`state` gave."""
        stopped_at, self._smoothed, count, below, pending, *sums = state
        self.stopped_at = None if stopped_at < 0 else int(stopped_at)
        self._count, self._below = int(count), int(below)
        self._probe = GradientProbe(sums=torch.tensor(sums, device="cpu")) if pending else None


class GradientProbe:
    """Compares, for one call, the denoising loss's gradient at the tapped tensors with the alignment's.

    A hook on the tensor sees the gradient of the total, one on the alignment's own branch the alignment's part, with
    its weight; the rest is the denoising loss's. Compared are the places where the alignment has a gradient: the
    image's tokens of the samples inside the window. Of several layers it is the one that the backward pass reaches
    first: further down, the deeper layer's alignment would count as denoising. A gradient scaler's factor and the
    weight cancel in the cosine. Nothing waits for the device.

    Args:
        found: Filled in the backward pass with ``gradient_cosine`` and ``gradient_ratio``, the norm of the alignment's
            gradient over that of the denoising loss's; 0-d.
        sums: Of an earlier probe.
    """

    def __init__(self, found: dict[str, Tensor] | None = None, sums: Tensor | None = None) -> None:
        self.sums = sums  # (3,), float32: Σ d·a, Σ d², Σ a², d the loss's gradient, a the alignment's; None before
        self.hidden = False  # whether PyTorch's graph hides how the loop's loss depends on a tapped tensor
        self.missed = False  # whether a backward pass reached a tapped tensor without the alignment's part
        self._found = {} if found is None else found

    def sums_on(self, device: torch.device) -> Tensor:
        """A copy of the sums, 0 where nothing was measured."""
        return torch.zeros(3, device=device) if self.sums is None else self.sums.to(device, copy=True)

    def branch(self, tensor: Tensor, denoising: Tensor) -> Tensor:
        """The same values in a branch of their own, for the alignment; ``denoising`` was computed from ``tensor``."""
        if not tensor.requires_grad:
            return tensor
        if not _reaches(denoising, tensor):
            self.hidden = True
            return tensor
        held: list[Tensor] = []  # the hooks' own: they are freed with the graph

        def compare(whole: Tensor) -> None:
            if not held:
                self.missed = True
            elif self.sums is None:
                self._measure(whole.detach().float(), held[-1].detach().float())
            held.clear()

        branch = tensor.view_as(tensor)
        branch.register_hook(held.append)  # type: ignore[no-untyped-call]
        tensor.register_hook(compare)  # type: ignore[no-untyped-call]
        return branch

    def _measure(self, whole: Tensor, aligned: Tensor) -> None:
        own = (whole - aligned) * (aligned != 0)
        self.sums = torch.stack([(own * aligned).sum(), own.square().sum(), aligned.square().sum()])
        self._found["gradient_cosine"] = cosine(self.sums)
        self._found["gradient_ratio"] = (self.sums[2] / self.sums[1]).sqrt()


def cosine(sums: Tensor) -> Tensor:
    """The cosine of two gradients from Σ d·a, Σ d², Σ a²; NaN where one of them is 0."""
    return sums[0] / (sums[1].sqrt() * sums[2].sqrt())


def _reaches(loss: Tensor, tensor: Tensor) -> bool:
    """Whether ``tensor`` itself is what ``loss`` was computed from.

    It is not where a whole compiled model gives the layer's output beside its own: both are leaves of one step.
    """
    wanted = (tensor.grad_fn, tensor.output_nr)
    edges = [(loss.grad_fn, loss.output_nr)]
    seen = set()
    while edges:
        edge = edges.pop()
        if edge == wanted:
            return True
        node = edge[0]
        if node is not None and node not in seen:
            seen.add(node)
            edges.extend(node.next_functions)
    return False
