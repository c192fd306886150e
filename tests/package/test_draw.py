"""Pictures: what the colours mean, which numbers curves and reports show, and that matplotlib is only an extra."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor
from toys import ToyDiT

import selftrans_reg as st
from selftrans_reg import errors
from selftrans_reg.analysis import draw
from selftrans_reg.analysis.draw import ColourBasis, draw_curves, draw_features, draw_report, save_panels, tile

BATCH = (torch.randn(12, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 10)
TOY: dict[str, Any] = {"time": "repa", "null": {"y": 10}}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is saved, as an object too."""
    figures: list[Figure] = []

    def keep(save: Callable[[Figure, Any], None]) -> Callable[[Figure, Any], None]:
        return lambda figure, path: (figures.append(figure), save(figure, path))[1]

    monkeypatch.setattr(draw, "save_figure", keep(draw.save_figure))
    return figures


def panel(figure: Figure, title: str) -> Any:
    (found,) = [axes for axes in figure.axes if axes.get_title().startswith(title)]
    return found


class TestColourBasis:
    def test_colours_are_the_principal_components_without_the_positions_mean(self, generator: torch.Generator) -> None:
        spread = torch.tensor([0.1, 5.0, 2.0, 1.0, 0.2])  # the axes by size: 1, 2, 3
        position = 100 * torch.randn(4, 5, generator=generator)
        tokens = torch.randn(500, 4, 5, generator=generator) * spread + position
        basis = ColourBasis(tokens)
        assert basis.directions.abs().argmax(0).tolist() == [1, 2, 3]
        found = basis.colours(tokens)
        assert found.shape == (500, 2, 2, 3)
        centred = tokens - tokens.mean(0)
        for channel, axis in enumerate([1, 2, 3]):
            pair = torch.stack([found[..., channel].flatten(), centred[..., axis].flatten()])
            assert torch.corrcoef(pair)[0, 1].abs() > 0.99
            clipped = (found[..., channel] == 0).float().mean() + (found[..., channel] == 1).float().mean()
            assert 0.015 < clipped < 0.025  # a hundredth at each end

    def test_of_several_groups_each_counts_by_its_directions_and_not_by_its_size(
        self, generator: torch.Generator
    ) -> None:
        small = torch.randn(300, 4, 8, generator=generator) * torch.tensor([3.0, 0, 2, 0, 0, 0, 0, 0])
        large = 1000 * torch.randn(300, 4, 8, generator=generator) * torch.tensor([0, 4.0, 0, 0.1, 0, 0, 0, 0])
        assert ColourBasis(small, large).directions.abs().argmax(0).tolist() == [1, 3, 0]
        unit = ColourBasis(small, large, unit=True)
        assert unit.directions.abs().argmax(0).tolist() == [1, 0, 2]
        torch.testing.assert_close(unit.colours(large), unit.colours(large / 1e3))

    @pytest.mark.parametrize(
        ("groups", "match"),
        [([], r"got \[\]"), ([(3, 4)], r"got \[\(3, 4\)\]"), ([(3, 4, 5), (3, 4, 6)], "of one width"),
         ([(3, 4, 2)], "width 3 or more; got 2")],
    )  # fmt: skip
    def test_what_has_no_three_components_is_an_error(self, groups: list[tuple[int, ...]], match: str) -> None:
        with pytest.raises((errors.ShapeError, errors.SettingError), match=match):
            ColourBasis(*map(torch.zeros, groups))


def test_tiles_go_row_by_row_with_a_white_gap() -> None:
    images = torch.arange(3.0).div(4).reshape(3, 1, 1, 1).expand(3, 2, 2, 3)
    expected = torch.tensor(
        [
            [0.00, 0.00, 1, 0.25, 0.25],
            [0.00, 0.00, 1, 0.25, 0.25],
            [1.00, 1.00, 1, 1.00, 1.00],
            [0.50, 0.50, 1, 1.00, 1.00],
            [0.50, 0.50, 1, 1.00, 1.00],
        ]
    )
    assert torch.equal(tile(images, columns=2), expected[:, :, None].expand(-1, -1, 3))


def broken() -> ToyDiT:
    model = ToyDiT()
    model.blocks[2].fc2.bias.data[0] = torch.nan
    return model


