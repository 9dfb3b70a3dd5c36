"""A console that remembers what it was told."""

from __future__ import annotations

from workflows.context import Silent


class Said(Silent):
    """A progress whose lines can be read afterwards."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        """A line."""
        self.lines.append(text)
