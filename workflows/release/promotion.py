"""Step 7: a version becomes champion if every gate agrees, and can be taken back.

A decision is first written to the journal, then the registry's aliases follow. MLflow's aliases know no
compare-and-set, so promoters take turns by a lease, and a crash in between is mended by whoever comes next: an entry
counts as applied when the registry keeps its digest on the version it speaks of, which is done last.

`champion` is what is used, `previous` what a rollback goes back to.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from infra.errors import GateRefusal, InputError
from infra.lease import Lease, hold
from infra.models import Registry
from infra.secrets import mask
from infra.storage import Store, open_store
from infra.tracking import Tracker
from workflows.config import GateSettings
from workflows.context import Context
from workflows.release.gate_files import OwnGate, check_measured, read_gates
from workflows.release.gates import GateResult, Growth, Inspection, growth_of, judge, table
from workflows.release.inspection import inspect
from workflows.release.journal import MOVES, Action, Entry, Journal
from workflows.release.registry import (
    FIGURES_TAG,
    PROTOCOL_TAG,
    figures_under,
    find_version,
    intervals_under,
    kid_parts_under,
    protocols_of,
    shared_protocol,
)

ENTRY_TAG = "hvqd.audit"
"""On a version: the digest of the journal's last entry about it that has been applied."""
OWNER_TAG = "hvqd.journal"
"""On the registered model: what its journal is bound by."""
_OWNER = "journal.json"
_LEASE_SECONDS = 60.0


