"""What the user sees of a sweep while it runs: a table in a terminal, a line an event in a log."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tuning.ledger import ENDED, best_of
from tuning.records import TrialRecord
from tuning.space import SearchSpace

_MOST_ROWS = 14
_WORDS = {"waiting": "waits", "running": "runs", "finished": "finished", "stopped": "stopped early", "failed": "failed"}
_REFRESH_SECONDS = 0.5


class SweepTable:
    """The progress of one sweep, on standard error."""

    def __init__(self, space: SearchSpace, trials: int, stream: TextIO) -> None:
        self._space, self._trials = space, trials
        self._console = Console(file=stream, highlight=False, emoji=False, soft_wrap=not stream.isatty())
        self._live = Live(console=self._console, auto_refresh=False, transient=True) if stream.isatty() else None
        self._records: dict[int, TrialRecord] = {}
        self._steps: dict[int, tuple[float, float, str]] = {}
        self._started, self._shown = time.monotonic(), 0.0
        if self._live is not None:
            self._live.start()

    def known(self, records: Iterable[TrialRecord]) -> None:
        """Trials of earlier sessions."""
        self._records.update({record.number: record for record in records})

    def changed(self, record: TrialRecord) -> None:
        """A trial began, reached a rung or ended."""
        before = self._records.get(record.number)
        self._records[record.number] = record
        if self._live is None and (before is None or (before.status, before.images) != (record.status, record.images)):
            self._console.print(self.line(record), markup=False)
        self.refresh()

    def progress(self, number: int, done: float, total: float, unit: str) -> None:
        """How far a trial's present step is."""
        self._steps[number] = (done, total, unit)
        self.refresh()

    def say(self, text: str) -> None:
        """A line above the table."""
        self._console.print(text, markup=False)

    def refresh(self) -> None:
        """Draw the table anew, at most twice a second."""
        now = time.monotonic()
        if self._live is not None and now - self._shown >= _REFRESH_SECONDS:
            self._shown = now
            self._live.update(self.table(), refresh=True)

    def finish(self) -> None:
        """Leave the table as it is."""
        if self._live is not None:
            self._live.stop()
            self._live = None
            self._console.print(self.table())

    # ---- text ----

    def line(self, record: TrialRecord) -> str:
        """A trial in a line."""
        parts = [f"trial {record.number:>3}", f"{_WORDS.get(record.status, record.status):<13}"]
        parts.append(f"{record.images:>7,}/{self._space.images:,} images")
        values = {metric.name: record.value(metric.name) for metric in self._space.metrics}
        parts += [f"{name} {value:.5g}" for name, value in values.items() if value is not None]
        if record.error:
            parts.append(record.error)
        elif record.status in ("waiting", "running") and not record.rungs:
            parts.append(self._drawn(record))
        return "  ".join(parts)

    def table(self) -> Table:
        """The trials that run, then the best of the others."""
        best = best_of(self._space, self._records.values())
        table = Table(title=self._summary(), title_justify="left", title_style="", expand=True)
        for name in ("trial", "state", "images", *(metric.name for metric in self._space.metrics), "seconds"):
            table.add_column(name, justify="left" if name == "state" else "right", no_wrap=True)
        table.add_column("draw", overflow="ellipsis", no_wrap=True, ratio=1)
        for record in self._rows():
            style = "bold" if best is not None and record.number == best.number else ""
            values = [record.value(metric.name) for metric in self._space.metrics]
            cells = [str(record.number), _WORDS.get(record.status, record.status), self._images(record)]
            cells += ["" if value is None else f"{value:.5g}" for value in values]
            cells += [f"{record.seconds:.0f}", record.error or self._drawn(record)]
            table.add_row(*(Text(cell) for cell in cells), style=style)
        return table

    def _rows(self) -> list[TrialRecord]:
        running = [record for record in self._records.values() if record.status not in ENDED]
        metric = self._space.metrics[0]
        sign = 1 if metric.direction == "min" else -1

        def rank(record: TrialRecord) -> tuple[bool, float, float]:
            value = record.value(metric.name)
            return value is None, -record.images, sign * (value or 0.0)

        ended = sorted((record for record in self._records.values() if record.status in ENDED), key=rank)
        return [*running, *ended][:_MOST_ROWS]

    def _summary(self) -> str:
        counts = Counter(_WORDS.get(record.status, record.status) for record in self._records.values())
        said = ", ".join(f"{count} {word}" for word, count in counts.items()) or "none yet"
        minutes, seconds = divmod(int(time.monotonic() - self._started), 60)
        return f"{self._space.name}: {len(self._records)} of {self._trials} trials ({said}), {minutes}:{seconds:02d}"

    def _images(self, record: TrialRecord) -> str:
        done = float(record.images)
        if record.status == "running" and record.number in self._steps:
            step, total, unit = self._steps[record.number]
            if unit != "images" or total != self._space.images:
                return f"{unit} {step:,.0f}/{total:,.0f}"
            done = max(done, step)
        return f"{100 * done / self._space.images:.0f} %"

    @staticmethod
    def _drawn(record: TrialRecord) -> str:
        def short(value: object) -> str:
            return f"{value:.4g}" if isinstance(value, float) else str(value).replace(" ", "")

        return " ".join(f"{name.rpartition('.')[2]}={short(value)}" for name, value in record.drawn.items())
