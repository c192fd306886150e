"""The convergence study at a tiny size: pairing, price, resuming, sharing the work, and what the docs say of it."""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import convergence
from benchmarks.convergence import Results, Run, Setting
from benchmarks.convergence_methods import METHODS, STUDIES, parse
from benchmarks.convergence_report import Study, crossing, interval, price_table, spent, verdict
from benchmarks.convergence_setting import PROTOCOLS, Protocol
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
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fashion")
    write_small_fashion(folder, *TINY.images)
    return folder


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of method trained with one seed; the folder holds `out` and `results.jsonl`."""
    folder = tmp_path_factory.mktemp("study")
    convergence.main([*arguments(folder, data), *(f"--method={text}" for text in TRAINED), "--seeds=0"])
    return folder


def arguments(folder: Path, data: Path) -> list[str]:
    return ["--size=tiny", f"--out={folder / 'out'}", f"--results={folder / 'results.jsonl'}", f"--data={data}"]


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def run_of(text: str, seed: int = 0) -> Run:
    return Run(TINY, parse(text), seed)


@pytest.fixture(scope="module")
def setting(finished: Path, data: Path) -> Setting:
    return Setting(TINY, finished / "out", data, "cpu")


# The measures


def test_judging_advances_no_generator_and_repeats_itself(setting: Setting, global_rng_untouched: None) -> None:
    with torch.random.fork_rng():
        model = TINY.new_model().eval()
    found = setting.judged(model, seed=3, final=True)
    assert found == setting.judged(model, seed=3, final=True)
    assert setting.judged(model, seed=3, final=False).keys() == {"distance"} < found.keys()


def test_held_out_loss_of_a_model_that_predicts_nothing_is_the_velocitys_square(setting: Setting) -> None:
    model = TINY.new_model().eval()  # its last layer is zero at first
    latents = setting.held_out[: TINY.samples]
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    assert setting.held_out_loss(model) == pytest.approx((noise - latents).square().mean().item(), rel=1e-5)


def test_a_poor_judge_is_refused(finished: Path, data: Path) -> None:
    with pytest.raises(Mistake, match=r"too poor a judge(.|\n)*not 1.1(.|\n)*more than 2 steps"):
        Setting(replace(TINY, least_accuracy=1.1), finished / "out", data, "cpu")


# The methods


@pytest.mark.parametrize("text", STUDIES["full"])
def test_a_method_is_read_as_it_is_written(text: str) -> None:
    method = parse(text)
    assert parse(str(method)) == method
    described = method.described()
    assert METHODS[described.pop("name")](**described) == method


def test_a_method_that_is_none_is_named() -> None:
    for text, match in [
        ("selff", "no method named 'selff'"),
        ("self scale=3", "no setting 'scale'"),
        ("self guidance_scale=big", "'guidance_scale=big': that is no float"),
    ]:
        with pytest.raises(Mistake, match=match):
            parse(text)


def test_settings_reach_the_library(setting: Setting, finished: Path) -> None:
    run = run_of(f"{SMALL} guidance_scale=4 rows=0.5 schedule=linear stop=0.4 distance=cosine weight=2")
    _, _, criterion, _ = convergence.prepared(setting, run, finished / "out")
    teacher = criterion.teacher
    assert (teacher.guidance_scale, teacher.layer, teacher.hidden_size) == (4.0, "blocks.1", 8)  # 3 of 5, of 3
    assert (criterion.layers, criterion.window, criterion.stop_step) == (("blocks.1",), (0.4, 0.7), 4)
    assert (criterion.distance, criterion.weight, criterion.teacher_rows) == ("cosine", 2.0, 0.5)


def test_a_teacher_has_a_seed_of_its_own() -> None:
    assert run_of(SMALL, 7).teacher() == run_of("stage1 share=0.4 width=8 depth=3", 1007)
    assert run_of("self same_seed=True", 7).teacher() == run_of("stage1", 7)
    assert run_of("none", 7).teacher() is None


# Runs


def inputs_of(setting: Setting, run: Run, out: Path) -> list[Tensor]:
    """The initial weights, and everything that the model is shown while the run trains."""
    found: list[Tensor] = []

    def denoise(model: torch.nn.Module, latents: Tensor, y: Tensor) -> Tensor:
        if not found:
            found.extend(value.clone() for value in model.state_dict().values())
        handle = model.register_forward_pre_hook(lambda m, args: found.extend(arg.clone() for arg in args))
        loss = denoising_loss(model, latents, y)
        handle.remove()
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convergence, "denoising_loss", denoise)
        run.folder(out).mkdir(parents=True, exist_ok=True)
        convergence.trained(setting, run, out)
    (run.folder(out) / "state.pt").unlink()
    return found


@pytest.fixture(scope="module")
def plain_inputs(setting: Setting, finished: Path) -> list[Tensor]:
    return inputs_of(setting, run_of("none"), finished / "out")


@pytest.mark.parametrize("text", ["stage1", SMALL, "own refresh=3", "ig", "sra", "repa"])
def test_methods_are_paired(setting: Setting, finished: Path, plain_inputs: list[Tensor], text: str) -> None:
    found = inputs_of(setting, run_of(text), finished / "out")
    assert len(found) > 3 * TINY.steps
    assert all(torch.equal(a, b) for a, b in zip(plain_inputs, found, strict=True))


def test_every_run_is_one_line_that_says_where_it_comes_from(finished: Path) -> None:
    lines = {line["key"]: line for line in lines_of(finished)}
    teacher = run_of("stage1 share=0.4 width=8 depth=3", 1000).key
    assert list(lines) == [*(run_of(text).key for text in TRAINED[:3]), teacher, *(run_of(t).key for t in TRAINED[3:])]
    for line in lines.values():
        assert line["command"].startswith(
            "python examples/benchmarks/convergence.py --size=tiny --method="
        )  # no folder of a machine
        assert {"commit", "hardware", "torch", "judge", "protocol", "method", "seed"} <= line.keys()
        assert all(math.isfinite(value) for measures in line["measures"] for value in measures.values())
    judged = {key: [measures["step"] for measures in line["measures"]] for key, line in lines.items()}
    assert judged[teacher] == [4]
    assert judged[run_of("stage1").key] == [2, 4, 10]
    assert judged[run_of("none share=1.2").key] == [2, 4, 10, 12]
    large = [m["step"] for m in lines[run_of("none share=1.2").key]["measures"] if "recall" in m]
    assert large == [10, 12]  # where the plain run ends, and where a longer one does
    assert lines[run_of(SMALL).key]["teacher"] == teacher
    assert lines[run_of("self same_seed=True stop=0.4").key]["teacher"] == run_of("stage1").key
    assert "distance_internally_guided" in lines[run_of("ig").key]["measures"][-1]


def test_a_finished_run_is_not_run_again(finished: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (finished / "results.jsonl").read_text()
    monkeypatch.setattr(convergence, "trained", None)
    convergence.main([*arguments(finished, data), "--method=stage1", f"--method={SMALL}", "--seeds=0"])
    assert (finished / "results.jsonl").read_text() == before


@pytest.mark.parametrize("text", ["sra", "repa", "ig", "own refresh=3"])
def test_a_run_that_was_cut_off_ends_as_it_would_have(
    finished: Path, data: Path, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(text)
    shutil.copytree(finished / "out", tmp_path / "out")
    shutil.rmtree(run.folder(tmp_path / "out"))
    order = [*arguments(tmp_path, data), f"--method={text}", "--seeds=0"]
    others = [line for line in lines_of(finished) if line["key"] != run.key]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in others))
    steps = []

    def cut(model: torch.nn.Module, latents: Tensor, y: Tensor) -> Tensor:
        if len(steps) == 7:
            raise KeyboardInterrupt
        steps.append(len(latents))
        return denoising_loss(model, latents, y)

    with monkeypatch.context() as patch:
        patch.setattr(convergence, "denoising_loss", cut)
        with pytest.raises(KeyboardInterrupt):
            convergence.main(order)
    assert {path.name for path in run.folder(tmp_path / "out").glob("*.pt")} == {"state.pt"}
    convergence.main(order)
    assert {path.name for path in run.folder(tmp_path / "out").glob("*.pt")} == {"0000010.pt"}
    expected, found = ([x for x in lines_of(folder) if x["key"] == run.key] for folder in (finished, tmp_path))
    assert [line["measures"] for line in found] == [line["measures"] for line in expected]
    for part in ("model", "ema"):
        whole, resumed = (
            torch.load(run.weights(folder / "out", 10), weights_only=True)[part] for folder in (finished, tmp_path)
        )
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_run_that_another_process_is_at_is_left_to_it(
    finished: Path, setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, results = tmp_path / "out", Results(tmp_path / "results.jsonl")
    runs = [run_of("stage1"), run_of("layersync")]
    waited = []

    def other_process_finishes(seconds: float) -> None:
        waited.append([line["key"] for line in results.lines()])
        results.add(next(line for line in lines_of(finished) if line["key"] == runs[0].key))

    monkeypatch.setattr(convergence.time, "sleep", other_process_finishes)
    with convergence.locked(runs[0].folder(out) / "lock", wait=False) as alone:
        assert alone
        convergence.work(setting, runs, out, results, [])
    assert waited == [[runs[1].key]]
    assert len(results.lines()) == 2


def test_results_of_other_settings_are_not_taken_for_these(finished: Path, tmp_path: Path) -> None:
    line = next(line for line in lines_of(finished) if line["key"] == run_of("stage1").key)
    line["protocol"]["lr"] = 1.0
    results = Results(tmp_path / "results.jsonl")
    results.add(line)
    with pytest.raises(Mistake, match=r"with other settings(.|\n)*--results"):
        results.has(run_of("stage1"))


def test_finished_runs_are_sampled_with_guidance_once(finished: Path, data: Path, tmp_path: Path) -> None:
    shutil.copy(finished / "results.jsonl", tmp_path)
    order = [*arguments(finished, data), "--guidance", "--method=none share=1.2", "--seeds=0"]
    order[2] = f"--results={tmp_path / 'results.jsonl'}"
    for _ in range(2):
        convergence.main(order)
        found = [line for line in lines_of(tmp_path) if line["kind"] == "guidance"]
        assert [line["step"] for line in found] == [10, 12]
        assert all(list(line["distances"]) == ["1.5", "2.0", "3.0"] for line in found)


# The price


def forward_operations(blocks: int, *, whole: bool) -> int:
    """Multiply-adds, times two, of one sample's forward through the first blocks, and to the end or not."""
    width, tokens, patch = TINY.hidden_size, 16, 4 * 2 * 2
    first = tokens * patch * width + 256 * width + width * width
    linear = 6 * width * width + tokens * width * width * (3 + 1 + 4 + 4)
    block = linear + 2 * tokens * tokens * width
    last = 2 * width * width + tokens * width * patch
    return 2 * (first + blocks * block + (last if whole else 0))


