"""The stages around any backbone: the criterion of each, the teacher that one leaves for the other, the latents."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import selftrans_reg as st
from common.checkpointing import checkpoint_path
from common.scaling import Scaling
from common.trainer import Condition, Trainer
from selftrans_reg.artefacts import CONFIG
from selftrans_reg.checkpoints import load_weights
from selftrans_reg.errors import SettingError


class Backbone(NamedTuple):
    """What the stages need to know of the model and its data.

    Attributes:
        new: Makes another model of this run, with any weights.
        null: The null condition by argument name.
        time: The time convention.
        shape: Of a latent, (C, h, w).
        scaling: From a VAE's latents to the model's.
        patch_size: Latent pixels per token side.
        select: Which part of a block's output is the image's tokens.
    """

    new: Callable[[], nn.Module]
    null: dict[str, Any]
    time: str
    shape: tuple[int, int, int]
    scaling: Scaling
    patch_size: int
    select: int | None = None


def latents_of(batch: tuple[Tensor, Tensor, Condition], scaling: Scaling) -> tuple[Tensor, Condition]:
    """Latents drawn from their posteriors (mean, std), as the model sees them, and what they are conditioned on."""
    mean, std, condition = batch
    return scaling.drawn(mean, std, torch.randn_like(mean)), condition


def start_from(checkpoint: str, model: nn.Module, say: Callable[[str], None]) -> None:
    """Load the averaged weights of a checkpoint into a new model, and say what was taken and what left out."""
    found = load_weights(model, checkpoint)
    left_out = f"; {len(found.left_out)} weights of projection heads are left out" if found.left_out else ""
    say(f"Starting from the {found.entry or 'only'} weights in {checkpoint}{left_out}.")


def new_criterion(run: argparse.Namespace, model: nn.Module, backbone: Backbone) -> st.SelfTransLoss | None:
    """What the stage of a run adds to the loss."""
    if run.stage == "baseline":
        return None
    settings = {
        "layer": run.layer,
        "select": backbone.select,
        "time": backbone.time,
        "weight": run.weight,
        "window": None if run.window == "all" else run.window,
        "gating": run.gating,
        "stop_step": run.stop_step or None,
        "hidden_features": run.head_features,
        "health_interval": run.log_every * run.micro_batches,
    }
    if run.stage == "vae":
        channels, _, _ = backbone.shape
        return st.SelfTransLoss.stage1(
            model, latent_channels=channels, patch_size=backbone.patch_size, target=run.target, **settings
        )
    teacher = read_teacher(run, backbone)
    return st.SelfTransLoss.stage2(model, teacher=teacher, teacher_chunk=run.teacher_chunk, **settings)


def read_teacher(run: argparse.Namespace, backbone: Backbone) -> st.CFGFeatureTeacher:
    """The teacher of stage 2: a saved one, as it is or at another layer or scale, or a stage-1 checkpoint.

    Raises:
        SettingError: If it was trained on other latents or another null condition.
    """
    if Path(run.teacher).is_file():
        return _built_teacher(run, backbone, Path(run.teacher), weights=run.teacher_weights, compile=run.compile)
    if run.teacher_weights is not None:
        raise SettingError(f"--teacher-weights is for a checkpoint; the teacher {run.teacher} was saved with one kind.")
    teacher = st.CFGFeatureTeacher.from_pretrained(run.teacher, model=backbone.new, compile=run.compile)
    scale = teacher.provenance.get("latent_scale")
    if scale is not None and not Scaling(scale).equals(backbone.scaling):
        raise SettingError(
            f"The teacher {run.teacher} was trained on latents times {scale}, which are not those of {run.data}.\n"
            f"Found: {backbone.scaling}. Train both stages on the same latents."
        )
    if not _same_null(teacher.null, backbone.null):
        raise SettingError(
            f"The teacher {run.teacher} was trained with another null condition than {run.data} has.\n"
            f"Found: another {', '.join(backbone.null)}. Train both stages on the same data."
        )
    asked = {"layer": run.teacher_layer, "guidance_scale": run.guidance_scale}
    asked = {name: value for name, value in asked.items() if value is not None}
    if not asked:
        return teacher
    saved = {"layer": teacher.layer, "guidance_scale": teacher.guidance_scale, "select": teacher.select}
    return st.build_teacher(
        teacher.model, None, **(saved | asked), null=teacher.null, time=teacher.time, compile=run.compile
    )


def leave_teacher(run: argparse.Namespace, backbone: Backbone, trainer: Trainer, source: str) -> Path:
    """Save the teacher that a finished stage-1 run has trained, if that was not done before.

    Args:
        run: The settings.
        backbone: Of the run.
        trainer: At its last step.
        source: Where the teacher comes from, for those with whom it is shared.
    """
    folder = run.out / "teacher"
    if not (folder / CONFIG).exists():
        model = trainer.ema if run.teacher_weights == "ema" else trainer.accelerator.unwrap_model(trainer.model)
        _built_teacher(run, backbone, model.state_dict()).save_pretrained(
            folder, source=source, step=trainer.steps, latent_scale=backbone.scaling.factor, latent_shape=backbone.shape
        )
    return folder


def check_teacher_stays(run: argparse.Namespace, trainer: Trainer) -> None:
    """Refuse to train a run on that has left its teacher, on which runs of stage 2 may rest.

    Raises:
        SettingError: If that is asked for.
    """
    if run.stage == "vae" and trainer.steps < run.steps and (run.out / "teacher" / CONFIG).exists():
        raise SettingError(
            f"{run.out} has left its teacher, on which runs of stage self may rest; more steps would make another.\n"
            f"Found: {trainer.steps} steps done, {run.steps} asked for.\n"
            f"Name another --out, with --resume {checkpoint_path(trainer.checkpoints, trainer.steps)}."
        )


def _built_teacher(
    run: argparse.Namespace, backbone: Backbone, checkpoint: Path | dict[str, Tensor], **settings: Any
) -> st.CFGFeatureTeacher:
    return st.build_teacher(
        backbone.new(),
        checkpoint,
        layer=run.teacher_layer,
        guidance_scale=run.guidance_scale,
        null=backbone.null,
        select=backbone.select,
        time=backbone.time,
        **settings,
    )


def _same_null(there: dict[str, Any], here: dict[str, Any]) -> bool:
    """Whether two null conditions are one; features encoded twice differ by what kernels round."""
    return there.keys() == here.keys() and all(
        value.shape == here[name].shape and torch.allclose(value.cpu().float(), here[name], rtol=0.05, atol=0.05)
        if isinstance(value, Tensor)
        else value == here[name]
        for name, value in there.items()
    )
