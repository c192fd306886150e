"""layer_report: planted cases with a known answer, plain formulas, backbones, what it leaves untouched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import PATHS, Backbone
from lookalikes import LOOKALIKES
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from toys import ToyDiT

import selftrans_reg as st
from selftrans_reg import errors
from selftrans_reg.analysis.draw import draw_features, draw_report
from selftrans_reg.analysis.report import LayerMeasures

CLASSES, DEPTH = 4, 8  # the published rule: stage 1 at blocks.1, student blocks.3, teacher blocks.4, scale 8


class Planted(nn.Module):
    """Tokens (N, 64, 8) in which chosen layers carry the image's label, and all carry the condition.

    Args:
        carriers: Layers that carry the label of the image.
        strength: Of the condition in the tokens.
        broken: A layer, and what its tokens are multiplied with where t (1 is noise) is 0.5 or more.
    """

    def __init__(self, *carriers: int, strength: float = 1.0, broken: tuple[int, float] | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Identity()) for _ in range(DEPTH))
        self.table = nn.Embedding(CLASSES + 1, 4)
        self.table.weight.data = strength * torch.cat([torch.eye(4), torch.zeros(1, 4)])
        self.carriers, self.broken, self.calls = carriers, broken, 0

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """``(x, t, y)``, t = 1 being noise."""
        self.calls += 1
        image = torch.cat([x.flatten(2).mT, torch.zeros_like(x).flatten(2).mT], dim=2)
        difference = x[:, :, 0, 0] - x[:, :, 0, 1]  # varies by sample, and knows nothing of the label
        offset = torch.cat([torch.zeros_like(difference), difference], dim=1)[:, None]
        condition = torch.cat([self.table(y), torch.zeros(len(y), 4)], dim=1)[:, None]
        for index, block in enumerate(self.blocks):
            tokens = image if index in self.carriers else image - image.mean(1, keepdim=True)
            broken = self.broken is not None and index == self.broken[0] and t[0] >= 0.5
            tokens = block((self.broken[1] if broken else 1.0) * (tokens + offset + condition))
        return tokens.mT[:, :4].reshape(x.shape)


def planted_data(n: int = 400, signal: float = 1.0) -> list[tuple[Tensor, Tensor]]:
    """Latents whose channel y is brighter, in batches."""
    g = torch.Generator().manual_seed(1)
    labels = torch.randint(CLASSES, (n,), generator=g)
    latents = torch.randn(n, 4, 8, 8, generator=g) + signal * torch.eye(CLASSES)[labels][:, :, None, None]
    return list(zip(latents.split(100), labels.split(100), strict=True))


def report_of(model: nn.Module, data: Any = None, **settings: Any) -> st.LayerReport:
    defaults = {"time": "repa", "null": {"y": CLASSES}, "noise_fractions": (0.4, 0.6)}
    return st.layer_report(model, planted_data() if data is None else data, **(defaults | settings))


class TestPlanted:
    def test_the_layer_that_carries_the_label_is_seen(self) -> None:
        report = report_of(Planted(5))
        assert [report.mean("probe", layer, 0) > 0.95 for layer in report.layers] == [i == 5 for i in range(DEPTH)]
        assert all(report.mean("probe", layer, 0) < 0.45 for layer in report.layers if layer != "blocks.5")

    @pytest.mark.parametrize(
        ("carriers", "layers", "why_student", "why_teacher"),
        [  # the student, the teacher; the published teacher's is kept where no other is measurably better
            ((5,), (3, 5), "measurably below blocks.5", "measured: probe of f_u"),
            ((3, 4, 5), (2, 4), "the last before blocks.4 that is measurably below it", "measurably above it"),
            ((1, 2, 3, 4), (3, 4), "not measurably below blocks.4", "measurably above it"),
            ((0, 1, 2), (1, 2), "none is measurably below", "the first that is not measurably below the best"),
            ((0, 2), (1, 2), "the last before blocks.2 that is measurably below it", "measured: probe of f_u"),
            ((1, 2), (1, 2), "the layer before blocks.2", "measured: probe of f_u"),  # and none before stage 1's
            ((), (3, 4), "measurably below", "no layer tells the labels apart"),
        ],
    )
    def test_layers_and_their_reasons(
        self, carriers: tuple[int, ...], layers: tuple[int, int], why_student: str, why_teacher: str
    ) -> None:
        plan = report_of(Planted(*carriers), guidance_scales=(1,)).recipe
        assert why_student in plan.reasons["student_layer"]
        assert why_teacher in plan.reasons["teacher_layer"]
        assert (plan.student_layer, plan.teacher_layer) == tuple(f"blocks.{layer}" for layer in layers)
        assert plan.stage1() == st.recipe(Planted()).stage1()

    def test_the_smallest_scale_that_sorts_the_features_is_proposed(self) -> None:
        data = planted_data(800, signal=0.1)
        report = report_of(Planted(*range(DEPTH), strength=0.1), data, guidance_scales=(1, 2, 16, 30))
        found = {scale: report.mean("knn", "blocks.4", scale) for scale in (1, 2, 8, 16)}
        assert found[1] < 0.75
        assert found[2] < found[8] - 0.05
        assert found[8] > 0.97
        assert report.recipe.guidance_scale == 8
        assert "measured: k-NN of f_g" in report.recipe.reasons["guidance_scale"]

    def test_nan_at_one_noise_fraction_is_named(self) -> None:
        report = report_of(Planted(3, 5, broken=(5, torch.nan)))
        (note,) = [note for note in report.notes if "NaN" in note]
        assert "Layer 'blocks.5' gives NaN or infinite features at noise fraction 0.6, for 400 of 400 samples" in note
        broken = [row for row in report.rows if row.norm is None]
        assert {(row.layer, row.noise_fraction) for row in broken} == {("blocks.5", 0.6)}
        assert broken[0] == LayerMeasures("blocks.5", 0.6, 0.0)
        assert report.mean("probe", "blocks.5", 0) is None
        assert report.recipe.teacher_layer == "blocks.3"
        scale, pairs = report.guidance_scales.index(1.0), [(s, t) for s in range(DEPTH) for t in range(DEPTH)]
        missing = [(s, t) for s, t in pairs if report.alignment[scale][s][t] is None]
        assert missing == [pair for pair in pairs if 5 in pair]
        lines = [line.split() for line in str(report).splitlines() if line.startswith("blocks.5")]
        assert [set(cells[1:]) for cells in lines] == [{"-"}, {"-"}]

    @pytest.mark.parametrize(
        ("model", "change", "note", "setting", "reason"),
        [
            (Planted(3, strength=0.0), None, "f_u| / |f_c| is 0 at most", "guidance_scale", "no contrast at blocks.3"),
            (Planted(3, strength=1e-4), None, "hardly trained with it", "guidance_scale", "no contrast at blocks.3"),
            (Planted(3, strength=3.0), None, "heuristics on 400", "guidance_scale", "f_g is 100% at w = 1"),
            (Planted(3, broken=(5, 1e30)), None, "Layer 'blocks.5' gives NaN or inf", "teacher_layer", "measured: p"),
            (Planted(3), "one label", "All labels are the same", "teacher_layer", "no labels to tell apart"),
            (Planted(3), "no labels", "heuristics on 400", "teacher_layer", "not measured, no labels to tell apart"),
            (Planted(3), "no labels", "heuristics on 400", "guidance_scale", "not measurable without labels"),
            (Planted(3), "no null", "Without null= there is no", "guidance_scale", "not measured: "),
            # The condition is the label, in every layer: nothing can be learned from finding it there.
            (Planted(3), "no null", "Without null= there is no", "teacher_layer", "the condition may tell the label"),
        ],
    )
    def test_what_cannot_be_told_is_noted_and_the_published_setting_holds(
        self, model: nn.Module, change: str | None, note: str, setting: str, reason: str
    ) -> None:
        data: list[Any] = planted_data()
        if change == "one label":
            data = [(x, torch.zeros_like(y)) for x, y in data]
        elif change == "no labels":
            data = [{"latents": x, "y": y} for x, y in data]
        report = report_of(model, data, **({"null": None} if change == "no null" else {}))
        assert any(note in found for found in (*report.notes, *report.recipe.notes))
        assert reason in report.recipe.reasons[setting]
        assert note in str(report)
        if "measured: p" not in reason:
            assert getattr(report.recipe, setting) == getattr(st.recipe(Planted()), setting)
        if change in ("one label", "no labels"):
            assert {(row.knn, row.probe) for row in report.rows} == {(None, None)}
            assert all(row.effective_rank > 1 and row.norm > 0 and row.contrast > 0 for row in report.rows)
            assert "k-NN" not in str(report).partition("Proposal")[0]

    def test_a_model_without_a_condition_needs_no_null_condition(self) -> None:
        class Unconditional(Planted):
            def forward(self, x: Tensor, t: Tensor) -> Tensor:
                return super().forward(x, t, torch.full((len(x),), CLASSES))

        report = report_of(Unconditional(5), [{"latents": x, "labels": y} for x, y in planted_data()], null=None)
        assert report.recipe.teacher_layer == "blocks.5"
        assert "measured: probe" in report.recipe.reasons["teacher_layer"]
        assert report.guidance_scales == (1.0,)
        assert {row.contrast for row in report.rows} == {None}
        assert len(report.notes) == 1


def test_every_number_is_that_of_a_plain_formula() -> None:
    """One batch through a toy, and each layer's f_c and f_u by passes of their own."""
    model, fraction, n = ToyDiT(), 0.3, 24
    x, y = torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(5)), torch.arange(n) % 3
    report = st.layer_report(
        model.train(), [(x, y)], ["blocks.2", "blocks.0", "blocks.1"], (5.0,),
        time="sit", null={"y": 10}, noise_fractions=[fraction], k=3, seed=7,
    )  # fmt: skip
    assert report.layers == ("blocks.0", "blocks.1", "blocks.2")  # in the order in which they ran
    assert report.guidance_scales == (0.0, 1.0, 5.0, 8.0)
    assert (report.samples, report.held_out, report.classes, report.chance) == (n, 6, 3, 8 / n)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(7))
    x_t, t = (1 - fraction) * x + fraction * noise, torch.full((n,), 1 - fraction)
    features: dict[str, tuple[Tensor, ...]] = {}
    with torch.no_grad(), st.FeatureTap(model.eval(), report.layers) as tap:
        for condition in (y, torch.full_like(y, 10)):
            model(x_t, t, condition)
            for name, tokens in tap.pop().items():
                features[name] = (*features.get(name, ()), tokens.double())

    def centred(f: Tensor) -> Tensor:
        k, ones = (f.mean(1) @ f.mean(1).T).fill_diagonal_(0), torch.ones(n, n, dtype=f.dtype)
        k = k - (ones @ k + k @ ones) / (n - 2) + ones * k.sum() / ((n - 1) * (n - 2))
        return k.fill_diagonal_(0)

    test, train = torch.randperm(n, generator=torch.Generator().manual_seed(7)).split([6, 18])
    for j, (layer, (f_c, f_u)) in enumerate(features.items()):
        assert report.mean("contrast", layer, 1.0) == pytest.approx(((f_c - f_u).norm() / f_c.norm()).item(), 1e-4)
        for index, scale in enumerate(report.guidance_scales):
            f_g = f_u + scale * (f_c - f_u)
            norm = f_g.norm(dim=2).square().mean().sqrt().item()
            assert report.mean("norm", layer, scale) == pytest.approx(norm, rel=1e-4)
            shares = torch.linalg.svdvals(f_g.mean(1) - f_g.mean((0, 1)))
            entropy = torch.distributions.Categorical(probs=shares / shares.sum()).entropy()
            assert report.mean("effective_rank", layer, scale) == pytest.approx(entropy.exp().item(), rel=1e-3)
            pooled = f_g.mean(1) - f_g.mean(1)[train].mean(0)
            neighbours = KNeighborsClassifier(3, metric="cosine").fit(pooled[train], y[train])
            assert report.mean("knn", layer, scale) == pytest.approx(neighbours.score(pooled[test], y[test]))
            for i, student in enumerate(report.layers):
                a, b = centred(features[student][0]), centred(f_g)
                cka = ((a * b).sum() / (a.norm() * b.norm())).item()
                assert report.alignment[index][i][j] == pytest.approx(cka, abs=1e-4)


