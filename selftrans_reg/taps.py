"""Every hook of the library: recording forwards, tapping layers, stopping early.

One forward of the model leaves one record. A pre-hook on the model opens it with the call's arguments, hooks on the
layers append their raw output objects to it and do nothing else, and a post-hook on the model closes it. Everything
more (selecting, slicing, projecting) happens later, outside the forward. Therefore recomputation in the backward pass,
sampling and copies of the model find no open record and leave no trace; a compiled model stays one graph; and under
reentrant checkpointing the stored object is the very one that receives the gradient.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, Literal, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .calls import by_name
from .errors import CaptureError, SelfTransError
from .modules import Layout, device_of, find_layer, layer_names, sharded_parts, unwrap
from .tokens import Select, Tokens, as_tokens, check_choice, tensors_in, walk

WhichForward: TypeAlias = Literal["first", "last"] | None
Versions: TypeAlias = tuple[list[Tensor], list[tuple[int, int]]]  # kept alive, and of each its id and version
Note = TypeVar("Note")
Owner = TypeVar("Owner", "Recorder[Any]", "EarlyExit")


class Capture(NamedTuple):
    """What a layer returned, untouched, and the circumstances that cannot be read later."""

    output: Any
    versions: Versions | None  # of its tensors in eager mode: a layer behind the tap that works in place changes them
    autocast: torch.dtype | None  # the dtype of the autocast that the layer ran under, None without


class Record(Generic[Note]):
    """One forward of the model: its arguments, what the tapped layers returned, and the owner's note on it.

    The arguments are in containers of the record's own: the model may put others into those that it was given.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], layers: Sequence[str]) -> None:
        self._versions: list[tuple[Tensor, int]] = []
        self.args, self.kwargs = walk((args, kwargs), self._see, fresh=True)
        self.captures: dict[str, list[Capture]] = {layer: [] for layer in layers}  # one each time that it ran
        self.with_gradients = torch.is_grad_enabled()
        self.transformed = torch._C._functorch.peek_interpreter_stack() is not None  # as inside torch.func.jvp
        self.note: Note  # what the owner has made of the arguments when the call began
        self.error: SelfTransError | None = None  # why it could not, to be raised when the record is taken

    def _see(self, tensor: Tensor, path: str) -> Tensor:
        self._versions.append((tensor, 0 if tensor.is_inference() else tensor._version))
        return tensor

    def check_arguments(self) -> None:
        """Raise ``CaptureError`` if an argument of the call was changed in place since: it is to be read again."""
        for tensor, version in self._versions:
            if not tensor.is_inference() and tensor._version != version:
                raise CaptureError(
                    "An argument of the model's call was changed in place after the call began, so what the student "
                    "was called with can no longer be read.\n"
                    "Change it out of place, in the model (as a label that is dropped) or in the loop (as x_t that is "
                    "reused), or call the criterion first."
                )

    def capture(self, layer: str) -> Capture:
        """The one capture of ``layer``, or a ``CaptureError`` if there is not one, or not as the layer gave it."""
        captures = self.captures[layer]
        if not captures:
            raise CaptureError(
                f"Layer {layer!r} did not run in the last forward, or its hook was not seen.\n"
                "If the model is compiled, it may have run code that was compiled without the hook: before this "
                "library was attached, for another model of the class, or for another layer that goes through the same "
                "function. PyTorch tells them apart after torch._dynamo.config.skip_nnmodule_hook_guards = False; call "
                "torch._dynamo.reset() too, if something is compiled already.\n"
                "Otherwise the model's forward skips this layer: tap one that runs in every forward."
            )
        if len(captures) > 1:
            raise _ran_often(layer, captures, "model")
        (capture,) = captures
        if capture.versions is not None and _versions_of(capture.output)[1] != capture.versions[1]:
            raise CaptureError(
                f"The output of layer {layer!r} was changed in place after the layer returned it, so what was captured "
                "is no longer what the layer gave.\n"
                "A later layer works in place (inplace=True, +=, mul_): make that one out of place, or tap the layer "
                "whose output is final."
            )
        return capture

    def no_gradient(self, layer: str, consequence: str, reason: str) -> CaptureError:
        """What to raise where the tokens of ``layer`` carry no gradient, and why they may not."""
        if self.transformed:
            reason = (
                "The model ran inside a function transform (torch.func.jvp, vjp, grad or vmap), whose tensors end with "
                "it: run it once more outside, and say which forward counts with forward='last' or 'first'."
            )
        return CaptureError(f"The tokens of layer {layer!r} carry no gradient, {consequence}.\n{reason}")


