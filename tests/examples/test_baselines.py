"""The baselines of the convergence study, each against its formula written out."""

from collections.abc import Iterator

import pytest
import torch
from benchmarks.baselines import REPA, SRA, ClassifierPatches, DeepSupervision, Dispersive, LayerSync, OwnEarlierEMA
from common.data import LatentData
from common.metrics import SmallClassifier
from common.paths import velocity_loss
from common.sit import SiT
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
    model = SiT(4, 2, 3, WIDTH, 4, 2, num_classes=5, class_dropout_prob=0.0, learn_sigma=False)
    for name, parameter in model.named_parameters():
        if "adaLN" in name:  # at the initial zeros every layer gives the same tokens
            nn.init.normal_(parameter, std=0.5)
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


def test_deep_supervision_regresses_the_velocity_patch_by_patch(model: SiT) -> None:
    criterion = DeepSupervision(model, "blocks.1", weight=1.0, hidden_size=WIDTH, latent_channels=3, patch_size=2)
    nn.init.normal_(criterion.linear.weight)
    batch = Batch(model)
    tokens = batch.tokens[1]
    normed = (tokens - tokens.mean(-1, keepdim=True)) / (tokens.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    predicted = normed @ criterion.linear.weight.T + criterion.linear.bias  # (N, 4, 12)
    velocity = batch.noise - batch.latents
    total = 0.0
    for row in range(2):
        for column in range(2):
            patch = velocity[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].permute(0, 2, 3, 1).flatten(1)
            total += (predicted[:, 2 * row + column] - patch).square().mean() / 4
    torch.testing.assert_close(batch.terms(criterion).alignment, total.detach(), rtol=1e-4, atol=1e-4)


def test_deep_supervision_starts_from_zero_prediction(model: SiT) -> None:
    criterion = DeepSupervision(model, "blocks.1", weight=1.0, hidden_size=WIDTH, latent_channels=3, patch_size=2)
    batch = Batch(model)
    expected = (batch.noise - batch.latents).square().mean()
    torch.testing.assert_close(batch.terms(criterion).alignment, expected, rtol=1e-4, atol=1e-4)


def test_sra_regresses_the_averages_layer_at_a_cleaner_time(model: SiT) -> None:
    ema = averaged_copy(model, 0.9).module
    for parameter in ema.parameters():
        parameter.mul_(1.1)
    criterion = SRA(model, ema, "blocks.0", "blocks.2", weight=1.0, hidden_size=WIDTH, hidden_features=8)
    batch = Batch(model)
    terms = batch.terms(criterion, step=7)

    interval = 0.2 * torch.rand(N, generator=torch.Generator().manual_seed(7))
    cleaner = (batch.t - interval).clamp(min=0)
    s = cleaner.reshape(-1, 1, 1, 1)
    found: list[Tensor] = []
    handle = ema.blocks[2].register_forward_hook(lambda m, a, out: found.append(out))
    with torch.no_grad():
        ema((1 - s) * batch.latents + s * batch.noise, cleaner, batch.y)
    handle.remove()
    error = (plain_head(criterion.head, batch.tokens[0]) - found[0]).abs()
    expected = torch.where(error < 1, 0.5 * error**2, error - 0.5).mean()
    torch.testing.assert_close(terms.alignment, expected.detach(), rtol=1e-4, atol=1e-5)
    terms.total.backward()
    assert all(parameter.grad is None for parameter in ema.parameters())
    assert not any(name.startswith("blocks") for name, _ in criterion.named_parameters())  # the average is no part


def test_sra_stops_the_average_at_its_layer_and_draws_by_the_step(model: SiT) -> None:
    ema = averaged_copy(model, 0.9).module
    criterion = SRA(model, ema, "blocks.0", "blocks.2", weight=1.0, hidden_size=WIDTH, hidden_features=8)
    ran: list[int] = []
    ema.blocks[3].register_forward_hook(lambda m, a, out: ran.append(1))
    found = []
    for step in (3, 4, 3):
        torch.manual_seed(1)
        batch = Batch(model)
        batch.terms(criterion, step)
        found.append(criterion.target(batch.latents, step))
    assert not ran
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])
    ema(torch.randn(2, 3, 4, 4), torch.rand(2), torch.arange(2))  # sampling from the average runs the whole of it
    assert ran


