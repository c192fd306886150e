"""Dropping the weights that a teacher never uses before its layer, and compiling its blocks."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .errors import PrunedModuleError
from .modules import named_layers, unwrap
from .taps import watched


class Dropped:
    """Stands where a parameter or buffer was that took no part; says so when it is used.

    Args:
        name: The module that was dropped.
        touched: Where to write the name down as well, since the model may swallow the error.
    """

    def __init__(self, name: str, touched: list[str]) -> None:
        self.name = name
        self.touched = touched

    def __getattr__(self, attribute: str) -> NoReturn:
        if attribute.startswith("__"):  # what copy and pickle ask every object for
            raise AttributeError(attribute)
        self.refuse()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls)).refuse()

    def refuse(self) -> NoReturn:
        """Raise ``PrunedModuleError``, and note it."""
        self.touched.append(self.name)
        raise pruned_error(self.name)


def pruned_error(name: str) -> PrunedModuleError:
    """What to raise when a module that was dropped is used."""
    return PrunedModuleError(
        f"Module {name!r} of the teacher was used, but it was dropped: the teacher's first call did not run it before "
        "the tapped layer.\nGive build_teacher an example= that takes every path which later calls take."
    )


class Usage(TorchFunctionMode):
    """While inside: notes every tensor that an operation is given, and which modules of a model start and finish.

    It does not matter how a model reaches a tensor: as a child's, in a tuple, in a closure, without a call.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.seen: set[object] = set()
        self.parameters: dict[object, nn.Parameter] = {}
        self.started: set[nn.Module] = set()
        self.finished: set[nn.Module] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self.seen.add(identity(leaf))
            if isinstance(leaf, nn.Parameter):
                self.parameters[identity(leaf)] = leaf
        return func(*args, **(kwargs or {}))

    def of(self, run: Callable[[], Tensor]) -> Tensor:
        """``run()``, watched."""
        with self, watched(self.model.modules(), lambda module, args: self.started.add(module), self.finished.add):
            return run()

    def unused(self) -> list[str]:
        """The largest modules that hold tensors, of which nothing took part.

        A module that finished is kept whole: compiled code may have used parts of it. So is what FSDP2 gathers
        together with something that ran, and puts back each time.
        """
        found: list[nn.Module] = []

        def walk(module: nn.Module, gathered: bool) -> None:
            gathered = module in self.started if _is_sharded(module) else gathered
            for child in module.children():
                if child in self.finished:
                    continue
                tensors = _tensors(child)
                ran = any(m in self.started for m in child.modules()) or any(identity(t) in self.seen for t in tensors)
                if ran or (gathered and not _is_sharded(child)):
                    walk(child, gathered)
                elif tensors:
                    found.append(child)

        walk(unwrap(self.model), gathered=False)
        names = {module: name for name, module in named_layers(self.model).items()}
        return [names[module] for module in found if module in names]

    def foreign(self) -> bool:
        """Whether parameters took part that are none of the model's own, as of adapters patched onto its layers."""
        return not self.parameters.keys() <= {identity(tensor) for tensor in _tensors(self.model)}


def identity(tensor: Tensor) -> object:
    """The same for all tensors that share memory."""
    try:
        return tensor.untyped_storage().data_ptr() or id(tensor)
    except (RuntimeError, NotImplementedError):  # of tensors that hold several, such as quantised ones
        return id(tensor)


def _is_sharded(module: nn.Module) -> bool:
    return hasattr(type(module), "reshard")  # by FSDP2, with all below that is not sharded itself


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def drop_unused(usage: Usage, run: Callable[[], Tensor], reference: Tensor) -> None:
    """Drop what took no part in ``run``, unless ``run()`` gives something else without it."""
    put_back = drop(usage.model, usage.unused())
    try:
        same = torch.allclose(run(), reference, rtol=1e-4, atol=1e-5, equal_nan=True)
    except Exception:  # whatever a model does that misses a part of itself
        same = False
    if not same:
        put_back()
        warnings.warn(
            "The teacher's features changed when the weights that take no part in them were dropped, so the teacher "
            "was kept whole. Its forward looks at its own modules: please report the model.",
            stacklevel=2,
        )


