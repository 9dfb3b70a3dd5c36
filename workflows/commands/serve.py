"""`hvqd serve`: the champion behind HTTP, until somebody stops it."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from infra.errors import EnvironmentFailure
from infra.ports import check_port
from infra.tracking import Tracker
from workflows.config import RunConfig
from workflows.release.registry import find_version
from workflows.serving.app import Served, start, stop


def plan_serving(config: RunConfig, tracker: Tracker, version: str | None) -> tuple[Served, str]:
    """What would be served, and the version that draws first.

    Args:
        version: number or alias of a version that stays; None follows the champion.

    Raises:
        InputError: no such version, or no champion.
    """
    model = config.tracking.model_name
    first = find_version(tracker, model, version or "champion")
    return Served(tracker, model, config.serve, None if version is None else first), first


class Server:
    """A server on a Ray cluster of its own, or on the one that compute.address names."""

    def __init__(self, config: RunConfig, served: Served) -> None:
        """Keep what to serve."""
        self._config, self._served = config, served

    def __enter__(self) -> str:
        """Begin; returns the address.

        Raises:
            EnvironmentFailure: the port is taken, or the model does not come up.
        """
        from infra.cluster import connect, disconnect

        settings = self._served.settings
        check_port(settings.host, settings.port)
        connect(self._config.compute.address, 1)
        try:
            start(self._served)
        except RuntimeError as error:
            disconnect()
            reason = " ".join(str(error).split())[:300]
            raise EnvironmentFailure(
                f"version {self._served.champion()} of {self._served.model} does not come up: {reason}\n"
                "hint: `hvqd models verify champion` looks at its files; --debug shows the log"
            ) from error
        except BaseException:
            disconnect()
            raise
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        return f"http://{host}:{settings.port}"

    def __exit__(self, *error: Any) -> None:
        """Stop serving, and the cluster if it is the server's own."""
        from infra.cluster import disconnect

        stop()
        disconnect()


def until_stopped() -> None:
    """Wait for Ctrl-C or SIGTERM."""
    stopped = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        stopped.set()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while not stopped.wait(3_600):
            pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
