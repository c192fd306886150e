"""Folders of images: what is listed, how an image is cropped and converted, and which ones are refused."""

import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from common.data_files import DataError
from common.image_folder import centre_crop, list_images, read_image
from PIL import Image
from torch import Tensor

RED, BLUE = (200, 10, 20), (10, 20, 200)


def noise(width: int, height: int) -> Image.Image:
    pixels = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def hwc(image: Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


def test_classes_and_images_are_listed_in_order(tmp_path: Path) -> None:
    for name in ("bee/2.png", "bee/10.JPEG", "ant/deep/x.webp", "ant/a.jpg", "ant/notes.txt", "bee/._2.png", "READ.me"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / ".git").mkdir()
    assert list_images(tmp_path) == (
        ["ant", "bee"],
        ["ant/a.jpg", "ant/deep/x.webp", "bee/10.JPEG", "bee/2.png"],
        [0, 0, 1, 1],
        [".git", "READ.me", "ant/notes.txt", "bee/._2.png"],
    )


def test_folders_without_classes_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"There is no folder .*nowhere"):
        list_images(tmp_path / "nowhere")
    with pytest.raises(DataError, match="Found: no folders"):
        list_images(tmp_path)
    (tmp_path / "loose.png").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"loose.png: an image in no class folder\n  empty: a class folder without"):
        list_images(tmp_path)


def test_a_crop_halves_by_box_means_then_cuts_the_middle() -> None:
    image = noise(64, 32)
    pixels = np.asarray(image).astype(np.float64)
    halved = (pixels[::2, ::2] + pixels[1::2, ::2] + pixels[::2, 1::2] + pixels[1::2, 1::2]) / 4
    found = np.asarray(centre_crop(image, 16)).astype(np.float64)
    assert found.shape == (16, 16, 3)
    assert np.abs(found - halved[:, 8:24]).max() <= 1  # rounded after each direction


@pytest.mark.parametrize(
    ("width", "height", "scaled", "left", "top"), [(40, 30, (21, 16), 2, 0), (8, 12, (16, 24), 0, 4)]
)
def test_a_crop_scales_the_shorter_side_bicubically(
    width: int, height: int, scaled: tuple[int, int], left: int, top: int
) -> None:
    image = noise(width, height)
    expected = np.asarray(image.resize(scaled, Image.Resampling.BICUBIC))[top : top + 16, left : left + 16]
    assert np.array_equal(np.asarray(centre_crop(image, 16)), expected)


def test_every_kind_of_image_becomes_rgb(tmp_path: Path) -> None:
    rgb = Image.new("RGB", (16, 16), RED)
    half_transparent = Image.new("RGBA", (16, 16), (*RED, 0))
    half_transparent.paste((*BLUE, 255), (0, 0, 8, 16))
    wide = np.tile(np.array([0, 257, 65535, 30000], np.uint16), (16, 4))
    transparent_palette = rgb.quantize(4)
    kinds = {
        "rgb.png": (rgb, {}, RED),
        "palette.png": (rgb.quantize(4), {}, RED),
        "transparent.png": (transparent_palette, {"transparency": transparent_palette.getpixel((0, 0))}, (255,) * 3),
        "grey.png": (rgb.convert("L"), {}, (rgb.convert("L").getpixel((0, 0)),) * 3),
        "cmyk.jpg": (Image.new("CMYK", (16, 16), (0, 255, 255, 0)), {"quality": 100}, (255, 0, 0)),
        "lossless.webp": (rgb, {"lossless": True}, RED),
        "bilevel.png": (Image.new("1", (16, 16), 1), {}, (255, 255, 255)),
    }
    for name, (image, settings, colour) in kinds.items():
        image.save(tmp_path / name, **settings)
        found = read_image(tmp_path / name, 16)
        assert found.shape == (3, 16, 16)
        assert found.dtype == torch.uint8
        assert (found.float() - torch.tensor(colour).reshape(3, 1, 1)).abs().max() <= 3, name
    half_transparent.save(tmp_path / "alpha.png")
    alpha = hwc(read_image(tmp_path / "alpha.png", 16))
    assert np.array_equal(alpha[:, :8], np.broadcast_to(np.array(BLUE), (16, 8, 3)))
    assert (alpha[:, 8:] == 255).all()
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert hwc(read_image(tmp_path / "wide.png", 16))[0, :4].tolist() == [[v] * 3 for v in (0, 1, 255, 117)]


def test_a_photograph_is_turned_upright(tmp_path: Path) -> None:
    image = noise(16, 16)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side
    image.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(hwc(read_image(tmp_path / "a.png", 16)), np.rot90(np.asarray(image), -1))


def test_damaged_images_are_named(tmp_path: Path) -> None:
    noise(64, 64).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    stream = io.BytesIO()
    noise(64, 64).save(stream, "PNG")
    png = stream.getvalue()
    no_width = (
        png[:16] + struct.pack(">I", 0) + png[20:29] + struct.pack(">I", zlib.crc32(png[12:16] + bytes(4) + png[20:29]))
    )
    for name, content, match in [
        ("truncated.jpg", whole[: len(whole) // 2], "truncated"),
        ("truncated.png", png[: len(png) // 2], "OSError"),
        ("broken.png", png[:60] + bytes(40) + png[100:], "broken data stream"),
        ("no_width.png", no_width + png[33:], "Error"),
        ("empty.png", b"", "UnidentifiedImageError"),
        ("text.png", b"not an image", "UnidentifiedImageError"),
        ("postscript.png", b"%!PS-Adobe-3.0 EPSF-3.0\n", "UnidentifiedImageError"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"^{re.escape(name)} cannot be used: (.|\n)*{match}"):
            read_image(tmp_path / name, 16)
    with pytest.raises(DataError, match="FileNotFoundError"):
        read_image(tmp_path / "nowhere.png", 16)


def test_an_animation_is_refused(tmp_path: Path) -> None:
    frames = [noise(16, 16), Image.new("RGB", (16, 16), RED)]
    for name in ("a.png", "a.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        with pytest.raises(DataError, match="it has 2 frames"):
            read_image(tmp_path / name, 16)


def test_a_photograph_with_a_second_view_is_the_first(tmp_path: Path) -> None:
    red, blue = (Image.new("RGB", (16, 16), colour) for colour in (RED, BLUE))
    red.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[blue], quality=100)
    found = read_image(tmp_path / "a.jpg", 16)
    assert (found.float() - torch.tensor(RED).reshape(3, 1, 1)).abs().max() <= 3


def test_decompression_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise(64, 64).save(tmp_path / "a.png")
    noise(512, 2).save(tmp_path / "long.png")
    for limit, kind in [(3000, "DecompressionBombWarning"), (1000, "DecompressionBombError")]:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(DataError, match=kind):
            read_image(tmp_path / "a.png", 16)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    assert read_image(tmp_path / "a.png", 16).shape == (3, 16, 16)
    with pytest.raises(DataError, match="512x2 pixels become 65536 when the shorter side is 16"):
        read_image(tmp_path / "long.png", 16)
