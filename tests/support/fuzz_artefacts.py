"""Throw broken and hostile artefacts at ``from_pretrained``: each is loaded, or refused with CheckpointError.

    python tests/support/fuzz_artefacts.py --cases 10000

Every case is one integer, from which its folder follows. The script runs them in child processes, a thousand in each,
so that a crash or a hang is caught too, and names the case. The suite runs the first few hundred.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import random
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from fuzz_checkpoints import MIB, damaged, peak_kib, reset_peak, snapshot
from tiny_artefacts import TinyDiT, make_teacher

import selftrans_reg as st
from selftrans_reg.errors import CheckpointError

SECONDS = 30  # one case, on a busy core; the usual one takes milliseconds
DAMAGED = ("config.json", "model.safetensors")


class Corpus:
    """A good teacher that the cases damage, under ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.teacher = make_teacher()
        self.teacher.save_pretrained(folder / "teacher", source="a run", latent_shape=(2, 4, 4))
        self.files = {name: (folder / "teacher" / name).read_bytes() for name in DAMAGED}

    def write(self, files: dict[str, bytes]) -> Path:
        case = self.folder / "case"
        case.mkdir(exist_ok=True)
        for name, data in files.items():
            (case / name).write_bytes(data)
        return case


_ODD: list[Any] = [
    *(-1, 0, 1, 3, 2**31, 2**53, 2**63, 2**64, 10**30, 10**400, 0.5, -0.0, 1e300, float("inf"), float("nan")),
    *("", "4", "y", "x", "blocks.0", "blocks.2", "final_layer", "a" * 10_000, "\ud800", "\0", "a\nb", "../a", "stage2"),
    *("null_condition.1", "null_condition.0", "f" * 64, "\u202e", "cosine", "edm", "first", None, True, False),
    *([], {}, [[]], [0], ["y"], {"unsaved": "f"}, {"unsaved": 1}, {"slice": [0, 0, 0]}, {"slice": [None, None, -1]}),
    *({"slice": [1, None, None]}, [0.7, 0.4], [1e18, 1e18], [2**40] * 3, {"path": ["y"], "value": 5}, ["a"] * 5000),
    *({"x": "x", "t": "t", "shared": [], "fixed": {"y": 1}}, {"class": "A", "fingerprint": "0" * 64}),
]  # fmt: skip


def odd_json(value: Any, rng: random.Random) -> Any:
    """``value`` with one entry somewhere inside replaced, removed, doubled or moved."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        kind = rng.randrange(10)
        if kind == 0:
            return {k: v for k, v in value.items() if k != key}
        if kind == 1:
            return {**value, rng.choice(["", "a", "null", "\ud800", "a" * 5000, "path", "tensor"]): value[key]}
        if kind == 2:
            return {**value, key: value[rng.choice(list(value))]}
        return {**value, key: odd_json(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        if rng.random() < 0.2:
            return value * rng.choice([0, 2, 3])
        return [*value[:at], odd_json(value[at], rng), *value[at + 1 :]]
    return copy.deepcopy(rng.choice(_ODD))


def odd_config(config: bytes, rng: random.Random) -> bytes:
    content = json.loads(config)
    for _ in range(rng.choice([1, 1, 2])):
        content = odd_json(content, rng)
    text = json.dumps(content).encode()
    if rng.random() < 0.1:
        text = rng.choice([b"[" * 100_000, b"9" * 100_000, b"\xff\xfe", b"", b" " * (3 * MIB), text + text])
    return damaged(text, rng) if rng.random() < 0.2 else text


def odd_weights(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.4:
        return damaged(data, rng)
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    if rng.random() < 0.4:
        for _ in range(rng.randint(1, 4)):  # other values, counters and fingerprints among them
            at = rng.randrange(len(body))
            body[at : at + 4] = rng.choice([bytes(4), b"\xff" * 4, rng.randbytes(4)])[: len(body) - at]
    else:
        header = odd_json(header, rng)
        if isinstance(header, dict) and rng.random() < 0.5:
            keys = list(header)
            names = rng.sample(keys, min(2, len(keys)))
            header = {(names[-1] if key == names[0] else key): value for key, value in header.items()}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(body)


def build(corpus: Corpus, case: int) -> Path:
    """The folder of a case."""
    rng = random.Random(case)
    files = dict(corpus.files)
    if rng.random() < 0.5:
        files["model.safetensors"] = odd_weights(files["model.safetensors"], rng)
        if rng.random() < 0.9:  # past the first check
            digest = hashlib.sha256(files["model.safetensors"]).hexdigest()
            files["config.json"] = json.dumps(json.loads(files["config.json"]) | {"sha256": digest}).encode()
    else:
        files["config.json"] = odd_config(files["config.json"], rng)
    return corpus.write(files)


def judge(folder: Path) -> str | None:
    """The refusal's message, None if it was loaded; AssertionError if neither is so, or something was left changed."""
    model = TinyDiT()
    before, base, start = snapshot(model), reset_peak(), time.monotonic()
    size = sum(path.stat().st_size for path in folder.iterdir())
    message = None
    try:
        st.CFGFeatureTeacher.from_pretrained(folder, model)
    except CheckpointError as error:
        message = str(error)
    except Exception as error:
        raise AssertionError(f"{type(error).__name__} instead of CheckpointError: {error}") from error
    seconds, grown = time.monotonic() - start, (peak_kib() - base) * 1024
    if message is not None:
        after = snapshot(model)
        assert after.keys() == before.keys(), f"changed: {message}"
        assert all(torch.equal(after[key], before[key]) for key in after), f"half loaded: {message}"
        assert all(p.requires_grad for p in model.parameters()), f"frozen: {message}"
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()), f"watched: {message}"
        assert len(message) < 8_000, f"a message of {len(message)} characters"
    else:
        assert all(value.isfinite().all() for value in model.state_dict().values()), "weights that are not finite"
    assert seconds < SECONDS, f"{seconds:.0f} s"
    assert grown <= 3 * size + 64 * MIB, f"{grown / MIB:.0f} MiB more for {size / MIB:.2f} MiB"
    return message


def run(first: int, count: int) -> Counter[str]:
    """How many of the cases were loaded and refused."""
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        corpus = Corpus(Path(folder))
        for case in range(first, first + count):
            try:
                counts[f"teacher {'loaded' if judge(build(corpus, case)) is None else 'refused'}"] += 1
            except BaseException as error:
                error.add_note(f"case {case}")
                raise
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0, help="the first case")
    parser.add_argument("--cases", type=int, default=10_000, help="how many cases")
    parser.add_argument("--child", action="store_true", help="run the cases in this process")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child:
        print(json.dumps(run(options.first, options.cases)))
        return
    counts: Counter[str] = Counter()
    failed = 0
    end = options.first + options.cases
    for first in range(options.first, end, 1000):
        command = [sys.executable, __file__, "--child", "--first", str(first), "--cases", str(min(1000, end - first))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
        if done.returncode:
            failed += 1
            print(f"FAILED in the cases from {first}, exit status {done.returncode}\n{done.stderr[-3000:]}")
        else:
            counts.update(json.loads(done.stdout))
    print(f"{sum(counts.values())} cases, {failed} failures")
    for name, count in sorted(counts.items()):
        print(f"  {name}: {count}")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
