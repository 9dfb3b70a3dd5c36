"""Where workers leave reports for the driver: an actor without dependencies, so that its process starts at once."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Mailbox:
    """Holds what workers report until the driver takes it; when nobody takes anything, the oldest messages go."""

    def __init__(self) -> None:
        self._messages: deque[tuple[str, Any]] = deque(maxlen=10_000)
        self._order = 0

    def put(self, message: tuple[str, Any]) -> None:
        """Leave a message."""
        self._messages.append(message)

    def take(self) -> list[tuple[str, Any]]:
        """All messages so far."""
        taken = list(self._messages)
        self._messages.clear()
        return taken

    def give_order(self, order: int) -> None:
        """Ask the workers for something: see `workflows.training.worker`; 0 takes it back."""
        self._order = order

    def order(self) -> int:
        """What the workers are asked for."""
        return self._order


class _PassesOn(logging.Handler):
    def __init__(self, say: Callable[[str], object]) -> None:
        super().__init__(logging.INFO)
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        self._say(record.getMessage())


@contextmanager
def passing_on(say: Callable[[str], object]) -> Iterator[None]:
    """Hand what the training logs to `say` as well: a worker's log lies where its user never looks."""
    logger, handler = logging.getLogger("workflows.training"), _PassesOn(say)
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def open_mailbox() -> Any:
    """A mailbox on the driver's own node: one on a machine that may be lost would take the training with it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(Mailbox).remote()
