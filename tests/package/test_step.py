"""One step, seen from outside: what it calls, which device it names, what inference mode and times by token leave."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import plain
import pytest
import torch
from loops import (
    GUIDANCE_SCALE,
    LAYER,
    WEIGHT,
    assert_same,
    gradients,
    new_criterion,
    new_teacher,
    noisy_batch,
    plain_tokens,
    student,
    total,
)
from torch import Tensor
from toys import ToyDiT

import selftrans_reg as st

TIMES = [0.1, 0.35, 0.5, 0.9]  # inside and outside of the window


def test_an_ordinary_step_makes_few_calls_over_few_files() -> None:
    calls: Counter[tuple[str, str]] = Counter()
    model, b = student(), noisy_batch(TIMES)
    criterion = new_criterion(model)

    def note(frame: FrameType, event: str, _: object) -> None:
        file = Path(frame.f_code.co_filename)
        if event == "call" and Path(st.__file__).parent in file.parents:
            calls[file.stem, frame.f_code.co_name] += 1

    for step in range(6):  # the first ones also check and measure
        sys.setprofile(note if step == 5 else None)
        total(model, criterion, b).backward()
    sys.setprofile(None)
    assert calls["criterion", "forward"] == 1
    assert sum(calls.values()) <= 130, calls.most_common(20)
    assert len({file for file, _ in calls}) <= 11


@pytest.fixture
def _meta_by_default() -> Iterator[None]:
    """A stand-in for ``torch.set_default_device("cuda")``: what names no device is made where it can be no use."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.mark.usefixtures("_meta_by_default")
@pytest.mark.parametrize(
    ("stage", "more"), [(1, {"window": None}), (2, {"teacher_rows": 1}), (2, {"teacher_rows": 1, "gating": "released"})]
)
def test_every_tensor_is_made_on_a_named_device(stage: int, more: dict[str, object]) -> None:
    with torch.device("cpu"):
        model, teacher, b = student(), new_teacher(), noisy_batch(TIMES)
    criterion = new_criterion(model, stage, teacher, **more, stop_when=st.Plateau(interval=1))
    for step in range(3):
        loss = total(model, criterion, b, step=step)
        loss.backward()
        assert loss.isfinite()
    criterion.load_state_dict(criterion.state_dict())


def test_features_may_come_from_inference_mode() -> None:
    """Autograd cannot save such tensors for the backward pass."""
    b = noisy_batch(TIMES)
    with torch.inference_mode():
        features = new_teacher()(b.x_t, b.t, b.y)
    tokens = torch.ones(features.shape, requires_grad=True)
    st.feature_alignment(tokens, features).mean().backward()
    torch.testing.assert_close(tokens.grad, 2 * (1 - features.clone()) / features.numel())


class ByToken(ToyDiT):
    """t (N, T), one time for each token; the model sees their mean."""

    def embed_t(self, t: Tensor) -> Tensor:
        return super().embed_t(t.mean(1))


@pytest.mark.parametrize("gating", ["per-sample", "released"])
@pytest.mark.parametrize("stage", [1, 2])
def test_times_by_token_gate_tokens_and_the_mean_is_over_the_whole_batch(stage: int, gating: str) -> None:
    model, teacher, b = ByToken(depth=3, seed=1), ByToken(depth=3, seed=2), noisy_batch([0.5] * 4)
    model.dropout = 0.0
    t = torch.rand(4, 16, generator=torch.Generator().manual_seed(0))
    t[1], t[2] = 0.9, 0.4  # a row outside, and one inside
    criterion = new_criterion(model, stage, new_teacher(copy.deepcopy(teacher)), gating=gating, check_interval=None)
    terms = criterion(model(b.x_t, t, b.y).square().mean(), latents=b.latents)
    terms.total.backward()
    found = gradients(model, criterion)
    model.zero_grad(), criterion.zero_grad()

    tokens, _ = plain_tokens(model, b._replace(t=t.mean(1)), b.y, LAYER)
    head = dict(criterion.heads.named_parameters())
    if stage == 1:
        error = plain.predict(head, tokens, "0.") - plain.patches(b.latents)
    else:
        calls = [(b.x_t, t, y) for y in (b.y, torch.full_like(b.y, 10))]
        error = plain.project(head, tokens, "0.") - plain.guided(teacher, "blocks.2", GUIDANCE_SCALE, *calls)
    distance, inside = error.square().mean(2), plain.inside(1 - t)  # (N, T)
    alignment = (distance * inside).mean() if gating == "per-sample" else distance.mean() * inside.mean()
    (model(b.x_t, t, b.y).square().mean() + WEIGHT * alignment).backward()
    torch.testing.assert_close(terms.alignment, alignment.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(terms.in_window, inside.mean())
    assert_same(found, gradients(model, criterion))


def test_what_is_no_step_is_refused() -> None:
    criterion = new_criterion(model := student())
    for step in (2**63, -1, 2.0, True, "1", torch.tensor(3)):
        with pytest.raises(st.SettingError, match="step must be an integer, 0 or more and below"):
            total(model, criterion, noisy_batch(TIMES), step=step)
