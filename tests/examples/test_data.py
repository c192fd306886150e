"""The examples' digits: real, split once and for all, batched in the seed's order."""

import pytest
import torch
from common.data import LatentData, digits, shuffled_batches
from common.options import Mistake
from sklearn.datasets import load_digits


def test_the_digits_are_sklearns_split_without_overlap() -> None:
    train, held_out = digits(size=8)  # at their own size nothing is interpolated
    raw = torch.from_numpy(load_digits().images).float() / 8 - 1
    rows = torch.cat([train.images, held_out.images]).flatten(1)
    assert rows.shape == (1797, 64)
    assert len(held_out.labels) == 450
    order = [sorted(map(tuple, part.flatten(1).tolist())) for part in (rows, raw)]
    assert order[0] == order[1]
    lookup = dict(zip(map(tuple, raw.flatten(1).tolist()), load_digits().target.tolist(), strict=True))
    assert [lookup[tuple(row)] for row in held_out.images.flatten(1).tolist()] == held_out.labels.tolist()


def test_the_split_is_the_same_each_time_and_keeps_the_classes_in_proportion() -> None:
    (train, held_out), (again, _) = digits(16), digits(16)
    assert torch.equal(train.images, again.images)
    assert train.images.shape == (1347, 1, 16, 16)
    assert train.images.min() >= -1
    assert train.images.max() <= 1
    assert (train.labels.bincount() / 3 - held_out.labels.bincount()).abs().max() < 1


def test_batches_follow_the_seed_and_cover_an_epoch(global_rng_untouched: None) -> None:
    values = torch.arange(10)

    def epochs(seed: int) -> list[list[int]]:
        loader = shuffled_batches(values, batch_size=3, seed=seed)
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


def test_fewer_latents_than_a_batch_are_an_error() -> None:
    data = LatentData(torch.zeros(4, 1, 2, 2), torch.zeros(4, 1, 2, 2), torch.arange(4), scale=1.0)
    with pytest.raises(Mistake, match="no batch"):
        next(data.batches(batch_size=5, seed=0))
