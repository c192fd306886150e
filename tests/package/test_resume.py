"""A run that stops after any step and goes on in a new process is, to the bit, the run that went through."""

import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from loops import denoising, new_criterion, noisy_batch
from torch import Tensor
from toys import ToyDiT

import selftrans_reg as st

STEPS = 6
SETTINGS = {"schedule": "cosine", "check_interval": 2}


@pytest.fixture(autouse=True)
def _rng_of_its_own() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


class Run:
    """A loop with everything that it saves: weights, optimiser, step and the state of the global generator."""

    def __init__(self, stage: int, seed: int = 1, **settings: Any) -> None:
        self.model = ToyDiT(depth=3, seed=seed)  # drops labels at random
        if stage == 2:
            settings = {"teacher_rows": 0.5} | settings
        self.criterion = new_criterion(self.model, stage, **SETTINGS | settings)
        parameters = [*self.model.parameters(), *self.criterion.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-2)

    def steps(self, steps: range) -> list[Tensor]:
        """The terms of each step; batches depend on the step alone."""
        found = []
        for step in steps:
            b = noisy_batch([0.35, 0.5, 0.45, 0.9], seed=step)
            terms = self.criterion(denoising(self.model, b), latents=b.latents, step=step)
            self.optimizer.zero_grad()
            terms.total.backward()
            self.optimizer.step()
            found.append(torch.stack(list(terms)).detach())
        return found

    def saved(self) -> io.BytesIO:
        state = {name: getattr(self, name).state_dict() for name in ("model", "criterion", "optimizer")}
        file = io.BytesIO()
        torch.save(state | {"rng": torch.get_rng_state()}, file)
        file.seek(0)
        return file

    def load(self, file: io.BytesIO) -> "Run":
        state = torch.load(file)
        for name in ("model", "criterion", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        torch.set_rng_state(state["rng"])
        return self

    def weights(self) -> dict[str, Tensor]:
        return {**self.model.state_dict(), **self.criterion.state_dict(prefix="criterion.")}


@pytest.mark.parametrize("stop_step", [2, 4, 100])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("done", range(1, STEPS))
def test_stopped_after_any_step_it_goes_on_as_if_it_had_not(done: int, stage: int, stop_step: int) -> None:
    through = Run(stage, stop_step=stop_step)
    first = through.steps(range(done))
    file = through.saved()
    wanted = through.steps(range(done, STEPS))
    resumed = Run(stage, seed=7, stop_step=stop_step).load(file)
    found = resumed.steps(range(done, STEPS))
    assert torch.equal(torch.stack(found), torch.stack(wanted))
    weights, wanted_weights = resumed.weights(), through.weights()
    assert weights.keys() == wanted_weights.keys()
    assert [name for name, tensor in weights.items() if not torch.equal(tensor, wanted_weights[name])] == []
    # The alignment was on before the stop step and off from there; otherwise the above would compare nothing.
    weight = [term[3].item() > 0 for term in first + found]
    assert weight == [step < stop_step for step in range(STEPS)]


def test_what_is_not_loaded_makes_another_run() -> None:
    through = Run(2, stop_step=100)
    through.steps(range(2))
    file = through.saved()
    wanted = through.steps(range(2, 4))
    resumed = Run(2, stop_step=100)
    resumed.model.load_state_dict(torch.load(file)["model"])
    assert not torch.equal(torch.stack(resumed.steps(range(2, 4))), torch.stack(wanted))


def test_past_the_stop_step_it_goes_on_without_a_teacher() -> None:
    through = Run(2, stop_step=2)
    through.steps(range(3))
    file = through.saved()
    wanted = through.steps(range(3, 5))
    model = ToyDiT(depth=3, seed=7)
    resumed = Run(2, stop_step=2)
    resumed.model = model
    resumed.criterion = st.SelfTransLoss.stage2(
        model, layer="blocks.1", teacher=None, time="sit", hidden_size=16, hidden_features=24, target_size=16,
        stop_step=2, **SETTINGS,
    )  # fmt: skip
    resumed.optimizer = torch.optim.AdamW([*model.parameters(), *resumed.criterion.parameters()], lr=1e-2)
    assert torch.equal(torch.stack(resumed.load(file).steps(range(3, 5))), torch.stack(wanted))
