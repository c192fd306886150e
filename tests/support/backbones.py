"""How the library is attached to a backbone, and one step of each stage beside the plain formula.

A :class:`Backbone` says what a user of that model would type, and what the plain formula needs to know besides. Paths
are written out here from their papers, so that nothing of the library is compared with itself.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import plain
import torch
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


def _table(alpha_bar: Tensor) -> Path:
    return Path(0, 999, lambda t: (alpha_bar[t].sqrt().float(), (1 - alpha_bar[t]).sqrt().float()), steps=True)


def _alpha_bar(end: float) -> Tensor:
    return (1 - torch.linspace(0.00085**0.5, end**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)


def _cogvideox() -> Path:
    alpha_bar = _alpha_bar(0.012)
    root = (alpha_bar / (3 - 2 * alpha_bar)).sqrt()  # the signal-to-noise ratio divided by 3
    return _table(((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2)


def _uvit(t: Tensor) -> tuple[Tensor, Tensor]:
    s = t / 999
    alpha = (-0.25 * s**2 * 19.9 - 0.05 * s).exp()
    return alpha, (1 - alpha**2).sqrt()


PATHS = {
    "repa": Path(0, 1, lambda t: (1 - t, t)),
    "sit": Path(0, 1, lambda t: (t, 1 - t)),
    "ddpm": _table((1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)),
    "flow": Path(0, 1000, lambda t: (1 - t / 1000, t / 1000)),
    "flow-unit": Path(0, 1, lambda t: (1 - t, t)),
    "uvit": Path(0, 999, _uvit),
    "edm": Path(0.02, 2, lambda t: (torch.ones_like(t), t), data_std=0.5),
    "maskdit": Path(0.02, 4, lambda t: (torch.ones_like(t), t)),
    "cogvideox": _cogvideox(),
    "hunyuandit-1.2": _table(_alpha_bar(0.018)),
    "stable-audio": Path(0, 1, lambda t: (torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t))),
    "mochi": Path(0, 1000, lambda t: (t / 1000, 1 - t / 1000)),
    "scheduler": _table(_alpha_bar(0.015)),
}
# Conventions without a name, as a user makes them: of two functions, or of a scheduler's table.
OWN = {
    "mochi": st.TimeConvention("mochi", alpha=lambda t: t / 1000, sigma=lambda t: 1 - t / 1000, domain=(0, 1000)),
    "scheduler": st.TimeConvention.from_alphas_cumprod("scheduler", _alpha_bar(0.015)),
}


class Batch(NamedTuple):
    """Clean latents, the model's arguments by name and in order, and (N,) 1 for samples in the default window, or 0."""

    latents: Tensor
    arguments: dict[str, Any]
    inside: Tensor


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """One backbone: how it is built and called, how the library is attached, and what the plain formula needs."""

    build: Callable[[int], nn.Module]  # from a seed to a model in train mode
    shape: tuple[int, ...]  # of one sample's latents, as the loop noises them
    time: str  # the convention of its loops
    conditions: Callable[[int, torch.Generator], dict[str, Any]]  # from N to the arguments besides x_t and t
    null: Mapping[str, Any]
    shallow: str  # stage 1's layer
    student: str
    teacher: str
    patch_size: tuple[int, ...] = (2, 2)
    channel_axis: int = 1
    reads: Mapping[str, Any] = field(default_factory=dict)  # call, select and tokens of both stages and the teacher
    teacher_reads: Mapping[str, Any] | None = None  # those of the teacher, where they differ
    settings: Mapping[str, Any] = field(default_factory=dict)  # others of both stages
    asks: int | None = None  # the width of the layers, where it cannot be read off them
    x: str = "x"  # the arguments that hold x_t and t,
    t: str = "t"
    give_x: Callable[[Tensor], Any] = lambda x: x  # and what becomes of both there
    give_t: Callable[[Tensor], Tensor] = lambda t: t
    positional: int = 2  # how many arguments the loop gives by position
    second_call: Mapping[str, Any] | None = None  # what a second call in the same step changes

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
        arguments = {self.x: self.give_x(x_t), self.t: self.give_t(t), **self.conditions(n, g)}
        return Batch(latents, arguments, plain.inside(sigma / (sigma + alpha * path.data_std)))

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loop's own loss for each sample, (N,)."""
        total = torch.zeros(len(batch.latents), device=batch.latents.device)
        for changes in [{}, *([] if self.second_call is None else [self.second_call])]:
            arguments = batch.arguments | changes
            first = [arguments.pop(name) for name in list(arguments)[: self.positional]]
            output = model(*first, **arguments)
            while not isinstance(output, Tensor):  # the image, whatever it comes in
                output = output["x"] if isinstance(output, Mapping) else output[0]
                output = torch.stack(output) if isinstance(output, list) else output  # one a sample
            total = total + output.square().flatten(1).mean(1)
        return total

    def stage1(self, model: nn.Module, **settings: Any) -> st.SelfTransLoss:
        grid = {"latent_channels": self.shape[self.channel_axis - 1], "patch_size": self.patch_size}
        grid["channel_axis"] = self.channel_axis
        return st.SelfTransLoss.stage1(model, **self._settings(self.shallow) | grid | settings)

    def make_teacher(self, model: nn.Module, **settings: Any) -> st.CFGFeatureTeacher:
        """A teacher that takes ``model`` over."""
        taken = {"layer": self.teacher, "guidance_scale": GUIDANCE_SCALE, "null": self.null, "hidden_size": self.asks}
        return st.build_teacher(model, None, **taken | dict(self.teacher_reads or self.reads) | settings)

    def stage2(self, model: nn.Module, teacher: st.CFGFeatureTeacher, **settings: Any) -> st.SelfTransLoss:
        return st.SelfTransLoss.stage2(model, teacher=teacher, **self._settings(self.student) | settings)

    def _settings(self, layer: str) -> dict[str, Any]:
        time = OWN.get(self.time, self.time)
        shared = {"layer": layer, "time": time, "hidden_size": self.asks, "hidden_features": 24}
        return shared | dict(self.reads) | dict(self.settings)

    def picked(self, output: Any, arguments: Mapping[str, Any], reads: Mapping[str, Any]) -> Tensor:
        """The image's tokens in a layer's output."""
        select, tokens = reads.get("select", 0), reads.get("tokens", slice(None))
        if not isinstance(output, Tensor):
            output = select(output) if callable(select) else output[select]
        if output.ndim == 4:  # maps
            return output.flatten(2).mT
        return tokens(output, arguments) if callable(tokens) else output[:, tokens]

    def plain_guided(self, model: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
        """f_u + w (f_c − f_u), from two passes through the whole model in eval mode."""
        model, reads = copy.deepcopy(model).eval(), self.teacher_reads or self.reads
        axes, fixed = (reads.get("call", {}).get(key, {}) for key in ("rows", "fixed"))
        given, n = {**arguments, **fixed}, len(arguments[self.x])
        null = {name: as_rows(value, given[name], n, axes.get(name, 0)) for name, value in self.null.items()}
        with torch.no_grad():
            calls = [given, {**given, **null}]
            f_c, f_u = (self.picked(plain.tapped(model, self.teacher, **call)[1], call, reads) for call in calls)
        return f_u + GUIDANCE_SCALE * (f_c - f_u)

    def plain_losses(self, model: nn.Module, batch: Batch, layer: str) -> tuple[Tensor, Tensor]:
        """The loop's loss for each sample, and the image's tokens of its first call."""
        seen: list[Any] = []
        tapped = getattr(model, "base_model", model).get_submodule(layer)  # PEFT's passes names on to the user's model
        handle = tapped.register_forward_hook(lambda module, args, output: seen.append(output))
        losses = self.losses(model, batch)
        handle.remove()
        return losses, self.picked(seen[0], batch.arguments, self.reads)


def as_rows(value: Any, given: Any, n: int, axis: int = 0) -> Any:
    """The null condition of one argument, for each of n samples."""
    if isinstance(value, Mapping):
        return [as_rows(value[i], entry, n) if i in value else entry for i, entry in enumerate(given)]
    if isinstance(given, list):
        return [value] * n
    if isinstance(value, Tensor):
        return value.unsqueeze(axis).expand_as(given).to(given, copy=True)
    return torch.full_like(given, value)


def patches(latents: Tensor, patch_size: tuple[int, ...], channel_axis: int) -> Tensor:
    """(N, C, *spatial), C on any axis -> (N, T, P), channels innermost."""
    parts, axes = latents.movedim(channel_axis, -1), len(patch_size)
    for axis, size in enumerate(patch_size, 1):
        parts = parts.unfold(axis, size, size)  # (N, *grid, C, *patch)
    return parts.movedim(axes + 1, -1).flatten(axes + 1).flatten(1, axes)


def plain_alignment(
    backbone: Backbone, teacher: nn.Module | None, p: Mapping[str, Tensor], tokens: Tensor, batch: Batch
) -> Tensor:
    """The alignment with a head's parameters in ``p``: of stage 2 with a teacher, of stage 1 without one."""
    if teacher is None:
        target = patches(batch.latents, backbone.patch_size, backbone.channel_axis)
        distance = plain.distance(plain.predict(p, tokens, "heads.0."), target)
    else:
        target = backbone.plain_guided(teacher, batch.arguments)
        distance = plain.distance(plain.project(p, tokens, "heads.0."), target)
    return (batch.inside * distance).sum() / len(batch.inside)


def assert_step_is_plain(backbone: Backbone, stage: int, sizes: Sequence[tuple[int, tuple[int, ...]]] = ()) -> None:
    """Steps on batches of these sizes: loss terms, and the gradients of model and head, are those of the plain formula.

    The teacher is compared once more, in whatever mode it is put, since its first call ran a model of which nothing had
    been dropped.
    """
    model, teacher = backbone.build(0), backbone.build(1)
    reference, reference_teacher = copy.deepcopy(model), copy.deepcopy(teacher)
    if stage == 1:
        layer, criterion = backbone.shallow, backbone.stage1(model)
    else:
        layer, criterion = backbone.student, backbone.stage2(model, backbone.make_teacher(teacher))
    p = plain.leaves(criterion)
    for n, shape in sizes or [(8, backbone.shape)]:
        batch = replace(backbone, shape=shape).batch(n)
        for module in (model, criterion, reference):
            module.zero_grad()
        with plain.global_seed(3):  # models drop labels
            terms = criterion(backbone.losses(model, batch), latents=batch.latents)
        terms.total.backward()

        with plain.global_seed(3):
            losses, tokens = backbone.plain_losses(reference, batch, layer)
        alignment = plain_alignment(backbone, None if stage == 1 else reference_teacher, p, tokens, batch)
        alignment.backward(retain_graph=True)
        assert any(q.grad is not None and q.grad.abs().max() > 1e-4 for q in reference.parameters())
        for parameter in (*reference.parameters(), *p.values()):
            parameter.grad = None
        (losses.mean() + 0.5 * alignment).backward()

        assert 0 < batch.inside.sum() < len(batch.inside)
        torch.testing.assert_close(terms.in_window, batch.inside.mean())
        torch.testing.assert_close(terms.denoising, losses.mean().detach(), **plain.TOLERANCE)
        torch.testing.assert_close(terms.alignment, alignment.detach(), **plain.TOLERANCE)
        plain.assert_same_gradients(model, reference)
        plain.assert_same_gradients(criterion, p)
    if stage == 2:
        arguments = backbone.batch(3, seed=1).arguments
        expected = backbone.plain_guided(reference_teacher, arguments)
        torch.testing.assert_close(criterion.teacher.train()(**arguments), expected, rtol=1e-4, atol=1e-4)
