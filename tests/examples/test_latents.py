"""Posterior moments on disk: both layouts read back, and whatever is wrong with them named, counted or left out."""

import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common.data_files import DataError
from common.latents import Index, LatentFolder, open_latents, read_index, shard_name, write_index, write_shard
from common.vae import Scaling
from torch import Tensor
from torch.utils.data import DataLoader

SHAPE = (4, 2, 2)
LABELS = [2, 0, 1, 1, 0, 3]
SCALING = Scaling(0.5, [0.1, 0.2, 0.3, 0.4])


@pytest.fixture
def moments(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Means and stds of six images."""
    mean = torch.randn(len(LABELS), *SHAPE, generator=generator)
    return mean, torch.rand(len(LABELS), *SHAPE, generator=generator) + 0.1


@pytest.fixture
def repa(tmp_path: Path, moments: tuple[Tensor, Tensor]) -> Path:
    """REPA's layout: three files a folder, with and without an axis of one in front."""
    folder = tmp_path / "imagenet/vae-sd"
    entries = []
    for i, (mean, std) in enumerate(zip(*moments, strict=True)):
        path = npy(folder, i)
        path.parent.mkdir(parents=True, exist_ok=True)
        array = torch.cat([mean, std]).numpy()
        np.save(path, array[None] if i % 2 else array)
        entries.append([path.relative_to(folder).as_posix(), LABELS[i]])
    (folder / "dataset.json").write_text(json.dumps({"labels": entries}))
    return folder


def the_index(**changes: Any) -> Index:
    index = Index({"vae": "some/vae"}, SCALING, list(SHAPE), False, 2, ["ant", "bee", "cat", "dog"], "1.2.3")
    return index._replace(**changes)


@pytest.fixture
def shards(tmp_path: Path, moments: tuple[Tensor, Tensor]) -> Path:
    """Our layout: four images, and two of which one was left out."""
    folder = tmp_path / "shards"
    folder.mkdir()
    write_index(the_index(), folder)
    for number, rows in enumerate([slice(0, 4), slice(4, 6)]):
        stored = [part[rows] for part in moments]
        images = [f"class/{i}.png" for i in range(len(LABELS))][rows]
        left_out = [("class/9.png", "truncated")] * number
        write_shard(folder, number, stored, torch.tensor(LABELS[rows]), images, left_out)
    return folder


def npy(folder: Path, index: int) -> Path:
    return folder / f"{index // 3:05d}/img-mean-std-{index:08d}.npy"


def relabel(folder: Path, index: int, entry: Any) -> None:
    content = json.loads((folder / "dataset.json").read_text())
    content["labels"][index] = entry
    (folder / "dataset.json").write_text(json.dumps(content))


def same(data: LatentFolder, moments: tuple[Tensor, Tensor], expected: list[int]) -> None:
    """The items are those of the images ``expected``."""
    assert data.labels.tolist() == [LABELS[i] for i in expected]
    assert len(data) == len(expected)
    for (mean, std, label), i in zip((data[k] for k in range(len(data))), expected, strict=True):
        assert mean.dtype == std.dtype == torch.float32
        assert torch.equal(mean, moments[0][i])
        assert torch.equal(std, moments[1][i])
        assert (label, type(label)) == (LABELS[i], int)


# --- whole folders


@pytest.mark.parametrize("layout", ["repa", "shards"])
def test_a_layout_reads_back_as_it_was_written(
    layout: str, request: pytest.FixtureRequest, moments: tuple[Tensor, Tensor]
) -> None:
    data = open_latents(request.getfixturevalue(layout))
    same(data, moments, list(range(6)))
    assert (data.channels, data.size, data.num_classes) == (4, 2, 4)
    assert (data.scaling, data.vae) == ((Scaling(0.18215), None) if layout == "repa" else (SCALING, "some/vae"))
    with pytest.raises(IndexError):
        data[6]
    assert torch.equal(data[-1][0], moments[0][5])
    plain = list(DataLoader(data, batch_size=4))
    for other in (DataLoader(data, batch_size=4, num_workers=1), DataLoader(pickle.loads(pickle.dumps(data)), 4)):
        for batch, again in zip(plain, other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))


