"""Teachers that are saved and come back: what is in the files, what is the same, what is refused."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file
from tiny_artefacts import TinyDiT, call, checkpointed, config_of, load_teacher, make_teacher, refused
from torch import Tensor, nn

import selftrans_reg as st
from selftrans_reg.artefacts import FORMAT_VERSION
from selftrans_reg.errors import PrunedModuleError, SettingError


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    make_teacher().save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


# --- What is in the files --------------------------------------------------------------------------------------------


def test_a_teacher_is_three_files_without_what_it_never_runs(tmp_path: Path) -> None:
    teacher, source = make_teacher(), TinyDiT(seed=1).state_dict()
    details: dict[str, Any] = {"source": "run 17", "step": 9, "latent_scale": 0.18215, "licence": "mit"}
    teacher.save_pretrained(tmp_path, **details, latent_shift=(0.5, -1.0), latent_shape=torch.Size([2, 4, 4]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    details |= {"latent_shift": [0.5, -1.0], "latent_shape": [2, 4, 4]}
    assert load_teacher(tmp_path).provenance == details
    tensors = load_file(tmp_path / "model.safetensors")
    assert torch.equal(tensors.pop("null_condition.1"), torch.tensor([0.5, -1.0, 0.1]))
    assert set(tensors) == {key for key in source if not key.startswith(("blocks.2", "final_layer"))}
    assert all(torch.equal(tensors[key], source[key]) for key in tensors)
    config = config_of(tmp_path)
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["selftrans_reg"]) == config
    assert re.fullmatch("[0-9a-f]{64}", config.pop("sha256"))
    assert config == {
        "kind": "teacher",
        "format_version": FORMAT_VERSION,
        "library_version": st.__version__,
        "layer": "blocks.1",
        "guidance_scale": 3.0,
        "null": [{"path": ["y"], "value": 5}, {"path": ["text"], "tensor": "null_condition.1"}],
        "call": {"x": "x", "t": "t", "shared": [], "fixed": {}},
        "select": None,
        "tokens": None,
        "time": "repa",
        "hidden_size": 4,
        "dropped": ["blocks.2", "final_layer"],
        "backbone": "TinyDiT",
        "fingerprint": bytes(teacher.fingerprint.tolist()).hex(),
        **details,
    }


def test_a_checkpoints_name_and_step_are_kept_unless_said_otherwise(tmp_path: Path) -> None:
    torch.save({"ema": TinyDiT().state_dict(), "steps": 700}, tmp_path / "0700.pt")
    settings = {"layer": "blocks.1", "guidance_scale": 2.0, "null": {"y": 5}, "hidden_size": 4}
    teacher = st.build_teacher(TinyDiT(), tmp_path / "0700.pt", **settings)
    assert teacher.provenance == {"source": "0700.pt", "step": 700}
    teacher.save_pretrained(tmp_path / "a", source="run 17")
    assert load_teacher(tmp_path / "a").provenance == {"source": "run 17", "step": 700}


# --- What comes back -------------------------------------------------------------------------------------------------


def first_label(arguments: dict[str, Any]) -> Tensor:
    return torch.zeros_like(arguments["y"])


class Prompted(TinyDiT):
    """Takes its conditions by words, nested, and from arguments whose samples are on another axis or in a list."""

    def forward(self, sample: Tensor, time: Tensor, cond: dict[str, Any], layers: Tensor, ratio: float) -> Tensor:  # type: ignore[override]
        y = torch.tensor([1 if cond["prompt"] else 5]).expand(len(sample))
        return super().forward(sample, time, y, cond["texts"][0] + layers.sum(0) + ratio)


def prompted(seed: int) -> dict[str, Any]:
    given = call(seed)
    cond = {"prompt": "a\ncat", "texts": [given["text"]]}
    return {"sample": given["x"], "time": given["t"], "cond": cond, "layers": given["text"][None] / 2, "ratio": 1.0}


def halves(arguments: dict[str, Any]) -> Tensor:
    return arguments["cond"]["texts"][0] / 2


class Odd(TinyDiT):
    """With tied weights, a mask, a buffer made by expand(), and a table that is in no state dict."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.blocks[1][0].weight = self.blocks[0][0].weight
        self.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))
        self.register_buffer("table", torch.arange(4.0).expand(3, 4))
        self.register_buffer("pos_embed", torch.arange(16.0).reshape(1, 4, 4) / 7, persistent=False)


