"""The examples' samplers on Gaussian data, whose flow is known in closed form, and on their formulas."""

import pytest
import torch
from common import samplers
from common.paths import PATHS, Path, linear_path
from common.samplers import Guidance, Model, reversed_time, sample_ode, sample_sde
from torch import Tensor

MEAN, STD = 1.5, 0.5
Y = torch.zeros(1, dtype=torch.long)


def gaussian_velocity(path: Path = linear_path) -> Model:
    """E[dx_t / dt given x_t] for data N(MEAN, STD**2): the regression of one Gaussian on another."""

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        alpha, sigma, d_alpha, d_sigma = path(t[:, None, None, None])
        variance = alpha**2 * STD**2 + sigma**2
        covariance = d_alpha * alpha * STD**2 + d_sigma * sigma
        return d_alpha * MEAN + covariance / variance * (x - alpha * MEAN)

    return model


def points(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1, 1)


def test_a_model_of_reversed_time_is_the_same_model() -> None:
    """The SiT repository's: x_s = s x + (1 - s) noise, from s = 0, noise, to s = 1, data, along dx / ds."""

    def towards_data(s: Tensor) -> tuple[Tensor, ...]:
        return s, 1 - s, torch.ones_like(s), -torch.ones_like(s)

    x, t = points(-1.0, 0.3, 2.0), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    torch.testing.assert_close(reversed_time(gaussian_velocity(towards_data))(x, t, Y), gaussian_velocity()(x, t, Y))


def test_ode_steps_equal_the_formula() -> None:
    def v(x: float, t: float) -> float:
        return gaussian_velocity()(points(x), torch.tensor([t], dtype=torch.float64), Y).item()

    x = 0.7
    halfway = x - 0.5 * v(x, 1.0)
    corrected = x - 0.5 * (v(x, 1.0) + v(halfway, 0.5)) / 2
    for method, middle in {"euler": halfway, "heun": corrected}.items():
        end = sample_ode(gaussian_velocity(), points(x), Y, steps=2, method=method)
        assert end.item() == pytest.approx(middle - 0.5 * v(middle, 0.5))


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


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_guidance_acts_in_the_steps_that_begin_inside_its_closed_interval(method: str) -> None:
    """Heun's second evaluation too is decided by where the step begins, as in REPA's sampler."""

    def labelled(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.where(y == 7, 10.0, 1.0)[:, None, None, None].expand_as(x)

    # Steps start at t = 1, 0.75, 0.5, 0.25; guided velocity 10 + 3 (1 - 10) = -17.
    guidance = Guidance(scale=3.0, null=7, low=0.5, high=0.75)
    end = sample_ode(labelled, torch.zeros(1, 5, 1, 1), Y, steps=4, method=method, guidance=guidance)
    assert end.flatten().tolist() == pytest.approx([-0.25 * (1 - 17 - 17 + 1)] * 5)  # in all channels


def test_the_model_sees_the_noises_precision_and_the_state_is_float64() -> None:
    seen = set()

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.add((x.dtype, t.dtype))
        return torch.full_like(x, 1e-5)

    end = sample_ode(model, torch.ones(1, 1, 1, 1), Y, steps=1000)
    assert seen == {(end.dtype, torch.float32)}
    # A float32 state would never leave 1: one step of 1e-8 is far below its spacing there, a thousand of them are not.
    assert end.item() == pytest.approx(1 - 1e-5, abs=1e-7)
