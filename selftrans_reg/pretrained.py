"""Teacher and criterion to saved artefacts and back.

What JSON can hold is saved. Functions are not: their names are, and loading asks for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from .artefacts import read_artefact, strip, write_artefact
from .calls import CallSpec
from .cards import criterion_card, teacher_card
from .checkpoints import check_fit, check_values, own_tensors
from .criterion import SelfTransLoss
from .errors import ArtefactError, CheckpointError, SelfTransError, SettingError, TeacherError, TimeConventionError
from .fields import CRITERION_FIELDS, TEACHER_FIELDS, is_text, is_unsaved
from .fingerprints import architecture
from .heads import ProjectionHead
from .losses import VAEAlignmentLoss
from .names import quoted, unwrap
from .schedules import schedule_state
from .teacher import CFGFeatureTeacher, Null, check_settings
from .time import TimeConvention
from .tokens import Select, Tokens
from .truncate import drop, dropped_names

_NULL_PREFIX = "null_condition."  # of the keys of the null condition's tensors


class Details(TypedDict, total=False):
    """What a teacher cannot know of itself; :meth:`CFGFeatureTeacher.save_pretrained` describes each."""

    source: str | None
    step: int | None
    latent_scale: float | None
    latent_shape: Sequence[int] | None
    licence: str | None


# --- Teacher ---------------------------------------------------------------------------------------------------------


def save_teacher(teacher: CFGFeatureTeacher, folder: Path, details: Details, name: str) -> None:
    """Write a teacher; ``name`` is what its card calls it."""
    weights = strip(teacher.model)
    first: dict[object, str] = {}  # of tied weights one is saved: loading ties them as the model does
    tensors = {key: value for key, value in weights.items() if first.setdefault(_identity(value), key) == key}
    if taken := [key for key in tensors if key.startswith(_NULL_PREFIX)]:
        raise ArtefactError(f"The model has weights under {taken[0]!r}, a name kept for the null condition: rename it.")
    null: list[dict[str, Any]] = []
    for index, (path, value) in enumerate(_leaves(teacher.null)):
        key = f"{_NULL_PREFIX}{index}"
        if isinstance(value, Tensor):
            tensors[key] = teacher.get_buffer(f"null_{index}")
            null.append({"path": list(path), "tensor": key})
        else:
            plain = isinstance(value, bool | int | float)
            null.append({"path": list(path), **({"value": value} if plain else _unsaved(value))})
    known: dict[str, Any] = dict.fromkeys(Details.__annotations__)
    known |= teacher.provenance | {key: value for key, value in details.items() if value is not None}
    if isinstance(known["latent_shape"], Sequence):
        known["latent_shape"] = list(known["latent_shape"])
    settings = {
        "layer": teacher.layer,
        "guidance_scale": teacher.guidance_scale,
        "null": null,
        **_shared_settings(teacher.spec, teacher.select, teacher.tokens, teacher.time),
        "hidden_size": teacher.hidden_size,
        "dropped": dropped_names(teacher.model),
        "backbone": {"class": type(unwrap(teacher.model)).__name__, "fingerprint": teacher.architecture},
        "fingerprint": bytes(teacher.fingerprint.tolist()).hex(),
        **known,
    }
    write_artefact(folder, "teacher", settings, tensors, TEACHER_FIELDS, lambda: teacher_card(settings, name))


def load_teacher(
    cls: type[CFGFeatureTeacher],
    folder: Path,
    model: nn.Module | Callable[[], nn.Module],
    null: Null | None,
    select: Select,
    tokens: Tokens,
    time: TimeConvention | None,
    compile: bool,  # noqa: A002
) -> CFGFeatureTeacher:
    """Read a teacher into ``model``, or into what it makes; nothing of it is touched unless everything fits."""
    config, saved = read_artefact(folder, "teacher", TEACHER_FIELDS)
    where = f"The teacher in {str(folder)!r}"
    asked: list[str] = []
    settings = _restored_settings(config, {"select": select, "tokens": tokens, "time": time}, asked, where)
    condition = _restored_null(config["null"], saved, null, asked, where)
    _ask(asked, where)
    dropped: list[str] = config["dropped"]
    if cut := [name for name in (config["layer"], *saved) if any(_is_in(name, gone) for gone in dropped)]:
        raise ArtefactError(f"{where} contradicts itself: it needs {cut[0][:100]!r}, which it says was dropped.")

    made = model if isinstance(model, nn.Module) else model()
    if not isinstance(made, nn.Module):
        raise SettingError(f"model= takes a model, or a function that makes one; it made {type(made).__name__}.")
    same = architecture(made) == config["backbone"]["fingerprint"]
    origin = f"It was saved from {config['backbone']['class']}, of {'the same' if same else 'other'} keys and shapes."
    with _fitting(where, made, origin):
        own = {k: v for k, v in own_tensors(made).items() if not any(_is_in(k, gone) for gone in dropped)}
        check_fit(made, own, saved, where)
        check_values(own, saved, where)
        check_settings(
            made, layer=config["layer"], guidance_scale=config["guidance_scale"], null=condition, call=config["call"]
        )
    drop(made, dropped)
    _assign(made, saved)
    with _fitting(where, made, origin):
        teacher = cls(
            made,
            layer=config["layer"],
            guidance_scale=config["guidance_scale"],
            null=condition,
            call=config["call"],
            hidden_size=config["hidden_size"],
            compile=compile,
            **settings,
        )
    teacher.fingerprint = torch.tensor(list(bytes.fromhex(config["fingerprint"])), dtype=torch.uint8)
    teacher.architecture = config["backbone"]["fingerprint"]
    teacher.provenance = {key: config[key] for key in Details.__annotations__ if config[key] is not None}
    return teacher


def _assign(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Give the model the saved weights in the dtypes in which they were saved, so that it computes the same."""
    dtypes = {value.dtype for value in saved.values() if value.is_floating_point()}
    if len(dtypes) == 1:
        model.to(dtypes.pop())  # for what is in no state dict, such as a table of positions
    own = own_tensors(model)
    for key, value in saved.items():
        own[key].data = value.to(own[key].device, copy=True)


