"""Parquet shards of an artifact in the making: written whole, noted as finished, taken up again after a kill.

While an artifact is made, its folder holds `staging/<request>/` with the intermediate files and notes of that request.
A note is written after its shard, so a noted shard is whole.
"""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Collection

import pyarrow as pa
import pyarrow.parquet as pq

from infra.storage import Store
from workflows.artifacts import MANIFEST, FileEntry
from workflows.data.distributed import Summary

STAGING = "staging"
_NOTE = "done-"


def shard_name(split: str, number: int) -> str:
    """The file name of a split's shard."""
    return f"{split}-{number:05d}.parquet"


def shard_bounds(rows: int, shard_rows: int) -> list[tuple[int, int]]:
    """(first, end) row of each shard: as even as possible, `shard_rows` on average, at least one shard."""
    count = max(1, round(rows / shard_rows))
    return list(itertools.pairwise(rows * index // count for index in range(count + 1)))


def to_parquet(table: pa.Table) -> bytes:
    """A parquet file's bytes; equal tables give equal bytes."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def mark_finished(store: Store, notes: Store, name: str, content: bytes, rows: int) -> Summary:
    """Write a shard, then the note that it is finished, which is also what comes back."""
    store.write_bytes(name, content)
    note = {"name": name, "rows": rows, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    notes.write_json(f"{_NOTE}{name}.json", note)
    return note


def finished_shards(store: Store, notes: Store) -> dict[str, FileEntry]:
    """The shards that notes name and that still have the noted size."""
    sizes = store.files()
    found = [notes.read_json(name) for name in notes.files() if name.startswith(_NOTE)]
    return {
        note["name"]: FileEntry(note["bytes"], note["sha256"])
        for note in found
        if sizes.get(note["name"]) == note["bytes"]
    }


def clear_stale(store: Store, staging: Store, finished: Collection[str]) -> None:
    """Take down what another request left in the artifact's folder, its manifest first.

    Args:
        staging: this request's own folder in it, which stays.
        finished: names of this request's finished shards, which stay.
    """
    kept = f"{STAGING}/{staging.url.rsplit('/', 1)[-1]}/"
    names = store.files()
    if MANIFEST in names:
        store.delete(MANIFEST)
    for name in names:
        if name != MANIFEST and not name.startswith(kept) and name not in finished:
            store.delete(name)
