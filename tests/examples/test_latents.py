"""Posterior moments on disk: both layouts read back, and whatever is wrong with them named, counted or left out."""

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common.data_files import DataError, first_ones, read_json, read_npy
from common.latent_shards import Shard, shard_name, write_shard
from common.latents import LatentFolder, open_latents
from common.moments import check_moments, read_moments
from common.run_folder import write_json
from common.shard_index import Index, index_content, read_index
from torch import Tensor
from torch.utils.data import DataLoader

SHAPE = (4, 2, 2)
LABELS = [2, 0, 1, 1, 0, 3]


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
        path = folder / f"{i // 3:05d}/img-mean-std-{i:08d}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        array = torch.cat([mean, std]).numpy()
        np.save(path, array[None] if i % 2 else array)
        entries.append([path.relative_to(folder).as_posix(), LABELS[i]])
    (folder / "dataset.json").write_text(json.dumps({"labels": entries}))
    return folder


def the_index(**changes: Any) -> Index:
    settings = {"vae": "some/vae"}
    index = Index(settings, 0.5, list(SHAPE), False, 2, ["ant", "bee", "cat", "dog"], "1.2.3")
    return index._replace(**changes)


@pytest.fixture
def shards(tmp_path: Path, moments: tuple[Tensor, Tensor]) -> Path:
    """Our layout: four images, and two of which one was left out."""
    folder = tmp_path / "shards"
    folder.mkdir()
    write_json(index_content(the_index()), folder / "index.json")
    for number, rows in enumerate([slice(0, 4), slice(4, 6)]):
        stored = {"mean": moments[0][rows], "std": moments[1][rows]}
        images = [f"class/{i}.png" for i in range(len(LABELS))][rows]
        left_out = [("class/9.png", "truncated")] * number
        write_shard(folder, number, Shard(stored, torch.tensor(LABELS[rows]), images, left_out))
    return folder


def relabel(folder: Path, index: int, entry: Any) -> None:
    content = json.loads((folder / "dataset.json").read_text())
    content["labels"][index] = entry
    (folder / "dataset.json").write_text(json.dumps(content))


def npy(folder: Path, index: int) -> Path:
    return folder / f"{index // 3:05d}/img-mean-std-{index:08d}.npy"


def same(data: LatentFolder, moments: tuple[Tensor, Tensor], expected: list[int]) -> None:
    """The items are those of the images ``expected``."""
    assert len(data) == len(expected)
    assert data.labels.tolist() == [LABELS[i] for i in expected]
    for (mean, std, label), i in zip((data[k] for k in range(len(data))), expected, strict=True):
        assert mean.dtype == std.dtype == torch.float32
        assert torch.equal(mean, moments[0][i])
        assert torch.equal(std, moments[1][i])
        assert label == LABELS[i]
        assert type(label) is int


@pytest.mark.parametrize("layout", ["repa", "shards"])
def test_a_layout_reads_back_as_it_was_written(
    layout: str, request: pytest.FixtureRequest, moments: tuple[Tensor, Tensor]
) -> None:
    data = open_latents(request.getfixturevalue(layout))
    same(data, moments, list(range(6)))
    assert (data.channels, data.size, data.num_classes) == (4, 2, 4)
    assert (data.scale, data.vae) == ((0.18215, None) if layout == "repa" else (0.5, "some/vae"))
    with pytest.raises(IndexError):
        data[6]
    assert torch.equal(data[-1][0], moments[0][5])


@pytest.mark.parametrize("layout", ["repa", "shards"])
def test_workers_and_pickling_give_the_same(layout: str, request: pytest.FixtureRequest) -> None:
    data = open_latents(request.getfixturevalue(layout))
    plain = list(DataLoader(data, batch_size=4))
    for other in (DataLoader(data, batch_size=4, num_workers=1), DataLoader(pickle.loads(pickle.dumps(data)), 4)):
        for batch, again in zip(plain, other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))


def test_repas_parent_folder_will_do(repa: Path, moments: tuple[Tensor, Tensor]) -> None:
    same(open_latents(repa.parent), moments, list(range(6)))


