"""SiTs and MMDiTs from checkpoints that somebody has, and one check of what such files say of themselves.

A SiT's file is this repository's, the SiT repository's or REPA's; its sizes are read off the shapes. What shapes do not
show (attention heads, whether the class table has a null row) comes from the settings that the file holds beside its
weights, or from the published sizes. What is said has to agree with the shapes.
"""

import argparse
import math
import os
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

import selftrans_reg as st
from common.mmdit import MMDiT
from common.options import Mistake
from common.sit import SIZES, SiT, published_sizes
from common.vae import Scaling, recorded_scaling

Family = Literal["SiT", "MMDiT"]

# Settings that a file of this repository's trainer holds, under the names of the model's arguments. Others name fewer.
_RECORDED: dict[Family, tuple[str, ...]] = {
    "SiT": ("input_size", "in_channels", "patch_size", "hidden_size", "depth", "num_heads", "num_classes",
            "learn_sigma", "qk_norm", "class_dropout_prob"),
    "MMDiT": ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "context_size"),
}  # fmt: skip
_FROM = {"SiT": "the SiT or REPA repository, or of sit_imagenet.py", "MMDiT": "mmdit_coco.py"}
_ALIASES = {"cfg_prob": "class_dropout_prob"}  # what REPA calls it
_PATHS = {"linear": "linear", "cosine": "cosine", "Linear": "linear", "GVP": "cosine"}  # ours and REPA's, then SiT's
_OUR_WORDS: dict[str, tuple[str, ...]] = {
    "family": ("SiT", "MMDiT"), "path": ("linear", "cosine"), "time": ("repa", "sit"),
}  # fmt: skip
_PREDICTIONS = ("v", "velocity")  # REPA's word and SiT's
_WRAPPERS = {"module", "_orig_mod"}  # of DDP and torch.compile, in a key
_IMAGENET_CLASSES = 1000
_NEEDED = ("x_embedder.proj.weight", "pos_embed", "y_embedder.embedding_table.weight", "final_layer.linear.weight",
           "blocks.0.mlp.fc1.weight")  # fmt: skip


class Conventions(NamedTuple):
    """How a model was trained: its time, "repa" (t = 1 is noise) or "sit" (t = 1 is data), and its path."""

    time: str
    path: str


class Checkpoint(NamedTuple):
    """What a checkpoint is and says, beside its weights.

    ``settings`` are the model's arguments, ``args`` those of the run that saved it, if the file has them; ``entry`` is
    what was taken, "ema" or "model", or None for a bare state dict; ``steps`` the training step, if the file names it.
    """

    source: str
    family: Family
    settings: dict[str, Any]
    entry: str | None
    steps: int | None
    args: dict[str, Any]

    def conventions(self, **known: Any) -> Conventions:
        """As `check_claims`, with the same keywords."""
        return check_claims(self.source, self.args, self.family, **known)


def check_claims(
    source: object, args: Mapping[str, Any], family: Family, *, said_time: str | None = None,
    said_path: str | None = None, option: str = "--time", time: str | None = None, path: str | None = None,
    scaling: Scaling | None = None, settings: Mapping[str, Any] | None = None,
) -> Conventions:  # fmt: skip
    """Compare what a checkpoint says of its model with what the user says and with what it is to be used for.

    To be called wherever a raw file enters: that its weights fit the shapes proves none of this. ``args`` are the
    settings that it holds, as from `saved_args`. ``said_time`` (by ``option``) and ``said_path`` are the user's words
    on its time, "repa" or "sit", and its path; ``time``, ``path``, the latents' ``scaling`` and the model's
    ``settings`` are those of the run that it is for, where they are fixed.

    Returns:
        The time and the path, from the file or from the user.
    """

    def refuse(if_: object, trained: str, advice: str) -> None:
        if if_:
            raise Mistake(f"{source} was trained {trained}.\n{advice}")

    # Other repositories' settings may have words of ours for something else: a folder's path, a job's time.
    ours = all(key in args for key in _RECORDED[family])
    stated = {key: args[key] for key, known in _OUR_WORDS.items() if key in args and (ours or args[key] in known)}
    names = [str(name)[:60] for name in (stated.get("family"), args.get("model")) if name not in (None, "demo")]
    others = ", ".join(repr(name) for name in names if not name.startswith(family))
    refuse(others, f"as a {others}, and is taken for a {family}", f"Pass one of {_FROM[family]}.")
    prediction = args.get("prediction", "velocity")
    here = f"to predict {prediction!r:.60}; a model of the velocity is needed here"
    refuse(prediction not in _PREDICTIONS, here, "Pass another checkpoint.")
    named = stated.get("path", args.get("path_type"))
    found_path = _PATHS.get(named) if isinstance(named, str) else None
    refuse(named is not None and found_path is None, f"on the path {named!r:.60}", f"Known: {', '.join(_PATHS)}.")
    refuse(_differ(found_path, said_path), f"on the {found_path} path", f"Found: --path {said_path}. Leave it out.")
    found_time = stated.get("time", "repa" if ours else None)
    here = f"in the convention {found_time!r}"
    refuse(_differ(found_time, said_time), here, f"Found: {option} {said_time}. Leave it out.")
    found = Conventions(found_time or said_time, found_path or said_path or path or "linear")
    if found.time is None:
        raise Mistake(
            f"{source} does not say what its training called t, and its weights do not show it.\n"
            f"Pass {option} repa if t = 1 was noise (REPA and its forks), or {option} sit if it was data (SiT's own "
            "files)."
        )
    advice = "Its weights predict the opposite velocity at every t: pass a checkpoint of the same convention."
    refuse(_differ(found.time, time), f"{_at_one(found.time)}; this run is {_at_one(time)}", advice)
    here = f"on the {found.path} path; this run is on the {path} path"
    refuse(_differ(found.path, path), here, "Pass one of the same path.")
    found_scaling = recorded_scaling(args, source)
    unlike = None not in (scaling, found_scaling) and not found_scaling.equals(scaling)
    here = f"on latents of {found_scaling}; here they have {scaling}"
    refuse(unlike, here, "Pass a checkpoint that was trained on the same latents.")
    own = {**(settings or {}), "class_dropout_prob": None}  # how often labels are dropped is each run's own business
    claims = _claims(args, family, source).items()
    differences = [f"{key}: {value} there, {own[key]} here" for key, value in claims if _differ(own.get(key), value)]
    if differences:
        raise Mistake(
            f"{source} holds another {family} than this run's.\nFound: {'; '.join(differences)}.\n"
            "Build the model with the settings of the run that saved it."
        )
    return found


