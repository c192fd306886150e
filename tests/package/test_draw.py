"""Pictures: what the colours mean, which numbers a report shows, and that matplotlib is only an extra."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from toys import ToyDiT

import selftrans_reg as st
from selftrans_reg import errors
from selftrans_reg.analysis.draw import ColourBasis, draw_features, draw_report

BATCH = (torch.randn(40, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(40) % 4)
NOISE = torch.randn(40, 4, 8, 8, generator=torch.Generator().manual_seed(0))
TOY: dict[str, Any] = {"time": "repa", "null": {"y": 10}}
LAYERS = ("blocks.0", "blocks.2")
BROKEN = ToyDiT()
BROKEN.blocks[2].fc2.bias.data[0] = torch.nan


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that would be saved."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **settings: figures.append(figure))
    return figures


def test_of_several_groups_each_counts_by_its_directions_and_not_by_its_size_if_asked(
    generator: torch.Generator,
) -> None:
    small = torch.randn(300, 4, 8, generator=generator) * torch.tensor([3.0, 0, 2, 0, 0, 0, 0, 0])
    large = 1000 * torch.randn(300, 4, 8, generator=generator) * torch.tensor([0, 4.0, 0, 0.1, 0, 0, 0, 0])
    assert ColourBasis(small, large).directions.abs().argmax(0).tolist() == [1, 3, 0]
    unit = ColourBasis(small, large, unit=True)
    assert unit.directions.abs().argmax(0).tolist() == [1, 0, 2]
    torch.testing.assert_close(unit.colours(large), unit.colours(large / 1e3))


def draw(model: ToyDiT | None = None, batch: Any = BATCH, **settings: Any) -> None:
    draw_features(model or ToyDiT(), batch, "features.png", **(TOY | {"layers": LAYERS} | settings))


@pytest.mark.usefixtures("global_rng_untouched")
def test_each_map_is_its_tokens_components_on_the_basis_of_all(drawn: list[Figure]) -> None:
    with torch.random.fork_rng():
        model = ToyDiT().train()
    draw(model, guidance_scales=(0, 1, 4), shown=1, noise_fraction=0.5)
    assert model.training
    rows = np.reshape(np.array(drawn[0].axes, dtype=object), (2, 4))
    assert [axes.get_title() for axes in rows[0, 1:]] == ["$f_u$ (w = 0)", "$f_c$ (w = 1)", "w = 4"]
    assert [axes.get_ylabel() for axes in rows[:, 1]] == [*LAYERS]

    x_t, t = (BATCH[0] + NOISE) / 2, torch.full((40,), 0.5)
    with torch.no_grad(), st.FeatureTap(model.eval(), LAYERS) as tap:
        model(x_t, t, BATCH[1])
        conditional = tap.pop()
        model(x_t, t, torch.full_like(BATCH[1], 10))
        null = tap.pop()
    maps = []
    for layer in LAYERS:
        for scale in (0, 1, 4):
            guided = (null[layer] + scale * (conditional[layer] - null[layer])).double().numpy()
            guided = guided - guided.mean(0)
            maps.append(guided / guided.std())
    flat = np.concatenate([values.reshape(-1, 16) for values in maps])
    directions = np.linalg.eigh(flat.T @ flat)[1][:, :-4:-1]  # (16, 3), the largest first
    low, high = np.quantile(flat @ directions, [0.01, 0.99], axis=0)
    for axes, values in zip(rows[:, 1:].flat, maps, strict=True):
        found = np.asarray(axes.images[0].get_array())
        expected = np.clip((values[0] @ directions - low) / (high - low), 0, 1).reshape(4, 4, 3)
        for a, b in zip(np.moveaxis(found, 2, 0), np.moveaxis(expected, 2, 0), strict=True):
            assert min(np.abs(a - b).max(), np.abs(a - 1 + b).max()) < 1e-3  # a direction's sign is nobody's choice


def test_the_input_stands_beside_them(drawn: list[Figure]) -> None:
    draw(shown=3, decode=lambda latents: latents[:, :3].clamp(-1, 1), noise_fraction=0.25)
    x = BATCH[0][:3]
    for index, title, shown in ((0, "clean", x), (5, "$x_t$", 0.75 * x + 0.25 * NOISE[:3])):
        expected = np.ones((17, 17, 3))  # two columns of 8 with a gap of 1, white where there is none
        images = 0.5 + shown[:, :3].clamp(-1, 1).permute(0, 2, 3, 1).numpy() / 2
        expected[:8, :8], expected[:8, 9:], expected[9:, :8] = images
        np.testing.assert_allclose(drawn[0].axes[index].images[0].get_array(), expected, atol=1e-6)
        assert drawn[0].axes[index].get_title() == title


def test_latents_of_one_channel_are_drawn_and_patches_need_not_make_a_square(drawn: list[Figure]) -> None:
    draw(ToyDiT(channels=1), (BATCH[0][:, :1, :4], BATCH[1]), null=None, shown=1)
    assert [a.images[0].get_array().shape[:2] for a in drawn[0].axes] == [(4, 8), (2, 4), (4, 8), (2, 4)]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"guidance_scales": ()}, r"A colour basis is taken from .* got \[\]"),
        ({"batch": (BATCH[0][:1], BATCH[1][:1])}, "2 or more; got .1, 4, 8, 8."),
        ({"layers": ["blocks.0", "blocks.1.fc1"]}, "of one width D; got .*40, 16, 32"),
        ({"grid": (2, 3)}, "16 tokens are no grid of 2 x 3"),
        ({"decode": lambda latents: latents}, "Images to draw are"),
        ({"model": BROKEN}, r"layer 'blocks\.2' has some"),
    ],
)
def test_what_cannot_be_drawn_is_an_error(settings: dict[str, Any], match: str, drawn: list[Figure]) -> None:
    with pytest.raises((errors.SettingError, errors.ShapeError), match=match):
        draw(**settings)
    assert drawn == []


def report_of(model: ToyDiT, data: Any = BATCH, **settings: Any) -> st.LayerReport:
    settings = TOY | {"noise_fractions": (0.3, 0.6), "guidance_scales": (1, 4), "k": 2} | settings
    return st.layer_report(model, [data], **settings)


def panel(figure: Figure, title: str) -> Any:
    (found,) = [axes for axes in figure.axes if axes.get_title().startswith(title)]
    return found


def test_a_report_shows_the_measurements(drawn: list[Figure]) -> None:
    report = report_of(ToyDiT())
    with torch.device("meta"):  # which leads nothing astray
        draw_report(report, "report.png")
    profiles = {"Linear probe": "probe", "k-NN of the null": "knn", "Effective": "effective_rank", "Contr": "contrast"}
    for title, measure in profiles.items():
        for index, fraction in enumerate((0.3, 0.6)):
            at = fraction, float(measure == "contrast")
            rows = [row for row in report.rows if (row.noise_fraction, row.guidance_scale) == at]
            found = panel(drawn[0], title).lines[index].get_ydata().tolist()
            assert found == [getattr(row, measure) for row in rows]
    knn = panel(drawn[0], "k-NN of $f_g$").images[0].get_array()
    assert knn[2, 1] == pytest.approx(report.mean("knn", "blocks.2", 4))
    proposed = report.alignment[report.guidance_scales.index(report.recipe.guidance_scale)]
    expected = [f"{value:.3g}" for row in proposed for value in row]
    assert [text.get_text() for text in panel(drawn[0], "CKA").texts] == expected


def test_a_report_is_drawn_without_what_was_not_measured(drawn: list[Figure]) -> None:
    unlabelled = {"latents": BATCH[0], "y": BATCH[1]}
    for report in (report_of(BROKEN), report_of(ToyDiT(), unlabelled), report_of(ToyDiT(), unlabelled, null=None)):
        draw_report(report, "report.png")
    cka = panel(drawn[0], "CKA")
    assert len(cka.texts) == np.isfinite(cka.images[0].get_array()).sum() < 16
    titles = [[axes.get_title()[:3] for axes in figure.axes if axes.get_title()] for figure in drawn[1:]]
    assert titles == [["Eff", "Con", "Nor", "CKA"], ["Eff", "CKA"]]


def test_without_matplotlib_nothing_is_run_for_a_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    report = report_of(ToyDiT())
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(ToyDiT, "forward", lambda *args: pytest.fail("the model ran"))
    for picture in (draw, lambda: draw_report(report, "a.png")):
        with pytest.raises(errors.MissingDependencyError, match=r"Pictures need matplotlib.*pip install matplotlib"):
            picture()
