"""Encoding captioned images: posteriors and text features of each, once, in the layout that training reads."""

import json
from pathlib import Path
from typing import Any

import encode_coco
import numpy as np
import pytest
import torch
from common.coco_features import CocoFeatures, CocoWriter
from common.data_files import DataError
from common.demo import save_text_encoder
from common.options import Mistake
from common.text import load_text_encoder
from common.vae import Scaling, load_vae
from small_images import CLOSE, SIZE, plain_posterior, write_noise, write_rgb_vae

# By id: 7 comes before 12.
NAMES = {12: "twelve.jpg.png", 7: "seven.png", 30: "thirty.png"}
CAPTIONS = {12: ["a red circle", "a small red circle"], 7: ["a blue square"], 30: ["a green cross"] * 3}
ORDER = [7, 12, 30]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_rgb_vae(folder / "vae", shift_factor=0.5)
    save_text_encoder(folder / "clip", seed=0)
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for seed, name in NAMES.items():
        write_noise(tmp_path / "images" / name, seed)
    write_captions(tmp_path, CAPTIONS, NAMES.items())
    return tmp_path


def write_captions(folder: Path, captions: dict[Any, list[Any]], names: Any) -> None:
    content = {
        "images": [{"id": image, "file_name": name} for image, name in names],
        "annotations": [{"image_id": image, "caption": text} for image, some in captions.items() for text in some],
    }
    (folder / "captions.json").write_text(json.dumps(content))


def run(folder: Path, models: Path, *more: str) -> None:
    encode_coco.main([
        str(folder / "images"), str(folder / "captions.json"), f"--out={folder / 'out'}", f"--vae={models / 'vae'}",
        f"--text-encoder={models / 'clip'}", f"--size={SIZE}", "--workers=0", "--device=cpu", "--batch-size=2", *more,
    ])  # fmt: skip


def test_images_and_captions_are_encoded_in_the_order_of_their_ids(source: Path, models: Path) -> None:
    run(source, models)
    data = CocoFeatures(source / "out", dropout=0.0)
    assert data.captions.tolist() == [1, 2, 3]
    assert (data.scaling, data.vae) == (Scaling(0.31, 0.5), str(models / "vae"))
    vae, texts = load_vae(models / "vae"), load_text_encoder(str(models / "clip"))
    assert torch.equal(data.empty, texts.encode([""])[0])
    for i, image in enumerate(ORDER):
        expected = plain_posterior(vae, source / "images" / NAMES[image])
        torch.testing.assert_close(data[i][:2], expected, **CLOSE)
        for k, features in enumerate(texts.encode(CAPTIONS[image])):
            found = torch.from_numpy(np.load(source / f"out/train/{i}_{k}.npy"))
            torch.testing.assert_close(found, features, **CLOSE)
    run(source, models, "--split=val")
    assert len(CocoFeatures(source / "out", "val")) == 3


def test_killed_work_goes_on_where_it_was(source: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, written = CocoWriter.write, []

    def counted(self: CocoWriter, index: int, *features: Any) -> None:
        written.append(index)
        if len(written) == 2:
            raise KeyboardInterrupt
        write(self, index, *features)

    monkeypatch.setattr(CocoWriter, "write", counted)
    with pytest.raises(KeyboardInterrupt):
        run(source, models)
    with pytest.raises(ValueError, match=r"precision: 'fp32' there, 'bf16' now"):
        run(source, models, "--precision=bf16")
    run(source, models)
    assert written == [0, 1, 1, 2]
    assert len(CocoFeatures(source / "out")) == 3


def test_bad_images_are_named_and_the_others_written(source: Path, models: Path) -> None:
    path = source / "images" / NAMES[7]
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    with pytest.raises(DataError, match=r"1 of 3 images cannot be read; the others are written.\n  seven.png: "):
        run(source, models)
    with pytest.raises(DataError, match=r"There is no folder .*: finish train.partial"):
        CocoFeatures(source / "out")
    path.write_bytes(whole)
    run(source, models)
    assert len(CocoFeatures(source / "out")) == 3


def test_captions_that_do_not_fit_are_named(source: Path) -> None:
    for captions, names, match in [
        ({12: []}, [], r"twelve.jpg.png \(id 12\): has no captions"),
        ({99: ["a dog", "a cat"]}, [], "id 99: has 2 captions and no image"),
        ({}, [(7, "twelve.jpg.png")], "id 7: is that of 2 images"),
        ({}, [(31, "missing.png")], "missing.png: is not in"),
    ]:
        write_captions(source, CAPTIONS | captions, [*NAMES.items(), *names])
        with pytest.raises(DataError, match=match):
            encode_coco.read_captions(source / "captions.json", source / "images")


def test_long_captions_are_cut_only_when_asked(source: Path, models: Path) -> None:
    write_captions(source, {**CAPTIONS, 7: [" ".join(["a red circle"] * 40)]}, NAMES.items())
    with pytest.raises(Mistake, match="reads at most"):
        run(source, models)
    run(source, models, f"--out={source / 'cut'}", "--cut-long")
    assert len(CocoFeatures(source / "cut")) == 3