def test_fewer_layers_than_the_rule_needs_are_measured_without_a_proposal() -> None:
    class Two(nn.Sequential):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return super().forward(x)

    report = st.layer_report(Two(nn.Linear(8, 8), nn.Linear(8, 8)), [(torch.randn(20, 5, 8),)], ["0", "1"], time="repa")
    assert report.recipe is None
    assert "Proposal" not in str(report)
    assert report.mean("norm", "1", 1) > 0


def test_a_default_device_leads_nothing_astray(tmp_path: Path) -> None:
    model, x, y = ToyDiT(), torch.randn(20, 4, 8, 8), torch.arange(20) % 4
    expected = st.layer_report(model, [(x, y)], time="ddpm", null={"y": 10})
    with torch.device("meta"):
        assert st.layer_report(model, [(x, y)], time="ddpm", null={"y": 10}) == expected
        draw_report(expected, tmp_path / "report.png")
        draw_features(model, (x, y), tmp_path / "features.png", ["blocks.1"], time="ddpm", null={"y": 10})
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("report.png", "features.png"))


@pytest.mark.usefixtures("global_rng_untouched")
def test_one_forward_for_each_batch_and_fraction_until_there_are_enough_whatever_the_loader() -> None:
    seen, (x, y) = [], (torch.cat(parts) for parts in zip(*planted_data(), strict=True))
    with torch.random.fork_rng():
        model = Planted(5)
    loader = DataLoader(TensorDataset(x, y), 100, shuffle=True)  # draws from the global generator
    settings = {
        "noise_fractions": (0.2, 0.5),
        "samples": 250,
        "progress": lambda items, title: seen.append(title) or items,
    }
    report = report_of(model, loader, **settings)
    assert (report.samples, model.calls) == (300, 3 * 2)
    assert report_of(model, loader, **settings) == report
    assert seen == ["features", "measures"] * 2


