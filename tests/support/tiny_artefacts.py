"""A tiny model, its teacher and criterion, and what the tests of saved weights and teachers share."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import selftrans_reg as st

FILES = ["README.md", "config.json", "model.safetensors"]


class TinyDiT(nn.Module):
    """``(x, t, y, text)`` -> (N, C, H, W), C = 2, with blocks of one Linear."""

    def __init__(self, width: int = 4, depth: int = 3, seed: int = 0) -> None:
        super().__init__()
        self.x_embedder = nn.Conv2d(2, width, 2, 2)
        self.y_embedder = nn.Embedding(6, width)  # the last row is the null label
        self.text_embedder = nn.Linear(3, width)
        self.register_buffer("pos_embed", torch.zeros(1, 4, width))
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth))
        self.final_layer = nn.Linear(width, 8)
        generator = torch.Generator().manual_seed(seed)
        for tensor in self.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))

    def forward(self, x: Tensor, t: Tensor, y: Tensor, text: Tensor) -> Tensor:
        tokens = self.x_embedder(x).flatten(2).transpose(1, 2) + self.pos_embed  # (N, 4, D)
        tokens = tokens + (self.y_embedder(y) + self.text_embedder(text) + t[:, None])[:, None]
        for block in self.blocks:
            tokens = tokens + block(tokens)
        return self.final_layer(tokens).transpose(1, 2).reshape(len(x), 2, 4, 4)


def call(seed: int = 0, n: int = 4) -> dict[str, Tensor]:
    """The arguments of a call of :class:`TinyDiT`; t is inside the window."""
    g = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(n, 2, 4, 4, generator=g),
        "t": 0.4 + 0.3 * torch.rand(n, generator=g),
        "y": torch.arange(n) % 5,
        "text": torch.randn(n, 3, generator=g),
    }


def checkpointed(model: nn.Module) -> nn.Module:
    model.blocks[1] = checkpoint_wrapper(model.blocks[1])
    return model


def make_teacher(seed: int = 1, model: nn.Module | None = None, **settings: Any) -> st.CFGFeatureTeacher:
    defaults: dict[str, Any] = {
        "layer": "blocks.1",
        "guidance_scale": 3.0,
        "null": {"y": 5, "text": torch.tensor([0.5, -1.0, 0.1])},
        "time": "repa",
        "hidden_size": 4,
        "example": call(),
    }
    return st.build_teacher(TinyDiT(seed=seed) if model is None else model, None, **(defaults | settings))


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def load_teacher(name: str | Path, model: Any = TinyDiT, **given: Any) -> st.CFGFeatureTeacher:
    return st.CFGFeatureTeacher.from_pretrained(name, model, **given)


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


def rewrite(folder: Path, tensors: dict[str, Tensor] | None = None, **entries: Any) -> Path:
    """Change entries and weights of a saved teacher as if it had been saved so, with a hash that fits."""
    config = config_of(folder) | entries
    tensors = load_file(folder / "model.safetensors") if tensors is None else tensors
    digest = hashlib.sha256(json.dumps({k: v for k, v in config.items() if k != "sha256"}, sort_keys=True).encode())
    for key, value in sorted(tensors.items()):
        digest.update(f"\n{key} {value.dtype} {tuple(value.shape)}\n".encode() + value.numpy().tobytes())
    text = json.dumps(config | {"sha256": digest.hexdigest()} | entries)
    save_file(tensors, folder / "model.safetensors", metadata={"selftrans_reg": text})
    (folder / "config.json").write_text(text)
    return folder


def refused(act: Callable[..., object], *args: Any, says: tuple[str, ...] | str = (), **kwargs: Any) -> str:
    """The message of the CheckpointError of ``act``, which has to say so much and to leave the model as it was."""
    model = next((value for value in args if isinstance(value, nn.Module)), nn.Module())
    before, trained = copy.deepcopy(model.state_dict()), [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(st.CheckpointError) as error:
        act(*args, **kwargs)
    message, after = str(error.value), model.state_dict()
    for part in (says,) if isinstance(says, str) else says:
        assert part in message, f"{part!r} is not in:\n{message}"
    assert len(message) < 8000
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert model.training
    return message
