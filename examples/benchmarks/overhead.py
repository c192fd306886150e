"""What the method adds to a training step, beside what counting operations says it must.

Every variant trains the same parameters on the same batches in one process, in turns; a row gives the median step as a
ratio to the step without the method, the same ratio of counted operations, and the quotient of the two.

    python examples/benchmarks/overhead.py                              # CPU: 12 blocks, width 384, 64 tokens
    python examples/benchmarks/overhead.py --size SiT-XL/2 --device cuda --autocast --compile
    python examples/benchmarks/overhead.py --sweep                      # how the cost grows
    python examples/benchmarks/overhead.py --rows                       # what sampling rows adds to the variance
    python examples/benchmarks/overhead.py --report                     # redraw docs/cost.md from the results
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import selftrans_reg as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.paths import interpolate, linear_path
from common.sit import SIZES, SiT

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results" / "overhead.jsonl"
WINDOW = (0.4, 0.7)
WEIGHT = 0.5
WARM_UP = 3
VARIANTS = ("no method", "taps only", "stage 1", "stage 2", "released way", "swapped weights")


@dataclass(frozen=True)
class Shape:
    """The size of one comparison. Depths count blocks, as the paper does."""

    depth: int = 12
    width: int = 384
    heads: int = 6
    tokens_per_side: int = 8
    batch: int = 32
    student: int = 6
    teacher: int = 8
    window: tuple[float, float] = WINDOW

    def model(self) -> SiT:
        """A SiT of this size. Its gates are opened: at the initial zeros attention would see constant input."""
        model = SiT(2 * self.tokens_per_side, 2, 4, self.width, self.depth, self.heads, learn_sigma=False)
        for name, parameter in model.named_parameters():
            if "adaLN" in name or "final_layer" in name:
                nn.init.normal_(parameter, std=0.02)
        return model


def published(name: str, batch: int) -> Shape:
    """The shape of SiT-B/2, SiT-XL/2, ... at 256 tokens with the published layers."""
    depth, width, heads = SIZES[name.removeprefix("SiT-").removesuffix("/2")]
    return Shape(depth, width, heads, 16, batch, depth // 2, 2 * depth // 3)


@dataclass(frozen=True)
class Batch:
    """Noisy latents with times stratified over [0, 1], so that every batch has the window's share inside it."""

    latents: Tensor
    x_t: Tensor
    velocity: Tensor
    t: Tensor
    y: Tensor

    @classmethod
    def draw(cls, shape: Shape, generator: torch.Generator, device: str) -> Batch:
        """The next batch of the generator."""
        n, side = shape.batch, 2 * shape.tokens_per_side
        latents, noise = torch.randn(2, n, 4, side, side, generator=generator).unbind()
        t = (torch.randperm(n, generator=generator) + 0.5) / n
        x_t, velocity = interpolate(linear_path, latents, noise, t)
        y = torch.randint(1000, (n,), generator=generator)
        return cls(*(tensor.to(device) for tensor in (latents, x_t, velocity, t, y)))


class Variant:
    """One way to train: a model that shares the base model's parameters, and what is added to its loss."""

    def __init__(self, name: str, base: nn.Module) -> None:
        self.name = name
        self.model = share(base)
        self.extra: list[nn.Parameter] = []

    def loss(self, denoising: Tensor, batch: Batch) -> Tensor:
        """The loss to call backward on."""
        return denoising


class TapsOnly(Variant):
    """The hooks alone: the record is made and thrown away."""

    def __init__(self, name: str, base: nn.Module, shape: Shape) -> None:
        super().__init__(name, base)
        self.tap = st.FeatureTap(self.model, f"blocks.{shape.student - 1}")

    def loss(self, denoising: Tensor, batch: Batch) -> Tensor:
        """The denoising loss alone."""
        self.tap.discard()
        return denoising


class Ours(Variant):
    """The library's criterion."""

    def __init__(self, name: str, base: nn.Module, make: Callable[[nn.Module], st.SelfTransLoss]) -> None:
        super().__init__(name, base)
        self.criterion = make(self.model)
        self.extra = list(self.criterion.parameters())

    def loss(self, denoising: Tensor, batch: Batch) -> Tensor:
        """Denoising and alignment."""
        return self.criterion(denoising, latents=batch.latents).total


