"""Runs a function in two processes that form a gloo group on the CPU."""

import functools
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

RANKS = 2


def on_ranks(function: Callable[..., Any], *args: object) -> list[Any]:
    """``function(rank, *args)`` on every rank at once, and what each returned: tensors, and lists and dicts of them.

    The processes are started once and used again; the group is new each time, and meets at a file, since a port could
    be taken. Warnings are errors there too.
    """
    with tempfile.TemporaryDirectory() as folder:
        futures = [pool.submit(_in_group, function, rank, folder, args) for rank, pool in enumerate(_pools())]
        errors = [error for future in futures if (error := future.exception())]
        if errors:  # all of them: often one says why, and the other that it lost its peer
            raise RuntimeError("\n".join("".join(traceback.format_exception(error)) for error in errors))
        return [torch.load(Path(folder, f"{rank}.pt")) for rank in range(RANKS)]


@functools.cache
def _pools() -> list[ProcessPoolExecutor]:
    return [ProcessPoolExecutor(1, get_context("spawn"), initializer=_prepare) for _ in range(RANKS)]


def _prepare() -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's name need not resolve
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning)  # torch 2.10 uses it for checkpoints
    # Dynamo looks at the .grad of every tensor, and hides the warning of its own looking in a way that "error" undoes.
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)


def _in_group(function: Callable[..., Any], rank: int, folder: str, args: tuple[object, ...]) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    try:
        torch.save(function(rank, *args), Path(folder, f"{rank}.pt"))
    finally:
        dist.destroy_process_group()
        torch.compiler.reset()
