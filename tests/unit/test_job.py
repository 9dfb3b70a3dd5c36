"""How a command ends: its exit status, two lines for people, and one JSON object as the last thing on stdout."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from infra.errors import EnvironmentFailure, GateRefusal, InputError
from infra.quiet import Streams
from workflows.commands.job import Job, exit_status, run_job

REPOSITORY = Path(__file__).parents[2]
SECRET = "hunter2SECRETVALUE"


def job_with_streams(*, as_json: bool = False, debug: bool = False) -> tuple[Job, io.StringIO, io.StringIO]:
    """A job and what it prints to stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    job = Job(None, None, [], None, False, as_json, None, debug, streams=Streams(out, err))
    return job, out, err


def ending(job: Job, body: Callable[[Job], None]) -> int:
    """The exit status of a body that fails."""
    with pytest.raises(typer.Exit) as ended:
        run_job(job, body)
    return ended.value.exit_code


def raising(error: BaseException) -> Callable[[Job], None]:
    def body(job: Job) -> None:
        raise error

    return body


ENDINGS = [
    (InputError("x must be y: z\nhint: do w"), 2, "x must be y: z", "do w"),
    (ValueError("x must be y: z\nhint: do w"), 2, "x must be y: z", "do w"),
    (EnvironmentFailure("no space left\nhint: free some"), 1, "no space left", "free some"),
    (GateRefusal("min_psnr fails\nhint: train longer"), 3, "min_psnr fails", "train longer"),
    (KeyboardInterrupt(), 130, "interrupted", "run the same command again, it goes on where it stood"),
    (MemoryError(), 1, "out of memory", "lower micro_batch or sampling.batch"),
    (ValueError("a bug"), 1, "ValueError: a bug", "the log in .hvqd/logs has the details; --debug shows them here"),
    (KeyError("k"), 1, "KeyError: 'k'", "the log in .hvqd/logs has the details; --debug shows them here"),
    (OSError(5, "I/O"), 1, "OSError: [Errno 5] I/O", "the log in .hvqd/logs has the details; --debug shows them here"),
    (RuntimeError("a\nb\nc"), 1, "RuntimeError: a", "the log in .hvqd/logs has the details; --debug shows them here"),
    (AssertionError(), 1, "AssertionError: ", "the log in .hvqd/logs has the details; --debug shows them here"),
]


@pytest.mark.parametrize(("error", "status", "problem", "hint"), ENDINGS, ids=lambda value: type(value).__name__)
def test_an_error_is_its_status_and_two_lines(error: BaseException, status: int, problem: str, hint: str) -> None:
    assert exit_status(error) == (status, f"{problem}\nhint: {hint}")
    job, out, err = job_with_streams()
    assert ending(job, raising(error)) == status
    assert err.getvalue().splitlines() == [f"error: {problem}", f"hint: {hint}"] and out.getvalue() == ""


@pytest.mark.parametrize(("error", "status", "problem", "hint"), ENDINGS, ids=lambda value: type(value).__name__)
def test_with_json_an_error_is_one_object_on_stdout(error: BaseException, status: int, problem: str, hint: str) -> None:
    job, out, err = job_with_streams(as_json=True)
    assert ending(job, raising(error)) == status
    assert len(out.getvalue().splitlines()) == 1
    assert json.loads(out.getvalue()) == {"status": status, "error": problem, "hint": hint}
    assert err.getvalue().splitlines() == [f"error: {problem}", f"hint: {hint}"]


def test_a_refusal_with_two_hints_keeps_both() -> None:
    job, out, _ = job_with_streams(as_json=True)
    assert ending(job, raising(GateRefusal("a\nhint: b\nhint: c"))) == 3
    assert json.loads(out.getvalue()) == {"status": 3, "error": "a", "hint": "b c"}


def test_a_traceback_goes_to_the_log_unless_debug_asks_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    job, _, err = job_with_streams()
    ending(job, raising(RuntimeError("a bug")))
    assert "Traceback" in capsys.readouterr().err and "Traceback" not in err.getvalue()
    job, _, err = job_with_streams()
    ending(job, raising(InputError("wrong\nhint: right")))
    assert capsys.readouterr().err == "", "what the user can cause needs no traceback"
    job, _, err = job_with_streams(debug=True)
    ending(job, raising(InputError("wrong\nhint: right")))
    assert "Traceback" in err.getvalue() and err.getvalue().splitlines()[-2:] == ["error: wrong", "hint: right"]


