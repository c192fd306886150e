"""Throw broken and hostile checkpoints at ``load_weights``: each is loaded whole or refused with CheckpointError.

    python tests/support/fuzz_checkpoints.py --cases 10000

Every case is one integer, from which its file follows. The script runs them in child processes, a few hundred in each,
so that a crash or a hang is caught too, and names the case. The suite runs the first cases of each family.
"""

from __future__ import annotations

import argparse
import codecs
import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save, save_file
from torch import Tensor, nn

from selftrans_reg.checkpoints import load_weights
from selftrans_reg.errors import CheckpointError

MIB = 1 << 20
SECONDS = 30  # one case, on a busy core; the usual one takes milliseconds


class ToyBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class ToyDiT(nn.Module):
    """The parts that make a DiT's state dict: a convolution, a table, a buffer, blocks. It is never called."""

    def __init__(self, width: int = 8, depth: int = 3, seed: int = 0) -> None:
        super().__init__()
        self.x_embedder = nn.Conv2d(4, width, 2, 2)
        self.y_embedder = nn.Embedding(11, width)
        self.blocks = nn.ModuleList(ToyBlock(width) for _ in range(depth))
        self.final_layer = nn.Linear(width, 16)
        self.register_buffer("pos_embed", torch.zeros(1, 16, width))
        self.register_buffer("counter", torch.zeros((), dtype=torch.int64))
        generator = torch.Generator().manual_seed(seed)
        for tensor in self.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 2)  # the counter is truncated


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


# --- Writing what torch.save writes, and what it does not -------------------------------------------------------------


class Call:
    """Pickled as the call of a function, which a trusting reader would make."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


class Storage:
    """Pickled as the reference of a storage: the record ``data/<key>`` with ``numel`` elements."""

    def __init__(self, key: Any = "0", numel: Any = 4, kind: Any = torch.FloatStorage, tag: Any = "storage") -> None:
        self.id = (tag, kind, key, "cpu", numel)


def tensor_call(storage: Any, size: Any, stride: Any, offset: Any = 0) -> Call:
    return Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, OrderedDict())


class _Pickler(pickle._Pickler):  # the Python one: it also pickles what the C one checks
    def persistent_id(self, obj: Any) -> Any:
        return obj.id if isinstance(obj, Storage) else None


def pickled(content: Any, protocol: int = 2) -> bytes:
    stream = io.BytesIO()
    _Pickler(stream, protocol).dump(content)
    return stream.getvalue()


def archive(pickle_bytes: bytes, compression: int = zipfile.ZIP_STORED, **records: bytes) -> bytes:
    """A file with ``torch.save``'s layout around any pickle; the record ``data/0`` holds four floats by default."""
    entries = {"data.pkl": pickle_bytes, "byteorder": b"little", "data/0": bytes(16), "version": b"3\n", **records}
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as file:
        for name, data in entries.items():
            file.writestr(f"archive/{name}", data)
    return stream.getvalue()


def code_bombs(marker: str) -> dict[str, bytes]:
    """Pickles that write the file ``marker`` if a trusting reader loads them."""
    text = f"touch {marker}".encode()
    return {
        "system": pickled({"ema": Call(os.system, f"touch {marker}")}),
        "eval": pickled({"ema": {"a": Call(eval, f"open({marker!r}, 'w').close()")}}),
        "mkdir": pickled({"args": argparse.Namespace(a=Call(os.mkdir, marker))}),
        "popen": pickled([Call(subprocess.run, ["touch", marker])]),
        "map": pickled([Call(list, Call(map, os.mkdir, [marker]))]),
        "protocol-4": pickled({"ema": Call(os.system, f"touch {marker}")}, protocol=4),
        "inst": b"\x80\x02(X" + struct.pack("<I", len(text)) + text + b"ios\nsystem\n.",
    }