class TestFeatures:
    LAYERS = ("blocks.0", "blocks.2")

    def draw(self, path: Path, model: ToyDiT | None = None, batch: Any = BATCH, **settings: Any) -> None:
        draw_features(model or ToyDiT(), batch, path / "features.png", **(TOY | {"layers": self.LAYERS} | settings))

    def images(self, figure: Figure) -> dict[tuple[str, str], np.ndarray]:
        """Every map by its place: layer from the row's label, scale from the column's title."""
        parts = figure.subfigs[1].axes
        titles = [axes.get_title() for axes in parts if axes.get_title()]
        rows = [axes.get_ylabel() for axes in parts if axes.get_ylabel()]
        places = [(row, title) for row in rows for title in titles]
        return {place: np.asarray(a.images[0].get_array()) for place, a in zip(places, parts, strict=True)}

    @pytest.mark.usefixtures("global_rng_untouched")
    def test_each_map_is_its_tokens_components_on_the_basis_of_all(self, tmp_path: Path, drawn: list[Figure]) -> None:
        with torch.random.fork_rng():
            model = ToyDiT().train()
        self.draw(tmp_path, model, guidance_scales=(0, 1, 4), shown=1, noise_fraction=0.5)
        assert model.training
        found = self.images(drawn[0])
        assert [*found] == [(n, s) for n in self.LAYERS for s in ("$f_u$ (w = 0)", "$f_c$ (w = 1)", "w = 4")]

        noise = torch.randn(BATCH[0].shape, generator=torch.Generator().manual_seed(0))
        x_t, t = (BATCH[0] + noise) / 2, torch.full((12,), 0.5)
        maps: dict[tuple[str, str], np.ndarray] = {}
        with torch.no_grad(), st.FeatureTap(model.eval(), self.LAYERS) as tap:
            model(x_t, t, BATCH[1])
            conditional = tap.pop()
            model(x_t, t, torch.full_like(BATCH[1], 10))
            null = tap.pop()
        for layer in self.LAYERS:
            for title, scale in zip(dict.fromkeys(s for _, s in found), (0, 1, 4), strict=True):
                guided = (null[layer] + scale * (conditional[layer] - null[layer])).double().numpy()
                guided = guided - guided.mean(0)
                maps[layer, title] = guided / guided.std()
        flat = np.concatenate([values.reshape(-1, 16) for values in maps.values()])
        directions = np.linalg.eigh(flat.T @ flat)[1][:, :-4:-1]  # (16, 3), the largest first
        low, high = np.quantile(flat @ directions, [0.01, 0.99], axis=0)
        for place, values in maps.items():
            expected = np.clip((values[0] @ directions - low) / (high - low), 0, 1).reshape(4, 4, 3)
            for channel in range(3):  # a direction's sign is nobody's choice
                pair = found[place][..., channel], expected[..., channel]
                assert min(np.abs(pair[0] - pair[1]).max(), np.abs(pair[0] - 1 + pair[1]).max()) < 1e-3

    def test_the_input_stands_beside_them(self, tmp_path: Path, drawn: list[Figure]) -> None:
        seen = []

        def decode(latents: Tensor) -> Tensor:
            seen.append(latents)
            return latents[:, :3].clamp(-1, 1)

        self.draw(tmp_path, shown=4, decode=decode, noise_fraction=0.25)
        assert torch.equal(seen[0], BATCH[0][:4])
        noise = torch.randn(BATCH[0].shape, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(seen[1], 0.75 * BATCH[0][:4] + 0.25 * noise[:4])
        left = drawn[0].subfigs[0].axes
        assert [axes.get_title() for axes in left[:2]] == ["clean", "$x_t$"]
        corner = left[0].images[0].get_array()[:8, :8]
        np.testing.assert_allclose(corner, 0.5 + seen[0][0, :3].clamp(-1, 1).permute(1, 2, 0) / 2, atol=1e-6)
        assert "one basis for all maps" in drawn[0].get_suptitle()
        assert (tmp_path / "features.png").stat().st_size > 10_000

    @pytest.mark.parametrize("channels", [1, 4])
    def test_latents_are_drawn_where_nothing_decodes_them(
        self, channels: int, tmp_path: Path, drawn: list[Figure]
    ) -> None:
        self.draw(tmp_path, ToyDiT(channels=channels), (BATCH[0][:, :channels], BATCH[1]), null=None)
        assert len(drawn[0].subfigs[1].axes) == 2  # the condition alone
        assert drawn[0].subfigs[0].axes[0].images[0].get_array().shape == (17, 17, 3)

    def test_patches_need_not_make_a_square(self, tmp_path: Path, drawn: list[Figure]) -> None:
        wide = torch.randn(6, 4, 4, 8, generator=torch.Generator().manual_seed(0))
        self.draw(tmp_path, batch=(wide, BATCH[1][:6]), shown=1)
        assert drawn[0].subfigs[1].axes[0].images[0].get_array().shape == (2, 4, 3)

    @pytest.mark.parametrize(
        ("settings", "match"),
        [
            ({"shown": 0}, "show one sample or more"),
            ({"guidance_scales": ()}, "Name guidance scales"),
            ({"guidance_scales": (-1,)}, "0 or more"),
            ({"batch": (BATCH[0][:1], BATCH[1][:1])}, "2 or more; got .1, 4, 8, 8."),
            ({"layers": ["blocks.0", "blocks.1.fc1"]}, "of one width D; got .*12, 16, 32"),
            ({"grid": (2, 3)}, "16 tokens are no grid of 2 x 3"),
            ({"decode": lambda latents: latents}, "Images to draw are"),
            ({"model": broken()}, r"layer 'blocks\.2' has some"),
            ({"seed": -1}, "seed must be a whole number"),
        ],
    )
    def test_what_cannot_be_drawn_is_an_error(self, settings: dict[str, Any], match: str, tmp_path: Path) -> None:
        with pytest.raises((errors.SettingError, errors.ShapeError), match=match):
            self.draw(tmp_path, **settings)
        assert list(tmp_path.iterdir()) == []


class TestCurves:
    LOG = ({"step": 0, "loss": 2.0, "note": "warm"}, {"step": 5, "loss": 1.0, "lr": 0.1}, {"step": 9, "loss": 0.5})

    def test_every_number_of_each_run_is_drawn_over_its_steps(self, tmp_path: Path, drawn: list[Figure]) -> None:
        path = tmp_path / "log.jsonl"  # with an unfinished last line, as a run that goes on has it
        path.write_text("".join(json.dumps(entry) + "\n" for entry in self.LOG) + '{"step": 12, "lo')
        draw_curves({"a": path, "b": [{"step": 3, "loss": 4.0}]}, tmp_path / "curves.png")
        lines = [line.get_xydata().tolist() for line in panel(drawn[0], "loss").lines]
        assert lines[0] == [[0, 2], [5, 1], [9, 0.5]]
        assert [[3, 4]] in lines
        assert panel(drawn[0], "lr").lines[0].get_xydata().tolist() == [[5, 0.1]]
        assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["a", "b"]
        assert {axes.get_title() for axes in drawn[0].axes} == {"loss", "lr"}
        assert (tmp_path / "curves.png").exists()

    def test_what_is_not_finite_is_marked(self, tmp_path: Path, drawn: list[Figure]) -> None:
        log = [{"steps": 0, "loss": 1.0}, {"steps": 1, "loss": float("nan")}, {"steps": 2, "loss": float("inf")}]
        draw_curves(log, tmp_path / "curves.png")
        axes = panel(drawn[0], "loss (x: not finite)")
        assert list(axes.lines[1].get_xdata()) == [1, 2]

    @pytest.mark.parametrize(
        ("text", "match"),
        [("x\n", "Line 1 of .* is not JSON: 'x'"), ("[1]\n", "no JSON object"), ('{"loss": 1}\n', "has no step"),
         ('{"step": 1}\n', "no number was logged"), ("", "no number was logged")],
    )  # fmt: skip
    def test_what_is_no_log_is_an_error(self, text: str, match: str, tmp_path: Path) -> None:
        (tmp_path / "log.jsonl").write_text(text)
        with pytest.raises(errors.SettingError, match=match):
            draw_curves(tmp_path / "log.jsonl", tmp_path / "curves.png")
        assert not (tmp_path / "curves.png").exists()


class TestReport:
    SETTINGS = TOY | {"noise_fractions": (0.3, 0.6), "guidance_scales": (1, 4), "k": 2}

    def test_it_shows_the_measurements(self, tmp_path: Path, drawn: list[Figure]) -> None:
        x = torch.randn(40, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        report = st.layer_report(ToyDiT(), [(x, torch.arange(40) % 4)], **self.SETTINGS)
        draw_report(report, tmp_path / "report.png")
        for title, measure, scale, factor in [
            ("Linear probe", "probe", 0, 100), ("k-NN of the null", "knn", 0, 100),
            ("Effective rank", "effective_rank", 0, 1), ("Contrast", "contrast", 1, 1),
        ]:  # fmt: skip
            for index, fraction in enumerate((0.3, 0.6)):
                expected = [
                    factor * getattr(row, measure)
                    for row in report.rows
                    if row.noise_fraction == fraction and row.guidance_scale == scale
                ]
                assert panel(drawn[0], title).lines[index].get_ydata().tolist() == pytest.approx(expected)
        knn = panel(drawn[0], "k-NN of $f_g$").images[0].get_array()
        assert knn[2, 1] == pytest.approx(100 * report.mean("knn", "blocks.2", 4))
        cka = panel(drawn[0], "CKA").images[0].get_array()
        proposed = report.guidance_scales.index(report.recipe.guidance_scale)
        assert cka[1, 3] == pytest.approx(report.alignment[proposed][1][3])
        shown = [text.get_text() for text in panel(drawn[0], "CKA").texts]
        assert shown == [f"{value:.2f}" for row in report.alignment[proposed] for value in row]
        labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
        lines = ["noise fraction 0.3", "noise fraction 0.6", "chance", "student layer", "teacher layer"]
        assert labels == [*lines, "proposed"]
        assert (tmp_path / "report.png").stat().st_size > 10_000

    def test_what_was_not_measured_has_no_number_and_many_layers_have_none(
        self, tmp_path: Path, drawn: list[Figure]
    ) -> None:
        batch = (torch.randn(40, 4, 8, 8), torch.arange(40) % 4)
        broken, deep = ToyDiT(), ToyDiT(depth=13)
        broken.blocks[3].fc2.bias.data[0] = torch.nan
        for model in (broken, deep):
            draw_report(st.layer_report(model, [batch], **self.SETTINGS), tmp_path / "report.png")
        for title in ("CKA", "k-NN of $f_g$"):
            cells = panel(drawn[0], title).images[0].get_array()
            assert len(panel(drawn[0], title).texts) == np.isfinite(cells).sum() < cells.size
            assert len(panel(drawn[1], title).texts) == 0

    def test_it_does_without_labels_and_null_condition(self, tmp_path: Path, drawn: list[Figure]) -> None:
        x, y = torch.randn(40, 4, 8, 8), torch.arange(40) % 4
        for null, titles in [
            (None, {"Effective rank", "CKA"}),
            ({"y": 10}, {"Effective rank", "CKA", "Contrast", "Norm of a token"}),
        ]:
            report = st.layer_report(ToyDiT(), [{"latents": x, "y": y}], **self.SETTINGS | {"null": null})
            draw_report(report, tmp_path / "report.png")
            found = {axes.get_title() for axes in drawn[-1].axes if axes.get_title()}
            assert len(found) == len(titles)
            assert all(any(title in name for name in found) for title in titles)

    def test_names_are_no_formulas(self, tmp_path: Path, drawn: list[Figure]) -> None:
        model = ToyDiT()
        model.add_module("$x", model.blocks[3])
        model.blocks[3] = model.get_submodule("$x")
        batch = (torch.randn(40, 4, 8, 8), torch.arange(40) % 4)
        found = st.layer_report(model, [batch], ["blocks.0", "blocks.1", "$x"], **self.SETTINGS)
        draw_report(found, tmp_path / "report.png")
        assert r"\$x" in [text.get_text() for text in panel(drawn[0], "CKA").get_xticklabels()]


class TestWithoutMatplotlib:
    @pytest.fixture(autouse=True)
    def without(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)

    def test_a_picture_names_the_extra_before_anything_is_run(self, tmp_path: Path) -> None:
        def forward(*args: Any) -> None:
            pytest.fail("the model ran for a picture that cannot be drawn")

        model = ToyDiT()
        model.forward = forward  # type: ignore[method-assign]
        for picture in (
            lambda: draw_curves(TestCurves.LOG, tmp_path / "a.png"),
            lambda: draw_features(model, BATCH, tmp_path / "a.png", **TOY),
            lambda: save_panels({"a": {"b": np.zeros((2, 2, 3))}}, tmp_path / "a.png"),
        ):
            with pytest.raises(errors.MissingDependencyError, match="pip install matplotlib"):
                picture()

    def test_a_report_is_measured_printed_and_saved(self, tmp_path: Path) -> None:
        report = st.layer_report(ToyDiT(), [BATCH], **TOY | {"k": 2})
        report.save(tmp_path / "report.json")
        assert "blocks.3" in str(report)
        with pytest.raises(ImportError, match="Pictures need matplotlib"):
            draw_report(report, tmp_path / "report.png")
