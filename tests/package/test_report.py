"""layer_report: planted cases with a known answer, plain formulas, backbones, what it leaves untouched, files, HTML."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import PATHS, Backbone
from lookalikes import LOOKALIKES
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from toys import ToyDiT

import selftrans_reg as st
from selftrans_reg import errors
from selftrans_reg.analysis.draw import draw_features, draw_report
from selftrans_reg.analysis.report import LayerMeasures

CLASSES = 4
DEPTH, PUBLISHED = (
    8,
    st.recipe("SiT-B/2").guidance_scale,
)  # the published rule: stage 1 at blocks.1, student blocks.3, teacher blocks.4


class Emit(nn.Module):
    """A block that gives what it is told, whatever comes in."""

    def __init__(self, carries: bool) -> None:
        super().__init__()
        self.carries = carries
        self.broken = False
        self.inner = nn.Identity()  # a block has layers of its own

    def forward(self, image: Tensor, offset: Tensor, condition: Tensor) -> Tensor:
        """Tokens with or without the image's mean, which is all that tells the label."""
        tokens = image if self.carries else image - image.mean(1, keepdim=True)
        tokens = tokens + offset + condition
        return self.inner(tokens * torch.nan if self.broken else tokens)


class Planted(nn.Module):
    """Tokens (N, 64, 8) in which chosen layers carry the image's label, and all carry the condition.

    Args:
        carriers: Layers that carry the label of the image.
        strength: Of the condition in the tokens.
        broken: A layer and the t (1 is noise) from which on it gives NaN.
    """

    def __init__(
        self, carriers: tuple[int, ...], strength: float = 1.0, broken: tuple[int, float] | None = None
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Emit(index in carriers) for index in range(DEPTH))
        self.table = nn.Embedding(CLASSES + 1, 4)
        self.table.weight.data = strength * torch.cat([torch.eye(4), torch.zeros(1, 4)])
        self.broken = broken
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """``(x, t, y)``, t = 1 being noise."""
        self.calls += 1
        if self.broken is not None:
            self.blocks[self.broken[0]].broken = bool(t[0] >= self.broken[1])
        image = torch.cat([x.flatten(2).mT, torch.zeros_like(x).flatten(2).mT], dim=2)
        difference = x[:, :, 0, 0] - x[:, :, 0, 1]  # varies by sample, and knows nothing of the label
        offset = torch.cat([torch.zeros_like(difference), difference], dim=1)[:, None]
        condition = torch.cat([self.table(y), torch.zeros(len(y), 4)], dim=1)[:, None]
        for block in self.blocks:
            tokens = block(image, offset, condition)
        return tokens.mT[:, :4].reshape(x.shape)


def published_scale() -> float:
    return st.recipe(Planted(carriers=())).guidance_scale


def planted_data(n: int = 400, signal: float = 1.0) -> list[tuple[Tensor, Tensor]]:
    """Latents whose channel y is brighter, in batches."""
    g = torch.Generator().manual_seed(1)
    labels = torch.randint(CLASSES, (n,), generator=g)
    latents = torch.randn(n, 4, 8, 8, generator=g) + signal * torch.eye(CLASSES)[labels][:, :, None, None]
    return list(zip(latents.split(100), labels.split(100), strict=True))


def report_of(model: nn.Module, data: Any, **settings: Any) -> st.LayerReport:
    defaults = {"time": "repa", "null": {"y": CLASSES}, "noise_fractions": (0.4, 0.6)}
    return st.layer_report(model, data, **(defaults | settings))


