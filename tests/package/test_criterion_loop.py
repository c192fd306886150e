"""The combined loss in a training loop: what it leaves alone, and what must not disturb it."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import weakref
from collections.abc import Iterator
from functools import partial

import plain
import pytest
import torch
from plain import TOLERANCE
from torch import Tensor, nn
from toys import ToyDiT, batch

import selftrans_reg as st


def stage1(model: nn.Module, **settings: object) -> st.SelfTransLoss:
    return st.SelfTransLoss.stage1(
        model,
        **{"layer": "blocks.1", "time": "repa", "latent_channels": 4, "patch_size": 2, "hidden_size": 16}
        | {"hidden_features": 24, "window": None}
        | settings,
    )


def make_teacher(model: nn.Module) -> st.CFGFeatureTeacher:
    return st.build_teacher(model, None, layer="blocks.2", guidance_scale=3.0, null={"y": 10}, hidden_size=16)


def stage2(model: nn.Module, **settings: object) -> st.SelfTransLoss:
    if "teacher" not in settings:
        settings["teacher"] = make_teacher(ToyDiT(seed=1))
    return st.SelfTransLoss.stage2(
        model,
        **{"layer": "blocks.1", "time": "repa", "hidden_size": 16, "hidden_features": 24, "window": None} | settings,
    )


def student(seed: int = 0) -> ToyDiT:
    """A model with a null class that drops no label."""
    model = ToyDiT(seed=seed)
    model.dropout = 0.0
    return model


def denoise(model: nn.Module, b: dict[str, Tensor]) -> Tensor:
    f = b["t"][:, None, None, None]
    return (model((1 - f) * b["x"] + f * b["noise"], b["t"], b["y"]) - (b["noise"] - b["x"])).square().mean()


def clear(*modules: nn.Module) -> None:
    for module in modules:
        module.zero_grad()


def hooks_of(model: nn.Module) -> int:
    return sum(
        len(hooks)
        for module in model.modules()
        for name, hooks in vars(module).items()
        if name.endswith("_hooks") and isinstance(hooks, dict)
    )


@pytest.fixture
def no_garbage_collector() -> Iterator[None]:
    """Only reference counts free memory, as between two collections of a real run."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class TestTheModelStaysAsItIs:
    @pytest.mark.parametrize("make", [stage1, stage2])
    def test_its_state_dict_keeps_keys_and_values(self, make: type) -> None:
        model = ToyDiT()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        criterion = make(model)
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert [name for name, _ in model.named_modules()] == [name for name, _ in ToyDiT().named_modules()]
        del criterion

    @pytest.mark.parametrize("make", [stage1, stage2])
    def test_training_with_weight_0_is_bit_equal_to_training_without(self, make: type) -> None:
        with_it, without = ToyDiT(dropout=0.2), ToyDiT(dropout=0.2)
        criterion = make(with_it, weight=0.0)
        trained = [*with_it.parameters(), *criterion.parameters()]
        losses = []
        for model, parameters in ((with_it, trained), (without, [*without.parameters()])):
            optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
            with plain.global_seed(0):
                for step in range(4):
                    b = batch(6, seed=step)
                    loss = denoise(model, b)
                    if model is with_it:
                        terms = criterion(loss, latents=b["x"])
                        assert terms.alignment > 0  # measured all the same
                        loss = terms.total
                    losses.append(loss.item())
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
        assert losses[:4] == losses[4:]
        assert len(set(losses)) == 4
        assert all(torch.equal(p, q) for p, q in zip(with_it.parameters(), without.parameters(), strict=True))

    @pytest.mark.parametrize("make", [stage1, stage2])
    def test_with_weight_0_the_alignment_is_measured_without_a_graph(self, make: type) -> None:
        model, b, projected = student(), batch(), []
        criterion = make(model, weight=0.0)
        criterion.heads[0].register_forward_hook(lambda module, args, output: projected.append(output.requires_grad))
        criterion(denoise(model, b), latents=b["x"])
        assert projected[0] is False

    @pytest.mark.parametrize("leave", ["detach", "with"])
    def test_leaving_removes_every_hook(self, leave: str) -> None:
        model = ToyDiT()
        assert hooks_of(model) == 0
        criterion = stage1(model)
        assert hooks_of(model) > 0
        if leave == "detach":
            criterion.detach()
        else:
            with criterion as inside:
                assert inside is criterion
        assert hooks_of(model) == 0
        with pytest.raises(st.CaptureError, match="watches no model"):
            criterion(denoise(model, batch()), latents=batch()["x"])

    def test_attaching_again_moves_it_to_another_model(self) -> None:
        first, second, b = student(), student(1), batch()
        criterion = stage1(first)
        criterion.attach(second)
        assert hooks_of(first) == 0
        own = denoise(second, b)
        denoise(first, b)
        assert criterion(own, latents=b["x"]).alignment > 0

    def test_a_dropped_criterion_leaves_a_model_that_runs_and_pickles(self) -> None:
        model, b = student(), batch()
        before = model(b["x"], b["t"], b["y"])
        criterion = stage1(model)
        assert hooks_of(model) > 0
        del criterion
        gc.collect()
        assert hooks_of(model) == 0
        torch.testing.assert_close(copy.deepcopy(model)(b["x"], b["t"], b["y"]), before)
        torch.testing.assert_close(model(b["x"], b["t"], b["y"]), before)

    @pytest.mark.usefixtures("global_rng_untouched")
    def test_nothing_advances_the_global_generator(self) -> None:
        with plain.global_seed(0):  # the models' own layers draw from it
            model, taught_by, b = student(), ToyDiT(seed=1), batch()
        teacher = make_teacher(taught_by)
        for make in (stage1, partial(stage2, teacher=teacher), partial(stage2, teacher=teacher, teacher_rows=3)):
            with make(model) as criterion:
                criterion(denoise(model, b), latents=b["x"]).total.backward()

    def test_two_criteria_may_watch_one_model(self) -> None:
        model, b = student(), batch()
        one, two = stage1(model), stage2(model)
        loss = denoise(model, b)
        assert one(loss, latents=b["x"]).alignment > 0
        assert two(loss).alignment > 0


