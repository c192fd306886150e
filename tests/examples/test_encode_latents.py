"""Encoding images: the posteriors that the VAE gives, once each, whatever interrupts the work or shares it."""

import os
import shutil
from pathlib import Path

import encode_latents
import pytest
import torch
from common.data_files import DataError
from common.latents import OpenShard, open_latents, read_index, shard_name
from common.options import Mistake
from common.processes import Processes, tf32
from common.vae import Scaling
from diffusers import AutoencoderKL
from small_images import CLOSE, SIZE, plain_posterior, write_noise, write_rgb_vae
from torch import Tensor

NAMES = ["ant/0.png", "ant/1.png", "ant/2.png", "bee/0.png", "bee/1.png", "cat/0.png", "cat/1.png"]
LABELS = [0, 0, 0, 1, 1, 2, 2]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in class folders, and a VAE."""
    folder = tmp_path_factory.mktemp("source")
    for seed, name in enumerate(NAMES):
        write_noise(folder / "images" / name, seed)
    write_rgb_vae(folder / "vae")
    return folder


@pytest.fixture
def own(source: Path, tmp_path: Path) -> Path:
    """The same, which a test may spoil."""
    return Path(shutil.copytree(source, tmp_path / "source"))


@pytest.fixture(scope="module")
def finished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "latents"
    run(source, out)
    return out


def run(source: Path, out: Path, *more: str) -> None:
    """The script, with three images a shard and two a batch."""
    encode_latents.main([
        str(source / "images"), f"--out={out}", f"--vae={source / 'vae'}", f"--size={SIZE}", "--device=cpu",
        "--shard-images=3", "--batch-size=2", "--workers=0", *more,
    ])  # fmt: skip


def items(folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    data = open_latents(folder)
    means, stds, labels = zip(*(data[i] for i in range(len(data))), strict=True)
    return torch.stack(means), torch.stack(stds), torch.tensor(labels)


def same(one: Path, other: Path) -> bool:
    return all(map(torch.equal, items(one), items(other)))


def test_every_image_is_stored_as_the_vaes_posterior(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out", "--flip")
    data = open_latents(tmp_path / "out")
    assert (len(data), data.num_classes, data.channels, data.size) == (14, 3, 4, 4)
    assert (data.scaling, data.vae) == (Scaling(0.31), str(source / "vae"))
    mean, std, labels = items(tmp_path / "out")
    order = [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 6]  # each shard's images, then the same mirrored
    assert labels.tolist() == [LABELS[i] for i in order]
    vae = AutoencoderKL.from_pretrained(source / "vae")
    for row, i in enumerate(order):
        expected = plain_posterior(vae, source / "images" / NAMES[i], mirrored=i in order[:row])
        torch.testing.assert_close((mean[row], std[row]), expected, **CLOSE)
    files = {"settings.json", "index.json", *map(shard_name, range(3))}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    index = read_index(tmp_path / "out")
    assert index.classes == ["ant", "bee", "cat"]
    assert OpenShard(tmp_path / "out", 2, index).images == [NAMES[6], f"{NAMES[6]} (mirrored)"]


def test_batches_workers_and_processes_change_nothing(
    source: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("__enter__", "__exit__", "meet"):  # one after the other, they need not wait
        monkeypatch.setattr(Processes, name, lambda self, *_: self if not _ else None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(DataError, match=r"latents-00001.safetensors is missing.* of 3 shards"):  # the other one's
        run(source, tmp_path / "latents", "--workers=1")
    assert {path.name for path in tmp_path.glob("latents/latents-*")} == {shard_name(0), shard_name(2)}
    monkeypatch.setenv("RANK", "1")
    run(source, tmp_path / "latents")
    assert same(tmp_path / "latents", finished)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    run(source, tmp_path / "larger", "--batch-size=100")
    torch.testing.assert_close(items(tmp_path / "larger"), items(finished), **CLOSE)


def test_half_precision_is_close_and_stored_in_half_the_room(
    source: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = []
    monkeypatch.setattr(encode_latents, "tf32", lambda value: allowed.append(value) or tf32(value))
    run(source, tmp_path / "half", "--store=float16", "--precision=bf16")
    run(source, tmp_path / "tf32", "--precision=tf32")
    assert allowed == [False, True]
    found, (mean, std, _) = items(tmp_path / "half"), items(finished)
    torch.testing.assert_close(found[:2], (mean, std), atol=0.05, rtol=0.05)  # eight bits of mantissa, a few layers
    assert found[0].equal(found[0].half().float())
    assert not found[0].equal(mean.half().float())


def test_what_a_dtype_cannot_hold_is_an_error(own: Path, tmp_path: Path) -> None:
    vae = write_rgb_vae(own / "vae")
    vae.quant_conv.bias[0] = 1e6
    vae.save_pretrained(own / "vae")
    with pytest.raises(Mistake, match=r"not finite with --precision fp32 --store float16(.|\n)*Take fp32 or bf16"):
        run(own, tmp_path / "latents", "--store=float16")


def test_killed_work_goes_on_where_it_was(
    source: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, fsync, seen = tmp_path / "latents", os.fsync, []

    def killed(file: int) -> None:  # a shard is written, but not yet named, when it is flushed
        seen.append({path.name for path in out.glob("*.safetensors")})
        if {shard_name(0)} in seen[:-1]:
            raise KeyboardInterrupt
        fsync(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            run(source, out)
    assert {path.name for path in out.glob("latents-*")} == {shard_name(0)}
    with pytest.raises(DataError, match=r"latents-00001.safetensors is missing.* of 3 shards"):
        open_latents(out)
    before = (out / shard_name(0)).stat().st_mtime_ns
    run(source, out)
    assert (out / shard_name(0)).stat().st_mtime_ns == before
    assert same(out, finished)
    (out / shard_name(1)).write_bytes((out / shard_name(1)).read_bytes()[:-1])
    with pytest.raises(DataError, match=r"latents-00001.safetensors cannot be read as a shard(.|\n)*without this file"):
        run(source, out)


@pytest.mark.parametrize("changed", ["flip", "store=float16", "precision=bf16", "shard-images=4", "size=32"])
def test_other_settings_are_refused_and_named(source: Path, finished: Path, changed: str) -> None:
    with pytest.raises(Mistake, match=f"Found: {changed.partition('=')[0].replace('-', '_')}: .* there, .* now"):
        run(source, finished, f"--{changed}")


def test_other_images_or_another_vae_are_refused(own: Path, finished: Path, tmp_path: Path) -> None:
    run(own, finished, f"--vae={own / 'vae'}")  # copies of the same
    write_rgb_vae(own / "vae", shift_factor=3.0)
    with pytest.raises(Mistake, match=r"run with other settings(.|\n)*Found: shift: 0.0 there"):
        run(own, finished)
    run(own, tmp_path / "out")
    assert open_latents(tmp_path / "out").scaling == Scaling(0.31, 3.0)
    assert same(tmp_path / "out", finished)  # the moments are unscaled, as ever
    (own / "images/bee/0.png").rename(own / "images/bee/2.png")
    write_rgb_vae(own / "vae", seed=1)
    with pytest.raises(Mistake, match=r"Found: image_names: .*; vae_weights: "):
        run(own, finished)


def test_bad_images_stop_their_shards_and_are_all_named(own: Path, finished: Path, tmp_path: Path) -> None:
    out, bad = tmp_path / "latents", [own / "images" / name for name in ("ant/1.png", "cat/1.png")]
    whole = [path.read_bytes() for path in bad]
    for path, content in zip(bad, whole, strict=True):
        path.write_bytes(content[:100])
    match = rf"2 of 7 images (.|\n)*  ant/1.png: {bad[0]} cannot be read(.|\n)*  cat/1.png: (.|\n)*--skip-bad"
    with pytest.raises(DataError, match=match):
        run(own, out)
    assert {path.name for path in out.iterdir()} == {"settings.json", "index.json", shard_name(1)}
    for path, content in zip(bad, whole, strict=True):
        path.write_bytes(content)
    run(own, out)
    assert same(out, finished)


def test_bad_images_are_left_out_when_asked(
    own: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("ant/0.png", "ant/1.png", "ant/2.png", "cat/1.png"):  # then the first shard is empty
        (own / "images" / name).write_bytes(b"")
    run(own, tmp_path / "latents", "--skip-bad")
    printed = capsys.readouterr().out
    assert "3 items of 7 images in 3 classes" in printed
    assert "4 images that cannot be read are left out:\n  ant/0.png: " in printed
    expected = tuple(part[3:6] for part in items(finished))
    torch.testing.assert_close(items(tmp_path / "latents"), expected, **CLOSE)


def test_classes_are_the_folders_in_order(tmp_path: Path) -> None:
    for name in ("bee-2/2.png", "bee/10.JPEG", "bee/deep/x.webp", "ant/a.jpg", "ant/notes.txt", ".git/x.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert list(encode_latents.list_classes(tmp_path).items()) == [
        ("ant", ["ant/a.jpg"]), ("bee", ["bee/10.JPEG", "bee/deep/x.webp"]), ("bee-2", ["bee-2/2.png"])
    ]  # fmt: skip
    (tmp_path / "loose.png").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"loose.png: an image in no class folder\n  empty: a class folder without"):
        encode_latents.list_classes(tmp_path)
    with pytest.raises(DataError, match="Found: no folders"):
        encode_latents.list_classes(tmp_path / "empty")
