"""Run a model on noisy inputs with condition and null condition, and keep what a report needs of every layer.

Of each layer's tokens the mean over them is kept, on the CPU, and a few sums: the guided features of any scale follow
from these, since both the mean and ``f_u + w (f_c − f_u)`` are linear.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..calls import CallSpec, RowTensors
from ..errors import SettingError, ShapeError
from ..modules import device_of, find_layer, quoted
from ..null import Null, NullCondition, checked_indices
from ..taps import FeatureTap, watched
from ..time import TimeConvention, is_number
from ..tokens import Select, Tokens, described

Progress: TypeAlias = Callable[[Iterable[Any], str], Iterable[Any]] | None

# A table of steps has no step at every fraction, and none may reach the ends.
_NEAR = 0.01
# A noise level of so many times the data's is beyond any.
_HIGHEST = 2.0**20
# Halvings of the interval of t: float32 tells no more of them apart, even from so high an end.
_HALVINGS = 60


class Batch(NamedTuple):
    """One batch as the caller gave it, on the model's device."""

    latents: Tensor  # (N, ...), clean
    labels: Tensor | None  # (N,), whole numbers
    arguments: dict[str, Any]  # of the model, by name: all but x_t and t


@dataclass
class Cell:
    """One layer at one noise fraction."""

    conditional: list[Tensor] = field(default_factory=list)  # (N, D) a batch: f_c's mean over the tokens, on the CPU
    unconditional: list[Tensor] = field(default_factory=list)  # f_u's; nothing without a null condition
    # |f_c|², |f_u|², <f_u, f_c − f_u>, |f_c − f_u|² over all samples and tokens, and the number of tokens
    sums: list[float] = field(default_factory=lambda: [0.0] * 5)
    broken: int = 0  # samples whose features are not finite, or so large that their squares are not

    def add(self, conditional: Tensor, unconditional: Tensor | None) -> None:
        """Take in a batch's (f_c, f_u), each (N, T, D) in float32."""
        null = conditional if unconditional is None else unconditional
        difference = conditional - null
        products = (conditional.square(), null.square(), null * difference, difference.square())
        rows = torch.stack([product.sum((1, 2)) for product in products])  # (4, N)
        broken = (~rows.isfinite().all(0)).sum()
        *found, count = torch.cat([rows.double().sum(1), broken[None].double()]).tolist()
        self.broken += int(count)
        tokens = conditional.shape[0] * conditional.shape[1]
        self.sums = [total + new for total, new in zip(self.sums, [*found, tokens], strict=True)]
        self.conditional.append(conditional.mean(1).cpu())
        if unconditional is not None:
            self.unconditional.append(unconditional.mean(1).cpu())

    def pooled(self, scale: float, device: torch.device) -> Tensor:
        """The pooled features f_u + scale (f_c − f_u) of all samples, (n, D), in float64."""
        conditional = torch.cat(self.conditional).to(device).double()
        if not self.unconditional:
            return conditional
        unconditional = torch.cat(self.unconditional).to(device).double()
        return unconditional + scale * (conditional - unconditional)

    def contrast(self) -> float:
        """|f_c − f_u| / |f_c|."""
        return math.sqrt(self.sums[3] / self.sums[0]) if self.sums[0] else 0.0

    def norm(self, scale: float) -> float:
        """Root mean square, over samples and tokens, of the norm of a token's guided features."""
        _, null, product, difference, tokens = self.sums
        square = null + 2 * scale * product + scale**2 * difference if self.unconditional else self.sums[0]
        return math.sqrt(max(square, 0.0) / tokens)


class Survey(NamedTuple):
    """What a model's layers gave."""

    layers: tuple[str, ...]  # in the order in which they ran
    cells: dict[tuple[str, float], Cell]  # by layer and noise fraction
    labels: Tensor | None  # (n,), on the CPU
    samples: int  # n
    conditioned: bool  # whether the model was given anything beside x_t and t


