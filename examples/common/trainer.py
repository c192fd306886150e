"""The trainer for long runs: accelerate, moving average, checkpoints, resuming, signals and logs, for any model.

Every random number of a step is a function of (seed, step, rank, micro-batch), and the order of an epoch one of (seed,
epoch). A run that was stopped at any step and resumed is therefore bit-equal to one that was not, on a device whose
kernels repeat themselves, as the CPU's do, and no generator's state is saved.
"""

import argparse
import copy
import json
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

import selftrans_reg as st
from common.loading import saved_args
from common.options import Mistake
from common.run_folder import checkpoint_path, clear_old, saved_checkpoints, write_whole

Condition = Any  # what the model is conditioned on: labels, text features
LatentsOf = Callable[[Any], tuple[Tensor, Condition]]
Denoise = Callable[[nn.Module, Tensor, Condition], Tensor]
Check = Callable[[Path, Mapping[str, Any]], object]

# gloo's thread needs the interpreter's lock to let go of the last barrier. A process that ends before waits for that
# thread with the lock held, which is for ever, or is aborted. Destroying the group does not end the thread: DDP's
# wrappers keep the group, and so do defaults of torch.distributed.nn's functions.
_GLOO_PAUSE = 0.5  # seconds

# What the console shows of a line of the log.
_SHOWN = ("denoising", "alignment", "in_window", "gradient_norm", "samples_per_second")

# GradScaler halves its scale, at first 65,536, at each step that it skips: so many in a row are no overflow any more.
_MAX_SKIPPED = 40

# Agreeing on a signal makes the host wait for the device. Ten steps are seconds, within any scheduler's grace.
_AGREE_EVERY = 10
_STOPPING = (signal.SIGTERM, signal.SIGINT)

_ENTRIES = {"model", "ema", "opt", "criterion", "scaler", "steps", "args"}


