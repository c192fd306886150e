"""The two-stream backbone: both stages run, and the taps give the image's tokens alone."""

import custom_backbone
import pytest
import torch

import selftrans_reg as st


def test_both_stages_run(capsys: pytest.CaptureFixture[str]) -> None:
    with torch.random.fork_rng():
        custom_backbone.main(["--steps=2"])
    printed = capsys.readouterr().out
    assert "stage 1, step 1: denoising" in printed
    assert "stage 2, step 1: denoising" in printed


def test_the_tap_leaves_the_context_and_the_register_out() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = custom_backbone.TwoStream(depth=2)
        timestep, context, x = torch.rand(3), torch.randn(3, 4, 12), torch.randn(3, 1, 16, 16)
    seen = []
    model.joint_blocks[1].register_forward_hook(lambda module, args, output: seen.append(output))
    with st.FeatureTap(model, "joint_blocks.1", **custom_backbone.TAP) as tap:
        model(timestep, context, x)
        tokens = tap.pop()
    assert tokens.shape == (3, 64, 64)
    assert torch.equal(tokens, seen[0][1][:, 1:])
