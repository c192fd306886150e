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
    model = student()
    found = count_calls(model, new_criterion(model), noisy_batch(TIMES))
    assert sum(found.values()) <= 130, found.most_common(20)
    assert len({file for file, _ in found}) <= 11


@pytest.fixture
def meta_by_default() -> Iterator[None]:
    """A stand-in for ``torch.set_default_device("cuda")``: what names no device is made where it can be no use."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("settings", [{}, {"window": None}, {"teacher_rows": 1}, {"gating": "released"}], ids=str)
@pytest.mark.parametrize("stage", [1, 2])
def test_every_tensor_is_made_on_a_named_device(
    stage: int, settings: dict[str, object], meta_by_default: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.device("cpu"):
        model, teacher, b = student(), new_teacher(), noisy_batch(TIMES)
    settings = settings if stage == 2 else {name: v for name, v in settings.items() if name != "teacher_rows"}
    criterion = new_criterion(model, stage, teacher, **settings, stop_when=st.Plateau(interval=1))
    for step in range(3):
        terms = criterion(denoising(model, b), latents=b.latents, step=step)
        terms.total.backward()
        assert terms.total.isfinite()
    criterion.load_state_dict(criterion.state_dict())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at the loss's
class TestCompiled:
    @pytest.mark.parametrize("how", ["torch.compile(criterion)", "criterion.compile()", "whole step"])
    @pytest.mark.parametrize("stage", [1, 2])
    def test_a_compiled_criterion_is_left_out_of_the_graphs(self, stage: int, how: str) -> None:
        """And so makes none, however much the batches differ; values and gradients are as they are without."""
        torch.compiler.reset()
        model, reference = student(), student()
        criterion, plain = new_criterion(model, stage), new_criterion(reference, stage)
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


class TestInferenceTensors:
    """Latents that were made under ``torch.inference_mode``: autograd cannot save them for the backward pass."""

    @pytest.mark.parametrize("times", [[0.35, 0.5], [0.35, 0.9]], ids=["all rows inside", "some rows"])
    @pytest.mark.parametrize("target", ["latents", "velocity"])
    def test_as_targets(self, times: list[float], target: str) -> None:
        found = []
        for inference in (True, False):
            model, b = student(), noisy_batch(times)
            criterion = new_criterion(model, 1, target=target)
            with torch.inference_mode(inference):
                latents = b.latents.clone()
            assert latents.is_inference() == inference
            criterion(denoising(model, b), latents=latents).total.backward()
            found.append(gradients(model, criterion))
        assert_same(*found, tolerance=0.0)

    @pytest.mark.parametrize("distance", ["mse", "cosine", "smooth_l1"])
    def test_as_features(self, distance: str) -> None:
        b = noisy_batch(TIMES)
        with torch.inference_mode():
            features = new_teacher()(b.x_t, b.t, b.y)
        head = st.ProjectionHead(16, 16, 8)
        tokens = torch.ones_like(features.clone()).requires_grad_()
        st.feature_alignment(head(tokens), features, distance).mean().backward()
        assert tokens.grad is not None


class ByToken(ToyDiT):
    """t (N, T), one time for each token; the model sees their mean."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, t.mean(1), y)


class TestTimesByToken:
    """The window gates tokens; the mean is over the whole batch and all tokens."""

    @pytest.mark.parametrize("gating", ["per-sample", "released"])
    @pytest.mark.parametrize("stage", [1, 2])
    def test_equals_the_plain_formula(self, stage: int, gating: str) -> None:
        model, b = ByToken(depth=3, seed=1), noisy_batch([0.5] * 4)
        model.dropout = 0.0
        taught_by = ByToken(depth=3, seed=2)
        taught_by.dropout = 0.0
        t = torch.rand(4, 16, generator=torch.Generator().manual_seed(0))
        t[1], t[2] = 0.9, 0.4  # a row outside, and one inside
        criterion = new_criterion(
            model, stage, new_teacher(taught_by) if stage == 2 else None, gating=gating, check_interval=None
        )
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

    def test_times_of_other_tokens_are_refused(self) -> None:
        model, b = ByToken(depth=3), noisy_batch([0.5] * 4)
        criterion = new_criterion(model, 1, check_interval=None)
        loss = model(b.x_t, torch.full((4, 8), 0.5), b.y).mean()
        with pytest.raises(st.ShapeError, match=r"8 times a sample, but layer 'blocks\.1' gave 16 tokens"):
            criterion(loss, latents=b.latents)

    def test_a_velocity_has_one_time_a_sample(self) -> None:
        model, b = ByToken(depth=3), noisy_batch([0.5] * 4)
        criterion = new_criterion(model, 1, check_interval=None, target="velocity")
        loss = model(b.x_t, torch.full((4, 16), 0.5), b.y).mean()
        with pytest.raises(st.ShapeError, match="target='velocity' needs one time for each sample"):
            criterion(loss, latents=b.latents)


def test_without_a_window_stage_1_needs_no_t() -> None:
    class Timeless(ToyDiT):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return super().forward(x, torch.full((len(x),), 0.5), y)

    model, b = Timeless(depth=3), noisy_batch([0.5] * 4)
    model.dropout = 0.0
    criterion = new_criterion(model, 1, window=None)
    terms = criterion(model(b.x_t, b.y).square().mean(), latents=b.latents)
    tokens, _ = plain_tokens(model, b, b.y, LAYER)
    expected = criterion.heads[0](tokens, b.latents).mean()
    torch.testing.assert_close(terms.alignment, expected.detach())


class TestBuilding:
    def test_a_model_is_no_teacher(self) -> None:
        with pytest.raises(st.SettingError, match=r"(?s)got a ToyDiT\.\n.*st\.build_teacher"):
            st.SelfTransLoss.stage2(student(), layer="blocks.1", teacher=student(), time="sit", hidden_size=16)

    @pytest.mark.parametrize("shared", ["model", "block", "tensor"])
    def test_a_refused_teacher_leaves_the_student_as_it_was(self, shared: str) -> None:
        model, other = student(), student()
        if shared == "block":
            other.blocks[0] = model.blocks[0]
        elif shared == "tensor":
            other.blocks[0].qkv.weight = model.blocks[0].qkv.weight
        with pytest.raises(st.TeacherError, match="student"):
            new_criterion(model, teacher=new_teacher(model if shared == "model" else other))
        assert all(p.requires_grad for p in model.parameters())
        assert all(module.training for module in model.modules())

    def test_no_heads(self) -> None:
        criterion = new_criterion(student())
        for heads in ([], [nn.Linear(4, 4)]):
            with pytest.raises(st.SettingError, match=r"one head for each of the layers 'blocks\.1'"):
                st.SelfTransLoss(student(), heads, criterion.settings)

    @pytest.mark.parametrize("step", [2**63, -1, 2.0, True, "1", torch.tensor(3)])
    def test_a_step_that_is_none(self, step: object) -> None:
        model, b = student(), noisy_batch(TIMES)
        with pytest.raises(st.SettingError, match="step must be an integer, 0 or more and below"):
            total(model, new_criterion(model), b, step=step)

    def test_an_empty_batch(self) -> None:
        model, b = student(), noisy_batch(TIMES).rows(slice(0, 0))
        with pytest.raises(st.ShapeError, match="has no rows"):
            total(model, new_criterion(model), b)
