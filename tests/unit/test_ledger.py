"""Every second of a training is booked once, whatever happens to its workers."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workflows.artifacts import Manifest
from workflows.reporting.sections import time_accounts
from workflows.training.ledger import ACCOUNTS, Goodput, Ledger


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_ledger_books_what_happens_inside_and_says_what_it_is_at() -> None:
    clock = Clock()
    ledger = Ledger(clock)
    assert (ledger.idle_seconds, ledger.doing) == (0.0, "")
    with ledger.time("data", own=True):
        clock.now += 2
        assert ledger.doing == "data"
    with ledger.time("steps"):
        clock.now += 3
    clock.now += 4
    assert (ledger.seconds, ledger.own_seconds) == ({"data": 2, "steps": 3}, 2)
    assert (ledger.idle_seconds, ledger.doing) == (4, "")
    ledger.lose(1 / 3)
    assert ledger.seconds == pytest.approx({"data": 2, "steps": 2, "lost": 1})


def heard(goodput: Goodput, clock: Clock, first: int, last: int, steps: float, data: float) -> None:
    """A group's first and last message, and the time between them."""
    goodput.hear(first + 1, first, {})
    clock.now += steps + data
    goodput.hear(last, first, {"steps": steps, "data": data})


def test_a_lost_worker_costs_the_restart_and_the_steps_that_are_done_again() -> None:
    clock = Clock()
    goodput = Goodput(clock)
    goodput.begin()
    clock.now += 10  # workers start
    heard(goodput, clock, 0, 100, steps=50, data=5)
    clock.now += 3  # nobody has noticed yet
    goodput.begin()
    clock.now += 7
    heard(goodput, clock, 60, 200, steps=70, data=7)
    clock.now += 2  # export
    found = goodput.end()
    assert found["seconds"] == pytest.approx(
        {
            "steps": 30 + 70,  # 40 of the 100 images were done again
            "lost": 20,
            "data": 12,
            "start": 10 + 2,
            "restart": 3 + 7,
            "evaluation": 0,
            "checkpoint": 0,
            "other": 0,
        }
    )
    assert found["wall_seconds"] == pytest.approx(154)
    assert found["goodput"] == pytest.approx(100 / 154, abs=1e-4)
    assert found["restarts"] == 1
    clock.now += 99
    assert goodput.summary()["wall_seconds"] == found["wall_seconds"], "the books are closed"


def test_the_books_of_a_killed_command_are_gone_on_with_and_the_pause_between_is_nobodys() -> None:
    clock = Clock()
    killed = Goodput(clock)
    killed.begin()
    clock.now += 10
    heard(killed, clock, 0, 100, steps=50, data=0)
    kept = json.loads(json.dumps(killed.as_json()))
    clock.now += 10_000
    goodput = Goodput.from_json(kept, clock)
    goodput.begin()
    clock.now += 10
    heard(goodput, clock, 80, 100, steps=10, data=0)
    found = goodput.end()
    assert found["wall_seconds"] == pytest.approx(80)
    assert found["seconds"] | {"other": 0} == pytest.approx(
        dict.fromkeys(ACCOUNTS, 0.0) | {"steps": 50, "lost": 10, "start": 10, "restart": 10}
    )


step = st.floats(0, 50)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(step, step, step, step, step, st.integers(0, 50), st.integers(0, 50)), max_size=6))
def test_the_accounts_sum_to_the_wall_time(groups: list[tuple[float, float, float, float, float, int, int]]) -> None:
    clock = Clock()
    began = clock.now
    goodput = Goodput(clock)
    for start, steps, data, unbooked, end, first, images in groups:
        goodput.begin()
        clock.now += start
        if images:
            goodput.hear(first + 1, first, {})
            clock.now += steps + data + unbooked
            goodput.hear(first + images, first, {"steps": steps, "data": data})
        clock.now += end
    found = goodput.end()
    wall = clock.now - began if groups else 0.0
    assert found["wall_seconds"] == pytest.approx(wall, abs=0.01)
    assert sum(found["seconds"].values()) == pytest.approx(wall, abs=0.01)
    assert all(seconds > -0.01 for seconds in found["seconds"].values())
    assert found["seconds"]["other"] == pytest.approx(sum(each[3] for each in groups if each[6]), abs=0.01)


def test_the_report_shows_the_accounts_of_each_training_and_nothing_without_them() -> None:
    books = {"seconds": {"steps": 75.0, "lost": 5.0, "data": 0.01}, "wall_seconds": 100.0, "goodput": 0.75}
    manifests = {
        "vq": Manifest("vq", "", {}, {}, provenance={"goodput": books}),
        "codes": Manifest("codes", "", {}, {}),
    }
    shown = time_accounts(manifests)
    for text in ("Steps that had to be done again", "75.0", "5.0", "100.0", "75.0%"):
        assert text in shown
    assert "waiting for batches" not in shown.lower() and "codes" not in shown
    assert time_accounts({"codes": manifests["codes"]}) == ""
