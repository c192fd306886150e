"""Mixed precision: what runs in half precision under autocast, and what stays in float32."""

import pytest
import torch
from common.sit import SiT
from loops import (
    GUIDANCE_SCALE,
    Batch,
    denoising,
    gradients,
    new_criterion,
    new_teacher,
    noisy_batch,
    plain_total,
    student,
    total,
    toy,
)
from torch import Tensor, nn

HALVES = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
TIMES = [0.35, 0.5, 0.1, 0.9, 0.55, 0.4]

# Half precision against float32, relative to the largest gradient of a tensor: sums of a few dozen rounded products.
ROUNDING = {torch.bfloat16: 0.05, torch.float16: 0.01}


def batch_on(device: torch.device) -> Batch:
    return noisy_batch(TIMES).to(device)


def output_dtypes(*modules: nn.Module) -> list[torch.dtype]:
    """A list that each module's output dtype will be appended to."""
    seen: list[torch.dtype] = []
    for module in modules:
        module.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    return seen


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(
            found[name].float(), tensor.float(), rtol=0, atol=tolerance * tensor.abs().max().item() + 1e-6
        )


@HALVES
@pytest.mark.parametrize("called", ["inside", "outside"])
@pytest.mark.parametrize("stage", [1, 2])
def test_under_autocast_it_is_the_formula_under_autocast(
    stage: int, called: str, half: torch.dtype, device: torch.device
) -> None:
    b, model = batch_on(device), student(device)
    criterion = new_criterion(model, stage)
    with torch.autocast(device.type, dtype=half):
        loss = denoising(model, b)
        if called == "inside":
            terms = criterion(loss, latents=b.latents)
    if called == "outside":  # as where accelerate puts its autocast around the forward alone
        terms = criterion(loss, latents=b.latents)
    assert terms.total.dtype == terms.alignment.dtype == torch.float32
    terms.total.backward()
    found = gradients(model, criterion)

    model.zero_grad()
    criterion.zero_grad()
    with torch.autocast(device.type, dtype=half):
        wanted = plain_total(model, criterion, toy(2, device) if stage == 2 else None, b)
    wanted.backward()
    # Another batch size may sum in another order before it rounds: far less than what the precision itself costs.
    torch.testing.assert_close(terms.total, wanted, rtol=ROUNDING[half] / 10, atol=0)
    assert_close(found, gradients(model, criterion), ROUNDING[half] / 2)


@HALVES
def test_gradients_under_autocast_are_those_of_float32_but_for_rounding(
    half: torch.dtype, device: torch.device
) -> None:
    b = batch_on(device)
    found = []
    for enabled in (True, False):
        model = student(device)
        criterion = new_criterion(model)
        with torch.autocast(device.type, dtype=half, enabled=enabled):
            total(model, criterion, b).backward()
        found.append(gradients(model, criterion))
    assert_close(*found, ROUNDING[half])
    assert any(not torch.equal(found[0][name], tensor) for name, tensor in found[1].items())


def small_sit(generator: torch.Generator, device: torch.device | str = "cpu") -> SiT:
    """SiT adds float32 positions to its patches, so under autocast its blocks add to a float32 stream; not the toy."""
    model = SiT(input_size=8, hidden_size=16, depth=3, num_heads=2, num_classes=10)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    model.y_embedder.dropout_prob = 0.0
    return model.to(device)


