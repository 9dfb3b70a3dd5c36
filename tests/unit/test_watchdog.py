"""A hung training names the silent worker and where it was; a slow one is named, too."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from workflows.training.ledger import Ledger
from workflows.training.watchdog import Heart, Pulse, Watchdog

WAITING = ("loop.py:9 in step", "/site-packages/torch/distributed/distributed_c10d.py:1 in all_reduce")
ELSEWHERE = ("loop.py:9 in step", "batches.py:4 in batch")


class Clock:
    """A clock that is moved by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def pulse(rank: int, idle: float = 0.0, stack: tuple[str, ...] = WAITING, **changes: float | str) -> Pulse:
    return replace(Pulse(rank, 100 + rank, "host", idle, "steps", 0.0, stack), **changes)  # type: ignore[arg-type]


def watchdog(clock: Clock) -> Watchdog:
    return Watchdog(hang_seconds=60, slow_factor=2, store_seconds=1000, clock=clock)


def test_all_is_well_before_the_first_pulse_while_steps_are_taken_and_while_a_checkpoint_is_written() -> None:
    clock = Clock()
    dog = watchdog(clock)
    clock.now = 1000
    assert dog.hung() == ""
    dog.hear(pulse(0, idle=59))
    dog.hear(pulse(1, idle=900))
    assert dog.hung() == "", "worker 0 has just done something"
    dog.hear(pulse(0, idle=61))
    dog.hear(replace(pulse(1, idle=900), doing="checkpoint"))
    assert dog.hung() == "", "the store may be away"
    dog.hear(pulse(0, idle=1061))
    dog.hear(replace(pulse(1, idle=1062), doing="checkpoint"))
    assert "no step for 1061 s" in dog.hung(), "but not for ever"


def test_the_one_that_is_elsewhere_while_the_others_wait_is_named_with_its_stack() -> None:
    dog = watchdog(Clock())
    dog.hear(pulse(0, idle=61))
    dog.hear(pulse(1, idle=70, stack=ELSEWHERE))
    dog.hear(pulse(2, idle=65))
    assert dog.hung().splitlines() == [
        "no step for 61 s (compute.faults.hang_seconds=60); all workers start again",
        "worker 1 (process 101 on host) is not where the others wait; it was last seen at",
        "  loop.py:9 in step",
        "  batches.py:4 in batch",
    ]


def test_one_that_gives_no_sign_of_life_is_named_with_where_it_was_last() -> None:
    clock = Clock()
    dog = watchdog(clock)
    dog.hear(pulse(1, idle=1, stack=ELSEWHERE))
    for _ in range(62):
        clock.now += 1
        dog.hear(pulse(0, idle=clock.now, stack=ELSEWHERE))
    found = dog.hung()
    assert "worker 1 (process 101 on host) gives no sign of life; it was last seen at" in found
    assert "worker 0" not in found


def test_when_every_one_waits_all_are_named() -> None:
    dog = watchdog(Clock())
    for rank in (0, 1):
        dog.hear(pulse(rank, idle=100))
    assert dog.hung().count("waits for the others") == 2


@pytest.mark.parametrize(("own", "named"), [((10.0, 31.0), [1]), ((10.0, 19.0), []), ((10.0, 11.0, 9.0, 40.0), [3])])
def test_a_slow_worker_is_named_after_half_a_minute(own: tuple[float, ...], named: list[int]) -> None:
    clock = Clock()
    dog = watchdog(clock)
    for rank in range(len(own)):
        dog.hear(pulse(rank))
    assert dog.slow() == []
    clock.now = 20
    for rank, seconds in enumerate(own):
        dog.hear(replace(pulse(rank), own_seconds=seconds))
    assert dog.slow() == [], "too early"
    clock.now = 31
    found = dog.slow()
    assert [int(line.split()[1]) for line in found] == named
    assert all("is slow: its own part of the steps takes" in line for line in found)
    assert dog.slow() == [], "a new window has begun"


def test_a_heart_tells_where_its_training_is_until_it_ends() -> None:
    pulses: list[Pulse] = []
    arrived = threading.Event()

    def send(found: Pulse) -> None:
        pulses.append(found)
        arrived.set()

    ledger = Ledger()
    with ledger.time("evaluation"), Heart(send, 3, ledger):
        assert arrived.wait(30)
    count = len(pulses)
    first = pulses[0]
    assert (first.rank, first.doing, first.waits) == (3, "evaluation", False)
    assert any("test_watchdog.py" in frame and "test_a_heart_tells" in frame for frame in first.stack)
    assert len(pulses) == count and "hvqd-pulse" not in {thread.name for thread in threading.enumerate()}
