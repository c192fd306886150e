"""Images on disk: the files that are some, every kind to the pixels that a viewer shows, and PNGs that are whole."""

import io
import os
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from common.data_files import DataError
from common.images import centre_crop, find_images, read_image, read_square, skipped_line, tile, to_uint8, write_png
from common.options import Mistake
from PIL import Image

RED, BLUE, WHITE = [200, 10, 20], [10, 20, 200], [255, 255, 255]


def noise(width: int, height: int) -> Image.Image:
    pixels = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


# --- files


def test_images_are_found_at_any_depth_and_the_rest_is_named(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/10.JPEG", "a/deep/x.webp", "a/.hidden/y.png", "a/notes.txt", "b/._2.png", "READ.me"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / ".git").mkdir()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "a/deep/loop").symlink_to(tmp_path)
    (tmp_path / "a/itself").symlink_to(tmp_path / "a")
    (tmp_path / "c").symlink_to(tmp_path / "outside")
    (tmp_path / "link.png").symlink_to(tmp_path / "b/2.png")
    found = find_images(tmp_path)
    assert found.images == ["a/deep/x.webp", "b/10.JPEG", "b/2.png", "link.png"]
    assert found.skipped == [
        ".git/", "READ.me", "a/.hidden/", "a/deep/loop/", "a/itself/", "a/notes.txt", "b/._2.png", "c", "gone.png",
        "pipe.png",
    ]  # fmt: skip
    line = skipped_line(tmp_path, found.skipped)
    assert line.endswith("10 entries are no images and are skipped: .git/, READ.me, a/.hidden/ and 7 more")
    with pytest.raises(DataError, match=r"There is no folder .*nowhere"):
        find_images(tmp_path / "nowhere")


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refused(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(DataError, match=r"closed cannot be looked through: Permission denied"):
        find_images(tmp_path)


def test_a_linked_folder_is_looked_through(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/0.png").touch()
    (tmp_path / "set").mkdir()
    (tmp_path / "set/class").symlink_to(tmp_path / "data")
    assert find_images(tmp_path / "set").images == ["class/0.png"]


# --- pixels


def png(
    bits: int, colour: int, samples: list[int], transparent: list[int] | None = None, palette: bytes = b""
) -> bytes:
    """A PNG of one row, written by hand: kinds that Pillow cannot write."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    text = "".join(format(sample, f"0{bits}b") for sample in samples)
    text += "0" * (-len(text) % 8)
    row = b"\0" + int(text, 2).to_bytes(len(text) // 8, "big")

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", len(samples) // channels, 1, bits, colour, 0, 0, 0))]
    parts += [chunk(b"PLTE", palette)] if palette else []
    if transparent is not None:
        form = "B" if colour == 3 else "H"
        parts.append(chunk(b"tRNS", struct.pack(f">{len(transparent)}{form}", *transparent)))
    parts += [chunk(b"IDAT", zlib.compress(row)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


PALETTE = bytes([*RED, *BLUE, 0, 0, 0])
KINDS: dict[str, tuple[bytes, list[list[int]]]] = {  # by file: its bytes and the pixels that a viewer shows
    "1 bit": (png(1, 0, [0, 1]), [[0] * 3, WHITE]),
    "1 bit, a transparent grey": (png(1, 0, [0, 1], [0]), [WHITE, WHITE]),
    "1 bit, a transparent white": (png(1, 0, [0, 1], [1]), [[0] * 3, WHITE]),
    "2 bits": (png(2, 0, [0, 1, 3]), [[0] * 3, [85] * 3, WHITE]),
    "2 bits, a transparent grey": (png(2, 0, [0, 1, 3], [1]), [[0] * 3, WHITE, WHITE]),
    "4 bits, a transparent grey": (png(4, 0, [5, 6], [5]), [WHITE, [102] * 3]),
    "8 bits": (png(8, 0, [0, 100]), [[0] * 3, [100] * 3]),
    "8 bits, a transparent grey": (png(8, 0, [7, 100], [100]), [[7] * 3, WHITE]),
    "16 bits": (png(16, 0, [0, 257, 30000, 65535]), [[0] * 3, [1] * 3, [117] * 3, WHITE]),
    "16 bits, a transparent grey": (png(16, 0, [0, 1000, 1001], [1000]), [[0] * 3, WHITE, [4] * 3]),
    "grey with alpha": (png(8, 4, [100, 255, 100, 0, 0, 128]), [[100] * 3, WHITE, [127] * 3]),
    "grey with alpha, 16 bits": (png(16, 4, [25700, 65535, 25700, 0]), [[100] * 3, WHITE]),
    "RGB": (png(8, 2, [*RED, *BLUE]), [RED, BLUE]),
    "RGB, a transparent colour": (png(8, 2, [*RED, *BLUE], BLUE), [RED, WHITE]),
    "RGB, 16 bits": (png(16, 2, [257 * c for c in RED]), [RED]),
    "RGB, 16 bits, a transparent colour": (png(16, 2, [1000, 9, 9, 257, 0, 0], [1000, 9, 9]), [WHITE, [1, 0, 0]]),
    "RGB with alpha": (png(8, 6, [*RED, 255, *RED, 0, *RED, 51]), [RED, WHITE, [244, 206, 208]]),
    "RGB with alpha, 16 bits": (png(16, 6, [*(257 * c for c in RED), 0]), [WHITE]),
    "palette": (png(8, 3, [0, 1], None, PALETTE), [RED, BLUE]),
    "palette of 2 bits, transparent": (png(2, 3, [0, 1, 2], [255, 0], PALETTE), [RED, WHITE, [0] * 3]),
    "palette, half transparent": (png(8, 3, [1, 0], [51], PALETTE), [BLUE, [244, 206, 208]]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_png_becomes_what_a_viewer_shows(kind: str, tmp_path: Path) -> None:
    content, expected = KINDS[kind]
    (tmp_path / "a.png").write_bytes(content)
    assert np.asarray(read_image(tmp_path / "a.png"))[0].tolist() == expected


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("L", "jpg"), ("RGB", "jpg"), ("CMYK", "jpg"), ("L", "webp"), ("RGB", "webp"), ("RGBA", "webp"), ("P", "webp")],
)
def test_every_mode_of_the_other_formats_keeps_its_colour(mode: str, kind: str, tmp_path: Path) -> None:
    image = Image.new("RGB", (16, 16), (0, 204, 0)).convert(mode)
    image.save(tmp_path / f"a.{kind}", **({"lossless": True} if kind == "webp" else {"quality": 100}))
    found = np.asarray(read_image(tmp_path / f"a.{kind}")).astype(int)
    assert np.abs(found - np.asarray(image.convert("RGB"))).max() <= (3 if kind == "jpg" else 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_and_mirrored_as_its_exif_says(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    turned = {
        1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1], 5: pixels.transpose(1, 0, 2),
        6: np.rot90(pixels, -1), 7: pixels[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(pixels),
    }  # fmt: skip
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png")), turned[orientation])
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(tmp_path / "wide.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / "wide.png"))[..., 0], turned[orientation][..., 0])


def test_damaged_images_are_named(tmp_path: Path) -> None:
    noise(64, 64).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    stream = io.BytesIO()
    noise(64, 64).save(stream, "PNG")
    content = stream.getvalue()
    header = content[12:16] + bytes(4) + content[20:29]
    no_width = content[:16] + bytes(4) + content[20:29] + struct.pack(">I", zlib.crc32(header)) + content[33:]
    for name, damaged, match in [
        ("truncated.jpg", whole[: len(whole) // 2], "truncated"),
        ("truncated.png", content[: len(content) // 2], "OSError"),
        ("broken.png", content[:60] + bytes(40) + content[100:], "broken data stream"),
        ("no_width.png", no_width, "Error"),
        ("empty.png", b"", "UnidentifiedImageError"),
        ("text.png", b"not an image", "UnidentifiedImageError"),
        ("postscript.png", b"%!PS-Adobe-3.0 EPSF-3.0\n", "UnidentifiedImageError"),
    ]:
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(DataError, match=rf"{re.escape(name)} cannot be read as an image: (.|\n)*{match}"):
            read_image(tmp_path / name)
    with pytest.raises(DataError, match="is missing"):
        read_image(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(DataError, match="no regular file"):
        read_image(tmp_path / "pipe.png")


def test_animations_are_refused_and_second_views_are_not(tmp_path: Path) -> None:
    frames = [noise(16, 16), Image.new("RGB", (16, 16), tuple(RED))]
    for name in ("a.png", "a.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        with pytest.raises(DataError, match="has 2 frames"):
            read_image(tmp_path / name)
    frames[1].save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=frames[:1], quality=100)
    assert np.abs(np.asarray(read_image(tmp_path / "a.jpg")).astype(int) - RED).max() <= 3


def test_decompression_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise(64, 64).save(tmp_path / "a.png")
    noise(512, 2).save(tmp_path / "long.png")
    for limit, kind in [(3000, "DecompressionBombWarning"), (1000, "DecompressionBombError")]:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(DataError, match=kind):
            read_image(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    assert read_square(tmp_path / "a.png", 16).shape == (3, 16, 16)
    with pytest.raises(DataError, match="512x2 pixels become 65536 when the shorter side is 16"):
        read_square(tmp_path / "long.png", 16)


# --- crops


def test_a_crop_halves_by_box_means_then_cuts_the_middle(tmp_path: Path) -> None:
    image = noise(64, 32)
    pixels = np.asarray(image).astype(np.float64)
    halved = (pixels[::2, ::2] + pixels[1::2, ::2] + pixels[::2, 1::2] + pixels[1::2, 1::2]) / 4
    image.save(tmp_path / "a.png")
    found = read_square(tmp_path / "a.png", 16)
    assert found.dtype == torch.uint8
    assert np.abs(found.permute(1, 2, 0).numpy() - halved[:, 8:24]).max() <= 1  # rounded after each direction


@pytest.mark.parametrize(
    ("width", "height", "scaled", "left", "top"), [(40, 30, (21, 16), 2, 0), (8, 12, (16, 24), 0, 4)]
)
def test_a_crop_scales_the_shorter_side_bicubically(
    width: int, height: int, scaled: tuple[int, int], left: int, top: int
) -> None:
    image = noise(width, height)
    expected = np.asarray(image.resize(scaled, Image.Resampling.BICUBIC))[top : top + 16, left : left + 16]
    assert np.array_equal(np.asarray(centre_crop(image, 16)), expected)


# --- writing


def test_pixels_follow_the_rule() -> None:
    grey = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.999, 1.0]).reshape(1, 1, 1, 6)
    assert to_uint8(grey)[0, 0, :, 0].tolist() == [0, 0, 64, 128, 255, 255]
    colour = torch.tensor([-1.0, 0.0, 1.0]).reshape(1, 3, 1, 1)
    assert to_uint8(colour).tolist() == [[[[0, 128, 255]]]]
    with pytest.raises(Mistake, match=r"one channel or three(.|\n)*Found: \(2, 4, 8, 8\)"):
        to_uint8(torch.zeros(2, 4, 8, 8))


def test_tiles_lie_row_by_row_with_white_between() -> None:
    images = np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1) * np.ones((1, 2, 1, 3), np.uint8)
    w = 255
    expected = [[0, w, 1], [0, w, 1], [w, w, w], [2, w, w], [2, w, w]]
    assert tile(images, columns=2)[..., 0].tolist() == expected
    assert tile(torch.from_numpy(images) / 255, 2, gap=3).shape == (7, 5, 3)
    assert tile(torch.from_numpy(images) / 255, 2).max() == 1


def test_a_png_that_is_replaced_is_always_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Image.Image, path: Path, **settings: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", broken)
    with pytest.raises(KeyboardInterrupt):
        write_png(np.zeros((2, 2, 3), np.uint8), tmp_path / "000000.png")
    assert not (tmp_path / "000000.png").exists()
