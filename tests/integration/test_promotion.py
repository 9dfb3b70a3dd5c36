"""Promotion on a real registry: one champion, explained by the journal, whatever is killed, raced or tampered with."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from infra.errors import EnvironmentFailure, GateRefusal, InputError
from infra.models import Registry
from infra.storage import open_store
from infra.tracking import Tracker
from workflows.config import RunConfig
from workflows.context import Context, Silent
from workflows.pipeline import tracker_for
from workflows.promotion import ENTRY_TAG, champions, promote, promoter_for, rollback
from workflows.versions import compare_versions, history, list_versions, repair, show_version

GOOD = {
    "psnr": 25.0, "usage_0": 1.0, "kid_samples": 1.0, "kid_untrained": 9.0, "kid_marginals": 8.0,
    "class_accuracy_samples": 0.5, "class_shuffled_samples": 0.1,
}  # fmt: skip


class Place:
    """A root with an sqlite registry, and versions in it that have figures but no models."""

    def __init__(self, root: Path, **settings: object) -> None:
        self.config = RunConfig.model_validate({"root": str(root), **settings})
        self.context = Context(self.config, open_store(str(root)), Silent(), None)
        self.tracker: Tracker = tracker_for(self.config, self.context.root)
        self.registry = Registry(self.tracker.uri)

    def version(self, **figures: float) -> str:
        """A new version with good figures but for these."""
        run = self.tracker.run(f"register {time.monotonic_ns()}", "register")
        folder = self.context.root.path / f"files-{time.monotonic_ns()}"
        folder.mkdir(parents=True)
        (folder / "MLmodel").write_text("flavors: {}\n")
        source = run.log_folder(folder, "model")
        tags = {"hvqd.figures": json.dumps(GOOD | figures), "hvqd.protocol": "p", "hvqd.conditional": "true"}
        return self.registry.create("hvqd", source, run.run_id, tags, "a card")

    @property
    def champion(self) -> str | None:
        return self.registry.alias("hvqd", "champion")

    @property
    def previous(self) -> str | None:
        return self.registry.alias("hvqd", "previous")

    def promote(self, version: str, **options: object) -> None:
        promote(self.context, self.tracker, version, **options)  # type: ignore[arg-type]

    def check_consistent(self) -> None:
        """One champion that exists, passes its gates, and is what the journal says."""
        promoter = promoter_for(self.context, self.tracker)
        entries = promoter.journal.entries()
        assert self.champion == (champions(entries) or [None])[-1]
        assert self.previous == (champions(entries)[-2] if len(champions(entries)) > 1 else None)
        for entry in entries:
            assert entry.action in ("override", "refuse") or all(gate["passed"] for gate in entry.gates)
        assert history(self.context, self.tracker, verify=True).value["verified"] is True


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "run")


def actions(place: Place) -> list[tuple[str, str]]:
    return [(entry.action, entry.version) for entry in promoter_for(place.context, place.tracker).journal.entries()]


def test_a_release_owners_day(place: Place) -> None:
    """Promote, refuse, override, roll back twice: aliases and journal tell the same story."""
    one, two, three = place.version(), place.version(kid_samples=2.0), place.version(kid_samples=0.9)
    place.promote(one)
    place.check_consistent()
    with pytest.raises(GateRefusal, match=r"version 2 of hvqd is not promoted: max_kid_regression fails: .* is 1, at"):
        place.promote(two)
    assert (place.champion, place.previous) == ("1", None)
    place.check_consistent()
    place.promote(two, override="it draws flags")
    assert (place.champion, place.previous) == ("2", "1")
    place.promote(three)
    assert (place.champion, place.previous) == ("3", "2")
    place.promote(three)  # again: nothing to do, nothing to record
    assert rollback(place.context, place.tracker, None, "grey faces").champion == "2"
    assert (place.champion, place.previous) == ("2", "1")
    assert rollback(place.context, place.tracker, None, "worse still").champion == "1"
    assert (place.champion, place.previous) == ("1", None)
    place.check_consistent()
    assert actions(place) == [
        ("promote", "1"),
        ("refuse", "2"),
        ("override", "2"),
        ("promote", "3"),
        ("rollback", "2"),
        ("rollback", "1"),
    ]
    text = history(place.context, place.tracker, verify=True).text
    assert "it draws flags" in text and "grey faces" in text and "refused by max_kid_regression" in text
    assert text.endswith("the chain holds: 6 entries, and the registry agrees")


def test_a_dry_run_asks_the_gates_and_leaves_no_trace(place: Place) -> None:
    one, bad = place.version(), place.version(psnr=1.0)
    promote(place.context, place.tracker, one, dry_run=True)
    with pytest.raises(GateRefusal, match=r"min_psnr fails: PSNR on test pictures, dB is 1, at least 20 is asked"):
        promote(place.context, place.tracker, bad, dry_run=True)
    assert place.champion is None and not (place.context.root.path / "audit").exists()


def test_what_cannot_be_rolled_back_is_said(place: Place) -> None:
    def refuses(message: str, version: str | None = None, reason: str = "why") -> None:
        with pytest.raises(InputError, match=message):
            rollback(place.context, place.tracker, version, reason)

    refuses(r"the model hvqd has no champion to go back from\nhint: `hvqd promote` makes one")
    one, two, three = (place.version() for _ in range(3))
    refuses(r"the model hvqd has no earlier champion to go back to\nhint: `hvqd models history`")
    place.promote(one)
    place.promote(two)
    refuses(r"--reason must say why\nhint: it is recorded", reason="  ")
    refuses(r"version 3 of hvqd is none of the champions to go back to: 1, 2\nhint: `hvqd promote --version`", three)
    refuses(r"version 2 of hvqd is champion already\nhint: nothing was changed", two)
    Path(place.registry.source("hvqd", one)).joinpath("MLmodel").unlink()
    refuses(r"the files of hvqd version 1 are gone: .*\nhint: restore them, or name another version")
    assert place.champion == "2"
    place.check_consistent()


def test_an_override_without_a_reason_and_an_unknown_version_are_refused(place: Place) -> None:
    one = place.version()
    with pytest.raises(InputError, match=r"--override needs a reason\nhint: it is recorded"):
        place.promote(one, override=" ")
    with pytest.raises(InputError, match=r"has no version 9 of the model hvqd\nhint: `hvqd register` makes one"):
        place.promote("9")
    assert actions(place) == []


def test_an_alias_that_was_moved_by_other_means_is_noticed_and_can_be_put_back(place: Place) -> None:
    one, two = place.version(), place.version()
    place.promote(one)
    place.registry.set_alias("hvqd", "champion", two)
    said = r"the alias champion of hvqd points to version 2, the journal says 1: it was moved by other means\nhint: "
    with pytest.raises(InputError, match=said):
        place.promote(two)
    dry = repair(place.context, place.tracker, dry_run=True)
    assert (dry.value["champion"], dry.value["journal"], place.champion) == ("2", "1", "2")
    assert repair(place.context, place.tracker, dry_run=False).value["champion"] == "1"
    place.promote(two)
    place.check_consistent()


def test_a_champion_from_before_the_journal_can_be_gone_back_to(place: Place) -> None:
    one, two = place.version(), place.version()
    place.registry.set_alias("hvqd", "champion", one)
    place.promote(two)
    assert (place.champion, place.previous) == ("2", "1")
    assert rollback(place.context, place.tracker, None, "as it was").champion == "1"
    place.check_consistent()


@pytest.mark.parametrize("point", ["nothing applied", "champion moved", "both moved"])
def test_what_a_crash_left_unfinished_is_finished_by_whoever_comes_next(place: Place, point: str) -> None:
    one, two, three = (place.version() for _ in range(3))
    place.promote(one)
    place.promote(two)
    place.registry.client.delete_model_version_tag("hvqd", two, ENTRY_TAG)  # the last thing that promote does
    if point == "nothing applied":
        place.registry.set_alias("hvqd", "champion", one)
    if point != "both moved":
        place.registry.drop_alias("hvqd", "previous")
    place.promote(three)
    assert (place.champion, place.previous) == ("3", "2")
    place.check_consistent()


def test_a_registry_restored_from_yesterday_is_refused_and_not_mixed(place: Place) -> None:
    """The journal knows a champion that the restored database has never heard of."""
    one = place.version()
    place.promote(one)
    database = place.context.root.path / "mlflow.db"
    yesterday = database.read_bytes()
    place.promote(place.version())
    other = Place(place.context.root.path.with_name("restored"))
    (other.context.root.path / "audit" / "hvqd").mkdir(parents=True)
    for file in (place.context.root.path / "audit" / "hvqd").glob("*.json"):
        (other.context.root.path / "audit" / "hvqd" / file.name).write_bytes(file.read_bytes())
    (other.context.root.path / "mlflow.db").write_bytes(yesterday)
    with pytest.raises(InputError, match=r"has no version 2 of the model hvqd"):
        other.promote(one)
    assert other.champion == "1"


def test_a_tampered_journal_is_named(place: Place) -> None:
    place.promote(place.version())
    place.promote(place.version())
    file = place.context.root.path / "audit" / "hvqd" / "000001.json"
    file.write_text(file.read_text().replace('"psnr": 25.0', '"psnr": 35.0'))
    with pytest.raises(InputError, match=r"the journal of hvqd at .* does not hold: entry 1 has been changed\nhint: "):
        history(place.context, place.tracker, verify=True)
    assert len(history(place.context, place.tracker, verify=False).value["entries"]) == 2


def test_while_a_promoter_is_at_it_nobody_else_is(place: Place) -> None:
    one = place.version()
    hurried = replace(promoter_for(place.context, place.tracker), patience_seconds=0.0)
    with (
        hurried.turn("a long promotion"),
        pytest.raises(EnvironmentFailure, match=r"a second one: a long promotion is under way by"),
        hurried.turn("a second one"),
    ):
        pytest.fail("two at a time")
    place.promote(one)
    place.check_consistent()


PROMOTER = """
import sys, random
from tests.integration.test_promotion import Place
from pathlib import Path
from workflows.promotion import rollback
from infra.errors import GateRefusal, InputError

