"""The examples' samplers on Gaussian data, whose flow is known in closed form, and on their formulas."""

import math
from collections.abc import Callable

import pytest
import torch
from common import samplers
from common.options import Mistake
from common.paths import PATHS, linear_path
from common.samplers import LAST_SDE_TIME, Guidance, reversed_time, sample_ode, sample_sde, score_from_velocity
from torch import Tensor

MEAN, STD = 1.5, 0.5
Y = torch.zeros(1, dtype=torch.long)


def gaussian_velocity(path: Callable[[Tensor], tuple[Tensor, ...]] = linear_path) -> Callable[..., Tensor]:
    """E[dx_t / dt given x_t] for data N(MEAN, STD**2): the regression of one Gaussian on another."""

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        alpha, sigma, d_alpha, d_sigma = path(t[:, None, None, None])
        variance = alpha**2 * STD**2 + sigma**2
        covariance = d_alpha * alpha * STD**2 + d_sigma * sigma
        return d_alpha * MEAN + covariance / variance * (x - alpha * MEAN)

    return model


def points(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1, 1)


def value_at(x: float, t: float) -> float:
    return gaussian_velocity()(points(x), torch.tensor([t], dtype=torch.float64), Y).item()


def test_a_model_of_reversed_time_is_the_same_model() -> None:
    """The SiT repository's: from s = 0, noise, to s = 1, data, along u = dx / ds."""

    def towards_data(x: Tensor, s: Tensor, y: Tensor) -> Tensor:
        s = s[:, None, None, None]
        covariance = s * STD**2 - (1 - s)  # of x_s = s x + (1 - s) noise with x - noise
        return MEAN + covariance / (s**2 * STD**2 + (1 - s) ** 2) * (x - s * MEAN)

    x, t = points(-1.0, 0.3, 2.0), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    torch.testing.assert_close(reversed_time(towards_data)(x, t, Y), gaussian_velocity()(x, t, Y))


def test_ode_steps_equal_the_formula() -> None:
    model, v, x = gaussian_velocity(), value_at, 0.7
    halfway = x - 0.5 * v(x, 1.0)
    assert sample_ode(model, points(x), Y, steps=2).item() == pytest.approx(halfway - 0.5 * v(halfway, 0.5))
    corrected = x - 0.5 * (v(x, 1.0) + v(halfway, 0.5)) / 2
    heun = sample_ode(model, points(x), Y, steps=2, method="heun").item()
    assert heun == pytest.approx(corrected - 0.5 * v(corrected, 0.5))


