import argparse
import json
import math
import os
import pickle
import random
import struct
import subprocess
import sys
import textwrap
import time
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from datetime import datetime
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from fuzz_files import FAMILIES, Corpus, judge
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import selftrans_reg as st
from selftrans_reg.checkpoints import read_checkpoint, read_json
from selftrans_reg.errors import CheckpointError, SelfTransError, SettingError
from selftrans_reg.weights import LoadReport, load_weights

State = dict[str, Tensor]


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


def snapshot(model: nn.Module) -> State:
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.fixture
def model() -> ToyDiT:
    return ToyDiT(seed=0)


@pytest.fixture
def ema() -> State:
    return ToyDiT(seed=1).state_dict()


@pytest.fixture
def raw() -> State:
    return ToyDiT(seed=2).state_dict()


def assert_equal(model: nn.Module, expected: State) -> None:
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(state[key], value), key


def refusal(model: nn.Module, checkpoint: Any, **options: Any) -> str:
    """The message of the CheckpointError; the model has to be as it was."""
    before = snapshot(model)
    with pytest.raises(CheckpointError) as info:
        load_weights(model, checkpoint, **options)
    assert isinstance(info.value, SelfTransError)
    assert isinstance(info.value, ValueError)
    assert_equal(model, before)
    return str(info.value)


def assert_says(message: str, *parts: str) -> None:
    for part in parts:
        assert part in message, f"{part!r} is not in:\n{message}"


def renamed(state: State, rename: Callable[[str], str]) -> State:
    return {rename(key): value for key, value in state.items()}


def below(prefix: str, state: State) -> State:
    return renamed(state, lambda key: f"{prefix}.{key}")


