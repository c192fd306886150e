"""Encoding images: the posteriors that the VAE gives, once each, whatever interrupts the work or shares it."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import encode_latents
import pytest
import torch
from common import latents
from common.data_files import DataError
from common.latents import LatentFolder, OpenShard, open_latents, read_index, shard_name
from common.options import Mistake
from common.processes import Processes
from common.vae import Scaling
from diffusers import AutoencoderKL
from small_images import CLOSE, SIZE, plain_posterior, write_noise, write_rgb_vae
from torch import Tensor

NAMES = ["ant/0.png", "ant/1.png", "ant/2.png", "bee/0.png", "bee/1.png", "cat/0.png", "cat/1.png"]
LABELS = [0, 0, 0, 1, 1, 2, 2]
SHARD_IMAGES = 3


class Source(NamedTuple):
    """Images in class folders, and a VAE with the folder that it is saved in."""

    images: Path
    vae: AutoencoderKL
    vae_folder: Path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("source")
    for seed, name in enumerate(NAMES):
        write_noise(folder / "images" / name, seed)
    (folder / "images/readme.txt").touch()
    return Source(folder / "images", write_rgb_vae(folder / "vae"), folder / "vae")


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
    assert "1 entries are no images and are skipped, such as readme.txt" in printed
    assert "14 items of 7 images in 3 classes, as latents 4x4x4" in printed
    assert "left out" not in printed
    data = open_latents(tmp_path / "out")
    assert (len(data), data.num_classes, data.channels, data.size) == (14, 3, 4, 4)
    assert (data.scaling, data.vae) == (Scaling(0.31), str(source.vae_folder))
    mean, std, labels = items(data)
    order = [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 6]  # each shard's images, then the same mirrored
    assert labels == [LABELS[i] for i in order]
    for row, i in enumerate(order):
        mirrored = i in order[:row]
        expected = plain_posterior(source.vae, source.images / NAMES[i], mirrored=mirrored)
        torch.testing.assert_close((mean[row], std[row]), expected, **CLOSE)
    files = {"settings.json", "index.json", *map(shard_name, range(3))}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    index = read_index(tmp_path / "out")
    assert index.classes == ["ant", "bee", "cat"]
    assert OpenShard(tmp_path / "out", 2, index).images == [NAMES[6], f"{NAMES[6]} (mirrored)"]


def test_the_vaes_shift_is_recorded_and_decides_whether_work_goes_on(
    source: Source, finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(source.vae_folder, tmp_path / "vae")
    config = json.loads((tmp_path / "vae/config.json").read_text())
    config["shift_factor"] = 3.0
    (tmp_path / "vae/config.json").write_text(json.dumps(config))
    shifted = source._replace(vae_folder=tmp_path / "vae")
    run(shifted, tmp_path / "out")
    data = open_latents(tmp_path / "out")
    assert data.scaling == Scaling(0.31, 3.0)
    assert torch.equal(data[3][0], open_latents(finished)[3][0])  # the moments are unscaled, as ever
    with pytest.raises(Mistake, match=r"run with other settings(.|\n)*shift: 0.0 there"):
        run(shifted, finished)


def test_batches_workers_and_processes_change_nothing(
    source: Source, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
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
    assert "items" not in capsys.readouterr().out
    assert same(tmp_path / "latents", finished)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    run(source, tmp_path / "larger", "--batch-size=100")
    for part, expected in zip(items(open_latents(tmp_path / "larger")), items(open_latents(finished)), strict=True):
        torch.testing.assert_close(part, expected, **CLOSE)


def test_tf32_is_used_when_asked_for_and_cudnn_in_any_case(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_moments, seen, cudnn = encode_latents.encode_moments, [], torch.backends.cudnn

    def watched(*given: Any) -> Any:
        seen.append((cudnn.enabled, cudnn.allow_tf32, torch.get_float32_matmul_precision()))
        return encode_moments(*given)

    monkeypatch.setattr(encode_latents, "encode_moments", watched)
    for precision in ("fp32", "tf32"):
        run(source, tmp_path / precision, f"--precision={precision}", "--batch-size=3", "--shard-images=7")
    assert seen == [(True, False, "highest")] * 3 + [(True, True, "high")] * 3


def test_half_precision_is_close_and_stored_in_half_the_room(source: Source, finished: Path, tmp_path: Path) -> None:
    mean, std, _ = items(open_latents(finished))
    run(source, tmp_path / "half", "--store=float16", "--precision=bf16")
    found = items(open_latents(tmp_path / "half"))
    torch.testing.assert_close(found[:2], (mean, std), atol=0.05, rtol=0.05)  # eight bits of mantissa, a few layers
    assert found[0].equal(found[0].half().float())
    assert not found[0].equal(mean.half().float())


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
    save_file, written = latents.save_file, []

    def killed(tensors: dict[str, Tensor], path: Path, **metadata: Any) -> None:
        if len(written) == 1:
            written.append("half")
            path.write_bytes(b"half a shard")
            raise KeyboardInterrupt
        written.append(path.name)
        save_file(tensors, path, **metadata)

    monkeypatch.setattr(latents, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        run(source, out)
    with pytest.raises(DataError, match=r"latents-00001.safetensors is missing.* of 3 shards"):
        open_latents(out)
    first = (out / shard_name(0)).stat()
    run(source, out)
    run(source, out)
    assert written == [f"{shard_name(0)}.partial", "half", *(f"{shard_name(i)}.partial" for i in (1, 2))]
    assert (out / shard_name(0)).stat().st_mtime_ns == first.st_mtime_ns
    assert {path.name for path in out.iterdir()} == {path.name for path in finished.iterdir()}
    assert same(out, finished)
    (out / shard_name(1)).write_bytes((out / shard_name(1)).read_bytes()[:-1])
    with pytest.raises(DataError, match=r"latents-00001.safetensors cannot be read as a shard(.|\n)*without this file"):
        run(source, out)


@pytest.mark.parametrize("changed", ["flip", "store=float16", "precision=bf16", "shard-images=4", "size=32"])
def test_other_settings_are_refused_and_named(source: Source, finished: Path, changed: str) -> None:
    with pytest.raises(Mistake, match=f"Found: {changed.partition('=')[0].replace('-', '_')}: .* there, .* now"):
        run(source, finished, f"--{changed}")


def test_other_images_or_another_vae_are_refused(own: Source, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(own.vae_folder, tmp_path / "copy")
    run(own._replace(vae_folder=tmp_path / "copy"), finished)  # copies of the same
    write_rgb_vae(tmp_path / "other", seed=1)
    with pytest.raises(Mistake, match="Found: vae_weights: "):
        run(own._replace(vae_folder=tmp_path / "other"), finished)
    (own.images / "bee/0.png").rename(own.images / "bee/2.png")
    with pytest.raises(Mistake, match="Found: image_names: "):
        run(own, finished)


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
    assert {path.name for path in out.iterdir()} == {"settings.json", "index.json", shard_name(1)}
    for name, content in whole.items():
        (own.images / name).write_bytes(content)
    run(own, out)
    assert same(out, finished)


def test_bad_images_are_left_out_when_asked(
    own: Source, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("ant/0.png", "ant/1.png", "ant/2.png", "cat/1.png"):  # then the first shard is empty
        (own.images / name).write_bytes(b"")
    run(own, tmp_path / "latents", "--skip-bad")
    printed = capsys.readouterr().out
    assert "3 items of 7 images in 3 classes" in printed
    assert "4 images that cannot be read are left out:\n  ant/0.png: " in printed
    mean, std, labels = items(open_latents(tmp_path / "latents"))
    assert labels == [1, 1, 2]
    torch.testing.assert_close((mean, std), tuple(part[3:6] for part in items(open_latents(finished))[:2]), **CLOSE)
    run(own, tmp_path / "latents")  # is finished
    assert "3 items of 7 images" in capsys.readouterr().out


# --- what does not fit


def test_classes_are_the_folders_in_order(tmp_path: Path) -> None:
    for name in ("bee-2/2.png", "bee/10.JPEG", "bee/deep/x.webp", "ant/a.jpg", "ant/notes.txt", ".git/x.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert encode_latents.list_classes(tmp_path) == {
        "ant": ["ant/a.jpg"], "bee": ["bee/10.JPEG", "bee/deep/x.webp"], "bee-2": ["bee-2/2.png"],
    }  # fmt: skip
    assert list(encode_latents.list_classes(tmp_path)) == ["ant", "bee", "bee-2"]
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
    with pytest.raises(Mistake, match=r"is not empty, and no run made it(.|\n)*holiday.jpg"):
        run(source, tmp_path)
    with pytest.raises(SystemExit):
        run(source, source.images / "latents")
    assert "would be taken for images" in capsys.readouterr().err
    assert not (source.images / "latents").exists()