def test_mode_gradients_and_hooks_are_as_before_and_a_criterion_does_not_notice() -> None:
    def seen() -> list[Any]:
        return [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]

    model = ToyDiT().train()
    model.blocks[1].eval()
    settings = {"latent_channels": 4, "patch_size": 2, "hidden_size": 16, "hidden_features": 8}
    criterion = st.SelfTransLoss.stage1(model, layer="blocks.1", time="repa", **settings)
    before, x, noise, y = seen(), *torch.randn(2, 20, 4, 8, 8), torch.arange(20) % 5
    loss = model((x + noise) / 2, torch.full((20,), 0.5), y).square().mean()
    first = st.layer_report(model, [(x, y)], time="repa", null={"y": 10})
    assert seen() == before
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert st.layer_report(model, [(x, y)], time="repa", null={"y": 10}) == first  # labels were not dropped
    assert criterion(loss, latents=x).alignment > 0


def test_nothing_is_cast_and_what_does_not_fit_is_an_error() -> None:
    class Half(ToyDiT):
        def embed_t(self, t: Tensor) -> Tensor:  # in float32, as backbones do it
            return super().embed_t(t).bfloat16()

    model, x = Half().bfloat16(), torch.randn(40, 4, 8, 8)
    model.t_embedder.float()
    half, whole = (
        st.layer_report(m, [(z, torch.arange(40) % 4)], time="repa", null={"y": 10}).mean("norm", "blocks.3", 1)
        for m, z in ((model, x.bfloat16()), (ToyDiT(), x))
    )
    assert half == pytest.approx(whole, rel=0.1)
    with pytest.raises(errors.SettingError, match=r"on latents in torch\.float32; its weights are in torch.bfloat"):
        st.layer_report(model, [(x, torch.arange(40))], time="repa")


