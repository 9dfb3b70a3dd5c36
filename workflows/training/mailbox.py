"""Where workers leave reports for the driver: an actor without dependencies, so that its process starts at once."""

from __future__ import annotations

from collections import deque
from typing import Any


class Mailbox:
    """Holds what workers report until the driver takes it; when nobody takes anything, the oldest messages go."""

    def __init__(self) -> None:
        self._messages: deque[tuple[str, Any]] = deque(maxlen=10_000)

    def put(self, message: tuple[str, Any]) -> None:
        """Leave a message."""
        self._messages.append(message)

    def take(self) -> list[tuple[str, Any]]:
        """All messages so far."""
        taken = list(self._messages)
        self._messages.clear()
        return taken
