"""Posterior moments on disk: both layouts read back, and whatever is wrong with them named."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

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
    entries = []
    for i in range(len(LABELS)):
        path = npy(folder, i)
        path.parent.mkdir(parents=True, exist_ok=True)
        array = moments[:, i].flatten(0, 1).numpy()
        np.save(path, array[None] if i % 2 else array)
        entries.append([path.relative_to(folder).as_posix(), LABELS[i]])
    (folder / "dataset.json").write_text(json.dumps({"labels": entries}))
    return folder


@pytest.fixture
def shards(tmp_path: Path, moments: Tensor) -> Path:
    """Our layout: four images, and two."""
    folder = tmp_path / "shards"
    folder.mkdir()
    write_index(INDEX, folder)
    for number, rows in enumerate([slice(0, 4), slice(4, 6)]):
        images = [f"class/{i}.png" for i in range(len(LABELS))][rows]
        write_shard(folder, number, moments[:, rows], torch.tensor(LABELS[rows]), images)
    return folder


def npy(folder: Path, index: int) -> Path:
    return folder / f"{index // 3:05d}/img-mean-std-{index:08d}.npy"


def relabel(folder: Path, index: int, entry: Any) -> None:
    content = json.loads((folder / "dataset.json").read_text())
    content["labels"][index] = entry
    (folder / "dataset.json").write_text(json.dumps(content))


# --- whole folders


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


def test_repas_parent_folder_will_do_and_classes_are_counted_or_given(repa: Path) -> None:
    assert open_latents(repa.parent, num_classes=1000).num_classes == 1000
    with pytest.raises(DataError, match=r"00001/img-mean-std-00000005.npy: the label 3 is not in 0 .. 2"):
        open_latents(repa, num_classes=3)


# --- wrong folders


def test_a_folder_of_something_else_is_named(tmp_path: Path, repa: Path, shards: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        open_latents(tmp_path / "nowhere")
    with pytest.raises(DataError, match="imagenet, shards"):
        open_latents(tmp_path)
    (repa / "index.json").write_text("{}")
    with pytest.raises(DataError, match=r"holds 2 data sets(.|\n)*dataset.json(.|\n)*index.json"):
        open_latents(repa)


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        (["00000/img-mean-std-00000001.npy", True], "the label True is not in 0 .. 1048575"),
        (["00000/img-mean-std-00000001.npy", -1], "the label -1 is not in"),
        (["00000/img-mean-std-00000000.npy", 0], "00000/img-mean-std-00000000.npy: listed twice"),
        (["../img-mean-std-00000001.npy", 0], r"\.\./img-mean-std-00000001.npy', 0\]: no name of a .npy file"),
        (["elsewhere/missing.npy", 0], "elsewhere/missing.npy: listed, but not there"),
        ("00000/img-mean-std-00000001.npy", "00000001.npy: the label None is not in"),
    ],
)
def test_a_wrong_entry_is_named(repa: Path, entry: Any, match: str) -> None:
    relabel(repa, 1, entry)
    with pytest.raises(DataError, match=rf"do not fit: [12] problems(.|\n)*{match}"):
        open_latents(repa)


def test_what_the_list_lacks_is_named(repa: Path) -> None:
    np.save(repa / "00001/another.npy", np.ones((8, 2, 2), np.float32))
    with pytest.raises(DataError, match=r"1 problems(.|\n)*00001/another.npy: there, but without a label"):
        open_latents(repa)
    for content, match in [([], "has no list of labels"), ({"labels": [["a.npy", 0]]}, "a.npy: listed, but")]:
        (repa / "dataset.json").write_text(json.dumps(content))
        with pytest.raises(DataError, match=match):
            open_latents(repa)


# --- bad files


def test_a_bad_file_is_named_when_it_is_read(repa: Path) -> None:
    data = open_latents(repa)
    npy(repa, 1).write_bytes(npy(repa, 1).read_bytes()[:-1])
    npy(repa, 2).unlink()
    os.mkfifo(npy(repa, 2))
    np.save(npy(repa, 3), np.full((8, 2, 2), np.nan, np.float32))
    np.save(npy(repa, 4), np.ones((8, 4, 4), np.float32))
    for index, match in [
        (1, "cannot be read as .npy"), (2, "no regular file"), (3, "not finite"),
        (4, r"a latent \(4, 4, 4\); the first .* \(4, 2, 2\)"),
    ]:  # fmt: skip
        with pytest.raises(DataError, match=rf"img-mean-std-0000000{index}.npy (.|\n)*{match}"):
            data[index]
    with pytest.raises(DataError, match=r"cannot be read as .npy"):  # so few files are all looked at
        open_latents(repa)


# --- wrong shards


def test_a_damaged_shard_is_named(shards: Path) -> None:
    path = shards / shard_name(0)
    whole = path.read_bytes()
    cases = {
        whole[:-4]: "SafetensorError",
        b"": "SafetensorError",
        (1 << 40).to_bytes(8, "little") + whole[8:]: "SafetensorError",
        whole.replace(b'images\\"', b'imagex\\"'): "KeyError: 'images'",
        whole.replace(b'"F32"', b'"I32"'): "does not fit its index",
        whole.replace(b"mean", b"neam"): "does not fit its index",
    }
    assert len(cases) == 6
    for content, match in cases.items():
        path.write_bytes(content)
        with pytest.raises(
            DataError, match=rf"cannot be read as a shard: (.|\n)*{match}(.|\n)*run it again, without this file"
        ):
            open_latents(shards)
    path.unlink()
    with pytest.raises(DataError, match=r"latents-00000.* is missing. Have encode_latents.py make .* of 2 shards"):
        open_latents(shards)


def test_labels_beyond_the_classes_are_named(shards: Path) -> None:
    with pytest.raises(DataError, match="has 4 classes; the model has 3"):
        open_latents(shards, num_classes=3)
    write_index(INDEX._replace(classes=["ant", "bee"]), shards)
    with pytest.raises(DataError, match="labels beyond the 2 classes"):
        open_latents(shards)


def test_bad_moments_in_a_shard_are_named_by_image(shards: Path, moments: Tensor) -> None:
    stored = torch.stack([moments[0, 4:], moments[1, 4:].log()])
    write_shard(shards, 1, stored, torch.tensor(LABELS[4:]), ["class/4.png", "class/5.png"])
    with pytest.raises(DataError, match=r"class/4.png in .*latents-00001(.|\n)*no standard deviation"):
        open_latents(shards)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"kind": "cats"}, "it holds {'kind': 'cats', .*, written by version 1.2.3"),
        ({"format": 2}, "'format': 2"),
        ({"shape": [4, 2, 3]}, "never writes"),
        ({"scaling": {"scale": -1, "shift": 0}}, "the scale is -1"),
        ({"scaling": {"scale": 1.0}}, "shift"),
        ({"mirrored": True}, "mirrored"),
    ],
)
def test_an_index_that_is_none_is_named(shards: Path, changes: dict[str, Any], match: str) -> None:
    content = json.loads((shards / "index.json").read_text())
    (shards / "index.json").write_text(json.dumps(content | changes))
    with pytest.raises(DataError, match=f"index.json cannot be read as an index of latents(.|\n)*{match}"):
        open_latents(shards)
