"""A sweep's report: one HTML file that shows what was found, how sure that is, and what it cost.

It reads the sweep's records and the pictures of its best trials, and needs no network.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape

import yaml

from infra.storage import Store
from tuning.analysis import FEWEST_TRIALS, RESAMPLES, importance, ranked, running_best, trade_off
from tuning.records import TrialRecord
from tuning.report_figures import (
    STYLE,
    curves_chart,
    drawn_text,
    importance_chart,
    parallel_chart,
    progress_chart,
    trade_chart,
)
from tuning.space import SearchSpace
from workflows.reporting.figures import short
from workflows.reporting.page import captioned, folded, page, section, table

NAME = "report.html"
SHEETS = ("samples.png", "vq/pictures/latest.png")
"""What a trial's folder may show, the most telling first."""
_BEST = 3
_ENDS = {
    "finished": "trained to the end",
    "stopped": "stopped early",
    "failed": "failed",
    "refused": "refused before they cost anything",
    "running": "running",
    "waiting": "waiting",
}


def write_sweep_report(store: Store, space: SearchSpace, records: Sequence[TrialRecord], trials: Store) -> str:
    """Write the report into the sweep's folder and say where it is, as a path or URL.

    Args:
        trials: the folder whose children, named by numbers of four digits, are the trials'.
    """
    sheets = {}
    for record in ranked(space, records)[:_BEST]:
        if (sheet := find_sheet(trials.child(f"{record.number:04d}"))) is not None:
            sheets[record.number] = sheet
    store.write_bytes(NAME, sweep_page(space, records, sheets).encode())
    return str(store.path / NAME) if store.is_local else f"{store.url}/{NAME}"


def find_sheet(folder: Store) -> bytes | None:
    """The picture of a trial's folder that says most, as PNG."""
    for name in SHEETS:
        try:
            return folder.read_bytes(name)
        except FileNotFoundError:
            continue
    return None


def sweep_page(
    space: SearchSpace, records: Sequence[TrialRecord], sheets: Mapping[int, bytes], resamples: int = RESAMPLES
) -> str:
    """The whole document.

    Args:
        sheets: trial number -> PNG.
        resamples: of the trials, for the intervals of importance.
    """
    ordered = ranked(space, records)
    parts = [
        STYLE,
        _header(space, records),
        _headline(space, records, ordered),
        _best(space, ordered, sheets),
        _curves(space, records, ordered),
        _parallel(space, ordered),
        _importance(space, records, resamples),
        _trade(space, records, ordered),
        _cost(space, records),
        _trials(space, records, ordered),
        _space(space),
    ]
    return page(f"hvqd: the search {space.name}", [part for part in parts if part])


# ---- parts of the page ----


def _header(space: SearchSpace, records: Sequence[TrialRecord]) -> str:
    links = (
        ("best", "The best"),
        ("curves", "Learning curves"),
        ("parallel", "Every trial's values"),
        ("importance", "What mattered"),
        ("trade", "The trade"),
        ("cost", "What it cost"),
        ("trials", "All trials"),
        ("space", "The space"),
    )
    anchors = "".join(f'<a href="#{name}">{text}</a>' for name, text in links)
    about = escape(space.about) or "A search over configurations."
    return (
        f"<header><h1>The search {escape(space.name)}: {len(records)} trials</h1>"
        f"<p>{about} Every figure is measured on the validation split.</p><nav>{anchors}</nav></header>"
    )


