"""Both stages by LoRA: a text-to-image model is held once, and teaches itself with the adapter of stage 1.

A tiny SD3 transformer of diffusers learns shapes without captions first: it stands for the model that one downloads.
With its weights frozen, PEFT's LoRA then learns to follow captions, in stage 1 and anew in stage 2. The teacher of
stage 2 shares the student's base, which the example's last lines compare with a second copy.

    python examples/lora_text_to_image.py
"""

import copy
import tempfile
from collections.abc import Iterable
from itertools import product

import torch
from common.options import Parser, at_least, run_script
from common.training import progress
from diffusers import SD3Transformer2DModel
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import selftrans_reg as st

SIDE, WIDTH = 16, 16  # of the images, which stand in for latents; of a word's embedding
COLOURS = {"red": (1, -1, -1), "green": (-1, 1, -1), "blue": (-1, -1, 1), "yellow": (1, 1, -1)}
SHAPES = ("circle", "square", "cross")
CAPTIONS = [f"{colour} {shape}" for colour, shape in product(COLOURS, SHAPES)]
LORA = LoraConfig(r=8, target_modules=["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"])
SD3 = {"select": 1, "time": "flow"}  # its blocks return (text, image)
HEAD = {"hidden_features": 128}  # 2048 unless told otherwise: more than the whole model here


def embedded(captions: list[str]) -> dict[str, Tensor]:
    """A fixed text encoder: a random vector for each word. The empty prompt has a length of its own, one token."""
    table = torch.randn(len(COLOURS) + len(SHAPES) + 1, WIDTH, generator=torch.Generator().manual_seed(0))
    words = ["", *COLOURS, *SHAPES]
    text = torch.stack([table[[words.index(word) for word in caption.split(" ")]] for caption in captions])
    return {"encoder_hidden_states": text, "pooled_projections": text.mean(1)}


def drawn(captions: list[str]) -> Tensor:
    """(N, 3, H, W), a shape of random place and size for each caption, on black."""
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    images = torch.full((len(captions), 3, SIDE, SIDE), -1.0)
    for image, caption in zip(images, captions, strict=True):
        colour, shape = caption.split(" ")
        (row, column), radius = 5 + 5 * torch.rand(2), 3 + 2 * torch.rand(())
        down, right = (y - row).abs(), (x - column).abs()
        inside = {
            "circle": down**2 + right**2 < radius**2,
            "square": torch.maximum(down, right) < 0.85 * radius,
            "cross": (torch.minimum(down, right) < radius / 3) & (torch.maximum(down, right) < radius),
        }[shape]
        image[:, inside] = torch.tensor(COLOURS[colour]).float()[:, None]
    return images


def train(model: nn.Module, steps: Iterable[int], criterion: st.SelfTransLoss | None, captioned: float = 0.9) -> None:
    """A flow-matching loop, with the criterion's term; some batches have the empty prompt."""
    device = next(model.parameters()).device
    heads = [] if criterion is None else list(criterion.parameters())
    opt = torch.optim.AdamW([*(p for p in model.parameters() if p.requires_grad), *heads], lr=2e-3)
    for _ in steps:
        captions = [CAPTIONS[i] for i in torch.randint(len(CAPTIONS), (32,))]
        latents, shown = drawn(captions).to(device), captions if torch.rand(()) < captioned else [""] * len(captions)
        sigma, noise = torch.rand(len(latents), device=device), torch.randn_like(latents)
        x_t = torch.lerp(latents, noise, sigma[:, None, None, None])
        text = {name: value.to(device) for name, value in embedded(shown).items()}
        velocity = model(hidden_states=x_t, timestep=1000 * sigma, **text).sample
        loss = (velocity - (noise - latents)).square().mean()
        total = loss if criterion is None else criterion(loss, latents=latents).total
        opt.zero_grad()
        total.backward()
        opt.step()


