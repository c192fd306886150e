"""What the long runs do around any backbone: settings, criterion, teacher, training, and the teacher that is left."""

import argparse
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from torch import Tensor, nn
from torch.utils.data import Dataset

import selftrans_reg as st
from common.loading import Family, check_claims, saved_args
from common.options import CHANGEABLE, STAGES, Mistake
from common.paths import PATHS, denoising_loss
from common.run_folder import checkpoint_path, locked, open_run_folder
from common.text import same_features
from common.trainer import Trainer
from common.vae import recorded_scaling

TIMES = {"linear": "repa", "cosine": "repa-cosine"}  # t = 1 is noise


class Backbone(NamedTuple):
    """What a run needs to know of its model and data."""

    family: Family
    blocks: str  # what the model calls its list of blocks
    new: Callable[[], nn.Module]  # makes another model of this run, with any weights
    sizes: dict[str, Any]  # the model's arguments: what a checkpoint's readers need to build it
    null: dict[str, Any]  # the null condition by argument name
    data: Dataset[Any]  # items (mean, std, condition) of unscaled latents; what these are: channels, size, scaling, vae
    select: int | None = None  # which part of a block's output is the image's tokens


def new_accelerator(
    precision: str, *, micro_batches: int, cpu: bool, out: Path, trackers: Sequence[str] = ()
) -> Accelerator:
    """The processes that were launched, as accelerate sees them, and the trackers that the run in ``out`` logs to."""
    accelerator = Accelerator(
        mixed_precision=precision,
        gradient_accumulation_steps=micro_batches,
        cpu=cpu or not torch.accelerator.is_available(),  # or accelerate would take every process for itself
        log_with=list(trackers) or None,
        project_config=ProjectConfiguration(str(out), logging_dir=str(out / "trackers")),
    )
    if len(accelerator.log_with) < len(trackers):  # accelerate leaves out what is not installed, and says nothing
        raise Mistake(f"--log-with {' '.join(trackers)}: not all of these are installed.")
    return accelerator


def settle(run: argparse.Namespace, plan: st.Recipe, values: dict[str, Any], *, teacher_weights: str = "ema") -> None:
    """Put a value where none was given: the model's recipe's, or the published runs' or the demo's ``values``."""
    aligned = {"weight": plan.weight, "window": plan.window or "all", "gating": plan.gating}
    if run.stage == "1":  # which is short: its alignment goes on to its end
        aligned |= {"layer": plan.stage1_layer, "target": plan.target}
        values = {**values, "stop_step": 0, **({"steps": plan.stage1_steps} if run.model != "demo" else {})}
    else:
        aligned |= {"layer": plan.student_layer, "stop_step": plan.stop_step}
    if run.stage == "1" or (run.stage == "2" and Path(run.teacher).is_file()):  # a saved teacher says what it is
        aligned |= {"teacher_layer": plan.teacher_layer, "guidance_scale": plan.guidance_scale}
        aligned |= {"teacher_weights": teacher_weights}
    if run.stage == "baseline":
        aligned, values = {}, {name: value for name, value in values.items() if name not in STAGES["1"]}
    for name, value in (aligned | values).items():
        if getattr(run, name) is None:
            setattr(run, name, value)


def train_long(
    run: argparse.Namespace, open_backbone: Callable[[argparse.Namespace], Backbone], script: str
) -> Trainer:
    """Train up to the last step, from the newest checkpoint if there is one; ``script`` names a teacher's origin.

    ``open_backbone`` opens the data, making it first for the demo, and settles the options.
    """
    accelerator = new_accelerator(
        run.precision or ("fp16" if torch.cuda.is_available() and not run.cpu else "no"),
        micro_batches=run.micro_batches, cpu=run.cpu, out=run.out, trackers=run.log_with,
    )  # fmt: skip
    run.precision = accelerator.mixed_precision
    if accelerator.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, for what autocast leaves in float32
    with accelerator.main_process_first():  # what it makes the others find
        backbone = open_backbone(run)
    data, scaling = backbone.data, backbone.data.scaling
    check = partial(
        check_claims, family=backbone.family, time="repa", path=run.path, scaling=scaling,
        settings=backbone.sizes, option="--file-time",
    )  # fmt: skip
    torch.manual_seed(run.seed)
    model = backbone.new()
    if run.init is not None:
        content = st.read_checkpoint(run.init)
        check(run.init, saved_args(content, run.init), said_time=run.file_time)
        found = st.load_weights(model, content)
        accelerator.print(f"Starting from the {found.entry or 'only'} weights in {run.init}.")
    criterion = new_criterion(run, model, backbone, check)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(run).items()}
    says = {"family": backbone.family, "time": "repa", "prediction": "velocity", "vae": data.vae}
    trainer = Trainer(
        accelerator, model, criterion=criterion, dataset=data, settings=run, out=run.out,
        # Latents drawn from their posteriors (mean, std), and what they are conditioned on.
        latents_of=lambda batch: (scaling.drawn(*batch[:2], torch.randn_like(batch[0])), batch[2]),
        denoise=partial(denoising_loss, path=PATHS[run.path]),
        args=settings | backbone.sizes | says | {"scale_factor": scaling.scale, "shift_factor": scaling.shift},
    )  # fmt: skip
    if run.compile:
        for block in model.get_submodule(backbone.blocks):
            block.compile()
    accelerator.print(
        f"Stage {run.stage}: {run.model}, {sum(parameter.numel() for parameter in model.parameters()):,} parameters, "
        f"on {len(data):,} latents of {run.data}; {run.steps:,} steps of {run.batch_size} on "
        f"{accelerator.num_processes} x {accelerator.device.type}, precision {run.precision}. Beside it: {criterion}"
    )
    with accelerator.main_process_first():
        open_run_folder(run.out, {name: settings[name] for name in settings if name not in CHANGEABLE})
    with locked(run.out) if accelerator.is_main_process else nullcontext():
        trainer.resume(run.resume, check)
        teacher = run.out / "teacher"
        left = (teacher / "config.json").exists()
        if left and trainer.steps < run.steps:
            raise Mistake(
                f"{run.out} has left its teacher after {trainer.steps} steps, on which runs of stage 2 may rest.\n"
                f"For more, name another --out, with --resume {checkpoint_path(trainer.checkpoints, trainer.steps)}."
            )
        trainer.run()
        if run.stage == "1" and accelerator.is_main_process:
            if not left:
                weights = (trainer.ema if run.teacher_weights == "ema" else model).state_dict()
                built_teacher(run, backbone, weights).save_pretrained(
                    teacher, source=f"examples/{script} --stage 1 --model {run.model}, {run.teacher_weights} weights",
                    step=trainer.steps, latent_scale=scaling.scale, latent_shift=scaling.shift,
                    latent_shape=(data.channels, data.size, data.size),
                )  # fmt: skip
            print(f"The teacher for --stage 2: {teacher}")
    accelerator.end_training()
    return trainer


