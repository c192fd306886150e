"""The method written out plainly, to compare with: functional torch code, no part of the library.

Students and teachers are copies made before anything was attached, watched by one hook of PyTorch's own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def tapped(model: nn.Module, layer: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """What the model returns, and what its layer returned on the way."""
    seen: list[Any] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda module, args, output: seen.append(output))
    output = model(*args, **kwargs)
    handle.remove()
    (captured,) = seen
    return output, captured


def leaves(module: nn.Module) -> dict[str, Tensor]:
    """A copy of a module's parameters, to differentiate with respect to."""
    return {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}


def project(p: Mapping[str, Tensor], tokens: Tensor, prefix: str = "") -> Tensor:
    """Linear SiLU Linear SiLU Linear."""
    for i in (0, 2, 4):
        tokens = F.linear(tokens if i == 0 else F.silu(tokens), p[f"{prefix}{i}.weight"], p[f"{prefix}{i}.bias"])
    return tokens


def predict(p: Mapping[str, Tensor], tokens: Tensor, prefix: str = "") -> Tensor:
    """Stage 1's head: (N, T, D) -> (N, T, p·p·C), the patches of the latents."""
    projected = project(p, tokens, f"{prefix}head.").float()
    normed = (projected - projected.mean(-1, keepdim=True)) / (projected.var(-1, False, keepdim=True) + 1e-6).sqrt()
    return F.linear(normed, p[f"{prefix}linear.weight"], p[f"{prefix}linear.bias"])


def patches(latents: Tensor, size: int = 2) -> Tensor:
    """(N, C, H, W) -> (N, T, p·p·C), patches row by row, channels innermost."""
    blocks = F.unfold(latents, size, stride=size).unflatten(1, (latents.shape[1], size**2))  # (N, C, p·p, T)
    return blocks.permute(0, 3, 2, 1).flatten(2)


def distance(prediction: Tensor, target: Tensor, kind: str = "mse") -> Tensor:
    """(N,), the mean over tokens and, but for the cosine, over the width."""
    if kind == "cosine":
        norms = prediction.square().sum(-1).sqrt() * target.square().sum(-1).sqrt()
        return (1 - (prediction * target).sum(-1) / norms).mean(1)
    error = prediction - target
    if kind == "smooth_l1":
        value = torch.where(error.abs() < 1, 0.5 * error.square(), error.abs() - 0.5)
    else:
        value = error.square()
    return value.flatten(1).mean(1)


def inside(noise_fraction: Tensor, window: tuple[float, float] | None = (0.4, 0.7)) -> Tensor:
    """(N,), 1 or 0."""
    if window is None:
        return torch.ones_like(noise_fraction)
    return ((noise_fraction >= window[0] - 1e-6) & (noise_fraction <= window[1] + 1e-6)).float()


def guided(model: nn.Module, layer: str, scale: float, args: tuple[Any, ...], null_args: tuple[Any, ...]) -> Tensor:
    """f_u + w (f_c − f_u) from two passes through the whole model in eval mode."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        conditional, unconditional = (tapped(model, layer, *a)[1] for a in (args, null_args))
        return unconditional + scale * (conditional - unconditional)


def assert_same_gradients(
    found: nn.Module, wanted: nn.Module | Mapping[str, Tensor], tolerance: Mapping[str, float] = TOLERANCE
) -> None:
    """Every parameter's gradient, to 1e-5 unless told otherwise; and there are gradients to compare."""
    expected = dict(wanted.named_parameters()) if isinstance(wanted, nn.Module) else wanted
    gradients = {name: p.grad for name, p in found.named_parameters()}
    torch.testing.assert_close(gradients, {name: p.grad for name, p in expected.items()}, **tolerance)
    assert any(gradient is not None and gradient.abs().max() > 1e-3 for gradient in gradients.values())


@contextmanager
def global_seed(seed: int) -> Iterator[None]:
    """Fixes what models draw from PyTorch's global generator, and leaves that generator as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@contextmanager
def refused(kind: type[Exception], *parts: str) -> Iterator[None]:
    """While inside, an error of this kind is expected, with all these parts in its message."""
    with pytest.raises(kind) as error:
        yield
    for part in parts:
        assert part in str(error.value)
