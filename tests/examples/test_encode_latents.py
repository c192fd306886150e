"""Encoding images: the posteriors that the VAE gives, once each, whatever interrupts the work or shares it."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import encode_latents
import numpy as np
import pytest
import torch
from common.data_files import DataError
from common.latents import LatentFolder, open_latents, read_index, shard_name
from common.options import Mistake
from common.vae import Scaling, new_vae
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

SIZE = 16
NAMES = ["ant/0.png", "ant/1.png", "ant/2.png", "bee/0.png", "bee/1.png", "cat/0.png", "cat/1.png"]
LABELS = [0, 0, 0, 1, 1, 2, 2]
SHARD_IMAGES = 3
# Sums in another order: what a batch of another size may change.
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


class Source(NamedTuple):
    """Images in class folders, and a VAE with the folder that it is saved in."""

    images: Path
    vae: AutoencoderKL
    vae_folder: Path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("source")
    for seed, name in enumerate(NAMES):
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (SIZE, SIZE, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path)
    (folder / "images/readme.txt").touch()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = new_vae(image_size=SIZE, image_channels=3, widths=(8, 8, 8)).eval().requires_grad_(False)
    vae.quant_conv.bias[4:] = -3.0  # a trained posterior is narrow
    vae.register_to_config(scaling_factor=0.31)
    vae.save_pretrained(folder / "vae")
    return Source(folder / "images", vae, folder / "vae")


def run(source: Source, out: Path, *more: str) -> None:
    """The script, with three images a shard and two a batch."""
    encode_latents.main([
        str(source.images), f"--out={out}", f"--vae={source.vae_folder}", f"--size={SIZE}", "--device=cpu",
        f"--shard-images={SHARD_IMAGES}", "--batch-size=2", "--workers=0", *more,
    ])  # fmt: skip


@pytest.fixture(scope="module")
def finished(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "latents"
    run(source, out)
    return out


def plain_posterior(source: Source, name: str, *, mirrored: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and std of one image, as diffusers gives them."""
    pixels = np.asarray(Image.open(source.images / name)).astype(np.float32)
    image = torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None]
    posterior = source.vae.encode(image.flip(-1) if mirrored else image).latent_dist
    return posterior.mean[0], posterior.std[0]


def items(data: LatentFolder) -> tuple[Tensor, Tensor, list[int]]:
    means, stds, labels = zip(*(data[i] for i in range(len(data))), strict=True)
    return torch.stack(means), torch.stack(stds), list(labels)


def same(one: Path, other: Path) -> bool:
    (a, b, c), (x, y, z) = items(open_latents(one)), items(open_latents(other))
    return torch.equal(a, x) and torch.equal(b, y) and c == z


@pytest.fixture
def own(source: Source, tmp_path: Path) -> Source:
    """The same images, which a test may spoil."""
    shutil.copytree(source.images, tmp_path / "images")
    return source._replace(images=tmp_path / "images")


# --- what is encoded


def test_every_image_is_stored_as_the_vaes_posterior(
    source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(source, tmp_path / "out", "--flip")
    printed = capsys.readouterr().out
    assert "1 entries are no images and are skipped: readme.txt" in printed
    assert "7 images of 3 classes, and mirrored, as latents 4x4x4 in 3 shards" in printed
    assert "left out" not in printed
    data = open_latents(tmp_path / "out")
    assert (len(data), data.num_classes, data.channels, data.size) == (14, 3, 4, 4)
    assert (data.scaling, data.vae) == (Scaling(0.31), str(source.vae_folder))
    mean, std, labels = items(data)
    assert labels == LABELS * 2
    for i, name in enumerate(NAMES):
        torch.testing.assert_close((mean[i], std[i]), plain_posterior(source, name), **CLOSE)
        torch.testing.assert_close((mean[7 + i], std[7 + i]), plain_posterior(source, name, mirrored=True), **CLOSE)
        assert (mean[7 + i] - mean[i]).abs().max() > 0.01
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"index.json", *map(shard_name, range(3))}
    index = read_index(tmp_path / "out")
    assert index.classes == ["ant", "bee", "cat"]
    assert index.settings["size"] == SIZE


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({"shift_factor": 0.5}, Scaling(0.31, 0.5)),
        (
            {"latents_mean": [1, 2, 3, 4], "latents_std": [1, 2, 4, 5]},
            Scaling([0.31, 0.155, 0.0775, 0.062], [1, 2, 3, 4]),
        ),
    ],
)
def test_the_vaes_shift_is_recorded_and_decides_whether_work_goes_on(
    source: Source, finished: Path, tmp_path: Path, config: dict[str, Any], scaling: Scaling
) -> None:
    shutil.copytree(source.vae_folder, tmp_path / "vae")
    content = json.loads((tmp_path / "vae/config.json").read_text())
    (tmp_path / "vae/config.json").write_text(json.dumps(content | config))
    shifted = source._replace(vae_folder=tmp_path / "vae")
    run(shifted, tmp_path / "out")
    run(shifted, tmp_path / "out")  # is finished
    data = open_latents(tmp_path / "out")
    assert data.scaling == scaling
    assert torch.equal(data[3][0], open_latents(finished)[3][0])  # the moments are unscaled, as ever
    with pytest.raises(Mistake, match=r"holds latents of another kind(.|\n)*scaling: "):
        run(shifted, finished)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_batch_size_does_not_matter(source: Source, finished: Path, tmp_path: Path, batch_size: int) -> None:
    run(source, tmp_path / "latents", f"--batch-size={batch_size}")
    for part, expected in zip(items(open_latents(tmp_path / "latents")), items(open_latents(finished)), strict=True):
        torch.testing.assert_close(part, expected, **CLOSE)


