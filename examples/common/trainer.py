"""The trainer for long runs: accelerate, moving average, checkpoints, resuming, signals and logs, for any model.

Every random number of a step is a function of (seed, step, rank, micro-batch), and the order of an epoch one of (seed,
epoch). A run that goes on from a checkpoint is therefore bit-equal to one that was never stopped, on a device whose
kernels repeat themselves, as the CPU's do, and no generator's state is saved.
"""

import argparse
import atexit
import copy
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

import selftrans_reg as st
from common.loading import saved_args
from common.options import Mistake
from common.processes import leave_signals, noted_signals
from common.run_folder import checkpoint_path, clear_old, saved_checkpoints, trimmed_log, write_whole
from common.training import averaged_copy

Condition = Any  # what the model is conditioned on: labels, text features
LatentsOf = Callable[[Any], tuple[Tensor, Condition]]
Denoise = Callable[[nn.Module, Tensor, Condition], Tensor]
Check = Callable[[Path | str, Mapping[str, Any]], object]

# gloo's thread, which outlives its group, needs the interpreter's lock to let go of the last barrier: a process that
# ends before waits for that thread with the lock held, which is for ever, or is aborted.
_GLOO_PAUSE = 0.5  # seconds

# What the console shows of a line of the log.
_SHOWN = ("denoising", "alignment", "in_window", "gradient_norm", "samples_per_second")

# GradScaler halves its scale, at first 65,536, at each step that it skips: forty in a row are no overflow any more.
_LEAST_SCALE = 2.0**-24