def _differ(one: Any, other: Any) -> bool:
    return None not in (one, other) and one != other


def _at_one(time: str | None) -> str:
    return f"with the time of {time!r} (t = 1 is {'data' if time == 'sit' else 'noise'})"


def saved_args(content: Mapping[str, Any], source: object) -> dict[str, Any]:
    """The settings that a checkpoint holds under ``args``; empty if there are none."""
    args = content.get("args", {})
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    if not isinstance(args, dict):
        kind = type(args).__name__
        raise Mistake(f"{source} has under 'args' a {kind}, no settings: save it anew without that entry.")
    return args


def sit_from_checkpoint(
    path: str | os.PathLike[str], *, weights: Literal["ema", "model"] = "ema"
) -> tuple[SiT, Checkpoint]:
    """Build the SiT that a checkpoint's weights fit, and load them strictly; no code of the file runs.

    Args:
        path: A file of this repository's trainer, of REPA or of the SiT repository, or any that `load_weights` reads.
        weights: Which entry to take; a bare state dict is taken for either.

    Returns:
        The model on the CPU, float32, frozen and in eval mode; and what the file says.
    """
    content = st.read_checkpoint(path)
    args, saved = saved_args(content, path), _weights_in(content, weights, path)
    settings = _settled(_sizes(saved, path), _claims(args, "SiT", path), path)
    return _loaded(SiT, "SiT", settings, content, saved, weights, path, args)


def mmdit_from_checkpoint(
    path: str | os.PathLike[str], *, weights: Literal["ema", "model"] = "ema"
) -> tuple[MMDiT, Checkpoint]:
    """Build the MMDiT of a checkpoint of `mmdit_coco.py`, with the sizes that it records; as `sit_from_checkpoint`."""
    content = st.read_checkpoint(path)
    args, saved = saved_args(content, path), _weights_in(content, weights, path)
    check_claims(path, args, "MMDiT", time="repa", path="linear", said_time=None if args.get("time") else "repa")
    settings = {name: args.get(name) for name in _RECORDED["MMDiT"]}
    depth = len({key.split(".")[1] for key in saved if key.startswith("joint_blocks.")})
    if not all(type(size) is int and size > 0 for size in settings.values()) or settings["depth"] != depth:
        sizes = ", ".join(f"{name}={value!r}"[:60] for name, value in settings.items())
        raise Mistake(
            f"{path} does not say what MMDiT it holds, or holds none.\nFound: {sizes}; {depth} joint blocks among its "
            f"weights.\nPass a checkpoint of {_FROM['MMDiT']}."
        )
    return _loaded(MMDiT, "MMDiT", settings, content, saved, weights, path, args)


def _weights_in(content: Mapping[str, Any], weights: str, path: object) -> dict[str, Tensor]:
    """The tensors of the asked entry, or of a bare state dict, by keys without wrappers' prefixes."""
    entries = {name: content[name] for name in ("ema", "model", "state_dict") if isinstance(content.get(name), Mapping)}
    wanted = entries.get(weights, entries.get("state_dict") if weights == "model" else None)
    if entries and wanted is None:
        raise Mistake(f"{path} has no {weights!r} weights.\nFound: {', '.join(entries)}. Take these with --weights.")
    chosen = content if wanted is None else wanted
    return {
        ".".join(part for part in str(key).split(".") if part not in _WRAPPERS): value
        for key, value in chosen.items()
        if isinstance(value, Tensor) and not str(key).startswith("projectors")  # heads have no say in the sizes
    }