def test_workers_and_the_number_of_processes_change_nothing(
    source: Source, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(encode_latents, "WAIT_SECONDS", 0.0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(Mistake, match="Process 0 has not written"):
        run(source, tmp_path / "latents")
    monkeypatch.setenv("RANK", "0")
    run(source, tmp_path / "latents", "--workers=1")
    assert {path.name for path in tmp_path.glob("latents/latents-*")} == {shard_name(0), shard_name(2)}
    assert "1 of 3 shards are still to be made, by the other processes" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    run(source, tmp_path / "latents")
    assert "7 images of 3 classes" in capsys.readouterr().out
    assert same(tmp_path / "latents", finished)


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_tf32_is_used_when_asked_for_and_cudnn_in_any_case(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    encode_moments, seen = encode_latents.encode_moments, set()

    def watched(*given: Any) -> Any:
        cudnn = torch.backends.cudnn
        seen.add((cudnn.enabled, cudnn.allow_tf32, torch.get_float32_matmul_precision()))
        return encode_moments(*given)

    monkeypatch.setattr(encode_latents, "encode_moments", watched)
    run(source, tmp_path / "out", f"--precision={precision}")
    asked = precision == "tf32"
    assert seen == {(True, asked, "high" if asked else "highest")}


def test_half_precision_is_close_and_stored_in_half_the_room(source: Source, finished: Path, tmp_path: Path) -> None:
    mean, std, _ = items(open_latents(finished))
    run(source, tmp_path / "stored", "--store=float16")
    assert items(open_latents(tmp_path / "stored"))[0].equal(mean.half().float())
    run(source, tmp_path / "computed", "--precision=bf16")
    found = items(open_latents(tmp_path / "computed"))
    torch.testing.assert_close(found[:2], (mean, std), atol=0.05, rtol=0.05)  # eight bits of mantissa, a few layers
    assert not found[0].equal(mean)


def test_what_a_dtype_cannot_hold_is_an_error(source: Source, tmp_path: Path) -> None:
    source.vae.quant_conv.bias[0] = 1e6
    try:
        source.vae.save_pretrained(tmp_path / "vae")
    finally:
        source.vae.quant_conv.bias[0] = 0.0
    with pytest.raises(Mistake, match=r"not finite with --precision fp32 --store float16(.|\n)*Take fp32 or bf16"):
        run(source._replace(vae_folder=tmp_path / "vae"), tmp_path / "latents", "--store=float16")


# --- going on


def test_killed_work_goes_on_where_it_was(
    source: Source, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "latents"
    write_shard, written = encode_latents.write_shard, []

    def killed(folder: Path, number: int, *shard: Any) -> None:
        if len(written) == 1:
            written.append(-1)
            (folder / f"{shard_name(number)}.partial").write_bytes(b"half a shard")
            raise KeyboardInterrupt
        written.append(number)
        write_shard(folder, number, *shard)

    monkeypatch.setattr(encode_latents, "write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        run(source, out)
    with pytest.raises(DataError, match="2 of 3 shards are missing"):
        open_latents(out)
    first = (out / shard_name(0)).stat()
    run(source, out)
    run(source, out)
    assert written == [0, -1, 1, 2]
    assert (out / shard_name(0)).stat().st_mtime_ns == first.st_mtime_ns
    assert {path.name for path in out.iterdir()} == {path.name for path in finished.iterdir()}
    assert same(out, finished)


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--flip"], "mirrored: False there, True now"),
        (["--store=float16"], "store: float32 there, float16 now"),
        (["--precision=bf16"], "precision: fp32 there, bf16 now"),
        (["--shard-images=4"], "shard_images: 3 there, 4 now; shards: 3 there, 2 now"),
        (["--size=32"], r"shape: \[4, 4, 4\] there, \[4, 8, 8\] now; size: 16 there, 32 now"),
    ],
)
def test_other_settings_are_refused_and_named(source: Source, finished: Path, more: list[str], match: str) -> None:
    with pytest.raises(Mistake, match=match):
        run(source, finished, *more)


def test_other_images_or_another_vae_are_refused(own: Source, finished: Path, tmp_path: Path) -> None:
    run(own, finished)  # a copy of the same
    shutil.copytree(own.vae_folder, tmp_path / "copy")
    run(own._replace(vae_folder=tmp_path / "copy"), finished)
    vae = new_vae(image_size=SIZE, image_channels=3, widths=(8, 8, 8))
    vae.register_to_config(scaling_factor=0.31)
    vae.save_pretrained(tmp_path / "other")
    with pytest.raises(Mistake, match="Found: vae_weights: "):
        run(own._replace(vae_folder=tmp_path / "other"), finished)
    (own.images / "bee/0.png").rename(own.images / "bee/2.png")
    with pytest.raises(Mistake, match="Found: image_names: "):
        run(own, finished)


def test_a_damaged_shard_is_not_taken_for_finished(source: Source, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "latents"
    shutil.copytree(finished, out)
    (out / shard_name(1)).write_bytes((out / shard_name(1)).read_bytes()[:-1])
    with pytest.raises(DataError, match=r"latents-00001.safetensors cannot be read as a shard(.|\n)*Delete it"):
        run(source, out)
    (out / shard_name(1)).unlink()
    run(source, out)
    assert same(out, finished)


# --- images that cannot be read


def test_bad_images_stop_their_shards_and_are_all_named(own: Source, finished: Path, tmp_path: Path) -> None:
    out, whole = tmp_path / "latents", {name: (own.images / name).read_bytes() for name in ("ant/1.png", "cat/1.png")}
    (own.images / "ant/1.png").write_bytes(whole["ant/1.png"][:100])
    (own.images / "cat/1.png").write_bytes(b"")
    with pytest.raises(DataError) as error:
        run(own, out)
    for expected in [
        "2 of 7 images cannot be read", f"  ant/1.png: {own.images}/ant/1.png cannot be read as an image: OSError: ",
        f"  cat/1.png: {own.images}/cat/1.png cannot be read as an image: UnidentifiedImageError: ", "--skip-bad",
    ]:  # fmt: skip
        assert expected in str(error.value)
    assert {path.name for path in out.iterdir()} == {"index.json", shard_name(1)}
    for name, content in whole.items():
        (own.images / name).write_bytes(content)
    run(own, out)
    assert same(out, finished)


def test_bad_images_are_left_out_when_asked_and_recorded(
    own: Source, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("ant/0.png", "ant/1.png", "ant/2.png", "cat/1.png"):  # then the first shard is empty
        (own.images / name).write_bytes(b"")
    run(own, tmp_path / "latents", "--skip-bad")
    printed = capsys.readouterr().out
    assert "3 images of 3 classes" in printed
    assert "4 images that cannot be read were left out:\n  ant/0.png: " in printed
    mean, std, labels = items(open_latents(tmp_path / "latents"))
    assert labels == [1, 1, 2]
    torch.testing.assert_close((mean, std), tuple(part[3:6] for part in items(open_latents(finished))[:2]), **CLOSE)
    run(own, tmp_path / "latents")  # is finished
    assert "4 images that cannot be read were left out" in capsys.readouterr().out


# --- what does not fit


def test_classes_are_the_folders_in_order(tmp_path: Path) -> None:
    for name in ("bee-2/2.png", "bee/10.JPEG", "bee/deep/x.webp", "ant/a.jpg", "ant/notes.txt", ".git/x.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert encode_latents.list_classes(tmp_path) == (
        ["ant", "bee", "bee-2"],
        ["ant/a.jpg", "bee/10.JPEG", "bee/deep/x.webp", "bee-2/2.png"],
        [0, 1, 1, 2],
        [".git/", "ant/notes.txt"],
    )
    (tmp_path / "loose.png").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"loose.png: an image in no class folder\n  empty: a class folder without"):
        encode_latents.list_classes(tmp_path)
    with pytest.raises(DataError, match="Found: no folders"):
        encode_latents.list_classes(tmp_path / "empty")


def test_folders_that_would_be_spoilt_are_refused(
    source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(Mistake, match=r"is not empty, and holds no latents(.|\n)*holiday.jpg"):
        run(source, tmp_path)
    with pytest.raises(SystemExit):
        run(source, source.images / "latents")
    assert "would be taken for images" in capsys.readouterr().err
    assert not (source.images / "latents").exists()


def test_vaes_that_do_not_fit_are_named(source: Source, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no VAE of .* at .*nowhere(.|\n)*sd-vae-ft-mse"):
        run(source._replace(vae_folder=tmp_path / "nowhere"), tmp_path / "out")
    new_vae(image_size=SIZE, image_channels=1, widths=(8, 8, 8)).save_pretrained(tmp_path / "grey")
    with pytest.raises(DataError, match="takes images of 1 channels"):
        run(source._replace(vae_folder=tmp_path / "grey"), tmp_path / "out")
    with pytest.raises(DataError, match="--size 18 is no multiple of 4"):
        run(source, tmp_path / "out", "--size=18")
    assert not (tmp_path / "out").exists()