def _restored_null(
    entries: Sequence[Mapping[str, Any]],
    tensors: dict[str, Tensor],
    given: Null | None,
    asked: list[str],
    where: str,
) -> dict[str, Any]:
    """The null condition, nested as it was; its tensors are taken out of ``tensors``."""
    if given is not None and not isinstance(given, Mapping):
        raise SettingError(f"null= maps argument names to functions that could not be saved; got {given!r}.")
    extra = dict(_leaves(given or {}))
    null: dict[str, Any] = {}
    for entry in entries:
        *above, last = entry["path"]
        value = entry.get("value")
        if "tensor" in entry:
            if not entry["tensor"].startswith(_NULL_PREFIX) or entry["tensor"] not in tensors:
                raise ArtefactError(f"{where} lacks its null condition's tensor {entry['tensor'][:100]!r}.")
            value = tensors.pop(entry["tensor"]).clone()
        elif "unsaved" in entry:
            value = extra.pop((*above, last), None)
            if value is None:
                text = "..."
                for key in reversed(entry["path"]):
                    text = f"{{{key!r}: {text}}}"
                asked.append(f"null={text} (it was {entry['unsaved']!r})")
        level: Any = null
        for key in above:
            level = level.setdefault(key, {}) if isinstance(level, dict) else None
        if not isinstance(level, dict) or last in level:
            raise ArtefactError(f"{where} is broken: its null condition has {entry['path']} twice.")
        level[last] = value
    if extra:
        raise SettingError(f"{where} holds its null condition but for functions; null= also names {sorted(extra)}.")
    return null


