"""The report's page: one HTML document with its style inside, readable in light and dark, on a phone and on paper."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from workflows.reporting.figures import data_uri, row_images

STYLE = """
:root { color-scheme: light dark; --ground: #fbfaf7; --card: #ffffff; --ink: #1d2127; --soft: #5b6470;
  --line: #e2e0da;
  --good: #1a7f4b; --bad: #b3382c; --accent: #3b5bdb; --c0: #3b5bdb; --c1: #d9730d; --c2: #0b8a7d; --c3: #b0369b;
  --c4: #7a6a00; }
@media (prefers-color-scheme: dark) { :root { --ground: #14161a; --card: #1c1f25; --ink: #e8e6e1; --soft: #9aa3af;
  --line: #31353d;
  --good: #57c98a; --bad: #ff8a7a; --accent: #8da2fb; --c0: #8da2fb; --c1: #f5a65b; --c2: #4fd1c0; --c3: #ec8bd9;
  --c4: #d8c95a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
header p, .note { color: var(--soft); } .note { font-size: .9rem; max-width: 72ch; }
h1 { font-size: clamp(1.7rem, 4vw, 2.4rem); line-height: 1.15; margin: 0 0 .4rem; letter-spacing: -.02em; }
h2 { font-size: 1.3rem; margin: 3rem 0 .3rem; letter-spacing: -.01em; } h3 { font-size: 1rem;
  margin: 1.4rem 0 .5rem; }
p { max-width: 72ch; margin: .4rem 0 1rem; } a { color: var(--accent); }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1rem; font-size: .9rem; margin: 1rem 0 0; }
.verdict { border-left: 4px solid var(--soft); padding: .3rem 0 .3rem 1rem; font-size: 1.1rem; margin: 1.5rem 0; }
.verdict.good { border-color: var(--good); } .verdict.bad { border-color: var(--bad); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: .8rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .9rem 1rem; }
.card b { display: block; font-size: 1.75rem; line-height: 1.25; font-variant-numeric: tabular-nums;
  letter-spacing: -.02em; }
.card small { color: var(--soft); display: block; } .good-text { color: var(--good); }
.bad-text { color: var(--bad); }
.card .gate { font-size: .85rem; font-weight: 600; }
img { display: block; max-width: 100%; height: auto; image-rendering: pixelated; border-radius: 4px;
  background: #fff; }
.rows { display: grid; grid-template-columns: minmax(7rem, max-content) minmax(0, 1fr); gap: .45rem 1rem;
  align-items: center; max-width: 940px; }
.rows span { color: var(--soft); font-size: .88rem; text-align: right; max-width: 11rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 1rem; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: .8rem .9rem; }
figcaption { font-weight: 600; font-size: .92rem; margin-bottom: .3rem; }
.scroll + .charts { margin-top: .8rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: .8rem; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--soft); font-size: 11px; }
svg .grid { stroke: var(--line); }
svg polyline { fill: none; stroke-width: 2; stroke-linejoin: round; } svg .even { stroke: var(--ink);
  stroke-dasharray: 4 4; }
svg polyline.c0 { stroke: var(--c0); } svg polyline.c1 { stroke: var(--c1); } svg polyline.c2 { stroke: var(--c2); }
svg polyline.c3 { stroke: var(--c3); } svg polyline.c4 { stroke: var(--c4); }
svg rect.c0, svg circle.c0 { fill: var(--c0); } svg circle.c1 { fill: var(--c1); } svg circle.c2 { fill: var(--c2); }
svg circle.c3 { fill: var(--c3); } svg circle.c4 { fill: var(--c4); } svg polyline.dashed { stroke-dasharray: 5 4; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem .9rem; font-size: .82rem; color: var(--soft); }
.legend b { color: var(--ink); }
.key::before { content: ""; display: inline-block; width: .75em; height: .75em; border-radius: 2px;
  margin-right: .4em; background: var(--c0); }
.key.c1::before { background: var(--c1); } .key.c2::before { background: var(--c2); }
.key.c3::before { background: var(--c3); }
.key.dashed::before { clip-path: inset(30% 0 30% 0); }
.key.c4::before { background: var(--c4); } .key.dash::before { background: none; height: 0; vertical-align: middle;
  border-top: 2px dashed var(--ink); }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 10px; background: var(--card); }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .8rem; text-align: right; border-top: 1px solid var(--line); vertical-align: top;
  white-space: nowrap; }
thead th { border-top: 0; color: var(--soft); font-weight: 600; font-size: .85rem; }
th:first-child, td:first-child, .text { text-align: left; }
tbody th { font-weight: 600; } td small, th small { display: block; color: var(--soft); font-weight: 400;
  font-size: .8rem; }
td.wrap { white-space: normal; } td.wrap, th.wrap { text-align: left; }
.ours { background: color-mix(in srgb, var(--accent) 9%, transparent); }
code, pre { font: .85rem/1.5 ui-monospace, SFMono-Regular, Menlo, monospace; } pre { overflow-x: auto;
  padding: 1rem; margin: 0; }
details { border: 1px solid var(--line); border-radius: 10px; background: var(--card); margin: .7rem 0; }
summary { cursor: pointer; padding: .6rem 1rem; font-weight: 600; } details .scroll { border: 0; border-radius: 0; }
@media (max-width: 640px) { .rows { grid-template-columns: 1fr; } .rows span { text-align: left; max-width: none; }
h2 { margin-top: 2.2rem; } }
@media print { details { display: none; } main { max-width: none; } }
"""


def page(title: str, body: Iterable[str]) -> str:
    """The whole document."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def section(name: str, heading: str, text: str, *content: str) -> str:
    """A heading with an anchor, a paragraph of explanation and what follows."""
    return f'<section id="{name}"><h2>{escape(heading)}</h2><p class="note">{text}</p>{"".join(content)}</section>'


def picture(png: bytes, description: str) -> str:
    """A picture with its alternative text."""
    return f'<img src="{data_uri(png)}" alt="{escape(description)}">'


def captioned(png: bytes, description: str) -> str:
    """A picture in a frame with a caption."""
    return f"<figure><figcaption>{escape(description)}</figcaption>{picture(png, description)}</figure>"


def picture_rows(png: bytes, names: Sequence[str], description: str) -> str:
    """A grid whose rows have names, each row beside its name."""
    rows = zip(names, row_images(png, len(names)), strict=True)
    cells = (f"<span>{escape(name)}</span>{picture(row, f'{description}: {name}')}" for name, row in rows)
    return f'<div class="rows">{"".join(cells)}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], highlight: int | None = None) -> str:
    """A table of HTML cells; the first of each row is its heading.

    Args:
        highlight: a column to set off.
    """

    def cell(index: int, content: str, tag: str) -> str:
        mark = ' class="ours"' if index == highlight else ""
        scope = ' scope="row"' if tag == "td" and index == 0 else ' scope="col"' if tag == "th" else ""
        tag = "th" if index == 0 else tag
        return f"<{tag}{scope}{mark}>{content}</{tag}>"

    top = "".join(cell(index, content, "th") for index, content in enumerate(head))
    body = "".join(
        f"<tr>{''.join(cell(index, content, 'td') for index, content in enumerate(row))}</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def folded(summary: str, content: str) -> str:
    """Something for those who want to look closer."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"