class TestPlanted:
    def test_the_layer_that_carries_the_label_is_proposed(self) -> None:
        report = report_of(Planted(carriers=(5,)), planted_data())
        assert report.mean("probe", "blocks.5", 0) > 0.95
        assert all(report.mean("probe", f"blocks.{i}", 0) < 0.45 for i in range(DEPTH) if i != 5)
        plan = report.recipe
        assert plan is not None
        assert (plan.student_layer, plan.teacher_layer) == ("blocks.3", "blocks.5")
        assert re.fullmatch(r"measured: probe of f_u 9\d%|measured: probe of f_u 100%.*", plan.reasons["teacher_layer"])
        assert "measurably below blocks.5" in plan.reasons["student_layer"]

    def test_a_student_layer_that_knows_as_much_gives_way_to_one_that_does_not(self) -> None:
        plan = report_of(Planted(carriers=(3, 4, 5)), planted_data()).recipe
        assert (plan.student_layer, plan.teacher_layer) == ("blocks.2", "blocks.4")  # blocks.4 is the published one
        assert "no layer is measurably above it" in plan.reasons["teacher_layer"]
        assert "the last before blocks.4 that is measurably below it" in plan.reasons["student_layer"]

    def test_where_nothing_is_told_apart_the_published_rule_holds_and_says_so(self) -> None:
        report = report_of(Planted(carriers=()), planted_data(), guidance_scales=(1,))
        plan = report.recipe
        assert (plan.student_layer, plan.teacher_layer) == ("blocks.3", "blocks.4")
        assert plan.guidance_scale == published_scale()
        assert "no layer tells the labels apart" in plan.reasons["teacher_layer"]
        assert "floor(2 depth / 3)" in plan.reasons["teacher_layer"]
        assert plan.stage1() == st.recipe(Planted(carriers=())).stage1()

    def test_the_smallest_scale_that_sorts_the_features_is_proposed(self) -> None:
        model = Planted(carriers=tuple(range(DEPTH)), strength=0.1)
        report = report_of(model, planted_data(800, signal=0.1), guidance_scales=(1, 2, 8, 30))
        found = {scale: report.mean("knn", "blocks.4", scale) for scale in (1, 2, 8, 30)}
        assert found[1] < 0.75
        assert found[8] > 0.97
        assert found[2] < found[8] - 0.05
        assert report.recipe.guidance_scale == 8
        assert "measured: k-NN of f_g" in report.recipe.reasons["guidance_scale"]

    def test_a_scale_that_cannot_be_told_is_the_published_one(self) -> None:
        plan = report_of(Planted(carriers=(4,), strength=3.0), planted_data()).recipe
        assert plan.guidance_scale == published_scale()
        assert "not told apart, k-NN of f_g is 100% at w = 1" in plan.reasons["guidance_scale"]
        assert any("times as long as f_c" in note for note in plan.notes)

    def test_an_ignored_null_condition_has_contrast_0_and_is_named(self) -> None:
        report = report_of(Planted(carriers=(5,), strength=0.0), planted_data())
        assert {row.contrast for row in report.rows} == {0.0}
        (note,) = [note for note in report.notes if "f_c − f_u is 0" in note]
        assert "The model ignores what null= replaces" in note
        assert "no contrast at blocks.5" in report.recipe.reasons["guidance_scale"]
        assert note in str(report)

    def test_nan_at_one_noise_fraction_is_named(self) -> None:
        report = report_of(Planted(carriers=(3, 5), broken=(5, 0.5)), planted_data())
        (note,) = [note for note in report.notes if "NaN" in note]
        for expected in ["Layer 'blocks.5'", "at noise fraction 0.6", "for 400 of 400 samples"]:
            assert expected in note
        broken = [row for row in report.rows if row.norm is None]
        assert {(row.layer, row.noise_fraction) for row in broken} == {("blocks.5", 0.6)}
        assert broken[0] == LayerMeasures("blocks.5", 0.6, 0.0)
        assert report.mean("probe", "blocks.5", 0) is None
        assert report.recipe.teacher_layer == "blocks.3"
        scale = report.guidance_scales.index(1.0)
        missing = [(s, t) for s in range(DEPTH) for t in range(DEPTH) if report.alignment[scale][s][t] is None]
        assert missing == [(s, t) for s in range(DEPTH) for t in range(DEPTH) if 5 in (s, t)]
        lines = [line for line in str(report).splitlines() if line.startswith("blocks.5")]
        assert [set(line.split()[1:]) for line in lines] == [{"-"}, {"-"}]

    def test_without_labels_the_rest_is_measured(self) -> None:
        data = [{"latents": x, "y": y} for x, y in planted_data()]
        report = report_of(Planted(carriers=(5,)), data)
        assert report.chance is report.classes is None
        assert {(row.knn, row.probe) for row in report.rows} == {(None, None)}
        assert all(row.effective_rank > 1 and row.norm > 0 and row.contrast > 0 for row in report.rows)
        assert "not measured, no labels to tell apart: layer 5 = floor" in report.recipe.reasons["teacher_layer"]
        assert "not measurable without labels" in report.recipe.reasons["guidance_scale"]
        assert "k-NN" not in str(report).partition("Proposal")[0]

    def test_without_a_null_condition_the_condition_alone_is_measured(self) -> None:
        report = report_of(Planted(carriers=(5,)), planted_data(), null=None)
        assert report.guidance_scales == (1.0,)
        assert {row.contrast for row in report.rows} == {None}
        assert any("Without null= there is no guidance" in note for note in report.notes)
        assert report.recipe.reasons["guidance_scale"].startswith("not measured: ")
        # The condition is the label, in every layer: nothing can be learned from finding it there.
        assert {row.probe for row in report.rows} == {1.0}
        assert "without null= the condition may tell the label: layer 5" in report.recipe.reasons["teacher_layer"]

    def test_a_model_without_a_condition_needs_no_null_condition(self) -> None:
        class Unconditional(Planted):
            def forward(self, x: Tensor, t: Tensor) -> Tensor:
                return super().forward(x, t, torch.full((len(x),), CLASSES))

        data = [{"latents": x, "labels": y} for x, y in planted_data()]
        report = report_of(Unconditional(carriers=(5,)), data, null=None)
        assert report.recipe.teacher_layer == "blocks.5"
        assert "measured: probe" in report.recipe.reasons["teacher_layer"]
        assert len(report.notes) == 1


