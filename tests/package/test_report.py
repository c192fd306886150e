"""layer_report: plain formulas, what the numbers speak for, backbones, and what it leaves untouched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbones import PATHS, Backbone
from lookalikes import LOOKALIKES
from loops import new_criterion
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from toys import ToyDiT

import selftrans_reg as st
from selftrans_reg import errors
from selftrans_reg.analysis.proposal import propose
from selftrans_reg.analysis.report import LayerMeasures
from selftrans_reg.analysis.scores import effective_rank, knn_accuracy, probe_accuracy

X, Y = torch.randn(20, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(20) % 4


def report_of(model: nn.Module | None = None, data: Any = ((X, Y),), **settings: Any) -> st.LayerReport:
    settings = {"time": "repa", "null": {"y": 10}, "noise_fractions": (0.4, 0.6)} | settings
    return st.layer_report(ToyDiT() if model is None else model, data, **settings)


def measured(
    probes: str, knn: tuple[float | None, ...] = (0.2, 1.0, 1.0, 1.0), contrast: float | None = 0.5, **other: Any
) -> st.LayerReport:
    """A report on 8 layers whose probes find so many tenths of the labels, none where there is a -."""
    settings = {"guidance_scales": (0.0, 1.0, 2.0, 8.0), "conditioned": True, "classes": 4, "chance": 0.25} | other
    scores = {f"blocks.{i}": None if digit == "-" else int(digit) / 10 for i, digit in enumerate(probes)}
    rows = [
        LayerMeasures(layer, 0.5, scale, contrast, 1.0, 1.0, found, score)
        for layer, score in scores.items()
        for scale, found in zip(settings["guidance_scales"], knn, strict=True)
    ]
    return st.LayerReport("Toy", (*scores,), (0.5,), samples=400, held_out=100, rows=tuple(rows), **settings)


PUBLISHED = st.recipe(ToyDiT(depth=8))  # stage 1 at blocks.1, student blocks.3, teacher blocks.4, scale 8


@pytest.mark.parametrize(
    ("report", "plan", "student", "teacher", "scale"),
    [  # the plan's layers and scale, and words of their reasons
        (measured("33333933"), (3, 5, 8), "measurably below blocks.5", "measured: probe of f_u 90%", "100% at w = 1"),
        (measured("33399933"), (2, 4, 8), "last before blocks.4 that is measurably below", "measurably above it", ""),
        (measured("39999333"), (3, 4, 8), "not measurably below blocks.4", "measurably above it", ""),
        (measured("99933333"), (1, 2, 8), "none is measurably below", "the first that is not measurably below the", ""),
        (measured("93933333"), (1, 2, 8), "last before blocks.2 that is measurably below", "measured: probe", ""),
        (measured("39933333"), (1, 2, 8), "the layer before blocks.2", "", ""),  # and none before stage 1's
        (measured("22222222"), (3, 4, 8), "measurably below", "no layer tells the labels apart", ""),
        (measured("333399-3"), (3, 4, 8), "measurably below", "", ""),
        (measured("3933-933"), (3, 5, 8), "", "measured: probe", ""),
        (measured("33339333", (0.2, 0.6, 0.97, 0.99)), (3, 4, 2), "", "", "measured: k-NN of f_g 97%, the first"),
        (measured("33333933", contrast=1e-3), (3, 5, 8), "", "", "no contrast at blocks.5 (0.001)"),
        (measured("-" * 8, (None,) * 4, chance=None), (3, 4, 8), "", "no labels to tell apart", "without labels"),
        (  # the condition is the label, in every layer: nothing can be learned from finding it there
            measured("33333933", (1.0,), None, guidance_scales=(1.0,)),
            (3, 4, 8), "not measured: ", "the condition may tell the label", "not measured: ",
        ),
        (
            measured("33333933", (1.0,), None, guidance_scales=(1.0,), conditioned=False),
            (3, 5, 8), "", "measured: probe 90%", "not measured: ",
        ),
    ],
)  # fmt: skip
def test_what_the_measurements_speak_for(
    report: st.LayerReport, plan: tuple[int, int, int], student: str, teacher: str, scale: str
) -> None:
    found = propose(report, PUBLISHED)
    assert (found.student_layer, found.teacher_layer) == (f"blocks.{plan[0]}", f"blocks.{plan[1]}")
    assert found.guidance_scale == plan[2]
    assert student in found.reasons["student_layer"]
    assert teacher in found.reasons["teacher_layer"]
    assert scale in found.reasons["guidance_scale"]
    assert found.stage1() == PUBLISHED.stage1()


class Broken(ToyDiT):
    """Its third block gives a value that is not finite, or whose square is not, where t is 0.5 or more."""

    value = torch.nan

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        factor = self.value if t[0] >= 0.5 else 1.0
        with self.blocks[2].fc2.register_forward_hook(lambda module, args, output: factor * output):
            return super().forward(x, t, y)


@pytest.mark.parametrize("value", [torch.nan, 1e30])
def test_features_at_one_noise_fraction_that_are_not_finite_are_named(value: float) -> None:
    model = Broken()
    model.value = value
    report = report_of(model)
    note = "Layer 'blocks.2' gives NaN or infinite features at noise fraction 0.6, for 20 of 20 samples"
    assert report.notes[0].startswith(note)
    broken = [row for row in report.rows if row.norm is None]
    assert {(row.layer, row.noise_fraction) for row in broken} == {("blocks.2", 0.6), ("blocks.3", 0.6)}
    assert broken[0] == LayerMeasures("blocks.2", 0.6, 0.0)
    assert report.mean("probe", "blocks.2", 0) is None
    finite = [[cell is not None for cell in row] for row in report.alignment[0]]
    assert value == 1e30 or finite == [[student < 2 and teacher < 2 for teacher in range(4)] for student in range(4)]
    assert "-  " in str(report)


class Two(nn.Sequential):
    """A model without a condition, and with fewer layers than the rule needs."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x)


