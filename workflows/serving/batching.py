"""Requests that come one by one are drawn together: whatever waits when the drawing thread is free, up to a batch.

Ray Serve's own `serve.batch` forms a batch from what has come within its waiting time even while another is being
drawn. Under load the clients of a small batch then come back together, as a small batch again, and the server draws
two or three pictures at a time with dozens waiting. Here nothing is divided before it can be drawn.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class _Waiting(Generic[Asked, Answer]):
    asked: Asked
    answer: asyncio.Future[Answer]

    def tell(self, answer: Answer | None, error: Exception | None) -> None:
        """From the thread that worked; whoever asked may be gone."""
        self.answer.get_loop().call_soon_threadsafe(self._settle, answer, error)

    def _settle(self, answer: Answer | None, error: Exception | None) -> None:
        if self.answer.done():
            return
        if error is not None:
            self.answer.set_exception(error)
        else:
            self.answer.set_result(answer)  # type: ignore[arg-type]


class Batcher(Generic[Asked, Answer]):
    """A thread that works on what is asked, several at a time, first come first served."""

    def __init__(self, work: Callable[[Sequence[Asked]], Sequence[Answer]], most: int, wait_seconds: float) -> None:
        """Start the thread.

        Args:
            work: an answer for each; an error is everybody's who was asked for together.
            most: how many together.
            wait_seconds: how long a batch that is not full waits for more.
        """
        self._work, self._most, self._wait_seconds = work, most, wait_seconds
        self._queue: queue.SimpleQueue[_Waiting[Asked, Answer]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True, name="draw").start()

    async def ask(self, asked: Asked) -> Answer:
        """The answer, when its turn has come."""
        waiting: _Waiting[Asked, Answer] = _Waiting(asked, asyncio.get_running_loop().create_future())
        self._queue.put(waiting)
        return await waiting.answer

    def _run(self) -> None:
        while True:
            batch = self._gather()
            try:
                answers = self._work([waiting.asked for waiting in batch])
                for waiting, answer in zip(batch, answers, strict=True):
                    waiting.tell(answer, None)
            except Exception as error:  # theirs who asked; the thread goes on
                for waiting in batch:
                    waiting.tell(None, error)

    def _gather(self) -> list[_Waiting[Asked, Answer]]:
        """The next ones, without those whose client is gone; at least one."""
        batch: list[_Waiting[Asked, Answer]] = []
        deadline = 0.0
        while len(batch) < self._most:
            try:
                found = self._queue.get(timeout=max(0.0, deadline - time.monotonic()) if batch else None)
            except queue.Empty:
                break
            if not found.answer.cancelled():
                deadline = deadline if batch else time.monotonic() + self._wait_seconds
                batch.append(found)
        return batch
