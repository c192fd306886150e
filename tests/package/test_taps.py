"""Every hook: recording forwards, tapping layers, stopping early."""

from __future__ import annotations

import copy
import io
from typing import Any

import plain
import pytest
import torch
from torch import Tensor, nn
from toys import ToyDiT, batch

import selftrans_reg as st
from selftrans_reg.errors import CallError, CaptureError, LayerNotFoundError, SettingError
from selftrans_reg.taps import EarlyExit, Record, Recorder, watched


def student() -> ToyDiT:
    model = ToyDiT()
    model.dropout = 0.0
    return model


def run(model: nn.Module, n: int = 4) -> Tensor:
    b = batch(n)
    return model(b["x"], b["t"], b["y"])


def noted(record: Record[str]) -> str:
    return "noted"


class TestFeatureTap:
    def test_tokens_are_the_layers_own_output_and_part_of_the_graph(self) -> None:
        model, b = student(), batch(4)
        reference = copy.deepcopy(model)
        with st.FeatureTap(model, "blocks.1") as tap:
            run(model)
            tokens = tap.pop()
        _, expected = plain.tapped(reference, "blocks.1", b["x"], b["t"], b["y"])
        torch.testing.assert_close(tokens, expected, rtol=0, atol=0)
        tokens.square().sum().backward()
        expected.square().sum().backward()
        plain.assert_same_gradients(model.blocks[0], reference.blocks[0])
        assert model.blocks[2].fc1.weight.grad is None

    def test_several_layers_come_by_name(self) -> None:
        model, b = student(), batch(4)
        with st.FeatureTap(model, ["blocks.2", "blocks.0"]) as tap:
            run(model)
            found = tap.pop()
        assert list(found) == ["blocks.2", "blocks.0"]
        for name, tokens in found.items():
            torch.testing.assert_close(tokens, plain.tapped(model, name, b["x"], b["t"], b["y"])[1])

    @pytest.mark.parametrize("mode", ["train", "eval", "no_grad", "inference_mode"])
    def test_it_captures_in_every_mode(self, mode: str) -> None:
        model = student().train(mode == "train")
        contexts = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
        with st.FeatureTap(model, "blocks.1") as tap, contexts.get(mode, torch.enable_grad)():
            run(model)
            assert tap.pop().shape == (4, 16, 16)

    def test_popping_empties_it(self) -> None:
        model = student()
        with st.FeatureTap(model, "blocks.1") as tap:
            run(model)
            tap.pop()
            with pytest.raises(CaptureError) as error:
                tap.pop()
        assert "There is no forward of the model to work on.\n" in str(error.value)
        assert "Call the model itself (not model.forward) once before each call" in str(error.value)

    def test_two_forwards_are_never_mixed(self) -> None:
        model = student()
        with st.FeatureTap(model, "blocks.1") as tap:
            run(model)
            run(model)
            with plain.refused(CaptureError, "ran 2 forwards since the last call, and nothing is guessed", "discard()"):
                tap.pop()
            run(model, 2)
            tap.discard()
            run(model, 3)
            assert len(tap.pop()) == 3

    def test_model_dot_forward_is_no_call(self) -> None:
        model, b = student(), batch(4)
        with st.FeatureTap(model, "blocks.1") as tap:
            model.forward(b["x"], b["t"], b["y"])
            with pytest.raises(CaptureError, match=r"Call the model itself \(not model\.forward\)"):
                tap.pop()

    @pytest.mark.parametrize("how", ["detached", "left", "deepcopy"])
    def test_a_tap_that_watches_nothing_says_so(self, how: str) -> None:
        model = student()
        tap = st.FeatureTap(model, "blocks.1")
        run(model)
        if how == "detached":
            tap.detach()
        elif how == "left":
            with tap:
                pass
        else:
            tap = copy.deepcopy(tap)
        tap.discard()
        with plain.refused(
            CaptureError, "This tap watches no model", "or is a copy of one that does.\nPop before leaving"
        ):
            tap.pop()
        tap.detach()

    def test_select_and_tokens_pick_the_images(self) -> None:
        class Block(nn.Module):
            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                return x[:, :3], x[:, 3:]

        model, x = nn.Sequential(Block()), torch.randn(2, 8, 4)
        with st.FeatureTap(model, "0", select=1, tokens=slice(1, None)) as tap:
            model(x)
            torch.testing.assert_close(tap.pop(), x[:, 4:])
        with st.FeatureTap(model, "0") as tap:
            model(x)
            with pytest.raises(CallError, match=r"Layer '0' returns a tuple with 2 tensors"):
                tap.pop()

    @pytest.mark.parametrize(
        ("settings", "error", "part"),
        [
            ({"layer": "block.1"}, LayerNotFoundError, "ToyDiT has no layer 'block.1'"),
            ({"layer": []}, SettingError, "Name at least one layer, and none twice; got none"),
            ({"layer": ["blocks.1", "blocks.1"]}, SettingError, "got 'blocks.1', 'blocks.1'"),
            ({"layer": 7}, SettingError, "got 7"),
            ({"layer": "blocks.1", "select": 1.5}, SettingError, "select must be"),
            ({"layer": "blocks.1", "tokens": 3}, SettingError, "tokens must be"),
        ],
    )
    def test_settings_that_make_no_sense_are_refused(
        self, settings: dict[str, Any], error: type[Exception], part: str
    ) -> None:
        with plain.refused(error, part):
            st.FeatureTap(ToyDiT(), **settings)


