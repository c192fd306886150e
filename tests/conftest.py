"""Fixtures for the whole suite, and the settings that have to hold before anything is imported."""

import os
from collections.abc import Iterator

# No test reaches a hub or opens a window; a value already in the environment wins.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

# The models of the suite are too small to gain from more threads, and one thread keeps sums in one order.
torch.set_num_threads(1)


# Files whose tests compile, start processes, load other libraries' models, draw, or run the docs: seconds each.
SLOW = {
    *("artefacts", "backbones", "borrowed", "checkpointing", "compile", "diffusers"),
    *("docs", "draw", "hub", "package", "plateau", "pretrained", "ranks", "report"),
    *("health", "lifetime", "survey", "trainers", "waiting", "ways"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow, which ``-m "not slow"`` leaves out, what stands in these files, and all that runs the examples."""
    for item in items:
        if item.path.parent.name == "examples" or item.path.stem.removeprefix("test_") in SLOW:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and the GPU too where there is one."""
    return torch.device(request.param)


@pytest.fixture
def generator() -> torch.Generator:
    """A CPU generator in a fixed state, so that a test neither reads nor advances the global one."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def global_rng_untouched() -> Iterator[None]:
    """Fails the test that advances PyTorch's global random number generators."""

    def states() -> list[torch.Tensor]:
        return [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]  # none where there is no GPU

    before = states()
    yield
    assert all(map(torch.equal, before, states())), "a global random number generator advanced"
