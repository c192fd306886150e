"""The captioned shapes of the text-to-image demo, and the text encoder that knows their words."""

from pathlib import Path

import torch
from common.demo import CAPTIONS, COLOURS, SHAPES, captioned_shapes, save_text_encoder
from common.text import load_text_encoder


def test_the_captions_say_what_is_drawn() -> None:
    data = captioned_shapes(200)
    palette = {name: torch.tensor(rgb) * 2 - 1 for name, rgb in COLOURS.items()}
    for image, (sentence, other) in zip(data.images, data.captions, strict=True):
        _, colour, _, _, _, ground, _ = sentence.split()
        torch.testing.assert_close(image[:, 0, 0], palette[ground])  # no shape reaches a corner
        inside = (image - palette[colour][:, None, None]).abs().amax(0) < 1e-4
        assert inside.sum() > 15
        assert sorted(set(sentence.split()) & {*COLOURS, *SHAPES}) == sorted(set(other.split()) & {*COLOURS, *SHAPES})


AREAS = {  # in squared radii
    "circle": torch.pi, "ring": torch.pi * (1 - 0.5**2), "square": (2 * 0.85) ** 2, "cross": 4 * 0.6 - 0.6**2,
    "triangle": 3 * 3**0.5 / 4,
}  # fmt: skip


def test_shapes_have_their_area() -> None:
    data, radii = captioned_shapes(100, size=128), {shape: [] for shape in AREAS}
    for image, (sentence, _) in zip(data.images, data.captions, strict=True):
        shape = next(shape for shape in AREAS if shape in sentence)
        step = (image - image[:, :1, :1]).abs().sum(0)
        radii[shape].append((step.sum() / step.max() / AREAS[shape]).sqrt().item() / 128)
    for found in radii.values():
        assert len(found) > 5
        assert 0.275 < min(found) < max(found) < 0.365  # the radii that are drawn: 0.28 to 0.36


def test_the_text_encoder_knows_each_word_as_one_token_and_is_the_same_each_time(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    for name in ("a", "b"):
        save_text_encoder(tmp_path / name)
    assert torch.equal(torch.get_rng_state(), state)
    first, second = (load_text_encoder(str(tmp_path / name)) for name in ("a", "b"))
    sentences = [
        caption.format(colour=colour, shape=shape, ground=ground)
        for caption in CAPTIONS for colour in COLOURS for ground in COLOURS for shape in SHAPES
    ]  # fmt: skip
    for sentence in sentences:
        tokens = first.tokenizer.tokenize(sentence)
        assert [token.removesuffix("</w>") for token in tokens] == sentence.split()
    features = first.encode(["", *sentences])
    assert torch.equal(features, second.encode(["", *sentences]))
    flat = features.flatten(1)
    assert torch.cdist(flat, flat).fill_diagonal_(torch.inf).min() > 1  # no two sentences look alike
    assert {entry.name for entry in tmp_path.iterdir()} == {"a", "b"}