FRACTION, SCALE, N = 0.3, 5.0, 24


@pytest.fixture(scope="module")
def measured() -> tuple[st.LayerReport, dict[str, tuple[Tensor, Tensor]]]:
    """One batch through a toy: its report, and each layer's f_c and f_u by passes of their own."""
    model = ToyDiT()
    g = torch.Generator().manual_seed(5)
    x, y = torch.randn(N, 4, 8, 8, generator=g), torch.arange(N) % 3
    report = st.layer_report(
        model.train(), [(x, y)], ["blocks.2", "blocks.0", "blocks.1"], (SCALE,),
        time="sit", null={"y": 10}, noise_fractions=[FRACTION], k=3, seed=7,
    )  # fmt: skip
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(7))
    x_t, t = (1 - FRACTION) * x + FRACTION * noise, torch.full((N,), 1 - FRACTION)
    features: dict[str, tuple[Tensor, ...]] = {}
    with torch.no_grad(), st.FeatureTap(model.eval(), ["blocks.0", "blocks.1", "blocks.2"]) as tap:
        for condition in (y, torch.full_like(y, 10)):
            model(x_t, t, condition)
            for name, tokens in tap.pop().items():
                features[name] = (*features.get(name, ()), tokens.double())
    return report, features


class TestFormulas:
    """Every number of the one batch again, by other means."""

    def test_layers_are_in_the_order_in_which_they_ran(self, measured: Any) -> None:
        assert measured[0].layers == ("blocks.0", "blocks.1", "blocks.2")
        assert measured[0].guidance_scales == (0.0, 1.0, SCALE, measured[0].recipe.guidance_scale)
        assert (measured[0].samples, measured[0].held_out, measured[0].classes) == (N, 6, 3)
        assert measured[0].chance == pytest.approx(1 / 3)

    def test_contrast_and_norm_are_over_all_tokens(self, measured: Any) -> None:
        report, features = measured
        for layer, (f_c, f_u) in features.items():
            assert report.mean("contrast", layer, 1.0) == pytest.approx(((f_c - f_u).norm() / f_c.norm()).item(), 1e-4)
            for scale in report.guidance_scales:
                f_g = f_u + scale * (f_c - f_u)
                expected = f_g.norm(dim=2).square().mean().sqrt().item()
                assert report.mean("norm", layer, scale) == pytest.approx(expected, rel=1e-4)

    def test_effective_rank_is_of_the_pooled_guided_features(self, measured: Any) -> None:
        report, features = measured
        for layer, (f_c, f_u) in features.items():
            pooled = (f_u + SCALE * (f_c - f_u)).mean(1)
            shares = torch.linalg.svdvals(pooled - pooled.mean(0))
            shares = shares / shares.sum()
            expected = torch.distributions.Categorical(probs=shares).entropy().exp().item()
            assert report.mean("effective_rank", layer, SCALE) == pytest.approx(expected, rel=1e-3)

    def test_alignment_is_cka_of_f_c_with_f_g(self, measured: Any) -> None:
        report, features = measured

        def centred(f: Tensor) -> Tensor:
            k, n = (f.mean(1) @ f.mean(1).T).fill_diagonal_(0), len(f)
            ones = torch.ones(n, n, dtype=k.dtype)
            k = k - (ones @ k + k @ ones) / (n - 2) + ones * k.sum() / ((n - 1) * (n - 2))
            return k.fill_diagonal_(0)

        for i, student in enumerate(report.layers):
            for j, teacher in enumerate(report.layers):
                for index, scale in enumerate(report.guidance_scales):
                    f_c, f_u = features[teacher]
                    a, b = centred(features[student][0]), centred(f_u + scale * (f_c - f_u))
                    expected = ((a * b).sum() / (a.norm() * b.norm())).item()
                    assert report.alignment[index][i][j] == pytest.approx(expected, abs=1e-4)


