"""CLIP text features by transformers' own classes, on tiny models whose vocabulary is made here; captioned shapes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from common.captioned_shapes import CAPTIONS, COLOURS, SHAPES, captioned_shapes, save_text_encoder
from common.text_features import TextEncoder, load_text_encoder
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from selftrans_reg.errors import CheckpointError, SettingError, ShapeError

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


def plain_features(encoder: TextEncoder, ids: list[int]) -> Tensor:
    """The last hidden state of one text, from the weights alone: pre-norm blocks, causal attention, quick GELU."""
    weights = {name.removeprefix("text_model."): value for name, value in encoder.model.state_dict().items()}

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name: str, value: Tensor) -> Tensor:
        centred = value - value.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    x = weights["embeddings.token_embedding.weight"][ids] + weights["embeddings.position_embedding.weight"]
    for i in range(2):
        block = f"encoder.layers.{i}"
        normed = norm(f"{block}.layer_norm1", x)
        q, k, v = (linear(f"{block}.self_attn.{which}_proj", normed).split(WIDTH // 2, dim=1) for which in "qkv")
        heads = []
        for qh, kh, vh in zip(q, k, v, strict=True):
            rows = [
                torch.softmax(qh[j] @ kh[: j + 1].T / (WIDTH // 2) ** 0.5, dim=0) @ vh[: j + 1] for j in range(LENGTH)
            ]
            heads.append(torch.stack(rows))
        x = x + linear(f"{block}.self_attn.out_proj", torch.cat(heads, dim=1))
        hidden = linear(f"{block}.mlp.fc1", norm(f"{block}.layer_norm2", x))
        x = x + linear(f"{block}.mlp.fc2", hidden * torch.sigmoid(1.702 * hidden))
    return norm("final_layer_norm", x)


def test_features_equal_the_plain_formula_on_padded_tokens(encoder: TextEncoder) -> None:
    assert (encoder.length, encoder.width) == (LENGTH, WIDTH)
    found = encoder.encode(["", "ab c", "Ba"])
    token = VOCABULARY.index
    padded = [
        [0, 1, 1, 1, 1, 1, 1],
        [0, token("ab</w>"), token("c</w>"), 1, 1, 1, 1],
        [0, token("b"), token("a</w>"), 1, 1, 1, 1],  # lower case, as CLIP reads everything
    ]
    expected = torch.stack([plain_features(encoder, ids) for ids in padded])
    assert found.features.shape == (3, LENGTH, WIDTH)
    torch.testing.assert_close(found.features, expected, rtol=1e-4, atol=1e-5)
    assert found.cut == []
    assert not found.features.requires_grad


def test_features_do_not_depend_on_the_other_texts(encoder: TextEncoder) -> None:
    texts = [a + b for a in LETTERS for b in "abcd"]  # more than one batch
    together = encoder.encode(texts).features
    for i in (0, 63, 64, len(texts) - 1):
        torch.testing.assert_close(together[i], encoder.encode([texts[i]]).features[0], rtol=1e-4, atol=1e-5)


def test_a_text_that_is_too_long_is_named_or_counted(encoder: TextEncoder) -> None:
    fitting, long = "a b c d e", "a b c d e f g"  # start and end beside them: 7 and 9 tokens
    encoder.encode([fitting])
    for match in ["at most 7 tokens", "1 of 2 texts", "9 tokens in 'a b c d e f g'", "Shorten"]:
        with pytest.raises(SettingError, match=match):
            encoder.encode([fitting, long])
    found = encoder.encode([fitting, long], cut_long=True)
    assert found.cut == [long]
    torch.testing.assert_close(found.features[1], found.features[0])  # its beginning, and the end token as ever


def test_what_the_tokenizer_cannot_spell_is_named(encoder: TextEncoder) -> None:
    for match in ["no tokens for a part of 'a 7'", "endoftext"]:
        with pytest.raises(SettingError, match=match):
            encoder.encode(["ab", "a 7"])


def test_the_text_part_of_a_whole_clip_model_is_what_is_loaded(folder: Path, tmp_path: Path) -> None:
    vision = {
        "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 8,
        "patch_size": 4,
    }  # fmt: skip
    with torch.random.fork_rng():
        config = CLIPConfig(text_config=tiny_config().to_dict(), vision_config=vision, projection_dim=4)
        whole = CLIPModel(config)
    whole.save_pretrained(tmp_path)
    CLIPTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    encoder = load_text_encoder(str(tmp_path))
    state = whole.text_model.state_dict()
    loaded = {name.removeprefix("text_model."): value for name, value in encoder.model.state_dict().items()}
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_another_width_is_named_with_the_encoder(encoder: TextEncoder, folder: Path) -> None:
    encoder.check_width(WIDTH, "the run")
    for match in [f"text features of {folder} have width 12", "runs/coco needs 768", "openai/clip-vit-large-patch14"]:
        with pytest.raises(ShapeError, match=match):
            encoder.check_width(768, "runs/coco")


def test_what_is_no_text_encoder_is_named(folder: Path, tmp_path: Path) -> None:
    for name, matches in {
        "nobody/nothing": ["No CLIP text model", "taken for a name on the hub"],
        str(tmp_path): ["No CLIP text model", "a folder"],
    }.items():
        for match in matches:
            with pytest.raises(CheckpointError, match=match):
                load_text_encoder(name)
    no_tokenizer = tmp_path / "model-alone"
    CLIPTextModel.from_pretrained(folder).save_pretrained(no_tokenizer)
    with pytest.raises(CheckpointError, match=r"No CLIP text model|tokenizer that is not its text"):
        load_text_encoder(str(no_tokenizer))


def test_a_model_without_all_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    model = CLIPTextModel.from_pretrained(folder)
    kept = {name: value for name, value in model.state_dict().items() if "final_layer_norm" not in name}
    model.save_pretrained(broken, state_dict=kept)
    for match in ["no whole CLIP text model", "final_layer_norm.bias", "2 weights in all"]:
        with pytest.raises(CheckpointError, match=match):
            load_text_encoder(str(broken))


class TestCaptionedShapes:
    def test_the_seed_decides(self) -> None:
        first, again, other = captioned_shapes(20), captioned_shapes(20), captioned_shapes(20, seed=1)
        assert torch.equal(first.images, again.images)
        assert first.captions == again.captions != other.captions
        assert first.images.shape == (20, 3, 32, 32)
        assert first.images.abs().max() <= 1

    def test_the_captions_say_what_is_drawn(self) -> None:
        data = captioned_shapes(200)
        palette = {name: torch.tensor(rgb) * 2 - 1 for name, rgb in COLOURS.items()}
        for image, (sentence, other) in zip(data.images, data.captions, strict=True):
            _, colour, _, _, _, ground, _ = sentence.split()
            torch.testing.assert_close(image[:, 0, 0], palette[ground])  # no shape reaches a corner
            inside = (image - palette[colour][:, None, None]).abs().amax(0) < 1e-4
            assert inside.sum() > 15
            assert sorted(set(sentence.split()) & {*COLOURS, *SHAPES}) == sorted(
                set(other.split()) & {*COLOURS, *SHAPES}
            )

    @pytest.mark.parametrize(
        ("shape", "area"),
        [  # in squared radii
            ("circle", torch.pi),
            ("ring", torch.pi * (1 - 0.5**2)),
            ("square", (2 * 0.85) ** 2),
            ("cross", 4 * 0.6 - 0.6**2),
            ("triangle", 3 * 3**0.5 / 4),
        ],
    )
    def test_shapes_have_their_area(self, shape: str, area: float) -> None:
        data = captioned_shapes(200, size=128)
        radii = []
        for image, (sentence, _) in zip(data.images, data.captions, strict=True):
            if shape in sentence:
                step = (image - image[:, :1, :1]).abs().sum(0)
                radii.append((step.sum() / step.max() / area).sqrt().item() / 128)
        assert len(radii) > 20
        assert min(radii) > 0.275  # the radii that are drawn: 0.28 to 0.36
        assert max(radii) < 0.365

    def test_the_text_encoder_knows_each_word_as_one_token_and_is_the_same_each_time(self, tmp_path: Path) -> None:
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
        features = first.encode(["", *sentences]).features
        assert torch.equal(features, second.encode(["", *sentences]).features)
        flat = features.flatten(1)
        assert torch.cdist(flat, flat).fill_diagonal_(torch.inf).min() > 1  # no two sentences look alike
        assert {entry.name for entry in tmp_path.iterdir()} == {"a", "b"}
