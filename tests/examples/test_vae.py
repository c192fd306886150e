"""The examples' VAE: it learns, records the scale of its latents, and comes back from disk as it was."""

from pathlib import Path

import pytest
import torch
from common.data import digits
from common.vae import decode, encode_moments, load_vae, new_vae, save_vae, train_vae
from diffusers import AutoencoderKL


@pytest.fixture(scope="module")
def trained() -> AutoencoderKL:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = new_vae(image_size=16, widths=(16, 16, 16))
        train_vae(vae, digits(16)[0].images, steps=60, lr=4e-3)
    return vae


def test_reconstructions_beat_the_mean_image(trained: AutoencoderKL) -> None:
    images = digits(16)[1].images
    mean, _ = encode_moments(trained, images)
    assert mean.shape == (450, 4, 4, 4)
    reconstructed = decode(trained, mean * trained.config.scaling_factor)
    error = (reconstructed - images).square().mean()
    assert error < 0.7 * (images.mean(0) - images).square().mean()
    assert reconstructed.abs().max() <= 1


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


def test_it_comes_back_from_disk_as_it_was(trained: AutoencoderKL, tmp_path: Path) -> None:
    save_vae(trained, tmp_path / "vae")
    assert [entry.name for entry in tmp_path.iterdir()] == ["vae"]
    loaded = load_vae(tmp_path / "vae")
    assert loaded.config.scaling_factor == trained.config.scaling_factor
    images = digits(16)[1].images[:3]
    torch.testing.assert_close(encode_moments(loaded, images), encode_moments(trained, images))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