def test_without_labels_conditions_or_layers_enough_the_rest_is_measured_and_it_is_said() -> None:
    assert [note[:21] for note in report_of().notes] == ["Features of the condi"]
    for data, notes in (((X, Y * 0), ["All labels are the same"]), ({"latents": X, "y": Y}, [])):
        report = report_of(data=[data])
        assert [note.partition(":")[0] for note in report.notes] == notes
        assert {(row.knn, row.probe) for row in report.rows} == {(None, None)}
        assert all(row.effective_rank > 1 and row.norm > 0 and row.contrast > 0 for row in report.rows)
        assert "k-NN" not in str(report).partition("Proposal")[0]
    two = Two(nn.Linear(8, 8), nn.Linear(8, 8))
    for report, notes in (
        (report_of(null=None), 2),
        (report_of(two, [{"latents": X[:, 0], "labels": Y}], layers=["0", "1"], null=None), 1),
    ):
        assert report.notes[0].startswith("Without null= there is no guidance to measure")
        assert (len(report.notes), report.guidance_scales) == (notes, (1.0,))
        assert all(row.probe >= 0 and row.norm > 0 and row.contrast is None for row in report.rows)
    assert report.recipe is None
    assert "Proposal" not in str(report)


def test_every_number_is_that_of_a_plain_formula() -> None:
    """One batch through a toy, and each layer's f_c and f_u by passes of their own."""
    model, fraction, n = ToyDiT(), 0.3, 24
    x, y = torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(5)), torch.arange(n) % 3
    settings = {"time": "sit", "null": {"y": 10}, "noise_fractions": [fraction], "k": 3, "seed": 7}
    with torch.device("meta"):  # which leads nothing astray
        report = st.layer_report(model.train(), [(x, y)], ["blocks.2", "blocks.0", "blocks.1"], (5.0,), **settings)
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
            pooled = f_g.mean(1)
            parts = pooled[train], y[train], pooled[test], y[test]
            norm = f_g.norm(dim=2).square().mean().sqrt().item()
            wanted = [norm, effective_rank(pooled), knn_accuracy(*parts, 3), probe_accuracy(*parts)]
            found = [report.mean(measure, layer, scale) for measure in ("norm", "effective_rank", "knn", "probe")]
            assert found == pytest.approx(wanted, rel=1e-4)
            for i, student in enumerate(report.layers):
                a, b = centred(features[student][0]), centred(f_g)
                cka = ((a * b).sum() / (a.norm() * b.norm())).item()
                assert report.alignment[index][i][j] == pytest.approx(cka, abs=1e-4)


@pytest.mark.usefixtures("global_rng_untouched")
def test_one_forward_for_each_batch_and_fraction_until_there_are_enough_whatever_the_loader() -> None:
    with torch.random.fork_rng():
        model = ToyDiT()
    calls: list[str] = []
    model.register_forward_pre_hook(lambda module, args: calls.append("forward"))
    loader = DataLoader(TensorDataset(X, Y), 4, shuffle=True)  # draws from the global generator
    settings = {"samples": 14, "k": 3, "progress": lambda items, title: calls.append(title) or items}
    report = report_of(model, loader, **settings)
    assert report.samples == 16
    assert calls == ["features", *["forward"] * (4 * 2), "measures"]
    assert report_of(model, loader, **settings) == report


def test_mode_gradients_and_hooks_are_as_before_and_a_criterion_does_not_notice() -> None:
    def seen() -> list[Any]:
        return [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]

    model = ToyDiT().train()
    model.blocks[1].eval()
    criterion = new_criterion(model, 1, time="repa")
    before = seen()
    loss = model((X + torch.randn(X.shape)) / 2, torch.full((20,), 0.5), Y).square().mean()
    first = report_of(model)
    assert seen() == before
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert report_of(model) == first  # labels were not dropped
    assert criterion(loss, latents=X).alignment > 0


