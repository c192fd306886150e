"""The paper's text-to-image runs: a two-stream MMDiT on COCO's latents and CLIP features, in either stage or in none.

Run alone, by torchrun or by accelerate launch; the global batch stays what it is. The same command goes on where it was
stopped. `--data demo` takes captioned shapes that the script draws and a small model instead: both stages in minutes.

    python examples/mmdit_coco.py --stage 1 --data demo --out runs/t2i/stage1
    python examples/mmdit_coco.py --stage 2 --data demo --out runs/t2i/stage2 --teacher runs/t2i/stage1/teacher
"""
# ruff: noqa: E402

import argparse
from collections.abc import Sequence
from pathlib import Path

from common.options import Mistake, at_least, long_run_parser, parse_long_run, run_script, within

PUBLISHED = {
    "steps": 150_000, "batch_size": 256, "lr": 2e-4, "warmup_steps": 5_000, "ema_decay": 0.9999, "log_every": 100,
    "checkpoint_every": 10_000, "keep_every": 50_000, "sample_every": 10_000, "head_features": 2048,
}  # fmt: skip
DEMO = {
    "steps": 1600, "batch_size": 32, "lr": 2e-3, "warmup_steps": 100, "ema_decay": 0.99, "log_every": 50,
    "checkpoint_every": 400, "keep_every": 400, "sample_every": 400, "head_features": 256, "stop_step": 800,
}  # fmt: skip
SIZE = {"patch_size": 2, "hidden_size": 768, "depth": 24, "num_heads": 24}  # as published
DEMO_SIZE = {"patch_size": 2, "hidden_size": 96, "depth": 6, "num_heads": 3}  # 16 tokens of image and of text
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


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = long_run_parser(__doc__, "joint_blocks", PUBLISHED, DEMO)
    add = parser.add_argument_group("the model, its data, and the text of its pictures").add_argument
    add("--data", required=True, help="folder of features in U-ViT's layout (docs/text-to-image.md), or 'demo'")
    add("--model", choices=["MMDiT", "demo"], help="the published size, or a small one (default: as the data)")
    add("--moments", choices=["std", "logvar"], default="std", help="what is behind the mean in {i}.npy")
    add("--context-dropout", type=within(0, 1), default=0.1, help="how often a caption gives way to the empty prompt")
    add("--text-encoder", help="CLIP text model for --prompts: folder or hub name, as openai/clip-vit-large-patch14")
    add("--prompts", nargs="+", help="of the pictures of samples (default: eight of the data's kind)")
    add("--demo-images", type=at_least(32), default=2048, help="how many images the demo draws")
    add("--demo-vae-steps", type=at_least(2), default=600, help="the training of the demo's VAE")
    parser.set_defaults(betas=[0.9, 0.9], weight_decay=0.03, sample_cfg=2.0, path="linear")
    run = parse_long_run(parser, argv, model="MMDiT", demo_data="demo-captions")
    run.prompts = run.prompts or (DEMO_PROMPTS if run.data == "demo" else PROMPTS)
    if run.stage != "baseline" and run.context_dropout == 0:
        parser.error("a teacher needs to know the empty prompt, which --context-dropout 0 never shows it")
    if run.data != "demo" and (run.vae is None) != (run.text_encoder is None):
        parser.error("pictures of samples need --vae and --text-encoder: pass both, or none")
    return run


if __name__ == "__main__":
    options()  # --help and wrong options end here, before the imports below take their seconds

from dataclasses import replace
from functools import partial

from common.coco_features import CocoFeatures
from common.demo import TEXT_ENCODER, VAE, demo_captions
from common.long_runs import Backbone, settle, train_long
from common.mmdit import MMDiT
from common.samplers import Guidance, ImageSampler, matching_vae
from common.text import draw_prompts, encoded_prompts, load_text_encoder, numbers_of, same_features
from common.trainer import Draw, Trainer

import selftrans_reg as st


def open_backbone(run: argparse.Namespace) -> Backbone:
    """The features, which are made first for the demo, and the model of their size; settles the options."""
    settle_mmdit(run)
    folder = Path(run.demo_data or run.data)
    if run.data == "demo":
        demo_captions(folder, images=run.demo_images, vae_steps=run.demo_vae_steps)
        run.vae, run.text_encoder = run.vae or str(folder / VAE), run.text_encoder or str(folder / TEXT_ENCODER)
    data = CocoFeatures(folder, dropout=run.context_dropout, second=run.moments)
    run.context_length, width = data.empty.shape
    sizes = DEMO_SIZE if run.model == "demo" else SIZE
    sizes = {**sizes, "input_size": data.size, "in_channels": data.channels, "context_size": width}
    null, draw = {"context": data.empty}, None if run.text_encoder is None else new_picture(run, data)
    # Of what a joint block returns, (text, image), the image's tokens are watched.
    return Backbone("MMDiT", "joint_blocks", partial(MMDiT, **sizes), sizes, null, data, select=1, draw=draw)


def new_picture(run: argparse.Namespace, data: CocoFeatures) -> Draw:
    """What draws the pictures of samples, with a text encoder for the prompts and a VAE for the images.

    Raises:
        Mistake: If one of the two is not that of the data.
    """
    vae, _ = matching_vae(run.vae, data.scaling, data.channels, run.data)
    encoder = load_text_encoder(run.text_encoder)
    prompts = encoded_prompts(encoder, run.prompts, data.empty.shape, run.data)
    if not same_features(prompts.features[prompts.null], data.empty):
        raise Mistake(
            f"{encoder.name} is not the text encoder of {run.data}: the empty prompt has other features.\n"
            "Pass with --text-encoder the one that the captions were encoded with."
        )
    shape, guidance = (data.channels, data.size, data.size), Guidance(run.sample_cfg, prompts.null)
    sampler = ImageSampler(vae, data.scaling, shape, numbers_of, run.sample_steps, guidance, run.seed)
    return partial(draw_prompts, sampler, prompts)


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
