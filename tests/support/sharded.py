"""FSDP2 on two gloo processes: which rows are whose, and what is sharded."""

from loops import Batch, noisy_batch
from ranks import RANKS
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def mine(rank: int, times: list[float]) -> Batch:
    return noisy_batch(times).rows(slice(4 * rank, 4 * rank + 4))


def shard(model: nn.Module, **options: object) -> None:
    """Each block and the rest, as people do."""
    mesh = init_device_mesh("cpu", (RANKS,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)


def shard_whole(module: nn.Module, **options: object) -> None:
    fully_shard(module, mesh=init_device_mesh("cpu", (RANKS,)), **options)