def _headline(space: SearchSpace, records: Sequence[TrialRecord], ordered: Sequence[TrialRecord]) -> str:
    metric = space.metrics[0]
    counts = Counter(record.status for record in records)
    ends = ", ".join(f"{count} {_ENDS[status]}" for status, count in counts.most_common())
    if not ordered:
        return (
            f'<p class="verdict bad">No trial has a value of {escape(metric.name)}: {escape(ends) or "no trials"}.</p>'
        )
    best = ordered[0]
    value = best.value(metric.name)
    assert value is not None
    trained, whole = _images(records), len([r for r in records if r.rungs]) * space.images
    failed = counts["failed"]
    tone = "bad" if failed else "good"
    said = f"Trial {best.number} is the best: {metric.name} {short(value)}."
    said += f" {failed} of {len(records)} trials failed; the table of all trials says why." if failed else ""
    typical = _median([v for r in ordered if r.status == "finished" and (v := r.value(metric.name)) is not None])
    cards = [
        (metric.name, short(value), f"trial {best.number}, {drawn_text(dict(best.drawn))}"),
        ("Median of the finished trials", "none" if typical is None else short(typical), f"of {counts['finished']}"),
        ("Trials", str(len(records)), ends),
        (
            "Images trained on",
            f"{trained:,}",
            f"{100 * trained / whole:.0f} % of training all of them to the end" if whole else "",
        ),
    ]
    drawn = "".join(
        f'<div class="card"><small>{escape(name)}</small><b>{escape(shown)}</b><small>{escape(detail)}</small></div>'
        for name, shown, detail in cards
    )
    return f'<p class="verdict {tone}">{escape(said)}</p><div class="cards">{drawn}</div>'


def _best(space: SearchSpace, ordered: Sequence[TrialRecord], sheets: Mapping[int, bytes]) -> str:
    shown = ordered[:_BEST]
    if not shown:
        return ""
    names = list(dict.fromkeys(name for record in shown for name in record.drawn))
    rows = [
        [
            f"<code>{escape(name)}</code>",
            *(escape(_value(record.drawn[name])) if name in record.drawn else "&ndash;" for record in shown),
        ]
        for name in names
    ]
    figures = list(dict.fromkeys(name for record in shown for rung in record.rungs for name in rung.metrics))
    sought = [metric.name for metric in space.metrics]
    for name in [*sought, *(name for name in figures if name not in sought)]:
        values = [record.value(name) for record in shown]
        rows.append([f"{escape(name)}", *("&ndash;" if value is None else short(value) for value in values)])
    head = ["", *(f"Trial {record.number}" for record in shown)]
    pictures = "".join(
        captioned(sheets[record.number], f"Trial {record.number}") for record in shown if record.number in sheets
    )
    text = (
        "The best three trials that were trained to the end; <code>best.yaml</code> holds the first as a configuration."
    )
    return section(
        "best", "The best", text, table(head, rows), f'<div class="pair" style="margin-top:1rem">{pictures}</div>'
    )


def _curves(space: SearchSpace, records: Sequence[TrialRecord], ordered: Sequence[TrialRecord]) -> str:
    metric = space.metrics[0]
    drawn = [
        curves_chart(metric.name, records, [record.number for record in ordered]),
        progress_chart(metric.name, running_best(space, records)),
    ]
    text = "A ring is where a trial was stopped because others were better after as many images."
    return section("curves", "Learning curves", text, *drawn)


def _parallel(space: SearchSpace, ordered: Sequence[TrialRecord]) -> str:
    known = [record for record in ordered if space.contains(dict(record.drawn))]
    text = "One line is one trial. Strong lines that pass through one place say that the place is good."
    return section("parallel", "Every trial's values", text, parallel_chart(space, known))


def _importance(space: SearchSpace, records: Sequence[TrialRecord], resamples: int) -> str:
    found = importance(space, records, resamples=resamples)
    if found is None:
        text = f"Too little to say: it takes at least {FEWEST_TRIALS} trials with different values."
        return section("importance", "What mattered", text)
    text = (
        f"How much of the variance of {escape(found.metric)} over the space stays when all but one parameter is known, "
        f"its total effect: by a forest fitted to {found.trials} trials after {found.images:,} images. "
        "Shares add up to more than 1 where parameters act together. "
    )
    if found.explained <= 0:
        text += (
            f"<b>The forest explains nothing of trials that it did not see (R² {found.explained:.2f}): "
            "these bars are noise, more trials would tell.</b>"
        )
    else:
        text += f"The forest explains {100 * found.explained:.0f} % of the variance of trials that it did not see."
    return section("importance", "What mattered", text, importance_chart(found))


