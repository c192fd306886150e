"""Does it help, by how much, at what price, against what else? The study behind docs/does-it-work.md.

Trains one small SiT in many ways on Fashion-MNIST, for a given seed each way from the same initial weights, on the same
batches, with the same noise, and judges it at several steps. A run is one method with one seed; its result is one line
of the results file, and what is there is not run again. Several processes may work on one --out at a time; one that is
killed goes on, when started again, where its run was last judged. A teacher's run comes first, with a seed of its own.

    python examples/benchmarks/convergence.py --study peers --seeds 10 11 12      # see STUDIES
    python examples/benchmarks/convergence.py --method "self teacher_width=48 rows=0.25" --seeds 10
    python examples/benchmarks/convergence.py --guidance 1.25 1.4 --method none     # samples with guidance, afterwards
    python examples/benchmarks/convergence.py --size S --device cuda --study screen
    python examples/benchmarks/convergence.py --report                   # redraw docs/does-it-work.md from the results
"""

from __future__ import annotations

import fcntl
import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.baselines import InternalGuidance
from benchmarks.convergence_methods import SCREEN_SEEDS, STUDIES, TEACHER_SEED, Method, Parts, described_method, parse
from benchmarks.convergence_setting import PROTOCOLS, Protocol, Setting
from benchmarks.recording import append, commit, hardware
from common.data import PACKAGED
from common.options import Mistake, Parser, run_script
from common.paths import denoising_loss, velocity_loss
from common.run_folder import open_run_folder, write_whole
from common.sit import SiT
from common.training import Criterion, Training, TrainSettings, averaged_copy, train

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

    @property
    def end(self) -> int:
        """Its length in steps."""
        return self.protocol.step_at(self.method.share)

    @property
    def ends(self) -> set[int]:
        """Where every measure is taken and weights are kept: where the plain run ends, and where it does itself."""
        return {min(self.protocol.steps, self.end), self.end}

    @property
    def judged_at(self) -> list[int]:
        """The steps at which it is judged: a teacher only at its end."""
        if self.seed >= TEACHER_SEED:
            return [self.end]
        return sorted({step for step in self.protocol.evaluate_at if step < self.end} | self.ends)

    def teacher(self) -> Run | None:
        """The run that comes first."""
        needed = self.method.teacher()
        return None if needed is None else Run(self.protocol, needed[0], self.seed + needed[1])


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
            Mistake: If it was, with other settings.
        """
        found = [line for line in self.lines() if line["kind"] == "run" and line["key"] == run.key]
        protocol = json.loads(json.dumps(asdict(run.protocol)))
        for line in found:
            if line["protocol"] != protocol or described_method(line["method"]) != run.method:
                raise Mistake(
                    f"{self.path} holds {run.key!r} with other settings.\nFound: {line['protocol']}, "
                    f"{line['method']}.\nName another file with --results."
                )
        return bool(found)


def prepared(setting: Setting, run: Run, out: Path) -> tuple[SiT, TrainSettings, Criterion | None, AveragedModel]:
    """What `Training` is made of; the seed decides the initial weights."""
    p, needed = setting.protocol, run.teacher()
    torch.manual_seed(run.seed)
    model = run.method.model(p, setting.device).train()
    ema = averaged_copy(model, p.ema_decay)
    teacher = None if needed is None else needed.weights(out, needed.end)
    criterion = run.method.criterion(Parts(setting, model, ema.module, run.seed, teacher))
    if isinstance(criterion, nn.Module):
        criterion.to(setting.device)
    decay_steps = round(p.cooldown * run.end)
    settings = TrainSettings(run.end, p.lr, p.warmup_steps, decay_steps, ema_decay=p.ema_decay)
    return model, settings, criterion, ema


def even_denoising(model: nn.Module, latents: Tensor, y: Tensor) -> Tensor:
    """The denoising loss at times spread evenly over [0, 1]: every batch has the window's share inside it."""
    n = len(latents)
    t = (torch.randperm(n).to(latents) + 0.5) / n
    return velocity_loss(model, latents, y, t, torch.randn_like(latents))


def counted_operations(setting: Setting, run: Run, out: Path) -> list[tuple[int, int]]:
    """For each part of the run its end and the operations of a step: matrix products, convolutions and attention."""
    counts = []
    batch = next(setting.latents.batches(batch_size=setting.protocol.batch_size, seed=run.seed))
    with torch.random.fork_rng():
        for begin, end in pairwise([0, *run.method.part_ends(run.protocol)]):
            training = Training(*prepared(setting, run, out))
            training.steps = begin
            with sdpa_kernel(SDPBackend.MATH):  # the counter does not see into every fused attention
                for _ in range(WARM_UP):  # uncounted: a teacher's first call also looks what it can leave out
                    training.step(even_denoising, *batch)
                with FlopCounterMode(display=False) as counter:
                    training.step(even_denoising, *batch)
            counts.append((end, counter.get_total_flops()))
    return counts


def described(setting: Setting, argv: list[str]) -> dict[str, Any]:
    """What every line says about where it comes from; the folders of a machine are no part of it."""
    command = " ".join(["python examples/benchmarks/convergence.py", *argv])
    return {
        "command": re.sub(r" --(out|data|results)[ =]\S+", "", command),
        "commit": commit(),
        "hardware": hardware(setting.device),
        "torch": torch.__version__,
        **setting.described(),
    }


