"""The convergence study at a tiny size: pairing, price, resuming, sharing the work, and what the docs say of it."""

import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import convergence
from benchmarks.convergence import Results, Run, Setting
from benchmarks.convergence_methods import parse
from benchmarks.convergence_report import (
    MEASURES,
    Study,
    best_guidance_table,
    crossing,
    end_table,
    guidance_table,
    internal_guidance_table,
    interval,
    price_table,
    spent,
    verdict,
)
from benchmarks.convergence_setting import PROTOCOLS, Protocol
from benchmarks.recording import append
from common.options import Mistake
from common.paths import denoising_loss
from idx_files import write_small_fashion
from scipy import stats
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
TINY = Protocol(  # it judges nothing
    "tiny", hidden_size=16, depth=5, num_heads=2, stage1_layer=1, student_layer=2, teacher_layer=3, peer_layer=1,
    peer_deep_layer=3, head_features=8, batch_size=4, warmup_steps=1, steps=10, evaluate_at=(2, 4, 10, 12),
    samples=20, final_samples=24, sampler_steps=2, vae_steps=2, classifier_steps=2, least_accuracy=0.0, images=(80, 24),
)  # fmt: skip
SMALL = "self teacher_width=8 teacher_depth=3 teacher_share=0.4"
TRAINED = [
    "none share=1.2", "stage1", "self same_seed=True stop=0.4", SMALL, f"{SMALL} normalised=True", "own refresh=3",
    "ig", "sra", "layersync", "dispersive", "repa",
]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def own_rng() -> Iterator[None]:
    with torch.random.fork_rng(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(PROTOCOLS, "tiny", TINY)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of method trained with one seed: a folder with the `data`, `out` and `results.jsonl`."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "data").mkdir()
    write_small_fashion(folder / "data", *TINY.images)
    convergence.main(order(folder, *TRAINED))
    return folder


@pytest.fixture(scope="module")
def setting(finished: Path) -> Setting:
    return Setting(TINY, finished / "out", finished / "data", "cpu")


@pytest.fixture
def again(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished study, to go on in."""
    return shutil.copytree(finished, tmp_path / "again")


def order(folder: Path, *methods: str) -> list[str]:
    files = [f"--out={folder / 'out'}", f"--results={folder / 'results.jsonl'}", f"--data={folder / 'data'}"]
    return ["--size=tiny", *files, *(f"--method={text}" for text in methods), "--seeds=0"]


def lines_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {line["key"]: line for line in map(json.loads, (folder / "results.jsonl").read_text().splitlines())}


def run_of(text: str, seed: int = 0) -> Run:
    return Run(TINY, parse(text), seed)


def test_judging_advances_no_generator_and_repeats_itself(setting: Setting, global_rng_untouched: None) -> None:
    with torch.random.fork_rng():
        model = TINY.new_model().eval()  # its last layer is zero at first
    found = setting.judged(model, seed=3, final=True)
    assert found == setting.judged(model, seed=3, final=True)
    assert setting.judged(model, seed=3, final=False).keys() == {"distance"} < found.keys()
    latents = setting.held_out[: TINY.samples]
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    assert found["held_out_loss"] == pytest.approx((noise - latents).square().mean().item(), rel=1e-5)


def test_settings_reach_the_library(setting: Setting, finished: Path) -> None:
    run = run_of(f"{SMALL} guidance_scale=4 rows=0.5 schedule=linear stop=0.4 distance=cosine weight=2")
    _, _, criterion, _ = convergence.prepared(setting, run, finished / "out")
    teacher = criterion.teacher
    assert (teacher.guidance_scale, teacher.layer, teacher.hidden_size) == (4.0, "blocks.1", 8)  # 3 of 5, of 3
    assert (criterion.layers, criterion.window, criterion.stop_step) == (("blocks.1",), (0.4, 0.7), 4)
    assert (criterion.distance, criterion.weight, criterion.teacher_rows) == ("cosine", 2.0, 0.5)


def test_methods_are_paired(setting: Setting, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The initial weights are the same, and at each step the batch and the generator of times, noise and labels."""
    seen: list[Tensor] = []

    def denoise(model: torch.nn.Module, latents: Tensor, y: Tensor) -> Tensor:
        if not seen:
            seen.extend(value.clone() for value in model.state_dict().values())
        seen.extend([latents, y, torch.get_rng_state()])
        return denoising_loss(model, latents, y)

    monkeypatch.setattr(convergence, "denoising_loss", denoise)
    plain: list[Tensor] = []
    for run in map(run_of, ["none", "stage1", SMALL, "own refresh=3", "ig", "sra", "repa"]):
        run.folder(finished / "out").mkdir(exist_ok=True, parents=True)
        convergence.trained(setting, run, finished / "out")
        (run.folder(finished / "out") / "state.pt").unlink()
        plain = plain or [*seen]
        assert len(seen) > 3 * TINY.steps
        assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True)), run.key
        seen.clear()


