"""What people have, read into a model: whole, strictly, and without running any of its code."""

import argparse
import json
import math
import os
import pickle
import re
import struct
import textwrap
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable
from datetime import datetime
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import save_file
from tiny_artefacts import TinyDiT, checkpointed, refused
from torch import Tensor, nn

import selftrans_reg as st
from selftrans_reg.checkpoints import read_checkpoint
from selftrans_reg.errors import CheckpointError, SettingError
from selftrans_reg.weights import LoadReport, load_weights

State = dict[str, Tensor]


@pytest.fixture
def model() -> TinyDiT:
    return TinyDiT(seed=0)


@pytest.fixture
def ema() -> State:
    return TinyDiT(seed=1).state_dict()


def assert_equal(model: nn.Module, expected: State) -> None:
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(state[key], value), key


def below(prefix: str, state: State) -> State:
    return {f"{prefix}.{key}": value for key, value in state.items()}


def written(content: Any, path: Path) -> Path:
    """The content in the format of the name; for an index in two shards, as huggingface_hub writes them."""
    if path.suffix == ".json":
        names = [path.name.replace(".safetensors.index.json", f"-0000{i}-of-00002.safetensors") for i in (1, 2)]
        weight_map = {key: names[i > 4] for i, key in enumerate(content)}
        for name in names:
            save_file({key: content[key] for key in content if weight_map[key] == name}, path.with_name(name))
        path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    elif path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


# --- What people have ------------------------------------------------------------------------------------------------

