"""COCO features: written and read in U-ViT's layout, captions at random, and what is missing named."""

from pathlib import Path

import numpy as np
import pytest
import torch
from common.coco_features import CocoFeatures, CocoWriter, write_coco_features
from common.data_files import DataError
from common.options import Mistake
from common.vae import Scaling
from torch import Tensor

CAPTIONS = [3, 1, 2]
EMPTY = torch.full((5, 6), -1.0)
SCALING = Scaling(0.5, 0.25)
Item = tuple[Tensor, Tensor, Tensor]


@pytest.fixture
def items(generator: torch.Generator) -> list[Item]:
    """Three images; the features of caption k of image i are all 10 i + k."""
    means, stds = torch.randn(3, 4, 2, 2, generator=generator), torch.rand(3, 4, 2, 2, generator=generator) + 0.1
    texts = [10.0 * i + torch.arange(count)[:, None, None].expand(-1, 5, 6) for i, count in enumerate(CAPTIONS)]
    return list(zip(means, stds, texts, strict=True))


@pytest.fixture
def folder(tmp_path: Path, items: list[Item]) -> Path:
    """Three images in U-ViT's layout."""
    write_coco_features(tmp_path / "coco", "train", items, EMPTY, scaling=SCALING, vae="some/vae")
    return tmp_path / "coco"


def test_the_layout_is_u_vits_and_an_item_an_image_with_one_of_its_captions(folder: Path, items: list[Item]) -> None:
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*.npy")} == {
        "empty_context.npy", "train/0.npy", "train/1.npy", "train/2.npy",
        "train/0_0.npy", "train/0_1.npy", "train/0_2.npy", "train/1_0.npy", "train/2_0.npy", "train/2_1.npy",
    }  # fmt: skip
    for name, expected in {
        "train/2": torch.cat(items[2][:2]), "train/2_1": torch.full((5, 6), 21.0), "empty_context": EMPTY
    }.items():  # fmt: skip
        assert np.array_equal(np.load(folder / f"{name}.npy"), expected.numpy())
    (folder / "train/photo.png").touch()  # U-ViT keeps the images there, too
    data = CocoFeatures(folder, dropout=0.0)
    assert (len(data), data.channels, data.size, data.captions.tolist()) == (3, 4, 2, CAPTIONS)
    assert (data.scaling, data.vae) == (SCALING, "some/vae")
    for i, (mean, std, contexts) in enumerate(items):
        *found, context = data[i]
        assert torch.equal(torch.stack(found), torch.stack([mean, std]))
        assert any(torch.equal(context, other) for other in contexts)
    with pytest.raises(IndexError):
        data[3]
    (folder / "features.json").unlink()
    assert (CocoFeatures(folder).scaling, CocoFeatures(folder).vae) == (Scaling(0.18215), None)  # U-ViT's own


