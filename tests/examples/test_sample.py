"""Sampling at a tiny size: every file, every way to go on, and the same images however the work is cut."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sample
import torch
from common.image_seeds import classes_of, draw, image_generator
from common.load_sit import sit_from_checkpoint
from common.processes import Processes
from common.vae import load_vae
from PIL import Image
from tiny_runs import ARGS, FAST, SCALE, SIZES, images_of, write_checkpoint, write_run, write_vae

from selftrans_reg.errors import CheckpointError, ShapeError

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "tiny", 4, 12)


@pytest.fixture(scope="module")
def finished(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("samples") / "all"
    sample.main([f"--checkpoint={run_folder}", f"--out={out}", *FAST])
    return out


def test_every_file_is_there_and_the_npz_is_what_adms_evaluator_reads(finished: Path) -> None:
    assert {entry.name for entry in finished.iterdir()} == {"settings.json", "images", "samples_10.npz", "grid.png"}
    assert [path.name for path in sorted((finished / "images").iterdir())] == [f"{i:06d}.png" for i in range(10)]
    with np.load(finished / "samples_10.npz", allow_pickle=False) as archive:
        images, labels = archive["arr_0"], archive["arr_1"]
    assert images.dtype == np.uint8
    assert images.shape == (10, 16, 16, 3)
    assert np.array_equal(images, images_of(finished))
    assert labels.shape == (10,)
    assert len(np.unique(images.reshape(10, -1), axis=0)) == 10
    grid = np.asarray(Image.open(finished / "grid.png"))
    assert grid.shape == (16, 10 * 18 - 2, 3)
    assert np.array_equal(grid[:, 18:34], images[1])


def test_a_folder_means_its_newest_checkpoint_and_the_averaged_weights(
    run_folder: Path, finished: Path, tmp_path: Path
) -> None:
    newest = run_folder / "checkpoints/0000012.pt"
    ways = [(newest, "ema", True), (newest, "model", False), (run_folder / "checkpoints/0000004.pt", "ema", False)]
    for i, (path, entry, same) in enumerate(ways):
        sample.main([f"--checkpoint={path}", f"--weights={entry}", f"--out={tmp_path / str(i)}", *FAST])
        assert np.array_equal(images_of(tmp_path / str(i)), images_of(finished)) == same


def test_an_image_is_its_formula(run_folder: Path, finished: Path) -> None:
    """Image 7, alone and written out: the seed's noise, three Euler-Maruyama steps, the VAE, and DiT's rounding."""
    model, _ = sit_from_checkpoint(run_folder / "checkpoints/0000012.pt")
    vae = load_vae(run_folder / "vae")
    generator = image_generator(0, 7)
    y = torch.randint(5, (), generator=generator).reshape(1)
    x = torch.randn(4, 4, 4, generator=generator).double()[None]
    with torch.no_grad():
        for t, t_next in [(1.0, 0.52), (0.52, 0.04), (0.04, 0.0)]:
            v = model(x.float(), torch.tensor([t]), y).double()
            score = (-(1 - t) * v - x) / (t**2 + (1 - t) * t)
            x = x + (v - t * score) * (t_next - t)
            if t_next:
                x = x + (2 * t * (t - t_next)) ** 0.5 * torch.randn(4, 4, 4, generator=generator)
        pixels = vae.decode(x.float() / SCALE).sample.clamp(-1, 1)[0, 0]
    expected = np.floor((127.5 * pixels + 128).clamp(0, 255).numpy())
    assert np.abs(images_of(finished)[7].astype(float) - expected[:, :, None]).max() <= 1
    with np.load(finished / "samples_10.npz") as archive:
        assert archive["arr_1"][7] == y.item()


@pytest.mark.parametrize("sampler", ["euler", "heun", "sde"])
def test_images_do_not_depend_on_the_batches(run_folder: Path, tmp_path: Path, sampler: str) -> None:
    found = []
    for size in (1, 4, 7):
        out = tmp_path / str(size)
        sample.main(
            [f"--checkpoint={run_folder}", f"--out={out}", *FAST, f"--batch-size={size}", f"--sampler={sampler}"]
        )
        found.append(images_of(out).astype(int))
    # A matrix product may round differently in another batch: that is 1e-7 of a pixel's range, rarely one grey level.
    for other in found[1:]:
        assert np.abs(other - found[0]).max() <= 1
        assert (other != found[0]).mean() < 1e-3
    assert found[0].std() > 10


def test_samplers_differ_and_guidance_acts_in_its_interval(run_folder: Path, finished: Path, tmp_path: Path) -> None:
    ways = {
        "euler": ["--sampler=euler"],
        "heun": ["--sampler=heun"],
        "guided": ["--cfg-scale=3"],
        "guided_late": ["--cfg-scale=3", "--guidance-high=0.6"],
        "never": ["--cfg-scale=3", "--guidance-low=0.1", "--guidance-high=0.2"],
    }
    images = {"sde": images_of(finished)}
    for name, settings in ways.items():
        sample.main([f"--checkpoint={run_folder}", f"--out={tmp_path / name}", *FAST, *settings])
        images[name] = images_of(tmp_path / name)
    assert np.array_equal(images.pop("never"), images["sde"])  # no step begins between 0.1 and 0.2
    names = list(images)
    for i, name in enumerate(names):
        for other in names[i + 1 :]:
            assert not np.array_equal(images[name], images[other]), (name, other)


def test_going_on_makes_only_what_is_missing(
    run_folder: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"--checkpoint={run_folder}", f"--out={tmp_path / 'out'}", *FAST]
    sample.main(arguments)
    for name in ("images/000002.png", "images/000009.png", "samples_10.npz"):
        (tmp_path / "out" / name).unlink()
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/images").iterdir()}
    sample.main(arguments)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert np.array_equal(images_of(tmp_path / "out"), images_of(finished))
    capsys.readouterr()
    sample.main(arguments)
    printed = capsys.readouterr().out
    assert "samples_10.npz: finished before" in printed
    assert "10 images of" in printed
    assert "images/s" not in printed  # none was made


def test_an_interrupted_run_goes_on(
    run_folder: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_png, written = sample.write_png, []

    def interrupted(image: object, path: Path) -> None:
        if len(written) == 6:
            raise KeyboardInterrupt
        written.append(path.name)
        write_png(image, path)

    arguments = [f"--checkpoint={run_folder}", f"--out={tmp_path / 'out'}", *FAST]
    with monkeypatch.context() as patch:
        patch.setattr(sample, "write_png", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sample.main(arguments)
    assert {entry.name for entry in (tmp_path / "out").iterdir()} == {"settings.json", "images"}
    sample.main(arguments)
    assert np.array_equal(images_of(tmp_path / "out"), images_of(finished))


def test_more_images_are_added_to_those_that_are_there(run_folder: Path, finished: Path, tmp_path: Path) -> None:
    for count in (5, 10):
        sample.main([f"--checkpoint={run_folder}", f"--out={tmp_path / 'out'}", *FAST, f"--num-samples={count}"])
    assert {"samples_5.npz", "samples_10.npz"} <= {entry.name for entry in (tmp_path / "out").iterdir()}
    assert np.abs(images_of(tmp_path / "out").astype(int) - images_of(finished)).max() <= 1


def test_another_run_is_never_written_into(run_folder: Path, finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    older = run_folder / "checkpoints/0000004.pt"
    for arguments, match in [
        ([f"--checkpoint={run_folder}", "--seed=1"], "seed: 0 there, 1 now"),
        ([f"--checkpoint={older}"], r"checkpoint: '0000012.pt' there, '0000004.pt' now; checkpoint_weights: "),
        ([f"--checkpoint={run_folder}", "--weights=model"], "checkpoint_weights: '[0-9a-f]{16}' there"),
        ([f"--checkpoint={run_folder}", "--cfg-scale=1.9"], "cfg_scale: 1.0 there, 1.9 now"),
    ]:
        with pytest.raises(ValueError, match=match):
            sample.main([*arguments, f"--out={finished}", *FAST])
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


@pytest.mark.parametrize(
    ("text", "expected"), [("balanced", [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]), ("4, 1", [4, 1, 4, 1, 4, 1, 4, 1, 4, 1])]
)
def test_labels_that_are_given(run_folder: Path, text: str, expected: list[int]) -> None:
    drawn = draw(0, range(10), classes_of(text, 5), SIZES)
    assert drawn.labels.tolist() == expected
    assert torch.equal(drawn.noise, draw(0, range(10), None, SIZES).noise)  # labels leave the noise as it is


def test_random_labels_are_uniform_and_follow_the_seed() -> None:
    small = SIZES | {"in_channels": 0}
    labels = draw(0, range(2000), None, small).labels
    counts = labels.bincount(minlength=5)
    assert (counts - 400).abs().max() < 4 * (2000 * 0.2 * 0.8) ** 0.5
    assert torch.equal(labels[1500:], draw(0, range(1500, 2000), None, small).labels)
    assert not torch.equal(labels, draw(1, range(2000), None, small).labels)


def test_no_two_images_of_a_run_begin_alike() -> None:
    def first(seed: int) -> float:
        return torch.randn(1, generator=torch.Generator().manual_seed(seed)).item()

    assert first(7) == first(7 + 2**32)  # why the numbers count up, instead of being hashes of 64 bits
    seeds = {image_generator(3, index).initial_seed() for index in range(0, 1_000_000, 997)}
    assert len(seeds) == 1004
    assert max(seeds) < 2**32


def test_two_processes_make_the_images_of_one(run_folder: Path, finished: Path, tmp_path: Path) -> None:
    run = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
            *(EXAMPLES / "sample.py", f"--checkpoint={run_folder}", f"--out={tmp_path / 'out'}", *FAST),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("10 images of") == 1  # one process alone reports
    assert np.array_equal(images_of(tmp_path / "out"), images_of(finished))
    with np.load(tmp_path / "out/samples_10.npz") as own, np.load(finished / "samples_10.npz") as other:
        assert all(np.array_equal(own[name], other[name]) for name in ("arr_0", "arr_1"))


def test_a_process_that_finds_a_newer_checkpoint_stops(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two processes, whose run's folder was given another checkpoint since the first one looked."""
    older, out = run_folder / "checkpoints/0000004.pt", tmp_path / "out"
    sample.main([f"--checkpoint={older}", f"--out={out}", *FAST])
    for png in (out / "images").iterdir():
        png.unlink()
    monkeypatch.setenv("RANK", "1")
    second = Processes()
    monkeypatch.setattr(second, "meet", lambda: None)
    with pytest.raises(ValueError, match=r"checkpoint: '0000004.pt' there, '0000012.pt' now"):
        sample.sample(sample.options([f"--checkpoint={run_folder}", f"--out={out}", *FAST]), second)
    assert not any((out / "images").iterdir())