def _loaded(
    kind: type[Any], family: Family, settings: dict[str, Any], content: Mapping[str, Any], saved: Mapping[str, Tensor],
    weights: Literal["ema", "model"], path: str | os.PathLike[str], args: dict[str, Any],
) -> tuple[Any, Checkpoint]:  # fmt: skip
    # Sizes are compared before anything is allocated: what a small file describes can be large.
    with torch.device("meta"):
        model: nn.Module = kind(**settings)
    described, there = (sum(t.numel() for t in tensors.values()) for tensors in (model.state_dict(), saved))
    if described > 2 * there:
        raise Mistake(f"{path} is damaged: it describes a {family} of {described:,} weights, and holds {there:,}.")
    report = st.load_weights(model.to_empty(device="cpu"), content, weights=weights)
    found = Checkpoint(os.fspath(path), family, settings, report.entry, report.step, args)
    return model.eval().requires_grad_(False), found


def _claims(args: Mapping[str, Any], family: Family, source: object) -> dict[str, Any]:
    """What a run's settings say about the model's sizes, under the names of its arguments."""
    named = {_ALIASES.get(name, name): value for name, value in args.items()}
    claims = {name: named[name] for name in _RECORDED[family] if name in named}
    odd = [f"{name}: {value!r}"[:100] for name, value in claims.items() if not isinstance(value, int | float)]
    odd += [f"num_heads: {claims['num_heads']}"] if not odd and claims.get("num_heads", 1) < 1 else []
    if odd:
        raise Mistake(f"{source} has settings that no {family} can have.\nFound: {'; '.join(odd)}.")
    try:
        return (published_sizes(str(args.get("model"))) if family == "SiT" else {}) | claims
    except Mistake:  # a size of one's own
        return claims


def _sizes(saved: Mapping[str, Tensor], source: object) -> dict[str, Any]:
    """SiT's arguments as far as the shapes of its weights show them, and ``rows``, those of the class table."""
    missing = [key for key in _NEEDED if key not in saved]
    if missing:
        raise Mistake(
            f"{source} holds no SiT: it has no {', '.join(missing)}.\n"
            f"Found: {', '.join(map(repr, list(saved)[:5])) or 'no tensor'}.\nPass a checkpoint of {_FROM['SiT']}."
        )
    norm = saved.get("blocks.0.attn.q_norm.weight")
    try:
        (hidden_size, in_channels, patch_size, _), (_, tokens, _), (rows, _), (channels, _), (mlp, _) = (
            saved[key].shape for key in _NEEDED
        )
        side, outputs = math.isqrt(tokens), channels / (patch_size**2 * in_channels)
        heads = 1 if norm is None else hidden_size / norm.numel()
        if side**2 != tokens or outputs not in (1, 2) or heads not in range(1, hidden_size + 1):
            raise ValueError  # noqa: TRY301
    except (ValueError, ZeroDivisionError) as error:
        shapes = "; ".join(f"{key} {tuple(saved[key].shape)}" for key in _NEEDED)
        message = f"{source} holds no SiT on square latents: the shapes do not go together.\nFound: {shapes}."
        raise Mistake(message) from error
    return {
        "input_size": side * patch_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "hidden_size": hidden_size,
        "depth": len({key.split(".")[1] for key in saved if key.startswith("blocks.")}),
        "mlp_ratio": mlp / hidden_size,
        "learn_sigma": outputs == 2,
        "qk_norm": norm is not None,
        "rows": rows,
        **({} if norm is None else {"num_heads": int(heads)}),
    }


def _settled(sizes: dict[str, Any], said: Mapping[str, Any], source: object) -> dict[str, Any]:
    """SiT's arguments from the shapes and, where they do not show it, from what is said; all has to agree."""
    different = [f"{k}: {sizes[k]} there, {value} said" for k, value in said.items() if _differ(sizes.get(k), value)]
    if different:
        raise Mistake(f"{source} holds another model than its own settings say.\nFound: {'; '.join(different)}.")
    known = {**said, **sizes}
    rows = known.pop("rows")
    published = {(depth, width): heads for depth, width, heads in SIZES.values()}
    known.setdefault("num_heads", published.get((known["depth"], known["hidden_size"])))
    known.setdefault("num_classes", _IMAGENET_CLASSES if rows - _IMAGENET_CLASSES in (0, 1) else None)
    for name, found in (
        ("num_heads", f"depth {known['depth']} and hidden_size {known['hidden_size']}, no published size"),
        ("num_classes", f"a class table of {rows} rows, whose last may be the null class"),
    ):
        if known[name] is None:
            raise Mistake(
                f"{source} does not say its {name}, and its shapes do not show it.\nFound: {found}.\n"
                f"Save it anew with the {name} of its training in a dictionary under 'args', beside its weights."
            )
    known.setdefault("class_dropout_prob", 0.1 if rows - known["num_classes"] else 0.0)
    if rows != known["num_classes"] + (known["class_dropout_prob"] > 0):
        raise Mistake(
            f"{source} has a class table that does not fit what is said of its classes.\n"
            f"Found: {rows} rows; num_classes={known['num_classes']}, label dropout {known['class_dropout_prob']}.\n"
            "One row a class is needed, and one more, for the null class, where labels are dropped."
        )
    return known
