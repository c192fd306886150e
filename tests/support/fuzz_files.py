"""Throw damaged and hostile files at ``load_weights`` and ``from_pretrained``: each is loaded whole, or refused by us.

    python tests/support/fuzz_files.py --cases 10000

Every case is one integer, from which its files follow. They run in child processes, a thousand in each, so that a crash
or a hang is caught too. The suite runs the first few of each family.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import random
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_artefacts import TinyDiT, make_teacher, rewrite
from torch import Tensor, nn

import selftrans_reg as st

MIB = 1 << 20
SECONDS = 30  # one case, on a busy core; the usual one takes milliseconds


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


class Corpus:
    """Good files that the cases damage, under ``folder``: a teacher, weights in one file and in shards, a ``.pt``."""

    def __init__(self, folder: Path) -> None:
        self.case = folder / "case"
        self.case.mkdir()
        make_teacher().save_pretrained(folder / "teacher", source="a run", latent_shape=(2, 4, 4))
        self.teacher = {path.name: path.read_bytes() for path in (folder / "teacher").iterdir()}
        state = TinyDiT(seed=3).state_dict()
        halves = [dict(list(state.items())[:6]), dict(list(state.items())[6:])]
        for i, half in enumerate((state, *halves)):
            save_file(half, folder / f"{i}.safetensors")
        self.whole, *shards = ((folder / f"{i}.safetensors").read_bytes() for i in range(3))
        index = {"weight_map": {key: f"{i}.safetensors" for i, half in enumerate(halves, 1) for key in half}}
        self.shards = {"1.safetensors": shards[0], "2.safetensors": shards[1]}
        self.shards["a.safetensors.index.json"] = json.dumps(index).encode()
        stream = io.BytesIO()
        torch.save({"ema": state, "model": state, "args": argparse.Namespace(lr=1e-4), "steps": 3}, stream)
        self.torch = stream.getvalue()

    def write(self, files: dict[str, bytes]) -> Path:
        for path in self.case.iterdir():
            path.unlink()
        for name, data in files.items():
            (self.case / name).write_bytes(data)
        return self.case


_ODD: list[Any] = [
    *(-1, 0, 1, 3, 2**31, 2**53, 2**63, 2**64, 10**30, 10**400, 0.5, -0.0, 1e300, float("inf"), float("nan")),
    *("", "4", "y", "x", "blocks.0", "final_layer", "a" * 10_000, "\ud800", "\0", "a\nb", "../a", "F8_E4M3", "BF16"),
    *("null_condition.1", "null_condition.0", "f" * 64, "\u202e", "<!--", "edm", "2.safetensors", None, True, False),
    *([], {}, [[]], [0], ["y"], {"unsaved": "f"}, {"unsaved": 1}, ["a"] * 5000),
    *({"start": 1, "stop": None, "step": None}, [1] * 3000, [2**40] * 3, {"path": ["y"], "value": 5}, [0, 2**62]),
    {"path": ["y"], "tensor": "pos_embed"},
    *({"x": "x", "t": "t", "shared": [], "fixed": {"y": 1}}, {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}),
]  # fmt: skip


def odd_json(value: Any, rng: random.Random) -> Any:
    """``value`` with one entry somewhere inside replaced, removed, doubled or moved."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        kind = rng.randrange(10)
        if kind == 0:
            return {k: v for k, v in value.items() if k != key}
        if kind == 1:
            return {**value, rng.choice(["", "a", "__metadata__", "\ud800", "a" * 5000, "path", "tensor"]): value[key]}
        if kind == 2:
            return {**value, key: value[rng.choice(list(value))]}
        return {**value, key: odd_json(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return (
            value * rng.choice([0, 2, 3])
            if rng.random() < 0.2
            else [*value[:at], odd_json(value[at], rng), *value[at + 1 :]]
        )
    return copy.deepcopy(rng.choice(_ODD))


def odd_text(data: bytes, rng: random.Random) -> bytes:
    text = json.dumps(odd_json(json.loads(data), rng)).encode()
    if rng.random() < 0.1:
        text = rng.choice([b"[" * 100_000, b"9" * 100_000, b"\xff\xfe", b"", b" " * (3 * MIB), text + text])
    return damaged(text, rng) if rng.random() < 0.2 else text


def odd_weights(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.4:
        return damaged(data, rng)
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    if rng.random() < 0.3:
        for _ in range(rng.randint(1, 4)):  # other values
            at = rng.randrange(len(body))
            body[at : at + 4] = rng.choice([bytes(4), b"\xff" * 4, rng.randbytes(4)])[: len(body) - at]
    else:
        header = odd_json(header, rng)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(body)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """``data`` with one to three bytes, ranges or bits changed, as disks, networks and adversaries do."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at, end = sorted(rng.randrange(len(out) + 1) for _ in range(2))
        if rng.random() < 0.5:  # the ends of a file carry its structure
            at = rng.choice([rng.randrange(min(len(out), 64) + 1), max(0, len(out) - rng.randrange(200))])
            end = min(len(out), at + rng.randrange(16))
        kind = rng.randrange(6)
        if kind < 2:
            del out[at : end if kind else None]
        elif kind == 2:
            out[at:at] = rng.randbytes(rng.randrange(1, 64))
        elif kind == 3:
            out[at:end] = rng.choice([b"\0", b"\xff"]) * (end - at)
        else:
            for _ in range(rng.randint(1, 8) if out else 0):
                out[rng.randrange(len(out)) if kind == 4 else min(at, len(out) - 1)] ^= 1 << rng.randrange(8)
    return bytes(out)


def config_as_saved(corpus: Corpus, rng: random.Random) -> Path:
    """Odd settings under a hash that fits, as whoever forges an artefact writes them."""
    folder = corpus.write(corpus.teacher)
    config = odd_json(json.loads(corpus.teacher["config.json"]), rng)
    try:
        return rewrite(folder, **config) if isinstance(config, dict) else folder
    except (ValueError, UnicodeEncodeError):  # what JSON or safetensors cannot hold
        return folder


def sharded(corpus: Corpus, rng: random.Random) -> Path:
    name = rng.choice(list(corpus.shards))
    change = odd_text if name.endswith("json") else odd_weights
    return corpus.write(corpus.shards | {name: change(corpus.shards[name], rng)}) / "a.safetensors.index.json"


def in_teacher(name: str, change: Callable[[bytes, random.Random], bytes]) -> Callable[[Corpus, random.Random], Path]:
    return lambda corpus, rng: corpus.write(corpus.teacher | {name: change(corpus.teacher[name], rng)})


FAMILIES: dict[str, Callable[[Corpus, random.Random], Path]] = {
    "config_on_disk": in_teacher("config.json", odd_text),
    "config_as_saved": config_as_saved,
    "weights_of_teacher": in_teacher("model.safetensors", odd_weights),
    "one_file": lambda corpus, rng: corpus.write({"a.safetensors": odd_weights(corpus.whole, rng)}) / "a.safetensors",
    "sharded": sharded,
    "torch_file": lambda corpus, rng: corpus.write({"a.pt": damaged(corpus.torch, rng)}) / "a.pt",
}


def peak_kib() -> int:
    """The process's highest resident memory since ``reset_peak``, in KiB (Linux)."""
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)


def reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return peak_kib()


def judge(path: Path) -> str | None:
    """The refusal's message, None if it was loaded; AssertionError if neither is so, or something was left changed."""
    model = TinyDiT()
    before, base, start = snapshot(model), reset_peak(), time.monotonic()
    files = [path] if path.suffix == ".pt" else list((path if path.is_dir() else path.parent).iterdir())
    size, message = sum(file.stat().st_size for file in files), None
    try:
        if path.is_dir():
            st.CFGFeatureTeacher.from_pretrained(path, model)
        else:
            st.load_weights(model, path)
    except st.CheckpointError as error:
        message = str(error)
    except Exception as error:
        raise AssertionError(f"{type(error).__name__} instead of CheckpointError: {error}") from error
    seconds, grown = time.monotonic() - start, (peak_kib() - base) * 1024
    after = snapshot(model)
    if message is None:
        kinds = {key for key, value in model.named_parameters()}
        assert all(v.isfinite().all() if k in kinds else not v.isnan().any() for k, v in after.items()), "not finite"
    else:
        assert after.keys() == before.keys(), f"changed: {message}"
        assert all(torch.equal(after[key], before[key]) for key in after), f"half loaded: {message}"
        assert all(p.requires_grad for p in model.parameters()), f"frozen: {message}"
        assert len(message) < 8_000, f"a message of {len(message)} characters"
    assert seconds < SECONDS, f"{seconds:.0f} s"
    if path.suffix != ".pt":  # which may exhaust the memory, as the docs say
        assert grown <= 3 * size + 64 * MIB, f"{grown / MIB:.0f} MiB more for {size / MIB:.2f} MiB"
    return message


def run(first: int, count: int) -> Counter[str]:
    """How many of the cases were loaded and refused, by family."""
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        corpus = Corpus(Path(folder))
        for case in range(first, first + count):
            name = list(FAMILIES)[case % len(FAMILIES)]
            try:
                counts[f"{name} {'refused' if judge(FAMILIES[name](corpus, random.Random(case))) else 'loaded'}"] += 1
            except BaseException as error:
                error.args = (f"case {case}", *error.args)
                raise
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--child", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child:
        print(json.dumps(run(options.first, options.cases)))
        return
    counts, failed, end = Counter[str](), 0, options.first + options.cases
    for first in range(options.first, end, 1000):
        command = [sys.executable, __file__, "--child", "--first", str(first), "--cases", str(min(1000, end - first))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
        if done.returncode:
            failed += 1
            print(f"FAILED in the cases from {first}, exit status {done.returncode}\n{done.stderr[-3000:]}", flush=True)
        else:
            counts.update(json.loads(done.stdout))
    print(f"{sum(counts.values())} cases, {failed} failures")
    for name, count in sorted(counts.items()):
        print(f"  {name}: {count}")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
