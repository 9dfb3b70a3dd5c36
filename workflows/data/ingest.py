"""Step 1: pictures of any source become the artifact `dataset/`.

Three passes. Every unit of the source is decoded somewhere on the cluster into a staging file of its own; the driver
reads their index (about a hundred bytes a picture, no pixels) and decides splits and duplicates; every shard is then
written from the staging files it needs. Units and shards that are finished are not done again, so a job that was
killed goes on, and since units and order come from the source alone the result is the same.
"""

from __future__ import annotations

import io
import time
from collections import Counter
from dataclasses import dataclass
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
from workflows.data.shards import (
    STAGING,
    clear_stale,
    finished_shards,
    mark_finished,
    shard_bounds,
    shard_name,
    to_parquet,
)
from workflows.data.sources import Raw, Unit, list_units, read_unit
from workflows.data.splits import SPLITS, assign_splits, keep_unique
from workflows.requests import request_of

REJECTED = "rejected.parquet"
_INDEX = ("id", "label", "style", "group", "split", "license", "digest")
_ROWS = pa.schema(
    [
        *((name, pa.string()) for name in _INDEX),
        ("caption", pa.string()),
        ("image", pa.binary()),
        ("seg", pa.binary()),
    ]
)
_REJECTIONS = pa.schema([("id", pa.string()), ("reason", pa.string())])
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
    if present is not None and present.request == request:
        check_files(store, present)
        return present
    started = time.monotonic()
    units = list_units(settings)
    staging = store.child(f"{STAGING}{request[:16]}")
    _decode(units, staging, context)
    plan = _decide(len(units), staging, settings, context.config.seed)
    clear_stale(store, staging)
    entries = _write_shards(plan, staging, store, context)
    store.write_bytes(REJECTED, to_parquet(plan.rejections))
    facts = {
        "classes": plan.classes,
        "styles": sorted(set(plan.index["style"]) - {""}),
        "licences": sorted(set(plan.index["license"]) - {""}),
        "rows": {split: int((plan.splits == split).sum()) for split in SPLITS},
        "class_rows": {split: _class_rows(plan, split) for split in SPLITS},
        "rejected": plan.rejections.num_rows,
        "duplicates": plan.duplicates,
        "image_size": list(settings.image_size),
    }
    provenance = {"seconds": round(time.monotonic() - started, 1), "units": len(units)}
    manifest = write_manifest(store, "dataset", request, {}, facts, provenance, known=entries, leave_out=(STAGING,))
    store.child(STAGING.rstrip("/")).delete()
    rows = ", ".join(f"{count:,} {split}" for split, count in facts["rows"].items())
    context.progress.say(f"  {rows}; {facts['rejected']} rejected, {facts['duplicates']} duplicates left out")
    if context.run is not None:
        counts = {f"rows_{split}": float(count) for split, count in facts["rows"].items()}
        context.run.log_metrics({**counts, "rejected": float(facts["rejected"])}, step=0)
    return manifest


# ---- pass 1: decode ----


class _DecodeWorker:
    """Decodes the pictures of a unit into its staging file."""

    def __init__(self, settings: DataSettings, staging: Store) -> None:
        self.settings, self.staging = settings, staging

    def __call__(self, unit: dict[str, Any]) -> Summary:
        """Write unit-NNNNNN.parquet and the rejections beside it."""
        rows, rejections = [], []
        for raw in read_unit(unit["unit"]):
            try:
                picture = prepare(raw.content, raw.seg, self.settings)
            except Rejected as reason:
                rejections.append({"id": raw.id, "reason": str(reason)})
                continue
            rows.append(_row(raw, picture.png, picture.seg_png, picture.digest.hex()))
        name = _unit_name(unit["number"])
        self.staging.write_bytes(f"rejected-{name}", to_parquet(pa.Table.from_pylist(rejections, _REJECTIONS)))
        self.staging.write_bytes(name, to_parquet(pa.Table.from_pylist(rows, _ROWS)))
        return {"pictures": len(rows) + len(rejections)}


def _unit_name(number: int) -> str:
    return f"unit-{number:06d}.parquet"


