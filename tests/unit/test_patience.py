"""Waiting for a store that is away: it goes on when it is back, gives up in time, and says one line a minute."""

from __future__ import annotations

import logging

import pytest

from infra.errors import EnvironmentFailure, InputError
from infra.storage import Store
from workflows.training import patience
from workflows.training.patience import Warnings, persist

REMOTE = Store("memory://bucket/checkpoints")


class Flaky:
    """A call that fails so many times."""

    def __init__(self, failures: int, error: type[Exception] = EnvironmentFailure) -> None:
        self.failures, self.error, self.calls = failures, error, 0

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error("cannot write s3://key:hunter2SECRET@bucket/x: 503\nhint: wait")
        return "done"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses of a test's length, and nothing said yet."""
    monkeypatch.setattr(patience, "_FIRST_PAUSE", 0.001)
    monkeypatch.setattr(patience, "_LONGEST_PAUSE", 0.002)
    monkeypatch.setattr(patience, "_warnings", Warnings())


@pytest.mark.parametrize("store", [REMOTE, None])
def test_it_goes_on_when_the_store_is_back_and_says_so_once(
    store: Store | None, caplog: pytest.LogCaptureFixture
) -> None:
    call = Flaky(20)
    with caplog.at_level(logging.WARNING):
        assert persist(call, "upload the checkpoint", store, 60) == "done"
    assert call.calls == 21
    (record,) = caplog.records
    assert "could not upload the checkpoint, trying again for 60 s more: cannot write s3://key:***@" in record.message
    assert "hunter2SECRET" not in caplog.text


def test_it_gives_up_in_time_with_the_stores_own_words() -> None:
    with pytest.raises(EnvironmentFailure, match=r"cannot write .*: 503\nhint: wait"):
        persist(Flaky(1_000_000), "upload", REMOTE, 0.05)


def test_a_local_disk_is_not_waited_for() -> None:
    call = Flaky(1)
    with pytest.raises(EnvironmentFailure, match="503"):
        persist(call, "upload", Store("/some/folder"), 60)
    assert call.calls == 1


@pytest.mark.parametrize("error", [InputError, FileNotFoundError])
def test_what_is_no_fault_of_the_store_is_raised_at_once(error: type[Exception]) -> None:
    call = Flaky(1, error)
    with pytest.raises(error, match="503"):
        persist(call, "read", REMOTE, 60)
    assert call.calls == 1


def test_what_is_done_between_the_attempts_can_end_the_waiting() -> None:
    done: list[int] = []

    def meanwhile() -> None:
        done.append(1)
        if len(done) == 3:
            raise EnvironmentFailure("the lock was taken over")

    call = Flaky(1_000_000)
    with pytest.raises(EnvironmentFailure, match="was taken over"):
        persist(call, "send metrics", None, 60, meanwhile)
    assert (len(done), call.calls) == (3, 3)


def test_one_warning_a_minute_tells_how_many_it_stands_for() -> None:
    now = [0.0]
    warnings = Warnings(lambda: now[0])
    said = []
    for second in range(0, 181, 10):
        now[0] = float(second)
        said.append(warnings.say("away"))
    assert [line for line in said if line] == [
        "away",
        *["away (and 5 more since the last such line)"] * 3,
    ]
