"""Mixed precision: what runs in half precision under autocast, and what stays in float32."""

import loops
import pytest
import torch
from loops import denoising, gradients, new_criterion, new_teacher, noisy_batch, small_sit, student, total
from torch import nn

HALVES = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
STAGES = pytest.mark.parametrize("stage", [1, 2])
B = noisy_batch([0.35, 0.5, 0.1, 0.9, 0.55, 0.4])
# Half precision against float32, relative to the largest gradient of a tensor: sums of a few dozen rounded products.
ROUNDING = {torch.bfloat16: 0.05, torch.float16: 0.01}


@HALVES
@pytest.mark.parametrize("called", ["inside", "outside"])  # accelerate puts its autocast around the forward alone
@STAGES
def test_under_autocast_it_is_the_formula_under_autocast(
    stage: int, called: str, half: torch.dtype, device: torch.device
) -> None:
    b, model = B.to(device), student(device)
    criterion = new_criterion(model, stage)
    with torch.autocast(device.type, dtype=half):
        loss = denoising(model, b)
    with torch.autocast(device.type, dtype=half, enabled=called == "inside"):
        terms = criterion(loss, latents=b.latents)
    assert terms.total.dtype == terms.alignment.dtype == torch.float32
    terms.total.backward()
    found = gradients(model, criterion)

    model.zero_grad(), criterion.zero_grad()
    with torch.autocast(device.type, dtype=half):
        wanted, alignment = loops.plain_terms(model, criterion, loops.toy(2, device) if stage == 2 else None, b)
        wanted = wanted + loops.WEIGHT * alignment
    wanted.backward()
    # Another batch size may sum in another order before it rounds: far less than what the precision itself costs.
    torch.testing.assert_close(terms.total, wanted, rtol=ROUNDING[half] / 10, atol=0)
    for name, tensor in gradients(model, criterion).items():
        tolerance = ROUNDING[half] / 2 * tensor.abs().max().item() + 1e-6
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=tolerance)


@HALVES
def test_what_runs_in_half_precision_and_what_does_not(
    half: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    b, model = B.to(device), small_sit(generator, device)
    teacher = new_teacher(small_sit(generator, device), example=(b.x_t, b.t, b.y))
    criterion = new_criterion(model, teacher=teacher)
    blocks, head, seen = teacher.model.blocks, criterion.heads[0], set()
    for module, dtype in ((blocks[0].mlp.fc1, half), (head[0], half), (head[4], half), *((b, None) for b in blocks)):
        module.register_forward_hook(lambda _, args, output, dtype=dtype: seen.add((dtype, output.dtype)))
    with torch.autocast(device.type, dtype=half):
        f_c, f_u = teacher.pair(b.x_t, b.t, y=b.y)
        total(model, criterion, b)
        guided = teacher.guide(f_c, f_u)
    assert seen == {(half, half), (None, torch.float32)}  # the teacher's residual stream stays in float32
    assert f_c.dtype == f_u.dtype == torch.float32
    assert torch.equal(guided, f_u + loops.GUIDANCE_SCALE * (f_c - f_u)), "the combination was rounded"

    for module in teacher.modules():  # matrices held in half precision, as docs/cost.md has it, give the same bits
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(half)
    with torch.autocast(device.type, dtype=half):
        found = teacher.pair(b.x_t, b.t, y=b.y)
    assert all(torch.equal(got, want) for got, want in zip(found, (f_c, f_u), strict=True))


@STAGES
def test_a_float32_loss_from_bfloat16_weights(stage: int, generator: torch.Generator) -> None:
    model = small_sit(generator).to(torch.bfloat16)
    criterion = new_criterion(model, stage)
    terms = criterion(denoising(model, B._replace(x_t=B.x_t.bfloat16())), latents=B.latents)  # t stays as it was drawn
    assert terms.alignment.dtype == torch.float32
    assert terms.alignment > 0
    terms.total.backward()
    assert {p.grad.dtype for p in model.blocks[0].parameters()} == {torch.bfloat16}
    assert {p.grad.dtype for p in criterion.parameters()} == {torch.float32}
