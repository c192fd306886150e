"""What else can be added to the loss: the peers of Self-Transcendence, each in a few lines over the library's taps.

All are called as `SelfTransLoss` is, so one loop trains them all. Each computes ``total = denoising + weight * term``
with the term averaged over the batch. Times are REPA's, t = 1 is noise, and the path is linear:
``x_t = (1 - t) x + t noise``.
No baseline advances the global random number generator.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import selftrans_reg as st
from selftrans_reg.taps import EarlyExit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.data import shuffled_batches
from common.metrics import SmallClassifier
from common.training import endless


class Baseline(nn.Module):
    """A weighted term from the tokens of one layer or two of the model's own forward.

    Args:
        model: The model that trains, called as ``model(x_t, t, y)``.
        layers: Names of the layers to watch.
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
        return output

    def forward(self, denoising: Tensor, latents: Tensor, step: int) -> st.LossTerms:
        """The terms for the batch that the model has just been run on."""
        found = self.tap.pop()
        tokens = [found[layer] for layer in self.layers]
        denoising = denoising.mean()
        term = self.term(tokens, latents, step)
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


class DeepSupervision(Baseline):
    """An intermediate layer predicts the velocity too, through a norm and a Linear: mean squared error.

    As the auxiliary loss of Internal Guidance, whose guidance in sampling is left out here.
    """

    def __init__(
        self, model: nn.Module, layer: str, *, weight: float, hidden_size: int, latent_channels: int, patch_size: int
    ) -> None:
        super().__init__(model, [layer], weight)
        self.patch_size = patch_size
        self.norm = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.utils.skip_init(nn.Linear, hidden_size, patch_size**2 * latent_channels)
        nn.init.zeros_(self.linear.weight)  # as the model's own last layer
        nn.init.zeros_(self.linear.bias)

    def term(self, tokens: list[Tensor], latents: Tensor, step: int) -> Tensor:
        """Squared error of the velocity ``noise - x = (x_t - x) / t``."""
        t = self.arguments["t"].clamp(min=1e-4).reshape(-1, 1, 1, 1)  # the times are uniform: hardly any is smaller
        velocity = (self.arguments["x"] - latents) / t
        p = self.patch_size
        target = rearrange(velocity, "n c (h p) (w q) -> n (h w) (p q c)", p=p, q=p)
        return F.mse_loss(self.linear(self.norm(tokens[0])), target)


class SRA(Baseline):
    """A shallow layer at a noisier time against a deep layer of the averaged model at a cleaner time: smooth L1.

    The cleaner time is ``max(t - k, 0)``, k uniform in [0, max_interval], on the same line from latents to noise. The
    averaged model sees the true label, and stops at its layer.

    Reference: Jiang et al., 2025, https://arxiv.org/abs/2505.02831
    """

    def __init__(
        self,
        model: nn.Module,
        ema: nn.Module,
        layer: str,
        ema_layer: str,
        *,
        weight: float,
        hidden_size: int,
        hidden_features: int,
        max_interval: float = 0.2,
    ) -> None:
        super().__init__(model, [layer], weight)
        self.max_interval = max_interval
        self.head = st.ProjectionHead(hidden_size, hidden_size, hidden_features)
        self._ema = [ema]  # in a list: the average is no part of this module
        self._exit = EarlyExit(ema, ema_layer)

    @torch.no_grad()
    def target(self, latents: Tensor, step: int) -> Tensor:
        """The averaged model's tokens at the cleaner time, (N, T, D)."""
        x_t, t, y = (self.arguments[name] for name in ("x", "t", "y"))
        # From the step alone, so that a resumed run draws what it would have drawn.
        interval = torch.rand(len(t), generator=torch.Generator().manual_seed(step)).to(t) * self.max_interval
        cleaner = (t - interval).clamp(min=0)
        share = (cleaner / t.clamp(min=1e-6)).reshape(-1, 1, 1, 1)
        x_cleaner = latents + share * (x_t - latents)
        (ema,) = self._ema
        return self._exit.run(ema, (x_cleaner, cleaner, y), {})

    def term(self, tokens: list[Tensor], latents: Tensor, step: int) -> Tensor:
        """Smooth L1 of the projected tokens."""
        return st.feature_alignment(self.head(tokens[0]), self.target(latents, step), "smooth_l1").mean()


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
        return torch.logsumexp(logits.flatten(), 0) - 2 * torch.log(torch.tensor(float(len(z))))


class REPA(Baseline):
    """A layer against an external encoder's patch features of the clean image: minus the cosine.

    The encoder here is the classifier that also judges the samples, so its advantage is twofold: it has seen labels,
    and it is the judge.

    Args:
        targets: ``targets(step)`` gives the encoder's features of the batch of that step, (N, T, E).
        target_size: E.

    Reference: Yu et al., 2024, https://arxiv.org/abs/2410.06940
    """

    def __init__(
        self,
        model: nn.Module,
        layer: str,
        targets: Callable[[int], Tensor],
        *,
        weight: float,
        hidden_size: int,
        target_size: int,
        hidden_features: int,
    ) -> None:
        super().__init__(model, [layer], weight)
        self.targets = targets
        self.head = st.ProjectionHead(hidden_size, target_size, hidden_features)

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


class OwnEarlierEMA(nn.Module):
    """One run in place of two: stage 1 up to a step, and from there on the run's own average of that moment teaches.

    Args:
        ema: The average of the model that trains.
        first: Stage 1's criterion on the model.
        then: Makes stage 2's criterion on the model from a frozen copy of the average.
        switch_step: The first step of the second part.
    """

    def __init__(
        self,
        ema: nn.Module,
        first: st.SelfTransLoss,
        then: Callable[[nn.Module], st.SelfTransLoss],
        switch_step: int,
    ) -> None:
        super().__init__()
        self.switch_step = switch_step
        self.register_buffer("switched", torch.tensor(False))
        self.snapshot = copy.deepcopy(ema)  # saved with the heads: a resumed run has the same teacher
        self.first = first
        self.then = then(copy.deepcopy(ema))  # now, as the optimiser must hold its head from the start
        self.then.detach()
        self._ema, self._make = [ema], then  # in a list: the average is no part of this module

    def forward(self, denoising: Tensor, latents: Tensor, step: int) -> st.LossTerms:
        """The terms of the part that the step belongs to."""
        if step < self.switch_step:
            return self.first(denoising, latents=latents, step=step)
        if step == self.switch_step:
            (ema,) = self._ema
            self.snapshot.load_state_dict(ema.state_dict())
            self.first.discard()  # it saw the forward that the second part was not there for yet
            self._switch()
            return st.LossTerms(denoising.mean(), denoising.detach().mean(), *torch.zeros(3, device=denoising.device))
        return self.then(denoising, latents=latents, step=step)

    def _switch(self) -> None:
        self.first.detach()
        heads = self.then.heads
        self.then = self._make(copy.deepcopy(self.snapshot))
        self.then.heads = heads  # those that the optimiser holds
        self.switched.fill_(True)

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take up a saved state; saved after the switch, the teacher comes first."""
        if state_dict["switched"]:
            own = "snapshot."
            self.snapshot.load_state_dict({k.removeprefix(own): v for k, v in state_dict.items() if k.startswith(own)})
            self._switch()
        return super().load_state_dict(state_dict, strict, assign)
