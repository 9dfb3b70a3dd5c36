"""Waiting for a store or a server that is away for a while: what training can do instead of failing.

The clients retry for some seconds on their own; an object store that restarts, credentials that are being renewed or a
network that is gone take minutes. One line a minute says what is waited for, and each attempt reads credentials anew.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from infra.errors import EnvironmentFailure
from infra.secrets import mask
from infra.storage import Store, renew

log = logging.getLogger(__name__)

Value = TypeVar("Value")

WARNING_SECONDS = 60.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 15.0


class Warnings:
    """Lets one warning a minute through, and says how many it has held back."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: float | None = None
        self._held = 0

    def say(self, text: str) -> str | None:
        """The line to show now, or None."""
        now = self._clock()
        if self._last is not None and now - self._last < WARNING_SECONDS:
            self._held += 1
            return None
        more = f" (and {self._held} more since the last such line)" if self._held else ""
        self._last, self._held = now, 0
        return text + more


_warnings = Warnings()


def persist(
    call: Callable[[], Value],
    what: str,
    store: Store | None,
    patience_seconds: float,
    meanwhile: Callable[[], None] | None = None,
) -> Value:
    """What `call` returns, tried again for so long as a remote place answers with failures.

    Args:
        store: where; a local folder is not waited for: a full disk does not empty itself. None for a server.
        meanwhile: done between the attempts; what it raises ends the waiting.

    Raises:
        EnvironmentFailure: it still fails after `patience_seconds`.
    """
    deadline, pause = time.monotonic() + patience_seconds, _FIRST_PAUSE
    while True:
        try:
            return call()
        except EnvironmentFailure as error:
            left = deadline - time.monotonic()
            if (store is not None and store.is_local) or left <= 0:
                raise
            reason = mask(str(error).splitlines()[0])
            line = _warnings.say(f"could not {what}, trying again for {left:.0f} s more: {reason}")
            if line is not None:
                log.warning("%s", line)
            time.sleep(min(pause * random.uniform(0.5, 1.0), left))
            renew()
            if meanwhile is not None:
                meanwhile()
            pause = min(2 * pause, _LONGEST_PAUSE)
