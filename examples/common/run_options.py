"""Command-line options that the long runs share, whatever their model: stages, alignment, training, logs."""

import argparse
from pathlib import Path

import torch

from common.options import at_least, positive, within
from selftrans_reg.errors import SettingError

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


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Which run, where, and from what."""
    add = parser.add_argument
    add("--stage", choices=list(_STAGES), required=True, help="as is, stage 1, or stage 2")
    add("--out", type=Path, required=True, help="folder of the run")
    add("--recipe", choices=["paper", "released"], default="paper", help="released: what the authors' code computes")
    add("--teacher", help="stage self: the folder that a vae run left, a name on the hub, or a checkpoint")
    add("--init", help="checkpoint whose weights the run starts from")
    add("--resume", default="auto", help="auto, never, or the path of a checkpoint (default auto)")


def add_alignment_options(parser: argparse.ArgumentParser, blocks: str) -> None:
    """What the stage adds to the loss; ``blocks`` is what the model calls its list of blocks."""
    group = parser.add_argument_group("the alignment (default: the recipe's)").add_argument
    group("--layer", help=f"that is aligned, as {blocks}.5")
    group("--teacher-layer", help=f"of the stage-1 model, as {blocks}.7")
    group("--guidance-scale", type=float, help="of the teacher's features")
    group("--teacher-weights", choices=["ema", "model"], help="of the stage-1 checkpoint")
    group("--teacher-chunk", type=at_least(1), help="largest batch of the teacher, to save memory")
    group("--window", type=window, help="noise fractions, as 0.4,0.7, or all")
    group("--weight", type=float)
    group("--target", choices=["latents", "velocity"], help="of stage vae")
    group("--gating", choices=["per-sample", "released"])
    group("--stop-step", type=at_least(0), help="step from which training goes on without; 0 for never")
    group("--head-features", type=at_least(1), help="inner width of the projection head")


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """How the model is trained, logged and saved, and pictures of samples on the way."""
    group = parser.add_argument_group("training").add_argument
    group("--steps", type=at_least(1), help="in all; more steps go on with a run")
    group("--batch-size", type=at_least(1), help="over all processes and micro-batches, default 256")
    group("--micro-batches", type=at_least(1), default=1, help="parts of a process's batch, to save memory")
    group("--lr", type=within(0, 1))
    group("--betas", type=within(0, 1), nargs=2, default=[0.9, 0.999])
    group("--weight-decay", type=within(0, 1), default=0.0)
    group("--warmup-steps", type=at_least(0))
    group("--clip", type=positive, default=1.0, help="largest norm of the gradient; inf for any")
    group("--ema-decay", type=within(0, 1))
    group("--precision", choices=["fp16", "bf16", "no"], help="default fp16, as published; no on a CPU")
    group("--tf32", action=argparse.BooleanOptionalAction, default=True, help="for what is float32 on a GPU")
    group("--compile", action="store_true", help="compile the blocks of model and teacher")
    group("--seed", type=at_least(0), default=0)
    group("--cpu", action="store_true", help="even where there is a GPU")

    group = parser.add_argument_group("data, logs, checkpoints, pictures").add_argument
    group("--workers", type=at_least(0), help="processes that read data, for each GPU; default 4, or 0 for the demo")
    group("--log-every", type=at_least(1), help="steps")
    group("--checkpoint-every", type=at_least(1), help="steps")
    group("--keep", type=at_least(1), default=3, help="newest checkpoints that stay")
    group("--keep-every", type=at_least(1), help="checkpoints at multiples of these steps stay too")
    group("--sample-every", type=at_least(1), help="steps between pictures of samples, which need --vae")
    group("--sample-steps", type=at_least(1), default=25, help="of the sampler in these pictures")
    group("--sample-cfg", type=float, default=1.0, help="its classifier-free guidance")
    group("--vae", help="AutoencoderKL that decodes them: folder or hub name, as stabilityai/sd-vae-ft-ema")


def complete(run: argparse.Namespace) -> None:
    """Fill in what depends on the machine and on whether this is the demo, and check the options of the stage.

    Raises:
        SettingError: If there is something that the stage would ignore, or lacks.
    """
    run.workers = (0 if run.data == "demo" else 4) if run.workers is None else run.workers
    run.precision = run.precision or ("fp16" if torch.cuda.is_available() and not run.cpu else "no")
    foreign = sorted({name for names in _STAGES.values() for name in names} - {*_STAGES[run.stage]})
    given = [f"--{name.replace('_', '-')}" for name in foreign if getattr(run, name) is not None]
    if given:
        raise SettingError(f"Stage {run.stage} has no use for {', '.join(given)}.\nLeave that out.")
    if run.stage == "self" and run.teacher is None:
        raise SettingError(
            "Stage self needs --teacher: the teacher/ folder that a run of --stage vae left, its name on the hub, or a "
            "checkpoint of such a run."
        )