@pytest.mark.parametrize("debug", [False, True])
def test_a_secret_in_an_error_is_not_shown_or_logged(debug: bool, capsys: pytest.CaptureFixture[str]) -> None:
    job, out, err = job_with_streams(as_json=True, debug=debug)
    ending(job, raising(RuntimeError(f"cannot reach http://me:{SECRET}@host with password={SECRET}")))
    shown = out.getvalue() + err.getvalue() + capsys.readouterr().err
    assert "http://me:***@host" in shown and SECRET not in shown


def test_a_termination_signal_ends_like_ctrl_c_and_is_handled_as_before_afterwards() -> None:
    before = signal.getsignal(signal.SIGTERM)
    job, _, err = job_with_streams()
    assert ending(job, lambda job: os.kill(os.getpid(), signal.SIGTERM)) == 130
    assert err.getvalue().splitlines()[0] == "error: interrupted"
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_answer_is_text_or_json_never_both() -> None:
    value = {"status": 0, "path": "ä"}
    job, out, err = job_with_streams()
    run_job(job, lambda job: job.answer(value, "text"))
    assert out.getvalue() == "text\n"
    job, out, err = job_with_streams(as_json=True)
    run_job(job, lambda job: (job.say("progress"), job.answer(value, "text"))[1])
    assert json.loads(out.getvalue()) == value and err.getvalue() == "progress\n"


NOISY = """
import os, subprocess, sys, warnings, logging
from workflows.commands.job import Job, run_job

def body(job):
    job.quiet()
    os.write(1, b"noise from C\\n")
    subprocess.run(["sh", "-c", "echo noise from a child; echo more noise >&2"])
    print("noise from Python")
    warnings.warn("noise from a warning")
    logging.getLogger("lib").warning("noise from logging")
    job.say("for the user")
    if len(sys.argv) > 1:
        raise RuntimeError("a bug")
    job.answer({"status": 0})

run_job(Job(None, None, [], None, False, True, None, False), body)
"""


@pytest.mark.parametrize("fails", [False, True])
def test_what_outside_systems_print_goes_to_the_log_alone(fails: bool, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", NOISY, *(["fail"] if fails else [])],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "HVQD_LOGS": str(tmp_path / "logs")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    (log,) = (tmp_path / "logs").iterdir()
    noise = log.read_text()
    for kind in ("from C", "from a child", "from Python", "from a warning", "from logging"):
        assert f"noise {kind}" in noise
    assert "noise" not in done.stdout and "for the user" in done.stderr and len(done.stdout.splitlines()) == 1
    assert json.loads(done.stdout)["status"] == (1 if fails else 0)
    assert ("RuntimeError: a bug" in noise and "Traceback" in noise) == fails


def test_a_log_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HVQD_LOGS", str(tmp_path / "file" / "logs"))
    job, _, err = job_with_streams()
    assert ending(job, lambda job: job.quiet()) == 1
    assert err.getvalue().startswith(f"error: cannot write the log to {tmp_path}/file/logs: ")
    assert err.getvalue().splitlines()[1] == "hint: name another folder in HVQD_LOGS"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["nosuch"], "No such command 'nosuch'."),
        (["run", "--nosuch"], "No such option: --nosuch"),
        (["sample"], "Missing option '--out'."),
        (["run", "--seed", "x"], "Invalid value for '--seed': "),
    ],
)
def test_bad_usage_is_status_2_and_two_lines(
    arguments: list[str], problem: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from workflows.cli import main

    monkeypatch.setattr(sys, "argv", ["hvqd", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert (ended.value.code, len(lines), shown.out) == (2, 2, "")
    assert lines[0].startswith(f"error: {problem}") and lines[1].startswith("hint: `hvqd ")


def test_a_status_reaches_the_shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from workflows.cli import main

    for arguments, status in ((["presets"], 0), (["config", "show", "--preset", "tyni"], 2)):
        monkeypatch.setattr(sys, "argv", ["hvqd", *arguments, "--json"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == status
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["status"] == status
