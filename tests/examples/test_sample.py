"""Sampling at a tiny size: every file, every way to go on, and the same images however the work is cut."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sample
import torch
from common.data_files import DataError
from common.loading import sit_from_checkpoint
from common.options import Mistake
from common.processes import Processes
from common.samplers import image_generator
from common.vae import Scaling, load_vae
from PIL import Image
from tiny_runs import ARGS, FAST, SCALE, SIZES, images_of, torchrun, write_checkpoint, write_run, write_vae
from torch import Tensor


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "tiny", 4, 12)


def sampled(checkpoint: Path, out: Path, *more: str) -> Path:
    sample.main([f"--checkpoint={checkpoint}", f"--out={out}", *FAST, *more])
    return out


def job_of(checkpoint: Path, *more: str) -> sample.Job:
    return sample.new_job(sample.options([f"--checkpoint={checkpoint}", "--out=unused", *FAST, *more]))


@pytest.fixture(scope="module")
def finished(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sampled(run_folder, tmp_path_factory.mktemp("samples") / "all")


def test_every_file_is_there_and_the_npz_is_what_adms_evaluator_reads(finished: Path) -> None:
    assert {entry.name for entry in finished.iterdir()} == {"settings.json", "images", "samples_10.npz", "grid.png"}
    assert [path.name for path in sorted((finished / "images").iterdir())] == [f"{i:06d}.png" for i in range(10)]
    with np.load(finished / "samples_10.npz", allow_pickle=False) as archive:
        images, labels = archive["arr_0"], archive["arr_1"]
    assert (images.dtype, images.shape, labels.shape) == (np.uint8, (10, 16, 16, 3), (10,))
    assert np.array_equal(images, images_of(finished))
    assert len(np.unique(images.reshape(10, -1), axis=0)) == 10
    grid = np.asarray(Image.open(finished / "grid.png"))
    assert grid.shape == (16, 10 * 18 - 2, 3)
    assert np.array_equal(grid[:, 18:34], images[1])


def test_an_image_is_its_formula(run_folder: Path, finished: Path) -> None:
    """Image 7, alone and written out: the seed's noise, three Euler-Maruyama steps, the VAE, and DiT's rounding."""
    model, _ = sit_from_checkpoint(run_folder / "checkpoints/0000012.pt")  # the newest, and its average
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


def test_images_depend_neither_on_the_batches_nor_on_how_many_there_are_and_are_made_once(
    run_folder: Path, finished: Path, tmp_path: Path
) -> None:
    for name, option in [("a", "--batch-size=1"), ("b", "--num-samples=5"), ("b", "--batch-size=7")]:
        times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("b/images/*")}
        (tmp_path / "b/images/000002.png").unlink(missing_ok=True)
        found = images_of(sampled(run_folder, tmp_path / name, option)).astype(int)
        # A matrix product may round differently in another batch: 1e-7 of a pixel's range, rarely one grey level.
        differences = np.abs(found - images_of(finished)[: len(found)])
        assert differences.max() <= 1
        assert (differences != 0).mean() < 1e-3
    made_again = [path.name for path, time in times.items() if path.stat().st_mtime_ns != time]
    assert (len(times), made_again) == (5, ["000002.png"])
    assert {"samples_5.npz", "samples_10.npz"} <= {entry.name for entry in (tmp_path / "b").iterdir()}


def test_another_run_is_never_written_into(run_folder: Path, finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    for checkpoint, option, match in [
        ("", "--seed=1", "seed: 0 there, 1 now"),
        ("checkpoints/0000004.pt", "--seed=0", "checkpoint: '0000012.pt' there, '0000004.pt' now; checkpoint_weights"),
        ("", "--weights=model", "checkpoint_weights: '[0-9a-f]{16}' there"),
        ("", "--cfg-scale=1.9", "cfg_scale: 1.0 there, 1.9 now"),
    ]:
        with pytest.raises(Mistake, match=match):
            sampled(run_folder / checkpoint, finished, option)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_images_have_random_numbers_of_their_own_whatever_their_labels_come_from() -> None:
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
    seeds = {image_generator(3, number).initial_seed() for number in range(0, 1_000_000, 997)}
    assert len(seeds) == 1004
    assert max(seeds) < 2**32  # torch's CPU generator takes no more


def test_two_processes_make_the_images_of_one(run_folder: Path, finished: Path, tmp_path: Path) -> None:
    printed = torchrun("sample.py", f"--checkpoint={run_folder}", f"--out={tmp_path / 'out'}", *FAST)
    assert printed.count("10 images of") == 1  # one process alone reports
    with np.load(tmp_path / "out/samples_10.npz") as own, np.load(finished / "samples_10.npz") as other:
        assert all(np.array_equal(own[name], other[name]) for name in ("arr_0", "arr_1"))


def test_a_process_that_finds_a_newer_checkpoint_stops(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two processes, whose run's folder was given another checkpoint since the first one looked."""
    out = sampled(run_folder / "checkpoints/0000004.pt", tmp_path / "out")
    for png in (out / "images").iterdir():
        png.unlink()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(Processes, "meet", lambda self: None)
    with pytest.raises(Mistake, match=r"checkpoint: '0000004.pt' there, '0000012.pt' now"):
        sample.sample(sample.options([f"--checkpoint={run_folder}", f"--out={out}", *FAST]), Processes())
    assert not any((out / "images").iterdir())


