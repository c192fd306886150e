"""The benchmark of a step's cost: what it compares is the same computation, and what the docs say is what it found."""

import argparse
import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from benchmarks import overhead, overhead_report
from benchmarks.overhead_variants import VARIANTS, Batch, Shape
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

ROOT = Path(__file__).resolve().parents[2]
TINY = Shape(3, 32, 2, 4, 8, 2, 2)


def new_bench(*, compiled: bool = False) -> overhead.Bench:
    settings = argparse.Namespace(device="cpu", autocast=False, compile=compiled)
    return overhead.Bench(TINY, settings, set(VARIANTS))


@pytest.fixture
def bench() -> overhead.Bench:
    return new_bench()


@pytest.fixture
def tiny_batch(generator: torch.Generator) -> Batch:
    return Batch.draw(TINY, generator, "cpu")


@pytest.mark.parametrize("autocast", [False, True])
def test_written_out_ways_and_library_regress_the_same_features(
    bench: overhead.Bench, tiny_batch: Batch, autocast: bool
) -> None:
    by_name = {variant.name: variant for variant in bench.variants}
    b = tiny_batch
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with torch.no_grad():
            expected = by_name["stage 2"].criterion.teacher(b.x_t, b.t, b.y)
        for name in ("released way", "swapped weights"):
            by_name[name].model(b.x_t, b.t, b.y)  # autocast keeps the student's weights in half precision
            with torch.no_grad():
                torch.testing.assert_close(by_name[name].guided(b), expected, rtol=1e-4, atol=1e-4)


def test_every_variant_counts_its_operations(bench: overhead.Bench, tiny_batch: Batch) -> None:
    counts = {variant.name: bench.count(variant, tiny_batch) for variant in bench.variants}
    assert counts["taps only"] == counts["no method"]
    assert counts["rows known"] == counts["stage 2"]
    # Swapping runs two whole forwards, the released way two up to the teacher's layer; both project every row.
    assert counts["no method"] < counts["stage 2"] < counts["released way"] < counts["swapped weights"]
    rows = len(tiny_batch.inside)
    head = 2 * 16 * (32 * 2048 + 2048 * 2048 + 2048 * 32)  # multiply-adds of one row's forward
    teacher = (counts["released way"] - counts["no method"]) / TINY.batch - 3 * head  # of one row, doubled
    assert counts["stage 2"] - counts["no method"] == pytest.approx(rows * (3 * head + teacher), rel=1e-3)


def first_gradients(bench: overhead.Bench, batch: Batch) -> dict[str, dict[str, Tensor]]:
    """Of the model's parameters, by variant."""
    found = {}
    for variant in bench.variants:
        torch.manual_seed(0)  # the same labels are dropped
        bench.gradients(variant, batch)
        found[variant.name] = {name: p.grad for name, p in variant.model.named_parameters() if p.grad is not None}
    return found


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_every_variant_runs_compiled(tiny_batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their models are of one class, so their graphs lie in one place: each variant has to get its own."""
    wanted = first_gradients(new_bench(), tiny_batch)
    graphs = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=graphs))
    torch._dynamo.reset()
    changed = ("skip_nnmodule_hook_guards", "recompile_limit", "fail_on_recompile_limit_hit")
    with torch._dynamo.config.patch({name: getattr(torch._dynamo.config, name) for name in changed}):
        bench = new_bench(compiled=True)
        operations = {variant.name: bench.count(variant, tiny_batch) for variant in bench.variants}
        assert graphs.frame_count == 0  # operations are counted in eager code
        found = [first_gradients(bench, tiny_batch) for _ in range(2)]
    assert graphs.frame_count > len({"no method", "stage 1", "stage 2", "the teacher's blocks"})
    for name, gradients in wanted.items():
        for key, gradient in gradients.items():
            torch.testing.assert_close(found[1][name][key], gradient, rtol=1e-4, atol=1e-6)
    assert operations["stage 2"] == new_bench().count(bench.variants[3], tiny_batch)  # without the padding


def test_peak_memory_counts_what_a_step_allocates(bench: overhead.Bench, tiny_batch: Batch) -> None:
    variant = bench.variants[0]
    bench.step(variant, tiny_batch)  # the optimiser's state is there from now on
    small = bench.peak_bytes(variant, tiny_batch)
    sizes = [t.numel() for p in variant.model.parameters() for t in (p, *bench.optimizer.state[p].values())]
    assert bench.held(variant) == 4 * sum(sizes)
    trainable = sum(p.numel() for p in variant.model.parameters() if p.requires_grad)
    assert small > bench.held(variant) + 4 * trainable  # the gradients, and more
    large = 2**26  # far above what so small a step needs
    variant.loss = lambda denoising, batch: denoising + torch.zeros(large, dtype=torch.uint8)[0]
    assert bench.held(variant) + large < bench.peak_bytes(variant, tiny_batch) < small + large


def test_one_run_is_recorded_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results.jsonl"
    overhead.main(["--size", "tiny", "--repeats", "1", "--results", str(results)])
    (line,) = results.read_text().splitlines()
    found = json.loads(line)
    assert list(found["variants"]) == list(VARIANTS)
    seconds = {name: values["seconds"] for name, values in found["variants"].items()}
    assert all(value > 0 for value in seconds.values())
    assert found["tap_seconds"] > 0
    assert found["parameters"]["teacher"] < found["parameters"]["model"]
    printed = capsys.readouterr().out
    for name, measured, counted, quotient in overhead_report.ratios(found):
        assert measured == pytest.approx(seconds[name] / seconds["no method"])  # of one batch alone
        assert f"| {name} | {measured:.2f} | {counted:.2f} | {quotient:.2f} |" in printed
        assert measured / counted == pytest.approx(quotient)


def test_docs_say_what_the_results_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "cost.md", tmp_path / "docs")
    monkeypatch.setattr(overhead_report, "ROOT", tmp_path)
    overhead_report.report(overhead_report.RESULTS)
    assert (tmp_path / "docs" / "cost.md").read_text() == (ROOT / "docs" / "cost.md").read_text()
    assert (tmp_path / "docs" / "images" / "overhead.png").stat().st_size > 10_000
