"""What a release owner asks the registry: which versions there are, how they differ, and whether they are whole."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from infra.errors import InputError
from infra.models import Registry, Version
from infra.tracking import Tracker
from workflows.context import Context
from workflows.drawing.bundle import DESCRIPTION, load_bundle
from workflows.release.promotion import ENTRY_TAG, Promoter, champions, promoter_for
from workflows.release.registry import (
    BUNDLE_PATH,
    figures_under,
    find_version,
    no_versions,
    protocols_of,
    shared_protocol,
    version_problems,
)
from workflows.tables import aligned

_LISTED = {"kid_samples": "KID", "psnr": "PSNR", "class_accuracy_samples": "class", "recall_samples": "recall"}
_LINEAGE = ("dataset", "vq", "codes", "prior", "evaluation")


@dataclass(frozen=True)
class Report:
    """An answer for programs and for people."""

    value: dict[str, Any]
    text: str


def _registry(context: Context, tracker: Tracker) -> tuple[Registry, str]:
    model = context.config.tracking.model_name
    if not tracker.is_there:
        raise no_versions(model)
    return Registry(tracker.uri), model


def _figures(tags: Mapping[str, str]) -> dict[str, float]:
    found: dict[str, float] = json.loads(tags.get("hvqd.figures", "{}"))
    return found


def list_versions(context: Context, tracker: Tracker) -> Report:
    """Every version with its aliases, age, main figures and protocol."""
    registry, model = _registry(context, tracker)
    versions = registry.versions(model)
    if not versions:
        raise no_versions(model)
    rows = [["version", "aliases", "registered (UTC)", *_LISTED.values(), "protocol"]]
    for version in versions:
        figures = _figures(version.tags)
        shown = [f"{figures[name]:.4g}" if name in figures else "-" for name in _LISTED]
        when = datetime.fromtimestamp(version.created, UTC).strftime("%Y-%m-%d %H:%M")
        rows.append(
            [
                version.number,
                ", ".join(version.aliases) or "-",
                when,
                *shown,
                version.tags.get("hvqd.protocol", "-")[:12],
            ]
        )
    return Report({"model": model, "versions": [_as_json(version) for version in versions]}, aligned(rows))


def _as_json(version: Version) -> dict[str, Any]:
    return {
        "version": version.number,
        "aliases": list(version.aliases),
        "created": version.created,
        "figures": _figures(version.tags),
        "protocol": version.tags.get("hvqd.protocol"),
        "lineage": {kind: version.tags.get(f"hvqd.digest.{kind}") for kind in _LINEAGE},
        "commit": version.tags.get("hvqd.commit"),
        "root": version.tags.get("hvqd.root"),
    }


def show_version(context: Context, tracker: Tracker, name: str) -> Report:
    """A version's card, lineage and figures.

    Args:
        name: its number or an alias.
    """
    registry, model = _registry(context, tracker)
    number = find_version(tracker, model, name)
    version = next(version for version in registry.versions(model) if version.number == number)
    card = registry.card(model, number)
    figures = _figures(version.tags)
    lines = [
        f"{model} version {number}" + (f" ({', '.join(version.aliases)})" if version.aliases else ""),
        *(f"  {kind:<11} {version.tags.get(f'hvqd.digest.{kind}', 'unknown')}" for kind in _LINEAGE),
        f"  {'commit':<11} {version.tags.get('hvqd.commit', 'unknown')}",
        f"  {'root':<11} {version.tags.get('hvqd.root', 'unknown')}",
        f"  {'protocol':<11} {', '.join(protocols_of(version.tags)) or 'unknown'}",
        "",
        aligned([["figure", "value"], *([figure, f"{value:.5g}"] for figure, value in sorted(figures.items()))]),
        "",
        card,
    ]
    return Report({"model": model, **_as_json(version), "card": card}, "\n".join(lines))


def compare_versions(context: Context, tracker: Tracker, first: str, second: str) -> Report:
    """Where two versions differ: lineage, protocol, settings of the models and of sampling, and figures."""
    registry, model = _registry(context, tracker)
    names = [find_version(tracker, model, name) for name in (first, second)]
    tags = [registry.tags(model, name) for name in names]
    protocol = shared_protocol(tags[1], tags[0])
    figures = [figures_under(one, protocol) or _figures(one) for one in tags]
    settings = [_settings(registry, model, name) for name in names]
    differing = {
        key: [one.get(key) for one in settings]
        for key in sorted({key for one in settings for key in one})
        if settings[0].get(key) != settings[1].get(key)
    }
    lineage = {
        kind: [one.get(f"hvqd.digest.{kind}", "unknown") for one in tags]
        for kind in _LINEAGE
        if tags[0].get(f"hvqd.digest.{kind}") != tags[1].get(f"hvqd.digest.{kind}")
    }
    shared = sorted(set(figures[0]) & set(figures[1]))
    rows = [["figure", *(f"version {name}" for name in names), "change"]]
    for figure in shared:
        old, new = figures[0][figure], figures[1][figure]
        change = f"{(new - old) / abs(old):+.1%}" if old else "-"
        rows.append([figure, f"{old:.5g}", f"{new:.5g}", change])
    lines = [f"{kind} differs: {one[:12]} and {other[:12]}" for kind, (one, other) in lineage.items()]
    lines += [f"{key}: {one} and {other}" for key, (one, other) in differing.items()]
    if protocol is None:
        lines.append("judged by different protocols: the figures below are not comparable")
    else:
        lines.append(f"figures by the protocol {protocol[:12]}")
    value = {
        "versions": names,
        "lineage": lineage,
        "settings": differing,
        "comparable": protocol is not None,
        "protocol": protocol,
        "figures": {figure: [one[figure] for one in figures] for figure in shared},
    }
    return Report(value, "\n".join([*lines, "", aligned(rows)]))


def _settings(registry: Registry, model: str, version: str) -> dict[str, Any]:
    """Dotted settings of a version's two models and of its sampling."""
    with tempfile.TemporaryDirectory(prefix="hvqd-version-") as scratch:
        bundle = registry.download(model, version, Path(scratch)) / BUNDLE_PATH
        found = {
            "vq": json.loads((bundle / "vq" / "config.json").read_text()),
            "prior": json.loads((bundle / "prior" / "config.json").read_text()),
            "sampling": json.loads((bundle / DESCRIPTION).read_text())["sampling"],
        }
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, child in value.items():
                walk(f"{prefix}.{key}", child)
        else:
            flat[prefix] = value

    for name, value in found.items():
        walk(name, value)
    return flat


