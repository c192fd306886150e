"""The methods that the convergence study compares: what each adds to the loss, and what it needs first.

A method is written as its name and the settings in which it differs: ``self teacher_width=48 rows=0.25``.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import nn

import selftrans_reg as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import baselines as peers
from benchmarks.convergence_setting import NULL_CLASS, PATCH_SIZE, Protocol, Setting, block
from common.options import Mistake
from common.sit import FinalLayer, SiT
from common.training import Criterion
from common.vae import LATENT_CHANNELS

TIME = "repa"  # t = 1 is noise
WINDOW = (0.4, 0.7)  # published
TEACHER_SEED = 1000  # a teacher's seed is its student's and this: users' teachers share nothing with their students


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

    @property
    def protocol(self) -> Protocol:
        """The setting's."""
        return self.setting.protocol

    def head(self, target_size: int = 0) -> st.ProjectionHead:
        """From the model's width to another, or to its own."""
        p = self.protocol
        return st.ProjectionHead(p.hidden_size, target_size or p.hidden_size, p.head_features)


@dataclass(frozen=True)
class Method:
    """One way to train, with its settings.

    Attributes:
        share: Length of the run as a share of the plain run's.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    share: float = 1.0

    def model(self, protocol: Protocol, device: str) -> SiT:
        """The model that trains."""
        return protocol.new_model(device)

    def criterion(self, parts: Parts) -> Criterion | None:
        """What the method adds to the loss."""
        raise NotImplementedError

    def teacher(self) -> tuple[Method, int] | None:
        """What has to be trained first, and what is added to the seed for it."""
        return None

    def part_ends(self, protocol: Protocol) -> list[int]:
        """The steps at which the cost of a step changes, the last of them the run's end."""
        return [protocol.step_at(self.share)]

    def __str__(self) -> str:
        changed = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return " ".join([self.name, *changed])

    def described(self) -> dict[str, Any]:
        """Name and every setting."""
        return {"name": self.name, **asdict(self)}


class Plain(Method):
    """The denoising loss alone."""

    name, title = "none", "plain"

    def criterion(self, parts: Parts) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Stage1(Method):
    """Stage 1 for the whole run: a shallow layer sees the latents, or the velocity as in the released code.

    Attributes:
        width: Of the model; 0 for the protocol's.
        depth: Of the model; 0 for the protocol's.
    """

    name, title = "stage1", "stage 1"
    target: Literal["latents", "velocity"] = "latents"
    width: int = 0
    depth: int = 0

    def model(self, protocol: Protocol, device: str) -> SiT:
        """A model of the size that was asked for."""
        return protocol.new_model(device, width=self.width, depth=self.depth)

    def criterion(self, parts: Parts) -> st.SelfTransLoss:
        """The library's stage 1."""
        p = parts.protocol
        layer = block(p.layer_at(p.stage1_layer, self.depth or p.depth))
        return st.SelfTransLoss.stage1(
            parts.model, layer=layer, time=TIME, latent_channels=LATENT_CHANNELS, patch_size=PATCH_SIZE,
            hidden_features=p.head_features, target=self.target, window=WINDOW,
        )  # fmt: skip


@dataclass(frozen=True)
class Guided(Method):
    """What the two ways to be taught in stage 2 have in common.

    Attributes:
        rows: Share of the rows in the window that are taught.
        schedule: How the weight goes to 0 until guidance stops.
        stop: The share of the run after which guidance ends; 1 for never.
    """

    guidance_scale: float = 8.0
    rows: float = 1.0
    distance: Literal["mse", "cosine", "smooth_l1"] = "mse"
    weight: float = 0.5
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    stop: float = 1.0

    def teacher_of(self, parts: Parts, model: nn.Module, checkpoint: Path | None, depth: int) -> st.CFGFeatureTeacher:
        """A teacher from a checkpoint, or from the weights that the model already has."""
        layer, null = block(parts.protocol.layer_at(parts.protocol.teacher_layer, depth)), {"y": NULL_CLASS}
        scale = self.guidance_scale
        return st.build_teacher(model, checkpoint, layer=layer, guidance_scale=scale, null=null, time=TIME)

    def stage2(self, parts: Parts, teacher: st.CFGFeatureTeacher, **more: Any) -> st.SelfTransLoss:
        """The library's stage 2."""
        p, rows = parts.protocol, None if self.rows == 1 else self.rows
        return st.SelfTransLoss.stage2(
            parts.model, layer=block(p.student_layer), teacher=teacher, time=TIME, hidden_features=p.head_features,
            distance=self.distance, weight=self.weight, window=WINDOW, teacher_rows=rows, schedule=self.schedule,
            stop_step=p.step_at(self.share * self.stop), **more,
        )  # fmt: skip


