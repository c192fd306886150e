"""What the method adds to a training step, beside what counting operations says it must.

Every variant trains the same parameters on the same batches in one process, in turns; a row gives the median over the
batches of a step's time over that of the step without the method, the same ratio of counted operations, and the
quotient of the two.

    python examples/benchmarks/overhead.py                              # CPU: 12 blocks, width 384, 64 tokens
    python examples/benchmarks/overhead.py --size SiT-XL/2 --device cuda --autocast --compile
    python examples/benchmarks/overhead.py --count --batch 10           # operations at the published sizes, untimed
    python examples/benchmarks/overhead.py --sweep                      # how the cost grows
    python examples/benchmarks/overhead.py --rows                       # what sampling rows adds to the variance
    python examples/benchmarks/overhead.py --report                     # redraw docs/cost.md from the results
"""

from __future__ import annotations

import argparse
import copy
import itertools
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import selftrans_reg as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.overhead_report import COUNTED, RESULTS, describe, report
from benchmarks.overhead_variants import VARIANTS, Batch, Shape, Variant, published, variants
from benchmarks.recording import append, commit, hardware
from common.sit import SIZES

WARM_UP = 3


class Bench:
    """The variants of one shape, ready to be stepped."""

    def __init__(self, shape: Shape, args: argparse.Namespace, chosen: set[str]) -> None:
        torch.manual_seed(0)
        self.shape = shape
        self.device = args.device
        self.autocast = args.autocast
        # A step on a GPU begins while the one before is still running, and it is for that one that a loss may have to
        # wait. On a CPU one step ends before the next begins.
        self.in_a_row = 8 if args.device == "cuda" else 1
        base = shape.model().to(args.device)
        base.train()
        self.variants = variants(shape, base, chosen, args.compile)
        if args.compile:
            # The variants' models are of one class, so PyTorch keeps their code in one place: it must tell those with
            # hooks from those without, and make room for all of them.
            torch._dynamo.config.skip_nnmodule_hook_guards = False
            torch._dynamo.config.recompile_limit = 8 * len(self.variants)
            torch._dynamo.config.fail_on_recompile_limit_hit = True  # or a variant would be timed uncompiled
            for variant in self.variants:
                variant.model.compile()
        # The parameters have one optimiser, as they are the same in all variants; every head has its own.
        self.optimizer = new_optimizer(base.parameters())
        self.heads = {v.name: [new_optimizer(v.extra)] if v.extra else [] for v in self.variants}

    def gradients(self, variant: Variant, batch: Batch) -> None:
        """Forward and backward."""
        autocast = torch.autocast(self.device, torch.bfloat16) if self.autocast else nullcontext()
        with autocast:
            denoising = F.mse_loss(variant.model(batch.x_t, batch.t, batch.y).float(), batch.velocity)
            loss = variant.loss(denoising, batch)
        self.zero_grad(variant)
        loss.backward()

    def step(self, variant: Variant, batch: Batch) -> None:
        """One training step as published: forward, backward, clip, AdamW."""
        self.gradients(variant, batch)
        nn.utils.clip_grad_norm_([p for p in (*variant.model.parameters(), *variant.extra) if p.requires_grad], 1.0)
        for optimizer in (self.optimizer, *self.heads[variant.name]):
            optimizer.step()

    def zero_grad(self, variant: Variant) -> None:
        """Forget the gradients, also those that another variant left at the model."""
        for optimizer in (self.optimizer, *self.heads[variant.name]):
            optimizer.zero_grad()

    def count(self, variant: Variant, batch: Batch) -> int:
        """Operations of one step: matrix products and attention, forward and backward."""
        # The counter sees neither into compiled code nor into every device's fused attention; and rows that a compiled
        # teacher's batch is padded with are none that the method needs.
        eager, plain = torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH)
        with eager, plain, patch("selftrans_reg.teacher.pad_rows", lambda tensor: tensor):
            self.gradients(variant, batch)  # uncounted: a teacher's first call also looks for what it never runs
            with FlopCounterMode(display=False) as counter:
                self.gradients(variant, batch)
        return counter.get_total_flops()

    def measure(self, repeats: int, title: str) -> dict[str, dict[str, float]]:
        """Time, counted operations and peak memory of each variant, from interleaved repeats.

        ``ratio`` is the median over the batches of a step's time over that of the first variant on the same batch.
        """
        generator = torch.Generator().manual_seed(0)
        counting = Batch.draw(self.shape, generator, self.device)
        found: dict[str, dict[str, float]] = {v.name: {"operations": self.count(v, counting)} for v in self.variants}
        seconds: dict[str, list[float]] = {v.name: [] for v in self.variants}
        order = random.Random(0)
        for repeat in tqdm(range(-WARM_UP, repeats), desc=title, disable=None):
            batch = Batch.draw(self.shape, generator, self.device)
            for variant in order.sample(self.variants, len(self.variants)):  # nobody is always behind the same one
                self.zero_grad(variant)  # the gradients are the step's, not the one's before
                self.wait()
                start = time.perf_counter()
                for _ in range(self.in_a_row):
                    self.step(variant, batch)
                self.wait()
                if repeat >= 0:
                    seconds[variant.name].append((time.perf_counter() - start) / self.in_a_row)
        base = seconds[self.variants[0].name]
        for variant in self.variants:
            values = seconds[variant.name]
            found[variant.name] |= {
                "seconds": statistics.median(values),
                "ratio": statistics.median(own / other for own, other in zip(values, base, strict=True)),
                "peak_bytes": self.peak_bytes(variant, batch),
            }
        return found

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def peak_bytes(self, variant: Variant, batch: Batch) -> int:
        """The most memory that a variant holds within a step; what the others hold is no part of it."""
        self.zero_grad(variant)
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.step(variant, batch)
            return torch.cuda.max_memory_allocated() - before + self.held(variant)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            self.step(variant, batch)
        changes = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        changes.sort(key=lambda event: event.start_ns())
        return max(itertools.accumulate(event.nbytes() for event in changes)) + self.held(variant)

    def held(self, variant: Variant) -> int:
        """Bytes that a variant holds between two steps: model, head, teacher, the optimisers' state."""
        optimizers = (self.optimizer, *self.heads[variant.name])
        state = [t for optimizer in optimizers for values in optimizer.state.values() for t in values.values()]
        teacher = [] if variant.teacher is None else variant.teacher.parameters()
        return sum(t.nbytes for t in (*variant.model.parameters(), *variant.extra, *teacher, *state))


