"""Images on disk: which files are some, every kind to the pixels that a viewer shows, sets, and whole PNGs."""

import io
import os
import re
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from common.data_files import DataError
from common.images import ImageSet, centre_crop, find_images, image_batches, read_image, tile, to_uint8, write_png
from common.options import Mistake
from PIL import Image

RED, BLUE, WHITE = [200, 10, 20], [10, 20, 200], [255, 255, 255]


def noise(width: int, height: int) -> Image.Image:
    pixels = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


# --- files


def test_images_are_found_at_any_depth_and_the_rest_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("b/2.png", "b/10.JPEG", "a/deep/x.webp", "a/.hidden/y.png", "a/notes.txt", "b/._2.png", "other/0.png"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).touch()
    (tmp_path / "set/other").rename(tmp_path / "other")
    folder = tmp_path / "set"
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    for name, target in {
        "gone.png": "nowhere.png", "a/deep/loop": "set", "a/itself": "set/a", "link.png": "set/b/2.png", "c": "other",
    }.items():  # fmt: skip
        (folder / name).symlink_to(tmp_path / target)
    assert find_images(folder) == ["a/deep/x.webp", "b/10.JPEG", "b/2.png", "c/0.png", "link.png"]
    assert "7 entries are no images and are skipped, such as a/.hidden/" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"There is no folder .*nowhere"):
        find_images(tmp_path / "nowhere")


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
    "1 bit, a transparent grey": (png(1, 0, [0, 1], [0]), [WHITE, WHITE]),
    "1 bit, a transparent white": (png(1, 0, [0, 1], [1]), [[0] * 3, WHITE]),
    "2 bits": (png(2, 0, [0, 1, 3]), [[0] * 3, [85] * 3, WHITE]),
    "8 bits, a transparent grey": (png(8, 0, [7, 100], [100]), [[7] * 3, WHITE]),
    "16 bits": (png(16, 0, [0, 257, 30000, 65535]), [[0] * 3, [1] * 3, [117] * 3, WHITE]),
    "grey with alpha": (png(8, 4, [100, 255, 100, 0, 0, 128]), [[100] * 3, WHITE, [127] * 3]),
    "grey with alpha, 16 bits": (png(16, 4, [25700, 65535, 25700, 0]), [[100] * 3, WHITE]),
    "RGB, a transparent colour": (png(8, 2, [*RED, *BLUE], BLUE), [RED, WHITE]),
    "RGB, 16 bits": (png(16, 2, [257 * c for c in RED]), [RED]),
    "RGB with alpha": (png(8, 6, [*RED, 255, *RED, 0, *RED, 51]), [RED, WHITE, [244, 206, 208]]),
    "palette of 2 bits, transparent": (png(2, 3, [0, 1, 2], [255, 0], PALETTE), [RED, WHITE, [0] * 3]),
    "palette, half transparent": (png(8, 3, [1, 0], [51], PALETTE), [BLUE, [244, 206, 208]]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_png_becomes_what_a_viewer_shows(kind: str, tmp_path: Path) -> None:
    content, expected = KINDS[kind]
    (tmp_path / "a.png").write_bytes(content)
    assert np.asarray(read_image(tmp_path / "a.png"))[0].tolist() == expected


@pytest.mark.parametrize(("mode", "kind"), [("L", "jpg"), ("CMYK", "jpg"), ("RGB", "webp"), ("RGBA", "webp")])
def test_the_other_formats_keep_their_colour(mode: str, kind: str, tmp_path: Path) -> None:
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


def test_what_is_no_whole_image_is_named(tmp_path: Path) -> None:
    noise(64, 64).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    stream = io.BytesIO()
    noise(64, 64).save(stream, "PNG")
    content = stream.getvalue()
    frames = [noise(16, 16), Image.new("RGB", (16, 16), tuple(RED))]
    frames[0].save(tmp_path / "film.webp", save_all=True, append_images=frames[1:])
    for name, damaged, match in [
        ("truncated.jpg", whole[: len(whole) // 2], "truncated"),
        ("broken.png", content[:60] + bytes(40) + content[100:], "broken data stream"),
        ("empty.png", b"", "UnidentifiedImageError"),
        ("postscript.png", b"%!PS-Adobe-3.0 EPSF-3.0\n", "UnidentifiedImageError"),
        ("film.webp", (tmp_path / "film.webp").read_bytes(), "has 2 frames"),
        ("2-bits.png", png(2, 0, [0, 1, 3], [1]), "in other than 8 bits: save it with an alpha channel"),
        ("16-bits.png", png(16, 0, [0, 1000], [1000]), "in other than 8 bits"),
        ("colour-of-16-bits.png", png(16, 2, [1000, 9, 9], [1000, 9, 9]), "in other than 8 bits"),
    ]:
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(DataError, match=rf"{re.escape(name)} cannot be read as an image: (.|\n)*{match}"):
            read_image(tmp_path / name)
    frames[1].save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=frames[:1], quality=100)  # a second view
    assert np.abs(np.asarray(read_image(tmp_path / "a.jpg")).astype(int) - RED).max() <= 3


# --- crops


def test_batches_of_crops_keep_the_places_and_name_what_is_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["a.png", "bad.png", "long.png", "c.png"]
    for name, size in zip(names, [(16, 16), (16, 16), (512, 2), (16, 24)], strict=True):
        noise(*size).save(tmp_path / name)
    (tmp_path / "bad.png").write_bytes(b"")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)  # above which Pillow takes an image for a bomb
    first, second = image_batches(tmp_path, names, [[3, 1], [2, 0]], size=16, workers=0)
    assert (first.rows, second.rows) == ([3], [0])
    for batch, image in [(first, noise(16, 24).crop((0, 4, 16, 20))), (second, noise(16, 16))]:
        assert batch.pixels.dtype == torch.uint8
        assert np.array_equal(batch.pixels[0].permute(1, 2, 0).numpy(), np.asarray(image))
    assert first.bad[0][0] == "bad.png"
    assert "UnidentifiedImageError" in first.bad[0][1]
    assert "16x4096 pixels, when scaled, are beyond" in second.bad[0][1]
    for limit in (200, 100):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(DataError, match="DecompressionBomb"):
            read_image(tmp_path / "a.png")


def test_a_crop_halves_by_box_means_then_cuts_the_middle() -> None:
    image = noise(64, 32)
    pixels = np.asarray(image).astype(np.float64)
    halved = (pixels[::2, ::2] + pixels[1::2, ::2] + pixels[::2, 1::2] + pixels[1::2, 1::2]) / 4
    found = np.asarray(centre_crop(image, 16))
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


# --- writing


def test_pixels_follow_the_rule() -> None:
    grey = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.999, 1.0]).reshape(1, 1, 1, 6)
    assert to_uint8(grey)[0, 0, :, 0].tolist() == [0, 0, 64, 128, 255, 255]
    colour = torch.tensor([-1.0, 0.0, 1.0]).reshape(1, 3, 1, 1)
    assert to_uint8(colour).tolist() == [[[[0, 128, 255]]]]
    with pytest.raises(Mistake, match=r"Found: \(2, 4, 8, 8\)"):
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