_OPT = {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(3)}}, "param_groups": [{"params": [0]}]}
LAYOUTS: dict[str, Callable[[State, State], dict[str, Any]]] = {
    "REPA": lambda raw, ema: {"model": raw, "ema": ema, "opt": _OPT, "config": {"a": {}}, "steps": 400_000},
    "compiled DDP": lambda raw, ema: {"model": below("module._orig_mod", raw), "ema": below("_orig_mod.module", ema)},
    "compiled and checkpointed blocks": lambda raw, ema: {
        "model": raw,
        "ema": {k.replace("blocks.1.", "blocks.1._orig_mod._checkpoint_wrapped_module."): v for k, v in ema.items()},
    },
    "an OrderedDict, parameters and a step": (
        lambda raw, ema: {"model": OrderedDict(raw), "ema": {k: nn.Parameter(v) for k, v in ema.items()}, "step": 7}
    ),
    "an average's counter, and a step that is no whole number": (
        lambda raw, ema: {"model": raw, "ema": {"n_averaged": torch.tensor(3), **below("module", ema)}, "step": 7.0}
    ),
}
_STEPS = {"REPA": 400_000, "an OrderedDict, parameters and a step": 7}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_loops_layout_is_loaded_whatever_wraps_the_model(
    model: TinyDiT, ema: State, tmp_path: Path, layout: str
) -> None:
    raw = TinyDiT(seed=2).state_dict()
    content = LAYOUTS[layout](raw, ema)
    path = written(content, tmp_path / "run.pt")
    for wrap in (nn.Module.train, torch.compile, nn.DataParallel, checkpointed):
        wrapped = wrap(model)
        for given in (content, path):
            for weights, expected in (("ema", ema), ("model", raw)):
                report = load_weights(wrapped, given, weights=weights)
                assert report == LoadReport(str(path) if given is path else None, weights, (), _STEPS.get(layout))
                assert_equal(model, expected)


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["a.pt", "model.safetensors", INDEX, f"diffusion_pytorch_{INDEX}"])
def test_a_bare_state_dict_is_loaded_from_every_format(
    model: TinyDiT, ema: State, tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    path = written({key: value.to(dtype) for key, value in ema.items()}, tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    for place in {path, path if name == "a.pt" else tmp_path}:
        for weights in ("ema", "model"):  # it is taken for either
            nn.init.zeros_(model.x_embedder.weight)
            assert load_weights(model, place, weights=weights) == LoadReport(str(place))
            assert_equal(model, {key: value.to(dtype).float() for key, value in ema.items()})


def test_loading_copies_into_the_models_own_tensors(model: TinyDiT, ema: State, device: torch.device) -> None:
    model.to(device).final_layer.requires_grad_(False).half()
    model.eval()
    before = dict(model.named_parameters())
    load_weights(model, ema)
    assert all(value is before[key] for key, value in model.named_parameters())
    assert not model.training
    assert [p.requires_grad for p in (model.final_layer.weight, model.x_embedder.weight)] == [False, True]
    assert torch.equal(model.final_layer.weight.cpu(), ema["final_layer.weight"].half())
    nn.init.zeros_(model.x_embedder.weight)
    assert ema["x_embedder.weight"].any(), "the model shares memory with the checkpoint"
    assert load_weights(model, None) == LoadReport()
    assert not model.x_embedder.weight.any()


def block() -> nn.Module:
    """With a child that is called as DDP calls what it wraps, and is none."""
    return nn.ModuleDict({"norm": nn.LayerNorm(2), "module": nn.Sequential(nn.Linear(2, 2))})


@pytest.mark.parametrize("build", [block, lambda: nn.ModuleDict({"module": block(), "b": block()})])
@pytest.mark.parametrize("rename", [str, "module.{}".format, lambda key: key.replace("module.0", "module._orig_mod.0")])
def test_a_child_that_is_called_module_keeps_its_name(build: Callable[[], nn.Module], rename: Any) -> None:
    state, model = build().state_dict(), build()
    assert list(st.strip(model)) == list(state)
    load_weights(model, {rename(key): value for key, value in state.items()})
    assert_equal(model, state)


# --- Entries ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "weights"),
    [
        (lambda raw, ema: {"state_dict": raw, "callbacks": {"EMA": {"weights": ema}}}, "callbacks.EMA.weights"),
        (lambda raw, ema: {"ema": {"step": torch.ones(()), **below("ema_model", ema)}}, "ema.ema_model"),
        (lambda raw, ema: {"state_dict": {**below("net", raw), **below("net_ema", ema)}}, "state_dict.net_ema"),
        (lambda raw, ema: below("model", raw) | below("ema", ema), "ema."),
        (lambda raw, ema: {"epoch": 3, "state_dict": below("module.net", ema)}, "state_dict.module.net"),
        (lambda raw, ema: below("net", ema), "net"),
        (lambda raw, ema: {"model": raw, "averaged": ema, "schema": {"a": torch.ones(1)}}, "averaged"),
    ],
)
def test_weights_reaches_below_entries_and_prefixes_and_the_error_says_so(
    model: TinyDiT, ema: State, content: Any, weights: str
) -> None:
    made = content(TinyDiT(seed=2).state_dict(), ema)
    refused(load_weights, model, made, says=f"weights={weights!r}")
    load_weights(model, made, weights=weights)
    assert_equal(model, ema)
    for name in ("", None, 3):
        with pytest.raises(SettingError, match="weights names the entry"):
            load_weights(model, made, weights=name)  # type: ignore[arg-type]


def test_heads_of_the_saved_model_are_left_out_and_reported_if_the_model_has_none(model: TinyDiT, ema: State) -> None:
    for names in (
        [f"projectors.{k}.{i}.{name}" for k in (0, 1) for i in (0, 2, 4) for name in ("weight", "bias")],  # REPA's
        [f"projectors.{i}.{name}" for i in (0, 2, 4) for name in ("weight", "bias")],  # the released code's
        ["projectors.0.weight", "projectors_final.linear.weight", "projectors_final.linear.bias"],
    ):
        content = {"ema": below("module", ema | dict.fromkeys(names, torch.zeros(3)))}
        assert load_weights(model, content).left_out == tuple(names)
        assert_equal(model, ema)
    for key in ("projectors.1.weight", "projectors.0.0.scale", "projectors_final.norm.weight"):
        says = ("Extra, not in the model (1):", f"{key} (3,)")
        refused(load_weights, model, ema | {key: torch.zeros(3)}, says=says)
    model.projectors = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.SiLU(), nn.Linear(2, 2))])
    heads = {key: torch.ones_like(value) for key, value in model.state_dict().items() if key.startswith("projectors")}
    assert load_weights(model, ema | heads).left_out == ()
    assert_equal(model, ema | heads)
    refused(load_weights, model, ema, says=("Missing, of the model's 18 (4):", "projectors.0.0.weight (2, 2)"))