@dataclass(frozen=True)
class SelfTranscendence(Guided):
    """Stage 2, taught by a finished stage-1 run.

    Attributes:
        teacher_width: Of the teacher's model; 0 for the student's.
        teacher_depth: Likewise.
        teacher_share: Length of its run, as a share of the plain run's.
        same_seed: Whether the teacher's run has the student's seed: the same weights at first, batches and noise.
        normalised: Whether each token of the target is brought to mean 0 and variance 1.
    """

    name, title = "self", "teacher"
    teacher_width: int = 0
    teacher_depth: int = 0
    teacher_share: float = 1.0
    same_seed: bool = False
    normalised: bool = False

    def teacher(self) -> tuple[Method, int]:
        """The run that teaches."""
        method = Stage1(share=self.teacher_share, width=self.teacher_width, depth=self.teacher_depth)
        return method, 0 if self.same_seed else TEACHER_SEED

    def part_ends(self, protocol: Protocol) -> list[int]:
        """With guidance and without."""
        return sorted({protocol.step_at(self.share * self.stop), protocol.step_at(self.share)})

    def criterion(self, parts: Parts) -> Criterion:
        """The library's stage 2, or the same on normalised targets."""
        protocol = parts.protocol
        model = self.teacher()[0].model(protocol, parts.setting.device)
        teacher = self.teacher_of(parts, model, parts.teacher, self.teacher_depth or protocol.depth)
        if not self.normalised:
            return self.stage2(parts, teacher)
        return peers.NormalisedTarget(
            parts.model, block(protocol.student_layer), teacher, parts.head(self.teacher_width), weight=self.weight,
            window=WINDOW, rows=self.rows,
        )  # fmt: skip


@dataclass(frozen=True)
class Own(Guided):
    """A single run: stage 1 up to a share of the steps, then its own average teaches.

    Attributes:
        start: The share after which it teaches.
        refresh: Steps after which the average is copied anew, again and again; 0 for never.
    """

    name, title = "own", "own average"
    rows: float = 0.25
    start: float = 0.2
    refresh: int = 0

    def part_ends(self, protocol: Protocol) -> list[int]:
        """Stage 1, stage 2, and neither."""
        return sorted({protocol.step_at(self.share * part) for part in (self.start, self.stop, 1.0)})

    def criterion(self, parts: Parts) -> peers.OwnAverage:
        """Stage 1 of the latents, and then stage 2."""
        protocol = parts.protocol
        snapshot = copy.deepcopy(parts.ema)
        teacher = self.teacher_of(parts, snapshot, None, protocol.depth)
        teacher.refresh(parts.ema.state_dict())  # its weights are no part of what it is: see a resumed run
        stages = Stage1().criterion(parts), self.stage2(parts, teacher, health_interval=None)
        start = protocol.step_at(self.share * self.start)
        return peers.OwnAverage(parts.ema, snapshot, *stages, start=start, refresh=self.refresh)


@dataclass(frozen=True)
class Peer(Method):
    """A baseline of benchmarks/baselines.py."""

    weight: float = 0.5


class InternallyGuided(Peer):
    """Internal Guidance, with the published weight and depth."""

    name, title = "ig", "Internal Guidance"

    def criterion(self, parts: Parts) -> peers.InternalGuidance:
        """The baseline."""
        p = parts.protocol
        with torch.random.fork_rng():
            final = FinalLayer(p.hidden_size, PATCH_SIZE, LATENT_CHANNELS)
        for parameter in final.parameters():
            nn.init.zeros_(parameter)  # as the model's own last layer
        return peers.InternalGuidance(parts.model, block(p.peer_layer), final, weight=self.weight, decay=p.ema_decay)


@dataclass(frozen=True)
class SelfRepresentation(Peer):
    """SRA, as its authors have it since July 2026; before, smooth L1 with weight 0.2."""

    name, title = "sra", "SRA"
    distance: Literal["cosine", "smooth_l1"] = "cosine"

    def criterion(self, parts: Parts) -> peers.SRA:
        """The baseline."""
        layers = block(parts.protocol.peer_layer), block(parts.protocol.peer_deep_layer)
        return peers.SRA(parts.model, parts.ema, layers, parts.head(), weight=self.weight, distance=self.distance)


class Synced(Peer):
    """LayerSync; its published weight is 0.2."""

    name, title = "layersync", "LayerSync"

    def criterion(self, parts: Parts) -> peers.LayerSync:
        """The baseline."""
        p = parts.protocol
        return peers.LayerSync(parts.model, block(p.peer_layer), block(p.peer_deep_layer), weight=self.weight)


class Dispersed(Peer):
    """Dispersive loss, with the published weight and temperature."""

    name, title = "dispersive", "Dispersive loss"

    def criterion(self, parts: Parts) -> peers.Dispersive:
        """The baseline."""
        return peers.Dispersive(parts.model, block(parts.protocol.peer_layer), weight=self.weight)


