"""The trainer for long runs: accelerate, moving average, checkpoints, resuming, signals and logs, for any model.

Every random number of a step is a function of (seed, step, rank, micro-batch), and the order of an epoch one of (seed,
epoch). A run that was stopped at any step and resumed is therefore bit-equal to one that was not, on a device whose
kernels repeat themselves, as the CPU's do.
"""

import copy
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

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
from common.run_folder import RunLog, checkpoint_path, clear_old, saved_checkpoints, write_whole
from common.step_sampler import SeededItems, StepSampler, mixed_seed

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

# Agreeing on a signal makes the host wait for the device. Ten steps are seconds, within any scheduler's grace.
_AGREE_EVERY = 10
_STOPPING = (signal.SIGTERM, signal.SIGINT)

_ENTRIES = {"model", "ema", "opt", "criterion", "scaler", "steps", "args"}


class LongRun(NamedTuple):
    """How to train: the options of the long runs, by the same names."""

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


class Trainer:
    """Trains a model, with a criterion beside it or without, and keeps the run's folder.

    The folder gets `checkpoints/`, `log.jsonl`, `samples/` and what trackers write. A checkpoint has the keys of the
    SiT and REPA repositories (`model`, `ema`, `opt`, `args`, `steps`), plain names, and `criterion` and `scaler`.

    Args:
        accelerator: The processes of the run, with its trackers named.
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

    Attributes:
        steps: Optimiser steps done.
        ema: The averaged model, frozen and in eval mode.

    Raises:
        Mistake: If the batch cannot be cut evenly, or the data is smaller than it.
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
        self.accelerator, self.settings, self.dataset = accelerator, settings, dataset
        self.latents_of, self.denoise, self.draw = latents_of, denoise, draw
        self.out, self.args, self.checkpoints = out, args, out / "checkpoints"
        self.micro_batches = accelerator.gradient_accumulation_steps
        self.steps, self._lr = 0, settings.lr
        self._sampler(0)  # a batch that cannot be cut is named now
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

    # --- The state between two steps ---------------------------------------------------------------------------------

    def content(self) -> dict[str, Any]:
        """What goes into a checkpoint."""
        model, criterion, optimizer = self._plain
        scaler = self.accelerator.scaler
        return {
            "model": model.state_dict(),
            "ema": self.ema.state_dict(),
            "opt": optimizer.state_dict(),
            "criterion": {} if criterion is None else criterion.state_dict(),
            "scaler": {} if scaler is None else scaler.state_dict(),
            "steps": self.steps,
            "args": self.args,
        }

    def resume(
        self, choice: str = "auto", check: Callable[[Path, Mapping[str, Any]], object] = lambda path, args: None
    ) -> None:
        """Go on from a checkpoint.

        Args:
            choice: "auto" for the newest if there is one, "never", or a path.
            check: Called with the file and what it says of its run, before anything is loaded.

        Raises:
            Mistake: If checkpoints of the folder would be written over, or the file is none or of another run.
            CheckpointError: If it is damaged or does not fit the model.
        """
        saved = saved_checkpoints(self.checkpoints)
        if choice == "never" and saved:
            raise Mistake(
                f"A fresh start would write over what is in {self.checkpoints}.\n"
                f"Found: {len(saved)} checkpoints, the newest after {max(saved)} steps.\n"
                "Go on from it with --resume auto, or name another folder with --out."
            )
        if choice == "never" or (choice == "auto" and not saved):
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

    def _load(self, path: Path, check: Callable[[Path, Mapping[str, Any]], object]) -> None:
        content = st.read_checkpoint(path)
        missing = sorted(_ENTRIES - content.keys())
        if (
            missing
            or type(content["steps"]) is not int
            or content["steps"] < 0
            or not isinstance(content["args"], dict)
        ):
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
        self.steps = content["steps"]

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
        main = self.accelerator.is_main_process
        readers = ReaderSignals()
        batches = self._batches(readers)
        log = RunLog(self.accelerator, self.out, self.steps, self.args)
        bar = tqdm(initial=self.steps, total=self.settings.steps, desc="training", dynamic_ncols=True, disable=not main)
        try:
            with StopSignals() as signals:
                self._loop(batches, signals, log, bar)
        finally:
            readers.release()
            bar.close()
            log.close()
            if self.accelerator.num_processes > 1 and self.accelerator.device.type == "cpu":
                time.sleep(_GLOO_PAUSE)

    def _loop(self, batches: Iterator[Any], signals: "StopSignals", log: RunLog, bar: tqdm) -> None:
        last, since, clock = self.settings.steps, self.steps, time.perf_counter()
        while self.steps < last:
            terms = self._step(batches)
            self.steps += 1
            bar.update()
            logged = self._is_due(self.settings.log_every) or self.steps == 1
            if logged or self.steps == last:
                values = self._read(terms)
                self._check_finite()
                rate = (self.steps - since) / (time.perf_counter() - clock) * self.settings.batch_size
                values["samples_per_second"] = rate
                since, clock = self.steps, time.perf_counter()
                # A last step between two lines is shown alone: a run that goes on later has no such line.
                if logged:
                    log.write(self.steps, values)
                shown = ", ".join(f"{name} {values[name]:.4g}" for name in _SHOWN if name in values)
                self._say(f"step {self.steps:,}: {shown}")
            stopped = signals.agreed(self.accelerator, self.steps)
            saves = self._is_due(self.settings.checkpoint_every) or self.steps == last or stopped
            draws = self._is_due(self.settings.sample_every) and self.draw is not None and not stopped
            if saves:
                self._save()
            if draws:
                self._draw()
            if saves or draws:  # which do not count as training
                since, clock = self.steps, time.perf_counter()
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
        with torch.no_grad():
            model = self._plain[0]
            self._average(list(self.ema.parameters()), list(model.parameters()), 0)
            for average, buffer in zip(self.ema.buffers(), model.buffers(), strict=True):
                average.copy_(buffer)
        return {**sums, "gradient_norm": norm}

    def _measures(self) -> dict[str, Tensor]:
        criterion = self._plain[1]
        return {} if criterion is None else criterion.measures

    def _read(self, terms: dict[str, Tensor]) -> dict[str, float]:
        """Means over the ranks, read off the device; what the criterion measures is the first rank's."""
        means = self.accelerator.reduce(torch.stack([term.float() for term in terms.values()]), "mean")
        values = {**dict(zip(terms, means.tolist(), strict=True)), "lr": self._lr}
        # A resumed process measures its first calls too, and where no row is inside, what was measured earlier stays:
        # only what this step's last call has measured is the same in both, and belongs into the log.
        if self._is_due(self.settings.log_every) or self.steps == 1:
            fresh = {k: v for k, v in self._measures().items() if self._measured_before.get(k) is not v}
            values |= {name: value.item() for name, value in fresh.items()}
        if self.accelerator.device.type == "cuda":
            values["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return values

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
            path = checkpoint_path(self.checkpoints, self.steps)
            try:
                self.checkpoints.mkdir(parents=True, exist_ok=True)
                write_whole(path, lambda file: torch.save(self.content(), file))
            except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
                raise Mistake(
                    f"{path} could not be written: {error}\nThe checkpoints before it are whole. Make room, then run "
                    "the same command again to go on from the newest."
                ) from error
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

    def _batches(self, readers: "ReaderSignals") -> Iterator[Any]:
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


# --- SIGTERM and SIGINT as a wish to stop after the current step -----------------------------------------------------


class ReaderSignals:
    """A loader's ``worker_init_fn``: its processes leave a signal that a whole job gets to the process that trains.

    Until `release`, that is. Afterwards a process that reads ends on a signal, so that the one that trains can end it.
    """

    def __init__(self) -> None:
        self._released = multiprocessing.Event()

    def __call__(self, worker: int) -> None:
        """Take the signals of the process that calls."""
        for number in _STOPPING:
            signal.signal(number, self._act)

    def release(self) -> None:
        """Let the readers be ended: those of a loop that an error has left are, when the process ends."""
        self._released.set()

    def _act(self, number: int, frame: FrameType | None) -> None:
        if self._released.is_set():
            os._exit(0)  # as torch's own handler does: any other code counts as a reader that failed


class StopSignals:
    """While open, SIGTERM and SIGINT are noted instead of ending the process; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.received = 0

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._note) for number in _STOPPING}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def agreed(self, accelerator: Accelerator, steps: int) -> int:
        """The number of a signal that any rank has got, 0 without one: the same on every rank.

        To be called by all ranks after each step; several look at every tenth only.
        """
        if accelerator.num_processes == 1:
            return self.received
        if steps % _AGREE_EVERY:
            return 0
        return int(accelerator.gather(torch.tensor([self.received], device=accelerator.device)).max())
