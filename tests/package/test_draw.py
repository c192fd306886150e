"""Pictures: what the colours mean, which numbers a report shows, and that matplotlib is only an extra."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from toys import ToyDiT

import selftrans_reg as st
from selftrans_reg import errors
from selftrans_reg.analysis.draw import ColourBasis, draw_features, draw_report

BATCH = (torch.randn(12, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 10)
NOISE = torch.randn(12, 4, 8, 8, generator=torch.Generator().manual_seed(0))
TOY: dict[str, Any] = {"time": "repa", "null": {"y": 10}}
LAYERS = ("blocks.0", "blocks.2")


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


def broken() -> ToyDiT:
    model = ToyDiT()
    model.blocks[2].fc2.bias.data[0] = torch.nan
    return model


class TestFeatures:
    def draw(self, path: Path, model: ToyDiT | None = None, batch: Any = BATCH, **settings: Any) -> None:
        draw_features(model or ToyDiT(), batch, path / "features.png", **(TOY | {"layers": LAYERS} | settings))

    @pytest.mark.usefixtures("global_rng_untouched")
    def test_each_map_is_its_tokens_components_on_the_basis_of_all(self, tmp_path: Path, drawn: list[Figure]) -> None:
        with torch.random.fork_rng():
            model = ToyDiT().train()
        self.draw(tmp_path, model, guidance_scales=(0, 1, 4), shown=1, noise_fraction=0.5)
        assert model.training
        rows = np.reshape(np.array(drawn[0].axes, dtype=object), (2, 4))
        assert [axes.get_title() for axes in rows[0, 1:]] == ["$f_u$ (w = 0)", "$f_c$ (w = 1)", "w = 4"]
        assert [axes.get_ylabel() for axes in rows[:, 1]] == [*LAYERS]

        x_t, t = (BATCH[0] + NOISE) / 2, torch.full((12,), 0.5)
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

    def test_the_input_stands_beside_them(self, tmp_path: Path, drawn: list[Figure]) -> None:
        self.draw(tmp_path, shown=3, decode=lambda latents: latents[:, :3].clamp(-1, 1), noise_fraction=0.25)
        latents = BATCH[0][:3]
        for axes, title, x in [
            (drawn[0].axes[0], "clean", latents),
            (drawn[0].axes[5], "$x_t$", 0.75 * latents + 0.25 * NOISE[:3]),
        ]:
            assert axes.get_title() == title
            found = axes.images[0].get_array()  # two columns of 8 with a gap of 1, white where there is none
            assert found.shape == (17, 17, 3)
            assert (found[8] == 1).all()
            images = [*(0.5 + x[:, :3].clamp(-1, 1).permute(0, 2, 3, 1) / 2).numpy(), np.ones((8, 8, 3))]
            for image, (top, left) in zip(images, [(0, 0), (0, 9), (9, 0), (9, 9)], strict=True):
                np.testing.assert_allclose(found[top : top + 8, left : left + 8], image, atol=1e-6)

    @pytest.mark.parametrize("channels", [1, 4])
    def test_latents_are_drawn_where_nothing_decodes_them_and_patches_need_not_make_a_square(
        self, channels: int, tmp_path: Path, drawn: list[Figure]
    ) -> None:
        self.draw(tmp_path, ToyDiT(channels=channels), (BATCH[0][:, :channels, :4], BATCH[1]), null=None, shown=1)
        assert [a.images[0].get_array().shape[:2] for a in drawn[0].axes] == [(4, 8), (2, 4), (4, 8), (2, 4)]

    @pytest.mark.parametrize(
        ("settings", "match"),
        [
            ({"shown": 0}, "shown must be a positive integer"),
            ({"guidance_scales": (-1,)}, "0 or more"),
            ({"guidance_scales": ()}, r"A colour basis is taken from .* got \[\]"),
            ({"batch": (BATCH[0][:1], BATCH[1][:1])}, "2 or more; got .1, 4, 8, 8."),
            ({"layers": ["blocks.0", "blocks.1.fc1"]}, "of one width D; got .*12, 16, 32"),
            ({"grid": (2, 3)}, "16 tokens are no grid of 2 x 3"),
            ({"decode": lambda latents: latents}, "Images to draw are"),
            ({"model": broken()}, r"layer 'blocks\.2' has some"),
        ],
    )
    def test_what_cannot_be_drawn_is_an_error(self, settings: dict[str, Any], match: str, tmp_path: Path) -> None:
        with pytest.raises((errors.SettingError, errors.ShapeError), match=match):
            self.draw(tmp_path, **settings)
        assert list(tmp_path.iterdir()) == []


class TestReport:
    SETTINGS = TOY | {"noise_fractions": (0.3, 0.6), "guidance_scales": (1, 4), "k": 2}
    DATA = (torch.randn(40, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 4)

    def drawn(self, figure: Figure, title: str) -> Any:
        (found,) = [axes for axes in figure.axes if axes.get_title().startswith(title)]
        return found

    def test_it_shows_the_measurements(self, tmp_path: Path, drawn: list[Figure]) -> None:
        report = st.layer_report(ToyDiT(), [self.DATA], **self.SETTINGS)
        draw_report(report, tmp_path / "report.png")
        for title, measure, scale in [
            ("Linear probe", "probe", 0), ("k-NN of the null", "knn", 0),
            ("Effective rank", "effective_rank", 0), ("Contrast", "contrast", 1),
        ]:  # fmt: skip
            for index, fraction in enumerate((0.3, 0.6)):
                rows = [row for row in report.rows if (row.noise_fraction, row.guidance_scale) == (fraction, scale)]
                found = self.drawn(drawn[0], title).lines[index].get_ydata().tolist()
                assert found == [getattr(row, measure) for row in rows]
        knn = self.drawn(drawn[0], "k-NN of $f_g$").images[0].get_array()
        assert knn[2, 1] == pytest.approx(report.mean("knn", "blocks.2", 4))
        cka, proposed = self.drawn(drawn[0], "CKA"), report.guidance_scales.index(report.recipe.guidance_scale)
        expected = [f"{value:.3g}" for row in report.alignment[proposed] for value in row]
        assert [text.get_text() for text in cka.texts] == expected
        labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
        lines = ["noise fraction 0.3", "noise fraction 0.6", "chance", "student layer", "teacher layer"]
        assert labels == [*lines, "proposed"]

    def test_what_was_not_measured_has_no_number_and_many_layers_have_none(
        self, tmp_path: Path, drawn: list[Figure]
    ) -> None:
        for model in (broken(), ToyDiT(depth=13)):
            model.add_module("$x", model.blocks[-1])  # a name is no formula
            model.blocks[-1] = model.get_submodule("$x")
            layers = [f"blocks.{i}" for i in range(len(model.blocks) - 1)]
            report = st.layer_report(model, [self.DATA], [*layers, "$x"], **self.SETTINGS)
            draw_report(report, tmp_path / "report.png")
        cells = self.drawn(drawn[0], "CKA").images[0].get_array()
        assert len(self.drawn(drawn[0], "CKA").texts) == np.isfinite(cells).sum() < cells.size
        assert len(self.drawn(drawn[1], "CKA").texts) == 0
        assert r"\$x" in [text.get_text() for text in self.drawn(drawn[0], "CKA").get_xticklabels()]

    @pytest.mark.parametrize(("null", "titles"), [(None, ["Eff", "CKA"]), ({"y": 10}, ["Eff", "Con", "Nor", "CKA"])])
    def test_it_does_without_labels_and_null_condition(
        self, null: Any, titles: list[str], tmp_path: Path, drawn: list[Figure]
    ) -> None:
        x, y = self.DATA
        report = st.layer_report(ToyDiT(), [{"latents": x, "y": y}], **self.SETTINGS | {"null": null})
        draw_report(report, tmp_path / "report.png")
        assert [axes.get_title()[:3] for axes in drawn[0].axes if axes.get_title()] == titles


def test_without_matplotlib_nothing_is_run_for_a_picture_and_a_report_is_printed_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    model = ToyDiT()
    report = st.layer_report(model, [BATCH], **TOY | {"k": 2})
    assert "blocks.3" in str(report)
    model.forward = lambda *args: pytest.fail("the model ran")  # type: ignore[method-assign]
    for draw in (lambda path: draw_features(model, BATCH, path, **TOY), lambda path: draw_report(report, path)):
        with pytest.raises(errors.MissingDependencyError, match=r"Pictures need matplotlib.*pip install matplotlib"):
            draw(tmp_path / "a.png")
