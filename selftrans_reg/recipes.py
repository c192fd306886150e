"""Published settings by model name; for models that the paper did not train its rule, and what small ones need."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from torch import nn

from .errors import SettingError
from .modules import check_one_of, find_layer, named_layers, nearest, numbered_groups, quoted, unwrap

Variant: TypeAlias = Literal["paper", "released"]

# Lists of blocks that one model runs one after the other, in that order: U-ViT; MDTv2, whose side blocks run only
# while it masks; MaskDiT; diffusers' Flux, AuraFlow and HiDream; Flux; EDM2.
_CHAINS = (
    ("in_blocks", "mid_block", "out_blocks"),
    ("en_inblocks", "en_outblocks", "de_blocks"),
    ("blocks", "decoder_blocks"),
    ("transformer_blocks", "single_transformer_blocks"),
    ("joint_transformer_blocks", "single_transformer_blocks"),
    ("double_stream_blocks", "single_stream_blocks"),
    ("double_blocks", "single_blocks"),
    ("enc", "dec"),
)
# Of these lists the first sees some of the tokens only while the model trains.
_MASKED = ("blocks", "decoder_blocks")
# Lists beside the blocks: streams and projections of the text, blocks that run in turn with those of the image.
_ASIDE = re.compile("audio|caption|context|perceiver|temporal|text|vace")
# Arguments, and classes of submodules, of a model that is given text.
_TEXT = re.compile("encoder_hidden_states|input_ids|caption|cap_feats|context|prompt|text|txt", re.IGNORECASE)
# In a shallower model stage 1's layer 2 would be the last.
_MIN_DEPTH = 3
# Halfway between S and B (12 blocks) and L (24), the sizes that the published number of epochs was given for.
_LARGE_DEPTH = 18
# The shallowest model that was published; for shallower ones there is the study of docs/does-it-work.md, on 8 blocks.
_PUBLISHED_DEPTH = 12
# ImageNet's 1.28 million images at batch 256.
_STEPS_PER_EPOCH = 5_000
_STEPS_NOTE = f"Steps are ImageNet's at batch 256, {_STEPS_PER_EPOCH:,} an epoch: scale them to your batch and data."


@dataclass(frozen=True)
class Recipe:
    """Settings of both stages, each with its reason: ``print(plan)`` shows them as a table.

    The three methods give keyword arguments; what only the caller knows (time, patch size, null condition) is not among
    them. Layer names count from 0, so the paper's layer 8 is ``blocks.7``.

    The layers are those that stage 1 aligns and stage 2 teaches, and the teacher's that it is taught by;
    ``guidance_scale`` is w of ``f_u + w (f_c − f_u)``; ``window`` is in noise fraction, None for all of it; ``weight``
    is λ, and ``stop_step`` the step from which stage 2 goes on without it. ``reasons`` says why, by attribute, and
    ``notes`` what else to consider.
    """

    name: str
    depth: int
    stage1_layer: str
    student_layer: str
    teacher_layer: str
    guidance_scale: float
    window: tuple[float, float] | None
    weight: float
    stop_step: int
    stage1_steps: int
    target: Literal["latents", "velocity"]
    gating: Literal["per-sample", "released"]
    reasons: dict[str, str] = field(repr=False, compare=False)
    notes: tuple[str, ...] = field(repr=False, compare=False)

    def stage1(self) -> dict[str, Any]:
        """Keyword arguments of ``SelfTransLoss.stage1``."""
        return {"layer": self.stage1_layer, **self._shared(), "target": self.target}

    def stage2(self) -> dict[str, Any]:
        """Keyword arguments of ``SelfTransLoss.stage2``."""
        return {"layer": self.student_layer, **self._shared(), "stop_step": self.stop_step}

    def teacher(self) -> dict[str, Any]:
        """Keyword arguments of ``build_teacher``."""
        return {"layer": self.teacher_layer, "guidance_scale": self.guidance_scale}

    def _shared(self) -> dict[str, Any]:
        return {"weight": self.weight, "window": self.window, "gating": self.gating, "distance": "mse"}

    def __str__(self) -> str:
        rows = [(key, str(getattr(self, key)), reason) for key, reason in self.reasons.items()]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        table = [f"  {key:<{widths[0]}}  {value:<{widths[1]}}  {reason}" for key, value, reason in rows]
        return "\n".join([f"{self.name}, {self.depth} blocks", *table, *(f"Note: {note}" for note in self.notes)])


def recipe(model: str | nn.Module, *, variant: Variant = "paper", blocks: str | Sequence[str] | None = None) -> Recipe:
    """The published settings of a model by its name, or the published rule applied to a live model.

    The rule for a depth of d blocks, counted from 1: stage 1 aligns layer 2, stage 2 teaches layer ``d // 2`` from the
    teacher's layer ``floor(2 d / 3)``. With fewer blocks than any published model, 12, the guidance scale is not the
    published 30 but 8, from this library's own study. A model that takes text gets what was published for text to
    image: guidance scale 5 and no window, and stage 1 at layer ``d // 6``. Counted are the blocks that see the whole
    image, and in a U-Net the student's layer has the resolution of the teacher's.

    Args:
        model: A name, such as ``"SiT-B/2"`` or ``"MMDiT"`` (text to image), or a model, wrapped or not.
        variant: ``"paper"``, or ``"released"`` for what the authors' code computes instead: stage 1 regresses the
            velocity, and the window scales every sample's loss by the fraction of the batch inside.
        blocks: For a live model, the name of its list of blocks, or the names of several that run one after the other.

    Raises:
        SettingError: If an argument makes no sense; if the name is unknown (it lists all names and the nearest), or the
            model's blocks are not certain (it lists what was seen) or fewer than 3.

    Reference: Sun et al., 2026, https://arxiv.org/abs/2601.07773

    Example:
        >>> plan = recipe("SiT-B/2")
        >>> plan.teacher()
        {'layer': 'blocks.7', 'guidance_scale': 30.0}
    """
    check_one_of("variant", variant, _VARIANTS)
    if isinstance(model, nn.Module):
        name, depth, layers, text, notes = _of_model(model, blocks)
    elif blocks is not None:
        raise SettingError(f"blocks names the lists of blocks of a live model; {model!r} is a name.")
    else:
        name, depth, layers, text, notes = _of_name(model, variant)
    settings = _rule(layers, depth, text=text) | _VARIANTS[variant] | {"weight": (0.5, "published")}
    if isinstance(model, str) and name.startswith("LightningDiT"):
        settings["guidance_scale"] = (10.0, "reported for LightningDiT")
    return Recipe(
        name=name,
        depth=depth,
        reasons={key: reason for key, (_, reason) in settings.items()},
        notes=tuple(notes),
        **{key: value for key, (value, _) in settings.items()},
    )


# Every setting as its value and the reason for it.
_Settings: TypeAlias = dict[str, tuple[Any, str]]
# A model's name, its number of blocks, those that see the whole image, whether it is given text, and notes.
_Found: TypeAlias = tuple[str, int, list[str], bool, list[str]]

_VARIANTS: dict[Variant, _Settings] = {
    "paper": {
        "target": ("latents", "the paper's: the clean latents"),
        "gating": ("per-sample", "the paper's: each sample by its own t"),
    },
    "released": {
        "target": ("velocity", "the released code regresses noise - latents"),
        "gating": ("released", "the released code scales every sample by the fraction of the batch inside"),
    },
}
_DEPTHS = {"S": 12, "B": 12, "L": 24, "XL": 28}
_PUBLISHED = {  # name -> depth
    **{f"SiT-{size}/{patch}": depth for size, depth in _DEPTHS.items() for patch in (1, 2, 4, 8)},
    **{f"DiT-{size}/{patch}": depth for size, depth in _DEPTHS.items() for patch in (2, 4, 8)},
    **{f"LightningDiT-{size}/{patch}": _DEPTHS[size] for size in ("B", "L", "XL") for patch in (1, 2)},
    "MMDiT": 24,
}


def _of_name(name: str, variant: Variant) -> _Found:
    if name not in _PUBLISHED:
        by_lower = {known.lower(): known for known in _PUBLISHED}
        close = [by_lower[found] for found in nearest(str(name).lower(), by_lower)]
        raise SettingError(
            f"No recipe is called {name!r}.\nKnown: {quoted(_PUBLISHED)}.\nNearest: {quoted(close) or 'none'}.\n"
            "For any other model pass the model itself: recipe(model) applies the published rule."
        )
    depth, text = _PUBLISHED[name], name == "MMDiT"
    notes = ["Blocks return (text, image): add select=1."] if text else [_STEPS_NOTE]
    if variant == "released" and not text:
        notes.append("The released code teaches with raw weights: build_teacher(..., weights='model').")
    return name, depth, [f"{'joint_' * text}blocks.{index}" for index in range(depth)], text, notes


def _of_model(model: nn.Module, blocks: str | Sequence[str] | None) -> _Found:
    root = unwrap(model)
    named = [*inspect.signature(root.forward).parameters, *(type(module).__name__ for module in root.modules())]
    name, text = type(root).__name__, any(map(_TEXT.search, named))
    layers = find_blocks(model, blocks)
    depth, notes = len(layers), [_STEPS_NOTE]
    whole = [layer for layer in layers if layer.split(".")[-2:-1] == [_MASKED[1]]]
    if 0 < len(whole) < depth and _MASKED[0] in {part for layer in layers for part in layer.split(".")}:
        layers = whole
        notes.append(f"Layers are the decoder's, {len(whole)} of the {depth} blocks: the others see a masked image.")
    if len(layers) < _MIN_DEPTH:
        raise SettingError(
            f"The published rule needs at least {_MIN_DEPTH} blocks that see the whole image; {name} has "
            f"{len(layers)}: {quoted(layers)}.\nChoose the layers yourself."
        )
    if depth < _PUBLISHED_DEPTH and not text:
        notes.append("Without a cooldown, 8 blocks were best guided to the end: stop_step=None. See 'Does it work?'.")
    if not text:
        notes.append("Text to image was published with guidance scale 5 and no window, instead: see recipe('MMDiT').")
    return name, depth, layers, text, notes


def _rule(layers: list[str], depth: int, *, text: bool) -> _Settings:
    """What was published for class labels, or for text to image, on these layers of a model that is ``depth`` deep."""
    student, teacher = len(layers) // 2, 2 * len(layers) // 3
    why = f"layer {student} = depth // 2"
    if size := re.search(r"\d+x\d+(?=_)", layers[teacher - 1]):  # a U-Net's, as in 64x64_block0
        alike = [i for i, layer in enumerate(layers[:student], 1) if f".{size[0]}_" in layer]
        if alike and alike[-1] != student:
            student, why = alike[-1], f"layer {alike[-1]}, the last up to depth // 2 of the teacher's resolution"
    first = max(2, len(layers) // 6) if text else 2
    of_stage1 = f"layer {first}; published is 4 of 24, for text to image" if text else "layer 2, whatever the depth"
    settings: _Settings = {
        "stage1_layer": (layers[first - 1], of_stage1),
        "student_layer": (layers[student - 1], why),
        "teacher_layer": (layers[teacher - 1], f"layer {teacher} = floor(2 depth / 3)"),
    }
    if text:
        return settings | {
            "guidance_scale": (5.0, "published for text to image"),
            "window": (None, "published for text to image: every t"),
            "stop_step": (50_000, "published"),
            "stage1_steps": (150_000, "published"),
        }
    shallow = 8.0, "the best of a study with 8 blocks; 30 is published, for 12 and more"
    epochs, sizes = (10, "L and XL (24 and 28 blocks)") if depth >= _LARGE_DEPTH else (20, "S and B (12 blocks)")
    return settings | {
        "guidance_scale": shallow if depth < _PUBLISHED_DEPTH else (30.0, "the published rule for class labels"),
        "window": ((0.4, 0.7), "published for class labels, as noise fraction"),
        "stop_step": (epochs * _STEPS_PER_EPOCH, f"{epochs} epochs, as published for {sizes}"),
        "stage1_steps": (40 * _STEPS_PER_EPOCH, "40 epochs"),
    }


def find_blocks(model: nn.Module, blocks: str | Sequence[str] | None) -> list[str]:
    """The names of the blocks in the order in which the model runs them."""
    if blocks is not None:
        chosen = (blocks,) if isinstance(blocks, str) else tuple(blocks)
        return [block for name in chosen for block in _members(name, find_layer(model, name))]
    layers = named_layers(model)
    groups = numbered_groups(layers)
    kinds = {name: sorted({_kind(member) for member in members}) for name, members in groups.items()}
    lists = [  # of one class, whose members have layers of their own
        name
        for name, members in groups.items()
        if isinstance(layers.get(name), nn.ModuleList) and len(kinds[name]) == 1 and unwrap(members[0])._modules
    ]
    lists = [name for name in lists if not _ASIDE.search(name.rpartition(".")[2])] or lists
    lists += [name for name, layer in layers.items() if isinstance(layer, nn.ModuleDict) and len(layer) >= _MIN_DEPTH]
    chains = []
    for first in lists:
        own = first.rpartition(".")[2]
        beside = [[first.removesuffix(own) + part for part in chain] for chain in _CHAINS if chain[0] == own]
        chains += [names for names in beside if all(name in layers for name in names)]
    chains += [[name] for name in lists if not any(name in names for names in chains)]
    candidates = [[block for name in names for block in _members(name, layers[name])] for names in chains]
    candidates.sort(key=len, reverse=True)
    # Certain only if nothing else in the model, such as a second tower, comes near in depth.
    if not candidates or (len(candidates) > 1 and 2 * len(candidates[1]) > len(candidates[0])):
        seen = [f"{name or 'at the top'} ({len(groups[name])} {' / '.join(kind)})" for name, kind in kinds.items()]
        raise SettingError(
            f"It is not certain which layers of {type(unwrap(model)).__name__} are its blocks.\n"
            f"Seen: {', '.join(seen) or 'no numbered layers'}.\n"
            "Say which, in the order in which they run: recipe(model, blocks='layers') or blocks=['first', 'second']; "
            "or choose the layers yourself."
        )
    return candidates[0]


def _members(name: str, layer: nn.Module) -> list[str]:
    """The names of a list's blocks, or the one name of a block that stands alone; of a dictionary its usual kind."""
    if isinstance(layer, nn.ModuleDict):
        usual = Counter(_kind(member) for member in layer.values() if member._modules).most_common(1)
        return [f"{name}.{key}" for key, member in layer.items() if usual and _kind(member) == usual[0][0]]
    if isinstance(layer, nn.ModuleList | nn.Sequential):
        return [f"{name}.{index}" for index in range(len(layer))]
    return [name]


def _kind(member: nn.Module) -> str:
    return type(unwrap(member)).__name__
