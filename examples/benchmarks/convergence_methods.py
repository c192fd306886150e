"""The methods that the convergence study compares: what each adds to the loss, and what it needs first.

A method is written as its name and the settings in which it differs: ``self guidance_scale=8``.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from torch import nn

import selftrans_reg as st
from selftrans_reg.errors import SettingError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.baselines import REPA, SRA, ClassifierPatches, DeepSupervision, Dispersive, LayerSync, OwnEarlierEMA
from benchmarks.convergence_setting import NULL_CLASS, PATCH_SIZE, Protocol, Setting, block
from common.sit import SiT
from common.training import Criterion
from common.vae import LATENT_CHANNELS

TIME = "repa"  # t = 1 is noise
WINDOW = (0.4, 0.7)  # published


class Teacher(NamedTuple):
    """The run that has to come first: a method, and the share of its steps after which its weights teach."""

    method: Method
    share: float


class Parts(NamedTuple):
    """What a method builds its criterion from.

    Attributes:
        setting: The prepared data.
        model: The model that trains.
        ema: Its averaged model.
        seed: The run's.
        teacher: File with the teacher's ``model`` and ``ema``, if the method has one.
    """

    setting: Setting
    model: SiT
    ema: nn.Module
    seed: int
    teacher: Path | None


@dataclass(frozen=True)
class Method:
    """One way to train, with its settings."""

    name: ClassVar[str]
    title: ClassVar[str]

    def criterion(self, parts: Parts) -> Criterion | None:
        """What the method adds to the loss."""
        raise NotImplementedError

    def teacher(self) -> Teacher | None:
        """What has to be trained first."""
        return None

    def part_ends(self, protocol: Protocol) -> list[int]:
        """The steps at which the cost of a step changes, the last of them the run's end."""
        return [protocol.steps]

    def __str__(self) -> str:
        changed = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return " ".join([self.name, *changed])

    def described(self) -> dict[str, Any]:
        """Name and every setting."""
        return {"name": self.name, **asdict(self)}


@dataclass(frozen=True)
class Plain(Method):
    """The denoising loss alone."""

    name = "none"
    title = "none"

    def criterion(self, parts: Parts) -> None:
        """Nothing."""
        return


@dataclass(frozen=True)
class Stage1(Method):
    """Stage 1 for the whole run: a shallow layer sees the latents, or the velocity as in the released code."""

    name = "stage1"
    title = "stage 1"
    target: Literal["latents", "velocity"] = "latents"
    layer: int = 2
    weight: float = 0.5

    def criterion(self, parts: Parts) -> st.SelfTransLoss:
        """The library's stage 1."""
        return st.SelfTransLoss.stage1(
            parts.model,
            layer=block(self.layer),
            time=TIME,
            latent_channels=LATENT_CHANNELS,
            patch_size=PATCH_SIZE,
            hidden_features=parts.setting.protocol.head_features,
            target=self.target,
            weight=self.weight,
            window=WINDOW,
        )


