"""The settings of `sit_imagenet.py`: its command line, and the published values of what is not given there."""

import argparse
from pathlib import Path
from typing import Any

import torch

import selftrans_reg as st
from common.options import at_least, within
from common.paths import PATHS
from common.run_options import add_alignment_options, add_run_options, add_training_options, complete
from common.sit import PATCH_SIZES, SIZES, SiT, build_sit
from selftrans_reg.errors import SettingError

_DEMO_SIZE = {"patch_size": 1, "hidden_size": 96, "depth": 6, "num_heads": 3}  # 64 tokens on the demo's latents

_PUBLISHED = {
    "steps": 400_000, "batch_size": 256, "lr": 1e-4, "warmup_steps": 0, "ema_decay": 0.9999, "log_every": 100,
    "checkpoint_every": 10_000, "keep_every": 50_000, "sample_every": 10_000,
}  # fmt: skip
_DEMO = {
    "steps": 700, "batch_size": 16, "lr": 3e-3, "warmup_steps": 50, "ema_decay": 0.99, "log_every": 50,
    "checkpoint_every": 100, "keep_every": 350, "sample_every": 350,
}  # fmt: skip


def options(argv: list[str] | None, description: str) -> argparse.Namespace:
    """Read the command line.

    Raises:
        SettingError: If it has what the stage would ignore, or what cannot be.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_options(parser)
    add = parser.add_argument
    add("--data", required=True, help="folder of latents (docs/data.md), 'demo', or 'random' to measure speed")
    names = [f"SiT-{size}/{patch}" for size in SIZES for patch in PATCH_SIZES]
    add("--model", choices=["demo", *names], metavar="SiT-{S,B,L,XL}/{2,4,8}|demo", help="default SiT-XL/2, or demo")
    add("--resolution", type=int, choices=[256, 512], help="of the images; the data has to be of it")
    group = parser.add_argument_group("the model").add_argument
    group("--qk-norm", action=argparse.BooleanOptionalAction, help="default off; on with --recipe released")
    group("--learn-sigma", action=argparse.BooleanOptionalAction, default=False, help="SiT's doubled output")
    group("--class-dropout", type=within(0, 1), default=0.1)
    group("--num-classes", type=at_least(1), help="default: the data's")
    group("--path", choices=list(PATHS), default="linear")
    add_alignment_options(parser, "blocks")
    add_training_options(parser)
    group = parser.add_argument_group("bad files, and the demo").add_argument
    group("--skip-bad", action="store_true", help="leave out files that cannot be used; they are listed")
    group("--demo-vae", type=Path, help="where the demo's is kept; default demo-vae beside --out")
    group("--demo-vae-steps", type=at_least(2), default=150)
    run = parser.parse_args(argv)
    complete(run)
    demo = run.data == "demo"
    run.model = run.model or ("demo" if demo else "SiT-XL/2")
    run.demo_vae = str(run.demo_vae or run.out.parent / "demo-vae") if demo else None
    if run.stage != "baseline" and run.class_dropout == 0:
        raise SettingError("A teacher needs the null class, which --class-dropout 0 takes away.")
    return run


def new_sit(run: argparse.Namespace, *, channels: int, size: int) -> SiT:
    """The model of the settings, with initial weights from the global generator."""
    settings = {
        "input_size": size,
        "in_channels": channels,
        "num_classes": run.num_classes,
        "class_dropout_prob": run.class_dropout,
        "learn_sigma": run.learn_sigma,
        "qk_norm": run.qk_norm,
    }
    return SiT(**_DEMO_SIZE, **settings) if run.model == "demo" else build_sit(run.model, **settings)


def settle(run: argparse.Namespace, *, num_classes: int, channels: int, size: int) -> None:
    """Put a value where none was given: what the recipe says, or the published runs, or for the demo what suits it.

    Args:
        run: From `options`.
        num_classes: Of the data.
        channels: Of its latents.
        size: Side of its latents.

    Raises:
        SettingError: If the data has more classes than asked for.
    """
    demo = run.model == "demo"
    run.num_classes = run.num_classes or num_classes
    if run.num_classes < num_classes:
        raise SettingError(f"--num-classes {run.num_classes} is too few: {run.data} has {num_classes}.")
    run.qk_norm = run.recipe == "released" if run.qk_norm is None else run.qk_norm
    with torch.device("meta"):  # the demo takes the published rule for its depth
        plan = st.recipe(new_sit(run, channels=channels, size=size) if demo else run.model, variant=run.recipe)
    defaults: dict[str, Any] = dict(_DEMO if demo else _PUBLISHED)
    if run.stage == "vae":
        # Stage 1 is short: its alignment goes on to its end.
        aligned = {"layer": plan.stage1_layer, "target": plan.target, "stop_step": 0}
        defaults |= {} if demo else {"steps": plan.stage1_steps}
    else:
        aligned = {"layer": plan.student_layer, "stop_step": 350 if demo else plan.stop_step}
    aligned |= {"weight": plan.weight, "window": plan.window or "all", "gating": plan.gating}
    aligned |= {"head_features": 256 if demo else 2048}
    teaching = {
        "teacher_layer": plan.teacher_layer,
        "guidance_scale": 3.0 if demo else plan.guidance_scale,
        "teacher_weights": "model" if run.recipe == "released" else "ema",
    }
    if run.stage != "baseline":
        defaults |= aligned
    # What a saved teacher is, it says itself.
    if run.stage == "vae" or (run.stage == "self" and Path(run.teacher).is_file()):
        defaults |= teaching
    for name, value in defaults.items():
        if getattr(run, name) is None:
            setattr(run, name, value)
