"""Sets of images, read in batches, and the extractors that turn them into features."""

import os
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import metrics
from common.data_files import DataError
from common.images import ImageSet, write_png
from common.metrics import Extractor, FeatureStatistics, evenly, extractor_named, reference_of
from common.options import Mistake, imported
from numpy.typing import NDArray
from PIL import Image


@pytest.fixture
def images() -> NDArray[np.uint8]:
    """Five images of 4 rows and 6 columns."""
    return np.random.default_rng(0).integers(256, size=(5, 4, 6, 3), dtype=np.uint8)


def written(images: NDArray[np.uint8], folder: Path) -> list[Path]:
    folder.mkdir(parents=True)
    paths = [folder / f"{i:06d}.png" for i in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        write_png(image, path)
    return paths


# --- sets of images


@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_folders_and_npz_give_the_images_in_order(tmp_path: Path, images: NDArray[np.uint8], size: int) -> None:
    written(images, tmp_path / "set/images")
    np.savez(tmp_path / "set.npz", images)
    np.savez_compressed(tmp_path / "compressed.npz", images)
    for source in [ImageSet(tmp_path / name) for name in ("set", "set/images", "set.npz", "compressed.npz")]:
        batches = list(source.batches(size))
        assert len(source) == 5
        assert max(len(batch) for batch in batches) == min(size, 5)
        assert torch.equal(torch.cat(batches), torch.from_numpy(images).permute(0, 3, 1, 2))


def test_a_folder_is_read_as_the_encoder_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sixteen bits of grey, a photograph on its side, another format; hidden files and others are named."""
    grey = np.arange(16, dtype=np.uint8).reshape(4, 4) * 16
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "0.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(grey)).save(tmp_path / "1.png", exif=exif)
    (tmp_path / "deep").mkdir()
    Image.fromarray(grey).save(tmp_path / "deep/2.webp", lossless=True)
    (tmp_path / ".cache").mkdir()
    Image.fromarray(grey).save(tmp_path / ".cache/0.png")
    (tmp_path / "notes.txt").touch()
    (batch,) = ImageSet(tmp_path).batches(9)
    assert batch.shape == (3, 3, 4, 4)
    assert (batch == torch.from_numpy(grey)).all()
    assert "2 entries are no images and are skipped: .cache/, notes.txt" in capsys.readouterr().out


def test_images_of_two_sizes_are_named(tmp_path: Path, images: NDArray[np.uint8]) -> None:
    paths = written(images, tmp_path / "set")
    write_png(images[0, :3], paths[3])
    with pytest.raises(DataError, match=r"images of a set have one size(.|\n)*Found: 6x4, and .*000003.png with 6x3"):
        list(ImageSet(tmp_path / "set").batches(2))


def test_what_holds_no_images_is_named(tmp_path: Path, images: NDArray[np.uint8]) -> None:
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(2))
    np.savez(tmp_path / "floats.npz", images / 255)
    np.savez(tmp_path / "pickled.npz", np.array([{}], dtype=object))
    (tmp_path / "text.npz").write_text("no archive")
    os.mkfifo(tmp_path / "pipe.npz")
    for name, match in [
        ("nowhere", r"There are no images at .*nowhere"),
        ("empty", "empty holds no image"),
        ("statistics.npz", r"no images under 'arr_0'.\nFound: mu.npy.\nStatistics are passed"),
        ("floats.npz", r"uint8 \(N, H, W, 3\).\nFound: float64 \(5, 4, 6, 3\)"),
        ("pickled.npz", r"uint8 \(N, H, W, 3\).\nFound: object"),
        ("text.npz", "text.npz cannot be read as .npz"),
        ("pipe.npz", "no regular file"),
    ]:
        with pytest.raises(DataError, match=match):
            ImageSet(tmp_path / name)


def test_broken_files_are_named(tmp_path: Path, images: NDArray[np.uint8]) -> None:
    paths = written(images, tmp_path / "set")
    paths[2].write_bytes(paths[2].read_bytes()[:40])
    with pytest.raises(DataError, match=r"000002.png cannot be read as an image"):
        list(ImageSet(tmp_path / "set").batches(2))
    np.savez(tmp_path / "whole.npz", images)
    content = bytearray((tmp_path / "whole.npz").read_bytes())
    content[200] ^= 1  # one pixel: the archive's checksum tells
    for name, damaged in [("flipped.npz", content), ("short.npz", content[:300])]:
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(DataError, match=rf"{name} cannot be read as .npz"):
            list(ImageSet(tmp_path / name).batches(2))


def test_a_header_that_announces_too_much_costs_no_memory(tmp_path: Path, images: NDArray[np.uint8]) -> None:
    with zipfile.ZipFile(tmp_path / "lying.npz", "w") as archive, archive.open("arr_0.npy", "w") as stream:
        header = {"descr": "|u1", "fortran_order": False, "shape": (10**9, 256, 256, 3)}
        np.lib.format.write_array_header_1_0(stream, header)
        stream.write(images.tobytes())
    with pytest.raises(DataError, match="ends in the middle of its images"):
        next(ImageSet(tmp_path / "lying.npz").batches(2))


# --- extractors


def test_few_of_many_features_are_held_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_PAIRED", 5)
    assert evenly(4).tolist() == [0, 1, 2, 3]
    assert evenly(13).tolist() == [0, 3, 6, 9, 12]
    grey = np.arange(13, dtype=np.uint8).reshape(13, 1, 1, 1) * np.ones((1, 2, 2, 3), np.uint8)
    np.savez(tmp_path / "grey.npz", grey)
    images = ImageSet(tmp_path / "grey.npz")
    extractor = Extractor("first", lambda batch: batch[:, 0, 0, :1].float())
    found = reference_of(images, extractor, batch_size=4)
    assert found.features[:, 0].tolist() == [0, 3, 6, 9, 12]
    assert found.count == 13
    assert found.statistics == FeatureStatistics(pytest.approx(np.array([6.0])), pytest.approx(np.array([[91 / 6]])))


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (lambda images: images.float().mean((1, 2, 3)), r"features \(N, D\) of N images.\nFound: float32 \(2,\) for 2"),
        (lambda images: images.flatten(1).numpy(), r"Found: uint8 \(2, 48\) for 2 images"),
        (lambda images: torch.zeros(1, 3), r"Found: float32 \(1, 3\) for 2 images"),
        (lambda images: torch.full((len(images), 2), float("inf")), "made features that are not finite"),
    ],
)
def test_what_is_no_features_is_named(function: Any, match: str) -> None:
    with pytest.raises(Mistake, match=match):
        Extractor("mine", function)(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))


def test_an_extractor_that_is_none_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "some_features.py").write_text("number = 3\n")
    for name in ("nothing", "some_features:nothing", "no_such_module:f", ":f", "some_features:"):
        with pytest.raises(Mistake, match=rf"--features '{name}' is no module:callable"):
            extractor_named(name, classifier=tmp_path / "classifier.pt", device="cpu")
    with pytest.raises(Mistake, match="--features 'some_features:number' is a int, which cannot be called"):
        imported("some_features:number", "--features")
    sys.modules.pop("some_features", None)


class Inception(torch.nn.Module):
    """Stands in for torch-fidelity's: the same call, a single weight."""

    start = 2.0

    def __init__(self, name: str, features_list: list[str]) -> None:
        super().__init__()
        assert (name, features_list) == ("inception-v3-compat", ["2048"])
        self.weight = torch.nn.Parameter(torch.tensor(self.start))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
        assert images.dtype == torch.uint8
        return (self.weight * images.float().mean((2, 3)),)


def test_inception_is_torch_fidelitys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def named() -> Extractor:
        return extractor_named("inception", classifier=tmp_path / "classifier.pt", device="cpu")

    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)  # not importable
    with pytest.raises(Mistake, match=r"needs torch-fidelity(.|\n)*pip install torch-fidelity"):
        named()
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    monkeypatch.setattr(module, "FeatureExtractorInceptionV3", Inception, raising=False)
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)
    images = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    found = named()
    np.testing.assert_allclose(found(images), 2 * images.float().mean((2, 3)).numpy())
    monkeypatch.setattr(Inception, "start", 3.0)
    assert named().name != found.name  # other weights make other features
