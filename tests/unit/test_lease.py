"""A lease: who waits is told for whom, and nobody waits for the dead. (That holders take turns is a store fact.)"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from infra.errors import EnvironmentFailure
from infra.lease import hold, is_free
from infra.storage import Store

HOLDER = """
import sys, time
from infra.lease import hold
from infra.storage import Store

with hold(Store(sys.argv[1]), "a test", seconds=float(sys.argv[2])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_who_waits_in_vain_is_told_who_holds_it(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    said = r"second: first is under way by .*@.* \(process \d+\) since 2.*\nhint: wait for it; .* after 60 s"
    with hold(store, "first"), pytest.raises(EnvironmentFailure, match=said), hold(store, "second", patience_seconds=0):
        pytest.fail("two holders")


def test_a_lease_is_free_again_after_an_error(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with pytest.raises(KeyError), hold(store, "first"):
        raise KeyError
    with hold(store, "second", patience_seconds=0) as lease:
        assert lease.number == 2


@contextmanager
def another_holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), "600"], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_killed_holder_on_this_machine_is_passed_over_at_once(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with another_holder(tmp_path) as process:
        with pytest.raises(EnvironmentFailure, match="a test is under way"), hold(store, "early", patience_seconds=0):
            pytest.fail("it is alive")
        process.send_signal(signal.SIGKILL)
        process.wait()
        with hold(store, "late", patience_seconds=0) as lease:
            assert lease.number == 2


def test_a_holder_elsewhere_is_passed_over_when_its_time_is_up(tmp_path: Path) -> None:
    """Another machine's process cannot be looked at, even if its number is one of here that has ended."""
    store = Store(str(tmp_path))
    with another_holder(tmp_path):
        pass
    file = tmp_path / "000000000001.json"
    entry = json.loads(file.read_text())
    entry["process"][0] = "another boot"
    file.write_text(json.dumps(entry))
    with pytest.raises(EnvironmentFailure, match="a test is under way"), hold(store, "early", patience_seconds=0):
        pytest.fail("the time is not up")
    file.write_text(json.dumps(entry | {"until": time.time() - 1}))
    with hold(store, "late", patience_seconds=0) as lease:
        assert lease.number == 2


def test_a_holder_that_was_overtaken_learns_of_it(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with hold(store, "slow", seconds=0.0) as slow:
        slow.check_held()
        with hold(store, "quick", patience_seconds=0):
            assert not slow.is_held()
            with pytest.raises(EnvironmentFailure, match=re.escape(f"the lock {store.url} was taken over")):
                slow.check_held()


def test_a_damaged_lease_does_not_lock_everybody_out(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.write_bytes("000000000007.json", b"{half")
    with hold(store, "next", patience_seconds=0) as lease:
        assert lease.number == 8
    assert json.loads(store.read_bytes("000000000008.json"))["released"] is True


def test_an_extended_lease_outlives_its_first_term_and_an_overtaken_one_cannot_be_extended(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with hold(store, "first", seconds=0.0) as first:
        first.extend(60)
        said = r"second: first is under way"
        with pytest.raises(EnvironmentFailure, match=said), hold(store, "second", patience_seconds=0):
            pytest.fail("two holders")
        first.extend(0.0)
        with hold(store, "second", patience_seconds=0), pytest.raises(EnvironmentFailure, match="was taken over"):
            first.extend(60)


def test_a_lease_is_free_before_between_and_after_its_holders(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    assert is_free(store)
    with hold(store, "first"):
        assert not is_free(store)
    assert is_free(store)
    with another_holder(tmp_path) as process:
        assert not is_free(store)
        process.kill()
        process.wait()
        assert is_free(store)
