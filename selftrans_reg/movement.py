"""Whether parameters move, and whether two layers hold the same: seen by a few values of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from .finite import local
from .names import named_layers

_VALUES = 256  # of each parameter


class Movement:
    """Whether the heads move while the tapped layers do.

    Args:
        late: Whether the run is in its middle, where a small step may round to none.
    """

    def __init__(self, late: bool = False) -> None:
        self._late = late
        self._watching = True
        self._start: tuple[Tensor, Tensor] | None = None

    def since_start(self, heads: nn.Module, layers: Iterable[nn.Module]) -> dict[str, Tensor]:
        """Whether heads and layers differ from what they were at the first call of this; 0-d, bool.

        Nothing at that first call, where the layers train nothing, and once :meth:`left_out` knows.
        """
        if not self._watching:
            return {}
        now = _values(heads.parameters(), True), _values(p for layer in layers for p in layer.parameters())
        if self._start is None:
            rounds = self._late and any(p.dtype in (torch.bfloat16, torch.float16) for p in heads.parameters())
            self._start = now
            self._watching = all(len(values) for values in now) and not rounds
            return {}
        same_size = all(then.shape == found.shape for then, found in zip(self._start, now, strict=True))
        self._watching = same_size  # else the model was wrapped anew
        differ = [(then != found).any() for then, found in zip(self._start, now, strict=True)] if same_size else []
        return dict(zip(("heads_moved", "layers_moved"), differ, strict=False))

    def left_out(self, found: Mapping[str, float], ready: bool) -> bool:
        """Whether the layers moved and the heads did not, once ``ready``; what was found is as :meth:`since_start`."""
        if "heads_moved" not in found or not (found["heads_moved"] or (ready and found["layers_moved"])):
            return False
        self._watching, self._start = False, None
        return not found["heads_moved"]


def same_weights(layers: Mapping[str, nn.Module], teacher: nn.Module) -> Tensor | None:
    """Whether each of the layers holds what the teacher's of the same name does; 0-d, bool; None if none compares."""
    taught = named_layers(teacher)
    pairs = []
    for name, layer in layers.items():
        theirs = dict(taught[name].named_parameters()) if name in taught else {}
        mine = dict(layer.named_parameters())
        if not mine or mine.keys() != theirs.keys():
            return None
        pairs.append((_values(mine.values(), True), _values(theirs.values(), True)))
    if any(a.shape != b.shape for a, b in pairs):
        return None
    return torch.stack([(a == b).all() for a, b in pairs]).all()


def _values(parameters: Iterable[nn.Parameter], frozen: bool = False) -> Tensor:
    """(n,), float32, a copy of the first values of each parameter that trains, or of each."""
    found = [local(p.detach()).flatten()[:_VALUES].float() for p in parameters if p.requires_grad or frozen]
    return torch.cat(found) if found else torch.zeros(0)
