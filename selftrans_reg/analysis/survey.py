"""Run a model on noisy inputs with condition and null condition, and keep what a report needs of every layer.

Of each layer's tokens the mean over them is kept, on the CPU, and a few sums: the guided features of any scale follow
from these, since both the mean and ``f_u + w (f_c − f_u)`` are linear.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from ..time import TimeConvention, resolve
from ..tokens import Select, Tokens, described

Progress: TypeAlias = Callable[[Iterable[Any], str], Iterable[Any]] | None

# A table of steps has no step at every fraction, and none may reach the ends.
_NEAR = 0.01
# A noise level of so many times the data's is beyond any.
_HIGHEST = 2.0**20
# Grids of t, each 32 times as fine as the one before: float32 tells no more of them apart, even from so high an end.
_FINER = 12


def guided(features: Tensor, scale: float) -> Tensor:
    """``f_u + scale (f_c − f_u)`` of features (P, ...): f_c and f_u, or f_c alone, which is then its own f_u."""
    return features[-1] + scale * (features[0] - features[-1])


class Cell:
    """One layer at one noise fraction."""

    def __init__(self) -> None:
        self._means: list[Tensor] = []  # (P, N, D) a batch: over the tokens, on the CPU
        self._products: list[Tensor] = []  # (4, N) a batch: |f_c|², |f_u|², <f_u, f_c − f_u>, |f_c − f_u|² of a token

    def add(self, features: Tensor) -> None:
        """Take in a batch's (P, N, T, D), in float32."""
        null, difference = features[-1], features[0] - features[-1]
        products = (features[0].square(), null.square(), null * difference, difference.square())
        self._products.append(torch.stack([product.sum(2).mean(1) for product in products]).cpu().double())
        self._means.append(features.mean(2).cpu())

    @property
    def broken(self) -> int:
        """How many samples have features that are not finite, or so large that their squares are not."""
        return int((~torch.cat(self._products, dim=1).isfinite().all(0)).sum())

    def pooled(self, scale: float, device: torch.device) -> Tensor:
        """The pooled guided features of all samples, (n, D), in float64."""
        return guided(torch.cat(self._means, dim=1).to(device).double(), scale)

    def sizes(self, scale: float) -> tuple[float, float]:
        """|f_c − f_u| / |f_c|, and the root mean square, over samples and tokens, of the norm of a token's f_g."""
        whole, null, product, difference = torch.cat(self._products, dim=1).mean(1).tolist()
        squared = null + 2 * scale * product + scale**2 * difference
        return math.sqrt(difference / whole) if whole else 0.0, math.sqrt(max(squared, 0.0))


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
            raise SettingError("call= must name the arguments that x_t and t go to, as in call=dict(x='x', t='t').")
        self.null = None if null is None else NullCondition(null, self.spec).to(self.device)

    def read(self, batch: Any) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
        """A caller's batch on the model's device: clean latents (N, ...), labels (N,), and the other arguments."""
        names = [name for name in self.spec.names if name not in (self.spec.x, self.spec.t)]
        named = dict(batch) if isinstance(batch, Mapping) else {}
        if by_position := isinstance(batch, list | tuple) and len(batch) <= 1 + len(names):
            named = dict(zip(("latents", *names), batch, strict=False))
        if "latents" not in named:
            found = f"keys {quoted(map(str, batch))}" if isinstance(batch, Mapping) else described(batch)
            found += f" of {len(batch)}" if isinstance(batch, list | tuple) else ""
            raise SettingError(
                f"A batch must be (latents, *condition), the condition in the order of {quoted(names)}; or a mapping "
                f"with 'latents', if there are any 'labels', and the model's other arguments by name.\nGot {found}."
            )
        arguments = tree_map_only(Tensor, lambda tensor: tensor.to(self.device), named)
        latents, labels = arguments.pop("latents"), arguments.get(names[0] if by_position and names else "labels")
        if "labels" not in names:
            arguments.pop("labels", None)
        floating = isinstance(latents, Tensor) and latents.is_floating_point() and latents.ndim > 0
        if not floating or not len(latents) or not latents.isfinite().all():
            raise SettingError(
                "The latents of a batch must be a floating tensor (N, ...) of finite values, one sample or more; got "
                f"{described(latents)}."
            )
        whole = isinstance(labels, Tensor) and not (labels.is_floating_point() or labels.is_complex())
        if labels is None or (whole and labels.shape == latents.shape[:1]):
            return latents, labels, arguments
        if by_position:  # a condition that is no label
            return latents, None, arguments
        raise ShapeError(
            f"Labels must be whole numbers (N,), one for each of {len(latents)} latents; got {described(labels)}."
        )

    def run(
        self, latents: Tensor, arguments: dict[str, Any], noise: Tensor, fraction: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """x_t, and of every layer the tokens (P, N, T, D) in float32: f_c and, with a null condition, f_u."""
        n, dtype = len(noise), torch.long if self.time.discrete else torch.float32  # as a loop gives t
        t = torch.full((n,), time_at(self.time, fraction), dtype=dtype, device=self.device)
        alpha, sigma = self.time.signal(t[:1]), self.time.noise(t[:1])  # (1,), so that half precision comes last
        x_t = (alpha * latents + sigma * noise.to(self.device)).to(latents.dtype)
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
                own = sorted({str(p.dtype) for p in self.model.parameters()})
                if "type" not in str(error) or own == [str(dtype)]:
                    raise
                raise SettingError(
                    f"The model fails on latents in {dtype}; its weights are in {', '.join(own)}: {error}\n"
                    "Nothing is cast: give latents and conditions in its dtypes, or measure under torch.autocast."
                ) from error
            return cast(dict[str, Tensor], tap.pop())


def survey(
    reader: LayerReader, batches: Iterable[Any], fractions: Sequence[float], samples: int, seed: int, progress: Progress
) -> Survey:
    """Run the model at every noise fraction on whole batches until there are so many samples, or no more batches.

    The noise of a sample is the same at all fractions.
    """
    cells = {(layer, fraction): Cell() for layer in reader.modules for fraction in fractions}
    labels: list[Tensor | None] = []
    order: list[nn.Module] = []
    count = 0
    generator = torch.Generator("cpu").manual_seed(seed)
    with undisturbed(reader.model):
        for raw in batches if progress is None else progress(batches, "features"):
            latents, known, arguments = reader.read(raw)
            noise = torch.randn(latents.shape, generator=generator, device="cpu")
            for fraction in fractions:
                with watched([] if order else reader.modules.values(), lambda module, args: order.append(module)):
                    _, found = reader.run(latents, arguments, noise, fraction)
                for layer, features in found.items():
                    cells[layer, fraction].add(features)
            labels.append(known)
            count += len(latents)
            if count >= samples:
                break
    if not labels:
        raise SettingError("There is no batch to measure on: batches= is empty, or an iterator that is used up.")
    given = [one.cpu() for one in labels if one is not None]
    if len(given) not in (0, len(labels)):
        raise SettingError(f"{len(given)} of {len(labels)} batches have labels: give them with all, or with none.")
    layers = tuple(sorted(reader.modules, key=lambda layer: order.index(reader.modules[layer])))
    from_0 = torch.unique(torch.cat(given), return_inverse=True)[1] if given else None
    return Survey(layers, cells, from_0, count, bool(arguments))


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """While inside, the model is in eval mode without gradients; then it and the global random state are as before."""
    training = {module: module.training for module in model.modules()}
    device = device_of(model)
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            model.eval()
            yield
        finally:
            for module, mode in training.items():
                module.training = mode


def time_at(time: TimeConvention, fraction: float) -> float:
    """The t at which ``time.noise_fraction(t)`` is ``fraction``; of steps, the nearest one.

    The nearest of a grid, which is laid anew around it: every path from data to noise is monotonic.
    """
    if time.domain is None:
        raise SettingError(f"Time {time.name!r} does not say how far t goes: give it domain=(smallest t, largest t).")
    low, high = time.domain[0], min(time.domain[1], _HIGHEST)
    for _ in range(1 if time.discrete else _FINER):
        steps = int(high - low) + 1 if time.discrete else 65
        grid = torch.linspace(low, high, steps, dtype=torch.float64, device="cpu")
        distance = (time.noise_fraction(grid) - fraction).abs().nan_to_num(torch.inf)
        best = int(distance.argmin())
        low, high = grid[max(best - 1, 0)].item(), grid[min(best + 1, len(grid) - 1)].item()
    if not distance[best] <= _NEAR:
        raise SettingError(
            f"No t of time {time.name!r} has noise fraction {fraction:g}: the nearest is off by {distance[best]:.4f}, "
            f"at t = {grid[best]:g}.\nName a noise fraction from 0 (data) to 1 (noise) that it reaches."
        )
    return grid[best].float().item()
