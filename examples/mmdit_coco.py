"""The paper's text-to-image runs: a two-stream MMDiT on COCO's latents and CLIP features, in either stage or in none.

Run alone, by torchrun or by accelerate launch; the global batch stays what it is. The same command goes on where it was
stopped. `--data demo` takes captioned shapes that the script draws and a small model instead: both stages in minutes.

    python examples/mmdit_coco.py --stage vae --data demo --out runs/t2i/vae
    python examples/mmdit_coco.py --stage self --data demo --out runs/t2i/self --teacher runs/t2i/vae/teacher
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common.coco_features import CocoFeatures
from common.demo_captions import TEXT_ENCODER, VAE, make_demo
from common.mmdit import MMDiT
from common.mmdit_settings import new_mmdit, options, settle
from common.options import Mistake
from common.paths import denoising_loss
from common.run_folder import open_run_folder
from common.run_options import CHANGEABLE
from common.samplers import Guidance
from common.sampling import ImageSampler, matching_vae
from common.stages import Backbone, check_teacher_stays, latents_of, leave_teacher, new_criterion, start_from
from common.text import draw_prompts, encoded_prompts, load_text_encoder, numbers_of, same_features
from common.trainer import LongRun, Trainer, new_accelerator
from torch import nn

# What the pictures are of may change, too, when a run goes on.
FREE = (*CHANGEABLE, "prompts", "text_encoder")


def open_data(run: argparse.Namespace) -> CocoFeatures:
    """The features; the demo's are made first, if they are not there."""
    folder = Path(run.demo_data or run.data)
    if run.data == "demo":
        make_demo(folder, images=run.demo_images, vae_steps=run.demo_vae_steps)
        run.vae, run.text_encoder = run.vae or str(folder / VAE), run.text_encoder or str(folder / TEXT_ENCODER)
    return CocoFeatures(folder, dropout=run.context_dropout, second=run.moments)


def new_picture(run: argparse.Namespace, data: CocoFeatures) -> Callable[[nn.Module, Path], None] | None:
    """What draws the pictures of samples, if there is a text encoder for the prompts and a VAE for the images.

    Raises:
        Mistake: If one of the two is not that of the data.
    """
    if run.text_encoder is None:
        return None
    vae, _ = matching_vae(run.vae, data.scaling, data.channels, run.data)
    encoder = load_text_encoder(run.text_encoder)
    prompts = encoded_prompts(encoder, run.prompts, data.empty.shape, run.data)
    if not same_features(prompts.features[prompts.null], data.empty):
        raise Mistake(
            f"{encoder.name} is not the text encoder of {run.data}: the empty prompt has other features.\n"
            "Pass with --text-encoder the one that the captions were encoded with."
        )
    sampler = ImageSampler(
        vae,
        data.scaling,
        (data.channels, data.size, data.size),
        numbers_of,
        steps=run.sample_steps,
        guidance=Guidance(run.sample_cfg, prompts.null),
        seed=run.seed,
    )
    return partial(draw_prompts, sampler, prompts)


def description(run: argparse.Namespace, model: MMDiT, data: CocoFeatures) -> dict[str, Any]:
    """What a checkpoint says of its run: the settings, and the sizes that its readers need to build the model."""
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(run).items()}
    length, width = data.empty.shape
    return settings | {
        "input_size": data.size,
        "in_channels": data.channels,
        "patch_size": model.patch_size,
        "hidden_size": model.pos_embed.shape[-1],
        "depth": len(model.joint_blocks),
        "num_heads": model.joint_blocks[0].num_heads,
        "context_length": length,
        "context_size": width,
        "path": "linear",
        "scale_factor": data.scaling.scale,
        "shift_factor": data.scaling.shift,
        "vae": run.vae or data.vae,
    }


def main(argv: list[str] | None = None) -> Trainer:
    """Train up to the last step, from the newest checkpoint if there is one."""
    run = options(argv, __doc__)
    settle(run)
    accelerator = new_accelerator(run.precision, micro_batches=run.micro_batches, cpu=run.cpu)
    if accelerator.device.type == "cuda":
        torch.set_float32_matmul_precision("high" if run.tf32 else "highest")
    with accelerator.main_process_first():  # what it makes the others find
        data = open_data(run)
    new = partial(new_mmdit, run, channels=data.channels, size=data.size, context_size=data.empty.shape[-1])
    torch.manual_seed(run.seed)
    model = new()
    if run.init is not None:
        start_from(run.init, model, accelerator.print)
    backbone = Backbone(
        new,
        null={"context": data.empty},
        time="repa",
        shape=(data.channels, data.size, data.size),
        scaling=data.scaling,
        patch_size=model.patch_size,
        select=1,  # a joint block returns (text, image)
    )
    trainer = Trainer(
        accelerator,
        model,
        criterion=new_criterion(run, model, backbone),
        dataset=data,
        latents_of=partial(latents_of, scaling=data.scaling),
        denoise=denoising_loss,
        settings=LongRun(**{name: getattr(run, name) for name in LongRun._fields}),
        out=run.out,
        args=description(run, model, data),
        draw=new_picture(run, data),
    )
    if run.compile:
        for block in model.joint_blocks:
            block.compile()
    with accelerator.main_process_first():
        open_run_folder(run.out, {name: value for name, value in vars(run).items() if name not in FREE})
    trainer.resume(run.resume)
    check_teacher_stays(run, trainer)
    trainer.run()
    if run.stage == "vae" and accelerator.is_main_process:
        source = f"examples/mmdit_coco.py --stage vae --model {run.model}, {run.teacher_weights} weights"
        print(f"The teacher for --stage self: {leave_teacher(run, backbone, trainer, source)}")
    accelerator.end_training()
    return trainer


if __name__ == "__main__":
    main()
