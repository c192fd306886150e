"""A pretend GPU: on any machine it shows what on a GPU would fail, or make the host wait.

Its tensors say that they lie on another device (PyTorch's PrivateUse1, which a backend written in Python may take) and
compute on the host. As on CUDA, an operation on tensors of two devices is an error; and a copy to pinned memory has
arrived only when an event behind it was waited for. Whatever would have to wait for the device is noted.

A process has it for good, and not for every other test's sake: :func:`on_pretend_gpu` has a process of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from selftrans_reg import alignment

NAME = "pretend"
GPU = f"{NAME}:0"

_aten = torch.ops.aten
# Their result's shape, or their result itself, is read from the device.
_READS = (
    _aten._local_scalar_dense.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten.equal.default,
    _aten.is_nonzero.default,
)
_INDEXING = (_aten.index.Tensor, _aten.index_put_.default, _aten._index_put_impl_.default)


def on_pretend_gpu(function: Callable[..., Any], *args: object) -> Any:
    """``function(*args)`` in the process that has the pretend GPU, and what it returned."""
    return _pool().submit(_beside_it, function, args).result()


@functools.cache
def _pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, get_context("spawn"), initializer=_install)


def _install() -> None:
    torch.set_num_threads(1)
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    torch.__future__.set_swap_module_params_on_conversion(True)  # how .to() moves parameters to another class
    alignment.ASYNCHRONOUS = (NAME,)
    torch.cuda.Event = _Event
    torch.cuda.current_stream = lambda device: device


def _beside_it(function: Callable[..., Any], args: tuple[object, ...]) -> Any:
    with _Dispatch():
        return function(*args)


class _Module(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class GPUTensor(Tensor):
    """A tensor on the pretend GPU.

    Attributes:
        held: Its values, on the host.
    """

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> GPUTensor:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        tensor = Tensor._make_wrapper_subclass(cls, held.size(), dtype=held.dtype, device=GPU, **layout)
        tensor.held = held
        return tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.tolist:  # of a class like this one PyTorch refuses it
            waits.append("aten.tolist")
            return args[0].held.tolist()
        with torch._C.DisableTorchFunctionSubclass():  # which would make what was copied to the host one of these
            return func(*args, **kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


waits: list[str] = []
"""What has waited for the device so far, by the operation's name."""

_under_way: list[tuple[Tensor, Tensor]] = []  # copies to pinned memory that no event is behind: (to, values)


class _Event:
    """Like CUDA's: what was queued before it has arrived once it was waited for."""

    def record(self, stream: torch.device) -> None:
        assert stream.type == NAME, "the event is recorded in another device's stream"
        self._behind = _under_way.copy()
        _under_way.clear()

    def synchronize(self) -> None:
        for to, values in self._behind:
            to.copy_(values)


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One operation: refused or noted if it is one for that, then done on the host."""
    given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    device = kwargs.get("device")
    on_gpu = any(isinstance(tensor, GPUTensor) for tensor in given) if device is None else device.type == NAME
    if func is _aten._fused_sdp_choice.default:
        return 0  # attention by matrix products
    if func is _aten.is_pinned.default:
        return _pinned(args[0])
    if func is _aten.copy_.default and _leaves_alone(*args, **kwargs):
        to, source = args[:2]
        _under_way.append((to, source.held.clone()))
        return to.logical_not_()  # until the values arrive: wrong ones
    _note(func, args, kwargs, given, on_gpu)
    pinned = kwargs.pop("pin_memory", False) or func is _aten._pin_memory.default
    if device is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    if pinned and func is _aten._pin_memory.default:
        func = _aten.clone.default
    result = func(*tree_map(_held, args), **tree_map(_held, kwargs))
    if pinned:
        result.pinned = True
    if not on_gpu:
        return result
    ours = {id(tensor.held): tensor for tensor in given if isinstance(tensor, GPUTensor)}
    return tree_map(lambda value: _placed(value, ours), result)


def _note(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Tensor], on_gpu: bool) -> None:
    """Note what waits, and refuse what mixes devices."""
    if func in (_aten._to_copy.default, _aten.copy_.default):
        source = given[-1]
        crosses = isinstance(source, GPUTensor) != on_gpu or len({type(tensor) for tensor in given}) > 1
        left_alone = kwargs.get("non_blocking", len(args) > 2 and args[2]) and _pinned(source)
        if crosses and not left_alone:
            waits.append(str(func))
        return
    if not any(isinstance(tensor, GPUTensor) for tensor in given):
        return
    if func in _READS:
        waits.append(str(func))
    indices = [tensor for tensor in tree_leaves(args[1]) if isinstance(tensor, Tensor)] if func in _INDEXING else []
    if any(index.dtype == torch.bool or not isinstance(index, GPUTensor) for index in indices):
        waits.append(str(func))
    for tensor in given:
        if not isinstance(tensor, GPUTensor) and tensor.ndim > 0 and not any(tensor is index for index in indices):
            raise RuntimeError(f"{func} got tensors on the GPU and one of shape {tuple(tensor.shape)} on the host")


def _leaves_alone(to: Tensor, source: Tensor, non_blocking: bool = False) -> bool:
    """Whether a copy goes to pinned memory while the host goes on."""
    return non_blocking and isinstance(source, GPUTensor) and not isinstance(to, GPUTensor) and _pinned(to)


def _pinned(tensor: Tensor) -> bool:
    return getattr(tensor, "pinned", False)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, GPUTensor) else value


def _placed(value: Any, ours: dict[int, GPUTensor]) -> Any:
    """A result on the GPU: the tensor itself where the operation was in place."""
    if not isinstance(value, Tensor):
        return value
    return ours[id(value)] if id(value) in ours else GPUTensor(value)
