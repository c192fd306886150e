"""Does it help, by how much, at what price, against what else? The study behind docs/does-it-work.md.

Trains one small SiT in many ways on Fashion-MNIST, for a given seed each way from the same initial weights, on the same
batches, with the same noise, and judges it at several steps. A run is one method with one seed; its result is one line
of the results file, and what is there is not run again. Several processes may work on one --out at a time; one that is
killed goes on, when started again, where its run was last judged.

    python examples/benchmarks/convergence.py                            # the reduced study, on a CPU
    python examples/benchmarks/convergence.py --study scale --seeds 0    # an ablation: see STUDIES
    python examples/benchmarks/convergence.py --method "self guidance_scale=8 stop=0.6" --seeds 0 1 2
    python examples/benchmarks/convergence.py --size S --device cuda --study full
    python examples/benchmarks/convergence.py --time                     # seconds of a step, all methods in turns
    python examples/benchmarks/convergence.py --report                   # redraw docs/does-it-work.md from the results
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel
from torch.utils.flop_counter import FlopCounterMode

from selftrans_reg.errors import SettingError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.convergence_methods import STUDIES, Method, Parts, parse
from benchmarks.convergence_report import write_page
from benchmarks.convergence_setting import PROTOCOLS, Protocol, Setting
from benchmarks.recording import commit, hardware
from common.fashion import PACKAGED
from common.options import at_least
from common.paths import denoising_loss, velocity_loss
from common.run_folder import open_run_folder
from common.sit import SiT
from common.training import Criterion, Training, TrainSettings, averaged_copy, progress, train

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results" / "convergence.jsonl"
WARM_UP = 2
WAIT = 5.0  # seconds before looking again for a run that another process is not working on


@dataclass(frozen=True)
class Run:
    """One method with one seed."""

    protocol: Protocol
    method: Method
    seed: int

    @property
    def key(self) -> str:
        """What its result is found by."""
        return f"{self.protocol.name} | {self.method} | seed {self.seed}"

    def folder(self, out: Path) -> Path:
        """Where its weights are kept."""
        return out / "runs" / self.key.replace(" | ", "/").replace(" ", "_")

    def weights(self, out: Path, step: int) -> Path:
        """Raw and averaged weights after so many steps."""
        return self.folder(out) / f"{step:07d}.pt"

    def parts(self) -> list[tuple[int, int]]:
        """First step and end of each part of the run within which every step costs the same."""
        return list(pairwise([0, *self.method.part_ends(self.protocol)]))

    def teacher(self) -> tuple[Run, int] | None:
        """The run that comes first, and the step whose weights teach.

        Raises:
            SettingError: If no weights are kept at that step.
        """
        needed = self.method.teacher()
        if needed is None:
            return None
        step = self.protocol.step_at(needed.share)
        if step not in self.protocol.evaluate_at:
            raise SettingError(
                f"{self.key}: a teacher's weights are kept only where it is judged.\n"
                f"Found: step {step}. Choose a share of {self.protocol.steps} that gives one of "
                f"{self.protocol.evaluate_at}."
            )
        return Run(self.protocol, needed.method, self.seed), step


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Whether this process alone holds the file while inside; the system frees what a killed process held."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def save(content: Any, path: Path) -> None:
    """Write under another name, then rename."""
    partial = path.with_name(path.name + ".partial")
    torch.save(content, partial)
    partial.replace(path)


class Results:
    """The results file: one JSON object a line, read anew at each question, as other processes add to it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self) -> list[dict[str, Any]]:
        """All of them."""
        if not self.path.exists():
            return []
        with self.path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            return [json.loads(line) for line in file]

    def has(self, run: Run) -> bool:
        """Whether the run is finished.

        Raises:
            SettingError: If it was, with other settings.
        """
        found = [line for line in self.lines() if line["key"] == run.key]
        wanted = json.loads(json.dumps([asdict(run.protocol), run.method.described()]))
        for line in found:
            if [line["protocol"], line["method"]] != wanted:
                raise SettingError(
                    f"{self.path} holds {run.key!r} with other settings.\nFound: {line['protocol']}, "
                    f"{line['method']}.\nName another file with --results."
                )
        return bool(found)

    def add(self, result: dict[str, Any]) -> None:
        """Append a line, whole, whoever else does."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(json.dumps(result) + "\n")
            file.flush()
            os.fsync(file.fileno())


def prepared(setting: Setting, run: Run, out: Path) -> tuple[SiT, TrainSettings, Criterion | None, AveragedModel]:
    """What `Training` is made of; the seed decides the initial weights."""
    p = setting.protocol
    torch.manual_seed(run.seed)
    model = p.new_model(setting.device).train()
    ema = averaged_copy(model, p.ema_decay)
    needed = run.teacher()
    teacher = None if needed is None else needed[0].weights(out, needed[1])
    criterion = run.method.criterion(Parts(setting, model, ema.module, run.seed, teacher))
    if isinstance(criterion, nn.Module):
        criterion.to(setting.device)
    settings = TrainSettings(steps=p.steps, lr=p.lr, warmup_steps=p.warmup_steps, ema_decay=p.ema_decay)
    return model, settings, criterion, ema


def even_denoising(model: nn.Module, latents: Tensor, y: Tensor) -> Tensor:
    """The denoising loss at times spread evenly over [0, 1]: every batch has the window's share inside it."""
    n = len(latents)
    t = (torch.randperm(n).to(latents) + 0.5) / n
    return velocity_loss(model, latents, y, t, torch.randn_like(latents))


