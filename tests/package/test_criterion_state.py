"""What the combined loss saves, resumes and moves."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from toys import ToyDiT, batch

import selftrans_reg as st
from selftrans_reg.errors import ShapeError


def make_teacher(**settings: object) -> st.CFGFeatureTeacher:
    defaults = {"layer": "blocks.2", "guidance_scale": 3.0, "null": {"y": 10}, "hidden_size": 16}
    return st.build_teacher(ToyDiT(seed=1), None, **(defaults | settings))


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


HEAD = {f"heads.0.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
BUFFERS = {"step", "calls", "schedule_state", "settings_state", "teacher_fingerprint", "health_state", "plateau_state"}


def test_parameters_and_state_are_the_heads_and_small_buffers_only() -> None:
    criterion = make(ToyDiT())
    assert {name for name, _ in criterion.named_parameters()} == HEAD
    state = criterion.state_dict()
    assert set(state) == HEAD | BUFFERS
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    assert sum(state[name].numel() for name in BUFFERS) < 100


def test_stage_1_saves_its_head_and_the_linear_behind_it() -> None:
    expected = {name.replace("heads.0.", "heads.0.head.") for name in HEAD}
    assert set(make(ToyDiT(), 1).state_dict()) == expected | BUFFERS | {"heads.0.linear.weight", "heads.0.linear.bias"}


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("form", ["safetensors", "torch"])
def test_a_resumed_run_goes_on_as_if_uninterrupted(stage: int, form: str, tmp_path: Path) -> None:
    settings = {"schedule": "cosine", "stop_step": 10, "weight": 0.3}
    models = [student(), student()]
    straight, first = (make(model, stage, **settings) for model in models)
    optimizers = [torch.optim.SGD(c.parameters(), lr=0.1) for c in (straight, first)]

    def train(model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
        losses = []
        for step in steps:
            optimizer.zero_grad()
            terms = terms_of(model, criterion, step)
            terms.total.backward()
            optimizer.step()
            losses.append(terms.alignment.item())
        return losses

    expected = train(models[0], straight, optimizers[0], range(12))
    found = train(models[1], first, optimizers[1], range(4))
    path = tmp_path / "state"
    if form == "safetensors":
        save_file(first.state_dict(), path)
    else:
        torch.save(first.state_dict(), path)
    first.detach()
    second = make(models[1], stage, **settings, generator=torch.Generator().manual_seed(99))
    second.load_state_dict(load_file(path) if form == "safetensors" else torch.load(path, weights_only=True))
    assert int(second.state_dict()["step"]) == 3
    assert int(second.state_dict()["calls"]) == 4
    found += train(models[1], second, torch.optim.SGD(second.parameters(), lr=0.1), range(4, 12))
    assert found == expected


def test_a_state_taken_in_the_middle_holds_the_step() -> None:
    model = student()
    criterion = make(model)
    assert int(criterion.state_dict()["step"]) == -1
    terms_of(model, criterion, step=41)
    assert int(criterion.state_dict()["step"]) == 41
    parent = nn.ModuleDict({"criterion": criterion})  # as a trainer module holds it
    terms_of(model, criterion, step=42)
    assert int(parent.state_dict()["criterion.step"]) == 42


@pytest.mark.parametrize("changed", [{"schedule": "linear"}, {"weight": 0.25}, {"stop_step": 21}])
def test_another_schedule_is_refused_and_the_advice_works(changed: dict[str, object]) -> None:
    settings = {"schedule": "cosine", "stop_step": 20, "weight": 0.5}
    state = make(ToyDiT(), **settings).state_dict()
    criterion = make(ToyDiT(), **(settings | changed))
    with pytest.raises(st.SettingError) as error:
        criterion.load_state_dict(state)
    for part in ("saved with schedule='cosine', weight=0.5, stop_step=20", "this criterion has", "on purpose"):
        assert part in str(error.value)
    (key,) = changed
    assert f"{key}={changed[key]!r}" in str(error.value)
    state["schedule_state"] = criterion.state_dict()["schedule_state"]  # as the message says
    criterion.load_state_dict(state)


OTHERS = {
    "layer": "blocks.3",
    "time": "sit",
    "window": (0.3, 0.7),
    "gating": "released",
    "distance": "cosine",
    "target": "velocity",
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_settings_are_refused_and_the_advice_works(name: str) -> None:
    state = make(ToyDiT(), 1).state_dict()
    make(ToyDiT(), 1).load_state_dict(state)
    criterion = make(ToyDiT(), 1, **{name: OTHERS[name]})
    with pytest.raises(st.SettingError, match="saved with other settings than this criterion's") as error:
        criterion.load_state_dict(state)
    found = {"layer": ("blocks.3",)}.get(name, OTHERS[name])
    assert f"this criterion's {name}={found!r}.\n" in str(error.value)
    state["settings_state"] = criterion.state_dict()["settings_state"]  # as the message says
    criterion.load_state_dict(state)


def test_a_state_of_the_other_stage_is_refused_in_words() -> None:
    with pytest.raises(st.SettingError, match="other settings than this criterion's stage=2"):
        make(ToyDiT(), 2).load_state_dict(make(ToyDiT(), 1).state_dict())


def test_a_state_that_tells_no_settings_is_loaded() -> None:
    state = make(ToyDiT(), 1).state_dict()
    del state["settings_state"]
    make(ToyDiT(), 1, window=(0.1, 0.2)).load_state_dict(state)


@pytest.mark.parametrize("name", ["teacher", "window", "time", "layers", "stop_step", "health_interval"])
def test_what_is_fixed_cannot_be_assigned_and_the_advice_works(name: str) -> None:
    model, other = student(), make_teacher(guidance_scale=7.0)
    old = make(model, 2)
    before = old.state_dict()
    with pytest.raises(st.SettingError, match=f"{name} of a criterion cannot be changed once it is built") as error:
        setattr(old, name, other if name == "teacher" else None)
    assert "new.heads.load_state_dict(old.heads.state_dict()); then old.detach()" in str(error.value)
    assert old.state_dict().keys() == before.keys()
    new = make(model, 2, teacher=other, generator=torch.Generator().manual_seed(5))
    new.heads.load_state_dict(old.heads.state_dict())
    old.detach()
    for (key, a), (_, b) in zip(old.heads.named_parameters(), new.heads.named_parameters(), strict=True):
        assert torch.equal(a, b), key
    assert terms_of(model, new, step=0).alignment > 0


def test_the_weight_may_be_assigned() -> None:
    model = student()
    criterion = make(model)
    criterion.weight = 0.125
    assert terms_of(model, criterion, step=0).weight == 0.125


@pytest.mark.parametrize(
    "changed", [{"guidance_scale": 4.0}, {"layer": "blocks.1"}, {"null": {"y": 9}}, {"checkpoint": "other"}]
)
def test_another_teacher_is_refused_and_the_advice_works(changed: dict[str, object]) -> None:
    state = make(ToyDiT()).state_dict()
    if "checkpoint" in changed:
        other = st.build_teacher(
            ToyDiT(seed=5), None, layer="blocks.2", guidance_scale=3.0, null={"y": 10}, hidden_size=16
        )
    else:
        other = make_teacher(**changed)
    criterion = make(ToyDiT(), teacher=other)
    with pytest.raises(st.TeacherError) as error:
        criterion.load_state_dict(state)
    for part in (
        "saved with another teacher",
        "weights, layer, guidance scale or null",
        "state['teacher_fingerprint']",
    ):
        assert part in str(error.value)
    state["teacher_fingerprint"] = other.fingerprint  # as the message says
    criterion.load_state_dict(state)
    torch.testing.assert_close(criterion.state_dict()["teacher_fingerprint"], other.fingerprint)


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
    torch.testing.assert_close(resumed.state_dict()["teacher_fingerprint"], make_teacher().fingerprint)
    resumed.detach()
    again = make(model, stop_step=2)  # and it can go back to the teacher
    again.load_state_dict(resumed.state_dict())


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
    with pytest.raises(st.CaptureError) as error:
        other(loss)
    assert "watches no model" in str(error.value)
    assert "attach(model)" in str(error.value)
    criterion.detach()
    other.attach(model)
    torch.testing.assert_close(tuple(terms_of(model, other)), tuple(expected))
    assert other.teacher is not criterion.teacher


class TestPlace:
    def test_to_moves_head_buffers_and_teacher(self, device: torch.device) -> None:
        criterion = make(ToyDiT()).to(device)
        assert criterion.teacher is not None
        assert {p.device.type for p in criterion.parameters()} == {device.type}
        assert {p.device.type for p in criterion.teacher.parameters()} == {device.type}

    def test_to_another_precision_moves_the_teacher_too_and_keeps_the_schedule(self) -> None:
        criterion = make(ToyDiT(), weight=0.123456, stop_step=10**9)
        before = criterion.state_dict()["schedule_state"].clone()
        criterion.to(torch.bfloat16).to(torch.float64)
        assert criterion.teacher is not None
        assert {p.dtype for p in [*criterion.parameters(), *criterion.teacher.parameters()]} == {torch.float64}
        assert torch.equal(criterion.state_dict()["schedule_state"], before)

    def test_a_null_tensor_moves_with_the_teacher_and_is_no_part_of_its_state(self) -> None:
        teacher = make_teacher(null={"y": torch.tensor(10.0)}).to(torch.float64)
        assert [b.dtype for b in teacher.buffers()] == [torch.float64]
        assert not any("null" in name for name in teacher.state_dict())

    def test_a_head_elsewhere_than_the_tokens_is_an_error_that_says_where_both_are(self) -> None:
        class Elsewhere(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = student().to("meta")

            def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
                return self.net(x.to("meta"), t.to("meta"), y.to("meta"))

        model = Elsewhere()
        criterion = make(model, layer="net.blocks.1")
        model(batch()["x"], batch()["t"], batch()["y"])
        with pytest.raises(ShapeError) as error:
            criterion(torch.zeros(()))
        assert "The head lies on cpu, the batch on meta" in str(error.value)
        assert "criterion.to('meta') where the model is moved" in str(error.value)


def test_a_resumed_run_is_checked_anew() -> None:
    """The first calls of a process are checked, however many calls the state has seen."""
    model = student()
    criterion = make(model, check_interval=1000)
    for _ in range(5):
        terms_of(model, criterion)
    resumed_model = student()
    resumed = make(resumed_model, time="sit", check_interval=1000)
    resumed.load_state_dict(criterion.state_dict() | {"settings_state": resumed.settings_state})
    with pytest.raises(st.TimeConventionError):
        terms_of(resumed_model, resumed)


def test_buffers_lie_with_the_heads(device: torch.device) -> None:
    """Wrapped in DDP, buffers are broadcast by the backend of the device that the heads are on."""
    criterion = make(student().to(device), 1)
    assert {tensor.device.type for tensor in criterion.state_dict().values()} == {device.type}
