"""inspect_features on every kind of checkpoint, at a tiny size: the folder it leaves, the page, going on, wrong use."""

import argparse
import base64
import json
import re
import textwrap
from pathlib import Path

import inspect_features
import numpy as np
import pytest
import quickstart
import torch
from common import data
from common.coco_features import write_coco_features
from common.data import LabelledImages, digits
from common.demo import demo_latents
from common.mmdit import MMDiT
from common.options import Mistake, imported
from common.run_folder import write_json
from common.vae import Scaling, load_vae
from tiny_runs import ARGS, SCALE, write_checkpoint, write_run, write_vae

import selftrans_reg as st

FAST = ["--noise-fractions=0.5", "--scales=1,4", "--samples=40", "--batch-size=20", "--k=3", "--device=cpu"]
FILES = {"settings.json", "report.json", "report.txt", "report.png", "features.png", "index.html"}


@pytest.fixture(autouse=True)
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    few = [LabelledImages(part.images[:30], part.labels[:30]) for part in digits(32)]
    monkeypatch.setattr(data, "digits", lambda size: few)


@pytest.fixture(scope="module")
def quickstart_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of the quickstart leaves that is read here: settings, VAE, two checkpoints with their logs."""
    folder = tmp_path_factory.mktemp("runs") / "quickstart"
    settings = quickstart.options(["--depth=4", "--hidden-size=12"])
    folder.mkdir()
    write_json({n: v for n, v in vars(settings).items() if n not in ("out", "device")}, folder / "settings.json")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        write_vae(folder / "vae")
        model = quickstart.new_sit(settings)
        state = {key: 0.3 * torch.randn_like(value) for key, value in model.state_dict().items()}
    log = [{"step": step, "denoising": 1.0 / (step + 1)} for step in range(3)]
    for way in ("baseline", "stage1"):
        torch.save({"model": state, "ema": state, "log": log}, folder / f"{way}.pt")
    return folder


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """REPA's layout: sixty posteriors (4, 4, 4) of five classes."""
    folder, generator = tmp_path_factory.mktemp("data") / "vae-sd", torch.Generator().manual_seed(0)
    (folder / "00000").mkdir(parents=True)
    entries = []
    for index in range(60):
        name = f"00000/img-mean-std-{index:08d}.npy"
        mean = torch.randn(4, 4, 4, generator=generator)
        np.save(folder / name, torch.cat([mean, torch.full_like(mean, 0.1)]).numpy())
        entries.append([name, index % 5])
    (folder / "dataset.json").write_text(json.dumps({"labels": entries}))
    return folder


def files_of(out: Path) -> set[str]:
    return {entry.name for entry in out.iterdir()}


def test_a_quickstart_run_becomes_a_page(
    quickstart_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "report"
    call = [str(quickstart_run / "stage1.pt"), f"--out={out}", *FAST]
    report = inspect_features.main(call)
    assert files_of(out) == FILES | {"curves.png"}
    assert (report.layers, report.classes) == (tuple(f"blocks.{i}" for i in range(4)), 10)
    assert {row.guidance_scale for row in report.rows} == {0, 1, 4, report.recipe.guidance_scale}
    assert max(row.contrast for row in report.rows) > 0.01  # the model's own null class was used
    assert str(report) in (out / "report.txt").read_text()
    page = (out / "index.html").read_text()
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert [base64.b64decode(data) for data in pictures] == [
        (out / name).read_bytes() for name in ("report.png", "features.png", "curves.png")
    ]
    assert "stage1 of quickstart" in page
    assert report._repr_html_() in page
    assert not re.search(r'(src|href)="(?!data:)', page)  # one file, that needs no other

    monkeypatch.setattr(st, "layer_report", lambda *args, **kwargs: pytest.fail("measured again"))
    capsys.readouterr()
    assert inspect_features.main(call) == st.LayerReport.load(out / "report.json")
    assert "measured before" in capsys.readouterr().out
    with pytest.raises(Mistake, match=r"other settings.*\n.*k: 3 there, 5 now"):
        inspect_features.main([*call, "--k=5"])


def test_the_batches_are_the_latents_that_the_model_was_trained_on(quickstart_run: Path) -> None:
    run = inspect_features.options([str(quickstart_run / "baseline.pt"), *FAST])
    subject = inspect_features.open_subject(run)
    assert subject.measured == {"time": "repa", "null": {"y": 10}}
    assert [*subject.logs] == ["baseline", "stage 1"]
    x, y = (torch.cat(parts) for parts in zip(*subject.batches(20), strict=True))
    again = torch.cat([x for x, _ in subject.batches(20)])
    assert torch.equal(x, again)
    assert x.shape == (40, 4, 8, 8)
    vae = load_vae(quickstart_run / "vae")
    images, labels = (torch.cat(parts) for parts in zip(*data.digits(32), strict=True))
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))[:40]
    posterior = vae.encode(images[order]).latent_dist
    assert torch.equal(y, labels[order])
    assert ((x / SCALE - posterior.mean) / posterior.std).std() == pytest.approx(1, abs=0.05)
    ink = subject.decode(x[:2])  # dark ink on white paper
    torch.testing.assert_close(ink, -vae.decode(x[:2] / SCALE).sample.clamp(-1, 1))


