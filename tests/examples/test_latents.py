"""Posterior moments on disk: both layouts read back, and whatever is wrong with them named."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from common.data_files import DataError
from common.latents import Index, open_latents, shard_name, write_index, write_shard
from common.vae import Scaling
from torch import Tensor
from torch.utils.data import DataLoader

SHAPE = (4, 2, 2)
LABELS = [2, 0, 1, 1, 0, 3]
NAMES = [f"{i // 3:05d}/img-mean-std-{i:08d}.npy" for i in range(len(LABELS))]
SCALING = Scaling(0.5, 0.1)
INDEX = Index("some/vae", SCALING, list(SHAPE), 2, ["ant", "bee", "cat", "dog"], "1.2.3")


@pytest.fixture
def moments(generator: torch.Generator) -> Tensor:
    """Means and stds of six images."""
    mean = torch.randn(len(LABELS), *SHAPE, generator=generator)
    return torch.stack([mean, torch.rand(len(LABELS), *SHAPE, generator=generator) + 0.1])


@pytest.fixture
def repa(tmp_path: Path, moments: Tensor) -> Path:
    """REPA's layout: three files a folder, with and without an axis of one in front."""
    folder = tmp_path / "imagenet/vae-sd"
    for i, name in enumerate(NAMES):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        array = moments[:, i].flatten(0, 1).numpy()
        np.save(folder / name, array[None] if i % 2 else array)
    (folder / "dataset.json").write_text(json.dumps({"labels": list(zip(NAMES, LABELS, strict=True))}))
    return folder


@pytest.fixture
def shards(tmp_path: Path, moments: Tensor) -> Path:
    """Our layout: four images, and two."""
    folder = tmp_path / "shards"
    folder.mkdir()
    write_index(INDEX, folder)
    for number, rows in enumerate([slice(0, 4), slice(4, 6)]):
        write_shard(folder, number, moments[:, rows], torch.tensor(LABELS[rows]), NAMES[rows])
    return folder


@pytest.mark.parametrize("layout", ["repa", "shards"])
def test_a_layout_reads_back_as_it_was_written(layout: str, request: pytest.FixtureRequest, moments: Tensor) -> None:
    data = open_latents(request.getfixturevalue(layout))
    assert data.labels.tolist() == LABELS
    for i, (mean, std, label) in enumerate(data[k] for k in range(len(data))):
        assert mean.dtype == std.dtype == torch.float32
        assert torch.equal(torch.stack([mean, std]), moments[:, i])
        assert (label, type(label)) == (LABELS[i], int)
    assert (data.channels, data.size, data.num_classes) == (4, 2, 4)
    assert (data.scaling, data.vae) == ((Scaling(0.18215), None) if layout == "repa" else (SCALING, "some/vae"))
    with pytest.raises(IndexError):
        data[6]
    assert torch.equal(data[-1][0], moments[0, 5])
    plain = list(DataLoader(data, batch_size=4))
    for other in (DataLoader(data, batch_size=4, num_workers=1), DataLoader(pickle.loads(pickle.dumps(data)), 4)):
        for batch, again in zip(plain, other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))


def test_a_folder_that_does_not_fit_is_named(tmp_path: Path, repa: Path, shards: Path) -> None:
    assert open_latents(repa.parent, num_classes=1000).num_classes == 1000
    for folder, classes, match in [
        (repa, 3, rf"{NAMES[5]}: the label 3 is not in 0 .. 2"),
        (shards, 3, "has 4 classes; the model has 3"),
        (tmp_path / "nowhere", None, "no such folder"),
        (tmp_path, None, "imagenet, shards"),
    ]:
        with pytest.raises(DataError, match=match):
            open_latents(folder, num_classes=classes)
    (repa / "index.json").write_text("{}")
    with pytest.raises(DataError, match=r"holds 2 data sets(.|\n)*dataset.json(.|\n)*index.json"):
        open_latents(repa)


