"""What every step of the path is handed: the configuration, the root, and who is told how it goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from infra.storage import Store
from infra.tracking import TrackedRun
from workflows.config import RunConfig


class Progress(Protocol):
    """Where a step says what it is doing; a terminal draws a bar, a log gets plain lines."""

    def say(self, text: str) -> None:
        """One line for the user."""

    def update(self, done: float, total: float, unit: str, note: str = "") -> None:
        """How much of the present step is done; called as often as convenient, shown as often as useful."""


class Silent:
    """A progress that tells nobody."""

    def say(self, text: str) -> None:
        """Nothing is shown."""

    def update(self, done: float, total: float, unit: str, note: str = "") -> None:
        """Nothing is shown."""


@dataclass(frozen=True)
class Context:
    """One step's surroundings."""

    config: RunConfig
    root: Store
    progress: Progress = field(default_factory=Silent)
    run: TrackedRun | None = None
    """The step's tracked run; None records nothing."""
    listen: Callable[[Mapping[str, float]], None] | None = None
    """Called in the driver with every record of a training as it comes, `images` included (the search listens)."""