def test_fewer_layers_than_the_rule_needs_are_measured_without_a_proposal() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.b(self.a(x))

    report = st.layer_report(Two(), [(torch.randn(20, 5, 8),)], ["a", "b"], time="repa")
    assert report.recipe is None
    assert "Proposal" not in str(report)
    assert report.mean("norm", "b", 1) > 0


class ChannelsLast(nn.Module):
    """A block whose maps are (N, H, W, D), 4 by 4 of width 32."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


def test_maps_with_channels_last_are_read_by_the_layers_width() -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.blocks = nn.Linear(4, 32), nn.ModuleList(ChannelsLast() for _ in range(3))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            x = self.embed(x.permute(0, 2, 3, 1))
            for block in self.blocks:
                x = block(x)
            return x

    model, x, seen = Windows(), torch.randn(12, 4, 4, 4), []
    report = st.layer_report(model, [(x,)], time="repa", noise_fractions=[0.5], k=2)
    model.blocks[1].register_forward_hook(lambda module, args, output: seen.append(output))
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    model((x + noise) / 2, torch.full((12,), 0.5))
    tokens = seen[0].flatten(1, 2).double()  # (12, 16, 32)
    assert report.mean("norm", "blocks.1", 1) == pytest.approx(tokens.norm(dim=2).square().mean().sqrt().item(), 1e-4)
    pooled = tokens.mean(1)
    shares = torch.linalg.svdvals(pooled - pooled.mean(0))
    expected = torch.special.entr(shares / shares.sum()).sum().exp().item()
    assert report.mean("effective_rank", "blocks.1", 1) == pytest.approx(expected, rel=1e-3)


def test_a_default_device_leads_nothing_astray(tmp_path: Path) -> None:
    model, x, y = ToyDiT(), torch.randn(20, 4, 8, 8), torch.arange(20) % 4
    expected = st.layer_report(model, [(x, y)], time="ddpm", null={"y": 10})
    with torch.device("meta"):
        assert st.layer_report(model, [(x, y)], time="ddpm", null={"y": 10}) == expected
        draw_report(expected, tmp_path / "report.png")
        draw_features(model, (x, y), tmp_path / "features.png", ["blocks.1"], time="ddpm", null={"y": 10})


class Cast(nn.Module):
    """To another dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