def history(context: Context, tracker: Tracker, *, verify: bool) -> Report:
    """The journal, oldest first; with `verify` also whether it is as it was written.

    Raises:
        InputError: with verify, when an entry was changed, is missing or was cut off (each named).
    """
    registry, model = _registry(context, tracker)
    promoter = promoter_for(context, tracker)
    entries = promoter.journal.entries()
    text = "\n".join(entry.as_text() for entry in entries) or f"nothing has been promoted to champion of {model} yet"
    value: dict[str, Any] = {"model": model, "entries": [entry.as_json() for entry in entries]}
    if verify:
        problems = promoter.journal.problems(_kept(registry, model))
        if problems:
            raise InputError(
                f"the journal of {model} at {promoter.folder.url} does not hold: {'; '.join(problems)}\n"
                "hint: compare it with a copy; what the registry keeps on each version is the tag " + ENTRY_TAG
            )
        value["verified"] = True
        text += f"\nthe chain holds: {len(entries)} entries, and the registry agrees"
    return Report(value, text)


def _kept(registry: Registry, model: str) -> dict[str, str]:
    """The digest of the last entry about each version, as the registry has it."""
    return {
        version.number: version.tags[ENTRY_TAG] for version in registry.versions(model) if ENTRY_TAG in version.tags
    }


def verify_version(context: Context, tracker: Tracker, name: str) -> Report:
    """Whether a version's files are as they were registered, and load.

    Raises:
        InputError: a file is missing, changed or new (named).
    """
    registry, model = _registry(context, tracker)
    number = find_version(tracker, model, name)
    registry.check_files(model, number)
    with tempfile.TemporaryDirectory(prefix="hvqd-version-") as scratch:
        folder = registry.download(model, number, Path(scratch))
        problems = version_problems(folder, registry.tags(model, number))
        if problems:
            raise InputError(
                f"version {number} of {model} is not what was registered: {'; '.join(problems)}\n"
                f"hint: restore {registry.source(model, number)} from a copy, or `hvqd rollback` to another version"
            )
        digest = load_bundle(folder / BUNDLE_PATH).digest
    return Report(
        {"model": model, "version": number, "digest": digest, "verified": True},
        f"version {number} of {model} is whole: weights {digest[:12]}",
    )


def repair(context: Context, tracker: Tracker, *, dry_run: bool) -> Report:
    """Put the aliases back to what the journal says, or only say what that is."""
    registry, model = _registry(context, tracker)
    promoter: Promoter = promoter_for(context, tracker)
    found = registry.alias(model, "champion")
    if dry_run:
        wanted = next(iter(champions(promoter.journal.entries())[-1:]), None)
        return Report(
            {"model": model, "champion": found, "journal": wanted},
            f"the alias champion of {model} points to version {found or 'none'}, the journal says {wanted or 'none'}",
        )
    head = promoter.repair()
    if head is None:
        return Report(
            {"model": model, "champion": None}, f"the journal of {model} names no champion: nothing was changed"
        )
    return Report(
        {"model": model, "champion": head.champion, "previous": head.previous},
        f"champion  {model} version {head.champion}, as entry {head.number} says",
    )