def test_repas_parent_folder_will_do_and_classes_are_counted_or_given(
    repa: Path, moments: tuple[Tensor, Tensor]
) -> None:
    same(open_latents(repa.parent), moments, list(range(6)))
    assert open_latents(repa, num_classes=1000).num_classes == 1000
    with pytest.raises(DataError, match=r"00001/img-mean-std-00000005.npy: the label 3 is not in 0 .. 2"):
        open_latents(repa, num_classes=3)


def test_an_index_without_a_shift_has_none(shards: Path) -> None:
    content = json.loads((shards / "index.json").read_text())
    assert (content["scale"], content.pop("shift")) == (0.5, [0.1, 0.2, 0.3, 0.4])
    (shards / "index.json").write_text(json.dumps(content))
    assert open_latents(shards).scaling == Scaling(0.5, 0.0)


def test_mirrored_images_follow_the_others(tmp_path: Path, moments: tuple[Tensor, Tensor]) -> None:
    mean, std = moments
    write_index(the_index(mirrored=True), tmp_path)
    for number, rows in enumerate([slice(0, 4), slice(4, 6)]):
        stored = [mean[rows], std[rows], mean[rows] + 9, std[rows] + 9]
        write_shard(tmp_path, number, stored, torch.tensor(LABELS[rows]), ["x.png"] * len(mean[rows]), [])
    data = open_latents(tmp_path)
    assert data.labels.tolist() == LABELS * 2
    for i in range(6):
        assert torch.equal(data[i][0], mean[i])
        assert torch.equal(data[i + 6][0], mean[i] + 9)
        assert torch.equal(data[i + 6][1], std[i] + 9)


def test_half_precision_is_read_as_single(tmp_path: Path, moments: tuple[Tensor, Tensor]) -> None:
    write_index(the_index(shards=1), tmp_path)
    half = [part.half() for part in moments]
    write_shard(tmp_path, 0, half, torch.tensor(LABELS), ["x.png"] * 6, [])
    mean, std, _ = open_latents(tmp_path)[2]
    assert mean.dtype == torch.float32
    assert torch.equal(mean, half[0][2].float())
    assert torch.equal(std, half[1][2].float())


# --- wrong folders


