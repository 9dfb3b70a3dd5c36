"""Step 1: pictures of any source become the artifact `dataset/`.

Three passes. Every unit of the source is decoded somewhere on the cluster into a staging file of its own; the driver
reads their index (some fifty bytes a picture, no pixels) and decides splits and duplicates; every shard is then
written from the staging files it needs. Units and shards that are finished are not done again, so a job that was
killed goes on, and since units and order come from the source alone the result is the same.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infra.errors import InputError
from infra.storage import Store
from workflows.artifacts import FileEntry, Manifest, check_files, find_manifest, write_manifest
from workflows.config import DataSettings
from workflows.context import Context
from workflows.data.distributed import Summary, map_units
from workflows.data.pictures import Rejected, prepare
from workflows.data.planning import INDEX, Plan, make_plan, rejected_rows
from workflows.data.reading import read_unit
from workflows.data.shards import (
    STAGING,
    clear_stale,
    finished_shards,
    mark_finished,
    shard_bounds,
    shard_name,
    to_parquet,
)
from workflows.data.sources import Raw, Unit, has_changed, list_units, source_digest
from workflows.data.splits import SPLITS, group_key, split_number
from workflows.requests import request_of

REJECTED = "rejected.parquet"
_REJECTIONS = pa.schema([("id", pa.string()), ("reason", pa.string())])
_STAGED = pa.schema(
    [
        *INDEX,
        ("id", pa.string()),
        ("caption", pa.string()),
        ("group", pa.string()),
        ("image", pa.binary()),
        ("seg", pa.binary()),
    ]
)
_SHARD = pa.schema(
    [
        ("id", pa.string()),
        ("label", pa.int64()),
        ("style", pa.string()),
        ("caption", pa.string()),
        ("group", pa.string()),
        ("image", pa.binary()),
        ("seg", pa.binary()),
        ("license", pa.string()),
    ]
)


def build_dataset(context: Context) -> Manifest:
    """The artifact `dataset/`: shards of each split, rejected.parquet and the manifest.

    Raises:
        InputError: the source has nothing to offer, or too many of its pictures are rejected.
    """
    settings, store = context.config.data, context.root.child("dataset")
    request = request_of("dataset", context.config, {})
    present = find_manifest(store)
    changed = present is not None and has_changed(settings, present.provenance.get("source"))
    if present is not None and present.request == request and not changed:
        check_files(store, present)
        return present
    started = time.monotonic()
    staging = store.child(STAGING, request[:16])
    try:
        listing = _decode(staging, context)
        names = listing.names
        plan = make_plan(names, staging, settings, context.config.seed)
    except InputError:
        store.child(STAGING).delete()  # what the user mends may be the pictures, so nothing of them is kept
        if not store.files():
            store.delete()
        raise
    entries = _write_shards(plan, names, staging, store, context)
    rejections = pa.Table.from_pylist(rejected_rows(plan, names, staging), _REJECTIONS)
    store.write_bytes(REJECTED, to_parquet(rejections))
    facts = {
        "classes": plan.classes,
        "styles": plan.styles,
        "licences": plan.licences,
        "rows": {split: len(plan.rows(split)) for split in SPLITS},
        "class_rows": {split: plan.class_rows(split) for split in SPLITS},
        "rejected": rejections.num_rows,
        "duplicates": plan.duplicates,
        "image_size": list(settings.image_size),
    }
    provenance = {
        "seconds": round(time.monotonic() - started, 1),
        "units": len(names),
        "source": source_digest(listing.contents),
    }
    manifest = write_manifest(
        store, "dataset", request, {}, facts, provenance, known=entries, leave_out=(f"{STAGING}/",)
    )
    store.child(STAGING).delete()
    _tell(context, manifest)
    return manifest


def _tell(context: Context, manifest: Manifest) -> None:
    facts = manifest.facts
    rows = ", ".join(f"{count:,} {split}" for split, count in facts["rows"].items())
    context.progress.say(f"  {rows}; {facts['rejected']} rejected, {facts['duplicates']} duplicates left out")
    if context.run is not None:
        counts = {f"rows_{split}": float(count) for split, count in facts["rows"].items()}
        left_out = {name: float(facts[name]) for name in ("rejected", "duplicates")}
        context.run.log_metrics({**counts, **left_out, "classes": float(len(facts["classes"]))}, step=0)


# ---- pass 1: decode ----


@dataclass
class _DecodeWorker:
    """Decodes the pictures of a unit into its staging file."""

    settings: DataSettings
    staging: Store

    def __call__(self, job: tuple[str, Unit]) -> Summary:
        """Write the unit's file: a row for every picture, with the reason where it was rejected."""
        name, unit = job
        rows = [_staged(raw, self.settings) for raw in read_unit(unit)]
        self.staging.write_bytes(name, to_parquet(pa.Table.from_pylist(rows, _STAGED)))
        return {"pictures": len(rows)}


