"""The settings of `sit_imagenet.py`: its command line, and the published values of what is not given there."""

import argparse
from pathlib import Path
from typing import Any

import torch

import selftrans_reg as st
from common.options import at_least
from common.paths import PATHS
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

# What only some stages have; None unless given.
_ALIGNED = ("layer", "head_features", "weight", "window", "gating", "stop_step")
_TEACHING = ("teacher_layer", "guidance_scale", "teacher_weights")
_STAGES = {
    "baseline": (),
    "vae": (*_ALIGNED, *_TEACHING, "target"),
    "self": (*_ALIGNED, *_TEACHING, "teacher", "teacher_chunk"),
}

# What a run may change when it goes on; all else belongs to its folder.
CHANGEABLE = (
    "out", "resume", "cpu", "steps", "micro_batches", "precision", "tf32", "compile", "workers", "teacher_chunk",
    "log_every", "checkpoint_every", "keep", "keep_every", "sample_every", "sample_steps", "sample_cfg", "vae",
)  # fmt: skip


def window(text: str) -> tuple[float, float] | str:
    """An argparse type: two noise fractions with a comma between, or "all"."""
    if text == "all":
        return text
    low, high = text.split(",")
    return float(low), float(high)


def options(argv: list[str] | None, description: str) -> argparse.Namespace:
    """Read the command line.

    Raises:
        SettingError: If it has what the stage would ignore, or what cannot be.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--stage", choices=list(_STAGES), required=True, help="as is, stage 1, or stage 2")
    add("--out", type=Path, required=True, help="folder of the run")
    add("--data", required=True, help="folder of latents (docs/data.md), 'demo', or 'random' to measure speed")
    names = [f"SiT-{size}/{patch}" for size in SIZES for patch in PATCH_SIZES]
    add("--model", choices=["demo", *names], metavar="SiT-{S,B,L,XL}/{2,4,8}|demo", help="default SiT-XL/2, or demo")
    add("--resolution", type=int, choices=[256, 512], help="of the images; the data has to be of it")
    add("--recipe", choices=["paper", "released"], default="paper", help="released: what the authors' code computes")
    add("--teacher", help="stage self: the folder that a vae run left, a name on the hub, or a checkpoint")
    add("--init", help="checkpoint whose weights the run starts from")
    add("--resume", default="auto", help="auto, never, or the path of a checkpoint (default auto)")

    group = parser.add_argument_group("the model").add_argument
    group("--qk-norm", action=argparse.BooleanOptionalAction, help="default off; on with --recipe released")
    group("--learn-sigma", action=argparse.BooleanOptionalAction, default=False, help="SiT's doubled output")
    group("--class-dropout", type=float, default=0.1)
    group("--num-classes", type=at_least(1), help="default: the data's")
    group("--path", choices=list(PATHS), default="linear")

    group = parser.add_argument_group("the alignment (default: the recipe's)").add_argument
    group("--layer", help="that is aligned, as blocks.5")
    group("--teacher-layer", help="of the stage-1 model, as blocks.7")
    group("--guidance-scale", type=float, help="of the teacher's features")
    group("--teacher-weights", choices=["ema", "model"], help="of the stage-1 checkpoint")
    group("--teacher-chunk", type=at_least(1), help="largest batch of the teacher, to save memory")
    group("--window", type=window, help="noise fractions, as 0.4,0.7, or all")
    group("--weight", type=float)
    group("--target", choices=["latents", "velocity"], help="of stage vae")
    group("--gating", choices=["per-sample", "released"])
    group("--stop-step", type=at_least(0), help="step from which training goes on without; 0 for never")
    group("--head-features", type=at_least(1), help="inner width of the projection head")

    group = parser.add_argument_group("training").add_argument
    group("--steps", type=at_least(1), help="default 400,000, in stage vae 200,000; more steps go on with a run")
    group("--batch-size", type=at_least(1), help="over all processes and micro-batches, default 256")
    group("--micro-batches", type=at_least(1), default=1, help="parts of a process's batch, to save memory")
    group("--lr", type=float)
    group("--betas", type=float, nargs=2, default=[0.9, 0.999])
    group("--weight-decay", type=float, default=0.0)
    group("--warmup-steps", type=at_least(0))
    group("--clip", type=float, default=1.0)
    group("--ema-decay", type=float)
    group("--precision", choices=["fp16", "bf16", "no"], help="default fp16, as published; no on a CPU")
    group("--tf32", action=argparse.BooleanOptionalAction, default=True, help="for what is float32 on a GPU")
    group("--compile", action="store_true", help="compile the blocks of model and teacher")
    group("--seed", type=at_least(0), default=0)
    group("--cpu", action="store_true", help="even where there is a GPU")

    group = parser.add_argument_group("data, logs, checkpoints, pictures").add_argument
    group("--workers", type=at_least(0), help="processes that read data, for each GPU; default 4, or 0 for the demo")
    group("--skip-bad", action="store_true", help="leave out files that cannot be used; they are listed")
    group("--log-every", type=at_least(1), help="steps")
    group("--checkpoint-every", type=at_least(1), help="steps")
    group("--keep", type=at_least(1), default=3, help="newest checkpoints that stay")
    group("--keep-every", type=at_least(1), help="checkpoints at multiples of these steps stay too")
    group("--sample-every", type=at_least(1), help="steps between pictures of samples, which need --vae")
    group("--sample-steps", type=at_least(1), default=25, help="of the sampler in these pictures")
    group("--sample-cfg", type=float, default=1.0, help="its classifier-free guidance")
    group("--vae", help="AutoencoderKL that decodes them: folder or hub name, as stabilityai/sd-vae-ft-ema")
    group("--demo-vae", type=Path, help="where the demo's is kept; default demo-vae beside --out")
    group("--demo-vae-steps", type=at_least(2), default=150)
    run = parser.parse_args(argv)
    demo = run.data == "demo"
    run.model = run.model or ("demo" if demo else "SiT-XL/2")
    run.workers = (0 if demo else 4) if run.workers is None else run.workers
    run.precision = run.precision or ("fp16" if torch.cuda.is_available() and not run.cpu else "no")
    run.demo_vae = str(run.demo_vae or run.out.parent / "demo-vae") if demo else None
    _check(run)
    return run


def _check(run: argparse.Namespace) -> None:
    foreign = sorted({name for names in _STAGES.values() for name in names} - {*_STAGES[run.stage]})
    given = [f"--{name.replace('_', '-')}" for name in foreign if getattr(run, name) is not None]
    if given:
        raise SettingError(f"Stage {run.stage} has no use for {', '.join(given)}.\nLeave that out.")
    if run.stage == "self" and run.teacher is None:
        raise SettingError(
            "Stage self needs --teacher: the teacher/ folder that a run of --stage vae left, its name on the hub, or a "
            "checkpoint of such a run."
        )
    if run.stage != "baseline" and run.class_dropout == 0:
        raise SettingError("A teacher needs the null class, which --class-dropout 0 takes away.")


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
