"""Images from a model: the ODE by Euler and Heun, the SDE by Euler-Maruyama, guidance in an interval, and the VAE.

REPA's convention: t runs from 1 (noise) to 0 (data) and the model predicts the velocity dx_t / dt. The state is
float64; the model sees it in the precision of the noise that it started from.
Source followed: the samplers of REPA, https://github.com/sihyun-yu/REPA.
"""

import argparse
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from numpy.typing import NDArray
from torch import Tensor

from common.images import to_uint8, write_png
from common.options import Mistake
from common.paths import PATHS, Path, linear_path
from common.vae import Scaling, decode, load_vae, recorded_scaling, scaling_of, weights_digest

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

    from common.loading import Checkpoint

Model = Callable[[Tensor, Tensor, Tensor], Tensor]
Labels = Callable[[Sequence[int], Sequence[torch.Generator]], Tensor]

# REPA stops the diffusion here and takes the last step without noise: the score's variance vanishes at t = 0.
LAST_SDE_TIME = 0.04


class Guidance(NamedTuple):
    """Classifier-free guidance ``v_u + scale (v_c - v_u)``, in the steps that begin at ``low <= t <= high``.

    Args:
        scale: 1 is the conditional velocity: the null condition is then never run.
        null: Index of the null class.
        low: Smallest t, noise being 1, at which guidance acts.
        high: Largest such t.
    """

    scale: float = 1.0
    null: int | None = None
    low: float = 0.0
    high: float = 1.0


UNGUIDED = Guidance()


def reversed_time(model: Model) -> Model:
    """A model in the SiT repository's convention, where t = 1 is data and the velocity leads there, in REPA's.

    With ``s = 1 - t`` both describe one path run in opposite directions: ``v(x, t) = -u(x, 1 - t)``.
    """
    return lambda x, t, y: -model(x, 1 - t, y)


def _guided(
    model: Model, noise: Tensor, y: Tensor, guidance: Guidance, steps: int, least: int
) -> Callable[..., Tensor]:
    """The velocity in float64 at a time that all samples share; ``start`` is where its step begins, by default t."""
    if steps < least:
        raise Mistake(f"This sampler needs at least {least} steps.\nFound: steps={steps}.")
    if guidance.scale != 1 and guidance.null is None:
        raise Mistake(
            f"Guidance of scale {guidance.scale} needs the null class.\n"
            "Found: null=None. Pass Guidance(scale, null=num_classes)."
        )
    if not 0 <= guidance.low <= guidance.high <= 1:
        raise Mistake(
            f"The guidance interval needs 0 <= low <= high <= 1.\nFound: low={guidance.low}, high={guidance.high}."
        )

    def velocity(x: Tensor, t: Tensor, start: Tensor | None = None) -> Tensor:
        begun = (t if start is None else start).item()
        seen, times = x.to(noise.dtype), t.to(noise.dtype).expand(len(x))
        if guidance.scale == 1 or not guidance.low <= begun <= guidance.high:
            return model(seen, times, y).double()
        both = model(seen.repeat(2, 1, 1, 1), times.repeat(2), torch.cat([y, torch.full_like(y, guidance.null)]))
        conditional, unconditional = both.double().chunk(2)
        return unconditional + guidance.scale * (conditional - unconditional)

    return velocity


@torch.no_grad()
def sample_ode(
    model: Model,
    noise: Tensor,
    y: Tensor,
    *,
    steps: int,
    method: Literal["euler", "heun"] = "euler",
    guidance: Guidance = UNGUIDED,
) -> Tensor:
    """Follow the probability-flow ODE from t = 1 to t = 0 on equal steps.

    Euler: ``x <- x + (t' - t) v(x, t)``. Heun averages the velocities at both ends, except in the last step, which is
    Euler's: steps * 2 - 1 evaluations. Whether guidance acts is decided at t for the whole step, as REPA does.

    Args:
        model: Called as ``model(x_t, t, y)``; eval mode is the caller's business.
        noise: The starting point; its dtype is the one that the model sees.
        y: Labels.
        steps: Number of steps.
        method: "euler" or "heun".
        guidance: Classifier-free guidance.

    Shape:
        noise: (N, C, H, W); y: (N,); returns: (N, C, H, W), of the noise's dtype

    Raises:
        Mistake: If a setting makes no sense.
    """
    velocity = _guided(model, noise, y, guidance, steps, least=1)
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64, device=noise.device)
    x = noise.double()
    for i, (t, t_next) in enumerate(pairwise(times)):
        slope = velocity(x, t)
        if method == "heun" and i < steps - 1:
            slope = (slope + velocity(x + (t_next - t) * slope, t_next, start=t)) / 2
        x = x + (t_next - t) * slope
    return x.to(noise.dtype)