def size_bombs() -> dict[str, bytes]:
    """Pickles that ask for much more than their size, among them some that just keep within the reader's limits."""
    deep = b")" + b"\x85" * 200_000
    hashes = b"".join(b"\x8a\x20" + (k * (2**61 - 1)).to_bytes(32, "little", signed=True) + b"N" for k in range(20_000))
    cast = Call(torch._utils._rebuild_device_tensor_from_cpu_tensor, tensor_call(Storage(), (10**10,), (0,)),
                torch.float64, "cpu", False)  # fmt: skip
    storage_key = b"X\x01\x00\x00\x00a(X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    return {
        "bytearray": pickled({"ema": Call(bytearray, 20 << 30)}),
        "empty-tensor": pickled({"ema": {"a": Call(torch.Tensor, 1 << 17, 1 << 17)}}),
        "encode": pickled({"ema": Call(codecs.encode, Call(codecs.encode, "a" * 10_000, "hex"), "hex")}),
        "cast": pickled({"a": cast}),
        "stride-0": pickled({"ema": {"final_layer.bias": tensor_call(Storage(), (10**9,), (0,))}}),
        "stride-0-fits": pickled({"final_layer.bias": tensor_call(Storage(), (16,), (0,))}),
        "numel": pickled({"final_layer.bias": tensor_call(Storage(numel=10**11), (10**11,), (1,))}),
        "offset": pickled({"final_layer.bias": tensor_call(Storage(), (1,), (1,), offset=2**40)}),
        "deep-key": b"\x80\x02}" + deep + b"Ns.",
        "deep-storage-key": b"\x80\x02}" + storage_key + deep + b"X\x03\x00\x00\x00cpuK\x04tQs.",
        "deep-list": b"\x80\x02" + b"]" * 199_000 + b"a" * 198_999 + b".",
        "many-lists": b"\x80\x02](" + b"]" * 3_900_000 + b"e.",
        "many-dicts": b"\x80\x02](" + b"}" * 390_000 + b"e.",
        "many-tensors": b"\x80\x02](" + pickled(tensor_call(Storage(), (4,), (1,)))[2:-1] * 9_900 + b"e.",
        "many-memos": b"\x80\x02N" + b"".join(b"r" + struct.pack("<I", k) for k in range(390_000)) + b".",
        "colliding-keys": b"\x80\x02}(" + hashes + b"u.",
        "wide-text": pickled({"ema": "a" * 3_900_000 + "\U0001f600"}),
    }


def _many_tensors_header() -> bytes:
    tensors = {f"{k}": {"dtype": "U8", "shape": [], "data_offsets": [k, k + 1]} for k in range(33_500)}
    header = json.dumps(tensors, separators=(",", ":")).encode()
    return struct.pack("<Q", len(header)) + header + bytes(len(tensors))


def file_bombs() -> dict[str, Callable[[], bytes]]:
    """What writes whole files, by name, that ask for much more than their size without any pickle."""
    good = pickled({"a": 1})
    return {
        "zipped.pt": lambda: archive(good, zipfile.ZIP_DEFLATED, **{"data/0": bytes(20 * MIB)}),
        "directory.pt": lambda: archive(good, **{f"{k}": b"" for k in range(60_000)}),
        "long-directory.pt": lambda: archive(good, **{f"{k:060000d}": b"" for k in range(80)}),
        "header.safetensors": _many_tensors_header,
        "long-header.safetensors": lambda: struct.pack("<Q", 9 * MIB) + b"{" + b" " * (9 * MIB - 2) + b"}",
        "lists.safetensors.index.json": lambda: b'{"weight_map":[' + b"[],{}," * 340_000 + b"0]}",
        "long.safetensors.index.json": lambda: b'{"weight_map":{}}' + b" " * (2 * MIB),
    }


# --- Cases -----------------------------------------------------------------------------------------------------------


