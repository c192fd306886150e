"""The trainer for long runs: accelerate, moving average, checkpoints, resuming, signals and logs, for any model.

Every random number of a step is a function of (seed, step, rank, micro-batch), and the order of an epoch one of (seed,
epoch). A run that was stopped at any step and resumed is therefore bit-equal to one that was not, on a device whose
kernels repeat themselves, as the CPU's do.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

import selftrans_reg as st
from common.checkpointing import checkpoint_path, clear_old, resume_point, save_checkpoint, saved_checkpoints
from common.run_log import RunLog
from common.step_sampler import SeededItems, StepSampler, mixed_seed
from common.stop_signals import ReaderSignals, StopSignals
from common.training_state import TrainingState
from selftrans_reg.errors import NotFiniteError, SettingError

Condition = Any  # what the model is conditioned on: labels, text features
LatentsOf = Callable[[Any], tuple[Tensor, Condition]]
Denoise = Callable[[nn.Module, Tensor, Condition], Tensor]
Draw = Callable[[nn.Module, Path], None]

# gloo's thread needs the interpreter's lock to let go of the last barrier. A process that ends before waits for that
# thread with the lock held, which is for ever, or is aborted. Destroying the group does not end the thread: DDP's
# wrappers keep the group, and so do defaults of torch.distributed.nn's functions.
_GLOO_PAUSE = 0.5  # seconds

# What the console shows of a line of the log.
_SHOWN = ("denoising", "alignment", "in_window", "gradient_norm", "samples_per_second")

# GradScaler halves its scale, at first 65,536, at each step that it skips: so many in a row are no overflow any more.
_MAX_SKIPPED = 40


class LongRun(NamedTuple):
    """How to train.

    Args:
        steps: Optimiser steps in all.
        batch_size: Samples of a step, over all processes and micro-batches.
        lr: Learning rate of AdamW, after the warm-up.
        betas: Of AdamW.
        weight_decay: Of AdamW.
        warmup_steps: Steps over which the learning rate rises linearly.
        clip: Largest norm of the gradient of model and head together.
        ema_decay: Decay of the moving average of the weights, which starts as a copy.
        seed: Of the data's order and of what each step draws.
        workers: Processes that read data, for each rank.
        log_every: Steps between two lines of the log. A criterion whose ``health_interval`` is this times the
            micro-batches measures what is logged.
        checkpoint_every: Steps between two checkpoints.
        sample_every: Steps between two pictures of samples; None for none.
        keep: How many of the newest checkpoints stay.
        keep_every: Checkpoints at multiples of so many steps stay too; None for none.
    """

    steps: int
    batch_size: int = 256
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup_steps: int = 0
    clip: float = 1.0
    ema_decay: float = 0.9999
    seed: int = 0
    workers: int = 0
    log_every: int = 100
    checkpoint_every: int = 10_000
    sample_every: int | None = None
    keep: int = 3
    keep_every: int | None = 50_000


def new_accelerator(precision: str, *, micro_batches: int, cpu: bool) -> Accelerator:
    """The processes that were launched, as accelerate sees them.

    Args:
        precision: "no", "bf16" or "fp16".
        micro_batches: Parts of a rank's batch whose gradients are accumulated.
        cpu: Run on the CPU even where there is a GPU.

    Raises:
        SettingError: If fp16 is asked for without CUDA, or not all launched processes are there.
    """
    if precision == "fp16" and (cpu or not torch.cuda.is_available()):
        raise SettingError("fp16 with gradient scaling needs CUDA.\nFound: the CPU. Choose bf16 or no mixed precision.")
    cpu = cpu or not torch.accelerator.is_available()  # said aloud: or accelerate would take every process for itself
    accelerator = Accelerator(mixed_precision=precision, gradient_accumulation_steps=micro_batches, cpu=cpu)
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != launched:
        raise SettingError(f"{launched} processes were launched; accelerate found {accelerator.num_processes}.")
    return accelerator


class Trainer:
    """Trains a model, with a criterion beside it or without, and keeps the run's folder.

    The folder gets `checkpoints/`, `log.jsonl`, `tensorboard/` and `samples/`. A checkpoint has the keys of the SiT and
    REPA repositories (`model`, `ema`, `opt`, `args`, `steps`), plain names, and besides `criterion` and `scaler`.

    Args:
        accelerator: From `new_accelerator`.
        model: On any device, its initial weights drawn; trained in place.
        criterion: From `SelfTransLoss.stage1` or `.stage2` on this very model, or None.
        dataset: Map-style. What items draw, they draw from the global generator of the CPU, seeded for each batch.
        latents_of: Called with a collated batch on the device; the clean latents as the model sees them, and the
            condition. It may draw from the global generators, which are seeded again.
        denoise: ``denoise(model, latents, condition)`` runs the model once and gives its loss, (N,) or a scalar.
        settings: How to train.
        out: The run's folder.
        args: Plain values that describe the run, for whoever reads a checkpoint.
        draw: ``draw(ema, path)`` writes a picture of samples; called on the first process only.

    Raises:
        SettingError: If the batch cannot be cut evenly, or the data is smaller than it.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        *,
        criterion: st.SelfTransLoss | None,
        dataset: Dataset[Any],
        latents_of: LatentsOf,
        denoise: Denoise,
        settings: LongRun,
        out: Path,
        args: dict[str, Any],
        draw: Draw | None = None,
    ) -> None:
        self.accelerator = accelerator
        self.settings = settings
        self.dataset = dataset
        self.latents_of = latents_of
        self.denoise = denoise
        self.out = out
        self.args = args
        self.draw = draw
        self.micro_batches = accelerator.gradient_accumulation_steps
        self.checkpoints = out / "checkpoints"
        self._sampler(0)  # a batch that cannot be cut is named now
        # Those without a gradient too: the SiT and REPA repositories number the optimiser's state so.
        parameters = [*model.parameters(), *(criterion.parameters() if criterion is not None else [])]
        optimizer = torch.optim.AdamW(
            parameters, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay
        )
        if criterion is not None:
            criterion.check_optimizer(optimizer)
        self._state = TrainingState(accelerator, model, criterion, optimizer, settings.ema_decay)
        self.model, self.optimizer = accelerator.prepare(model.train(), optimizer)
        self.criterion = None if criterion is None else accelerator.prepare(criterion.train())
        self._lr = settings.lr
        self._bad = torch.zeros((), dtype=torch.int64, device=accelerator.device)  # steps in a row

    @property
    def steps(self) -> int:
        """Optimiser steps done."""
        return self._state.steps

    @property
    def ema(self) -> nn.Module:
        """The averaged model, frozen and in eval mode."""
        return self._state.ema

    def resume(self, choice: str = "auto") -> None:
        """Go on from a checkpoint: "auto" for the newest if there is one, "never", or a path.

        Raises:
            SettingError: If checkpoints of the folder would be written over.
            CheckpointError: If the checkpoint is damaged or does not fit the run.
        """
        path = resume_point(self.checkpoints, choice)
        if path is None:
            return
        self._state.load(path)
        newer = [str(found) for steps, found in saved_checkpoints(self.checkpoints).items() if steps > self.steps]
        if newer:
            raise SettingError(
                f"Going on from {path} would write over newer checkpoints of this run.\n"
                f"Found: {', '.join(newer)}.\nName another folder with --out, or move these away."
            )
        self._say(f"Going on from {path}, after {self.steps:,} steps.")

    def run(self) -> None:
        """Train up to the last step.

        Raises:
            SystemExit: After a SIGTERM or SIGINT to any rank, once the state is saved; the code is 128 + the signal.
            NotFiniteError: If the loss or the gradient is no number any more; nothing of that is saved.
        """
        if self.steps >= self.settings.steps:
            self._say(f"Nothing to train: {self.steps:,} of {self.settings.steps:,} steps are done.")
            return
        main = self.accelerator.is_main_process
        readers = ReaderSignals()
        batches = self._batches(readers)
        log = RunLog(self.out, self.steps) if main else None
        bar = tqdm(initial=self.steps, total=self.settings.steps, desc="training", dynamic_ncols=True, disable=not main)
        try:
            with StopSignals() as signals:
                self._loop(batches, signals, log, bar)
        finally:
            readers.release()
            bar.close()
            if log is not None:
                log.close()
            if self.accelerator.num_processes > 1 and self.accelerator.device.type == "cpu":
                time.sleep(_GLOO_PAUSE)

    def _loop(self, batches: Iterator[Any], signals: StopSignals, log: RunLog | None, bar: tqdm) -> None:
        last, clock = self.settings.steps, _Clock(self.steps)
        while self.steps < last:
            terms = self._step(batches)
            self._state.steps += 1
            bar.update()
            if self.steps % self.settings.log_every == 0 or self.steps in (1, last):
                values = self._read(terms)
                self._check_finite()
                values["samples_per_second"] = clock.rate(self.steps) * self.settings.batch_size
                if log is not None:
                    log.write(self.steps, values)
                    shown = ", ".join(f"{name} {values[name]:.4g}" for name in _SHOWN if name in values)
                    bar.write(f"step {self.steps:,}: {shown}")
            stopped = signals.agreed(self.accelerator, self.steps)
            if self._is_due(self.settings.checkpoint_every) or self.steps == last or stopped:
                self._save()
                clock.restart(self.steps)
            if self._is_due(self.settings.sample_every) and self.draw is not None and not stopped:
                self._draw()
                clock.restart(self.steps)
            if stopped and self.steps < last:
                name = signal.Signals(stopped).name
                self._say(f"Stopped by {name} after {self.steps:,} steps, which are saved: the same command goes on.")
                raise SystemExit(128 + stopped)

    def _step(self, batches: Iterator[Any]) -> dict[str, Tensor]:
        """One optimiser step; its terms, means over this rank's micro-batches, unread."""
        settings, accelerator = self.settings, self.accelerator
        self._lr = settings.lr * min(1.0, (self.steps + 1) / max(1, settings.warmup_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr
        sums: dict[str, Tensor] = {}
        watched = [self.model] if self.criterion is None else [self.model, self.criterion]
        for part in range(self.micro_batches):
            batch = send_to_device(next(batches), accelerator.device, non_blocking=True)
            torch.manual_seed(mixed_seed(settings.seed, self.steps, accelerator.process_index, part))
            latents, condition = self.latents_of(batch)
            with accelerator.accumulate(*watched):
                loss = self.denoise(self.model, latents, condition)
                if self.criterion is None:
                    total = loss.mean()
                    terms = {"loss": total, "denoising": total}
                else:
                    found = self.criterion(loss, latents=latents, step=self.steps)
                    total = found.total
                    terms = {"loss": total, **{k: v for k, v in found._asdict().items() if k != "total"}}
                accelerator.backward(total)
                if accelerator.sync_gradients:
                    parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
                    norm = accelerator.clip_grad_norm_(parameters, settings.clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
            for name, term in terms.items():
                sums[name] = sums.get(name, 0) + term.detach() / self.micro_batches
        self._bad = torch.where(sums["loss"].isfinite() & norm.isfinite(), 0, self._bad + 1)
        self._state.update_ema()
        return {**sums, "gradient_norm": norm}

    def _read(self, terms: dict[str, Tensor]) -> dict[str, float]:
        """Means over the ranks, read off the device; what the criterion measures is the first rank's."""
        means = self.accelerator.reduce(torch.stack([term.float() for term in terms.values()]), "mean")
        values = {**dict(zip(terms, means.tolist(), strict=True)), "lr": self._lr}
        # A resumed process measures its first calls too: only what both measure belongs into the log.
        if self._state.criterion is not None and (self.steps % self.settings.log_every == 0 or self.steps == 1):
            values |= {name: value.item() for name, value in self._state.criterion.measures.items()}
        if self.accelerator.device.type == "cuda":
            values["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return values

    def _check_finite(self) -> None:
        """Stop if the weights are lost. Where gradients are scaled, a step that overflows is skipped and no loss."""
        bad = int(self.accelerator.gather(self._bad.reshape(1)).max())
        if bad > (_MAX_SKIPPED if self.accelerator.scaler is not None else 0):
            saved = list(saved_checkpoints(self.checkpoints).values())
            raise NotFiniteError(
                f"The loss or its gradient has not been finite for the last {bad} steps, up to step {self.steps}.\n"
                f"The newest checkpoint from before is {saved[-1] if saved else 'none'}; nothing was saved since.\n"
                "The same command would meet it again: go on from that checkpoint (--resume) in another folder with a "
                "lower learning rate or weight of the alignment, or bf16 instead of fp16. With qk-norm it is rarer."
            )

    def _save(self) -> None:
        """Write the checkpoint of this step on the first process, then drop old ones; the others wait."""
        self._check_finite()
        if self.accelerator.is_main_process:
            save_checkpoint(self._state.content(self.args), checkpoint_path(self.checkpoints, self.steps))
            clear_old(self.checkpoints, keep=self.settings.keep, keep_every=self.settings.keep_every)
        self.accelerator.wait_for_everyone()

    def _draw(self) -> None:
        if self.accelerator.is_main_process:
            folder = self.out / "samples"
            folder.mkdir(exist_ok=True)
            self.draw(self.ema, folder / f"{self.steps:07d}.png")
        self.accelerator.wait_for_everyone()

    def _is_due(self, every: int | None) -> bool:
        return bool(every) and self.steps % every == 0

    def _sampler(self, first_step: int) -> StepSampler:
        return StepSampler(
            len(self.dataset),
            batch_size=self.settings.batch_size,
            micro_batches=self.micro_batches,
            rank=self.accelerator.process_index,
            ranks=self.accelerator.num_processes,
            seed=self.settings.seed,
            first_step=first_step,
        )

    def _batches(self, readers: ReaderSignals) -> Iterator[Any]:
        return iter(
            DataLoader(
                SeededItems(self.dataset),
                batch_sampler=self._sampler(self.steps),
                num_workers=self.settings.workers,
                worker_init_fn=readers,
                pin_memory=self.accelerator.device.type == "cuda",
            )
        )

    def _say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(text)


class _Clock:
    """Steps a second since it was last read or restarted: saving and drawing do not count."""

    def __init__(self, steps: int) -> None:
        self.restart(steps)

    def restart(self, steps: int) -> None:
        self.steps, self.time = steps, time.perf_counter()

    def rate(self, steps: int) -> float:
        rate = (steps - self.steps) / (time.perf_counter() - self.time)
        self.restart(steps)
        return rate