def sampler_of(*arguments: object) -> sample.Sampler:
    return sample.new_sampler(sample.options([*map(str, arguments), "--out=unused", *FAST]))[0]


def test_a_model_of_the_sit_repository_is_turned_around(run_folder: Path, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "published.pt", 3)
    known = [f"--checkpoint={path}", "--num-heads=2", "--num-classes=5", f"--vae={run_folder / 'vae'}"]
    for match in ["does not say what its training called t", "--time repa if", "--time sit if"]:
        with pytest.raises(ValueError, match=match):
            sampler_of(*known)
    plain = sit_from_checkpoint(path, num_heads=2, num_classes=5)[0]
    x, t, y = torch.ones(2, 4, 4, 4), torch.tensor([0.2, 0.9]), torch.tensor([1, 5])
    with torch.no_grad():
        assert torch.equal(sampler_of(*known, "--time=repa").model(x, t, y), plain(x, t, y))
        assert torch.equal(sampler_of(*known, "--time=sit").model(x, t, y), -plain(x, 1 - t, y))
    assert sampler_of(*known, "--time=sit").run.weights == "ema"
    torch.save(plain.state_dict(), tmp_path / "bare.pt")
    assert sampler_of(f"--checkpoint={tmp_path / 'bare.pt'}", *known[1:], "--time=sit").run.weights == "bare"
    with pytest.raises(ValueError, match=r"in the convention 'repa'.\nFound: --time sit. Leave it out"):
        sampler_of(f"--checkpoint={run_folder}", "--time=sit")


