"""`hvqd models gc`: versions that nothing needs any more, and their files.

What is kept: every version that an alias names, that a rollback can go back to, that the journal's last entry speaks
of, whose files another version uses, too; and the newest ones. A removal is first noted on the version, then its files
go, then the version: what a crash interrupts is finished by the next one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from infra.errors import InputError
from infra.models import Registry
from infra.storage import Store, open_store
from infra.tracking import Tracker
from workflows.context import Context
from workflows.release.promotion import Promoter, champions, promoter_for
from workflows.release.registry import no_versions
from workflows.release.versions import Report
from workflows.tables import aligned

GONE_TAG = "hvqd.gc"
"""On a version whose files are being removed."""


@dataclass(frozen=True)
class Fate:
    """What becomes of a version, and why."""

    version: str
    source: str
    kept_because: str | None
    """None when nothing needs it."""


def collect(context: Context, tracker: Tracker, *, keep: int, delete: bool) -> Report:
    """Say which versions nothing needs, and with `delete` remove them and their files.

    Args:
        keep: so many of the newest versions stay in any case.

    Raises:
        InputError: there is no registry, or fewer than none to keep.
        EnvironmentFailure: somebody promotes at this moment.
    """
    if keep < 0:
        raise InputError(f"--keep must be at least 0: {keep}\nhint: --keep 5 keeps the five newest whatever they are")
    model = context.config.tracking.model_name
    promoter = promoter_for(context, tracker)
    if not (tracker.is_there and promoter.is_known()):
        raise no_versions(model)
    if not delete:
        return _report(model, fates(promoter, keep), deleted=False)
    with promoter.turn(f"gc of {model}") as lease:  # nobody promotes what is about to go
        found = fates(promoter, keep)
        for fate in found:
            if fate.kept_because is None:
                lease.check_held()
                _remove(promoter.registry, model, fate)
    return _report(model, found, deleted=True)


def fates(promoter: Promoter, keep: int) -> list[Fate]:
    """Every version of the model, oldest first, and what needs it."""
    registry, model = promoter.registry, promoter.model
    versions = registry.versions(model)
    sources = {version.number: registry.source(model, version.number) for version in versions}
    used = registry.sources()
    entries = promoter.journal.entries()
    stack = champions(entries)
    newest = {version.number for version in versions[len(versions) - keep :]} if keep else set()
    found = []
    for version in versions:
        source = sources[version.number]
        others = [name for name, place in used if place == source and name != (model, version.number)]
        reasons: Mapping[str, bool] = {
            f"alias {', '.join(version.aliases)}": bool(version.aliases),
            "a rollback can go back to it": version.number in stack,
            "the journal's last entry is about it": bool(entries) and entries[-1].version == version.number,
            f"its files are also those of {_names(others)}": bool(others),
            f"one of the {keep} newest": version.number in newest and GONE_TAG not in version.tags,
            "its files are not at a place that can be cleared": not _can_be_cleared(source),
        }
        found.append(Fate(version.number, source, next((why for why, holds in reasons.items() if holds), None)))
    return found


def _names(others: list[tuple[str, str]]) -> str:
    return ", ".join(f"{model} version {version}" for model, version in others)


def _can_be_cleared(source: str) -> bool:
    return source.startswith(("/", "file:", "s3://", "gs://", "abfs"))


def _remove(registry: Registry, model: str, fate: Fate) -> None:
    registry.set_tag(model, fate.version, GONE_TAG, "its files are being removed")
    _folder(fate.source).delete()
    registry.delete(model, fate.version)


def _folder(source: str) -> Store:
    return open_store(source.removeprefix("file://"))


def _size(source: str) -> int:
    return sum(_folder(source).files().values())


def _report(model: str, found: list[Fate], *, deleted: bool) -> Report:
    going = [fate for fate in found if fate.kept_because is None]
    freed = {} if deleted else {fate.version: _size(fate.source) for fate in going}
    rows = [["version", "fate", "why"]]
    for fate in found:
        size = f", {freed[fate.version] / 1e6:.1f} MB" if fate.version in freed else ""
        verdict = "kept" if fate.kept_because else "removed" if deleted else "would go"
        rows.append([fate.version, verdict, fate.kept_because or f"nothing needs it{size}"])
    value = {
        "model": model,
        "removed": [fate.version for fate in going] if deleted else [],
        "would_remove": [] if deleted else [fate.version for fate in going],
        "kept": {fate.version: fate.kept_because for fate in found if fate.kept_because},
        "bytes": sum(freed.values()),
    }
    last = [] if deleted or not going else ["nothing was removed: `--delete` removes them"]
    return Report(value, "\n".join([aligned(rows), *last]))