# --- sets


IMAGES = np.random.default_rng(0).integers(256, size=(5, 4, 6, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", [1, 2, 9])
def test_folders_and_npz_give_the_images_in_order(tmp_path: Path, size: int) -> None:
    (tmp_path / "set/images").mkdir(parents=True)
    for i, image in enumerate(IMAGES):
        write_png(image, tmp_path / f"set/images/{i:06d}.png")
    np.savez(tmp_path / "set.npz", IMAGES)
    np.savez_compressed(tmp_path / "compressed.npz", IMAGES)
    for source in [ImageSet(tmp_path / name) for name in ("set", "set/images", "set.npz", "compressed.npz")]:
        for _ in range(2):
            batches = list(source.batches(size))
            assert len(source) == 5
            assert max(len(batch) for batch in batches) == min(size, 5)
            assert torch.equal(torch.cat(batches), torch.from_numpy(IMAGES).permute(0, 3, 1, 2))
    write_png(IMAGES[0, :3], tmp_path / "set/images/000003.png")
    with pytest.raises(DataError, match=r"images of a set have one size(.|\n)*\(6, 4\), and \(6, 3\) of .*000003.png"):
        list(ImageSet(tmp_path / "set").batches(2))


def test_what_holds_no_images_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(2))
    np.savez(tmp_path / "floats.npz", IMAGES / 255)
    np.savez(tmp_path / "flipped.npz", IMAGES)
    content = bytearray((tmp_path / "flipped.npz").read_bytes())
    content[200] ^= 1  # one pixel: the archive's checksum tells
    (tmp_path / "flipped.npz").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "lying.npz", "w") as archive, archive.open("arr_0.npy", "w") as stream:
        header = {"descr": "|u1", "fortran_order": False, "shape": (10**9, 256, 256, 3)}
        np.lib.format.write_array_header_1_0(stream, header)
        stream.write(IMAGES.tobytes())
    for name, match in [
        ("nowhere", "There are no images at .*nowhere"),
        ("statistics.npz", "KeyError: 'arr_0"),
        ("floats.npz", r"uint8 \(N, H, W, 3\).*; it is float64 \(5, 4, 6, 3\)"),
        ("flipped.npz", "flipped.npz cannot be read as images in an .npz: BadZipFile"),
        ("lying.npz", "lying.npz cannot be read as images in an .npz: "),
    ]:
        with pytest.raises(DataError, match=match):
            list(ImageSet(tmp_path / name).batches(2))
