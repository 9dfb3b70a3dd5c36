"""Gauges of a training on Ray's Prometheus exporter, for dashboards and alarms (infra/deploy/docker/grafana).

Values are set from the thread that sends signs of life, once a second; a step only notes two numbers. Ray adds `ray_`
to the names, and labels for node and process. On a cluster of one's own nobody scrapes, and nothing is set.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

TAGS = ("stage", "root", "rank", "device")
METERS: dict[str, str] = {
    "hvqd_images_seen": "Images that the training has seen.",
    "hvqd_images_planned": "Images after which it ends.",
    "hvqd_images_per_second": "Images a second, all workers together, over the last half minute.",
    "hvqd_loss": "Loss, the mean over the last logging interval.",
    "hvqd_goodput_ratio": "Share of all time since the training began, restarts included, that was steps that count.",
    "hvqd_restarts": "How often workers have been started again.",
    "hvqd_checkpoint_age_seconds": "Since the newest complete checkpoint was written: what a lost machine would cost.",
    "hvqd_memory_bytes": "A worker's memory: resident on the host, and the most that was allocated on its GPU.",
}
"""What is exported, without Ray's prefix. The first of all are rank 0's, goodput and restarts the driver's, memory
every worker's."""
_WINDOW_SECONDS = 30.0

Set = Callable[[str, float, dict[str, str]], None]


def on_exporter() -> Set:
    """What sets a gauge of this process, which is part of a Ray cluster."""
    from ray.util.metrics import Gauge

    gauges: dict[str, Any] = {name: Gauge(name, what, tag_keys=TAGS) for name, what in METERS.items()}
    return lambda name, value, tags: gauges[name].set(value, tags)


def nowhere(name: str, value: float, tags: dict[str, str]) -> None:
    """Where nobody scrapes."""


@dataclass
class Meters:
    """What one process of a training tells the exporter."""

    stage: str
    root: str
    rank: int | None
    """None for the driver."""
    set: Set
    clock: Callable[[], float] = time.monotonic
    checkpoint_age: Callable[[], float | None] = lambda: None
    """Seconds since the newest checkpoint; None where it is not known."""
    loss: float | None = None
    _seen: deque[tuple[float, int, int]] = field(default_factory=deque)
    """(time, images seen, images planned) after the last steps."""

    def step(self, images_seen: int, planned: int) -> None:
        """A step is over."""
        now = self.clock()
        if not self._seen or now - self._seen[-1][0] >= 0.5:
            self._seen.append((now, images_seen, planned))
        while now - self._seen[0][0] > _WINDOW_SECONDS and len(self._seen) > 2:
            self._seen.popleft()

    def publish(self) -> None:
        """Set a worker's gauges to what is known now."""
        if self._seen:
            (first, before, _), (last, seen, planned) = self._seen[0], self._seen[-1]
            self._tell("hvqd_images_seen", seen)
            self._tell("hvqd_images_planned", planned)
            # Until now, not until the last step: a training that stands still shows it.
            self._tell("hvqd_images_per_second", (seen - before) / max(self.clock() - first, last - first, 1e-3))
        if self.loss is not None:
            self._tell("hvqd_loss", self.loss)
        if (age := self.checkpoint_age()) is not None:
            self._tell("hvqd_checkpoint_age_seconds", age)
        self._tell("hvqd_memory_bytes", resident_bytes(), "host")
        if torch.cuda.is_available():
            self._tell("hvqd_memory_bytes", torch.cuda.max_memory_allocated(), "gpu")

    def tell_times(self, summary: dict[str, Any]) -> None:
        """The driver's books so far."""
        self._tell("hvqd_goodput_ratio", summary["goodput"])
        self._tell("hvqd_restarts", summary["restarts"])

    def _tell(self, name: str, value: float, device: str = "") -> None:
        rank = "driver" if self.rank is None else str(self.rank)
        self.set(name, float(value), {"stage": self.stage, "root": self.root, "rank": rank, "device": device})


def meters_for(address: str | None, stage: str, root: str, rank: int | None) -> Meters:
    """A process's meters; on a cluster of one's own (no address), and in a driver outside of it, they tell nobody."""
    outside = address is None or (rank is None and address.startswith("ray://"))
    return Meters(stage, root, rank, nowhere if outside else on_exporter())


def resident_bytes() -> int:
    """Of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))
