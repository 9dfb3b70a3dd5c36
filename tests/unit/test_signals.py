"""A Ctrl-C that waits for the end of what must not be cut in half."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import pytest

from infra.signals import held_back


def test_the_first_waits_for_the_end_and_the_second_does_not() -> None:
    done: list[str] = []
    with pytest.raises(KeyboardInterrupt), held_back():
        signal.raise_signal(signal.SIGINT)
        done.append("whole")
    assert done == ["whole"]
    with pytest.raises(KeyboardInterrupt), held_back():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        done.append("never")
    assert done == ["whole"]


def test_it_comes_once_through_blocks_within_blocks_and_handlers_are_as_before() -> None:
    before, caught = signal.getsignal(signal.SIGTERM), []
    signal.signal(signal.SIGTERM, lambda number, frame: caught.append(number))
    mine = signal.getsignal(signal.SIGTERM)
    try:
        with held_back():
            with held_back():
                signal.raise_signal(signal.SIGTERM)
            assert caught == []
        assert caught == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_elsewhere_than_on_the_main_thread_nothing_is_changed() -> None:
    seen: list[object] = []

    def look() -> None:
        with held_back():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]


def test_an_error_of_the_block_gives_way_to_the_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt) as caught, held_back():
        signal.raise_signal(signal.SIGINT)
        raise OSError("meanwhile")
    assert isinstance(caught.value.__context__, OSError)


@pytest.mark.parametrize(("ignores", "status"), [("ignore_from_now_on()", 130), ("", -signal.SIGINT)])
def test_a_process_that_is_ending_keeps_its_status(ignores: str, status: int) -> None:
    """Python gives Ctrl-C back to the system before its last steps, which end the process by the signal."""
    script = f"""
import ctypes, sys
from infra.signals import ignore_from_now_on

libc = ctypes.CDLL(None)
getattr(libc, "__cxa_atexit")(libc.getchar, None, None)  # what comes after Python waits for stdin
{ignores}
print("ends", flush=True)
sys.exit(130)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ends\n"
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        process.communicate(b"\n", timeout=60)
    assert process.returncode == status
