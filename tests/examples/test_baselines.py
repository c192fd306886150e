"""The baselines of the convergence study, each against its formula written out."""

from collections.abc import Iterator

import pytest
import torch
from benchmarks.baselines import (
    REPA,
    SRA,
    ClassifierPatches,
    Dispersive,
    InternalGuidance,
    LayerSync,
    NormalisedTarget,
    OwnAverage,
)
from common.data import LatentData
from common.metrics import SmallClassifier
from common.paths import velocity_loss
from common.sit import FinalLayer, SiT
from common.training import averaged_copy
from torch import Tensor, nn

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


class Batch:
    """A forward of the model, and what a formula needs of it."""

    def __init__(self, model: SiT) -> None:
        self.latents, self.noise = torch.randn(2, N, 3, 4, 4)
        self.t, self.y = torch.rand(N), torch.arange(N) % 5
        t = self.t.reshape(-1, 1, 1, 1)
        self.x_t = (1 - t) * self.latents + t * self.noise
        self.tokens: list[Tensor] = []  # of every block
        handles = [block.register_forward_hook(lambda m, a, out: self.tokens.append(out)) for block in model.blocks]
        self.loss = velocity_loss(model, self.latents, self.y, self.t, self.noise)
        for handle in handles:
            handle.remove()

    def terms(self, criterion: nn.Module, step: int = 0) -> st.LossTerms:
        return criterion(self.loss, latents=self.latents, step=step)


def plain_head(head: st.ProjectionHead, tokens: Tensor) -> Tensor:
    for layer in head:
        tokens = layer(tokens)
    return tokens


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """The mean cosine over samples and tokens."""
    return ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean()


def test_the_term_is_added_with_its_weight_and_reaches_the_layer(model: SiT, global_rng_untouched: None) -> None:
    with torch.random.fork_rng():
        criterion = LayerSync(model, "blocks.0", "blocks.2", weight=0.3)
        batch = Batch(model)
        terms = batch.terms(criterion)
    assert terms.total.item() == pytest.approx(batch.loss.mean().item() + 0.3 * terms.alignment.item(), rel=1e-6)
    assert terms.weight.item() == pytest.approx(0.3)
    assert (terms.denoising.requires_grad, terms.alignment.requires_grad) == (False, False)
    (terms.total - batch.loss.mean()).backward()
    assert model.blocks[0].mlp.fc1.weight.grad.abs().sum() > 0
    assert model.blocks[1].mlp.fc1.weight.grad.abs().sum() == 0  # the deeper layer is a target, not taught


def test_layersync_is_minus_the_cosine_to_the_deeper_layer(model: SiT) -> None:
    criterion = LayerSync(model, "blocks.0", "blocks.2", weight=1.0)
    batch = Batch(model)
    expected = -cosine(batch.tokens[0], batch.tokens[2])
    torch.testing.assert_close(batch.terms(criterion).alignment, expected.detach())


def test_dispersive_is_the_log_mean_over_all_pairs(model: SiT) -> None:
    criterion = Dispersive(model, "blocks.1", weight=1.0, temperature=0.7)
    batch = Batch(model)
    z = batch.tokens[1].flatten(1).double()
    pairs = [torch.exp(-((a - b) ** 2).mean() / 0.7) for a in z for b in z]
    expected = torch.stack(pairs).mean().log()
    torch.testing.assert_close(batch.terms(criterion).alignment.double(), expected.detach(), rtol=1e-4, atol=1e-5)


def internal_guidance(model: SiT) -> InternalGuidance:
    final = FinalLayer(WIDTH, 2, 3)
    criterion = InternalGuidance(model, "blocks.1", final, weight=1.0, decay=0.9)
    for parameter in final.parameters():
        nn.init.normal_(parameter, std=0.5)
    return criterion


