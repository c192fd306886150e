"""An MMDiT from a checkpoint of `mmdit_coco.py`, built with the sizes that the file records beside its weights."""

import os
from typing import Any, Literal, NamedTuple

import torch

from common.mmdit import MMDiT
from selftrans_reg.checkpoints import check_fit, choose_entry, load_weights, plain_keys, read_checkpoint
from selftrans_reg.errors import CheckpointError

_RECORDED = ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "context_size")


class MMDiTCheckpoint(NamedTuple):
    """What a checkpoint says beside its weights.

    Attributes:
        settings: The arguments of `MMDiT` with which the model was built.
        steps: The training step.
        args: The settings of the run that saved it.
    """

    settings: dict[str, int]
    steps: int | None
    args: dict[str, Any]


def mmdit_from_checkpoint(
    path: str | os.PathLike[str], *, weights: Literal["ema", "model"] = "ema"
) -> tuple[MMDiT, MMDiTCheckpoint]:
    """Build the MMDiT of a checkpoint and load its weights strictly; no code of the file runs.

    Args:
        path: A checkpoint of `mmdit_coco.py`.
        weights: Which entry to take.

    Returns:
        The model on the CPU, float32, frozen and in eval mode; and what the file says.

    Raises:
        CheckpointError: If the file is unsafe or broken, holds no MMDiT, or another one than it says.
    """
    where = os.fspath(path)
    content = read_checkpoint(path)
    _, chosen = choose_entry(content, weights, where)
    saved = plain_keys(chosen, where)
    args = content.get("args")
    settings = {name: args.get(name) if isinstance(args, dict) else None for name in _RECORDED}
    depth = len({key.split(".")[1] for key in saved if key.startswith("joint_blocks.")})
    if not all(type(size) is int and size > 0 for size in settings.values()) or settings["depth"] != depth:
        raise CheckpointError(
            f"{where} does not say what MMDiT it holds, or holds none.\n"
            f"Found: {', '.join(f'{name}={value!r}'[:60] for name, value in settings.items())}; "
            f"{depth} joint blocks among its weights.\nPass a checkpoint of examples/mmdit_coco.py."
        )
    # Shapes are compared before anything is allocated: what a small file describes can be large.
    with torch.device("meta"):
        described = MMDiT(**settings)
    check_fit(described, dict(described.state_dict(keep_vars=True)), saved, where)
    model = described.to_empty(device="cpu")
    report = load_weights(model, path, weights=weights)
    return model.eval().requires_grad_(False), MMDiTCheckpoint(settings, report.step, args)
