"""Promotion on a real registry: one champion, explained by the journal, whatever is killed, raced or tampered with."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from infra.errors import EnvironmentFailure, GateRefusal, InputError
from infra.models import Registry
from tests.conftest import RegistryServer
from tests.integration.test_tracking import answering
from tests.registry_place import KIDS, Place, race
from workflows.release.promotion import ENTRY_TAG, promote, promoter_for, rollback
from workflows.release.version_gc import collect
from workflows.release.versions import compare_versions, history, list_versions, repair, show_version


@pytest.fixture(params=["sqlite", "server"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """sqlite and a folder, or an MLflow server on PostgreSQL with artifacts on S3."""
    if request.param == "sqlite":
        return Place(tmp_path / "run")
    server: RegistryServer = request.getfixturevalue("registry_server")
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    found = Place(tmp_path / "run", tracking={"uri": server.address})
    found.clear()
    return found


@pytest.mark.parametrize("place", ["sqlite", "server"], indirect=True)
def test_a_release_owners_day(place: Place) -> None:
    """Promote, refuse, override, roll back twice: aliases and journal tell the same story."""
    one, two, three = place.version(), place.version(kid_samples=2.0), place.version(kid_samples=0.9)
    place.promote(one)
    place.check_consistent()
    with pytest.raises(
        GateRefusal, match=r"version 2 of hvqd is not promoted: max_kid_regression fails: .* is 1 \[.*\], at"
    ):
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
    assert place.actions() == [
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
    assert place.champion is None and place.journal_folder.files() == {}


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
    place.lose_files(one)
    refuses(r"the files of hvqd version 1 are gone: .*\nhint: restore them, or name another version")
    assert place.champion == "2"
    place.check_consistent()


def test_an_override_without_a_reason_and_an_unknown_version_are_refused(place: Place) -> None:
    one = place.version()
    with pytest.raises(InputError, match=r"--override needs a reason\nhint: it is recorded"):
        place.promote(one, override=" ")
    with pytest.raises(InputError, match=r"has no version 9 of the model hvqd\nhint: `hvqd register` makes one"):
        place.promote("9")
    assert place.actions() == []


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


@pytest.mark.parametrize("place", ["sqlite"], indirect=True)
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
    folder = place.journal_folder
    content = folder.read_bytes("000001.json")
    folder.write_bytes("000001.json", content.replace(b'"psnr": 25.0', b'"psnr": 35.0'))
    with pytest.raises(InputError, match=r"the journal of hvqd at .* does not hold: entry 1 has been changed\nhint: "):
        history(place.context, place.tracker, verify=True)
    assert len(history(place.context, place.tracker, verify=False).value["entries"]) == 2


def test_a_decision_over_an_entry_that_was_cut_off_is_refused_as_long_as_the_registry_remembers(place: Place) -> None:
    one, two = place.version(), place.version(psnr=1.0)
    place.promote(one)
    with pytest.raises(GateRefusal):
        place.promote(two)
    cut = place.journal_folder.read_bytes("000002.json")
    place.journal_folder.delete("000002.json")
    with pytest.raises(
        InputError, match=r"the entry .{12} that the registry keeps for version 2 is gone .*\nhint: rest"
    ):
        place.promote(two, override="nobody will know")
    with pytest.raises(InputError, match="for version 2 is gone: the end was cut off"):
        history(place.context, place.tracker, verify=True)
    assert place.champion == "1" and place.actions() == [("promote", "1")]
    place.journal_folder.write_bytes("000002.json", cut)
    place.promote(two, override="as everybody sees")
    place.check_consistent()


def test_a_server_that_refuses_the_token_is_named_and_nothing_is_recorded(tmp_path: Path) -> None:
    with answering(401) as address:
        stranger = Place(tmp_path / "run", tracking={"uri": address, "audit": str(tmp_path / "audit")})
        for ask in (lambda: stranger.promote("1"), lambda: rollback(stranger.context, stranger.tracker, None, "why")):
            with pytest.raises(
                EnvironmentFailure, match=r"refuses this user \(HTTP 401\).*\nhint: set MLFLOW_TRACKING"
            ):
                ask()
    written = {path.parent.name for path in (tmp_path / "audit").rglob("*") if path.is_file()}
    assert written <= {"lease"}, "no entry, and no journal that is bound to a registry"


@pytest.mark.parametrize("place", ["sqlite"], indirect=True)
def test_a_journal_of_another_registry_is_refused_and_nothing_is_moved(place: Place) -> None:
    """Versions of two registries have the same numbers: a shared journal would move one's alias for the other."""
    one = place.version()
    place.promote(one)
    shared = str(place.journal_folder.path.parent)
    other = Place(place.context.root.path.with_name("other"), tracking={"audit": shared})
    same_number = other.version()
    assert same_number == one
    message = r"the journal at .*/audit/hvqd is another registry's: it is bound to .{8}, .* to none\nhint: give every"
    with pytest.raises(InputError, match=message):
        other.promote(same_number)
    assert other.champion is None
    place.promote(place.version())
    place.check_consistent()


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


