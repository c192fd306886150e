"""The captioned shapes of the text-to-image demo, and the text encoder that knows their words."""

from itertools import product
from pathlib import Path

import torch
from common.demo import CAPTIONS, COLOURS, SHAPES, captioned_shapes, save_text_encoder
from common.text import load_text_encoder

AREAS = {  # in squared radii
    "circle": torch.pi, "ring": torch.pi * (1 - 0.5**2), "square": (2 * 0.85) ** 2, "cross": 4 * 0.6 - 0.6**2,
    "triangle": 3 * 3**0.5 / 4,
}  # fmt: skip


def test_the_captions_say_what_is_drawn() -> None:
    """In which colour on which ground, and by its area which shape."""
    data, radii = captioned_shapes(100, size=128), {shape: [] for shape in AREAS}
    palette = {name: torch.tensor(rgb)[:, None, None] * 2 - 1 for name, rgb in COLOURS.items()}
    for image, (sentence, other) in zip(data.images, data.captions, strict=True):
        _, colour, shape, _, _, ground, _ = sentence.split()
        assert other.split() == [ground, "ground", "with", "a", colour, shape]
        step = palette[colour] - palette[ground]
        covered = ((image - palette[ground]) * step).sum(0) / step.square().sum()  # the fraction of each pixel
        torch.testing.assert_close(image, palette[ground] + covered * step)
        radii[shape].append((covered.sum() / AREAS[shape]).sqrt().item() / 128)
    for found in radii.values():
        assert len(found) > 5
        assert 0.275 < min(found) < max(found) < 0.365  # the radii that are drawn: 0.28 to 0.36


def test_the_text_encoder_knows_each_word_as_one_token_and_is_the_same_each_time(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    for name in ("a", "b"):
        save_text_encoder(tmp_path / name)
    assert torch.equal(torch.get_rng_state(), state)
    first, second = (load_text_encoder(str(tmp_path / name)) for name in ("a", "b"))
    words = product(CAPTIONS, COLOURS, COLOURS, SHAPES)
    sentences = [caption.format(colour=c, ground=g, shape=s) for caption, c, g, s in words]
    for sentence in sentences:
        assert [token.removesuffix("</w>") for token in first.tokenizer.tokenize(sentence)] == sentence.split()
    features = first.encode(["", *sentences])
    assert torch.equal(features, second.encode(["", *sentences]))
    flat = features.flatten(1)
    assert torch.cdist(flat, flat).fill_diagonal_(torch.inf).min() > 1  # no two sentences look alike
    assert {entry.name for entry in tmp_path.iterdir()} == {"a", "b"}
