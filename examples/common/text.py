"""Texts as conditions: CLIP's features by transformers' own classes, images for prompts, and pictures of them.

As U-ViT and latent diffusion make the features: the prompt padded to the model's length, no attention mask, the last
hidden state. Source followed: U-ViT's COCO script, https://github.com/baofff/U-ViT. transformers is imported when a
model is loaded.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from common.data_files import DataError
from common.options import Mistake
from common.run_folder import write_whole
from common.samplers import ImageSampler, Model

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

# What the published features come from: 77 tokens of width 768.
CLIP_VIT_L14 = "openai/clip-vit-large-patch14"

_BATCH_SIZE = 64
_SAME = 0.05  # half precision and other hardware round otherwise; CLIP's features are about 1, and some of them 30
_COLUMNS = 8
_CAPTION_WIDTH = 17  # letters that fit below an image


class TextFeatures(NamedTuple):
    """Features of some texts, and what of them was not seen.

    Attributes:
        features: (N, L, D), float32 on the CPU.
        cut: The texts that were longer than the encoder's length, of which only the beginning is in the features.
    """

    features: Tensor
    cut: list[str]


class TextEncoder:
    """A frozen CLIP text model with its tokenizer.

    Args:
        name: What messages call it: the folder or hub name that it came from.
        tokenizer: Its tokenizer.
        model: The text model, which is put into eval mode and frozen.

    Attributes:
        length: Tokens L of every text, start and end included; shorter texts are padded.
        width: Width D of the features.
    """

    def __init__(self, name: str, tokenizer: "CLIPTokenizer", model: "CLIPTextModel") -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.model = model.eval().requires_grad_(False)
        self.length: int = model.config.max_position_embeddings
        self.width: int = model.config.hidden_size

    @torch.no_grad()
    def encode(self, texts: Sequence[str], *, cut_long: bool = False) -> TextFeatures:
        """The last hidden state of each text.

        Args:
            texts: The texts; the empty one is the null condition.
            cut_long: Encode the beginning of a text that is too long, as CLIP's users do, and list it under ``cut``.
        """
        texts = list(texts)
        tokens = self.tokenizer(texts, truncation=False, verbose=False)["input_ids"]  # start to end, unpadded
        for text, ids in zip(texts, tokens, strict=True):
            # CLIP's byte-level vocabulary spells everything: what is unknown becomes its end token in the middle.
            if self.tokenizer.unk_token_id in ids[1:-1]:
                raise Mistake(
                    f"The tokenizer of {self.name} has no tokens for a part of {text!r}.\n"
                    f"Found: {self.tokenizer.convert_ids_to_tokens(ids)}. Use words that it knows."
                )
        long = [(text, len(ids)) for text, ids in zip(texts, tokens, strict=True) if len(ids) > self.length]
        if long and not cut_long:
            raise Mistake(
                f"{self.name} reads at most {self.length} tokens, its start and end among them.\n"
                f"Found: {len(long)} of {len(texts)} texts longer than that; {long[0][1]} tokens in {long[0][0]!r}.\n"
                "Shorten them: what is behind the limit would not be seen."
            )
        fixed = {"padding": "max_length", "truncation": True, "max_length": self.length}  # the end token stays
        padded = self.tokenizer(texts, return_tensors="pt", **fixed)["input_ids"]
        chunks = [self.model(ids.to(self.model.device)).last_hidden_state for ids in padded.split(_BATCH_SIZE)]
        return TextFeatures(torch.cat(chunks).float().cpu(), [text for text, _ in long])


def load_text_encoder(name: str, *, device: str = "cpu") -> TextEncoder:
    """The CLIP text model and its tokenizer, from a folder or from the hub.

    Args:
        name: A folder with both, or a hub name such as ``"openai/clip-vit-large-patch14"``.
        device: Where the model runs.
    """
    from transformers import CLIPTextModel, CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(name)
        model, found = CLIPTextModel.from_pretrained(name, output_loading_info=True)
    except (OSError, ValueError) as error:
        where = "a folder" if Path(name).exists() else "no folder here, so taken for a name on the hub"
        raise DataError(
            f"No CLIP text model and tokenizer could be loaded from {name!r} ({where}).\nFound: {error}\n"
            f"Name a folder with both, as save_pretrained writes them, or a hub name such as {CLIP_VIT_L14!r}."
        ) from error
    # transformers goes on with what it finds: random weights for those that are missing, an empty tokenizer.
    if found["missing_keys"]:
        raise DataError(
            f"{name!r} holds no whole CLIP text model.\n"
            f"Missing: {', '.join(sorted(found['missing_keys'])[:3])}, {len(found['missing_keys'])} weights in all."
        )
    if len(tokenizer) != model.config.vocab_size:
        raise DataError(
            f"{name!r} holds a tokenizer that is not its text model's.\n"
            f"Found: {len(tokenizer):,} tokens in the tokenizer, {model.config.vocab_size:,} in the model.\n"
            "Save the model's own tokenizer beside it."
        )
    return TextEncoder(name, tokenizer, model.to(device))


def same_features(one: Tensor, other: Tensor) -> bool:
    """Whether two texts' features are those of one text by one encoder, up to rounding."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=_SAME, atol=_SAME)