class Plain(Variant):
    """The method written out without the library: every row, guidance from whole batches."""

    def __init__(self, name: str, base: nn.Module, shape: Shape, teacher: nn.Module) -> None:
        super().__init__(name, base)
        self.shape = shape
        self.teacher = teacher
        device = next(base.parameters()).device
        self.head = st.ProjectionHead(shape.width, shape.width, device=device)
        self.extra = list(self.head.parameters())
        self.tokens: dict[int, Tensor] = {}
        for depth in {shape.student, shape.teacher}:
            self.model.blocks[depth - 1].register_forward_hook(self._keep(depth))

    def _keep(self, depth: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            self.tokens[depth] = output

        return hook

    def guided(self, batch: Batch) -> Tensor:
        """f_u + w (f_c − f_u) for every row."""
        raise NotImplementedError

    def loss(self, denoising: Tensor, batch: Batch) -> Tensor:
        """Denoising, and mean(mask) · mean(loss) over every sample."""
        tokens = self.tokens[self.shape.student]
        with torch.no_grad():
            target = self.guided(batch)
        inside = ((batch.t >= WINDOW[0]) & (batch.t <= WINDOW[1])).float().mean()
        return denoising + WEIGHT * inside * F.mse_loss(self.head(tokens).float(), target.float())


class Released(Plain):
    """As the released code: one doubled batch of every row, left after the teacher's block."""

    def guided(self, batch: Batch) -> Tensor:
        """Runs the blocks by hand, as far as the teacher's."""
        x, t = batch.x_t.repeat(2, 1, 1, 1), batch.t.repeat(2)
        y = torch.cat([batch.y, torch.full_like(batch.y, 1000)])
        tokens = self.teacher.x_embedder(x) + self.teacher.pos_embed
        c = self.teacher.t_embedder(t) + self.teacher.y_embedder(y)
        for block in self.teacher.blocks[: self.shape.teacher]:
            tokens = block(tokens, c)
        conditional, unconditional = tokens.chunk(2)
        return unconditional + 30.0 * (conditional - unconditional)


class Swapped(Plain):
    """Teacher weights copied into the live model and back, two whole forwards in between."""

    def guided(self, batch: Batch) -> Tensor:
        """Runs the live model twice with the teacher's weights."""
        live = [p.detach().clone() for p in self.model.parameters()]
        self._copy(self.teacher.parameters())
        self.model.eval()
        features = []
        for y in (batch.y, torch.full_like(batch.y, 1000)):
            self.model(batch.x_t, batch.t, y)
            features.append(self.tokens[self.shape.teacher])
        self.model.train()
        self._copy(iter(live))
        conditional, unconditional = features
        return unconditional + 30.0 * (conditional - unconditional)

    def _copy(self, source: Iterator[Tensor]) -> None:
        for parameter, value in zip(self.model.parameters(), source, strict=True):
            parameter.data.copy_(value)


def share(model: nn.Module) -> nn.Module:
    """A copy of the modules around the same parameters: hooks and compiled code of its own, no memory."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def variants(shape: Shape, base: nn.Module, chosen: set[str], compile_teacher: bool) -> list[Variant]:
    """The ways to compare, those chosen."""
    window = shape.window

    def stage1(model: nn.Module) -> st.SelfTransLoss:
        return st.SelfTransLoss.stage1(
            model, layer="blocks.1", time="repa", latent_channels=4, patch_size=2, window=window
        )

    def stage2(model: nn.Module) -> st.SelfTransLoss:
        teacher = st.build_teacher(
            copy.deepcopy(base),
            None,
            layer=f"blocks.{shape.teacher - 1}",
            guidance_scale=30.0,
            null={"y": 1000},
            compile=compile_teacher,
        )
        return st.SelfTransLoss.stage2(
            model, layer=f"blocks.{shape.student - 1}", teacher=teacher, time="repa", window=window
        )

    def whole_teacher() -> nn.Module:
        return copy.deepcopy(base).eval().requires_grad_(False)

    makers: dict[str, Callable[[str], Variant]] = {
        "no method": lambda name: Variant(name, base),
        "taps only": lambda name: TapsOnly(name, base, shape),
        "stage 1": lambda name: Ours(name, base, stage1),
        "stage 2": lambda name: Ours(name, base, stage2),
        "released way": lambda name: Released(name, base, shape, whole_teacher()),
        "swapped weights": lambda name: Swapped(name, base, shape, whole_teacher()),
    }
    return [make(name) for name, make in makers.items() if name in chosen]


class Bench:
    """The variants of one shape, ready to be stepped."""

    def __init__(self, shape: Shape, args: argparse.Namespace, chosen: set[str]) -> None:
        torch.manual_seed(0)
        self.shape = shape
        self.device = args.device
        self.autocast = args.autocast
        base = shape.model().to(args.device)
        base.train()
        self.variants = variants(shape, base, chosen, args.compile)
        if args.compile:
            for variant in self.variants:
                variant.model.compile()
        self.optimizers = {
            v.name: torch.optim.AdamW([*base.parameters(), *v.extra], lr=1e-5, weight_decay=0.0) for v in self.variants
        }

    def step(self, variant: Variant, batch: Batch) -> None:
        """One training step as published: forward, backward, clip, AdamW."""
        autocast = torch.autocast(self.device, torch.bfloat16) if self.autocast else nullcontext()
        with autocast:
            denoising = F.mse_loss(variant.model(batch.x_t, batch.t, batch.y).float(), batch.velocity)
            loss = variant.loss(denoising, batch)
        optimizer = self.optimizers[variant.name]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"] if p.requires_grad], 1.0)
        optimizer.step()

    def count(self, variant: Variant, batch: Batch) -> int:
        """Operations of one step: matrix products and attention, forward and backward."""
        # The counter sees neither into compiled code nor into every device's fused attention.
        eager, plain = torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH)
        with eager, plain:
            self.step(variant, batch)  # uncounted: a teacher's first call also looks for what it never runs
            with FlopCounterMode(display=False) as counter:
                self.step(variant, batch)
        return counter.get_total_flops()

    def measure(self, repeats: int, title: str) -> dict[str, dict[str, float]]:
        """Median seconds, counted operations and peak memory of each variant, from interleaved repeats."""
        generator = torch.Generator().manual_seed(0)
        counting = Batch.draw(self.shape, generator, self.device)
        found: dict[str, dict[str, float]] = {v.name: {"operations": self.count(v, counting)} for v in self.variants}
        seconds: dict[str, list[float]] = {v.name: [] for v in self.variants}
        for repeat in tqdm(range(-WARM_UP, repeats), desc=title, disable=None):
            batch = Batch.draw(self.shape, generator, self.device)
            shift = repeat % len(self.variants)  # nobody is always first
            for variant in self.variants[shift:] + self.variants[:shift]:
                if self.device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                    torch.cuda.synchronize()
                start = time.perf_counter()
                self.step(variant, batch)
                if self.device == "cuda":
                    torch.cuda.synchronize()
                    found[variant.name]["peak_bytes"] = torch.cuda.max_memory_allocated()
                if repeat >= 0:
                    seconds[variant.name].append(time.perf_counter() - start)
        for name, values in seconds.items():
            found[name]["seconds"] = statistics.median(values)
        return found


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


def hardware(device: str) -> str:
    """What the numbers were taken on, in words."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    model = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return f"{model[0] if model else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def commit() -> str:
    """The commit that the numbers belong to, marked if the working tree differs from it."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return described.stdout.strip() or "unknown"


def run(name: str, shape: Shape, args: argparse.Namespace, chosen: set[str]) -> dict[str, Any]:
    """Measure one shape and append the result to the results file."""
    bench = Bench(shape, args, chosen)
    result = {
        "name": name,
        "shape": asdict(shape),
        "hardware": hardware(args.device),
        "torch": torch.__version__,
        "autocast": args.autocast,
        "compiled": args.compile,
        "command": "python examples/benchmarks/overhead.py " + " ".join(sys.argv[1:]),
        "commit": commit(),
        "repeats": args.repeats,
        "parameters": teacher_size(shape),
        "variants": bench.measure(args.repeats, name),
    }
    append(args.results, result)
    return result


def append(path: Path, result: dict[str, Any]) -> None:
    """Add one result to the results file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(result) + "\n")


def ratios(result: dict[str, Any]) -> list[tuple[str, float, float, float]]:
    """(variant, measured ratio, counted ratio, measured over counted) of one result."""
    found = result["variants"]
    base = found["no method"]
    rows = []
    for name, values in found.items():
        measured, counted = values["seconds"] / base["seconds"], values["operations"] / base["operations"]
        rows.append((name, measured, counted, measured / counted))
    return rows


def table(result: dict[str, Any]) -> str:
    """One result as a Markdown table."""
    memory = "peak_bytes" in result["variants"]["no method"]
    lines = ["| step | measured | counted | measured / counted |" + (" peak memory |" if memory else "")]
    lines.append("|---|---|---|---|" + ("---|" if memory else ""))
    for name, measured, counted, quotient in ratios(result):
        row = f"| {name} | {measured:.2f} | {counted:.2f} | {quotient:.2f} |"
        if memory:
            row += f" {result['variants'][name]['peak_bytes'] / 2**30:.1f} GiB |"
        lines.append(row)
    return "\n".join(lines)


def describe(result: dict[str, Any]) -> str:
    """One result with what a reader needs to take it again."""
    shape, size = result["shape"], result["parameters"]
    base = result["variants"]["no method"]["seconds"]
    return (
        f"**{result['name']}**: {shape['depth']} blocks, width {shape['width']}, {shape['tokens_per_side'] ** 2} "
        "tokens, "
        f"batch {shape['batch']}, student layer {shape['student']}, teacher layer {shape['teacher']}; "
        f"{'bfloat16 autocast' if result['autocast'] else 'float32'}{', compiled' if result['compiled'] else ''}. "
        f"{result['hardware']}, PyTorch {result['torch']}, commit {result['commit']}, {result['repeats']} repeats, "
        f"{base * 1000:.0f} ms a step without the method. The truncated teacher keeps "
        f"{size['teacher'] / size['model']:.2f} of the model's parameters.\n\n"
        f"```bash\n{result['command']}\n```\n\n{table(result)}\n"
    )


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
    inside = ((batch.t >= WINDOW[0]) & (batch.t <= WINDOW[1])).nonzero().squeeze(1)

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
            "name": "teacher_rows",
            "rows": k,
            "inside": n,
            "measured": float(torch.stack(errors).mean() / full.square().sum()),
            "formula": float((n - k) / (k * (n - 1)) * spread / full.square().sum()),
            "repeats": args.repeats,
            "command": "python examples/benchmarks/overhead.py " + " ".join(sys.argv[1:]),
            "commit": commit(),
        }
        append(args.results, result)


