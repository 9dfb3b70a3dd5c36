"""A Ctrl-C that waits for the end of what must not be cut in half."""

from __future__ import annotations

import signal
import threading

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