def test_a_model_that_is_compiled_and_has_run_is_measured_as_it_is() -> None:
    compiled, x, y = ToyDiT().eval(), torch.randn(20, 4, 8, 8), torch.arange(20) % 4
    compiled.compile(backend="eager")
    with torch.no_grad():
        compiled(x, torch.rand(20), y)
    found = st.layer_report(torch.compile(compiled, backend="eager"), [(x, y)], time="repa", null={"y": 10})
    torch.compiler.reset()
    assert found.rows == st.layer_report(ToyDiT(), [(x, y)], time="repa", null={"y": 10}).rows


# What PyTorch says of reentrant checkpointing without gradients, as fast-DiT's sampling does too.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("name", LOOKALIKES)
def test_every_backbone_is_measured_as_it_is_called(name: str) -> None:
    """The norm of the teacher's layer against a plain pass on condition and null condition each."""
    backbone: Backbone = LOOKALIKES[name]
    model, n, g = backbone.build(0), 12, torch.Generator().manual_seed(3)
    latents, conditions = torch.randn(n, *backbone.shape, generator=g), backbone.conditions(n, g)
    reads = dict(backbone.reads if backbone.teacher_reads is None else backbone.teacher_reads)
    layers = [backbone.teacher]
    if backbone.teacher_reads is None and backbone.student != backbone.teacher:
        layers = [backbone.student, backbone.teacher]
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


