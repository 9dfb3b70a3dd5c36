"""Manifests: what their digests cover, and what is said about a damaged one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra.errors import InputError
from infra.storage import Store, open_store
from workflows.artifacts import (
    MANIFEST,
    FileEntry,
    Manifest,
    check_files,
    digest_of,
    file_entry,
    find_manifest,
    read_manifest,
    request_digest,
    write_manifest,
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An artifact's folder with two files, one of them no part of it."""
    found = open_store(str(tmp_path / "vq"))
    found.write_bytes("model/weights.bin", b"weights")
    found.write_bytes("checkpoints/half.bin", b"scratch")
    return found


def written(store: Store, **changes: Any) -> Manifest:
    settings: dict[str, Any] = {
        "kind": "vq",
        "request": "asked",
        "parents": {"dataset": "d1"},
        "facts": {"images": 640},
        "provenance": {"seconds": 1.5},
        "leave_out": ("checkpoints/",),
    }
    return write_manifest(store, **(settings | changes))


def test_a_manifest_comes_back_as_it_was_written(store: Store) -> None:
    manifest = written(store)
    assert find_manifest(store) == manifest == read_manifest(store, "hvqd train vq")
    assert manifest.files == {"model/weights.bin": FileEntry(7, hashlib.sha256(b"weights").hexdigest())}


def test_the_digest_covers_content_parents_facts_and_kind_and_nothing_else(store: Store) -> None:
    digest = written(store).digest
    assert written(store, provenance={"seconds": 99, "run": "other"}).digest == digest
    assert written(store, request="asked in other words").digest == digest
    changed = [
        written(store, parents={"dataset": "d2"}).digest,
        written(store, facts={"images": 641}).digest,
        written(store, kind="prior").digest,
    ]
    store.write_bytes("model/weights.bin", b"weightz")
    changed.append(written(store).digest)
    store.write_bytes("model/more.bin", b"")
    changed.append(written(store).digest)
    assert len({digest, *changed}) == 6


def test_a_request_covers_kind_settings_and_parents_whatever_the_order_of_keys() -> None:
    request = request_digest("vq", {"a": 1, "b": [2, 3]}, {"dataset": "d", "codes": "c"})
    assert request == request_digest("vq", {"b": [2, 3], "a": 1}, {"codes": "c", "dataset": "d"})
    others = [
        request_digest("prior", {"a": 1, "b": [2, 3]}, {"dataset": "d", "codes": "c"}),
        request_digest("vq", {"a": 1, "b": [3, 2]}, {"dataset": "d", "codes": "c"}),
        request_digest("vq", {"a": 1, "b": [2, 3]}, {"dataset": "e", "codes": "c"}),
    ]
    assert len({request, *others}) == 4


def test_a_digest_is_the_sha256_of_compact_sorted_json() -> None:
    assert digest_of({"b": "é", "a": 1}) == hashlib.sha256('{"a":1,"b":"é"}'.encode()).hexdigest()


def test_a_files_entry_is_its_size_and_digest(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert file_entry(tmp_path / "file") == FileEntry(3, hashlib.sha256(b"abc").hexdigest())


def test_digests_known_from_writing_are_not_computed_again_unless_the_size_differs(store: Store) -> None:
    known = {"model/weights.bin": FileEntry(7, "known")}
    assert written(store, known=known).files["model/weights.bin"].sha256 == "known"
    known = {"model/weights.bin": FileEntry(8, "of an older file")}
    assert written(store, known=known).files["model/weights.bin"] == FileEntry(
        7, hashlib.sha256(b"weights").hexdigest()
    )


def test_a_folder_without_a_manifest_is_unfinished(store: Store) -> None:
    assert find_manifest(store) is None
    with pytest.raises(InputError, match=r"no finished artifact at .*/vq\nhint: make it with `hvqd train vq`"):
        read_manifest(store, "hvqd train vq")


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "null",
        lambda text: text.replace('"kind"', '"kin"'),
        lambda text: text.replace('"bytes"', '"bites"'),
        lambda text: json.dumps(json.loads(text) | {"files": []}),
    ],
    ids=["truncated", "a list", "null", "no kind", "unknown entry", "files in a list"],
)
def test_a_damaged_manifest_is_named_with_how_to_rebuild(store: Store, damage: Callable[[str], str]) -> None:
    written(store)
    store.write_bytes(MANIFEST, damage(store.read_bytes(MANIFEST).decode()).encode())
    with pytest.raises(InputError, match=r"the manifest .*/vq/manifest\.json is damaged: .*\nhint: delete .*rebuild"):
        find_manifest(store)


@pytest.mark.parametrize(("given", "changed"), [("640", "641"), ('"d1"', '"d2"'), ("weights.bin", "weightz.bin")])
def test_an_edited_manifest_does_not_match_its_own_digest(store: Store, given: str, changed: str) -> None:
    written(store)
    text = store.read_bytes(MANIFEST).decode()
    assert given in text
    store.write_bytes(MANIFEST, text.replace(given, changed).encode())
    with pytest.raises(InputError, match=r"manifest\.json does not match its own digest\nhint: delete .*rebuild it"):
        find_manifest(store)


def test_a_missing_or_truncated_file_is_named(store: Store) -> None:
    manifest = written(store)
    check_files(store, manifest, deep=True)
    store.write_bytes("model/weights.bin", b"weig")
    with pytest.raises(InputError, match=r"/vq/model/weights\.bin has 4 bytes instead of 7\nhint: delete .*the vq$"):
        check_files(store, manifest)
    store.delete("model/weights.bin")
    with pytest.raises(InputError, match=r"/vq/model/weights\.bin is missing\nhint: delete .*manifest\.json"):
        check_files(store, manifest)


def test_a_changed_byte_is_found_by_the_deep_check_only(store: Store) -> None:
    manifest = written(store)
    store.write_bytes("model/weights.bin", b"weightz")
    check_files(store, manifest)
    with pytest.raises(InputError, match=r"weights\.bin does not match its digest\nhint: delete .*rebuild the vq"):
        check_files(store, manifest, deep=True)
