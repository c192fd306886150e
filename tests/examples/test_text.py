"""CLIP text features by transformers' own classes, on tiny models whose vocabulary is made here."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from common.data_files import DataError
from common.options import Mistake
from common.text import TextEncoder, encoded_prompts, load_text_encoder, numbers_of, same_features, save_captioned
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"
# Letters inside and at the end of a word, and one merge: "ab" at a word's end is one token.
VOCABULARY = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS), "ab</w>"]
LENGTH, WIDTH = 7, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP text model and tokenizer as they lie on a disk."""
    folder = tmp_path_factory.mktemp("clip")
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(VOCABULARY)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPTextModel(tiny_config()).save_pretrained(folder)
    return folder


def tiny_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(VOCABULARY), hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=LENGTH, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def encoder(folder: Path) -> TextEncoder:
    return load_text_encoder(str(folder))


def test_features_are_the_last_hidden_state_of_padded_tokens(encoder: TextEncoder) -> None:
    assert (encoder.length, encoder.width) == (LENGTH, WIDTH)
    found = encoder.encode(["", "ab c", "Ba"])
    token = VOCABULARY.index
    padded = [
        [0, 1, 1, 1, 1, 1, 1],
        [0, token("ab</w>"), token("c</w>"), 1, 1, 1, 1],
        [0, token("b"), token("a</w>"), 1, 1, 1, 1],  # lower case, as CLIP reads everything
    ]
    with torch.no_grad():
        expected = encoder.model(torch.tensor(padded)).last_hidden_state
    assert found.shape == (3, LENGTH, WIDTH)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not found.requires_grad


def test_features_do_not_depend_on_the_other_texts(encoder: TextEncoder) -> None:
    texts = [a + b for a in LETTERS for b in "abcd"]  # more than one batch
    together = encoder.encode(texts)
    for i in (0, 64):
        torch.testing.assert_close(together[i], encoder.encode([texts[i]])[0], rtol=1e-4, atol=1e-5)


def test_a_text_that_is_too_long_is_named_or_cut(encoder: TextEncoder) -> None:
    fitting, long = "a b c d e", "a b c d e f g"  # start and end beside them: 7 and 9 tokens
    encoder.encode([fitting])
    for match in ["at most 7 tokens", "1 of 2 texts", "9 tokens in 'a b c d e f g'", "Shorten"]:
        with pytest.raises(Mistake, match=match):
            encoder.encode([fitting, long])
    found = encoder.encode([fitting, long], cut_long=True)
    torch.testing.assert_close(found[1], found[0])  # its beginning, and the end token as ever


def test_what_the_tokenizer_cannot_spell_is_named(encoder: TextEncoder) -> None:
    for match in ["no tokens for a part of 'a 7'", "endoftext"]:
        with pytest.raises(Mistake, match=match):
            encoder.encode(["ab", "a 7"])


def test_prompts_are_the_conditions_of_their_numbers(encoder: TextEncoder) -> None:
    prompts = encoded_prompts(encoder, ["ab", "c"], (LENGTH, WIDTH), "the data")
    assert prompts.null == 2
    torch.testing.assert_close(prompts.features, encoder.encode(["ab", "c", ""]))
    assert same_features(prompts.features[2], encoder.encode([""])[0].half().float())
    assert not same_features(prompts.features[2], prompts.features[0])
    assert not same_features(prompts.features[2], prompts.features[2][:1])
    model = torch.nn.Linear(1, 1)
    model.forward = lambda x, t, context: context + x
    found = prompts.conditioned(model)(torch.zeros(3, 1, 1), torch.zeros(3), numbers_of([1, 0, 2], []))
    assert torch.equal(found, prompts.features[[1, 0, 2]])
    for shape in [(LENGTH, 768), (77, WIDTH)]:
        with pytest.raises(
            Mistake, match=rf"gives 7 tokens of width 12 a text; the data has {shape[0]} of width {shape[1]}"
        ):
            encoded_prompts(encoder, ["ab"], shape, "the data")


def test_a_picture_shows_every_image_and_nothing_else_is_left(tmp_path: Path) -> None:
    colours = [(250, 10, 10), (10, 200, 10), (10, 10, 250), (240, 200, 10)]
    solid = np.array(colours, np.uint8)[:, None, None, :] * np.ones((1, 8, 8, 1), np.uint8)
    save_captioned({"first": solid[:2], "second": solid[2:]}, ["a caption", "another"], tmp_path / "rows.png")
    save_captioned({"": np.concatenate([solid] * 3)}, ["the same"] * 12, tmp_path / "wrapped.png")  # more than a line
    for name, shown in {"rows.png": 1, "wrapped.png": 3}.items():
        with Image.open(tmp_path / name) as picture:
            pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
        areas = [(pixels == colour).all(1).sum() / shown for colour in colours]
        assert min(areas) > 5_000
        assert max(areas) < 1.1 * min(areas)
    assert {entry.name for entry in tmp_path.iterdir()} == {"rows.png", "wrapped.png"}


def test_what_is_no_whole_text_encoder_is_named(folder: Path, tmp_path: Path) -> None:
    model = CLIPTextModel.from_pretrained(folder)
    kept = {name: value for name, value in model.state_dict().items() if "final_layer_norm" not in name}
    model.save_pretrained(tmp_path / "broken", state_dict=kept)
    for name in ("broken", "other"):
        CLIPTokenizer.from_pretrained(folder).save_pretrained(tmp_path / name)
    config = tiny_config()
    config.vocab_size += 1
    CLIPTextModel(config).save_pretrained(tmp_path / "other")
    for name, match in {
        "nobody/nothing": "taken for a name on the hub",
        str(tmp_path): r"\(a folder\)",
        str(tmp_path / "broken"): r"lacks 2 weights, as .*final_layer_norm.bias",
        str(tmp_path / "other"): "tokenizer is not its text model's: 55 tokens in the tokenizer, 56 in the model",
    }.items():
        with pytest.raises(DataError, match=f"No CLIP text model and tokenizer could be loaded(.|\n)*{match}"):
            load_text_encoder(name)