class TestCaptures:
    def test_a_layer_that_did_not_run_is_an_error_with_both_reasons(self) -> None:
        class Skipping(ToyDiT):
            def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
                return x

        with st.FeatureTap(model := Skipping(), "blocks.1") as tap:
            run(model)
            with pytest.raises(CaptureError) as error:
                tap.pop()
        for part in (
            "Layer 'blocks.1' did not run in the last forward, or its hook was not seen",
            "call torch._dynamo.reset() too, if something is compiled already",
            "skips this layer: tap one that runs in every forward",
        ):
            assert part in str(error.value)

    def test_a_layer_that_ran_twice_is_an_error(self) -> None:
        block = nn.Linear(4, 4)
        model = nn.Sequential(block, nn.SiLU(), block)
        with st.FeatureTap(model, "0") as tap:
            model(torch.randn(2, 3, 4))
            with pytest.raises(CaptureError) as error:
                tap.pop()
        for part in ("Layer '0' ran 2 times in one forward", "nothing is guessed", "Tap a layer that runs once"):
            assert part in str(error.value)

    @pytest.mark.parametrize("form", ["tensor", "tuple", "replaced in a dict"])
    def test_an_output_changed_in_place_afterwards_is_an_error(self, form: str) -> None:
        class Block(nn.Linear):
            def forward(self, x: Tensor) -> Any:
                tokens = super().forward(x)
                return {"tensor": tokens, "tuple": (tokens, None)}.get(form, {0: tokens})

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.block = Block(4, 4)

            def forward(self, x: Tensor, shift: float) -> Tensor:
                output = self.block(x)
                tokens = output if form == "tensor" else output[0]
                if shift and form == "replaced in a dict":
                    output[0] = tokens + shift
                elif shift:
                    tokens.add_(shift)
                return tokens

        model = Model()
        with st.FeatureTap(model, "block") as tap:
            model(torch.randn(2, 3, 4), 0.0)
            tap.pop()
            model(torch.randn(2, 3, 4), 1.0)
            with pytest.raises(CaptureError) as error:
                tap.pop()
        for part in ("output of layer 'block' was changed in place after", "inplace=True, +=, mul_", "out of place"):
            assert part in str(error.value)

    def test_a_part_of_a_compiled_model_is_captured(self) -> None:
        model, b = student(), batch(4)
        expected = plain.tapped(copy.deepcopy(model), "blocks.1", b["x"], b["t"], b["y"])[1]
        with st.FeatureTap(model, "blocks.1") as tap:
            torch.compile(model, backend="eager", fullgraph=True)(b["x"], b["t"], b["y"])
            torch.testing.assert_close(tap.pop(), expected)

    def test_the_autocast_seen_is_that_of_the_device_where_the_model_runs(self) -> None:
        """Attached on another device, such as meta, and then moved."""
        model = student().to("meta")
        recorder = Recorder(model, ["blocks.1"], noted, training_only=True)
        model.to_empty(device="cpu").load_state_dict(student().state_dict())
        run(model)
        assert recorder.take().capture("blocks.1").autocast is None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            run(model)
        assert recorder.take().capture("blocks.1").autocast == torch.bfloat16