def test_the_path_is_the_runs_or_the_given_one(run_folder: Path, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "cosine.pt", 3, ARGS | {"path": "cosine", "vae": str(run_folder / "vae")})
    assert sampler_of(f"--checkpoint={path}").path == "cosine"
    with pytest.raises(ValueError, match=r"trained on the cosine path.\nFound: --path linear"):
        sampler_of(f"--checkpoint={path}", "--path=linear")


def test_a_vae_that_does_not_fit_is_named(run_folder: Path, tmp_path: Path) -> None:
    newest = f"--checkpoint={run_folder}"
    other = write_vae(tmp_path / "other", scale=0.5)
    for match in ["scales its latents by 0.5; the model was trained on latents times 0.8", "or --scale-factor"]:
        with pytest.raises(ValueError, match=match):
            sampler_of(newest, f"--vae={other}")
    assert sampler_of(newest, f"--vae={other}", "--scale-factor=0.8").vae.config.scaling_factor == 0.8
    with pytest.raises(ValueError, match="above 0; got 0"):
        sampler_of(newest, "--scale-factor=0")
    with pytest.raises(CheckpointError, match=r"no VAE of diffusers' AutoencoderKL at '.*nowhere'"):
        sampler_of(newest, f"--vae={tmp_path / 'nowhere'}")

    wide = write_checkpoint(tmp_path / "wide.pt", 3, ARGS | {"in_channels": 3}, in_channels=3)
    for match in ["decodes latents of 4 channels; .*wide.pt makes 3", "Pass with --vae the one"]:
        with pytest.raises(CheckpointError, match=match):
            sampler_of(f"--checkpoint={wide}", f"--vae={run_folder / 'vae'}")
    nameless = write_checkpoint(tmp_path / "nameless.pt", 3, ARGS | {"vae": None})
    for match in ["does not name its VAE", "Found: vae=None", "stabilityai/sd-vae-ft-mse"]:
        with pytest.raises(ValueError, match=match):
            sampler_of(f"--checkpoint={nameless}")


