"""The VAE: what lies between its latents and the model's, both ways; and one that learns and comes back from disk."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from common import vae as vaes
from common.data import digits
from common.data_files import DataError
from common.vae import Scaling, decode, encode_moments, load_encoder, load_vae, recorded_scaling, scaling_of

LATENTS = torch.linspace(-2, 2, 2 * 4 * 3 * 3).reshape(2, 4, 3, 3)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"scaling_factor": 0.18215}, LATENTS * 0.18215),
        ({"scaling_factor": 1.5305, "shift_factor": 0.0609}, (LATENTS - 0.0609) * 1.5305),
        ({"shift_factor": 0.5}, LATENTS - 0.5),
    ],
)
def test_latents_are_scaled_as_the_config_says_and_back(config: dict[str, Any], expected: torch.Tensor) -> None:
    scaling, std, noise = scaling_of(config, "the VAE"), LATENTS**2, LATENTS.flip(0)
    torch.testing.assert_close(scaling.to_model(LATENTS), expected)
    torch.testing.assert_close(scaling.to_vae(expected), LATENTS)
    torch.testing.assert_close(scaling.drawn(LATENTS, std, noise), scaling.to_model(LATENTS + std * noise))
    assert recorded_scaling({"scale_factor": scaling.scale, "shift_factor": scaling.shift}, "a run") == scaling
    assert recorded_scaling({}, "a run") is None


def test_a_scaling_that_these_scripts_cannot_apply_is_named() -> None:
    for scale in (0.0, float("nan"), "1", True, [1.0] * 4):
        with pytest.raises(DataError, match="the VAE states a scaling that no latents can have"):
            scaling_of({"scaling_factor": scale}, "the VAE")
    with pytest.raises(DataError, match=r"a run states a scaling .* shift inf"):
        recorded_scaling({"scale_factor": 1, "shift_factor": float("inf")}, "a run")
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae") / "vae"
    with torch.random.fork_rng(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(vaes, "new_vae", partial(vaes.new_vae, widths=(16, 16, 16)))
        vaes.trained_vae(folder, digits(16)[0].images, steps=100, seed=0, device="cpu")
    return folder


def test_reconstructions_beat_the_mean_image_and_latents_have_variance_one(
    folder: Path, generator: torch.Generator
) -> None:
    trained = load_vae(folder)
    assert [entry.name for entry in folder.parent.iterdir()] == ["vae"]
    assert not any(parameter.requires_grad for parameter in trained.parameters())
    train, held_out = (part.images for part in digits(16))
    mean, _ = encode_moments(trained, held_out)
    assert mean.shape == (450, 4, 4, 4)
    error = (decode(trained, mean * trained.config.scaling_factor) - held_out).square().mean()
    assert error < 0.7 * (held_out.mean(0) - held_out).square().mean()
    mean, std = encode_moments(trained, train)
    latents = trained.config.scaling_factor * (mean + std * torch.randn(mean.shape, generator=generator))
    assert latents.var().item() == pytest.approx(1, abs=0.05)


def test_moments_are_mean_and_standard_deviation_not_log_variance(folder: Path) -> None:
    trained, images = load_vae(folder), digits(16)[1].images[:3]
    with torch.no_grad():
        mean, log_variance = trained.quant_conv(trained.encoder(images)).chunk(2, dim=1)
    torch.testing.assert_close(encode_moments(trained, images), (mean, (0.5 * log_variance).exp()))


def test_a_vaes_shift_reaches_the_picture(folder: Path) -> None:
    trained = load_vae(folder)
    with torch.no_grad():
        expected = trained.decode(LATENTS / 0.7 + 3).sample.clamp(-1, 1)
    trained.register_to_config(scaling_factor=0.7, shift_factor=3.0)
    torch.testing.assert_close(decode(trained, LATENTS), expected)
    trained.register_to_config(shift_factor=None)
    torch.testing.assert_close(decode(trained, LATENTS, Scaling(0.7, 3.0)), expected)
    assert not torch.allclose(decode(trained, LATENTS), expected, atol=1e-3)


def test_vaes_that_do_not_fit_are_named(folder: Path, tmp_path: Path) -> None:
    vaes.new_vae(16, 3, widths=(8, 8, 8)).save_pretrained(tmp_path)
    vae, side = load_encoder(str(tmp_path), "bf16", 20)
    assert (vae.dtype, side) == (torch.bfloat16, 5)
    for name, size, match in [
        (tmp_path / "nowhere", 16, r"no VAE of .* at .*nowhere(.|\n)*sd-vae-ft-mse"),
        (folder, 16, "takes images of 1 channels"),
        (tmp_path, 18, "--size 18 is no multiple of 4"),
    ]:
        with pytest.raises(DataError, match=match):
            load_encoder(str(name), "fp32", size)
