"""What goes into a dataset, decided from the index of its staging files: splits, duplicates, small classes.

The index of a picture is a few small numbers; no pixels and no names are held for all pictures at once.

Axes: N pictures, in the source's order.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.errors import InputError
from infra.storage import Store
from workflows.config import DataSettings
from workflows.data.splits import NONE, SPLITS, TEST, TRAIN, VAL, assign_splits, keep_unique

Array = np.ndarray[Any, Any]

INDEX = [
    ("reason", pa.string()),  # why it was rejected; null for a good picture, whose other columns are then set
    ("label", pa.string()),
    ("style", pa.string()),
    ("license", pa.string()),
    ("given", pa.int8()),
    ("group_key", pa.uint64()),
    ("digest", pa.binary(16)),
]
"""Columns of a staging file that decisions are made from."""
_READERS = 8


@dataclass(frozen=True)
class Plan:
    """What goes into the dataset. Arrays are over the readable pictures, in the source's order."""

    units: Array
    """(N,) number of the staging file."""
    places: Array
    """(N,) row in the staging file."""
    labels: Array
    """(N,) number of the class, NONE for none."""
    splits: Array
    """(N,) number of SPLITS, NONE for what is left out."""
    classes: list[str]
    styles: list[str]
    licences: list[str]
    rejected: int
    dropped: list[tuple[int, int, str]]
    """Staging file, row and reason of the readable pictures that are rejected for their class."""
    duplicates: int

    def rows(self, split: str) -> Array:
        """Positions of a split's pictures."""
        return np.flatnonzero(self.splits == SPLITS.index(split))

    def class_rows(self, split: str) -> list[int]:
        """How many pictures of each class a split has."""
        labels = self.labels[self.rows(split)]
        return [int(count) for count in np.bincount(labels[labels >= 0], minlength=len(self.classes))]

    def digest(self, names: Sequence[str]) -> str:
        """Of all that shapes the shards; `names` are the staging files."""
        found = hashlib.sha256("\n".join([*names, *self.classes]).encode())
        for array in (self.units, self.places, self.labels, self.splits):
            found.update(np.ascontiguousarray(array).tobytes())
        return found.hexdigest()


def make_plan(names: Sequence[str], staging: Store, settings: DataSettings, seed: int) -> Plan:
    """Decide from the staging files.

    Raises:
        InputError: too many rejections, too few pictures, classes of a single picture, or contradictory splits.
    """
    index = _read_index(names, staging)
    _check_rejections(index, names, staging, settings)
    small = _small_classes(index, settings)
    wanted = ~np.isin(index.labels, small)
    candidates = np.flatnonzero(wanted)

    def group_of(candidate: int) -> str:
        position = candidates[candidate]
        with staging.open(names[index.units[position]]) as file:
            return str(pq.read_table(file, columns=["group"])["group"][int(index.places[position])])

    splits = np.full(len(index.labels), NONE, dtype=np.int8)
    assigned = assign_splits(
        index.group_keys[wanted], index.given[wanted], settings.validation_share, settings.test_share, seed, group_of
    )
    unique = keep_unique(index.digests[wanted], assigned)
    splits[candidates[unique]] = assigned[unique]
    empty = [SPLITS[split] for split in (TRAIN, VAL, TEST) if not (splits == split).any()]
    if empty:
        raise InputError(
            f"no pictures are left for {' and '.join(empty)} after leaving out {int((~unique).sum())} duplicates\n"
            "hint: add pictures that differ, or check data.group_column"
        )
    classes = sorted(set(index.label_names) - {index.label_names[label] for label in small} - {""})
    numbers = {name: number for number, name in enumerate(classes)}
    renumbered = np.array([numbers.get(name, NONE) for name in index.label_names], dtype=np.int32)
    kept = splits != NONE
    return Plan(
        units=index.units,
        places=index.places,
        labels=renumbered[index.labels],
        splits=splits,
        classes=classes,
        styles=_names_of(index.styles[kept], index.style_names),
        licences=_names_of(index.licences[kept], index.licence_names),
        rejected=sum(index.reasons.values()),
        dropped=[
            (int(index.units[at]), int(index.places[at]), f"class: {index.label_names[index.labels[at]]} has no other")
            for at in np.flatnonzero(~wanted)
        ],
        duplicates=int((~unique).sum()),
    )


def _names_of(numbers: Array, names: list[str]) -> list[str]:
    return sorted({names[number] for number in np.unique(numbers)} - {""})


# ---- the index ----


@dataclass(frozen=True)
class _Index:
    units: Array
    places: Array
    labels: Array
    styles: Array
    licences: Array
    given: Array
    group_keys: Array
    digests: Array
    label_names: list[str]
    style_names: list[str]
    licence_names: list[str]
    reasons: Counter[str]
    """How many were rejected, by the kind of reason."""
    first_rejected: int | None
    """The first staging file with a rejection."""


@dataclass
class _Numbering:
    """Numbers for words, in the order of their appearance."""

    numbers: dict[str, int] = field(default_factory=dict)

    def of(self, column: pa.ChunkedArray) -> Array:
        """(n,) int32 numbers of a column's words."""
        encoded = column.combine_chunks().dictionary_encode()
        known = [self.numbers.setdefault(word or "", len(self.numbers)) for word in encoded.dictionary.to_pylist()]
        numbers: Array = np.array(known, dtype=np.int32)[encoded.indices.to_numpy()]
        return numbers


