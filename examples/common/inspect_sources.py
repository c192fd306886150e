"""What `inspect_features.py` can look into: the examples' checkpoints, and a user's model by the name of a function."""

import argparse
import contextlib
import importlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import quickstart
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from common.coco_features import CocoFeatures
from common.data import digits
from common.demo_latents import MemoryLatents, demo_latents
from common.latents import LatentFolder, open_latents
from common.load_mmdit import mmdit_from_checkpoint
from common.load_sit import SiTCheckpoint, sit_from_checkpoint
from common.sit_conventions import path_of, time_of
from common.vae import decode, encode_moments, load_vae
from selftrans_reg.checkpoints import load_weights, read_checkpoint
from selftrans_reg.errors import SettingError

_SIT_TIMES = {
    ("repa", "linear"): "repa",
    ("repa", "cosine"): "repa-cosine",
    ("sit", "linear"): "sit",
    ("sit", "cosine"): "sit-gvp",
}


class Subject(NamedTuple):
    """A model with all that it takes to measure it.

    Attributes:
        title: What it is, for the page.
        model: On the device, in eval mode.
        batches: Makes the batches, ``(latents, *condition)`` or mappings.
        measured: How `layer_report` and `draw_features` are to call it: time, null, select, tokens.
        decode: From latents to images, if there is a VAE.
        log: Of its training, as `draw_curves` takes it, if there is one.
    """

    title: str
    model: nn.Module
    batches: Callable[[], Iterable[Any]]
    measured: dict[str, Any]
    decode: Callable[[Tensor], Tensor] | None = None
    log: Any = None


def open_subject(run: argparse.Namespace) -> Subject:
    """The model of a checkpoint with its data, by what the options and the file say.

    Raises:
        SettingError: If the data or the time convention is not known, or an option is of no use.
        CheckpointError: If the file is unsafe or broken, or holds no model of the examples.
    """
    if not run.checkpoint.is_file():
        raise SettingError(f"There is no file {run.checkpoint}. Name a checkpoint, or a run's folder.")
    if run.model is not None:
        return _of_user(run)
    foreign = [name for name in ("null", "select", "tokens") if getattr(run, name) is not None]
    if foreign:
        raise SettingError(f"--{foreign[0]} goes with --model; the examples' checkpoints say it themselves.")
    if _is_quickstart(run.checkpoint.parent):
        return _of_quickstart(run)
    args = read_checkpoint(run.checkpoint).get("args")
    return _of_mmdit(run) if isinstance(args, dict) and "context_size" in args else _of_sit(run)


def imported(name: str) -> Any:
    """What ``module:attribute`` names; modules of the working directory are found too.

    Raises:
        SettingError: If there is no such thing.
    """
    module, _, attribute = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise SettingError(f"{name!r} is no module:function that can be imported: {error}.") from error
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(Path.cwd()))
    if not callable(found):
        raise SettingError(f"{name!r} names {type(found).__name__}, not a function.")
    return found


def _of_user(run: argparse.Namespace) -> Subject:
    missing = [f"--{name}" for name in ("data", "time") if getattr(run, name) is None]
    if missing:
        raise SettingError(f"With --model, {' and '.join(missing)} must be given too.")
    model = imported(run.model)()
    if not isinstance(model, nn.Module):
        raise SettingError(f"{run.model} must return the model; it returned {type(model).__name__}.")
    load_weights(model, run.checkpoint, weights=run.weights)
    measured = {"time": run.time, "null": _null(run.null or []), "select": run.select, "tokens": run.tokens}
    return Subject(
        f"{type(model).__name__} of {run.checkpoint.name}",
        model.to(run.device).eval(),
        imported(run.data),
        measured,
        None if run.vae is None else _decoder(load_vae(run.vae), None, run.device),
        run.log,
    )


def _null(given: list[str]) -> Mapping[str, Any] | None:
    """The null condition of ``y=1000`` and the like, or what a function returns; None without."""
    if len(given) == 1 and ":" in given[0]:
        null: Mapping[str, Any] = imported(given[0])()
        return null
    try:
        pairs = [entry.split("=") for entry in given]
        return {name: int(value) if value.isdecimal() else float(value) for name, value in pairs} or None
    except ValueError as error:
        raise SettingError(f"--null is name=number, or one module:function; got {given}.") from error


def _is_quickstart(folder: Path) -> bool:
    path = folder / "settings.json"
    return path.is_file() and "classifier_steps" in json.loads(path.read_text()) and (folder / "vae").is_dir()