def test_operations_are_those_of_the_formula(finished: Path) -> None:
    width, tokens, n = TINY.hidden_size, 16, TINY.batch_size
    counted = {line["key"]: line["operations"] for line in lines_of(finished)}
    no_input_gradient = 2 * (tokens * 16 * width + 256 * width)  # of the first layers: data needs none
    plain = n * (3 * forward_operations(TINY.depth, whole=True) - no_input_gradient)
    assert counted[run_of("none share=1.2").key] == [[12, plain]]

    inside = 1  # of the times 1/8, 3/8, 5/8, 7/8
    hidden = TINY.head_features
    head = 3 * 2 * tokens * (width * hidden + hidden * hidden + hidden * width)
    latents = head + 3 * 2 * tokens * width * 16
    assert counted[run_of("stage1").key] == [[10, plain + inside * latents]]
    taught = plain + inside * (head + 2 * forward_operations(TINY.teacher_layer, whole=False))  # with and without
    assert counted[run_of("self same_seed=True stop=0.4").key] == [[4, taught], [10, plain]]
    # The first call of a run's own average runs more than the rest of its calls, and is not what counts.
    assert [ops for _, ops in counted[run_of("own refresh=3").key]][-1] == taught
    shallow = forward_operations(TINY.peer_deep_layer, whole=False)
    assert counted[run_of("sra").key] == [[10, plain + n * (head + shallow)]]
    assert counted[run_of("layersync").key] == [[10, plain]]


