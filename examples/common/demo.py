"""Data that need no download: digits and captioned shapes through small VAEs, and random latents to measure speed.

The shapes' captions go through a CLIP text model in transformers' format whose vocabulary is their words. Its weights
are random and stay so: each sentence has features of its own, and finding the words in them is the diffusion model's
work.
"""

import json
import string
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL
from filelock import FileLock
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AddedToken, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from common.coco_features import write_coco_features
from common.data import NUM_DIGIT_CLASSES, digits
from common.run_folder import open_run_folder
from common.text import load_text_encoder
from common.vae import Scaling, encode_moments, scaling_of, trained_vae

IMAGE_SIZE = 32

VAE = "vae"
TEXT_ENCODER = "text_encoder"
_SPLIT = "train"

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


def _alone_with(folder: Path) -> AbstractContextManager[object]:
    """Runs that start at one time make what they share once: the others wait for the first."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(folder.with_name(f".{folder.name}.lock"))


class MemoryLatents(Dataset[tuple[Tensor, Tensor, int]]):
    """Posteriors held in memory, mean and std (N, C, h, h), with the attributes of `common.latents.LatentFolder`."""

    def __init__(
        self, mean: Tensor, std: Tensor, labels: Tensor, *, num_classes: int, scaling: Scaling, vae: str | None
    ) -> None:
        self.mean, self.std, self.labels, self.num_classes = mean, std, labels, num_classes
        _, self.channels, self.size, _ = mean.shape
        self.scaling, self.vae = scaling, vae

    def __len__(self) -> int:
        """Images."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        """Mean, std, label."""
        return self.mean[index], self.std[index], int(self.labels[index])


def digit_latents(vae: AutoencoderKL, place: str, *, held_out: bool = False) -> MemoryLatents:
    """The training digits as (4, 8, 8) posteriors of a VAE, or all digits; ``place`` is where the VAE is."""
    images, labels = (torch.cat(parts) for parts in zip(*digits(IMAGE_SIZE)[: 1 + held_out], strict=True))
    moments, scaling = encode_moments(vae, images), scaling_of(vae.config, f"The VAE in {place}")
    return MemoryLatents(*moments, labels, num_classes=NUM_DIGIT_CLASSES, scaling=scaling, vae=place)


def demo_latents(folder: Path, *, vae_steps: int) -> MemoryLatents:
    """The training digits' latents, by a VAE that is trained now if the folder is not there."""
    with _alone_with(folder):
        vae = trained_vae(folder, digits(IMAGE_SIZE)[0].images, steps=vae_steps, seed=0, device="cpu")
    return digit_latents(vae, str(folder))


def random_latents(size: int, count: int = 4096) -> MemoryLatents:
    """Standard normal "posteriors" of this side with ImageNet's classes, which cost nothing to read."""
    mean = torch.randn(count, 4, size, size, generator=torch.Generator().manual_seed(0))
    std, labels = torch.zeros(()).expand_as(mean), torch.arange(count) % 1000
    return MemoryLatents(mean, std, labels, num_classes=1000, scaling=Scaling(), vae=None)


def demo_captions(folder: Path, *, images: int, vae_steps: int, seed: int = 0) -> None:
    """Make the folder's VAE, text encoder and features in U-ViT's layout; what is finished is not made again.

    Raises:
        Mistake: If the folder holds a demo of other settings, or something else.
    """
    with _alone_with(folder):
        open_run_folder(folder, {"images": images, "vae_steps": vae_steps, "seed": seed})
        if (folder / _SPLIT).exists():
            return
        data = captioned_shapes(images, seed=seed)
        vae = trained_vae(folder / VAE, data.images, steps=vae_steps, seed=seed, device="cpu")
        if not (folder / TEXT_ENCODER).exists():
            save_text_encoder(folder / TEXT_ENCODER, seed=seed)
        encoder = load_text_encoder(str(folder / TEXT_ENCODER))
        mean, std = encode_moments(vae, data.images)
        texts = ["", *(caption for captions in data.captions for caption in captions)]
        empty, *features = encoder.encode(texts).split([1, *map(len, data.captions)])
        items = zip(mean, std, features, strict=True)
        write_coco_features(
            folder, _SPLIT, items, empty[0], scaling=scaling_of(vae.config, "The VAE"), vae=str(folder / VAE)
        )


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
    letters = string.ascii_lowercase + string.digits
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (partial / "vocab.json").write_text(json.dumps({piece: index for index, piece in enumerate(pieces)}))
    (partial / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(partial, model_max_length=TEXT_LENGTH)
    tokenizer.add_tokens([AddedToken(word, single_word=True) for word in words if len(word) > 1])
    tokenizer.save_pretrained(partial)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=TEXT_WIDTH, intermediate_size=4 * TEXT_WIDTH, projection_dim=TEXT_WIDTH,
        num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=TEXT_LENGTH,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIPTextModel(config)
    model.save_pretrained(partial)
    partial.rename(folder)