def test_classes_are_counted_or_given(repa: Path) -> None:
    assert open_latents(repa, num_classes=1000).num_classes == 1000
    with pytest.raises(DataError, match=r"00001/img-mean-std-00000005.npy: the label 3 is not in 0 .. 2"):
        open_latents(repa, num_classes=3)


def test_a_sample_has_the_posteriors_mean_and_deviation(tmp_path: Path, generator: torch.Generator) -> None:
    mean, std = torch.full((1, 64, 64), 3.0), torch.full((1, 64, 64), 0.25)
    np.save(tmp_path / "a.npy", torch.cat([mean, std]).numpy())
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": [["a.npy", 0]]}))
    data = open_latents(tmp_path)
    found_mean, found_std, _ = data[0]
    latent = data.scale * (found_mean + found_std * torch.randn(mean.shape, generator=generator))
    # 4,096 draws: standard errors 0.0007 and 0.0005
    assert latent.mean().item() == pytest.approx(0.18215 * 3.0, abs=4e-3)
    assert latent.std().item() == pytest.approx(0.18215 * 0.25, abs=3e-3)


def test_mirrored_images_follow_the_others(tmp_path: Path, moments: tuple[Tensor, Tensor]) -> None:
    mean, std = moments
    write_json(index_content(the_index(mirrored=True)), tmp_path / "index.json")
    for number, rows in enumerate([slice(0, 4), slice(4, 6)]):
        stored = {"mean": mean[rows], "std": std[rows], "mean_mirrored": mean[rows] + 9, "std_mirrored": std[rows] + 9}
        write_shard(tmp_path, number, Shard(stored, torch.tensor(LABELS[rows]), ["x.png"] * len(mean[rows]), []))
    data = open_latents(tmp_path)
    assert data.labels.tolist() == LABELS * 2
    for i in range(6):
        assert torch.equal(data[i][0], mean[i])
        assert torch.equal(data[i + 6][0], mean[i] + 9)
        assert torch.equal(data[i + 6][1], std[i] + 9)


def test_half_precision_is_read_as_single(tmp_path: Path, moments: tuple[Tensor, Tensor]) -> None:
    write_json(index_content(the_index(shards=1)), tmp_path / "index.json")
    half = [part.half() for part in moments]
    stored = {"mean": half[0], "std": half[1]}
    write_shard(tmp_path, 0, Shard(stored, torch.tensor(LABELS), ["x.png"] * 6, []))
    mean, std, _ = open_latents(tmp_path)[2]
    assert mean.dtype == torch.float32
    assert torch.equal(mean, half[0][2].float())
    assert torch.equal(std, half[1][2].float())


# --- wrong moments


def test_a_log_variance_is_never_taken_for_a_std(repa: Path, moments: tuple[Tensor, Tensor]) -> None:
    for i, (mean, std) in enumerate(zip(*moments, strict=True)):
        np.save(npy(repa, i), torch.cat([mean, 2 * std.log()]).numpy())
    for match in ["no standard deviation", "log-variance", "latent_dist.std"]:
        with pytest.raises(DataError, match=match):
            open_latents(repa)


def test_moments_of_another_kind_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    for shape in [(8, 2, 3), (7, 2, 2), (2, 8, 2, 2), (8, 2), (0, 2, 2)]:
        np.save(path, np.ones(shape, np.float32))
        with pytest.raises(DataError, match=re.escape(f"an array {shape}")):
            read_moments(path)
    mean = torch.ones(4, 2, 2)
    for bad in (float("nan"), float("inf")):
        for pair in [(mean * bad, mean), (mean, mean * bad)]:
            with pytest.raises(DataError, match=r"image 3 holds values that are not finite"):
                check_moments(*pair, "image 3")


# --- wrong .npy and .json files


