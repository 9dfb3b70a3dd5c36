"""The driver's desk: what workers report is passed on to the user, the tracker and the stage's folder."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infra import tracking
from infra.errors import EnvironmentFailure
from infra.secrets import mask
from infra.storage import Store
from workflows.context import Context
from workflows.training.alarms import Alarm
from workflows.training.ledger import Goodput
from workflows.training.meters import Meters, meters_for
from workflows.training.patience import Warnings, persist
from workflows.training.turn import Turn
from workflows.training.watchdog import Watchdog

PICTURES, TIMES = "pictures/", "times/"
_BOOKS = "goodput.json"
_BETWEEN_SECONDS = 10.0
_WAITING = "trying again"


@dataclass
class Desk:
    """Where what workers reported is passed to the user, to the tracker and to the stage's folder."""

    context: Context
    folder: Store
    """Of the stage on the root."""
    request: str = ""
    """What the training answers: the books of another one are not gone on with."""
    turn: Turn | None = None
    """The right to write the stage's folder, kept while workers are looked after."""
    _alarms: set[str] = field(default_factory=set)
    """Those that the user knows of: a restarted worker raises again what came after its checkpoint."""
    records: int = 0
    """How many lines of the history workers sent."""
    stopped: int = 0
    """The order that the present group has obeyed, if any."""
    has_begun: bool = False
    """Whether the present group has taken a step."""
    goodput: Goodput = field(default_factory=Goodput)
    _watchdog: Watchdog | None = None
    _meters: Meters | None = None
    _warnings: Warnings = field(default_factory=Warnings)
    _said: dict[str, Warnings] = field(default_factory=dict)
    """By what was said."""
    _times_kept: float = 0.0

    def __post_init__(self) -> None:
        with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            books = self.folder.read_json(f"{TIMES}{_BOOKS}")
            if books["request"] == self.request:
                self.goodput = Goodput.from_json(books)

    def begin(self, watchdog: Watchdog) -> None:
        """A new group of workers starts."""
        self.stopped, self.has_begun, self._watchdog = 0, False, watchdog
        self.goodput.begin()
        stage, address = self.folder.url.rsplit("/", 1)[-1], self.context.config.compute.address
        self._meters = meters_for(address, stage, self.context.root.url, rank=None)

    def keep_turn(self) -> None:
        """Renew the right to write here.

        Raises:
            EnvironmentFailure: somebody else has taken it.
        """
        if self.turn is not None:
            self.turn.keep()

    def warn(self, line: str) -> None:
        """One line, at most once a minute."""
        shown = self._warnings.say(line)
        if shown is not None:
            self.context.progress.say(f"  {shown}")

    def pass_on(self, line: str) -> None:
        """What the training says, once however many processes say it; of waiting, a line a minute from all of them."""
        kind = _WAITING if _WAITING in line else line
        shown = self._said.setdefault(kind, Warnings()).say(line)
        if shown is not None:
            self.context.progress.say(f"  {mask(shown)}")

    def keep_times(self) -> None:
        """Write where the time went, so that a later command goes on with the same books."""
        self._times_kept = time.monotonic()
        with suppress(EnvironmentFailure):  # bookkeeping ends no training
            self.folder.write_json(f"{TIMES}{_BOOKS}", {"request": self.request, **self.goodput.as_json()})

    def tell_times(self, images: int) -> None:
        """End the books: show where the time went, and tell the tracker."""
        summary = self.goodput.end()
        with suppress(EnvironmentFailure):
            self.folder.delete(f"{TIMES}{_BOOKS}")  # the artifact's manifest has them from here on
        seconds = {name: value for name, value in summary["seconds"].items() if value >= 0.05}
        shown = ", ".join(f"{name} {value:.1f}" for name, value in sorted(seconds.items(), key=lambda item: -item[1]))
        self.context.progress.say(f"  {summary['goodput']:.0%} of {summary['wall_seconds']:.0f} s were steps ({shown})")
        if self.context.run is not None:
            run = self.context.run
            values = {f"seconds/{name}": value for name, value in summary["seconds"].items()}
            values |= {"goodput": summary["goodput"], "seconds/wall": summary["wall_seconds"]}
            self._tell_tracker("send times to the tracker", lambda: run.log_metrics(values, step=images))

    def show(self, messages: list[tuple[str, Any]]) -> int:
        """Pass messages on, in order; returns how many of them were records."""
        records = 0
        for kind, content in messages:
            match kind:
                case "progress":
                    images_seen, total, note = content
                    self.context.progress.update(images_seen, total, "images", note)
                case "record":
                    records += 1
                    self._record(content)
                case "past":
                    self._catch_up(*content)
                case "alarm":
                    self._alarm(content)
                case "said":
                    self.pass_on(content)
                case "picture":
                    self._picture(*content)
                case "pulse":
                    if self._watchdog is not None:
                        self._watchdog.hear(content)
                case "times":
                    self.has_begun = True
                    self.goodput.hear(*content)
                    if self._meters is not None:
                        self._meters.tell_times(self.goodput.summary())
                    if time.monotonic() - self._times_kept > _BETWEEN_SECONDS:
                        self.keep_times()
                case "stopped":
                    self.stopped = content
        self.records += records
        return records

    def _tell_tracker(self, what: str, call: Callable[[], object]) -> None:
        """A tracker that is away for a while ends no training, and does not cost it its turn."""

        def meanwhile() -> None:
            tracking.renew()
            self.keep_turn()

        persist(call, what, None, self.context.config.compute.faults.patience_seconds, meanwhile)

    def _record(self, record: dict[str, float]) -> None:
        if self.context.run is not None:
            values = {name: value for name, value in record.items() if name != "images"}
            run, step = self.context.run, int(record["images"])
            self._tell_tracker("send metrics to the tracker", lambda: run.log_metrics(values, step=step))
        if self.context.listen is not None:
            self.context.listen(record)

    def _catch_up(self, history: list[dict[str, float]], alarms: list[Alarm]) -> None:
        """What a driver that was killed did not pass on any more; the tracker leaves out what it has."""
        for record in history:
            self._record(record)
        for alarm in alarms:
            self._alarm(alarm, is_news=False)

    def _alarm(self, alarm: Alarm, *, is_news: bool = True) -> None:
        if alarm.title in self._alarms:
            return
        self._alarms.add(alarm.title)
        if is_news:
            for line in alarm.text.splitlines():
                self.context.progress.say(f"  {line}")
        if self.context.run is not None:
            name = "_".join(alarm.title.replace(",", "").split())
            run, tags = self.context.run, {f"hvqd.alarm.{name}": alarm.text}
            self._tell_tracker("send an alarm to the tracker", lambda: run.set_tags(tags))

    def _picture(self, images_seen: int, png: bytes) -> None:
        patience = self.context.config.compute.faults.patience_seconds
        persist(lambda: self.folder.write_bytes(f"{PICTURES}latest.png", png), "write a picture", self.folder, patience)
        if self.context.run is not None:
            with tempfile.TemporaryDirectory(prefix="hvqd-picture-") as scratch:
                path = Path(scratch) / f"images-{images_seen:012d}.png"
                path.write_bytes(png)
                run = self.context.run
                self._tell_tracker("send a picture to the tracker", lambda: run.log_file(path, "pictures"))
