"""Run a model on noisy inputs with condition and null condition, and keep what a report needs of every layer.

Of each layer's tokens the mean over them is kept, on the CPU, and a few sums: the guided features of any scale follow
from these, since both the mean and ``f_u + w (f_c − f_u)`` are linear.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..calls import CallSpec, RowTensors
from ..errors import SettingError, ShapeError
from ..modules import device_of, find_layer, layer_names, quoted
from ..null import Null, NullCondition, checked_indices
from ..recipes import find_blocks
from ..taps import FeatureTap, watched
from ..time import TimeConvention, is_number, resolve
from ..tokens import Select, Tokens, described

Progress: TypeAlias = Callable[[Iterable[Any], str], Iterable[Any]] | None

# A table of steps has no step at every fraction, and none may reach the ends.
_NEAR = 0.01
# A noise level of so many times the data's is beyond any.
_HIGHEST = 2.0**20
# Halvings of the interval of t: float32 tells no more of them apart, even from so high an end.
_HALVINGS = 60


def guided(features: Tensor, scale: float) -> Tensor:
    """``f_u + scale (f_c − f_u)`` of features (P, ...): f_c and f_u, or f_c alone, which is then its own f_u."""
    return features[-1] + scale * (features[0] - features[-1])


@dataclass
class Cell:
    """One layer at one noise fraction."""

    means: list[Tensor] = field(default_factory=list)  # (P, N, D) a batch: over the tokens, on the CPU
    # |f_c|², |f_u|², <f_u, f_c − f_u>, |f_c − f_u|² over all samples and tokens, and the number of tokens
    sums: list[float] = field(default_factory=lambda: [0.0] * 5)
    broken: int = 0  # samples whose features are not finite, or so large that their squares are not

    def add(self, features: Tensor) -> None:
        """Take in a batch's (P, N, T, D), in float32."""
        null, difference = features[-1], features[0] - features[-1]
        products = (features[0].square(), null.square(), null * difference, difference.square())
        rows = torch.stack([product.sum((1, 2)) for product in products]).cpu().double()  # (4, N)
        found = [*rows.sum(1).tolist(), null[..., 0].numel()]
        self.sums = [total + new for total, new in zip(self.sums, found, strict=True)]
        self.broken += int((~rows.isfinite().all(0)).sum())
        self.means.append(features.mean(2).cpu())

    def pooled(self, scale: float, device: torch.device) -> Tensor:
        """The pooled guided features of all samples, (n, D), in float64."""
        return guided(torch.cat(self.means, dim=1).to(device).double(), scale)

    def contrast(self) -> float:
        """|f_c − f_u| / |f_c|."""
        return math.sqrt(self.sums[3] / self.sums[0]) if self.sums[0] else 0.0

    def norm(self, scale: float) -> float:
        """Root mean square, over samples and tokens, of the norm of a token's guided features."""
        _, null, product, difference, tokens = self.sums
        return math.sqrt(max(null + 2 * scale * product + scale**2 * difference, 0.0) / tokens)


class Survey(NamedTuple):
    """What a model's layers gave."""

    layers: tuple[str, ...]  # in the order in which they ran
    cells: dict[tuple[str, float], Cell]  # by layer and noise fraction
    labels: Tensor | None  # (n,), whole numbers from 0, on the CPU
    samples: int  # n
    conditioned: bool  # whether the model was given anything beside x_t and t