class Hostile:
    """Unpickled, it would leave a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.trace,)


def test_no_npy_runs_code_or_takes_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.array([Hostile(tmp_path / "trace")], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"holds object; floating"):
        read_npy(path)
    assert not (tmp_path / "trace").exists()
    np.save(path, np.ones((8, 2, 2), np.float32))
    whole = path.read_bytes()
    huge = whole.replace(b"(8, 2, 2), }         ", b"(8, 2, 2000000000), }")
    assert len(huge) == len(whole)
    cases = {
        huge: "takes 128000000128",
        whole[:-4]: r"has 252 bytes, but an array \(8, 2, 2\) of float32 takes 256",
        whole + b"\0": "has 257 bytes",
        whole[:30]: "cannot be read as .npy",
        b"": "cannot be read as .npy",
        whole.replace(b"(8, 2, 2), }  ", b"(8,-2,-2), }  "): "none that np.save writes",
        whole.replace(b"'<f4', ", b"1+1,   "): "none that np.save writes",
        whole[:8] + b"\xff\xff" + whole[10:60] + b"(" + b"1" * 60_000: "none that np.save writes",  # in no time
        b"\x93NUMPY\x03" + whole[7:]: "none that np.save writes",
        whole.replace(b"<f4", b"<i4"): "floating-point numbers are needed",
    }
    for content, match in cases.items():
        path.write_bytes(content)
        with pytest.raises(DataError, match=match):
            read_npy(path)
    with path.open("wb") as stream:
        stream.truncate((64 << 20) + 1)  # a sparse file takes no room
    with pytest.raises(DataError, match="at most 67108864 are read"):
        read_npy(path)
    with pytest.raises(DataError, match=r"b.npy is missing"):
        read_npy(tmp_path / "b.npy")


def test_arrays_are_read_as_numpy_reads_them(tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(size=(8, 2, 2))
    for kind in (
        array,
        np.asfortranarray(array),
        array.astype(">f4"),
        array.astype(np.float16),
        array[0, 0],
        array[0, 0, 0],
    ):
        np.save(tmp_path / "a.npy", kind)
        assert np.array_equal(read_npy(tmp_path / "a.npy"), np.load(tmp_path / "a.npy", allow_pickle=False))


def test_no_json_takes_memory_or_overflows_the_stack(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for content in (b"{", b"\xff", b"[" * 100_000, b"1" * 5000):
        path.write_bytes(content)
        with pytest.raises(DataError, match="cannot be read as JSON"):
            read_json(path)
    with path.open("wb") as stream:
        stream.truncate((1 << 30) + 1)
    with pytest.raises(DataError, match="longer than 1073741824 bytes"):
        read_json(path)


def test_the_first_few_are_named_and_the_others_counted() -> None:
    problems = [(f"{i}.npy", "broken\nin two") for i in range(7)]
    lines = first_ones(problems).splitlines()
    assert lines == [*(f"  {i}.npy: broken in two" for i in range(5)), "  and 2 more"]
    assert first_ones(problems[:5]).splitlines() == lines[:5]


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
    with pytest.raises(DataError, match=match) as error:
        open_latents(repa)
    assert "--skip-bad" in str(error.value)
    data = open_latents(repa, skip_bad=True)
    same(data, moments, [2, 3, 4, 5] if "twice" in match else [0, 2, 3, 4, 5])
    assert "left out" in (printed := capsys.readouterr().out)
    assert re.search(match, printed)


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
    """Three of six files are bad: one truncated, one not finite, one of another size."""
    npy(repa, 1).write_bytes(npy(repa, 1).read_bytes()[:-1])
    np.save(npy(repa, 3), np.full((8, 2, 2), np.nan, np.float32))
    np.save(npy(repa, 4), np.ones((8, 4, 4), np.float32))


def test_a_bad_file_is_named_when_it_is_read(repa: Path) -> None:
    data = open_latents(repa)
    spoil(repa)
    for index, match in [(1, "truncated"), (3, "not finite"), (4, r"a latent \(4, 4, 4\); the others .* \(4, 2, 2\)")]:
        with pytest.raises(DataError, match=rf"img-mean-std-0000000{index}.npy (.|\n)*{match}(.|\n)*skip_bad"):
            data[index]
    with pytest.raises(DataError, match="truncated"):  # so few files are all looked at
        open_latents(repa)


def test_bad_files_are_left_out_and_counted_when_asked(
    repa: Path, moments: tuple[Tensor, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(repa)
    before = sorted(repa.rglob("*"))
    bad_list = tmp_path / "run/bad.json"
    same(open_latents(repa, skip_bad=True), moments, [0, 2, 5])
    printed = capsys.readouterr().out
    assert "3 entries left out, 3 items used" in printed
    assert "img-mean-std-00000001.npy: " in printed
    same(open_latents(repa, skip_bad=True, bad_list=bad_list), moments, [0, 2, 5])
    assert [entry[:2] for entry in json.loads(bad_list.read_text())["bad"]] == [
        [i, f"{i // 3:05d}/img-mean-std-{i:08d}.npy"] for i in (1, 3, 4)
    ]
    assert sorted(repa.rglob("*")) == before


def test_a_kept_list_spares_reading_every_file_again(repa: Path, tmp_path: Path) -> None:
    spoil(repa)
    bad_list = tmp_path / "bad.json"
    open_latents(repa, skip_bad=True, bad_list=bad_list)
    npy(repa, 5).write_bytes(b"")  # would be found
    data = open_latents(repa, skip_bad=True, bad_list=bad_list)
    assert len(data) == 3
    with pytest.raises(DataError, match=r"00000005.npy"):
        data[2]
    relabel(repa, 0, ["00000/img-mean-std-00000000.npy", 3])
    with pytest.raises(DataError, match=r"bad.json lists what is bad(.|\n)*as it was(.|\n)*delete this one"):
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
        whole[:-4]: "cannot be read as a shard",
        b"": "cannot be read as a shard",
        (1 << 40).to_bytes(8, "little") + whole[8:]: "announces a header of 1099511627776 bytes",
        whole.replace(b'"images"', b'"imagex"'): "KeyError: 'images'",
        whole.replace(b'"F32"', b'"I32"'): "does not fit its index",
        whole.replace(b"mean", b"neam"): "does not fit its index",
    }
    for content, match in cases.items():
        path.write_bytes(content)
        with pytest.raises(DataError, match=match) as error:
            open_latents(shards)
        assert "run encode_latents.py again" in str(error.value)
    same(open_latents(shards, skip_bad=True), moments, [4, 5])


def test_labels_beyond_the_classes_are_named(shards: Path) -> None:
    write_json(index_content(the_index(classes=["ant", "bee"])), shards / "index.json")
    with pytest.raises(DataError, match="labels beyond the 2 classes"):
        open_latents(shards)


def test_bad_moments_in_a_shard_are_named_by_image(shards: Path, moments: tuple[Tensor, Tensor]) -> None:
    stored = {"mean": moments[0][4:], "std": moments[1][4:].log()}
    write_shard(shards, 1, Shard(stored, torch.tensor(LABELS[4:]), ["class/4.png", "class/5.png"], []))
    with pytest.raises(DataError, match=r"class/4.png in .*latents-00001.safetensors holds no standard deviation"):
        open_latents(shards)
    same(open_latents(shards, skip_bad=True), moments, [0, 1, 2, 3])


def test_more_classes_than_the_model_has_are_an_error(shards: Path) -> None:
    assert open_latents(shards, num_classes=1000).num_classes == 4
    with pytest.raises(DataError, match="has 4 classes; the model has 3"):
        open_latents(shards, num_classes=3)


def test_an_index_that_is_none_is_named(shards: Path) -> None:
    right = index_content(the_index())
    for change, match in [
        ({"kind": None}, "is no index of latents"),
        ({"format": 2, "library": "9.0"}, "has format 2, written by version '9.0'"),
        ({"scale": 0.0}, "scale: 0.0"),
        ({"scale": True}, "scale: True"),
        ({"shape": [4, 2, 3]}, r"shape: \[4, 2, 3\]"),
        ({"shape": [4, 10**9, 10**9]}, "shape: "),
        ({"shards": 10**9}, "shards: 1000000000"),
        ({"classes": []}, r"classes: \[\]"),
        ({"settings": {}}, "settings: {}"),
        ({"mirrored": 1}, "mirrored: 1"),
    ]:
        write_json({**right, **change}, shards / "index.json")
        with pytest.raises(DataError, match=match):
            read_index(shards)
    del right["scale"]
    write_json(right, shards / "index.json")
    with pytest.raises(DataError, match="KeyError: 'scale'"):
        read_index(shards)
