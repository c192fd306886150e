"""Every hook: recording forwards, tapping layers, stopping early."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import plain
import pytest
import torch
from loops import student
from plain import refused
from torch import Tensor, nn
from toys import ToyDiT, batch

import selftrans_reg as st
from selftrans_reg.errors import CaptureError
from selftrans_reg.taps import EarlyExit, Recorder, watched

B = batch(4)
CALL = (B["x"], B["t"], B["y"])


class TestFeatureTap:
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
            with refused(CaptureError, "no forward of the model", "once before each call of this one."):
                tap.pop()
            model(*CALL)
            model(*CALL)
            with refused(CaptureError, "ran 2 forwards since the last call", "Call this after every forward; or drop"):
                tap.pop()
            model(*CALL)
            tap.discard()
            model(*(tensor[:3] for tensor in CALL))
            assert len(tap.pop()) == 3

    def test_a_tap_that_was_detached_or_copied_watches_nothing(self) -> None:
        tap = st.FeatureTap(model := student(), "blocks.1")
        model(*CALL)
        copied = copy.deepcopy(tap)
        tap.detach()
        for nothing in (tap, copied):
            nothing.discard()
            with refused(CaptureError, "This tap watches no model"):
                nothing.pop()

    def test_select_and_tokens_pick_the_images(self) -> None:
        model, x = nn.Sequential(nn.GRU(4, 6, batch_first=True)), torch.randn(2, 8, 4)
        with st.FeatureTap(model, "0", select=0, tokens=slice(3, None)) as tap:
            output, _ = model(x)
            torch.testing.assert_close(tap.pop(), output[:, 3:])


CHANGES = {  # what a layer returns, and how a later one changes it
    "a tensor": (lambda x: x, lambda x: x.add_(1.0)),
    "in a tuple": (lambda x: (x, None), lambda output: output[0].add_(1.0)),
    "replaced in a dict": (lambda x: {"x": x}, lambda output: output.update(x=output["x"] + 1.0) or output),
}


@pytest.mark.parametrize("form", CHANGES)
def test_an_output_changed_in_place_afterwards_is_an_error(form: str) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Identity(), nn.Identity()), torch.randn(2, 3, 4)
    model[1].forward, change = CHANGES[form]
    with st.FeatureTap(model, "1") as tap:
        model(x)
        torch.testing.assert_close(tap.pop(), model[0](x))
        model[2].forward = change
        model(x)
        with refused(CaptureError, "output of layer '1' was changed in place after"):
            tap.pop()


def test_the_autocast_seen_is_that_of_the_device_where_the_model_runs() -> None:
    """Attached on another device, such as meta, and then moved."""
    model = student("meta")
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


class Careful(ToyDiT):  # whose own try must not swallow the exit
    def through_blocks(self, tokens: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks:
            with contextlib.suppress(Exception):
                tokens = block(tokens, c)
        return tokens


def test_an_early_exit_returns_the_raw_output_goes_no_further_and_leaves_the_model_as_it_was() -> None:
    model, later = Careful(dropout=0.0), []
    expected, tokens = plain.tapped(model, "blocks.1", *CALL)
    model.blocks[2].register_forward_pre_hook(lambda module, args: later.append(module))
    early_exit = EarlyExit(model, "blocks.1")
    torch.testing.assert_close(early_exit.run(model, CALL[:2], {"y": B["y"]}), tokens)
    with pytest.raises(RuntimeError):
        early_exit.run(model, (B["x"][:, :3], B["t"], B["y"]), {})
    assert not later
    torch.testing.assert_close(model(*CALL), expected)


def test_watching_every_module_ends_with_its_block() -> None:
    model = student()
    started: list[nn.Module] = []
    finished: list[nn.Module] = []
    with watched(model.modules(), lambda module, args: started.append(module), finished.append):
        model(*CALL)
    model(*CALL)
    assert started[0] is finished[-1] is model
    assert len(started) == len(finished) == len({m for m in model.modules() if not isinstance(m, nn.ModuleList)})