def _row(raw: Raw, image: bytes, seg: bytes | None, digest: str) -> dict[str, Any]:
    return {
        "id": raw.id,
        "label": raw.label,
        "style": raw.style,
        "group": raw.group or raw.id,
        "split": raw.split,
        "license": raw.license,
        "digest": digest,
        "caption": raw.caption,
        "image": image,
        "seg": seg,
    }


def _decode(units: list[Unit], staging: Store, context: Context) -> None:
    finished = set(staging.files()) if staging.exists("") else set()
    numbered: list[dict[str, Any]] = [
        {"number": number, "unit": unit} for number, unit in enumerate(units) if _unit_name(number) not in finished
    ]
    total = sum(len(unit.members) for unit in units)
    done = total - sum(len(item["unit"].members) for item in numbered)
    settings = context.config.data
    for summary in map_units(lambda: _DecodeWorker(settings, staging), numbered, context.config.compute):
        done += summary["pictures"]
        context.progress.update(done, total, "pictures")


# ---- pass 2: decide ----


@dataclass(frozen=True)
class _Plan:
    """What goes into the data set. Arrays are over the readable pictures, in the source's order."""

    index: dict[str, list[str]]
    units: np.ndarray[Any, Any]
    """Number of the staging file."""
    places: np.ndarray[Any, Any]
    """Row in the staging file."""
    splits: np.ndarray[Any, Any]
    """train, val, test, or "" for what is left out."""
    classes: list[str]
    rejections: pa.Table
    duplicates: int


def _decide(units: int, staging: Store, settings: DataSettings, seed: int) -> _Plan:
    tables, numbers, places, rejections = [], [], [], []
    for number in range(units):
        with staging.open(_unit_name(number)) as file:
            table = pq.read_table(file, columns=list(_INDEX))
        tables.append(table)
        numbers.append(np.full(table.num_rows, number))
        places.append(np.arange(table.num_rows))
        rejections.append(pq.read_table(io.BytesIO(staging.read_bytes(f"rejected-{_unit_name(number)}"))))
    joined, rejected = pa.concat_tables(tables), pa.concat_tables(rejections)
    index = {name: joined[name].to_pylist() for name in _INDEX}
    _check_share(joined.num_rows, rejected, settings)
    small = _small_classes(index["label"], settings)
    splits = np.full(joined.num_rows, "", dtype="<U5")
    candidates = [row for row, label in enumerate(index["label"]) if label not in small]
    splits[candidates] = assign_splits(
        [index["group"][row] for row in candidates],
        [index["split"][row] for row in candidates],
        settings.validation_share,
        settings.test_share,
        seed,
    )
    unique = keep_unique([index["digest"][row] for row in candidates], splits[candidates])
    for row, kept in zip(candidates, unique, strict=True):
        if not kept:
            splits[row] = ""
    empty = [split for split in SPLITS if not (splits == split).any()]
    if empty:
        raise InputError(
            f"no pictures are left for {' and '.join(empty)} after leaving out duplicates\n"
            "hint: add pictures that differ, or check data.group_column"
        )
    dropped = [
        {"id": index["id"][row], "reason": f"its class {label!r} has a single picture"}
        for row, label in enumerate(index["label"])
        if label in small
    ]
    rejected = pa.concat_tables([rejected, pa.Table.from_pylist(dropped, _REJECTIONS)])
    return _Plan(
        index,
        np.concatenate(numbers),
        np.concatenate(places),
        splits,
        sorted(set(index["label"]) - small - {""}),
        rejected.sort_by("id"),
        int((~unique).sum()),
    )