NOTES = {
    "faint": ({"strength": 1e-4}, None, "nearly the same features: .*for long enough"),
    "ignored": ({"strength": 0.0}, None, "The model ignores what null= replaces"),
    "overflow": ({}, 1e30, "Layer 'blocks.5' gives NaN or infinite features"),
    "one label": ({}, "label", "All labels are the same"),
}


@pytest.mark.parametrize("case", NOTES)
def test_what_was_seen_is_noted(case: str) -> None:
    settings, change, note = NOTES[case]
    model, data = Planted(carriers=(3, 5), **settings), planted_data()
    if isinstance(change, float):
        model.blocks[5].inner.forward = lambda tokens: tokens * change
    elif change == "label":
        data = [(x, torch.zeros_like(y)) for x, y in data]
    report = report_of(model, data)
    assert any(re.search(note, found) for found in report.notes)
    assert note in str(report) or ".*" in note
    if case == "overflow":
        assert report.recipe.teacher_layer == "blocks.3"


class TestUntouched:
    def test_every_layer_is_read_in_one_forward_for_each_batch_and_fraction_until_there_are_enough(self) -> None:
        seen: dict[str, int] = {}

        def progress(items: Any, title: str) -> Iterator[Any]:
            for item in items:
                seen[title] = seen.get(title, 0) + 1
                yield item

        model = Planted(carriers=(5,))
        report = report_of(model, planted_data(), noise_fractions=(0.2, 0.5), samples=250, progress=progress)
        assert (report.samples, model.calls) == (300, 3 * 2)
        assert seen == {"features": 3, "measures": 2 * DEPTH}

    @pytest.mark.usefixtures("global_rng_untouched")
    def test_a_shuffled_loader_does_not_advance_the_global_generator(self) -> None:
        x, y = (torch.cat(parts) for parts in zip(*planted_data(), strict=True))
        with torch.random.fork_rng():
            model = Planted(carriers=(5,))
        loader = DataLoader(TensorDataset(x, y), 100, shuffle=True)
        assert report_of(model, loader) == report_of(model, loader)

    def test_mode_gradients_and_hooks_are_as_before(self) -> None:
        model = ToyDiT().train()
        model.blocks[1].eval()
        modes = [module.training for module in model.modules()]
        data = [(torch.randn(20, 4, 8, 8), torch.arange(20) % 5)]
        torch.manual_seed(0)
        first = st.layer_report(model, data, time="repa", null={"y": 10})
        assert [module.training for module in model.modules()] == modes
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
        assert st.layer_report(model, data, time="repa", null={"y": 10}) == first  # labels were not dropped

    def test_a_model_in_half_precision_is_called_with_what_is_given(self) -> None:
        class Model(ToyDiT):
            def embed_t(self, t: Tensor) -> Tensor:
                assert t.dtype == torch.float32
                return super().embed_t(t)

        model = Model().bfloat16()
        model.t_embedder.float().append(Cast(torch.bfloat16))  # time is embedded in float32, as backbones do it
        x, y = torch.randn(40, 4, 8, 8), torch.arange(40) % 4
        settings = {"time": "repa", "null": {"y": 10}}
        whole = st.layer_report(ToyDiT(), [(x, y)], **settings)
        half = st.layer_report(model, [(x.bfloat16(), y)], **settings)
        with pytest.raises(errors.SettingError, match="on latents in float32; its weights are in bfloat16, float32"):
            st.layer_report(model, [(x, y)], **settings)
        for row, other in zip(half.rows, whole.rows, strict=True):
            assert (row.contrast, row.norm) == pytest.approx((other.contrast, other.norm), rel=0.1)

    @pytest.mark.parametrize("way", ["a wrapper", "in place"])
    def test_a_model_that_is_compiled_and_has_run_is_measured_as_it_is(self, way: str) -> None:
        model, compiled = ToyDiT().eval(), ToyDiT().eval()
        if way == "a wrapper":
            compiled = torch.compile(compiled, backend="eager")
        else:
            compiled.compile(backend="eager")
        x, y = torch.randn(20, 4, 8, 8), torch.arange(20) % 4
        with torch.no_grad():
            before = compiled(x, torch.rand(20), y).shape
        try:
            found = st.layer_report(compiled, [(x, y)], time="repa", null={"y": 10})
            assert compiled(x, torch.rand(20), y).shape == before
        finally:
            torch.compiler.reset()
        assert found.rows == st.layer_report(model, [(x, y)], time="repa", null={"y": 10}).rows

    def test_a_criterion_on_the_same_model_does_not_notice(self) -> None:
        model = ToyDiT()
        criterion = st.SelfTransLoss.stage1(
            model, layer="blocks.1", time="repa", latent_channels=4, patch_size=2, hidden_size=16, hidden_features=8
        )
        x, t, y = torch.randn(8, 4, 8, 8), torch.rand(8), torch.arange(8)
        noise = torch.randn_like(x)
        f = t[:, None, None, None]
        loss = model((1 - f) * x + f * noise, t, y).square().mean()
        st.layer_report(model, [(torch.randn(20, 4, 8, 8), torch.arange(20) % 10)], time="repa", null={"y": 10})
        assert criterion(loss, latents=x).alignment > 0