def trained(setting: Setting, run: Run, out: Path) -> list[dict[str, Any]]:
    """Train a run, or go on with it; what was measured, by step."""
    folder = run.folder(out)
    state_file = folder / "state.pt"
    resumed = torch.load(state_file, map_location=setting.device, weights_only=True) if state_file.exists() else None
    measures: list[dict[str, Any]] = [] if resumed is None else resumed["measures"]
    model, settings, criterion, ema = prepared(setting, run, out)

    def after_step(training: Training) -> None:
        step, model = training.steps, training.ema.module
        if step not in run.judged_at:
            return
        final = step in run.ends and run.seed < TEACHER_SEED
        measures.append({"step": step, **setting.judged(model, run.seed, final=final)})
        if final and isinstance(criterion, InternalGuidance):
            samples = setting.samples(criterion.guided(model), run.seed)[0]
            measures[-1]["distance_internally_guided"] = setting.distance(samples)
        if step in run.ends:
            weights = {"model": training.model.state_dict(), "ema": model.state_dict()}
            write_whole(run.weights(out, step), partial(torch.save, weights))
        state = {"training": training.state_dict(), "measures": measures}
        write_whole(state_file, partial(torch.save, state))

    torch.manual_seed(run.seed)  # from here on every method draws the same times, noise and dropped labels
    batches = setting.latents.batches(batch_size=run.protocol.batch_size, seed=run.seed)
    train(
        model, batches, denoising_loss, settings, criterion=criterion, ema=ema, after_step=after_step, title=run.key,
        resume=None if resumed is None else resumed["training"],
    )  # fmt: skip
    return measures


def with_teachers(runs: list[Run]) -> list[Run]:
    """The runs, each after the run that teaches it, without repetition."""
    ordered: dict[str, Run] = {}
    for run in runs:
        chain = [run]
        while (needed := chain[-1].teacher()) is not None:
            chain.append(needed)
        ordered |= {link.key: link for link in reversed(chain) if link.key not in ordered}
    return list(ordered.values())


def work(setting: Setting, runs: list[Run], out: Path, results: Results, argv: list[str]) -> None:
    """Do the runs one by one, leaving alone those that another process is at, until all are finished."""
    runs = with_teachers(runs)
    teachers = [needed for run in runs if not results.has(run) and (needed := run.teacher()) is not None]

    def finished(run: Run) -> bool:
        return results.has(run) and (run not in teachers or run.weights(out, run.end).exists())

    def done(run: Run) -> bool:
        needed = run.teacher()
        if needed is not None and not needed.weights(out, needed.end).exists():
            return False
        with locked(run.folder(out) / "lock", wait=False) as alone:
            if alone and not finished(run):
                result = do(setting, run, out, argv)
                if not results.has(run):  # a teacher whose weights were lost is trained anew, but counts once
                    append(results.path, result)
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
        "teacher": None if needed is None else needed.key,
        "measures": trained(setting, run, out),
    }
    last = result["measures"][-1]
    print(f"{run.key}: distance {last['distance']:.2f} after {last['step']:,} steps")
    return result


def sample_with_guidance(
    scales: list[float], setting: Setting, runs: list[Run], out: Path, results: Results, argv: list[str]
) -> None:
    """For each run whose weights are kept, the measures of samples with classifier-free guidance, as a line."""
    lines = [line for line in results.lines() if line["kind"] == "guidance"]
    for run in runs:
        for step in sorted(run.ends):
            weights, key = run.weights(out, step), f"{run.key} | step {step}"
            known = {scale for line in lines if line["key"] == key for scale in line["guided"]}
            missing = [scale for scale in scales if str(scale) not in known]
            if not missing or not weights.exists():
                continue
            model = run.method.model(run.protocol, setting.device).eval()
            model.load_state_dict(torch.load(weights, map_location=setting.device, weights_only=True)["ema"])
            measures = {str(scale): setting.judged_with_guidance(model, run.seed, scale) for scale in missing}
            append(results.path, {
                "kind": "guidance", "key": key, "method": run.method.described(), "seed": run.seed, "step": step,
                **described(setting, argv), "guided": measures,
            })  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Train what is not finished, or sample with guidance, or report."""
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(__doc__)
    parser.add_argument("--size", choices=PROTOCOLS, default="short", help="of model, data and run")
    parser.add_argument("--study", choices=STUDIES, default="screen", help="which methods")
    parser.add_argument("--method", action="append", help="instead: a method with its settings; may be repeated")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SCREEN_SEEDS))
    parser.add_argument(
        "--out", type=Path, default=Path("runs/convergence"), help="folder of weights and prepared data"
    )
    parser.add_argument("--data", type=Path, default=PACKAGED, help="folder of the four Fashion-MNIST files")
    parser.add_argument("--results", type=Path, default=RESULTS, help="results are appended to this file")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--guidance", type=float, nargs="+", help="sample from finished runs, with these scales")
    parser.add_argument("--report", action="store_true", help="redraw the docs from the results; measure nothing")
    args = parser.parse_args(argv)
    results = Results(args.results)
    if args.report:
        from benchmarks.convergence_report import write_page

        write_page(results.lines(), ROOT)
        return

    protocol = PROTOCOLS[args.size]
    methods = [parse(text) for text in args.method or STUDIES[args.study]]
    runs = [Run(protocol, method, seed) for seed in args.seeds for method in methods]
    with locked(args.out.with_name(args.out.name + ".lock"), wait=True):
        open_run_folder(args.out, asdict(protocol))
        setting = Setting(protocol, args.out, args.data, args.device)
    judge = {name: round(value, 3) for name, value in setting.judge.items()}
    print(f"The judge's accuracy, and the distance of real images: {judge}")
    order = partial(sample_with_guidance, args.guidance) if args.guidance else work
    order(setting, runs, args.out, results, argv)


if __name__ == "__main__":
    run_script(main)
