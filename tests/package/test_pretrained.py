"""Teachers and criteria that are saved and come back: what is in the files, what is the same, what is refused."""

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
from tiny_artefacts import (
    FILES,
    TinyDiT,
    assert_says,
    call,
    config_of,
    load_teacher,
    make_teacher,
    names_in,
    refusal,
    rewrite,
)
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import selftrans_reg as st
from selftrans_reg.artefacts import FORMAT_VERSION
from selftrans_reg.errors import CheckpointError, PrunedModuleError, SettingError


@pytest.fixture
def teacher() -> st.CFGFeatureTeacher:
    return make_teacher()


@pytest.fixture
def saved(teacher: st.CFGFeatureTeacher, tmp_path: Path) -> Path:
    teacher.save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


# --- Teacher: what is in the files -----------------------------------------------------------------------------------

KEPT = ["blocks.0.0", "blocks.1.0", "text_embedder", "x_embedder"]


def test_a_teacher_is_three_files_without_what_it_never_runs(saved: Path) -> None:
    assert names_in(saved) == FILES
    weights = {f"{name}.{kind}" for name in KEPT for kind in ("weight", "bias")} | {"pos_embed", "y_embedder.weight"}
    tensors = load_file(saved / "model.safetensors")
    assert set(tensors) == weights | {"null_condition.1"}
    source = TinyDiT(seed=1).state_dict()
    assert all(torch.equal(tensors[key], source[key]) for key in weights)
    assert torch.equal(tensors["null_condition.1"], torch.tensor([0.5, -1.0, 0.1]))


def test_the_config_of_a_teacher(teacher: st.CFGFeatureTeacher, tmp_path: Path) -> None:
    teacher.save_pretrained(
        tmp_path, source="run 17", step=9, latent_scale=0.18215, latent_shape=(2, 4, 4), licence="mit"
    )
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
        "source": "run 17",
        "step": 9,
        "latent_scale": 0.18215,
        "latent_shape": [2, 4, 4],
        "licence": "mit",
    }


def test_a_checkpoints_name_and_step_are_kept_unless_said_otherwise(tmp_path: Path) -> None:
    torch.save({"ema": TinyDiT().state_dict(), "steps": 700}, tmp_path / "0700.pt")
    settings = {"layer": "blocks.1", "guidance_scale": 2.0, "null": {"y": 5}, "hidden_size": 4}
    teacher = st.build_teacher(TinyDiT(), tmp_path / "0700.pt", **settings)
    assert teacher.provenance == {"source": "0700.pt", "step": 700}
    teacher.save_pretrained(tmp_path / "a")
    teacher.save_pretrained(tmp_path / "b", source="run 17", latent_scale=0.5)
    assert [config_of(tmp_path / name)["source"] for name in "ab"] == ["0700.pt", "run 17"]
    loaded = load_teacher(tmp_path / "b")
    assert loaded.provenance == {"source": "run 17", "step": 700, "latent_scale": 0.5}


def test_the_card_says_what_it_is_and_its_code_loads_it(
    teacher: st.CFGFeatureTeacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher.save_pretrained(tmp_path / "mine", source="https://example.org/17", licence="CC BY-NC 4.0", step=9)
    card = (tmp_path / "mine" / "README.md").read_text()
    for part in (
        *(
            "---\nlibrary_name: selftrans-reg\nlicense: other\nlicense_name: CC BY-NC 4.0\n",
            "| layer | blocks.1 |",
            "| guidance scale | 3.0 |",
        ),
        *("| null condition | y: 5, text: a tensor |", "| time convention | repa |", "| training step | 9 |"),
        *(
            "| trained in | https://example.org/17 |",
            "| licence | CC BY-NC 4.0 |",
            "@misc{sun2026selftranscendence",
            "2601.07773",
        ),
    ):
        assert part in card, part
    code = card.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"TinyDiT": TinyDiT}
    exec(code, namespace)
    assert torch.equal(namespace["teacher"].fingerprint, teacher.fingerprint)


# --- Teacher: what comes back ----------------------------------------------------------------------------------------


def first_label(arguments: dict[str, Any]) -> Tensor:
    return torch.zeros_like(arguments["y"])


class Streams(nn.Module):
    """A block with two outputs, of which the first is the tokens with one class token ahead."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.linear(tokens)
        return torch.cat([tokens[:, :1], tokens], dim=1), tokens


class Nested(TinyDiT):
    """Takes its conditions as a dictionary, under other names of x_t and t, and has blocks of two streams."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed=seed)
        generator = torch.Generator().manual_seed(seed + 100)
        self.streams = Streams()
        for p in self.streams.parameters():
            p.data = torch.randn(p.shape, generator=generator)

    def forward(self, cond: dict[str, Any], sample: Tensor, time: Tensor, ratio: float = 1.0) -> Tensor:  # type: ignore[override]
        tokens = self.x_embedder(sample).flatten(2).transpose(1, 2) + time[:, None, None] + ratio
        tokens = tokens + (self.y_embedder(cond["y"]) + self.text_embedder(cond["texts"][0]))[:, None]
        _, tokens = self.streams(tokens)
        return self.final_layer(tokens)