@dataclass(frozen=True)
class SelfTranscendence(Method):
    """Stage 2, taught by a finished run of the same seed. Layers count from 1; 0 stands for the protocol's.

    Attributes:
        teacher_run: "latents" or "velocity", a stage-1 run; or "self", a run of this method: a second generation.
        teacher_share: The share of its steps after which the teacher's weights are taken.
        teacher_weights: "ema" or "model", the raw ones.
        stop: The share of the steps after which guidance ends; 1 for never.
    """

    name = "self"
    title = "Self-Transcendence"
    teacher_run: Literal["latents", "velocity", "self"] = "latents"
    teacher_share: float = 1.0
    teacher_weights: Literal["ema", "model"] = "ema"
    guidance_scale: float = 3.0
    student_layer: int = 0
    teacher_layer: int = 0
    window: bool = True
    gating: Literal["per-sample", "released"] = "per-sample"
    stop: float = 0.48
    distance: Literal["mse", "cosine", "smooth_l1"] = "mse"
    weight: float = 0.5

    def teacher(self) -> Teacher:
        """The run that teaches."""
        method = SelfTranscendence() if self.teacher_run == "self" else Stage1(self.teacher_run)
        return Teacher(method, self.teacher_share)

    def part_ends(self, protocol: Protocol) -> list[int]:
        """With guidance and without."""
        return sorted({protocol.step_at(self.stop), protocol.steps})

    def criterion(self, parts: Parts) -> st.SelfTransLoss:
        """The library's stage 2."""
        return self.stage2(parts, parts.setting.protocol.new_model(parts.setting.device), parts.teacher)

    def stage2(self, parts: Parts, model: nn.Module, checkpoint: Path | None, **more: Any) -> st.SelfTransLoss:
        """Stage 2 with a teacher from a checkpoint, or from the weights that the model already has."""
        protocol = parts.setting.protocol
        teacher = st.build_teacher(
            model,
            checkpoint,
            layer=block(self.teacher_layer or protocol.teacher_layer),
            guidance_scale=self.guidance_scale,
            null={"y": NULL_CLASS},
            time=TIME,
            weights=self.teacher_weights,
        )
        return st.SelfTransLoss.stage2(
            parts.model,
            layer=block(self.student_layer or protocol.student_layer),
            teacher=teacher,
            time=TIME,
            hidden_features=protocol.head_features,
            distance=self.distance,
            weight=self.weight,
            window=WINDOW if self.window else None,
            gating=self.gating,
            stop_step=protocol.step_at(self.stop),
            **more,
        )


@dataclass(frozen=True)
class OwnEMA(Method):
    """A single run: stage 1 up to a share of the steps, then its own average of that moment teaches."""

    name = "own-ema"
    title = "own earlier EMA"
    switch: float = 0.4
    stop: float = 0.8
    guidance_scale: float = 3.0

    def part_ends(self, protocol: Protocol) -> list[int]:
        """Stage 1, stage 2, and neither."""
        return sorted({protocol.step_at(self.switch), protocol.step_at(self.stop), protocol.steps})

    def criterion(self, parts: Parts) -> OwnEarlierEMA:
        """Stage 1 of the latents, and then stage 2."""
        later = SelfTranscendence(guidance_scale=self.guidance_scale, stop=self.stop)
        return OwnEarlierEMA(
            parts.ema,
            Stage1().criterion(parts),
            # It is taught by itself on purpose: not to be warned of.
            lambda teacher: later.stage2(parts, teacher, None, health_interval=None),
            parts.setting.protocol.step_at(self.switch),
        )


@dataclass(frozen=True)
class DeepSupervised(Method):
    """A denoising loss on the student's layer."""

    name = "deep"
    title = "deep supervision"
    weight: float = 0.5

    def criterion(self, parts: Parts) -> DeepSupervision:
        """The baseline."""
        protocol = parts.setting.protocol
        return DeepSupervision(
            parts.model,
            block(protocol.student_layer),
            weight=self.weight,
            hidden_size=protocol.hidden_size,
            latent_channels=LATENT_CHANNELS,
            patch_size=PATCH_SIZE,
        )


@dataclass(frozen=True)
class SelfRepresentation(Method):
    """SRA, with the published weight and interval."""

    name = "sra"
    title = "SRA"
    weight: float = 0.2
    max_interval: float = 0.2

    def criterion(self, parts: Parts) -> SRA:
        """The baseline."""
        protocol = parts.setting.protocol
        return SRA(
            parts.model,
            parts.ema,
            block(protocol.peer_layer),
            block(protocol.peer_deep_layer),
            weight=self.weight,
            hidden_size=protocol.hidden_size,
            hidden_features=protocol.head_features,
            max_interval=self.max_interval,
        )


@dataclass(frozen=True)
class Synced(Method):
    """LayerSync, with the published weight."""

    name = "layersync"
    title = "LayerSync"
    weight: float = 0.2

    def criterion(self, parts: Parts) -> LayerSync:
        """The baseline."""
        protocol = parts.setting.protocol
        return LayerSync(parts.model, block(protocol.peer_layer), block(protocol.peer_deep_layer), weight=self.weight)


