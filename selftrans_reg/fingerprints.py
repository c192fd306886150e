"""What makes a teacher the one that it is, in 32 bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .names import unwrap


def fingerprint(model: nn.Module, settings: Mapping[str, Any]) -> Tensor:
    """SHA-256 of a model's weights and of what its features depend on besides, as 32 bytes in a uint8 tensor.

    Args:
        model: The model, whole.
        settings: By name, numbers, strings, slices, tensors, and functions, which count by their names.
    """
    digest = hashlib.sha256()
    digest.update("\n".join(f"{name}={_plain(value)}" for name, value in sorted(settings.items())).encode())
    for name, value in sorted(unwrap(model).state_dict().items()):
        if isinstance(value, Tensor):  # a module's extra state may be anything
            digest.update(f"\n{name} {_plain(value)}".encode())
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


def architecture(model: nn.Module) -> str:
    """SHA-256 of the keys and shapes of the model's weights, in hexadecimal."""
    state = unwrap(model).state_dict()
    lines = [f"{key} {tuple(value.shape)}" for key, value in sorted(state.items()) if isinstance(value, Tensor)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _plain(value: Any) -> str:
    if isinstance(value, Tensor):
        value = value.full_tensor() if hasattr(value, "full_tensor") else value  # FSDP2 holds a part on each rank
        flat = value.detach().cpu().contiguous().reshape(-1)
        data = memoryview(flat.view(torch.uint8).numpy())
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(data).hexdigest()}"
    return getattr(value, "__qualname__", "callable") if callable(value) else repr(value)
