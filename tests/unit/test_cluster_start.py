"""A local cluster that does not start in time is the machine's fault, and said so."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest

from infra.cluster import connect
from infra.errors import EnvironmentFailure


@pytest.mark.parametrize(
    ("said", "raised", "match"),
    [
        (
            "The current node timed out during startup. This could happen because some of the raylet failed",
            EnvironmentFailure,
            r"Ray did not start on this machine in the 30 s .*\nhint: the machine is busy",
        ),
        ("something else", RuntimeError, "something else"),
    ],
)
def test_a_machine_too_busy_for_ray_is_named(
    monkeypatch: pytest.MonkeyPatch, said: str, raised: type[Exception], match: str
) -> None:
    import ray

    def fails(**settings: Any) -> None:
        raise (Exception if raised is EnvironmentFailure else raised)(said)

    monkeypatch.setattr(ray, "init", fails)
    with pytest.raises(raised, match=match):
        connect(None, 1)


def test_what_listens_but_is_no_cluster_is_given_up_after_ten_seconds() -> None:
    script = """
import socket, sys, time
from infra.cluster import connect
from infra.errors import EnvironmentFailure
with socket.socket() as silent:
    silent.bind(("127.0.0.1", 0))
    silent.listen()
    started = time.monotonic()
    try:
        connect(f"127.0.0.1:{silent.getsockname()[1]}", 1)
    except EnvironmentFailure as error:
        print(round(time.monotonic() - started), str(error).splitlines()[0])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert re.fullmatch(r"1\d no Ray cluster answers at 127\.0\.0\.1:\d+: no answer within 10 s\n", done.stdout)
