"""Drawings of the report: inline SVG that follows the page's colours in light and dark, and pictures as data URIs."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any

from PIL import Image

_WIDTH, _HEIGHT = 420, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 34
_COLOURS = 5
_BARS = 128
_PHASE = re.compile(r"^(train|validation|valid|val)[_/.]")
_LEVEL = re.compile(r"_(\d+)$")
_EVENTS = ("codebooks_started", "adversary_switched_off")
"""What happens once is no curve."""


def short(value: float) -> str:
    """A number a reader can take in: at most four significant digits, thousands separated."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    if abs(value) >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 1e-3 else f"{value:.2g}"


def data_uri(png: bytes) -> str:
    """A PNG as a URI that needs no file."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def row_images(png: bytes, rows: int) -> list[bytes]:
    """The rows of a picture grid as PNGs of their own, without the gaps between them."""
    with Image.open(io.BytesIO(png)) as image:
        pitch = (image.height + 2) / rows  # rows are two pixels apart, see generate.image_grid
        parts = []
        for row in range(rows):
            top = round(row * pitch)
            content = io.BytesIO()
            image.crop((0, top, image.width, round(top + pitch) - 2)).save(content, "PNG")
            parts.append(content.getvalue())
    return parts


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that divide a range into about `count` pieces."""
    if high <= low:
        return [low]
    span = high - low
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if span / (factor * power) <= count)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


class _Frame:
    """Maps values to the drawing's coordinates."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]) -> None:
        margin = (y[1] - y[0]) * 0.06 or abs(y[1]) * 0.1 or 1.0
        self.x, self.y = x, (y[0] - margin, y[1] + margin)

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1)
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return (
            round(_LEFT + across * (_WIDTH - _LEFT - _RIGHT), 1),
            round(_HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM), 1),
        )

    def axes(self, label: str) -> str:
        """Grid lines with numbers, and the name of the horizontal axis."""
        parts = []
        for value in ticks(*self.y):
            _, y = self.at(self.x[0], value)
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
            parts.append(f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{short(value)}</text>')
        for value in ticks(*self.x):
            x, _ = self.at(value, self.y[0])
            name = f"{short(value / 1000)}k" if value >= 1000 else short(value)
            parts.append(f'<text x="{x}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor="middle">{name}</text>')
        middle = (_LEFT + _WIDTH - _RIGHT) / 2
        parts.append(f'<text class="axis" x="{middle}" y="{_HEIGHT - 3}" text-anchor="middle">{escape(label)}</text>')
        return "".join(parts)


def _svg(body: str, description: str) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(description)}">'
        f"<title>{escape(description)}</title>{body}</svg>"
    )


@dataclass
class _Line:
    """One curve of a chart."""

    points: list[tuple[float, float]]
    colour: int
    dashed: bool


def _line_chart(lines: Mapping[str, _Line], name: str, axis: str = "images seen") -> str:
    """Lines over a common axis, with a legend of their last values."""
    points = [point for line in lines.values() for point in line.points]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    frame = _Frame((min(xs), max(xs)), (min(ys), max(ys)))
    body, legend = [frame.axes(axis)], []
    for label, line in lines.items():
        look = f"c{line.colour % _COLOURS}" + (" dashed" if line.dashed else "")
        path = " ".join(f"{x},{y}" for x, y in (frame.at(*point) for point in line.points))
        body.append(f'<polyline class="{look}" points="{path}"/>')
        if len(line.points) == 1:
            x, y = frame.at(*line.points[0])
            body.append(f'<circle class="{look}" cx="{x}" cy="{y}" r="3"/>')
        legend.append(f'<span class="key {look}">{escape(label)} <b>{short(line.points[-1][1])}</b></span>')
    last = ", ".join(f"{label} ends at {short(line.points[-1][1])}" for label, line in lines.items())
    return (
        f"<figure><figcaption>{escape(name)}</figcaption>{_svg(''.join(body), f'{name} over {axis}: {last}')}"
        f'<div class="legend">{"".join(legend)}</div></figure>'
    )


def history_charts(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """One chart for each metric of a stage's history; levels, and training and validation, share a chart."""
    charts: dict[str, dict[tuple[str, int | None], list[tuple[float, float]]]] = {}
    for record in history:
        for key, value in record.items():
            if key in ("images", *_EVENTS) or isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            if not math.isfinite(value):
                continue
            phase, level = _PHASE.match(key), _LEVEL.search(key)
            name = _LEVEL.sub("", _PHASE.sub("", key))
            part = ("training" if phase[1] == "train" else "validation") if phase else ""
            curve = (part, int(level[1]) if level else None)
            charts.setdefault(name, {}).setdefault(curve, []).append((float(record["images"]), float(value)))
    drawn = []
    for name, curves in charts.items():
        validated = any(part == "validation" for part, _ in curves)
        both = validated and any(part != "validation" for part, _ in curves)
        lines = {}
        for (part, level_number), points in curves.items():
            words = [part, "" if level_number is None else f"level {level_number}"]
            label = " ".join(filter(None, words)) or ("training" if validated else "value")
            # A level keeps its colour; what validation shows of it is dashed.
            lines[label] = _Line(points, level_number or 0, both and part == "validation")
        drawn.append(_line_chart(lines, name.replace("_", " ")))
    return drawn


def usage_chart(counts: Sequence[int], name: str) -> str:
    """How often each code of a codebook is used, most used first, against an even use."""
    ordered = sorted(counts, reverse=True)
    total = sum(ordered) or 1
    size = len(ordered)
    bars = min(size, _BARS)
    edges = [index * size // bars for index in range(bars + 1)]
    heights = [100 * sum(ordered[low:high]) / (high - low) / total for low, high in pairwise(edges)]
    even = 100 / size
    frame = _Frame((0, size), (0, max([*heights, even])))
    frame.y = (0, frame.y[1])
    body = [frame.axes("codes, most used first")]
    for (low, high), height in zip(pairwise(edges), heights, strict=True):
        (x, y), (right, floor) = frame.at(low, height), frame.at(high, 0)
        body.append(
            f'<rect class="c0" x="{x}" y="{y}" width="{max(right - x - 0.4, 0.4):.1f}" height="{floor - y:.1f}"/>'
        )
    _, y = frame.at(0, even)
    body.append(f'<line class="even" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
    used = sum(count > 0 for count in counts)
    description = (
        f"{name}: {used} of {size} codes used, the most used one {short(100 * ordered[0] / total)} % of the time"
    )
    drawing = _svg("".join(body), description)
    return (
        f"<figure><figcaption>{escape(name)}; share of all codes in %</figcaption>{drawing}"
        f'<div class="legend"><span class="key c0">{used:,} of {size:,} codes used</span>'
        '<span class="key dash">even use</span></div></figure>'
    )
