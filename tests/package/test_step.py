"""One step, seen from outside: what it calls, which device it names, what compiles it, what inference mode leaves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from count_calls import TIMES, count_calls
from loops import (
    LAYER,
    assert_same,
    denoising,
    gradients,
    new_criterion,
    new_teacher,
    noisy_batch,
    plain_tokens,
    student,
    total,
    toy,
)
from torch import Tensor, nn
from toys import ToyDiT

import selftrans_reg as st


def test_an_ordinary_step_makes_few_calls_over_few_files() -> None:
    found = count_calls()
    assert sum(found.values()) <= 130, found.most_common(20)
    assert len({file for file, _ in found}) <= 11


@pytest.fixture
def _meta_by_default() -> Iterator[None]:
    """A stand-in for ``torch.set_default_device("cuda")``: what names no device is made where it can be no use."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.mark.usefixtures("_meta_by_default")
@pytest.mark.parametrize(
    ("stage", "more"), [(1, {"window": None}), (2, {"teacher_rows": 1}), (2, {"gating": "released"})]
)
def test_every_tensor_is_made_on_a_named_device(stage: int, more: dict[str, object]) -> None:
    with torch.device("cpu"):
        model, teacher, b = student(), new_teacher(), noisy_batch(TIMES)
    criterion = new_criterion(model, stage, teacher, **more, stop_when=st.Plateau(interval=1))
    for step in range(3):
        terms = criterion(denoising(model, b), latents=b.latents, step=step)
        terms.total.backward()
        assert terms.total.isfinite()
    criterion.load_state_dict(criterion.state_dict())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at the loss's
@pytest.mark.parametrize("how", ["torch.compile(criterion)", "criterion.compile()", "whole step"])
def test_a_compiled_criterion_is_left_out_of_the_graphs(how: str) -> None:
    """And so makes none, however much the batches differ; values and gradients are as they are without."""
    torch.compiler.reset()
    model, reference = student(), student()
    criterion, plain = new_criterion(model), new_criterion(reference)
    run: nn.Module = criterion
    if how == "torch.compile(criterion)":
        run = torch.compile(criterion, backend="eager")
    elif how == "criterion.compile()":
        criterion.compile(backend="eager")
    else:
        run = torch.compile(lambda loss, latents: criterion(loss, latents=latents), backend="eager")
    torch._dynamo.utils.counters.clear()
    for n in (4, 3, 2, 1):
        b = noisy_batch(TIMES[:n])
        run(denoising(model, b), latents=b.latents).total.backward()
        total(reference, plain, b).backward()
    assert_same(gradients(model, criterion), gradients(reference, plain), tolerance=0.0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 1
    torch.compiler.reset()


@pytest.mark.parametrize("target", ["latents", "velocity"])
def test_latents_may_come_from_inference_mode(target: str) -> None:
    """Autograd cannot save such tensors for the backward pass."""
    for times in ([0.35, 0.5], [0.35, 0.9]):  # all rows inside, some rows
        found = []
        for inference in (True, False):
            model, b = student(), noisy_batch(times)
            criterion = new_criterion(model, 1, target=target)
            with torch.inference_mode(inference):
                latents = b.latents.clone()
            criterion(denoising(model, b), latents=latents).total.backward()
            found.append(gradients(model, criterion))
        assert_same(*found, tolerance=0.0)


@pytest.mark.parametrize("distance", ["mse", "cosine", "smooth_l1"])
def test_features_may_come_from_inference_mode(distance: str) -> None:
    b = noisy_batch(TIMES)
    with torch.inference_mode():
        features = new_teacher()(b.x_t, b.t, b.y)
    tokens = torch.ones_like(features.clone()).requires_grad_()
    st.feature_alignment(st.ProjectionHead(16, 16, 8)(tokens), features, distance).mean().backward()
    assert tokens.grad is not None


class ByToken(ToyDiT):
    """t (N, T), one time for each token; the model sees their mean."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__(depth=3, seed=seed)
        self.dropout = 0.0

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, t.mean(1), y)


class TestTimesByToken:
    """The window gates tokens; the mean is over the whole batch and all tokens."""

    @pytest.mark.parametrize("gating", ["per-sample", "released"])
    @pytest.mark.parametrize("stage", [1, 2])
    def test_equals_the_plain_formula(self, stage: int, gating: str) -> None:
        model, b = ByToken(), noisy_batch([0.5] * 4)
        t = torch.rand(4, 16, generator=torch.Generator().manual_seed(0))
        t[1], t[2] = 0.9, 0.4  # a row outside, and one inside
        teacher = new_teacher(ByToken(2)) if stage == 2 else None
        criterion = new_criterion(model, stage, teacher, gating=gating, check_interval=None)
        terms = criterion(model(b.x_t, t, b.y).square().mean(), latents=b.latents)
        terms.total.backward()
        found = gradients(model, criterion)
        model.zero_grad(), criterion.zero_grad()

        called = b._replace(t=t.mean(1))
        tokens, _ = plain_tokens(model, called, b.y, LAYER)
        head = criterion.heads[0]
        if stage == 1:
            predicted = head.predict(tokens)
            target = F.unfold(b.latents, 2, stride=2).transpose(1, 2)  # (N, T, C p q)
            target = target.unflatten(2, (4, 4)).transpose(2, 3).flatten(2)  # channels last
        else:
            predicted = head(tokens)
            with torch.no_grad():
                f_c, _ = plain_tokens(toy(2), called, b.y, 2)
                f_u, _ = plain_tokens(toy(2), called, torch.full_like(b.y, 10), 2)
            target = f_u + 3.0 * (f_c - f_u)
        distance = (predicted - target).square().mean(2)  # (N, T)
        inside = ((1 - t >= 0.4 - 1e-6) & (1 - t <= 0.7 + 1e-6)).float()
        alignment = (distance * inside).mean() if gating == "per-sample" else distance.mean() * inside.mean()
        (model(b.x_t, t, b.y).square().mean() + 0.5 * alignment).backward()
        torch.testing.assert_close(terms.alignment, alignment.detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(terms.in_window, inside.mean())
        assert_same(found, gradients(model, criterion))

    def test_times_that_do_not_fit_are_refused(self) -> None:
        for count, target, message in (
            (8, "latents", r"8 times a sample, but layer 'blocks\.1' gave 16 tokens"),
            (16, "velocity", "target='velocity' needs one time for each sample"),
        ):
            model, b = ByToken(), noisy_batch([0.5] * 4)
            criterion = new_criterion(model, 1, check_interval=None, target=target)
            loss = model(b.x_t, torch.full((4, count), 0.5), b.y).mean()
            with pytest.raises(st.ShapeError, match=message):
                criterion(loss, latents=b.latents)


def test_what_is_no_teacher_or_no_step_is_refused() -> None:
    criterion = new_criterion(model := student())
    with pytest.raises(st.SettingError, match=r"(?s)got a ToyDiT\.\n.*st\.build_teacher"):
        st.SelfTransLoss.stage2(student(), layer="blocks.1", teacher=student(), time="sit", hidden_size=16)
    for step in (2**63, -1, 2.0, True, "1", torch.tensor(3)):
        with pytest.raises(st.SettingError, match="step must be an integer, 0 or more and below"):
            total(model, criterion, noisy_batch(TIMES), step=step)