def batch_of(setting: Setting, seed: int) -> tuple[Tensor, Tensor]:
    """A batch to count and to time with."""
    return next(setting.latents.batches(batch_size=setting.protocol.batch_size, seed=seed))


def counted_operations(setting: Setting, run: Run, out: Path) -> list[tuple[int, int]]:
    """For each part of the run its end and the operations of a step: matrix products, convolutions and attention."""
    counts = []
    with torch.random.fork_rng():
        for begin, end in run.parts():
            training = Training(*prepared(setting, run, out))
            training.steps = begin
            batch = batch_of(setting, run.seed)
            with sdpa_kernel(SDPBackend.MATH):  # the counter does not see into every fused attention
                training.step(even_denoising, *batch)  # uncounted: a first call also looks what it can leave out
                with FlopCounterMode(display=False) as counter:
                    training.step(even_denoising, *batch)
            counts.append((end, counter.get_total_flops()))
    return counts


def measured_seconds(setting: Setting, runs: list[Run], out: Path, repeats: int) -> dict[str, list[tuple[int, float]]]:
    """As `counted_operations`, the median seconds of a step, by method; all parts of all runs take turns."""
    parts = [(run, begin, end) for run in runs for begin, end in run.parts()]
    trainings = [Training(*prepared(setting, run, out)) for run, _, _ in parts]
    for training, (_, begin, _) in zip(trainings, parts, strict=True):
        training.steps = begin
    seconds: list[list[float]] = [[] for _ in parts]
    batch = batch_of(setting, 0)
    for repeat in progress(range(-WARM_UP, repeats), "timing"):
        for i in [(repeat + k) % len(parts) for k in range(len(parts))]:  # nobody is always first
            start = time.perf_counter()
            trainings[i].step(even_denoising, *batch)
            if setting.device == "cuda":
                torch.cuda.synchronize()
            if repeat >= 0:
                seconds[i].append(time.perf_counter() - start)
    found: dict[str, list[tuple[int, float]]] = {str(run.method): [] for run in runs}
    for (run, _, end), values in zip(parts, seconds, strict=True):
        found[str(run.method)].append((end, statistics.median(values)))
    return found


def described(setting: Setting, argv: list[str]) -> dict[str, Any]:
    """What every line says about where it comes from."""
    return {
        "command": " ".join(["python examples/benchmarks/convergence.py", *argv]),
        "commit": commit(),
        "hardware": hardware(setting.device),
        "torch": torch.__version__,
        **setting.described(),
    }


def trained(setting: Setting, run: Run, out: Path) -> list[dict[str, Any]]:
    """Train a run, or go on with it; what was measured, by step."""
    folder = run.folder(out)
    state_file = folder / "state.pt"
    state = torch.load(state_file, map_location=setting.device, weights_only=True) if state_file.exists() else None
    measures: list[dict[str, Any]] = [] if state is None else state["measures"]
    model, settings, criterion, ema = prepared(setting, run, out)

    def after_step(training: Training) -> None:
        if training.steps not in run.protocol.evaluate_at:
            return
        measures.append({"step": training.steps, **setting.judged(training.ema.module, run.seed)})
        weights = {"model": training.model.state_dict(), "ema": training.ema.module.state_dict()}
        save(weights, run.weights(out, training.steps))
        save({"training": training.state_dict(), "measures": measures}, state_file)

    torch.manual_seed(run.seed)  # from here on every method draws the same times, noise and dropped labels
    train(
        model,
        setting.latents.batches(batch_size=run.protocol.batch_size, seed=run.seed),
        denoising_loss,
        settings,
        criterion=criterion,
        ema=ema,
        resume=None if state is None else state["training"],
        after_step=after_step,
        title=run.key,
    )
    return measures


