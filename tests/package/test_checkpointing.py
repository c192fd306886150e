"""Activation checkpointing: the gradients of the formula where the capture can carry them, an error where it cannot."""

import pytest
import torch
from checkpointed import MODELS, in_segments
from loops import assert_same, denoising, gradients, new_criterion, noisy_batch, plain_gradients, student, total
from torch import nn
from torch.utils.checkpoint import checkpoint

from selftrans_reg import FeatureTap
from selftrans_reg.errors import CaptureError

TIMES = [0.35, 0.5, 0.1, 0.9]
REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])


@REENTRANT
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("kind", MODELS)
def test_gradients_are_those_of_the_formula(kind: str, stage: int, reentrant: bool, device: torch.device) -> None:
    b = noisy_batch(TIMES).to(device)
    model = MODELS[kind](reentrant, device)
    criterion = new_criterion(model, stage)
    for _ in range(2):  # the second step must not see what the first one's recomputation left
        model.zero_grad()
        criterion.zero_grad()
        total(model, criterion, b).backward()
        assert_same(gradients(model, criterion), plain_gradients(b, stage))


@pytest.mark.parametrize("kind", ["inner module", "middle of a segment"])
def test_without_reentrance_any_layer_carries_a_gradient(kind: str, device: torch.device) -> None:
    b = noisy_batch(TIMES).to(device)
    layer = {"inner module": "blocks.1.fc2", "middle of a segment": "blocks.0"}[kind]
    found = []
    for model in (student(device), in_segments(2, False, device)):
        criterion = new_criterion(model, layer=layer)
        total(model, criterion, b).backward()
        found.append(gradients(model, criterion))
    assert_same(found[1], found[0])


@pytest.mark.parametrize(
    ("size", "layer"),
    [(1, "blocks.1.fc2"), (2, "blocks.0"), (3, "blocks.1")],
    ids=["inner", "first of 2", "second of 3"],
)
def test_inside_a_reentrant_segment_is_an_error(size: int, layer: str) -> None:
    b = noisy_batch(TIMES)
    model = in_segments(size, True, torch.device("cpu"))
    criterion = new_criterion(model, layer=layer)
    with pytest.raises(CaptureError, match=f"layer '{layer}' carry no gradient") as error:
        total(model, criterion, b)
    assert error.match("use_reentrant=False, or tap the very module that is checkpointed")


def test_a_tap_alone_says_that_the_gradient_is_hidden() -> None:
    b = noisy_batch(TIMES)
    model = in_segments(1, True, torch.device("cpu"))
    with FeatureTap(model, "blocks.1.fc2") as tap:
        denoising(model, b)
        with pytest.raises(CaptureError, match=r"'blocks.1.fc2' carry no gradient, although it trains"):
            tap.pop()


def test_the_backward_pass_records_nothing() -> None:
    b = noisy_batch(TIMES)
    model = in_segments(1, True, torch.device("cpu"))
    ran: list[nn.Module] = []
    model.blocks[1].register_forward_hook(lambda module, args, output: ran.append(module))
    criterion = new_criterion(model)
    total(model, criterion, b).backward()
    assert len(ran) == 2  # the forward, and the recomputation
    with pytest.raises(CaptureError, match="There is no forward"):
        criterion(torch.zeros(()), latents=b.latents)


@REENTRANT
def test_the_whole_model_in_a_checkpoint(reentrant: bool) -> None:
    b = noisy_batch(TIMES)
    model = student()
    criterion = new_criterion(model)
    x_t = b.x_t.clone().requires_grad_()  # what a reentrant checkpoint needs to have a gradient at all
    output = checkpoint(model, x_t, b.t, b.y, use_reentrant=reentrant)
    loss = (output - b.velocity).square().mean()
    if reentrant:  # the forward ran without gradients, and the one in backward comes too late
        with pytest.raises(CaptureError, match="the last one ran without gradients") as error:
            criterion(loss, latents=b.latents)
        assert error.match("use_reentrant=True")
        loss.backward()
    else:
        criterion(loss, latents=b.latents).total.backward()
        assert_same(gradients(model, criterion), plain_gradients(b))
    with pytest.raises(CaptureError, match="There is no forward"):
        criterion(loss.detach(), latents=b.latents)


# Dynamo looks at the .grad of every tensor, and hides the warning of its own looking in a way that pytest undoes.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(
    ("kind", "reentrant"),
    [
        ("each block by the model's loop", False),
        ("each block by the model's loop", True),
        ("each block in a wrapper", False),
        ("segments that end at the layer", True),
    ],
)
def test_compiled_is_one_graph(kind: str, reentrant: bool, device: torch.device) -> None:
    b = noisy_batch(TIMES).to(device)
    model = MODELS[kind](reentrant, device)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    criterion = new_criterion(compiled)
    for _ in range(2):
        model.zero_grad()
        criterion.zero_grad()
        total(compiled, criterion, b).backward()
        assert_same(gradients(model, criterion), plain_gradients(b))


def test_compiled_inside_a_segment_there_is_no_error_to_raise() -> None:
    """Compiled code recomputes in a way of its own, so that what lies inside carries its gradient even if reentrant."""
    b = noisy_batch(TIMES)
    found = []
    for model in (student(), torch.compile(in_segments(2, True, torch.device("cpu")), backend="aot_eager")):
        criterion = new_criterion(model, layer="blocks.0")
        total(model, criterion, b).backward()
        found.append(gradients(model, criterion))
    assert_same(found[1], found[0])
