"""The examples' pictures: what they add to the library's."""

import numpy as np
import torch
from common.pictures import grey_to_rgb, tile

from selftrans_reg.analysis import draw


def test_ink_is_dark() -> None:
    rgb = grey_to_rgb(torch.tensor([-1.0, 0.0, 1.0, 2.0]).reshape(1, 1, 1, 4))
    assert rgb[0, 0, :, 1].tolist() == [1.0, 0.5, 0.0, 0.0]
    assert rgb.shape == (1, 1, 4, 3)


def test_tiles_are_an_array() -> None:
    images = torch.rand(3, 2, 2, 3)
    found = tile(images, columns=2, gap=3)
    assert isinstance(found, np.ndarray)
    np.testing.assert_array_equal(found, draw.tile(images, columns=2, gap=3))
