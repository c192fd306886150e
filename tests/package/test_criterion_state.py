"""What the combined loss saves, resumes and moves."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import denoising, new_criterion, noisy_batch, toy
from loops import student as new_student
from plain import refused
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import selftrans_reg as st

EXTRA = "_extra_state"
B = noisy_batch([0.35, 0.5, 0.1, 0.45])


def make_teacher(seed: int = 2, **settings: Any) -> st.CFGFeatureTeacher:
    defaults = {"layer": "blocks.2", "guidance_scale": 3.0, "null": {"y": 10}, "hidden_size": 16}
    return st.build_teacher(toy(seed), None, **(defaults | settings))


def terms_of(model: nn.Module, criterion: nn.Module, step: int | None = None) -> st.LossTerms:
    return criterion(denoising(model, B), latents=B.latents, step=step)


def new(stage: int = 2, **settings: Any) -> st.SelfTransLoss:
    """Of a student that lives as long as it."""
    model = new_student()
    criterion = new_criterion(model, stage, **settings)
    criterion.held = [model]  # in a list: it is no part of the criterion
    return criterion


def run(criterion: st.SelfTransLoss, step: int | None = None) -> st.LossTerms:
    return terms_of(criterion.held[0], criterion, step)


def shifted(criterion: st.SelfTransLoss) -> st.SelfTransLoss:
    """Its heads changed, as by training."""
    for parameter in criterion.parameters():
        parameter.data += 1
    return criterion


def entries(criterion: nn.Module) -> dict[str, Any]:
    """The extra state as JSON."""
    return json.loads(bytes(criterion.state_dict()[EXTRA].tolist()))


def same_state(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("stage", [1, 2])
def test_the_state_is_the_heads_and_one_small_tensor(stage: int) -> None:
    """Which has one size, whatever was counted: distributed checkpoints are loaded in place."""
    criterion = new(stage, stop_when=st.Plateau(interval=1), stop_step=2**62)
    head = {f"heads.0.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
    if stage == 1:
        head = {name.replace("heads.0.", "heads.0.head.") for name in head}
        head |= {"heads.0.linear.weight", "heads.0.linear.bias"}
    assert {name for name, _ in criterion.named_parameters()} == head
    assert not list(criterion.buffers())
    fresh = criterion.state_dict()
    for step in (0, 2**62 - 1):
        run(criterion, step).total.backward()
    criterion.weight = 0.1 + 0.2
    state = criterion.state_dict()
    assert set(state) == head | {EXTRA}
    assert (state[EXTRA].dtype, entries(criterion)["step"]) == (torch.uint8, 2**62 - 1)
    assert len(state[EXTRA]) == len(fresh[EXTRA]) < 4096


@pytest.mark.parametrize("wrap", ["module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("parent", ["", "loss."])
def test_a_state_saved_from_a_wrapper_loads_into_the_bare_criterion(wrap: str, parent: str) -> None:
    saved, criterion = shifted(new()), new()
    run(saved, step=41)
    owner = nn.ModuleDict({"loss": criterion}) if parent else criterion
    owner.load_state_dict({f"{parent}{wrap}{name}": value for name, value in saved.state_dict().items()})
    assert same_state(criterion, saved)


@pytest.mark.parametrize("form", ["safetensors", "torch", "half and back"])
def test_every_format_keeps_it(form: str, tmp_path: Path) -> None:
    settings = {"weight": 0.123456789, "schedule": "cosine", "stop_step": 10**9}
    criterion, resumed = new(**settings), new(**settings)
    run(criterion, step=10**8 + 1)
    state, path = criterion.state_dict(), tmp_path / "state"
    if form == "safetensors":
        save_file(state, path)
        state = load_file(path)
    elif form == "torch":
        torch.save(state, path)
        state = torch.load(path, weights_only=True)
    else:
        state = criterion.half().float().state_dict()
    resumed.load_state_dict(state)
    assert entries(resumed) == entries(criterion)
    assert entries(resumed)["step"] == 10**8 + 1


OTHERS: dict[str, tuple[Any, Any]] = {  # as saved, and as this criterion has it
    **{"layer": ("blocks.1", "blocks.2"), "time": ("sit", "repa"), "window": ((0.4, 0.7), (0.3, 0.7))},
    **{"gating": ("per-sample", "released"), "distance": ("mse", "cosine"), "target": ("latents", "velocity")},
    **{"schedule": ("cosine", "linear"), "weight": (0.5, 0.25), "stop_step": (20, 21)},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_settings_are_refused_with_both_values_and_may_be_allowed(name: str) -> None:
    was, now = (f"{name}={(v,) if name == 'layer' else v!r}" for v in OTHERS[name])
    value = OTHERS[name][1]
    usual = {"schedule": "cosine", "stop_step": 20}
    saved, criterion, untouched = shifted(new(1, **usual)), *(new(1, **usual | {name: value}) for _ in range(2))
    run(saved, step=3)
    with refused(st.SettingError, f"saved with {was}; this criterion has {now}.\n", "criterion.allow_changes() before"):
        criterion.load_state_dict(saved.state_dict())
    assert same_state(criterion, untouched)
    criterion.allow_changes()
    criterion.load_state_dict(saved.state_dict())  # as the message says
    assert (entries(criterion)["step"], entries(criterion)["settings"]) == (3, entries(untouched)["settings"])
    with refused(st.SettingError):  # allowed for one state only
        criterion.load_state_dict(saved.state_dict())


@pytest.mark.parametrize("changed", [{"guidance_scale": 4.0}, {"layer": "blocks.1"}, {"null": {"y": 9}}, {"seed": 5}])
def test_another_teacher_is_refused_and_may_be_allowed(changed: dict[str, Any]) -> None:
    saved, criterion = shifted(new()), new(teacher=make_teacher(**changed))
    run(saved).total.backward()  # which truncates the teacher
    new().load_state_dict(saved.state_dict())
    own = entries(criterion)["teacher"]
    with refused(st.TeacherError, entries(saved)["teacher"][:16], own[:16]):
        criterion.load_state_dict(saved.state_dict())
    criterion.allow_changes()
    criterion.load_state_dict(saved.state_dict())  # as the message says
    assert entries(criterion)["teacher"] == own


def test_past_the_stop_step_a_run_resumes_without_its_teacher_and_keeps_its_fingerprint() -> None:
    saved = new(stop_step=2)
    run(saved, step=1)
    saved.release_teacher()
    model = new_student()
    settings = {"layer": "blocks.1", "time": "sit", "hidden_features": 24, "target_size": 16, "stop_step": 2}
    resumed = st.SelfTransLoss.stage2(model, teacher=None, **settings)
    resumed.load_state_dict(saved.state_dict())
    assert terms_of(model, resumed, step=2).weight.item() == 0.0
    new(stop_step=2).load_state_dict(resumed.state_dict())  # and it can go back to the teacher
    with refused(st.TeacherError, "another teacher"):
        new(stop_step=2, teacher=make_teacher(seed=3)).load_state_dict(resumed.state_dict())


@pytest.mark.parametrize("built_with", [0.5, 0.125], ids=["as the script has it", "as the run had it last"])
def test_the_weight_may_be_assigned_and_a_resumed_run_has_it(built_with: float) -> None:
    criterion, resumed = new(stop_when=st.Plateau()), new(stop_when=st.Plateau(), weight=built_with)
    for weight in (math.nan, -0.1, "1", None, True, 0.0):  # a plateau compares gradients, and 0 has none
        with refused(st.SettingError, "weight"):
            criterion.weight = weight
    assert criterion.weight == 0.5
    criterion.weight = 0.125
    assert run(criterion, step=0).weight == 0.125
    resumed.load_state_dict(criterion.state_dict())
    assert resumed.weight == 0.125


@pytest.mark.parametrize("name", ["teacher", "window", "time", "layers", "stop_step", "settings"])
def test_what_is_fixed_cannot_be_assigned(name: str) -> None:
    with refused(st.SettingError, f"{name} of a criterion cannot be changed once it is built"):
        setattr(new(), name, None)


def as_extra(text: bytes) -> dict[str, Tensor]:
    return {EXTRA: torch.tensor(list(text), dtype=torch.uint8)}


def damaged_states() -> dict[str, dict[str, Any]]:
    """Extra states that are none of a criterion's."""
    whole = new().state_dict()[EXTRA]
    wrong = [
        *({"format": 2}, {"more": 1}, {"step": -2}, {"calls": 1.5}, {"weight": float("nan")}, {"settings": None}),
        *({"health": []}, {"health": ["a"] * 10}, {"plateau": ["nan"] * 8}),
    ]
    raw = {"cut off": whole[:40], "zeros": torch.zeros_like(whole), "floats": whole.float() / 255, "no tensor": "state"}
    return {
        **{name: {EXTRA: value} for name, value in raw.items()},
        **{"nested deeply": as_extra(b"[" * 100_000), "a number": as_extra(b"12")},
        **{str(entry): as_extra(json.dumps(entries(new()) | entry).encode()) for entry in wrong},
    }