class Sleepy(Registry):
    """A registry whose user falls asleep just before an alias moves, and is overtaken meanwhile."""

    def set_alias(self, model: str, alias: str, version: str) -> None:
        work = ASLEEP.pop() if ASLEEP else None
        if work is not None:
            work()
        super().set_alias(model, alias, version)


ASLEEP: list[Callable[[], None]] = []
"""What others do while the next user of a sleepy registry sleeps."""


@pytest.mark.parametrize("place", ["sqlite"], indirect=True)
def test_who_wakes_after_being_overtaken_leaves_what_the_later_one_decided(place: Place) -> None:
    one, two, three = (place.version() for _ in range(3))
    place.promote(one)
    late = replace(promoter_for(place.context, place.tracker), registry=Sleepy(place.registry.uri))

    def overtake() -> None:
        lease = place.journal_folder.child("lease")
        held = max(lease.children())
        lease.write_json(held, lease.read_json(held) | {"until": 0.0})  # it did not answer for too long
        place.promote(three)

    with late.turn("a promotion with a nap") as lease:
        ASLEEP.append(overtake)
        with pytest.raises(
            EnvironmentFailure, match=r"was taken over because this process did not answer .*\nhint: see"
        ):
            late.decide(lease, "promote", two, "")
    assert (place.champion, place.previous) == (three, two), "decided and applied, and then followed by another"
    place.check_consistent()


def test_promoters_that_are_killed_at_random_moments_leave_one_explained_champion(place: Place) -> None:
    """Two at a time, killed after a random while; whoever comes next finishes what the dead began."""
    for kid in KIDS:
        place.version(kid_samples=kid)
    recorded = [race(place, promoters=2, seed=seed) for seed in range(4)]
    assert all(recorded), "promoters came to their turn in every round"
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


@pytest.mark.parametrize("place", ["sqlite"], indirect=True)
def test_without_a_registry_the_questions_say_so(place: Place) -> None:
    for ask in (
        list_versions,
        lambda *given: show_version(*given, "1"),
        lambda *given: history(*given, verify=True),
        lambda *given: collect(*given, keep=1, delete=True),
    ):
        with pytest.raises(InputError, match=r"the model hvqd has no versions yet\nhint: `hvqd register` makes one"):
            ask(place.context, place.tracker)
    assert not place.context.root.path.exists()


def test_a_registry_that_knows_only_other_models_says_so_and_is_not_bound(place: Place) -> None:
    place.registry.client.create_registered_model(f"another-{uuid.uuid4().hex}")
    for ask in (list_versions, lambda *given: collect(*given, keep=1, delete=True)):
        with pytest.raises(InputError, match=r"the model hvqd has no versions yet\nhint: `hvqd register` makes one"):
            ask(place.context, place.tracker)
    with pytest.raises(InputError, match=r"the model hvqd has no champion to go back from"):
        rollback(place.context, place.tracker, None, "why")
    assert place.journal_folder.files() == {}
