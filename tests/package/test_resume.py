"""A run that stops after any step and goes on in a new process is, to the bit, the run that went through."""

import io
from typing import Any

import plain
import pytest
import torch
from loops import new_criterion, noisy_batch, total
from torch import Tensor, nn
from toys import ToyDiT

STEPS = 6


class Run(nn.Module):
    """A loop with everything that it saves: weights, optimiser, step and the state of the global generator."""

    def __init__(self, stage: int, seed: int = 1, **settings: Any) -> None:
        super().__init__()
        settings |= {"teacher_rows": 0.5} if stage == 2 else {}
        self.model = ToyDiT(depth=3, seed=seed)  # drops labels at random
        self.criterion = new_criterion(self.model, stage, schedule="cosine", check_interval=2, **settings)
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)

    def steps(self, steps: range) -> list[float]:
        """The total of each step; batches depend on the step alone."""
        found = []
        for step in steps:
            loss = total(self.model, self.criterion, noisy_batch([0.35, 0.5, 0.45, 0.9], seed=step), step=step)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            found.append(loss.item())
        return found

    def saved(self) -> dict[str, Any]:
        file = io.BytesIO()
        state = {"run": self.state_dict(), "optimizer": self.optimizer.state_dict(), "rng": torch.get_rng_state()}
        torch.save(state, file)
        return torch.load(io.BytesIO(file.getvalue()))

    def load(self, state: dict[str, Any]) -> None:
        self.load_state_dict(state["run"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])


@pytest.mark.parametrize("stop_step", [4, 100])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("done", [1, 3, 5])
def test_stopped_after_any_step_it_goes_on_as_if_it_had_not(done: int, stage: int, stop_step: int) -> None:
    with plain.global_seed(0):
        through = Run(stage, stop_step=stop_step)
        through.steps(range(done))
        state = through.saved()
        wanted = through.steps(range(done, STEPS))
        resumed = Run(stage, seed=7, stop_step=stop_step)
        resumed.load(state)
        assert resumed.steps(range(done, STEPS)) == wanted
    found: dict[str, Tensor] = resumed.state_dict()
    assert [name for name, tensor in through.state_dict().items() if not torch.equal(tensor, found[name])] == []