class LayerReader:
    """Runs a model on noisy latents, on condition and null condition, and gives its layers' tokens.

    The model, which is left as it is, gets the latents and conditions as they are given, and x_t in the latents' dtype.
    The arguments are those of ``layer_report``.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        *,
        time: TimeConvention,
        null: Null | None,
        call: Mapping[str, Any] | None,
        select: Select,
        tokens: Tokens,
    ) -> None:
        self.model, self.layers, self.time = model, tuple(layers), time
        self.select, self.tokens = select, tokens
        self.spec = CallSpec(model, call)
        if self.spec.x is None or self.spec.t is None:
            raise SettingError(
                "Here x_t and t are put into the call, so call= must name their arguments, as call=dict(x='x', t='t'); "
                "callables only read them."
            )
        self.null = None if null is None else NullCondition(null, self.spec).to(device_of(model))
        self.modules = {name: find_layer(model, name) for name in self.layers}
        self.device = device_of(model)

    def read(self, batch: Any) -> Batch:
        """A caller's batch by parts.

        Raises:
            SettingError: If it is neither ``(latents, *condition)`` nor a mapping with ``latents``, or holds what the
                model does not take, or latents that are none or not finite.
            ShapeError: If the labels are not one whole number for each sample.
        """
        batch = dict(batch) if isinstance(batch, Mapping) else batch
        batch = tree_map_only(Tensor, lambda tensor: tensor.to(self.device), batch)
        names = [name for name in self.spec.names if name not in (self.spec.x, self.spec.t)]
        if isinstance(batch, Mapping) and "latents" in batch:
            latents, labels = batch["latents"], batch.get("labels")
            own = {"latents"} if "labels" in names else {"latents", "labels"}
            arguments = {name: value for name, value in batch.items() if name not in own}
        elif isinstance(batch, list | tuple) and 0 < len(batch) <= 1 + len(names):
            latents, labels = batch[0], None
            arguments = dict(zip(names, batch[1:], strict=False))
            if len(batch) > 1 and _are_labels(batch[1], latents):
                labels = batch[1]
        else:
            found = f"the keys {quoted(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
            raise SettingError(
                f"A batch must be (latents, *condition), the condition in the order of {quoted(names)}; or a mapping "
                f"with 'latents', if there are any 'labels', and the model's other arguments by name.\nGot {found}"
                + (f" of {len(batch)}." if isinstance(batch, list | tuple) else ".")
            )
        usable = isinstance(latents, Tensor) and latents.is_floating_point() and latents.ndim > 0 and len(latents) > 0
        if not usable or not latents.isfinite().all():
            raise SettingError(
                "The latents of a batch must be a floating tensor (N, ...) of finite values, one sample or more; got "
                f"{described(latents)}."
            )
        if labels is not None and not _are_labels(labels, latents):
            raise ShapeError(
                f"Labels must be whole numbers (N,), one for each of {len(latents)} latents; got {described(labels)}."
            )
        return Batch(latents, labels, arguments)

    def run(self, batch: Batch, noise: Tensor, fraction: float) -> dict[str, tuple[Tensor, Tensor | None]]:
        """The tokens (f_c, f_u), each (N, T, D) in float32, of every layer; f_u is None without a null condition.

        Raises:
            SettingError: If the null condition does not fit the call, or the latents' dtype the model.
            CaptureError: If a layer does not run, or runs more than once.
            ShapeError: If a layer keeps no row for each sample.
        """
        t = times_at(self.time, fraction, len(batch.latents), self.device)
        x_t = add_noise(self.time, batch.latents, noise, t)
        args, kwargs = self.spec.arguments({str(self.spec.x): x_t, str(self.spec.t): t, **batch.arguments})
        call = self.spec.bind(args, kwargs)
        held = RowTensors(call, self.spec.known, () if self.null is None else self.null.values)
        passes = [(held, held.tensors)] if self.null is None else self.null.passes(call, held)
        found = [self._tokens(side.rebuild(tensors), x_t, len(tensors[0])) for side, tensors in passes]
        halves = {
            name: torch.cat([tokens[name] for tokens in found]).chunk(1 if self.null is None else 2)
            for name in self.layers
        }
        return {name: (half[0], half[1] if len(half) > 1 else None) for name, half in halves.items()}

    def _tokens(self, arguments: dict[str, Any], x_t: Tensor, rows: int) -> dict[str, Tensor]:
        args, kwargs = self.spec.arguments(arguments)
        with (
            checked_indices(self.model, self.null),
            torch.compiler.set_stance("force_eager"),  # what was compiled before has no hook in it
            FeatureTap(self.model, self.layers, select=self.select, tokens=self.tokens) as tap,
        ):
            try:
                self.model(*args, **kwargs)
            except RuntimeError as error:
                own = sorted({str(p.dtype).removeprefix("torch.") for p in self.model.parameters()})
                given = str(x_t.dtype).removeprefix("torch.")
                if "type" not in str(error) or own == [given]:
                    raise
                raise SettingError(
                    f"The model fails on latents in {given}; its weights are in {', '.join(own)}: {error}\n"
                    "Nothing is cast: give latents and conditions in the dtypes that the model is called with, as "
                    "latents.to(torch.bfloat16), or measure under torch.autocast."
                ) from error
            found = tap.pop()
        assert isinstance(found, dict)
        for name, tokens in found.items():
            if len(tokens) != rows:
                raise ShapeError(
                    f"Layer {name!r} gives {len(tokens)} rows for a batch of {rows}: name layers that keep one row "
                    "for each sample."
                )
        return {name: tokens.float() for name, tokens in found.items()}


@torch.no_grad()
def survey(
    reader: LayerReader,
    batches: Iterable[Any],
    fractions: Sequence[float],
    *,
    samples: int,
    seed: int,
    progress: Progress,
) -> Survey:
    """Run the model at every noise fraction on whole batches until there are so many samples, or no more batches.

    The noise of a sample is the same at all fractions.

    Raises:
        SettingError: If some batches have labels and others none, or there is no batch.
    """
    cells = {(layer, fraction): Cell() for layer in reader.layers for fraction in fractions}
    labels: list[Tensor | None] = []
    order: list[nn.Module] = []
    count = 0
    generator = noise_generator(seed)
    batches = batches if progress is None else progress(batches, "features")
    with undisturbed(reader.model):
        for raw in batches:
            batch = reader.read(raw)
            noise = torch.randn(batch.latents.shape, generator=generator, device="cpu").to(batch.latents)
            for fraction in fractions:
                seen = [] if order else list(reader.modules.values())
                with watched(seen, lambda module, args: order.append(module)):
                    found = reader.run(batch, noise, fraction)
                for layer, features in found.items():
                    cells[layer, fraction].add(*features)
            labels.append(None if batch.labels is None else batch.labels.cpu())
            count += len(batch.latents)
            if count >= samples:
                break
    if not labels:
        raise SettingError("There is no batch to measure on: batches= is empty, or an iterator that is used up.")
    known = [label for label in labels if label is not None]
    if known and len(known) != len(labels):
        raise SettingError(f"{len(known)} of {len(labels)} batches have labels: give them with all, or with none.")
    layers = tuple(sorted(reader.layers, key=lambda layer: order.index(reader.modules[layer])))
    return Survey(layers, cells, torch.cat(known) if known else None, count, bool(batch.arguments))


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """While inside, the model is in eval mode; afterwards it and the global random state are as they were."""
    training = {module: module.training for module in model.modules()}
    device = device_of(model)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            model.eval()
            yield
        finally:
            for module, mode in training.items():
                module.training = mode


def noise_generator(seed: object) -> torch.Generator:
    """A generator on the CPU.

    Raises:
        SettingError: If the seed is none that PyTorch takes.
    """
    if type(seed) is not int or not 0 <= seed < 1 << 64:
        raise SettingError(f"seed must be a whole number from 0 to 2**64 - 1; got {seed!r:.80}.")
    return torch.Generator("cpu").manual_seed(seed)


def time_at(time: TimeConvention, fraction: float) -> float:
    """The t at which ``time.noise_fraction(t)`` is ``fraction``; of steps, the nearest one.

    By bisection: every path from data to noise is monotonic in its noise fraction.

    Raises:
        SettingError: If the fraction is not in [0, 1], the convention does not say where t ends, or no t comes within
            0.01 of the fraction.
    """
    if not is_number(fraction) or not 0 <= fraction <= 1:
        raise SettingError(f"A noise fraction is a number from 0 (data) to 1 (noise); got {fraction!r}.")
    if time.domain is None:
        raise SettingError(
            f"Time convention {time.name!r} does not say from where to where t goes, so the t of noise fraction "
            f"{fraction:g} cannot be found: give it domain=(smallest t, largest t)."
        )

    def fraction_at(t: float) -> float:
        return time.noise_fraction(torch.tensor([t], device="cpu")).item()

    low, high = time.domain
    if time.discrete:
        steps = torch.arange(int(low), int(high) + 1, device="cpu")
        t = float(steps[(time.noise_fraction(steps) - fraction).abs().argmin()])
    else:
        high = min(high, _HIGHEST)
        clean, noisy = (low, high) if fraction_at(high) > fraction_at(low) else (high, low)
        exact = [end for end in (clean, noisy) if fraction_at(end) == fraction]
        for _ in range(0 if exact else _HALVINGS):
            middle = (clean + noisy) / 2
            clean, noisy = (middle, noisy) if fraction_at(middle) < fraction else (clean, middle)
        t = exact[0] if exact else (clean + noisy) / 2
    found = fraction_at(t)
    if not abs(found - fraction) <= _NEAR:
        raise SettingError(
            f"No t of time {time.name!r} has noise fraction {fraction:g}: the nearest is {found:.4f} at t = {t:g}.\n"
            "Name a noise fraction that it reaches."
        )
    return t


def times_at(time: TimeConvention, fraction: float, rows: int, device: torch.device) -> Tensor:
    """The same t for every row, as a loop gives it: whole steps where the convention has steps.

    Shape:
        returns: (rows,), int64 or float32
    """
    t = time_at(time, fraction)
    return torch.full((rows,), t, dtype=torch.long if time.discrete else torch.float32, device=device)


def add_noise(time: TimeConvention, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """``x_t = α(t) latents + σ(t) noise``, in the latents' dtype.

    Shape:
        latents, noise: (N, ...); t: (N,); returns: (N, ...)
    """
    alpha, sigma = (factor.reshape(-1, *[1] * (latents.ndim - 1)) for factor in (time.signal(t), time.noise(t)))
    return (alpha * latents + sigma * noise).to(latents.dtype)


def _are_labels(value: object, latents: object) -> bool:
    return (
        isinstance(value, Tensor)
        and isinstance(latents, Tensor)
        and not (value.is_floating_point() or value.is_complex())
        and value.shape == latents.shape[:1]
    )