def test_it_is_the_same_by_position_by_name_and_with_any_whole_labels() -> None:
    class Labelled(Planted):
        def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            return super().forward(x, t, labels)

    x, y = planted_data(100)[0]
    expected = report_of(Planted(5), [[x, y]])
    assert report_of(Planted(5), [{"latents": x, "y": y, "labels": (1000 * y - 7).int()}]) == expected
    taken = report_of(Labelled(5), [{"latents": x, "labels": y}], null={"labels": CLASSES})
    assert taken.rows == expected.rows


X, Y = torch.zeros(9, 4, 8, 8), torch.zeros(9).long()


@pytest.mark.parametrize(
    ("batches", "settings", "match"),
    [
        ([], {}, "no batch to measure on"),
        ([X], {}, r"must be \(latents, \*condition\).*\nGot a float32 tensor"),
        ([(X, 1, 2, 3)], {}, "in the order of 'y'.*\nGot a tuple of 4"),
        ([{"x": 1}], {}, "Got keys 'x'"),
        ([(X / 0, Y)], {}, "of finite values, one sample or more"),
        ([{"latents": X, "labels": torch.rand(9)}], {}, "Labels must be whole numbers"),
        ([{"latents": X, "labels": Y[:3]}], {}, "one for each of 9 latents"),
        ([(X, Y)], {}, "9 samples are too few for k = 10"),
        ([{"latents": X, "y": Y}, {"latents": X, "y": Y, "labels": Y}], {}, "1 of 2 batches have labels"),
        ([(X, Y)], {"guidance_scales": (1, -2)}, "0 or more"),
        ([(X, Y)], {"noise_fractions": ()}, "noise_fractions is empty"),
        ([(X, Y)], {"samples": 0}, "samples must be a positive integer; got 0"),
        ([(X, Y)], {"k": 2.5}, "k must be a positive integer; got 2.5"),
        ([(X, Y)], {"null": {"y": CLASSES + 1}}, "would reach embedding 'table'"),
        ([(X, Y)], {"call": {"t": lambda call: call["t"]}}, "call= must name the arguments"),
    ],
)
def test_what_cannot_be_measured_is_an_error(batches: list[Any], settings: dict[str, Any], match: str) -> None:
    with pytest.raises((errors.SettingError, errors.ShapeError), match=match):
        report_of(Planted(5), batches, **settings)


@pytest.fixture(scope="module")
def report() -> st.LayerReport:
    return report_of(Planted(5, broken=(6, torch.nan)), guidance_scales=(1, 4))


def test_the_table_says_what_was_measured(report: st.LayerReport) -> None:
    text = str(report)
    for expected in [
        "Planted: 8 layers on 400 samples at noise fractions 0.4, 0.6",
        "100 held-out samples of 4 classes: chance",
        "heuristics on 400 samples of one checkpoint, not results of training",
    ]:
        assert expected in text
    lines = [line.split() for line in text.replace("CKA with blocks.5", "CKA").splitlines()]
    own, guided = (
        dict(zip(lines[i], lines[i + 6], strict=True)) for i, line in enumerate(lines) if "layer" in line[:1]
    )
    shown = {"probe": ("probe", 100), "k-NN": ("knn", 100), "rank": ("effective_rank", 1), "norm": ("norm", 1)}
    assert [*own] == ["layer", *(f"{name}@0" for name in shown), "contrast@1", "CKA@8"]
    assert [*guided] == ["layer", *(f"{name}@{w}" for name in ("k-NN", "rank", "norm") for w in (1, 4, 8))]
    for heading, cell in [*own.items(), *guided.items()]:
        name, _, scale = heading.partition("@")
        measure, factor = shown.get(name, (name, 1))
        if name == "CKA":
            assert float(cell) == pytest.approx(report.alignment[report.guidance_scales.index(8.0)][5][5], abs=0.005)
        elif name != "layer":
            assert float(cell) == pytest.approx(factor * report.mean(measure, "blocks.5", float(scale)), abs=0.05)


def test_in_a_notebook_no_name_is_markup() -> None:
    found = report_of(type("<img src=x>", (Planted,), {})(5), planted_data(100))._repr_html_()
    assert "&lt;img src=x&gt;" in found
    assert "<img" not in found
