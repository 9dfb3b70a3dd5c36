"""A local cluster that does not start in time is the machine's fault, and said so."""

from __future__ import annotations

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