@dataclass(frozen=True)
class Dispersed(Method):
    """Dispersive loss, with the published weight and temperature."""

    name = "dispersive"
    title = "Dispersive loss"
    weight: float = 0.5
    temperature: float = 0.5

    def criterion(self, parts: Parts) -> Dispersive:
        """The baseline."""
        return Dispersive(
            parts.model,
            block(parts.setting.protocol.peer_layer),
            weight=self.weight,
            temperature=self.temperature,
        )


@dataclass(frozen=True)
class External(Method):
    """REPA, with the classifier as encoder: not self-contained, and taught by the judge."""

    name = "repa"
    title = "REPA (external: the classifier)"
    weight: float = 0.5

    def criterion(self, parts: Parts) -> REPA:
        """The baseline."""
        setting = parts.setting
        protocol = setting.protocol
        targets = ClassifierPatches(setting.classifier, setting.images, batch_size=protocol.batch_size, seed=parts.seed)
        return REPA(
            parts.model,
            block(protocol.student_layer),
            targets,
            weight=self.weight,
            hidden_size=protocol.hidden_size,
            target_size=targets.size,
            hidden_features=protocol.head_features,
        )


METHODS: dict[str, type[Method]] = {
    kind.name: kind
    for kind in (
        Plain, Stage1, SelfTranscendence, OwnEMA, DeepSupervised, SelfRepresentation, Synced, Dispersed, External,
    )
}  # fmt: skip


def parse(text: str) -> Method:
    """The method that a text such as ``self guidance_scale=8`` means.

    Raises:
        SettingError: If there is no such method or setting, or the value is not of the setting's type.
    """
    name, *settings = text.split()
    if name not in METHODS:
        raise SettingError(f"There is no method named {name!r}.\nKnown: {', '.join(METHODS)}.")
    kinds = {field.name: type(field.default) for field in fields(METHODS[name])}
    values = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in kinds:
            raise SettingError(f"The method {name!r} has no setting {key!r}.\nKnown: {', '.join(kinds) or 'none'}.")
        values[key] = _value(setting, kinds[key], value)
    return METHODS[name](**values)


def _value(setting: str, kind: type, value: str) -> Any:
    if kind is bool:
        if value not in ("True", "False"):
            raise SettingError(f"{setting!r}: write True or False.")
        return value == "True"
    try:
        return kind(value)
    except ValueError as error:
        raise SettingError(f"{setting!r}: that is no {kind.__name__}.") from error


# Which methods each part of the study trains; a teacher that is missing is trained first.
STUDIES: dict[str, list[str]] = {
    "reduced": ["none", "stage1", "stage1 target=velocity", "self", "sra", "layersync"],
    "price": ["self teacher_share=0.4", "self teacher_share=0.2"],
    "longer": ["self stop=1.0", "self guidance_scale=4 stop=1.0", "self guidance_scale=8 stop=1.0"],
    "confirmation": ["none", "self guidance_scale=8 stop=1.0", "self guidance_scale=8 stop=1.0 teacher_share=0.4"],
    "peers": ["self gating=released", "deep", "dispersive", "repa"],
    "questions": ["own-ema", "own-ema switch=0.6 stop=1.0", "self teacher_run=self"],
    "scale": [f"self guidance_scale={scale}" for scale in (1, 2, 4, 8, 16, 30)],
    "layers": [
        *(f"self teacher_layer={layer}" for layer in (4, 6, 7)),
        *(f"self student_layer={layer}" for layer in (2, 4)),
    ],
    "ablations": [
        "self window=False", "self stop=0.2", "self stop=1.0", "self teacher_weights=model", "self teacher_share=0.4",
        "self teacher_share=0.2", "self teacher_run=velocity", "self distance=cosine", "self weight=0.25",
        "self weight=1.0",
    ],
}  # fmt: skip
STUDIES["full"] = list(dict.fromkeys(text for study in tuple(STUDIES.values()) for text in study))
