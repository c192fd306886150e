"""What else can be added to the loss: the peers of Self-Transcendence, each in a few lines over the library's taps.

All are called as `SelfTransLoss` is, so one loop trains them all. Each computes ``total = denoising + weight * term``
with the term averaged over the batch. Times are REPA's, t = 1 is noise, and the path is linear:
``x_t = (1 - t) x + t noise``. No baseline advances the global random number generator.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import selftrans_reg as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.data import shuffled_batches
from common.metrics import SmallClassifier
from common.training import averaged_copy, endless


def one_token(output: Tensor) -> Tensor:
    """Tokens as they are, and an embedding (N, D) as one token, (N, 1, D)."""
    return output if output.ndim == 3 else output.unsqueeze(1)


class Baseline(nn.Module):
    """A weighted term from the tokens of one layer or several of the model's own forward.

    Args:
        model: The model that trains, called as ``model(x_t, t, y)``.
        layers: Names of the layers to watch, or of embedders, whose (N, D) is seen as one token.
        weight: Factor of the term.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], weight: float) -> None:
        super().__init__()
        self.layers = list(layers)
        self.weight = weight
        self.arguments: dict[str, Any] = {}  # of the model's last call, by name
        self.tap = st.FeatureTap(model, self.layers, tokens=self._remember)

    def _remember(self, output: Tensor, arguments: dict[str, Any]) -> Tensor:
        self.arguments = arguments
        return one_token(output)

    def forward(self, denoising: Tensor, latents: Tensor, step: int) -> st.LossTerms:
        """The terms for the batch that the model has just been run on."""
        found = self.tap.pop()
        denoising = denoising.mean()
        term = self.term([found[layer] for layer in self.layers], latents, step)
        weight = torch.tensor(self.weight, device=term.device)
        return st.LossTerms(
            denoising + weight * term, denoising.detach(), term.detach(), weight, torch.ones_like(weight)
        )

    def term(self, tokens: list[Tensor], latents: Tensor, step: int) -> Tensor:
        """The term, a scalar.

        Shape:
            tokens: for each layer (N, T, D); latents: (N, C, H, W)
        """
        raise NotImplementedError