def test_a_wrong_list_is_named(repa: Path) -> None:
    for entries, match in [
        ([[NAMES[1], True]], "the label True is not in 0 .. 1048575"),
        ([[NAMES[1], -1]], "the label -1 is not in"),
        ([[NAMES[0], 2], [NAMES[0], 0]], f"{NAMES[0]}: listed twice"),
        ([["../other.npy", 0]], r"  \.\./other.npy: listed, but not there"),
        ([[NAMES[1], 0]], f"  {NAMES[0]}: there, but without a label"),
        ([], "do not fit"),
        ([NAMES[1]], "cannot be read as a list"),
    ]:
        (repa / "dataset.json").write_text(json.dumps({"labels": entries}))
        with pytest.raises(DataError, match=rf"dataset.json (.|\n)*{match}"):
            open_latents(repa)


def test_a_bad_file_is_named_when_it_is_read(repa: Path) -> None:
    data = open_latents(repa)
    (repa / NAMES[1]).write_bytes((repa / NAMES[1]).read_bytes()[:-1])
    (repa / NAMES[2]).unlink()
    os.mkfifo(repa / NAMES[2])
    np.save(repa / NAMES[3], np.full((8, 2, 2), np.nan, np.float32))
    np.save(repa / NAMES[4], np.ones((8, 4, 4), np.float32))
    for index, match in [
        (1, "cannot be read as .npy"), (2, "no regular file"), (3, "not finite"),
        (4, r"a latent \(4, 4, 4\); the first is \(4, 2, 2\)"),
    ]:  # fmt: skip
        with pytest.raises(DataError, match=rf"{NAMES[index]} (.|\n)*{match}"):
            data[index]
    with pytest.raises(DataError, match=r"cannot be read as .npy"):  # so few files are all looked at
        open_latents(repa)


def test_a_damaged_shard_is_named(shards: Path, moments: Tensor) -> None:
    path = shards / shard_name(0)
    whole = path.read_bytes()
    cases = {
        whole[:-4]: "SafetensorError",
        (1 << 40).to_bytes(8, "little") + whole[8:]: "SafetensorError",
        whole.replace(b'images\\"', b'imagex\\"'): "KeyError: 'images'",
        whole.replace(b"mean", b"neam"): "SafetensorError",
    }
    write_shard(shards, 0, moments[:, :4].flatten(2), torch.tensor(LABELS[:4]), NAMES[:4])
    for content, match in [*cases.items(), (path.read_bytes(), "does not fit its index")]:
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"as a shard: (.|\n)*{match}(.|\n)*run it again, without this file"):
            open_latents(shards)
    path.unlink()
    with pytest.raises(DataError, match=r"latents-00000.* is missing. Have encode_latents.py make .* of 2 shards"):
        open_latents(shards)


def test_moments_and_labels_that_a_shard_cannot_hold_are_named(shards: Path, moments: Tensor) -> None:
    write_index(INDEX._replace(classes=["ant", "bee"]), shards)
    with pytest.raises(DataError, match="labels beyond the 2 classes"):
        open_latents(shards)
    write_index(INDEX, shards)
    write_shard(shards, 1, torch.stack([moments[0, 4:], moments[1, 4:].log()]), torch.tensor(LABELS[4:]), NAMES[4:])
    with pytest.raises(DataError, match=rf"{NAMES[4]} in .*latents-00001(.|\n)*no standard deviation"):
        open_latents(shards)


def test_an_index_that_is_none_is_named(shards: Path) -> None:
    content = json.loads((shards / "index.json").read_text())
    for changes, match in [
        ({"format": 2}, "'format': 2.*, written by version 1.2.3"),
        ({"shape": [4, 2, 3]}, "never writes"),
        ({"scaling": {"scale": -1, "shift": 0}}, "scale -1"),
        ({"mirrored": True}, "mirrored"),
    ]:
        (shards / "index.json").write_text(json.dumps(content | changes))
        with pytest.raises(DataError, match=rf"index.json (.|\n)*{match}"):
            open_latents(shards)
