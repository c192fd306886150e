"""The settings of `mmdit_coco.py`: its command line, and the published values of what is not given there."""

import argparse
from pathlib import Path
from typing import Any

import selftrans_reg as st
from common.mmdit import PUBLISHED_DEPTH, MMDiT
from common.options import at_least
from common.run_options import add_alignment_options, add_run_options, add_training_options, complete
from common.text import CLIP_VIT_L14
from selftrans_reg.errors import SettingError

_DEMO_SIZE = {
    "patch_size": 2,
    "hidden_size": 96,
    "depth": 6,
    "num_heads": 3,
}  # 16 tokens of image and of text

_PUBLISHED = {
    "steps": 150_000, "batch_size": 256, "lr": 2e-4, "warmup_steps": 5_000, "ema_decay": 0.9999, "log_every": 100,
    "checkpoint_every": 10_000, "keep_every": 50_000, "sample_every": 10_000, "head_features": 2048,
}  # fmt: skip
_DEMO = {
    "steps": 1600, "batch_size": 32, "lr": 2e-3, "warmup_steps": 100, "ema_decay": 0.99, "log_every": 50,
    "checkpoint_every": 400, "keep_every": 400, "sample_every": 400, "head_features": 256, "stop_step": 800,
}  # fmt: skip

PROMPTS = [
    "a cat asleep on a red sofa", "two people on bicycles in a city street", "a bowl of oranges on a wooden table",
    "a train beside a snowy mountain", "a giraffe under a tree", "a kite above a beach",
    "a kitchen with white cupboards", "a man on a surfboard in a wave",
]  # fmt: skip
DEMO_PROMPTS = [
    "a red circle on a blue ground", "a yellow square on a black ground", "a green triangle on a white ground",
    "a white cross on a red ground", "a blue ring on a yellow ground", "a black circle on a green ground",
    "white ground with a black triangle", "red ground with a yellow ring",
]  # fmt: skip


def options(argv: list[str] | None, description: str) -> argparse.Namespace:
    """Read the command line.

    Raises:
        SettingError: If it has what the stage would ignore, or what cannot be.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_options(parser)
    add = parser.add_argument
    add("--data", required=True, help="folder of features in U-ViT's layout (docs/text-to-image.md), or 'demo'")
    add("--model", choices=["MMDiT", "demo"], help="the published size, or a small one; default as the data")
    add("--moments", choices=["std", "logvar"], default="std", help="what is behind the mean in {i}.npy")
    add("--context-dropout", type=float, default=0.1, help="how often a caption gives way to the empty prompt")
    add_alignment_options(parser, "joint_blocks")
    add_training_options(parser)
    group = parser.add_argument_group("text, and the demo").add_argument
    group("--text-encoder", help=f"CLIP text model for the pictures' prompts: folder or hub name, as {CLIP_VIT_L14}")
    group("--prompts", nargs="+", help="of these pictures")
    group("--demo-data", type=Path, help="where the demo's images are kept; default demo-captions beside --out")
    group("--demo-images", type=at_least(32), default=2048)
    group("--demo-vae-steps", type=at_least(2), default=600)
    parser.set_defaults(betas=[0.9, 0.9], weight_decay=0.03, sample_cfg=2.0)
    run = parser.parse_args(argv)
    complete(run)
    demo = run.data == "demo"
    run.model = run.model or ("demo" if demo else "MMDiT")
    run.demo_data = str(run.demo_data or run.out.parent / "demo-captions") if demo else None
    run.prompts = run.prompts or (DEMO_PROMPTS if demo else PROMPTS)
    if run.stage != "baseline" and run.context_dropout == 0:
        raise SettingError("A teacher needs to know the empty prompt, which --context-dropout 0 never shows it.")
    if not demo and (run.vae is None) != (run.text_encoder is None):
        raise SettingError(
            "Pictures of samples need --vae and --text-encoder.\nFound: one of them. Pass both, or none."
        )
    return run


def new_mmdit(run: argparse.Namespace, *, channels: int, size: int, context_size: int) -> MMDiT:
    """The model of the settings, with initial weights from the global generator."""
    sizes = _DEMO_SIZE if run.model == "demo" else {}
    return MMDiT(input_size=size, in_channels=channels, context_size=context_size, **sizes)


def settle(run: argparse.Namespace) -> None:
    """Put a value where none was given: what the recipe says, or the published runs, or for the demo what suits it.

    The recipe names layers of the published 24 blocks; the demo takes those at the same fractions of its depth.
    """
    demo = run.model == "demo"
    plan = st.recipe("MMDiT", variant=run.recipe)
    depth = _DEMO_SIZE["depth"] if demo else PUBLISHED_DEPTH
    defaults: dict[str, Any] = {"stop_step": plan.stop_step} | (_DEMO if demo else _PUBLISHED)
    if not demo and run.stage == "vae":
        defaults["steps"] = plan.stage1_steps
    defaults |= {"weight": plan.weight, "window": plan.window or "all", "gating": plan.gating}
    if run.stage == "vae":
        # Stage 1 is short: its alignment goes on to its end.
        defaults |= {"layer": layer_at(plan.stage1_layer, depth), "target": plan.target, "stop_step": 0}
    else:
        defaults |= {"layer": layer_at(plan.student_layer, depth)}
    if run.stage == "baseline":
        defaults = {name: value for name, value in defaults.items() if name in _PUBLISHED and name != "head_features"}
    # What a saved teacher is, it says itself.
    if run.stage == "vae" or (run.stage == "self" and Path(run.teacher).is_file()):
        defaults |= {
            "teacher_layer": layer_at(plan.teacher_layer, depth),
            "guidance_scale": plan.guidance_scale,
            "teacher_weights": "ema",  # in the released code too
        }
    for name, value in defaults.items():
        if getattr(run, name) is None:
            setattr(run, name, value)


def layer_at(layer: str, depth: int) -> str:
    """The layer at the same fraction of another depth than the published one."""
    blocks, _, index = layer.rpartition(".")
    return f"{blocks}.{max(1, (int(index) + 1) * depth // PUBLISHED_DEPTH) - 1}"
