"""The baselines of the convergence study, each against its formula written out."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from benchmarks import baselines as peers
from common.data import LatentData
from common.metrics import SmallClassifier
from common.paths import velocity_loss
from common.sit import FinalLayer, SiT
from common.training import averaged_copy
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, pixel_shuffle

import selftrans_reg as st

N, WIDTH = 6, 16


@pytest.fixture(autouse=True)
def own_rng() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def model() -> SiT:
    model = SiT(4, 2, 3, WIDTH, 4, 2, num_classes=5, learn_sigma=False)
    for name, parameter in model.named_parameters():
        if "adaLN" in name:  # at the initial zeros every layer gives the same tokens
            nn.init.normal_(parameter, std=0.5)
    model.y_embedder.dropout_prob = 0.0
    return model.train()


@contextmanager
def watched(model: SiT) -> Iterator[list[Tensor]]:
    """The tokens of every block that runs inside."""
    tokens: list[Tensor] = []
    handles = [block.register_forward_hook(lambda m, args, out: tokens.append(out)) for block in model.blocks]
    yield tokens
    for handle in handles:
        handle.remove()


class Batch:
    """A forward of the model, and what a formula needs of it."""

    def __init__(self, model: SiT) -> None:
        self.latents, self.noise = torch.randn(2, N, 3, 4, 4)
        self.t, self.y = torch.rand(N), torch.arange(N) % 5
        self.x_t = self.noisy(self.t)
        with watched(model) as self.tokens:
            self.loss = velocity_loss(model, self.latents, self.y, self.t, self.noise)

    def noisy(self, t: Tensor) -> Tensor:
        return torch.lerp(self.latents, self.noise, t.reshape(-1, 1, 1, 1))

    def terms(self, criterion: nn.Module, step: int = 0) -> st.LossTerms:
        return criterion(self.loss, latents=self.latents, step=step)


def test_terms_are_their_formulas_and_reach_their_layer(model: SiT, global_rng_untouched: None) -> None:
    """Minus the cosine to a deeper layer, or to the encoder of the batch; the log mean over all pairs."""
    with torch.random.fork_rng():
        targets, head = torch.randn(3, N, 4, 5), st.ProjectionHead(WIDTH, 5, 8)
        repa = peers.REPA(model, "blocks.1", lambda step: targets[step], head, weight=1.0)
        dispersive = peers.Dispersive(model, "blocks.1", weight=0.5, temperature=0.7)
        layersync = peers.LayerSync(model, "blocks.0", "blocks.2", weight=0.3)
        batch = Batch(model)
    z = batch.tokens[1].flatten(1).double()
    pairs = [torch.exp(-((a - b) ** 2).mean() / 0.7) for a in z for b in z]
    for criterion, weight, expected in [
        (repa, 1.0, -cosine_similarity(head(batch.tokens[1]), targets[2], -1).mean()),
        (dispersive, 0.5, torch.stack(pairs).mean().log().float()),
        (layersync, 0.3, -cosine_similarity(batch.tokens[0], batch.tokens[2], -1).mean()),
    ]:
        terms = batch.terms(criterion, step=2)
        torch.testing.assert_close(terms.alignment, expected.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(terms.total, batch.loss.mean() + weight * expected)
        assert terms.weight.item() == pytest.approx(weight)
        assert (terms.denoising.requires_grad, terms.alignment.requires_grad) == (False, False)
    (terms.total - batch.loss.mean()).backward()
    assert model.blocks[0].mlp.fc1.weight.grad.abs().sum() > 0
    assert model.blocks[1].mlp.fc1.weight.grad.abs().sum() == 0  # the deeper layer is a target, not taught


def test_internal_guidance_regresses_the_velocity_early_and_samples_away_from_its_average(model: SiT) -> None:
    final = FinalLayer(WIDTH, 2, 3)
    criterion = peers.InternalGuidance(model, "blocks.1", final, weight=1.0, decay=0.9)
    for parameter in final.parameters():
        nn.init.normal_(parameter, std=0.5)
    average = copy.deepcopy(final)  # which it begins as

    def early_velocity(final: nn.Module, batch: Batch) -> Tensor:
        patches = final(batch.tokens[1], model.t_embedder(batch.t) + model.y_embedder(batch.y))
        patches = patches.unflatten(2, (2, 2, 3)).permute(0, 4, 2, 3, 1).reshape(N, 12, 2, 2)  # channel, row, column
        return pixel_shuffle(patches, 2)

    batch = Batch(model)
    terms = batch.terms(criterion)
    expected = (early_velocity(final, batch) - (batch.noise - batch.latents)).square().mean()
    torch.testing.assert_close(terms.alignment, expected.detach(), rtol=1e-4, atol=1e-4)
    terms.total.backward()
    assert all(p.grad is not None for p in final.parameters())
    assert not any(p.requires_grad for p in criterion.average.parameters())

    for parameter in final.parameters():
        parameter.data.add_(1.0)
    batch = Batch(model.eval())
    with torch.no_grad():
        found = criterion.guided(model, 1.4)(batch.x_t, batch.t, batch.y)
        early = early_velocity(average, batch)
        torch.testing.assert_close(found, early + 1.4 * (model(batch.x_t, batch.t, batch.y) - early))


@pytest.mark.parametrize("distance", ["cosine", "smooth_l1"])
def test_sra_regresses_the_averages_layer_at_a_cleaner_time(model: SiT, distance: str) -> None:
    ema = averaged_copy(model, 0.9).module
    for parameter in ema.parameters():
        parameter.mul_(1.1)
    head = st.ProjectionHead(WIDTH, WIDTH, 8)
    criterion = peers.SRA(model, ema, ("blocks.0", "blocks.2"), head, weight=1.0, distance=distance)
    model.y_embedder.dropout_prob = 0.5
    seen: list[Tensor] = []
    model.y_embedder.embedding_table.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    batch = Batch(model)
    with watched(ema) as ran:
        terms = batch.terms(criterion, step=7)
    assert len(ran) == 3  # the average stops at its layer
    assert 0 < (seen[0] == 5).sum() < N  # some labels were dropped, and the average sees the same

    cleaner = (batch.t - 0.2 * torch.rand(N, generator=torch.Generator().manual_seed(7))).clamp(min=0)
    with torch.no_grad(), watched(ema) as tokens:
        ema(batch.noisy(cleaner), cleaner, seen[0])
    projected = head(batch.tokens[0])
    error = (projected - tokens[2]).abs()
    if distance == "smooth_l1":
        expected = torch.where(error < 0.05, error**2 / 0.1, error - 0.025).mean()
    else:  # of each channel, along the tokens
        expected = 1 - cosine_similarity(projected, tokens[2], 1).mean()
    torch.testing.assert_close(terms.alignment, expected.detach(), rtol=1e-4, atol=1e-5)
    terms.total.backward()
    assert all(parameter.grad is None for parameter in ema.parameters())
    assert not any(name.startswith("blocks") for name, _ in criterion.named_parameters())  # the average is no part


def test_the_encoder_sees_the_images_of_the_batches_that_train() -> None:
    images, labels = torch.randn(12, 1, 32, 32), torch.arange(12)
    classifier = SmallClassifier(3).eval().requires_grad_(False)
    batches = LatentData(*torch.zeros(2, 12, 1, 2, 2), labels, 1.0).batches(batch_size=4, seed=5)
    patches, resumed = (peers.ClassifierPatches(classifier, images, batch_size=4, seed=5) for _ in range(2))
    for step in range(7):  # more than two epochs
        _, rows = next(batches)
        found = patches(step)
        torch.testing.assert_close(found, classifier.features[:6](images[rows]).flatten(2).mT)  # (N, 16, 64)
    assert found.shape == (4, 16, patches.size)
    assert torch.equal(resumed(6), found)


def taught_by(snapshot: nn.Module) -> st.CFGFeatureTeacher:
    return st.build_teacher(snapshot, None, layer="blocks.2", guidance_scale=3.0, null={"y": 5}, time="repa")


def guided(teacher: SiT, batch: Batch) -> Tensor:
    """The guided features of its third block."""
    with torch.no_grad(), watched(teacher) as tokens:
        teacher(batch.x_t, batch.t, batch.y)
        teacher(batch.x_t, batch.t, torch.full_like(batch.y, 5))
    return tokens[6] + 3.0 * (tokens[2] - tokens[6])


@pytest.mark.parametrize("window", [(0.0, 1.0), (0.3, 0.8), (2.0, 3.0)])
def test_a_normalised_target_has_mean_0_and_variance_1(model: SiT, window: tuple[float, float]) -> None:
    snapshot = averaged_copy(model, 0.9).module
    whole, head = copy.deepcopy(snapshot), st.ProjectionHead(WIDTH, WIDTH, 8)
    criterion = peers.NormalisedTarget(model, "blocks.1", taught_by(snapshot), head, weight=1.0, window=window)
    batch = Batch(model)
    terms = batch.terms(criterion)
    target = guided(whole, batch)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    errors = (head(batch.tokens[1]) - target).square().mean((1, 2))
    inside = (batch.t >= window[0]) & (batch.t <= window[1])
    torch.testing.assert_close(terms.alignment, (errors * inside).mean().detach(), rtol=1e-4, atol=1e-5)
    terms.total.backward()


@pytest.mark.parametrize(("refresh", "taught_at"), [(0, [2] * 4), (2, [2, 2, 4, 4])])
def test_an_own_average_teaches_as_it_was_when_copied(model: SiT, refresh: int, taught_at: list[int]) -> None:
    ema, snapshot = (averaged_copy(model, 0.9).module for _ in range(2))
    common = {"time": "repa", "hidden_features": 8, "window": None}
    first = st.SelfTransLoss.stage1(model, layer="blocks.0", latent_channels=3, patch_size=2, **common)
    then = st.SelfTransLoss.stage2(model, layer="blocks.1", teacher=taught_by(snapshot), **common)
    criterion = peers.OwnAverage(ema, snapshot, first, then, start=2, refresh=refresh)
    averages = []
    for step in range(6):
        for parameter in ema.parameters():
            parameter.mul_(0.95)  # the average moves on
        averages.append(copy.deepcopy(ema))
        batch = Batch(model)
        terms = batch.terms(criterion, step)
        if step < 2:
            expected = first.heads[0](batch.tokens[0], batch.latents).mean()
        else:
            projected = then.heads[0](batch.tokens[1])
            expected = (projected - guided(averages[taught_at[step - 2]], batch)).square().mean()
        torch.testing.assert_close(terms.alignment, expected.detach(), rtol=1e-3, atol=1e-5)
        terms.total.backward()
        model.zero_grad()
