"""The wrapped loop on several ranks, each with its part of every batch, with gradient accumulation.

DDP goes around the model and around the criterion; the lines that Self-Transcendence adds are marked `# New`. Stage 1
trains the teacher, stage 2 a new model with it. Digits of 16x16 pixels stand in for VAE latents.

    torchrun --nproc_per_node=2 examples/distributed.py
"""

import argparse
import contextlib
import itertools
import os
from pathlib import Path

import torch
import torch.distributed as dist
from common.data import NUM_DIGIT_CLASSES, digits
from common.options import Parser, at_least, run_script
from common.paths import Transport
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from wrap_sit_loop import new_model

import selftrans_reg as st  # New


def train(run: argparse.Namespace, device: torch.device, name: str, teacher: st.CFGFeatureTeacher | None) -> None:
    """Train one model: stage 1 without a teacher, stage 2 with one. The first rank reports and saves."""
    images, labels = digits(size=16)[0]
    data = TensorDataset(images, labels)
    sampler = DistributedSampler(data, seed=0, drop_last=True)
    loader = DataLoader(data, batch_size=run.batch_size, sampler=sampler, drop_last=True)
    transport = Transport(path="linear")
    model = DistributedDataParallel(new_model().to(device))
    if teacher is None:  # New
        criterion = st.SelfTransLoss.stage1(  # New
            model, layer="blocks.1", time="sit", latent_channels=1, patch_size=2, hidden_features=128
        )
    else:  # New
        criterion = st.SelfTransLoss.stage2(model, layer="blocks.2", teacher=teacher, time="sit", hidden_features=128)
    criterion = DistributedDataParallel(criterion)  # New: or each rank would train a head of its own
    opt = torch.optim.AdamW([*model.parameters(), *criterion.parameters()], lr=1e-3, weight_decay=0)  # New: the head's
    batches = itertools.chain.from_iterable(loader for epoch in itertools.count() if not sampler.set_epoch(epoch))

    for step in range(run.steps):
        opt.zero_grad()
        for part in range(run.accumulate):
            x, y = (tensor.to(device) for tensor in next(batches))
            with contextlib.ExitStack() as silent:
                if part < run.accumulate - 1:
                    silent.enter_context(model.no_sync())
                    silent.enter_context(criterion.no_sync())  # New
                loss_dict = transport.training_losses(model, x, {"y": y})
                terms = criterion(loss_dict["loss"], latents=x, step=step)  # New
                (terms.total / run.accumulate).backward()  # New: was loss_dict["loss"].mean()
        opt.step()
        if dist.get_rank() == 0 and (step % 10 == 0 or step == run.steps - 1):  # of its own part of the batch
            found = f"denoising {terms.denoising:.3f}, alignment {terms.alignment:.3f}"
            print(f"{name}, step {step}: {found}", flush=True)
    if dist.get_rank() == 0:
        state = {"model": model.module.state_dict(), "criterion": criterion.module.state_dict()}
        torch.save(state, run.out / f"{name}.pt")
    dist.barrier()  # the next stage reads the file


def main(argv: list[str] | None = None) -> None:
    """Run stage 1, then stage 2."""
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/distributed"), help="folder of the checkpoints")
    parser.add_argument("--steps", type=at_least(1), default=100, help="of each stage")
    parser.add_argument("--batch-size", type=at_least(1), default=16, help="of one rank's part of a batch")
    parser.add_argument("--accumulate", type=at_least(1), default=2, help="parts of a batch that a rank runs in turn")
    run = parser.parse_args(argv)
    run.out.mkdir(parents=True, exist_ok=True)
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    torch.manual_seed(dist.get_rank())  # ranks draw different t and noise; DDP gives all of them rank 0's weights
    train(run, device, "stage1", teacher=None)
    teacher = st.build_teacher(  # New
        new_model(),
        run.out / "stage1.pt",
        weights="model",
        layer="blocks.3",
        guidance_scale=8.0,  # what st.recipe says of so few blocks
        null={"y": NUM_DIGIT_CLASSES},
        time="sit",
    )
    train(run, device, "stage2", teacher)
    dist.destroy_process_group()


if __name__ == "__main__":
    run_script(main)
