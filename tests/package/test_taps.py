"""Every hook: recording forwards, tapping layers, stopping early."""

from __future__ import annotations

import copy
from typing import Any

import plain
import pytest
import torch
from torch import Tensor, nn
from toys import ToyDiT, batch

import selftrans_reg as st
from selftrans_reg.errors import CaptureError, LayerNotFoundError, SettingError
from selftrans_reg.taps import EarlyExit, Recorder, watched

B = batch(4)
CALL = (B["x"], B["t"], B["y"])


def student() -> ToyDiT:
    model = ToyDiT()
    model.dropout = 0.0
    return model


class TestFeatureTap:
    def test_tokens_are_the_layers_own_output_and_part_of_the_graph(self) -> None:
        model = student()
        reference = copy.deepcopy(model)
        with st.FeatureTap(model, "blocks.1") as tap:
            model(*CALL)
            tokens = tap.pop()
        _, expected = plain.tapped(reference, "blocks.1", *CALL)
        torch.testing.assert_close(tokens, expected, rtol=0, atol=0)
        tokens.square().sum().backward()
        expected.square().sum().backward()
        plain.assert_same_gradients(model.blocks[0], reference.blocks[0])
        assert model.blocks[2].fc1.weight.grad is None

    @pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
    def test_several_layers_come_by_name_in_every_mode(self, context: Any) -> None:
        model = student().train(context is torch.no_grad)
        with st.FeatureTap(model, ["blocks.2", "blocks.0"]) as tap, context():
            model(*CALL)
            found = tap.pop()
        assert list(found) == ["blocks.2", "blocks.0"]
        for name, tokens in found.items():
            torch.testing.assert_close(tokens, plain.tapped(model, name, *CALL)[1])

    def test_each_pop_takes_one_forward(self) -> None:
        model = student()
        with st.FeatureTap(model, "blocks.1") as tap:
            model(*CALL)
            tap.pop()
            model.forward(*CALL)
            with plain.refused(
                CaptureError,
                "There is no forward of the model to work on.\n",
                "Call the model itself (not model.forward) once before each call",
            ):
                tap.pop()
            model(*CALL)
            model(*CALL)
            with plain.refused(CaptureError, "ran 2 forwards since the last call, and nothing is guessed", "discard()"):
                tap.pop()
            model(*CALL)
            tap.discard()
            model(*(tensor[:3] for tensor in CALL))
            assert len(tap.pop()) == 3

    @pytest.mark.parametrize("how", ["detached", "deepcopy"])
    def test_a_tap_that_watches_nothing_says_so(self, how: str) -> None:
        tap = st.FeatureTap(model := student(), "blocks.1")
        model(*CALL)
        if how == "detached":
            tap.detach()
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

    @pytest.mark.parametrize(
        ("settings", "error", "part"),
        [
            ({"layer": "block.1"}, LayerNotFoundError, "ToyDiT has no layer 'block.1'"),
            ({"layer": []}, SettingError, "Name at least one layer, and none twice; got none"),
            ({"layer": ["blocks.1", "blocks.1"]}, SettingError, "got 'blocks.1', 'blocks.1'"),
            ({"layer": "blocks.1", "select": 1.5}, SettingError, "select must be"),
        ],
    )
    def test_settings_that_make_no_sense_are_refused(
        self, settings: dict[str, Any], error: type[Exception], part: str
    ) -> None:
        with plain.refused(error, part):
            st.FeatureTap(ToyDiT(), **settings)


@pytest.mark.parametrize("form", ["tensor", "tuple", "replaced in a dict"])
def test_an_output_changed_in_place_afterwards_is_an_error(form: str) -> None:
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
        with plain.refused(CaptureError, "output of layer 'block' was changed in place after"):
            tap.pop()


def test_the_autocast_seen_is_that_of_the_device_where_the_model_runs() -> None:
    """Attached on another device, such as meta, and then moved."""
    model = student().to("meta")
    recorder = Recorder(model, ["blocks.1"], lambda record: None, training_only=True)
    model.to_empty(device="cpu").load_state_dict(student().state_dict())
    model(*CALL)
    assert recorder.take().capture("blocks.1").autocast is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(*CALL)
    assert recorder.take().capture("blocks.1").autocast == torch.bfloat16


def test_a_forward_of_a_copy_is_not_the_models() -> None:
    """A shallow one shares the very hooks, as the replicas of data parallelism do."""
    model = student()
    with st.FeatureTap(model, "blocks.1") as tap:
        model(*CALL)
        copy.copy(model)(*(tensor[:2] for tensor in CALL))
        early_exit = EarlyExit(model, "blocks.2")
        early_exit.here.outputs, early_exit.here.stop = [], True  # as in the middle of a run
        assert copy.deepcopy(model)(*CALL).shape == (4, 4, 8, 8)
        assert len(tap.pop()) == 4


class TestEarlyExit:
    def test_it_returns_the_layers_raw_output_goes_no_further_and_leaves_the_model_as_it_was(self) -> None:
        model = student()
        expected, tokens = plain.tapped(model, "blocks.1", *CALL)
        later: list[int] = []
        model.blocks[2].register_forward_pre_hook(lambda module, args: later.append(1))
        early_exit = EarlyExit(model, "blocks.1")
        torch.testing.assert_close(early_exit.run(model, CALL[:2], {"y": B["y"]}), tokens)
        with pytest.raises(RuntimeError):
            early_exit.run(model, (B["x"][:, :3], B["t"], B["y"]), {})
        assert later == []
        torch.testing.assert_close(model(*CALL), expected)

    def test_a_models_own_try_does_not_swallow_it(self) -> None:
        class Careful(ToyDiT):
            def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
                try:
                    return super().forward(x, t, y)
                except Exception:
                    return x

        model = Careful()
        assert EarlyExit(model, "blocks.1").run(model, CALL, {}).shape == (4, 16, 16)


def test_watching_every_module_ends_with_its_block() -> None:
    model = student()
    started: list[nn.Module] = []
    finished: list[nn.Module] = []
    with watched(model.modules(), lambda module, args: started.append(module), finished.append):
        model(*CALL)
    assert started[0] is finished[-1] is model
    assert set(started) == set(finished) == {m for m in model.modules() if not isinstance(m, nn.ModuleList)}
    started.clear()
    model(*CALL)
    assert started == []