# What PyTorch says of reentrant checkpointing without gradients, as fast-DiT's sampling does too.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("name", LOOKALIKES)
def test_every_backbone_is_measured_as_it_is_called(name: str) -> None:
    """Contrast and norm of two layers against a plain pass on condition and null condition each."""
    backbone: Backbone = LOOKALIKES[name]
    model, n = backbone.build(0), 12
    g = torch.Generator().manual_seed(3)
    latents = torch.randn(n, *backbone.shape, generator=g)
    conditions = backbone.conditions(n, g)
    reads = dict(backbone.reads if backbone.teacher_reads is None else backbone.teacher_reads)
    layers = list(dict.fromkeys([backbone.student, backbone.teacher]))
    layers = layers if backbone.teacher_reads is None else [backbone.teacher]
    settings = {"time": backbone.time, "null": backbone.null, "noise_fractions": [0.5], "k": 2, **reads}
    report = st.layer_report(model, [{"latents": latents, **conditions}], layers, (1, 3), **settings)

    path = PATHS[backbone.time]
    grid = torch.arange(1000) if path.steps else torch.linspace(path.low, path.high, 200_001)
    alpha, sigma = path.coefficients(grid)
    nearest = (sigma / (sigma + alpha * path.data_std) - 0.5).abs().argmin()
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    given = {backbone.x: alpha[nearest] * latents + sigma[nearest] * noise, backbone.t: grid[nearest].expand(n)}
    guided = backbone.plain_guided(model, {**given, **conditions})
    expected = guided.norm(dim=2).square().mean().sqrt().item()
    assert report.mean("norm", backbone.teacher, 3.0) == pytest.approx(expected, rel=2e-3)
    assert report.mean("contrast", backbone.teacher, 1.0) > 0