class LayerReader:
    """Runs a model on noisy latents, on condition and null condition, and gives its layers' tokens.

    The model gets latents and conditions as they are given, and x_t in the latents' dtype.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str] | None,
        *,
        time: str | TimeConvention,
        null: Null | None = None,
        call: Mapping[str, Any] | None = None,
        select: Select = None,
        tokens: Tokens = None,
    ) -> None:
        self.model, self.time, self.select, self.tokens = model, resolve(time), select, tokens
        self.device = device_of(model)
        names = find_blocks(model, None) if layers is None else layer_names(layers)
        self.modules = {name: find_layer(model, name) for name in names}
        self.spec = CallSpec(model, call)
        if self.spec.x is None or self.spec.t is None:
            raise SettingError(
                "x_t and t are put in here, so call= must name their arguments: call=dict(x='x', t='t')."
            )
        self.null = None if null is None else NullCondition(null, self.spec).to(self.device)

    def read(self, batch: Any) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
        """A caller's batch on the model's device: clean latents (N, ...), labels (N,), and the other arguments."""
        batch = dict(batch) if isinstance(batch, Mapping) else batch
        batch = tree_map_only(Tensor, lambda tensor: tensor.to(self.device), batch)
        names = [name for name in self.spec.names if name not in (self.spec.x, self.spec.t)]
        if by_name := isinstance(batch, dict) and "latents" in batch:
            latents, labels = batch["latents"], batch.get("labels")
            own = {"latents"} if "labels" in names else {"latents", "labels"}
            arguments = {name: value for name, value in batch.items() if name not in own}
        elif isinstance(batch, list | tuple) and 0 < len(batch) <= 1 + len(names):
            latents, labels = batch[0], next(iter(batch[1:]), None)
            arguments = dict(zip(names, batch[1:], strict=False))
        else:
            found = f"the keys {quoted(map(str, batch))}" if isinstance(batch, dict) else type(batch).__name__
            found += f" of {len(batch)}" if isinstance(batch, list | tuple) else ""
            raise SettingError(
                f"A batch must be (latents, *condition), the condition in the order of {quoted(names)}; or a mapping "
                f"with 'latents', if there are any 'labels', and the model's other arguments by name.\nGot {found}."
            )
        usable = isinstance(latents, Tensor) and latents.is_floating_point() and latents.ndim > 0 and len(latents) > 0
        if not usable or not latents.isfinite().all():
            raise SettingError(
                "The latents of a batch must be a floating tensor (N, ...) of finite values, one sample or more; got "
                f"{described(latents)}."
            )
        whole = isinstance(labels, Tensor) and not (labels.is_floating_point() or labels.is_complex())
        if labels is not None and not (whole and labels.shape == latents.shape[:1]):
            if by_name:
                raise ShapeError(
                    f"Labels must be whole numbers (N,), one for each of {len(latents)} latents; got "
                    f"{described(labels)}."
                )
            labels = None
        return latents, labels, arguments

    def run(
        self, latents: Tensor, arguments: dict[str, Any], noise: Tensor, fraction: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """x_t, and of every layer the tokens (P, N, T, D) in float32: f_c and, with a null condition, f_u."""
        n, t = len(noise), times_at(self.time, fraction, len(noise), self.device)
        x_t = add_noise(self.time, latents, noise.to(latents), t)
        args, kwargs = self.spec.arguments({str(self.spec.x): x_t, str(self.spec.t): t, **arguments})
        call = self.spec.bind(args, kwargs)
        held = RowTensors(call, self.spec.known, () if self.null is None else self.null.values)
        passes = [(held, held.tensors)] if self.null is None else self.null.passes(call, held)
        found = [self._tokens(side.rebuild(tensors), x_t.dtype) for side, tensors in passes]
        features = {name: torch.cat([tokens[name] for tokens in found]) for name in self.modules}
        for name, tokens in features.items():
            if len(tokens) != (n if self.null is None else 2 * n):
                raise ShapeError(f"Layer {name!r} does not keep one row for each sample: name layers that do.")
        return x_t, {name: tokens.reshape(-1, n, *tokens.shape[1:]).float() for name, tokens in features.items()}

    def _tokens(self, arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
        args, kwargs = self.spec.arguments(arguments)
        with (
            checked_indices(self.model, self.null),
            torch.compiler.set_stance("force_eager"),  # what was compiled before has no hook in it
            FeatureTap(self.model, list(self.modules), select=self.select, tokens=self.tokens) as tap,
        ):
            try:
                self.model(*args, **kwargs)
            except RuntimeError as error:
                own = sorted({str(p.dtype).removeprefix("torch.") for p in self.model.parameters()})
                given = str(dtype).removeprefix("torch.")
                if "type" not in str(error) or own == [given]:
                    raise
                raise SettingError(
                    f"The model fails on latents in {given}; its weights are in {', '.join(own)}: {error}\n"
                    "Nothing is cast: give latents and conditions in its dtypes, or measure under torch.autocast."
                ) from error
            return cast(dict[str, Tensor], tap.pop())


@torch.no_grad()
def survey(
    reader: LayerReader, batches: Iterable[Any], fractions: Sequence[float], samples: int, seed: int, progress: Progress
) -> Survey:
    """Run the model at every noise fraction on whole batches until there are so many samples, or no more batches.

    The noise of a sample is the same at all fractions.
    """
    cells = {(layer, fraction): Cell() for layer in reader.modules for fraction in fractions}
    labels: list[Tensor] = []
    order: list[nn.Module] = []
    batches_read = count = 0
    generator = noise_generator(seed)
    with undisturbed(reader.model):
        for raw in batches if progress is None else progress(batches, "features"):
            latents, known, arguments = reader.read(raw)
            noise = torch.randn(latents.shape, generator=generator, device="cpu")
            for fraction in fractions:
                with watched([] if order else reader.modules.values(), lambda module, args: order.append(module)):
                    _, found = reader.run(latents, arguments, noise, fraction)
                for layer, features in found.items():
                    cells[layer, fraction].add(features)
            labels += [] if known is None else [known.cpu()]
            batches_read, count = batches_read + 1, count + len(latents)
            if count >= samples:
                break
    if not batches_read:
        raise SettingError("There is no batch to measure on: batches= is empty, or an iterator that is used up.")
    if len(labels) not in (0, batches_read):
        raise SettingError(f"{len(labels)} of {batches_read} batches have labels: give them with all, or with none.")
    layers = tuple(sorted(reader.modules, key=lambda layer: order.index(reader.modules[layer])))
    from_0 = torch.unique(torch.cat(labels), return_inverse=True)[1] if labels else None
    return Survey(layers, cells, from_0, count, bool(arguments))


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
    """A generator on the CPU, of a seed that is checked."""
    if type(seed) is not int or not 0 <= seed < 1 << 64:
        raise SettingError(f"seed must be a whole number from 0 to 2**64 - 1; got {seed!r:.80}.")
    return torch.Generator("cpu").manual_seed(seed)


def time_at(time: TimeConvention, fraction: float) -> float:
    """The t at which ``time.noise_fraction(t)`` is ``fraction``; of steps, the nearest one.

    By bisection: every path from data to noise is monotonic in its noise fraction.
    """
    if not is_number(fraction) or not 0 <= fraction <= 1:
        raise SettingError(f"A noise fraction is a number from 0 (data) to 1 (noise); got {fraction!r}.")
    if time.domain is None:
        raise SettingError(f"Time {time.name!r} does not say how far t goes: give it domain=(smallest t, largest t).")

    def fraction_at(t: float) -> float:
        return time.noise_fraction(torch.tensor([t], device="cpu")).item()

    low, high = time.domain
    if time.discrete:
        candidates = torch.arange(int(low), int(high) + 1, device="cpu")
    else:
        high = min(high, _HIGHEST)
        clean, noisy = (low, high) if fraction_at(high) > fraction_at(low) else (high, low)
        for _ in range(_HALVINGS):
            middle = (clean + noisy) / 2
            clean, noisy = (middle, noisy) if fraction_at(middle) < fraction else (clean, middle)
        candidates = torch.tensor([low, high, (clean + noisy) / 2], device="cpu")
    found = time.noise_fraction(candidates)
    best = (found - fraction).abs().nan_to_num(torch.inf).argmin()
    if not abs(found[best] - fraction) <= _NEAR:
        raise SettingError(
            f"No t of time {time.name!r} has noise fraction {fraction:g}: the nearest is {found[best]:.4f} at t = "
            f"{candidates[best]:g}.\nName a noise fraction that it reaches."
        )
    return float(candidates[best])


def times_at(time: TimeConvention, fraction: float, rows: int, device: torch.device) -> Tensor:
    """The same t for every row, (rows,), as a loop gives it: int64 where the convention has steps, else float32."""
    t = time_at(time, fraction)
    return torch.full((rows,), t, dtype=torch.long if time.discrete else torch.float32, device=device)


def add_noise(time: TimeConvention, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """``x_t = α(t) latents + σ(t) noise``, in the latents' shape and dtype; t is (N,)."""
    alpha, sigma = (factor.reshape(-1, *[1] * (latents.ndim - 1)) for factor in (time.signal(t), time.noise(t)))
    return (alpha * latents + sigma * noise).to(latents.dtype)