# --- Criterion -------------------------------------------------------------------------------------------------------


def save_criterion(criterion: SelfTransLoss, folder: Path, source: str | None, licence: str | None, name: str) -> None:
    """Write a criterion: its head, settings and counters, nothing of the model or the teacher."""
    projections = [_projection(head) for head in criterion.heads]
    vae = criterion.heads[0] if isinstance(criterion.heads[0], VAEAlignmentLoss) else None
    settings = {
        "stage": criterion.stage,
        "layers": list(criterion.layers),
        **_shared_settings(criterion.spec, criterion.select, criterion.tokens, criterion.time),
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
        "forward": criterion.which_forward,
        "check_interval": criterion.check_interval,
        "teacher_chunk": criterion.teacher_chunk,
        "teacher_rows": criterion.teacher_rows,
        "source": source,
        "licence": licence,
    }
    state = criterion.state_dict()
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
    _check_criterion(config, state, where)
    asked: list[str] = []
    settings = _restored_settings(config, {"select": select, "tokens": tokens, "time": time}, asked, where)
    _ask(asked, where)
    stage, stop, step = config["stage"], config["stop_step"], int(state["step"])
    if stage == 1 and teacher is not None:
        raise SettingError(f"{where} is one of stage 1, which has no teacher: leave teacher= out.")
    if stage == 2 and teacher is None and (stop is None or step + 1 < stop):
        raise TeacherError(f"{where} still needs its teacher (step {step}, stop_step {stop}): pass teacher=.")
    sizes = config["hidden_sizes"]
    same = ("hidden_features", "distance", "weight", "gating", "schedule", "stop_step", "call", "forward")
    settings |= {key: config[key] for key in (*same, "check_interval")}
    settings |= {
        "layer": config["layers"],
        "window": config["window"] and tuple(config["window"]),
        "hidden_size": sizes[0] if len(set(sizes)) == 1 else None,  # else they were read off the layers
    }
    with _fitting(where, model):
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
        raise ArtefactError(
            "Only a criterion made by stage1() or stage2() can be saved: this one has heads of its own."
        )
    return projection


def _check_widths(criterion: SelfTransLoss, saved: Sequence[int], where: str) -> None:
    found = [_projection(head).in_features for head in criterion.heads]
    if found != saved:
        raise ArtefactError(f"{where} was made for layers of widths {saved}; those of this model are {found}.")


def _check_criterion(config: Mapping[str, Any], state: Mapping[str, Tensor], where: str) -> None:
    """Refuse what contradicts itself, before anything is built at the sizes that it states.

    Raises:
        ArtefactError: If entries and tensors do not belong together.
    """
    vae = ("latent_channels", "patch_size", "channel_axis")
    needed, foreign = (vae, ("target_size",)) if config["stage"] == 1 else (("target_size",), vae)
    if any(config[key] is None for key in needed) or any(config[key] is not None for key in foreign):
        raise ArtefactError(f"{where} is broken: stage {config['stage']} has {quoted(needed)}, not {quoted(foreign)}.")
    if len(config["layers"]) != len(config["hidden_sizes"]):
        raise ArtefactError(f"{where} is broken: it has {len(config['layers'])} layers, but not as many hidden_sizes.")
    expected = _expected_shapes(config)
    found = {key: tuple(value.shape) for key, value in state.items()}
    if found != expected:
        wrong = sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
        listed = "\n  ".join(f"{k[:100]}: saved {found.get(k)}, expected {expected.get(k)}" for k in wrong[:8])
        raise ArtefactError(f"{where} is broken: its tensors are not those of its settings.\n  {listed}")
    heads = {key: value for key, value in state.items() if key.startswith("heads.")}
    if _dtype_of_heads(state) is None or not all(value.isfinite().all() for value in heads.values()):
        raise ArtefactError(f"{where} is broken: its heads are not finite numbers of one floating dtype.")
    kinds = {
        "step": torch.int64,
        "calls": torch.int64,
        "schedule_state": torch.int64,
        "teacher_fingerprint": torch.uint8,
    }
    if any(state[key].dtype != dtype for key, dtype in kinds.items()) or state["step"] < -1 or state["calls"] < 0:
        raise ArtefactError(f"{where} is broken: its counters are not whole numbers from 0 on.")
    if not torch.equal(
        state["schedule_state"], schedule_state(config["schedule"], config["weight"], config["stop_step"])
    ):
        raise ArtefactError(f"{where} is broken: schedule, weight and stop_step are not those of its tensors.")