@pytest.mark.parametrize("damage", damaged_states().items(), ids=lambda item: item[0])
def test_of_a_damaged_state_nothing_is_loaded(damage: tuple[str, dict[str, Any]]) -> None:
    criterion = new()
    with pytest.raises(st.CheckpointError, match="nothing was loaded") as error:
        criterion.load_state_dict(shifted(new()).state_dict() | damage[1])
    assert len(str(error.value)) < 2000
    assert same_state(criterion, new())


def test_a_copy_watches_nothing_until_it_is_attached() -> None:
    model = new_student()
    criterion = new_criterion(model)
    expected, other = terms_of(model, criterion), copy.deepcopy(criterion)
    with refused(st.CaptureError, "watches no model", "attach(model)"):
        terms_of(model, other)
    criterion.detach()
    other.attach(model)
    torch.testing.assert_close(tuple(terms_of(model, other)), tuple(expected))
    assert other.teacher is not criterion.teacher


@pytest.mark.parametrize("where", ["device", "precision"])
def test_to_moves_head_and_teacher(where: str, device: torch.device) -> None:
    criterion = new().to(device if where == "device" else torch.float64)
    parameters = [*criterion.parameters(), *criterion.teacher.parameters()]
    assert {p.device.type for p in parameters} == {device.type if where == "device" else "cpu"}
    assert {p.dtype for p in parameters} == {torch.float32 if where == "device" else torch.float64}


def test_a_resumed_run_is_checked_anew() -> None:
    """The first calls of a process are checked, however many calls the state has seen."""
    saved, resumed = new(), new(time="repa")
    for _ in range(5):
        run(saved)
    resumed.allow_changes()
    resumed.load_state_dict(saved.state_dict())
    with refused(st.TimeConventionError):
        run(resumed)