class Trainer:
    """Trains a model, with a criterion beside it or without, and keeps the run's folder.

    The folder gets `checkpoints/`, `log.jsonl` and what trackers write. A checkpoint has the keys of the
    SiT and REPA repositories (`model`, `ema`, `opt`, `args`, `steps`), plain names, and `criterion` and `scaler`.

    Args:
        accelerator: The processes of the run, with its trackers named.
        model: On any device, its initial weights drawn; trained in place.
        criterion: From `SelfTransLoss.stage1` or `.stage2` on this very model, or None.
        dataset: Map-style. What items draw, they draw from the global generator of the CPU, seeded for each batch.
        latents_of: Called with a collated batch on the device; the clean latents as the model sees them, and the
            condition. It may draw from the global generators, which are seeded again.
        denoise: ``denoise(model, latents, condition)`` runs the model once and gives its loss, (N,) or a scalar.
        settings: How to train: the options of the long runs, by the same names.
        out: The run's folder.
        args: Plain values that describe the run, for whoever reads a checkpoint.

    Attributes:
        steps: Optimiser steps done.
        ema: The averaged model, frozen and in eval mode.

    Raises:
        Mistake: If the batch cannot be cut evenly, or the data is smaller than it.
    """

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, *, criterion: st.SelfTransLoss | None, dataset: Dataset[Any],
        latents_of: LatentsOf, denoise: Denoise, settings: argparse.Namespace, out: Path, args: dict[str, Any],
    ) -> None:  # fmt: skip
        self.accelerator, self.settings, self.dataset = accelerator, settings, dataset
        self.latents_of, self.denoise = latents_of, denoise
        self.out, self.args, self.checkpoints = out, args, out / "checkpoints"
        self.micro_batches = accelerator.gradient_accumulation_steps
        self.steps, self._lr = 0, settings.lr
        parts = accelerator.num_processes * self.micro_batches
        if settings.batch_size % parts:
            raise Mistake(
                f"A global batch of {settings.batch_size} cannot be cut evenly.\n"
                f"Found: {accelerator.num_processes} processes, each with {self.micro_batches} micro-batches.\n"
                f"Choose a batch size that is a multiple of {parts}."
            )
        if len(dataset) < settings.batch_size:
            raise Mistake(
                f"The data has {len(dataset)} samples, fewer than one batch of {settings.batch_size}: lower the batch."
            )
        # Those without a gradient too: the SiT and REPA repositories number the optimiser's state so.
        parameters = [*model.parameters(), *(criterion.parameters() if criterion is not None else [])]
        optimizer = torch.optim.AdamW(
            parameters, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay
        )
        if criterion is not None:
            criterion.check_optimizer(optimizer)
        self._plain = model, criterion, optimizer  # under the names that they have without any wrapper
        self.ema = copy.deepcopy(model).to(accelerator.device).eval().requires_grad_(False)
        self._average = get_ema_multi_avg_fn(settings.ema_decay)
        self.model, self.optimizer = accelerator.prepare(model.train(), optimizer)
        self.criterion = None if criterion is None else accelerator.prepare(criterion.train())
        self._bad = torch.zeros((), dtype=torch.int64, device=accelerator.device)  # steps in a row

    def resume(self, choice: str = "auto", check: Check = lambda path, args: None) -> None:
        """Go on from a checkpoint: with "auto" from the newest, if there is one, else from the one at this path.

        ``check`` is called with the file and what it says of its run, before anything is loaded.

        Raises:
            Mistake: If checkpoints of the folder would be written over, or the file is none or of another run.
            CheckpointError: If it is damaged or does not fit the model.
        """
        saved = saved_checkpoints(self.checkpoints)
        if choice == "auto" and not saved:
            return
        path = saved[max(saved)] if choice == "auto" else Path(choice)
        if not path.is_file():
            raise Mistake(f"There is no checkpoint {str(path)!r} to resume from.\nFound: {[*saved] or 'none'}.")
        self._load(path, check)
        newer = [str(found) for steps, found in saved.items() if steps > self.steps]
        if newer:
            raise Mistake(
                f"Going on from {path} would write over newer checkpoints of this run.\n"
                f"Found: {', '.join(newer)}.\nName another folder with --out, or move these away."
            )
        self._say(f"Going on from {path}, after {self.steps:,} steps.")

    def _load(self, path: Path, check: Check) -> None:
        content = st.read_checkpoint(path)
        missing, steps = sorted(_ENTRIES - content.keys()), content.get("steps")
        if missing or type(steps) is not int or steps < 0 or not isinstance(content["args"], dict):
            raise Mistake(
                f"{path} is no checkpoint that training can go on from.\n"
                f"Found: {sorted(map(str, content))}{f', without {missing}' if missing else ', without sense'}.\n"
                "For a new run that starts from its weights, pass it as --init."
            )
        model, criterion, optimizer = self._plain
        if (criterion is None) != (not content["criterion"]):
            there, here = ("a", "none") if content["criterion"] else ("no", "one")
            raise Mistake(f"{path} is of another stage: it holds {there} criterion, and this run has {here}.")
        check(path, saved_args(content, path))
        st.load_weights(model, content, weights="model")
        st.load_weights(self.ema, content, weights="ema")
        try:
            if criterion is not None:
                criterion.load_state_dict(content["criterion"])
            # A copy: what is loaded would else stay a view of the file.
            optimizer.load_state_dict(copy.deepcopy(content["opt"]))
            if self.accelerator.scaler is not None and content["scaler"]:
                self.accelerator.scaler.load_state_dict(content["scaler"])
        except (KeyError, RuntimeError, ValueError) as error:  # torch names neither the file nor what to do
            raise Mistake(f"{path}: its criterion or optimiser does not fit this run: {error}") from error
        self.steps = steps

    # --- The loop ----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train up to the last step.

        Raises:
            SystemExit: After a SIGTERM or SIGINT to any rank, once the state is saved; the code is 128 + the signal.
            NotFiniteError: If the loss or the gradient is no number any more; nothing of that is saved.
        """
        if self.steps >= self.settings.steps:
            self._say(f"Nothing to train: {self.steps:,} of {self.settings.steps:,} steps are done.")
            return
        released, settings, accelerator = multiprocessing.Event(), self.settings, self.accelerator
        batches = micro_batches(
            len(self.dataset), batch_size=settings.batch_size, parts=self.micro_batches,
            rank=accelerator.process_index, ranks=accelerator.num_processes, seed=settings.seed, first_step=self.steps,
        )  # fmt: skip
        loader = DataLoader(
            SeededItems(self.dataset),
            batch_sampler=batches,
            num_workers=settings.workers,
            worker_init_fn=partial(_leave_signals, released),
            pin_memory=accelerator.device.type == "cuda",
        )
        accelerator.init_trackers("selftrans-reg", init_kwargs={"tensorboard": {"purge_step": self.steps + 1}})
        first = accelerator.is_main_process
        bar = tqdm(initial=self.steps, total=settings.steps, desc="training", dynamic_ncols=True, disable=not first)
        try:
            kept = trimmed_log(self.out / "log.jsonl", self.steps) if first else nullcontext()
            with kept as log, noted_signals() as signals:
                self._loop(iter(loader), signals, log, bar)
        finally:
            released.set()
            bar.close()
            if accelerator.num_processes > 1 and accelerator.device.type == "cpu":
                time.sleep(_GLOO_PAUSE)

    def _loop(self, batches: Iterator[Any], signals: list[int], log: IO[str] | None, bar: tqdm) -> None:
        last, since, clock = self.settings.steps, self.steps, time.perf_counter()
        while self.steps < last:
            terms = self._step(batches)
            self.steps += 1
            bar.update()
            logged = self._is_due(self.settings.log_every) or self.steps == 1
            if logged or self.steps == last:
                values = self._read(terms, logged)
                self._check_finite()
                rate = (self.steps - since) / (time.perf_counter() - clock) * self.settings.batch_size
                values["samples_per_second"] = rate
                since, clock = self.steps, time.perf_counter()
                # A last step between two lines is shown alone: a run that goes on later has no such line.
                if logged and log is not None:
                    self._write(log, values)
                shown = ", ".join(f"{name} {values[name]:.4g}" for name in _SHOWN if name in values)
                self._say(f"step {self.steps:,}: {shown}")
            stopped = self._agreed(signals)
            if self._is_due(self.settings.checkpoint_every) or self.steps == last or stopped:
                self._save()
                since, clock = self.steps, time.perf_counter()  # saving does not count as training
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
            self._measured_before = dict(self._measures())
            with accelerator.accumulate(*watched):
                loss = self.denoise(self.model, latents, condition)
                if self.criterion is None:
                    total = loss.mean()
                    terms = {"denoising": total}
                else:
                    terms = self.criterion(loss, latents=latents, step=self.steps)._asdict()
                    total = terms.pop("total")
                accelerator.backward(total)
                if accelerator.sync_gradients:
                    parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
                    norm = accelerator.clip_grad_norm_(parameters, settings.clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
            for name, term in {"loss": total, **terms}.items():
                sums[name] = sums.get(name, 0) + term.detach() / self.micro_batches
        self._bad = torch.where(sums["loss"].isfinite() & norm.isfinite(), 0, self._bad + 1)
        with torch.no_grad():
            model = self._plain[0]
            self._average(list(self.ema.parameters()), list(model.parameters()), 0)
            for average, buffer in zip(self.ema.buffers(), model.buffers(), strict=True):
                average.copy_(buffer)
        return {**sums, "gradient_norm": norm}

    def _measures(self) -> dict[str, Tensor]:
        criterion = self._plain[1]
        return {} if criterion is None else criterion.measures

    def _read(self, terms: dict[str, Tensor], logged: bool) -> dict[str, float]:
        """Means over the ranks, read off the device; what the criterion measures is the first rank's."""
        means = self.accelerator.reduce(torch.stack([term.float() for term in terms.values()]), "mean")
        values = {**dict(zip(terms, means.tolist(), strict=True)), "lr": self._lr}
        # A resumed process measures its first calls too, and where no row is inside, what was measured earlier stays:
        # only what this step's last call has measured is the same in both, and belongs into the log.
        if logged:
            fresh = {k: v for k, v in self._measures().items() if self._measured_before.get(k) is not v}
            values |= {name: value.item() for name, value in fresh.items()}
        if self.accelerator.device.type == "cuda":
            values["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return values

    def _write(self, log: IO[str], values: dict[str, float]) -> None:
        """Add a line to the log, and to the trackers; what is not finite becomes null, JSON's only word for it."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        log.write(json.dumps({"step": self.steps, **dict.fromkeys(values), **finite}) + "\n")
        log.flush()
        os.fsync(log.fileno())
        self.accelerator.log(finite, step=self.steps)

    def _agreed(self, signals: list[int]) -> int:
        """The number of a signal that any rank has got, 0 without one: the same on all, which ask every tenth step."""
        own = signals[-1] if signals else 0
        if self.accelerator.num_processes == 1:
            return own
        if self.steps % _AGREE_EVERY:
            return 0
        return int(self.accelerator.gather(torch.tensor([own], device=self.accelerator.device)).max())

    def _check_finite(self) -> None:
        """Stop if the weights are lost. Where gradients are scaled, a step that overflows is skipped and no loss."""
        bad = int(self.accelerator.gather(self._bad.reshape(1)).max())
        if bad > (_MAX_SKIPPED if self.accelerator.scaler is not None else 0):
            saved = list(saved_checkpoints(self.checkpoints).values())
            raise st.NotFiniteError(
                f"The loss or its gradient has not been finite for the last {bad} steps, up to step {self.steps}.\n"
                f"The newest checkpoint from before is {saved[-1] if saved else 'none'}; nothing was saved since.\n"
                "The same command would meet it again: go on from that checkpoint (--resume) in another folder with a "
                "lower learning rate or weight of the alignment, or bf16 instead of fp16. With qk-norm it is rarer."
            )

    def _save(self) -> None:
        """Write the checkpoint of this step on the first process, then drop old ones; the others wait."""
        self._check_finite()
        if self.accelerator.is_main_process:
            path, (model, criterion, optimizer) = checkpoint_path(self.checkpoints, self.steps), self._plain
            saved = {"criterion": criterion, "scaler": self.accelerator.scaler}  # either may be None
            content = {
                "model": model.state_dict(), "ema": self.ema.state_dict(), "opt": optimizer.state_dict(),
                **{name: {} if part is None else part.state_dict() for name, part in saved.items()},
                "steps": self.steps, "args": self.args,
            }  # fmt: skip
            try:
                self.checkpoints.mkdir(parents=True, exist_ok=True)
                write_whole(path, lambda file: torch.save(content, file))
            except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
                raise Mistake(
                    f"{path} could not be written: {error}\nThe checkpoints before it are whole. Make room, then run "
                    "the same command again to go on from the newest."
                ) from error
            clear_old(self.checkpoints, keep=self.settings.keep, keep_every=self.settings.keep_every)
        self.accelerator.wait_for_everyone()

    def _is_due(self, every: int | None) -> bool:
        return bool(every) and self.steps % every == 0

    def _say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(text)


# --- Which samples a step sees, and which random numbers it draws: functions of the seed and the step ----------------


def mixed_seed(*key: int) -> int:
    """One seed for a tuple of numbers from 0 on, such as (seed, step, rank); nearby tuples give unrelated seeds."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


class MicroBatch(NamedTuple):
    """Indices of the samples, and what seeds the generator before they are read."""

    indices: list[int]
    seed: int


class SeededItems(Dataset[Any]):
    """A map-style dataset read by micro-batches: what its items draw from the CPU's generator is each batch's own.

    With worker processes too, whose own seeds a resumed run would not repeat.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitems__(self, batch: MicroBatch) -> list[Any]:
        """The samples of a micro-batch: a loader prefers this over single items."""
        torch.default_generator.manual_seed(batch.seed)
        return [self.dataset[index] for index in batch.indices]


def micro_batches(
    length: int, *, batch_size: int, parts: int, rank: int, ranks: int, seed: int, first_step: int = 0
) -> Iterator[MicroBatch]:
    """One rank's micro-batches from a step on, for ever.

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
                yield MicroBatch(indices.tolist(), mixed_seed(seed, epoch, step, rank, part, 1))
        epoch, first = epoch + 1, 0


# --- The log, and signals as a wish to stop after the current step ---------------------------------------------------


def trimmed_log(path: Path, steps: int) -> IO[str]:
    """A log, one JSON object a line, opened to go on after so many steps.

    Lines after that step were written by a process that was stopped without a checkpoint; those steps run again, so
    their lines are dropped, as is a last line that was cut off.

    Raises:
        Mistake: If another line is damaged, as no process that was stopped leaves it.
    """
    lines, kept = path.read_bytes().splitlines() if path.exists() else [], []
    for number, line in enumerate(lines, start=1):
        try:
            kept += [line] if json.loads(line)["step"] <= steps else []
        except (KeyError, TypeError, ValueError) as error:
            if number < len(lines):
                raise Mistake(
                    f"Line {number} of {path} is damaged: {error}.\nRemove that line, or move the file away: "
                    "the run goes on without it."
                ) from error
    write_whole(path, lambda file: file.writelines(line + b"\n" for line in kept))
    return path.open("a")


def _leave_signals(released: Any, worker: int) -> None:
    """In a process that reads: leave a signal that a whole job gets to the process that trains, until ``released``.

    Afterwards a reader ends on a signal, with the code of one that did not fail: those of a loop that an error has
    left are ended so.
    """
    for number in _STOPPING:
        signal.signal(number, lambda *_: os._exit(0) if released.is_set() else None)


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """While open, SIGTERM and SIGINT are noted instead of ending the process; a second SIGINT interrupts at once."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and received[-1:] == [number]:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in _STOPPING}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