def _staged(raw: Raw, settings: DataSettings) -> dict[str, Any]:
    try:
        picture = prepare(raw.content, raw.seg, settings)
    except Rejected as reason:
        return {"id": raw.id, "reason": str(reason)}
    group = raw.group or raw.id
    return {
        "id": raw.id,
        "label": raw.label,
        "style": raw.style,
        "group": group,
        "group_key": group_key(group),
        "given": split_number(raw.split),
        "license": raw.license,
        "digest": picture.digest,
        "caption": raw.caption,
        "image": picture.png,
        "seg": picture.seg_png,
    }


@dataclass
class _Listing:
    """The units' staging names in order, while units stream by."""

    names: list[str] = field(default_factory=list)
    contents: list[str] = field(default_factory=list)
    """The units' content digests."""
    pictures: int = 0
    """Listed so far."""
    finished: int = 0
    """Of these, decoded by an interrupted run."""

    def unfinished(self, units: Iterator[Unit], present: set[str]) -> Iterator[tuple[str, Unit]]:
        """Names and units that have no staging file yet."""
        for number, unit in enumerate(units):
            name = f"unit-{number:06d}-{unit.digest[:16]}.parquet"
            self.names.append(name)
            self.contents.append(unit.content_digest)
            self.pictures += len(unit.members)
            if name in present:
                self.finished += len(unit.members)
            else:
                yield name, unit


def _decode(staging: Store, context: Context) -> _Listing:
    """The staging files of all units, made now unless they are there."""
    settings, listing, done = context.config.data, _Listing(), 0
    jobs = listing.unfinished(list_units(settings), set(staging.files()))
    for summary in map_units(lambda: _DecodeWorker(settings, staging), jobs, context.config.compute):
        done += int(summary["pictures"])
        context.progress.update(listing.finished + done, listing.pictures, "pictures")
    return listing


# ---- pass 3: write ----


@dataclass(frozen=True)
class _ShardJob:
    """One shard: rows of staging files, in order."""

    name: str
    units: tuple[tuple[str, tuple[int, ...]], ...]
    """Staging file, and rows of it."""


@dataclass
class _ShardWorker:
    """Writes a shard from the staging files it needs."""

    staging: Store
    notes: Store
    store: Store
    classes: list[str]

    @functools.cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.classes)}

    def __call__(self, job: _ShardJob) -> Summary:
        """Write one shard."""
        parts = []
        for name, places in job.units:
            with self.staging.open(name) as file:
                parts.append(pq.read_table(file).take(pa.array(places)))
        rows = pa.concat_tables(parts)
        labels = pa.array([self._numbers.get(label, -1) for label in rows["label"].to_pylist()], pa.int64())
        columns = {name: labels if name == "label" else rows[name] for name in _SHARD.names}
        shard = pa.table(columns).cast(_SHARD).combine_chunks()
        return mark_finished(self.store, self.notes, job.name, to_parquet(shard), shard.num_rows)


def _write_shards(plan: Plan, names: list[str], staging: Store, store: Store, context: Context) -> dict[str, FileEntry]:
    # Notes count for one plan only: the source may have changed since an interrupted run wrote its shards.
    notes = staging.child(plan.digest(names)[:16])
    entries = finished_shards(store, notes)
    clear_stale(store, staging, finished=entries)
    total = sum(len(plan.rows(split)) for split in SPLITS)
    written, classes = 0, plan.classes
    waiting = [job for job in _shard_jobs(plan, names, context.config.data.shard_rows) if job.name not in entries]
    before = total - sum(len(places) for job in waiting for _, places in job.units)
    for summary in map_units(lambda: _ShardWorker(staging, notes, store, classes), waiting, context.config.compute):
        entries[str(summary["name"])] = FileEntry(int(summary["bytes"]), str(summary["sha256"]))
        written += int(summary["rows"])
        context.progress.update(before + written, total, "rows written")
    return entries


def _shard_jobs(plan: Plan, names: list[str], shard_rows: int) -> Iterator[_ShardJob]:
    for split in SPLITS:
        rows = plan.rows(split)
        for number, (first, end) in enumerate(shard_bounds(len(rows), shard_rows)):
            mine = rows[first:end]
            units, starts = np.unique(plan.units[mine], return_index=True)  # sorted, as the rows are
            parts = np.split(plan.places[mine], starts[1:])
            yield _ShardJob(
                shard_name(split, number),
                tuple((names[unit], tuple(places.tolist())) for unit, places in zip(units, parts, strict=True)),
            )
