"""The criterion in a LightningModule, attached in ``configure_model``."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from loops import Batch, assert_same, denoising, gradients, new_criterion, noisy_batch, plain_gradients, student
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from toys import ToyDiT

from selftrans_reg import SelfTransLoss

TIMES = [0.35, 0.45, 0.55, 0.9]


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model: ToyDiT = student()
        self.criterion: SelfTransLoss | None = None
        self.gradients: dict[str, Tensor] = {}

    def configure_model(self) -> None:
        if self.criterion is None:  # Lightning calls this before each of fit, validate and test
            self.criterion = new_criterion(self.model, stop_step=100)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        b = Batch(*batch)
        return self.criterion(denoising(self.model, b), latents=b.latents, step=self.global_step).total

    def on_after_backward(self) -> None:
        self.gradients = self.gradients or gradients(self.model, self.criterion)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


def loader() -> DataLoader:
    return DataLoader(TensorDataset(*noisy_batch(TIMES)), batch_size=len(TIMES))


@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")  # said on machines with more than a few processors
def test_attached_in_configure_model(tmp_path: Path) -> None:
    module = Module()
    trainer = Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, loader())
    assert_same(module.gradients, plain_gradients(noisy_batch(TIMES)))
    assert module.criterion._step == 2
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt")["state_dict"]
    assert {"model.blocks.0.fc1.weight", "criterion.heads.0.0.weight", "criterion._extra_state"} <= saved.keys()
    assert not [key for key in saved if "teacher" in key]
