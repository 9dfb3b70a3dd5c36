"""One thing at a time in the background: what a checkpoint still has to do while training goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """Runs one call in a thread; whoever starts another, or waits, learns how the one before ended."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a call is under way."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, call: Callable[[], None]) -> None:
        """Begin a call when the one before has ended.

        Raises:
            Exception: what the one before raised.
        """
        self.wait()

        def work() -> None:
            try:
                call()
            except BaseException as error:  # handed to whoever waits
                self._failure = error

        # A daemon: a process that ends must not wait for an upload that its peers will never complete.
        self._thread = threading.Thread(target=work, name="hvqd-checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the call that is under way.

        Raises:
            Exception: what it raised.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
