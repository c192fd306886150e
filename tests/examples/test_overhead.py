"""The benchmark of a step's cost: what it compares is the same computation, and what the docs say is what it found."""

import argparse
import json
import shutil
from pathlib import Path

import pytest
import torch
from benchmarks import overhead, overhead_report
from benchmarks.overhead_variants import VARIANTS, Batch, Shape

ROOT = Path(__file__).resolve().parents[2]
TINY = Shape(3, 32, 2, 4, 8, 2, 2)


@pytest.fixture
def bench() -> overhead.Bench:
    return overhead.Bench(TINY, argparse.Namespace(device="cpu", autocast=False, compile=False), set(VARIANTS))


@pytest.mark.parametrize("autocast", [False, True])
def test_written_out_ways_and_library_regress_the_same_features(
    bench: overhead.Bench, generator: torch.Generator, autocast: bool
) -> None:
    by_name, b = {variant.name: variant for variant in bench.variants}, Batch.draw(TINY, generator, "cpu")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with torch.no_grad():
            expected = by_name["stage 2"].criterion.teacher(b.x_t, b.t, b.y)
        for name in ("released way", "swapped weights"):
            by_name[name].model(b.x_t, b.t, b.y)  # autocast keeps the student's weights in half precision
            with torch.no_grad():
                torch.testing.assert_close(by_name[name].guided(b), expected, rtol=1e-4, atol=1e-4)


def test_every_variant_counts_its_operations(bench: overhead.Bench, generator: torch.Generator) -> None:
    batch = Batch.draw(TINY, generator, "cpu")
    counts = {variant.name: bench.count(variant, batch) for variant in bench.variants}
    assert counts["taps only"] == counts["no method"]
    assert counts["rows known"] == counts["stage 2"]
    # Swapping runs two whole forwards, the released way two up to the teacher's layer; both project every row.
    assert counts["no method"] < counts["stage 2"] < counts["released way"] < counts["swapped weights"]
    head = 2 * 16 * (32 * 2048 + 2048 * 2048 + 2048 * 32)  # multiply-adds of one row's forward
    teacher = (counts["released way"] - counts["no method"]) / TINY.batch - 3 * head  # of one row, doubled
    expected = len(batch.inside) * (3 * head + teacher)
    assert counts["stage 2"] - counts["no method"] == pytest.approx(expected, rel=1e-3)


def test_peak_memory_counts_what_a_step_allocates(bench: overhead.Bench, generator: torch.Generator) -> None:
    variant, batch = bench.variants[0], Batch.draw(TINY, generator, "cpu")
    bench.step(variant, batch)  # the optimiser's state is there from now on
    small = bench.peak_bytes(variant, batch)
    sizes = [t.numel() for p in variant.model.parameters() for t in (p, *bench.optimizer.state[p].values())]
    assert bench.held(variant) == 4 * sum(sizes)
    trainable = sum(p.numel() for p in variant.model.parameters() if p.requires_grad)
    assert small > bench.held(variant) + 4 * trainable  # the gradients, and more
    large = 2**26  # far above what so small a step needs
    variant.loss = lambda denoising, batch: denoising + torch.zeros(large, dtype=torch.uint8)[0]
    assert bench.held(variant) + large < bench.peak_bytes(variant, batch) < small + large


def test_one_run_is_recorded_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overhead.main(["--size", "tiny", "--repeats", "1", "--results", str(tmp_path / "results.jsonl")])
    found, printed = json.loads((tmp_path / "results.jsonl").read_text()), capsys.readouterr().out
    seconds = {name: values["seconds"] for name, values in found["variants"].items()}
    assert list(seconds) == list(VARIANTS)
    assert min(found["tap_seconds"], *seconds.values()) > 0
    assert found["parameters"]["teacher"] < found["parameters"]["model"]
    for name, measured, counted, quotient in overhead_report.ratios(found):
        assert measured == pytest.approx(seconds[name] / seconds["no method"])  # of one batch alone
        assert f"| {name} | {measured:.2f} | {counted:.2f} | {quotient:.2f} |" in printed
        assert measured / counted == pytest.approx(quotient)


def test_docs_say_what_the_results_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path("docs", "cost.md")
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / page, tmp_path / page)
    monkeypatch.setattr(overhead_report, "ROOT", tmp_path)
    overhead_report.report(overhead_report.RESULTS)
    assert (tmp_path / page).read_text() == (ROOT / page).read_text()
    assert (tmp_path / "docs" / "images" / "overhead.png").stat().st_size > 10_000