class InternalGuidance(Baseline):
    """A final layer of its own, modulated by time and label as the model's last one is, predicts the velocity early.

    In sampling the whole model's velocity is extrapolated away from the early one: see `guided`.

    Args:
        model: A SiT, with ``t_embedder``, ``y_embedder`` and ``patch_size``.
        layer: Published: at 0.3 of the depth.
        final: A final layer as the model's own, zero at first.
        decay: Of the moving average of the final layer, which samples.

    Reference: Zhou et al., 2025, https://arxiv.org/abs/2512.24176
    """

    def __init__(self, model: nn.Module, layer: str, final: nn.Module, *, weight: float, decay: float) -> None:
        super().__init__(model, [layer, "t_embedder", "y_embedder"], weight)
        self.final, self.average = final, averaged_copy(final, decay)
        self.patch_size = model.patch_size

    def velocity(self, final: nn.Module, tokens: Sequence[Tensor], like: Tensor) -> Tensor:
        """The early velocity, (N, C, H, W)."""
        p, h = self.patch_size, like.shape[2] // self.patch_size
        patches = final(tokens[0], (tokens[1] + tokens[2]).squeeze(1))
        return rearrange(patches, "n (h w) (p q c) -> n c (h p) (w q)", h=h, p=p, q=p)

    def term(self, tokens: list[Tensor], latents: Tensor, step: int) -> Tensor:
        """Squared error of the velocity ``noise - x = (x_t - x) / t``."""
        self.average.update_parameters(self.final)
        t = self.arguments["t"].clamp(min=1e-4).reshape(-1, 1, 1, 1)  # the times are uniform: hardly any is smaller
        return F.mse_loss(self.velocity(self.final, tokens, latents), (self.arguments["x"] - latents) / t)

    def guided(self, model: nn.Module, scale: float = 1.4) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """A model to sample from: ``v_early + scale (v - v_early)``; the scale is the published one."""

        def velocity(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            with st.FeatureTap(model, self.layers, tokens=one_token) as tap:
                v, found = model(x, t, y), tap.pop()
            early = self.velocity(self.average, [found[layer] for layer in self.layers], x)
            return early + scale * (v - early)

        return velocity


class SRA(Baseline):
    """A shallow layer at a noisier time against a deep layer of the averaged model at a cleaner time.

    The cleaner time is ``max(t - k, 0)``, k uniform in [0, max_interval], on the same line from latents to noise. The
    averaged model sees the labels as the student saw them, dropped ones too, and stops at its layer.

    Args:
        model: A SiT with a ``y_embedder``, whose last row is the null class.
        ema: Its average.
        layers: The model's and the average's.
        head: Between them.
        distance: "cosine", the authors' default since July 2026, with weight 0.5: of each channel, along the tokens.
            Or "smooth_l1" with beta 0.05, the paper's, with weight 0.2.

    Reference: Jiang et al., 2025, https://arxiv.org/abs/2505.02831; code: https://github.com/vvvvvjdy/SRA
    """

    def __init__(
        self, model: nn.Module, ema: nn.Module, layers: tuple[str, str], head: nn.Module, *, weight: float,
        distance: Literal["cosine", "smooth_l1"] = "cosine", max_interval: float = 0.2,
    ) -> None:  # fmt: skip
        super().__init__(model, [layers[0], "y_embedder"], weight)
        self.head, self.distance, self.max_interval = head, distance, max_interval
        self._models, self._deep = [model, ema], layers[1]  # in a list: they are no part of this module

    @torch.no_grad()
    def target(self, latents: Tensor, embedded: Tensor, step: int) -> Tensor:
        """The averaged model's tokens at the cleaner time, (N, T, D)."""
        x_t, t, y = (self.arguments[name] for name in ("x", "t", "y"))
        model, ema = self._models
        table = model.get_parameter("y_embedder.embedding_table.weight")
        y = torch.where((embedded == table[-1]).flatten(1).all(1), len(table) - 1, y)
        # From the step alone, so that a resumed run draws what it would have drawn.
        interval = torch.rand(len(t), generator=torch.Generator().manual_seed(step)).to(t) * self.max_interval
        cleaner = (t - interval).clamp(min=0)
        share = (cleaner / t.clamp(min=1e-6)).reshape(-1, 1, 1, 1)
        return early_output(ema, self._deep, latents + share * (x_t - latents), cleaner, y)

    def term(self, tokens: list[Tensor], latents: Tensor, step: int) -> Tensor:
        """The distance of the projected tokens."""
        found, target = self.head(tokens[0]), self.target(latents, tokens[1], step)
        if self.distance == "smooth_l1":
            return F.smooth_l1_loss(found, target, beta=0.05)
        return 1 - F.cosine_similarity(found, target, dim=1).mean()


class _ReachedError(Exception):
    pass


def early_output(model: nn.Module, layer: str, *inputs: Tensor) -> Tensor:
    """A layer's output; what lies behind it does not run."""

    def leave(module: nn.Module, args: Any, output: Tensor) -> None:
        raise _ReachedError(output)

    handle = model.get_submodule(layer).register_forward_hook(leave)
    try:
        return model(*inputs)
    except _ReachedError as reached:
        return reached.args[0]
    finally:
        handle.remove()


class LayerSync(Baseline):
    """A layer's tokens towards those of a deeper layer in the same forward, which is detached: minus the cosine.

    Reference: Haghighi et al., 2025, https://arxiv.org/abs/2510.12581
    """

    def __init__(self, model: nn.Module, layer: str, deeper: str, *, weight: float) -> None:
        super().__init__(model, [layer, deeper], weight)

    def term(self, tokens: list[Tensor], latents: Tensor, step: int) -> Tensor:
        """Minus the cosine, averaged over tokens."""
        shallow, deep = tokens
        return st.feature_alignment(shallow, deep, "cosine").mean() - 1


class Dispersive(Baseline):
    """Pushes a layer's features apart over the batch: ``log mean_ij exp(-|z_i - z_j|^2 / (dim z * temperature))``.

    z is a sample's tokens in one row; the mean is over all pairs, a sample with itself included.

    Reference: Wang and He, 2025, https://arxiv.org/abs/2506.09027
    """

    def __init__(self, model: nn.Module, layer: str, *, weight: float, temperature: float = 0.5) -> None:
        super().__init__(model, [layer], weight)
        self.temperature = temperature

    def term(self, tokens: list[Tensor], latents: Tensor, step: int) -> Tensor:
        """The logarithm of the mean over pairs."""
        z = tokens[0].flatten(1)  # (N, T * D)
        products = z @ z.T
        norms = products.diagonal()
        squared = norms[:, None] + norms[None, :] - 2 * products
        logits = -squared / (z.shape[1] * self.temperature)
        return torch.logsumexp(logits.flatten(), 0) - 2 * math.log(len(z))


class REPA(Baseline):
    """A layer against an external encoder's patch features of the clean image: minus the cosine.

    The encoder here is the classifier that also judges the samples, so its advantage is twofold: it has seen labels,
    and it is the judge.

    Args:
        targets: ``targets(step)`` gives the encoder's features of the batch of that step, (N, T, E).
        head: From the layer's width to E.

    Reference: Yu et al., 2024, https://arxiv.org/abs/2410.06940
    """

    def __init__(
        self, model: nn.Module, layer: str, targets: Callable[[int], Tensor], head: nn.Module, *, weight: float
    ) -> None:
        super().__init__(model, [layer], weight)
        self.targets, self.head = targets, head

    def term(self, tokens: list[Tensor], latents: Tensor, step: int) -> Tensor:
        """Minus the cosine, averaged over tokens."""
        return st.feature_alignment(self.head(tokens[0]), self.targets(step), "cosine").mean() - 1


class ClassifierPatches:
    """The classifier's last feature map of a run's batches, one token for each of its 4x4 places.

    Goes through the images in the order in which `LatentData.batches` goes through their latents, which the seed and
    the size of the batch decide.

    Shape:
        returns: (N, 16, 64)
    """

    size = 64

    def __init__(self, classifier: SmallClassifier, images: Tensor, *, batch_size: int, seed: int) -> None:
        self.classifier = classifier
        self.images = images
        self._order: Iterator[tuple[Tensor, ...]] = endless(
            shuffled_batches(torch.arange(len(images)), batch_size=batch_size, seed=seed)
        )
        self._next = 0

    @torch.no_grad()
    def __call__(self, step: int) -> Tensor:
        """The features of the batch of a step; steps may be left out, but not go back."""
        while self._next <= step:
            (rows,) = next(self._order)
            self._next += 1
        images = self.images[rows].to(self.classifier.head.weight.device)
        convolutions = self.classifier.features[:6]  # as far as the last activation before pooling
        return rearrange(convolutions(images), "n e h w -> n (h w) e")


class NormalisedTarget(Baseline):
    """Stage 2 on targets of mean 0 and variance 1 over the channels of each token: ``(f_g - mean) / std``.

    Args:
        head: From the layer's width to the teacher's.
        rows: Share of the rows inside the window that are taught.
    """

    def __init__(
        self, model: nn.Module, layer: str, teacher: st.CFGFeatureTeacher, head: nn.Module, *, weight: float,
        window: tuple[float, float], rows: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__(model, [layer], weight)
        self.head, self.window, self.rows = head, window, rows
        self._teacher = [teacher]  # in a list: it is no part of this module

    def term(self, tokens: list[Tensor], latents: Tensor, step: int) -> Tensor:
        """Squared error of the chosen rows, times the share of all rows that lie in the window."""
        x_t, t, y = (self.arguments[name] for name in ("x", "t", "y"))
        inside = ((t >= self.window[0]) & (t <= self.window[1])).nonzero().flatten()
        if not len(inside):
            return 0.0 * self.head(tokens[0][:1]).sum()
        order = torch.randperm(len(inside), generator=torch.Generator().manual_seed(step)).to(inside.device)
        chosen = inside[order[: math.ceil(self.rows * len(inside))]]
        target = self._teacher[0](x_t[chosen], t[chosen], y[chosen])
        target = F.layer_norm(target, target.shape[-1:])
        return st.feature_alignment(self.head(tokens[0][chosen]), target).mean() * len(inside) / len(t)


class OwnAverage(nn.Module):
    """One run in place of two: stage 1 up to a step, and from there on the run's own average of that moment teaches.

    Args:
        ema: The average of the model that trains.
        snapshot: A copy of it, which the teacher of stage 2 was built from.
        first: Stage 1's criterion on the model.
        then: Stage 2's.
        start: The first step of the second part.
        refresh: How many steps later, and after as many again, the average is copied anew; 0 for never.
    """

    def __init__(
        self, ema: nn.Module, snapshot: nn.Module, first: st.SelfTransLoss, then: st.SelfTransLoss, *, start: int,
        refresh: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.snapshot = snapshot  # saved with the heads: a resumed run has the same teacher
        self.first, self.then = first, then
        self.start, self.refresh = start, refresh
        self._ema = [ema]  # in a list: the average is no part of this module

    def forward(self, denoising: Tensor, latents: Tensor, step: int) -> st.LossTerms:
        """The terms of the part that the step belongs to."""
        past = step - self.start
        if (past == 0 or (past > 0 and self.refresh and past % self.refresh == 0)) and self.then.teacher is not None:
            self.then.teacher.refresh(self._ema[0].state_dict())
        active, idle = (self.first, self.then) if past < 0 else (self.then, self.first)
        idle.discard()  # both saw the forward
        return active(denoising, latents=latents, step=step)

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take up a saved state; what the teacher does not run was not saved once it had begun."""
        kept = {k: v for k, v in self.state_dict().items() if k.startswith("snapshot.")}
        return super().load_state_dict({**kept, **state_dict}, strict, assign)
