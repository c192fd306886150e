"""The examples' pictures: where tiles go, and what the colours of tokens mean."""

from pathlib import Path

import matplotlib.image
import numpy as np
import torch
from common.pictures import ColourBasis, grey_to_rgb, save_panels, tile


def test_tiles_go_row_by_row_with_a_white_gap() -> None:
    images = torch.arange(3.0).div(4).reshape(3, 1, 1, 1).expand(3, 2, 2, 3)
    expected = np.array(
        [
            [0.00, 0.00, 1, 0.25, 0.25],
            [0.00, 0.00, 1, 0.25, 0.25],
            [1.00, 1.00, 1, 1.00, 1.00],
            [0.50, 0.50, 1, 1.00, 1.00],
            [0.50, 0.50, 1, 1.00, 1.00],
        ]
    )
    np.testing.assert_array_equal(tile(images, columns=2), np.repeat(expected[:, :, None], 3, axis=2))


def test_ink_is_dark() -> None:
    rgb = grey_to_rgb(torch.tensor([-1.0, 0.0, 1.0, 2.0]).reshape(1, 1, 1, 4))
    assert rgb[0, 0, :, 1].tolist() == [1.0, 0.5, 0.0, 0.0]
    assert rgb.shape == (1, 1, 4, 3)


def test_colours_are_the_principal_components_without_the_positions_mean(generator: torch.Generator) -> None:
    spread = torch.tensor([0.1, 5.0, 2.0, 1.0, 0.2])  # the axes by size: 1, 2, 3
    position = 100 * torch.randn(4, 5, generator=generator)
    tokens = torch.randn(500, 4, 5, generator=generator) * spread + position
    basis = ColourBasis(tokens)
    largest = basis.directions.abs().argmax(0)
    assert largest.tolist() == [1, 2, 3]
    colours = basis.colours(tokens)
    assert colours.shape == (500, 2, 2, 3)
    centred = tokens - tokens.mean(0)
    for channel, axis in enumerate([1, 2, 3]):
        pair = torch.stack([colours[..., channel].flatten(), centred[..., axis].flatten()])
        assert torch.corrcoef(pair)[0, 1].abs() > 0.99
        clipped = (colours[..., channel] == 0).float().mean() + (colours[..., channel] == 1).float().mean()
        assert 0.015 < clipped < 0.025  # a hundredth at each end


def test_one_basis_and_one_range_serve_other_tokens(generator: torch.Generator) -> None:
    tokens = torch.randn(2000, 4, 5, generator=generator)
    basis = ColourBasis(tokens)
    offset = torch.randn(4, 5, generator=generator)
    torch.testing.assert_close(basis.colours(tokens + offset), basis.colours(tokens), atol=1e-4, rtol=0)
    faint = basis.colours(tokens / 4)  # a quarter of the contrast, about the same middle
    middle = -basis.low / (basis.high - basis.low)
    unclipped = basis.colours(tokens).double() - middle
    inside = (unclipped.abs() < 0.4).all(-1)
    assert inside.float().mean() > 0.5
    torch.testing.assert_close(faint.double()[inside] - middle, unclipped[inside] / 4, atol=1e-5, rtol=0)


def test_panels_are_written(tmp_path: Path) -> None:
    red = np.zeros((4, 4, 3), dtype=np.float32)
    red[..., 0] = 1
    save_panels({"first": {"a": red, "b": 0 * red}, "second": {"c": red}}, tmp_path / "picture.png")
    written = matplotlib.image.imread(tmp_path / "picture.png")[..., :3]
    assert (written == [1, 0, 0]).all(-1).mean() > 0.05
    assert (written == [0, 0, 0]).all(-1).mean() > 0.05
