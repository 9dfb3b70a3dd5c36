"""Artifacts: a folder with a manifest that says what is in it, from what it was made, and when it is complete.

The manifest is written last, so a folder without one is unfinished. Two digests tell two things:

- `request` covers what was asked (settings and the parents' digests): a step whose manifest answers the same request
  is current and is skipped.
- `digest` covers what came out (every file's content, the facts, the parents): two runs agree if and only if their
  digests agree. Times, machines and run ids stand in `provenance`, which no digest covers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from infra.errors import InputError
from infra.storage import Store

MANIFEST = "manifest.json"
FORMAT = 1


def digest_of(value: object) -> str:
    """Hexadecimal SHA-256 of a JSON value, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact."""

    bytes: int
    sha256: str


def file_entry(path: Path) -> FileEntry:
    """The entry of a local file."""
    with path.open("rb") as file:
        return FileEntry(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


@dataclass(frozen=True)
class Manifest:
    """What an artifact folder holds."""

    kind: str
    """dataset, vq, codes, prior, evaluation or registration."""
    request: str
    """Digest of the settings and parents that asked for it."""
    parents: Mapping[str, str]
    """Digest of each artifact it was made from, by kind."""
    files: Mapping[str, FileEntry]
    """Every file by relative name, the manifest itself left out."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the next step needs to know (rows, classes, figures); content, covered by the digest."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Times, machine, versions, run ids; not covered by any digest."""

    @property
    def digest(self) -> str:
        """Digest of the content."""
        return digest_of(
            {
                "kind": self.kind,
                "parents": dict(self.parents),
                "files": {name: entry.sha256 for name, entry in self.files.items()},
                "facts": self.facts,
            }
        )


def request_digest(kind: str, settings: object, parents: Mapping[str, str]) -> str:
    """Digest of a request for an artifact; `settings` is the JSON value of all that shapes the result."""
    return digest_of({"kind": kind, "format": FORMAT, "settings": settings, "parents": dict(parents)})


def write_manifest(
    store: Store,
    kind: str,
    request: str,
    parents: Mapping[str, str],
    facts: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    known: Mapping[str, FileEntry] | None = None,
    leave_out: tuple[str, ...] = (),
) -> Manifest:
    """Complete an artifact: digest the files that lie in its folder and write the manifest, last.

    Args:
        store: the artifact's folder.
        known: entries whose digests were computed while writing, so that they are not read again.
        leave_out: prefixes of relative names that are no part of the artifact.
    """
    known = known or {}
    entries: dict[str, FileEntry] = {}
    for name, size in store.files().items():
        if name == MANIFEST or name.startswith(leave_out or ("\0",)):
            continue
        entry = known.get(name)
        entries[name] = entry if entry and entry.bytes == size else FileEntry(size, store.sha256(name))
    manifest = Manifest(kind, request, dict(parents), entries, facts or {}, provenance or {})
    store.write_json(MANIFEST, {"format": FORMAT, "digest": manifest.digest, **asdict(manifest)})
    return manifest


def find_manifest(store: Store) -> Manifest | None:
    """The artifact's manifest, or None while the folder has none.

    Raises:
        InputError: the manifest is damaged or of another format.
    """
    try:
        content = store.read_bytes(MANIFEST)
    except FileNotFoundError:
        return None
    rebuild = f"hint: delete {store.url}/{MANIFEST} and run the same command again to rebuild it"
    try:
        value = json.loads(content)
        files = {name: FileEntry(**entry) for name, entry in value["files"].items()}
        manifest = Manifest(
            value["kind"], value["request"], value["parents"], files, value["facts"], value["provenance"]
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"the manifest {store.url}/{MANIFEST} is damaged: {error!r}\n{rebuild}") from error
    if value.get("digest") != manifest.digest:
        raise InputError(f"the manifest {store.url}/{MANIFEST} does not match its own digest\n{rebuild}")
    return manifest


def read_manifest(store: Store, made_by: str) -> Manifest:
    """The artifact's manifest.

    Args:
        made_by: the command that makes it, for the hint.

    Raises:
        InputError: there is none, or it is damaged.
    """
    manifest = find_manifest(store)
    if manifest is None:
        raise InputError(f"there is no finished artifact at {store.url}\nhint: make it with `{made_by}`")
    return manifest


def check_lineage(manifests: Mapping[str, Manifest], made_by: Mapping[str, str], of: tuple[str, ...]) -> None:
    """Check that artifacts were made from the others as they are now.

    Args:
        manifests: of one root, by kind.
        made_by: the command that makes each kind.
        of: the kinds whose parents are looked at.

    Raises:
        InputError: one was made from another than the one that is there, such as codes of another tokenizer.
    """
    for kind in of:
        for parent, digest in manifests[kind].parents.items():
            found = manifests.get(parent)
            if found is not None and found.digest != digest:
                raise InputError(
                    f"{kind}/ was made from another {parent}/ ({digest[:12]}) than the one that is there "
                    f"({found.digest[:12]})\nhint: run `{made_by[kind]}` again"
                )


def check_files(store: Store, manifest: Manifest, *, deep: bool = False) -> None:
    """Check that every file is there with its size and, if `deep`, its digest.

    Raises:
        InputError: a file is missing or damaged (named).
    """
    sizes = store.files()
    for name, entry in manifest.files.items():
        damage = None
        if name not in sizes:
            damage = "is missing"
        elif sizes[name] != entry.bytes:
            damage = f"has {sizes[name]} bytes instead of {entry.bytes}"
        elif deep and store.sha256(name) != entry.sha256:
            damage = "does not match its digest"
        if damage:
            raise InputError(
                f"{store.url}/{name} {damage}\n"
                f"hint: delete {store.url}/{MANIFEST} and run the same command again to rebuild the {manifest.kind}"
            )