def test_repa_is_minus_the_cosine_to_the_encoder_of_that_batch(model: SiT) -> None:
    targets = torch.randn(3, N, 4, 5)
    criterion = REPA(
        model, "blocks.1", lambda step: targets[step], weight=1.0, hidden_size=WIDTH, target_size=5, hidden_features=8
    )
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


def own_earlier_ema(model: SiT) -> tuple[OwnEarlierEMA, nn.Module]:
    ema = averaged_copy(model, 0.9).module
    for parameter in ema.parameters():
        parameter.mul_(0.9)  # an average is never quite the model
    common = {"time": "repa", "hidden_features": 8, "window": None}
    first = st.SelfTransLoss.stage1(model, layer="blocks.0", latent_channels=3, patch_size=2, **common)

    def then(teacher: nn.Module) -> st.SelfTransLoss:
        built = st.build_teacher(teacher, None, layer="blocks.2", guidance_scale=3.0, null={"y": 5}, time="repa")
        return st.SelfTransLoss.stage2(model, layer="blocks.1", teacher=built, **common)

    return OwnEarlierEMA(ema, first, then, switch_step=2), ema


@pytest.fixture
def nullable() -> SiT:
    model = SiT(4, 2, 3, WIDTH, 4, 2, num_classes=5, learn_sigma=False)
    for name, parameter in model.named_parameters():
        if "adaLN" in name:
            nn.init.normal_(parameter, std=0.5)
    return model.train()


def test_own_earlier_ema_is_stage_1_and_then_stage_2_from_the_snapshot(nullable: SiT) -> None:
    criterion, ema = own_earlier_ema(nullable)
    held = {id(parameter) for parameter in criterion.parameters() if parameter.requires_grad}
    found = []
    for step in range(5):
        for parameter in ema.parameters():
            parameter.add_(0.05)  # the average moves on; after the switch the teacher does not
        if step == 2:
            snapshot = {name: value.clone() for name, value in ema.state_dict().items()}
        batch = Batch(nullable)
        terms = batch.terms(criterion, step)
        found.append(terms.alignment.item())
        terms.total.backward()
        nullable.zero_grad()
    assert found[2] == 0  # the batch of the switch
    assert min(found[:2] + found[3:]) > 0

    x, t, y = batch.x_t, batch.t, batch.y
    teacher = SiT(4, 2, 3, WIDTH, 4, 2, num_classes=5, learn_sigma=False).eval()
    teacher.load_state_dict(snapshot)
    tokens: list[Tensor] = []
    teacher.blocks[2].register_forward_hook(lambda m, a, out: tokens.append(out))
    with torch.no_grad():
        teacher(x, t, y)
        teacher(x, t, torch.full_like(y, 5))
    guided = tokens[1] + 3.0 * (tokens[0] - tokens[1])
    projected = plain_head(criterion.then.heads[0], batch.tokens[1])
    assert found[4] == pytest.approx((projected - guided).square().mean().item(), rel=1e-3)
    trained = {id(p) for p in criterion.then.parameters() if p.grad is not None}
    assert trained <= held  # the optimiser was given them at the start
    assert trained


@pytest.mark.parametrize("saved_after", [1, 4])
def test_own_earlier_ema_goes_on_from_its_state(nullable: SiT, saved_after: int) -> None:
    criterion, _ = own_earlier_ema(nullable)
    for step in range(saved_after):
        Batch(nullable).terms(criterion, step)
    state = {name: value.clone() for name, value in criterion.state_dict().items()}
    torch.manual_seed(9)
    expected = Batch(nullable).terms(criterion, saved_after).alignment
    criterion.first.detach()
    criterion.then.detach()

    again, _ = own_earlier_ema(nullable)
    again.load_state_dict(state)
    torch.manual_seed(9)
    assert torch.equal(Batch(nullable).terms(again, saved_after).alignment, expected)
