"""The toy student with activation checkpointing, in the ways in which models do it."""

from collections.abc import Callable, Iterator

import torch
from loops import student
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils.checkpoint import checkpoint
from toys import ToyDiT


class CheckpointedSegments(nn.ModuleList):
    """Blocks which a model's own loop over them runs checkpointed, ``size`` at a time."""

    def __init__(self, blocks: nn.ModuleList, size: int, reentrant: bool) -> None:
        super().__init__(blocks._modules.values())
        self.size, self.reentrant = size, reentrant

    def __iter__(self) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
        blocks = list(self._modules.values())
        return iter([self.segment(blocks[i : i + self.size]) for i in range(0, len(blocks), self.size)])

    def segment(self, blocks: list[nn.Module]) -> Callable[[Tensor, Tensor], Tensor]:
        def run(x: Tensor, c: Tensor) -> Tensor:
            for block in blocks:
                x = block(x, c)
            return x

        return lambda x, c: checkpoint(run, x, c, use_reentrant=self.reentrant)


def in_segments(size: int, reentrant: bool, device: torch.device) -> ToyDiT:
    model = student(device)
    model.blocks = CheckpointedSegments(model.blocks, size, reentrant)
    return model


def in_wrappers(reentrant: bool, device: torch.device) -> ToyDiT:
    model = student(device)
    kind = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
    model.blocks = nn.ModuleList(checkpoint_wrapper(block, checkpoint_impl=kind) for block in model.blocks)
    return model


MODELS = {
    "each block by the model's loop": lambda reentrant, device: in_segments(1, reentrant, device),
    "each block in a wrapper": in_wrappers,
    # The tapped block is the last of its segment: what it returns is what the checkpoint returns.
    "segments that end at the layer": lambda reentrant, device: in_segments(2, reentrant, device),
}
