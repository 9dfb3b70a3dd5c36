"""Shards in the making: written whole, noted when finished, and taken up again."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given
from hypothesis import strategies as st

from infra.storage import Store
from workflows.artifacts import MANIFEST, FileEntry
from workflows.data.shards import (
    STAGING,
    clear_stale,
    finished_shards,
    mark_finished,
    shard_bounds,
    shard_name,
    to_parquet,
)


@given(st.integers(0, 10_000), st.integers(1, 3_000))
def test_bounds_cover_all_rows_evenly(rows: int, shard_rows: int) -> None:
    bounds = shard_bounds(rows, shard_rows)
    assert [first for first, _ in bounds] == [0, *(end for _, end in bounds[:-1])]
    assert bounds[-1][1] == rows
    sizes = [end - first for first, end in bounds]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= 1.5 * shard_rows + 1
    assert len(bounds) == 1 or min(sizes) >= shard_rows // 2


def test_names_sort_in_the_order_of_the_shards() -> None:
    names = [shard_name("val", number) for number in (0, 9, 10, 99_999)]
    assert names == sorted(names)
    assert names[0] == "val-00000.parquet"


def test_equal_tables_give_equal_bytes_that_read_back() -> None:
    table = pa.table({"id": ["a", "b"], "image": [b"1", None]})
    content = to_parquet(table)
    assert to_parquet(pa.table({"id": ["a", "b"], "image": [b"1", None]})) == content
    assert pq.read_table(io.BytesIO(content)).equals(table)


def test_a_finished_shard_is_found_again_with_its_digest(tmp_path: Path) -> None:
    store, notes = Store(str(tmp_path)), Store(str(tmp_path / "notes"))
    summary = mark_finished(store, notes, "a.parquet", b"content", rows=3)
    entry = FileEntry(7, hashlib.sha256(b"content").hexdigest())
    assert summary == {"name": "a.parquet", "rows": 3, "bytes": 7, "sha256": entry.sha256}
    assert store.read_bytes("a.parquet") == b"content"
    assert finished_shards(store, notes) == {"a.parquet": entry}


def test_a_shard_without_note_or_of_another_size_is_not_finished(tmp_path: Path) -> None:
    store, notes = Store(str(tmp_path)), Store(str(tmp_path / "notes"))
    for name in ("whole", "longer", "gone"):
        mark_finished(store, notes, f"{name}.parquet", b"content", rows=1)
    store.write_bytes("unnoted.parquet", b"content")
    store.write_bytes("longer.parquet", b"other content")
    store.delete("gone.parquet")
    notes.write_json("another.json", {"name": "unnoted.parquet", "bytes": 7})
    assert list(finished_shards(store, notes)) == ["whole.parquet"]
    assert finished_shards(store, Store(str(tmp_path / "absent"))) == {}


def test_what_another_request_left_is_taken_down_and_our_own_stays(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    mine = store.child(STAGING, "mine")
    for name in (MANIFEST, "train-00000.parquet", "train-00001.parquet", f"{STAGING}/other/unit.parquet"):
        store.write_bytes(name, b"x")
    for name in ("unit.parquet", "plan/done-train-00000.parquet.json"):
        mine.write_bytes(name, b"x")
    store.write_bytes(f"{STAGING}/mine-too/unit.parquet", b"x")
    clear_stale(store, mine, finished={"train-00000.parquet"})
    assert list(store.files()) == [
        f"{STAGING}/mine/plan/done-train-00000.parquet.json",
        f"{STAGING}/mine/unit.parquet",
        "train-00000.parquet",
    ]