@torch.no_grad()
def right_colours(model: nn.Module, euler_steps: int = 10) -> str:
    """How many of 48 sampled images have the colour of their caption."""
    device, captions = next(model.parameters()).device, CAPTIONS * 4
    text = {name: value.to(device) for name, value in embedded(captions).items()}
    x = torch.randn(len(captions), 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)).to(device)
    for sigma in torch.arange(euler_steps, 0, -1, device=device) / euler_steps:
        x = x - model.eval()(hidden_states=x, timestep=1000 * sigma.expand(len(x)), **text).sample / euler_steps
    seen = nn.functional.normalize(x.mean((2, 3)) + 1)  # against black
    known = nn.functional.normalize(torch.tensor(list(COLOURS.values()), device=device) + 1.0)
    found = [list(COLOURS)[i] for i in (seen @ known.T).argmax(1)]
    model.train()
    return f"{sum(c.startswith(f) for c, f in zip(captions, found, strict=True))} of {len(captions)} images"


def memory(*models: nn.Module) -> int:
    """The bytes that the models hold together, what they share counted once."""
    tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def main(argv: list[str] | None = None) -> None:
    """Train the base, then an adapter in either stage, and compare the memory of two teachers."""
    parser = Parser(__doc__)
    parser.add_argument("--base-steps", type=at_least(1), default=400, help="of the base, without captions")
    parser.add_argument("--steps", type=at_least(1), default=300, help="of each stage")
    parser.add_argument("--device", default="cpu", help="as cuda")
    run = parser.parse_args(argv)
    torch.manual_seed(0)
    base = SD3Transformer2DModel(
        **{"sample_size": SIDE, "patch_size": 2, "in_channels": 3, "out_channels": 3, "pos_embed_max_size": SIDE // 2},
        **{"num_layers": 6, "num_attention_heads": 4, "attention_head_dim": 16, "qk_norm": "rms_norm"},
        **{"joint_attention_dim": WIDTH, "pooled_projection_dim": WIDTH, "caption_projection_dim": 64},
    ).to(run.device)
    train(base, progress(range(run.base_steps), "the base"), None, captioned=0.0)
    plan, downloaded = st.recipe(base), copy.deepcopy(base)
    print(f"colours right: the base {right_colours(base)}, by chance")

    first = get_peft_model(base, LORA)
    criterion = st.SelfTransLoss.stage1(first, **plan.stage1(), latent_channels=3, patch_size=2, **HEAD, **SD3)
    train(first, progress(range(run.steps), "stage 1"), criterion)
    print(f"colours right: the adapter of stage 1 {right_colours(first)}")

    student, held = get_peft_model(downloaded, LORA), {}
    null = {name: value[0].to(run.device) for name, value in embedded([""]).items()}
    with tempfile.TemporaryDirectory() as adapter:
        first.save_pretrained(adapter)
        del base, first, criterion
        for title, copied, steps in [
            ("a teacher with a second base", copy.deepcopy, 1),  # for the comparison alone
            ("stage 2", st.share_frozen, run.steps),
        ]:
            teacher = st.build_teacher(copied(student), adapter, **plan.teacher(), null=null, **SD3)
            held[title] = memory(student, teacher)
            if run.device != "cpu":
                torch.cuda.reset_peak_memory_stats()
            settings = plan.stage2() | {"stop_step": None}
            criterion = st.SelfTransLoss.stage2(student, teacher=teacher, **settings, **HEAD, **SD3)
            train(student, progress(range(steps), title), criterion)
            if run.device != "cpu":
                held[title] = torch.cuda.max_memory_allocated()
            criterion.detach()
            del teacher, criterion
    print(f"colours right: the adapter of stage 2 {right_colours(student)}")
    second, shared = (value / 2**20 for value in held.values())
    print(f"memory: student and teacher on one base {shared:.2f} MiB, with a second base {second:.2f} MiB")


if __name__ == "__main__":
    run_script(main)