def new_criterion(
    run: argparse.Namespace, model: nn.Module, backbone: Backbone, check: Callable[..., object]
) -> st.SelfTransLoss | None:
    """What the stage of a run adds to the loss; ``check`` is `check_claims`, for a checkpoint that teaches."""
    if run.stage == "baseline":
        return None
    settings = {
        "layer": run.layer,
        "select": backbone.select,
        "time": TIMES[run.path],
        "weight": run.weight,
        "window": None if run.window == "all" else run.window,
        "gating": run.gating,
        "stop_step": run.stop_step or None,
        "hidden_features": run.head_features,
        "health_interval": run.log_every * run.micro_batches,
    }
    if run.stage == "1":
        sizes = {"latent_channels": backbone.data.channels, "patch_size": backbone.sizes["patch_size"]}
        return st.SelfTransLoss.stage1(model, target=run.target, **sizes, **settings)
    teacher = read_teacher(run, backbone, check)
    return st.SelfTransLoss.stage2(model, teacher=teacher, teacher_chunk=run.teacher_chunk, **settings)


def read_teacher(run: argparse.Namespace, backbone: Backbone, check: Callable[..., object]) -> st.CFGFeatureTeacher:
    """The teacher of stage 2: a saved one, as it is or at another layer or scale, or a stage-1 checkpoint.

    Raises:
        Mistake: If it was trained on other latents or another null condition, or with other conventions.
    """
    if Path(run.teacher).is_file():
        content = st.read_checkpoint(run.teacher)
        args = saved_args(content, run.teacher)
        check(run.teacher, args, said_time=run.file_time)
        if 0 in (args.get("context_dropout"), args.get("class_dropout_prob"), args.get("cfg_prob")):
            raise Mistake(f"{run.teacher} was trained without dropping its condition: it knows no null condition.")
        return built_teacher(run, backbone, content, weights=run.teacher_weights, compile=run.compile)
    if run.teacher_weights is not None:
        raise Mistake(f"--teacher-weights is for a checkpoint; the teacher {run.teacher} was saved with one kind.")
    teacher = st.CFGFeatureTeacher.from_pretrained(run.teacher, model=backbone.new, compile=run.compile)
    scaling, other = recorded_scaling(teacher.provenance, run.teacher, "latent_scale", "latent_shift"), []
    if scaling is not None and not scaling.equals(backbone.data.scaling):
        other.append(f"its latents have {scaling}, and here {backbone.data.scaling}")
    if not same_null(teacher.null, backbone.null):
        other.append(f"another null condition, {', '.join(backbone.null)}")
    if other:
        raise Mistake(
            f"The teacher {run.teacher} was trained on other data than {run.data}.\nFound: {'; '.join(other)}.\n"
            "Train both stages on the same data."
        )
    if run.teacher_layer is run.guidance_scale is None:
        return teacher
    scale = teacher.guidance_scale if run.guidance_scale is None else run.guidance_scale
    return st.build_teacher(
        teacher.model, None, layer=run.teacher_layer or teacher.layer, guidance_scale=scale, null=teacher.null,
        select=teacher.select, time=teacher.time, compile=run.compile,
    )  # fmt: skip


def built_teacher(
    run: argparse.Namespace, backbone: Backbone, checkpoint: Any, **settings: Any
) -> st.CFGFeatureTeacher:
    """The teacher that a checkpoint makes, at the layer and scale that were asked for."""
    return st.build_teacher(
        backbone.new(), checkpoint, layer=run.teacher_layer, guidance_scale=run.guidance_scale, null=backbone.null,
        select=backbone.select, time=TIMES[run.path], **settings,
    )  # fmt: skip


def same_null(there: dict[str, Any], here: dict[str, Any]) -> bool:
    """Whether two null conditions are one."""
    return there.keys() == here.keys() and all(
        same_features(value.cpu().float(), here[name]) if isinstance(value, Tensor) else value == here[name]
        for name, value in there.items()
    )
