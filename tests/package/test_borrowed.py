"""Teachers that share the student's frozen weights, hold quantised ones, or leave their place to others."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import accelerate
import peft
import plain
import pytest
import torch
from diffusers import hooks
from torch import Tensor, nn
from toys import ToyDiT, batch, teacher_of

import selftrans_reg as st
from selftrans_reg.errors import CheckpointError, TeacherError
from selftrans_reg.truncate import identity

B = batch(6)
CALL, NULL_CALL = (B["x"], B["t"], B["y"]), (B["x"], B["t"], torch.full((6,), 10))


def guided(model: nn.Module) -> Tensor:
    """The formula, by two passes through the very model."""
    model.eval()
    with torch.no_grad():
        conditional, unconditional = (plain.tapped(model, "blocks.2", *args)[1] for args in (CALL, NULL_CALL))
    return unconditional + 3.0 * (conditional - unconditional)


def taught(student: nn.Module, teacher: st.CFGFeatureTeacher) -> st.SelfTransLoss:
    settings = {"time": "sit", "window": None, "check_interval": None, "hidden_size": 32, "target_size": 32}
    criterion = st.SelfTransLoss.stage2(student, layer="blocks.1", teacher=teacher, **settings)
    criterion(student(*CALL).square().mean()).total.backward()  # without a warning of equal weights
    return criterion


def with_adapter(seed: int, **settings: Any) -> nn.Module:
    config = peft.LoraConfig(r=4, target_modules=["qkv", "fc1"], **settings)
    with plain.global_seed(seed):
        return peft.get_peft_model(ToyDiT(width=32), config).train()


@pytest.mark.parametrize("name", ["", "adapter_model.safetensors"])
def test_an_adapter_teaches_on_the_students_own_base(name: str, tmp_path: Path) -> None:
    first, student = with_adapter(1, init_lora_weights=False), with_adapter(2)
    first.save_pretrained(tmp_path / "stage1")
    expected = guided(first)
    teacher = teacher_of(st.share_frozen(student), tmp_path / "stage1" / name)
    torch.testing.assert_close(teacher(*CALL), expected, **plain.TOLERANCE)
    mine = {identity(tensor) for tensor in (*student.parameters(), *student.buffers())}
    extra = sum(p.nbytes for p in teacher.parameters() if identity(p) not in mine)
    assert extra == sum(p.nbytes for n, p in teacher.named_parameters() if "lora" in n) > 0
    taught(student, teacher)
    assert all(p.requires_grad == ("lora" in n) for n, p in student.named_parameters())
    assert student.training


def test_adapters_patched_onto_the_layers_are_copied_with_them_as_they_are(tmp_path: Path) -> None:
    class Patched(nn.Module):  # as kohya's: outside of the model, which it changes
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.down = nn.Linear(linear.in_features, linear.out_features, bias=False)
            self.inner = linear.forward
            linear.forward = self.forward

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + self.down(x)

    student = ToyDiT(width=32).requires_grad_(False)
    with plain.global_seed(0):
        adapters = nn.ModuleList(Patched(block.fc1) for block in student.blocks)
    expected = guided(copy.deepcopy(student))
    teacher = teacher_of(st.share_frozen(student.train()))
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(1.0)
    torch.testing.assert_close(teacher(*CALL), expected, **plain.TOLERANCE)
    taught(student, teacher)
    assert all(p.grad is not None for p in adapters[0].parameters())
    with pytest.raises(CheckpointError, match="weights that are no part of its model"):
        teacher.save_pretrained(tmp_path / "teacher")


def test_nothing_is_loaded_into_what_another_model_shares() -> None:
    student = with_adapter(1)
    before = {name: tensor.clone() for name, tensor in st.strip(student).items()}
    teacher_of(st.share_frozen(student), dict(before))  # the same values are harmless
    with pytest.raises(CheckpointError, match=r"share_frozen\(\) has left to another model"):
        teacher_of(st.share_frozen(student), {name: tensor + 1 for name, tensor in before.items()})
    assert all(torch.equal(tensor, before[name]) for name, tensor in st.strip(student).items())


def test_a_copy_owns_what_trains_and_what_batches_change() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2)).requires_grad_(False)
    model[2].requires_grad_(True)
    model.register_buffer("table", torch.ones(3))
    mine, theirs = (m.state_dict(keep_vars=True) for m in (model, st.share_frozen(model)))
    same = {name for name, tensor in mine.items() if theirs[name] is tensor}
    assert same == {"0.weight", "0.bias", "1.weight", "1.bias", "table"}


@pytest.mark.parametrize("what", ["the model", "a parameter", "a module", "a view"])
def test_what_trains_and_is_shared_is_refused_and_the_student_left_alone(what: str) -> None:
    student = ToyDiT()
    other = student if what == "the model" else copy.deepcopy(student)
    if what == "a parameter":
        other.x_embedder.weight = student.x_embedder.weight
    elif what == "a module":
        other.x_embedder = student.x_embedder
    elif what == "a view":
        other.x_embedder.weight = nn.Parameter(student.x_embedder.weight.detach())
    teacher = teacher_of(other)
    if what == "a parameter":  # building alone froze nothing of another model
        assert student.x_embedder.weight.requires_grad
    with plain.refused(TeacherError, "share_frozen(model)", "student itself" if what == "the model" else "x_embedder"):
        st.SelfTransLoss.stage2(student, layer="blocks.1", teacher=teacher, time="sit")
    assert all(p.requires_grad for p in student.parameters())
    assert all(module.training for module in student.modules())


def quantise_or_offload(model: nn.Module, how: str, folder: Path) -> None:
    cpu = torch.device("cpu")
    if how == "torchao":
        quantization = pytest.importorskip("torchao.quantization")
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    elif how == "layerwise casting":
        skipped = ("x_embedder", "y_embedder")
        hooks.apply_layerwise_casting(model, torch.float8_e4m3fn, torch.float32, skip_modules_pattern=skipped)
    elif how == "cpu_offload":
        accelerate.cpu_offload(model, execution_device=cpu)
    elif how == "dispatch_model":
        places = {name: "cpu" for name, _ in model.named_children() if name != "blocks"}
        places |= {f"blocks.{i}": "disk" if i % 2 else "cpu" for i in range(4)}
        accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)
    else:
        hooks.apply_group_offloading(model, cpu, cpu, offload_type="block_level", num_blocks_per_group=1)


@pytest.mark.filterwarnings("ignore")  # of the libraries' own
@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize("how", ["torchao", "layerwise casting", "cpu_offload", "dispatch_model", "group_offload"])
def test_a_quantised_or_offloaded_teacher_gives_its_own_features_from_where_it_is(
    how: str, truncate: bool, tmp_path: Path
) -> None:
    model, offloaded = ToyDiT(width=32).requires_grad_(False), how.endswith(("offload", "model"))
    expected = guided(model)
    quantise_or_offload(model, how, tmp_path / "weights")
    teacher = teacher_of(model, truncate=truncate)
    if not offloaded:
        assert not torch.equal(teacher.fingerprint, teacher_of(ToyDiT(width=32)).fingerprint)
        expected = guided(model)
    places = {name: p.device for name, p in teacher.model.named_parameters()}
    for _ in range(2):
        torch.testing.assert_close(teacher(*CALL), expected, rtol=1e-4, atol=1e-5)
    if offloaded:
        assert teacher.to("meta") is teacher  # whatever a criterion is moved to
    criterion = taught(ToyDiT(width=32, seed=5), teacher)
    assert {n: p.device for n, p in criterion.teacher.model.named_parameters()}.items() <= places.items()
    if how != "group_offload":
        with pytest.raises(CheckpointError, match="cannot be saved"):
            teacher.save_pretrained(tmp_path / "teacher")
        assert not (tmp_path / "teacher").exists()


@pytest.mark.parametrize("how", ["meta", "lazy", "FSDP1"])
def test_a_teacher_that_cannot_run_is_refused_by_name_however_it_comes_in(how: str) -> None:
    class FullyShardedDataParallel(nn.Sequential):  # known by its name
        pass

    model = ToyDiT()
    teacher, part = teacher_of(model), "'x_embedder.weight' has no data yet: materialise the model first"
    if how == "meta":
        model.to("meta")
    elif how == "lazy":
        model.x_embedder = nn.LazyConv2d(16, 2, 2)
    else:
        model.blocks[1], part = FullyShardedDataParallel(model.blocks[1]), "FullyShardedDataParallel (FSDP1)"
    for refused in (lambda: teacher_of(model), lambda: teacher(*CALL)):
        with plain.refused(TeacherError, part):
            refused()