FLIP = functools.partial(torch.flip, dims=[1])
MINE = st.TimeConvention("mine", alpha=lambda t: 1 - t, sigma=lambda t: t)
TEACHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # settings, and what loading asks for
    "as it is": ({}, {}),
    "before its first call": ({"example": None}, {}),
    "without a time convention": ({"time": None}, {}),
    "a null condition of one number": ({"null": {"text": 0.25}}, {}),
    "a null condition of a boolean": ({"null": {"y": True}}, {}),
    "a callable null condition": (
        {"null": {"text": torch.ones(3), "y": first_label}},
        {"null": {"y": first_label}},
    ),
    "a slice of the tokens": ({"tokens": slice(1, None)}, {}),
    "a function for the tokens": ({"tokens": FLIP}, {"tokens": FLIP}),
    "a selecting function": ({"select": nn.Identity()}, {"select": nn.Identity()}),
    "a time convention of one's own": ({"time": MINE}, {"time": MINE}),
}


@pytest.mark.parametrize("which", TEACHERS)
def test_a_loaded_teacher_gives_the_same_features_and_is_known_as_the_same(which: str, tmp_path: Path) -> None:
    settings, given = TEACHERS[which]
    teacher = make_teacher(**settings)
    teacher.save_pretrained(tmp_path)
    model = TinyDiT(seed=5)
    loaded = load_teacher(tmp_path, model, **given)
    assert loaded.model is model
    assert torch.equal(loaded.fingerprint, teacher.fingerprint)
    for seed in (1, 2):
        assert torch.equal(loaded(**call(seed)), teacher(**call(seed)))
    keys = ("layer", "guidance_scale", "hidden_size", "time")
    assert [getattr(loaded, key) for key in keys] == [getattr(teacher, key) for key in keys]
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())


def test_a_nested_call_comes_back(tmp_path: Path) -> None:
    def halves(arguments: dict[str, Any]) -> Tensor:
        return arguments["cond"]["texts"][0] / 2

    teacher = st.build_teacher(
        Nested(seed=1),
        None,
        layer="streams",
        guidance_scale=2.0,
        null={"cond": {"y": 5, "texts": {0: halves}}},
        call={"x": "sample", "t": "time", "fixed": {"ratio": 0.5}, "shared": ["ratio"]},
        select=0,
        tokens=slice(1, None),
        hidden_size=4,
    )
    b = call()
    arguments = {"cond": {"y": b["y"], "texts": [b["text"]]}, "sample": b["x"], "time": b["t"]}
    expected = teacher(**arguments)
    teacher.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError) as error:
        load_teacher(tmp_path, Nested)
    assert_says(error, "null={'cond': {'texts': {0: ...}}}", "halves")
    loaded = load_teacher(tmp_path, Nested, null={"cond": {"texts": {0: halves}}})
    assert torch.equal(loaded(**arguments), expected)


@pytest.mark.parametrize("make", ["class", "function", "model"])
def test_the_model_is_given_as_a_class_a_function_or_itself(
    make: str, saved: Path, teacher: st.CFGFeatureTeacher
) -> None:
    models: dict[str, Any] = {"class": TinyDiT, "function": lambda: TinyDiT(4, 3, seed=2), "model": TinyDiT(seed=3)}
    assert torch.equal(load_teacher(saved, models[make])(**call(1)), teacher(**call(1)))


@pytest.mark.parametrize("dtypes", ["bfloat16", "float64", "mixed"])
def test_the_weights_keep_the_dtypes_in_which_they_were_saved(dtypes: str, tmp_path: Path) -> None:
    teacher = make_teacher()
    if dtypes == "mixed":
        teacher.model.y_embedder.to(torch.float64)
        teacher.model.x_embedder.to(torch.float32)
    else:
        teacher.to(getattr(torch, dtypes))
    teacher.save_pretrained(tmp_path)
    loaded = load_teacher(tmp_path)
    expected = {name: p.dtype for name, p in teacher.model.named_parameters()}
    assert {name: p.dtype for name, p in loaded.model.named_parameters()} == expected
    arguments = {k: v if dtypes == "mixed" or k == "y" else v.to(getattr(torch, dtypes)) for k, v in call(1).items()}
    if dtypes == "mixed":
        assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), teacher.parameters(), strict=True))
    else:
        assert torch.equal(loaded(**arguments), teacher(**arguments))