def test_spent_adds_up_the_parts() -> None:
    parts = [(3, 10.0), (5, 1.0)]
    assert [spent(parts, step) for step in (0, 2, 3, 4, 5, math.inf)] == [0, 20, 30, 31, 32, 32]


# The report


def made_up(
    text: str, seed: int, distances: list[float], operations: float, teacher: str | None = None
) -> dict[str, Any]:
    steps = [10, 20, 40, 60, 80][: len(distances)]
    return {
        "kind": "run", "key": f"made-up | {text} | seed {seed}", "method": parse(text).described(), "seed": seed,
        "protocol": {"name": "made-up", "steps": 40}, "operations": [[steps[-1], operations]], "teacher": teacher,
        "measures": [{"step": s, "distance": d, "distance_all": d} for s, d in zip(steps, distances, strict=True)],
    }  # fmt: skip


@pytest.fixture
def study() -> Study:
    """Two seeds; the teacher costs a tenth of the plain run, and a step with it half as much again."""
    lines = [made_up("stage1 share=0.1 width=8", 1000, [99], 40)]
    teacher = lines[0]["key"]
    for seed, more in ((10, 0.0), (11, 2.0)):
        lines += [
            made_up("none", seed, [30 + more, 20 + more, 10 + more], 100),
            made_up("none share=2", seed, [30 + more, 20 + more, 10 + more, 8 + more, 6 + more], 100),
            made_up("self", seed, [24 + 2 * more, 14 + more, 6 + 2 * more], 150, teacher),
            made_up("layersync", seed, [31, 22, 13], 100),
        ]  # fmt: skip
    return Study.of(lines, "made-up", (10, 11))


