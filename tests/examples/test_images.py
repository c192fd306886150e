"""Images on disk: which files are some, every kind to the pixels that a viewer shows, sets, and whole PNGs."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common.data_files import DataError
from common.images import ImageSet, centre_crop, find_images, image_batches, read_image, tile, to_uint8, write_png
from common.options import Mistake
from PIL import Image

RED, BLUE, WHITE, BLACK = [200, 10, 20], [10, 20, 200], [255] * 3, [0] * 3


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8))


def test_images_are_found_at_any_depth_and_the_rest_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "set"
    names = ("set/b/2.png", "set/b/10.JPEG", "set/a/deep/x.webp", "set/a/.hidden/y.png", "set/b/._2.png", "other/0.png")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    for name, target in {
        "gone.png": "nowhere.png", "a/deep/loop": "set", "a/itself": "set/a", "link.png": "set/b/2.png", "c": "other",
    }.items():  # fmt: skip
        (folder / name).symlink_to(tmp_path / target)
    assert find_images(folder) == ["a/deep/x.webp", "b/10.JPEG", "b/2.png", "c/0.png", "link.png"]
    assert "6 entries are no images and are skipped, such as a/.hidden/" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"There is no folder .*nowhere"):
        find_images(tmp_path / "nowhere")


def of(pixels: object) -> Image.Image:
    return Image.fromarray(np.asarray(pixels, np.uint8)[None])


PALETTE = of([1, 0]).convert("P")
PALETTE.putpalette([*RED, *BLUE])
WIDE = Image.fromarray(np.array([[0, 257, 30000, 65535]], np.uint16))
ORANGE = Image.new("RGB", (16, 16), (250, 130, 0))
KINDS: dict[str, tuple[Image.Image, dict[str, Any], list[list[int]]]] = {  # how it is saved, and what a viewer shows
    "png: 1 bit": (of([0, 255]).convert("1"), {"transparency": 0}, [WHITE, WHITE]),
    "png: a transparent grey": (of([7, 100]), {"transparency": 100}, [[7] * 3, WHITE]),
    "png: 16 bits": (WIDE, {}, [BLACK, [1] * 3, [117] * 3, WHITE]),
    "png: grey with alpha": (of([[100, 255], [100, 0], [0, 128]]), {}, [[100] * 3, WHITE, [127] * 3]),
    "png: a transparent colour": (of([RED, BLUE]), {"transparency": tuple(BLUE)}, [RED, WHITE]),
    "png: with alpha": (of([[*RED, 255], [*RED, 0], [*RED, 51]]), {}, [RED, WHITE, [244, 206, 208]]),
    "png: palette": (PALETTE, {"transparency": b"\x33"}, [BLUE, [244, 206, 208]]),
    "webp: with alpha": (of([[*RED, 255], [*RED, 51]]), {"lossless": True}, [RED, [244, 206, 208]]),
    "jpeg: CMYK": (ORANGE.convert("CMYK"), {"quality": 100}, [[250, 130, 0]] * 16),
    "mpo: two views": (
        ORANGE,
        {"quality": 100, "save_all": True, "append_images": [noise(9, 9)]},
        [[250, 130, 0]] * 16,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_becomes_what_a_viewer_shows(kind: str, tmp_path: Path) -> None:
    image, saved, expected = KINDS[kind]
    image.save(tmp_path / "a", kind.partition(":")[0], **saved)
    found = np.asarray(read_image(tmp_path / "a"))[0].astype(int)
    assert np.abs(found - expected).max() <= (3 if kind[0] in "jm" else 0)  # JPEG rounds


def test_an_image_is_turned_and_mirrored_as_its_exif_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 7
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    expected = pixels[::-1, ::-1].transpose(1, 0, 2)
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png")), expected)
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(tmp_path / "wide.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / "wide.png"))[..., 0], expected[..., 0])


def test_what_is_no_whole_image_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def saved(image: Image.Image, kind: str, **more: object) -> bytes:
        image.save(stream := io.BytesIO(), kind, **more)
        return stream.getvalue()

    whole, broken = saved(noise(64, 64), "jpeg"), saved(noise(64, 64), "png")
    for content, match in [
        (whole[: len(whole) // 2], "truncated"),
        (broken[:60] + bytes(40) + broken[100:], "broken data stream"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "UnidentifiedImageError"),
        (saved(ORANGE, "webp", save_all=True, append_images=[noise(16, 16)]), "has 2 frames"),
        (saved(WIDE, "png", transparency=257), "in other than 8 bits: save it with an alpha channel"),
    ]:
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(DataError, match=rf"a.png cannot be read as an image: (.|\n)*{match}"):
            read_image(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(whole)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)  # above which Pillow warns of a bomb
    with pytest.raises(DataError, match="DecompressionBomb"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_of_crops_keep_the_places_and_name_what_is_bad(workers: int, tmp_path: Path) -> None:
    names = ["a.png", "bad.png", "c.png"]
    noise(16, 16).save(tmp_path / "a.png")
    (tmp_path / "bad.png").write_bytes(b"")
    noise(16, 24).save(tmp_path / "c.png")
    first, second, third = image_batches(tmp_path, names, [[2, 1, 0], [1], [0]], size=16, workers=workers)
    assert (first.rows, second.rows, third.rows) == ([2, 0], [], [0])
    assert (first.pixels.dtype, second.pixels.shape, third.bad) == (torch.uint8, (0, 3, 16, 16), [])
    for pixels, image in zip(first.pixels, [noise(16, 24).crop((0, 4, 16, 20)), noise(16, 16)], strict=True):
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(image))
    for ((name, reason),) in (first.bad, second.bad):
        assert name == "bad.png"
        assert "UnidentifiedImageError" in reason


def test_a_crop_halves_by_box_means_then_cuts_the_middle() -> None:
    image = noise(64, 32)
    pixels = np.asarray(image).astype(np.float64)
    halved = (pixels[::2, ::2] + pixels[1::2, ::2] + pixels[::2, 1::2] + pixels[1::2, 1::2]) / 4
    found = np.asarray(centre_crop(image, 16))
    assert np.abs(found - halved[:, 8:24]).max() <= 1  # rounded after each direction


def test_a_crop_scales_the_shorter_side_bicubically() -> None:
    for image, scaled, box in [(noise(40, 30), (21, 16), (2, 0, 18, 16)), (noise(8, 12), (16, 24), (0, 4, 16, 20))]:
        expected = image.resize(scaled, Image.Resampling.BICUBIC).crop(box)
        assert np.array_equal(np.asarray(centre_crop(image, 16)), np.asarray(expected))


def test_pixels_follow_the_rule() -> None:
    grey = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.999, 1.0]).reshape(1, 1, 1, 6)
    assert to_uint8(grey)[0, 0, :, 0].tolist() == [0, 0, 64, 128, 255, 255]
    assert to_uint8(torch.tensor([-1.0, 0.0, 1.0]).reshape(1, 3, 1, 1)).tolist() == [[[[0, 128, 255]]]]
    with pytest.raises(Mistake, match=r"Found: \(2, 4, 8, 8\)"):
        to_uint8(torch.zeros(2, 4, 8, 8))


def test_tiles_lie_row_by_row_with_white_between() -> None:
    images = np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1) * np.ones((1, 2, 1, 3), np.uint8)
    w = 255
    assert tile(images, columns=2)[..., 0].tolist() == [[0, w, 1], [0, w, 1], [w, w, w], [2, w, w], [2, w, w]]
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


IMAGES = np.random.default_rng(0).integers(256, size=(5, 4, 6, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", [2, 9])
def test_folders_and_npz_give_the_images_in_order(tmp_path: Path, size: int) -> None:
    (tmp_path / "set/images").mkdir(parents=True)
    for i, image in enumerate(IMAGES):
        write_png(image, tmp_path / f"set/images/{i:06d}.png")
    np.savez_compressed(tmp_path / "set.npz", IMAGES)
    for source in [ImageSet(tmp_path / name) for name in ("set", "set/images", "set.npz")]:
        for _ in range(2):
            batches = list(source.batches(size))
            assert (len(source), max(map(len, batches))) == (5, min(size, 5))
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
    for name, match in [
        ("nowhere", "There are no images at .*nowhere"),
        ("statistics.npz", "KeyError: 'arr_0"),
        ("floats.npz", r"uint8 \(N, H, W, 3\).*; it is float64 \(5, 4, 6, 3\)"),
        ("flipped.npz", "flipped.npz cannot be read as images in an .npz: BadZipFile"),
    ]:
        with pytest.raises(DataError, match=match):
            list(ImageSet(tmp_path / name).batches(2))