def test_settings_without_sense_are_named_before_a_folder_is_made(run_folder: Path, tmp_path: Path) -> None:
    vae = f"--vae={run_folder / 'vae'}"
    unconditional = write_checkpoint(tmp_path / "all.pt", 3, ARGS | {"class_dropout_prob": 0.0}, class_dropout_prob=0.0)
    for arguments, error, match in [
        ([f"--checkpoint={run_folder}", "--labels=3,5"], ValueError, "each below 5; got '3,5'"),
        ([f"--checkpoint={run_folder}", "--labels=cats"], ValueError, "'random', 'balanced', or classes"),
        ([f"--checkpoint={run_folder}", "--steps=1"], ValueError, "at least 2 steps"),
        ([f"--checkpoint={run_folder}", "--guidance-low=0.9", "--guidance-high=0.1"], ValueError, "low <= high"),
        ([f"--checkpoint={unconditional}", vae, "--cfg-scale=2"], ValueError, "needs the null class"),
        ([f"--checkpoint={run_folder}", "--model=SiT-B/2"], ValueError, "depth: 2 there, 12 said"),
        ([f"--checkpoint={tmp_path / 'empty'}"], ValueError, "no checkpoint of a run"),
    ]:
        with pytest.raises(error, match=match):
            sample.main([*FAST, *arguments, f"--out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


def test_latents_that_are_not_finite_are_named(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = sampler_of(f"--checkpoint={run_folder}")
    broken = sampler._replace(model=lambda x, t, y: x * torch.where(t > 0.9, 1.0, float("inf"))[:, None, None, None])
    for match in ["not finite for 3 of 3 images", "Found: image 4, with sde, --steps 3", "Take an earlier checkpoint"]:
        with pytest.raises(ShapeError, match=match):
            broken.images([4, 5, 6])


@pytest.mark.parametrize(
    ("name", "product", "tf32"),
    [
        ("fp32", torch.float32, False),
        ("tf32", torch.float32, True),
        ("fp16", torch.float16, False),
        ("bf16", torch.bfloat16, False),
    ],
)
def test_the_precision_is_the_models_alone(run_folder: Path, name: str, product: torch.dtype, tf32: bool) -> None:
    seen = set()
    sampler = sampler_of(f"--checkpoint={run_folder}", f"--precision={name}")

    def switches() -> tuple[object, ...]:
        cudnn = torch.backends.cudnn
        return torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.enabled

    def model(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen.add((x.dtype, (x @ x.mT).dtype, *switches()))
        return x

    before = switches()
    sampler._replace(model=model).images([0])
    assert seen == {(torch.float32, product, "high" if tf32 else "highest", tf32, True)}
    assert switches() == before