@pytest.mark.parametrize("name", PATHS)
def test_score_is_that_of_the_gaussian(name: str) -> None:
    x, t = points(-1.0, 0.5, 2.0), torch.tensor(0.6, dtype=torch.float64)
    alpha, sigma, *_ = PATHS[name](t)
    expected = -(x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
    velocity = gaussian_velocity(PATHS[name])(x, t.expand(3), Y)
    torch.testing.assert_close(score_from_velocity(velocity, x, t, PATHS[name]), expected)


@pytest.mark.parametrize("name", PATHS)
def test_sde_converges_to_the_datas_mean_and_deviation_at_order_1(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both moments are exact: of an affine map, they are its value at zero and its response to each of its draws."""

    def moments(steps: int) -> Tensor:
        rows = steps + 1  # nothing, the start, and the noise of each step but the last
        drawn = iter(torch.eye(rows, dtype=torch.float64)[2:])
        monkeypatch.setattr(samplers, "randn_tensor", lambda shape, **_: next(drawn).reshape(shape))
        start = torch.eye(rows, dtype=torch.float64)[1].reshape(-1, 1, 1, 1)
        model, generator = gaussian_velocity(PATHS[name]), torch.Generator()
        end = sample_sde(model, start, Y.expand(rows), steps=steps, generator=generator, path=PATHS[name]).flatten()
        return torch.stack([end[0], (end[1:] - end[0]).norm()])

    found = torch.stack([moments(steps) for steps in (100, 200, 400, 800)])
    assert found[-1].tolist() == pytest.approx([MEAN, STD], abs=0.03)  # the last step stays as long as it is
    shrinking = found[:, 1].diff().abs().log2().diff()  # a straight path has no error in the mean
    torch.testing.assert_close(shrinking, torch.full_like(shrinking, -1), rtol=0, atol=0.15)


def test_sde_steps_equal_the_formula(generator: torch.Generator) -> None:
    end = sample_sde(gaussian_velocity(), points(0.7), Y, steps=3, generator=generator).item()
    generator.manual_seed(0)
    x = 0.7
    times = [1.0, (1 + LAST_SDE_TIME) / 2, LAST_SDE_TIME, 0.0]
    for i in range(3):
        t, dt = times[i], times[i + 1] - times[i]
        v = value_at(x, t)
        ratio = -(1 - t)  # alpha / alpha'
        score = (ratio * v - x) / (t**2 - ratio * t)
        x = x + (v - t * score) * dt
        if i < 2:
            fresh = torch.randn(1, 1, 1, 1, generator=generator, dtype=torch.float64).item()
            x += math.sqrt(2 * t) * math.sqrt(abs(dt)) * fresh
    assert end == pytest.approx(x)
    assert LAST_SDE_TIME == 0.04


def test_sde_with_a_generator_a_sample_does_not_depend_on_the_batch() -> None:
    def run(rows: list[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(row) for row in rows]
        start = torch.cat([torch.randn(1, 1, 2, 2, generator=g) for g in generators])
        return sample_sde(gaussian_velocity(), start, Y.expand(len(rows)), steps=5, generator=generators)

    torch.testing.assert_close(run([3, 4, 5])[1:], run([4, 5]), rtol=0, atol=1e-6)


def labelled(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Velocity 1 for class 0 and 10 for the null class 7."""
    return torch.where(y == 7, 10.0, 1.0)[:, None, None, None].expand_as(x)


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_guidance_acts_in_the_steps_that_begin_inside_its_closed_interval(method: str) -> None:
    """Heun's second evaluation too is decided by where the step begins, as in REPA's sampler."""
    # Steps start at t = 1, 0.75, 0.5, 0.25; guided velocity 10 + 3 (1 - 10) = -17.
    guidance = Guidance(scale=3.0, null=7, low=0.5, high=0.75)
    end = sample_ode(labelled, torch.zeros(1, 5, 1, 1), Y, steps=4, method=method, guidance=guidance)
    assert end.flatten().tolist() == pytest.approx([-0.25 * (1 - 17 - 17 + 1)] * 5)  # in all channels


def test_the_model_sees_the_noises_precision_and_the_state_is_float64() -> None:
    seen = set()

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.add((x.dtype, t.dtype))
        return torch.full_like(x, 1e-5)

    start = torch.ones(1, 1, 1, 1)
    end = sample_ode(model, start, Y, steps=1000)
    assert seen == {(torch.float32, torch.float32)}
    assert end.dtype == torch.float32
    # A float32 state would never leave 1: one step of 1e-8 is far below its spacing there, a thousand of them are not.
    assert end.item() == pytest.approx(1 - 1e-5, abs=1e-7)


def test_bad_settings_are_named() -> None:
    for settings, match in [
        ({"steps": 0}, "at least 1 steps"),
        ({"steps": 2, "method": "rk45"}, "no ODE method named 'rk45'"),
        ({"steps": 2, "guidance": Guidance(2.0)}, "scale 2.0 needs the null class"),
        ({"steps": 2, "guidance": Guidance(2.0, 7, 0.8, 0.2)}, "0 <= low <= high <= 1"),
    ]:
        with pytest.raises(Mistake, match=match):
            sample_ode(labelled, points(0.0), Y, **settings)