def of_parts(seed: int = 0) -> nn.Module:
    """Two weights are one tensor's, strided."""
    model = TinyDiT(seed=seed)
    both = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(seed))
    model.blocks[0][0].weight.data, model.blocks[1][0].weight.data = both.transpose(1, 2).unbind()
    return model


FLIP = functools.partial(torch.flip, dims=[1])
MINE = st.TimeConvention("mine", alpha=lambda t: 1 - t, sigma=lambda t: t)
PROMPTED: dict[str, Any] = {
    "null": {"cond": {"prompt": "", "texts": {0: halves}}},
    "call": {"x": "sample", "t": "time", "fixed": {"ratio": 0.5}, "shared": ["ratio"], "rows": {"layers": 1}},
    "example": prompted(0),
}
FIRST = {"text": torch.ones(3), "y": first_label}
TEACHERS: dict[str, tuple[Any, dict[str, Any], dict[str, Any], str]] = {  # model, settings, what loading asks for, how
    "as it is": (TinyDiT, {}, {}, ""),
    "before its first call": (TinyDiT, {"example": None}, {}, ""),
    "without a time convention": (TinyDiT, {"time": None}, {}, ""),
    "a null condition of one number": (TinyDiT, {"null": {"text": 0.25}}, {}, ""),
    "a null condition of a boolean": (TinyDiT, {"null": {"y": True}}, {}, ""),
    "a slice of the tokens": (TinyDiT, {"tokens": slice(1, None)}, {}, ""),
    "a tokens function": (TinyDiT, {"tokens": FLIP}, {"tokens": FLIP}, "tokens=... (it was 'partial')"),
    "a selecting function": (TinyDiT, {"select": FLIP}, {"select": FLIP}, "select=... (it was 'partial')"),
    "a time of one's own": (TinyDiT, {"time": MINE}, {"time": MINE}, "time=... (it was 'mine')"),
    "a callable": (TinyDiT, {"null": FIRST}, {"null": {"y": first_label}}, "null={'y': ...} (it was 'first_label')"),
    "words, nested, along another axis": (
        Prompted,
        PROMPTED,
        {"null": {"cond": {"texts": {0: halves}}}},
        "null={'cond': {'texts': {0: ...}}} (it was 'halves')",
    ),
    "a wrapped model": (lambda seed: checkpointed(TinyDiT(seed=seed)), {}, {}, ""),
    "weights that are parts of one tensor": (of_parts, {}, {}, ""),
    "tied weights, masks, and tables": (Odd, {}, {}, ""),
}


