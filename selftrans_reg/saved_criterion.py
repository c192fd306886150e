"""A criterion to its saved artefact and back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .artefacts import (
    CRITERION_FIELDS,
    ask,
    criterion_card,
    fitting,
    read_artefact,
    restored_settings,
    shared_settings,
    write_artefact,
)
from .criterion import SelfTransLoss, fresh_observations, from_bits
from .errors import CheckpointError, SettingError, TeacherError
from .heads import ProjectionHead
from .health import Health
from .losses import VAEAlignmentLoss
from .modules import quoted
from .plateau import Plateau, PlateauRule
from .settings import schedule_state
from .teacher import CFGFeatureTeacher
from .time import TimeConvention
from .tokens import Select, Tokens


def save_criterion(criterion: SelfTransLoss, folder: Path, source: str | None, licence: str | None, name: str) -> None:
    """Write a criterion: its head, settings and counters, nothing of the model or the teacher."""
    projections = [_projection(head) for head in criterion.heads]
    vae = criterion.heads[0] if isinstance(criterion.heads[0], VAEAlignmentLoss) else None
    settings = {
        "stage": criterion.stage,
        "layers": list(criterion.layers),
        **shared_settings(criterion.spec, criterion.select, criterion.tokens, criterion.time),
        "hidden_sizes": [p.in_features for p in projections],
        "hidden_features": projections[0].hidden_features,
        "target_size": None if vae else projections[0].out_features,
        "latent_channels": vae.latent_channels if vae else None,
        "patch_size": list(vae.patch_size) if vae else None,
        "channel_axis": vae.channel_axis if vae else None,
        "target": criterion.target,
        "distance": criterion.distance,
        "weight": criterion.weight,
        "window": None if criterion.window is None else list(criterion.window),
        "gating": criterion.gating,
        "schedule": criterion.schedule,
        "stop_step": criterion.stop_step,
        "stop_when": None if criterion.stop_when is None else asdict(criterion.stop_when),
        "forward": criterion.which_forward,
        "check_interval": criterion.check_interval,
        "health_interval": criterion.health_interval,
        "teacher_chunk": criterion.teacher_chunk,
        "teacher_rows": criterion.teacher_rows,
        "source": source,
        "licence": licence,
    }
    state = criterion.state_dict()
    del state["settings_state"]  # the settings themselves are saved
    write_artefact(folder, "criterion", settings, state, CRITERION_FIELDS, lambda: criterion_card(settings, name))


def load_criterion(
    cls: type[SelfTransLoss],
    folder: Path,
    model: nn.Module,
    teacher: CFGFeatureTeacher | None,
    select: Select,
    tokens: Tokens,
    time: TimeConvention | None,
) -> SelfTransLoss:
    """Read a criterion and attach it to ``model``; nothing is attached unless everything fits."""
    config, state = read_artefact(folder, "criterion", CRITERION_FIELDS)
    where = f"The criterion in {str(folder)!r}"
    state = fresh_observations() | state
    _check_criterion(config, state, where)
    asked: list[str] = []
    settings = restored_settings(config, {"select": select, "tokens": tokens, "time": time}, asked, where)
    ask(asked, where)
    stage, stop, step = config["stage"], config["stop_step"], int(state["step"])
    if stage == 1 and teacher is not None:
        raise SettingError(f"{where} is one of stage 1, which has no teacher: leave teacher= out.")
    stopped = from_bits(state["plateau_state"])[0] >= 0
    if stage == 2 and teacher is None and not stopped and (stop is None or step + 1 < stop):
        raise TeacherError(f"{where} still needs its teacher (step {step}, stop_step {stop}): pass teacher=.")
    sizes = config["hidden_sizes"]
    same = ("hidden_features", "distance", "weight", "gating", "schedule", "stop_step", "call", "forward")
    settings |= {key: config[key] for key in (*same, "check_interval", "health_interval")}
    settings |= {
        "layer": config["layers"],
        "window": config["window"] and tuple(config["window"]),
        "stop_when": config["stop_when"] and Plateau(**config["stop_when"]),
        "hidden_size": sizes[0] if len(set(sizes)) == 1 else None,  # else they were read off the layers
    }
    with fitting(where, model):
        if stage == 1:
            settings |= {key: config[key] for key in ("latent_channels", "patch_size", "channel_axis", "target")}
            criterion = cls.stage1(model, **settings)
        else:
            settings |= {key: config[key] for key in ("target_size", "teacher_chunk", "teacher_rows")}
            criterion = cls.stage2(model, teacher=teacher, **settings)
    try:
        _check_widths(criterion, sizes, where)
        criterion.heads.to(_dtype_of_heads(state))
        criterion.load_state_dict(state)
    except BaseException:
        criterion.detach()
        raise
    return criterion


def _projection(head: nn.Module) -> ProjectionHead:
    projection = head.head if isinstance(head, VAEAlignmentLoss) else head
    if not isinstance(projection, ProjectionHead):
        raise CheckpointError(
            "Only a criterion made by stage1() or stage2() can be saved: this one has heads of its own."
        )
    return projection


def _check_widths(criterion: SelfTransLoss, saved: Sequence[int], where: str) -> None:
    found = [_projection(head).in_features for head in criterion.heads]
    if found != saved:
        raise CheckpointError(f"{where} was made for layers of widths {saved}; those of this model are {found}.")


def _check_criterion(config: Mapping[str, Any], state: Mapping[str, Tensor], where: str) -> None:
    """Refuse what contradicts itself, before anything is built at the sizes that it states.

    Raises:
        CheckpointError: If entries and tensors do not belong together.
    """
    vae = ("latent_channels", "patch_size", "channel_axis")
    needed, foreign = (vae, ("target_size",)) if config["stage"] == 1 else (("target_size",), vae)
    if any(config[key] is None for key in needed) or any(config[key] is not None for key in foreign):
        raise CheckpointError(
            f"{where} is broken: stage {config['stage']} has {quoted(needed)}, not {quoted(foreign)}."
        )
    if len(config["layers"]) != len(config["hidden_sizes"]):
        raise CheckpointError(
            f"{where} is broken: it has {len(config['layers'])} layers, but not as many hidden_sizes."
        )
    expected = _expected_shapes(config)
    found = {key: tuple(value.shape) for key, value in state.items()}
    if found != expected:
        wrong = sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
        listed = "\n  ".join(f"{k[:100]}: saved {found.get(k)}, expected {expected.get(k)}" for k in wrong[:8])
        raise CheckpointError(f"{where} is broken: its tensors are not those of its settings.\n  {listed}")
    heads = {key: value for key, value in state.items() if key.startswith("heads.")}
    if _dtype_of_heads(state) is None or not all(value.isfinite().all() for value in heads.values()):
        raise CheckpointError(f"{where} is broken: its heads are not finite numbers of one floating dtype.")
    kinds = {
        "step": torch.int64,
        "calls": torch.int64,
        **dict.fromkeys(("schedule_state", "health_state", "plateau_state"), torch.int64),
        "teacher_fingerprint": torch.uint8,
    }
    if any(state[key].dtype != dtype for key, dtype in kinds.items()) or state["step"] < -1 or state["calls"] < 0:
        raise CheckpointError(f"{where} is broken: its counters are not whole numbers from 0 on.")
    try:
        Health(None).load(from_bits(state["health_state"]))
        rule = PlateauRule(None)
        rule.load(from_bits(state["plateau_state"]))
    except (ValueError, OverflowError) as error:
        raise CheckpointError(f"{where} is broken: what its run observed is no numbers.") from error
    if rule.stopped_at is not None and config["stop_when"] is None:
        raise CheckpointError(f"{where} is broken: stop_when has stopped its run, and it has none.")
    if not torch.equal(
        state["schedule_state"], schedule_state(config["schedule"], config["weight"], config["stop_step"])
    ):
        raise CheckpointError(f"{where} is broken: schedule, weight and stop_step are not those of its tensors.")


def _expected_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The state dict's shapes, as :class:`SelfTransLoss`, its heads and counters have them."""
    shapes: dict[str, tuple[int, ...]] = {"step": (), "calls": (), "schedule_state": (3,), "teacher_fingerprint": (32,)}
    shapes |= {name: tuple(value.shape) for name, value in fresh_observations().items()}
    inner = config["hidden_features"]
    for index, width in enumerate(config["hidden_sizes"]):
        head, out = f"heads.{index}", config["target_size"]
        if config["stage"] == 1:
            values = math.prod(config["patch_size"]) * config["latent_channels"]
            shapes |= {f"{head}.linear.weight": (values, width), f"{head}.linear.bias": (values,)}
            head, out = f"{head}.head", width
        for layer, (rows, columns) in {0: (inner, width), 2: (inner, inner), 4: (out, inner)}.items():
            shapes |= {f"{head}.{layer}.weight": (rows, columns), f"{head}.{layer}.bias": (rows,)}
    return shapes


def _dtype_of_heads(state: Mapping[str, Tensor]) -> torch.dtype | None:
    """The one floating dtype of every head, if there is one."""
    dtypes = {value.dtype for key, value in state.items() if key.startswith("heads.")}
    return dtypes.pop() if len(dtypes) == 1 and all(dtype.is_floating_point for dtype in dtypes) else None