def test_what_is_in_no_state_dict_follows_the_dtype_of_the_weights(tmp_path: Path) -> None:
    class WithTable(TinyDiT):
        def __init__(self, seed: int = 0) -> None:
            super().__init__(seed=seed)
            self.register_buffer("pos_embed", torch.arange(16.0).reshape(1, 4, 4) / 7, persistent=False)

    settings = {"layer": "blocks.1", "guidance_scale": 2.0, "null": {"y": 5}, "hidden_size": 4}
    teacher = st.build_teacher(WithTable(seed=1), None, **settings).to(torch.bfloat16)
    teacher.save_pretrained(tmp_path)
    arguments = {key: value if key == "y" else value.bfloat16() for key, value in call(1).items()}
    assert torch.equal(load_teacher(tmp_path, WithTable)(**arguments), teacher(**arguments))


def test_a_loaded_teacher_is_saved_again_as_the_same(saved: Path, tmp_path: Path) -> None:
    loaded = load_teacher(saved)
    loaded.save_pretrained(tmp_path / "again")
    assert config_of(tmp_path / "again") == config_of(saved)
    loaded(**call())
    loaded.save_pretrained(tmp_path / "later")
    assert config_of(tmp_path / "later") == config_of(saved)


def test_nothing_of_a_loaded_teacher_depends_on_its_file(saved: Path, teacher: st.CFGFeatureTeacher) -> None:
    loaded = load_teacher(saved)
    (saved / "model.safetensors").write_bytes(bytes((saved / "model.safetensors").stat().st_size))
    assert torch.equal(loaded(**call(1)), teacher(**call(1)))


def test_what_was_dropped_says_so_when_used(saved: Path) -> None:
    loaded = load_teacher(saved)
    with pytest.raises(PrunedModuleError, match=r"'blocks\.2' of the teacher was used, but it was dropped"):
        loaded.model(**call())


def test_a_teacher_of_tied_weights_is_saved_once_and_tied_again(tmp_path: Path) -> None:
    class Tied(TinyDiT):
        def __init__(self, seed: int = 0) -> None:
            super().__init__(seed=seed)
            self.blocks[1][0].weight = self.blocks[0][0].weight

    settings = {"layer": "blocks.1", "guidance_scale": 2.0, "null": {"y": 5}, "hidden_size": 4}
    teacher = st.build_teacher(Tied(seed=1), None, **settings)
    expected = teacher(**call())
    teacher.save_pretrained(tmp_path)
    assert "blocks.1.0.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = load_teacher(tmp_path, Tied)
    assert loaded.model.blocks[1][0].weight is loaded.model.blocks[0][0].weight
    assert torch.equal(loaded(**call()), expected)
    with pytest.raises(CheckpointError) as error:
        load_teacher(tmp_path, TinyDiT)
    assert_says(error, "Missing", "blocks.1.0.weight")


@pytest.mark.parametrize(
    "parts", [lambda w: w.unbind(), lambda w: w.transpose(1, 2).unbind()], ids=["views", "strided"]
)
def test_weights_that_are_parts_of_one_tensor_are_saved_as_their_own(parts: Any, tmp_path: Path) -> None:
    model = TinyDiT(seed=1)
    both = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0))
    model.blocks[0][0].weight.data, model.blocks[1][0].weight.data = parts(both)
    settings = {"layer": "blocks.1", "guidance_scale": 2.0, "null": {"y": 5}, "hidden_size": 4}
    teacher = st.build_teacher(model, None, **settings)
    teacher.save_pretrained(tmp_path)
    loaded = load_teacher(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), teacher.parameters(), strict=True))
    torch.testing.assert_close(loaded(**call()), teacher(**call()))


def test_a_wrapped_teacher_is_saved_under_plain_keys(tmp_path: Path) -> None:
    model = TinyDiT(seed=1)
    model.blocks[0] = checkpoint_wrapper(model.blocks[0])
    settings = {"layer": "blocks.1", "guidance_scale": 2.0, "null": {"y": 5}, "hidden_size": 4}
    teacher = st.build_teacher(model, None, **settings)
    expected = teacher(**call())
    teacher.save_pretrained(tmp_path)
    assert "blocks.0.0.weight" in load_file(tmp_path / "model.safetensors")
    assert torch.equal(load_teacher(tmp_path)(**call()), expected)

    def wrapped() -> nn.Module:
        other = TinyDiT()
        other.blocks[0], other.blocks[2] = checkpoint_wrapper(other.blocks[0]), checkpoint_wrapper(other.blocks[2])
        return other

    assert torch.equal(load_teacher(tmp_path, wrapped)(**call()), expected)


# --- Teacher: what is refused ----------------------------------------------------------------------------------------


class Renamed(TinyDiT):
    def __init__(self) -> None:
        super().__init__()
        self.x_embed, self.x_embedder = self.x_embedder, nn.Identity()