def _expected_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The state dict's shapes, as :class:`SelfTransLoss`, its heads and counters have them."""
    shapes: dict[str, tuple[int, ...]] = {"step": (), "calls": (), "schedule_state": (3,), "teacher_fingerprint": (32,)}
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


# --- Shared ----------------------------------------------------------------------------------------------------------


def _shared_settings(spec: CallSpec, select: Select, tokens: Tokens, time: TimeConvention | None) -> dict[str, Any]:
    call = {"x": spec.x, "t": spec.t, "shared": sorted(spec.shared), "fixed": spec.fixed}
    cut = {"slice": [tokens.start, tokens.stop, tokens.step]} if isinstance(tokens, slice) else None
    return {
        "call": call,
        "select": _unsaved(select) if callable(select) else select,
        "tokens": _unsaved(tokens) if callable(tokens) else cut,
        "time": time.name if time and time.is_named else time and {"unsaved": time.name},
    }


def _unsaved(function: object) -> dict[str, str]:
    """What stands for a function: its name, for whoever has to find it again."""
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return {"unsaved": name if is_text(name) else "a function"}


def _restored_settings(
    config: Mapping[str, Any], given: Mapping[str, Any], asked: list[str], where: str
) -> dict[str, Any]:
    """``select``, ``tokens`` and ``time``: as saved, or as given where they could not be saved."""
    settings: dict[str, Any] = {}
    for name, value in given.items():
        saved = config[name]
        if is_unsaved(saved):
            if value is None:
                asked.append(f"{name}=... (it was {saved['unsaved']!r})")
            elif isinstance(value, TimeConvention) and value.name != saved["unsaved"]:
                raise SettingError(f"{where} was saved with another time convention: {saved['unsaved']!r}.")
            settings[name] = value
            continue
        settings[name] = slice(*saved["slice"]) if isinstance(saved, dict) else saved
        if value is not None and value != settings[name]:
            raise SettingError(f"{where} was saved with {name}={settings[name]!r}, which is kept: leave {name}= out.")
    return settings


def _ask(asked: Sequence[str], where: str) -> None:
    if asked:
        raise ArtefactError(f"{where} was saved with functions, which no file can hold. Pass them: {'; '.join(asked)}.")


def _leaves(null: Mapping[Any, Any], above: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every value of a null condition with its path, in the order in which the teacher numbers them."""
    for key, value in null.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*above, key))
        else:
            yield (*above, key), value


def _is_in(key: str, module: str) -> bool:
    return key == module or key.startswith(f"{module}.")


def _identity(value: Tensor) -> object:
    """The same for the same tensor under another key."""
    return (value.data_ptr(), value.shape, value.stride()) if value.numel() else id(value)


@contextmanager
def _fitting(where: str, model: nn.Module, origin: str = "") -> Iterator[None]:
    """Say that an artefact does not fit, and ``origin``, where a model refuses its settings or weights."""
    try:
        yield
    except (ArtefactError, TeacherError, TimeConventionError):
        raise
    except CheckpointError as error:  # which says so already
        raise ArtefactError(f"{error}\n{origin}") from error
    except SelfTransError as error:
        name = type(unwrap(model)).__name__
        raise ArtefactError(f"{where} does not fit {name}; nothing was loaded.\n{error}\n{origin}".rstrip()) from error
