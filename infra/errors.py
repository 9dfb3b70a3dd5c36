"""Errors a user can meet, each with the exit status of the command line.

A message is two lines: what is wrong (with the value and what is allowed), and `hint:` with what to do.
The science (`hvqd_model`) raises plain ValueError of the same form; the front door treats both alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class InputError(ValueError):
    """Bad usage, input or configuration: exit status 2."""


class EnvironmentFailure(RuntimeError):  # noqa: N818 - it names what failed, the machine and its services
    """The environment let us down (disk full, store or server away): exit status 1."""


class GateRefusal(RuntimeError):  # noqa: N818
    """A promotion gate refused: exit status 3."""

    def __init__(self, message: str, facts: Mapping[str, Any] | None = None, shown: str = "") -> None:
        """Keep what every gate said.

        Args:
            facts: for programs, printed with `--json`.
            shown: for people, printed before the message.
        """
        super().__init__(message)
        self.facts = dict(facts or {})
        self.shown = shown