def _versions_of(value: Any) -> Versions:
    """The tensors of a nested value, and how often each was changed in place; those of inference mode do not count."""
    tensors = [value] if isinstance(value, Tensor) else [tensor for _, tensor in tensors_in(value)]
    return tensors, [(id(tensor), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]


def _ran_often(layer: str, outputs: Sequence[Any], whose: str) -> CaptureError:
    return CaptureError(
        f"Layer {layer!r} ran {len(outputs)} times in one forward of the {whose}, and nothing is guessed.\n"
        "Tap a layer that runs once."
    )


class _Hook(Generic[Owner]):
    """A hook that knows its owner and its module weakly, and turns inert in copies and pickles of the module."""

    def __init__(self, owner: Owner, module: nn.Module, what: str = "") -> None:
        self.owner: weakref.ref[Owner] = weakref.ref(owner)
        self.module = weakref.ref(module)
        self.what = what  # the layer that is captured, or the method that is called

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial, (_inert,)


def _inert(*args: Any, **kwargs: Any) -> None:
    """What remains of a hook in a copy of the model: nothing happens."""


class _LayerHook(_Hook["Recorder[Any]"]):
    """Appends a layer's raw output to the open record. Traced by ``torch.compile``: keep it free of Python counters."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        recorder = self.owner()
        if recorder is None or module is not self.module():
            return
        record = getattr(recorder.here, "opened", None)
        if record is None:
            return
        device, compiling = recorder.device_type, torch.compiler.is_compiling()
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        capture = Capture(output, None if compiling else _versions_of(output), autocast)
        if compiling and hasattr(torch._dynamo.utils, "_disable_side_effect_safety_checks_for_current_subtracer"):
            # Dynamo lets nothing out of a checkpointed region, since eager code would repeat it in backward, and
            # leaves the whole model uncompiled. A capture must not be repeated: this lets it out. It is private
            # to PyTorch, so a version without it compiles such models as if the tap were a graph break.
            let_out = torch._dynamo.utils._disable_side_effect_safety_checks_for_current_subtracer
            let_out(_append, record.captures[self.what], capture)
        else:
            record.captures[self.what].append(capture)


def _append(captures: list[Capture], capture: Capture) -> None:
    captures.append(capture)


class _RootHook(_Hook["Recorder[Any]"]):
    """Calls one method of its owner around the model's forward, outside of any compiled graph."""

    def __call__(self, module: nn.Module, *args: Any) -> None:
        recorder = self.owner()
        if recorder is not None and module is self.module():
            getattr(recorder, self.what)(module, *args)
        elif recorder is not None and getattr(module, "_is_replica", False):
            recorder.elsewhere = ": it ran as replicas of nn.DataParallel, which are copies of it; use DDP"


class Recorder(Generic[Note]):
    """Watches one model: a record for each forward, holding the raw outputs of the named layers.

    At most one record is held, whatever the loop does, so that a forgotten consumer cannot pile up graphs. What a
    thread's forwards leave is that thread's, in ``here``: others may sample from the model in the meantime.

    Args:
        model: The user's model, wrapped or not.
        layers: Dotted names, as the unwrapped model prints them.
        on_open: Makes a new record's note before the forward runs; an error of the library that it raises is kept for
            the loss, where the user expects it.
        training_only: Record a forward only in train mode with gradients enabled, and never inside a backward pass.
        eval_mode: With ``training_only``, record those in eval mode too.
        forward: Which of several forwards between two takes counts; None makes several an error.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        on_open: Callable[[Record[Note]], Note],
        *,
        training_only: bool = False,
        eval_mode: bool = False,
        forward: WhichForward = None,
    ) -> None:
        self.layers = tuple(layers)
        self.on_open = on_open
        self.training_only = training_only
        self.eval_mode = eval_mode
        self.forward = forward
        self.here = threading.local()  # the record ``opened`` and the one ``kept``, the ``count``, why ``passed_over``
        self.elsewhere = ""  # why a forward left no record in this thread, for the error message
        self.device_type = "cpu"
        root = unwrap(model)
        modules = [find_layer(model, layer) for layer in self.layers]
        self._root = weakref.ref(root)
        _keep_out_of_graphs()
        before, after = _RootHook(self, root, "_open"), _RootHook(self, root, "_close")
        self._handles: list[RemovableHandle] = [
            root.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
            root.register_forward_hook(after, always_call=True),
            *(m.register_forward_hook(_LayerHook(self, m, n)) for m, n in zip(modules, self.layers, strict=True)),
        ]
        weakref.finalize(self, _remove, self._handles).atexit = False  # a dropped owner leaves no hooks behind

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return type(None), ()  # a copy watches nothing

    @property
    def model(self) -> nn.Module | None:
        """The unwrapped model, while there is one: the loop owns it."""
        return self._root()

    @property
    def holds_record(self) -> bool:
        """Whether there was a forward to record since the last take."""
        return getattr(self.here, "kept", None) is not None

    def take(self) -> Record[Note]:
        """The record of this thread's one forward since the last take, or the error that ``on_open`` has raised."""
        record: Record[Note] | None = getattr(self.here, "kept", None)
        count = getattr(self.here, "count", 0)
        self.discard()
        if record is None:
            mode = f", {'' if self.eval_mode else 'in train mode '}with gradients enabled" if self.training_only else ""
            why = getattr(self.here, "passed_over", self.elsewhere)
            raise CaptureError(
                f"There is no forward of the model to work on{why}.\n"
                f"Call the model itself (not model.forward) once before each call of this one{mode}."
            )
        if count > 1 and self.forward is None:
            choice = "say which counts with forward='first' or 'last'; or " if self.training_only else ""
            raise CaptureError(
                f"The model ran {count} forwards since the last call, and nothing is guessed.\n"
                f"Call this after every forward; or {choice}drop what a skipped batch left with discard()."
            )
        if record.error is not None:
            raise copy.copy(record.error)  # not itself: a raised error holds this frame, which holds it and the graph
        return record

    def discard(self) -> None:
        """Forget what was recorded."""
        self.here.opened = self.here.kept = None
        self.here.count = 0

    def detach(self) -> None:
        """Remove every hook and forget what was recorded."""
        _remove(self._handles)
        self.here = threading.local()

    def _open(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.here.opened = None  # what an interrupted forward may have left
        device = device_of(module).type  # now: the model may have been moved
        self.device_type = device if torch.amp.is_autocast_available(device) else "cpu"
        # A checkpoint of the whole model recomputes it in backward; and torch.jit.trace takes it down.
        if torch._C._current_graph_task_id() != -1 or torch._C._is_tracing():
            return
        if self.training_only:
            if not (module.training or self.eval_mode):
                self.here.passed_over = ": the last one was in eval mode"
                return
            if not torch.is_grad_enabled():
                self.here.passed_over = ": the last one ran without gradients, as a checkpoint with use_reentrant=True"
                return
        record: Record[Note] = Record(args, kwargs, self.layers)
        try:
            if not self._came_first(module) and self.training_only:
                _refuse_rounded(*args, *kwargs.values())
            record.note = self.on_open(record)
        except SelfTransError as error:
            record.error = error.with_traceback(None)  # whose frames hold the record, and with it the graph
        self.here.opened = record

    def _came_first(self, module: nn.Module) -> bool:
        """Whether no hook of another's ran before this recorder's, which from now on comes first."""
        first = self._handles[0].id
        for key, hook in module._forward_pre_hooks.items():
            if key == first:
                return True
            if not isinstance(hook, _RootHook):
                break
        module._forward_pre_hooks.move_to_end(first, last=False)  # type: ignore[attr-defined]  # it is an OrderedDict
        return False

    def _close(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        here = self.here
        record, here.opened = getattr(here, "opened", None), None
        if record is None or output is None:  # always_call: a forward that raised has no output
            return
        here.count = getattr(here, "count", 0) + 1
        here.passed_over = ""
        self.elsewhere = ": the last one ran in another thread, which has to take it"
        if getattr(here, "kept", None) is None or self.forward == "last":
            here.kept = record


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


def _refuse_rounded(*values: object) -> None:
    """Raise ``CaptureError`` if arguments come in less than float32, as another hook may have cast them."""
    rounded = {value.dtype for value in values if isinstance(value, Tensor)} & {torch.bfloat16, torch.float16}
    if rounded:
        raise CaptureError(
            f"The model's arguments were {rounded.pop()} when this library saw them, and another hook had seen them "
            "before: with fully_shard and a mixed-precision policy it rounds them, t too, which decides what is inside "
            "the window.\nAttach after the model was sharded: call criterion.attach(model) after fully_shard or "
            "accelerator.prepare."
        )


class _Stop(BaseException):
    """Leaves a forward at the tapped layer. No ``Exception``: a model's own ``try`` must not swallow it."""


class _StopHook(_Hook["EarlyExit"]):
    """Keeps the layer's output for the forward of its thread that the owner is running, and leaves it there."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        early_exit = self.owner()
        outputs = None if early_exit is None else getattr(early_exit.here, "outputs", None)
        if early_exit is None or outputs is None or module is not self.module():
            return
        stop = early_exit.here.stop
        outputs.append(output if stop else walk(output, lambda tensor, path: tensor.clone()))
        if stop:
            raise _Stop


class EarlyExit:
    """Runs a model up to one layer and returns that layer's raw output.

    What belongs to a forward is kept by its thread: others may run the same model meanwhile, through this or not.
    """

    def __init__(self, model: nn.Module, layer: str) -> None:
        _keep_out_of_graphs()
        module = find_layer(model, layer)
        self.layer = layer
        self.here = threading.local()  # the ``outputs`` of the layer in a forward in progress, and whether to ``stop``
        module.register_forward_hook(_StopHook(self, module))

    def run(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, stop: bool = True) -> Any:
        """The layer's raw output in ``model(*args, **kwargs)``, of which nothing more is run if it is to ``stop``.

        Otherwise the forward goes on, and what fails behind the layer is of no interest.
        """
        outputs: list[Any] = []
        self.here.outputs, self.here.stop = outputs, stop
        try:
            model(*args, **kwargs)
        except _Stop:
            for part in sharded_parts(model):  # as FSDP2's own hooks do where a forward ends
                part.reshard()  # type: ignore[operator]
        except Exception:
            if not outputs:
                raise
        finally:
            self.here.outputs = None
        if not outputs:
            raise CaptureError(
                f"The teacher's forward ended without running layer {self.layer!r}: name one that always runs."
            )
        if len(outputs) > 1:
            raise _ran_often(self.layer, outputs, "teacher")
        return outputs[0]


@contextlib.contextmanager
def watched(
    modules: Iterable[nn.Module],
    started: Callable[[nn.Module, tuple[Any, ...]], None],
    finished: Callable[[nn.Module], None] = _inert,
) -> Iterator[None]:
    """While inside: ``started(module, args)`` and ``finished(module)`` around every call of ``modules``."""
    handles: list[RemovableHandle] = []
    for module in modules:
        handles.append(module.register_forward_pre_hook(lambda m, args: started(m, args)))
        handles.append(module.register_forward_hook(lambda m, args, output: finished(m)))
    try:
        yield
    finally:
        _remove(handles)


@functools.cache
def _keep_out_of_graphs() -> None:
    """Mark the hooks that dynamo must not compile; it would, once for each new record.

    Done when the first hook is made, not when the module is imported: the mark imports all of dynamo.
    """
    for kind in (_RootHook, _StopHook):
        kind.__call__ = torch.compiler.disable(kind.__call__)  # type: ignore[method-assign, no-untyped-call]


class FeatureTap:
    """Capture the tokens of one layer, or of several, without modifying the model.

    Every forward pass is captured, in any mode. The tokens are part of the autograd graph. Used as a context manager it
    removes its hooks on leaving; :meth:`detach` does the same.

    Args:
        model: Any module, wrapped or not.
        layer: The dotted name as the unwrapped model prints it, such as ``"blocks.5"``; or several names.
        select: Which tensor of a tuple, dict or dataclass output: an index, a key, or a callable of the output.
        tokens: Which tokens along the second axis: a slice, or a callable from the selected tensor to (N, T, D), which
            gets the call's arguments by name too if it has a second parameter.

    Raises:
        LayerNotFoundError: If the model has no such layer; nearest names are listed.

    Example:
        >>> import torch, selftrans_reg as st
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 8))
        >>> with st.FeatureTap(model, "0") as tap:
        ...     out = model(torch.zeros(2, 16, 4))
        ...     tap.pop().shape
        torch.Size([2, 16, 8])
    """

    def __init__(
        self, model: nn.Module, layer: str | Sequence[str], *, select: Select = None, tokens: Tokens = None
    ) -> None:
        check_choice(select, tokens)
        self.layer = layer
        self.select = select
        self.tokens = tokens
        root = unwrap(model)
        self._by_name = functools.partial(by_name, inspect.signature(root.forward), model_name=type(root).__name__)
        layers = {name: find_layer(model, name) for name in layer_names(layer)}
        self._layers = {name: (weakref.ref(module), Layout.of(module)) for name, module in layers.items()}
        self._recorder: Recorder[None] | None = Recorder(model, list(layers), lambda record: None)

    def pop(self) -> Tensor | dict[str, Tensor]:
        """The tokens of the forward since the last pop; the tap is empty afterwards.

        Shape:
            returns: (N, T, D), or a dictionary of them by layer name if several layers were named

        Raises:
            CaptureError: If there was no forward, or several; or a layer did not run, or ran more than once; or the
                tap was detached, or is a copy of one.
            CaptureError: If activation checkpointing hides the gradient of a layer that trains.
            CallError: If the layer's output holds several tensors and ``select`` was not given.
        """
        if self._recorder is None:
            raise CaptureError(
                "This tap watches no model: it was detached, as on leaving its with block, or is a copy of one that "
                "does.\nPop before leaving the block; for another model make a new FeatureTap."
            )
        record, found = self._recorder.take(), {}
        arguments = functools.partial(self._by_name, record.args, record.kwargs)
        for name, (ref, layout) in self._layers.items():
            output = record.capture(name).output
            tokens = as_tokens(output, self.select, self.tokens, layer=name, layout=layout, arguments=arguments)
            found[name] = tokens
            module = ref()
            trains = record.with_gradients and module is not None and any(p.requires_grad for p in module.parameters())
            if trains and not tokens.requires_grad:
                raise record.no_gradient(
                    name,
                    "although it trains and gradients were enabled",
                    "Reentrant activation checkpointing hides the gradient of what lies inside a checkpointed segment: "
                    "use use_reentrant=False, or tap the very module that is checkpointed. For features alone call the "
                    "model under torch.no_grad().",
                )
        return found[self.layer] if isinstance(self.layer, str) else found

    def discard(self) -> None:
        """Forget what was captured."""
        if self._recorder is not None:
            self._recorder.discard()

    def detach(self) -> None:
        """Remove every hook."""
        if self._recorder is not None:
            self._recorder.detach()
        self._recorder = None

    def __enter__(self) -> FeatureTap:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()
