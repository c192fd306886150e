"""The criterion in a LightningModule, attached in ``configure_model``."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from loops import Batch, assert_same, gradients, new_criterion, noisy_batch, plain_gradients, student, total
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

B = noisy_batch([0.35, 0.45, 0.55, 0.9])


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model, self.criterion, self.found = student(), None, {}

    def configure_model(self) -> None:
        if self.criterion is None:  # Lightning calls this before each of fit, validate and test
            self.criterion = new_criterion(self.model, stop_step=100)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return total(self.model, self.criterion, Batch(*batch), step=self.global_step)

    def on_after_backward(self) -> None:
        self.found = self.found or gradients(self.model, self.criterion)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")  # said on machines with more than a few processors
def test_attached_in_configure_model(tmp_path: Path) -> None:
    module = Module()
    quiet: dict[str, Any] = dict.fromkeys(["logger", "enable_progress_bar", "enable_model_summary"], False)
    trainer = Trainer(max_steps=3, accelerator="cpu", enable_checkpointing=False, default_root_dir=tmp_path, **quiet)
    trainer.fit(module, DataLoader(TensorDataset(*B), batch_size=4))
    assert_same(module.found, plain_gradients(B))
    assert module.criterion._step == 2
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt")["state_dict"]
    assert {"model.blocks.0.fc1.weight", "criterion.heads.0.0.weight", "criterion._extra_state"} <= saved.keys()
    assert not [key for key in saved if "teacher" in key]
