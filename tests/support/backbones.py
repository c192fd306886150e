"""How the library is attached to a backbone, and one step of each stage beside the plain formula.

A :class:`Backbone` says what a user of that model would type, and what the plain formula needs to know besides. Paths
are written out here from their papers, so that nothing of the library is compared with itself.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import plain
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import selftrans_reg as st

GUIDANCE_SCALE = 3.0


class Path(NamedTuple):
    """``x_t = alpha x + sigma noise`` at times from ``low`` to ``high``, whole ones if it is a table."""

    low: float
    high: float
    coefficients: Callable[[Tensor], tuple[Tensor, Tensor]]
    steps: bool = False
    data_std: float = 1.0


def _ddpm(betas: Tensor) -> Path:
    return _table((1 - betas.double()).cumprod(0))


def _cogvideox() -> Path:
    alpha_bar = (1 - _scaled_linear(0.012)).cumprod(0)
    root = (alpha_bar / (3 - 2 * alpha_bar)).sqrt()  # the signal-to-noise ratio divided by 3
    return _table(((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2)


def _table(alpha_bar: Tensor) -> Path:
    return Path(0, 999, lambda t: (alpha_bar[t].sqrt().float(), (1 - alpha_bar[t]).sqrt().float()), steps=True)


def _scaled_linear(end: float) -> Tensor:
    return torch.linspace(0.00085**0.5, end**0.5, 1000, dtype=torch.float64) ** 2


def _uvit(t: Tensor) -> tuple[Tensor, Tensor]:
    s = t / 999
    alpha = (-0.25 * s**2 * 19.9 - 0.05 * s).exp()
    return alpha, (1 - alpha**2).sqrt()


PATHS = {
    "repa": Path(0, 1, lambda t: (1 - t, t)),
    "sit": Path(0, 1, lambda t: (t, 1 - t)),
    "ddpm": _ddpm(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)),
    "flow": Path(0, 1000, lambda t: (1 - t / 1000, t / 1000)),
    "flow-unit": Path(0, 1, lambda t: (1 - t, t)),
    "uvit": Path(0, 999, _uvit),
    "edm": Path(0.02, 2, lambda t: (torch.ones_like(t), t), data_std=0.5),
    "maskdit": Path(0.02, 4, lambda t: (torch.ones_like(t), t)),
    "cogvideox": _cogvideox(),
    "hunyuandit-1.2": _ddpm(_scaled_linear(0.018)),
    "stable-audio": Path(0, 1, lambda t: (torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t))),
}


def first_argument(output: Any, arguments: Mapping[str, Any]) -> Any:
    """The output as it is."""
    return output


@dataclass(frozen=True)
class Batch:
    """Clean latents, and the arguments of the model's call by name, in the signature's order.

    Attributes:
        latents: In the layout in which the model gets x_t.
        arguments: x_t, t and the conditions.
        inside: (N,), 1 for the samples in the default window, else 0.
    """

    latents: Tensor
    arguments: dict[str, Any]
    inside: Tensor


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """One backbone: how it is built and called, how the library is attached, and what the plain formula needs.

    Attributes:
        build: From a seed to a model in train mode.
        shape: Of one sample's latents, in the layout in which the model gets x_t.
        time: The convention of its loops.
        conditions: From a batch size and a generator to the arguments besides x_t and t.
        null: The null condition.
        shallow, student, teacher: Layers of stage 1 and of stage 2.
        patch_size, channel_axis: Of the latents.
        reads: Settings that both stages and the teacher take: ``call``, ``select``, ``tokens``.
        teacher_reads: Those of the teacher, where they differ.
        settings: Other settings of both stages.
        asks: The width of the layers, where it cannot be read off them.
        x, t: Names of the arguments that hold x_t and t.
        t_dtype, t_axes: How the loop gives t.
        positional: How many arguments the loop gives by position.
        second_call: What a second call in the same step changes; None without one.
        image: From the model's output to the image that the loop compares.
        pick: From a layer's output and the call's arguments to the image's tokens.
        teacher_pick: The same for the teacher's layer, where it differs.
    """

    build: Callable[[int], nn.Module]
    shape: tuple[int, ...]
    time: str
    conditions: Callable[[int, torch.Generator], dict[str, Any]]
    null: Mapping[str, Any]
    shallow: str
    student: str
    teacher: str
    patch_size: tuple[int, ...] = (2, 2)
    channel_axis: int = 1
    reads: Mapping[str, Any] = field(default_factory=dict)
    teacher_reads: Mapping[str, Any] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    asks: int | None = None
    x: str = "x"
    t: str = "t"
    t_dtype: torch.dtype = torch.float32
    t_axes: int = 1
    positional: int = 2
    second_call: Mapping[str, Any] | None = None
    image: Callable[[Any], Tensor] = lambda output: output
    pick: Callable[[Any, Mapping[str, Any]], Tensor] = first_argument
    teacher_pick: Callable[[Any, Mapping[str, Any]], Tensor] | None = None

    def batch(self, n: int = 8, seed: int = 0) -> Batch:
        """A batch whose times are spread over the whole range."""
        g = torch.Generator().manual_seed(seed)
        latents, noise = torch.randn(2, n, *self.shape, generator=g)
        path = PATHS[self.time]
        t = path.low + (path.high - path.low) * (torch.randperm(n, generator=g) + torch.rand(n, generator=g)) / n
        t = t.long() if path.steps else t
        alpha, sigma = path.coefficients(t)
        axes = (n, *[1] * len(self.shape))
        x_t = alpha.reshape(axes) * latents + sigma.reshape(axes) * noise
        given = t.to(self.t_dtype).reshape(n, *[1] * (self.t_axes - 1))
        arguments = {self.x: x_t, self.t: given, **self.conditions(n, g)}
        return Batch(latents, arguments, plain.inside(sigma / (sigma + alpha * path.data_std)))

    def call(self, model: nn.Module, arguments: Mapping[str, Any]) -> Any:
        """The model's call as the loop writes it, some arguments by position."""
        positional = list(arguments)[: self.positional]
        return model(*(arguments[n] for n in positional), **{n: v for n, v in arguments.items() if n not in positional})

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loop's own loss for each sample, (N,)."""
        total = torch.zeros(len(batch.latents), device=batch.latents.device)
        for changes in [{}, *([] if self.second_call is None else [self.second_call])]:
            image = self.image(self.call(model, batch.arguments | changes))
            total = total + (image - batch.latents).square().flatten(1).mean(1)
        return total

    def stage1(self, model: nn.Module, **settings: Any) -> st.SelfTransLoss:
        """The criterion of stage 1, attached to ``model``."""
        channels = self.shape[self.channel_axis - 1]
        grid = {"latent_channels": channels, "patch_size": self.patch_size, "channel_axis": self.channel_axis}
        return st.SelfTransLoss.stage1(model, **self._settings(self.shallow) | grid | settings)

    def make_teacher(self, model: nn.Module, **settings: Any) -> st.CFGFeatureTeacher:
        """A teacher that takes ``model`` over."""
        reads = self.reads if self.teacher_reads is None else self.teacher_reads
        taken = {"layer": self.teacher, "guidance_scale": GUIDANCE_SCALE, "null": self.null, "hidden_size": self.asks}
        return st.build_teacher(model, None, **taken | dict(reads) | settings)

    def stage2(self, model: nn.Module, teacher: st.CFGFeatureTeacher, **settings: Any) -> st.SelfTransLoss:
        """The criterion of stage 2, attached to ``model``."""
        return st.SelfTransLoss.stage2(model, teacher=teacher, **self._settings(self.student) | settings)

    def _settings(self, layer: str) -> dict[str, Any]:
        shared = {"layer": layer, "time": self.time, "hidden_size": self.asks, "hidden_features": 24}
        return shared | dict(self.reads) | dict(self.settings)

    def plain_tokens(self, model: nn.Module, layer: str, arguments: Mapping[str, Any]) -> Tensor:
        """The image's tokens behind the teacher's layer, by a hook of PyTorch's own."""
        _, captured = plain.tapped(model, layer, **arguments)
        return (self.teacher_pick or self.pick)(captured, arguments)

    def plain_guided(self, model: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
        """f_u + w (f_c − f_u), from two passes through the whole model in eval mode."""
        model, null = copy.deepcopy(model).eval(), {}
        arguments = {**arguments, **dict(self.teacher_reads or {}).get("call", {}).get("fixed", {})}
        for name, value in self.null.items():
            given = arguments[name]
            null[name] = torch.zeros_like(given) + torch.as_tensor(value, dtype=given.dtype)
        with torch.no_grad():
            f_c, f_u = (self.plain_tokens(model, self.teacher, a) for a in (arguments, {**arguments, **null}))
        return f_u + GUIDANCE_SCALE * (f_c - f_u)

    def plain_losses(self, model: nn.Module, batch: Batch, layer: str) -> tuple[Tensor, Tensor]:
        """The loop's loss for each sample, and the image's tokens of its first call."""
        seen: list[Any] = []
        handle = model.get_submodule(layer).register_forward_hook(lambda module, args, output: seen.append(output))
        losses = self.losses(model, batch)
        handle.remove()
        return losses, self.pick(seen[0], batch.arguments)


def patches(latents: Tensor, patch_size: tuple[int, ...], channel_axis: int) -> Tensor:
    """(N, C, *spatial), C on any axis -> (N, T, P), channels innermost; by reshaping alone."""
    spatial = [axis for axis in range(1, latents.ndim) if axis != channel_axis]
    latents = latents.permute(0, *spatial, channel_axis)
    n, *sizes, channels = latents.shape
    split = [part for size, p in zip(sizes, patch_size, strict=True) for part in (size // p, p)]
    grid, inner = range(1, 2 * len(sizes), 2), range(2, 2 * len(sizes) + 1, 2)
    parts = latents.reshape(n, *split, channels).permute(0, *grid, *inner, 2 * len(sizes) + 1)
    return parts.reshape(n, math.prod(split[::2]), -1)


def plain_alignment(
    backbone: Backbone,
    teacher: nn.Module | None,
    p: Mapping[str, Tensor],
    tokens: Tensor,
    batch: Batch,
    head: str = "heads.0.",
) -> Tensor:
    """The alignment with a head's parameters in ``p``: of stage 2 with a teacher, of stage 1 without one."""
    if teacher is None:
        projected = plain.project(p, tokens, f"{head}head.")
        normed = F.layer_norm(projected, projected.shape[-1:], eps=1e-6)
        predicted = F.linear(normed, p[f"{head}linear.weight"], p[f"{head}linear.bias"])
        target = patches(batch.latents, backbone.patch_size, backbone.channel_axis)
    else:
        predicted, target = plain.project(p, tokens, head), backbone.plain_guided(teacher, batch.arguments)
    return (batch.inside * plain.distance(predicted, target)).sum() / len(batch.inside)


def assert_step_is_plain(backbone: Backbone, stage: int) -> None:
    """One step on a batch: loss terms, and the gradients of model and head, are those of the plain formula."""
    model, teacher, batch = backbone.build(0), backbone.build(1), backbone.batch()
    reference, reference_teacher = copy.deepcopy(model), copy.deepcopy(teacher)
    if stage == 1:
        layer, criterion = backbone.shallow, backbone.stage1(model)
    else:
        layer, criterion = backbone.student, backbone.stage2(model, backbone.make_teacher(teacher))
    with plain.global_seed(3):  # models drop labels
        terms = criterion(backbone.losses(model, batch), latents=batch.latents)
    terms.total.backward()

    p = plain.leaves(criterion)
    with plain.global_seed(3):
        losses, tokens = backbone.plain_losses(reference, batch, layer)
    alignment = plain_alignment(backbone, None if stage == 1 else reference_teacher, p, tokens, batch)
    (losses.mean() + 0.5 * alignment).backward(retain_graph=True)

    assert 0 < batch.inside.sum() < len(batch.inside)
    torch.testing.assert_close(terms.in_window, batch.inside.mean())
    torch.testing.assert_close(terms.denoising, losses.mean().detach(), **plain.TOLERANCE)
    torch.testing.assert_close(terms.alignment, alignment.detach(), **plain.TOLERANCE)
    plain.assert_same_gradients(model, reference)
    plain.assert_same_gradients(criterion, p)
    reference.zero_grad()
    alignment.backward()
    assert any(q.grad is not None and q.grad.abs().max() > 1e-4 for q in reference.get_submodule(layer).parameters())
