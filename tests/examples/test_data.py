"""The examples' small images: real, split once and for all, batched in the seed's order."""

import gzip
import re
from pathlib import Path

import pytest
import torch
from common.data import LatentData, digits, fashion, shuffled_batches
from common.options import Mistake
from idx_files import write_small_fashion
from sklearn.datasets import load_digits


def test_the_digits_are_sklearns_split_without_overlap() -> None:
    (train, held_out), (again, _) = digits(size=8), digits(size=8)  # at their own size nothing is interpolated
    assert torch.equal(train.images, again.images)
    assert (train.labels.bincount() / 3 - held_out.labels.bincount()).abs().max() < 1
    lookup = {tuple(image.ravel() / 8 - 1): label for image, label in zip(*load_digits(return_X_y=True), strict=True)}
    images, labels = (torch.cat(parts) for parts in zip(train, held_out, strict=True))
    rows = dict(zip(map(tuple, images.flatten(1).tolist()), labels.tolist(), strict=True))
    assert (len(train.labels), len(held_out.labels), rows) == (1347, 450, lookup)
    assert digits(16)[0].images.shape == (1347, 1, 16, 16)


def test_batches_follow_the_seed_and_cover_an_epoch(global_rng_untouched: None) -> None:
    def epochs(seed: int) -> list[list[int]]:
        loader = shuffled_batches(torch.arange(10), batch_size=3, seed=seed)
        return [[int(v) for (batch,) in loader for v in batch] for _ in range(2)]

    first, second = epochs(0)
    assert len(first) == len(set(first)) == 9  # the last, smaller batch is left out
    assert first != second
    assert epochs(0) == [first, second]
    assert epochs(1) != [first, second]


def test_latents_are_drawn_from_their_posterior_and_scaled() -> None:
    labels = torch.arange(4)
    mean = labels.float().reshape(4, 1, 1, 1).expand(4, 2, 32, 32)
    data = LatentData(mean, torch.full_like(mean, 0.5), labels, scale=2.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        latents, found = next(data.batches(batch_size=4, seed=3))
        again, _ = next(data.batches(batch_size=4, seed=3))
    assert sorted(found.tolist()) == [0, 1, 2, 3]
    # 2,048 draws a sample: standard errors 0.022 of the mean and 0.016 of the deviation.
    torch.testing.assert_close(latents.mean((1, 2, 3)), 2.0 * found, atol=0.1, rtol=0)
    torch.testing.assert_close(latents.std((1, 2, 3)), torch.ones(4), atol=0.07, rtol=0)
    assert not torch.equal(latents, again)


def test_fashion_is_padded_scaled_and_keeps_its_labels(tmp_path: Path) -> None:
    images, labels = write_small_fashion(tmp_path, train=5, held_out=3)
    for part, raw, wanted in zip(fashion(tmp_path), images, labels, strict=True):
        assert part.labels.tolist() == wanted.tolist()
        expected = torch.full((len(raw), 1, 32, 32), -1.0)  # black, the background
        expected[:, 0, 2:30, 2:30] = torch.from_numpy(raw).float() / 127.5 - 1
        assert torch.equal(part.images, expected)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    raw = gzip.decompress(path.read_bytes())
    for content, match in [
        (gzip.compress(raw[: -28 * 28]), "have 4 images and 5 labels"),
        (gzip.compress(raw[:-1]), f"{path.name} cannot be read as a file of Fashion-MNIST"),
        (path.read_bytes()[:-9], f"{path.name} cannot be read as a file of Fashion-MNIST"),
    ]:
        path.write_bytes(content)
        with pytest.raises(Mistake, match=match):
            fashion(tmp_path)
    path.unlink()
    with pytest.raises(Mistake, match=f"{re.escape(str(path))} is missing.*--data"):
        fashion(tmp_path)
