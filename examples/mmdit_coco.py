"""The paper's text-to-image runs: a two-stream MMDiT on COCO's latents and CLIP features, in either stage or in none.

Run alone, by torchrun or by accelerate launch; the global batch stays what it is. The same command goes on from the
last checkpoint. `--data demo` takes captioned shapes that it draws and a small model: both stages in minutes.

    python examples/mmdit_coco.py --stage 1 --data demo --out runs/t2i/stage1
    python examples/mmdit_coco.py --stage 2 --data demo --out runs/t2i/stage2 --teacher runs/t2i/stage1/teacher
"""
# ruff: noqa: E402

import argparse
from collections.abc import Sequence
from pathlib import Path

from common.options import at_least, long_run_parser, parse_long_run, run_script, within

PUBLISHED = {
    "steps": 150_000, "batch_size": 256, "lr": 2e-4, "warmup_steps": 5_000, "ema_decay": 0.9999, "log_every": 100,
    "checkpoint_every": 10_000, "keep_every": 50_000, "head_features": 2048,
}  # fmt: skip
DEMO = {
    "steps": 1600, "batch_size": 32, "lr": 2e-3, "warmup_steps": 100, "ema_decay": 0.99, "log_every": 50,
    "checkpoint_every": 400, "keep_every": 400, "head_features": 256, "stop_step": 800,
}  # fmt: skip
SIZE = {"patch_size": 2, "hidden_size": 768, "depth": 24, "num_heads": 24}  # as published
DEMO_SIZE = {"patch_size": 2, "hidden_size": 96, "depth": 6, "num_heads": 3}  # 16 tokens of image and of text


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = long_run_parser(__doc__, "joint_blocks", PUBLISHED, DEMO)
    add = parser.add_argument_group("the model and its data").add_argument
    add("--data", required=True, help="folder of features in U-ViT's layout (docs/text-to-image.md), or 'demo'")
    add("--model", choices=["MMDiT", "demo"], help="the published size, or a small one (default: as the data)")
    add("--moments", choices=["std", "logvar"], default="std", help="what is behind the mean in {i}.npy")
    add("--context-dropout", type=within(0, 1), default=0.1, help="how often a caption gives way to the empty prompt")
    add("--demo-images", type=at_least(32), default=2048, help="how many images the demo draws")
    add("--demo-vae-steps", type=at_least(2), default=600, help="the training of the demo's VAE")
    parser.set_defaults(betas=[0.9, 0.9], weight_decay=0.03, path="linear")
    run = parse_long_run(parser, argv, model="MMDiT", demo_data="demo-captions")
    if run.stage != "baseline" and run.context_dropout == 0:
        parser.error("a teacher needs to know the empty prompt, which --context-dropout 0 never shows it")
    return run


if __name__ == "__main__":
    options()  # --help and wrong options end here, before the imports below take their seconds

from dataclasses import replace
from functools import partial

from common.coco_features import CocoFeatures
from common.demo import TEXT_ENCODER, demo_captions
from common.long_runs import Backbone, settle, train_long
from common.mmdit import MMDiT
from common.trainer import Trainer

import selftrans_reg as st


def open_backbone(run: argparse.Namespace) -> Backbone:
    """The features, which are made first for the demo, and the model of their size; settles the options."""
    settle_mmdit(run)
    folder = Path(run.demo_data or run.data)
    if run.data == "demo":
        demo_captions(folder, images=run.demo_images, vae_steps=run.demo_vae_steps)
        run.text_encoder = str(folder / TEXT_ENCODER)
    data = CocoFeatures(folder, dropout=run.context_dropout, second=run.moments)
    run.context_length, width = data.empty.shape
    run.empty_prompt = data.empty[0, :32].tolist()  # by which another text encoder is told apart from the data's
    sizes = DEMO_SIZE if run.model == "demo" else SIZE
    sizes = {**sizes, "input_size": data.size, "in_channels": data.channels, "context_size": width}
    # Of what a joint block returns, (text, image), the image's tokens are watched.
    return Backbone("MMDiT", "joint_blocks", partial(MMDiT, **sizes), sizes, {"context": data.empty}, data, select=1)


def settle_mmdit(run: argparse.Namespace) -> None:
    """Put the recipe's values, the published ones or the demo's, where none were given.

    The recipe names layers of the published 24 blocks; the demo takes those at the same fractions of its depth.
    """
    plan, demo = st.recipe("MMDiT", variant=run.recipe), run.model == "demo"
    for name in ("stage1_layer", "student_layer", "teacher_layer") if demo else ():
        blocks, _, index = getattr(plan, name).rpartition(".")
        depth = max(1, (int(index) + 1) * DEMO_SIZE["depth"] // SIZE["depth"])
        plan = replace(plan, **{name: f"{blocks}.{depth - 1}"})
    settle(run, plan, DEMO if demo else PUBLISHED)  # the average teaches, in the released code too


def main(argv: Sequence[str] | None = None) -> Trainer:
    """Train up to the last step, from the newest checkpoint if there is one."""
    return train_long(options(argv), open_backbone, "mmdit_coco.py")


if __name__ == "__main__":
    run_script(main)
