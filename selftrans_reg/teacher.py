"""The frozen teacher: classifier-free-guided features of one layer, f_u + w (f_c − f_u)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

import torch
from torch import Tensor, nn

from .calls import Call, CallSpec, Rows, RowTensors, as_weights, join_rows, take_rows
from .checkpoints import load_weights
from .errors import SelfTransError, SettingError, ShapeError, TeacherError
from .hub import Shareable
from .modules import (
    Layout,
    architecture,
    check_positive,
    find_layer,
    fingerprint,
    infer_width,
    quoted,
    sharded_parts,
    unwrap,
)
from .null import Null, checked_indices, flatten_null, null_tensors, shown
from .taps import EarlyExit
from .time import TimeConvention, resolve
from .tokens import Select, Tokens, as_tokens, check_select, check_tokens
from .truncate import blocks_of, compile_blocks, pad_rows, pruned_error, pruned_modules, truncate

if TYPE_CHECKING:
    from .hub import Source
    from .saved_teacher import Details


_LOGGER = logging.getLogger(__name__)


class CFGFeatureTeacher(Shareable, nn.Module):
    """A frozen model that gives the guided features of one layer.

    The model runs on the condition and on the null condition, as one doubled batch, and stops at its layer:

        f_g = f_u + guidance_scale · (f_c − f_u)

    so 1 is the conditional feature. The combination is computed in float32. The model runs without gradients, in eval
    mode whatever ``.train()`` says, under the autocast that is active. At the first call the modules that never run
    are dropped and their memory is free; before, one forward goes on to its end, to see that the layer runs once.

    Made by :func:`build_teacher`, which describes the arguments.

    Shape:
        call: the model's own arguments; x_t (N, ...), t (N,)
        returns: (N, T, D), float32, no gradient
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: str,
        guidance_scale: float,
        null: Null,
        call: Mapping[str, Any] | None = None,
        select: Select = None,
        tokens: Tokens = None,
        hidden_size: int | None = None,
        time: str | TimeConvention | None = None,
        compile: bool = False,  # noqa: A002
    ) -> None:
        super().__init__()
        check_guidance_scale(guidance_scale)
        check_select(select)
        check_tokens(tokens)
        tapped = find_layer(model, layer)
        if hidden_size is not None:
            check_positive("hidden_size", hidden_size)
        self.layer = layer
        self.guidance_scale = float(guidance_scale)
        self.select = select
        self.tokens = tokens
        self.hidden_size = infer_width(tapped) if hidden_size is None else hidden_size
        self.time = None if time is None else resolve(time)
        self.spec = CallSpec(model, call)
        self.null = null
        self._null = dict(flatten_null(null, self.spec))
        for index, value in enumerate(self._null.values()):
            if isinstance(value, Tensor):
                self.register_buffer(
                    f"null_{index}", value.detach(), persistent=False
                )  # so that it moves with the teacher
        if compile and not blocks_of(model):
            raise SettingError(
                "compile=True compiles the blocks of an nn.ModuleList, an nn.ModuleDict, or an nn.Sequential of one "
                f"class; {type(unwrap(model)).__name__} has none.\n"
                "Leave compile=True out, and compile the model's parts yourself: part.compile()."
            )
        self.model = model.requires_grad_(False)
        self.eval()
        self._exit = EarlyExit(model, layer)
        self._prepared = False
        self._layout = Layout.of(tapped, self.hidden_size)
        self._pruned = pruned_modules(model)
        self._compile = compile
        settings = {"layer": layer, "guidance_scale": self.guidance_scale, "select": select, "tokens": tokens}
        settings |= {f"fixed {name}": value for name, value in self.spec.fixed.items()}
        settings |= {f"null {path}": value for path, value in self._null.items()}
        self.fingerprint = fingerprint(model, settings)
        self.architecture = architecture(model)
        self.provenance: dict[str, Any] = {}  # where it comes from, for those with whom it is shared

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_exit"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._exit = EarlyExit(self.model, self.layer)  # a copy's hooks are inert

    @classmethod
    def from_pretrained(
        cls,
        name: str | PathLike[str],
        model: nn.Module | Callable[[], nn.Module],
        *,
        null: Null | None = None,
        select: Select = None,
        tokens: Tokens = None,
        time: TimeConvention | None = None,
        compile: bool = False,  # noqa: A002
        **source: Unpack[Source],
    ) -> CFGFeatureTeacher:
        """The teacher that was saved in a folder or pushed to the hub, with the same features.

        Args:
            name: The folder, or the repository ``"owner/name"`` on the hub.
            model: A model of the class and settings that the teacher was saved from, which is taken over; or a
                function of no arguments that makes one. Its weights are replaced; they keep the dtypes that were saved.
            null: The part of the null condition that is functions, which cannot be saved, as :func:`build_teacher` took
                it.
            select: The function, if it was one.
            tokens: The function, if it was one.
            time: The time convention, if it was not a named one.
            compile: As for :func:`build_teacher`.
            **source: For the hub: ``revision``, ``token``, ``cache_dir``, ``local_files_only``.

        Raises:
            CheckpointError: If there is no such teacher; if its files are broken, unsafe or of a later version; if it
                does not fit the model, which is then as it was; or if a function is needed.
            SettingError: If something is passed that was saved.
        """
        from .hub import fetch
        from .saved_teacher import load_teacher

        return load_teacher(cls, fetch(name, **source), model, null, select, tokens, time, compile)

    def save_pretrained(self, directory: str | PathLike[str], **details: Unpack[Details]) -> None:
        """Save weights, settings and a model card, for :meth:`from_pretrained`.

        What the first call has dropped is not saved; before it the whole model is. Functions (a null condition,
        ``select``, ``tokens``, a time convention of your own) are saved by name only, and loading asks for them. An
        older teacher in the folder is replaced, atomically; an edited ``README.md`` stays. In a distributed run, call
        this on one rank.

        Args:
            directory: The folder; made if there is none.
            **details: What the teacher cannot know, all optional: ``source``, the run that it comes from, in words or
                as an address; ``step``, at which the weights were taken; ``latent_scale`` and ``latent_shape``, the
                factor on the VAE's latents and their (C, H, W); ``licence`` of the weights. They are kept in
                ``teacher.provenance``.

        Raises:
            CheckpointError: If the folder holds something else, something cannot be saved, or the disk is full.
        """
        self._save(Path(directory), Path(directory).name, **details)

    def _save(self, folder: Path, name: str, **details: Unpack[Details]) -> None:
        from .saved_teacher import save_teacher

        save_teacher(self, folder, details, name)

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
            check_indices: Compare indices with the embeddings that they reach, as always at the first call. It waits
                for the device.

        Raises:
            SettingError: If the null condition does not fit the call.
            CallError: If the rows of an argument cannot be taken.
            CaptureError: If the layer runs not at all, or several times in one forward.
            PrunedModuleError: If a module was used that the first call dropped.
            ShapeError: If the batch has no rows, or the layer does not keep one row for each sample.
            SettingError: If ``chunk`` is given and the model is sharded.
        """
        if chunk is not None and sharded_parts(self.model):
            raise SettingError(
                f"teacher_chunk={chunk} does not go with a sharded teacher: ranks with different numbers of rows would "
                "run it different numbers of times, and wait for each other forever.\n"
                "Leave teacher_chunk out, or keep the teacher whole on each rank."
            )
        held = RowTensors(call, self.spec.known, self._null)
        pairs = zip(held.tensors, null_tensors(self._null_now(), call, held), strict=True)
        if rows is not None:
            pairs = ((take_rows(c, rows), take_rows(u, rows)) for c, u in pairs)  # type: ignore[assignment]
        doubled = [
            as_weights(self.model, join_rows([c, u]), exact=path == self.spec.t)
            for path, (c, u) in zip(held.paths, pairs, strict=True)
        ]
        total = len(doubled[0])
        if total == 0:
            raise ShapeError("The teacher was called with a batch of no rows: there are no features to give.")
        size = chunk or total

        def run() -> Tensor:
            parts = [self._run(held, [d[i : i + size] for d in doubled]) for i in range(0, total, size)]
            return torch.cat(parts).float()

        self._forget_touched()
        if check_indices or not self._prepared:
            with torch.compiler.set_stance("force_eager"):  # no code is compiled for the hooks of these calls alone
                with checked_indices(self.model, self._null):
                    if not self._prepared:
                        self._exit.check_runs_once(self.model, *self._arguments(held, [d[:size] for d in doubled]))
                        self._forget_touched()
                    features = run()
                if not self._prepared:
                    self._prepare(features, run)
        else:
            features = run()
        if touched := [pruned.name for pruned in self._pruned if pruned.touched]:
            raise pruned_error(touched)
        conditional, unconditional = features.chunk(2)
        return conditional, unconditional

    def _forget_touched(self) -> None:
        for pruned in self._pruned:
            pruned.forget()

    def _prepare(self, features: Tensor, run: Callable[[], Tensor]) -> None:
        """What the first call does once: drop what never runs, and compile the rest if asked."""
        self._check_repeatable(features, run())
        truncate(self.model, find_layer(self.model, self.layer), run)
        if self._compile:
            compile_blocks(self.model)
        self._pruned = pruned_modules(self.model)
        self._prepared = True

    def _arguments(self, held: RowTensors, tensors: list[Rows]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self.spec.arguments(held.rebuild(tensors))

    def _run(self, held: RowTensors, tensors: list[Rows]) -> Tensor:
        wanted = len(tensors[0])
        if self._compile:
            tensors = [pad_rows(tensor) if isinstance(tensor, Tensor) else tensor for tensor in tensors]
        rows = len(tensors[0])
        args, kwargs = self._arguments(held, tensors)
        try:
            output = self._exit.run(self.model, args, kwargs)
        except SelfTransError:
            raise
        except Exception as error:
            error.add_note(
                f"This was the teacher on {rows} rows, condition and null condition one behind the other. Taken for "
                f"one row a sample: {quoted(held.paths)}. If all samples share one of these, say so: "
                "build_teacher(..., call=dict(shared=[...]))."
            )
            raise
        tokens = as_tokens(
            output,
            self.select,
            self.tokens,
            layer=self.layer,
            layout=self._layout,
            arguments=lambda: held.rebuild(tensors),
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
            f"layer={self.layer!r}, guidance_scale={self.guidance_scale:g}, null: {self.shown_null()}, time={time!r}, "
            f"hidden_size={self.hidden_size}, select={self.select}, tokens={self.tokens}"
        )

    def shown_null(self) -> str:
        """The null condition in short: numbers as they are, the rest by kind."""
        return shown(self._null)

    def _null_now(self) -> dict[str, Any]:
        """The null condition by path, its tensors where the teacher has moved to."""
        return {
            path: self.get_buffer(f"null_{index}") if isinstance(value, Tensor) else value
            for index, (path, value) in enumerate(self._null.items())
        }

    def _check_repeatable(self, first: Tensor, second: Tensor) -> None:
        # Far above what the order of a sum changes, far below what a mask does.
        if (first - second).norm() > 0.01 * first.norm():
            raise TeacherError(
                f"The teacher gives other features at layer {self.layer!r} each time that it sees the same call: "
                "something in it is random even in eval mode, such as a mask on the encoder's tokens.\n"
                "Switch that off for the teacher: call=dict(fixed=dict(mask_ratio=0.0)), or what the argument is "
                "called."
            )


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
    weights: Literal["ema", "model"] = "ema",
    example: Sequence[Any] | Mapping[str, Any] | None = None,
    compile: bool = False,  # noqa: A002
) -> CFGFeatureTeacher:
    """Load a checkpoint into ``model`` and turn it into a frozen teacher.

    The model is taken over: pass a copy to keep yours.

    Args:
        model: A model of the checkpoint's architecture.
        checkpoint: A ``.pt`` file of a DiT, SiT or REPA loop, a ``.safetensors`` file, a directory, a state dict, or
            None for the weights that the model already has. Loaded strictly; the keys of projection heads that
            REPA and the released code save along are left out and named in a logged warning.
        layer: The dotted name of the layer whose output is the feature, such as ``"blocks.7"``.
        guidance_scale: w in f_u + w (f_c − f_u); published: 30 for SiT-B/2, 5 for text-to-image.
        null: The null condition by argument name: a number (a class index, or 0 for a zero vector); a tensor of the
            argument's shape without its batch axis; or a callable from the call's arguments to N rows. A nested
            argument takes a nested mapping.
        call: ``dict(x=..., t=...)`` names the arguments that hold x_t and t where they are not the first two;
            ``shared=[...]`` names arguments that all samples share although their first axis looks like the batch;
            ``fixed=dict(mask_ratio=0.0)`` gives the teacher other values than the student's call had.
        select: Which tensor of a tuple, dict or dataclass output.
        tokens: Which tokens are the image's: a slice or a callable.
        hidden_size: The feature's width, where it cannot be read off the layer.
        time: The convention that the teacher was trained with; when given, the student's must be the same.
        weights: Which entry of a training checkpoint.
        example: A call's arguments, ``(x_t, t, y)`` or by name: what never runs is then dropped at once, not at the
            first call.
        compile: Compile the teacher's blocks, with a cache of their own, after the first call.

    Raises:
        CheckpointError: If the checkpoint is unreadable, unsafe, or does not fit the model.
        LayerNotFoundError: If the model has no such layer.
        SettingError: If the null condition is empty, misnamed, or outside its embedding (with ``example``).
        SettingError: If the guidance scale or another setting makes no sense.
    """
    if weights not in ("ema", "model"):
        raise SettingError(f"weights must be 'ema' or 'model'; got {weights!r}.")
    # The settings are checked first: a checkpoint can take minutes to load.
    check_settings(model, layer=layer, guidance_scale=guidance_scale, null=null, call=call)
    report = load_weights(model, checkpoint, weights=weights)
    if report.left_out:
        _LOGGER.warning(
            "%d keys of %s belong to projection heads, no part of the model, and were left out: %s",
            len(report.left_out),
            report.source or "the state dict",
            quoted(report.left_out),
        )
    teacher = CFGFeatureTeacher(
        model,
        layer=layer,
        guidance_scale=guidance_scale,
        null=null,
        call=call,
        select=select,
        tokens=tokens,
        hidden_size=hidden_size,
        time=time,
        compile=compile,
    )
    if report.source is not None:
        teacher.provenance["source"] = Path(report.source).name  # no paths: they would tell of the machine
    if report.step is not None:
        teacher.provenance["step"] = report.step
    if example is not None:
        features = teacher(**example) if isinstance(example, Mapping) else teacher(*example)
        if hidden_size is not None and hidden_size != features.shape[-1]:
            raise ShapeError(f"hidden_size={hidden_size}, but layer {layer!r} gives {tuple(features.shape)}.")
        teacher.hidden_size = features.shape[-1]
    return teacher


def check_settings(
    model: nn.Module, *, layer: str, guidance_scale: float, null: Null, call: Mapping[str, Any] | None
) -> None:
    """Raise what building a teacher with these settings would raise, and leave the model as it is."""
    check_guidance_scale(guidance_scale)
    find_layer(model, layer)
    dict(flatten_null(null, CallSpec(model, call)))


def check_guidance_scale(scale: object) -> None:
    """Raise ``SettingError`` unless ``scale`` is a finite number, 0 or more."""
    if isinstance(scale, bool) or not isinstance(scale, float | int) or not math.isfinite(scale) or scale < 0:
        raise SettingError(
            f"guidance_scale must be a finite number, 0 or more (1 is the conditional feature); got {scale!r}."
        )
