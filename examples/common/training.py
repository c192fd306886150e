"""The training loop of the quickstart and of the study, and what examples share besides: batches and progress."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from common.options import Mistake

Item = TypeVar("Item")
Denoise = Callable[[nn.Module, Tensor, Tensor], Tensor]
Criterion = nn.Module  # `selftrans_reg.SelfTransLoss`, or a module that is called as it is

# Reading a loss waits for the device, so the log is written at every so-manieth step only.
_LOG_EVERY = 20


def endless(batches: Iterable[Item]) -> Iterator[Item]:
    """The batches of one epoch after another.

    Raises:
        Mistake: If an epoch has none.
    """
    while True:
        empty = True
        for item in batches:
            empty = False
            yield item
        if empty:
            raise Mistake(
                "An epoch has no batch.\nFewer samples than one batch make none: take more of them, or a smaller batch."
            )


def progress(items: Iterable[Item], title: str) -> "tqdm[Item]":
    """A progress bar over the items."""
    return tqdm(items, desc=title, dynamic_ncols=True)


class TrainSettings(NamedTuple):
    """How to train: steps of AdamW, the gradient clipped, the weights averaged.

    The learning rate rises linearly in the first ``warmup_steps``, and falls linearly to 0 in the last ``decay_steps``.
    """

    steps: int
    lr: float
    warmup_steps: int = 0
    decay_steps: int = 0
    clip: float = 1.0
    ema_decay: float = 0.9999


def averaged_copy(model: nn.Module, decay: float) -> AveragedModel:
    """A moving average of the model's weights, frozen and in eval mode; its first update copies the weights."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)).eval().requires_grad_(False)


class Training:
    """A run between two steps: everything that its next step depends on, but for the batches.

    Args:
        model: Trained in place.
        settings: How to train.
        criterion: What it adds to the loss, if anything.
        ema: The average to update; by default a new one. A criterion that looks at the average needs it first.

    Attributes:
        steps: Steps done.
        ema: The average; its ``module`` is the averaged model.
        log: Every 20th step and the last: ``step``, ``denoising``; with a criterion ``alignment`` and ``in_window``.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: TrainSettings,
        criterion: Criterion | None = None,
        ema: AveragedModel | None = None,
    ) -> None:
        self.model, self.settings, self.criterion = model, settings, criterion
        self.ema = averaged_copy(model, settings.ema_decay) if ema is None else ema
        parameters = [*model.parameters(), *(criterion.parameters() if criterion is not None else [])]
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=settings.lr, weight_decay=0.0)
        warmup, decay = max(1, settings.warmup_steps), max(1, settings.decay_steps)
        self.schedule = LambdaLR(
            self.optimizer, lambda step: min(1.0, (step + 1) / warmup, max(0.0, (settings.steps - step) / decay))
        )
        self.steps = 0
        self.log: list[dict[str, float]] = []

    def step(self, denoise: Denoise, latents: Tensor, labels: Tensor) -> None:
        """One batch: forward, backward, clipping, AdamW, the average, and now and then a line of the log."""
        loss = denoise(self.model, latents, labels)
        if self.criterion is None:
            total, terms = loss.mean(), {"denoising": loss.detach().mean()}
        else:
            found = self.criterion(loss, latents=latents, step=self.steps)
            total = found.total
            terms = {"denoising": found.denoising, "alignment": found.alignment, "in_window": found.in_window}
        self.optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
        self.optimizer.step()
        self.schedule.step()
        self.ema.update_parameters(self.model)
        if self.steps % _LOG_EVERY == 0 or self.steps == self.settings.steps - 1:
            self.log.append({"step": self.steps, **{name: term.item() for name, term in terms.items()}})
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """All of it, the global generators included: tensors and plain values."""
        return {
            "steps": self.steps,
            **{name: part.state_dict() for name, part in self._parts().items()},
            "log": self.log,
            "generators": [torch.get_rng_state(), *torch.cuda.get_rng_state_all()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken: the next step is the one that it would have been."""
        self.steps, self.log = state["steps"], list(state["log"])
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        cpu, *cuda = state["generators"]
        torch.set_rng_state(cpu.cpu())
        torch.cuda.set_rng_state_all([generator.cpu() for generator in cuda])

    def _parts(self) -> dict[str, Any]:
        parts = {"model": self.model, "ema": self.ema, "optimizer": self.optimizer, "schedule": self.schedule}
        return parts if self.criterion is None else {**parts, "criterion": self.criterion}


def train(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    denoise: Denoise,
    settings: TrainSettings,
    *,
    criterion: Criterion | None = None,
    ema: AveragedModel | None = None,
    resume: dict[str, Any] | None = None,
    after_step: Callable[[Training], None] = lambda run: None,
    title: str = "training",
) -> Training:
    """Train a model on latents, with the alignment of a criterion or, without one, on the denoising loss alone.

    All randomness (times, noise, dropped labels) comes from the global generator, which a criterion never advances:
    runs that start from one seed see the same with and without it.

    Args:
        model: As for `Training`; likewise ``settings``, ``criterion`` and ``ema``.
        batches: Endless ``(latents, labels)`` on the model's device.
        denoise: ``denoise(model, latents, labels)`` runs the model once and gives its loss, (N,) or a scalar.
        settings: How to train.
        criterion: From `SelfTransLoss.stage1` or `.stage2` on this very model, or another with the same call.
        ema: The average to update, where the criterion has to know it.
        resume: What `Training.state_dict` gave: the run goes on there, on the batches that follow in the same order.
        after_step: Called with the run after every step, to evaluate or to save it; it must leave the global
            generators as they were.
        title: Of the progress bar.
    """
    run = Training(model, settings, criterion, ema)
    unseen = iter(batches)
    if resume is not None:
        for _ in islice(unseen, resume["steps"]):  # seen before; may draw from the generators, which come next
            pass
        run.load_state_dict(resume)
    model.train()
    bar = progress(range(run.steps, settings.steps), title)
    for _, (latents, labels) in zip(bar, unseen, strict=False):  # the steps end, the batches do not
        run.step(denoise, latents, labels)
        if run.log[-1]["step"] == run.steps - 1:
            bar.set_postfix({name: f"{term:.3f}" for name, term in run.log[-1].items() if name != "step"})
        after_step(run)
    return run