class Corpus:
    """Good files that the cases damage, written once into ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        state = ToyDiT(seed=1).state_dict()
        run = {"model": state, "ema": ToyDiT(seed=2).state_dict(), "args": argparse.Namespace(lr=1e-4), "steps": 7}
        self.files = {"run.pt": self._torch_bytes(run), "bare.pt": self._torch_bytes(state)}
        self.files["weights.safetensors"] = save(state)
        keys = list(state)
        names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        weight_map = {key: names[i % 2] for i, key in enumerate(keys)}
        for name in names:
            save_file({key: state[key] for key in keys if weight_map[key] == name}, folder / name)
            self.files[name] = (folder / name).read_bytes()
        self.index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        self.files["model.safetensors.index.json"] = json.dumps(self.index).encode()
        self.state = state
        with zipfile.ZipFile(io.BytesIO(self.files["run.pt"])) as file:
            self.records = {name.partition("/")[2]: file.read(name) for name in file.namelist()}

    def write(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(data)
        return path

    @staticmethod
    def _torch_bytes(content: Any) -> bytes:
        stream = io.BytesIO()
        torch.save(content, stream)
        return stream.getvalue()


def damaged(data: bytes, rng: random.Random) -> bytes:
    """``data`` with one to three bytes, ranges or bits changed, as disks, networks and adversaries do."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at, end = sorted(rng.randrange(len(out) + 1) for _ in range(2))
        if rng.random() < 0.5:  # the ends of a file carry its structure
            at = rng.choice([rng.randrange(min(len(out), 64) + 1), max(0, len(out) - rng.randrange(200))])
            end = min(len(out), at + rng.randrange(16))
        kind = rng.randrange(7)
        if kind == 0:
            del out[at:]
        elif kind == 1:
            del out[at:end]
        elif kind == 2:
            out[at:at] = rng.randbytes(rng.randrange(1, 64))
        elif kind == 3:
            out[at:end] = rng.choice([b"\0", b"\xff"]) * (end - at)
        elif kind == 4:
            out[at:end] = out[: end - at]
        else:
            for _ in range(rng.randint(1, 8)):
                if out:
                    out[rng.randrange(len(out)) if kind == 5 else min(at, len(out) - 1)] ^= 1 << rng.randrange(8)
    return bytes(out)


def damaged_file(corpus: Corpus, rng: random.Random) -> Path:
    name = rng.choice(["run.pt", "bare.pt", "weights.safetensors"])
    return corpus.write("case" + Path(rng.choice([name, name, name, "x.pt", "x.safetensors"])).suffix,
                        damaged(corpus.files[name], rng))  # fmt: skip


def damaged_pickle(corpus: Corpus, rng: random.Random) -> Path:
    """A sound archive around a damaged pickle, so that the damage gets past the archive's checksum."""
    records = dict(corpus.records)
    data = bytearray(records.pop("data.pkl"))
    for _ in range(rng.randint(1, 3)):
        if data and rng.random() < 0.7:
            data[rng.randrange(len(data))] = rng.randrange(256)
        else:
            data = bytearray(damaged(bytes(data), rng))
    if rng.random() < 0.2:
        name = rng.choice(list(records))
        records[name] = damaged(records[name], rng)
    return corpus.write("case.pt", archive(bytes(data), **records))


_FRAGMENTS = [
    b"}", b"]", b")", b"N", b"K\x01", b"(", b"t", b"\x85", b"\x86", b"\x87", b"\x88", b"\x89", b"R", b"\x81", b"b",
    b"Q", b"s", b"u", b"a", b"e", b"0", b"2", b"M\xff\xff", b"J\xff\xff\xff\x7f", b"G" + bytes(8), b"q\x00", b"h\x00",
    b"r\xff\xff\xff\xff", b"j\x01\x00\x00\x00", b"\x8a\x09" + b"\xff" * 8 + b"\x7f", b"X\x03\x00\x00\x00ema",
    b"X\xff\xff\xff\xffe", b"X\x02\x00\x00\x00\xff\xfe", b"cos\nsystem\n", b"cbuiltins\nbytearray\n", b"\x93", b"\x8f",
    b"ccollections\nOrderedDict\n", b"cargparse\nNamespace\n", b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch\nFloatStorage\n", b"c\xff\xfe\n\n", b"I" + b"9" * 5000 + b"\n", b"\x8d" + b"\xff" * 8,
    b"\x95" + b"\x7f" * 8,
    pickled(tensor_call(Storage(), (4,), (1,)))[2:-1],
]  # fmt: skip


def random_pickle(corpus: Corpus, rng: random.Random) -> Path:
    # Ten values first, or most streams would end at once, on an empty stack.
    body = b"".join(rng.choice(_FRAGMENTS[:6]) for _ in range(10))
    body += b"".join(rng.choice(_FRAGMENTS) for _ in range(rng.randrange(40)))
    return corpus.write("case.pt", archive(b"\x80\x02" + body + b"."))


