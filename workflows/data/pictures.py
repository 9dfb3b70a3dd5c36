"""One picture: from a file's bytes to RGB pixels of the run's size, or the reason why not. No Ray, no storage.

Rules, in order:

1. Rejected are empty files, what is no picture in a known format, pictures with more than `max_pixels` or a side below
   `min_side` (both read from the header, so that a decompression bomb is never inflated), files that are cut off or
   damaged, and pictures that are fully transparent.
2. Of an animation the first frame counts. The EXIF orientation is applied; a damaged EXIF block is ignored.
3. 16-bit greys are scaled to 8 bits, float greys are taken as 0 to 1 (0 to 255 when any value is above 1). Greys,
   palettes and CMYK become RGB. Transparency is laid on the background.
4. Resizing comes last, by Lanczos (antialiased when shrinking). `crop` keeps the largest centred window of the run's
   aspect ratio. Label maps go through the same geometry by nearest neighbour.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from workflows.config import DataSettings

# Only formats that Pillow decodes itself and whose header tells the size: others start programs (EPS), are containers
# (PDF), or hold pictures that are inflated on opening (ICO).
_WANTED = {"PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "TGA", "JPEG2000", "AVIF"}
_BY_EXTENSION = Image.registered_extensions()  # also loads the decoders, so that OPEN is complete
FORMATS = tuple(sorted(_WANTED & set(Image.OPEN)))
EXTENSIONS = frozenset(extension for extension, kind in _BY_EXTENSION.items() if kind in FORMATS)


class Rejected(Exception):  # noqa: N818 - an answer about one picture, not an error of the job
    """Why a picture is left out: a kind, and after a colon the details."""


@dataclass(frozen=True)
class Picture:
    """A picture of the run's size."""

    png: bytes
    """Lossless RGB."""
    seg_png: bytes | None
    """Label map, one byte a pixel."""
    digest: bytes
    """16 bytes: pictures of equal pixels have equal digests."""


def prepare(content: bytes | None, seg: bytes | None, settings: DataSettings) -> Picture:
    """A file's bytes as a picture of `settings.image_size`.

    Args:
        content: the file; None when it could not be read at all.
        seg: a file with the picture's label map, of the same size, if there is one.

    Raises:
        Rejected: with the reason.
    """
    image = _decoded(content, settings)
    seg_png = None
    if seg is not None:
        labels = _label_map(seg, settings)
        if labels.size != image.size:
            raise Rejected(f"label map: {labels.size[0]} x {labels.size[1]}, not {image.size[0]} x {image.size[1]}")
        seg_png = _png(_resized(labels, settings, Image.Resampling.NEAREST, 0))
    background = settings.background
    pixels = _resized(_flattened(image, background), settings, Image.Resampling.LANCZOS, background)
    return Picture(_png(pixels), seg_png, hashlib.blake2b(pixels.tobytes(), digest_size=16).digest())


@contextmanager
def _explained() -> Iterator[None]:
    """Pillow's many exceptions as a reason; its own size limit is off, because ours is checked on the header."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Rejected:
        raise
    except UnidentifiedImageError as error:
        raise Rejected("unreadable: not a picture in a known format") from error
    except Exception as error:  # decoders raise anything on damaged data
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        kind = "truncated" if "truncated" in reason.lower() else "unreadable"
        raise Rejected(f"{kind}: {reason}") from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _loaded(content: bytes, settings: DataSettings) -> Image.Image:
    """The first frame, decoded once its header has passed."""
    with _explained():
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        width, height = image.size
        if width * height > settings.max_pixels:
            raise Rejected(f"too large: {width} x {height} has more than {settings.max_pixels} pixels")
        if min(width, height) < settings.min_side:
            raise Rejected(f"too small: {width} x {height} is shorter than {settings.min_side} pixels")
        image.load()
        return image


def _decoded(content: bytes | None, settings: DataSettings) -> Image.Image:
    if content is None:
        raise Rejected("unreadable: the source has no bytes for it")
    if not content:
        raise Rejected("empty: the file has no bytes")
    image = _loaded(content, settings)
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the pixels are good, only the note about them is not
        return image


def _label_map(content: bytes, settings: DataSettings) -> Image.Image:
    """One byte a pixel: greys as they are, palettes by their index."""
    try:
        image = _loaded(content, settings)
    except Rejected as reason:
        raise Rejected(f"label map: {reason}") from reason
    if image.mode not in ("L", "P", "1"):
        raise Rejected(f"label map: mode {image.mode}, not one byte a pixel")
    return Image.fromarray(np.asarray(image).astype(np.uint8))


def _flattened(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """RGB, with transparency laid on the background."""
    with _explained():
        if image.mode.startswith("I") or image.mode == "F":
            image = _eight_bits(image)
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            if image.getchannel("A").getextrema()[1] == 0:
                raise Rejected("empty: fully transparent")
            below = Image.new("RGBA", image.size, (*background, 255))
            below.alpha_composite(image)
            image = below
        return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Greys of 16 bits and floats as 8 bits."""
    values = np.asarray(image)
    if values.dtype.kind == "f":
        values = np.nan_to_num(values)
        scaled = values * (255.0 if values.max(initial=0.0) <= 1.0 else 1.0)
        return Image.fromarray(scaled.clip(0, 255).round().astype(np.uint8))
    return Image.fromarray(((values.astype(np.int64) + 128) // 257).clip(0, 255).astype(np.uint8))


def _resized(image: Image.Image, settings: DataSettings, kernel: Image.Resampling, fill: Any) -> Image.Image:
    height, width = settings.image_size
    match settings.resize:
        case "stretch":
            return image.resize((width, height), kernel)
        case "crop":
            return ImageOps.fit(image, (width, height), kernel)
        case "pad":
            return ImageOps.pad(image, (width, height), kernel, color=fill)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()
