"""Damaged and hostile files for ``load_weights`` and ``from_pretrained``: each is loaded whole, or refused by us.

Every case is one integer, from which its files follow: ``judge(case(family, good_files(folder), random.Random(1)))``.
"""

from __future__ import annotations

import io
import json
import random
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from tiny_artefacts import TinyDiT, load_teacher, make_teacher, refused, rewrite

import selftrans_reg as st

FAMILIES = ("teacher", "forged", "whole", "shards", "torch")
INDEX = "a.safetensors.index.json"
_ODD: list[Any] = [
    *(-1, 0, 1, 3, 2**31, 2**53, 2**64, 10**400, 0.5, -0.0, 1e300, float("inf"), float("nan"), None, True, False),
    *("", "4", "y", "x", "blocks.0", "final_layer", "a" * 10_000, "\ud800", "\0", "a\nb", "../a", "F8_E4M3", "BF16"),
    *("null_condition.1", "null_condition.0", "f" * 64, "\u202e", "edm", "2.safetensors", [], {}, [[]], [0], ["y"]),
    *({"unsaved": "f"}, {"unsaved": 1}, ["a"] * 5000, {"start": 1, "stop": None, "step": None}, [2**40] * 3),
    *({"path": ["y"], "value": 5}, {"path": ["y"], "tensor": "pos_embed"}, {"x": "x", "t": "t", "shared": []}),
]  # fmt: skip


def good_files(folder: Path) -> tuple[Path, dict[str, bytes]]:
    """What the cases damage, by name: a teacher, weights in one file, in shards, and of torch.save."""
    make_teacher().save_pretrained(folder / "teacher", source="a run", latent_shape=(2, 4, 4))
    state, stream = TinyDiT(seed=3).state_dict(), io.BytesIO()
    torch.save({"ema": state, "model": state, "steps": 3}, stream)
    halves = {"1.safetensors": dict(list(state.items())[:6]), "2.safetensors": dict(list(state.items())[6:])}
    index = {"weight_map": {key: name for name, half in halves.items() for key in half}}
    files = {path.name: path.read_bytes() for path in (folder / "teacher").iterdir()}
    files |= {"a.safetensors": save(state), INDEX: json.dumps(index).encode(), "a.pt": stream.getvalue()}
    return folder, files | {name: save(half) for name, half in halves.items()}


def odd_json(value: Any, rng: random.Random) -> Any:
    """``value`` with one entry somewhere inside replaced, removed or put elsewhere."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key, kind = rng.choice(list(value)), rng.randrange(8)
        if kind == 0:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: value[rng.choice(list(value))] if kind == 1 else odd_json(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [*value[:at], odd_json(value[at], rng), *value[at + rng.choice([0, 1, 1]) :]]
    return rng.choice(_ODD)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """``data`` with a range removed, inserted or overwritten, or a bit flipped; often at an end, where structure is."""
    out = bytearray(data)
    at = rng.choice([rng.randrange(len(out)), rng.randrange(64), len(out) - 1 - rng.randrange(64)])
    new = rng.choice([b"", b"\0" * 9, b"\xff" * 9, rng.randbytes(9), b"[" * 100_000, b" " * (3 << 20)])
    out[at : at + rng.choice([0, 9, len(out)])] = (
        new if rng.random() < 0.7 else bytes([out[at] ^ 1 << rng.randrange(8)])
    )
    return bytes(out)


def odd(name: str, data: bytes, rng: random.Random) -> bytes:
    """A file with damaged bytes, or with odd entries in its JSON or its header."""
    if rng.random() < 0.4 or name == "a.pt":
        return damaged(data, rng)
    if name.endswith(".json"):
        return json.dumps(odd_json(json.loads(data), rng)).encode()
    length = struct.unpack("<Q", data[:8])[0]
    text = json.dumps(odd_json(json.loads(data[8 : 8 + length]), rng)).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def case(family: str, good: tuple[Path, dict[str, bytes]], rng: random.Random) -> Path:
    folder, files = good
    if family in ("teacher", "forged"):
        names, path = ["config.json", "model.safetensors"], folder / "teacher"
    else:
        names = {"whole": ["a.safetensors"], "shards": ["1.safetensors", "2.safetensors", INDEX], "torch": ["a.pt"]}[
            family
        ]
        path = folder / names[-1]
    chosen = rng.choice(names)
    for name in names:
        home = path if path.is_dir() else folder
        (home / name).write_bytes(odd(name, files[name], rng) if name == chosen and family != "forged" else files[name])
    config = odd_json(json.loads(files["config.json"]), rng)
    if family == "forged" and isinstance(config, dict):  # under a hash that fits
        with suppress(ValueError):  # of what JSON or safetensors cannot hold
            rewrite(path, **config)
    return path


def peak() -> int:
    """The process's highest resident memory since ``5`` was written to ``clear_refs``, in KiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if "VmHWM" in line)


class Loaded(Exception):  # noqa: N818
    pass


def judge(path: Path) -> bool:
    """Whether it was refused; AssertionError if it was neither that nor loaded, or changed the model all the same."""
    Path("/proc/self/clear_refs").write_text("5")
    model, base = TinyDiT(), peak()

    def load(model: TinyDiT) -> None:
        load_teacher(path, model) if path.is_dir() else st.load_weights(model, path)
        raise Loaded

    try:
        refused(load, model)
    except Loaded:
        assert all(value.isfinite().all() for value in model.parameters())
        return False
    assert path.suffix == ".pt" or peak() - base <= 80 << 10  # a .pt may exhaust the memory, as the docs say
    return True
