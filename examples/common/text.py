"""Texts as conditions: CLIP's features by transformers' own classes.

As U-ViT and latent diffusion make the features: the prompt padded to the model's length, no attention mask, the last
hidden state. Source followed: U-ViT's COCO script, https://github.com/baofff/U-ViT. transformers is imported when a
model is loaded.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.data_files import DataError
from common.options import Mistake

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

# What the published features come from: 77 tokens of width 768.
CLIP_VIT_L14 = "openai/clip-vit-large-patch14"

_BATCH_SIZE = 64
_SAME = 0.05  # half precision and other hardware round otherwise; CLIP's features are about 1, and some of them 30


class TextEncoder:
    """A frozen CLIP text model with its tokenizer.

    Attributes:
        name: The folder or hub name that it came from.
        length: Tokens L of every text, start and end included; shorter texts are padded.
        width: Width D of the features.
    """

    def __init__(self, name: str, tokenizer: "CLIPTokenizer", model: "CLIPTextModel") -> None:
        self.name, self.tokenizer = name, tokenizer
        self.model = model.eval().requires_grad_(False)
        self.length: int = model.config.max_position_embeddings
        self.width: int = model.config.hidden_size

    @torch.no_grad()
    def encode(self, texts: Sequence[str], *, cut_long: bool = False) -> Tensor:
        """The last hidden state of each text, (N, L, D), float32 on the CPU; the empty one is the null condition.

        With ``cut_long``, of a text that is too long only the beginning is encoded, as CLIP's users do.
        """
        texts = list(texts)
        tokens = self.tokenizer(texts, truncation=False, verbose=False)["input_ids"]  # start to end, unpadded
        long = []
        for text, ids in zip(texts, tokens, strict=True):
            # CLIP's byte-level vocabulary spells everything: what is unknown becomes its end token in the middle.
            if self.tokenizer.unk_token_id in ids[1:-1]:
                raise Mistake(
                    f"The tokenizer of {self.name} has no tokens for a part of {text!r}.\n"
                    f"Found: {self.tokenizer.convert_ids_to_tokens(ids)}. Use words that it knows."
                )
            long += [(text, len(ids))] if len(ids) > self.length else []
        if long and not cut_long:
            raise Mistake(
                f"{self.name} reads at most {self.length} tokens, its start and end among them.\n"
                f"Found: {len(long)} of {len(texts)} texts longer than that; {long[0][1]} tokens in {long[0][0]!r}.\n"
                "Shorten them: what is behind the limit would not be seen."
            )
        fixed = {"padding": "max_length", "truncation": True, "max_length": self.length}  # the end token stays
        padded = self.tokenizer(texts, return_tensors="pt", **fixed)["input_ids"]
        chunks = [self.model(ids.to(self.model.device)).last_hidden_state for ids in padded.split(_BATCH_SIZE)]
        return torch.cat(chunks).float().cpu()


def load_text_encoder(name: str, *, device: str = "cpu") -> TextEncoder:
    """The CLIP text model and its tokenizer, from a folder that has both or from the hub."""
    from transformers import CLIPTextModel, CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(name)
        model, found = CLIPTextModel.from_pretrained(name, output_loading_info=True)
        # transformers goes on with what it finds: random weights for those that are missing, an empty tokenizer.
        if missing := sorted(found["missing_keys"]):
            raise ValueError(f"its text model lacks {len(missing)} weights, as {', '.join(missing[:3])}")  # noqa: TRY301
        if len(tokenizer) != model.config.vocab_size:
            sizes = f"{len(tokenizer):,} tokens in the tokenizer, {model.config.vocab_size:,} in the model"
            raise ValueError(f"its tokenizer is not its text model's: {sizes}")  # noqa: TRY301
    except (OSError, ValueError) as error:
        where = "a folder" if Path(name).exists() else "no folder here, so taken for a name on the hub"
        raise DataError(
            f"No CLIP text model and tokenizer could be loaded from {name!r} ({where}).\nFound: {error}\n"
            f"Name a folder with both, as save_pretrained writes them, or a hub name such as {CLIP_VIT_L14!r}."
        ) from error
    return TextEncoder(name, tokenizer, model.to(device))


def same_features(one: Tensor, other: Tensor) -> bool:
    """Whether two texts' features are those of one text by one encoder, up to rounding."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=_SAME, atol=_SAME)
