"""Encoding captioned images: posteriors and text features of each, once, in the layout that training reads."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import encode_coco
import numpy as np
import pytest
import torch
from common.coco_features import CocoFeatures, CocoWriter
from common.data_files import DataError
from common.demo import save_text_encoder
from common.options import Mistake
from common.text import TextEncoder, load_text_encoder
from common.vae import Scaling
from diffusers import AutoencoderKL
from small_images import CLOSE, SIZE, plain_posterior, write_noise, write_rgb_vae

# By id: 7 comes before 12.
NAMES = {12: "twelve.jpg.png", 7: "seven.png", 30: "thirty.png"}
CAPTIONS = {12: ["a red circle", "a small red circle"], 7: ["a blue square"], 30: ["a green cross"] * 3}
ORDER = [7, 12, 30]


class Source(NamedTuple):
    """What is encoded, and with what."""

    folder: Path
    vae: AutoencoderKL
    texts: TextEncoder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_rgb_vae(folder / "vae", shift_factor=0.5)
    save_text_encoder(folder / "clip", seed=0)
    return folder


@pytest.fixture
def source(models: Path, tmp_path: Path) -> Source:
    for seed, name in NAMES.items():
        write_noise(tmp_path / "images" / name, seed)
    write_captions(tmp_path, CAPTIONS)
    return Source(tmp_path, AutoencoderKL.from_pretrained(models / "vae"), load_text_encoder(str(models / "clip")))


def write_captions(folder: Path, captions: dict[Any, list[Any]], names: list[tuple[Any, str]] | None = None) -> None:
    content = {
        "images": [{"id": image, "file_name": name} for image, name in (NAMES.items() if names is None else names)],
        "annotations": [{"image_id": image, "caption": text} for image, some in captions.items() for text in some],
    }
    (folder / "captions.json").write_text(json.dumps(content))


def run(folder: Path, models: Path, *more: str) -> None:
    encode_coco.main([
        str(folder / "images"), str(folder / "captions.json"), f"--out={folder / 'out'}", f"--vae={models / 'vae'}",
        f"--text-encoder={models / 'clip'}", f"--size={SIZE}", "--workers=0", "--device=cpu", "--batch-size=2", *more,
    ])  # fmt: skip


def test_images_and_captions_are_encoded_in_the_order_of_their_ids(
    source: Source, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(source.folder, models)
    assert "3 images with 6 captions" in capsys.readouterr().out
    data = CocoFeatures(source.folder / "out", dropout=0.0)
    assert data.captions.tolist() == [1, 2, 3]
    assert (data.scaling, data.vae) == (Scaling(0.31, 0.5), str(models / "vae"))
    assert torch.equal(data.empty, source.texts.encode([""])[0])
    for i, image in enumerate(ORDER):
        mean, std, _ = data[i]
        expected = plain_posterior(source.vae, source.folder / "images" / NAMES[image])
        torch.testing.assert_close((mean, std), expected, **CLOSE)
        for k, features in enumerate(source.texts.encode(CAPTIONS[image])):
            found = torch.from_numpy(np.load(source.folder / f"out/train/{i}_{k}.npy"))
            torch.testing.assert_close(found, features, **CLOSE)
    run(source.folder, models, "--split=val")
    assert len(CocoFeatures(source.folder / "out", "val")) == 3
    with pytest.raises(Mistake, match="train is there already"):
        run(source.folder, models)


def test_killed_work_goes_on_where_it_was(source: Source, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, written = CocoWriter.write, []

    def counted(self: CocoWriter, index: int, *features: Any) -> None:
        if len(written) == 1:
            written.append(-1)
            raise KeyboardInterrupt
        written.append(index)
        write(self, index, *features)

    monkeypatch.setattr(CocoWriter, "write", counted)
    with pytest.raises(KeyboardInterrupt):
        run(source.folder, models)
    with pytest.raises(ValueError, match=r"precision: 'fp32' there, 'bf16' now"):
        run(source.folder, models, "--precision=bf16")
    run(source.folder, models)
    assert written == [0, -1, 1, 2]
    assert len(CocoFeatures(source.folder / "out")) == 3


def test_bad_images_are_named_and_the_others_written(source: Source, models: Path) -> None:
    path = source.folder / "images" / NAMES[7]
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    with pytest.raises(DataError, match=r"1 of 3 images cannot be read; the others are written.\n  seven.png: "):
        run(source.folder, models)
    with pytest.raises(DataError, match=r"There is no folder .*: finish train.partial"):
        CocoFeatures(source.folder / "out")
    path.write_bytes(whole)
    run(source.folder, models)
    assert len(CocoFeatures(source.folder / "out")) == 3


@pytest.mark.parametrize(
    ("captions", "names", "match"),
    [
        ({**CAPTIONS, 12: []}, [*NAMES.items()], r"twelve.jpg.png \(id 12\): has no captions"),
        ({**CAPTIONS, 12: [None]}, [*NAMES.items()], r"'None' \(id 12\): is no caption"),
        ({**CAPTIONS, 99: ["a dog", "a cat"]}, [*NAMES.items()], "id 99: has 2 captions and no image"),
        (CAPTIONS, [*NAMES.items(), (7, "twelve.jpg.png")], "id 7: is that of 2 images"),
        (CAPTIONS, [*NAMES.items(), (8, "seven.png")], "'seven.png': is the file of 2 images"),
        ({"7": ["a dog"]}, [(7, "seven.png")], "id '7': is no whole number"),
        ({True: ["a dog"]}, [(True, "seven.png")], "id True: is no whole number"),
        (CAPTIONS, [*NAMES.items(), (31, "missing.png")], "missing.png: is not in"),
        ({}, [([7], "seven.png")], "cannot be read as COCO's captions: TypeError"),
        ({}, [], "0 problems in 0 images"),
    ],
)
def test_captions_that_do_not_fit_are_named(
    source: Source, captions: dict[Any, list[Any]], names: list[tuple[Any, Any]], match: str
) -> None:
    write_captions(source.folder, captions, names)
    with pytest.raises(DataError, match=match):
        encode_coco.read_captions(source.folder / "captions.json", source.folder / "images")


def test_long_captions_are_cut_only_when_asked(source: Source, models: Path) -> None:
    write_captions(source.folder, {**CAPTIONS, 7: [" ".join(["a red circle"] * 40)]})
    with pytest.raises(Mistake, match="reads at most"):
        run(source.folder, models)
    run(source.folder, models, f"--out={source.folder / 'cut'}", "--cut-long")
    assert len(CocoFeatures(source.folder / "cut")) == 3