class TestDisturbances:
    """Each leaves the loss and every gradient as they are without it, and holds no graph."""

    @pytest.fixture(autouse=True)
    def undisturbed(self) -> None:
        self.model, self.b = student(), batch()
        self.criterion = stage1(self.model)
        self.terms = self.criterion(denoise(self.model, self.b), latents=self.b["x"])
        self.terms.total.backward()
        self.wanted = {name: p.grad.clone() for m in (self.model, self.criterion) for name, p in m.named_parameters()}
        clear(self.model, self.criterion)

    def check(self, loss: Tensor) -> None:
        """The criterion's call after the model's forward gave ``loss`` and was disturbed."""
        terms = self.criterion(loss, latents=self.b["x"])
        terms.total.backward()
        torch.testing.assert_close(tuple(terms), tuple(self.terms), rtol=0, atol=0)
        found = {name: p.grad for m in (self.model, self.criterion) for name, p in m.named_parameters()}
        torch.testing.assert_close(found, self.wanted, rtol=0, atol=0)

    def other(self) -> tuple[Tensor, Tensor, Tensor]:
        b = batch(5, seed=9)
        return b["x"], b["t"], b["y"]

    def test_sampling_without_gradients_between_forward_and_loss(self) -> None:
        loss = denoise(self.model, self.b)
        with torch.no_grad():
            self.model(*self.other())
        self.check(loss)

    def test_sampling_in_eval_mode_between_forward_and_loss(self) -> None:
        loss = denoise(self.model, self.b)
        self.model.eval()
        self.model(*self.other())
        self.model.train()
        self.check(loss)

    def test_sampling_in_inference_mode_between_loss_and_backward(self) -> None:
        terms = self.criterion(denoise(self.model, self.b), latents=self.b["x"])
        with torch.inference_mode():
            self.model(*self.other())
        terms.total.backward()
        self.check_gradients()

    def check_gradients(self) -> None:
        found = {name: p.grad for m in (self.model, self.criterion) for name, p in m.named_parameters()}
        torch.testing.assert_close(found, self.wanted, rtol=0, atol=0)

    @pytest.mark.parametrize("how", ["deepcopy", "pickle"])
    @pytest.mark.parametrize("training", [True, False])
    def test_a_copy_made_after_attaching_and_then_used(self, how: str, training: bool) -> None:
        loss = denoise(self.model, self.b)
        if how == "deepcopy":
            ema = copy.deepcopy(self.model)
        else:
            file = io.BytesIO()
            torch.save(self.model, file)
            ema = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
        ema.train(training)
        denoise(ema, batch(5, seed=9)).backward()
        assert ema.blocks[0].fc1.weight.grad is not None
        self.check(loss)

    def test_an_averaged_model_made_after_attaching(self) -> None:
        ema = torch.optim.swa_utils.AveragedModel(self.model)
        loss = denoise(self.model, self.b)
        ema.update_parameters(self.model)
        ema(*self.other())
        self.check(loss)

    def test_two_forwards_each_with_its_call_before_one_backward(self) -> None:
        more = batch(seed=3)
        first = self.criterion(denoise(self.model, self.b), latents=self.b["x"])
        second = self.criterion(denoise(self.model, more), latents=more["x"])
        (first.total + second.total).backward()
        both = {name: p.grad.clone() for m in (self.model, self.criterion) for name, p in m.named_parameters()}
        clear(self.model, self.criterion)
        self.criterion(denoise(self.model, more), latents=more["x"]).total.backward()
        for m in (self.model, self.criterion):
            for name, p in m.named_parameters():
                torch.testing.assert_close(both[name], self.wanted[name] + p.grad, **TOLERANCE)

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    @pytest.mark.parametrize("where", ["before the layer", "after the layer"])
    def test_a_forward_that_raises(self, error: type[BaseException], where: str) -> None:
        def fail(module: nn.Module, args: tuple[object, ...]) -> None:
            raise error

        handle = self.model.blocks[0 if where == "before the layer" else 3].register_forward_pre_hook(fail)
        with contextlib.suppress(error):
            denoise(self.model, batch(5, seed=9))
        handle.remove()
        self.check(denoise(self.model, self.b))

    def test_a_forward_that_raises_between_forward_and_loss(self) -> None:
        loss = denoise(self.model, self.b)
        with contextlib.suppress(RuntimeError):
            self.model(torch.zeros(2, 3, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.long))
        self.check(loss)

    @pytest.mark.parametrize("mistake", ["loss", "latents", "step"])
    def test_a_call_that_was_refused_takes_its_forward_with_it(self, mistake: str) -> None:
        """In a notebook the cell is corrected and run again, forward included."""
        loss = denoise(self.model, self.b)
        wrong = {
            "loss": lambda: self.criterion(loss.reshape(1, 1, 1, 1), latents=self.b["x"]),
            "latents": lambda: self.criterion(loss, latents=None),
            "step": lambda: self.criterion(loss, latents=self.b["x"], step=-1),
        }
        with pytest.raises(st.SelfTransError):
            wrong[mistake]()
        self.check(denoise(self.model, self.b))

    @pytest.mark.parametrize("changed", ["x_t", "y"])
    def test_an_argument_that_the_loop_changes_in_place_is_refused(self, changed: str) -> None:
        """The teacher would be shown another call than the student's."""
        model, b = student(), batch()
        criterion = stage2(model)
        arguments = {"x_t": b["x"].clone(), "y": b["y"].clone()}
        loss = model(arguments["x_t"], b["t"], arguments["y"]).square().mean()
        arguments[changed].zero_()
        with pytest.raises(st.CaptureError, match=r"changed in place after the call began.*\n.*out of place"):
            criterion(loss)

    @pytest.mark.parametrize("by", ["model", "loop"])
    def test_a_condition_that_is_replaced_in_its_dict_is_taught_as_it_was_given(self, by: str) -> None:
        class Drops(ToyDiT):
            def forward(self, x: Tensor, t: Tensor, cond: dict[str, list[Tensor]]) -> Tensor:
                labels = cond["y"][0]
                if by == "model":
                    cond["y"][0] = torch.full_like(labels, self.num_classes)
                return super().forward(x, t, labels)

        model, b = Drops(), batch()
        teacher = st.build_teacher(
            Drops(seed=1), None, layer="blocks.2", guidance_scale=3.0, null={"cond": {"y": {0: 10}}}
        )
        criterion = stage2(model, teacher=teacher)
        shown: list[Tensor] = []
        teacher.model.register_forward_pre_hook(lambda module, args: shown.append(args[2]["y"][0]))
        cond = {"y": [b["y"]]}
        loss = model(b["x"], b["t"], cond).square().mean()
        if by == "loop":
            cond["y"] = [torch.full_like(b["y"], 10)]
        criterion(loss)
        assert shown[0].tolist() == [*b["y"].tolist(), *[10] * 8]

    def test_labels_that_the_model_drops_in_place_are_refused(self) -> None:
        class DropsInPlace(ToyDiT):
            def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
                y[:2] = self.num_classes
                return super().forward(x, t, y)

        model, b = DropsInPlace(), batch()
        criterion = stage2(model)
        loss = model(b["x"], b["t"], b["y"]).square().mean()
        with pytest.raises(st.CaptureError, match="as a label that is dropped"):
            criterion(loss)

    def test_a_skipped_batch_after_discard(self) -> None:
        denoise(self.model, batch(5, seed=9))
        self.criterion.discard()
        self.check(denoise(self.model, self.b))

    def test_evaluation_with_the_criterion_in_eval_mode(self) -> None:
        loss = denoise(self.model, batch(5, seed=9))
        terms = self.criterion.eval()(loss)
        assert terms.total.item() == terms.denoising.item() == loss.item()
        assert [term.item() for term in terms[2:]] == [0.0, 0.0, 0.0]
        assert terms.total.requires_grad
        self.criterion.train()
        self.check(denoise(self.model, self.b))

    def test_forward_first_and_last_say_which_of_several_counts(self) -> None:
        self.criterion.detach()
        for which, batches in (("first", (self.b, batch(seed=3))), ("last", (batch(seed=3), self.b))):
            clear(self.model, self.criterion)
            self.criterion = stage1(self.model, forward=which)
            losses = [denoise(self.model, b) for b in batches]
            self.check(losses[0] if which == "first" else losses[1])
            self.criterion.detach()


