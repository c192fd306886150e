"""The benchmark of a step's cost: what it compares is the same computation, and what the docs say is what it found."""

import argparse
import json
import shutil
from pathlib import Path

import pytest
import torch
from benchmarks import overhead, overhead_report
from benchmarks.overhead_variants import VARIANTS, Batch, Shape

ROOT = Path(__file__).resolve().parents[1]
TINY = Shape(3, 32, 2, 4, 8, 2, 2)


@pytest.fixture
def bench() -> overhead.Bench:
    settings = argparse.Namespace(device="cpu", autocast=False, compile=False)
    return overhead.Bench(TINY, settings, set(VARIANTS))


@pytest.fixture
def tiny_batch(generator: torch.Generator) -> Batch:
    return Batch.draw(TINY, generator, "cpu")


def test_written_out_ways_and_library_regress_the_same_features(bench: overhead.Bench, tiny_batch: Batch) -> None:
    by_name = {variant.name: variant for variant in bench.variants}
    b = tiny_batch
    for name in ("released way", "swapped weights"):
        by_name[name].model(b.x_t, b.t, b.y)
    teacher = by_name["stage 2"].criterion.teacher
    with torch.no_grad():
        expected = teacher(b.x_t, b.t, b.y)
        released = by_name["released way"].guided(b)
        swapped = by_name["swapped weights"].guided(b)
    torch.testing.assert_close(released, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(swapped, expected, rtol=1e-4, atol=1e-4)


def test_variants_share_one_set_of_parameters(bench: overhead.Bench) -> None:
    first, *others = [list(variant.model.parameters()) for variant in bench.variants]
    for other in others:
        assert all(a is b for a, b in zip(first, other, strict=True))


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


def test_batches_hold_the_windows_share(tiny_batch: Batch) -> None:
    assert sorted(tiny_batch.t.tolist()) == pytest.approx([(i + 0.5) / 8 for i in range(8)])
    assert tiny_batch.inside.tolist() == [i for i, t in enumerate(tiny_batch.t.tolist()) if 0.4 <= t <= 0.7]


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
