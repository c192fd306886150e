"""Checks an installed wheel that has nothing beside it: what it holds, what it declares, and one short run.

Started by ``.ci/run`` with the Python of an environment that holds only the wheel and its dependencies:

    python -I -W error tests/support/check_wheel.py
"""

import importlib.metadata
import importlib.util
import re
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import selftrans_reg as st

N, C, SIZE, PATCH, WIDTH, CLASSES = 4, 4, 8, 2, 16, 5
CORE = {"torch", "einops", "safetensors", "huggingface-hub"}
NOT_CORE = ["accelerate", "diffusers", "matplotlib", "pytest", "scipy", "sklearn", "transformers"]


class ToyTransformer(nn.Module):
    """Three residual blocks with the call and the names of a SiT; nothing is initialised to zero."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(C, WIDTH, PATCH, PATCH)
        self.time = nn.Linear(1, WIDTH)
        self.labels = nn.Embedding(CLASSES + 1, WIDTH)  # the last row is the null label
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
            for _ in range(3)
        )
        self.final = nn.ConvTranspose2d(WIDTH, C, PATCH, PATCH)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """(N, C, H, W), (N,), (N,) -> (N, C, H, W)."""
        grid = self.patches(x)  # (N, D, H / PATCH, W / PATCH)
        condition = self.time(t[:, None]) + self.labels(y)  # (N, D)
        tokens = grid.flatten(2).transpose(1, 2) + condition[:, None]  # (N, T, D)
        for block in self.blocks:
            tokens = tokens + block(tokens)
        return self.final(tokens.transpose(1, 2).reshape(grid.shape))


def check(holds: bool, message: str) -> None:
    """Unlike an assert, stays under ``python -O``."""
    if not holds:
        raise SystemExit(f"check_wheel: {message}")


def check_contents() -> None:
    """Only the package and its metadata, the marker for typed packages and the licence among them."""
    distribution = importlib.metadata.distribution("selftrans-reg")
    installed = [str(path) for path in distribution.files or [] if "__pycache__" not in path.parts]
    metadata = f"selftrans_reg-{st.__version__}.dist-info/"
    stray = [path for path in installed if not path.startswith(("selftrans_reg/", metadata))]
    check(not stray, f"the wheel holds more than the package: {stray}")
    for path in ("selftrans_reg/py.typed", f"{metadata}licenses/LICENSE"):
        check(path in installed, f"the wheel lacks {path}; it holds {installed}")
    package = Path(st.__file__).resolve()
    check(package.is_relative_to(Path(sys.prefix).resolve()), f"imported {package}, not the wheel in {sys.prefix}")

    declared = [line for line in distribution.requires or [] if "extra ==" not in line]
    names = {re.split(r"[^A-Za-z0-9_.-]", line, maxsplit=1)[0].lower() for line in declared}
    check(names == CORE, f"the wheel declares {sorted(names)} as dependencies instead of {sorted(CORE)}")
    beside = [name for name in NOT_CORE if importlib.util.find_spec(name)]
    check(not beside, f"the environment is not the wheel's alone: it also has {beside}")


def noisy(latents: Tensor, t: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The linear path with t = 1 for data, and its velocity."""
    noise = torch.randn(latents.shape, generator=generator)
    share = t[:, None, None, None]
    return share * latents + (1 - share) * noise, latents - noise


def step(model: nn.Module, criterion: st.SelfTransLoss, latents: Tensor, number: int) -> st.LossTerms:
    """One training step as a user writes it."""
    generator = torch.Generator().manual_seed(number)
    t = torch.tensor([0.35, 0.5, 0.55, 0.9])  # three of the four inside the window
    y = torch.randint(CLASSES, (N,), generator=generator)
    x_t, velocity = noisy(latents, t, generator)
    optimizer = torch.optim.AdamW([*model.parameters(), *criterion.parameters()], lr=1e-3)
    denoising = (model(x_t, t, y) - velocity).square().mean()
    terms = criterion(denoising, latents=latents, step=number)
    optimizer.zero_grad()
    terms.total.backward()
    missing = [name for name, parameter in criterion.named_parameters() if not parameter.grad.abs().sum() > 0]
    check(not missing, f"no gradient reached {missing}")
    check(bool(terms.total.isfinite()), f"the loss is {terms.total}")
    check(terms.in_window.item() == 0.75, f"in_window is {terms.in_window}, not 0.75")
    optimizer.step()
    return terms


def check_run(folder: Path) -> None:
    """Both stages take a step; head and teacher come back from their files as they were."""
    torch.manual_seed(0)
    latents = torch.randn(N, C, SIZE, SIZE)
    settings = {"layer": "blocks.0", "time": "sit", "latent_channels": C, "patch_size": PATCH}

    model = ToyTransformer()
    stage1 = st.SelfTransLoss.stage1(model, **settings)
    step(model, stage1, latents, number=0)
    torch.save(stage1.state_dict(), folder / "criterion.pt")
    restored = st.SelfTransLoss.stage1(ToyTransformer(), **settings)
    restored.load_state_dict(torch.load(folder / "criterion.pt"))
    for name, value in stage1.state_dict().items():
        check(torch.equal(value, restored.state_dict()[name]), f"{name} came back changed")

    torch.save(model.state_dict(), folder / "stage1.pt")
    null = {"y": CLASSES}
    in_memory, from_disk = (
        st.build_teacher(ToyTransformer(), weights, layer="blocks.1", guidance_scale=30.0, null=null)
        for weights in (model.state_dict(), folder / "stage1.pt")
    )
    t, y = torch.full((N,), 0.5), torch.arange(N)
    from_memory, from_file = in_memory(latents, t, y=y), from_disk(latents, t, y=y)
    check(from_memory.shape == (N, (SIZE // PATCH) ** 2, WIDTH), f"the teacher returns {tuple(from_memory.shape)}")
    check(torch.equal(from_memory, from_file), "the teacher differs between a state dict and its file")

    student = ToyTransformer()
    stage2 = st.SelfTransLoss.stage2(student, layer="blocks.0", teacher=from_disk, time="sit", stop_step=10)
    check(step(student, stage2, latents, number=0).alignment.item() > 0, "the teacher's term is 0 inside its window")

    from_disk.save_pretrained(folder / "teacher")
    again = st.CFGFeatureTeacher.from_pretrained(folder / "teacher", model=ToyTransformer)
    check(torch.equal(again(latents, t, y=y), from_file), "the teacher differs after save_pretrained")
    resumed = st.SelfTransLoss.stage2(ToyTransformer(), layer="blocks.0", teacher=again, time="sit", stop_step=10)
    resumed.load_state_dict(stage2.state_dict())  # which knows the teacher again


if __name__ == "__main__":
    check_contents()
    with tempfile.TemporaryDirectory() as folder:
        check_run(Path(folder))
    print(f"check_wheel: selftrans-reg {st.__version__} works on its own with torch {torch.__version__}")