def new_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW with the published settings, but for steps that are too small to lead the variants anywhere."""
    return torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0)


def teacher_size(shape: Shape) -> dict[str, int]:
    """Parameters of the whole model and of what a truncated teacher keeps of it."""
    model = shape.model()
    whole = sum(p.numel() for p in model.parameters())
    batch = Batch.draw(shape, torch.Generator().manual_seed(0), "cpu")
    teacher = st.build_teacher(
        model,
        None,
        layer=f"blocks.{shape.teacher - 1}",
        guidance_scale=30.0,
        null={"y": 1000},
        example=(batch.x_t[:2], batch.t[:2], batch.y[:2]),
    )
    return {"model": whole, "teacher": sum(p.numel() for p in teacher.parameters())}


def tap_seconds(calls: int = 5000) -> float:
    """What a tap adds to one call of a model, by itself: next to a step it is lost in the noise."""
    model, x = nn.Sequential(nn.Identity()), torch.zeros(2, 16, 4, requires_grad=True)

    def seconds(after: Callable[[], object]) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            model(x)
            after()
        return (time.perf_counter() - start) / calls

    untapped = seconds(lambda: None)
    with st.FeatureTap(model, "0") as tap:
        return seconds(tap.pop) - untapped


def run(name: str, shape: Shape, args: argparse.Namespace, chosen: set[str]) -> dict[str, Any]:
    """Measure one shape and append the result to the results file."""
    bench = Bench(shape, args, chosen)
    result = {
        **described(name),
        "shape": asdict(shape),
        "hardware": hardware(args.device),
        "torch": torch.__version__,
        "autocast": args.autocast,
        "compiled": args.compile,
        "repeats": args.repeats,
        "parameters": teacher_size(shape),
        "tap_seconds": tap_seconds(),
        "variants": bench.measure(args.repeats, name),
    }
    append(args.results, result)
    return result


def count(args: argparse.Namespace) -> None:
    """Operations at the published sizes, 256 tokens: exact on any machine, and nothing is timed."""
    for size in SIZES:
        shape = published(size, args.batch)
        batch = Batch.draw(shape, torch.Generator().manual_seed(0), args.device)
        operations = {}
        for name in tqdm(COUNTED, desc=f"SiT-{size}/2", disable=None):
            bench = Bench(shape, args, {name})  # one at a time: four of the largest take more memory than most have
            operations[name] = {"operations": bench.count(bench.variants[0], batch)}
        result = {**described(f"counted SiT-{size}/2"), "shape": asdict(shape), "variants": operations}
        append(args.results, result)


def sweep(args: argparse.Namespace) -> None:
    """How stage 2's cost grows with depth, tokens, batch and window, one axis at a time."""
    axes: dict[str, list[Shape]] = {
        "depth": [Shape(d, 192, 3, 8, 16, d // 2, 2 * d // 3) for d in (6, 12, 18, 24)],
        "tokens": [Shape(12, 192, 3, side, 16) for side in (4, 8, 12, 16)],
        "batch": [Shape(12, 192, 3, 8, batch) for batch in (4, 8, 16, 32, 64)],
        "window": [
            Shape(12, 192, 3, 8, 16, window=(0.5 - half, 0.5 + half)) for half in (0.0625, 0.125, 0.25, 0.375, 0.5)
        ],
    }
    for axis, shapes in axes.items():
        for shape in shapes:
            run(f"sweep {axis}", shape, args, {"no method", "stage 2"})


def row_sampling(args: argparse.Namespace) -> None:
    """What ``teacher_rows`` adds to the variance of the alignment's gradient, measured and by the formula.

    k of n rows, drawn without replacement, give a gradient whose mean squared distance from that of all n rows is
    (n − k) / (k (n − 1)) times the mean squared distance of one row's gradient from their average.
    """
    shape = Shape(depth=6, width=192, heads=3, batch=64, student=3, teacher=4)
    bench = Bench(shape, args, {"no method"})
    model = bench.variants[0].model
    batch = Batch.draw(shape, torch.Generator().manual_seed(0), args.device)
    teacher = st.build_teacher(copy.deepcopy(model), None, layer="blocks.3", guidance_scale=30.0, null={"y": 1000})
    inside = batch.inside.to(args.device)

    def gradient(criterion: st.SelfTransLoss, rows: Tensor) -> Tensor:
        """The alignment's gradient at the model's parameters, for some rows of the batch."""
        model.zero_grad()
        model(batch.x_t[rows], batch.t[rows], batch.y[rows])
        criterion(torch.zeros((), device=args.device)).total.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    def criterion(**settings: Any) -> st.SelfTransLoss:
        return st.SelfTransLoss.stage2(model, layer="blocks.2", teacher=teacher, time="repa", **settings)

    n = len(inside)
    model.y_embedder.dropout_prob = 0.0  # a row's gradient then does not depend on the forward that it is in
    with criterion() as whole:
        full = gradient(whole, inside)
        spread = torch.stack([(gradient(whole, inside[i : i + 1]) - full).square().sum() for i in range(n)]).mean()
    for k in sorted({1, n // 4, n // 2, 3 * n // 4}):
        with criterion(teacher_rows=k) as some:
            errors = [(gradient(some, inside) - full).square().sum() for _ in range(args.repeats)]
        result = {
            **described("teacher_rows"),
            "rows": k,
            "inside": n,
            "measured": float(torch.stack(errors).mean() / full.square().sum()),
            "formula": float((n - k) / (k * (n - 1)) * spread / full.square().sum()),
            "repeats": args.repeats,
        }
        append(args.results, result)


def described(name: str) -> dict[str, Any]:
    """What every result says about where it comes from."""
    command = "python examples/benchmarks/overhead.py " + shlex.join(sys.argv[1:])
    return {"name": name, "command": command, "commit": commit()}


def main(argv: list[str] | None = None) -> None:
    """Measure, or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = ["cpu", "tiny", *(f"SiT-{size}/2" for size in SIZES)]
    parser.add_argument("--size", choices=sizes, default="cpu", help="what to measure (default: cpu)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--autocast", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--compile", action="store_true", help="compile the model in place, and the teacher's blocks")
    parser.add_argument("--variants", choices=VARIANTS[1:], nargs="+", default=VARIANTS[1:], help="beside no method")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--count", action="store_true", help="count operations at the published sizes, time nothing")
    parser.add_argument("--sweep", action="store_true", help="how the cost grows with depth, tokens, batch and window")
    parser.add_argument("--rows", action="store_true", help="the variance that teacher_rows adds")
    parser.add_argument("--results", type=Path, default=RESULTS, help="results are appended to this file")
    parser.add_argument("--report", action="store_true", help="redraw the docs from the results, measure nothing")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.report:
        report(args.results)
    elif args.count:
        count(args)
    elif args.sweep:
        sweep(args)
    elif args.rows:
        row_sampling(args)
    else:
        tiny = Shape(3, 32, 2, 4, 8, 2, 2)
        shape = {"cpu": Shape(batch=args.batch), "tiny": tiny}.get(args.size) or published(args.size, args.batch)
        print(describe(run(args.size, shape, args, {"no method", *args.variants})))


if __name__ == "__main__":
    main()