def test_every_run_is_one_line_that_says_where_it_comes_from(finished: Path) -> None:
    lines = lines_of(finished)
    teacher, longer = run_of("stage1 share=0.4 width=8 depth=3", 1000).key, run_of("none share=1.2").key
    assert list(lines) == [*(run_of(text).key for text in TRAINED[:3]), teacher, *(run_of(t).key for t in TRAINED[3:])]
    for line in lines.values():  # a command names no folder of a machine
        assert line["command"].startswith("python examples/benchmarks/convergence.py --size=tiny --method=")
        assert {"commit", "hardware", "torch", "judge", "protocol", "method", "seed"} <= line.keys()
        assert all(math.isfinite(value) for measures in line["measures"] for value in measures.values())
    judged = {key: [measures["step"] for measures in line["measures"]] for key, line in lines.items()}
    assert (judged[teacher], judged[run_of("stage1").key], judged[longer]) == ([4], [2, 4, 10], [2, 4, 10, 12])
    # The large sample: where the plain run ends, and where a longer one does.
    assert [m["step"] for m in lines[longer]["measures"] if "recall" in m] == [10, 12]
    assert lines[run_of(SMALL).key]["teacher"] == teacher
    assert lines[run_of("self same_seed=True stop=0.4").key]["teacher"] == run_of("stage1").key
    assert "distance_internally_guided" in lines[run_of("ig").key]["measures"][-1]


