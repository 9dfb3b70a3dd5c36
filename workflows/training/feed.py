"""Batches on the device, the next one made ready while a GPU computes.

On a CPU the same cores make batches and compute, so there the loop simply asks. On a GPU a thread reads the next
micro-batch into page-locked memory, from which copies overlap with computing. What a batch holds is a function of its
position alone, so that being early changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from workflows.training.stage import Position, pinned, place_on

Batch = tuple[Any, ...]


class Feed:
    """Hands out inputs of the objective."""

    def __init__(self, batch: Callable[[Position], Batch], device: torch.device, *, ahead: bool | None = None) -> None:
        """
        Args:
            batch: makes the inputs of a position, on the CPU.
            device: where they are wanted.
            ahead: whether the next ones are made early; None: on a GPU.
        """
        self._batch, self._device = batch, device
        self._ahead = device.type == "cuda" if ahead is None else ahead
        self._thread: ThreadPoolExecutor | None = None
        self._next: tuple[Position, Future[Batch]] | None = None

    def take(self, position: Position, following: Position | None) -> Batch:
        """The inputs of a position, on the device; `following` is most likely asked for next."""
        if not self._ahead:
            return place_on(self._device, *self._batch(position))
        early = self._next
        batch = early[1].result() if early is not None and early[0] == position else self._make(position)
        self._next = None
        if following is not None:
            self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="hvqd-feed")
            self._next = following, self._thread.submit(self._make, following)
        return place_on(self._device, *batch)

    def close(self) -> None:
        """End the thread; what it was making is dropped."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
        self._thread = self._next = None

    def _make(self, position: Position) -> Batch:
        batch = self._batch(position)
        return pinned(*batch) if self._device.type == "cuda" else batch