def save_shards(state: State, folder: Path, stem: str = "model") -> Path:
    """Two shards and their index, as huggingface_hub writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for i, keys in enumerate((list(state)[:9], list(state)[9:]), start=1):
        name = f"{stem}-0000{i}-of-00002.safetensors"
        save_file({key: state[key] for key in keys}, folder / name)
        weight_map |= dict.fromkeys(keys, name)
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


# --- What people have ------------------------------------------------------------------------------------------------

_ARGS = argparse.Namespace(
    model="SiT-B/2", lr=1e-4, betas=(0.9, 0.999), resume=None, fp16=True, layers=[1, 2], seed=2**63,
    dtype=torch.bfloat16, device=torch.device("cpu"),
)  # fmt: skip


def _optimizer_state(state: State) -> dict[str, Any]:
    """What ``opt`` of every loop holds: the state of an AdamW that has made a step."""
    parameters = [nn.Parameter(value.clone()) for value in state.values() if value.is_floating_point()]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer.state_dict()


LOOPS: dict[str, Callable[[State, State], dict[str, Any]]] = {
    "DiT": lambda raw, ema: {"model": raw, "ema": ema, "opt": _optimizer_state(raw), "args": _ARGS},
    "REPA": lambda raw, ema: {"model": raw, "ema": ema, "opt": _optimizer_state(raw), "args": _ARGS, "steps": 400_000},
    "LightningDiT": lambda raw, ema: {
        "model": renamed(raw, lambda key: f"module.{key}"),
        "ema": renamed(ema, lambda key: f"module.{key}"),
        "opt": _optimizer_state(raw),
        "config": {"model": {"model_type": "LightningDiT-B/1"}, "train": {"max_steps": 80_000}},
    },
    "compiled DDP": lambda raw, ema: {
        "model": renamed(raw, lambda key: f"module._orig_mod.{key}"),
        "ema": renamed(ema, lambda key: f"_orig_mod.module.{key}"),
    },
    "compiled and checkpointed blocks": lambda raw, ema: {
        "model": raw,
        "ema": renamed(ema, lambda key: key.replace("blocks.1.", "blocks.1._orig_mod._checkpoint_wrapped_module.")),
    },
    "a step, OrderedDict and parameters": lambda raw, ema: {
        "model": OrderedDict(raw),
        "ema": OrderedDict((k, nn.Parameter(v) if v.is_floating_point() else v) for k, v in ema.items()),
        "step": 7,
    },
}


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("loop", LOOPS)
def test_every_loops_layout_is_loaded(
    model: ToyDiT, ema: State, raw: State, tmp_path: Path, loop: str, in_memory: bool
) -> None:
    content = LOOPS[loop](raw, ema)
    path = tmp_path / "run.pt"
    torch.save(content, path)
    steps = {"REPA": 400_000, "a step, OrderedDict and parameters": 7}
    for weights, expected in (("ema", ema), ("model", raw)):
        report = load_weights(model, content if in_memory else path, weights=weights)  # type: ignore[arg-type]
        assert report == LoadReport(None if in_memory else str(path), weights, (), steps.get(loop))
        assert_equal(model, expected)


@pytest.mark.parametrize("weights", ["ema", "model"])
@pytest.mark.parametrize("form", ["pt", "safetensors", "index", "dictionary"])
def test_a_bare_state_dict_is_taken_for_either_value(
    model: ToyDiT, ema: State, tmp_path: Path, form: str, weights: Any
) -> None:
    checkpoint: Any = tmp_path / f"bare.{form}"
    if form == "pt":
        torch.save(ema, checkpoint)
    elif form == "safetensors":
        save_file(ema, checkpoint)
    elif form == "index":
        checkpoint = save_shards(ema, tmp_path)
    else:
        checkpoint = ema
    report = load_weights(model, checkpoint, weights=weights)
    assert report == LoadReport(None if form == "dictionary" else str(checkpoint), None, (), None)
    assert_equal(model, ema)


@pytest.mark.parametrize("stem", ["diffusion_pytorch_model", "model"])
@pytest.mark.parametrize("sharded", [True, False])
def test_a_folder_is_loaded_under_the_hubs_names(
    model: ToyDiT, ema: State, tmp_path: Path, stem: str, sharded: bool
) -> None:
    (tmp_path / "config.json").write_text("{}")
    if sharded:
        save_shards(ema, tmp_path, stem)
    else:
        save_file(ema, tmp_path / f"{stem}.safetensors")
    assert load_weights(model, tmp_path).source == str(tmp_path)
    assert_equal(model, ema)


@pytest.mark.parametrize("max_shard_size", ["10GB", "30KB"])
def test_what_diffusers_saves_is_loaded(tmp_path: Path, max_shard_size: str) -> None:
    def build() -> DiTTransformer2DModel:
        return DiTTransformer2DModel(
            num_layers=2, num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, sample_size=8,
            patch_size=2, num_embeds_ada_norm=10,
        )  # fmt: skip

    with torch.random.fork_rng():
        torch.manual_seed(0)
        saved, fresh = build(), build()
    saved.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "diffusion_pytorch_model.safetensors.index.json").exists() == (max_shard_size == "30KB")
    load_weights(fresh, tmp_path)
    assert_equal(fresh, saved.state_dict())


def test_none_keeps_the_models_own_weights(model: ToyDiT) -> None:
    before = snapshot(model)
    assert load_weights(model, None) == LoadReport(None, None, (), None)
    assert_equal(model, before)


def test_loading_copies_into_the_models_own_tensors(model: ToyDiT, ema: State) -> None:
    model.final_layer.requires_grad_(False).half()
    model.eval()
    before = dict(model.named_parameters())
    load_weights(model, ema)
    after = dict(model.named_parameters())
    assert all(after[key] is before[key] for key in before)
    assert not model.training
    assert not model.final_layer.weight.requires_grad
    assert model.blocks[0].norm.weight.requires_grad
    assert torch.equal(model.final_layer.weight, ema["final_layer.weight"].half())
    with torch.no_grad():
        model.x_embedder.weight.zero_()
    assert ema["x_embedder.weight"].any(), "the model shares memory with the checkpoint"


@pytest.mark.parametrize("saved", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_floating_point_weights_take_the_models_dtype(
    model: ToyDiT, ema: State, tmp_path: Path, saved: torch.dtype, suffix: str
) -> None:
    state = {key: value.to(saved) if value.is_floating_point() else value for key, value in ema.items()}
    path = tmp_path / f"weights{suffix}"
    torch.save(state, path) if suffix == ".pt" else save_file(state, path)
    load_weights(model, path)
    assert_equal(model, {key: value.to(ema[key].dtype) for key, value in state.items()})


def test_weights_reach_the_device_of_the_model(ema: State, device: torch.device) -> None:
    model = ToyDiT(seed=0).to(device)
    load_weights(model, ema)
    assert all(value.device.type == device.type for value in model.state_dict().values())
    assert_equal(model.cpu(), ema)


@pytest.mark.parametrize("wrap", ["compiled", "checkpointed", "parallel"])
def test_a_wrapped_model_is_loaded_by_plain_keys(model: ToyDiT, ema: State, wrap: str) -> None:
    wrapped: nn.Module = model
    if wrap == "compiled":
        wrapped = torch.compile(model, backend="eager")  # type: ignore[assignment]
        assert next(iter(wrapped.state_dict())).startswith("_orig_mod.")
    elif wrap == "checkpointed":
        model.blocks[1] = checkpoint_wrapper(model.blocks[1])
        assert any("_checkpoint_wrapped_module" in name for name, _ in model.named_parameters())
    else:
        wrapped = nn.DataParallel(model)
    load_weights(wrapped, ema)
    assert_equal(model, ema)


def test_the_state_of_an_averaged_model_is_loaded(model: ToyDiT, raw: State, tmp_path: Path) -> None:
    source = ToyDiT(seed=3)
    source.load_state_dict(raw)
    averaged = torch.optim.swa_utils.AveragedModel(source, use_buffers=True)
    state = averaged.state_dict()
    assert next(iter(state)) == "n_averaged"
    torch.save({"ema": state}, tmp_path / "run.pt")
    assert load_weights(model, tmp_path / "run.pt").left_out == ()
    assert_equal(model, raw)
    assert_says(refusal(model, raw | {"n_averaged": torch.tensor(1)}), "n_averaged")  # of no wrapper: it is unknown


# --- Entries ---------------------------------------------------------------------------------------------------------


def test_a_missing_entry_is_named_with_those_found(model: ToyDiT, raw: State) -> None:
    message = refusal(model, {"model": raw, "opt": {}})
    assert_says(message, "has 'model', 'opt' but no 'ema'", "pass weights='model'")
    message = refusal(model, {"ema": raw, "opt": {}}, weights="model")
    assert_says(message, "has 'ema', 'opt' but no 'model'", "pass weights='ema'")


def test_state_dict_is_the_models_entry(model: ToyDiT, raw: State) -> None:
    content = {"state_dict": raw, "epoch": 3}
    assert_says(refusal(model, content), "has 'state_dict', 'epoch' but no 'ema'", "pass weights='state_dict'")
    assert load_weights(model, content, weights="model").entry == "state_dict"
    assert_equal(model, raw)
    message = refusal(model, {"state_dict": raw, "model": raw}, weights="model")
    assert_says(message, "open which is meant", "pass weights='state_dict', or the entry 'model' itself")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "Not tensors: nothing"),
        ({"net": {}, "epoch": 3}, "Not tensors: 'net' (dict), 'epoch' (int)"),
        ({"ema": None, "pos_embed": torch.zeros(1)}, "Not tensors: 'ema' (NoneType)"),
        ({"ema": {}}, "entry 'ema', holds no weights at all"),
        ({"ema": {"shadow_params": [torch.zeros(1)]}}, "has under 'shadow_params' a list"),
        ({"ema": {3: torch.zeros(1)}}, "has a int for a key"),
    ],
)
def test_what_is_no_state_dict_is_refused(model: ToyDiT, content: Any, said: str) -> None:
    assert_says(refusal(model, content), "the given dictionary", said)


@pytest.mark.parametrize("step", [True, "7", 7.0, torch.tensor(7), None])
def test_a_step_that_is_no_plain_integer_is_not_reported(model: ToyDiT, ema: State, step: Any) -> None:
    assert load_weights(model, {"ema": ema, "steps": step}).step is None


def test_other_values_of_the_arguments_are_refused(model: ToyDiT, ema: State) -> None:
    for weights in ("", None, 3):
        with pytest.raises(SettingError, match="weights names the entry"):
            load_weights(model, ema, weights=weights)  # type: ignore[arg-type]
    assert_says(refusal(model, 7), "A path is a string", "got int")
    assert_says(refusal(model, [ema]), "got list")


# --- Heads -----------------------------------------------------------------------------------------------------------

_HEAD_KEYS = {
    "REPA": [f"projectors.{k}.{i}.{name}" for k in (0, 1) for i in (0, 2, 4) for name in ("weight", "bias")],
    "released": [f"projectors.{i}.{name}" for i in (0, 2, 4) for name in ("weight", "bias")],
    "released, stage 1": ["projectors.0.weight", "projectors_final.linear.weight", "projectors_final.linear.bias"],
}


@pytest.mark.parametrize("kind", _HEAD_KEYS)
def test_heads_of_the_saved_model_are_left_out_and_reported(model: ToyDiT, ema: State, kind: str) -> None:
    heads = {f"module.{key}": torch.zeros(3) for key in _HEAD_KEYS[kind]}
    report = load_weights(model, {"ema": renamed(ema, lambda key: f"module.{key}") | heads})
    assert report.left_out == tuple(_HEAD_KEYS[kind])
    assert_equal(model, ema)


@pytest.mark.parametrize(
    "key", ["projectors.1.weight", "projectors.0.0.scale", "projectors_final.norm.weight", "head.0.weight"]
)
def test_any_other_extra_key_is_an_error(model: ToyDiT, ema: State, key: str) -> None:
    assert_says(refusal(model, ema | {key: torch.zeros(3)}), "Extra, not in the model (1):", f"{key} (3,)")


def test_a_model_with_heads_of_its_own_gets_them_strictly(ema: State) -> None:
    model = ToyDiT(seed=0)
    model.projectors = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.SiLU(), nn.Linear(2, 2))])
    heads = {key: torch.ones_like(value) for key, value in model.state_dict().items() if key.startswith("projectors")}
    assert load_weights(model, ema | heads).left_out == ()
    assert_equal(model, ema | heads)
    assert_says(refusal(model, ema), "Missing, of the model's 35 (4):", "projectors.0.0.weight (2, 2)")
    wider = heads | {"projectors.0.4.weight": torch.ones(2, 2)}
    assert_says(refusal(model, ema | wider), "Extra, not in the model (1):", "projectors.0.4.weight")


# --- Fit -------------------------------------------------------------------------------------------------------------


def test_missing_extra_and_misshapen_keys_are_listed_with_the_nearest(
    model: ToyDiT, ema: State, tmp_path: Path
) -> None:
    ema["blocks.1.qvk.bias"] = ema.pop("blocks.1.qkv.bias")
    ema["y_embedder.weight"] = torch.zeros(10, 8)
    ema["counter"] = torch.zeros(())
    del ema["pos_embed"]
    torch.save({"ema": ema}, tmp_path / "run.pt")
    message = refusal(model, tmp_path / "run.pt")
    assert_says(
        message,
        f"{tmp_path / 'run.pt'}, entry 'ema', does not fit ToyDiT; nothing was loaded.",
        "Missing, of the model's 31 (2):",
        "  pos_embed (1, 16, 8), a buffer; nearest: none",
        "  blocks.1.qkv.bias (24,); nearest: 'blocks.1.qvk.bias'",
        "Extra, not in the model (1):\n  blocks.1.qvk.bias (24,); nearest: 'blocks.1.qkv.bias'",
        "Of another shape (1):\n  y_embedder.weight: saved (10, 8), model (11, 8)",
        "Of another dtype (1):\n  counter: saved torch.float32, model torch.int64",
        "Build the model with the settings of the run",
    )


def test_long_lists_are_cut_and_counted(model: ToyDiT) -> None:
    message = refusal(model, {f"layer.{i}": torch.zeros(1) for i in range(1000)})
    assert_says(message, "Missing, of the model's 31 (31):", "... and 23 more", "(1000):", "... and 992 more")
    assert len(message) < 4000


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_only_floating_point_converts_to_floating_point(model: ToyDiT, ema: State, dtype: torch.dtype) -> None:
    ema["final_layer.bias"] = torch.ones(16).to(dtype)
    assert_says(refusal(model, ema), "Of another dtype (1):", f"saved {dtype}, model torch.float32")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, -1])
def test_weights_that_are_not_finite_are_counted(model: ToyDiT, ema: State, bad: float, place: int) -> None:
    ema["final_layer.weight"].view(-1)[[place, 5]] = bad
    message = refusal(model, ema)
    assert_says(
        message, "2 of 128 values under 'final_layer.weight'", "not finite in torch.float32", "earlier checkpoint"
    )


def test_weights_that_overflow_the_models_dtype_are_refused(ema: State) -> None:
    ema["final_layer.bias"][3] = 1e5
    assert_says(
        refusal(ToyDiT(seed=0).half(), ema), "1 of 16 values under 'final_layer.bias'", "finite in torch.float16"
    )
    load_weights(ToyDiT(seed=0).bfloat16(), ema)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.out = nn.Linear(3, 5, bias=False)
        self.out.weight = self.embed.weight


@pytest.mark.parametrize("kept", [["embed.weight"], ["out.weight"], ["embed.weight", "out.weight"]])
def test_of_tied_weights_one_is_enough(tmp_path: Path, kept: list[str]) -> None:
    value = torch.arange(15.0).view(5, 3)
    save_file({key: value.clone() for key in kept}, tmp_path / "a.safetensors")
    torch.save(dict.fromkeys(kept, value), tmp_path / "a.pt")  # as torch saves them: one storage
    for name in ("a.safetensors", "a.pt"):
        model = Tied()
        load_weights(model, tmp_path / name)
        assert torch.equal(model.embed.weight, value)
        assert model.out.weight is model.embed.weight


def test_tied_weights_saved_with_other_values_are_refused() -> None:
    message = refusal(Tied(), {"embed.weight": torch.ones(5, 3), "out.weight": torch.zeros(5, 3)})
    assert_says(message, "different values under 'embed.weight' and 'out.weight'", "one tensor in the model", "Untie")


# --- Models that cannot take weights ---------------------------------------------------------------------------------


def test_a_model_without_data_is_refused(ema: State) -> None:
    with torch.device("meta"):
        model = nn.Linear(3, 3)
    with pytest.raises(
        CheckpointError, match=r"(?s)Linear cannot take weights: its 'weight' has no data here.*to_empty"
    ):
        load_weights(model, {"weight": torch.ones(3, 3), "bias": torch.ones(3)})
    with pytest.raises(CheckpointError, match="LazyLinear cannot take weights: its 'weight' has no data"):
        load_weights(nn.LazyLinear(3), {"weight": torch.ones(3, 3)})


def test_a_model_whose_state_dict_is_made_of_copies_is_refused(model: ToyDiT, ema: State) -> None:
    def copies(module: nn.Module, state: dict[str, Any], *_: Any) -> None:
        state["final_layer.bias"] = state["final_layer.bias"].detach().clone()  # as a sharded model's hooks gather

    model._register_state_dict_hook(copies)
    message = refusal(model, ema)
    assert_says(message, "ToyDiT cannot take weights: its 'final_layer.bias'", "before the model is sharded")


def test_a_file_that_holds_the_same_weights_twice_is_refused(model: ToyDiT, ema: State) -> None:
    twice = ema | {"module.final_layer.bias": torch.zeros(16)}
    assert_says(refusal(model, twice), "the weights 'final_layer.bias' twice, under different prefixes")


class Child(nn.Module):
    """A block with a child that is called as DDP calls what it wraps, and is none."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.module = nn.LayerNorm(2), nn.Sequential(nn.Linear(2, 2))
        self.norm.weight.data.uniform_(generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rename", [str, "module.{}".format, lambda key: key.replace("module.0", "module._orig_mod.0")])
@pytest.mark.parametrize("build", [Child, lambda: nn.ModuleDict({"module": Child(), "b": Child()})])
def test_a_child_that_is_called_module_keeps_its_name(build: Callable[[], nn.Module], rename: Any) -> None:
    source, model = build(), build()
    state = source.state_dict()
    assert list(st.strip(source)) == list(state)
    load_weights(model, {rename(key): value for key, value in state.items()})
    assert_equal(model, state)


# --- Averages and prefixes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["state_dict_ema", "model_ema", "averaged", "ema_state_dict", "swa_model", "EMA"])
def test_what_looks_like_an_average_is_named_and_taken_by_its_name(
    model: ToyDiT, ema: State, raw: State, name: str
) -> None:
    content = {"model": raw, name: ema, "schema": {"a": torch.ones(1)}}
    message = refusal(model, content)
    assert_says(message, f"and {name!r} looks like an average", f"pass weights={name!r} or weights='model'")
    assert load_weights(model, content, weights=name).entry == name
    assert_equal(model, ema)


@pytest.mark.parametrize(
    ("content", "weights"),
    [
        (lambda raw, ema: {"state_dict": raw, "callbacks": {"EMA": {"weights": ema}}}, "callbacks.EMA.weights"),
        (lambda raw, ema: {"ema": {"step": torch.ones(()), **below("ema_model", ema)}}, "ema.ema_model"),
        (lambda raw, ema: {"state_dict": {**below("net", raw), **below("net_ema", ema)}}, "state_dict.net_ema"),
        (lambda raw, ema: below("model", raw) | below("ema", ema), "ema."),
        (lambda raw, ema: {"epoch": 3, "state_dict": below("module.net", ema)}, "state_dict.module.net"),
        (lambda raw, ema: below("net", ema), "net"),
        (lambda raw, ema: {"module": ema, "global_steps": 3, "ds_config": {}}, "module"),
    ],
)
def test_weights_reaches_below_entries_and_prefixes_and_the_error_says_so(
    model: ToyDiT, ema: State, raw: State, content: Any, weights: str
) -> None:
    made = content(raw, ema)
    message = refusal(model, made)
    assert_says(message, f"weights={weights!r}")
    load_weights(model, made, weights=weights)
    assert_equal(model, ema)


# --- What a model's tensors can be -----------------------------------------------------------------------------------


def test_a_mask_of_minus_infinity_is_no_defect() -> None:
    def build(value: float) -> nn.Module:
        model = nn.Linear(2, 2)
        model.register_buffer("mask", torch.full((2, 2), value).triu(1))
        return model

    model, state = build(0.0), build(-math.inf).state_dict()
    load_weights(model, state)
    assert_equal(model, state)
    assert_says(refusal(model, state | {"mask": torch.full((2, 2), math.inf)}), "4 of 4 values under 'mask'")
    assert_says(refusal(model, state | {"bias": torch.full((2,), -math.inf)}), "2 of 2 values under 'bias'")


@pytest.mark.parametrize("make", [lambda: torch.zeros(1).expand(3), lambda: torch.zeros(4).as_strided((3, 2), (1, 1))])
def test_a_buffer_whose_elements_share_memory_is_loaded(make: Callable[[], Tensor], tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("table", make())
    values = torch.arange(float(make().numel())).reshape(make().shape)
    for table in (values, torch.ones(1).expand(make().shape)):
        torch.save(model.state_dict() | {"bias": torch.ones(2), "table": table}, tmp_path / "a.pt")
        load_weights(model, tmp_path / "a.pt")
        assert torch.equal(model.table, table)


def test_a_model_of_inference_tensors_is_refused_before_anything_is_written() -> None:
    with torch.inference_mode():
        model = nn.Linear(2, 2)
    assert_says(refusal(model, {"weight": torch.ones(2, 2), "bias": torch.ones(2)}), "cannot take weights")


def test_no_message_is_as_long_as_the_file_makes_it(model: ToyDiT, ema: State) -> None:
    class Odd:
        def __repr__(self) -> str:
            raise RecursionError

    axes = torch.ones([1] * 5000)
    for content in (
        {axes: 1},
        {Odd(): 1},
        {"ema": {axes: 1}},
        {"ema": ema | {"counter": axes}},
        ema | {"x" * 10**6: axes},
    ):
        assert len(refusal(model, content)) < 4000


# --- Adapters --------------------------------------------------------------------------------------------------------


def adapted(seed: int, **settings: Any) -> nn.Module:
    """The toy with an adapter on its attention; the seed is the adapter's alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what PEFT imports
        peft = pytest.importorskip("peft")
        model: nn.Module = peft.get_peft_model(ToyDiT(), peft.LoraConfig(r=2, target_modules=["qkv"], **settings))
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
    state = read_checkpoint(tmp_path)
    key = next(iter(state))
    assert_says(refusal(model, {k: v for k, v in state.items() if k != key}), "Missing, of the model's", key)
    assert_says(refusal(model, state | {"x.lora_A.weight": torch.ones(2, 4)}), "Extra, not in the model (1)")
    assert_says(refusal(model, state | {key: torch.ones(3, 4)}), "Of another shape (1)")
    assert_says(refusal(ToyDiT(), tmp_path), "These are the weights of an adapter", "peft.get_peft_model(model")


def test_an_adapter_of_another_scale_is_refused(tmp_path: Path) -> None:
    adapted(1, lora_alpha=16).save_pretrained(tmp_path)  # type: ignore[operator]
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        assert_says(refusal(adapted(2), path), "was trained with lora_alpha=16", "'default' has 8")


# --- Tensors that are no weights -------------------------------------------------------------------------------------


class Subclass(Tensor):
    pass


def _quantised() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates making them, and files hold them
        return torch.quantize_per_tensor(torch.ones(16), 0.1, 0, torch.qint8)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.zeros(16, device="meta"), "a tensor on the meta device"),
        (torch.zeros(16).to_sparse(), "a nested, quantised or sparse tensor"),
        (_quantised(), "a nested, quantised or sparse tensor"),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), "a NestedTensor"),
        (torch.zeros(16).as_subclass(Subclass), "a Subclass"),
        ([0.0] * 16, "a list"),
    ],
)
def test_tensors_without_their_own_data_are_refused(model: ToyDiT, ema: State, value: Any, said: str) -> None:
    ema["final_layer.bias"] = value
    assert_says(refusal(model, {"ema": ema}), "entry 'ema', has under 'final_layer.bias'", said)


# --- Files of torch.save ---------------------------------------------------------------------------------------------

DATA: dict[str, Any] = {
    "size": torch.Size([1, 2]),
    "dtype": torch.int64,
    "set": {1, 2},
    "frozenset": frozenset([1]),
    "bytes": b"abc",
    "Counter": Counter("aab"),
    "complex": 1 + 2j,
    "keys": {(1, 2): 3, 4: 5},
    "uint16": torch.ones(3, dtype=torch.uint16),
    "range": range(3),
    "slice": slice(1, None),
    "path": PurePosixPath("runs/17"),
    "namespaces": (argparse.Namespace(lr=1e-4), SimpleNamespace(a=1)),
    "long": 2**400,
    "when": datetime.now(),
}


@pytest.mark.parametrize("legacy", [False, True])
def test_plain_data_beside_the_weights_is_read(model: ToyDiT, ema: State, tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "a.pt"
    data = {key: value for key, value in DATA.items() if key != "uint16" or not legacy}  # which torch cannot read so
    torch.save({"ema": ema, "args": data}, path, _use_new_zipfile_serialization=not legacy)
    load_weights(model, path)
    assert_equal(model, ema)
    args = read_checkpoint(path)["args"]
    assert all(torch.equal(args[k], v) if isinstance(v, Tensor) else args[k] == v for k, v in data.items())


def test_a_run_folder_among_the_arguments_becomes_a_path_that_touches_nothing(ema: State, tmp_path: Path) -> None:
    torch.save({"ema": ema, "args": argparse.Namespace(out=tmp_path)}, tmp_path / "a.pt")
    assert type(read_checkpoint(tmp_path / "a.pt")["args"].out) is PurePosixPath


class Persistent(nn.Linear):
    """Pickled as EDM's networks are: a function and a dictionary that says what it was."""

    def __reduce__(self) -> Any:
        return _persistent, ({"type": "class", "state": self.__dict__},)


def _persistent(meta: dict[str, Any]) -> nn.Module:
    made = nn.Linear(2, 2)
    made.__dict__.update(meta["state"])
    return made


class Config(dict[str, Any]):
    pass


def _raw_pickle(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


def _legacy(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


WRITERS: list[Callable[[Any, Path], Any]] = [torch.save, _legacy, _raw_pickle]
CONTENTS: dict[str, Callable[[nn.Linear], Any]] = {
    "a loop's, with a configuration": lambda net: {
        "ema": net.state_dict(),
        "model": net.state_dict(),
        "c": Config(a=1),
    },
    "one entry of another name": lambda net: {"module": {**net.state_dict(), "extra": Config()}, "step": 3},
    "EDM2's": lambda net: {"ema": net, "encoder": Config(), "dataset_kwargs": {"a": 1}},
    "a module": lambda net: net,
    "a state dict with more": lambda net: {**net.state_dict(), "epoch": Config()},
}


@pytest.mark.parametrize("kind", [nn.Linear, Persistent])
@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("which", CONTENTS)
def test_the_remedy_of_a_refused_file_works_on_it(
    which: str,
    write: Callable[[Any, Path], Any],
    kind: type[nn.Linear],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, model, entry = kind(2, 2), nn.Linear(2, 2), "module" if which.startswith("one entry") else "ema"
    write(CONTENTS[which](net), tmp_path / "a.pt")
    message = refusal(model, tmp_path / "a.pt")
    assert_says(message, "is refused, and nothing of it was run: it asks for ", "If you trust the file")
    monkeypatch.chdir(tmp_path)
    exec(textwrap.dedent(message.split("made with:\n")[1]), {})
    load_weights(model, "weights.pt", weights=entry)
    assert_equal(model, net.state_dict())


class Bomb:
    """Writes a file if a trusting reader loads it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_an_older_pytorch_warns_of_pt_files(tmp_path: Path, model: ToyDiT, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(model.state_dict(), tmp_path / "stage1.pt")
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.9.1+cu128"))
    with pytest.warns(UserWarning, match=r"stage1\.pt: PyTorch 2\.9\.1\S* can be made to run code .* fixed in 2\.10"):
        read_checkpoint(tmp_path / "stage1.pt")


@pytest.mark.parametrize("write", WRITERS)
def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path, model: ToyDiT, ema: State, write: Any) -> None:
    marker, path = tmp_path / "ran", tmp_path / "bomb.pt"
    write({"ema": ema, "args": Bomb(marker)}, path)
    asks = "what torch.save never writes" if write is _raw_pickle else "posix.mkdir"
    assert_says(refusal(model, path), f"nothing of it was run: it asks for {asks}, not plain data")
    assert not marker.exists()
    pickle.loads(pickle.dumps(Bomb(marker)))
    assert marker.exists(), "the bomb is a dud: it does not go off in a trusting reader either"


def test_what_others_have_allowed_stays_allowed(tmp_path: Path, model: ToyDiT, ema: State) -> None:
    torch.save({"ema": ema, "args": _ARGS}, tmp_path / "run.pt")
    before = set(torch.serialization.get_safe_globals())
    load_weights(model, tmp_path / "run.pt")
    assert set(torch.serialization.get_safe_globals()) == before
    with torch.serialization.safe_globals([argparse.Namespace]):
        load_weights(model, tmp_path / "run.pt")
        assert argparse.Namespace in torch.serialization.get_safe_globals()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_that_is_rewritten_in_place_ends_no_process(tmp_path: Path, suffix: str) -> None:
    """A loop writes ``last.pt`` over and over while this one reads it: whole, or refused."""
    path = tmp_path / f"last{suffix}"
    code = (
        "import sys, torch, safetensors.torch as s\n"
        "for i in range(10**6):\n"
        "    state = {k: torch.full((300, 300), float(i)) for k in 'ab'}\n"
        f"    {'torch.save(state, sys.argv[1])' if suffix == '.pt' else 's.save_file(state, sys.argv[1])'}\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, path])
    try:
        deadline = time.monotonic() + 60
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        for _ in range(60):
            try:
                state = read_checkpoint(path)
            except CheckpointError:
                continue
            assert len({float(value) for tensor in state.values() for value in tensor.unique()}) == 1
    finally:
        writer.kill()
        writer.wait()


@pytest.mark.parametrize("family", ["one_file", "sharded", "torch_file"])
def test_damaged_files_are_loaded_whole_or_refused(tmp_path: Path, family: str) -> None:
    corpus = Corpus(tmp_path)
    messages = [judge(FAMILIES[family](corpus, random.Random(case))) for case in range(60)]
    assert sum(message is not None for message in messages) > 30


# --- Broken and foreign files ----------------------------------------------------------------------------------------


def test_a_path_that_is_not_there_names_the_nearest(model: ToyDiT, tmp_path: Path) -> None:
    (tmp_path / "0400000.pt").touch()
    assert_says(refusal(model, tmp_path / "040000.pt"), "There is no file", "'0400000.pt'", "hf_hub_download")
    assert_says(refusal(model, tmp_path / "none" / "a.pt"), "There is no file", "Nearest in its folder: none")


def test_files_of_another_format_are_refused(model: ToyDiT, ema: State, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    for data in (b"", b"x", b"PK\x03\x04"):
        path.write_bytes(data)
        assert_says(refusal(model, path), "cannot be read as a checkpoint")
    with zipfile.ZipFile(path, "w") as file:  # as torch.jit.save writes programs
        file.writestr("a/data.pkl", pickle.dumps({}))
        file.writestr("a/constants.pkl", pickle.dumps(()))
        file.writestr("a/version", "3")
    assert_says(refusal(model, path), "TorchScript")


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), "text", None])
def test_a_file_that_holds_no_dictionary_is_refused(model: ToyDiT, tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "a.pt")
    assert_says(refusal(model, tmp_path / "a.pt"), f"holds a {type(content).__name__}", "a checkpoint is a dictionary")


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_a_truncated_file_is_refused_at_every_length(model: ToyDiT, ema: State, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    torch.save(ema, path) if name == "a.pt" else save_file(ema, path)
    data = path.read_bytes()
    for length in range(0, len(data), 997):
        path.write_bytes(data[:length])
        refusal(model, path)
    path.write_bytes(data)
    load_weights(model, path)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "F99"},
        {"shape": [17]},
        {"shape": [2**40, 2**40]},
        {"shape": [16.0]},
        {"shape": [-4, -4]},
        {"data_offsets": [0, 2**40]},
        {"data_offsets": [4, 68]},
        {"shape": [32], "data_offsets": [0, 128]},
        {"shape": [8], "data_offsets": [0, 32]},
    ],
)
def test_a_safetensors_header_that_contradicts_the_file_is_refused(
    model: ToyDiT, tmp_path: Path, change: dict[str, Any]
) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]} | change}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    assert_says(refusal(model, path), "cannot be read as a checkpoint: SafetensorError")
    path.write_bytes(struct.pack("<Q", 2**63))
    assert_says(refusal(model, path), f"announces a header of {2**63} bytes; at most {2 << 20} are read")


# --- Shards and folders ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../a.safetensors", "/etc/a.safetensors", "sub/a.safetensors", "..\\a.safetensors", "a.pt", "..", ""]
)
def test_an_index_cannot_name_a_file_elsewhere(model: ToyDiT, ema: State, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    index = save_shards(ema, folder)
    for place in (tmp_path, folder / "sub"):
        place.mkdir(exist_ok=True)
        save_file(ema, place / "a.safetensors")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(ema, name)}))
    assert_says(refusal(model, index), repr(name), "no plain name of a .safetensors file")


def test_a_shard_cannot_be_a_link_elsewhere(model: ToyDiT, ema: State, tmp_path: Path) -> None:
    index = save_shards(ema, tmp_path / "folder")
    shard = tmp_path / "folder" / "model-00001-of-00002.safetensors"
    (tmp_path / "elsewhere").mkdir()
    moved = shard.rename(tmp_path / "elsewhere" / shard.name)
    shard.symlink_to(moved)
    assert_says(refusal(model, index), "'model-00001-of-00002.safetensors'", "a link out of its folder")


def test_the_links_of_the_hubs_cache_are_followed(model: ToyDiT, ema: State, tmp_path: Path) -> None:
    snapshot_folder = tmp_path / "models--me--sit" / "snapshots" / "abc" / "transformer"
    blobs = tmp_path / "models--me--sit" / "blobs"
    blobs.mkdir(parents=True)
    save_shards(ema, snapshot_folder)
    for i, path in enumerate(sorted(snapshot_folder.iterdir())):
        path.rename(blobs / f"{i}")
        path.symlink_to(Path("../../../blobs") / f"{i}")
    load_weights(model, snapshot_folder)
    assert_equal(model, ema)


def test_index_and_shards_have_to_agree(model: ToyDiT, ema: State, tmp_path: Path) -> None:
    index = save_shards(ema, tmp_path)
    good = json.loads(index.read_text())["weight_map"]
    names = sorted(set(good.values()))

    def said(weight_map: Any, *parts: str) -> None:
        index.write_text(json.dumps({"weight_map": weight_map}))
        assert_says(refusal(model, index), *parts)

    said(good | {"pos_embed": names[1]}, "disagree", "only: 'pos_embed'")
    said({k: v for k, v in good.items() if k != "pos_embed"}, "disagree", "In the shard only: 'pos_embed'")
    said(good | {"new": names[0]}, "disagree", "In the index only: 'new'")
    said(good | {"new": "c.safetensors"}, "names the shard 'c.safetensors', which is not there")
    for odd in ([], None, {"a": 1}, {"a": None}):
        said(odd, "has no 'weight_map' from keys to file names")
    index.write_text('{"weight_map": {"a": "b.safetensors", "a": "c.safetensors"}}')
    assert_says(refusal(model, index), "has the key 'a' twice")
    index.write_text("[" * 100_000)
    assert_says(refusal(model, index), "cannot be read as a checkpoint: RecursionError")
    index.write_text(json.dumps({"weight_map": good}))
    load_weights(model, index)


def test_a_folder_has_to_hold_exactly_one_set_of_weights(model: ToyDiT, ema: State, tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    message = refusal(model, tmp_path)
    assert_says(message, "holds 0 of 'diffusion_pytorch_model.safetensors'", "'model_index.json', 'transformer/'")
    assert_says(message, "exactly one is needed", "Pass the path of the file")
    save_file(ema, tmp_path / "model.safetensors")
    save_shards(ema, tmp_path)
    assert_says(refusal(model, tmp_path), "holds 2 of", "'model.safetensors.index.json'")


def test_an_index_cannot_name_more_shards_than_any_model_has(model: ToyDiT, tmp_path: Path) -> None:
    index = tmp_path / "a.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {f"a{i}": f"{i}.safetensors" for i in range(1025)}}))
    assert_says(refusal(model, index), "names 1025 shards; at most 1024 are read")


@pytest.mark.parametrize("path", [None, 7, b"a.pt", "a" * 5000, "a\0b", ["a"]])
def test_what_names_no_file_is_refused(path: Any) -> None:
    with pytest.raises(CheckpointError):
        read_checkpoint(path)


def test_a_folder_that_may_not_be_read_is_refused(
    model: ToyDiT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", denied)  # as for anyone but root, who runs some of the tests
    assert_says(refusal(model, tmp_path / "a.pt"), "PermissionError", "Permission denied")


def test_json_is_read_and_what_went_wrong_is_chained(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text('{"a": [1, null, "é"]}', encoding="utf-8")
    assert read_json(tmp_path / "c.json") == {"a": [1, None, "é"]}
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint: FileNotFoundError") as info:
        read_json(tmp_path / "none.json")
    assert isinstance(info.value.__cause__, FileNotFoundError)
    (tmp_path / "c.json").write_text(" " * (3 << 20))
    with pytest.raises(CheckpointError, match="is longer than 2097152 bytes"):
        read_json(tmp_path / "c.json")
