"""What all runs of the convergence study share: the sizes, the prepared data, and how a model is judged."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import metrics
from common.data import NUM_FASHION_CLASSES, LabelledImages, LatentData, fashion
from common.options import Mistake
from common.paths import velocity_loss
from common.run_folder import finished_or_made
from common.samplers import UNGUIDED, Guidance, Model, sample_ode
from common.sit import SiT
from common.vae import DOWNSAMPLING, LATENT_CHANNELS, decode, encode_moments, trained_vae

IMAGE_SIZE = 32
PATCH_SIZE = 2
NULL_CLASS = NUM_FASHION_CLASSES
_BATCH = 125  # of samples and latents; larger ones are slower on a CPU


@dataclass(frozen=True)
class Protocol:
    """The sizes and settings that every run of one comparison has in common. Layers count from 1.

    Attributes:
        stage1_layer: Layer that sees the latents in stage 1.
        student_layer: Layer that Self-Transcendence teaches.
        teacher_layer: Layer that it is taught by.
        peer_layer: Shallow layer of the peers: a quarter of the depth, and 0.3 of it for Internal Guidance.
        peer_deep_layer: Deep layer of SRA and LayerSync: two thirds of it.
        head_features: Inner width of every projection head.
        steps: Length of the plain run, the unit of every price.
        evaluate_at: Steps at which a run is judged, as far as it goes, and can be resumed.
        samples: For the distance at each of these steps.
        final_samples: For all that is measured where the plain run ends, and where a longer one does.
        sampler_steps: Euler steps, one evaluation of the model each, without guidance.
        least_accuracy: What the classifier must reach on held-out images to be a judge.
        images: How many images to train on and to hold out, from the first.
        cooldown: The last part of every run, a teacher's too, in which the learning rate falls linearly to 0.
    """

    name: str
    hidden_size: int = 96
    depth: int = 8
    num_heads: int = 3
    stage1_layer: int = 2
    student_layer: int = 3
    teacher_layer: int = 5
    peer_layer: int = 2
    peer_deep_layer: int = 5
    head_features: int = 256
    batch_size: int = 64
    lr: float = 3e-3
    warmup_steps: int = 100
    ema_decay: float = 0.99
    steps: int = 2500
    evaluate_at: tuple[int, ...] = (500, 1000, 1500, 1750, 2000, 2250, 2500, 3000, 3500, 4000, 4500, 5000, 5500)
    samples: int = 2000
    final_samples: int = 10_000
    sampler_steps: int = 25
    vae_steps: int = 1000
    classifier_steps: int = 10_000
    least_accuracy: float = 0.9
    images: tuple[int, int] = (60_000, 10_000)
    cooldown: float = 0.0

    def step_at(self, share: float) -> int:
        """The step at a share of the plain run."""
        return round(share * self.steps)

    def layer_at(self, layer: int, depth: int) -> int:
        """The layer of a model of another depth that lies where this protocol has ``layer``."""
        return max(1, int(layer * depth / self.depth + 0.5))

    def new_model(self, device: str = "cpu", *, width: int = 0, depth: int = 0) -> SiT:
        """A SiT of this size, or of another; its initial weights come from the global generator."""
        return SiT(
            input_size=IMAGE_SIZE // DOWNSAMPLING,
            patch_size=PATCH_SIZE,
            in_channels=LATENT_CHANNELS,
            hidden_size=width or self.hidden_size,
            depth=depth or self.depth,
            num_heads=max(1, width // 16) if width else self.num_heads,
            num_classes=NUM_FASHION_CLASSES,
            learn_sigma=False,
        ).to(device)


# Runs of other lengths are compared at their ends alone: before the cooldown none is at its best.
COOLDOWN = Protocol("cooldown", cooldown=0.2, evaluate_at=())
SHORT = replace(COOLDOWN, name="short", steps=1000)
LONG = replace(COOLDOWN, name="long", steps=4000)
SIT_S = Protocol(
    "S", hidden_size=384, depth=12, num_heads=6, student_layer=6, teacher_layer=8, peer_layer=3, peer_deep_layer=8,
    head_features=2048, batch_size=256, lr=3e-4, warmup_steps=500, ema_decay=0.999, steps=20_000, samples=10_000,
    evaluate_at=tuple(range(5000, 44_001, 5000)), sampler_steps=50, vae_steps=4000, cooldown=0.2,
)  # fmt: skip
PROTOCOLS = {p.name: p for p in (Protocol("cpu"), SHORT, COOLDOWN, LONG, SIT_S)}


def block(layer: int) -> str:
    """The module of a layer that is counted from 1."""
    return f"blocks.{layer - 1}"


class Setting:
    """The prepared data of a protocol: latents, judge, and the judgement itself.

    Args:
        protocol: The sizes.
        out: Where VAE, classifier and latents are kept; what is there is not made again.
        data: Folder of the four files.
        device: Where to train.

    Raises:
        Mistake: If the classifier is too poor a judge.
    """

    def __init__(self, protocol: Protocol, out: Path, data: Path, device: str) -> None:
        self.protocol = protocol
        self.device = device
        train, held_out = (
            LabelledImages(part.images[:count], part.labels[:count])
            for part, count in zip(fashion(data, IMAGE_SIZE), protocol.images, strict=True)
        )
        self.images = train.images
        self.vae = trained_vae(out / "vae", train.images, steps=protocol.vae_steps, seed=0, device=device)
        self.classifier: metrics.SmallClassifier = metrics.trained_classifier(
            out / "classifier.pt", train, steps=protocol.classifier_steps, seed=0, device=device
        )
        moments = finished_or_made(out / "latents.pt", lambda: self._encode(train.images, held_out.images))
        scale = self.vae.config.scaling_factor
        self.latents = LatentData(moments["mean"].to(device), moments["std"].to(device), train.labels.to(device), scale)
        self.held_out = (moments["held_out"] * scale).to(device)
        self.held_out_labels = held_out.labels.to(device)
        features = self._features(train.images)
        self.reference = metrics.feature_statistics(features)
        self.manifold = features[: protocol.final_samples]
        self.judge = self._judge(held_out)

    def _encode(self, train: Tensor, held_out: Tensor) -> dict[str, Tensor]:
        mean, std = encode_moments(self.vae, train)
        return {"mean": mean, "std": std, "held_out": encode_moments(self.vae, held_out)[0]}

    def _features(self, images: Tensor) -> NDArray[np.float64]:
        return metrics.classifier_features(self.classifier, images)

    def _judge(self, held_out: LabelledImages) -> dict[str, float]:
        """How good the judge is, and what the best possible samples would get: as many held-out images."""
        found = metrics.accuracy(self.classifier, held_out.images, held_out.labels)
        if found < self.protocol.least_accuracy:
            raise Mistake(
                f"The classifier is too poor a judge: {found:.3f} of the held-out images, not "
                f"{self.protocol.least_accuracy}.\nTrain it for more than {self.protocol.classifier_steps} steps."
            )
        some = slice(self.protocol.samples)
        return {
            "accuracy": found,
            "real": self.distance(held_out.images[some]),
            "real_through_vae": self.distance(decode(self.vae, self.held_out[some])),
            "real_all": self.distance(held_out.images[: self.protocol.final_samples]),
            "real_all_through_vae": self.distance(decode(self.vae, self.held_out[: self.protocol.final_samples])),
        }

    def distance(self, images: Tensor) -> float:
        """Fréchet distance of images from all training images."""
        return metrics.frechet_distance(self.reference, metrics.feature_statistics(self._features(images)))

    def samples(
        self, model: Model, seed: int, count: int | None = None, guidance: Guidance = UNGUIDED
    ) -> tuple[Tensor, Tensor]:
        """Images (N, 1, H, W) from noise that the seed decides, and the labels that were asked for."""
        p = self.protocol
        labels = torch.arange(count or p.samples) % NUM_FASHION_CLASSES
        side = IMAGE_SIZE // DOWNSAMPLING
        noise = torch.randn(len(labels), LATENT_CHANNELS, side, side, generator=torch.Generator().manual_seed(seed))
        chunks = zip(noise.to(self.device).split(_BATCH), labels.to(self.device).split(_BATCH), strict=True)
        latents = [sample_ode(model, x, y, steps=p.sampler_steps, guidance=guidance) for x, y in chunks]
        return decode(self.vae, torch.cat(latents)).cpu(), labels

    @torch.no_grad()
    def held_out_loss(self, model: SiT) -> float:
        """Denoising loss on held-out latents, at times spread evenly over [0, 1] and fixed noise."""
        latents, labels = self.held_out[: self.protocol.samples], self.held_out_labels[: self.protocol.samples]
        n = len(latents)
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(latents.shape, generator=generator).to(self.device)
        t = ((torch.randperm(n, generator=generator) + 0.5) / n).to(self.device)
        parts = zip(*(tensor.split(_BATCH) for tensor in (latents, labels, t, noise)), strict=True)
        return torch.cat([velocity_loss(model, *part) for part in parts]).mean().item()

    def judged(self, model: SiT, seed: int, *, final: bool) -> dict[str, Any]:
        """The distance of a model in eval mode, at the end every measure; advances no global generator."""
        if not final:
            return {"distance": self.distance(self.samples(model, seed)[0])}
        images, labels = self.samples(model, seed, self.protocol.final_samples)
        distance = self.distance(images[: self.protocol.samples])  # as at the other steps
        return {"distance": distance, **self._measures(images, labels), "held_out_loss": self.held_out_loss(model)}

    def judged_with_guidance(self, model: SiT, seed: int, scale: float) -> dict[str, float]:
        """The measures of samples with classifier-free guidance, as many as at a step before the end."""
        return self._measures(*self.samples(model, seed, guidance=Guidance(scale, null=NULL_CLASS)))

    def _measures(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        features = self._features(images)
        half = len(features) // 2
        precision, recall = metrics.precision_recall(self.manifold[:half], features[:half])
        return {
            "distance_all": metrics.frechet_distance(self.reference, metrics.feature_statistics(features)),
            "kid": metrics.kernel_distance(self.manifold, features),
            "precision": precision,
            "recall": recall,
            "label_seen": metrics.accuracy(self.classifier, images, labels),
        }

    def described(self) -> dict[str, Any]:
        """What a result has to say about its setting."""
        return {"protocol": asdict(self.protocol), "judge": self.judge}