_ODD = [-1, 0, 1, 3, 2**31, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63), 0.5, "4", None, True, (), (1,), [], {}, b"0"]


def odd_tensor(corpus: Corpus, rng: random.Random) -> Path:
    """A whole state dict, one bias of which has an odd size, stride, offset, storage key, count or class."""
    content: dict[Any, Any] = {}
    records: dict[str, bytes] = {}
    for i, (name, value) in enumerate(corpus.state.items()):
        kind = torch.FloatStorage if value.is_floating_point() else torch.LongStorage
        content[name] = tensor_call(Storage(str(i), value.numel(), kind), tuple(value.shape), value.stride())
        records[f"data/{i}"] = value.numpy().tobytes()
    bias = str(list(content).index("final_layer.bias"))
    fields: dict[str, Any] = {"size": (16,), "stride": (1,), "offset": 0, "key": bias, "numel": 16, "tag": "storage",
                              "kind": torch.FloatStorage}  # fmt: skip
    for field in rng.choices(list(fields), k=rng.randint(1, 2)):
        odd = rng.choice(_ODD)
        fields[field] = rng.choice([odd, (odd,), (odd, odd), torch.LongStorage, torch.float32, 1, "1", 17, 10**9])
    storage: Any = Storage(fields["key"], fields["numel"], fields["kind"], fields["tag"])
    if rng.random() < 0.1:
        storage = argparse.Namespace(dtype=torch.float32, _untyped_storage=rng.choice(_ODD), device="cpu")
    tensor: Any = tensor_call(storage, fields["size"], fields["stride"], fields["offset"])
    if rng.random() < 0.2:
        tensor = rng.choice([
            Call(torch._utils._rebuild_parameter, tensor, True, OrderedDict()),
            Call(torch._utils._rebuild_parameter, tensor, rng.choice(_ODD), rng.choice(_ODD)),
            Call(torch.device, rng.choice(_ODD)),
        ])  # fmt: skip
    content["final_layer.bias"] = tensor
    if rng.random() < 0.2:
        records[f"data/{bias}"] = bytes(rng.choice([0, 16, 64, 100]))
    if rng.random() < 0.1:
        records["byteorder"] = rng.choice([b"big", b"", b"\xff"])
    if rng.random() < 0.1:
        records[".storage_alignment"] = rng.choice([b"0", b"-1", b"x", b"9" * 5000])
    if rng.random() < 0.1:
        records[".format_version"] = rng.choice([b"0", b"1", b"\xff"])
    whole = rng.choice([content, {"ema": content, "model": content, "steps": rng.choice(_ODD)}])
    return corpus.write("case.pt", archive(pickled(whole), **records))


