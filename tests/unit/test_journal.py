"""The journal: entries in order, each written once, and every change of the past is seen."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from infra.errors import InputError
from infra.storage import Store
from workflows.release.journal import Action, Entry, Journal
from workflows.release.promotion import champions


def written(folder: Path, *decisions: tuple[Action, str]) -> Journal:
    """A journal with these decisions, champions as a promoter would have them."""
    journal = Journal(Store(str(folder)), "hvqd")
    for action, version in decisions:
        entries = journal.entries()
        stack = champions(entries)
        if action in ("promote", "override"):
            stack.append(version)
        elif action == "rollback":
            stack = stack[: stack.index(version) + 1]
        entry = journal.append(
            entries[-1] if entries else None,
            action=action,
            version=version,
            champion=stack[-1] if stack else None,
            previous=stack[-2] if len(stack) > 1 else None,
            reason="because" if action != "promote" else "",
            gates=[{"gate": "min_psnr", "passed": action != "refuse", "value": 1.5}],
            figures={"psnr": 1.5},
            protocol="p",
        )
        assert entry is not None
    return journal


DECISIONS: tuple[tuple[Action, str], ...] = (
    ("promote", "1"),
    ("refuse", "2"),
    ("promote", "3"),
    ("override", "4"),
    ("rollback", "1"),
)


def kept(journal: Journal) -> dict[str, str]:
    """What the registry keeps: the last entry's digest for each version."""
    return {entry.version: entry.digest for entry in journal.entries()}


def test_entries_come_back_in_order_and_bound_to_each_other(tmp_path: Path) -> None:
    journal = written(tmp_path, *DECISIONS)
    entries = journal.entries()
    assert [(entry.number, entry.action, entry.version) for entry in entries] == [
        (number, *decision) for number, decision in enumerate(DECISIONS, start=1)
    ]
    assert [entry.champion for entry in entries] == ["1", "1", "3", "4", "1"]
    assert [entry.previous for entry in entries] == [None, None, "1", "3", None]
    assert all(later.before == earlier.digest for earlier, later in pairwise(entries))
    assert journal.head() == entries[-1]
    assert journal.problems(kept(journal)) == []
    assert len({entry.as_text() for entry in entries}) == 5


def test_the_second_writer_after_the_same_entry_is_refused(tmp_path: Path) -> None:
    journal = written(tmp_path, ("promote", "1"))
    head = journal.head()
    content = {
        "action": "promote", "version": "2", "champion": "2", "previous": "1", "reason": "", "gates": [],
        "figures": {}, "protocol": "",
    }  # fmt: skip
    assert journal.append(head, **content) is not None
    assert journal.append(head, **content | {"version": "3", "champion": "3"}) is None
    assert [entry.version for entry in journal.entries()] == ["1", "2"]


def change(field: str, value: object) -> Callable[[Path], None]:
    def apply(file: Path) -> None:
        content = json.loads(file.read_text())
        file.write_text(json.dumps(content | {field: value}))

    return apply


def change_with_digest(file: Path) -> None:
    """By somebody who knows how digests are made."""
    content = json.loads(file.read_text()) | {"reason": "another"}
    entry = Entry(**content)
    file.write_text(json.dumps(content | {"digest": entry.computed_digest}))


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    "harm",
    [
        change("reason", "another"),
        change("by", "mallory@nowhere"),
        change("figures", {"psnr": 99.0}),
        change("gates", []),
        change("champion", "9"),
        change_with_digest,
        Path.unlink,
    ],
)
def test_a_changed_or_missing_entry_is_named(number: int, harm: Callable[[Path], None], tmp_path: Path) -> None:
    journal = written(tmp_path, *DECISIONS)
    before = kept(journal)
    harm(tmp_path / f"{number:06d}.json")
    problems = journal.problems(before)
    assert problems
    named = f"entry {number} "
    assert any(named in problem or f"entry {number + 1} " in problem or "cut off" in problem for problem in problems)


def test_a_journal_whose_end_was_cut_off_is_noticed(tmp_path: Path) -> None:
    journal = written(tmp_path, *DECISIONS)
    before = kept(journal)
    (tmp_path / "000005.json").unlink()
    assert journal.problems(before) == [
        "the entry that the registry keeps for version 1 is gone: the end was cut off",
    ]
    assert journal.problems({}) == [], "the chain alone cannot tell"


def test_an_entry_that_never_reached_the_registry_is_noticed(tmp_path: Path) -> None:
    journal = written(tmp_path, *DECISIONS[:4])
    before = kept(journal)
    again = written(tmp_path, DECISIONS[4])
    assert again.problems(before) == ["the registry has not heard of the last entry about version 1"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"number": 1}'])
def test_an_entry_that_cannot_be_read_is_named(content: bytes, tmp_path: Path) -> None:
    journal = written(tmp_path, *DECISIONS)
    (tmp_path / "000003.json").write_bytes(content)
    with pytest.raises(InputError, match=r"the journal entry .*/000003.json is damaged: .*\nhint: restore the file"):
        journal.entries()


def test_a_rollback_goes_back_through_the_champions_in_turn() -> None:
    def entry(action: Action, version: str, previous: str | None = None) -> Entry:
        return Entry(1, action, "m", version, version, previous, "", "", "", [], {}, "", "")

    story = [entry("promote", "1"), entry("promote", "2"), entry("refuse", "9"), entry("promote", "3")]
    assert champions(story) == ["1", "2", "3"]
    story.append(entry("rollback", "2"))
    assert champions(story) == ["1", "2"]
    story.append(entry("promote", "4"))
    assert champions(story) == ["1", "2", "4"]
    story.append(entry("rollback", "1"))
    assert champions(story) == ["1"]
    assert champions([entry("promote", "5", previous="3")]) == ["3", "5"], "champion before the journal began"