def row_table(results: list[dict[str, Any]]) -> str:
    """The variance that sampling rows adds, as a Markdown table."""
    lines = ["| rows of those inside | measured | formula |", "|---|---|---|"]
    lines += [f"| {r['rows']} of {r['inside']} | {r['measured']:.3f} | {r['formula']:.3f} |" for r in results]
    first = results[0]
    return (
        "Mean squared distance of the alignment's gradient from that of all rows inside, over the squared norm of the "
        f"latter; {first['repeats']} draws, a model at its start, commit {first['commit']}:\n\n"
        f"```bash\n{first['command']}\n```\n\n" + "\n".join(lines) + "\n"
    )


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """The sweep as a picture: measured and counted ratio along each axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    axes: dict[str, Callable[[dict[str, Any]], float]] = {
        "depth": lambda shape: shape["depth"],
        "tokens": lambda shape: shape["tokens_per_side"] ** 2,
        "batch": lambda shape: shape["batch"],
        "window": lambda shape: shape["window"][1] - shape["window"][0],
    }
    labels = {"depth": "blocks", "tokens": "tokens", "batch": "batch", "window": "width of the window"}
    figure, panels = plt.subplots(1, 4, figsize=(13, 3.2), sharey=True, layout="constrained")
    for panel, (axis, value) in zip(panels, axes.items(), strict=True):
        rows = [(value(r["shape"]), *ratios(r)[1][1:3]) for r in results if r["name"] == f"sweep {axis}"]
        x, measured, counted = zip(*sorted(rows), strict=True)
        panel.plot(x, counted, "--", color="0.5", label="counted")
        panel.plot(x, measured, "o-", color="tab:blue", label="measured")
        panel.set_xlabel(labels[axis])
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("stage 2 step / step without")
    panels[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def report(results_file: Path) -> None:
    """Write the latest result of each kind into docs/cost.md, and draw the sweep."""
    latest: dict[str, dict[str, Any]] = {}
    for line in results_file.read_text().splitlines():
        result = json.loads(line)
        kind = [result.get(key) for key in ("name", "shape", "rows", "compiled", "hardware")]
        latest[json.dumps(kind)] = result
    found = list(latest.values())
    rows = [r for r in found if r["name"] == "teacher_rows"]
    sweeps = [r for r in found if r["name"].startswith("sweep")]
    steps = [r for r in found if r not in rows and r not in sweeps]
    page = ROOT / "docs" / "cost.md"
    text = between(page.read_text(), "overhead", "\n".join(describe(r) for r in steps))
    page.write_text(between(text, "rows", row_table(rows)))
    draw(sweeps, ROOT / "docs" / "images" / "overhead.png")


def between(text: str, name: str, content: str) -> str:
    """``text`` with ``content`` between its marks ``<!-- name: begin -->`` and ``<!-- name: end -->``."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n\n{content}\n{end}{rest.partition(end)[2]}"


def main(argv: list[str] | None = None) -> None:
    """Measure, or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = ["cpu", "tiny", *(f"SiT-{size}/2" for size in SIZES)]
    parser.add_argument("--size", choices=sizes, default="cpu", help="what to measure (default: cpu)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--autocast", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--compile", action="store_true", help="compile the model in place, and the teacher's blocks")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--sweep", action="store_true", help="how the cost grows with depth, tokens, batch and window")
    parser.add_argument("--rows", action="store_true", help="the variance that teacher_rows adds")
    parser.add_argument("--results", type=Path, default=RESULTS, help="results are appended to this file")
    parser.add_argument("--report", action="store_true", help="redraw the docs from the results, measure nothing")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.report:
        report(args.results)
    elif args.sweep:
        sweep(args)
    elif args.rows:
        row_sampling(args)
    else:
        tiny = Shape(3, 32, 2, 4, 8, 2, 2)
        shape = {"cpu": Shape(batch=args.batch), "tiny": tiny}.get(args.size) or published(args.size, args.batch)
        print(describe(run(args.size, shape, args, set(VARIANTS))))


if __name__ == "__main__":
    main()
