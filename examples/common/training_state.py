"""What a long run is between two steps: weights, their moving average, optimiser, head, scaler; saved and loaded."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

import selftrans_reg as st
from common.checkpointing import read_training_state
from selftrans_reg.checkpoints import load_weights
from selftrans_reg.errors import CheckpointError

_KEYS = {"model", "ema", "opt", "criterion", "scaler", "steps", "args"}


class TrainingState:
    """The state of a run, under the names that its modules have without any wrapper.

    Args:
        accelerator: Of the run.
        model: Unwrapped, with its initial weights.
        criterion: Unwrapped, or None.
        optimizer: Over both.
        ema_decay: Decay of the moving average, which starts as a copy of the model.

    Attributes:
        steps: Optimiser steps done.
        ema: The averaged model, frozen and in eval mode.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        criterion: st.SelfTransLoss | None,
        optimizer: torch.optim.Optimizer,
        ema_decay: float,
    ) -> None:
        self.accelerator = accelerator
        self.model = model
        self.criterion = criterion
        self.optimizer = optimizer
        self.steps = 0
        self.ema = copy.deepcopy(model).to(accelerator.device).eval().requires_grad_(False)
        self._average = get_ema_multi_avg_fn(ema_decay)

    @torch.no_grad()
    def update_ema(self) -> None:
        """Move the average towards the weights; buffers are copied."""
        self._average(list(self.ema.parameters()), list(self.model.parameters()), 0)
        for average, buffer in zip(self.ema.buffers(), self.model.buffers(), strict=True):
            average.copy_(buffer)

    def content(self, args: dict[str, Any]) -> dict[str, Any]:
        """What goes into a checkpoint, with the keys of the SiT and REPA repositories and two more."""
        scaler = self.accelerator.scaler
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "opt": self.optimizer.state_dict(),
            "criterion": {} if self.criterion is None else self.criterion.state_dict(),
            "scaler": {} if scaler is None else scaler.state_dict(),
            "steps": self.steps,
            "args": args,
        }

    def load(self, path: Path) -> None:
        """Take up what a checkpoint holds.

        Raises:
            CheckpointError: If it is damaged or does not fit the run.
        """
        content = read_training_state(path, _KEYS)
        if (self.criterion is None) != (not content["criterion"]):
            there, here = ("a", "none") if content["criterion"] else ("no", "one")
            raise CheckpointError(f"{path} is of another stage: it holds {there} criterion, and this run has {here}.")
        load_weights(self.model, content, weights="model")
        load_weights(self.ema, content, weights="ema")
        if self.criterion is not None:
            _load(path, "criterion", lambda: self.criterion.load_state_dict(content["criterion"]))
        # A copy: what is loaded would else stay a view of the file.
        _load(path, "optimiser", lambda: self.optimizer.load_state_dict(copy.deepcopy(content["opt"])))
        if self.accelerator.scaler is not None and content["scaler"]:
            self.accelerator.scaler.load_state_dict(content["scaler"])
        self.steps = content["steps"]


def _load(path: Path, what: str, load: Callable[[], object]) -> None:
    """Call ``load``; what torch says about state that does not fit becomes an error that names the file."""
    try:
        load()
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: the {what} does not fit this run: {error}") from error