class Prompts(NamedTuple):
    """Texts and their features; to a sampler they are classes, with the empty prompt as the null class.

    Attributes:
        texts: P prompts.
        features: (P + 1, L, D), theirs and behind them those of the empty prompt.
    """

    texts: list[str]
    features: Tensor

    @property
    def null(self) -> int:
        """The empty prompt's number."""
        return len(self.texts)

    def conditioned(self, model: nn.Module) -> Model:
        """The model as the samplers call it: y is the number of a prompt."""
        table = self.features.to(next(model.parameters()).device)
        return lambda x, t, y: model(x, t, context=table[y])


def numbers_of(numbers: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """The labels of prompts, for an `ImageSampler`: their numbers."""
    return torch.tensor(numbers)


def encoded_prompts(encoder: TextEncoder, texts: Sequence[str], shape: Sequence[int], of: str) -> Prompts:
    """Prompts with their features.

    Args:
        encoder: The text encoder of the captions that the model was trained on.
        texts: The prompts.
        shape: (L, D) that the model was trained on.
        of: What messages call the model or its data.
    """
    if (encoder.length, encoder.width) != tuple(shape):
        raise Mistake(
            f"{encoder.name} gives {encoder.length} tokens of width {encoder.width} a text; {of} has "
            f"{shape[0]} of width {shape[1]}.\nPass with --text-encoder the one that the captions were encoded with."
        )
    features = encoder.encode([*texts, ""]).features
    return Prompts(list(texts), features)


def draw_prompts(sampler: ImageSampler, prompts: Prompts, model: nn.Module, path: Path) -> None:
    """Write a picture of all prompts, each below its image, by a model in eval mode."""
    device = next(model.parameters()).device
    images = sampler.images(prompts.conditioned(model), range(len(prompts.texts)), device)
    save_captioned({"": images}, prompts.texts, path)


def save_captioned(rows: dict[str, NDArray[np.uint8]], captions: Sequence[str], path: Path) -> None:
    """Write images with captions as one PNG.

    Args:
        rows: By heading, images (N, H, W, 3), one for each caption. A single row is wrapped; of several, the captions
            are below the last.
        captions: N texts.
        path: The file.
    """
    from matplotlib.figure import Figure

    columns = min(len(captions), _COLUMNS) if len(rows) == 1 else len(captions)
    grid = [
        (heading, list(images[start : start + columns]), captions[start : start + columns])
        for heading, images in rows.items()
        for start in range(0, len(captions), columns)
    ]
    height = 1.75 * len(grid) if len(rows) == 1 else 1.4 * len(grid) + 0.35  # with captions in each row, or below all
    figure = Figure(figsize=(1.35 * columns + 0.6, height), layout="constrained")
    axes = figure.subplots(len(grid), columns, squeeze=False)
    for line, (heading, images, texts) in enumerate(grid):
        for place, axis in enumerate(axes[line]):
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
            if place < len(images):
                axis.imshow(images[place], interpolation="nearest")
                if len(rows) == 1 or line == len(grid) - 1:
                    axis.set_xlabel(textwrap.fill(texts[place], _CAPTION_WIDTH), fontsize=8)
        axes[line, 0].set_ylabel(heading, fontsize=9)
    write_whole(path, lambda file: figure.savefig(file, dpi=110, format="png"))
