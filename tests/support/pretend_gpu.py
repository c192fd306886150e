"""A pretend GPU: on any machine it shows what on a GPU would fail, or make the host wait.

Its tensors say that they lie on another device, and compute on the host. As on CUDA, an operation on tensors of two
devices is an error; a copy to pinned memory has arrived only when an event behind it was waited for; and whatever would
have to wait for the device warns, as in CUDA's synchronisation debug mode.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from selftrans_reg import alignment

NAME = "lazy"  # a device that PyTorch knows, that has no backend here, and whose backward passes run on the host

_aten = torch.ops.aten
# Their result's shape, or their result itself, is read from the device.
_READS = (_aten._local_scalar_dense, _aten.nonzero, _aten.masked_select, _aten.equal, _aten.is_nonzero)
_INDEXING = (_aten.index, _aten.index_put_, _aten._index_put_impl_)
_under_way: list[tuple[Tensor, Tensor]] = []  # copies to pinned memory that no event is behind: (to, values)


@contextmanager
def pretend_gpu() -> Iterator[None]:
    """While inside there is one."""
    with pytest.MonkeyPatch.context() as patch, _Dispatch():
        patch.setattr(alignment, "ASYNCHRONOUS", (NAME,))
        patch.setattr(torch.cuda, "Event", _Event)
        patch.setattr(torch.cuda, "current_stream", lambda device: device)
        patch.setattr(torch, NAME, torch.cpu, raising=False)  # the device's module, which checkpointing looks for
        patch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # which does not know the device
        patch.setattr(torch, "is_autocast_enabled", lambda device: False)
        # How .to() moves parameters to another class.
        patch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
        yield


class GPUTensor(Tensor):
    """A tensor on the pretend GPU, whose values the host holds in ``held``."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # what is copied to the host is none of these

    @staticmethod
    def __new__(cls, held: Tensor) -> GPUTensor:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        tensor = Tensor._make_wrapper_subclass(cls, held.size(), dtype=held.dtype, device=f"{NAME}:0", **layout)
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, *args: Any) -> Any:
        raise AssertionError(f"{func} outside of pretend_gpu()")

    def tolist(self) -> list[Any]:
        """Of a class like this one PyTorch refuses it."""
        _waits("tolist")
        return self.held.tolist()


class _Event:
    """Like CUDA's: what was queued before it has arrived once it was waited for."""

    def record(self, stream: torch.device) -> None:
        assert stream.type == NAME, "the event is recorded in another device's stream"
        self._behind = _under_way.copy()
        _under_way.clear()

    def synchronize(self) -> None:
        for to, values in self._behind:
            to.copy_(values)


def _waits(what: object) -> None:
    warnings.warn(f"called a synchronizing operation: {what}", stacklevel=2)


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operation: refused or warned of if it is one for that, then done on the host."""
        if func is _aten._fused_sdp_choice.default:
            return 0  # attention by matrix products
        kwargs = kwargs or {}
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        on_host = [tensor for tensor in given if not isinstance(tensor, GPUTensor)]
        device = kwargs.get("device")
        to_gpu = len(on_host) < len(given) if device is None else device.type == NAME
        if func in (_aten._to_copy.default, _aten.copy_.default):
            to_gpu = isinstance(args[0], GPUTensor) if func is _aten.copy_.default else to_gpu
            goes_on = kwargs.get("non_blocking") or args[2:] == (True,)
            if isinstance(given[-1], GPUTensor) != to_gpu:
                if not goes_on or not any(hasattr(tensor, "pinned") for tensor in on_host):
                    _waits(func)
                elif not to_gpu:
                    _under_way.append((args[0], args[1].held.clone()))
                    return args[0].logical_not_()  # until the values arrive: wrong ones
        elif len(on_host) < len(given):
            indices = args[1] if func.overloadpacket in _INDEXING else ()
            by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
            if by_mask or func.overloadpacket in _READS:
                _waits(func)
            if any(tensor.ndim > 0 for tensor in on_host):
                raise RuntimeError(f"{func} got tensors on the GPU and on the host")
        pinned = kwargs.pop("pin_memory", False)
        if func is _aten._pin_memory.default:
            func, pinned = _aten.clone.default, True
        kwargs = kwargs if device is None else kwargs | {"device": "cpu"}
        held_args, held_kwargs = tree_map(lambda v: v.held if isinstance(v, GPUTensor) else v, (args, kwargs))
        result = func(*held_args, **held_kwargs)
        if pinned:
            result.pinned = True
        if func._schema.is_mutable:
            return args[0]
        return tree_map(lambda v: GPUTensor(v) if isinstance(v, Tensor) else v, result) if to_gpu else result
