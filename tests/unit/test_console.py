"""What the user sees of a job: plain lines in a log, a bar in a terminal, and text exactly as it was said."""

from __future__ import annotations

import io
import os
import re
import threading

import pytest

from workflows.commands.console import ConsoleProgress

BAR = re.compile(r"\x1b\[|━")


def test_what_is_said_comes_out_as_it_is() -> None:
    stream = io.StringIO()
    said = ["s3://bucket/a:cat:b", "[bold]no markup[/bold] [/]", "x" * 300, "12 of 3.5 'quoted' http://host"]
    for text in said:
        ConsoleProgress(stream).say(text)
    assert stream.getvalue().splitlines() == said


def test_a_log_gets_one_plain_line_when_a_step_is_done() -> None:
    stream = io.StringIO()
    progress = ConsoleProgress(stream)
    for done in range(101):
        progress.update(done * 10, 1_000, "images", "loss [0.5]")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 1, "a step of less than a few seconds needs no more than its end"
    assert re.fullmatch(r"  1,000/1,000 images  [\d,.]+ images/s  0:00 left  loss \[0\.5\]", lines[0])
    assert not BAR.search(stream.getvalue())


def test_each_new_step_begins_anew() -> None:
    stream = io.StringIO()
    progress = ConsoleProgress(stream)
    for total, unit in ((10, "images"), (10, "images"), (10, "pictures"), (20, "pictures")):
        progress.update(total / 2, total, unit)
        progress.update(total, total, unit)
    assert [line.split("  ")[1] for line in stream.getvalue().splitlines()] == [
        "10/10 images",
        "10/10 images",
        "10/10 pictures",
        "20/20 pictures",
    ]


def test_the_pace_counts_from_where_a_resumed_step_stood(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    progress = ConsoleProgress(stream)
    clock = iter([100.0, 130.0, 145.0])
    monkeypatch.setattr("workflows.commands.console.time.monotonic", lambda: next(clock))
    progress.update(1_000, 2_000, "images")
    progress.update(1_300, 2_000, "images")
    progress.update(1_450, 2_000, "images")
    assert stream.getvalue().splitlines() == [
        "  1,300/2,000 images  10.0 images/s  1:10 left",
        "  1,450/2,000 images  10.0 images/s  0:55 left",
    ]


def test_a_terminal_gets_a_bar_that_goes_when_something_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    reading, writing = os.openpty()
    seen: list[bytes] = []

    def read() -> None:
        while True:
            try:
                seen.append(os.read(reading, 65_536))
            except OSError:  # the terminal's other end was closed
                return

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(writing, "w") as terminal:
        progress = ConsoleProgress(terminal)
        progress.update(5, 20, "images", "loss [0.5]")
        progress.update(10, 20, "images", "loss [0.25] [/]")
        progress.say("half [time] :cat:")
        progress.finish()
        terminal.flush()
    reader.join(timeout=10)
    os.close(reading)
    assert not reader.is_alive()
    text = b"".join(seen).decode()
    assert BAR.search(text) and "5/20 images" in text and "loss [0.5]" in text and "loss [0.25] [/]" in text
    assert text.rstrip().endswith("half [time] :cat:"), "the bar is gone below what was said"