def test_a_model_of_the_sit_repository_is_turned_around(run_folder: Path, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "published.pt", 3, {"num_heads": 2, "num_classes": 5})
    plain = sit_from_checkpoint(path)[0]
    x, t, y = torch.ones(2, 4, 4, 4), torch.tensor([0.2, 0.9]), torch.tensor([1, 5])
    with torch.no_grad():
        for time, expected in {"repa": plain(x, t, y), "sit": -plain(x, 1 - t, y)}.items():
            job = job_of(path, f"--vae={run_folder / 'vae'}", f"--time={time}")
            assert torch.equal(job.model(x, t, y), expected)
            assert job.decided["time"] == time


def test_latents_whose_scaling_nobody_recorded_have_their_vaes(tmp_path: Path) -> None:
    plain, vae = write_checkpoint(tmp_path / "plain.pt", 12, ARGS), write_vae(tmp_path / "vae", shift_factor=3.0)
    assert job_of(plain, f"--vae={vae}").sampler.scaling == Scaling(SCALE, 3.0)


@pytest.mark.parametrize(
    ("args", "options", "match"),
    [
        ({"scale_factor": 0.5}, [], "scale 0.8, shift 0.0 in the VAE, scale 0.5, shift 0.0 in the latents"),
        ({"scale_factor": "0.8"}, [], "a scaling that no latents can have"),
        ({"in_channels": 3}, [], "decodes latents of 4 channels; .* have 3"),
        ({"vae": None}, [], "does not name its VAE"),
        ({}, ["--labels=3,5"], "each below 5; got '3,5'"),
        ({}, ["--steps=1"], "at least 2 steps"),
        ({}, ["--guidance-low=0.9", "--guidance-high=0.1"], "low <= high"),
        ({"class_dropout_prob": 0.0}, ["--cfg-scale=2"], "needs the null class"),
    ],
)
def test_what_makes_no_sense_is_named_before_a_folder_is_made(
    run_folder: Path, tmp_path: Path, args: dict[str, Any], options: list[str], match: str
) -> None:
    sizes = {name: value for name, value in args.items() if name in SIZES}
    path = write_checkpoint(tmp_path / "a.pt", 3, ARGS | {"vae": str(run_folder / "vae")} | args, **sizes)
    with pytest.raises((Mistake, DataError), match=match):
        sampled(path, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_latents_that_are_not_finite_are_named(run_folder: Path) -> None:
    with pytest.raises(Mistake, match=r"not finite for 3 of 3 images.\nFound: image 4, by sde in 3 steps"):
        job_of(run_folder).sampler.images(lambda x, t, y: x * torch.inf, [4, 5, 6], "cpu")


@pytest.mark.parametrize("name", ["fp32", "tf32", "bf16"])
def test_the_precision_is_the_models_alone(name: str) -> None:
    seen = set()

    def switches() -> tuple[object, ...]:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.add((x.dtype, (x @ x.mT).dtype, *switches()))
        return x

    before, x = switches(), torch.ones(1, 4, 4, 4)
    sample.in_precision(model, name, "cpu")(x, x[:, 0, 0, 0], x[:, 0, 0, 0])
    product = torch.bfloat16 if name == "bf16" else torch.float32
    assert seen == {(torch.float32, product, "high" if name == "tf32" else "highest", name == "tf32")}
    assert switches() == before
