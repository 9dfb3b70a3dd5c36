"""What the user sees of a job while it runs: a bar with rate and time left in a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

_LINE_SECONDS = 15.0


class ConsoleProgress:
    """The progress of one command, on standard error."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._interactive = self._stream.isatty()
        self._console = Console(file=self._stream, highlight=False, soft_wrap=True, emoji=False)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._key: tuple[float, str] | None = None
        self._start = (0.0, 0.0)
        self._last = (0.0, -1.0)
        self._last_line = 0.0

    def say(self, text: str) -> None:
        """One line; a bar that is under way stays below it or ends."""
        self.finish()
        self._console.print(text, markup=False)

    def update(self, done: float, total: float, unit: str, note: str = "") -> None:
        """Show how far the step is; a new total or unit, or a step back, begins a new bar."""
        now = time.monotonic()
        if self._key != (total, unit) or done < self._last[1]:
            self.finish()
            self._key, self._start, self._last_line = (total, unit), (now, done), now
        self._last = (now, done)
        text = f"{done:,.0f}/{total:,.0f} {unit}{self._pace(now, done, total, unit)}{'  ' + note if note else ''}"
        if self._interactive:
            self._draw(done, total, text)
        elif now - self._last_line >= _LINE_SECONDS or done >= total:
            self._last_line = now
            self._console.print(f"  {text}", markup=False)
        if done >= total:
            self.finish()

    def finish(self) -> None:
        """End the bar that is under way."""
        if self._bar is not None:
            self._bar.stop()
        self._bar, self._task, self._key = None, None, None

    def _pace(self, now: float, done: float, total: float, unit: str) -> str:
        seconds, advanced = now - self._start[0], done - self._start[1]
        if seconds <= 0 or advanced <= 0:
            return ""
        rate = advanced / seconds
        left = (total - done) / rate
        return f"  {rate:,.1f} {unit}/s  {int(left) // 60}:{int(left) % 60:02d} left"

    def _draw(self, done: float, total: float, text: str) -> None:
        if self._bar is None:
            columns = (
                TextColumn(" "),
                BarColumn(28),
                TextColumn("{task.description}", markup=False),
                TimeElapsedColumn(),
            )
            self._bar = Progress(*columns, console=self._console, transient=True, refresh_per_second=4)
            self._task = self._bar.add_task(text, total=total, completed=int(done))
            self._bar.start()
        assert self._task is not None
        self._bar.update(self._task, completed=done, description=text)