def test_an_interval_is_students() -> None:
    low, high = stats.t.interval(0.95, 2, loc=3.0, scale=stats.sem([1.0, 2.0, 6.0]))
    assert interval([1.0, 2.0, 6.0]) == pytest.approx((3.0, low, high))
    assert math.isnan(interval([1.0]).high)


def test_a_crossing_is_linear_between_the_steps() -> None:
    assert crossing([10, 20], [3.0, -1.0]) == pytest.approx(17.5)
    assert crossing([10, 20, 40], [3.0, 1.0, 0.0]) == 40
    assert crossing([10, 20], [0.0, 2.0]) == 10
    assert crossing([10, 20], [3.0, 1.0]) == math.inf


def test_the_goal_is_the_plain_runs_end_seed_by_seed(study: Study) -> None:
    above = [(24 - 10, 28 - 12), (14 - 10, 16 - 12), (6 - 10, 10 - 12)]  # of both seeds, at the three steps
    means = [sum(pair) / 2 for pair in above]
    at = 20 + 20 * means[1] / (means[1] - means[2])
    upper = stats.t.interval(0.95, 1, loc=means[2], scale=stats.sem(above[2]))[1]
    found = study.reached("self")
    assert found.mean == pytest.approx(at)
    assert upper > 0
    assert found.high == math.inf  # two seeds leave it open at the last step
    row = price_table(study, ["self"]).splitlines()[-1].split(" | ")
    assert row[2:5] == ["0.10", "1.50", f"{at / 40:.2f}"]  # the teacher's whole run over the whole plain one
    assert row[5].startswith(f"{0.1 + at * 150 / 4000:.2f} (")
    assert row[5].endswith("to > 1.60)")
    assert price_table(study, ["layersync"]).splitlines()[-1].split(" | ")[4] == "> 1.00"  # not reached


def test_equal_operations_are_read_off_the_longer_plain_run(study: Study) -> None:
    # 1.6 plain runs are 64 steps: 7.6 and 9.6 there; and 6 and 10 for what was taught
    assert study.at_equal_operations("self").mean == pytest.approx((6 - 7.6 + 10 - 9.6) / 2)
    assert study.differences("self", 40).mean == pytest.approx((6 - 10 + 10 - 12) / 2)


def test_the_verdict_is_of_the_upper_bound(study: Study) -> None:
    assert "nothing on this page is confirmed" in verdict(Study.of([], "made-up", ()), None)
    assert "on 2 of 10 seeds: not met; that distance is not reached by it" in verdict(study, "The criterion.")
    for seed, line in study.runs["self"].items():
        found = {"distance": 2 * seed - 19, "distance_all": 2 * seed - 10}  # 9 below the goals, and as the plain run
        line["measures"] = [{"step": step, **found} for step in (10, 20, 40)]
    # At its first judgement: 0.1 + 10 * 150 / 4000.
    assert ": met; the upper bound is 0.47; +0.0 ± 0.0 on the large sample" in verdict(study, None)
    for line in study.runs["self"].values():
        line["measures"][-1]["distance_all"] += 1
    assert ": not met; the upper bound is 0.47; +1.0 ± 0.0 on the large sample" in verdict(study, None)


def test_docs_say_what_the_results_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "does-it-work.md", tmp_path / "docs")
    monkeypatch.setattr(convergence, "ROOT", tmp_path)
    convergence.main(["--report"])
    assert (tmp_path / "docs" / "does-it-work.md").read_text() == (ROOT / "docs" / "does-it-work.md").read_text()
    assert (tmp_path / "docs" / "images" / "convergence.png").stat().st_size > 10_000
