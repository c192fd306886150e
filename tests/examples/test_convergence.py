"""The convergence study at a tiny size: pairing, price, resuming, sharing the work, and what the docs say of it."""

import json
import math
import os
import shutil
import signal
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import convergence
from benchmarks.convergence import Results, Run, Setting
from benchmarks.convergence_methods import METHODS, STUDIES, parse
from benchmarks.convergence_report import (
    Study,
    ablation_table,
    confirmation,
    crossing,
    lead_table,
    spent,
    title,
    verdict,
    write_page,
)
from benchmarks.convergence_setting import PROTOCOLS, knn_accuracy, layer_features
from common.paths import denoising_loss
from common.training import Training
from idx_files import write_small_fashion
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from selftrans_reg.errors import SettingError

ROOT = Path(__file__).resolve().parents[2]
TINY = PROTOCOLS["tiny"]
TRAINED = [
    *STUDIES["reduced"], "self teacher_share=0.4", "self gating=released", "deep", "dispersive", "repa", "own-ema",
    "self teacher_run=self",
]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def own_rng() -> Iterator[None]:
    with torch.random.fork_rng():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fashion")
    write_small_fashion(folder, *TINY.images)
    return folder


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every method trained with one seed; the folder holds `out` and `results.jsonl`."""
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


def test_knn_votes_as_sklearn_does(generator: torch.Generator) -> None:
    reference, queries = torch.randn(40, 6, generator=generator) + 1, torch.randn(30, 6, generator=generator) + 1
    labels, wanted = torch.arange(40) % 3, torch.arange(30) % 3
    centre = reference.mean(0)
    neighbours = KNeighborsClassifier(5, metric="cosine").fit((reference - centre).numpy(), labels.numpy())
    expected = neighbours.score((queries - centre).numpy(), wanted.numpy())
    assert knn_accuracy(reference, labels, queries, wanted, neighbours=5) == pytest.approx(expected)


def test_features_are_the_mean_token_of_the_null_class_at_the_noise_asked_for(setting: Setting) -> None:
    model = TINY.new_model().eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1)
    latents = setting.held_out[:5]
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    for t in (0.0, 0.5):
        tokens: list[Tensor] = []
        handle = model.blocks[1].register_forward_hook(lambda m, a, out, tokens=tokens: tokens.append(out))
        with torch.no_grad():
            model((1 - t) * latents + t * noise, torch.full((5,), t), torch.full((5,), 10))
        handle.remove()
        torch.testing.assert_close(layer_features(model, "blocks.1", latents, t), tokens[0].mean(1))


def test_judging_advances_no_generator_and_repeats_itself(setting: Setting, global_rng_untouched: None) -> None:
    with torch.random.fork_rng():
        model = TINY.new_model().eval()
    assert setting.judged(model, seed=3) == setting.judged(model, seed=3)
    assert sorted(setting.judged(model, 3)) == ["distance", "held_out_loss", "knn_clean", "knn_noisy", "label_seen"]


def test_held_out_loss_of_a_model_that_predicts_nothing_is_the_velocitys_square(setting: Setting) -> None:
    model = TINY.new_model().eval()  # its last layer is zero at first
    latents = setting.held_out[: TINY.samples]
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    assert setting.held_out_loss(model) == pytest.approx((noise - latents).square().mean().item(), rel=1e-5)


def test_a_poor_judge_is_refused(finished: Path, data: Path) -> None:
    for match in ["too poor a judge", "not 1.1", "more than 2 steps"]:
        with pytest.raises(SettingError, match=match):
            Setting(replace(TINY, least_accuracy=1.1), finished / "out", data, "cpu")


# The methods


@pytest.mark.parametrize("text", STUDIES["full"])
def test_a_method_is_read_as_it_is_written(text: str) -> None:
    method = parse(text)
    assert parse(str(method)) == method
    described = method.described()
    assert METHODS[described.pop("name")](**described) == method


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("selff", "no method named 'selff'"),
        ("self scale=3", "no setting 'scale'"),
        ("self guidance_scale=big", "'guidance_scale=big': that is no float"),
        ("self window=no", "write True or False"),
        ("none layer=2", "Known: none"),
    ],
)
def test_a_method_that_is_none_is_named(text: str, match: str) -> None:
    with pytest.raises(SettingError, match=match):
        parse(text)


def test_a_teacher_without_kept_weights_is_named_before_anything_is_trained(tmp_path: Path, data: Path) -> None:
    for match in ["Found: step 3", r"one of \(1, 2, 5\)"]:
        with pytest.raises(SettingError, match=match):
            convergence.main([*arguments(tmp_path, data), "--method=none", "--method=self teacher_share=0.6"])
    assert not (tmp_path / "out").exists()


def test_settings_reach_the_library(setting: Setting, finished: Path) -> None:
    run = run_of("self guidance_scale=8 student_layer=1 teacher_layer=4 window=False stop=0.4 distance=cosine weight=2")
    _, _, criterion, _ = convergence.prepared(setting, run, finished / "out")
    teacher = criterion.teacher
    assert (teacher.guidance_scale, teacher.layer, criterion.layers) == (8.0, "blocks.3", ("blocks.0",))
    assert (criterion.window, criterion.stop_step, criterion.distance, criterion.weight) == (None, 2, "cosine", 2.0)


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
        convergence.trained(setting, run, out)
    (run.folder(out) / "state.pt").unlink()
    return found


@pytest.fixture(scope="module")
def plain_inputs(setting: Setting, finished: Path) -> list[Tensor]:
    return inputs_of(setting, run_of("none"), finished / "out")


@pytest.mark.parametrize("text", ["stage1", "self", "sra", "layersync", "deep", "dispersive", "repa", "own-ema"])
def test_methods_are_paired(setting: Setting, finished: Path, plain_inputs: list[Tensor], text: str) -> None:
    found = inputs_of(setting, run_of(text), finished / "out")
    assert len(found) > 3 * TINY.steps
    assert all(torch.equal(a, b) for a, b in zip(plain_inputs, found, strict=True))


def test_every_run_is_one_line_that_says_where_it_comes_from(finished: Path) -> None:
    lines = lines_of(finished)
    assert [line["key"] for line in lines] == [run_of(text).key for text in TRAINED]
    for line in lines:
        assert line["command"].startswith("python examples/benchmarks/convergence.py --size=tiny")
        assert {"commit", "hardware", "torch", "judge", "protocol", "method", "seed"} <= line.keys()
        assert [measures["step"] for measures in line["measures"]] == [1, 2, 5]
        assert all(math.isfinite(value) for measures in line["measures"] for value in measures.values())
    by_key = {line["key"]: line for line in lines}
    assert by_key[run_of("self teacher_share=0.4").key]["teacher"] == {"key": run_of("stage1").key, "steps": 2}
    assert by_key[run_of("self teacher_run=self").key]["teacher"] == {"key": run_of("self").key, "steps": 5}
    assert by_key[run_of("sra").key]["teacher"] is None


def test_a_finished_run_is_not_run_again(finished: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (finished / "results.jsonl").read_text()
    monkeypatch.setattr(convergence, "trained", None)
    convergence.main([*arguments(finished, data), "--method=none", "--method=self", "--seeds=0"])
    assert (finished / "results.jsonl").read_text() == before


@pytest.mark.parametrize("text", ["none", "self", "sra", "repa", "own-ema"])
def test_a_run_that_was_cut_off_ends_as_it_would_have(
    finished: Path, data: Path, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(text)
    shutil.copytree(finished / "out", tmp_path / "out")
    shutil.rmtree(run.folder(tmp_path / "out"))
    order = [*arguments(tmp_path, data), f"--method={text}", "--seeds=0"]
    teacher = [line for line in lines_of(finished) if line["key"] == run_of("stage1").key]
    (tmp_path / "results.jsonl").write_text(json.dumps(teacher[0]) + "\n")

    steps = []

    def cut(model: torch.nn.Module, latents: Tensor, y: Tensor) -> Tensor:
        if len(steps) == 4:
            raise KeyboardInterrupt
        steps.append(len(latents))
        return denoising_loss(model, latents, y)

    with monkeypatch.context() as patch:
        patch.setattr(convergence, "denoising_loss", cut)
        with pytest.raises(KeyboardInterrupt):
            convergence.main(order)
    assert {path.name for path in run.folder(tmp_path / "out").glob("*.pt")} == {"0000001.pt", "0000002.pt", "state.pt"}
    convergence.main(order)
    assert {path.name for path in run.folder(tmp_path / "out").glob("*.pt")} == {f"000000{s}.pt" for s in (1, 2, 5)}
    expected, found = ([x for x in lines_of(folder) if x["key"] == run.key] for folder in (finished, tmp_path))
    assert [line["measures"] for line in found] == [line["measures"] for line in expected]
    for part in ("model", "ema"):
        whole, resumed = (
            torch.load(run.weights(folder / "out", 5), weights_only=True)[part] for folder in (finished, tmp_path)
        )
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_weights_of_a_teacher_that_were_lost_are_trained_anew_but_counted_once(
    finished: Path, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished / "out", tmp_path / "out")
    stage1 = run_of("stage1")
    lost = stage1.weights(tmp_path / "out", 5)
    lost.unlink()
    keep = [line for line in lines_of(finished) if line["key"] != run_of("self").key]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in keep))
    convergence.main([*arguments(tmp_path, data), "--method=self", "--seeds=0"])
    keys = [line["key"] for line in lines_of(tmp_path)]
    assert sorted(keys) == sorted(line["key"] for line in lines_of(finished))
    whole, anew = (torch.load(stage1.weights(f / "out", 5), weights_only=True)["ema"] for f in (finished, tmp_path))
    assert all(torch.equal(whole[name], anew[name]) for name in whole)


def test_a_run_that_another_process_is_at_is_left_to_it(
    finished: Path, setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, results = tmp_path / "out", Results(tmp_path / "results.jsonl")
    runs = [run_of("none"), run_of("layersync")]
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


def test_a_killed_process_lets_go(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        with convergence.locked(tmp_path / "lock", wait=False):
            (tmp_path / "held").touch()
            time.sleep(60)
        os._exit(0)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    with convergence.locked(tmp_path / "lock", wait=False) as alone:
        assert not alone
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with convergence.locked(tmp_path / "lock", wait=False) as alone:
        assert alone


def test_results_of_other_settings_are_not_taken_for_these(finished: Path, data: Path, tmp_path: Path) -> None:
    line = lines_of(finished)[0]
    line["protocol"]["lr"] = 1.0
    results = Results(tmp_path / "results.jsonl")
    results.add(line)
    for match in ["with other settings", "--results"]:
        with pytest.raises(SettingError, match=match):
            results.has(run_of("none"))


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
    assert counted[run_of("none").key] == [[5, plain]]

    inside = 1  # of the times 1/8, 3/8, 5/8, 7/8
    hidden = TINY.head_features
    head = 3 * 2 * tokens * (width * hidden + hidden * hidden + hidden * width)
    teacher = 2 * forward_operations(TINY.teacher_layer, whole=False)  # with the condition and without
    assert counted[run_of("self").key] == [[2, plain + inside * (head + teacher)], [5, plain]]
    latents = head + 3 * 2 * tokens * width * 16
    assert counted[run_of("stage1").key] == [[5, plain + inside * latents]]
    shallow = forward_operations(TINY.peer_deep_layer, whole=False)
    assert counted[run_of("sra").key] == [[5, plain + n * (head + shallow)]]
    assert counted[run_of("layersync").key] == [[5, plain]]


def test_a_price_includes_every_run_that_came_before(finished: Path) -> None:
    study = Study.of(lines_of(finished), "tiny")
    each = {text: study.runs[text][0]["operations"] for text in ("stage1", "self", "self teacher_share=0.4")}
    (stage1,) = [ops for _, ops in each["stage1"]]
    taught, alone = [ops for _, ops in each["self"]]
    assert study.cost("self", 3, "operations") == 5 * stage1 + 2 * taught + alone
    assert study.cost("self teacher_share=0.4", 3, "operations") == 2 * stage1 + 2 * taught + alone
    assert study.cost("self teacher_run=self", 1, "operations") == 5 * stage1 + 2 * taught + 3 * alone + taught
    assert study.cost("self", 3, "steps") == 3
    assert study.cost("self", 3, "seconds") is None


def test_time_is_taken_in_turns_and_recorded_by_part(
    finished: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []
    step = Training.step
    monkeypatch.setattr(Training, "step", lambda self, *args: (order.append((id(self), self.steps)), step(self, *args)))
    results = tmp_path / "results.jsonl"
    shutil.copy(finished / "results.jsonl", results)
    convergence.main([
        *arguments(finished, data), f"--results={results}", "--time", "--repeats=3", "--method=none", "--method=self",
        "--method=stage1", "--seeds=0",
    ])  # fmt: skip
    assert len(order) == (3 + convergence.WARM_UP) * 4  # the two parts of `self` count apart
    rounds = [order[i : i + 4] for i in range(0, len(order), 4)]
    assert all({who for who, _ in one} == {who for who, _ in rounds[0]} for one in rounds)
    assert len({one[0][0] for one in rounds}) == 4  # nobody is always first
    assert sorted(at for _, at in rounds[0]) == [0, 0, 0, 2]
    study = Study.of((json.loads(line) for line in results.read_text().splitlines()), "tiny")
    assert [end for end, _ in study.seconds["self"]] == [2, 5]
    taught, alone = [seconds for _, seconds in study.seconds["self"]]
    (stage1,) = [seconds for _, seconds in study.seconds["stage1"]]
    assert study.cost("self", 4, "seconds") == pytest.approx(5 * stage1 + 2 * taught + 2 * alone)


# The report


def made_up(
    text: str, seed: int, distances: list[float], operations: float, teacher: str | None = None
) -> dict[str, Any]:
    protocol = {"name": "made-up", "evaluate_at": [10, 20, 40], "batch_size": 2, "depth": 3, "hidden_size": 4}
    protocol |= {"lr": 0.1, "ema_decay": 0.5, "samples": 7, "sampler_steps": 9, "images": [100, 50]}
    others = {"label_seen": 0.5, "knn_clean": 0.25, "knn_noisy": 0.125, "held_out_loss": 1.5}
    return {
        "kind": "run", "key": f"made-up | {text} | seed {seed}", "method": parse(text).described(), "seed": seed,
        "protocol": protocol, "hardware": "an abacus", "torch": "0", "commit": "c0ffee",
        "judge": {"accuracy": 0.9, "real": 1.0, "real_through_vae": 2.0, "real_all": 0.5},
        "operations": [[40, operations]],
        "teacher": None if teacher is None else {"key": f"made-up | {teacher} | seed {seed}", "steps": 20},
        "measures": [{"step": s, "distance": d, **others} for s, d in zip([10, 20, 40], distances, strict=True)],
    }  # fmt: skip


@pytest.fixture
def study() -> list[dict[str, Any]]:
    lines = []
    for seed, more in ((0, 0.0), (1, 2.0)):
        lines += [
            made_up("none", seed, [30 + more, 20 + more, 10 + more], 100),
            made_up("stage1", seed, [28 + more, 18 + more, 9 + more], 120),
            made_up("self", seed, [24 + more, 8 + more, 7 + more], 150, teacher="stage1"),
        ]
    lines.append(made_up("self weight=1.0", 1, [20, 15, 13], 150, teacher="stage1"))
    return lines


def test_spent_adds_up_the_parts() -> None:
    parts = [(3, 10.0), (5, 1.0)]
    assert [spent(parts, step) for step in (0, 2, 3, 4, 5)] == [0, 20, 30, 31, 32]


def test_crossing_is_linear_in_the_logarithm() -> None:
    assert crossing([10, 20], [8.0, 2.0], 4.0) == pytest.approx(15)
    assert crossing([10, 20, 40], [9.0, 3.0, 1.0], 3.0) == pytest.approx(20)
    assert crossing([10, 20], [8.0, 2.0], 9.0) == 10
    assert crossing([10, 20], [8.0, 2.0], 1.0) is None


def test_the_verdict_counts_the_teachers_price(study: list[dict[str, Any]]) -> None:
    found = verdict(Study.of(study, "made-up"))
    own, plain = [25, 9, 8], 11  # means of the two seeds
    at = 10 + 10 * math.log(own[0] / plain) / math.log(own[0] / own[1])
    operations = (at * 150 + 20 * 120) / (40 * 100)
    assert f"in {at / 40:.2f} of its steps: met" in found
    assert f"in {operations:.2f} of its operations: not met" in found
    assert "At 10 steps: 25.00; the best of the others is stage 1, 29.00: met." in found
    assert "Seed by seed the difference is -4.00 ± 0.00." in found


def test_the_verdict_says_so_when_nothing_is_gained(study: list[dict[str, Any]]) -> None:
    for line in study:
        if line["method"]["name"] == "self":
            line["measures"] = [{**measures, "distance": 50.0} for measures in line["measures"]]
    found = verdict(Study.of(study, "made-up"))
    assert "At 40 steps: 50.00; the best of the others is stage 1, 10.00: not met." in found
    assert "does not reach the plain run's final distance in 40 steps" in found


def test_the_lead_is_read_off_the_plain_curve(study: list[dict[str, Any]]) -> None:
    found = lead_table(Study.of(study, "made-up")).splitlines()[2:]
    plain = [31, 21, 11]  # and Self-Transcendence 25, 9, 8
    at = 10 + 10 * math.log(plain[0] / 25) / math.log(plain[0] / plain[1])
    alone, everything = 10 * 150 / (at * 100), (10 * 150 + 20 * 120) / (at * 100)
    assert found == [
        f"| Self-Transcendence | 10 | 25.0 | {at:.0f} | {alone:.2f} | {everything:.2f} |",
        "| Self-Transcendence | 20 | 9.0 | later than its end |  |  |",
        "| Self-Transcendence | 40 | 8.0 | later than its end |  |  |",
    ]


def test_an_ablation_is_compared_on_common_seeds_only(study: list[dict[str, Any]]) -> None:
    found = ablation_table(Study.of(study, "made-up"), ["self", "self weight=1.0"]).splitlines()
    assert found[2].startswith("| Self-Transcendence | 2 |")
    assert found[2].endswith("| +0.0 ± 0.0 |")
    assert found[3] == "| Self-Transcendence, weight 1 | 1 | 20.0 | 15.0 | 13.0 | +4.0 |"  # seed 1 had 9.0


def test_seeds_that_settings_were_chosen_on_are_told_from_others(study: list[dict[str, Any]], tmp_path: Path) -> None:
    assert confirmation(Study.of(study, "made-up", explored=False)) == "None of them has been run yet."
    best = "self guidance_scale=8.0 stop=1.0"
    study += [made_up(best, 0, [1, 1, 1], 150, teacher="stage1"), made_up("stage1", 3, [30, 20, 10], 120)]
    study += [made_up("none", seed, [30, 20, 10], 100) for seed in (3, 4)]
    study += [made_up(best, seed, [26, 14, 9 + seed], 150, teacher="stage1") for seed in (3, 4)]
    assert sorted(Study.of(study, "made-up").runs["none"]) == [0, 1]
    found = confirmation(Study.of(study, "made-up", explored=False)).split("\n\n")
    assert found[0].splitlines()[-1].endswith(", stop 1 | 2 | 26.0 ± 0.0 | 14.0 ± 0.0 | 12.5 ± 0.7 |")
    assert found[1].splitlines()[-1].endswith(", stop 1 | -4.0 ± 0.0 | -6.0 ± 0.0 | +2.5 ± 0.7 |")
    assert found[2].splitlines()[-1].endswith(", stop 1 | 2.10 | no | no | no | no |")  # 150 and, for half, 120
    page = tmp_path / "docs" / "does-it-work.md"
    page.parent.mkdir()
    shutil.copy(ROOT / "docs" / "does-it-work.md", page)
    write_page(study, tmp_path, "made-up")
    assert page.read_text().count(found[1]) == 1


def test_a_page_holds_mean_and_deviation(study: list[dict[str, Any]], tmp_path: Path) -> None:
    page = tmp_path / "docs" / "does-it-work.md"
    page.parent.mkdir()
    shutil.copy(ROOT / "docs" / "does-it-work.md", page)
    write_page(study, tmp_path, "made-up")
    text = page.read_text()
    deviation = statistics.stdev([10.0, 12.0])
    assert f"11.0 ± {deviation:.1f} |" in text
    assert "| stage 1 | -2.0 ± 0.0 | -2.0 ± 0.0 | -1.0 ± 0.0 |" in text
    assert "| stage 1 | 1.20 | no |" in text  # its operations, and seconds that nobody took
    assert "an abacus" in text


def test_a_methods_title_names_its_settings() -> None:
    assert title(parse("self guidance_scale=8")) == "Self-Transcendence, guidance scale 8"
    assert title(parse("stage1 target=velocity")) == "stage 1, target velocity"


def test_docs_say_what_the_results_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "does-it-work.md", tmp_path / "docs")
    monkeypatch.setattr(convergence, "ROOT", tmp_path)
    convergence.main(["--report"])
    assert (tmp_path / "docs" / "does-it-work.md").read_text() == (ROOT / "docs" / "does-it-work.md").read_text()
    assert (tmp_path / "docs" / "images" / "convergence.png").stat().st_size > 10_000
