"""What a worker logs reaches its user: once however many say it, and a line a minute of waiting, without secrets."""

from __future__ import annotations

import logging
from pathlib import Path

from infra.storage import open_store
from tests.said import Said
from workflows.config import RunConfig
from workflows.context import Context
from workflows.training.desk import Desk
from workflows.training.mailbox import passing_on


def test_the_trainings_log_is_passed_on_while_it_lasts_and_nothing_else() -> None:
    heard: list[str] = []
    inner, outer = logging.getLogger("workflows.training.checkpoint"), logging.getLogger("workflows.reporting.report")
    level = logging.getLogger("workflows.training").level
    inner.warning("too early")
    with passing_on(heard.append):
        inner.info("going on from %s", "here")
        inner.debug("not meant for anybody")
        outer.warning("of something else")
        inner.warning("%d steps in a row", 8)
    inner.warning("too late")
    assert heard == ["going on from here", "8 steps in a row"]
    assert logging.getLogger("workflows.training").level == level


def test_eight_workers_that_wait_for_a_store_say_so_in_one_line_and_different_news_are_all_told(tmp_path: Path) -> None:
    said, root = Said(), open_store(str(tmp_path))
    desk = Desk(Context(RunConfig(), root, said), root.child("vq"))
    waiting = (
        "could not upload the checkpoint, trying again for {} s more: cannot write s3://me:hunter2SECRET@b/rank-{}"
    )
    desk.show([("said", waiting.format(600 - rank, rank)) for rank in range(8)])
    desk.show([("said", f"the checkpoint {name} is passed over: damaged") for name in ("one", "one", "two")])
    assert said.lines == [
        "  could not upload the checkpoint, trying again for 600 s more: cannot write s3://me:***@b/rank-0",
        "  the checkpoint one is passed over: damaged",
        "  the checkpoint two is passed over: damaged",
    ]
