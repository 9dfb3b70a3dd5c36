"""`hvqd codes inspect`: what the most used codes of each level look like.

A code by itself has no look: the decoder paints with its neighbours and the coarser levels. So codes are shown where
they occur. Pictures are encoded; for level l they are decoded from the levels up to l, and of every shown code there is
the mean of the cells that it stood for, then some of these cells with what surrounds them. Where mean and single cells
agree, the code means one thing; where the mean is a grey blur, what it means depends on its neighbours.

Axes: n pictures of H x W pixels, L levels (0 the coarsest) of h x w codes, K codes a level, p x q pixels a cell.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from hvqd_model import HierarchicalVQ
from hvqd_model.metrics import perplexity, usage
from infra.errors import InputError
from workflows.config import RunConfig
from workflows.drawing.generate import Pictures, decode_codes
from workflows.drawing.reconstruct import BATCH, write_picture
from workflows.drawing.sheets import GAP, INK, SOFT, font, to_png
from workflows.drawing.tokenizer_source import find_pictures, find_tokenizer, spread
from workflows.encode import encode_batches
from workflows.training.precision import choose_precision

_OCCURRENCES = 64
"""Cells a mean is taken over."""
_EXAMPLES = 3
_COLUMNS = 8
_SIDE = 92


_SMALL = (_SIDE - (_EXAMPLES - 1) * GAP) // _EXAMPLES
_LINE = (226, 224, 218)


@dataclass(frozen=True)
class InspectRequest:
    """What is asked for."""

    path: str
    """A picture, a folder of pictures, or a split of the root's dataset."""
    pictures: int
    """How many pictures are encoded at most."""
    codes: int
    """How many codes of each level are shown."""
    model: str | None
    """Model folder or `models:/name@alias`; None takes the root's champion."""
    precision: Literal["auto", "fp32", "bf16"]
    """Arithmetic of encoder and decoder."""
    out: Path
    """PNG file of the sheet."""

    def as_json(self) -> dict[str, Any]:
        """The plan."""
        return {**vars(self), "out": str(self.out)}


@dataclass(frozen=True)
class ShownCode:
    """A code and what it looks like."""

    code: int
    count: int
    mean: NDArray[np.uint8]
    """(p, q, 3) mean of its cells."""
    examples: tuple[NDArray[np.uint8], ...]
    """(2 p, 2 q, 3) cells with half a cell around them."""


@dataclass(frozen=True)
class InspectedLevel:
    """One level's use and its most used codes."""

    level: int
    grid: tuple[int, int]
    counts: NDArray[np.int64]
    """(K,) how often each code occurred."""
    shown: tuple[ShownCode, ...]

    def as_json(self) -> dict[str, Any]:
        """Its entry in the answer."""
        counts, total = torch.from_numpy(self.counts), int(self.counts.sum())
        return {
            "level": self.level,
            "grid": list(self.grid),
            "codebook_size": len(self.counts),
            "codes": total,
            "used": int((self.counts > 0).sum()),
            "usage": round(usage(counts), 4),
            "perplexity": round(perplexity(counts), 2),
            "most_used": [
                {"code": found.code, "count": found.count, "share": round(found.count / total, 5)}
                for found in self.shown
            ],
        }


def inspect_levels(
    model: HierarchicalVQ, pictures: Pictures, most: int, precision: Literal["fp32", "bf16"] = "fp32"
) -> list[InspectedLevel]:
    """The use of each level's codes in (n, H, W, 3) pictures, and its `most` used ones."""
    device = str(next(model.parameters()).device)
    codes = encode_batches(model, pictures, device, precision, BATCH)
    found = []
    for level, (grid, size) in enumerate(zip(model.config.grids, model.config.codebook_sizes, strict=True)):
        counts = np.bincount(codes[level].reshape(-1), minlength=size)
        order = np.argsort(-counts, kind="stable")[:most]
        decoded = decode_codes(model, codes[: level + 1], BATCH, precision)
        shown = tuple(
            _shown(int(code), int(counts[code]), codes[level], decoded, model.config.cells[level])
            for code in order[counts[order] > 0]
        )
        found.append(InspectedLevel(level, grid, counts, shown))
    return found


