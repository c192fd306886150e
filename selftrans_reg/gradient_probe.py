"""How the gradients of the two terms relate at the tapped tensors, seen in the loop's own backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class GradientProbe:
    """Compares, for one call, the denoising loss's gradient at the tapped tensors with the alignment's.

    A hook on the tensor sees the gradient of the total, one on the alignment's own branch the alignment's part, with
    its weight; the rest is the denoising loss's. Compared are the places where the alignment has a gradient: the
    image's tokens of the samples inside the window. Of several layers it is the one that the backward pass reaches
    first: further down, the deeper layer's alignment would count as denoising. A gradient scaler's factor and the
    weight cancel in the cosine. Nothing waits for the device.

    Args:
        found: Called in the backward pass with ``gradient_cosine`` and ``gradient_ratio``, the norm of the alignment's
            gradient over that of the denoising loss's; 0-d.

    Attributes:
        sums: (3,), float32: Σ d·a, Σ d², Σ a², with d the denoising loss's gradient and a the alignment's; None
            before the backward pass.
        hidden: Whether PyTorch's graph hides how the loop's loss depends on a tapped tensor.
        missed: Whether a backward pass reached a tapped tensor without the alignment's part.
    """

    def __init__(self, found: Callable[[dict[str, Tensor]], object]) -> None:
        self.sums: Tensor | None = None
        self.hidden = False
        self.missed = False
        self._found = found

    def branch(self, tensor: Tensor, denoising: Tensor) -> Tensor:
        """What the alignment is to be computed from instead of ``tensor``: the same values in a branch of their own.

        Args:
            tensor: The tapped tensor.
            denoising: The loop's own loss, computed from it.
        """
        if not tensor.requires_grad:
            return tensor
        if not _reaches(denoising, tensor):
            self.hidden = True
            return tensor
        held: list[Tensor] = []  # the hooks' own: they are freed with the graph

        def compare(whole: Tensor) -> None:
            aligned = held.pop() if held else None
            if aligned is None:
                self.missed = True
            elif self.sums is None:
                self._measure(whole.detach().float(), aligned.detach().float())

        branch = tensor.view_as(tensor)
        branch.register_hook(held.append)  # type: ignore[no-untyped-call]
        tensor.register_hook(compare)  # type: ignore[no-untyped-call]
        return branch

    def _measure(self, whole: Tensor, aligned: Tensor) -> None:
        own = (whole - aligned) * (aligned != 0)
        self.sums = torch.stack([(own * aligned).sum(), own.square().sum(), aligned.square().sum()])
        self._found({"gradient_cosine": cosine(self.sums), "gradient_ratio": (self.sums[2] / self.sums[1]).sqrt()})


def cosine(sums: Tensor) -> Tensor:
    """The cosine of two gradients from Σ d·a, Σ d², Σ a²; NaN where one of them is 0."""
    return sums[0] / (sums[1].sqrt() * sums[2].sqrt())


def _reaches(loss: Tensor, tensor: Tensor) -> bool:
    """Whether ``tensor`` itself is what ``loss`` was computed from.

    It is not where a whole compiled model gives the layer's output beside its own: for autograd that is one step, and
    the output is another leaf of it.
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