def test_captions_are_drawn_evenly_and_dropped_as_often_as_asked(folder: Path) -> None:
    data = CocoFeatures(folder, dropout=0.1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = torch.tensor([data[0][2][0, 0] for _ in range(2000)])
    fractions = [(drawn == value).float().mean().item() for value in (-1.0, 0.0, 1.0, 2.0)]
    assert fractions == pytest.approx([0.1, 0.3, 0.3, 0.3], abs=0.04)  # standard errors 0.007 and 0.010


def test_a_log_variance_is_read_as_such_only_when_said(folder: Path, items: list[Item]) -> None:
    for i, (mean, std, _) in enumerate(items):
        np.save(folder / f"train/{i}.npy", torch.cat([mean, 2 * std.log()]).numpy())
    with pytest.raises(DataError, match=r"no standard deviation(.|\n)*second='logvar'"):
        CocoFeatures(folder)
    mean, std, _ = CocoFeatures(folder, second="logvar")[1]
    assert torch.equal(mean, items[1][0])
    torch.testing.assert_close(std, items[1][1])
    np.save(folder / "train/0.npy", torch.cat(items[0][:2]).numpy())
    with pytest.raises(DataError, match=r"0.npy holds no log-variance.*It may be the std"):
        CocoFeatures(folder, second="logvar")


@pytest.mark.parametrize(
    ("gone", "match"),
    [
        (["train/1_0.npy"], r"1 files.\n  1_0.npy: missing"),
        (["train/0_1.npy"], r"2 files.\n  0_1.npy: missing\n  0_2.npy: there, but no"),
        (["train/1.npy"], r"1.npy: missing(.|\n)*2.npy: there, but no image's or caption's next number"),
        (["empty_context.npy"], "empty_context.npy is missing"),
    ],
)
def test_what_is_missing_is_named(folder: Path, gone: list[str], match: str) -> None:
    for name in gone:
        (folder / name).unlink()
    with pytest.raises(DataError, match=match):
        CocoFeatures(folder)


def test_strangers_and_other_shapes_are_named(folder: Path) -> None:
    data = CocoFeatures(folder, dropout=0.0)
    for name, shape in {"1": (8, 4, 4), "2_0": (5, 7), "2_1": (5, 7), "0_0": (5,)}.items():
        np.save(folder / f"train/{name}.npy", np.ones(shape, np.float32))
    for index, match in [
        (0, r"0_0.npy holds no text features"),
        (1, r"1.npy holds a latent \(4, 4, 4\); the first is \(4, 2, 2\)"),
        (2, r"2_[01].npy holds text features \(5, 7\); those .* are \(5, 6\)"),
    ]:
        with pytest.raises(DataError, match=match):
            [data[index] for _ in range(20)]  # any of three captions is drawn
    (folder / "train/01.npy").touch()
    (folder / "features.json").write_text('{"scale": 1}')
    for split, match in [("train", "01.npy: there, but no image's"), ("test", "There is no folder .*test")]:
        with pytest.raises(DataError, match=match):
            CocoFeatures(folder, split)
    (folder / "train/01.npy").unlink()
    with pytest.raises(DataError, match=r"features.json cannot be read as notes(.|\n)*Make it again"):
        CocoFeatures(folder)


def test_nothing_written_is_replaced(folder: Path, items: list[Item]) -> None:
    for split, empty, scaling, match in [
        ("train", EMPTY, SCALING, "train is there already"),
        ("val", EMPTY + 1, SCALING, "other features than the empty prompt has now"),
        ("val", EMPTY, Scaling(0.5, 0.0), r"another VAE(.|\n)*'shift': 0.25(.|\n)*'shift': 0.0"),
    ]:
        with pytest.raises(Mistake, match=match):
            write_coco_features(folder, split, items, empty, scaling=scaling, vae="some/vae")
    write_coco_features(folder, "val", items[:1], EMPTY, scaling=SCALING, vae="some/vae")
    assert (len(CocoFeatures(folder)), len(CocoFeatures(folder, "val"))) == (3, 1)


def test_wrong_items_leave_no_split(tmp_path: Path, items: list[Item]) -> None:
    mean, std, contexts = items[1]
    for wrong, match in [
        ([items[0], (mean, std.log() * 2, contexts)], "image 1 holds no standard deviation"),
        ([(mean, std[:1], contexts)], r"Image 0 has mean \(4, 2, 2\), std \(1, 2, 2\)"),
        ([(mean, std, contexts[:0])], r"captions \(0, 5, 6\); needed are .*\(K, 5, 6\)"),
        ([], "not finished"),
    ]:
        with pytest.raises(DataError, match=match):
            write_coco_features(tmp_path, "train", wrong, EMPTY, scaling=Scaling())
        assert not (tmp_path / "train").exists()
    writer = CocoWriter(tmp_path, "train", EMPTY, scaling=Scaling())
    writer.write(1, *items[1])
    with pytest.raises(DataError, match="not finished: 2 of 3 images are missing"):
        writer.finish(3)
    write_coco_features(tmp_path, "train", items, EMPTY, scaling=Scaling())  # what broke off is no obstacle
    assert {path.name for path in tmp_path.iterdir()} == {"empty_context.npy", "features.json", "train"}