def early_velocity(model: SiT, final: FinalLayer, batch: Batch) -> Tensor:
    """Patch by patch, from the tokens of the second block."""
    patches = final(batch.tokens[1], model.t_embedder(batch.t) + model.y_embedder(batch.y))  # (N, 4, 12)
    velocity = torch.empty_like(batch.latents)
    for row in range(2):
        for column in range(2):
            patch = patches[:, 2 * row + column].unflatten(1, (2, 2, 3)).permute(0, 3, 1, 2)
            velocity[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = patch
    return velocity


def test_internal_guidance_regresses_the_velocity_early(model: SiT) -> None:
    criterion = internal_guidance(model)
    batch = Batch(model)
    terms = batch.terms(criterion)
    expected = (early_velocity(model, criterion.final, batch) - (batch.noise - batch.latents)).square().mean()
    torch.testing.assert_close(terms.alignment, expected.detach(), rtol=1e-4, atol=1e-4)
    terms.total.backward()
    assert all(p.grad is not None for p in criterion.final.parameters())
    assert not any(p.requires_grad for p in criterion.average.parameters())


def test_internal_guidance_samples_away_from_the_averages_early_velocity(model: SiT) -> None:
    criterion = internal_guidance(model)
    Batch(model).terms(criterion)  # the average begins as a copy
    before = {name: value.clone() for name, value in criterion.final.state_dict().items()}
    for parameter in criterion.final.parameters():
        parameter.data.add_(1.0)
    batch = Batch(model.eval())
    with torch.no_grad():
        v = model(batch.x_t, batch.t, batch.y)
        found = criterion.guided(model, 1.4)(batch.x_t, batch.t, batch.y)
        criterion.final.load_state_dict(before)
        early = early_velocity(model, criterion.final, batch)
    torch.testing.assert_close(found, early + 1.4 * (v - early))


@pytest.mark.parametrize("distance", ["cosine", "smooth_l1"])
def test_sra_regresses_the_averages_layer_at_a_cleaner_time(model: SiT, distance: str) -> None:
    ema = averaged_copy(model, 0.9).module
    for parameter in ema.parameters():
        parameter.mul_(1.1)
    head = st.ProjectionHead(WIDTH, WIDTH, 8)
    criterion = SRA(model, ema, ("blocks.0", "blocks.2"), head, weight=1.0, distance=distance)
    model.y_embedder.dropout_prob = 0.5
    seen: list[Tensor] = []
    model.y_embedder.embedding_table.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    ran: list[int] = []
    ema.blocks[3].register_forward_hook(lambda m, a, out: ran.append(1))
    batch = Batch(model)
    terms = batch.terms(criterion, step=7)
    assert not ran  # the average stops at its layer
    assert 0 < (seen[0] == 5).sum() < N  # some labels were dropped, and the average sees the same

    interval = 0.2 * torch.rand(N, generator=torch.Generator().manual_seed(7))
    cleaner = (batch.t - interval).clamp(min=0)
    s = cleaner.reshape(-1, 1, 1, 1)
    found: list[Tensor] = []
    handle = ema.blocks[2].register_forward_hook(lambda m, a, out: found.append(out))
    with torch.no_grad():
        ema((1 - s) * batch.latents + s * batch.noise, cleaner, seen[0])
    handle.remove()
    projected = plain_head(head, batch.tokens[0])
    error = (projected - found[0]).abs()
    if distance == "smooth_l1":
        expected = torch.where(error < 0.05, error**2 / 0.1, error - 0.025).mean()
    else:  # of each channel, along the tokens
        expected = 1 - cosine(projected.transpose(1, 2), found[0].transpose(1, 2))
    torch.testing.assert_close(terms.alignment, expected.detach(), rtol=1e-4, atol=1e-5)
    terms.total.backward()
    assert all(parameter.grad is None for parameter in ema.parameters())
    assert not any(name.startswith("blocks") for name, _ in criterion.named_parameters())  # the average is no part


def test_repa_is_minus_the_cosine_to_the_encoder_of_that_batch(model: SiT) -> None:
    targets = torch.randn(3, N, 4, 5)
    head = st.ProjectionHead(WIDTH, 5, 8)
    criterion = REPA(model, "blocks.1", lambda step: targets[step], head, weight=1.0)
    batch = Batch(model)
    expected = -cosine(plain_head(criterion.head, batch.tokens[1]), targets[2])
    torch.testing.assert_close(batch.terms(criterion, step=2).alignment, expected.detach())


def test_the_encoder_sees_the_images_of_the_batches_that_train() -> None:
    images, labels = torch.randn(12, 1, 32, 32), torch.arange(12)
    classifier = SmallClassifier(3).eval().requires_grad_(False)
    latents = LatentData(torch.zeros(12, 1, 2, 2), torch.zeros(12, 1, 2, 2), labels, 1.0)
    batches = latents.batches(batch_size=4, seed=5)
    patches = ClassifierPatches(classifier, images, batch_size=4, seed=5)
    resumed = ClassifierPatches(classifier, images, batch_size=4, seed=5)
    for step in range(7):  # more than two epochs
        _, rows = next(batches)
        x = images[rows]
        for layer in list(classifier.features)[:6]:
            x = layer(x)
        expected = torch.stack([x[:, :, i, j] for i in range(4) for j in range(4)], dim=1)  # (N, 16, 64)
        found = patches(step)
        torch.testing.assert_close(found, expected)
    assert found.shape == (4, 16, patches.size)
    assert torch.equal(resumed(6), found)


def taught_by(snapshot: nn.Module) -> st.CFGFeatureTeacher:
    return st.build_teacher(snapshot, None, layer="blocks.2", guidance_scale=3.0, null={"y": 5}, time="repa")


def guided(weights: dict[str, Tensor], batch: Batch) -> Tensor:
    """The guided features of the third block of a model with these weights."""
    teacher = SiT(4, 2, 3, WIDTH, 4, 2, num_classes=5, learn_sigma=False).eval()
    teacher.load_state_dict(weights)
    tokens: list[Tensor] = []
    teacher.blocks[2].register_forward_hook(lambda m, a, out: tokens.append(out))
    with torch.no_grad():
        teacher(batch.x_t, batch.t, batch.y)
        teacher(batch.x_t, batch.t, torch.full_like(batch.y, 5))
    return tokens[1] + 3.0 * (tokens[0] - tokens[1])


@pytest.mark.parametrize("window", [(0.0, 1.0), (0.3, 0.8), (2.0, 3.0)])
def test_a_normalised_target_has_mean_0_and_variance_1(model: SiT, window: tuple[float, float]) -> None:
    snapshot = averaged_copy(model, 0.9).module
    weights = {name: value.clone() for name, value in snapshot.state_dict().items()}
    head = st.ProjectionHead(WIDTH, WIDTH, 8)
    criterion = NormalisedTarget(model, "blocks.1", taught_by(snapshot), head, weight=1.0, window=window)
    batch = Batch(model)
    terms = batch.terms(criterion)
    target = guided(weights, batch)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    errors = (plain_head(head, batch.tokens[1]) - target).square().mean((1, 2))
    inside = (batch.t >= window[0]) & (batch.t <= window[1])
    torch.testing.assert_close(terms.alignment, (errors * inside).mean().detach(), rtol=1e-4, atol=1e-5)
    terms.total.backward()


@pytest.mark.parametrize(("refresh", "taught_at"), [(0, [2] * 4), (2, [2, 2, 4, 4])])
def test_an_own_average_teaches_as_it_was_when_copied(model: SiT, refresh: int, taught_at: list[int]) -> None:
    ema = averaged_copy(model, 0.9).module
    snapshot = averaged_copy(model, 0.9).module
    common = {"time": "repa", "hidden_features": 8, "window": None}
    first = st.SelfTransLoss.stage1(model, layer="blocks.0", latent_channels=3, patch_size=2, **common)
    then = st.SelfTransLoss.stage2(model, layer="blocks.1", teacher=taught_by(snapshot), **common)
    criterion = OwnAverage(ema, snapshot, first, then, start=2, refresh=refresh)
    averages = []
    for step in range(6):
        for parameter in ema.parameters():
            parameter.mul_(0.95)  # the average moves on
        averages.append({name: value.clone() for name, value in ema.state_dict().items()})
        batch = Batch(model)
        terms = batch.terms(criterion, step)
        if step < 2:
            expected = first.heads[0](batch.tokens[0], batch.latents).mean()
        else:
            projected = plain_head(then.heads[0], batch.tokens[1])
            expected = (projected - guided(averages[taught_at[step - 2]], batch)).square().mean()
        torch.testing.assert_close(terms.alignment, expected.detach(), rtol=1e-3, atol=1e-5)
        terms.total.backward()
        model.zero_grad()
