"""The frozen teacher: classifier-free-guided features of one layer, f_u + w (f_c − f_u)."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .artefacts import read_artefact
from .calls import Call, CallSpec, Rows, RowTensors, in_precision_of
from .checkpoints import wrapped_errors
from .errors import CallError, CheckpointError, SelfTransError, SettingError, ShapeError, TeacherError
from .hub import Details, Shareable, Source, fetch
from .modules import SHARED, Layout, find_layer, fingerprint, freeze, infer_width, quoted, sharded_parts, unwrap
from .null import PREFIX, Null, NullCondition, checked_indices, restored, unsaved
from .taps import EarlyExit
from .time import TimeConvention, resolve
from .tokens import Select, Tokens, as_tokens, check_choice
from .truncate import (
    Usage,
    blocks_of,
    compile_blocks,
    drop,
    drop_unused,
    dropped_names,
    pad_rows,
    pruned_error,
    touched_in,
)
from .weights import check_fit, check_values, load_weights, own_tensors

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

_LOGGER = logging.getLogger(__name__)
_SLICE = ("start", "stop", "step")
_PREPARING = threading.Lock()  # for all teachers: a stance is the whole process's, and taken when it is made


class CFGFeatureTeacher(Shareable, nn.Module):
    """A frozen model that gives the guided features of one layer.

    The model runs on the condition and on the null condition, as one doubled batch where their shapes agree and in two
    passes where they do not, and stops at its layer::

        f_g = f_u + guidance_scale · (f_c − f_u)

    so 1 is the conditional feature. The combination is computed in float32. The model runs without gradients, in eval
    mode whatever ``.train()`` says, under the autocast that is active. The first call takes a few forwards more: one
    goes on to its end, to see that the layer runs once, and one runs a single row, to see that rows can be taken from
    the call. What took no part is then dropped, and its memory is free.

    Made by :func:`build_teacher`, which describes the arguments.

    Shape:
        call: the model's own arguments; x_t (N, ...), t (N,)
        returns: (N, T, D), float32, no gradient
    """

    if TYPE_CHECKING:

        def __call__(self, *args: Any, **kwargs: Any) -> Tensor:  # nn.Module's returns Any
            """The guided features (N, T, D)."""

    def __init__(self, model: nn.Module, settings: Mapping[str, Any], compile: bool, truncate: bool) -> None:  # noqa: A002
        super().__init__()
        self.layer: str = settings["layer"]
        self.guidance_scale = float(settings["guidance_scale"])
        self.null: Null = settings["null"]
        self.select: Select = settings["select"]
        self.tokens: Tokens = settings["tokens"]
        self.time = None if settings["time"] is None else resolve(settings["time"])
        self.spec = CallSpec(model, settings["call"])
        self.null_condition = NullCondition(self.null, self.spec)
        tapped = find_layer(model, self.layer)
        self.hidden_size = infer_width(tapped, settings["hidden_size"])
        if compile and not blocks_of(model):
            raise SettingError(
                "compile=True compiles the blocks of an nn.ModuleList, an nn.ModuleDict, or an nn.Sequential of one "
                f"class; {type(unwrap(model)).__name__} has none.\n"
                "Leave compile=True out, and compile the model's parts yourself: part.compile()."
            )
        self.model = model
        self.check_model()
        shaping = {name: getattr(self, name) for name in ("layer", "guidance_scale", "select", "tokens")}
        shaping |= {f"fixed {name}": value for name, value in self.spec.fixed.items()}
        shaping |= {f"null {name}": value for name, _, value in self.null_condition.now()}
        self._shaping = shaping
        self.fingerprint = fingerprint(model, shaping)
        if any(parameter.is_meta for parameter in model.parameters()):
            _LOGGER.warning("The teacher's offloaded weights are told from others by their names and shapes alone.")
        self.provenance: dict[str, Any] = {}  # where it comes from, for those with whom it is shared
        self._taken = freeze(model)
        self.eval()
        self._compile, self._truncate = compile, truncate
        self.refreshed = False
        self._foreign = False  # whether weights took part that are not the model's
        self._prepared = False
        self._layout = Layout.of(tapped, self.hidden_size)
        self._exit = EarlyExit(self.model, self.layer)
        self._touched = touched_in(self.model)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_exit": None, "_taken": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._exit = EarlyExit(self.model, self.layer)

    @classmethod
    def from_pretrained(
        cls,
        name: str | PathLike[str],
        model: nn.Module | Callable[[], nn.Module],
        *,
        null: Null | None = None,
        call: Mapping[str, Any] | None = None,
        select: Select = None,
        tokens: Tokens = None,
        time: TimeConvention | None = None,
        compile: bool = False,  # noqa: A002
        truncate: bool = True,
        **source: Unpack[Source],
    ) -> CFGFeatureTeacher:
        """The teacher that was saved in a folder or pushed to the hub, with the same features.

        Args:
            name: The folder, or the repository ``"owner/name"`` on the hub.
            model: A model of the class and settings that the teacher was saved from, which is taken over; or a
                function of no arguments that makes one. Its weights are replaced; they keep the dtypes that were saved.
            null: The part of the null condition that is functions, as :func:`build_teacher` took it.
            call: The functions for ``x`` and ``t``, if these were functions.
            select: The function, if it was one.
            tokens: The function, if it was one.
            time: The time convention, if it was not a named one.
            compile: As for :func:`build_teacher`.
            truncate: As for :func:`build_teacher`.
            **source: For the hub: ``revision``, ``token``, ``cache_dir``, ``local_files_only``.

        Raises:
            CheckpointError: If there is no such teacher; if its files are broken, unsafe or of a later version; if it
                does not fit the model, which is then as it was; or if a function is needed.
            SettingError: If something is passed that was saved.
        """
        folder = fetch(name, **source)
        config, saved = read_artefact(folder)
        where = f"The teacher in {str(folder)!r}"
        asked: list[str] = []

        def known(key: str, value: Any, given: Any) -> Any:
            if not isinstance(value, dict) or "unsaved" not in value:
                value = slice(*(value[part] for part in _SLICE)) if isinstance(value, dict) else value
                if isinstance(value, slice):
                    value.indices(1)  # raises unless its parts are numbers
                if given is not None and given != value:
                    raise SettingError(f"{where} was saved with {key}={value!r:.100}, which is kept: leave {key}= out.")
                return value
            if given is None:
                asked.append(f"{key}=... (it was {value['unsaved']!r:.100})")
            elif isinstance(given, TimeConvention) and given.name != value["unsaved"]:
                raise SettingError(f"{where} was saved with another time convention: {value['unsaved']!r:.100}.")
            return given

        with wrapped_errors(folder):  # what is no teacher's setting
            given = {"select": select, "tokens": tokens, "time": time}
            settings = {key: known(key, config[key], value) for key, value in given.items()}
            settings |= {key: config[key] for key in ("layer", "guidance_scale", "hidden_size", "call")}
            settings["call"] |= {k: known(f"call.{k}", config["call"][k], (call or {}).get(k)) for k in "xt"}
            settings["null"] = restored(config["null"], saved, null, asked)
            if asked:
                raise CheckpointError(
                    f"{where} was saved with functions, which no file can hold. Pass them: {'; '.join(asked[:8])}."
                )
            dropped = [str(name) for name in config["dropped"]]
            digest = torch.tensor(list(bytes.fromhex(config["fingerprint"])), dtype=torch.uint8)
        made = model if isinstance(model, nn.Module) else model()
        if not isinstance(made, nn.Module):
            raise SettingError(f"model= takes a model, or a function that makes one; it made {type(made).__name__}.")
        if SHARED in vars(made):
            raise SettingError(
                "A saved teacher replaces all weights: pass a model of its own, not share_frozen(model)."
            )
        put_back = drop(made, dropped)
        try:
            with wrapped_errors(folder):
                own = own_tensors(made)
                check_fit(made, own, saved, where)
                check_values(own, saved, where)
                check_settings(made, settings)
            dtypes = {value.dtype for value in saved.values() if value.is_floating_point()}
            if len(dtypes) == 1:
                made.to(dtypes.pop())  # for what is in no state dict, such as a table of positions
            for key, value in own_tensors(made).items():
                if key in saved:
                    value.data = saved[key].to(value.device, copy=True)
        except SelfTransError as error:
            put_back()
            origin = f"{str(error)[:4000]}\nIt was saved from {config['backbone']!s:.100}."
            if not isinstance(error, CheckpointError):
                origin = f"{where} does not fit {type(unwrap(made)).__name__}; nothing was loaded.\n{origin}"
            raise CheckpointError(origin) from error
        teacher = cls(made, settings, compile, truncate)
        teacher.fingerprint = digest
        teacher.provenance = {key: config[key] for key in Details.__annotations__ if config[key] is not None}
        return teacher

    def plain(self, **details: Unpack[Details]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The teacher as plain values, functions by their names, and its tensors.

        Raises:
            CheckpointError: If it could not be built again from these.
        """
        if self._foreign:
            raise CheckpointError(
                "This teacher cannot be saved: it computes with weights that are no part of its model, such as an "
                "adapter's that is patched onto its layers. Merge them into the model first."
            )
        own = own_tensors(self.model, "be saved")
        first: dict[int, str] = {}  # of tied weights one is saved: loading ties them as the model does
        tensors = {key: value for key, value in own.items() if first.setdefault(id(value), key) == key}
        check_values(own, tensors, "This teacher cannot be saved: it")
        null, conditions = self.null_condition.plain()
        if taken := [key for key in tensors if key.startswith(PREFIX)]:
            raise CheckpointError(
                f"The model has weights under {taken[0]!r}, a name kept for the null condition: rename it."
            )
        known: dict[str, Any] = dict.fromkeys(Details.__annotations__)
        known |= self.provenance | {key: value for key, value in details.items() if value is not None}
        known = {key: list(value) if isinstance(value, tuple) else value for key, value in known.items()}

        def named(value: Any) -> Any:
            return unsaved(value) if callable(value) else value

        cut = {part: getattr(self.tokens, part) for part in _SLICE} if isinstance(self.tokens, slice) else None
        config = {
            "layer": self.layer,
            "guidance_scale": self.guidance_scale,
            "null": null,
            "call": {key: named(value) for key, value in self.spec.config.items()},
            "select": named(self.select),
            "tokens": unsaved(self.tokens) if callable(self.tokens) else cut,
            "time": self.time.name if self.time and self.time.is_named else self.time and {"unsaved": self.time.name},
            "hidden_size": self.hidden_size,
            "dropped": dropped_names(self.model),
            "backbone": type(unwrap(self.model)).__name__,
            "fingerprint": bytes(self.fingerprint.tolist()).hex(),
            **known,
        }
        return config, tensors | conditions

    def refresh(self, checkpoint: str | PathLike[str] | Mapping[str, Any]) -> None:
        """Teach with other weights from now on, θ_teacher ← θ̄: for a run that is taught by its own average.

        ``teacher.refresh(ema.state_dict())`` at an interval of steps. What the teacher has dropped it leaves out. A
        refreshed teacher's fingerprint is that of its settings alone: to resume a run, refresh the new teacher, too,
        before the criterion's state is loaded; where it was saved at a refresh, it goes on as it would have.

        Args:
            checkpoint: What :func:`build_teacher` takes, of the same architecture.

        Raises:
            CheckpointError: If it does not fit, or the teacher is sharded; the weights are then as they were.
        """
        load_weights(self.model, checkpoint)
        self.fingerprint, self.refreshed = fingerprint(nn.Module(), self._shaping), True

    def train(self, mode: bool = True) -> CFGFeatureTeacher:
        """Stay in eval mode: a teacher drops no labels."""
        super().train(False)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The guided features (N, T, D) for the call ``model(*args, **kwargs)``."""
        return self.guide(*self.pair(*args, **kwargs))

    def pair(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The features (f_c, f_u) of condition and null condition, each (N, T, D) in float32."""
        return self.features(self.spec.bind(args, kwargs))

    def guide(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """f_u + guidance_scale (f_c − f_u)."""
        return unconditional + self.guidance_scale * (conditional - unconditional)

    @torch.no_grad()
    def features(
        self, call: Call, rows: Tensor | None = None, chunk: int | None = None, *, check_indices: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(f_c, f_u) for some rows of a call.

        Args:
            call: The whole batch's call, by this model's names.
            rows: (n,), indices of the rows to run; None for all.
            chunk: The largest batch in one pass, condition and null counted; None for one pass.
            check_indices: Compare indices with the embeddings that they reach, as the first call does: a host sync.

        Raises:
            SettingError: If the null condition does not fit the call; or for a ``chunk`` of a sharded model.
            CallError: If the rows of an argument cannot be taken, or are not what they look like.
            CaptureError: If the layer runs not at all, or several times in one forward.
            PrunedModuleError: If a module was used that the first call dropped.
            ShapeError: If the batch has no rows, or the layer does not keep one row for each sample.
        """
        if chunk is not None and sharded_parts(self.model):
            raise SettingError(
                f"teacher_chunk={chunk} does not go with a sharded teacher: ranks with different numbers of rows would "
                "run it different numbers of times, and wait for each other forever.\n"
                "Leave teacher_chunk out, or keep the teacher whole on each rank."
            )
        held = RowTensors(call, self.spec.known, self.null_condition.values)
        passes = self.null_condition.passes(call, held, rows)
        passes = [(side, in_precision_of(self.model, call.x_t, found)) for side, found in passes]
        if not len(passes[0][1][0]):
            raise ShapeError("The teacher was called with a batch of no rows: there are no features to give.")

        def run() -> Tensor:
            parts = []
            for side, found in passes:
                size = chunk or len(found[0])
                for start in range(0, len(found[0]), size):
                    parts.append(self._run(side, [values[start : start + size] for values in found]))
            return torch.cat(parts).float()

        self._touched.clear()
        if self._prepared and not check_indices:
            features = run()
        else:
            # No code is compiled for the hooks of these calls alone.
            checked = checked_indices(self.model, self.null_condition)
            with _PREPARING, torch.compiler.set_stance("force_eager"), checked:
                features = run() if self._prepared else self._prepare(call, held, rows, run)
        if self._touched:  # and the model went on without it
            raise pruned_error(self._touched[0])
        conditional, unconditional = features.chunk(2)
        return conditional, unconditional

    def _prepare(self, call: Call, held: RowTensors, rows: Tensor | None, run: Callable[[], Tensor]) -> Tensor:
        """The first call: see that the layer gives what it should, drop what takes no part, compile if asked."""
        self.check_model()
        usage = Usage(self.model)
        features = usage.of(run)
        whole = in_precision_of(self.model, call.x_t, held.tensors)
        expected = self._run(held, whole, to_end=True).float()
        self._touched.clear()  # a saved teacher has lost what lies behind its layer
        exact = call.x_t.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(call.x_t.device.type)
        close = partial(_close, tolerance=0.001 if exact else 0.05)
        chosen = expected if rows is None else expected[rows]
        same = close(features[: len(chosen)], chosen)
        if not same and not close(run(), features):
            raise TeacherError(
                f"The teacher gives other features at layer {self.layer!r} each time that it sees the same call: "
                "something in it is random even in eval mode, such as a mask on the encoder's tokens.\n"
                "Switch that off for the teacher: call=dict(fixed=dict(mask_ratio=0.0)), or by its own name."
            )
        cause: Exception | None = None
        try:
            same = close(self._run(held, [values[-1:] for values in whole]).float(), expected[-1:]) and same
        except Exception as error:
            cause, same = error, False
        if not same:
            by_row = [path for path in held.paths if path not in (self.spec.x, self.spec.t)]
            shared = [path for path, shape in held.whole.items() if call.rows in shape]
            raise CallError(
                f"A row that is taken from the batch of {call.rows} gives other features at the teacher's layer "
                f"{self.layer!r} than it gives there: look at {quoted(shared or by_row or held.paths)}.\n{held}\n"
                "If all samples share one of the former, name it in call=dict(shared=[...]); one of the latter that "
                "holds something by sample must not be named there, and has its samples on the first axis, or on the "
                "one that call=dict(rows={...}) says. A model whose samples see each other cannot teach some of them."
            ) from cause
        self._foreign = usage.foreign() and not self.is_placed
        if self._truncate:
            drop_unused(usage, run, features)
            self._touched = touched_in(self.model)
        if self._compile:
            compile_blocks(self.model)
        self._taken = []
        self._prepared = True
        return features

    def _run(self, held: RowTensors, tensors: list[Rows], *, to_end: bool = False) -> Tensor:
        wanted = len(tensors[0])
        if self._compile and all(isinstance(rows, Tensor) for rows in tensors):
            tensors = [pad_rows(rows) for rows in tensors]  # type: ignore[arg-type]
        rows = len(tensors[0])
        arguments = held.rebuild(tensors)
        args, kwargs = self.spec.arguments(arguments)
        try:
            output = self._exit.run(self.model, args, kwargs, stop=self._truncate and not to_end)
        except (SelfTransError, torch.OutOfMemoryError):  # the latter is what loops catch to try a smaller batch
            raise
        except Exception as error:
            raise TeacherError(
                f"The teacher fails on {rows} rows: {type(error).__name__}: {error}\n{held}\n"
                "If all samples share one of the former, say so: build_teacher(..., call=dict(shared=[...]))."
            ) from error
        tokens = as_tokens(
            output, self.select, self.tokens, layer=self.layer, layout=self._layout, arguments=lambda: arguments
        )
        if len(tokens) != rows:
            raise ShapeError(
                f"The teacher's layer {self.layer!r} gives {len(tokens)} rows for a batch of {rows}: "
                "tap a layer that keeps one row for each sample."
            )
        return tokens[:wanted]

    def extra_repr(self) -> str:
        """The settings, as ``print(teacher)`` shows them."""
        time = None if self.time is None else self.time.name
        return (
            f"layer={self.layer!r}, guidance_scale={self.guidance_scale:g}, null: {self.null_condition}, "
            f"time={time!r}, hidden_size={self.hidden_size}, select={self.select}, tokens={self.tokens}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if not self.is_placed:
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]
        self.null_condition._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    @property
    def is_placed(self) -> bool:
        """Whether hooks of accelerate's or diffusers' offloading put the weights in place: ``.to()`` leaves them."""
        return any(
            hasattr(module, "_hf_hook")
            or "group_offloading" in getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
            for module in self.model.modules()
        )

    def check_model(self) -> None:
        """Raise ``TeacherError`` if the model cannot run, or not as far as its layer."""
        if "FullyShardedDataParallel" in {type(module).__name__ for module in self.model.modules()}:
            raise TeacherError(
                "A teacher cannot be wrapped in FullyShardedDataParallel (FSDP1): a rank without rows would leave the "
                "others waiting. Shard it with fully_shard (FSDP2), or keep it whole on each rank."
            )
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            if is_lazy(tensor) or (tensor.is_meta and not self.is_placed):
                raise TeacherError(
                    f"The teacher's {name!r} has no data yet: materialise the model first, by a forward, or "
                    "model.to_empty(device='cpu') and its weights."
                )

    def give_back(self) -> None:
        """Leave the model in the mode, and with the parameters that train, in which it was taken over."""
        for module, training, parameters in self._taken:
            module.training = training
            module._parameters.update(parameters)
            for parameter in parameters.values():
                parameter.requires_grad_(True)
        self._taken = []


def _close(first: Tensor, second: Tensor, tolerance: float) -> bool:
    """Whether no row differs by more than the order of sums changes; a mask, or another's row, changes far more."""
    if first.shape != second.shape:
        return False
    return not ((first - second).flatten(1).norm(dim=1) > tolerance * second.flatten(1).norm(dim=1)).any()


def build_teacher(
    model: nn.Module,
    checkpoint: str | PathLike[str] | Mapping[str, Any] | None,
    *,
    layer: str,
    guidance_scale: float,
    null: Null,
    call: Mapping[str, Any] | None = None,
    select: Select = None,
    tokens: Tokens = None,
    hidden_size: int | None = None,
    time: str | TimeConvention | None = None,
    weights: str = "ema",
    example: Sequence[Any] | Mapping[str, Any] | None = None,
    compile: bool = False,  # noqa: A002
    truncate: bool = True,
) -> CFGFeatureTeacher:
    """Load a checkpoint into ``model`` and turn it into a frozen teacher.

    The model is taken over: pass a copy to keep yours.

    Args:
        model: A model of the checkpoint's architecture.
        checkpoint: A ``.pt`` file of a DiT, SiT or REPA loop, a ``.safetensors`` file, a directory, a PEFT adapter's
            folder, a state dict, or None for the weights that the model already has. Loaded strictly; the keys of
            projection heads that REPA and the released code save along are left out and named in a logged warning.
        layer: The dotted name of the layer whose output is the feature, such as ``"blocks.7"``.
        guidance_scale: w in f_u + w (f_c − f_u); published: 30 for SiT-B/2, 5 for text-to-image.
        null: The null condition by argument name: a number (a class index, or 0 for a zero vector); None; a tensor
            without the batch axis, of the argument's length or its own; or a callable from the call's arguments to N
            rows. A nested argument takes a nested mapping.
        call: ``dict(x=..., t=...)`` says what x_t and t are, as for :class:`SelfTransLoss`; ``shared=[...]`` names what
            all samples share although it looks like the batch, inside an argument too (``"data_info['mask_type']"``);
            ``rows={"layers": 1, "captions": "list"}`` says along which axis the samples are, or that a list holds one
            entry for each; ``fixed=dict(mask_ratio=0.0)`` gives the teacher other values than the student's call had.
        select: Which tensor of a tuple, dict or dataclass output.
        tokens: Which tokens are the image's: a slice or a callable.
        hidden_size: The feature's width, where it cannot be read off the layer.
        time: The convention that the teacher was trained with; when given, the student's must be the same.
        weights: Which weights of a training checkpoint, as for :func:`load_weights`.
        example: A call's arguments, ``(x_t, t, y)`` or by name: what never runs is then dropped at once.
        compile: Compile the teacher's blocks, with a cache of their own, after the first call.
        truncate: Stop at the layer and drop what takes no part. False runs every forward to its end and keeps all, as
            what moves blocks between devices needs if it counts them.

    Raises:
        CheckpointError: If the checkpoint is unreadable, unsafe, or does not fit the model.
        LayerNotFoundError: If the model has no such layer.
        SettingError: If the null condition is empty, misnamed, or outside its embedding (with ``example``).
        SettingError: If the guidance scale or another setting makes no sense.
    """
    settings: dict[str, Any] = {"layer": layer, "guidance_scale": guidance_scale, "null": null, "call": call}
    settings |= {"select": select, "tokens": tokens, "hidden_size": hidden_size, "time": time}
    check_settings(model, settings)  # first: a checkpoint can take minutes to load
    report = load_weights(model, checkpoint, weights=weights)
    if report.left_out:
        _LOGGER.warning(
            "%d keys of %s belong to projection heads, no part of the model, and were left out: %s",
            len(report.left_out),
            report.source or "the state dict",
            quoted(report.left_out),
        )
    teacher = CFGFeatureTeacher(model, settings, compile, truncate)
    source = None if report.source is None else Path(report.source).name  # no paths: they would tell of the machine
    teacher.provenance = {k: v for k, v in (("source", source), ("step", report.step)) if v is not None}
    if example is not None:
        features = teacher(**example) if isinstance(example, Mapping) else teacher(*example)
        if hidden_size is not None and hidden_size != features.shape[-1]:
            raise ShapeError(f"hidden_size={hidden_size}, but layer {layer!r} gives {tuple(features.shape)}.")
        teacher.hidden_size = features.shape[-1]
    return teacher


def check_settings(model: nn.Module, settings: Mapping[str, Any]) -> None:
    """Raise what building a teacher with these settings would raise, and leave the model as it is."""
    check_guidance_scale(settings["guidance_scale"])
    check_choice(settings["select"], settings["tokens"])
    infer_width(find_layer(model, settings["layer"]), settings["hidden_size"])
    if settings["time"] is not None:
        resolve(settings["time"])
    NullCondition(settings["null"], CallSpec(model, settings["call"]))


def check_guidance_scale(scale: object) -> None:
    """Raise ``SettingError`` unless ``scale`` is a finite number, 0 or more."""
    if isinstance(scale, bool) or not isinstance(scale, float | int) or not math.isfinite(scale) or scale < 0:
        raise SettingError(
            f"guidance_scale must be a finite number, 0 or more (1 is the conditional feature); got {scale!r}."
        )