def test_weights_that_do_not_fit_are_listed_with_the_nearest_and_nothing_is_loaded(saved: Path) -> None:
    assert_says(
        refusal(saved, Renamed()),
        *("does not fit Renamed; nothing was loaded", "Missing, of the model's 10 (2)", "Extra, not in the model (2)"),
        "It was saved from TinyDiT.",
        *("x_embedder.weight (4, 2, 2, 2); nearest: 'x_embed.weight'", "x_embed.weight (4, 2, 2, 2); nearest: 'x_emb"),
    )
    assert_says(refusal(saved, TinyDiT(width=6)), "Of another shape", "blocks.0.0.weight: saved (4, 4), model (6, 6)")
    assert_says(refusal(saved, TinyDiT(depth=4)), "Missing, of the model's", "blocks.3.0.weight (4, 4)")
    assert_says(refusal(saved, TinyDiT(depth=1)), "Extra", "blocks.1.0.weight")


def test_a_model_that_lacks_only_what_was_dropped_fits(saved: Path, teacher: st.CFGFeatureTeacher) -> None:
    assert torch.equal(load_teacher(saved, TinyDiT(depth=2))(**call(1)), teacher(**call(1)))


def test_weights_that_are_not_finite_are_refused(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    tensors["y_embedder.weight"][2, 1] = torch.inf
    assert_says(refusal(rewrite(saved, tensors), TinyDiT()), "1 of 24 values", "'y_embedder.weight'", "not finite")


def test_a_model_that_takes_other_arguments_is_refused(saved: Path) -> None:
    class Other(TinyDiT):
        def forward(self, sample: Tensor, t: Tensor, y: Tensor, text: Tensor) -> Tensor:
            return super().forward(sample, t, y, text)

    assert_says(
        refusal(saved, Other()),
        "does not fit Other",
        "It was saved from TinyDiT.",
        "names 'x', which Other.forward does not take",
    )


def test_a_factory_that_makes_no_model_is_refused(saved: Path) -> None:
    with pytest.raises(SettingError, match="it made dict"):
        load_teacher(saved, dict)


@pytest.mark.parametrize(
    "which", ["a callable null condition", "a selecting function", "a time convention of one's own"]
)
def test_functions_are_asked_for_by_name(which: str, tmp_path: Path) -> None:
    settings, given = TEACHERS[which]
    make_teacher(**settings).save_pretrained(tmp_path)
    names = {"null": "null={'y': ...} (it was 'first_label')", "select": "select=... (it was 'Identity')"}
    wanted = names | {"time": "time=... (it was 'mine')"}
    assert_says(refusal(tmp_path, TinyDiT()), "no file can hold. Pass them:", *(wanted[key] for key in given))


def test_what_was_saved_cannot_be_replaced(saved: Path, tmp_path: Path) -> None:
    make_teacher(time=MINE).save_pretrained(tmp_path / "mine")
    with pytest.raises(SettingError, match="another time convention: 'mine'"):
        load_teacher(tmp_path / "mine", time=st.TimeConvention.named("sit"))
    for given, part in (
        ({"tokens": slice(1, None)}, "was saved with tokens=None, which is kept"),
        ({"select": 1}, "was saved with select=None"),
        ({"time": MINE}, "was saved with time='repa'"),
        ({"null": {"y": 4}}, "null= also names [('y',)]"),
        ({"null": 4}, "null= maps argument names"),
    ):
        with pytest.raises(SettingError) as error:
            load_teacher(saved, **given)
        assert_says(error, part)


def test_what_json_cannot_hold_is_refused_when_saving(tmp_path: Path) -> None:
    def fails(teacher: st.CFGFeatureTeacher, error: type[Exception], *parts: str, **details: Any) -> None:
        with pytest.raises(error) as caught:
            teacher.save_pretrained(tmp_path / "new", **details)
        assert_says(caught, *parts)
        assert not (tmp_path / "new").exists()

    fails(make_teacher(call={"fixed": {"text": torch.ones(4, 3)}}, null={"y": 5}), CheckpointError, "'call' should be")
    fails(
        make_teacher(),
        CheckpointError,
        "This teacher cannot be saved: 'step' should be null or a whole number from 0",
        step=-1,
    )
    fails(make_teacher(), CheckpointError, "'source' should be null or one line of text", source="two\nlines")
    fails(make_teacher(), SettingError, "A saved teacher has no 'licens'", licens="mit")
    fails(make_teacher().to("meta"), CheckpointError, "TinyDiT cannot be saved: its 'pos_embed' has no data here")

    class Reserved(TinyDiT):
        def __init__(self) -> None:
            super().__init__()
            self.null_condition = nn.Linear(1, 1)

    teacher = st.build_teacher(Reserved(), None, layer="blocks.0", guidance_scale=1.0, null={"y": 5})
    fails(teacher, CheckpointError, "'null_condition.weight', a name kept for the null condition")
