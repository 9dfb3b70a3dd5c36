"""The journal of a registered model: every promotion, refusal and rollback, in order, each bound to the one before.

An entry is a file of its own, numbered without gaps and created at most once, so that of two writers one must look
again (`Store.create_bytes`). Each holds the digest of its own content and of the entry before: changing, removing or
inserting one breaks the chain. The head's digest is also kept in the registry, on the model version it speaks of, which
shows when the journal's end was cut off.

What the journal says counts; the registry's aliases follow from its head (see workflows.release.promotion).
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal

from infra.errors import InputError
from infra.lease import user
from infra.storage import Store
from workflows.artifacts import digest_of

Action = Literal["promote", "override", "refuse", "rollback"]
MOVES: tuple[Action, ...] = ("promote", "override", "rollback")
"""The actions after which another version is champion."""
_NOTHING = "0" * 64


@dataclass(frozen=True)
class Entry:
    """What was decided, by whom, and on which grounds."""

    number: int
    """From 1."""
    action: Action
    model: str
    version: str
    """The version that the action is about."""
    champion: str | None
    """Champion after it."""
    previous: str | None
    """What a rollback would go back to, after it."""
    by: str
    at: str
    """UTC, to the second."""
    reason: str
    gates: list[dict[str, Any]]
    """What each gate said."""
    figures: dict[str, float]
    """What the version had shown."""
    protocol: str
    """Digest of how the figures were made."""
    before: str
    """Digest of the entry before; zeros for the first."""
    digest: str = ""
    """Of all of the above."""

    @property
    def computed_digest(self) -> str:
        """What `digest` must be."""
        return digest_of({name: value for name, value in asdict(self).items() if name != "digest"})

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)

    def as_text(self) -> str:
        """One line for people."""
        moved = f"champion {self.champion or 'none'}" + (f", previous {self.previous}" if self.previous else "")
        failed = ", ".join(gate["gate"] for gate in self.gates if not gate["passed"])
        why = self.reason or (f"refused by {failed}" if self.action == "refuse" else "every gate agreed")
        return f"{self.number:>4}  {self.at}  {self.action:<8}  version {self.version:<4} {moved:<28} {self.by}  {why}"


@dataclass(frozen=True)
class Journal:
    """The journal of one model in its folder."""

    store: Store
    model: str

    def entries(self) -> list[Entry]:
        """All entries in order.

        Raises:
            InputError: an entry cannot be read (named).
        """
        found = []
        for name in self.store.children():
            if not name.removesuffix(".json").isdigit():
                continue
            try:
                found.append(Entry(**json.loads(self.store.read_bytes(name))))
            except (ValueError, TypeError) as error:
                raise InputError(
                    f"the journal entry {self.store.url}/{name} is damaged: {' '.join(str(error).split())}\n"
                    "hint: restore the file from a copy: no decision is made as long as the journal cannot be read"
                ) from error
        return sorted(found, key=lambda entry: entry.number)

    def head(self) -> Entry | None:
        """The last entry."""
        entries = self.entries()
        return entries[-1] if entries else None

    def append(self, head: Entry | None, **content: Any) -> Entry | None:
        """Write the entry after `head`; None when somebody else was first.

        Args:
            head: the last entry that the decision took into account.
            content: action, version, champion, previous, reason, gates, figures, protocol.
        """
        entry = Entry(
            number=head.number + 1 if head else 1,
            model=self.model,
            by=f"{user()}@{socket.gethostname()}",
            at=datetime.now(UTC).isoformat(timespec="seconds"),
            before=head.digest if head else _NOTHING,
            **content,
        )
        entry = replace(entry, digest=entry.computed_digest)
        written = json.dumps(entry.as_json(), indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        return entry if self.store.create_bytes(f"{entry.number:06d}.json", written.encode()) else None

    def problems(self, kept: Mapping[str, str]) -> list[str]:
        """What is wrong with the chain, a line each; empty when it holds.

        Args:
            kept: the digest that the registry keeps for each version: that of the last entry about it.
        """
        entries = self.entries()
        found, before = [], _NOTHING
        for place, entry in enumerate(entries, start=1):
            if entry.number != place:
                found.append(f"entry {place} is missing")
                return found  # what follows has lost its chain
            if entry.digest != entry.computed_digest:
                found.append(f"entry {place} has been changed")
            if entry.before != before:
                found.append(f"entry {place} does not follow entry {place - 1} as it is now")
            before = entry.digest
        last = {entry.version: entry.digest for entry in entries}
        for version, digest in sorted(kept.items()):
            if digest not in {entry.digest for entry in entries}:
                found.append(f"the entry that the registry keeps for version {version} is gone: the end was cut off")
            elif last[version] != digest:
                found.append(f"the registry has not heard of the last entry about version {version}")
        return found
