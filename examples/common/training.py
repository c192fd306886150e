"""The training loop that the examples share, and what it needs: endless batches and progress bars."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

import selftrans_reg as st

Item = TypeVar("Item")
Denoise = Callable[[nn.Module, Tensor, Tensor], Tensor]

# Reading a loss waits for the device, so the log is written at every so-manieth step only.
_LOG_EVERY = 20


def endless(batches: Iterable[Item]) -> Iterator[Item]:
    """The batches of one epoch after another."""
    while True:
        yield from batches


def progress(items: Iterable[Item], title: str) -> "tqdm[Item]":
    """A progress bar over the items."""
    return tqdm(items, desc=title, dynamic_ncols=True)


class TrainSettings(NamedTuple):
    """How to train.

    Args:
        steps: Optimiser steps.
        lr: Learning rate of AdamW, after the warm-up.
        warmup_steps: Steps over which the learning rate rises linearly.
        clip: Largest norm of the gradient of model and head together.
        ema_decay: Decay of the moving average of the weights.
    """

    steps: int
    lr: float
    warmup_steps: int = 0
    clip: float = 1.0
    ema_decay: float = 0.9999


class TrainResult(NamedTuple):
    """What a run leaves.

    Attributes:
        ema: The averaged model, frozen and in eval mode.
        seconds: Wall-clock time of the loop.
        log: Every 20th step and the last: ``step``, ``denoising``; with a criterion ``alignment`` and ``in_window``.
    """

    ema: nn.Module
    seconds: float
    log: list[dict[str, float]]


def train(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    denoise: Denoise,
    settings: TrainSettings,
    *,
    criterion: st.SelfTransLoss | None = None,
    title: str = "training",
) -> TrainResult:
    """Train a model on latents, with the alignment of a criterion or, without one, on the denoising loss alone.

    All randomness (times, noise, dropped labels) comes from the global generator, which a criterion never advances:
    runs that start from one seed see the same with and without it.

    Args:
        model: Trained in place.
        batches: Endless ``(latents, labels)`` on the model's device.
        denoise: ``denoise(model, latents, labels)`` runs the model once and gives its loss, (N,) or a scalar.
        settings: How to train.
        criterion: From `SelfTransLoss.stage1` or `.stage2` on this very model.
        title: Of the progress bar.
    """
    parameters = [*model.parameters(), *(criterion.parameters() if criterion is not None else [])]
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0)
    if criterion is not None:
        criterion.check_optimizer(optimizer)
    warmup = max(1, settings.warmup_steps)
    schedule = LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay)).eval().requires_grad_(False)
    log = []
    start = time.perf_counter()
    model.train()
    bar = progress(range(settings.steps), title)
    for step, (latents, labels) in zip(bar, batches, strict=False):  # the steps end, the batches do not
        loss = denoise(model, latents, labels)
        if criterion is None:
            total, terms = loss.mean(), {"denoising": loss.detach().mean()}
        else:
            found = criterion(loss, latents=latents, step=step)
            total = found.total
            terms = {"denoising": found.denoising, "alignment": found.alignment, "in_window": found.in_window}
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(parameters, settings.clip)
        optimizer.step()
        schedule.step()
        ema.update_parameters(model)
        if step % _LOG_EVERY == 0 or step == settings.steps - 1:
            log.append({"step": step, **{name: term.item() for name, term in terms.items()}})
            bar.set_postfix({name: f"{term:.3f}" for name, term in log[-1].items() if name != "step"})
    return TrainResult(ema.module, time.perf_counter() - start, log)
