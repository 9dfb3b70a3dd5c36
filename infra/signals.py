"""Ctrl-C and SIGTERM that wait for the end of what must not be cut in half."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_KINDS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def held_back() -> Iterator[None]:
    """Let the first Ctrl-C or SIGTERM wait until the block has ended; a second one comes through at once.

    Does nothing outside the main thread, where Python answers no signals.
    """
    before = {kind: signal.getsignal(kind) for kind in _KINDS}
    if threading.current_thread() is not threading.main_thread() or None in before.values():  # None: not Python's own
        yield
        return
    waiting: list[int] = []

    def give_back() -> None:
        for kind, handler in before.items():
            signal.signal(kind, handler)

    def note(number: int, frame: FrameType | None) -> None:
        if not waiting:
            waiting.append(number)
            return
        waiting.clear()
        give_back()
        signal.raise_signal(number)

    for kind in _KINDS:
        signal.signal(kind, note)
    try:
        yield
    finally:
        give_back()
        for number in waiting:
            signal.raise_signal(number)


def ignore_from_now_on() -> None:
    """Let further ones do nothing: the process is ending anyway, and Python's own last steps would die of them."""
    for kind in _KINDS:
        signal.signal(kind, signal.SIG_IGN)
