"""What lies between a VAE's latents and the model's: both ways, by every convention of diffusers, and in pictures."""

from typing import Any

import pytest
import torch
from common.data_files import DataError
from common.vae import Scaling, checked_scaling, decode, new_vae, recorded_scaling, scaling_of

LATENTS = torch.linspace(-2, 2, 2 * 4 * 3 * 3).reshape(2, 4, 3, 3)
MEAN, STD = [0.1, -0.2, 0.3, 0.0], [1.0, 2.0, 0.5, 4.0]


def column(values: list[float]) -> torch.Tensor:
    return torch.tensor(values)[:, None, None]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"scaling_factor": 0.18215}, LATENTS * 0.18215),
        ({"scaling_factor": 1.5305, "shift_factor": 0.0609}, (LATENTS - 0.0609) * 1.5305),
        (
            {"scaling_factor": 0.5, "latents_mean": MEAN, "latents_std": STD},
            (LATENTS - column(MEAN)) * 0.5 / column(STD),
        ),
        ({"scaling_factor": 2.0, "latents_mean": tuple(MEAN)}, (LATENTS - column(MEAN)) * 2),
        ({"scaling_factor": 2.0, "latents_std": STD, "shift_factor": 0.5}, (LATENTS - 0.5) * 2 / column(STD)),
        ({"scaling_factor": 0.3, "shift_factor": 0.0, "latents_mean": MEAN}, (LATENTS - column(MEAN)) * 0.3),
        ({"latents_mean": MEAN, "latents_std": STD}, (LATENTS - column(MEAN)) / column(STD)),
    ],
)
def test_latents_are_scaled_as_the_config_says_and_back(config: dict[str, Any], expected: torch.Tensor) -> None:
    scaling = scaling_of(config | {"latent_channels": 4}, "the VAE")
    torch.testing.assert_close(scaling.to_model(LATENTS), expected)
    torch.testing.assert_close(scaling.to_vae(expected), LATENTS)
    noise = LATENTS.flip(0)
    torch.testing.assert_close(
        scaling.drawn(LATENTS, LATENTS**2, noise), scaling.to_model(LATENTS + LATENTS**2 * noise)
    )
    recorded = {"scale_factor": scaling.scale, "shift_factor": scaling.shift}
    assert recorded_scaling(recorded, "a run") == scaling
    assert recorded_scaling({}, "a run") is None
    assert recorded_scaling({"scale_factor": 2}, "a run") == Scaling(2, 0.0)  # runs that knew no shift


@pytest.mark.parametrize(
    "config",
    [
        {"scaling_factor": 0.0},
        {"scaling_factor": float("nan")},
        {"scaling_factor": "1"},
        {"scaling_factor": 1.0, "shift_factor": float("inf")},
        {"scaling_factor": 1.0, "latents_mean": [0.0] * 3},
        {"scaling_factor": 1.0, "latents_std": [1.0, 1.0, 1.0, 0.0]},
        {"scaling_factor": 1.0, "latents_std": [1.0, 1.0, 1.0, -1.0]},
    ],
)
def test_a_scaling_that_no_latents_can_have_is_named(config: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="the VAE states a scaling that no latents can have"):
        scaling_of(config | {"latent_channels": 4}, "the VAE")


def test_two_shifts_are_asked_about() -> None:
    with pytest.raises(DataError, match="states two shifts"):
        scaling_of({"scaling_factor": 1.0, "shift_factor": 0.1, "latents_mean": MEAN, "latent_channels": 4}, "the VAE")
    with pytest.raises(DataError, match="a run records a scaling"):
        recorded_scaling({"scale_factor": [1.0, True]}, "a run")


def test_scalings_are_compared_to_five_digits() -> None:
    plain = Scaling(0.18215, 0.0)
    assert plain.equals(Scaling([0.182151] * 4, [0.0] * 4))
    assert Scaling(0.3611, 0.1159).equals(Scaling(0.3611, 0.11590001))
    for other in [
        Scaling(0.13025),
        Scaling(0.18215, 3.0),
        Scaling([0.18215] * 3 + [0.2]),
        Scaling(0.18215, [0.0, 0.1]),
    ]:
        assert not plain.equals(other)
        assert not other.equals(plain)
    assert not Scaling([1.0, 1.0]).equals(Scaling([1.0, 1.0, 1.0]))
    assert [s.factor for s in (plain, Scaling(1.0, 0.5), Scaling([1.0, 2.0]))] == [0.18215, None, None]
    assert checked_scaling(1, 0) == (1, 0)


def test_a_vaes_shift_reaches_the_picture() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = new_vae(16, 1, widths=(8, 8, 8)).eval()
    with torch.no_grad():
        expected = vae.decode(LATENTS / 0.7 + 3).sample.clamp(-1, 1)
    vae.register_to_config(scaling_factor=0.7, shift_factor=3.0)
    torch.testing.assert_close(decode(vae, LATENTS), expected)
    torch.testing.assert_close(decode(vae, LATENTS, Scaling(0.7, 3.0)), expected)
    vae.register_to_config(shift_factor=None)
    assert not torch.allclose(decode(vae, LATENTS), expected, atol=1e-3)
