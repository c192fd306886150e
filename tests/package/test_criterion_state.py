"""What the combined loss saves, resumes and moves."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from loops import denoising, new_criterion, new_teacher, noisy_batch, student, toy
from plain import refused
from torch import nn

import selftrans_reg as st

EXTRA = "_extra_state"
B = noisy_batch([0.35, 0.5, 0.1, 0.45])


def new(stage: int = 2, shift: float = 0.0, **settings: Any) -> st.SelfTransLoss:
    """Of a student that lives as long as it; its heads are shifted, as by training."""
    model = student()
    criterion = new_criterion(model, stage, **settings)
    criterion.held = [model]  # in a list: it is no part of the criterion
    for parameter in criterion.parameters():
        parameter.data += shift
    return criterion


def run(criterion: st.SelfTransLoss, step: int | None = None) -> st.LossTerms:
    return criterion(denoising(criterion.held[0], B), latents=B.latents, step=step)


def entries(criterion: nn.Module) -> dict[str, Any]:
    """The extra state as JSON."""
    return json.loads(bytes(criterion.state_dict()[EXTRA].tolist()))


def same_state(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("stage", [1, 2])
def test_the_state_is_the_heads_and_one_small_tensor(stage: int) -> None:
    """Which has one size, whatever was counted: distributed checkpoints are loaded in place."""
    criterion = new(stage, stop_when=st.Plateau(interval=1), stop_step=2**62)
    head = {f"heads.0.{'head.' * (stage == 1)}{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
    head |= {"heads.0.linear.weight", "heads.0.linear.bias"} if stage == 1 else set()
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
def test_a_state_saved_in_half_precision_from_a_wrapper_loads_into_the_bare_criterion(wrap: str, parent: str) -> None:
    settings = {"weight": 0.123456789, "schedule": "cosine", "stop_step": 10**9}
    saved, criterion = new(shift=1.0, **settings), new(**settings)
    run(saved, step=10**8 + 1)
    assert entries(saved)["step"] == 10**8 + 1
    owner = nn.ModuleDict({"loss": criterion}) if parent else criterion
    owner.load_state_dict({f"{parent}{wrap}{name}": value for name, value in saved.half().state_dict().items()})
    assert same_state(criterion, saved.float())


OTHERS: dict[str, tuple[Any, Any]] = {  # as saved, and as this criterion has it
    **{"layer": ("blocks.1", "blocks.2"), "time": ("sit", "repa"), "window": ((0.4, 0.7), (0.3, 0.7))},
    **{"gating": ("per-sample", "released"), "distance": ("mse", "cosine"), "target": ("latents", "velocity")},
    **{"schedule": ("cosine", "linear"), "weight": (0.5, 0.25), "stop_step": (20, 21)},
}
OTHER_TEACHERS: dict[str, dict[str, Any]] = {
    **{"its guidance scale": {"guidance_scale": 4.0}, "its layer": {"layer": "blocks.1"}},
    **{"its null condition": {"null": {"y": 9}}, "its weights": {"model": toy(5)}},
}


@pytest.mark.parametrize("changed", [*OTHERS, *OTHER_TEACHERS])
def test_a_state_of_another_run_is_refused_with_both_values_and_may_be_allowed(changed: str) -> None:
    usual = {"schedule": "cosine", "stop_step": 20}
    if changed in OTHERS:
        stage, given, error = 1, {changed: OTHERS[changed][1]}, st.SettingError
    else:
        stage, given, error = 2, {"teacher": new_teacher(**OTHER_TEACHERS[changed])}, st.TeacherError
    saved, criterion, untouched = new(stage, 1.0, **usual), *(new(stage, **usual | given) for _ in range(2))
    for step in range(4):
        run(saved, step=step).total.backward()
    state, own = saved.state_dict(), entries(untouched)
    new(stage, **usual).load_state_dict(state)
    parts = [entries(saved)["teacher"][:16], own["teacher"][:16]] if stage == 2 else []
    if stage == 1:
        was, now = (f"{changed}={(v,) if changed == 'layer' else v!r}" for v in OTHERS[changed])
        parts = [f"saved with {was}; this criterion has {now}.\n"]
    with refused(error, *parts, "criterion.allow_changes() before"):
        criterion.load_state_dict(state)
    assert same_state(criterion, untouched)
    criterion.allow_changes()
    criterion.load_state_dict(state)  # as the message says
    found = entries(criterion)
    assert (found["step"], found["settings"], found["teacher"]) == (3, own["settings"], own["teacher"])
    assert same_state(criterion.heads, saved.heads)
    with refused(error):  # allowed for one state only
        criterion.load_state_dict(state)
    if changed == "time":  # the first calls of a process are checked, however many calls the state has seen
        with refused(st.TimeConventionError):
            run(criterion, step=4)


def test_past_the_stop_step_a_run_resumes_without_its_teacher_and_keeps_its_fingerprint() -> None:
    saved = new(stop_step=2)
    run(saved, step=1)
    saved.release_teacher()
    settings = {"layer": "blocks.1", "time": "sit", "hidden_features": 24, "target_size": 16, "stop_step": 2}
    resumed = st.SelfTransLoss.stage2(student(), teacher=None, **settings)
    resumed.load_state_dict(saved.state_dict())
    assert resumed(torch.ones(()), step=2).weight.item() == 0.0
    new(stop_step=2).load_state_dict(resumed.state_dict())  # and it can go back to the teacher
    with refused(st.TeacherError, "another teacher"):
        new(stop_step=2, teacher=new_teacher(toy(3))).load_state_dict(resumed.state_dict())


def test_a_run_taught_by_its_own_average_resumes_with_a_teacher_that_was_refreshed_too() -> None:
    saved, resumed = (new(stop_step=9, teacher=new_teacher(toy(seed))) for seed in (3, 4))
    before = saved.state_dict()
    saved.teacher.refresh(toy(5).state_dict())
    after = saved.state_dict()
    for state in (before, after):
        with refused(st.TeacherError, "another teacher"):
            resumed.load_state_dict(state)
    resumed.teacher.refresh(toy(5).state_dict())
    resumed.load_state_dict(after)
    saved.release_teacher()
    resumed.load_state_dict(saved.state_dict())
    assert run(resumed, step=1).alignment == run(new(teacher=resumed.teacher), step=1).alignment


@pytest.mark.parametrize("built_with", [0.5, 0.125], ids=["as the script has it", "as the run had it last"])
def test_the_weight_may_be_assigned_and_a_resumed_run_has_it_and_nothing_else_may(built_with: float) -> None:
    criterion, resumed = new(stop_when=st.Plateau()), new(stop_when=st.Plateau(), weight=built_with)
    for name, values in {
        "weight": (math.nan, -0.1, "1", None, True, 0.0),  # a plateau compares gradients, and 0 has none
        **dict.fromkeys(("teacher", "window", "time", "layers", "stop_step", "settings"), (None,)),
    }.items():
        for value in values:
            with refused(st.SettingError, name):
                setattr(criterion, name, value)
    assert criterion.weight == 0.5
    criterion.weight = 0.125
    assert run(criterion, step=0).weight == 0.125
    resumed.load_state_dict(criterion.state_dict())
    assert resumed.weight == 0.125


WHOLE = new().state_dict()[EXTRA]
DAMAGED: dict[str, Any] = {
    **{"cut off": WHOLE[:40], "zeros": 0 * WHOLE, "floats": WHOLE.float() / 255, "no tensor": "state"},
    **{"nested deeply": b"[" * 100_000, "a number": b"12"},
    **{"a format": {"format": 2}, "more": {"more": 1}, "a step": {"step": -2}, "calls": {"calls": 1.5}},
    **{"a weight": {"weight": math.nan}, "no settings": {"settings": None}, "no health": {"health": []}},
    **{"words": {"health": ["a"] * 10}, "a plateau": {"plateau": ["nan"] * 8}},
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_of_a_damaged_state_nothing_is_loaded(damage: str) -> None:
    criterion, extra = new(), DAMAGED[damage]
    if isinstance(extra, dict):  # entries that are none of a criterion's
        extra = json.dumps(entries(criterion) | extra).encode()
    if isinstance(extra, bytes):
        extra = torch.tensor(list(extra), dtype=torch.uint8)
    with pytest.raises(st.CheckpointError, match="nothing was loaded") as error:
        criterion.load_state_dict(new(shift=1.0).state_dict() | {EXTRA: extra})
    assert len(str(error.value)) < 2000
    assert same_state(criterion, new())


def test_to_moves_head_and_teacher(device: torch.device) -> None:
    criterion = new().to(device, torch.float64)
    parameters = [*criterion.parameters(), *criterion.teacher.parameters()]
    assert {(p.device.type, p.dtype) for p in parameters} == {(device.type, torch.float64)}
