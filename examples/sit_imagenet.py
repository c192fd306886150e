"""The paper's runs on ImageNet's latents: a SiT as it is, with stage 1, or with stage 2 and a stage-1 run's teacher.

Run alone, by torchrun or by accelerate launch; the global batch stays what it is. The same command goes on where it was
stopped. `--data demo` takes small digits and a small model instead, so that both stages run on a laptop in minutes.

    torchrun --nproc_per_node=8 examples/sit_imagenet.py --stage vae --model SiT-B/2 --data vae-sd --out runs/b2/vae
    torchrun --nproc_per_node=8 examples/sit_imagenet.py --stage self --model SiT-B/2 --data vae-sd --out runs/b2/self \
        --teacher runs/b2/vae/teacher
"""

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from common.demo_latents import MemoryLatents, RandomLatents, demo_latents
from common.latents import LatentFolder, open_latents
from common.paths import denoising_loss, path_named
from common.run_folder import open_run_folder
from common.run_options import CHANGEABLE
from common.samplers import Guidance
from common.sampling import ImageSampler, class_columns, draw_grid, matching_vae
from common.sit import SiT
from common.sit_settings import new_sit, options, settle
from common.stages import Backbone, check_teacher_stays, latents_of, leave_teacher, new_criterion, start_from
from common.trainer import LongRun, Trainer, new_accelerator

from selftrans_reg.errors import SettingError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

Data = LatentFolder | MemoryLatents | RandomLatents

VAE_DOWNSAMPLING = 8  # of Stable Diffusion's VAE, which the published runs use
TIMES = {"linear": "repa", "cosine": "repa-cosine"}  # t = 1 is noise


def open_data(run: argparse.Namespace) -> tuple[Data, "AutoencoderKL | None"]:
    """The latents, and the VAE that decodes the pictures of samples, if there is one.

    Raises:
        SettingError: If the data is of another resolution than asked for.
    """
    vae = None
    if run.data == "demo":
        data, vae = demo_latents(Path(run.demo_vae), vae_steps=run.demo_vae_steps, device="cpu")
    elif run.data == "random":
        data = RandomLatents((run.resolution or 256) // VAE_DOWNSAMPLING)
    else:
        bad_list = run.out.with_name(f"{run.out.name}-bad-files.json")
        data = open_latents(Path(run.data), num_classes=run.num_classes, skip_bad=run.skip_bad, bad_list=bad_list)
    if run.resolution is not None and data.size * VAE_DOWNSAMPLING != run.resolution:
        raise SettingError(
            f"--resolution {run.resolution} has latents of {run.resolution // VAE_DOWNSAMPLING} pixels a side.\n"
            f"Found: {data.size} in {run.data}. Name other data, or leave --resolution out."
        )
    if run.vae is not None:
        vae, _ = matching_vae(run.vae, data.scaling, data.channels, run.data)
    return data, vae


def description(run: argparse.Namespace, model: SiT, data: Data) -> dict[str, Any]:
    """What a checkpoint says of its run: the settings, and the sizes that its readers need to build the model."""
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(run).items()}
    return settings | {
        "input_size": data.size,
        "in_channels": data.channels,
        "patch_size": model.patch_size,
        "hidden_size": model.pos_embed.shape[-1],
        "depth": len(model.blocks),
        "num_heads": model.blocks[0].attn.num_heads,
        "class_dropout_prob": run.class_dropout,
        "scale_factor": data.scaling.scale,
        "shift_factor": data.scaling.shift,
        "vae": run.vae or data.vae,
    }


def main(argv: list[str] | None = None) -> Trainer:
    """Train up to the last step, from the newest checkpoint if there is one."""
    run = options(argv, __doc__)
    accelerator = new_accelerator(run.precision, micro_batches=run.micro_batches, cpu=run.cpu)
    if accelerator.device.type == "cuda":
        torch.set_float32_matmul_precision("high" if run.tf32 else "highest")
    with accelerator.main_process_first():  # what it makes the others find
        data, vae = open_data(run)
    settle(run, num_classes=data.num_classes, channels=data.channels, size=data.size)
    new = partial(new_sit, run, channels=data.channels, size=data.size)
    torch.manual_seed(run.seed)
    model = new()
    if run.init is not None:
        start_from(run.init, model, accelerator.print)
    shape = (data.channels, data.size, data.size)
    backbone = Backbone(
        new,
        null={"y": run.num_classes},
        time=TIMES[run.path],
        shape=shape,
        scaling=data.scaling,
        patch_size=model.patch_size,
    )
    draw = None
    if vae is not None:
        sampler = ImageSampler(
            vae,
            data.scaling,
            shape,
            class_columns(run.num_classes),
            steps=run.sample_steps,
            guidance=Guidance(run.sample_cfg, run.num_classes),
            seed=run.seed,
        )
        draw = partial(draw_grid, sampler)
    trainer = Trainer(
        accelerator,
        model,
        criterion=new_criterion(run, model, backbone),
        dataset=data,
        latents_of=partial(latents_of, scaling=data.scaling),
        denoise=partial(denoising_loss, path=path_named(run.path)),
        settings=LongRun(**{name: getattr(run, name) for name in LongRun._fields}),
        out=run.out,
        args=description(run, model, data),
        draw=draw,
    )
    if run.compile:
        for block in model.blocks:
            block.compile()
    with accelerator.main_process_first():
        open_run_folder(run.out, {name: value for name, value in vars(run).items() if name not in CHANGEABLE})
    trainer.resume(run.resume)
    check_teacher_stays(run, trainer)
    trainer.run()
    if run.stage == "vae" and accelerator.is_main_process:
        source = f"examples/sit_imagenet.py --stage vae --model {run.model}, {run.teacher_weights} weights"
        print(f"The teacher for --stage self: {leave_teacher(run, backbone, trainer, source)}")
    accelerator.end_training()
    return trainer


if __name__ == "__main__":
    main()