# --- What does not fit, and what are no weights ----------------------------------------------------------------------


def _quantised() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates making them, and files hold them
        return torch.quantize_per_tensor(torch.ones(8), 0.1, 0, torch.qint8)


def biased(value: Any) -> Callable[[State], dict[str, Any]]:
    return lambda state: state | {"final_layer.bias": value}


REFUSED: list[tuple[Callable[[State], Any], str, str]] = [
    (lambda s: {"model": s, "opt": {}}, "ema", "has 'model', 'opt' but no 'ema': pass weights='model'."),
    (lambda s: {"ema": s, "opt": {}}, "model", "has 'ema', 'opt' but no 'model': pass weights='ema'"),
    (lambda s: {"state_dict": s, "model": s}, "model", "open which is meant: pass weights='state_dict', or the entry"),
    (lambda s: {}, "ema", "Not tensors: nothing"),
    (lambda s: {"ema": None, "a": torch.zeros(1), "epoch": 3}, "ema", "Not tensors: 'ema' (NoneType), 'epoch' (int)"),
    (lambda s: {"ema": {}}, "ema", "the given dictionary, entry 'ema', holds no weights at all"),
    (lambda s: {"ema": {"shadow_params": [torch.zeros(1)]}}, "ema", "has under 'shadow_params' a list"),
    (lambda s: {"ema": {3: torch.zeros(1)}}, "ema", "has a int for a key"),
    (lambda s: [s], "ema", "A path is a string or a pathlib.Path; got list"),
    (lambda s: s | {"n_averaged": torch.tensor(1)}, "ema", "  n_averaged ()"),  # of no wrapper: it is unknown
    (lambda s: s | {"module.final_layer.bias": torch.zeros(8)}, "ema", "'final_layer.bias' twice, under different"),
    *(
        (biased(torch.ones(8).to(dtype)), "ema", f"Of another dtype (1):\n  final_layer.bias: saved {dtype}, model")
        for dtype in (torch.bool, torch.complex64, torch.float8_e4m3fn)
    ),
    (biased(torch.zeros(8, device="meta")), "ema", "under 'final_layer.bias' a tensor on the meta device; weights are"),
    (biased(torch.zeros(8).to_sparse()), "ema", "a nested, quantised or sparse tensor"),
    (biased(_quantised()), "ema", "a nested, quantised or sparse tensor"),
    (biased(torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged)), "ema", "a NestedTensor"),
]


@pytest.mark.parametrize(("content", "weights", "says"), REFUSED)
def test_what_is_no_state_dict_of_the_models_or_unclear_is_refused(
    model: TinyDiT, ema: State, content: Any, weights: str, says: str
) -> None:
    refused(load_weights, model, content(ema), weights=weights, says=says)


def test_missing_extra_and_misshapen_keys_are_listed_with_the_nearest(model: TinyDiT, ema: State) -> None:
    ema["blocks.1.0.bais"] = ema.pop("blocks.1.0.bias")
    ema["y_embedder.weight"] = torch.zeros(5, 4)
    ema["final_layer.bias"] = torch.zeros(8, dtype=torch.int64)
    del ema["pos_embed"]
    message = """the given dictionary, entry 'ema', does not fit TinyDiT; nothing was loaded.
Missing, of the model's 14 (2):
  pos_embed (1, 4, 4), a buffer; nearest: none
  blocks.1.0.bias (4,); nearest: 'blocks.1.0.bais'
Extra, not in the model (1):
  blocks.1.0.bais (4,); nearest: 'blocks.1.0.bias'
Of another shape (1):
  y_embedder.weight: saved (5, 4), model (6, 4)
Of another dtype (1):
  final_layer.bias: saved torch.int64, model torch.float32
Build the model"""
    refused(load_weights, model, {"ema": ema}, says=message)
    says = ("Missing, of the model's 14 (14):", "... and 6 more", "(1000):", "... and 992 more")
    refused(load_weights, model, {f"layer.{i}": torch.zeros(1) for i in range(1000)}, says=says)