def _trade(space: SearchSpace, records: Sequence[TrialRecord], ordered: Sequence[TrialRecord]) -> str:
    trade = trade_off(space, records)
    if trade is None:
        return ""
    best = [record.number for record in ordered]
    numbers = {record.number: record for record in records}
    rows = [
        [
            f"Trial {number}",
            short(trade.points[number][0]),
            short(trade.points[number][1]),
            f'<span class="text">{escape(drawn_text(dict(numbers[number].drawn)))}</span>',
        ]
        for number in trade.front
    ]
    text = "The trials on the front: no other one is better on one side without being worse on the other."
    head = ["", trade.cost.name.replace("_", " "), trade.quality.name, "Values"]
    drawn = table(head, rows).replace('<td><span class="text">', '<td class="wrap"><span class="text">')
    return section("trade", "The trade", text, trade_chart(trade, best), drawn)


def _cost(space: SearchSpace, records: Sequence[TrialRecord]) -> str:
    compute = space.resolved_base.compute
    processors = compute.most_workers * compute.threads_per_worker
    rows = []
    for status, ends in _ENDS.items():
        mine = [record for record in records if record.status == status]
        if mine:
            rows.append([escape(ends), *_sums(space, mine, processors)])
    rows.append(["Total", *_sums(space, records, processors)])
    failed = sum(record.seconds for record in records if record.status == "failed")
    total = sum(record.seconds for record in records)
    lost = f" Trials that failed took {100 * failed / total:.0f} % of the time." if failed and total else ""
    devices = f", {compute.most_workers * compute.gpus_per_worker} GPUs a trial" if compute.gpus_per_worker else ""
    text = (
        f"A trial has {compute.most_workers} &times; {compute.threads_per_worker} CPU threads{devices}; time is that "
        f"of its own process, start included. Multiply the hours by your price of one.{lost}"
    )
    head = ["", "Trials", "Images", "Of the images to the end", "Time", "CPU-hours"]
    return section("cost", "What it cost", text, table(head, rows))


def _sums(space: SearchSpace, records: Sequence[TrialRecord], processors: int) -> list[str]:
    images, seconds = _images(records), sum(record.seconds for record in records)
    whole = len(records) * space.images
    return [
        str(len(records)),
        f"{images:,}",
        f"{100 * images / whole:.0f} %" if whole else "&ndash;",
        duration(seconds),
        f"{seconds * processors / 3600:.2f}",
    ]


def _trials(space: SearchSpace, records: Sequence[TrialRecord], ordered: Sequence[TrialRecord]) -> str:
    rank = {record.number: place for place, record in enumerate(ordered)}
    rows = []
    for record in sorted(records, key=lambda record: (rank.get(record.number, len(rank)), record.number)):
        values = [record.value(metric.name) for metric in space.metrics]
        said = drawn_text(dict(record.drawn))
        if record.error:
            said += f". {record.error}"
        rows.append(
            [
                f"Trial {record.number}",
                escape(_ENDS[record.status]),
                f"{record.images:,}",
                *("&ndash;" if value is None else short(value) for value in values),
                duration(record.seconds),
                f'<span class="text">{escape(said)}</span>',
            ]
        )
    head = ["", "End", "Images", *(metric.name for metric in space.metrics), "Time", "Values"]
    drawn = table(head, rows).replace('<td><span class="text">', '<td class="wrap"><span class="text">')
    return section(
        "trials",
        "All trials",
        "The best first; at the end those without a figure.",
        folded(f"{len(rows)} trials", drawn),
    )


def _space(space: SearchSpace) -> str:
    shown = space.model_dump(mode="json", exclude={"resolved_base"}, exclude_none=True, exclude_defaults=True)
    listing = yaml.safe_dump(json.loads(json.dumps(shown)), sort_keys=False, allow_unicode=True)
    return section("space", "The space", "What was searched.", folded("As YAML", f"<pre>{escape(listing)}</pre>"))


# ---- small words ----


def _images(records: Sequence[TrialRecord]) -> int:
    return sum(record.images for record in records)


def _median(values: Sequence[float]) -> float | None:
    ordered = sorted(values)
    if not ordered:
        return None
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _value(value: object) -> str:
    return short(value) if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """A time a reader can take in."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
