"""Every rule by which a file becomes a picture of the run's size, or is rejected with its reason."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.pictures import decoded, encoded, noise
from workflows.config import DataSettings
from workflows.data.pictures import EXTENSIONS, FORMATS, Picture, Rejected, prepare

SIDE = 8
SETTINGS = DataSettings(image_size=(SIDE, SIDE), min_side=4)
WHITE, BLUE = (255, 255, 255), (0, 0, 255)


def pixels(content: bytes, seg: bytes | None = None, **changes: Any) -> np.ndarray[Any, Any]:
    """(H, W, 3) what the file becomes."""
    found = decoded(prepare(content, seg, SETTINGS.model_copy(update=changes)).png)
    assert found.dtype == np.uint8 and found.shape[2:] == (3,), "always RGB, whatever came in"
    return found


def flat(mode: str, color: Any, kind: str = "PNG", **options: Any) -> bytes:
    """A file of one colour, of the run's size."""
    return encoded(Image.new(mode, (SIDE, SIDE), color), kind, **options)


def png(width: int, height: int, rows: bytes, *, bits: int = 8, colour: int = 0, more: bytes = b"") -> bytes:
    """A PNG written by hand; `rows` is what its data chunk holds before compression."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + more + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


# ---- colours ----


def test_a_lossless_rgb_picture_of_the_right_size_keeps_every_pixel() -> None:
    for kind in ("PNG", "BMP", "TIFF", "PPM", "TGA"):
        image = noise(1, SIDE, SIDE)
        np.testing.assert_array_equal(pixels(encoded(image, kind)), np.asarray(image))


@pytest.mark.parametrize(
    ("content", "rgb"),
    [
        (flat("L", 77), (77, 77, 77)),
        (flat("1", 1), (255, 255, 255)),
        (flat("RGB", (1, 2, 3)), (1, 2, 3)),
        (flat("CMYK", (255, 0, 0, 0), "TIFF"), (0, 255, 255)),
        (flat("CMYK", (0, 0, 0, 255), "TIFF"), (0, 0, 0)),
        (flat("I;16", 65535), (255, 255, 255)),
        (flat("I;16", 257 * 100), (100, 100, 100)),
        (flat("I;16", 257 * 100 + 128), (100, 100, 100)),
        (flat("I;16", 257 * 100 + 129), (101, 101, 101)),
        (flat("I", 257 * 9, "TIFF"), (9, 9, 9)),
        (flat("F", 0.5, "TIFF"), (128, 128, 128)),
        (flat("F", 1.0, "TIFF"), (255, 255, 255)),
        (flat("F", 200.0, "TIFF"), (200, 200, 200)),
        (flat("F", 300.0, "TIFF"), (255, 255, 255)),
        (flat("F", -1.0, "TIFF"), (0, 0, 0)),
        (flat("F", float("nan"), "TIFF"), (0, 0, 0)),
    ],
)
def test_every_mode_becomes_rgb(content: bytes, rgb: tuple[int, int, int]) -> None:
    np.testing.assert_array_equal(pixels(content), np.full((SIDE, SIDE, 3), rgb))


def test_a_cmyk_jpeg_keeps_its_colour() -> None:
    np.testing.assert_allclose(
        pixels(flat("CMYK", (255, 0, 0, 0), "JPEG")), np.full((SIDE, SIDE, 3), (0, 255, 255)), atol=2
    )


def test_a_palette_is_looked_up() -> None:
    image = noise(2, SIDE, SIDE).quantize(4)
    np.testing.assert_array_equal(pixels(encoded(image)), np.asarray(image.convert("RGB")))


def test_sixteen_bits_a_channel_are_read_as_eight() -> None:
    rows = (b"\0" + struct.pack(">HHH", 65535, 257 * 100, 0) * SIDE) * SIDE
    np.testing.assert_array_equal(
        pixels(png(SIDE, SIDE, rows, bits=16, colour=2)), np.full((SIDE, SIDE, 3), (255, 100, 0))
    )


# ---- transparency ----


@pytest.mark.parametrize(
    ("content", "rgb"),
    [
        (flat("RGBA", (255, 0, 0, 255)), (255, 0, 0)),
        (flat("RGBA", (255, 0, 0, 128)), (128, 0, 127)),
        (flat("LA", (100, 255)), (100, 100, 100)),
        (flat("LA", (0, 51)), (0, 0, 204)),
        (flat("RGBA", (255, 0, 0, 128), "WEBP", lossless=True), (128, 0, 127)),
    ],
)
def test_transparency_is_laid_on_the_background(content: bytes, rgb: tuple[int, int, int]) -> None:
    np.testing.assert_allclose(pixels(content, background=BLUE), np.full((SIDE, SIDE, 3), rgb), atol=1)


def half_transparent(kind: str) -> bytes:
    """The left half is red, the right one transparent by the file's own means."""
    image = Image.new("P", (SIDE, SIDE), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.paste(1, (SIDE // 2, 0, SIDE, SIDE))
    if kind == "RGB":  # one colour that counts as transparent
        return encoded(image.convert("RGB"), transparency=(0, 255, 0))
    return encoded(image, kind, transparency=1)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "RGB"])
def test_a_transparent_colour_shows_the_background(kind: str) -> None:
    found = pixels(half_transparent(kind), background=BLUE)
    np.testing.assert_array_equal(found[:, : SIDE // 2], np.full((SIDE, SIDE // 2, 3), (255, 0, 0)))
    np.testing.assert_array_equal(found[:, SIDE // 2 :], np.full((SIDE, SIDE // 2, 3), BLUE))


def test_white_is_behind_transparency_unless_the_settings_say_otherwise() -> None:
    np.testing.assert_array_equal(pixels(half_transparent("PNG"))[:, SIDE // 2 :], np.full((SIDE, SIDE // 2, 3), WHITE))


@pytest.mark.parametrize("content", [flat("RGBA", (9, 9, 9, 0)), flat("LA", (9, 0)), flat("P", 0, transparency=0)])
def test_a_fully_transparent_picture_is_rejected(content: bytes) -> None:
    with pytest.raises(Rejected, match=r"^empty: fully transparent$"):
        pixels(content)


# ---- animations and orientation ----


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_an_animation_counts(kind: str) -> None:
    frames = [Image.new("RGB", (SIDE, SIDE), color) for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(pixels(content), np.full((SIDE, SIDE, 3), (255, 0, 0)))


# What the eye sees of an array stored under each EXIF orientation (EXIF 2.3, tag 0x0112).
SEEN: dict[int, Callable[[Any], Any]] = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].transpose(1, 0, 2),
    8: lambda stored: np.rot90(stored, 1),
}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(orientation: int) -> None:
    stored = noise(3, 6, 4)
    exif = Image.Exif()
    exif[0x0112] = orientation
    seen = SEEN[orientation](np.asarray(stored))
    np.testing.assert_array_equal(pixels(encoded(stored, exif=exif), image_size=seen.shape[:2]), seen)


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"\0"])
def test_a_damaged_exif_block_is_ignored(exif: bytes) -> None:
    image = Image.new("RGB", (SIDE, SIDE), (200, 10, 10))
    np.testing.assert_array_equal(pixels(encoded(image, "JPEG", exif=exif)), pixels(encoded(image, "JPEG")))


# ---- geometry ----


def striped(width: int, height: int, band: int) -> Image.Image:
    """White, with black bands of `band` pixels at both ends of the longer side."""
    image = Image.new("RGB", (width, height), "white")
    horizontal = width > height
    for box in (
        (0, 0, band, height) if horizontal else (0, 0, width, band),
        (width - band, 0, width, height) if horizontal else (0, height - band, width, height),
    ):
        image.paste((0, 0, 0), box)
    return image


@pytest.mark.parametrize(("width", "height"), [(64, 16), (16, 64)])
def test_crop_keeps_the_largest_centred_window(width: int, height: int) -> None:
    # The bands end 8 pixels before the window: Lanczos looks 6 pixels over its edge.
    found = pixels(encoded(striped(width, height, 16)), resize="crop")
    np.testing.assert_array_equal(found, np.full((SIDE, SIDE, 3), 255))


@pytest.mark.parametrize(("width", "height"), [(32, 16), (16, 32)])
def test_pad_keeps_everything_on_the_background(width: int, height: int) -> None:
    found = pixels(encoded(Image.new("RGB", (width, height), (9, 9, 9))), resize="pad", background=BLUE)
    found = found if width > height else found.transpose(1, 0, 2)
    np.testing.assert_array_equal(found[2:6], np.full((4, SIDE, 3), 9))
    np.testing.assert_array_equal(found[[0, 1, 6, 7]], np.full((4, SIDE, 3), BLUE))


def test_stretch_ignores_the_aspect_ratio() -> None:
    image = Image.new("RGB", (32, 16), (255, 0, 0))
    image.paste((0, 0, 255), (16, 0, 32, 16))
    found = pixels(encoded(image), resize="stretch")
    np.testing.assert_array_equal(found[:, 0], np.full((SIDE, 3), (255, 0, 0)))
    np.testing.assert_array_equal(found[:, -1], np.full((SIDE, 3), (0, 0, 255)))


@pytest.mark.parametrize("resize", ["crop", "pad", "stretch"])
def test_the_result_has_the_height_and_width_asked_for_whatever_comes_in(resize: str) -> None:
    for width, height in ((5, 5), (40, 40), (900, 4), (4, 900), (31, 17)):
        found = pixels(encoded(Image.new("RGB", (width, height), (9, 9, 9))), resize=resize, image_size=(8, 16))
        assert found.shape == (8, 16, 3)


def test_shrinking_is_antialiased() -> None:
    checkers = np.indices((8 * SIDE, 8 * SIDE)).sum(0) % 2 * 255
    found = pixels(encoded(Image.fromarray(checkers.astype(np.uint8))))
    np.testing.assert_allclose(found, 127.5, atol=6)


# ---- rejections ----


def test_a_file_without_bytes_or_that_is_not_there_is_rejected() -> None:
    with pytest.raises(Rejected, match=r"^empty: the file has no bytes$"):
        prepare(b"", None, SETTINGS)
    with pytest.raises(Rejected, match=r"^unreadable: the source has no bytes for it$"):
        prepare(None, None, SETTINGS)


@pytest.mark.parametrize(
    "content", [b"no picture", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"%PDF-1.4", b"%!PS-Adobe-3.0 EPSF-3.0\n"]
)
def test_what_is_no_picture_in_a_known_format_is_rejected(content: bytes) -> None:
    with pytest.raises(Rejected, match=r"^unreadable: "):
        pixels(content)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000"])
def test_a_file_that_is_cut_off_is_rejected(kind: str) -> None:
    content = encoded(noise(4, 64, 64), kind)
    with pytest.raises(Rejected, match=r"^(truncated|unreadable): "):
        pixels(content[: len(content) // 2])


def test_a_truncated_jpeg_is_called_truncated() -> None:
    content = encoded(noise(4, 64, 64), "JPEG")
    with pytest.raises(Rejected, match=r"^truncated: image file is truncated"):
        pixels(content[:-200])


def test_damaged_data_is_rejected() -> None:
    content = bytearray(encoded(noise(4, 64, 64)))
    content[200:220] = bytes(20)
    with pytest.raises(Rejected, match=r"^(truncated|unreadable): "):
        pixels(bytes(content))


def test_a_side_below_the_smallest_is_rejected() -> None:
    assert pixels(encoded(noise(5, 4, 40))).shape == (SIDE, SIDE, 3)
    for width, height in ((3, 40), (40, 3)):
        with pytest.raises(Rejected, match=rf"^too small: {width} x {height} is shorter than 4 pixels$"):
            pixels(encoded(noise(5, width, height)))


def test_more_pixels_than_allowed_are_rejected() -> None:
    assert pixels(encoded(noise(5, 10, 10)), max_pixels=100).shape == (SIDE, SIDE, 3)
    with pytest.raises(Rejected, match=r"^too large: 10 x 11 has more than 100 pixels$"):
        pixels(encoded(noise(5, 10, 11)), max_pixels=100)


def test_a_decompression_bomb_is_rejected_from_its_header() -> None:
    # Its data are 10 bytes, so decoding them would end as "truncated": only the header can have been read.
    with pytest.raises(Rejected, match=r"^too large: 60000 x 60000 has more than 50000000 pixels$"):
        pixels(png(60_000, 60_000, bytes(10)))


def test_a_bomb_inside_an_icon_is_not_inflated() -> None:
    inner = encoded(Image.new("L", (4_000, 4_000)))
    icon = struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inner), 22) + inner
    with pytest.raises(Rejected, match=r"^unreadable: not a picture in a known format$"):
        pixels(icon, max_pixels=1_000)
    assert "ICO" not in FORMATS, "Pillow inflates the pictures inside an icon when it opens it"


def test_the_limit_on_pixels_is_ours_and_pillows_own_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert prepare(encoded(noise(6, 10, 10)), None, SETTINGS).png
    assert Image.MAX_IMAGE_PIXELS == 10


def test_formats_that_start_programs_are_not_opened() -> None:
    assert {"PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000"} <= set(FORMATS)
    assert not {"EPS", "PDF", "WMF", "MPEG"} & set(FORMATS)
    assert {".png", ".jpg", ".jpeg", ".webp", ".gif", ".tif", ".jp2"} <= EXTENSIONS
    assert not {".eps", ".pdf", ".ico", ".txt"} & EXTENSIONS


# ---- label maps ----


def labels(width: int = 16, height: int = 16) -> np.ndarray[Any, Any]:
    """(H, W) classes 0, 7 and 200, in blocks that survive halving."""
    blocks = np.random.default_rng(0).choice([0, 7, 200], (height // 2, width // 2)).astype(np.uint8)
    return blocks.repeat(2, 0).repeat(2, 1)


@pytest.mark.parametrize("mode", ["L", "P"])
def test_a_label_map_goes_through_the_same_geometry_without_mixing_labels(mode: str) -> None:
    image = Image.fromarray(labels())
    if mode == "P":
        image.putpalette(bytes(range(256)) * 3)
    found = prepare(encoded(noise(7)), encoded(image), SETTINGS)
    assert found.seg_png is not None
    np.testing.assert_array_equal(decoded(found.seg_png), labels()[::2, ::2])


@pytest.mark.parametrize("resize", ["crop", "pad"])
def test_a_label_map_is_cropped_and_padded_as_its_picture_is(resize: str) -> None:
    wide = labels(32, 16)
    expected = wide[::2, 8:24:2] if resize == "crop" else np.pad(wide[2::4, 2::4], ((2, 2), (0, 0)))
    settings = SETTINGS.model_copy(update={"resize": resize})
    found = prepare(encoded(noise(7, 32, 16)), encoded(Image.fromarray(wide)), settings)
    assert found.seg_png is not None
    np.testing.assert_array_equal(decoded(found.seg_png), expected)


def test_a_black_and_white_label_map_has_labels_zero_and_one() -> None:
    image = Image.new("1", (SIDE, SIDE), 1)
    image.putpixel((0, 0), 0)
    found = prepare(flat("RGB", WHITE), encoded(image), SETTINGS)
    assert found.seg_png is not None
    expected = np.ones((SIDE, SIDE), dtype=np.uint8)
    expected[0, 0] = 0
    np.testing.assert_array_equal(decoded(found.seg_png), expected)


@pytest.mark.parametrize(
    ("seg", "reason"),
    [
        (flat("RGB", WHITE), r"^label map: mode RGB, not one byte a pixel$"),
        (encoded(Image.new("L", (9, SIDE))), r"^label map: 9 x 8, not 8 x 8$"),
        (b"no picture", r"^label map: unreadable: not a picture in a known format$"),
        (b"", r"^label map: unreadable: "),
    ],
)
def test_a_label_map_that_does_not_fit_rejects_the_picture(seg: bytes, reason: str) -> None:
    with pytest.raises(Rejected, match=reason):
        prepare(flat("RGB", WHITE), seg, SETTINGS)


# ---- what comes back ----


def test_pictures_of_equal_pixels_have_equal_digests_whatever_their_files() -> None:
    image = noise(8, SIDE, SIDE)

    def digest(content: bytes) -> bytes:
        found: Picture = prepare(content, None, SETTINGS)
        assert len(found.digest) == 16
        return found.digest

    same = {digest(encoded(image)), digest(encoded(image, "BMP")), digest(encoded(image.convert("RGBA")))}
    assert len(same) == 1
    assert digest(encoded(ImageOps.mirror(image))) not in same


def test_the_same_file_gives_the_same_bytes() -> None:
    content = encoded(noise(9, 40, 30), "JPEG")
    assert prepare(content, None, SETTINGS) == prepare(content, None, SETTINGS)