def test_no_message_is_as_long_as_the_file_makes_it(model: TinyDiT, ema: State) -> None:
    class Odd:
        def __repr__(self) -> str:
            raise RecursionError

    axes = torch.ones([1] * 5000)
    for content in ({axes: 1}, {Odd(): 1}, {"ema": {axes: 1}}, {"ema": ema | {"a": axes}}, ema | {"x" * 10**6: axes}):
        assert len(refused(load_weights, model, content)) < 4000


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_counted(bad: float, ema: State) -> None:
    model, weight = nn.Linear(1 << 10, 1 << 11, bias=False), torch.zeros(1 << 11, 1 << 10)
    weight.view(-1)[[0, 5, -1]] = bad  # it is looked at in two parts
    says = ("3 of 2097152 values under 'weight' that are not finite in torch.float32", "Take an earlier checkpoint")
    refused(load_weights, model, {"weight": weight}, says=says)
    ema["final_layer.bias"][3] = 1e5
    refused(load_weights, TinyDiT().half(), ema, says="1 of 8 values under 'final_layer.bias' that are not finite in")
    load_weights(TinyDiT().bfloat16(), ema)


def test_a_mask_of_minus_infinity_is_no_defect() -> None:
    def build(value: float) -> nn.Module:
        model = nn.Linear(2, 2)
        model.register_buffer("mask", torch.full((2, 2), value).triu(1))
        model.register_buffer("rope", torch.ones(2, dtype=torch.complex64))
        model.register_buffer("scale", torch.ones(2).to(torch.float8_e4m3fn))
        return model

    model, state = build(0.0), build(-math.inf).state_dict()
    load_weights(model, state)
    assert torch.equal(model.mask, state["mask"])
    for key, value, count in (("mask", math.inf, 4), ("bias", -math.inf, 2), ("rope", math.nan, 2)):
        wrong = torch.full_like(state[key], value)
        refused(load_weights, model, state | {key: wrong}, says=f"{count} of {count} values")


@pytest.mark.parametrize("kept", [["embed.weight"], ["out.weight"], ["embed.weight", "out.weight"]])
@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_of_tied_weights_one_is_enough(tmp_path: Path, kept: list[str], name: str) -> None:
    value, model = torch.arange(15.0).view(5, 3), nn.ModuleDict({"embed": nn.Embedding(5, 3), "out": nn.Linear(3, 5)})
    model.out.bias, model.out.weight = None, model.embed.weight
    load_weights(model, written({key: value.clone() for key in kept}, tmp_path / name))
    assert torch.equal(model.embed.weight, value)
    assert model.out.weight is model.embed.weight
    says = ("different values under 'embed.weight' and 'out.weight'", "one tensor in the model", "Untie")
    refused(load_weights, model, {"embed.weight": torch.ones(5, 3), "out.weight": torch.zeros(5, 3)}, says=says)


