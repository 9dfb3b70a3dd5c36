"""Where the time goes: every second of a training is booked to one account.

A worker books what it does between its first and its last step; the driver books the rest (starting, restarting,
ending) and moves the time of steps that had to be done again from `steps` to `lost`. What nobody booked is `other`, so
that the accounts always sum to the wall time; a test holds that `other` stays small.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

Account = Literal["steps", "data", "evaluation", "checkpoint", "start", "restart", "lost", "other"]
ACCOUNTS: tuple[Account, ...] = ("steps", "data", "evaluation", "checkpoint", "start", "restart", "lost", "other")
MEANING: dict[Account, str] = {
    "steps": "forward, backward, exchange and optimizer steps that count",
    "data": "waiting for batches",
    "evaluation": "validation",
    "checkpoint": "standing still for checkpoints",
    "start": "starting and ending workers",
    "restart": "finding out, starting again and reading the checkpoint after a fault",
    "lost": "steps that had to be done again",
    "other": "all the rest",
}


@dataclass
class Ledger:
    """Seconds by account."""

    clock: Callable[[], float] = time.monotonic
    seconds: dict[str, float] = field(default_factory=dict)
    doing: str = ""
    """The account that is open now."""
    own_seconds: float = 0.0
    """Of steps and batches, what this rank does alone; on a GPU only what keeps the processor busy."""
    _moved: float | None = None

    @contextmanager
    def time(self, account: Account, *, own: bool = False) -> Iterator[None]:
        """Book what happens inside."""
        started = self.clock()
        outer, self.doing = self.doing, account
        try:
            yield
        finally:
            self.doing, self._moved = outer, self.clock()
            self.book(account, self._moved - started)
            if own:
                self.own_seconds += self._moved - started

    @property
    def idle_seconds(self) -> float:
        """Since something was booked."""
        return 0.0 if self._moved is None else self.clock() - self._moved

    def lose(self, share: float) -> None:
        """Move a share of the steps to those that have to be done again."""
        lost = self.seconds.get("steps", 0.0) * min(max(share, 0.0), 1.0)
        self.book("steps", -lost)
        self.book("lost", lost)

    def book(self, account: Account, seconds: float) -> None:
        """Add seconds to an account."""
        self.seconds[account] = self.seconds.get(account, 0.0) + seconds


@dataclass
class Attempt:
    """What one group of workers did, as the driver heard it."""

    began: float
    """When it was asked for."""
    first_images: int | None = None
    """Where it went on."""
    last_images: int = 0
    accounts: dict[str, float] = field(default_factory=dict)
    first_heard: float | None = None
    """When its first step was heard of."""
    last_heard: float = 0.0


@dataclass
class Goodput:
    """The driver's books of one training, over all its attempts and all its commands."""

    clock: Callable[[], float] = time.monotonic
    totals: dict[str, float] = field(default_factory=dict)
    """Of ended attempts, and of earlier commands."""
    wall: float = 0.0
    """Seconds of earlier commands; the pause between two commands is nobody's."""
    images_reached: int = 0
    seconds_an_image: float = 0.0
    restarts: int = 0
    _began: float | None = None
    _attempt: Attempt | None = None

    def begin(self) -> None:
        """A group of workers is asked for."""
        now = self.clock()
        if self._began is None:
            self._began = now
        self._close(now)
        self._attempt = Attempt(now)

    def hear(self, images_seen: int, first_images: int, accounts: dict[str, float]) -> None:
        """Rank 0 has told its accounts so far."""
        attempt, now = self._attempt, self.clock()
        if attempt is None:
            return
        if attempt.first_heard is None:
            attempt.first_heard, attempt.first_images = now, first_images
            self._lose(self.images_reached - first_images)
        attempt.accounts, attempt.last_images, attempt.last_heard = dict(accounts), images_seen, now
        self.images_reached = images_seen
        done = images_seen - first_images
        if done > 0:
            self.seconds_an_image = accounts.get("steps", 0.0) / done

    def _lose(self, images: int) -> None:
        """Move the time of steps that will be done again."""
        lost = min(max(images, 0) * self.seconds_an_image, self.totals.get("steps", 0.0))
        if lost > 0:
            self._add("steps", -lost)
            self._add("lost", lost)

    def _add(self, account: str, seconds: float) -> None:
        self.totals[account] = self.totals.get(account, 0.0) + seconds

    def _close(self, now: float) -> None:
        """Book an attempt that is followed by another one: what came after its last sign was part of the restart."""
        for account, seconds in self._open_accounts(now, ending="restart").items():
            self._add(account, seconds)
        if self._attempt is not None:
            self.restarts += 1
        self._attempt = None

    def _open_accounts(self, now: float, ending: Account = "start") -> dict[str, float]:
        """Accounts of the attempt under way; all of its wall time.

        Args:
            ending: where the time since its last sign goes.
        """
        attempt = self._attempt
        if attempt is None:
            return {}
        elapsed = now - attempt.began
        told = dict(attempt.accounts)
        spare = elapsed - sum(told.values())
        starting: Account = "restart" if self.restarts else "start"
        if attempt.first_heard is None:
            return {**told, starting: elapsed}
        before = min(max(spare, 0.0), attempt.first_heard - attempt.began)
        after = min(max(spare - before, 0.0), now - attempt.last_heard)
        for account, seconds in ((starting, before), (ending, after)):
            told[account] = told.get(account, 0.0) + seconds
        told["other"] = spare - before - after
        return told

    def summary(self) -> dict[str, Any]:
        """Wall seconds, seconds by account, and the share of them that was steps."""
        now = self.clock()
        accounts = dict.fromkeys(ACCOUNTS, 0.0)
        for account, seconds in [*self.totals.items(), *self._open_accounts(now).items()]:
            accounts[account] += seconds  # type: ignore[index]
        wall = self.wall + (now - self._began if self._began is not None else 0.0)
        return {
            "wall_seconds": round(wall, 3),
            "seconds": {account: round(seconds, 3) for account, seconds in accounts.items()},
            "goodput": round(accounts["steps"] / wall, 4) if wall > 0 else 0.0,
            "restarts": self.restarts,
        }

    def end(self) -> dict[str, Any]:
        """Close the books: no time passes any more; returns the summary."""
        found = self.summary()
        self.totals, self.wall = dict(found["seconds"]), found["wall_seconds"]
        self._began = self._attempt = None
        return found

    def as_json(self) -> dict[str, Any]:
        """All that a later command needs to go on with these books."""
        return {
            **self.summary(),
            "images_reached": self.images_reached,
            "seconds_an_image": self.seconds_an_image,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any], clock: Callable[[], float] = time.monotonic) -> Goodput:
        """The books of an earlier command, which ended in the middle."""
        return cls(
            clock,
            totals=dict(value["seconds"]),
            wall=float(value["wall_seconds"]),
            images_reached=int(value["images_reached"]),
            seconds_an_image=float(value["seconds_an_image"]),
            restarts=int(value["restarts"]) + 1,
        )