def score_from_velocity(velocity: Tensor, x: Tensor, t: Tensor, path: Path = linear_path) -> Tensor:
    """The score of x_t: ``s = (a v - x) / (sigma**2 - a sigma' sigma)`` with ``a = alpha / alpha'``."""
    alpha, sigma, d_alpha, d_sigma = path(t)
    ratio = alpha / d_alpha
    return (ratio * velocity - x) / (sigma**2 - ratio * d_sigma * sigma)


@torch.no_grad()
def sample_sde(
    model: Model,
    noise: Tensor,
    y: Tensor,
    *,
    steps: int,
    generator: torch.Generator | list[torch.Generator],
    path: Path = linear_path,
    guidance: Guidance = UNGUIDED,
) -> Tensor:
    """Follow the reverse SDE with diffusion ``w(t) = 2 t`` by Euler-Maruyama.

    ``x <- x + d dt + sqrt(w |dt|) noise`` with the drift ``d = v - w s / 2`` and the score s, at
    ``linspace(1, 0.04, steps)`` and then 0; the last step, which counts among the steps, has no noise. Guiding the
    velocity is guiding the drift, as the drift is affine in it. ``path`` is the one that the model was trained on. A
    ``generator`` for each sample makes samples independent of the batch they share. All else is as for `sample_ode`.
    """
    velocity = _guided(model, noise, y, guidance, steps, least=2)
    times = torch.linspace(1, LAST_SDE_TIME, steps, dtype=torch.float64, device=noise.device)
    x = noise.double()
    for i, (t, t_next) in enumerate(pairwise([*times, times.new_zeros(())])):
        v, dt, diffusion = velocity(x, t), t_next - t, 2 * t
        x = x + (v - diffusion / 2 * score_from_velocity(v, x, t, path)) * dt
        if i < steps - 1:
            # Drawn in the noise's dtype: a float32 run sees the same stream whatever the state is kept in.
            fresh = randn_tensor(x.shape, generator=generator, device=x.device, dtype=noise.dtype)
            x = x + torch.sqrt(diffusion * dt.abs()) * fresh
    return x.to(noise.dtype)


# --- Images by their numbers -----------------------------------------------------------------------------------------


def image_generator(seed: int, number: int) -> torch.Generator:
    """The random numbers of one image: its label, its first noise, and the noise of the SDE's steps, in this order.

    torch's CPU generator takes 32 bits of a seed. Seeds that count up keep all images of a run apart; among 50,000
    hashes of 32 bits, two would be equal one time in four.
    """
    first = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return torch.Generator().manual_seed((first + number) % 2**32)


@dataclass
class ImageSampler:
    """Makes the images of some numbers, whatever batches they come in.

    Args:
        vae: Decodes the latents.
        scaling: Between its latents and the model's.
        shape: Of a latent, (C, h, w).
        labels: From numbers and their generators to the labels y of these images; may draw from the generators.
        steps: Of the sampler.
        guidance: Classifier-free guidance.
        seed: Of the generators.
        method: "euler" or "heun", the ODE's; or "sde".
        path: The path that the model was trained on.
    """

    vae: "AutoencoderKL"
    scaling: Scaling
    shape: tuple[int, int, int]
    labels: Labels
    steps: int
    guidance: Guidance
    seed: int
    method: Literal["euler", "heun", "sde"] = "heun"
    path: str = "linear"

    def __post_init__(self) -> None:
        self._latents(lambda x, t, y: x, [0], "cpu")  # a setting without sense is named now, not after a run

    def images(self, model: Model, numbers: Sequence[int], device: str | torch.device) -> NDArray[np.uint8]:
        """The images (N, H, W, 3) of these numbers, by a model in eval mode on the device."""
        latents = self._latents(model, numbers, device)
        broken = [number for number, latent in zip(numbers, latents, strict=True) if not latent.isfinite().all()]
        if broken:
            raise Mistake(
                f"The model's latents are not finite for {len(broken)} of {len(numbers)} images.\n"
                f"Found: image {broken[0]}, by {self.method} in {self.steps} steps, guidance {self.guidance.scale}.\n"
                "Take an earlier checkpoint, --precision fp32, or a smaller guidance scale."
            )
        return to_uint8(decode(self.vae.to(device), latents, self.scaling))

    def _latents(self, model: Model, numbers: Sequence[int], device: str | torch.device) -> Tensor:
        generators = [image_generator(self.seed, number) for number in numbers]
        y = self.labels(numbers, generators).to(device)
        noise = torch.stack([torch.randn(self.shape, generator=generator) for generator in generators]).to(device)
        same = {"steps": self.steps, "guidance": self.guidance}
        if self.method == "sde":
            return sample_sde(model, noise, y, generator=generators, path=PATHS[self.path], **same)
        return sample_ode(model, noise, y, method=self.method, **same)