class External(Peer):
    """REPA, with the classifier as encoder: not self-contained, and taught by the judge."""

    name, title = "repa", "REPA (external: the classifier)"

    def criterion(self, parts: Parts) -> peers.REPA:
        """The baseline."""
        p, setting = parts.protocol, parts.setting
        targets = peers.ClassifierPatches(setting.classifier, setting.images, batch_size=p.batch_size, seed=parts.seed)
        return peers.REPA(parts.model, block(p.student_layer), targets, parts.head(targets.size), weight=self.weight)


METHODS: dict[str, type[Method]] = {
    kind.name: kind
    for kind in (
        Plain, Stage1, SelfTranscendence, Own, InternallyGuided, SelfRepresentation, Synced, Dispersed, External,
    )
}  # fmt: skip


def described_method(settings: dict[str, Any]) -> Method:
    """The method of a result; a setting that it does not name did not exist then, and has its default."""
    return METHODS[settings["name"]](**{key: value for key, value in settings.items() if key != "name"})


def parse(text: str) -> Method:
    """The method that a text such as ``self rows=0.25`` means.

    Raises:
        Mistake: If there is no such method or setting, or the value is not of the setting's type.
    """
    name, *settings = text.split()
    if name not in METHODS:
        raise Mistake(f"There is no method named {name!r}.\nKnown: {', '.join(METHODS)}.")
    kinds = {field.name: type(field.default) for field in fields(METHODS[name])}
    values: dict[str, Any] = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in kinds:
            raise Mistake(f"The method {name!r} has no setting {key!r}.\nKnown: {', '.join(kinds)}.")
        try:
            values[key] = {"True": True, "False": False}[value] if kinds[key] is bool else kinds[key](value)
        except (KeyError, ValueError) as error:
            raise Mistake(f"{setting!r}: that is no {kinds[key].__name__}.") from error
    return METHODS[name](**values)


SCREEN_SEEDS, CONFIRMATION_SEEDS, LONG_SEEDS = (10, 11, 12), tuple(range(20, 30)), tuple(range(30, 35))
_SMALL = "self teacher_width=32 teacher_depth=5"
_SHORTER = "self share=0.832 teacher_width=48 teacher_share=0.4", "self share=0.683 teacher_share=0.2"
# What each part of the study trains; a teacher that is missing is trained first. `share` brings the price of a run of
# --size short to that of the plain one. A smaller or shorter teacher's run counts in it; any other exists already.
STUDIES: dict[str, list[str]] = {
    "confirmation": [
        "none", "self share=0.925 stop=0.5 teacher_share=2.5", "self share=0.862",
        "own share=0.96 schedule=linear start=0.3 refresh=100", "own share=0.96 refresh=100", f"{_SMALL} share=0.865",
        "stage1 share=0.96",
    ],
    "long": [  # with --size long
        "none", "own share=0.96 refresh=400", "own share=0.96 schedule=linear start=0.3 refresh=400",
        "own share=0.98 stop=0.5 refresh=400",
    ],
    "screen": [
        "self share=0.925 stop=0.5 teacher_share=2.5", "self share=0.9596 rows=0.25 teacher_share=2.5",
        "self share=0.925 stop=0.5", "self share=0.953 stop=0.3",
        "self share=0.9596 rows=0.25", "self share=0.982 rows=0.1",
        f"{_SMALL} share=0.887 stop=0.3",
        *(" ".join([teacher, more]) for teacher in _SHORTER for more in ("", "distance=cosine", "normalised=True")),
        "self share=0.504 teacher_share=0.4", "self share=0.561 teacher_share=0.4 rows=0.25",
        *(f"own share=0.96 start={start} refresh={steps}" for start in (0.1, 0.2) for steps in (0, 100)),
        "own share=0.96 start=0.3 refresh=100", "own share=0.96 schedule=linear start=0.3 refresh=100",
        "own rows=0.1 share=0.981 schedule=linear start=0.3 refresh=100 stop=0.8",
    ],
    "controls": ["none share=2.2", "stage1 share=2.12", "self"],
    "peers": [
        *(f"ig share=0.997 weight={weight}" for weight in (0.5, 0.25)),
        *(f"sra share=0.75 {more}" for more in ("weight=0.5", "weight=0.25", "distance=smooth_l1 weight=0.2")),
        *(f"layersync weight={weight}" for weight in (0.5, 0.2)),
        *(f"dispersive share=0.993 weight={weight}" for weight in (0.5, 0.25)),
        *(f"repa share=0.885 weight={weight}" for weight in (0.5, 1.0)),
    ],
}  # fmt: skip