def test_nothing_is_cast_and_what_does_not_fit_is_an_error() -> None:
    two, settings = Two(nn.Linear(8, 8), nn.Linear(8, 8)), {"layers": ["0", "1"], "null": None}
    whole = report_of(two, [(X[:, 0],)], **settings)
    half = report_of(two.bfloat16(), [(X[:, 0].bfloat16(),)], **settings)
    assert half.mean("norm", "1", 1) == pytest.approx(whole.mean("norm", "1", 1), rel=0.1)
    with pytest.raises(errors.SettingError, match=r"on latents in torch\.float32; its weights are in torch.bfloat"):
        report_of(two, [(X[:, 0],)], **settings)


# What PyTorch says of reentrant checkpointing without gradients, as fast-DiT's sampling does too.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("name", LOOKALIKES)
def test_every_backbone_is_measured_as_it_is_called(name: str) -> None:
    """The norm of the teacher's layer against a plain pass on condition and null condition each."""
    backbone: Backbone = LOOKALIKES[name]
    model, n, g = backbone.build(0), 12, torch.Generator().manual_seed(3)
    latents, conditions = torch.randn(n, *backbone.shape, generator=g), backbone.conditions(n, g)
    reads = dict(backbone.reads if backbone.teacher_reads is None else backbone.teacher_reads)
    settings = {"time": backbone.time, "null": backbone.null, "noise_fractions": [0.5], "k": 2, **reads}
    report = st.layer_report(model, [{"latents": latents, **conditions}], [backbone.teacher], (1, 3), **settings)

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
    class Labelled(ToyDiT):
        def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            return super().forward(x, t, labels)

    expected = report_of()
    assert report_of(data=[{"latents": X, "y": Y, "labels": (1000 * Y - 7).int()}]) == expected
    assert report_of(Labelled(), [{"latents": X, "labels": Y}], null={"labels": 10}).rows == expected.rows


@pytest.mark.parametrize(
    ("batches", "settings", "match"),
    [
        ([], {}, "no batch to measure on"),
        ([X], {}, r"must be \(latents, \*condition\).*\nGot a float32 tensor"),
        ([(X, 1, 2, 3)], {}, "in the order of 'y'.*\nGot a tuple of 4"),
        ([{"x": 1}], {}, "Got keys 'x'"),
        ([(X / 0, Y)], {}, "of finite values, one sample or more"),
        ([{"latents": X, "labels": torch.rand(20)}], {}, "Labels must be whole numbers"),
        ([{"latents": X, "labels": Y[:3]}], {}, "one for each of 20 latents"),
        ([(X[:9], Y[:9])], {}, "9 samples are too few for k = 10"),
        ([{"latents": X, "y": Y}, {"latents": X, "y": Y, "labels": Y}], {}, "1 of 2 batches have labels"),
        ([(X, Y)], {"noise_fractions": ()}, "noise_fractions is empty"),
        ([(X, Y)], {"null": {"y": 11}}, "would reach embedding 'y_embedder'"),
        ([(X, Y)], {"call": {"t": lambda call: call["t"]}}, "call= must name the arguments"),
    ],
)
def test_what_cannot_be_measured_is_an_error(batches: list[Any], settings: dict[str, Any], match: str) -> None:
    with pytest.raises((errors.SettingError, errors.ShapeError), match=match):
        report_of(None, batches, **settings)


def test_the_table_says_what_was_measured_and_in_a_notebook_no_name_is_markup() -> None:
    report = report_of(type("<img src=x>", (ToyDiT,), {})(), guidance_scales=(1, 4))
    assert "5 held-out samples of 4 classes: chance" in str(report)
    assert "&lt;img src=x&gt;" in report._repr_html_()
    assert "<img" not in report._repr_html_()
    lines = [line.split() for line in str(report).replace("CKA with blocks.1", "CKA").splitlines()]
    own, guided = (
        dict(zip(lines[i], lines[i + 2], strict=True)) for i, line in enumerate(lines) if "layer" in line[:1]
    )
    shown = {"probe": ("probe", 100), "k-NN": ("knn", 100), "rank": ("effective_rank", 1), "norm": ("norm", 1)}
    assert [*own] == ["layer", *(f"{name}@0" for name in shown), "contrast@1", "CKA@8"]
    assert [*guided] == ["layer", *(f"{name}@{w}" for name in ("k-NN", "rank", "norm") for w in (1, 4, 8))]
    assert float(own.pop("CKA@8")) == pytest.approx(report.alignment[-1][1][1], abs=0.005)
    for heading, cell in [*own.items(), *guided.items()]:
        name, _, scale = heading.partition("@")
        measure, factor = shown.get(name, (name, 1))
        if name != "layer":
            assert float(cell) == pytest.approx(factor * report.mean(measure, "blocks.1", float(scale)), abs=0.05)