def _shown(code: int, count: int, codes: NDArray[np.int32], decoded: Pictures, cell: tuple[int, int]) -> ShownCode:
    """The code's cells: of (n, h, w) codes and the (n, H, W, 3) pictures decoded from them."""
    places = np.argwhere(codes == code)
    chosen = places[spread(len(places), _OCCURRENCES)]
    mean = np.mean([_window(decoded[n], (row, column), cell, (0, 0)) for n, row, column in chosen], axis=0)
    around = (cell[0] // 2, cell[1] // 2)
    examples = tuple(
        _window(decoded[n], (row, column), cell, around) for n, row, column in chosen[spread(len(chosen), _EXAMPLES)]
    )
    return ShownCode(code, count, mean.round().astype(np.uint8), examples)


def _window(
    picture: NDArray[np.uint8], place: tuple[int, int], cell: tuple[int, int], around: tuple[int, int]
) -> NDArray[np.uint8]:
    """The pixels of a cell and around it; past the picture's edge its last pixels are repeated."""
    rows, columns = (
        np.arange(place[axis] * cell[axis] - around[axis], (place[axis] + 1) * cell[axis] + around[axis]).clip(
            0, picture.shape[axis] - 1
        )
        for axis in (0, 1)
    )
    window: NDArray[np.uint8] = picture[np.ix_(rows, columns)]
    return window


# ---- the sheet ----


def draw_levels(levels: list[InspectedLevel]) -> Image.Image:
    """The sheet: for each level a heading and its codes, most used first."""
    pitch = _SIDE + 2 * GAP
    tile = _SIDE + _SMALL + 38
    rows = [-(-len(level.shown) // _COLUMNS) for level in levels]
    sheet = Image.new("RGB", (_COLUMNS * pitch + 2 * GAP, 26 + sum(30 + count * tile for count in rows)), "white")
    pen = ImageDraw.Draw(sheet)
    legend = "Large: the mean of a code's cells, decoded from its level and the coarser ones. "
    legend += "Small: single cells, with half a cell around."
    pen.text((GAP, 6), legend, SOFT, font(11))
    top = 26
    for level, count in zip(levels, rows, strict=True):
        pen.text((GAP, top + 6), _heading(level), INK, font(13))
        top += 30
        for index, code in enumerate(level.shown):
            left = GAP + index % _COLUMNS * pitch
            _draw_code(sheet, pen, (left, top + index // _COLUMNS * tile), code, int(level.counts.sum()))
        top += count * tile
    return sheet


def _heading(level: InspectedLevel) -> str:
    facts = level.as_json()
    return (
        f"level {level.level}{' (coarsest)' if level.level == 0 else ''}: {level.grid[0]} x {level.grid[1]} codes, "
        f"{facts['used']:,} of {facts['codebook_size']:,} used ({facts['usage']:.0%}), "
        f"perplexity {facts['perplexity']:,.0f}"
    )


def _draw_code(
    sheet: Image.Image, pen: ImageDraw.ImageDraw, corner: tuple[int, int], code: ShownCode, total: int
) -> None:
    left, top = corner
    sheet.paste(_fitted(code.mean, _SIDE), (left, top))
    pen.rectangle((left - 1, top - 1, left + _SIDE, top + _SIDE), outline=_LINE)
    for place, example in enumerate(code.examples):
        across, down = left + place * (_SMALL + GAP), top + _SIDE + GAP
        sheet.paste(_fitted(example, _SMALL), (across, down))
        pen.rectangle((across - 1, down - 1, across + _SMALL, down + _SMALL), outline=_LINE)
    below = top + _SIDE + _SMALL + 2 * GAP
    pen.text((left, below), f"#{code.code}", INK, font(11))
    pen.text((left, below + 12), f"{code.count:,} ({code.count / total:.1%})", SOFT, font(11))


def _fitted(picture: NDArray[np.uint8], side: int) -> Image.Image:
    """A square of the picture, pixels as blocks."""
    return Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST)


# ---- the command ----


def inspect_codes(request: InspectRequest, config: RunConfig) -> dict[str, Any]:
    """Write the sheet.

    Returns:
        JSON values: image (path), model, precision, pictures (how many) and levels.

    Raises:
        InputError: no such tokenizer or picture.
        EnvironmentFailure: the sheet cannot be written.
    """
    if request.codes < 1:
        raise InputError(f"--codes must be at least 1: {request.codes}\nhint: for example --codes 24")
    named = find_tokenizer(request.model, config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = find_pictures(request.path, config, named.model.config.image_size, request.pictures)
    precision, _ = choose_precision(request.precision, device)
    levels = inspect_levels(named.model.to(device), found.pictures, request.codes, precision)
    return {
        "image": write_picture(request.out, to_png(draw_levels(levels))),
        "model": named.name,
        "precision": precision,
        "pictures": len(found.pictures),
        "levels": [level.as_json() for level in levels],
        "rejected": list(found.rejected),
    }


def as_text(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [f"{'level':<6}{'codes':>9}{'used':>16}{'usage':>8}{'perplexity':>12}  most used"]
    for row in result["levels"]:
        most = ", ".join(f"#{code['code']} {code['share']:.1%}" for code in row["most_used"][:3])
        used = f"{row['used']:,} of {row['codebook_size']:,}"
        lines.append(
            f"{row['level']:<6}{row['codes']:>9,}{used:>16}{row['usage']:>8.1%}{row['perplexity']:>12,.1f}  {most}"
        )
    return "\n".join([f"{result['pictures']} pictures by {result['model']}", *lines, result["image"]])