def test_a_folder_of_something_else_is_named(tmp_path: Path, repa: Path, shards: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder, match in [
        (tmp_path / "nowhere", "no such folder"),
        (tmp_path / "empty", "an empty folder"),
        (tmp_path, "imagenet, shards"),
    ]:
        with pytest.raises(DataError, match=match):
            open_latents(folder)
    (repa / "index.json").write_text("{}")
    with pytest.raises(DataError, match=r"holds 2 data sets(.|\n)*dataset.json(.|\n)*index.json"):
        open_latents(repa)


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        (["00000/img-mean-std-00000001.npy", "3"], "the label '3' is no whole number"),
        (["00000/img-mean-std-00000001.npy", 1.0], "the label '1.0' is no whole number"),
        (["00000/img-mean-std-00000001.npy", True], "the label 'True' is no whole number"),
        (["00000/img-mean-std-00000001.npy", -1], "the label -1 is not in 0 .. 1048575"),
        (["00000/img-mean-std-00000001.npy", 10**9], "the label 1000000000 is not in"),
        (["00000/img-mean-std-00000000.npy", 0], "00000/img-mean-std-00000000.npy: listed twice"),
        (["../img-mean-std-00000001.npy", 0], r"\.\./img-mean-std-00000001.npy: no name of a .npy file"),
        (["/etc/a.npy", 0], "/etc/a.npy: no name of a .npy file"),
        (["00000/missing.npy", 0], "00000/missing.npy: listed, but not there"),
        (["elsewhere/missing.npy", 0], "elsewhere/missing.npy: listed, but not there"),
        ("00000/img-mean-std-00000001.npy", "no pair of file and label"),
    ],
)
def test_a_wrong_entry_is_named_and_can_be_left_out(
    repa: Path, moments: tuple[Tensor, Tensor], entry: Any, match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    relabel(repa, 1, entry)
    with pytest.raises(DataError, match=rf"{match}(.|\n)*--skip-bad"):
        open_latents(repa)
    same(open_latents(repa, skip_bad=True), moments, [2, 3, 4, 5] if "twice" in match else [0, 2, 3, 4, 5])
    assert re.search(match, capsys.readouterr().out)


def test_files_without_a_label_are_named(repa: Path) -> None:
    np.save(repa / "00001/another.npy", np.ones((8, 2, 2), np.float32))
    with pytest.raises(DataError, match=r"1 entries(.|\n)*00001/another.npy: there, but without a label"):
        open_latents(repa)
    assert len(open_latents(repa, skip_bad=True)) == 6


def test_a_list_that_is_none_is_named(repa: Path) -> None:
    for content in ({"labels": None}, {"labels": []}, [], {}):
        (repa / "dataset.json").write_text(json.dumps(content))
        with pytest.raises(DataError, match="has no list of labels"):
            open_latents(repa)
    (repa / "dataset.json").write_text(json.dumps({"labels": [["a.npy", 0]]}))
    with pytest.raises(DataError, match=r"None of the files(.|\n)*a.npy: listed, but not there"):
        open_latents(repa)


# --- bad files, found when read or left out


def spoil(repa: Path) -> None:
    """Four of six files are bad: one truncated, one a pipe, one not finite, one of another size."""
    npy(repa, 1).write_bytes(npy(repa, 1).read_bytes()[:-1])
    npy(repa, 2).unlink()
    os.mkfifo(npy(repa, 2))
    np.save(npy(repa, 3), np.full((8, 2, 2), np.nan, np.float32))
    np.save(npy(repa, 4), np.ones((8, 4, 4), np.float32))


def test_a_bad_file_is_named_when_it_is_read(repa: Path) -> None:
    data = open_latents(repa)
    spoil(repa)
    for index, match in [
        (1, "cannot be read as .npy"), (2, "no regular file"), (3, "not finite"),
        (4, r"a latent \(4, 4, 4\); the others .* \(4, 2, 2\)"),
    ]:  # fmt: skip
        with pytest.raises(DataError, match=rf"img-mean-std-0000000{index}.npy (.|\n)*{match}(.|\n)*skip_bad"):
            data[index]
    with pytest.raises(DataError, match=r"cannot be read as .npy"):  # so few files are all looked at
        open_latents(repa)


def test_bad_files_are_left_out_and_their_list_is_kept(
    repa: Path, moments: tuple[Tensor, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(repa)
    before = sorted(repa.rglob("*"))
    bad_list = tmp_path / "run/bad.json"
    same(open_latents(repa, skip_bad=True, bad_list=bad_list), moments, [0, 5])
    printed = capsys.readouterr().out
    assert "4 entries left out, 2 items used" in printed
    assert "img-mean-std-00000001.npy: " in printed
    assert [entry[:2] for entry in json.loads(bad_list.read_text())["bad"]] == [
        [i, f"{i // 3:05d}/img-mean-std-{i:08d}.npy"] for i in (1, 2, 3, 4)
    ]
    assert sorted(repa.rglob("*")) == before
    npy(repa, 5).write_bytes(b"")  # would be found if every file were read again
    data = open_latents(repa, skip_bad=True, bad_list=bad_list)
    assert len(data) == 2
    with pytest.raises(DataError, match=r"00000005.npy"):
        data[1]
    relabel(repa, 0, ["00000/img-mean-std-00000000.npy", 3])
    with pytest.raises(DataError, match=r"bad.json lists what is bad(.|\n)*as it was(.|\n)*delete this one"):
        open_latents(repa, skip_bad=True, bad_list=bad_list)


@pytest.mark.parametrize(
    "entry",
    [
        [-1, "00001/img-mean-std-00000005.npy", "truncated"],
        [6, "00001/img-mean-std-00000005.npy", "truncated"],
        [True, "00000/img-mean-std-00000001.npy", "truncated"],
        [5.0, "00001/img-mean-std-00000005.npy", "truncated"],
        ["5", "00001/img-mean-std-00000005.npy", "truncated"],
        [4, "00001/img-mean-std-00000005.npy", "truncated"],
        [5, "00001/img-mean-std-00000005.npy", None],
        [5, "00001/img-mean-std-00000005.npy"],
        5,
        None,
    ],
)
def test_a_damaged_list_drops_nothing(repa: Path, tmp_path: Path, entry: Any) -> None:
    bad_list = tmp_path / "bad.json"
    npy(repa, 1).write_bytes(b"")
    open_latents(repa, skip_bad=True, bad_list=bad_list)
    whole = json.loads(bad_list.read_text())
    for content in (whole | {"bad": [entry]}, whole | {"bad": entry}, {"bad": []}, [], None):
        bad_list.write_text(json.dumps(content))
        with pytest.raises(DataError, match=r"bad.json cannot be read as a list of bad items(.|\n)*Delete it"):
            open_latents(repa, skip_bad=True, bad_list=bad_list)
    for content in ("", '{"bad": ['):
        bad_list.write_text(content)
        with pytest.raises(DataError, match=r"bad.json cannot be read as JSON"):
            open_latents(repa, skip_bad=True, bad_list=bad_list)


def test_a_folder_of_bad_files_alone_is_named(repa: Path) -> None:
    for i in range(6):
        npy(repa, i).write_bytes(b"")
    with pytest.raises(DataError, match=r"Not one of 6 files(.|\n)*cannot be read as .npy"):
        open_latents(repa, skip_bad=True)


# --- wrong shards


def test_shards_that_are_missing_are_counted(shards: Path) -> None:
    (shards / shard_name(1)).unlink()
    for skip_bad in (False, True):
        with pytest.raises(DataError, match=r"not finished: 1 of 2 shards are missing, latents-00001(.|\n)*Run encode"):
            open_latents(shards, skip_bad=skip_bad)


def test_a_damaged_shard_is_named_and_can_be_left_out(shards: Path, moments: tuple[Tensor, Tensor]) -> None:
    path = shards / shard_name(0)
    whole = path.read_bytes()
    cases = {
        whole[:-4]: "SafetensorError",
        b"": "SafetensorError",
        (1 << 40).to_bytes(8, "little") + whole[8:]: "announces a header of 1099511627776 bytes",
        whole.replace(b'"images"', b'"imagex"'): "KeyError: 'images'",
        whole.replace(b'"F32"', b'"I32"'): "does not fit its index",
        whole.replace(b"mean", b"neam"): "does not fit its index",
    }
    for content, match in cases.items():
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"cannot be read as a shard: (.|\n)*{match}(.|\n)*run encode_latents.py"):
            open_latents(shards)
    same(open_latents(shards, skip_bad=True), moments, [4, 5])
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match="no regular file"):
        open_latents(shards)


def test_labels_beyond_the_classes_are_named(shards: Path) -> None:
    write_index(the_index(classes=["ant", "bee"]), shards)
    with pytest.raises(DataError, match="labels beyond the 2 classes"):
        open_latents(shards)
    write_index(the_index(), shards)
    with pytest.raises(DataError, match="has 4 classes; the model has 3"):
        open_latents(shards, num_classes=3)


def test_bad_moments_in_a_shard_are_named_by_image(shards: Path, moments: tuple[Tensor, Tensor]) -> None:
    stored = [moments[0][4:], moments[1][4:].log()]
    write_shard(shards, 1, stored, torch.tensor(LABELS[4:]), ["class/4.png", "class/5.png"], [])
    with pytest.raises(DataError, match=r"class/4.png in .*latents-00001(.|\n)*no standard deviation"):
        open_latents(shards)
    same(open_latents(shards, skip_bad=True), moments, [0, 1, 2, 3])


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"kind": "cats"}, "is no index of latents"),
        ({"format": 2}, "has format 2, written by version '1.2.3'"),
        ({"shape": [4, 2]}, "cannot be read as an index of latents"),
        ({"shape": [4, 2, 3]}, r"shape: \[4, 2, 3\]"),
        ({"shape": [4, 1 << 20, 1 << 20]}, "shape"),
        ({"scale": -1}, "the scale is -1"),
        ({"scale": [1.0]}, "the scale has 1 numbers, the latents 4 channels"),
        ({"shift": "0"}, "the shift is 0"),
        ({"shards": 0}, "shards: 0"),
        ({"shards": 1 << 40}, "shards: "),
        ({"mirrored": 1}, "mirrored: 1"),
        ({"classes": []}, r"classes: \[\]"),
        ({"settings": {}}, "settings: {}"),
    ],
)
def test_an_index_that_is_none_is_named(shards: Path, changes: dict[str, Any], match: str) -> None:
    content = json.loads((shards / "index.json").read_text())
    (shards / "index.json").write_text(json.dumps(content | changes))
    with pytest.raises(DataError, match=match):
        read_index(shards)
    (shards / "index.json").write_text("[]")
    with pytest.raises(DataError, match="is no index of latents"):
        read_index(shards)
