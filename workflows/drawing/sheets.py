"""Sheets of pictures: originals beside what each prefix of the levels makes of them, and where it errs.

A row a picture; the header names the columns and gives the mean PSNR of the pictures shown. Error maps show the largest
difference of the three colours, from white (none) over orange to black (64 of 255 or more), the same in every sheet.

Axes: n pictures of H x W pixels.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from hvqd_model.metrics import psnr
from workflows.drawing.generate import Pictures

GAP = 4
_HEADER, _FONT_SIZE = 40, 12
_FULL_ERROR = 64.0
_ANCHORS = np.array([0.0, 0.2, 0.5, 1.0])
_COLOURS = np.array([[255, 255, 255], [255, 214, 120], [226, 70, 30], [0, 0, 0]], dtype=np.float64)
INK, SOFT = (29, 33, 39), (91, 100, 112)


@cache
def font(size: int = _FONT_SIZE) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font that comes with Pillow, so that a sheet looks the same everywhere."""
    return ImageFont.load_default(size)


def mean_psnr(pictures: Pictures, originals: Pictures) -> float:
    """The mean over pictures of the PSNR in dB, RGB of 8 bits."""
    a, b = (
        torch.from_numpy(np.ascontiguousarray(found)).permute(0, 3, 1, 2).double() for found in (pictures, originals)
    )
    return float(psnr(a, b, 255.0).mean())


def error_map(pictures: Pictures, originals: Pictures) -> Pictures:
    """(n, H, W, 3) where pictures differ from their originals; see the module's docstring for the colours."""
    error = np.abs(pictures.astype(np.int64) - originals).max(3) / _FULL_ERROR
    channels = [np.interp(error, _ANCHORS, _COLOURS[:, channel]) for channel in range(3)]
    return np.stack(channels, 3).round().astype(np.uint8)


def prefix_name(count: int) -> str:
    """What the first `count` levels are called."""
    return "level 1" if count == 1 else f"levels 1-{count}"


def enlarged(pictures: NDArray[np.uint8], scale: int) -> NDArray[np.uint8]:
    """(n, scale H, scale W, 3) pictures whose pixels are blocks."""
    return pictures.repeat(scale, 1).repeat(scale, 2)


def reduced(pictures: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    """(n, H / factor, W / factor, 3) pictures whose pixels are means of blocks."""
    return np.stack([np.asarray(Image.fromarray(picture).reduce(factor)) for picture in pictures])


def prefix_sheet(
    originals: Pictures,
    prefixes: Sequence[tuple[int, Pictures]],
    least_side: int = 96,
    most_side: int | None = None,
) -> Image.Image:
    """The sheet of some pictures.

    Args:
        originals: (n, H, W, 3), n at least 1.
        prefixes: how many levels were decoded, and the (n, H, W, 3) pictures; in the order of the columns.
        least_side: pictures with shorter sides are enlarged by a whole number.
        most_side: pictures with longer sides are made smaller by a whole number, after all has been measured.
    """
    qualities = [f"{mean_psnr(pictures, originals):.2f} dB" for _, pictures in prefixes]
    names = [prefix_name(count) for count, _ in prefixes]
    columns = [("original", f"{len(originals)} pictures" if len(originals) > 1 else "", originals)]
    columns += [(name, quality, found) for name, quality, (_, found) in zip(names, qualities, prefixes, strict=True)]
    for name, (_, found) in zip(names, prefixes, strict=True):
        title = "error " + name.split()[1]
        columns.append((title, f"black: {_FULL_ERROR:.0f}/255+", error_map(found, originals)))
    scale = max(1, -(-least_side // max(originals.shape[1:3])))
    factor = 1 if most_side is None else -(-max(originals.shape[1:3]) // most_side)
    cells = [reduced(found, factor) if factor > 1 else enlarged(found, scale) for *_, found in columns]
    named = [(title, detail, found) for (title, detail, _), found in zip(columns, cells, strict=True)]
    return column_sheet(named, least_side, scale=1)


def column_sheet(
    columns: Sequence[tuple[str, str, Pictures]], least_side: int = 96, scale: int | None = None
) -> Image.Image:
    """Columns of pictures under their names.

    Args:
        columns: a name, a detail and (n, H, W, 3) pictures each.
        least_side: pictures with shorter sides are enlarged by a whole number.
        scale: enlarge by this number instead.
    """
    if scale is None:
        scale = max(1, -(-least_side // max(columns[0][2].shape[1:3])))
    cells = [enlarged(found, scale) for *_, found in columns]
    height, width = cells[0].shape[1:3]
    pitch = max(width, least_side) + GAP  # a narrow picture still has room for its header
    rows = max(len(found) for found in cells)
    sheet = Image.new("RGB", (pitch * len(columns) - GAP + 2 * GAP, _HEADER + rows * (height + GAP)), "white")
    pen = ImageDraw.Draw(sheet)
    for place, ((title, detail, _), pictures) in enumerate(zip(columns, cells, strict=True)):
        left = GAP + place * pitch
        pen.text((left, 5), title, INK, font())
        pen.text((left, 21), detail, SOFT, font())
        for row, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture), (left, _HEADER + row * (height + GAP)))
    return sheet


def to_png(image: Image.Image) -> bytes:
    """The picture as a PNG's bytes."""
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()
