"""CLIP's text features by transformers' own classes: the condition of the text-to-image runs.

As U-ViT and latent diffusion make them: the prompt padded to the model's length, no attention mask, the last hidden
state. Source followed: U-ViT's COCO script, https://github.com/baofff/U-ViT.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from selftrans_reg.errors import CheckpointError, SettingError, ShapeError

# What the published features come from: 77 tokens of width 768.
CLIP_VIT_L14 = "openai/clip-vit-large-patch14"

_BATCH_SIZE = 64


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

    def __init__(self, name: str, tokenizer: CLIPTokenizer, model: CLIPTextModel) -> None:
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

        Raises:
            SettingError: If a text is too long and ``cut_long`` is not set, or the tokenizer cannot spell it.
        """
        # Start to end, unpadded; what is too long is dealt with below, and needs no warning.
        tokens = self.tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
        for text, ids in zip(texts, tokens, strict=True):
            # CLIP's byte-level vocabulary spells everything: what is unknown becomes its end token in the middle.
            if self.tokenizer.unk_token_id in ids[1:-1]:
                raise SettingError(
                    f"The tokenizer of {self.name} has no tokens for a part of {text!r}.\n"
                    f"Found: {self.tokenizer.convert_ids_to_tokens(ids)}. Use words that it knows."
                )
        long = [(text, len(ids)) for text, ids in zip(texts, tokens, strict=True) if len(ids) > self.length]
        if long and not cut_long:
            raise SettingError(
                f"{self.name} reads at most {self.length} tokens, its start and end among them.\n"
                f"Found: {len(long)} of {len(texts)} texts longer than that; {long[0][1]} tokens in {long[0][0]!r}.\n"
                "Shorten them: what is behind the limit would not be seen."
            )
        padded = torch.full((len(tokens), self.length), self.tokenizer.pad_token_id)
        for row, ids in zip(padded, tokens, strict=True):
            kept = ids if len(ids) <= self.length else [*ids[: self.length - 1], ids[-1]]  # the end token stays
            row[: len(kept)] = torch.tensor(kept)
        chunks = [self.model(ids.to(self.model.device)).last_hidden_state for ids in padded.split(_BATCH_SIZE)]
        return TextFeatures(torch.cat(chunks).float().cpu(), [text for text, _ in long])

    def check_width(self, expected: int, of: str) -> None:
        """Raise ``ShapeError`` unless the features have the width that something else needs."""
        if self.width != expected:
            raise ShapeError(
                f"The text features of {self.name} have width {self.width}; {of} needs {expected}.\n"
                f"Use the text encoder that its captions were encoded with (published: {CLIP_VIT_L14}, width 768)."
            )


def load_text_encoder(name: str, *, device: str = "cpu") -> TextEncoder:
    """The CLIP text model and its tokenizer, from a folder or from the hub.

    Args:
        name: A folder with both, or a hub name such as ``"openai/clip-vit-large-patch14"``.
        device: Where the model runs.

    Raises:
        CheckpointError: If there is no such text model, or it cannot be read.
    """
    try:
        tokenizer = CLIPTokenizer.from_pretrained(name)
        model, found = CLIPTextModel.from_pretrained(name, output_loading_info=True)
    except (OSError, ValueError) as error:
        where = "a folder" if Path(name).exists() else "no folder here, so taken for a name on the hub"
        raise CheckpointError(
            f"No CLIP text model and tokenizer could be loaded from {name!r} ({where}).\n"
            f"Found: {error}\n"
            f"Name a folder with both, as save_pretrained writes them, or a hub name such as {CLIP_VIT_L14!r}."
        ) from error
    # transformers goes on with what it finds: random weights for those that are missing, an empty tokenizer.
    if found["missing_keys"]:
        raise CheckpointError(
            f"{name!r} holds no whole CLIP text model.\n"
            f"Missing: {', '.join(sorted(found['missing_keys'])[:3])}, {len(found['missing_keys'])} weights in all."
        )
    if len(tokenizer) != model.config.vocab_size:
        raise CheckpointError(
            f"{name!r} holds a tokenizer that is not its text model's.\n"
            f"Found: {len(tokenizer):,} tokens in the tokenizer, {model.config.vocab_size:,} in the model.\n"
            "Save the model's own tokenizer beside it."
        )
    return TextEncoder(name, tokenizer, model.to(device))
