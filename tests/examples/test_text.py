"""CLIP text features by transformers' own classes, on the demo's tiny model."""

from pathlib import Path

import pytest
import torch
from common.data_files import DataError
from common.demo import TEXT_LENGTH, TEXT_WIDTH, save_text_encoder
from common.options import Mistake
from common.text import TextEncoder, load_text_encoder, same_features
from transformers import CLIPTextConfig, CLIPTextModel


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    save_text_encoder(folder := tmp_path_factory.mktemp("clip") / "clip")
    return load_text_encoder(str(folder))


def test_features_are_the_last_hidden_state_of_padded_tokens(encoder: TextEncoder) -> None:
    assert (encoder.length, encoder.width) == (TEXT_LENGTH, TEXT_WIDTH)
    found = encoder.encode(["", "a bc", "Ba"])
    tokens = {
        "": [0],
        "a bc": [0, 38, 3, 40],
        "ba": [0, 3, 38],
    }  # 2, 3, 4 are letters, 38, 39, 40 those at a word's end
    with torch.no_grad():
        padded = torch.tensor([(ids + [1] * TEXT_LENGTH)[:TEXT_LENGTH] for ids in tokens.values()])
        expected = encoder.model(padded).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not found.requires_grad
    assert same_features(found[0], expected[0].half().float())
    assert not same_features(found[0], found[1])
    assert not same_features(found[0], found[0][:1])
    texts = [f"{a}{b}" for a in range(9) for b in range(9)]  # more than one batch
    together = encoder.encode(texts)
    for i in (0, 64):
        torch.testing.assert_close(together[i], encoder.encode([texts[i]])[0], rtol=1e-4, atol=1e-5)


def test_a_text_that_is_too_long_is_named_or_cut_and_one_that_cannot_be_spelled_named(encoder: TextEncoder) -> None:
    fitting, long = " ".join("abcdefghijklmn"), " ".join("abcdefghijklmnop")  # start and end beside them
    with pytest.raises(Mistake, match=r"at most 16 tokens(.|\n)*1 of 2 texts .* 18 tokens in 'a b c d "):
        encoder.encode([fitting, long])
    found = encoder.encode([fitting, long], cut_long=True)
    torch.testing.assert_close(found[1], found[0])  # its beginning, and the end token as ever
    with pytest.raises(Mistake, match=r"no tokens for a part of 'a \?'(.|\n)*endoftext"):
        encoder.encode(["ab", "a ?"])


def test_what_is_no_whole_text_encoder_is_named(encoder: TextEncoder, tmp_path: Path) -> None:
    for name in ("broken", "other"):
        encoder.tokenizer.save_pretrained(tmp_path / name)
    kept = {name: value for name, value in encoder.model.state_dict().items() if "final_layer_norm" not in name}
    encoder.model.save_pretrained(tmp_path / "broken", state_dict=kept)
    config = CLIPTextConfig(**{**encoder.model.config.to_dict(), "vocab_size": len(encoder.tokenizer) + 1})
    CLIPTextModel(config).save_pretrained(tmp_path / "other")
    for name, match in {
        "nobody/nothing": "taken for a name on the hub",
        str(tmp_path): r"\(a folder\)",
        str(tmp_path / "broken"): r"lacks 2 weights, as .*final_layer_norm.bias",
        str(tmp_path / "other"): "tokenizer is not its text model's: .* tokens in the tokenizer, .* in the model",
    }.items():
        with pytest.raises(DataError, match=f"No CLIP text model and tokenizer could be loaded(.|\n)*{match}"):
            load_text_encoder(name)
