"""A SiT from a checkpoint that somebody has: ours, the SiT repository's or REPA's; its sizes are read off the shapes.

What shapes do not show (attention heads, whether the class table has a null row) comes from the settings that the file
holds beside its weights, from the published sizes, or from the caller. What is said has to agree with the shapes.
"""

import argparse
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from common.checkpointing import saved_checkpoints
from common.sit import SIZES, SiT, published_sizes
from selftrans_reg.checkpoints import check_fit, choose_entry, load_weights, plain_keys, read_checkpoint
from selftrans_reg.errors import CheckpointError
from selftrans_reg.modules import some_of

# Settings that a file of this repository's trainer holds, under the names of SiT's arguments. Others name fewer.
_RECORDED = (
    "input_size", "in_channels", "patch_size", "hidden_size", "depth", "num_heads", "num_classes", "learn_sigma",
    "qk_norm", "class_dropout_prob",
)  # fmt: skip
_ALIASES = {"cfg_prob": "class_dropout_prob"}  # what REPA calls it
_PATHS = {"linear": "linear", "cosine": "cosine", "Linear": "linear", "GVP": "cosine"}  # ours and REPA's, then SiT's
_PREDICTIONS = ("v", "velocity")  # REPA's word and SiT's
_IMAGENET_CLASSES = 1000
_NEEDED = ("x_embedder.proj.weight", "pos_embed", "y_embedder.embedding_table.weight", "final_layer.linear.weight",
           "blocks.0.mlp.fc1.weight")  # fmt: skip


class SiTCheckpoint(NamedTuple):
    """What a checkpoint is and says, beside its weights.

    Attributes:
        settings: The arguments of `SiT` with which the model was built.
        entry: The entry that was taken, ``"ema"`` or ``"model"``, or None for a bare state dict.
        left_out: Keys of projection heads, which are no part of the model.
        steps: The training step, if the file names it.
        args: The settings of the run that saved it; empty if the file has none.
        time: ``"repa"`` for a file of this repository's trainer; None for others, in which nothing says it.
        path: "linear" or "cosine", or None where the file does not say.
    """

    settings: dict[str, Any]
    entry: str | None
    left_out: tuple[str, ...]
    steps: int | None
    args: dict[str, Any]
    time: Literal["repa"] | None
    path: str | None


def sit_from_checkpoint(
    path: str | os.PathLike[str],
    *,
    weights: Literal["ema", "model"] = "ema",
    model: str | None = None,
    num_heads: int | None = None,
    num_classes: int | None = None,
) -> tuple[SiT, SiTCheckpoint]:
    """Build the SiT that a checkpoint's weights fit, and load them strictly; no code of the file runs.

    Args:
        path: A file of this repository's trainer, of REPA or of the SiT repository, or any that `load_weights` reads.
        weights: Which entry to take; a bare state dict is taken for either.
        model: The published name that the weights are expected to have, as "SiT-B/2"; None to take what is there.
        num_heads: Needed only for a size that was not published, in a file that does not say it.
        num_classes: Needed only for a file that does not say it and has neither 1,000 classes nor 1,001 rows.

    Returns:
        The model on the CPU, float32, frozen and in eval mode; and what the file says.

    Raises:
        CheckpointError: If the file is unsafe or broken, holds no SiT, or another one than is said.
        SettingError: If there is no SiT named ``model``.
    """
    said: dict[str, dict[str, Any]] = {}
    if model is not None:
        said[f"model={model!r}"] = published_sizes(model)
    given = {"num_heads": num_heads, "num_classes": num_classes}
    said["the call"] = {name: value for name, value in given.items() if value is not None}

    content = read_checkpoint(path)
    where = os.fspath(path)
    _, chosen = choose_entry(content, weights, where)
    # Heads have no say in the sizes; which keys are heads of a known form is checked when the weights are loaded.
    saved = {key: value for key, value in plain_keys(chosen, where).items() if not key.startswith("projectors")}
    args = _saved_args(content, where)
    said["the record of its own run"] = _claims(args, where)
    settings = _settled(_sizes(saved, where), said, where)

    # Shapes are compared before anything is allocated: what a small file describes can be large.
    with torch.device("meta"):
        described = SiT(**settings)
    check_fit(described, dict(described.named_parameters()), saved, where)
    sit = described.to_empty(device="cpu")
    report = load_weights(sit, path, weights=weights)
    ours = all(name in args for name in _RECORDED)
    checkpoint = SiTCheckpoint(
        settings, report.entry, report.left_out, report.step, args, "repa" if ours else None, _path(args, where)
    )
    return sit.eval().requires_grad_(False), checkpoint


def checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoints of a run, by their steps: ``checkpoints/0050000.pt`` and so on, or the same in the folder itself.

    Raises:
        CheckpointError: If there is none.
    """
    inside = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    found = list(saved_checkpoints(inside).values())
    if not found:
        there = sorted(path.name for path in inside.iterdir()) if inside.is_dir() else []
        raise CheckpointError(
            f"There is no checkpoint of a run in {inside}.\nFound: {some_of(there)}.\n"
            "Its name is the number of steps, as 0050000.pt: pass another file by its path."
        )
    return found


def newest_checkpoint(path: Path) -> Path:
    """The file itself, or a run's checkpoint of the most steps.

    Raises:
        CheckpointError: If a folder holds none.
    """
    return path if path.is_file() else checkpoints_of(path)[-1]


def _saved_args(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    args = content.get("args", {})
    if isinstance(args, argparse.Namespace):
        return vars(args)
    if not isinstance(args, dict):
        raise CheckpointError(
            f"{where} has under 'args' a {type(args).__name__}; a run's settings are a dictionary or a Namespace.\n"
            "Save the checkpoint anew without that entry."
        )
    return args


def _claims(args: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a run's settings say about the model, under the names of SiT's arguments."""
    named = {_ALIASES.get(name, name): value for name, value in args.items()}
    claims = {name: named[name] for name in _RECORDED if name in named}
    odd = [f"{name}: {value!r}"[:100] for name, value in claims.items() if not isinstance(value, int | float)]
    odd += [f"num_heads: {claims['num_heads']}"] if not odd and claims.get("num_heads", 1) < 1 else []
    if odd:
        raise CheckpointError(
            f"{where} has settings that no SiT can have.\nFound: {'; '.join(odd)}.\n"
            "Correct the entry 'args' of the file, or leave it out."
        )
    try:
        return published_sizes(str(args.get("model"))) | claims
    except ValueError:  # a size of one's own
        return claims


def _path(args: Mapping[str, Any], where: str) -> str | None:
    prediction = args.get("prediction", "v")
    name = args.get("path", args.get("path_type"))
    if prediction not in _PREDICTIONS or not (name is None or name in _PATHS):
        raise CheckpointError(
            f"{where} was trained to predict {prediction!r} on the path {name!r}.\n"
            "Known: 'v' and 'velocity', on the paths 'linear' and 'cosine' ('Linear' and 'GVP' in SiT's files)."
        )
    return None if name is None else _PATHS[name]


def _sizes(saved: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """SiT's arguments as far as the shapes of its weights show them, and ``rows``, those of the class table."""
    missing = [key for key in _NEEDED if key not in saved]
    if missing:
        raise CheckpointError(
            f"{where} holds no SiT: it has no {', '.join(missing)}.\nFound: {some_of(list(saved))}.\n"
            "Pass a checkpoint of the SiT or REPA repository, or of examples/sit_imagenet.py."
        )
    kernel, positions, table, final, mlp = (tuple(saved[key].shape) for key in _NEEDED)
    depth = len({key.split(".")[1] for key in saved if key.startswith("blocks.")})
    qk_norm = "blocks.0.attn.q_norm.weight" in saved
    try:
        hidden_size, in_channels, patch_size, _ = kernel
        _, tokens, _ = positions
        rows, _ = table
        outputs = final[0] / (patch_size**2 * in_channels)
        mlp_ratio = mlp[0] / hidden_size
        heads = hidden_size / saved["blocks.0.attn.q_norm.weight"].numel() if qk_norm else 1
        sensible = outputs in (1, 2) and math.isqrt(tokens) ** 2 == tokens and heads in range(1, hidden_size + 1)
    except (ValueError, ZeroDivisionError, IndexError):
        sensible = False
    if not sensible:
        shapes = "; ".join(f"{key} {tuple(saved[key].shape)}" for key in _NEEDED)
        raise CheckpointError(
            f"{where} holds no SiT on square latents: the shapes do not go together.\nFound: {shapes}.\n"
            "Pass a checkpoint of the SiT or REPA repository, or of examples/sit_imagenet.py."
        )
    sizes = {
        "input_size": math.isqrt(tokens) * patch_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "hidden_size": hidden_size,
        "depth": depth,
        "mlp_ratio": mlp_ratio,
        "learn_sigma": outputs == 2,
        "qk_norm": qk_norm,
        "rows": rows,
    }
    return sizes | ({"num_heads": int(heads)} if qk_norm else {})


def _settled(sizes: dict[str, Any], said: Mapping[str, Mapping[str, Any]], where: str) -> dict[str, Any]:
    """SiT's arguments from the shapes and, where they do not show it, from what is said; all has to agree."""
    known = dict(sizes)
    for who, claims in said.items():
        differences = [
            f"{name}: {known[name]} there, {value} said"
            for name, value in claims.items()
            if known.setdefault(name, value) != value
        ]
        if differences:
            raise CheckpointError(
                f"{where} holds another model than {who} says.\nFound: {'; '.join(differences)}.\n"
                "Name the model that the file holds, or pass the file of the model that is meant."
            )
    rows = known.pop("rows")
    published = {(depth, width): heads for depth, width, heads in SIZES.values()}
    known.setdefault("num_heads", published.get((known["depth"], known["hidden_size"])))
    known.setdefault("num_classes", _IMAGENET_CLASSES if rows - _IMAGENET_CLASSES in (0, 1) else None)
    for name, found in (
        ("num_heads", f"depth {known['depth']} and hidden_size {known['hidden_size']}, no published size"),
        ("num_classes", f"a class table of {rows} rows, whose last may be the null class"),
    ):
        if known[name] is None:
            raise CheckpointError(
                f"{where} does not say its {name}, and its shapes do not show it.\nFound: {found}.\nPass {name}=, "
                f"or --{name.replace('_', '-')} of the examples."
            )
    known.setdefault("class_dropout_prob", 0.1 if rows - known["num_classes"] else 0.0)
    if rows != known["num_classes"] + (known["class_dropout_prob"] > 0):
        raise CheckpointError(
            f"{where} has a class table that does not fit what is said of its classes.\n"
            f"Found: {rows} rows; num_classes={known['num_classes']}, label dropout {known['class_dropout_prob']}.\n"
            "One row a class is needed, and one more, for the null class, where labels are dropped."
        )
    return known