class Trainer:
    """Trains a model, with a criterion beside it or without, and keeps the run's folder.

    The folder gets `checkpoints/`, `log.jsonl` and what trackers write. A checkpoint has the keys of the
    SiT and REPA repositories (`model`, `ema`, `opt`, `args`, `steps`), plain names, and `criterion` and `scaler`.

    Args:
        model: On any device, its initial weights drawn; trained in place.
        criterion: From `SelfTransLoss.stage1` or `.stage2` on this very model, or None.
        dataset: Map-style. What items draw, they draw from the global generator of the CPU, seeded for each batch.
        latents_of: Called with a collated batch on the device; the clean latents as the model sees them, and the
            condition. It may draw from the global generators, which are seeded again.
        denoise: ``denoise(model, latents, condition)`` runs the model once and gives its loss, (N,) or a scalar.
        settings: How to train: the options of the long runs, by the same names.
        out: The run's folder.
        args: Plain values that describe the run, for whoever reads a checkpoint.
    """

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, *, criterion: st.SelfTransLoss | None, dataset: Dataset[Any],
        latents_of: LatentsOf, denoise: Denoise, settings: argparse.Namespace, out: Path, args: dict[str, Any],
    ) -> None:  # fmt: skip
        self.accelerator, self.settings, self.dataset = accelerator, settings, dataset
        self.latents_of, self.denoise = latents_of, denoise
        self.out, self.args, self.checkpoints = out, args, out / "checkpoints"
        self.steps, self.micro_batches = 0, accelerator.gradient_accumulation_steps
        parts = accelerator.num_processes * self.micro_batches
        if settings.batch_size % parts or settings.batch_size > len(dataset):
            raise Mistake(
                f"A global batch of {settings.batch_size} cannot be made.\n"
                f"Found: {len(dataset)} samples; {accelerator.num_processes} processes, each with {self.micro_batches} "
                f"micro-batches. Choose a multiple of {parts}, and at most the data's size."
            )
        # Those without a gradient too: the SiT and REPA repositories number the optimiser's state so.
        self._parameters = [*model.parameters(), *(criterion.parameters() if criterion is not None else [])]
        optimizer = torch.optim.AdamW(
            self._parameters, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay
        )
        if criterion is not None:
            criterion.check_optimizer(optimizer)
        self._plain = model, criterion  # under the names that they have without any wrapper
        self._average = averaged_copy(model.to(accelerator.device), settings.ema_decay)
        self._average.n_averaged += 1  # of the initial weights
        self.ema: nn.Module = self._average.module  # frozen, and in eval mode
        self.model, self.optimizer = accelerator.prepare(model.train(), optimizer)
        self.criterion = None if criterion is None else accelerator.prepare(criterion.train())
        if accelerator.num_processes > 1 and accelerator.device.type == "cpu":
            atexit.register(time.sleep, _GLOO_PAUSE)

    def resume(self, start: Path | str | None = None, check: Check = lambda path, args: None) -> None:
        """Go on from the newest checkpoint of the folder; where there is none yet, from ``start``, one of another run.

        ``check`` is called with the file and what it says of its run, before anything is loaded.

        Raises:
            Mistake: If ``start`` is an earlier one of this folder, or the file does not belong to such a run.
            CheckpointError: If it is missing or damaged, or does not fit the model.
        """
        saved = saved_checkpoints(self.checkpoints)
        path = saved[max(saved)] if saved else start
        if path is None:
            return
        if start is not None and Path(start).absolute().parent == self.checkpoints.absolute():
            raise Mistake(f"{start} is of this very run, which goes on from its newest: name another --out.")
        content = st.read_checkpoint(path)
        check(path, saved_args(content, path))
        model, criterion = self._plain
        st.load_weights(model, content, weights="model")
        st.load_weights(self.ema, content, weights="ema")
        try:
            if criterion is not None:
                criterion.load_state_dict(content["criterion"])
            # A copy: what is loaded would else stay a view of the file.
            self.optimizer.load_state_dict(copy.deepcopy(content["opt"]))
            if self.accelerator.scaler is not None and content["scaler"]:
                self.accelerator.scaler.load_state_dict(content["scaler"])
            self.steps = content["steps"]
        except (KeyError, RuntimeError, ValueError) as error:  # torch names neither the file nor what to do
            raise Mistake(
                f"{path} is of another stage, or no checkpoint to go on from: {error!r}.\n"
                "For a new run that starts from its weights, pass it as --init."
            ) from error
        self.accelerator.print(f"Going on from {path}, after {self.steps:,} of {self.settings.steps:,} steps.")

    def run(self) -> None:
        """Train up to the last step.

        Raises:
            SystemExit: After a SIGTERM or Ctrl-C to any rank, once the step is saved; the code is 128 + the signal.
            NotFiniteError: If the loss or the gradient is no number any more; nothing of that is saved.
        """
        settings, accelerator, first = self.settings, self.accelerator, self.accelerator.is_main_process
        batches = micro_batches(
            len(self.dataset), batch_size=settings.batch_size, parts=self.micro_batches,
            rank=accelerator.process_index, ranks=accelerator.num_processes, seed=settings.seed, first_step=self.steps,
        )  # fmt: skip
        loader = DataLoader(
            SeededItems(self.dataset), batch_sampler=batches, num_workers=settings.workers,
            worker_init_fn=leave_signals, pin_memory=accelerator.device.type == "cuda",
        )  # fmt: skip
        accelerator.init_trackers("selftrans-reg", init_kwargs={"tensorboard": {"purge_step": self.steps + 1}})
        bar = tqdm(initial=self.steps, total=settings.steps, desc="training", dynamic_ncols=True, disable=not first)
        kept = trimmed_log(self.out / "log.jsonl", self.steps) if first else nullcontext()
        with bar, kept as log, noted_signals() as noted:
            read, since, clock = iter(loader), self.steps, time.perf_counter()
            while self.steps < settings.steps:
                terms = self._step(read)
                self.steps += 1
                bar.update()
                if self.steps == 1 or self.steps % settings.log_every == 0:
                    self._check_finite()
                    rate = (self.steps - since) / (time.perf_counter() - clock) * settings.batch_size
                    since, clock = self.steps, time.perf_counter()
                    self._write(log, terms, rate)
                stop = self._agreed(noted)
                if stop or self.steps % settings.checkpoint_every == 0 or self.steps == settings.steps:
                    self._save()
                    since, clock = self.steps, time.perf_counter()  # saving does not count as training
                if stop and self.steps < settings.steps:
                    accelerator.print(f"Stopped after {self.steps:,} steps, which are saved: the same command goes on.")
                    raise SystemExit(128 + stop)

    def _agreed(self, noted: list[int]) -> int:
        """A signal that any rank has got, or 0: all ask at the same steps, as several wait for the device."""
        if self.steps % 10:  # ten steps are seconds, within any scheduler's grace
            return 0
        return max(gather_object([max(noted, default=0)]))

    def _step(self, batches: Iterator[Any]) -> dict[str, Tensor]:
        """One optimiser step; its terms, means over this rank's micro-batches, unread."""
        settings, accelerator, (model, criterion) = self.settings, self.accelerator, self._plain
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * min(1.0, (self.steps + 1) / max(1, settings.warmup_steps))
        sums: dict[str, Tensor] = {}
        watched = [self.model] if self.criterion is None else [self.model, self.criterion]
        for part in range(self.micro_batches):
            batch = send_to_device(next(batches), accelerator.device, non_blocking=True)
            torch.manual_seed(mixed_seed(settings.seed, self.steps, accelerator.process_index, part))
            latents, condition = self.latents_of(batch)
            with accelerator.accumulate(*watched):
                loss = self.denoise(self.model, latents, condition)
                if criterion is None:
                    total = loss.mean()
                    terms = {"denoising": total}
                else:
                    # What earlier calls measured, which a resumed process measures at others, is no part of the log.
                    criterion.measures.clear()
                    terms = self.criterion(loss, latents=latents, step=self.steps)._asdict()
                    total = terms.pop("total")
                accelerator.backward(total)
                if accelerator.sync_gradients:
                    self._norm = accelerator.clip_grad_norm_(self._parameters, settings.clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
            for name, term in {"loss": total, **terms}.items():
                sums[name] = sums.get(name, 0) + term.detach() / self.micro_batches
        self._average.update_parameters(model)
        return {**sums, "gradient_norm": self._norm}

    def _write(self, log: IO[str] | None, terms: dict[str, Tensor], rate: float) -> None:
        """A line for the log, the trackers and the console: means over the ranks, and what the first rank measured."""
        means = self.accelerator.reduce(torch.stack([term.float() for term in terms.values()]), "mean")
        values = dict(zip(terms, means.tolist(), strict=True)) | {"lr": self.optimizer.param_groups[0]["lr"]}
        if self._plain[1] is not None:
            values |= {name: value.item() for name, value in self._plain[1].measures.items()}
        values["samples_per_second"] = rate
        if self.accelerator.device.type == "cuda":
            values["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if log is None:
            return
        # What is not finite becomes null, JSON's only word for it.
        line = {name: value if math.isfinite(value) else None for name, value in values.items()}
        log.write(json.dumps({"step": self.steps, **line}) + "\n")
        log.flush()
        self.accelerator.log(line, step=self.steps)
        shown = ", ".join(f"{name} {values[name]:.4g}" for name in _SHOWN if name in values)
        tqdm.write(f"step {self.steps:,}: {shown}")

    def _check_finite(self) -> None:
        """Stop if the weights are lost. Where gradients are scaled, a step that overflows is skipped and no loss."""
        scaler = self.accelerator.scaler
        if scaler.get_scale() < _LEAST_SCALE if scaler is not None else not self._norm.isfinite():
            saved = list(saved_checkpoints(self.checkpoints).values())
            raise st.NotFiniteError(
                f"The loss or its gradient is not finite any more at step {self.steps}, and nothing of that is saved.\n"
                f"The newest checkpoint from before is {saved[-1] if saved else 'none'}.\n"
                "The same command would meet it again: go on from that checkpoint (--resume) in another folder with a "
                "lower learning rate or weight of the alignment, or bf16 instead of fp16. With qk-norm it is rarer."
            )

    def _save(self) -> None:
        """Write the checkpoint of this step on the first process, then drop old ones; the others wait."""
        self._check_finite()
        if self.accelerator.is_main_process:
            path, (model, criterion) = checkpoint_path(self.checkpoints, self.steps), self._plain
            parts = {"model": model, "ema": self.ema, "opt": self.optimizer}
            parts |= {"criterion": criterion, "scaler": self.accelerator.scaler}  # either may be None
            content = {name: {} if part is None else part.state_dict() for name, part in parts.items()}
            content |= {"steps": self.steps, "args": self.args}
            try:
                self.checkpoints.mkdir(parents=True, exist_ok=True)
                write_whole(path, lambda file: torch.save(content, file))
            except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
                raise Mistake(
                    f"{path} could not be written: {error}\nThose before it are whole: the same command again goes on."
                ) from error
            clear_old(self.checkpoints, keep=self.settings.keep, keep_every=self.settings.keep_every)
        self.accelerator.wait_for_everyone()


# --- Which samples a step sees, and which random numbers it draws: functions of the seed and the step ----------------


def mixed_seed(*key: int) -> int:
    """One seed for a tuple of numbers from 0 on, such as (seed, step, rank); nearby tuples give unrelated seeds."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


class SeededItems(Dataset[Any]):
    """A map-style dataset read by micro-batches: what its items draw is each batch's own, in worker processes too."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitems__(self, batch: tuple[list[int], int]) -> list[Any]:
        """The samples of a micro-batch and its seed: a loader prefers this over single items."""
        indices, seed = batch
        torch.default_generator.manual_seed(seed)
        return [self.dataset[index] for index in indices]


def micro_batches(
    length: int, *, batch_size: int, parts: int, rank: int, ranks: int, seed: int, first_step: int = 0
) -> Iterator[tuple[list[int], int]]:
    """One rank's micro-batches from a step on, for ever: the samples' indices, and the seed of what these draw.

    Each epoch is a permutation of its own, cut into global batches; what is left over is not seen in that epoch. A
    global batch is the same whatever the number of ranks and of micro-batches, ``parts``, that it is cut into.
    """
    steps_per_epoch = length // batch_size
    epoch, first = divmod(first_step, steps_per_epoch)
    while True:
        order = torch.randperm(length, generator=torch.Generator().manual_seed(mixed_seed(seed, epoch)))
        for step in range(first, steps_per_epoch):
            batch = order[step * batch_size : (step + 1) * batch_size]
            # Shaped so that another number of parts cuts the same batch.
            for part, indices in enumerate(batch.view(parts, ranks, -1)[:, rank]):
                # The 1 keeps it apart from the seed of the same micro-batch's noise.
                yield indices.tolist(), mixed_seed(seed, epoch, step, rank, part, 1)
        epoch, first = epoch + 1, 0