@HALVES
def test_what_runs_in_half_precision_and_what_does_not(
    half: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    b, model = batch_on(device), small_sit(generator, device)
    criterion = new_criterion(model, teacher=new_teacher(small_sit(generator, device), example=(b.x_t, b.t, b.y)))
    teacher = criterion.teacher
    assert teacher is not None
    linears = output_dtypes(teacher.model.blocks[0].mlp.fc1, criterion.heads[0][0], criterion.heads[0][4])
    stream = output_dtypes(teacher.model.blocks[0], teacher.model.blocks[1])
    with torch.autocast(device.type, dtype=half):
        f_c, f_u = teacher.pair(b.x_t, b.t, y=b.y)
        total(model, criterion, b)
    assert set(linears) == {half}
    assert set(stream) == {torch.float32}, "the teacher's residual stream"
    assert f_c.dtype == f_u.dtype == torch.float32
    with torch.autocast(device.type, dtype=half):
        guided = teacher.guide(f_c, f_u)
    assert torch.equal(guided, f_u + GUIDANCE_SCALE * (f_c - f_u)), "the combination was rounded"


@HALVES
def test_matrices_held_in_half_precision_give_the_same_features_to_the_bit(
    half: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    b = batch_on(device)
    teacher = new_teacher(small_sit(generator, device), example=(b.x_t, b.t, b.y))
    with torch.autocast(device.type, dtype=half):
        wanted = teacher.pair(b.x_t, b.t, y=b.y)
        for module in teacher.modules():  # as docs/cost.md has it
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(half)
        found = teacher.pair(b.x_t, b.t, y=b.y)
    assert all(torch.equal(got, want) for got, want in zip(found, wanted, strict=True))
    assert {p.dtype for p in teacher.model.blocks[0].parameters()} == {half}


@pytest.mark.parametrize("stage", [1, 2])
def test_a_float32_loss_from_bfloat16_weights(stage: int, generator: torch.Generator) -> None:
    b = noisy_batch(TIMES)
    model = small_sit(generator).to(torch.bfloat16)
    criterion = new_criterion(model, stage)
    half = b._replace(x_t=b.x_t.bfloat16())  # t stays as it was drawn
    terms = criterion(denoising(model, half), latents=b.latents)
    assert terms.alignment.dtype == torch.float32
    assert terms.alignment > 0
    terms.total.backward()
    assert {p.grad.dtype for p in model.blocks[0].parameters()} == {torch.bfloat16}
    assert {p.grad.dtype for p in criterion.parameters()} == {torch.float32}


def test_features_are_cast_to_the_heads_dtype() -> None:
    b, model = noisy_batch(TIMES), student()
    criterion = new_criterion(model)
    criterion.heads.to(torch.bfloat16)
    seen = output_dtypes(criterion.heads[0])
    terms = criterion(denoising(model, b), latents=b.latents)
    terms.total.backward()
    assert seen == [torch.bfloat16]
    assert terms.alignment.dtype == torch.float32
    assert {p.grad.dtype for p in criterion.parameters()} == {torch.bfloat16}
    assert {p.grad.dtype for p in model.blocks[:2].parameters()} == {torch.float32}


@pytest.mark.parametrize("stage", [1, 2])
def test_a_gradient_scaler_scales_the_whole_loss(stage: int, device: torch.device) -> None:
    b = batch_on(device)
    results = []
    for enabled in (True, False):
        model = student(device)
        criterion = new_criterion(model, stage)
        optimizer = torch.optim.SGD([*model.parameters(), *criterion.parameters()], lr=1e-4)
        scaler = torch.amp.GradScaler(device.type, enabled=enabled, init_scale=2.0**7)
        with torch.autocast(device.type, dtype=torch.float16):
            loss = total(model, criterion, b)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        results.append(gradients(model, criterion))
        before = criterion.heads[0][0].weight.clone() if stage == 2 else criterion.heads[0].linear.weight.clone()
        scaler.step(optimizer)
        scaler.update()
        after = criterion.heads[0][0].weight if stage == 2 else criterion.heads[0].linear.weight
        assert not torch.equal(before, after)
    # The scale saves what would have underflowed and adds nothing: the same gradients up to float16's rounding.
    assert_close(*results, ROUNDING[torch.float16])


def test_a_step_that_overflowed_is_skipped_for_model_and_head_alike(device: torch.device) -> None:
    b, model = batch_on(device), student(device)
    criterion = new_criterion(model)
    parameters = [*model.parameters(), *criterion.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=1e-4)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**40)
    before = [parameter.clone() for parameter in parameters]
    with torch.autocast(device.type, dtype=torch.float16):
        loss = total(model, criterion, b)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 2.0**40
    assert all(torch.equal(old, new) for old, new in zip(before, parameters, strict=True))


def test_a_teacher_built_under_autocast_is_the_same_one(device: torch.device) -> None:
    with torch.autocast(device.type, dtype=torch.bfloat16):
        teacher = new_teacher(toy(2, device))
    assert torch.equal(teacher.fingerprint.cpu(), new_teacher().fingerprint.cpu())