def with_teachers(runs: list[Run]) -> list[Run]:
    """The runs, each after the run that teaches it, without repetition."""
    ordered: dict[str, Run] = {}
    for run in runs:
        chain = [run]
        while (needed := chain[-1].teacher()) is not None:
            chain.append(needed[0])
        ordered |= {link.key: link for link in reversed(chain) if link.key not in ordered}
    return list(ordered.values())


def work(setting: Setting, runs: list[Run], out: Path, results: Results, argv: list[str]) -> None:
    """Do the runs one by one, leaving alone those that another process is at, until all are finished."""
    runs = with_teachers(runs)
    teachers = [needed for run in runs if not results.has(run) and (needed := run.teacher()) is not None]

    def finished(run: Run) -> bool:
        weights = [teacher.weights(out, step) for teacher, step in teachers if teacher == run]
        return results.has(run) and all(path.exists() for path in weights)

    def done(run: Run) -> bool:
        needed = run.teacher()
        if needed is not None and not needed[0].weights(out, needed[1]).exists():
            return False
        with locked(run.folder(out) / "lock", wait=False) as alone:
            if alone and not finished(run):
                result = do(setting, run, out, argv)
                if not results.has(run):  # a teacher whose weights were lost is trained anew, but counts once
                    results.add(result)
                (run.folder(out) / "state.pt").unlink()
            return alone

    while unfinished := [run for run in runs if not finished(run)]:
        if not any(done(run) for run in unfinished):
            time.sleep(WAIT)


def do(setting: Setting, run: Run, out: Path, argv: list[str]) -> dict[str, Any]:
    """Train one run, and say all about it."""
    needed = run.teacher()
    result = {
        "kind": "run",
        "key": run.key,
        "method": run.method.described(),
        "seed": run.seed,
        **described(setting, argv),
        "operations": counted_operations(setting, run, out),
        "teacher": None if needed is None else {"key": needed[0].key, "steps": needed[1]},
        "measures": trained(setting, run, out),
    }
    last = result["measures"][-1]
    print(f"{run.key}: distance {last['distance']:.2f} after {last['step']:,} steps")
    return result


def main(argv: list[str] | None = None) -> None:
    """Train what is not finished, or time, or report."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=PROTOCOLS, default="cpu", help="of model, data and run (default: cpu)")
    parser.add_argument("--study", choices=STUDIES, default="reduced", help="which methods (default: reduced)")
    parser.add_argument("--method", action="append", help="instead: a method with its settings; may be repeated")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--out", type=Path, default=Path("runs/convergence"), help="folder of weights and prepared data"
    )
    parser.add_argument("--data", type=Path, default=PACKAGED, help="folder of the four Fashion-MNIST files")
    parser.add_argument("--results", type=Path, default=RESULTS, help="results are appended to this file")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--time", action="store_true", help="measure a step of each method, in turns; train nothing")
    parser.add_argument("--repeats", type=at_least(1), default=20, help="of --time")
    parser.add_argument("--report", action="store_true", help="redraw the docs from the results; measure nothing")
    args = parser.parse_args(argv)
    results = Results(args.results)
    if args.report:
        write_page(results.lines(), ROOT)
        return

    protocol = PROTOCOLS[args.size]
    methods = [parse(text) for text in args.method or STUDIES[args.study]]
    runs = [Run(protocol, method, seed) for seed in args.seeds for method in methods]
    for run in runs:
        run.teacher()  # a share without weights is named before anything is trained
    with locked(args.out.with_name(args.out.name + ".lock"), wait=True):
        open_run_folder(args.out, asdict(protocol))
        setting = Setting(protocol, args.out, args.data, args.device)
    judge = {name: round(value, 3) for name, value in setting.judge.items()}
    print(f"The judge's accuracy, and the distance of real images: {judge}")
    if args.time:
        found = measured_seconds(setting, [run for run in runs if run.seed == args.seeds[0]], args.out, args.repeats)
        results.add(
            {"kind": "seconds", "key": f"{protocol.name} | seconds", **described(setting, argv), "parts": found}
        )
    else:
        work(setting, runs, args.out, results, argv)


if __name__ == "__main__":
    main()
