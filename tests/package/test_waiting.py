"""No step waits for the device but those that look: the host goes on to queue the next operations."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from lookalikes import LOOKALIKES
from loops import assert_same, gradients, new_criterion, noisy_batch, student, total
from pretend_gpu import NAME, pretend_gpu
from torch import Tensor
from torch.utils._pytree import tree_map_only

import selftrans_reg as st

# In SiT's convention the default window is t in [0.3, 0.6]: four of the eight rows are inside.
TIMES = [0.1, 0.4, 0.5, 0.9, 0.35, 0.95, 0.55, 0.05]
INTERVAL = 6
LOOKING = [True, True, True, False, False, True]  # the first three calls, and one at the interval
SETTINGS: list[dict[str, Any]] = [
    *({"stage": 1}, {"stage": 1, "gating": "released"}, {"stage": 1, "target": "velocity"}),
    *({}, {"layer": ["blocks.0", "blocks.1"]}, {"gating": "released"}, {"window": None}),
    *({"teacher_rows": 2}, {"teacher_chunk": 3}, {"stop_when": st.Plateau(interval=INTERVAL)}),
]

pytestmark = pytest.mark.filterwarnings("ignore:.*synchroniz")  # outside of the steps


@pytest.fixture(params=[NAME, "cuda"] if torch.cuda.is_available() else [NAME])
def gpu(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cuda":
        yield "cuda"
        torch.cuda.set_sync_debug_mode("default")
    else:
        with pretend_gpu():
            yield request.param


def waited(step: Callable[[], Tensor]) -> bool:
    """Whether the host waited in a step and its backward pass."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
        step().backward()
    return any("called a synchronizing" in str(warning.message) for warning in caught)


def steps(settings: dict[str, Any], device: str) -> list[tuple[bool, dict[str, Tensor]]]:
    """Of each step, whether it waited, and its gradients."""
    model, found = student(device), []
    criterion = new_criterion(model, **{"health_interval": INTERVAL, "check_interval": INTERVAL} | settings)
    for seed in range(INTERVAL):
        b = noisy_batch(TIMES, seed=seed).to(device)
        model.zero_grad(), criterion.zero_grad()
        looked = waited(lambda b=b: total(model, criterion, b))
        found.append((looked, {name: tensor.cpu() for name, tensor in gradients(model, criterion).items()}))
    return found


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_only_steps_that_look_wait(settings: dict[str, Any], gpu: str) -> None:
    found = steps(settings, gpu)
    assert [looked for looked, _ in found] == LOOKING
    for (_, there), (_, here) in zip(found, steps(settings, "cpu"), strict=True):
        assert_same(there, here, tolerance=1e-5)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", LOOKALIKES)
def test_a_step_waits_for_no_backbone(name: str, stage: int, gpu: str) -> None:
    backbone = LOOKALIKES[name]
    model, settings = backbone.build(0).to(gpu), {"health_interval": None, "check_interval": None}  # no looks
    if stage == 1:
        criterion = backbone.stage1(model, **settings)
    else:
        criterion = backbone.stage2(model, backbone.make_teacher(backbone.build(1)), **settings)
    found = []
    for seed in range(3):
        b = tree_map_only(Tensor, lambda tensor: tensor.to(gpu), backbone.batch(seed=seed))
        found.append(waited(lambda b=b: criterion(backbone.losses(model, b), latents=b.latents).total))
    # In the first step tables of times are copied to the device, and the teacher looks at its indices.
    assert not any(found[1:])