def new_sampler(
    run: argparse.Namespace, found: "Checkpoint", labels: Labels, null: int | None, path: str = "linear"
) -> tuple[ImageSampler, dict[str, Any]]:
    """What samples from a checkpoint's model as the options say, and what of it decides the images."""
    channels, side = found.settings["in_channels"], found.settings["input_size"]
    place, trained = vae_place(found.args.get("vae"), found.source), recorded_scaling(found.args, found.source)
    vae, scaling = matching_vae(run.vae or place, trained, channels, found.source)
    guidance = Guidance(run.cfg_scale, null, run.guidance_low, run.guidance_high)
    sampler = ImageSampler(
        vae, scaling, (channels, side, side), labels, run.steps, guidance, run.seed, method=run.sampler, path=path
    )
    names = ("sampler", "steps", "cfg_scale", "guidance_low", "guidance_high", "seed")
    decided = {"vae_weights": weights_digest(vae)[:16], "scale_factor": scaling.scale, "shift_factor": scaling.shift}
    return sampler, {name: getattr(run, name) for name in names} | decided


def png_of(folder: pathlib.Path, number: int) -> pathlib.Path:
    """The file of an image."""
    return folder / f"{number:06d}.png"


def batches_left(folder: pathlib.Path, count: int, batch_size: int) -> list[range]:
    """Batches of image numbers, cut at the same places whatever is there, with an image missing in each.

    Cut elsewhere, an image could differ: rounding depends on the rows of a batch.
    """
    there = {entry.name for entry in os.scandir(folder)}
    batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    return [batch for batch in batches if any(png_of(folder, number).name not in there for number in batch)]


def write_missing(
    folder: pathlib.Path, batches: Iterable[range], sampler: ImageSampler, model: Model, device: str
) -> None:
    """Make the images of these batches, and write those that are not there."""
    for numbers in batches:
        for number, image in zip(numbers, sampler.images(model, numbers, device), strict=True):
            if not png_of(folder, number).exists():
                write_png(image, png_of(folder, number))


# --- The VAE of a model ----------------------------------------------------------------------------------------------


def vae_place(recorded: Any, checkpoint: str | os.PathLike[str]) -> str | None:
    """Where the VAE is that a run has recorded: a folder from here or from the run's, or a name on the hub."""
    if not isinstance(recorded, str):
        return None
    folder = pathlib.Path(checkpoint).parent
    places = [pathlib.Path(recorded), folder.parent / recorded, folder / recorded]
    return next((str(place) for place in places if place.exists()), recorded)


def matching_vae(
    name: str | os.PathLike[str] | None,
    trained: Scaling | None,
    channels: int,
    of: str | os.PathLike[str],
) -> tuple["AutoencoderKL", Scaling]:
    """The VAE of this name, for a model's latents, and the scaling to decode them with: ``trained``, or the VAE's own.

    Messages call the source of the latents ``of``.
    """
    if name is None:
        raise Mistake(
            f"{of} does not name its VAE.\n"
            "Pass --vae: a folder of diffusers' AutoencoderKL, or its name on the hub, as stabilityai/sd-vae-ft-mse."
        )
    vae = load_vae(name)
    if vae.config.latent_channels != channels:
        raise Mistake(
            f"The VAE {name} decodes latents of {vae.config.latent_channels} channels; those of {of} have {channels}.\n"
            "Pass with --vae the one that they came from."
        )
    own = scaling_of(vae.config, f"The VAE {name}")
    if trained is not None and not trained.equals(own):
        raise Mistake(
            f"The VAE {name} is not the one that the latents of {of} came from.\nFound: {own} in the VAE, {trained} "
            "in the latents.\nPass with --vae the one that encoded them."
        )
    return vae, trained or own
