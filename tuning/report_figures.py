"""Drawings of a sweep's report: inline SVG in the page's colours, readable in light and dark, each with its words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from tuning.analysis import Importance, Trade
from tuning.records import TrialRecord
from tuning.space import Drawn, SearchSpace
from workflows.reporting.figures import short, ticks

STYLE = """<style>
svg .others { stroke: var(--soft); stroke-width: 1; opacity: .35; fill: none; }
svg .ring { fill: var(--card); stroke: var(--soft); } svg .dot { fill: var(--soft); opacity: .6; }
svg .bar { fill: var(--c0); opacity: .85; } svg .whisker { stroke: var(--ink); stroke-width: 1.5; }
svg polyline.front { stroke: var(--c1); stroke-dasharray: 5 4; } svg circle.front { fill: var(--c1); }
svg circle.c1 { fill: var(--c1); } svg circle.c2 { fill: var(--c2); } svg .named { fill: var(--ink); }
svg polyline.path { stroke-width: 1.6; }
svg .halo { paint-order: stroke; stroke: var(--card); stroke-width: 4px; stroke-linejoin: round; }
.wide { margin: .8rem 0; }
</style>"""
"""Beside the page's own style."""

_BEST = 3
_LONGEST_LABEL = 18


@dataclass(frozen=True)
class _Frame:
    """Maps values to the coordinates of a drawing."""

    x: tuple[float, float]
    y: tuple[float, float]
    width: int = 860
    height: int = 300
    left: int = 62
    right: int = 16
    top: int = 14
    bottom: int = 36
    log_x: bool = False

    def at(self, x: float, y: float) -> tuple[float, float]:
        low, high, value = (math.log(v) for v in (*self.x, x)) if self.log_x else (*self.x, x)
        across = (value - low) / ((high - low) or 1)
        up = (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1)
        return (
            round(self.left + across * (self.width - self.left - self.right), 1),
            round(self.height - self.bottom - up * (self.height - self.top - self.bottom), 1),
        )

    def axes(self, across: str, up: str) -> str:
        parts = []
        for value in ticks(*self.y):
            _, y = self.at(self.x[0], value)
            parts.append(f'<line class="grid" x1="{self.left}" x2="{self.width - self.right}" y1="{y}" y2="{y}"/>')
            parts.append(f'<text x="{self.left - 6}" y="{y + 4}" text-anchor="end">{short(value)}</text>')
        for value in self._across():
            x, _ = self.at(value, self.y[0])
            name = f"{short(value / 1000)}k" if value >= 1000 else short(value)
            parts.append(f'<text x="{x}" y="{self.height - self.bottom + 15}" text-anchor="middle">{name}</text>')
        middle = (self.left + self.width - self.right) / 2
        parts.append(
            f'<text class="axis" x="{middle}" y="{self.height - 4}" text-anchor="middle">{escape(across)}</text>'
        )
        parts.append(f'<text class="axis" x="{self.left}" y="{self.top - 3}">{escape(up)}</text>')
        return "".join(parts)

    def _across(self) -> list[float]:
        if not self.log_x:
            return ticks(*self.x)
        found, value = [], self.x[0]
        while value <= self.x[1] * 1.001:
            found.append(value)
            value *= 2
        return found[:: max(1, len(found) // 8)]


def _svg(frame: _Frame, body: str, name: str, described: str) -> str:
    return (
        f'<figure class="wide"><figcaption>{escape(name)}</figcaption>'
        f'<svg viewBox="0 0 {frame.width} {frame.height}" role="img" aria-label="{escape(described)}">'
        f"<title>{escape(described)}</title>{body}</svg></figure>"
    )


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return low - margin, high + margin


def _points(frame: _Frame, values: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x},{y}" for x, y in (frame.at(*point) for point in values))


# ---- curves ----


def curves_chart(metric: str, records: Sequence[TrialRecord], best: Sequence[int]) -> str:
    """The metric at every rung of every trial; the best ones in colour, a ring where a trial was stopped.

    Args:
        best: numbers of trials, the best first; the first three are named.
    """
    lines = {
        record.number: [(float(r.images), v) for r in record.rungs if _finite(v := r.metrics.get(metric, math.nan))]
        for record in records
    }
    lines = {number: line for number, line in lines.items() if line}
    if not lines:
        return ""
    stopped = {record.number for record in records if record.status == "stopped"}
    xs = [x for line in lines.values() for x, _ in line]
    ys = [y for line in lines.values() for _, y in line]
    frame = _Frame((min(xs), max(xs)), _padded(ys))
    body = [frame.axes("images seen", metric)]
    named = [number for number in best[:_BEST] if number in lines]
    for number in [number for number in lines if number not in named] + named[::-1]:
        colour = f"c{named.index(number)}" if number in named else "others"
        line = lines[number]
        body.append(
            f'<polyline class="{colour}" points="{_points(frame, line)}"><title>trial {number}</title></polyline>'
        )
        x, y = frame.at(*line[-1])
        if number in stopped:
            body.append(f'<circle class="ring" cx="{x}" cy="{y}" r="3"/>')
        elif len(line) == 1:
            body.append(f'<circle class="{colour if number in named else "dot"}" cx="{x}" cy="{y}" r="3"/>')
    legend = "".join(
        f'<span class="key c{place}">trial {number} <b>{short(lines[number][-1][1])}</b></span>'
        for place, number in enumerate(named)
    )
    described = f"{metric} over images seen, {len(lines)} trials, {len(stopped)} of them stopped early"
    drawn = _svg(frame, "".join(body), f"{metric} of every trial", described)
    return drawn.replace("</svg>", f'</svg><div class="legend">{legend}</div>')


def _finite(value: float) -> bool:
    return math.isfinite(value)


def progress_chart(metric: str, best: Sequence[tuple[int, float]]) -> str:
    """The best value so far, in steps, over the number of trials."""
    if len(best) < 2:
        return ""
    steps: list[tuple[float, float]] = []
    for count, value in best:
        steps += [(float(count), steps[-1][1] if steps else value), (float(count), value)]
    frame = _Frame((0.0, steps[-1][0]), _padded([value for _, value in steps]), height=200)
    body = frame.axes("trials", f"best {metric}") + f'<polyline class="c0" points="{_points(frame, steps)}"/>'
    described = f"Best {metric} so far: {short(best[0][1])} after {best[0][0]} trials, {short(best[-1][1])} at the end"
    return _svg(frame, body, f"Best {metric} so far", described)


# ---- parallel coordinates ----


def parallel_chart(space: SearchSpace, ordered: Sequence[TrialRecord]) -> str:
    """A line for each trial through its values, the better the more in colour; what does not apply is at the bottom.

    Args:
        ordered: trials with a value of the first metric, the best first.
    """
    if not ordered:
        return ""
    metric = space.metrics[0]
    rows = [space.flat(dict(record.drawn)) | {metric.name: record.value(metric.name)} for record in ordered]
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name != metric.name]
    order = list(space.parameters)
    names = [*sorted(names, key=lambda name: order.index(name.partition("/")[0])), metric.name]
    frame = _Frame((0, max(len(names) - 1, 1)), (0.0, 1.0), height=340, left=70, right=70, top=40, bottom=46)
    body, scales, axes = [], {}, []
    for column, name in enumerate(names):
        values = [row[name] for row in rows if name in row]
        absent = len(values) < len(rows)
        scales[name] = _scale(space, name, values, absent)
        axes.append(_axis(frame, column, name, scales[name], absent))  # over the lines, so that it can be read
    count = len(rows)
    for place in range(count - 1, -1, -1):
        points = [
            frame.at(column, scales[name].place(rows[place][name]) if name in rows[place] else 0.0)
            for column, name in enumerate(names)
        ]
        strength = round(100 * (1 - place / max(count - 1, 1)))
        path = " ".join(f"{x},{y}" for x, y in points)
        style = (
            f"stroke:color-mix(in oklab, var(--c1) {strength}%, var(--line));opacity:{0.35 + 0.65 * strength / 100:.2f}"
        )
        body.append(
            f'<polyline class="path" style="{style}" points="{path}">'
            f"<title>trial {ordered[place].number}</title></polyline>"
        )
    described = f"Parallel coordinates of {count} trials over {', '.join(names)}; the best is trial {ordered[0].number}"
    return _svg(frame, "".join(body + axes), "Every trial's values; the better, the stronger the colour", described)


@dataclass(frozen=True)
class _Scale:
    """Where on an axis a value stands, 0 to 1, and what to write beside it."""

    labels: tuple[tuple[float, str], ...]
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    places: Mapping[Any, float] | None = None
    floor: float = 0.0
    """Below it is where values stand that do not apply."""

    def place(self, value: Any) -> float:
        if self.places is not None:
            return self.places[value]
        low, high, found = (math.log(v) if self.log else v for v in (self.low, self.high, float(value)))
        return self.floor + (1 - self.floor) * (found - low) / ((high - low) or 1)


def _scale(space: SearchSpace, name: str, values: Sequence[Any], absent: bool) -> _Scale:
    floor = 0.12 if absent else 0.0
    parameter = space.parameters.get(name.partition("/")[0])
    if parameter is not None and parameter.kind == "choice":
        choices = [parameter.flat(choice) for choice in parameter.domain]
        steps = max(len(choices) - 1, 1)
        places = {choice: floor + (1 - floor) * index / steps for index, choice in enumerate(choices)}
        texts = [_text(choice) for choice in parameter.domain]
        return _Scale(tuple(zip(places.values(), texts, strict=True)), places=places, floor=floor)
    low, high = (float(parameter.domain[0]), float(parameter.domain[1])) if parameter else (min(values), max(values))
    log = parameter is not None and parameter.kind.startswith("log_")
    middle = math.sqrt(low * high) if log else (low + high) / 2
    whole = parameter is not None and parameter.kind in ("int", "log_int")
    shown = [low, high] if (whole and high - low < 2) or low == high else [low, middle, high]
    scale = _Scale((), low, high, log, floor=floor)
    return _Scale(tuple((scale.place(v), short(round(v) if whole else v)) for v in shown), low, high, log, floor=floor)


def _axis(frame: _Frame, column: int, name: str, scale: _Scale, absent: bool) -> str:
    x, top = frame.at(column, 1.0)
    _, bottom = frame.at(column, 0.0)
    stem = name.rpartition(".")[2].replace("/", " ")
    label = stem if len(stem) <= _LONGEST_LABEL else stem[: _LONGEST_LABEL - 1] + "…"
    high = 14 if column % 2 else 28  # neighbours' names do not meet
    parts = [
        f'<line class="grid" x1="{x}" x2="{x}" y1="{top}" y2="{bottom}"/>',
        f'<text class="named" x="{x}" y="{high}" text-anchor="middle">{escape(label)}'
        f"<title>{escape(name)}</title></text>",
    ]
    for place, text in scale.labels:
        _, y = frame.at(column, place)
        parts.append(f'<text class="halo" x="{x + 5}" y="{y + 4}">{escape(text)}</text>')
    if absent:
        parts.append(f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">not there</text>')
    return "".join(parts)


def _text(value: Any) -> str:
    text = short(value) if isinstance(value, float) else str(value).replace(" ", "").replace("'", "")
    return text if len(text) <= _LONGEST_LABEL else text[: _LONGEST_LABEL - 1] + "…"


# ---- importance ----


def importance_chart(found: Importance) -> str:
    """A bar for each parameter, with its interval."""
    pitch = 30
    frame = _Frame((0.0, 1.0), (0.0, 1.0), height=pitch * len(found.effects) + 50, left=250, right=70, top=8, bottom=36)
    body = []
    for value in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, _ = frame.at(value, 0)
        body.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{frame.top}" y2="{frame.height - frame.bottom}"/>')
        body.append(f'<text x="{x}" y="{frame.height - frame.bottom + 15}" text-anchor="middle">{short(value)}</text>')
    axis = f"share of the variance of {found.metric}, with its 90 % interval"
    middle = (frame.left + frame.width - frame.right) / 2
    body.append(f'<text class="axis" x="{middle}" y="{frame.height - 4}" text-anchor="middle">{escape(axis)}</text>')
    for row, effect in enumerate(found.effects):
        y = frame.top + pitch * row + 6
        start, end = frame.at(0.0, 0)[0], frame.at(effect.share, 0)[0]
        low, high = frame.at(effect.low, 0)[0], frame.at(effect.high, 0)[0]
        body.append(f'<rect class="bar" x="{start}" y="{y}" width="{max(end - start, 0.5):.1f}" height="16"/>')
        body.append(f'<line class="whisker" x1="{low}" x2="{high}" y1="{y + 8}" y2="{y + 8}"/>')
        body += [f'<line class="whisker" x1="{x}" x2="{x}" y1="{y + 4}" y2="{y + 12}"/>' for x in (low, high)]
        body.append(f'<text class="named" x="{start - 8}" y="{y + 12}" text-anchor="end">{escape(effect.name)}</text>')
        body.append(f'<text x="{max(high, end) + 6}" y="{y + 12}">{effect.share:.2f}</text>')
    words = ", ".join(
        f"{effect.name} {effect.share:.2f} ({effect.low:.2f} to {effect.high:.2f})" for effect in found.effects
    )
    return _svg(frame, "".join(body), f"What {found.metric} depends on", f"Importance: {words}")


# ---- the trade ----


def trade_chart(trade: Trade, best: Sequence[int]) -> str:
    """Quality over cost, the Pareto front joined."""
    xs = [x for x, _ in trade.points.values()]
    ys = [y for _, y in trade.points.values()]
    log = min(xs) > 0 and max(xs) / min(xs) > 8
    frame = _Frame((min(xs), max(xs)) if log else _padded(xs), _padded(ys), log_x=log)
    body = [frame.axes(trade.cost.name.replace("_", " "), trade.quality.name)]
    front = [trade.points[number] for number in trade.front]
    body.append(f'<polyline class="front" points="{_points(frame, front)}"/>')
    for number, point in trade.points.items():
        x, y = frame.at(*point)
        kind = "front" if number in trade.front else "dot"
        body.append(
            f'<circle class="{kind}" cx="{x}" cy="{y}" r="{5 if number in trade.front else 4}">'
            f"<title>trial {number}: {short(point[1])} for {short(point[0])}</title></circle>"
        )
        if number in trade.front or number in best[:1]:
            anchor = "end" if x > frame.width - 60 else "start"
            side = -8 if anchor == "end" else 8
            body.append(f'<text class="named" x="{x + side}" y="{y - 6}" text-anchor="{anchor}">{number}</text>')
    described = (
        f"{trade.quality.name} against {trade.cost.name} of {len(trade.points)} trials; "
        f"on the front: {', '.join(map(str, trade.front))}"
    )
    return _svg(frame, "".join(body), f"{trade.quality.name} against {trade.cost.name.replace('_', ' ')}", described)


def drawn_text(drawn: Drawn) -> str:
    """A draw in a line."""
    return ", ".join(f"{name.rpartition('.')[2]} {_text(value)}" for name, value in drawn.items())