def test_a_run_of_sit_imagenet_says_all_by_itself(tmp_path: Path, latents: Path) -> None:
    run, out = write_run(tmp_path / "run", 7), tmp_path / "report"
    vae = str(write_vae(tmp_path / "vae", scale=0.18215))
    args = ARGS | {"data": str(latents), "depth": 4, "vae": vae}
    path = write_checkpoint(run / "checkpoints/0000009.pt", 9, args, depth=4)
    (run / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    report = inspect_features.main([str(path), f"--out={out}", *FAST])
    assert files_of(out) == FILES | {"curves.png"}
    assert (len(report.layers), report.classes, report.samples) == (4, 5, 40)
    inspect_features.main([str(run), f"--out={out}", *FAST])  # the same one, as the newest of the run's folder


def test_the_demo_of_sit_imagenet_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = digits(32)[0]
    monkeypatch.setattr("common.demo.digits", lambda size: [LabelledImages(few.images[:30], few.labels[:30])])
    with torch.random.fork_rng():
        write_vae(tmp_path / "vae")
    expected, _ = demo_latents(tmp_path / "vae", vae_steps=2, device="cpu")
    sizes = {"depth": 4, "num_classes": 10, "input_size": 8}
    args = ARGS | sizes | {"data": "demo", "demo_vae": str(tmp_path / "vae"), "demo_vae_steps": 2}
    path = write_checkpoint(tmp_path / "run/checkpoints/0000001.pt", 1, args, **sizes)
    subject = inspect_features.open_subject(inspect_features.options([str(path), *FAST]))
    (_, y), *_ = subject.batches(20)
    assert sorted(y.tolist()) == sorted(
        expected.labels[torch.randperm(30, generator=torch.Generator().manual_seed(0))[:20]].tolist()
    )
    args["demo_vae"] = str(tmp_path / "elsewhere")
    path = write_checkpoint(tmp_path / "run/checkpoints/0000002.pt", 2, args, **sizes)
    with pytest.raises(Mistake, match="The demo's VAE is not at"):
        inspect_features.open_subject(inspect_features.options([str(path), *FAST]))


@pytest.mark.parametrize(
    ("options", "time"),
    [(["--time=sit"], "sit"), (["--time=sit", "--path=cosine"], "sit-gvp"), (["--time=repa"], "repa")],
)
def test_a_foreign_sit_needs_to_be_told_its_time_and_data(
    options: list[str], time: str, tmp_path: Path, latents: Path
) -> None:
    path = write_checkpoint(tmp_path / "foreign.pt", 3, class_dropout_prob=0.0)
    sizes = {"num_heads": 2, "num_classes": 5, "class_dropout_prob": 0.0}
    content = torch.load(path, weights_only=True) | {"args": argparse.Namespace(**sizes)}
    torch.save(content, path)
    with pytest.raises(Mistake, match="--time repa if t = 1 was noise"):
        inspect_features.open_subject(inspect_features.options([str(path), f"--data={latents}"]))
    with pytest.raises(Mistake, match="pass --data FOLDER"):
        inspect_features.open_subject(inspect_features.options([str(path), *options]))
    subject = inspect_features.open_subject(inspect_features.options([str(path), f"--data={latents}", *options]))
    assert subject.measured == {"time": time, "null": None}  # without label dropout there is no null class
    assert subject.decode is None
    assert subject.logs == {}


def test_other_latents_than_the_models_are_refused(tmp_path: Path, latents: Path) -> None:
    known = [f"--data={latents}", *FAST]
    vae = str(write_vae(tmp_path / "vae", scale=0.18215))
    for changes, match in [
        ({"scale_factor": 0.13025}, "trained on 4, 4 and scale 0.13025, shift 0.0"),
        ({"scale_factor": 0.18215, "shift_factor": 3.0}, r"4 pixels a side, scale 0.18215, shift 0.0; .* shift 3.0"),
    ]:
        path = write_checkpoint(tmp_path / "a.pt", 1, ARGS | {"vae": vae} | changes)
        with pytest.raises(Mistake, match=rf"trained on other latents than these(.|\n)*{match}"):
            inspect_features.open_subject(inspect_features.options([str(path), *known]))
    path = write_checkpoint(tmp_path / "a.pt", 1, ARGS | {"vae": vae})
    subject = inspect_features.open_subject(inspect_features.options([str(path), *known]))
    x, _ = next(iter(subject.batches(20)))
    torch.testing.assert_close(subject.decode(x), -load_vae(vae).decode(x / 0.18215).sample.clamp(-1, 1))
    shifted = write_vae(tmp_path / "shifted", scale=0.18215, shift_factor=3.0)
    with pytest.raises(Mistake, match="is not the one that the latents of"):
        inspect_features.open_subject(inspect_features.options([str(path), *known, f"--vae={shifted}"]))


def test_an_mmdit_is_measured_without_labels(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    items = [
        (torch.randn(4, 4, 4, generator=g), torch.full((4, 4, 4), 0.1), torch.randn(2, 3, 6, generator=g))
        for _ in range(30)
    ]
    write_coco_features(tmp_path / "features", "train", items, torch.zeros(3, 6), scaling=Scaling(0.5))
    sizes = {"input_size": 4, "patch_size": 2, "in_channels": 4, "hidden_size": 16, "depth": 3, "num_heads": 2}
    sizes |= {"context_size": 6}
    with torch.random.fork_rng():
        state = {key: 0.3 * torch.randn_like(value) for key, value in MMDiT(**sizes).state_dict().items()}
    content = {"model": state, "ema": state, "steps": 5}
    torch.save(content | {"args": sizes | {"data": str(tmp_path / "features"), "vae": None}}, tmp_path / "t2i.pt")
    out = tmp_path / "report"
    report = inspect_features.main([str(tmp_path / "t2i.pt"), f"--out={out}", *FAST])
    assert files_of(out) == FILES
    assert report.layers == tuple(f"joint_blocks.{i}" for i in range(3))
    assert report.classes is None
    assert min(row.contrast for row in report.rows) > 0
    assert (report.samples, report.recipe.depth) == (30, 3)


class TestAModelOfOnesOwn:
    @pytest.fixture(autouse=True)
    def module(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A module in the working directory, and the weights of its model."""
        monkeypatch.chdir(tmp_path)
        name = f"mine_{tmp_path.name.replace('-', '_')}"
        self.name = name
        Path(f"{name}.py").write_text(
            textwrap.dedent(
                """
                import torch
                from toys import ToyDiT

                Hostile = type("<script>alert(1)</script>", (ToyDiT,), {})

                def build():
                    return Hostile()

                def batches():
                    g = torch.Generator().manual_seed(0)
                    for _ in range(2):
                        yield {"latents": torch.randn(20, 4, 8, 8, generator=g), "y": torch.arange(20) % 10,
                               "labels": torch.arange(20) % 4}

                def null():
                    return {"y": lambda call: torch.full_like(call["y"], 10)}

                def wrong():
                    return 3

                CONSTANT = 3
                """
            )
        )
        torch.save(self.build().state_dict(), "weights.pt")

    def build(self) -> torch.nn.Module:
        found: torch.nn.Module = imported(f"{self.name}:build", "--model")()
        return found

    def call(self, *options: str) -> list[str]:
        own = [f"--model={self.name}:build", f"--data={self.name}:batches", "--time=sit"]
        return ["weights.pt", *FAST, *own, *options]

    def test_is_made_by_its_function_and_its_names_are_no_markup(self) -> None:
        report = inspect_features.main(self.call("--out=a", "--null=y=10", "--layers=blocks.0,blocks.2"))
        assert report.layers == ("blocks.0", "blocks.2")
        assert report.classes == 4
        assert files_of(Path("a")) == FILES
        page = Path("a/index.html").read_text()
        assert "<script" not in page
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
        same = inspect_features.main(
            self.call("--out=b", f"--null={self.name}:null", "--layers=blocks.0,blocks.2", "--tokens=:")
        )
        assert same == report

    def test_a_picture_that_cannot_be_is_explained(self) -> None:
        inspect_features.main(self.call("--out=a", "--null=y=10", "--layers=blocks.0,blocks.1.fc1,blocks.2"))
        assert files_of(Path("a")) == FILES - {"features.png"}
        assert "Not drawn: A colour basis is taken from tokens" in Path("a/index.html").read_text()

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            (["--model=nowhere:build"], "'nowhere:build' is no module:callable that can be imported"),
            (["--model={}:nothing"], "has no attribute 'nothing'"),
            (["--model={}:CONSTANT"], "is a int, which cannot be called"),
            (["--model={}:wrong"], "must return the model; it returned int"),
            (["--null=y"], "--null is name=number, or one module:function"),
            (["--null=y=ten"], "--null is name=number"),
        ],
    )
    def test_a_wrong_name_is_an_error(self, options: list[str], match: str) -> None:
        with pytest.raises(Mistake, match=match):
            inspect_features.main(self.call(*(option.format(self.name) for option in options)))
        assert not Path("runs").exists()

    def test_what_is_missing_is_named(self, capsys: pytest.CaptureFixture[str]) -> None:
        for given, match in [
            ([f"--model={self.name}:build"], "--data and --time must be given too"),
            (["--null=y=10"], "--null goes with --model"),
        ]:
            with pytest.raises(SystemExit):
                inspect_features.main(["weights.pt", *given])
            assert match in capsys.readouterr().err
        with pytest.raises(Mistake, match=r"no file nothing\.pt"):
            inspect_features.main(["nothing.pt"])
        with pytest.raises(Mistake, match="holds no SiT"):
            inspect_features.main(["weights.pt", "--time=sit"])  # no SiT