@pytest.mark.parametrize("which", TEACHERS)
def test_a_loaded_teacher_gives_the_same_features_and_is_known_as_the_same(which: str, tmp_path: Path) -> None:
    build, settings, given, asked = TEACHERS[which]
    teacher, model = make_teacher(model=build(seed=1), **settings), build(seed=5)
    teacher.save_pretrained(tmp_path / "a")
    if asked:
        says = f"was saved with functions, which no file can hold. Pass them: {asked}."
        refused(load_teacher, tmp_path / "a", model, says=says)
    loaded = load_teacher(tmp_path / "a", model, **given)
    assert loaded.model is model
    assert torch.equal(loaded.fingerprint, teacher.fingerprint)
    loaded.save_pretrained(tmp_path / "b")
    assert config_of(tmp_path / "b") == config_of(tmp_path / "a")
    for seed in (1, 2):
        arguments = prompted(seed) if build is Prompted else call(seed)
        exact = 0 if build is not of_parts else 1e-6  # strided weights are summed in another order
        torch.testing.assert_close(loaded(**arguments), teacher(**arguments), rtol=0, atol=exact)
    assert (loaded.layer, loaded.guidance_scale, loaded.time) == (teacher.layer, teacher.guidance_scale, teacher.time)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_and_ties_come_back(dtype: torch.dtype, tmp_path: Path) -> None:
    teacher = make_teacher(model=Odd(seed=1)).to(dtype)
    teacher.save_pretrained(tmp_path / "a")
    assert "blocks.1.0.weight" not in load_file(tmp_path / "a" / "model.safetensors")
    loaded = load_teacher(tmp_path / "a", Odd)
    assert loaded.model.blocks[1][0].weight is loaded.model.blocks[0][0].weight
    assert {value.dtype for value in (*loaded.model.parameters(), *loaded.model.buffers())} == {dtype}
    assert all(torch.equal(getattr(loaded.model, name), getattr(teacher.model, name)) for name in ("mask", "table"))
    arguments = {key: value if key == "y" else value.to(dtype) for key, value in call(1).items()}
    assert torch.equal(loaded(**arguments), teacher(**arguments))
    refused(load_teacher, tmp_path / "a", TinyDiT(), says=("Missing", "blocks.1.0.weight"))
    teacher = make_teacher()
    teacher.model.y_embedder.to(dtype)  # of several, each weight keeps its own
    teacher.save_pretrained(tmp_path / "b")
    pairs = list(zip(load_teacher(tmp_path / "b").parameters(), teacher.parameters(), strict=True))
    assert all(torch.equal(p, q) and p.dtype == q.dtype for p, q in pairs)


# --- What is refused -------------------------------------------------------------------------------------------------


class Other(TinyDiT):
    def forward(self, sample: Tensor, t: Tensor, y: Tensor, text: Tensor) -> Tensor:
        return super().forward(sample, t, y, text)


def test_a_model_that_does_not_fit_stays_as_it_was(saved: Path) -> None:
    for model, says in (
        (TinyDiT(width=6), "blocks.0.0.weight: saved (4, 4), model (6, 6)"),
        (TinyDiT(depth=4), "blocks.3.0.weight (4, 4)"),
        (TinyDiT(depth=1), "blocks.1.0.weight"),
        (Other(), "names 'x', which Other.forward does not take"),
    ):
        says_so = (f"does not fit {type(model).__name__}", says, "It was saved from TinyDiT.")
        refused(load_teacher, saved, model, says=says_so)


def test_a_model_needs_nothing_that_was_dropped_and_says_so_when_it_is_used(saved: Path) -> None:
    assert torch.equal(load_teacher(saved, TinyDiT(depth=2))(**call(1)), make_teacher()(**call(1)))
    with pytest.raises(PrunedModuleError, match=r"'blocks\.2' of the teacher was used, but it was dropped"):
        load_teacher(saved).model(**call())


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"tokens": slice(1, None)}, "was saved with tokens=None, which is kept"),
        ({"select": 1}, "was saved with select=None"),
        ({"time": st.TimeConvention.named("sit")}, "was saved with another time convention: 'mine'"),
        ({"time": MINE, "null": {"y": 4}}, "null= also names [('y',)]"),
        ({"null": 4}, "null= maps argument names"),
        ({"time": MINE, "model": dict}, "it made dict"),
        ({"time": MINE, "model": st.share_frozen(TinyDiT())}, "pass a model of its own, not share_frozen"),
    ],
)
def test_what_was_saved_cannot_be_replaced(tmp_path: Path, given: dict[str, Any], says: str) -> None:
    make_teacher(time=MINE).save_pretrained(tmp_path)
    with pytest.raises(SettingError, match=re.escape(says)):
        load_teacher(tmp_path, **given)
