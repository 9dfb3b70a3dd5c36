"""Requests drawn together: full batches under load, an early answer without it, and nobody waits for who is gone."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence

import pytest

from workflows.serving.batching import Batcher


class Slow:
    """Doubles numbers, one batch at a time, when it is let."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = threading.Event()

    def __call__(self, numbers: Sequence[int]) -> list[int]:
        self.batches.append(list(numbers))
        assert self.go.wait(10)
        if 13 in numbers:
            raise ValueError("thirteen")
        return [2 * number for number in numbers]


async def _begun(slow: Slow, batches: int) -> None:
    deadline = time.monotonic() + 10
    while len(slow.batches) < batches:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


def test_what_trickles_in_during_a_draw_is_drawn_together_afterwards() -> None:
    slow = Slow()
    batcher = Batcher(slow, most=4, wait_seconds=0.001)

    async def ask() -> list[int]:
        tasks = [asyncio.create_task(batcher.ask(0))]
        await _begun(slow, 1)
        for number in range(1, 10):
            tasks.append(asyncio.create_task(batcher.ask(number)))
            await asyncio.sleep(0.01)  # longer than a batch waits
        slow.go.set()
        return list(await asyncio.gather(*tasks))

    assert asyncio.run(ask()) == [2 * number for number in range(10)]
    assert slow.batches == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9]]


def test_a_batch_that_is_not_full_waits_for_more_no_longer_than_it_may() -> None:
    slow = Slow()
    slow.go.set()
    batcher = Batcher(slow, most=4, wait_seconds=0.5)

    async def ask() -> float:
        started = time.monotonic()
        await asyncio.gather(*(batcher.ask(number) for number in range(3)))
        return time.monotonic() - started

    assert 0.45 < asyncio.run(ask()) < 5
    assert slow.batches == [[0, 1, 2]]


def test_an_error_is_of_those_who_were_drawn_together_and_the_next_ones_are_answered() -> None:
    slow = Slow()
    slow.go.set()
    batcher = Batcher(slow, most=2, wait_seconds=0.05)

    async def ask() -> list[int | BaseException]:
        return list(await asyncio.gather(*(batcher.ask(n) for n in (13, 1, 2, 3)), return_exceptions=True))

    first, second, *others = asyncio.run(ask())
    assert others == [4, 6]
    for error in (first, second):
        assert isinstance(error, ValueError) and str(error) == "thirteen"


def test_who_is_gone_before_the_draw_is_left_out() -> None:
    slow = Slow()
    batcher = Batcher(slow, most=4, wait_seconds=0.01)

    async def ask() -> None:
        first = asyncio.create_task(batcher.ask(0))
        await _begun(slow, 1)
        gone, stays = asyncio.create_task(batcher.ask(1)), asyncio.create_task(batcher.ask(2))
        await asyncio.sleep(0.01)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        slow.go.set()
        assert (await first, await stays) == (0, 4)

    asyncio.run(ask())
    assert slow.batches == [[0], [2]]