class TestBatches:
    def test_it_is_the_same_by_position_by_name_and_with_any_whole_labels(self) -> None:
        class Labelled(Planted):
            def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
                return super().forward(x, t, labels)

        x, y = (torch.cat(parts) for parts in zip(*planted_data(), strict=True))
        expected = report_of(Planted(carriers=(5,)), [[x, y]])
        for batch in ({"latents": x, "y": y, "labels": y}, {"latents": x, "y": y, "labels": (1000 * y - 7).int()}):
            assert report_of(Planted(carriers=(5,)), [batch]) == expected
        taken = report_of(Labelled(carriers=(5,)), [{"latents": x, "labels": y}], null={"labels": CLASSES})
        assert taken.rows == expected.rows

    @pytest.mark.parametrize(
        ("batches", "match"),
        [
            ([], "no batch to measure on"),
            ([torch.zeros(4, 4, 8, 8)], r"must be \(latents, \*condition\).*\nGot Tensor"),
            ([()], "Got tuple of 0"),
            ([(torch.zeros(4, 4, 8, 8), 1, 2, 3)], "in the order of 'y'.*\nGot tuple of 4"),
            ([{"x": 1}], "Got the keys 'x'"),
            (
                [(torch.full((4, 4, 8, 8), torch.nan), torch.zeros(4).long())],
                "of finite values, one sample or more",
            ),
            ([([1, 2], torch.zeros(4).long())], "must be a floating tensor"),
            (
                [(torch.zeros(0, 4, 8, 8), torch.zeros(0).long())],
                "one sample or more; got a float32 tensor",
            ),
            ([{"latents": torch.zeros(4, 4, 8, 8), "labels": torch.rand(4)}], "Labels must be whole numbers"),
            ([{"latents": torch.zeros(4, 4, 8, 8), "labels": torch.zeros(3).long()}], "one for each of 4 latents"),
            ([(torch.zeros(4, 4, 8, 8), torch.zeros(4).long())], "4 samples are too few for k = 10"),
            (
                [
                    {"latents": torch.randn(9, 4, 8, 8), "y": torch.zeros(9).long()},
                    {"latents": torch.randn(9, 4, 8, 8), "y": torch.zeros(9).long(), "labels": torch.zeros(9).long()},
                ],
                "1 of 2 batches have labels",
            ),
        ],
    )
    def test_what_is_no_batch_is_an_error(self, batches: list[Any], match: str) -> None:
        with pytest.raises((errors.SettingError, errors.ShapeError), match=match):
            report_of(Planted(carriers=(5,)), batches)

    @pytest.mark.parametrize(
        ("settings", "error", "match"),
        [
            ({"guidance_scales": (1, -2)}, errors.SettingError, "0 or more"),
            ({"noise_fractions": ()}, errors.SettingError, "noise_fractions is empty"),
            ({"noise_fractions": (1.5,)}, errors.SettingError, "from 0 .data. to 1"),
            ({"seed": 2**64}, errors.SettingError, "seed must be a whole number from 0"),
            ({"samples": 0}, errors.SettingError, "samples must be a positive integer; got 0"),
            ({"k": 2.5}, errors.SettingError, "k must be a positive integer; got 2.5"),
            ({"time": "siT"}, errors.SettingError, "Nearest: 'sit'"),
            ({"layers": ["block.5"]}, errors.LayerNotFoundError, "Nearest: 'blocks.5'"),
            ({"layers": []}, errors.SettingError, "at least one layer"),
            ({"null": {"z": 1}}, errors.SettingError, "does not take"),
            ({"null": {"y": CLASSES + 1}}, errors.SettingError, "would reach embedding 'table'"),
            ({"call": {"t": lambda call: call["t"]}}, errors.SettingError, "so call= must name their arguments"),
            ({"select": 1.5}, errors.SettingError, "select must be"),
        ],
    )
    def test_a_wrong_setting_is_an_error(self, settings: dict[str, Any], error: type, match: str) -> None:
        with pytest.raises(error, match=match):
            report_of(Planted(carriers=(5,)), planted_data(), **settings)


@pytest.fixture(scope="module")
def report() -> st.LayerReport:
    return report_of(Planted(carriers=(5,), broken=(6, 0.5)), planted_data(), guidance_scales=(1, 4))


