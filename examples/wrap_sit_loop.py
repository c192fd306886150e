"""An existing SiT loop, whose loss function draws t and the noise inside, with Self-Transcendence added.

The lines that are added or changed are marked `# New`. Stage 1 trains the teacher; stage 2 trains a new model with it.
Digits of 16x16 pixels stand in for VAE latents, so that the loop starts at once: latents of your own go in their place.

    python examples/wrap_sit_loop.py
"""

from pathlib import Path

import torch
from common.data import NUM_DIGIT_CLASSES, digits, shuffled_batches
from common.options import Parser, at_least, run_script
from common.paths import Transport
from common.sit import SiT
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import selftrans_reg as st  # New


def new_model() -> SiT:
    """A small SiT of 64 tokens."""
    return SiT(
        input_size=16, patch_size=2, in_channels=1, hidden_size=64, depth=6, num_heads=2, num_classes=NUM_DIGIT_CLASSES
    )


def train(out: Path, name: str, epochs: int, teacher: st.CFGFeatureTeacher | None = None) -> None:
    """Train one model and save it: stage 1 without a teacher, stage 2 with one."""
    data, _ = digits(size=16)
    loader = shuffled_batches(data.images, data.labels, batch_size=32, seed=0)
    model, transport = new_model(), Transport(path="linear")
    if teacher is None:  # New
        criterion = st.SelfTransLoss.stage1(  # New
            model, layer="blocks.1", time="sit", latent_channels=1, patch_size=2, hidden_features=128
        )
    else:  # New
        half = epochs * len(loader) // 2  # New
        criterion = st.SelfTransLoss.stage2(  # New
            model, layer="blocks.2", teacher=teacher, time="sit", hidden_features=128, stop_step=half
        )
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    opt = torch.optim.AdamW([*model.parameters(), *criterion.parameters()], lr=1e-3, weight_decay=0)  # New: the head's
    criterion.check_optimizer(opt)  # New: an error if the head was forgotten

    step = 0
    for epoch in range(epochs):
        for x, y in loader:
            loss_dict = transport.training_losses(model, x, {"y": y})
            terms = criterion(loss_dict["loss"], latents=x, step=step)  # New
            opt.zero_grad()
            terms.total.backward()  # New: was loss_dict["loss"].mean()
            opt.step()
            ema.update_parameters(model)
            step += 1
        # Stage 2's alignment reads 0 in the second half: its stop_step has come.
        print(f"{name}, epoch {epoch}: denoising {terms.denoising:.3f}, alignment {terms.alignment:.3f}")
    torch.save({"model": model.state_dict(), "ema": ema.module.state_dict()}, out / f"{name}.pt")


def main(argv: list[str] | None = None) -> None:
    """Run stage 1, then stage 2."""
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/wrap_sit_loop"), help="folder of the checkpoints")
    parser.add_argument("--epochs", type=at_least(1), default=4, help="of each stage")
    run = parser.parse_args(argv)
    run.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    train(run.out, "stage1", run.epochs)
    teacher = st.build_teacher(  # New
        new_model(),
        run.out / "stage1.pt",
        layer="blocks.3",
        guidance_scale=8.0,  # what st.recipe says of so few blocks
        null={"y": NUM_DIGIT_CLASSES},
        time="sit",
    )
    train(run.out, "stage2", run.epochs, teacher)


if __name__ == "__main__":
    run_script(main)
