"""Which samples a step sees, and which random numbers it draws: functions of the seed and the step alone.

A run that is resumed at a step therefore goes on exactly as it would have, with no state of a generator saved.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from common.options import Mistake


def mixed_seed(*key: int) -> int:
    """One seed for a tuple of numbers from 0 on, such as (seed, step, rank); nearby tuples give unrelated seeds."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


class MicroBatch(NamedTuple):
    """Indices of the samples, and what seeds the generator before they are read."""

    indices: list[int]
    seed: int


class SeededItems(Dataset[Any]):
    """A map-style dataset read by micro-batches: what its items draw from the CPU's generator is each batch's own.

    With worker processes too, whose own seeds a resumed run would not repeat.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitems__(self, batch: MicroBatch) -> list[Any]:
        """The samples of a micro-batch: a loader prefers this over single items."""
        torch.default_generator.manual_seed(batch.seed)
        return [self.dataset[index] for index in batch.indices]


class StepSampler(Sampler[MicroBatch]):
    """One rank's micro-batches from a step on, for ever.

    Each epoch is a permutation of its own, cut into global batches; what is left over is not seen in that epoch. A
    global batch is the same whatever the number of ranks and of micro-batches that it is cut into.

    Args:
        length: Number of samples.
        batch_size: Samples of an optimiser step, over all ranks and micro-batches; a multiple of their product.
        micro_batches: Parts of a batch that a rank runs one after the other.
        rank: This process, of so many ``ranks``.
        ranks: Processes.
        seed: Of the order.
        first_step: The step to begin with, counted from 0.

    Raises:
        Mistake: If the batch cannot be cut evenly, or there are fewer samples than one batch.
    """

    def __init__(
        self, length: int, *, batch_size: int, micro_batches: int, rank: int, ranks: int, seed: int, first_step: int = 0
    ) -> None:
        if batch_size % (ranks * micro_batches):
            raise Mistake(
                f"A global batch of {batch_size} cannot be cut evenly.\n"
                f"Found: {ranks} processes, each with {micro_batches} micro-batches.\n"
                f"Choose a batch size that is a multiple of {ranks * micro_batches}."
            )
        if length < batch_size:
            raise Mistake(f"The data has {length} samples, fewer than one batch of {batch_size}: lower the batch.")
        self.length, self.batch_size, self.micro_batches = length, batch_size, micro_batches
        self.rank, self.ranks, self.seed, self.first_step = rank, ranks, seed, first_step

    def __iter__(self) -> Iterator[MicroBatch]:
        """One micro-batch after another."""
        steps_per_epoch = self.length // self.batch_size
        epoch, first = divmod(self.first_step, steps_per_epoch)
        while True:
            generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch))
            order = torch.randperm(self.length, generator=generator)
            for step in range(first, steps_per_epoch):
                batch = order[step * self.batch_size : (step + 1) * self.batch_size]
                parts = batch.view(self.micro_batches, self.ranks, -1)  # so that another number cuts the same batch
                for part, indices in enumerate(parts[:, self.rank]):
                    # The 1 keeps it apart from the seed of the same micro-batch's noise.
                    yield MicroBatch(indices.tolist(), mixed_seed(self.seed, epoch, step, self.rank, part, 1))
            epoch, first = epoch + 1, 0