place = Place(Path(sys.argv[1]))
place.champion  # everything is loaded
draw = random.Random(int(sys.argv[2]))
print("ready", flush=True)
while True:
    try:
        if draw.random() < 0.3:
            rollback(place.context, place.tracker, None, "at random")
        else:
            place.promote(str(draw.randint(1, 6)))
    except (GateRefusal, InputError):
        pass
"""


def test_promoters_that_are_killed_at_random_moments_leave_one_explained_champion(place: Place) -> None:
    """Two at a time, killed after a random while; whoever comes next finishes what the dead began."""
    root = place.context.root.path
    for kid in (1.0, 2.0, 1.05, 0.9, 1.5, 1.0):
        place.version(kid_samples=kid)
    draw = random.Random(5)
    repository = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": str(repository)}
    for round_ in range(4):
        running = [
            subprocess.Popen(
                [sys.executable, "-c", PROMOTER, str(root), str(10 * round_ + one)],
                stdout=subprocess.PIPE, text=True, env=env, cwd=repository,
            )
            for one in range(2)
        ]  # fmt: skip
        for process in running:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        before = len(actions(place))
        deadline = time.monotonic() + 60
        while len(actions(place)) < before + 2 + draw.randint(0, 3) and time.monotonic() < deadline:
            time.sleep(draw.random() * 0.02)
        for process in running:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert len(actions(place)) > before, "promoters came to their turn"
        promoter = promoter_for(place.context, place.tracker)
        with promoter.turn("the one after"):
            pass
        place.check_consistent()


# ---- what is asked of the registry ----


def test_versions_are_listed_shown_and_compared(place: Place) -> None:
    one, two = place.version(), place.version(kid_samples=0.5)
    place.promote(one)
    listed = list_versions(place.context, place.tracker)
    assert [(version["version"], version["aliases"]) for version in listed.value["versions"]] == [
        (one, ["champion"]),
        (two, []),
    ]
    lines = listed.text.splitlines()
    assert lines[0].split()[:2] == ["version", "aliases"] and len(lines) == 3
    shown = show_version(place.context, place.tracker, "champion")
    assert shown.value["version"] == "1" and "a card" in shown.text and "kid_samples" in shown.text
    for name, message in (("9", "has no version 9"), ("nosuch", "no version of the model hvqd has the alias nosuch")):
        with pytest.raises(InputError, match=message):
            show_version(place.context, place.tracker, name)
        with pytest.raises(InputError, match=message):
            compare_versions(place.context, place.tracker, "1", name)


def test_without_a_registry_the_questions_say_so(place: Place) -> None:
    for ask in (list_versions, lambda *given: show_version(*given, "1"), lambda *given: history(*given, verify=True)):
        with pytest.raises(InputError, match=r"the model hvqd has no versions yet\nhint: `hvqd register` makes one"):
            ask(place.context, place.tracker)
    assert not place.context.root.path.exists()
