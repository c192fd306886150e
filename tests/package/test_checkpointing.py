"""Activation checkpointing: the gradients of the formula where the capture can carry them, an error where it cannot."""

import pytest
import torch
from checkpointed import MODELS, in_segments
from loops import assert_same, denoising, gradients, new_criterion, noisy_batch, plain_gradients, student, total
from torch.utils.checkpoint import checkpoint

from selftrans_reg import FeatureTap
from selftrans_reg.errors import CaptureError

B = noisy_batch([0.35, 0.5, 0.1, 0.9])
CPU = torch.device("cpu")
# Dynamo looks at the .grad of every tensor, and hides the warning of its own looking in a way that pytest undoes.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("kind", MODELS)
def test_gradients_are_those_of_the_formula(kind: str, compiled: bool, reentrant: bool, device: torch.device) -> None:
    torch.compiler.reset()  # of what other tests compiled there may be no room for more
    b = B.to(device)
    model = MODELS[kind](reentrant, device)
    called = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    criterion = new_criterion(called)
    for _ in range(2):  # the second step must not see what the first one's recomputation left
        model.zero_grad(), criterion.zero_grad()
        total(called, criterion, b).backward()
        assert_same(gradients(model, criterion), plain_gradients(b))
    with pytest.raises(CaptureError, match="There is no forward"):
        criterion(torch.zeros((), device=device), latents=b.latents)


@pytest.mark.parametrize(("size", "layer"), [(1, "blocks.1.fc2"), (2, "blocks.0"), (3, "blocks.1")])
def test_inside_a_segment_it_needs_to_be_non_reentrant(size: int, layer: str) -> None:
    model = in_segments(size, True, CPU)
    criterion = new_criterion(model, layer=layer)
    with pytest.raises(CaptureError, match=f"layer '{layer}' carry no gradient"):
        total(model, criterion, B)
    with FeatureTap(model, layer) as tap:
        denoising(model, B)
        with pytest.raises(CaptureError, match=f"'{layer}' carry no gradient, although it trains"):
            tap.pop()
    torch.compiler.reset()
    # Compiled code recomputes in a way of its own, so that what lies inside carries its gradient even if reentrant.
    compiled, found = torch.compile(in_segments(size, True, CPU), backend="aot_eager"), []
    for model in (student(), in_segments(size, False, CPU), compiled):
        criterion = new_criterion(model, layer=layer)
        total(model, criterion, B).backward()
        found.append(gradients(model, criterion))
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_the_whole_model_in_a_checkpoint(reentrant: bool) -> None:
    model = student()
    criterion = new_criterion(model)
    x_t = B.x_t.clone().requires_grad_()  # what a reentrant checkpoint needs to have a gradient at all
    output = checkpoint(model, x_t, B.t, B.y, use_reentrant=reentrant)
    loss = (output - B.velocity).square().mean()
    if reentrant:  # the forward ran without gradients, and the one in backward comes too late
        with pytest.raises(CaptureError, match=r"the last one ran without gradients.*use_reentrant=True"):
            criterion(loss, latents=B.latents)
        loss.backward()
    else:
        criterion(loss, latents=B.latents).total.backward()
        assert_same(gradients(model, criterion), plain_gradients(B))
    with pytest.raises(CaptureError, match="There is no forward"):
        criterion(loss.detach(), latents=B.latents)