def drop(model: nn.Module, names: Iterable[str]) -> Callable[[], None]:
    """Put a :class:`Dropped` in the place of every tensor in modules of these names.

    Returns:
        What puts them back.
    """
    layers, touched = named_layers(model), touched_in(model)
    gone: dict[nn.Module, str] = {}
    for name in names:
        for module in layers[name].modules() if name in layers else ():
            gone.setdefault(module, name)
    homes: list[tuple[nn.Module, dict[str, Any]]] = [(m, h) for m in gone for h in (m._parameters, m._buffers)]
    places = [(*home, name, tensor) for home in homes for name, tensor in home[1].items() if tensor is not None]
    for module, home, name, _ in places:
        del home[name]
        module.__dict__[name] = Dropped(gone[module], touched)

    def put_back() -> None:
        for module, home, name, tensor in places:
            del module.__dict__[name]
            home[name] = tensor

    return put_back


def _dropped(model: nn.Module) -> Iterator[Dropped]:
    return (value for module in model.modules() for value in vars(module).values() if isinstance(value, Dropped))


def touched_in(model: nn.Module) -> list[str]:
    """The list in which what was dropped from ``model`` notes that it was used."""
    return next((dropped.touched for dropped in _dropped(model)), [])


def dropped_names(model: nn.Module) -> list[str]:
    """The names of the modules whose tensors a truncated model has lost."""
    return list(dict.fromkeys(dropped.name for dropped in _dropped(model)))


# Sizes to which rows are padded, from a power of two to the next. How many are inside the window differs from step to
# step. Graphs of a changing size take them all, but a block whose code depends on the size needs a graph for each.
# Sixteen cost a sixteenth more rows at most; multiples of eight would make 24 rows of 18.
_SIZES = 16


def compile_blocks(model: nn.Module) -> None:
    """Compile the forward of every block of ``model``; one graph serves all blocks of a class that are alike.

    The forward as a whole cannot be compiled, since it is left by an exception. Where PyTorch can, the graphs get a
    cache of their own: student, EMA copy and teacher share a class, and with it a cache of eight entries; and as many
    entries as blocks may need that differ in a number, such as their index.
    """
    blocks = blocks_of(model)
    wanted = {"isolate_recompiles": True, "recompile_limit": 8 * len(blocks)}
    options: dict[str, Any] = {k: v for k, v in wanted.items() if k in inspect.signature(torch.compile).parameters}
    compiled: dict[type[nn.Module], Callable[..., Any]] = {}
    for block in blocks:
        if "forward" in vars(block):  # patched for this block alone, as by accelerate's hooks
            block.forward = torch.compile(block.forward, **options)
            continue
        kind = type(block)
        if kind not in compiled:
            compiled[kind] = torch.compile(kind.forward, **options)
        block.forward = functools.partial(compiled[kind], block)


def blocks_of(model: nn.Module, inside: bool = False) -> list[nn.Module]:
    """The outermost members of lists and dicts of modules, and of Sequentials of one class, as timm has them."""
    found: dict[nn.Module, None] = {}  # a dict keeps the order, and a shared block once
    for child in model.children():
        kinds = {type(member) for member in child.children()}
        is_container = isinstance(child, nn.ModuleList | nn.ModuleDict) or (
            isinstance(child, nn.Sequential) and len(child) > 1 and len(kinds) == 1
        )
        found |= {child: None} if inside and not is_container else dict.fromkeys(blocks_of(child, is_container))
    return list(found)


def pad_rows(tensor: Tensor) -> Tensor:
    """The tensor with its last row repeated up to one of a few sizes, at most a sixteenth larger."""
    octave = 2 ** (len(tensor).bit_length() - 1)
    missing = -len(tensor) % max(1, octave // _SIZES)
    return torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])]) if missing else tensor