@pytest.mark.parametrize("text", ["sra", "repa", "ig", "own refresh=3"])
def test_a_run_that_was_cut_off_ends_as_it_would_have_and_no_other_is_run_again(
    finished: Path, again: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, steps = run_of(text), []
    folder, expected = run.folder(again / "out"), lines_of(finished)
    shutil.rmtree(folder)
    others = [json.dumps(line) + "\n" for key, line in expected.items() if key != run.key]
    (again / "results.jsonl").write_text("".join(others))

    def cut(model: torch.nn.Module, latents: Tensor, y: Tensor) -> Tensor:
        if len(steps) == 7:
            raise KeyboardInterrupt
        steps.append(len(latents))
        return denoising_loss(model, latents, y)

    with monkeypatch.context() as patch:
        patch.setattr(convergence, "denoising_loss", cut)
        with pytest.raises(KeyboardInterrupt):
            convergence.main(order(again, "stage1", SMALL, text))
    assert [path.name for path in folder.glob("*.pt")] == ["state.pt"]
    convergence.main(order(again, "stage1", SMALL, text))
    assert [path.name for path in folder.glob("*.pt")] == ["0000010.pt"]
    written = (again / "results.jsonl").read_text().splitlines(keepends=True)
    assert written[:-1] == others
    assert json.loads(written[-1])["measures"] == expected[run.key]["measures"]
    whole, resumed = (torch.load(run.weights(f / "out", 10), weights_only=True) for f in (finished, again))
    for part in ("model", "ema"):
        assert all(torch.equal(whole[part][name], resumed[part][name]) for name in whole[part])


def test_a_run_that_another_process_is_at_is_left_to_it(
    finished: Path, setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, results = tmp_path / "out", Results(tmp_path / "results.jsonl")
    runs, waited = [run_of("stage1"), run_of("layersync")], []

    def other_process_finishes(seconds: float) -> None:
        waited.append([line["key"] for line in results.lines()])
        append(results.path, lines_of(finished)[runs[0].key])

    monkeypatch.setattr(convergence.time, "sleep", other_process_finishes)
    with convergence.locked(runs[0].folder(out) / "lock", wait=False) as alone:
        assert alone
        convergence.work(setting, runs, out, results, [])
    assert waited == [[runs[1].key]]
    assert len(results.lines()) == 2


def test_what_would_not_be_the_study_is_refused(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(Mistake, match="too poor a judge"):
        Setting(replace(TINY, least_accuracy=1.1), finished / "out", finished / "data", "cpu")
    run, line = run_of("layersync"), lines_of(finished)[run_of("layersync").key]
    method = {"name": "layersync", "weight": 0.5}  # a setting that was added later has had its default
    kept = Results(tmp_path / "kept.jsonl")
    append(kept.path, line | {"method": method})
    assert kept.has(run)
    for other in ({"protocol": asdict(replace(TINY, lr=1.0))}, {"method": method | {"weight": 0.7}}):
        results = Results(tmp_path / f"{list(other)}.jsonl")
        append(results.path, line | other)
        with pytest.raises(Mistake, match="with other settings"):
            results.has(run)
    for text, match in [("selff", "named"), ("self x=3", "setting"), ("self rows=x", "no float")]:
        with pytest.raises(Mistake, match=match):
            parse(text)


def test_finished_runs_are_sampled_with_each_scale_once(again: Path) -> None:
    for scales, last in ((["2"], "2.0"), (["1.5", "2"], "1.5"), (["1.5", "2"], "1.5")):
        convergence.main([*order(again, "none share=1.2"), "--guidance", *scales])
        *_, first, second = map(json.loads, (again / "results.jsonl").read_text().splitlines())
        assert [(line["kind"], line["step"]) for line in (first, second)] == [("guidance", 10), ("guidance", 12)]
        assert list(first["guided"]) == list(second["guided"]) == [last]
        assert first["guided"][last].keys() == {"distance_all", "kid", "precision", "recall", "label_seen"}
    assert len((again / "results.jsonl").read_text().splitlines()) == len(TRAINED) + 1 + 4


def test_operations_are_those_of_the_formula(finished: Path) -> None:
    """Multiply-adds, times two: of one sample's forward, of a head, and three times as many with the gradients."""
    width, tokens, patch, n = TINY.hidden_size, 16, 4 * 2 * 2, TINY.batch_size
    embedders = tokens * patch * width + 256 * width + width * width
    block = 6 * width**2 + tokens * width**2 * (3 + 1 + 4 + 4) + 2 * tokens**2 * width
    last = 2 * width**2 + tokens * width * patch

    def early(blocks: int) -> int:
        return 2 * (embedders + blocks * block)

    def counted(text: str) -> list[list[int]]:
        return lines_of(finished)[run_of(text).key]["operations"]

    no_input_gradient = 2 * (tokens * patch * width + 256 * width)  # of the first layers: data needs none
    plain = n * (3 * (early(TINY.depth) + 2 * last) - no_input_gradient)
    assert counted("none share=1.2") == [[12, plain]]
    assert counted("layersync") == [[10, plain]]
    # Of four times, 1/8 to 7/8, one is inside the window.
    head = 3 * 2 * tokens * (2 * width * TINY.head_features + TINY.head_features**2)
    assert counted("stage1") == [[10, plain + head + 3 * 2 * tokens * width * patch]]
    taught = plain + head + 2 * early(TINY.teacher_layer)  # with the condition and without
    assert counted("self same_seed=True stop=0.4") == [[4, taught], [10, plain]]
    # The first call of a run's own average runs more than the rest of its calls, and is not what counts.
    assert [ops for _, ops in counted("own refresh=3")][-1] == taught
    assert counted("sra") == [[10, plain + n * (head + early(TINY.peer_deep_layer))]]


def made_up(text: str, seed: int, distances: list[float], cost: float, teacher: Any = None) -> dict[str, Any]:
    curve = zip([10, 20, 40], distances, strict=False)
    measures = [{"step": step, **dict.fromkeys(["distance", *MEASURES], d)} for step, d in curve]
    return {
        "kind": "run", "key": f"made-up | {text} | seed {seed}", "method": parse(text).described(), "seed": seed,
        "protocol": {"name": "made-up", "steps": 40}, "operations": [[measures[-1]["step"], cost]],
        "teacher": teacher, "measures": measures,
    }  # fmt: skip


@pytest.fixture
def study() -> Study:
    """Two seeds; the teacher costs a tenth of the plain run, and a step with it half as much again."""
    lines = [made_up("stage1 share=0.1 width=8", 1000, [99], 40)]
    teacher = lines[0]["key"]
    for seed, more in ((10, 0.0), (11, 2.0)):
        lines += [
            made_up("none", seed, [30 + more, 20 + more, 10 + more], 100),
            made_up("self", seed, [24 + 2 * more, 14 + more, 6 + 2 * more], 150, teacher),
            made_up("layersync", seed, [31, 22, 13], 100),
        ]  # fmt: skip
    return Study.of(lines, "made-up", (10, 11))


def test_intervals_are_students_crossings_linear_and_costs_of_the_parts_added_up() -> None:
    low, high = stats.t.interval(0.95, 2, loc=3.0, scale=stats.sem([1.0, 2.0, 6.0]))
    assert interval([1.0, 2.0, 6.0]) == pytest.approx((3.0, low, high))
    assert math.isnan(interval([1.0]).high)
    found = [crossing([10, 20, 40], above) for above in ([3.0, -1.0, 0.0], [3, 1, 0], [0, 2, 0], [3, 1, 1])]
    assert found == pytest.approx([17.5, 40, 10, math.inf])
    parts = [(3, 10.0), (5, 1.0)]
    assert [spent(parts, step) for step in (0, 2, 3, 4, 5, math.inf)] == [0, 20, 30, 31, 32, 32]


def test_the_goal_is_the_plain_runs_end_seed_by_seed(study: Study) -> None:
    above = [(24 - 10, 28 - 12), (14 - 10, 16 - 12), (6 - 10, 10 - 12)]  # of both seeds, at the three steps
    means = [sum(pair) / 2 for pair in above]
    at = 20 + 20 * means[1] / (means[1] - means[2])
    upper = stats.t.interval(0.95, 1, loc=means[2], scale=stats.sem(above[2]))[1]
    assert upper > 0
    assert study.reached("self")[::2] == pytest.approx((at, math.inf))  # two seeds leave it open at the last step
    row = price_table(study, ["self"]).splitlines()[-1].split(" | ")
    assert row[2:5] == ["0.10", "1.50", f"{at / 40:.2f}"]  # the teacher's whole run over the whole plain one
    assert re.fullmatch(rf"{0.1 + at * 150 / 4000:.2f} \(.* to > 1\.60\)", row[5])
    assert price_table(study, ["layersync"]).splitlines()[-1].split(" | ")[4] == "> 1.00"  # not reached
    assert study.differences("self", 40).mean == pytest.approx((6 - 10 + 10 - 12) / 2)


@pytest.mark.parametrize(
    ("first", "operations", "run", "found", "words"),
    [
        (9.0, 150, "0.75", "-1.0 ± 0.3", "met; -1.0 ± 0.3 at 0.85 of the price, 0.75 without"),  # the other's is -1.05
        (9.0, 190, "0.95", "-1.0 ± 0.3", "met where the teacher exists; -1.0 ± 0.3 at 1.05 of the price, 0.95 without"),
        (9.0, 210, "1.05", "-1.0 ± 0.3", "not met where the teacher exists; -1.0 ± 0.3 at 1.15 of the price"),
        (8.0, 150, "0.75", "-1.5 ± 6.0", "not met; -1.5 ± 6.0 at 0.85 of the price, 0.75 without"),
    ],
)
def test_the_verdict_is_of_the_interval_at_the_runs_ends(
    first: float, operations: float, run: str, found: str, words: str
) -> None:
    lines = [made_up("stage1 share=0.1 width=8", 1000, [99], 40)]
    for seed, plain, taught in ((10, 10, first), (11, 12, 10.95)):
        lines += [made_up("none", seed, [50, 50, plain], 100)]
        lines += [made_up("self share=0.5", seed, [50, taught], operations, lines[0]["key"])]
    study = Study.of(lines, "made-up", (10, 11, 12))
    *_, row = end_table(study, study.methods(["none", "self share=0.5"])).splitlines()
    assert f"20 | 0.10 | {run} | {found}" in row
    assert f"> Why.\n\n- teacher whole, on 2 of 3 seeds: {words}" in verdict(
        study, ["none", "self share=0.5"], [{"text": "Why."}]
    )
    assert "nothing on this page is confirmed" in verdict(Study.of([], "made-up", ()), ["none"], [])


def test_samples_with_guidance_stand_beside_those_without() -> None:
    lines = []
    for seed, alone, taught, more in ((10, 11.0, 10.0, 0.0), (11, 13.0, 15.0, 0.1), (12, 13.0, 15.0, 9.0)):
        lines += [made_up("none", seed, [30, 20, alone], 100), made_up("self", seed, [31, 21, taught], 100)]
        for line, at, last in ((lines[-2], 8.0, 30.0), (lines[-1], 6.0 + more, 5.0)):
            for step, later in ((40, 0.0), (88, 50.0)):  # beyond the plain run's end nothing is compared
                distances = {"1.5": at + seed + later, "2.0": 9.0 + later, "3.0": last + later}
                measures = {scale: {"distance_all": each, "kid": 2 * each} for scale, each in distances.items()}
                lines.append({**line, "kind": "guidance", "step": step, "guided": measures})
    ig = made_up("ig share=0.997", 10, [31, 21, 12], 100)
    ig["measures"][-1]["distance_internally_guided"] = 7.0
    study = Study.of([*lines, ig], "made-up", (10, 11))
    half = stats.t.ppf(0.975, 1) * 0.05  # of two values, 0.1 apart
    plain, taught = guidance_table(study).splitlines()[-2:]
    assert plain.startswith("| plain | 2 | 12.0 ± 12.7 | 18.5 ± 6.4 | 9.0 ± 0.0 | 30.0 ± 0.0 |")
    assert taught == f"| teacher whole | 2 | +0.5 ± {1.5 * 12.706:.1f} | -1.9 ± {half:.1f} | +0.0 ± 0.0 | -25.0 ± 0.0 |"
    plain, taught = best_guidance_table(study).splitlines()[-2:]
    assert plain.startswith("| plain | 2 | 2.0 | 9.0 ± 0.0 | 18.0 ± 0.0 | not measured |")
    assert taught.startswith("| teacher whole | 2 | 3.0 | -4.0 ± 0.0 | -8.0 ± 0.0 | not measured |")
    assert internal_guidance_table(study).splitlines()[-1] == "| Internal Guidance | 1 | 7.0 | 12.0 | 11.0 |"
    criterion = {"text": "Why.", "guidance": "1.5", "asked": {"self": [10, 11, 12], "layersync": [10]}}
    *_, said = verdict(study, [], [criterion]).splitlines()
    assert said == f"- teacher whole, guidance 1.5 in sampling, on 2 of 3 seeds: met; -1.9 ± {half:.1f}."
    *_, said = verdict(study, [], [{**criterion, "guidance": "2.0"}]).splitlines()
    assert said.endswith("on 2 of 3 seeds: not met; +0.0 ± 0.0.")
    *_, said = verdict(study, [], [{**criterion, "guidance": "best"}]).splitlines()
    assert said.endswith("guidance 3.0 in sampling and 2.0 in the plain run's, on 2 of 3 seeds: met; -4.0 ± 0.0.")


def test_docs_say_what_the_results_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path("docs", "does-it-work.md")
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / page, tmp_path / page)
    monkeypatch.setattr(convergence, "ROOT", tmp_path)
    convergence.main(["--report"])
    assert (tmp_path / page).read_text() == (ROOT / page).read_text()
    assert (tmp_path / "docs" / "images" / "convergence.png").stat().st_size > 10_000
