"""No step waits for the device but those that look: the host goes on to queue the next operations."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lookalikes import LOOKALIKES
from loops import assert_same, denoising, gradients, new_criterion, noisy_batch, student
from pretend_gpu import GPU, on_pretend_gpu, waits
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import selftrans_reg as st
from selftrans_reg.time import TimeConvention, check_against_latents

# In SiT's convention the default window is t in [0.3, 0.6]: four of the eight rows are inside.
TIMES = [0.1, 0.4, 0.5, 0.9, 0.35, 0.95, 0.55, 0.05]
INTERVAL = 6
LOOKING = [True, True, True, False, False, True]  # the first three calls, and one at the interval
SETTINGS: list[dict[str, Any]] = [
    *({"stage": 1}, {"stage": 1, "gating": "released"}, {"stage": 1, "target": "velocity"}),
    *({}, {"layer": ["blocks.0", "blocks.1"]}, {"gating": "released"}, {"window": None}),
    *({"teacher_rows": 2}, {"teacher_chunk": 3}, {"stop_when": st.Plateau(interval=INTERVAL)}),
]
Steps = list[tuple[bool, dict[str, Tensor]]]  # of each, whether it waited, and its gradients


def steps_of(model: nn.Module, criterion: nn.Module, batches: list[Any], loss_of: Callable[..., Tensor]) -> Steps:
    found = []
    for seed, batch in enumerate(batches):
        torch.manual_seed(seed)
        model.zero_grad(), criterion.zero_grad()
        waits.clear()
        criterion(loss_of(model, batch), latents=batch.latents).total.backward()
        found.append((bool(waits), {name: tensor.cpu() for name, tensor in gradients(model, criterion).items()}))
    return found


def of_a_loop(settings: dict[str, Any], device: str) -> Steps:
    model = student(device)
    criterion = new_criterion(model, **{"health_interval": INTERVAL, "check_interval": INTERVAL} | settings)
    batches = [noisy_batch(TIMES, seed=seed).to(device) for seed in range(INTERVAL)]
    return steps_of(model, criterion, batches, denoising)


def of_a_backbone(name: str, stage: int, device: str) -> Steps:
    """Of a look-alike's loop that looks at nothing."""
    backbone = LOOKALIKES[name]
    model, settings = backbone.build(0).to(device), {"health_interval": None, "check_interval": None}
    if stage == 1:
        criterion = backbone.stage1(model, **settings)
    else:
        criterion = backbone.stage2(model, backbone.make_teacher(backbone.build(1)), **settings)
    batches = []
    for batch in (backbone.batch(seed=seed) for seed in range(3)):
        arguments = tree_map_only(Tensor, lambda tensor: tensor.to(device), batch.arguments)
        batches.append(batch._replace(latents=batch.latents.to(device), arguments=arguments))
    return steps_of(model, criterion, batches, backbone.losses)


def assert_same_steps(found: Steps, wanted: Steps) -> None:
    for (_, gradients_found), (_, gradients_wanted) in zip(found, wanted, strict=True):
        assert_same(gradients_found, gradients_wanted)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_only_steps_that_look_wait(settings: dict[str, Any]) -> None:
    found = on_pretend_gpu(of_a_loop, settings, GPU)
    assert [waited for waited, _ in found] == LOOKING
    assert_same_steps(found, of_a_loop(settings, "cpu"))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", LOOKALIKES)
def test_a_step_waits_for_no_backbone(name: str, stage: int) -> None:
    found = on_pretend_gpu(of_a_backbone, name, stage, GPU)
    # In the first step tables of times are copied to the device, and the teacher looks at its indices.
    assert not any(waited for waited, _ in found[1:])
    assert_same_steps(found, of_a_backbone(name, stage, "cpu"))


def waits_of_a_check(name: str) -> list[str]:
    b = noisy_batch(TIMES).to(GPU)
    waits.clear()
    check_against_latents(TimeConvention.named(name), b.x_t, b.t, b.latents)
    return list(waits)


def test_the_check_against_the_latents_waits_once() -> None:
    assert len(on_pretend_gpu(waits_of_a_check, "sit")) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="asks CUDA")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_on_cuda_too(settings: dict[str, Any]) -> None:
    model = student("cuda")
    criterion = new_criterion(model, **{"health_interval": INTERVAL, "check_interval": INTERVAL} | settings)
    batches = [noisy_batch(TIMES, seed=seed).to("cuda") for seed in range(INTERVAL)]
    try:
        for b, looking in zip(batches, LOOKING, strict=True):
            torch.cuda.set_sync_debug_mode("default" if looking else "error")
            criterion(denoising(model, b), latents=b.latents).total.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