class TestTrainingRecords:
    """The criterion's recorder leaves out what is no training forward, and says so when nothing is left."""

    @pytest.mark.parametrize(
        ("mode", "reason"), [("eval", ": the last one was in eval mode."), ("no_grad", ": the last one ran without")]
    )
    def test_why_there_is_no_record(self, mode: str, reason: str) -> None:
        model = student().train(mode != "eval")
        recorder = Recorder(model, ["blocks.1"], noted, training_only=True)
        with torch.set_grad_enabled(mode == "eval"):
            run(model)
        with plain.refused(
            CaptureError, f"There is no forward of the model to work on{reason}", "in train mode with gradients enabled"
        ):
            recorder.take()


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_hooks_are_inert_in_a_copy(how: str) -> None:
    model = student()
    with st.FeatureTap(model, "blocks.1") as tap:
        exit_early = EarlyExit(model, "blocks.2")
        if how == "pickle":
            file = io.BytesIO()
            torch.save(model, file)
            other = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
        else:
            other = copy.deepcopy(model)
        torch.testing.assert_close(run(other), run(model))
        assert len(tap.pop()) == 4  # one forward, the model's own
        exit_early.here.outputs, exit_early.here.stop = [], True  # as in the middle of a run
        assert run(other).shape == (4, 4, 8, 8)


def test_a_forward_of_a_shallow_copy_is_not_the_models() -> None:
    """It shares the very hooks, as the replicas of data parallelism do."""
    model = student()
    with st.FeatureTap(model, "blocks.1") as tap:
        run(model)
        run(copy.copy(model), 2)
        assert len(tap.pop()) == 4


class TestEarlyExit:
    def test_it_returns_the_layers_raw_output_and_goes_no_further(self) -> None:
        model, b = student(), batch(4)
        later: list[int] = []
        model.blocks[2].register_forward_pre_hook(lambda module, args: later.append(1))
        exit_early = EarlyExit(model, "blocks.1")
        found = exit_early.run(model, (b["x"], b["t"]), {"y": b["y"]})
        assert later == []
        torch.testing.assert_close(found, plain.tapped(model, "blocks.1", b["x"], b["t"], b["y"])[1])
        assert later == [1]
        assert exit_early.here.outputs is None

    def test_a_models_own_try_does_not_swallow_it(self) -> None:
        class Careful(ToyDiT):
            def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
                try:
                    return super().forward(x, t, y)
                except Exception:
                    return x

        model, b = Careful(), batch(4)
        assert EarlyExit(model, "blocks.1").run(model, (b["x"], b["t"], b["y"]), {}).shape == (4, 16, 16)

    def test_between_two_runs_the_model_runs_to_its_end(self) -> None:
        model, b = student(), batch(4)
        expected = run(model)
        exit_early = EarlyExit(model, "blocks.1")
        exit_early.run(model, (b["x"], b["t"], b["y"]), {})
        torch.testing.assert_close(run(model), expected)
        with pytest.raises(RuntimeError):
            exit_early.run(model, (b["x"][:, :3], b["t"], b["y"]), {})
        torch.testing.assert_close(run(model), expected)

    def test_a_layer_that_never_runs_is_an_error(self) -> None:
        model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
        model.forward = model["used"].forward
        with plain.refused(
            CaptureError, "The teacher's forward ended without running layer 'unused'", "name one that always runs"
        ):
            EarlyExit(model, "unused").run(model, (torch.zeros(1, 2),), {})


def test_watching_every_module_ends_with_its_block() -> None:
    model = student()
    started: list[nn.Module] = []
    finished: list[nn.Module] = []
    with watched(model.modules(), lambda module, args: started.append(module), finished.append):
        run(model)
    assert started[0] is finished[-1] is model
    assert set(started) == set(finished) == {m for m in model.modules() if not isinstance(m, nn.ModuleList)}
    started.clear()
    run(model)
    assert started == []
