"""Self-Transcendence on a backbone of one's own: layers named by strings, tuples picked apart, arguments named.

The model is a small two-stream transformer. Each of its blocks returns a tuple ``(context, image)``, the image stream
starts with a register token that is no part of the image, and the arguments have other names than x and t.

    python examples/custom_backbone.py
"""

import torch
from common.data import digits, shuffled_batches
from common.options import Parser, at_least, run_script
from common.training import endless
from einops import rearrange
from torch import Tensor, nn

import selftrans_reg as st

WIDTH, CONTEXT_WIDTH, PATCH, GRID = 64, 12, 2, 8
CALL = {"x": "hidden_states", "t": "timestep"}  # x_t and t are not the model's first two arguments
TAP = {"select": 1, "tokens": slice(1, None)}  # of the tuple the image stream, and of that all but the register


class TwoStreamBlock(nn.Module):
    """Joint attention over both streams, then an MLP: ``(context, image)`` in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.joint = nn.TransformerEncoderLayer(WIDTH, 2, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)

    def forward(self, context: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mix the streams."""
        x = self.joint(torch.cat([context, image], dim=1))
        return x[:, : context.shape[1]], x[:, context.shape[1] :]


class TwoStream(nn.Module):
    """Predicts the velocity of ``hidden_states`` (N, 1, 16, 16) from the ``context`` (N, L, 12)."""

    def __init__(self, depth: int = 6) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, WIDTH, PATCH, stride=PATCH)
        self.register = nn.Parameter(0.02 * torch.randn(1, 1, WIDTH))
        self.position = nn.Parameter(0.02 * torch.randn(1, GRID**2, WIDTH))
        self.context_embedder = nn.Linear(CONTEXT_WIDTH, WIDTH)
        self.time_embedder = nn.Sequential(nn.Linear(1, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.joint_blocks = nn.ModuleList([TwoStreamBlock() for _ in range(depth)])
        self.final = nn.Linear(WIDTH, PATCH**2)

    def forward(self, timestep: Tensor, context: Tensor, hidden_states: Tensor) -> Tensor:
        """``timestep`` counts from 0 (data) to 1000 (noise), as in diffusers' flow-matching pipelines."""
        image = rearrange(self.embed(hidden_states), "n d h w -> n (h w) d") + self.position
        image = torch.cat([self.register.expand(len(image), -1, -1), image], dim=1)
        image = image + self.time_embedder(timestep[:, None] / 1000)[:, None]
        context = self.context_embedder(context)
        for block in self.joint_blocks:
            context, image = block(context, image)
        return rearrange(self.final(image[:, 1:]), "n (h w) (p q) -> n 1 (h p) (w q)", h=GRID, p=PATCH)


def train(model: TwoStream, criterion: st.SelfTransLoss, steps: int, title: str) -> None:
    """A flow-matching loop with the criterion's term."""
    data, _ = digits(size=16)
    codes = nn.functional.one_hot(data.labels, CONTEXT_WIDTH).float()[:, None]  # (N, 1, 12), a stand-in for text
    batches = endless(shuffled_batches(data.images, codes, batch_size=32, seed=0))
    opt = torch.optim.AdamW([*model.parameters(), *criterion.parameters()], lr=1e-3)
    criterion.check_optimizer(opt)
    for step, (x, context) in zip(range(steps), batches, strict=False):
        t, noise = torch.rand(len(x)), torch.randn_like(x)
        context = context * (torch.rand(len(x), 1, 1) > 0.1)  # condition dropout: zeros are the null condition
        x_t = torch.lerp(x, noise, t[:, None, None, None])
        velocity = model(timestep=1000 * t, context=context, hidden_states=x_t)
        terms = criterion((velocity - (noise - x)).square().mean(), latents=x, step=step)
        opt.zero_grad()
        terms.total.backward()
        opt.step()
    print(f"{title}, step {step}: denoising {terms.denoising:.3f}, alignment {terms.alignment:.3f}")


def main(argv: list[str] | None = None) -> None:
    """Run stage 1, then stage 2."""
    parser = Parser(__doc__)
    parser.add_argument("--steps", type=at_least(1), default=100, help="of each stage")
    steps = parser.parse_args(argv).steps
    torch.manual_seed(0)
    first, second = TwoStream(), TwoStream()
    common = {"time": "flow", "hidden_features": 128, "call": CALL, **TAP}
    criterion = st.SelfTransLoss.stage1(first, layer="joint_blocks.1", latent_channels=1, patch_size=PATCH, **common)
    train(first, criterion, steps, "stage 1")
    criterion.detach()  # no more hooks: the first model becomes the teacher
    null = {"context": torch.zeros(1, CONTEXT_WIDTH)}  # of the argument's shape without its batch axis
    settings = {"layer": "joint_blocks.3", "guidance_scale": 8.0, "null": null, "call": CALL, "time": "flow"}
    teacher = st.build_teacher(first, None, **settings, **TAP)
    train(second, st.SelfTransLoss.stage2(second, layer="joint_blocks.2", teacher=teacher, **common), steps, "stage 2")


if __name__ == "__main__":
    run_script(main)
