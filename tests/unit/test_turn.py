"""One training a root: a second one on the same machine is told at once who holds it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.errors import EnvironmentFailure
from infra.storage import Store
from workflows.training.turn import SECONDS, Turn, take_turn

SAID = r"training vq: training vq is under way by .*@.* \(process \d+\) since .*\nhint: wait for it"


@pytest.mark.parametrize("say", [None, print])
def test_a_second_training_on_this_machine_is_refused_at_once(
    tmp_path: Path, say: Callable[[str], None] | None
) -> None:
    folder = Store(str(tmp_path))
    with (
        take_turn(folder, "training vq"),
        pytest.raises(EnvironmentFailure, match=SAID),
        take_turn(folder, "training vq", say),
    ):
        pytest.fail("two writers")
    with take_turn(folder, "training vq", say):
        pass


def elsewhere(folder: Path) -> None:
    """Let the holder be on another machine, as far as anybody can see."""
    (path,) = folder.glob("lease/*.json")
    entry = json.loads(path.read_text())
    path.write_text(json.dumps(entry | {"who": "me@another-machine (process 1)", "process": None}))


def test_one_on_another_machine_is_waited_for_and_the_user_is_told(tmp_path: Path) -> None:
    folder, said = Store(str(tmp_path)), list[str]()
    with take_turn(folder, "training vq"):
        elsewhere(tmp_path)
        with (
            pytest.raises(EnvironmentFailure, match="under way by me@another-machine"),
            take_turn(folder, "training vq", said.append, patience_seconds=0.3),
        ):
            pytest.fail("two writers")
    assert len(said) == 1 and "another-machine" in said[0] and "should it be gone" in said[0]


def test_what_is_raised_inside_is_not_taken_for_a_refusal(tmp_path: Path) -> None:
    with (
        pytest.raises(EnvironmentFailure, match="the disk is full"),
        take_turn(Store(str(tmp_path)), "training vq", print),
    ):
        raise EnvironmentFailure("the disk is full")


def test_a_turn_is_renewed_now_and_then_and_its_loss_is_noticed(tmp_path: Path) -> None:
    folder, now = Store(str(tmp_path)), [0.0]

    def until() -> float:
        return float(max(json.loads(path.read_text())["until"] for path in tmp_path.glob("lease/*.json")))

    with take_turn(folder, "training vq") as taken:
        turn = Turn(taken.lease, lambda: now[0], 0.0)
        before = until()
        turn.keep()
        assert until() == before
        now[0] = SECONDS / 4
        turn.keep()
        assert until() > before
        (path,) = tmp_path.glob("lease/*.json")
        (tmp_path / "lease" / "000000000999.json").write_text(path.read_text())
        now[0] = SECONDS
        with pytest.raises(EnvironmentFailure, match="was taken over"):
            turn.keep()
