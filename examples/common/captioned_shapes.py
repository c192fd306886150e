"""Captioned images that need no download: one coloured shape on a coloured ground, and two sentences that say so.

With them goes a CLIP text model in transformers' format whose vocabulary is these sentences' words. Its weights are
random and stay so: each sentence has features of its own, and finding the words in them is the diffusion model's work.
"""

import json
import string
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

COLOURS = {
    "red": (0.86, 0.16, 0.16),
    "green": (0.13, 0.60, 0.25),
    "blue": (0.16, 0.32, 0.85),
    "yellow": (0.98, 0.84, 0.16),
    "white": (0.97, 0.97, 0.97),
    "black": (0.08, 0.08, 0.08),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
CAPTIONS = ("a {colour} {shape} on a {ground} ground", "{ground} ground with a {colour} {shape}")

TEXT_LENGTH = 16
TEXT_WIDTH = 64


class CaptionedImages(NamedTuple):
    """Images (N, 3, S, S), float32 in [-1, 1], and for each of them its captions."""

    images: Tensor
    captions: list[list[str]]


def captioned_shapes(count: int, *, size: int = 32, seed: int = 0) -> CaptionedImages:
    """Draw images of random shapes, colours, places and sizes, each with two captions; the seed decides everything.

    Place and size are not in the captions. The ground never has the colour of the shape.
    """
    generator = torch.Generator().manual_seed(seed)
    names = list(COLOURS)
    shape = torch.randint(len(SHAPES), (count,), generator=generator)
    colour = torch.randint(len(names), (count,), generator=generator)
    ground = (colour + torch.randint(1, len(names), (count,), generator=generator)) % len(names)
    radius = size * (0.28 + 0.08 * torch.rand(count, generator=generator))
    centre = size * (0.5 + 0.08 * (2 * torch.rand(count, 2, generator=generator) - 1))

    pixels = torch.arange(size) + 0.5
    y = pixels[None, :, None] - centre[:, 1, None, None]  # (N, S, 1), downwards
    x = pixels[None, None, :] - centre[:, 0, None, None]  # (N, 1, S)
    drawn = torch.stack([_distance(name, x, y, radius[:, None, None]) for name in SHAPES])
    distance = drawn[shape, torch.arange(count)]  # (N, S, S)
    covered = (0.5 - distance).clamp(0, 1).unsqueeze(1)  # the fraction of a pixel inside, to within its corners
    palette = torch.tensor(list(COLOURS.values()))[:, :, None, None]
    images = covered * palette[colour] + (1 - covered) * palette[ground]
    words = [
        {"colour": names[c], "shape": SHAPES[s], "ground": names[g]}
        for c, s, g in zip(colour.tolist(), shape.tolist(), ground.tolist(), strict=True)
    ]
    return CaptionedImages(images * 2 - 1, [[caption.format(**named) for caption in CAPTIONS] for named in words])


def _distance(shape: str, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """How far outside the shape a point is, in pixels, negative inside; exact along the edges, all that is seen."""
    if shape == "circle":
        return (x.square() + y.square()).sqrt() - radius
    if shape == "ring":
        return ((x.square() + y.square()).sqrt() - 0.75 * radius).abs() - 0.25 * radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.85 * radius
    if shape == "cross":
        bars = [torch.maximum(a.abs() - radius, b.abs() - 0.3 * radius) for a, b in ((x, y), (y, x))]
        return torch.minimum(*bars)
    assert shape == "triangle"  # equilateral, its tip up: three half-planes
    return torch.maximum(y, 0.5 * (3**0.5 * x.abs() - y)) - 0.5 * radius


def save_text_encoder(folder: Path, *, seed: int = 0) -> None:
    """Write a tiny CLIP text model and its tokenizer as transformers reads them, whole or not at all.

    Every word of the captions is one token; other words are spelled in lower-case letters and digits.
    """
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    words = sorted({word for caption in CAPTIONS for word in caption.split() if "{" not in word} | {*COLOURS, *SHAPES})
    merges = _merges([word for word in words if len(word) > 1])
    letters = string.ascii_lowercase + string.digits
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    tokens += dict.fromkeys(first + second for first, second in merges)
    (partial / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (partial / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges), ""]))
    CLIPTokenizer.from_pretrained(partial, model_max_length=TEXT_LENGTH).save_pretrained(partial)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokens),
                hidden_size=TEXT_WIDTH,
                intermediate_size=4 * TEXT_WIDTH,
                projection_dim=TEXT_WIDTH,
                num_hidden_layers=1,
                num_attention_heads=4,
                max_position_embeddings=TEXT_LENGTH,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=1,
            )
        )
    model.save_pretrained(partial)
    partial.rename(folder)


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, in the order of their priority, that make one token of each word."""
    merges: list[tuple[str, str]] = []
    for word in words:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        for pair in merges:
            pieces = _merged(pieces, pair)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = _merged(pieces, merges[-1])
    return merges


def _merged(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    result: list[str] = []
    for piece in pieces:
        if result and (result[-1], piece) == pair:
            result[-1] += piece
        else:
            result.append(piece)
    return result
