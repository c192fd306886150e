"""The VAE: what lies between its latents and the model's, both ways; and one that learns and comes back from disk."""

from pathlib import Path
from typing import Any

import pytest
import torch
from common import vae as vaes
from common.data import digits
from common.data_files import DataError
from common.vae import (
    Scaling,
    decode,
    encode_moments,
    load_encoder,
    load_vae,
    new_vae,
    recorded_scaling,
    scaling_of,
    trained_vae,
)
from diffusers import AutoencoderKL

LATENTS = torch.linspace(-2, 2, 2 * 4 * 3 * 3).reshape(2, 4, 3, 3)

# --- scaling


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"scaling_factor": 0.18215}, LATENTS * 0.18215),
        ({"scaling_factor": 1.5305, "shift_factor": 0.0609}, (LATENTS - 0.0609) * 1.5305),
        ({"shift_factor": 0.5}, LATENTS - 0.5),
    ],
)
def test_latents_are_scaled_as_the_config_says_and_back(config: dict[str, Any], expected: torch.Tensor) -> None:
    scaling = scaling_of(config, "the VAE")
    torch.testing.assert_close(scaling.to_model(LATENTS), expected)
    torch.testing.assert_close(scaling.to_vae(expected), LATENTS)
    noise = LATENTS.flip(0)
    torch.testing.assert_close(
        scaling.drawn(LATENTS, LATENTS**2, noise), scaling.to_model(LATENTS + LATENTS**2 * noise)
    )
    recorded = {"scale_factor": scaling.scale, "shift_factor": scaling.shift}
    assert recorded_scaling(recorded, "a run") == scaling


def test_what_a_run_does_not_record_is_not_made_up() -> None:
    assert recorded_scaling({}, "a run") is None
    assert recorded_scaling({"scale_factor": 2}, "a run") == Scaling(2, 0.0)
    with pytest.raises(DataError, match="a run records a scaling"):
        recorded_scaling({"scale_factor": [1.0] * 4}, "a run")


@pytest.mark.parametrize(
    "config",
    [
        {"scaling_factor": 0.0},
        {"scaling_factor": float("nan")},
        {"scaling_factor": "1"},
        {"scaling_factor": True},
        {"scaling_factor": 1.0, "shift_factor": float("inf")},
    ],
)
def test_a_scaling_that_no_latents_can_have_is_named(config: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="the VAE states a scaling that no latents can have"):
        scaling_of(config, "the VAE")
    for name in ("latents_mean", "latents_std"):
        with pytest.raises(DataError, match="the VAE has latents_mean or latents_std, a scale for each channel"):
            scaling_of({"scaling_factor": 1.0, name: [1.0] * 4}, "the VAE")


def test_scalings_are_compared_to_five_digits() -> None:
    plain = Scaling(0.18215, 0.0)
    assert plain.equals(Scaling(0.182151))
    assert Scaling(0.3611, 0.1159).equals(Scaling(0.3611, 0.11590001))
    for other in [Scaling(0.13025), Scaling(0.18215, 3.0)]:
        assert not plain.equals(other)
        assert not other.equals(plain)


# --- images to latents, and back


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae") / "vae"
    with torch.random.fork_rng(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(vaes, "new_vae", lambda size, channels: new_vae(size, channels, widths=(16, 16, 16)))
        trained_vae(folder, digits(16)[0].images, steps=100, seed=0, device="cpu")
    return folder


@pytest.fixture
def trained(folder: Path) -> AutoencoderKL:
    return load_vae(folder)


def test_reconstructions_beat_the_mean_image(trained: AutoencoderKL, folder: Path) -> None:
    assert [entry.name for entry in folder.parent.iterdir()] == ["vae"]
    assert not any(parameter.requires_grad for parameter in trained.parameters())
    images = digits(16)[1].images
    mean, _ = encode_moments(trained, images)
    assert mean.shape == (450, 4, 4, 4)
    reconstructed = decode(trained, mean * trained.config.scaling_factor)
    error = (reconstructed - images).square().mean()
    assert error < 0.7 * (images.mean(0) - images).square().mean()


def test_moments_are_mean_and_standard_deviation_not_log_variance(trained: AutoencoderKL) -> None:
    images = digits(16)[1].images[:3]
    with torch.no_grad():
        moments = trained.quant_conv(trained.encoder(images))
    mean, std = encode_moments(trained, images)
    torch.testing.assert_close(mean, moments[:, :4])
    torch.testing.assert_close(std, (0.5 * moments[:, 4:]).exp())


def test_scaled_latents_have_variance_one(trained: AutoencoderKL, generator: torch.Generator) -> None:
    mean, std = encode_moments(trained, digits(16)[0].images)
    latents = trained.config.scaling_factor * (mean + std * torch.randn(mean.shape, generator=generator))
    assert latents.var().item() == pytest.approx(1, abs=0.05)


def test_a_vaes_shift_reaches_the_picture(trained: AutoencoderKL) -> None:
    with torch.no_grad():
        expected = trained.decode(LATENTS / 0.7 + 3).sample.clamp(-1, 1)
    trained.register_to_config(scaling_factor=0.7, shift_factor=3.0)
    torch.testing.assert_close(decode(trained, LATENTS), expected)
    trained.register_to_config(shift_factor=None)
    torch.testing.assert_close(decode(trained, LATENTS, Scaling(0.7, 3.0)), expected)
    assert not torch.allclose(decode(trained, LATENTS), expected, atol=1e-3)


def test_vaes_that_do_not_fit_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no VAE of .* at .*nowhere(.|\n)*sd-vae-ft-mse"):
        load_vae(tmp_path / "nowhere")
    with pytest.raises(DataError, match="takes images of 1 channels"):
        load_encoder(str(folder), "fp32", 16)
    new_vae(16, 3, widths=(8, 8, 8)).save_pretrained(tmp_path / "rgb")
    vae, side = load_encoder(str(tmp_path / "rgb"), "bf16", 20)
    assert (vae.dtype, side) == (torch.bfloat16, 5)
    with pytest.raises(DataError, match="--size 18 is no multiple of 4"):
        load_encoder(str(tmp_path / "rgb"), "fp32", 18)