@pytest.mark.parametrize("make", [lambda: torch.zeros(1).expand(3), lambda: torch.zeros(4).as_strided((3, 2), (1, 1))])
def test_a_buffer_whose_elements_share_memory_is_loaded(make: Callable[[], Tensor], tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("table", make())
    values = torch.arange(float(make().numel())).reshape(make().shape)
    for table in (values, torch.ones(1).expand(make().shape)):
        load_weights(model, written(model.state_dict() | {"table": table}, tmp_path / "a.pt"))
        assert torch.equal(model.table, table)


def test_a_model_that_cannot_take_weights_is_refused() -> None:
    gathering, meta = nn.Linear(3, 3), nn.Linear(3, 3, device="meta")
    gathering._register_state_dict_hook(lambda _, state, *__: state.update(weight=state["weight"].detach().clone()))
    with torch.inference_mode():
        inference = nn.Linear(3, 3)
    for model, says in (
        *((meta, "has no data here: bring"), (nn.LazyLinear(3), "has no data here")),
        *((gathering, "is no plain tensor of its own (Tensor): do it before"), (inference, "is no plain tensor")),
    ):
        with pytest.raises(CheckpointError, match=re.escape(f"Linear cannot take weights: its 'weight' {says}")):
            load_weights(model, {"weight": torch.ones(3, 3), "bias": torch.ones(3)})


# --- Adapters --------------------------------------------------------------------------------------------------------


def adapted(seed: int, **settings: Any) -> nn.Module:
    """The toy with an adapter on its blocks; the seed is the adapter's alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what PEFT imports
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=r"blocks\.\d\.0", **settings)
        model: nn.Module = peft.get_peft_model(TinyDiT(), config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora" in name or "modules_to_save" in name:
            parameter.data.normal_(generator=generator)
    return model


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"modules_to_save": ["final_layer"]}], ids=str)
def test_an_adapter_is_loaded_whole_and_nothing_else(tmp_path: Path, settings: dict[str, Any]) -> None:
    source = adapted(1, **settings)
    source.save_pretrained(tmp_path)  # type: ignore[operator]
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        model = adapted(2, **settings)
        load_weights(model, path)
        assert_equal(model, source.state_dict())
        says = ("was trained with lora_alpha=8", "'default' has 16", "PeftConfig.from_pretrained(folder)")
        refused(load_weights, adapted(2, lora_alpha=16, **settings), path, says=says)
    state = read_checkpoint(tmp_path)
    key, *rest = state
    refused(load_weights, model, {k: state[k] for k in rest}, says=("Missing, of the model's", key))
    refused(load_weights, model, state | {"x.lora_A.weight": torch.ones(2, 4)}, says="Extra, not in the model (1)")
    says = ("These are the weights of an adapter", "peft.get_peft_model(model")
    refused(load_weights, TinyDiT(), tmp_path, says=says)


# --- Files of torch.save ---------------------------------------------------------------------------------------------

DATA: dict[str, Any] = {
    "size": torch.Size([1, 2]), "dtype": torch.int64, "device": torch.device("cpu"), "bytes": b"abc", "set": {1, 2},
    "Counter": Counter("aab"), "complex": 1 + 2j, "keys": {(1, 2): 3, 4: 5}, "uint16": torch.ones(3).to(torch.uint16),
    "range": range(3), "slice": slice(1, None), "path": PurePosixPath("runs/17"), "long": 2**400,
    "namespaces": (argparse.Namespace(lr=1e-4), SimpleNamespace(a=1)), "when": datetime.now(), "some": frozenset([1]),
}  # fmt: skip


@pytest.mark.parametrize("legacy", [False, True])
def test_plain_data_beside_the_weights_is_read(ema: State, tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "a.pt"
    data = {key: value for key, value in DATA.items() if key != "uint16" or not legacy}  # which torch cannot read so
    torch.save({"ema": ema, "args": data | {"out": tmp_path}}, path, _use_new_zipfile_serialization=not legacy)
    before = set(torch.serialization.get_safe_globals())
    args = read_checkpoint(path)["args"]
    assert all(torch.equal(args[k], v) if isinstance(v, Tensor) else args[k] == v for k, v in data.items())
    assert type(args["out"]) is PurePosixPath  # which cannot touch the disk
    assert set(torch.serialization.get_safe_globals()) == before
    with torch.serialization.safe_globals([argparse.Namespace]):
        read_checkpoint(path)
        assert argparse.Namespace in torch.serialization.get_safe_globals()  # what others have allowed stays allowed


class Config(dict[str, Any]):
    pass


WRITERS: dict[str, Callable[[Any, Path], Any]] = {
    "torch": torch.save,
    "torch before 1.6": lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
    "pickle": lambda content, path: path.write_bytes(pickle.dumps(content)),
}


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    ("made", "weights"),
    [
        (lambda net: {"module": {**net.state_dict(), "extra": Config()}, "step": 3}, "module"),
        (lambda net: {"ema": net, "encoder": Config(), "dataset_kwargs": {"a": 1}}, "ema"),  # as EDM2's
        (lambda net: net, "ema"),
        (lambda net: {**net.state_dict(), "epoch": Config()}, "ema"),
    ],
)
def test_the_remedy_of_a_refused_file_works_on_it(
    made: Any, weights: str, write: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source, model = nn.Linear(2, 2), nn.Linear(2, 2)
    WRITERS[write](made(source), tmp_path / "a.pt")
    says = ("is refused, and nothing of it was run: it asks for ", "If you trust the file")
    message = refused(load_weights, model, tmp_path / "a.pt", says=says)
    exec(textwrap.dedent(message.split("made with:\n")[1]), {})
    load_weights(model, "weights.pt", weights=weights)
    assert_equal(model, source.state_dict())


@pytest.mark.parametrize("write", WRITERS)
def test_code_in_a_file_is_refused_and_not_run(
    tmp_path: Path, model: TinyDiT, ema: State, write: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker, path = tmp_path / "ran", tmp_path / "bomb.pt"

    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(marker),)

    WRITERS[write]({"ema": ema, "args": Bomb()}, path)
    asks = "what torch.save never writes" if write == "pickle" else "posix.mkdir"
    refused(load_weights, model, path, says=f"nothing of it was run: it asks for {asks}, not plain data")
    assert not marker.exists()
    pickle.loads(pickle.dumps(Bomb()))
    assert marker.exists(), "the bomb is a dud: it does not go off in a trusting reader either"
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.9.1+cu128"))
    with pytest.warns(UserWarning, match=r"bomb\.pt: PyTorch 2\.9\.1\S* can be made to run code .* fixed in 2\.10"):
        refused(load_weights, model, path)


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_a_file_that_is_written_to_is_refused_while_read_and_not_needed_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path, wide = written({"a": torch.ones(10_000)}, tmp_path / name), torch.ones(10_000)
    state = read_checkpoint(path)
    os.truncate(path, 0)  # which would end this process, if the file were mapped
    assert torch.equal(state["a"], wide)
    path = written({"a": wide}, tmp_path / name)
    module = torch if name == "a.pt" else safetensors.torch
    load = module.load

    def meanwhile(data: Any, **options: Any) -> Any:
        with path.open("ab") as other:
            other.write(b"more")
        return load(data, **options)

    monkeypatch.setattr(module, "load", meanwhile)
    refused(read_checkpoint, path, says="was written to while it was read, so what was read may be of two states")


# --- Broken and foreign files ----------------------------------------------------------------------------------------


def _header(**change: Any) -> bytes:
    header = json.dumps({"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]} | change}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(64)


BROKEN: list[tuple[str, bytes, str]] = [
    *(("a.pt", data, "cannot be read as a checkpoint") for data in (b"", b"x", b"PK\x03\x04")),
    *(
        ("a.safetensors", data, "cannot be read as a checkpoint: SafetensorError")
        for data in (_header(dtype="F99"), _header(shape=[2**40, 2**40]), _header(data_offsets=[0, 2**40]))
    ),
    ("a.safetensors", struct.pack("<Q", 2**63), f"announces a header of {2**63} bytes; at most {2 << 20} are read"),
    *((INDEX, data, "has no 'weight_map' from keys to file names") for data in (b"[]", b'{"weight_map": {"a": 1}}')),
    (INDEX, b'{"weight_map": {"a": "b.safetensors", "a": "c.safetensors"}}', "has the key 'a' twice"),
    (INDEX, b"[" * 100_000, "cannot be read as a checkpoint: RecursionError"),
    (INDEX, b"\xff\xfe", "cannot be read as a checkpoint: UnicodeDecodeError"),
    (INDEX, b" " * (3 << 20), "is longer than 2097152 bytes"),
    (INDEX, b'{"weight_map": {"a": "none.safetensors"}}', "There is no file"),
    *(
        (INDEX, b'{"weight_map": {"a": "%s"}}' % name, "which is no file of that folder, or a link out of it")
        for name in (b"../other/a.safetensors", b"/etc/a.safetensors", b"sub/a.safetensors", b"..", b"")
    ),
    (INDEX, b'{"weight_map": {"a": "a\\u0000b"}}', "cannot be read as a checkpoint: ValueError"),
]


@pytest.mark.parametrize(("name", "data", "says"), BROKEN, ids=[f"{i}-{name}" for i, (name, _, _) in enumerate(BROKEN)])
def test_a_broken_or_foreign_file_is_refused(tmp_path: Path, model: TinyDiT, name: str, data: bytes, says: str) -> None:
    for place in ("other", "folder/sub"):  # what an index must not reach
        (tmp_path / place).mkdir(parents=True)
        save_file({"a": torch.ones(1)}, tmp_path / place / "a.safetensors")
    (tmp_path / "folder" / name).write_bytes(data)
    refused(load_weights, model, tmp_path / "folder" / name, says=says)


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_a_file_that_is_cut_short_is_refused(tmp_path: Path, model: TinyDiT, ema: State, name: str) -> None:
    path = written(ema, tmp_path / name)
    for length in range(path.stat().st_size - 1, 0, -101):
        os.truncate(path, length)
        refused(load_weights, model, path, says="cannot be read as a checkpoint")


def test_a_path_that_is_not_there_names_the_nearest(model: TinyDiT, tmp_path: Path) -> None:
    (tmp_path / "0400000.pt").touch()
    os.mkfifo(tmp_path / "pipe.pt")
    refused(load_weights, model, tmp_path / "040000.pt", says=("There is no file", "'0400000.pt'", "hf_hub_download"))
    refused(load_weights, model, tmp_path / "none" / "a.pt", says=("There is no file", "Nearest in its folder: none"))
    refused(load_weights, model, tmp_path / "pipe.pt", says="There is no file")  # and does not wait for it
    refused(load_weights, model, written([1, 2], tmp_path / "0400000.pt"), says="holds a list; a checkpoint is a dict")
    for path in (7, b"a.pt", "a" * 5000, "a\0b"):
        refused(load_weights, model, path)


def test_links_are_followed_within_the_hubs_cache_alone(model: TinyDiT, ema: State, tmp_path: Path) -> None:
    folder, blobs = tmp_path / "models--me--sit" / "snapshots" / "abc", tmp_path / "models--me--sit" / "blobs"
    for place in (folder, blobs):
        place.mkdir(parents=True)
    written(ema, blobs / INDEX)
    for path in blobs.iterdir():
        (folder / path.name).symlink_to(Path("../../blobs") / path.name)
    load_weights(model, folder)
    assert_equal(model, ema)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for path in blobs.iterdir():
        (moved / path.name).symlink_to(path)
    refused(load_weights, model, moved / INDEX, says=("'model-00001-of-00002.safetensors'", "a link out of it"))


def test_index_and_shards_have_to_agree(model: TinyDiT, ema: State, tmp_path: Path) -> None:
    index = written(ema, tmp_path / INDEX)
    good = json.loads(index.read_text())["weight_map"]
    first, second = sorted(set(good.values()))
    assert good["pos_embed"] == first
    for weight_map, says in (
        (good | {"pos_embed": second}, "In the index only: 'pos_embed'"),  # of that shard, which is read first
        ({k: v for k, v in good.items() if k != "pos_embed"}, "In the shard only: 'pos_embed'"),
        (good | {"new": first}, "In the index only: 'new'"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        refused(load_weights, model, index, says=("disagree. Download or convert the whole set again", says))


def test_a_folder_has_to_hold_exactly_one_set_of_weights(model: TinyDiT, ema: State, tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    says = ("holds 0 of 'diffusion_pytorch_model.safetensors'", "exactly one", "'model_index.json', 'transformer/'")
    refused(load_weights, model, tmp_path, says=says)
    for name in ("model.safetensors", INDEX):
        written(ema, tmp_path / name)
    refused(load_weights, model, tmp_path, says=("holds 2 of", "'model.safetensors.index.json'", "Pass the path"))