def odd_archive(corpus: Corpus, rng: random.Random) -> Path:
    """A sound archive in which four bytes of a local header, of the directory or of its end record are replaced."""
    data = bytearray(corpus.files[rng.choice(["run.pt", "bare.pt"])])
    for _ in range(rng.randint(1, 2)):
        signature = rng.choice([b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"])
        found = [i for i in range(len(data) - 64) if data[i : i + 4] == signature] or [len(data) - 64]
        at = rng.choice(found) + rng.randrange(4, 46)
        value = rng.choice([0, 1, 8, 100, 2**16 - 1, 2**31 - 1, 2**32 - 1, rng.randrange(2**32)])
        data[at : at + 4] = struct.pack("<I", value)
    if rng.random() < 0.2:
        data = data + data[rng.randrange(len(data)) :]
    return corpus.write("case.pt", bytes(data))


def _odd_json(value: Any, rng: random.Random) -> Any:
    """``value`` with one entry somewhere inside replaced, removed, doubled or exchanged with another."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        kind = rng.randrange(8)
        if kind == 0:
            return {k: v for k, v in value.items() if k != key}
        if kind == 1:
            other = rng.choice(list(value))
            return {**value, key: value[other], other: value[key]}
        if kind == 2:
            return {**value, rng.choice(["", "../a", "\ud800", "__metadata__", "a" * 5000]): value[key]}
        return {**value, key: _odd_json(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], _odd_json(value[at], rng), *value[at + 1 :]]
    return rng.choice([*_ODD[:-1], "F8_E4M3", "F64", "I64", "BOOL", "U8",
                       float("nan"), [2**40, 2**40], ["a"], {"a": []}, "../../etc/passwd", "/etc/passwd",
                       "..\\a.safetensors", "a\0.safetensors", "model.safetensors.index.json"])  # fmt: skip


def odd_header(corpus: Corpus, rng: random.Random) -> Path:
    data = corpus.files["weights.safetensors"]
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    for _ in range(rng.randint(1, 2)):
        header = _odd_json(header, rng)
    text = json.dumps(header).encode()
    if rng.random() < 0.2:
        text = damaged(text, rng)
    stated = rng.choice([0, 1, len(text) - 1, 2**40, 2**63, 2**64 - 1]) if rng.random() < 0.2 else len(text)
    return corpus.write("case.safetensors", struct.pack("<Q", max(stated, 0)) + text + data[8 + length :])


def odd_index(corpus: Corpus, rng: random.Random) -> Path:
    text = json.dumps(_odd_json(corpus.index, rng)).encode()
    if rng.random() < 0.4:
        text = damaged(text, rng)
    if rng.random() < 0.05:
        text = rng.choice([b"[" * 100_000, b'{"a":' * 50_000, b"9" * 100_000, b'"\\ud800"', b"\xff\xfe", b""])
    return corpus.write("case.safetensors.index.json", text)


def odd_dictionary(corpus: Corpus, rng: random.Random) -> Mapping[Any, Any]:
    state: dict[Any, Any] = dict(corpus.state)
    for _ in range(rng.randint(1, 3)):
        key = rng.choice(list(state))
        tensor = corpus.state.get(key, torch.ones(3))
        state[key] = rng.choice([
            None, 1, "x", [tensor], tensor.numpy(), tensor.to("meta"), tensor[None], tensor.flatten()[:0],
            tensor * torch.nan, tensor.to(torch.complex64), tensor.to(torch.int8), tensor.bool(), tensor.half(),
            tensor.to(torch.float8_e4m3fn),
            torch.zeros(1).expand(10**9),
            tensor.float().to_sparse(), nn.Parameter(tensor.float()), nn.Buffer(tensor),
            torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), {key: tensor},
        ])  # fmt: skip
        if rng.random() < 0.3:
            odd = rng.choice([0, None, "", f"module.{key}", f"{key}.", ("a",), "ema", "model"])
            state[odd] = state.pop(key)
    nest = rng.choice(["", "", "ema", "model", "state_dict"])
    return {nest: state, "opt": {}} if nest else state


_FAMILIES = (
    damaged_file, damaged_pickle, random_pickle, odd_tensor, odd_archive, odd_header, odd_index, odd_dictionary
)  # fmt: skip
FAMILIES: dict[str, Callable[[Corpus, random.Random], Any]] = {family.__name__: family for family in _FAMILIES}


# --- Judging ---------------------------------------------------------------------------------------------------------


def peak_kib() -> int:
    """The process's highest resident memory since ``reset_peak``, in KiB (Linux)."""
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)


def reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return peak_kib()


class Verdict(NamedTuple):
    """What became of one checkpoint: the refusal's message, None if it was loaded, and what that took."""

    message: str | None
    seconds: float
    grown: int  # bytes of resident memory, at the highest


def judge(checkpoint: Any, weights: str) -> Verdict:
    """Load into a small model; AssertionError unless it is loaded whole, or refused with the model as it was."""
    model = ToyDiT()
    before = snapshot(model)
    size = checkpoint.stat().st_size if isinstance(checkpoint, Path) else 0
    measured = sys.platform == "linux"
    base, start = reset_peak() if measured else 0, time.monotonic()
    message = None
    try:
        load_weights(model, checkpoint, weights=weights)  # type: ignore[arg-type]
    except CheckpointError as error:
        message = str(error)
    except BaseException as error:
        raise AssertionError(f"{type(error).__name__} instead of CheckpointError: {error}") from error
    verdict = Verdict(message, time.monotonic() - start, (peak_kib() - base) * 1024 if measured else 0)
    after = snapshot(model)
    assert after.keys() == before.keys()
    unchanged = all(torch.equal(after[key], before[key]) for key in after)
    if message is None:
        assert not unchanged, "said to be loaded, and nothing changed"
        assert all(value.isfinite().all() for value in after.values()), "loaded weights that are not finite"
    else:
        assert unchanged, f"refused, and half loaded: {message}"
        assert len(message) < 8_000, f"a message of {len(message)} characters"
    assert verdict.seconds < SECONDS, f"{verdict.seconds:.0f} s"
    assert verdict.grown <= 3 * size + 64 * MIB, f"{verdict.grown / MIB:.0f} MiB more for {size / MIB:.2f} MiB"
    return verdict


def run_case(corpus: Corpus, case: int) -> Verdict:
    rng = random.Random(case)
    family = list(FAMILIES.values())[case % len(FAMILIES)]
    return judge(family(corpus, rng), rng.choice(["ema", "model"]))


def bombs(folder: Path) -> dict[str, Callable[[], bytes]]:
    """What writes every bomb, by file name; ``folder / "ran"`` appears if one of the code bombs goes off."""
    pickles = code_bombs(str(folder / "ran")) | size_bombs()
    return {f"{name}.pt": partial(archive, data) for name, data in pickles.items()} | file_bombs()


def child(*arguments: str) -> subprocess.CompletedProcess[str]:
    """This script in a process of its own, whose memory nothing has used before."""
    command = [sys.executable, __file__, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)


def _child(first: int, count: int) -> None:
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        corpus = Corpus(Path(folder))
        for case in range(first, first + count):
            print(f"case {case}", flush=True)
            verdict = run_case(corpus, case)
            counts[f"{list(FAMILIES)[case % len(FAMILIES)]} {'refused' if verdict.message else 'loaded'}"] += 1
    print(json.dumps(counts))


def _load(small: Path, large: Path) -> None:
    """Load 64² and 4096² numbers; the second, the code being in memory by then, in little more than its file takes."""
    for width, path in ((64, small), (4096, large)):
        model = nn.Linear(width, width, bias=False).bfloat16()
        base = reset_peak()
        load_weights(model, path)
        grown = (peak_kib() - base) * 1024
        assert (model.weight == 0.5).all()
        print(f"{path.name}: {grown / MIB:.0f} MiB")
    assert grown <= large.stat().st_size + 32 * MIB, f"{grown} bytes for a file of {large.stat().st_size}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0, help="the first case")
    parser.add_argument("--cases", type=int, default=10_000, help="how many cases")
    parser.add_argument("--child", action="store_true", help="run the cases in this process")
    parser.add_argument("--bomb", type=Path, help="judge this file, which has to be refused, in this process")
    parser.add_argument("--load", type=Path, nargs=2, help="load two square matrices, a small one first")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.bomb:
        verdict = judge(options.bomb, "ema")
        assert verdict.message is not None, "the bomb was loaded"
        print(f"{options.bomb.name}: {verdict.grown / MIB:.0f} MiB, {verdict.seconds:.1f} s: {verdict.message}")
        return
    if options.load:
        _load(*options.load)
        return
    if options.child:
        _child(options.first, options.cases)
        return
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, build in bombs(Path(folder)).items():
            path = Path(folder, name)
            path.write_bytes(build())
            done = child("--bomb", str(path))
            print(done.stdout.partition("\n")[0])
            if done.returncode or Path(folder, "ran").exists():
                failed += 1
                print(f"FAILED {name}, exit status {done.returncode}\n{done.stderr[-2000:]}")
    counts: Counter[str] = Counter()
    end = options.first + options.cases
    for first in range(options.first, end, 500):
        done = child("--child", "--first", str(first), "--cases", str(min(500, end - first)))
        last = (done.stdout.strip().splitlines() or ["no case"])[-1]
        if done.returncode:
            failed += 1
            print(f"FAILED at {last}, exit status {done.returncode}\n{done.stderr[-2000:]}")
        else:
            counts.update(json.loads(last))
    print(f"{sum(counts.values())} cases, {failed} failures")
    for name, count in sorted(counts.items()):
        print(f"  {name}: {count}")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
