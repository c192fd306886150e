"""Sampling at a tiny size: every file, every way to go on, and the same images however the work is cut."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sample
import torch
from common import loading
from common.data_files import DataError
from common.loading import sit_from_checkpoint
from common.options import Mistake
from common.processes import Processes
from common.samplers import image_generator
from common.vae import load_vae
from numpy.typing import NDArray
from PIL import Image
from tiny_runs import ARGS, FAST, SCALE, images_of, write_checkpoint, write_run, write_vae
from torch import Tensor

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "tiny", 4, 12)


@pytest.fixture(scope="module")
def finished(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("samples") / "all"
    sample.main([f"--checkpoint={run_folder}", f"--out={out}", *FAST])
    return out


def images_with(run_folder: Path, out: Path, *more: str) -> NDArray[np.uint8]:
    sample.main([f"--checkpoint={run_folder}", f"--out={out}", *FAST, *more])
    return images_of(out)


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


def test_images_do_not_depend_on_the_batches(run_folder: Path, finished: Path, tmp_path: Path) -> None:
    expected = images_of(finished).astype(int)
    for size in (1, 7):
        found = images_with(run_folder, tmp_path / str(size), f"--batch-size={size}").astype(int)
        # A matrix product may round differently in another batch: 1e-7 of a pixel's range, rarely one grey level.
        assert np.abs(found - expected).max() <= 1
        assert (found != expected).mean() < 1e-3


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


def test_more_images_are_added_to_those_that_are_there(run_folder: Path, finished: Path, tmp_path: Path) -> None:
    for count in (5, 10):
        found = images_with(run_folder, tmp_path / "out", f"--num-samples={count}")
    assert {"samples_5.npz", "samples_10.npz"} <= {entry.name for entry in (tmp_path / "out").iterdir()}
    assert np.abs(found.astype(int) - images_of(finished)).max() <= 1


def test_another_run_is_never_written_into(run_folder: Path, finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    older = run_folder / "checkpoints/0000004.pt"
    for arguments, match in [
        ([f"--checkpoint={run_folder}", "--seed=1"], "seed: 0 there, 1 now"),
        ([f"--checkpoint={older}"], r"checkpoint: '0000012.pt' there, '0000004.pt' now; checkpoint_weights: "),
        ([f"--checkpoint={run_folder}", "--weights=model"], "checkpoint_weights: '[0-9a-f]{16}' there"),
        ([f"--checkpoint={run_folder}", "--cfg-scale=1.9"], "cfg_scale: 1.0 there, 1.9 now"),
    ]:
        with pytest.raises(Mistake, match=match):
            sample.main([*arguments, f"--out={finished}", *FAST])
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_labels_leave_the_noise_as_it_is() -> None:
    def drawn(text: str, numbers: range, seed: int = 0) -> tuple[list[int], Tensor]:
        generators = [image_generator(seed, number) for number in numbers]
        labels = sample.labels_named(text, 5)(numbers, generators)
        return labels.tolist(), torch.stack([torch.randn(3, generator=generator) for generator in generators])

    labels, noise = drawn("random", range(2000))
    assert (torch.tensor(labels).bincount(minlength=5) - 400).abs().max() < 4 * (2000 * 0.2 * 0.8) ** 0.5
    assert drawn("random", range(1500, 2000))[0] == labels[1500:]
    assert drawn("random", range(2000), seed=1)[0] != labels
    for text, expected in [("balanced", [0, 1, 2, 3, 4, 0, 1, 2]), ("4, 1", [4, 1, 4, 1, 4, 1, 4, 1])]:
        found, same = drawn(text, range(8))
        assert found == expected
        assert torch.equal(same, noise[:8])


def test_no_two_images_of_a_run_begin_alike() -> None:
    seeds = {image_generator(3, index).initial_seed() for index in range(0, 1_000_000, 997)}
    assert len(seeds) == 1004
    assert max(seeds) < 2**32  # torch's CPU generator takes no more


def test_two_processes_make_the_images_of_one(run_folder: Path, finished: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run = subprocess.run(
        [*launch, EXAMPLES / "sample.py", f"--checkpoint={run_folder}", f"--out={tmp_path / 'out'}", *FAST],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("10 images of") == 1  # one process alone reports
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
    with pytest.raises(Mistake, match=r"checkpoint: '0000004.pt' there, '0000012.pt' now"):
        sample.sample(sample.options([f"--checkpoint={run_folder}", f"--out={out}", *FAST]), second)
    assert not any((out / "images").iterdir())


def job_of(*arguments: object) -> sample.Job:
    return sample.new_job(sample.options([*map(str, arguments), "--out=unused", *FAST]))


def test_a_model_of_the_sit_repository_is_turned_around(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_checkpoint(tmp_path / "published.pt", 3, {"num_heads": 2, "num_classes": 5})
    known = [f"--checkpoint={path}", f"--vae={run_folder / 'vae'}"]
    with pytest.raises(Mistake, match=r"does not say what its training called t(.|\n)*--time repa (.|\n)*--time sit"):
        job_of(*known)
    plain = sit_from_checkpoint(path)[0]
    x, t, y = torch.ones(2, 4, 4, 4), torch.tensor([0.2, 0.9]), torch.tensor([1, 5])
    with torch.no_grad():
        assert torch.equal(job_of(*known, "--time=repa").model(x, t, y), plain(x, t, y))
        assert torch.equal(job_of(*known, "--time=sit").model(x, t, y), -plain(x, 1 - t, y))
    assert job_of(*known, "--time=sit").decided["time"] == "sit"
    monkeypatch.setitem(loading.SIZES, "tiny", (2, 16, 2))
    monkeypatch.setattr(loading, "_IMAGENET_CLASSES", 5)
    torch.save(plain.state_dict(), tmp_path / "bare.pt")
    run = sample.options([f"--checkpoint={tmp_path / 'bare.pt'}", *known[1:], "--time=sit", "--out=unused", *FAST])
    sample.new_job(run)
    assert run.weights == "bare"


def test_latents_are_decoded_with_the_vaes_own_shift(run_folder: Path, finished: Path, tmp_path: Path) -> None:
    plain = write_checkpoint(tmp_path / "run/plain.pt", 12, ARGS)  # says no scaling, as others' files
    images = {}
    for name, config in {"none": {}, "shift": {"shift_factor": 3.0}}.items():
        vae = write_vae(tmp_path / name, **config)
        images[name] = images_with(plain, tmp_path / f"out-{name}", f"--vae={vae}")
    assert np.array_equal(images["none"], images_of(finished))
    assert not np.array_equal(images["none"], images["shift"])
    with pytest.raises(Mistake, match=r"other settings(.|\n)*shift_factor: 3.0 there, 0.0 now"):
        images_with(plain, tmp_path / "out-shift", f"--vae={tmp_path / 'none'}")


def test_a_vae_that_does_not_fit_is_named(run_folder: Path, tmp_path: Path) -> None:
    newest, other = f"--checkpoint={run_folder}", write_vae(tmp_path / "other", scale=0.5)
    with pytest.raises(Mistake, match=r"scale 0.5, shift 0.0 in the VAE, scale 0.8, shift 0.0 in the latents"):
        job_of(newest, f"--vae={other}")
    with pytest.raises(DataError, match=r"no VAE of diffusers' AutoencoderKL at '.*nowhere'"):
        job_of(newest, f"--vae={tmp_path / 'nowhere'}")
    for name, args, sizes, match in [
        ("odd", {"scale_factor": "0.8"}, {}, r"odd.pt records a scaling that no latents can have"),
        ("wide", {"in_channels": 3}, {"in_channels": 3}, r"decodes latents of 4 channels; .*wide.pt have 3"),
    ]:
        path = write_checkpoint(tmp_path / f"{name}.pt", 3, ARGS | args, **sizes)
        with pytest.raises((Mistake, DataError), match=match):
            job_of(f"--checkpoint={path}", f"--vae={run_folder / 'vae'}")
    nameless = write_checkpoint(tmp_path / "nameless.pt", 3, ARGS | {"vae": None})
    with pytest.raises(Mistake, match=r"does not name its VAE(.|\n)*stabilityai/sd-vae-ft-mse"):
        job_of(f"--checkpoint={nameless}")


def test_settings_without_sense_are_named_before_a_folder_is_made(run_folder: Path, tmp_path: Path) -> None:
    for argument, match in [
        ("--labels=3,5", "each below 5; got '3,5'"),
        ("--steps=1", "at least 2 steps"),
        ("--guidance-low=0.9", "low <= high"),
    ]:
        given = [*FAST, f"--checkpoint={run_folder}", "--guidance-high=0.1", argument]
        with pytest.raises(Mistake, match=match):
            sample.main([*given, f"--out={tmp_path / 'out'}"])
    sizes = {"class_dropout_prob": 0.0}
    unconditional = write_checkpoint(tmp_path / "all.pt", 3, ARGS | sizes | {"vae": str(run_folder / "vae")}, **sizes)
    with pytest.raises(Mistake, match="needs the null class"):
        job_of(f"--checkpoint={unconditional}", "--cfg-scale=2")
    assert not (tmp_path / "out").exists()


def test_latents_that_are_not_finite_are_named(run_folder: Path) -> None:
    def broken(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return x * torch.where(t > 0.9, 1.0, float("inf"))[:, None, None, None]

    found = r"not finite for 3 of 3 images.\nFound: image 4, by sde in 3 steps(.|\n)*Take an earlier checkpoint"
    with pytest.raises(Mistake, match=found):
        job_of(f"--checkpoint={run_folder}").sampler.images(broken, [4, 5, 6], "cpu")


@pytest.mark.parametrize(
    ("name", "product"), [("fp32", torch.float32), ("tf32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_the_precision_is_the_models_alone(name: str, product: torch.dtype) -> None:
    seen = set()

    def switches() -> tuple[object, ...]:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.add((x.dtype, (x @ x.mT).dtype, *switches()))
        return x

    before, x = switches(), torch.ones(1, 4, 4, 4)
    sample.in_precision(model, name, "cpu")(x, x[:, 0, 0, 0], x[:, 0, 0, 0])
    assert seen == {(torch.float32, product, "high" if name == "tf32" else "highest", name == "tf32")}
    assert switches() == before
