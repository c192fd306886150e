"""A run of the long-run trainer that takes a fraction of a second: a SiT of four blocks on twenty random latents."""

import json
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from common.long_runs import new_accelerator
from common.paths import denoising_loss
from common.sit import SiT
from common.trainer import Trainer
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path
from torch.utils.data import Dataset

import selftrans_reg as st

CLASSES = 5
SIZE = {"input_size": 4, "patch_size": 1, "in_channels": 2, "hidden_size": 16, "depth": 4, "num_heads": 2}
SETTINGS = {
    "steps": 7, "batch_size": 8, "micro_batches": 1, "lr": 1e-2, "betas": (0.9, 0.999), "weight_decay": 0.0,
    "warmup_steps": 0, "clip": 1.0, "ema_decay": 0.9, "seed": 0, "precision": "no", "workers": 0, "log_every": 2,
    "checkpoint_every": 100, "keep": 3, "keep_every": None,
}  # fmt: skip


class Items(Dataset[tuple[Tensor, int]]):
    """Latents and labels; ``noise`` adds what an item draws."""

    def __init__(self, length: int = 20, noise: float = 0.1) -> None:
        self.latents = torch.randn(length, 2, 4, 4, generator=torch.Generator().manual_seed(1))
        self.noise = noise

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.latents[index] + self.noise * torch.randn(2, 4, 4), index % CLASSES


def new_sit(seed: int = 0, **settings: Any) -> SiT:
    """A SiT whose initial weights are the seed's, none of them zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = SiT(**(SIZE | {"num_classes": CLASSES, "learn_sigma": False} | settings))
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    return model


def new_criterion(stage: str, model: SiT, health_interval: int) -> st.SelfTransLoss | None:
    settings: dict[str, Any] = {"time": "repa", "hidden_features": 8, "window": (0.2, 0.8)}
    settings |= {"layer": "blocks.1", "health_interval": health_interval}
    if stage == "1":
        return st.SelfTransLoss.stage1(model, latent_channels=2, patch_size=1, **settings)
    if stage == "2":
        teacher = st.build_teacher(new_sit(seed=7), None, layer="blocks.2", guidance_scale=3.0, null={"y": CLASSES})
        return st.SelfTransLoss.stage2(model, teacher=teacher, stop_step=5, **settings)
    return None


def fixed_loss(model: nn.Module, latents: Tensor, y: Tensor) -> Tensor:
    """A loss that draws nothing: time and noise are functions of the latents."""
    t = latents.flatten(1).mean(1).sigmoid()
    noise = latents.flip(-1)
    x_t = torch.lerp(latents, noise, t.view(-1, 1, 1, 1))
    return (model(x_t, t, y) - (noise - latents)).square().flatten(1).mean(1)


def new_trainer(out: Path, *, stage: str = "1", **given: Any) -> Trainer:
    """``given``: settings, or what the trainer is made of: model, dataset, denoise."""
    run = Namespace(**(SETTINGS | {"model": new_sit(), "dataset": Items(), "denoise": denoising_loss} | given))
    out.mkdir(exist_ok=True)
    return Trainer(
        new_accelerator(run.precision, micro_batches=run.micro_batches, cpu=True, out=out, trackers=["tensorboard"]),
        run.model,
        criterion=new_criterion(stage, run.model, run.log_every * run.micro_batches),
        dataset=run.dataset,
        latents_of=tuple,
        denoise=run.denoise,
        settings=run,
        out=out,
        args={"model": "tiny"},
    )


def trained(out: Path, resume: Path | None = None, **given: Any) -> Trainer:
    """A trainer that has run to its last step."""
    with own_state():
        trainer = new_trainer(out, **given)
        trainer.resume(resume)
        trainer.run()
        return trainer


@contextmanager
def own_state() -> Iterator[None]:
    """What accelerate keeps for a process, and the global generator, are as before afterwards."""
    with torch.random.fork_rng():
        try:
            yield
        finally:
            reset()


def reset() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def checkpoint(out: Path, steps: int = 3) -> Path:
    return out / "checkpoints" / f"{steps:07d}.pt"


def lines(out: Path) -> list[dict[str, Any]]:
    """The log without what no second run repeats."""
    found = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "samples_per_second"} for line in found]


def differences(a: Path, b: Path) -> list[str]:
    """Places at which two checkpoints are not bit-equal."""
    left, right = (dict(tree_flatten_with_path(torch.load(path, weights_only=True))[0]) for path in (a, b))
    assert left.keys() == right.keys()
    pairs = [(place, x, right[place]) for place, x in left.items()]
    return [keystr(at) for at, x, y in pairs if not (torch.equal(x, y) if isinstance(x, Tensor) else x == y)]