def _read_index(names: Sequence[str], staging: Store) -> _Index:
    labels, styles, licences = _Numbering(), _Numbering(), _Numbering()
    columns: list[tuple[Array, ...]] = []
    reasons: Counter[str] = Counter()
    first_rejected = None
    for unit, table in enumerate(_index_tables(names, staging)):
        good = table["reason"].is_null()
        bad = table.filter(pc.invert(good))
        if bad.num_rows:
            reasons.update(str(reason).split(":")[0] for reason in bad["reason"].to_pylist())
            first_rejected = unit if first_rejected is None else first_rejected
        places = np.flatnonzero(good.to_numpy())
        if not len(places):
            continue
        rows = table.filter(good)
        columns.append(
            (
                np.full(len(places), unit, dtype=np.int32),
                places.astype(np.int32),
                labels.of(rows["label"]),
                styles.of(rows["style"]),
                licences.of(rows["license"]),
                rows["given"].to_numpy(),
                rows["group_key"].to_numpy(),
                np.array(rows["digest"].to_pylist(), dtype="S16"),
            )
        )
    none = tuple(np.zeros(0, dtype=kind) for kind in ["i4"] * 5 + ["i1", "u8", "S16"])
    units, places, label, style, licence, given, keys, digests = map(np.concatenate, zip(none, *columns, strict=True))
    return _Index(
        units,
        places,
        label,
        style,
        licence,
        given,
        keys,
        digests,
        list(labels.numbers),
        list(styles.numbers),
        list(licences.numbers),
        reasons,
        first_rejected,
    )


def _index_tables(names: Sequence[str], staging: Store) -> Iterator[pa.Table]:
    """The staging files' index columns, in order; a few are read at once, because each costs a round trip."""

    def read(name: str) -> pa.Table:
        with staging.open(name) as file:
            return pq.read_table(file, columns=[column for column, _ in INDEX], use_threads=False)

    remaining = iter(names)
    with ThreadPoolExecutor(_READERS) as pool:
        while some := list(itertools.islice(remaining, 8 * _READERS)):
            yield from pool.map(read, some)


def rejected_rows(plan: Plan, names: Sequence[str], staging: Store) -> list[dict[str, str]]:
    """Id and reason of every rejected picture, sorted by id."""
    dropped: dict[int, list[tuple[int, str]]] = {}
    for unit, place, reason in plan.dropped:
        dropped.setdefault(unit, []).append((place, reason))
    found = []
    for unit, name in enumerate(names if plan.rejected or dropped else []):
        with staging.open(name) as file:
            table = pq.read_table(file, columns=["id", "reason"])
        found += table.filter(table["reason"].is_valid()).to_pylist()
        found += [{"id": table["id"][place].as_py(), "reason": reason} for place, reason in dropped.get(unit, [])]
    return sorted(found, key=lambda row: (row["id"], row["reason"]))


# ---- checks ----


def _check_rejections(index: _Index, names: Sequence[str], staging: Store, settings: DataSettings) -> None:
    readable, rejected = len(index.labels), sum(index.reasons.values())
    total = readable + rejected
    listed = ", ".join(f"{count} {kind}" for kind, count in index.reasons.most_common(4))
    if index.first_rejected is not None:
        with staging.open(names[index.first_rejected]) as file:
            table = pq.read_table(file, columns=["id", "reason"])
        first = table.filter(table["reason"].is_valid()).slice(0, 1).to_pylist()[0]
        listed += f" (first: {first['id']}: {first['reason']})"
    if readable == 0:
        raise InputError(
            f"no readable picture among the {total} of data.source={settings.source}: {listed}\n"
            "hint: check the files; PNG, JPEG, WebP, GIF, BMP, TIFF and JPEG 2000 are read"
        )
    if rejected > settings.max_rejected_share * total:
        raise InputError(
            f"{rejected} of {total} pictures were rejected, more than "
            f"data.max_rejected_share={settings.max_rejected_share:g}: {listed}\n"
            "hint: repair the source, or raise data.max_rejected_share"
        )
    if readable < len(SPLITS):
        raise InputError(
            f"data.source={settings.source} has {readable} readable picture(s); "
            "train, val and test need at least one each\nhint: give at least three pictures"
        )


def _small_classes(index: _Index, settings: DataSettings) -> list[int]:
    """Numbers of the classes that are to be left out because they have a single picture, copies not counted."""
    pairs = np.unique(np.rec.fromarrays([index.labels, index.digests]))
    labels, counts = np.unique(pairs["f0"], return_counts=True)
    small = [int(label) for label in labels[counts == 1] if index.label_names[label]]
    if not small or settings.small_classes == "keep":
        return []
    if settings.small_classes == "refuse":
        shown = sorted(index.label_names[label] for label in small)
        raise InputError(
            f"{len(small)} class(es) have a single picture, which cannot be both learned and tested: "
            f"{', '.join(shown[:5])}{', …' if len(shown) > 5 else ''}\n"
            "hint: add pictures, or set data.small_classes=drop (or keep)"
        )
    return small