def _of_quickstart(run: argparse.Namespace) -> Subject:
    """A run of `quickstart.py` on all digits; the curves are those of its three runs."""
    folder = run.checkpoint.parent
    settings = argparse.Namespace(**json.loads((folder / "settings.json").read_text()), device=run.device)
    model = quickstart.new_sit(settings)
    load_weights(model, run.checkpoint, weights=run.weights)
    vae = load_vae(folder / "vae").to(run.device)
    images, labels = (torch.cat(parts) for parts in zip(*digits(quickstart.IMAGE_SIZE), strict=True))
    mean, std = encode_moments(vae, images)
    scale = vae.config.scaling_factor
    data = MemoryLatents(mean, std, labels, num_classes=quickstart.NUM_DIGIT_CLASSES, scale=scale, vae=None)
    runs = {name: folder / f"{way}.pt" for way, name in quickstart.WAYS.items()}
    return Subject(
        f"{run.checkpoint.stem} of {folder.name}",
        model.eval(),
        lambda: _batches(data, run),
        {"time": quickstart.TIME, "null": {"y": quickstart.NUM_DIGIT_CLASSES}},
        _decoder(vae, scale, run.device),
        run.log or {name: read_checkpoint(path)["log"] for name, path in runs.items() if path.exists()},
    )


def _of_sit(run: argparse.Namespace) -> Subject:
    """A SiT: of `sit_imagenet.py`, of REPA or of the SiT repository."""
    model, found = sit_from_checkpoint(run.checkpoint, weights=run.weights)
    data = _sit_data(run, found)
    classes = found.settings["num_classes"]
    return Subject(
        f"{found.args.get('model', 'SiT')} of {run.checkpoint}",
        model.to(run.device),
        lambda: _batches(data, run),
        {
            "time": _SIT_TIMES[time_of(run, found), path_of(run, found)],
            "null": {"y": classes} if found.settings["class_dropout_prob"] else None,
        },
        _decoder_named(run, found.args.get("vae"), data.scale),
        run.log or _log_beside(run.checkpoint),
    )


def _sit_data(run: argparse.Namespace, found: SiTCheckpoint) -> LatentFolder | MemoryLatents:
    name = run.data or found.args.get("data")
    if name == "demo":
        vae = Path(found.args.get("demo_vae") or "")
        if not vae.is_dir():
            raise SettingError(f"The demo's VAE is not at {vae}. Start this where the run was started.")
        return demo_latents(vae, vae_steps=found.args["demo_vae_steps"], device="cpu")[0]
    if name is None or name == "random":
        raise SettingError(f"{run.checkpoint} does not name the latents that it was trained on: pass --data FOLDER.")
    return open_latents(Path(name), num_classes=found.settings["num_classes"])


def _of_mmdit(run: argparse.Namespace) -> Subject:
    """An MMDiT of `mmdit_coco.py`: captions are no labels, so what needs labels is not measured."""
    model, found = mmdit_from_checkpoint(run.checkpoint, weights=run.weights)
    folder = run.data or found.args.get("demo_data") or found.args.get("data")
    data = CocoFeatures(Path(folder), dropout=0.0, second=found.args.get("moments", "std"))
    return Subject(
        f"MMDiT of {run.checkpoint}",
        model.to(run.device),
        lambda: _batches(data, run),
        {"time": "repa", "null": {"context": data.empty}, "select": 1},
        _decoder_named(run, found.args.get("vae"), data.scale),
        run.log or _log_beside(run.checkpoint),
    )


def _batches(data: Dataset[Any], run: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor]]:
    """Latents as the model sees them, drawn from their posteriors, and conditions: as many at random as are wanted."""
    generator = torch.Generator().manual_seed(run.seed)
    order = torch.randperm(len(data), generator=generator)[: run.samples]
    for mean, std, condition in DataLoader(Subset(data, order.tolist()), run.batch_size):
        yield data.scale * (mean + std * torch.randn(mean.shape, generator=generator)), condition


def _decoder_named(run: argparse.Namespace, recorded: str | None, scale: float) -> Callable[[Tensor], Tensor] | None:
    """Of the VAE that is given, or of the run's own if that is a folder within reach."""
    # A run names its VAE from where it was started, or from its folder.
    places = [Path(recorded), run.checkpoint.parent.parent / recorded] if recorded else []
    name = run.vae or next((place for place in places if place.is_dir()), None)
    return None if name is None else _decoder(load_vae(name), scale, run.device)


def _decoder(vae: AutoencoderKL, scale: float | None, device: str) -> Callable[[Tensor], Tensor]:
    """Latents to images, grey ones as ink on paper; ``scale`` is the latents' own, by default the VAE's."""
    vae.to(device).register_to_config(scaling_factor=scale or vae.config.scaling_factor)
    sign = -1 if vae.config.out_channels == 1 else 1
    return lambda latents: sign * decode(vae, latents)


def _log_beside(checkpoint: Path) -> Path | None:
    path = checkpoint.parent.parent / "log.jsonl"
    return path if path.is_file() else None
