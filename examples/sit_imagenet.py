"""The paper's runs on ImageNet's latents: a SiT as it is, with stage 1, or with stage 2 and a stage-1 run's teacher.

Run alone, by torchrun or by accelerate launch; the global batch stays what it is. The same command goes on from the
last checkpoint. `--data demo` takes small digits and a small model: both stages run on a laptop in minutes.

    torchrun --nproc_per_node=8 examples/sit_imagenet.py --stage 1 --model SiT-B/2 --data vae-sd --out runs/b2/stage1
    torchrun --nproc_per_node=8 examples/sit_imagenet.py --stage 2 --model SiT-B/2 --data vae-sd --out runs/b2/stage2 \
        --teacher runs/b2/stage1/teacher
"""
# ruff: noqa: E402

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from common.options import Mistake, at_least, long_run_parser, parse_long_run, run_script, within

PUBLISHED = {
    "steps": 400_000, "batch_size": 256, "lr": 1e-4, "warmup_steps": 0, "ema_decay": 0.9999, "log_every": 100,
    "checkpoint_every": 10_000, "keep_every": 50_000, "head_features": 2048,
}  # fmt: skip
DEMO = {
    "steps": 700, "batch_size": 16, "lr": 3e-3, "warmup_steps": 50, "ema_decay": 0.99, "log_every": 50,
    "checkpoint_every": 100, "keep_every": 350, "head_features": 256, "stop_step": 350,
}  # fmt: skip
DEMO_SIZE = {"patch_size": 1, "hidden_size": 96, "depth": 6, "num_heads": 3}  # 64 tokens on the demo's latents


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = long_run_parser(__doc__, "blocks", PUBLISHED, DEMO)
    add = parser.add_argument_group("the model and its data").add_argument
    add(
        "--data",
        required=True,
        help="folder of latents (docs/data.md), 'demo', or to measure speed 'random' or 'random-512'",
    )
    names = [f"SiT-{size}/{patch}" for size in ("S", "B", "L", "XL") for patch in (2, 4, 8)]
    add("--model", choices=["demo", *names], metavar="SiT-{S,B,L,XL}/{2,4,8}|demo",
        help="default: SiT-XL/2, or demo with that data")  # fmt: skip
    add("--qk-norm", action=argparse.BooleanOptionalAction, help="default: only with --recipe released")
    add("--learn-sigma", action=argparse.BooleanOptionalAction, default=False, help="SiT's doubled output")
    add("--class-dropout", type=within(0, 1), default=0.1, help="how often a label gives way to the null class")
    add("--num-classes", type=at_least(1), help="default: the data's")
    add("--path", choices=["linear", "cosine"], default="linear", help="between data and noise")
    add("--demo-vae-steps", type=at_least(2), default=150, help="the training of the demo's VAE")
    run = parse_long_run(parser, argv, model="SiT-XL/2", demo_data="demo-vae")
    run.qk_norm = run.recipe == "released" if run.qk_norm is None else run.qk_norm
    if run.stage != "baseline" and run.class_dropout == 0:
        parser.error("a teacher needs the null class, which --class-dropout 0 takes away")
    return run


if __name__ == "__main__":
    options()  # --help and wrong options end here, before the imports below take their seconds

import torch
from common.demo import demo_latents, random_latents
from common.latents import open_latents
from common.long_runs import Backbone, settle, train_long
from common.sit import SiT, published_sizes
from common.trainer import Trainer

import selftrans_reg as st


def open_backbone(run: argparse.Namespace) -> Backbone:
    """The latents, and the model of their size; settles the options.

    Raises:
        Mistake: If the data has more classes than asked for.
    """
    if run.data == "demo":
        data = demo_latents(run.demo_data, vae_steps=run.demo_vae_steps)
    elif run.data in ("random", "random-512"):
        data = random_latents(32 if run.data == "random" else 64)
    else:
        data = open_latents(Path(run.data), num_classes=run.num_classes)
    run.num_classes = run.num_classes or data.num_classes
    if run.num_classes < data.num_classes:
        raise Mistake(f"--num-classes {run.num_classes} is too few: {run.data} has {data.num_classes}.")
    sizes = {
        **(DEMO_SIZE if run.model == "demo" else published_sizes(run.model)),
        "input_size": data.size,
        "in_channels": data.channels,
        "num_classes": run.num_classes,
        "class_dropout_prob": run.class_dropout,
        "learn_sigma": run.learn_sigma,
        "qk_norm": run.qk_norm,
    }
    new = partial(SiT, **sizes)
    settle_sit(run, new)
    return Backbone("SiT", "blocks", new, sizes, {"y": run.num_classes}, data)


def settle_sit(run: argparse.Namespace, new: partial[SiT]) -> None:
    """Put the recipe's values, the published ones or the demo's, where none were given."""
    demo = run.model == "demo"
    with torch.device("meta"):  # the demo takes the published rule for its depth
        plan = st.recipe(new() if demo else run.model, variant=run.recipe)
    weights = "model" if run.recipe == "released" else "ema"
    settle(run, plan, DEMO if demo else PUBLISHED, teacher_weights=weights)


def main(argv: Sequence[str] | None = None) -> Trainer:
    """Train up to the last step, from the newest checkpoint if there is one."""
    return train_long(options(argv), open_backbone, "sit_imagenet.py")


if __name__ == "__main__":
    run_script(main)