@dataclass(frozen=True)
class PromotionResult:
    """What a promotion did, or would do."""

    model: str
    version: str
    previous: str | None
    """The champion before."""
    gates: list[GateResult]
    moved: bool
    """Whether the alias has been moved now."""
    overridden: str | None = None
    """The reason why it was moved against a gate."""

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "model": self.model,
            "version": self.version,
            "previous": self.previous,
            "moved": self.moved,
            "overridden": self.overridden,
            "gates": [gate.as_json() for gate in self.gates],
        }

    def as_text(self) -> str:
        """For people."""
        lines = [table(self.gates)] if self.gates else []
        if self.moved:
            was = f" (was version {self.previous})" if self.previous else ""
            against = f", against its gates: {self.overridden}" if self.overridden else ""
            lines.append(f"champion  {self.model} version {self.version}{was}{against}")
        elif self.previous == self.version:
            lines.append(f"champion  {self.model} version {self.version} already")
        elif all(gate.passed for gate in self.gates) or self.overridden:
            against = f", against its gates: {self.overridden}" if self.overridden else ""
            lines.append(f"would make {self.model} version {self.version} champion{against}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Judgement:
    """What the gates said of a version, and by which figures."""

    results: list[GateResult]
    figures: dict[str, float]
    protocol: str | None

    @classmethod
    def unasked(cls, tags: Mapping[str, str]) -> Judgement:
        """The version's own figures, of which no gate was asked."""
        return cls([], json.loads(tags.get(FIGURES_TAG, "{}")), tags.get(PROTOCOL_TAG))

    @property
    def failed(self) -> bool:
        """Whether a gate refuses."""
        return any(not result.passed for result in self.results)


@dataclass(frozen=True)
class Promoter:
    """Who moves the aliases of one model: its registry, its journal and the lease beside it."""

    registry: Registry
    model: str
    folder: Store
    """Holds the journal's entries, and the lease in `lease/`."""
    patience_seconds: float = 30.0
    """How long to wait for another promoter."""

    @property
    def journal(self) -> Journal:
        """The model's journal."""
        return Journal(self.folder, self.model)

    def is_known(self) -> bool:
        """Whether there is anything to decide about: the model in the registry, or decisions in the journal."""
        return self.registry.has(self.model) or self.journal.head() is not None

    @contextmanager
    def turn(self, what: str) -> Iterator[Lease]:
        """One at a time, and only after what a crash left unfinished is finished."""
        with self._lease(what) as lease:
            self._check_belongs()
            self._finish(lease)
            yield lease

    def _check_belongs(self) -> None:
        """Bind the journal and the registry to each other, or find that they are; a turn is held.

        Raises:
            InputError: the journal is another registry's, whose versions only have the same numbers.
        """
        known = self.registry.model_tag(self.model, OWNER_TAG)  # first, so that a refused user writes nothing
        try:
            owner = str(self.folder.read_json(_OWNER)["id"])
        except FileNotFoundError:
            owner = uuid.uuid4().hex
            self.folder.write_json(_OWNER, {"id": owner, "model": self.model, "registry": mask(self.registry.uri)})
            is_new = known is None
        else:
            is_new = known is None and self.journal.head() is None
        if is_new:
            self.registry.set_model_tag(self.model, OWNER_TAG, owner)
        elif known != owner:
            raise InputError(
                f"the journal at {self.folder.url} is another registry's: it is bound to {owner[:8]}, the model "
                f"{self.model} at {mask(self.registry.uri)} to {known[:8] if known else 'none'}\n"
                "hint: give every registry a place of its own: --set tracking.audit=URL"
            )

    def _lease(self, what: str) -> AbstractContextManager[Lease]:
        folder = self.folder.child("lease")
        return hold(folder, what, seconds=_LEASE_SECONDS, patience_seconds=self.patience_seconds)

    def _finish(self, lease: Lease) -> None:
        """Apply the journal's head where its writer did not come so far."""
        entries = self.journal.entries()
        if not entries:
            return
        if not self._is_applied(entries[-1]):
            self._apply(entries[-1], lease)
        expected, found = entries[-1].champion, self.registry.alias(self.model, "champion")
        if found != expected:
            raise InputError(
                f"the alias champion of {self.model} points to version {found}, the journal says {expected}: it was "
                "moved by other means\nhint: `hvqd models history --verify` says whether the journal is whole; "
                "`hvqd models repair` puts the alias back to what it says"
            )

    def _is_applied(self, entry: Entry) -> bool:
        return self.registry.tags(self.model, entry.version).get(ENTRY_TAG) == entry.digest

    def is_settled(self) -> bool:
        """Whether nothing is left unfinished and the champion is what the journal says; asked without a turn."""
        entries = self.journal.entries()
        if not entries:
            return True
        return self._is_applied(entries[-1]) and self.registry.alias(self.model, "champion") == entries[-1].champion

    def _apply(self, entry: Entry, lease: Lease) -> None:
        if entry.action in MOVES:
            lease.check_held()
            self._point(entry)
            if not lease.is_held():  # it slept between look and write: what the one after decided counts
                self._point(self.journal.entries()[-1])
                lease.check_held()
        self.registry.set_tag(self.model, entry.version, ENTRY_TAG, entry.digest)

    def _point(self, entry: Entry) -> None:
        """Make the aliases what an entry says."""
        for alias, version in (("champion", entry.champion), ("previous", entry.previous)):
            if version is not None:
                self.registry.set_alias(self.model, alias, version)
            else:
                self.registry.drop_alias(self.model, alias)

    def decide(
        self, lease: Lease, action: Action, version: str, reason: str, judgement: Judgement | None = None
    ) -> Entry:
        """Write a decision and apply it.

        Args:
            judgement: what the gates said; None where they were not asked.
        """
        journal = self.journal
        tags = self.registry.tags(self.model, version)
        shown = judgement or Judgement.unasked(tags)
        entries = journal.entries()
        self._check_known(tags, version, entries)
        stack = champions(entries) or [
            found for alias in ("previous", "champion") if (found := self.registry.alias(self.model, alias))
        ]
        match action:
            case "promote" | "override":
                stack = [*stack, version]
            case "rollback":
                stack = stack[: stack.index(version) + 1] if version in stack else [*stack, version]
        entry = journal.append(
            entries[-1] if entries else None,
            action=action,
            version=version,
            champion=stack[-1] if stack else None,
            previous=stack[-2] if len(stack) > 1 else None,
            reason=reason,
            gates=[gate.as_json() for gate in shown.results],
            figures=shown.figures,
            protocol=shown.protocol or "",
        )
        if entry is None:
            lease.check_held()  # says that somebody else was faster
            raise InputError(
                f"the journal at {self.folder.url} was written by something that does not hold its lock\n"
                "hint: see `hvqd models history`, then run the same command again"
            )
        self._apply(entry, lease)
        return entry

    def _check_known(self, tags: Mapping[str, str], version: str, entries: Sequence[Entry]) -> None:
        """Look whether the journal still has what the registry keeps of it, and whether the registry may be written.

        A new entry about a version would replace the only trace of one that was cut off; and who may only read would
        leave a decision that the registry never hears of.

        Raises:
            InputError: the journal's end was cut off.
            EnvironmentFailure: the registry refuses this user.
        """
        kept = tags.get(ENTRY_TAG)
        if kept is not None and kept not in {entry.digest for entry in entries}:
            raise InputError(
                f"the entry {kept[:12]} that the registry keeps for version {version} is gone from the journal at "
                f"{self.folder.url}: its end was cut off\n"
                "hint: restore the journal from a copy; `hvqd models history --verify` says what else is missing"
            )
        owner = self.registry.model_tag(self.model, OWNER_TAG)
        if owner is not None:
            self.registry.set_model_tag(self.model, OWNER_TAG, owner)

    def repair(self) -> Entry | None:
        """Put the aliases where the journal says, whoever moved them; None when there is nothing in the journal."""
        with self._lease(f"repair of {self.model}") as lease:
            entries = self.journal.entries()
            moves = [entry for entry in entries if entry.action in MOVES]
            if moves:
                self._apply(moves[-1], lease)
            if entries:
                self._apply(entries[-1], lease)
            return moves[-1] if moves else None


def champions(entries: Sequence[Entry]) -> list[str]:
    """The champions that a rollback can go back through, oldest first; the last one is champion."""
    stack: list[str] = []
    for entry in entries:
        if entry.action == "rollback" and entry.version in stack:
            stack = stack[: stack.index(entry.version) + 1]
        elif entry.action in MOVES:
            if not stack and entry.previous is not None:  # champion before the journal began
                stack.append(entry.previous)
            stack.append(entry.version)
    return stack


def promoter_for(context: Context, tracker: Tracker) -> Promoter:
    """The promoter of the configuration's model.

    Raises:
        InputError: no place for the journal that all promoters of the registry share.
    """
    config = context.config.tracking
    return Promoter(Registry(tracker.uri), config.model_name, _folder(context, tracker).child(config.model_name))


def _folder(context: Context, tracker: Tracker) -> Store:
    """Where the journals of this registry's models lie: the same place for everybody who uses the registry."""
    named = context.config.tracking.audit
    if named is not None:
        return open_store(named)
    if tracker.uri.startswith("sqlite:///"):
        return context.root.child("audit")
    location = tracker.shared_artifacts("hvqd.audit")
    if location.startswith("mlflow-artifacts:"):
        raise InputError(
            "the tracking server keeps artifacts for itself, and a journal needs a place that can be written only "
            f"once: {location}\nhint: name a folder or s3:// prefix that all promoters share: --set tracking.audit=URL"
        )
    return open_store(location)


def promote(
    context: Context,
    tracker: Tracker,
    version: str | None = None,
    *,
    dry_run: bool = False,
    override: str | None = None,
) -> PromotionResult:
    """Move the alias `champion` to a version if every gate agrees; `previous` keeps the old champion.

    Args:
        version: default the candidate.
        dry_run: ask the gates, move nothing, record nothing.
        override: why it shall be champion although a gate refuses; recorded.

    Raises:
        InputError: there is no such version, or an empty reason.
        GateRefusal: a gate refused; it is named with its value and threshold.
    """
    model, registry = context.config.tracking.model_name, Registry(tracker.uri)
    wanted = (version or registry.alias(model, "candidate")) if tracker.is_there else None
    if wanted is None:
        raise InputError(f"the model {model} has no candidate to promote\nhint: `hvqd register` makes one")
    if override is not None and not override.strip():
        raise InputError("--override needs a reason\nhint: it is recorded, for example --override 'fixes the flags'")
    wanted = find_version(tracker, model, wanted)  # that it exists, before anybody is kept waiting
    gates, own = read_gates(context.config.gates)
    # What is wrong with the question is said at once: an inspection takes its time, and so not while others wait, too.
    _judge(registry, model, wanted, registry.alias(model, "champion"), gates, own, Inspection())
    inspection = inspect(registry, model, wanted, gates)

    def ask(champion: str | None) -> Judgement:
        return _judge(registry, model, wanted, champion, gates, own, inspection)

    if dry_run:
        champion = registry.alias(model, "champion")
        judged = ask(champion)
        result = PromotionResult(model, wanted, champion, judged.results, False, override if judged.failed else None)
        _refuse_if_failed(result, override)
        return result
    promoter = promoter_for(context, tracker)
    if registry.alias(model, "champion") == wanted and promoter.is_settled():
        judged = ask(wanted)
        if not judged.failed:  # nothing to decide, nothing to write
            return PromotionResult(model, wanted, wanted, judged.results, moved=False)
    with promoter.turn(f"promotion of {model} version {wanted}") as lease:
        champion = registry.alias(model, "champion")
        judged = ask(champion)
        if judged.failed and override is None:
            promoter.decide(lease, "refuse", wanted, "", judged)
        elif champion != wanted:
            promoter.decide(lease, "override" if judged.failed else "promote", wanted, override or "", judged)
    moved = champion != wanted and not (judged.failed and override is None)
    result = PromotionResult(model, wanted, champion, judged.results, moved, override if judged.failed else None)
    _refuse_if_failed(result, override)
    return result


def _refuse_if_failed(result: PromotionResult, override: str | None) -> None:
    failed = [gate for gate in result.gates if not gate.passed]
    if failed and override is None:
        lines = "; ".join(gate.as_text() for gate in failed)
        raise GateRefusal(
            f"version {result.version} of {result.model} is not promoted: {lines}\n"
            "hint: train longer, or change the gate if it asks for the wrong thing (--set gates.NAME=VALUE)",
            facts=result.as_json(),
            shown=result.as_text(),
        )


def _judge(
    registry: Registry,
    model: str,
    wanted: str,
    champion: str | None,
    gates: GateSettings,
    own: Sequence[OwnGate],
    inspection: Inspection,
) -> Judgement:
    """Every gate's answer; all figures of a decision are of one protocol.

    Raises:
        InputError: figures of which nobody knows how they were made, or a gate over a figure that nobody measured.
    """
    tags = registry.tags(model, wanted)
    known, against = protocols_of(tags), champion is not None and champion != wanted
    if not known and tags.get(FIGURES_TAG):
        raise InputError(
            f"the figures of version {wanted} of {model} come without a protocol: nobody knows how they were made\n"
            f"hint: `hvqd evaluate --model {wanted}` judges it anew"
        )
    other = registry.tags(model, champion) if champion is not None and against else {}
    shared = shared_protocol(tags, other)
    protocol = shared or next(iter(known), None)
    figures = figures_under(tags, protocol) or {}
    check_measured(own, figures, f"version {wanted} of {model}")
    growth: Growth | None = None
    if shared is not None:
        shown = figures_under(other, shared) or {}
        growth = growth_of(figures, shown, kid_parts_under(tags, shared), kid_parts_under(other, shared))
    results = judge(
        figures,
        gates,
        conditional=tags.get("hvqd.conditional") == "true",
        own=own,
        intervals=intervals_under(tags, protocol) if protocol else {},
        against_champion=against,
        growth=growth,
        inspection=inspection,
    )
    return Judgement(results, figures, protocol)


def rollback(context: Context, tracker: Tracker, version: str | None, reason: str) -> Entry:
    """Make an earlier champion the champion again, without asking the gates.

    Args:
        version: default the champion before this one.
        reason: recorded.

    Raises:
        InputError: no reason, nothing to go back to, never champion, or its files are gone.
    """
    if not reason.strip():
        raise InputError("--reason must say why\nhint: it is recorded, for example --reason 'flags come out grey'")
    model = context.config.tracking.model_name
    promoter = _known_promoter(context, tracker)
    with promoter.turn(f"rollback of {model}") as lease:
        return promoter.decide(lease, "rollback", _target(promoter, version), reason)


def plan_rollback(context: Context, tracker: Tracker, version: str | None) -> str:
    """The version that `rollback` would make champion; the same errors, and nothing is moved."""
    return _target(_known_promoter(context, tracker), version)


def _known_promoter(context: Context, tracker: Tracker) -> Promoter:
    """The promoter of a model that the registry or the journal knows."""
    promoter = promoter_for(context, tracker)
    if not (tracker.is_there and promoter.is_known()):
        raise InputError(f"the model {promoter.model} has no champion to go back from\nhint: `hvqd promote` makes one")
    return promoter


def _target(promoter: Promoter, version: str | None) -> str:
    """The earlier champion to go back to, whose files are there."""
    model, stack = promoter.model, champions(promoter.journal.entries())
    target = version or (stack[-2] if len(stack) > 1 else None)
    if target is None:
        raise InputError(
            f"the model {model} has no earlier champion to go back to\n"
            "hint: `hvqd models history` shows what has been champion"
        )
    if target not in stack:
        known = ", ".join(stack) or "there is none"
        raise InputError(
            f"version {target} of {model} is none of the champions to go back to: {known}\n"
            "hint: `hvqd promote --version` asks the gates about any version"
        )
    if stack[-1] == target:
        raise InputError(f"version {target} of {model} is champion already\nhint: nothing was changed")
    promoter.registry.check_files(model, target)
    return target
