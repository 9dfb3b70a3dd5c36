"""Who is silent, who is slow: every worker says once a second how it is, and the driver draws the conclusions.

A collective in which one rank does not take part hangs on all the others, and the process group notices after half an
hour at best. The silent rank is the one that sends no signs of life any more (its process or machine stands still), or
the one that is somewhere else than in a collective while all others wait in one.
"""

from __future__ import annotations

import os
import socket
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from workflows.training.ledger import Ledger

_PULSE_SECONDS = 1.0
_FRAMES = 12
_WAITING = ("torch/distributed", "deepspeed/comm")
"""Where a rank is that waits for others."""
_SLOW_WINDOW_SECONDS = 30.0


@dataclass(frozen=True)
class Pulse:
    """One worker's sign of life."""

    rank: int
    process: int
    host: str
    idle_seconds: float
    """Since it last finished anything that its ledger books."""
    doing: str
    """The account that is open now, if any."""
    own_seconds: float
    """Spent so far on its own part of steps: batches and the forward pass."""
    stack: tuple[str, ...]
    """Where the training is, innermost last."""
    actor: Any = None
    """Its handle, by which it can be ended."""

    @property
    def who(self) -> str:
        """For people."""
        return f"worker {self.rank} (process {self.process} on {self.host})"

    @property
    def waits(self) -> bool:
        """Whether it is in a collective."""
        return any(place in frame for frame in self.stack[-4:] for place in _WAITING)


class Heart:
    """A thread of a worker that sends pulses while the training runs in another."""

    def __init__(self, send: Callable[[Pulse], None], rank: int, ledger: Ledger, actor: Any = None) -> None:
        self._send, self._rank, self._ledger, self._actor = send, rank, ledger, actor
        self._watched = threading.get_ident()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="hvqd-pulse", daemon=True)

    def __enter__(self) -> Heart:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _beat(self) -> None:
        while True:
            self._send(self.pulse())
            if self._end.wait(_PULSE_SECONDS):
                return

    def pulse(self) -> Pulse:
        """How it is now."""
        frame = sys._current_frames().get(self._watched)
        frames = traceback.extract_stack(frame, limit=60)[-_FRAMES:] if frame is not None else []
        return Pulse(
            rank=self._rank,
            process=os.getpid(),
            host=socket.gethostname(),
            idle_seconds=self._ledger.idle_seconds,
            doing=self._ledger.doing,
            own_seconds=self._ledger.own_seconds,
            stack=tuple(f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in frames),
            actor=self._actor,
        )


@dataclass
class Watchdog:
    """The driver's view of one group of workers."""

    hang_seconds: float
    slow_factor: float
    store_seconds: float = 0.0
    """How much longer a checkpoint may take: the store may be away."""
    clock: Callable[[], float] = time.monotonic
    pulses: dict[int, Pulse] = field(default_factory=dict)
    _heard: dict[int, float] = field(default_factory=dict)
    _window: dict[int, float] = field(default_factory=dict)
    """Own seconds at the start of the window in which workers are compared."""
    _window_start: float | None = None

    def hear(self, pulse: Pulse) -> None:
        """A sign of life."""
        self.pulses[pulse.rank], self._heard[pulse.rank] = pulse, self.clock()

    def hung(self) -> str:
        """What is said when nothing has moved for too long, the silent ranks named; empty while all is well."""
        if not self.pulses:
            return ""
        now = self.clock()
        silence = {rank: now - self._heard[rank] for rank in self.pulses}
        idle = min(pulse.idle_seconds + silence[rank] for rank, pulse in self.pulses.items())
        saving = any(pulse.doing == "checkpoint" for pulse in self.pulses.values())
        if idle < self.hang_seconds + (self.store_seconds if saving else 0.0):
            return ""
        dead = [pulse for rank, pulse in self.pulses.items() if silence[rank] > self.hang_seconds / 2]
        elsewhere = [pulse for pulse in self.pulses.values() if not pulse.waits]
        named = dead or elsewhere or list(self.pulses.values())
        why = "is not where the others wait" if elsewhere else "waits for the others"
        why = "gives no sign of life" if dead else why
        allowed = f"compute.faults.hang_seconds={self.hang_seconds:g}"
        lines = [f"no step for {idle:.0f} s ({allowed}); all workers start again"]
        for pulse in sorted(named, key=lambda pulse: pulse.rank):
            lines.append(f"{pulse.who} {why}; it was last seen at")
            lines += [f"  {frame}" for frame in pulse.stack]
        return "\n".join(lines)

    def slow(self) -> list[str]:
        """A line for each worker whose own part of the last half minute took far longer than the others'."""
        now = self.clock()
        current = {rank: pulse.own_seconds for rank, pulse in self.pulses.items()}
        if self._window_start is None or current.keys() != self._window.keys():
            self._window_start, self._window = now, current
            return []
        if now - self._window_start < _SLOW_WINDOW_SECONDS or len(current) < 2:
            return []
        spent = {rank: current[rank] - self._window[rank] for rank in current}
        elapsed = now - self._window_start
        self._window_start, self._window = now, current
        # Of the others: with two workers the median of both would hide the slow one.
        found = []
        for rank, seconds in spent.items():
            others = statistics.median(other for place, other in spent.items() if place != rank)
            if seconds > self.slow_factor * others and seconds > 0.1 * elapsed:
                share = f"{seconds / max(others, 1e-9):.1f} times as long as the others'"
                found.append(f"{self.pulses[rank].who} is slow: its own part of the steps takes {share}")
        return found