def _check_share(readable: int, rejected: pa.Table, settings: DataSettings) -> None:
    total = readable + rejected.num_rows
    reasons = Counter(str(reason).split(":")[0] for reason in rejected["reason"].to_pylist())
    listed = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common(4))
    first = "".join(f" (the first: {row['id']}: {row['reason']})" for row in rejected.slice(0, 1).to_pylist())
    if readable == 0:
        raise InputError(
            f"no readable picture among the {total} of data.source={settings.source}: {listed}{first}\n"
            "hint: check the files; PNG, JPEG, WebP, GIF, BMP and TIFF are read"
        )
    if rejected.num_rows > settings.max_rejected_share * total:
        raise InputError(
            f"{rejected.num_rows} of {total} pictures were rejected, more than "
            f"data.max_rejected_share={settings.max_rejected_share:g}: {listed}{first}\n"
            "hint: repair the source, or raise data.max_rejected_share"
        )
    if readable < 3:
        raise InputError(
            f"data.source={settings.source} has {readable} readable picture(s); "
            "train, val and test need at least one each\nhint: give at least three pictures"
        )


def _small_classes(labels: list[str], settings: DataSettings) -> set[str]:
    """Classes of a single picture that are to be left out."""
    small = sorted(label for label, count in Counter(labels).items() if count == 1 and label)
    if not small or settings.small_classes == "keep":
        return set()
    if settings.small_classes == "refuse":
        shown = ", ".join(small[:5]) + (", …" if len(small) > 5 else "")
        raise InputError(
            f"{len(small)} class(es) have a single picture, which cannot be both learned and tested: {shown}\n"
            "hint: add pictures, or set data.small_classes=drop (or keep)"
        )
    return set(small)


def _class_rows(plan: _Plan, split: str) -> list[int]:
    counts = Counter(label for label, found in zip(plan.index["label"], plan.splits, strict=True) if found == split)
    return [counts[name] for name in plan.classes]


# ---- pass 3: write ----


@dataclass(frozen=True)
class _ShardJob:
    """One shard: rows of staging files, in order."""

    name: str
    units: tuple[int, ...]
    places: tuple[tuple[int, ...], ...]
    """Rows of each of those staging files."""


class _ShardWorker:
    """Writes a shard from the staging files it needs, and a note beside them that it is done."""

    def __init__(self, staging: Store, store: Store, classes: list[str]) -> None:
        self.staging, self.store = staging, store
        self.labels = {name: number for number, name in enumerate(classes)}

    def __call__(self, unit: _ShardJob) -> Summary:
        """Write one shard."""
        job = unit
        parts = []
        for number, places in zip(job.units, job.places, strict=True):
            with self.staging.open(_unit_name(number)) as file:
                parts.append(pq.read_table(file).take(pa.array(places)))
        rows = pa.concat_tables(parts)
        numbers = [self.labels.get(label, -1) for label in rows["label"].to_pylist()]
        columns = {name: rows[name] for name in _SHARD.names if name != "label"}
        shard = pa.table({**columns, "label": pa.array(numbers, pa.int64())}).select(_SHARD.names).cast(_SHARD)
        return mark_finished(self.store, self.staging, job.name, to_parquet(shard), rows.num_rows)


def _write_shards(plan: _Plan, staging: Store, store: Store, context: Context) -> dict[str, FileEntry]:
    entries = finished_shards(store, staging)
    waiting = [job for job in _shard_jobs(plan, context.config.data.shard_rows) if job.name not in entries]
    total = int((plan.splits != "").sum())
    done = total - sum(len(places) for job in waiting for places in job.places)
    classes = plan.classes
    for summary in map_units(lambda: _ShardWorker(staging, store, classes), waiting, context.config.compute):
        entries[str(summary["name"])] = FileEntry(int(summary["bytes"]), str(summary["sha256"]))
        done += int(summary["rows"])
        context.progress.update(done, total, "rows written")
    return entries


def _shard_jobs(plan: _Plan, shard_rows: int) -> list[_ShardJob]:
    jobs = []
    for split in SPLITS:
        rows = np.flatnonzero(plan.splits == split)
        for number, (first, end) in enumerate(shard_bounds(len(rows), shard_rows)):
            mine = rows[first:end]
            units = np.unique(plan.units[mine])
            places = tuple(tuple(plan.places[mine[plan.units[mine] == unit]].tolist()) for unit in units)
            jobs.append(_ShardJob(shard_name(split, number), tuple(units.tolist()), places))
    return jobs