class Watched(ToyDiT):
    """Says which outputs of its second block are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = 0.0
        self.alive: list[weakref.ref[Tensor]] = []
        self.blocks[1].register_forward_hook(lambda module, args, output: self.alive.append(weakref.ref(output)))

    def living(self) -> int:
        return sum(reference() is not None for reference in self.alive)


@pytest.mark.usefixtures("no_garbage_collector")
class TestNoGraphIsLeaked:
    """Graphs die with the loop's own references, without the garbage collector's help."""

    @pytest.mark.parametrize("make", [stage1, stage2])
    def test_nothing_outlives_a_step(self, make: type) -> None:
        model, b = Watched(), batch()
        criterion = make(model)
        for _ in range(3):
            criterion(denoise(model, b), latents=b["x"]).total.backward()
            assert model.living() == 0

    def test_a_loop_that_never_calls_the_criterion_holds_one_forward(self) -> None:
        model, b = Watched(), batch()
        criterion = stage1(model)
        for _ in range(5):
            denoise(model, b)
            assert model.living() == 1
        criterion.discard()
        assert model.living() == 0

    @pytest.mark.parametrize("which", ["first", "last"])
    def test_choosing_among_several_forwards_holds_one(self, which: str) -> None:
        model, b = Watched(), batch()
        criterion = stage1(model, forward=which)
        for _ in range(3):
            denoise(model, b)
            assert model.living() == 1
        criterion(denoise(model, b), latents=b["x"])
        assert model.living() == 0

    def test_past_the_stop_step_and_in_eval_mode_nothing_is_held(self) -> None:
        model, b = Watched(), batch()
        criterion = stage2(model, stop_step=0)
        criterion(denoise(model, b), step=5)
        assert model.living() == 0
        criterion.eval()(denoise(model, b))
        assert model.living() == 0

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_a_forward_that_raised_is_gone_with_the_next_at_the_latest(self, error: type[BaseException]) -> None:
        model, b = Watched(), batch()
        criterion = stage1(model)

        def fail(module: nn.Module, args: tuple[object, ...]) -> None:
            raise error

        handle = model.blocks[3].register_forward_pre_hook(fail)
        with contextlib.suppress(error):
            denoise(model, b)
        handle.remove()
        if error is ValueError:
            assert model.living() == 0
        criterion(denoise(model, b), latents=b["x"]).total.backward()
        assert model.living() == 0

    def test_a_refused_call_holds_nothing(self) -> None:
        model, b = Watched(), batch()
        criterion = stage1(model)
        loss = denoise(model, b)
        with contextlib.suppress(st.ShapeError):
            criterion(loss)
        del loss
        assert model.living() == 0

    def test_a_call_that_could_not_be_read_holds_nothing(self) -> None:
        model, b = Watched(), batch()
        criterion = stage1(model, call={"x": "t", "t": "x"})
        for _ in range(3):
            loss = denoise(model, b)
            with contextlib.suppress(st.SelfTransError):
                criterion(loss, latents=b["x"])
            del loss
            assert model.living() == 0

    def test_model_and_criterion_do_not_keep_each_other_alive(self) -> None:
        model = ToyDiT()
        criterion = stage2(model)
        there = weakref.ref(model), weakref.ref(criterion)
        del model
        gc.collect()
        assert there[0]() is None
        del criterion
        gc.collect()
        assert there[1]() is None
