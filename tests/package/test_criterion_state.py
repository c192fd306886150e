"""What the combined loss saves, resumes and moves."""

from __future__ import annotations

import copy
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from toys import ToyDiT, batch

import selftrans_reg as st

EXTRA = "_extra_state"
HEAD = {f"heads.0.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}


def make_teacher(seed: int = 1, **settings: object) -> st.CFGFeatureTeacher:
    defaults = {"layer": "blocks.2", "guidance_scale": 3.0, "null": {"y": 10}, "hidden_size": 16}
    return st.build_teacher(ToyDiT(seed=seed), None, **(defaults | settings))


def make(model: nn.Module, stage: int = 2, **settings: object) -> st.SelfTransLoss:
    common = {"layer": "blocks.1", "time": "repa", "hidden_size": 16, "hidden_features": 24, "window": None}
    if stage == 1:
        return st.SelfTransLoss.stage1(model, latent_channels=4, patch_size=2, **(common | settings))
    return st.SelfTransLoss.stage2(model, **({"teacher": make_teacher()} | common | settings))


def terms_of(model: nn.Module, criterion: nn.Module, step: int | None = None) -> st.LossTerms:
    b = batch()
    f = b["t"][:, None, None, None]
    output = model((1 - f) * b["x"] + f * b["noise"], b["t"], b["y"])
    return criterion(output.square().mean(), latents=b["x"], step=step)


def student() -> ToyDiT:
    model = ToyDiT()
    model.dropout = 0.0
    return model


def entries(criterion: nn.Module) -> dict[str, Any]:
    """The extra state as JSON."""
    return json.loads(bytes(criterion.state_dict()[EXTRA].tolist()))


def with_entries(criterion: nn.Module, **changes: object) -> dict[str, Tensor]:
    """The criterion's state with some entries of its extra state replaced."""
    text = json.dumps(entries(criterion) | changes).encode()
    return criterion.state_dict() | {EXTRA: torch.tensor(list(text), dtype=torch.uint8)}


@pytest.mark.parametrize("stage", [1, 2])
def test_the_state_is_the_heads_and_one_small_tensor(stage: int) -> None:
    criterion = make(ToyDiT(), stage)
    head = HEAD
    if stage == 1:
        head = {name.replace("heads.0.", "heads.0.head.") for name in HEAD}
        head |= {"heads.0.linear.weight", "heads.0.linear.bias"}
    assert {name for name, _ in criterion.named_parameters()} == head
    assert not list(criterion.buffers())
    state = criterion.state_dict()
    assert set(state) == head | {EXTRA}
    assert state[EXTRA].dtype == torch.uint8
    assert len(state[EXTRA]) < 4096


def test_the_extra_state_has_one_size_whatever_was_counted() -> None:
    """Distributed checkpoints are loaded in place."""
    model = student()
    criterion = make(model, stop_when=st.Plateau(interval=1), stop_step=2**62)
    fresh = criterion.state_dict()[EXTRA]
    for step in (0, 2**62 - 1):
        terms_of(model, criterion, step).total.backward()
    criterion.weight = 0.1 + 0.2
    assert len(criterion.state_dict()[EXTRA]) == len(fresh)
    assert entries(criterion)["step"] == 2**62 - 1


@pytest.mark.parametrize("wrap", ["module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("parent", ["", "loss."])
def test_a_state_saved_from_a_wrapper_loads_into_the_bare_criterion(wrap: str, parent: str) -> None:
    model = student()
    saved = make(model, generator=torch.Generator().manual_seed(3))
    terms_of(model, saved, step=41)
    state = {f"{parent}{wrap}{name}": value for name, value in saved.state_dict().items()}
    criterion = make(student())
    owner = nn.ModuleDict({"loss": criterion}) if parent else criterion
    owner.load_state_dict(state)
    assert entries(criterion) == entries(saved)
    assert all(torch.equal(p, q) for p, q in zip(criterion.parameters(), saved.parameters(), strict=True))


@pytest.mark.parametrize("form", ["safetensors", "torch", "half and back"])
def test_every_format_keeps_it(form: str, tmp_path: Path) -> None:
    model = student()
    criterion = make(model, weight=0.123456789, schedule="cosine", stop_step=10**9)
    terms_of(model, criterion, step=10**8 + 1)
    state, path = criterion.state_dict(), tmp_path / "state"
    if form == "safetensors":
        save_file(state, path)
        state = load_file(path)
    elif form == "torch":
        torch.save(state, path)
        state = torch.load(path, weights_only=True)
    else:
        before = state[EXTRA].clone()
        assert torch.equal(criterion.half().state_dict()[EXTRA], before)
        state = criterion.float().state_dict()
    resumed = make(student(), weight=0.123456789, schedule="cosine", stop_step=10**9)
    resumed.load_state_dict(state)
    assert entries(resumed) == entries(criterion)
    assert entries(resumed)["step"] == 10**8 + 1


OTHERS: dict[str, tuple[object, str]] = {
    "layer": ("blocks.3", "layer=('blocks.1',)"),
    "time": ("sit", "time='repa'"),
    "window": ((0.3, 0.7), "window=None"),
    "gating": ("released", "gating='per-sample'"),
    "distance": ("cosine", "distance='mse'"),
    "target": ("velocity", "target='latents'"),
    "schedule": ("linear", "schedule='cosine'"),
    "weight": (0.25, "weight=0.5"),
    "stop_step": (21, "stop_step=20"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_settings_are_refused_with_both_values_and_may_be_allowed(name: str) -> None:
    model = student()
    saved = make(model, 1, schedule="cosine", stop_step=20)
    terms_of(model, saved, step=3)
    value, was = OTHERS[name]
    criterion = make(ToyDiT(), 1, **({"schedule": "cosine", "stop_step": 20} | {name: value}))
    before = copy.deepcopy(criterion.state_dict())
    now = f"{name}={('blocks.3',) if name == 'layer' else value!r}"
    with pytest.raises(st.SettingError) as error:
        criterion.load_state_dict(saved.state_dict())
    assert f"saved with {was}; this criterion has {now}.\n" in str(error.value)
    assert "call criterion.allow_changes() before loading" in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in criterion.state_dict().items())
    criterion.allow_changes()
    criterion.load_state_dict(saved.state_dict())  # as the message says
    assert entries(criterion)["step"] == 3
    assert (
        entries(criterion)["settings"]
        == entries(make(ToyDiT(), 1, **{"schedule": "cosine", "stop_step": 20} | {name: value}))["settings"]
    )
    with pytest.raises(st.SettingError):  # allowed for one state only
        criterion.load_state_dict(saved.state_dict())


def test_a_state_of_the_other_stage_is_refused_in_words() -> None:
    with pytest.raises(st.SettingError, match=r"saved with stage=1; this criterion has stage=2"):
        make(ToyDiT(), 2).load_state_dict(make(ToyDiT(), 1).state_dict())


@pytest.mark.parametrize("changed", [{"guidance_scale": 4.0}, {"layer": "blocks.1"}, {"null": {"y": 9}}, {"seed": 5}])
def test_another_teacher_is_refused_and_may_be_allowed(changed: dict[str, Any]) -> None:
    state = make(ToyDiT()).state_dict()
    other = make_teacher(**changed)
    criterion = make(ToyDiT(), teacher=other)
    with pytest.raises(st.TeacherError) as error:
        criterion.load_state_dict(state)
    for teacher in (make_teacher(), other):
        assert bytes(teacher.fingerprint.tolist()).hex()[:16] in str(error.value)
    criterion.allow_changes()
    criterion.load_state_dict(state)  # as the message says
    assert entries(criterion)["teacher"] == bytes(other.fingerprint.tolist()).hex()


def test_a_truncated_teacher_is_known_again() -> None:
    model = student()
    criterion = make(model)
    terms_of(model, criterion).total.backward()
    make(student()).load_state_dict(criterion.state_dict())


def test_past_the_stop_step_a_run_resumes_without_its_teacher_and_keeps_its_fingerprint() -> None:
    model = student()
    criterion = make(model, stop_step=2)
    terms_of(model, criterion, step=1)
    criterion.release_teacher()
    state = criterion.state_dict()
    criterion.detach()
    resumed = make(model, teacher=None, target_size=16, stop_step=2)
    resumed.load_state_dict(state)
    assert terms_of(model, resumed, step=2).weight.item() == 0.0
    resumed.detach()
    make(model, stop_step=2).load_state_dict(resumed.state_dict())  # and it can go back to the teacher
    with pytest.raises(st.TeacherError):
        make(model, stop_step=2, teacher=make_teacher(seed=3)).load_state_dict(resumed.state_dict())


class TestWeight:
    def test_it_may_be_assigned_and_a_resumed_run_has_it(self) -> None:
        model = student()
        criterion = make(model)
        criterion.weight = 0.125
        assert terms_of(model, criterion, step=0).weight == 0.125
        for built_with in (0.5, 0.125):  # as the script has it, or as the run had it last
            resumed = make(student(), weight=built_with)
            resumed.load_state_dict(criterion.state_dict())
            assert resumed.weight == 0.125

    @pytest.mark.parametrize("weight", [float("nan"), -0.1, float("inf"), "1", None, True])
    def test_what_is_no_weight_is_refused_and_changes_nothing(self, weight: object) -> None:
        criterion = make(student())
        with pytest.raises(st.SettingError, match="weight must be a number from 0 to 1000000"):
            criterion.weight = weight
        assert criterion.weight == 0.5

    def test_with_a_plateau_it_stays_above_0(self) -> None:
        criterion = make(student(), stop_when=st.Plateau())
        with pytest.raises(st.SettingError, match="the alignment has none"):
            criterion.weight = 0.0


@pytest.mark.parametrize("name", ["teacher", "window", "time", "layers", "stop_step", "health_interval", "settings"])
def test_what_is_fixed_cannot_be_assigned_and_the_advice_works(name: str) -> None:
    model, other = student(), make_teacher(guidance_scale=7.0)
    old = make(model, 2)
    with pytest.raises(st.SettingError, match=f"{name} of a criterion cannot be changed once it is built") as error:
        setattr(old, name, other if name == "teacher" else None)
    assert "new.heads.load_state_dict(old.heads.state_dict()); then old.detach()" in str(error.value)
    new = make(model, 2, teacher=other, generator=torch.Generator().manual_seed(5))
    new.heads.load_state_dict(old.heads.state_dict())
    old.detach()
    assert all(torch.equal(a, b) for a, b in zip(old.heads.parameters(), new.heads.parameters(), strict=True))
    assert terms_of(model, new, step=0).alignment > 0


def damaged_states() -> dict[str, dict[str, Any]]:
    criterion = make(ToyDiT())
    state = criterion.state_dict()
    key = "heads.0.4.bias"
    return {
        "cut off": state | {EXTRA: state[EXTRA][:40]},
        "zeros": state | {EXTRA: torch.zeros_like(state[EXTRA])},
        "floats": state | {EXTRA: state[EXTRA].float() / 255},
        "no tensor": state | {EXTRA: "state"},
        "nested deeply": state | {EXTRA: torch.tensor(list(b"[" * 100_000), dtype=torch.uint8)},
        "a number": state | {EXTRA: torch.tensor(list(b"12"), dtype=torch.uint8)},
        "later format": with_entries(criterion, format=2),
        "unknown entry": with_entries(criterion, more=1),
        "negative step": with_entries(criterion, step=-2),
        "half a call": with_entries(criterion, calls=1.5),
        "no weight": with_entries(criterion, weight=float("nan")),
        "no health": with_entries(criterion, health=[]),
        "health of text": with_entries(criterion, health=["a"] * 10),
        "plateau of NaN": with_entries(criterion, plateau=["nan"] * 8),
        "no settings": with_entries(criterion, settings=None),
        "head's shape": state | {key: torch.zeros(3)},
        "head missing": {name: value for name, value in state.items() if name != key},
        "head too much": state | {"heads.1.0.weight": torch.zeros(3)},
    }


@pytest.mark.parametrize("damage", damaged_states())
def test_of_a_damaged_state_nothing_is_loaded(damage: str) -> None:
    state = {name: value + 1 if name.startswith("heads") else value for name, value in damaged_states()[damage].items()}
    criterion = make(ToyDiT())
    before = copy.deepcopy(criterion.state_dict())
    with pytest.raises(st.CheckpointError, match="nothing was loaded") as error:
        criterion.load_state_dict(state)
    assert len(str(error.value)) < 2000
    assert all(torch.equal(value, before[name]) for name, value in criterion.state_dict().items())


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_watches_nothing_until_it_is_attached(how: str) -> None:
    model = student()
    criterion = make(model)
    expected = terms_of(model, criterion)
    if how == "deepcopy":
        other = copy.deepcopy(criterion)
    else:
        file = io.BytesIO()
        torch.save(criterion, file)
        other = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    loss = model(batch()["x"], batch()["t"], batch()["y"]).mean()
    with pytest.raises(st.CaptureError, match=r"(?s)watches no model.*attach\(model\)"):
        other(loss)
    criterion.detach()
    other.attach(model)
    torch.testing.assert_close(tuple(terms_of(model, other)), tuple(expected))
    assert other.teacher is not criterion.teacher


class TestPlace:
    def test_to_moves_head_and_teacher(self, device: torch.device) -> None:
        criterion = make(ToyDiT()).to(device)
        assert criterion.teacher is not None
        assert {p.device.type for p in [*criterion.parameters(), *criterion.teacher.parameters()]} == {device.type}

    def test_to_another_precision_moves_the_teacher_too(self) -> None:
        criterion = make(ToyDiT()).to(torch.float64)
        assert criterion.teacher is not None
        assert {p.dtype for p in [*criterion.parameters(), *criterion.teacher.parameters()]} == {torch.float64}

    def test_a_head_elsewhere_than_the_tokens_is_an_error_that_says_where_both_are(self) -> None:
        class Elsewhere(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = student().to("meta")

            def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
                return self.net(x.to("meta"), t.to("meta"), y.to("meta"))

        model = Elsewhere()
        criterion = make(model, layer="net.blocks.1")
        model(batch()["x"], batch()["t"], batch()["y"])
        with pytest.raises(
            st.ShapeError, match=re.escape("The head lies on cpu, the batch on meta: call criterion.to(")
        ):
            criterion(torch.zeros(()))


def test_a_resumed_run_is_checked_anew() -> None:
    """The first calls of a process are checked, however many calls the state has seen."""
    model = student()
    criterion = make(model)
    for _ in range(5):
        terms_of(model, criterion)
    resumed_model = student()
    resumed = make(resumed_model, time="sit")
    resumed.allow_changes()
    resumed.load_state_dict(criterion.state_dict())
    with pytest.raises(st.TimeConventionError):
        terms_of(resumed_model, resumed)