class TestFiles:
    def test_a_saved_report_comes_back(self, report: st.LayerReport, tmp_path: Path) -> None:
        report.save(tmp_path / "report.json")
        again = st.LayerReport.load(tmp_path / "report.json")
        assert str(again) == str(report)
        assert again.recipe == report.recipe
        assert again.recipe.reasons == report.recipe.reasons
        again.save(tmp_path / "new" / "folder" / "again.json")
        assert (tmp_path / "new/folder/again.json").read_text() == (tmp_path / "report.json").read_text()
        assert [entry.name for entry in (tmp_path / "new/folder").iterdir()] == ["again.json"]
        content = json.loads((tmp_path / "report.json").read_text())
        assert content["kind"] == "layer report"
        assert content["library_version"] == st.__version__
        assert content["rows"][0].keys() == {
            "layer", "noise_fraction", "guidance_scale", "contrast", "norm", "effective_rank", "knn", "probe"
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"kind": "teacher"}, "is no layer report: it lacks"),
            ({"format_version": 2}, "format 2, written by selftrans-reg"),
            ({"surprise": 1}, "missing, unknown or malformed: 'surprise'"),
            ({"samples": "many"}, "malformed: 'samples'"),
            ({"layers": ["a"]}, "rows or alignment, which do not fit"),
            ({"rows": [{"layer": 3}]}, "malformed: 'rows'"),
            ({"alignment": []}, "rows or alignment"),
            ({"recipe": {"name": "x"}}, "malformed: 'recipe'"),
            ({"guidance_scales": [float("nan")]}, "malformed: 'guidance_scales'"),
            ({"samples": 10**400, "chance": 1e300}, "malformed: 'chance', 'samples'"),
            ({"layers": ["a"] * 3}, "rows or alignment, which do not fit"),
            ({axis: [*range(60_000)] for axis in ("noise_fractions", "guidance_scales")}, "which do not fit"),
        ],
    )
    def test_another_file_is_refused(
        self, report: st.LayerReport, tmp_path: Path, change: dict[str, Any], match: str
    ) -> None:
        report.save(tmp_path / "report.json")
        content = json.loads((tmp_path / "report.json").read_text()) | change
        (tmp_path / "report.json").write_text(json.dumps(content))
        with pytest.raises(errors.CheckpointError, match=match):
            st.LayerReport.load(tmp_path / "report.json")


class TestShown:
    def test_the_table_says_what_was_measured(self, report: st.LayerReport) -> None:
        text = str(report)
        for expected in [
            "Planted: 8 layers on 400 samples at noise fractions 0.4, 0.6",
            "100 held-out samples of 4 classes: chance",
            "null condition alone",
            "CKA with blocks.5",
            "Note: Layer 'blocks.6' gives NaN",
            "Proposal for Planted, 8 blocks",
            "heuristics on 400 samples of one checkpoint, not results of training",
        ]:
            assert expected in text
        own, guided = (line for line in text.splitlines() if line.startswith("blocks.5"))
        values = own.split()
        assert values[1] == f"{100 * report.mean('probe', 'blocks.5', 0):.1f}"
        assert values[4] == f"{report.mean('norm', 'blocks.5', 0):.2f}"
        assert values[5] == f"{report.mean('contrast', 'blocks.5', 1):.3f}"
        assert values[6] == f"{report.alignment[report.guidance_scales.index(published_scale())][5][5]:.2f}"
        scales = [scale for scale in report.guidance_scales if scale >= 1]
        norms = [report.mean("norm", "blocks.5", scale) for scale in scales]
        expected = [f"{100 * report.mean('knn', 'blocks.5', scale):.1f}" for scale in scales]
        expected += [f"{report.mean('effective_rank', 'blocks.5', scale):.1f}" for scale in scales]
        assert guided.split()[1:] == [*expected, *(f"{norm / norms[0]:.2f}" for norm in norms[1:])]

    def test_html_holds_every_row_and_no_name_is_markup(self) -> None:
        hostile = type("<img src=x onerror=alert(1)>", (Planted,), {})(carriers=(5,))
        hostile.add_module("<script>alert('1')</script>", hostile.blocks[7])
        layers = [*(f"blocks.{i}" for i in range(7)), "<script>alert('1')</script>"]
        del hostile.blocks[7]
        hostile.blocks.append(hostile.get_submodule(layers[-1]))
        found = report_of(hostile, planted_data(), layers=layers)
        assert layers[-1] in found.layers
        page = found._repr_html_()
        assert "<script" not in page
        assert "<img" not in page
        assert "&lt;script&gt;alert(&#x27;1&#x27;)&lt;/script&gt;" in page
        assert page.count("<tr>") == 1 + len(found.rows)
        assert "<b>" not in st.LayerReport(**{**vars(found), "notes": ("<b>",)})._repr_html_()
