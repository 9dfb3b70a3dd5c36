"""Which picture goes where: splits by group, and exact duplicates. Pure functions on arrays of a few bytes a picture.

A group (all drawings of one concept, all crops of one photograph) never spans two splits. Up to 100,000 groups the
shares are met exactly, by rank of a hash; beyond that a threshold on the hash needs no ranking. Neither depends on the
order of the pictures, and no split is ever empty.

Axes: N pictures, in the source's order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

from infra.errors import InputError

Array = np.ndarray[Any, Any]

SPLITS = ("train", "val", "test")
TRAIN, VAL, TEST = range(3)
NONE = -1
"""In no split: not given by the source, or left out."""
_ALIASES = {"training": "train", "validation": "val", "valid": "val", "dev": "val", "testing": "test"}
_EXACT_GROUPS = 100_000


def group_key(group: str) -> int:
    """64 bits that stand for a group."""
    return int.from_bytes(hashlib.blake2b(group.encode(), digest_size=8).digest(), "big")


def split_number(name: str) -> int:
    """The split that a source's own word names; NONE for an empty word.

    Raises:
        InputError: the word names none of ours.
    """
    if not name:
        return NONE
    word = _ALIASES.get(name.lower(), name.lower())
    if word not in SPLITS:
        raise InputError(
            f"the source's split column must say train, val or test: {name}\nhint: rename the split, or the column"
        )
    return SPLITS.index(word)


def group_ranks(keys: Array, seed: int) -> Array:
    """(n,) uint64 uniform numbers that depend on (n,) uint64 group keys and the seed alone."""
    mixed = keys ^ np.uint64(group_key(f"split {seed}"))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # SplitMix64's finalizer
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)))


def assign_splits(
    keys: Array,
    given: Array,
    validation_share: float,
    test_share: float,
    seed: int,
    name_of: Callable[[int], str] = str,
) -> Array:
    """(N,) int8 numbers of SPLITS.

    Args:
        keys: (N,) uint64 keys of the pictures' groups.
        given: (N,) the source's own split of each picture, or NONE; it holds for the whole group. A held-out split
            that the source never names is filled from what is left for training.
        name_of: what to call the group of a picture in an error, by the picture's position.

    Raises:
        InputError: a group in two of the source's splits, or fewer groups than splits.
    """
    groups, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    named = _given_by_group(len(groups), inverse, given, lambda group: name_of(int(first[group])))
    wanted = {
        split: share for split, share in ((TEST, test_share), (VAL, validation_share)) if not (named == split).any()
    }
    free = np.flatnonzero((named == NONE) | (named == TRAIN))
    if len(free) < len(wanted) + 1:
        raise InputError(
            f"{len(groups)} group(s) of pictures cannot fill the splits train, val and test\n"
            "hint: give at least three pictures (of three groups, when there are groups)"
        )
    found = np.where(named == NONE, TRAIN, named).astype(np.int8)
    ranks = group_ranks(groups[free], seed)
    taken = _by_threshold(ranks, wanted) if len(free) > _EXACT_GROUPS else _by_quota(ranks, wanted)
    for split, places in taken.items():
        found[free[places]] = split
    return np.asarray(found[inverse])


def _by_quota(ranks: Array, wanted: dict[int, float]) -> dict[int, Array]:
    """Places of the groups that each split takes: its exact share, at least one; at least one stays to train on."""
    order = np.argsort(ranks, kind="stable")
    taken: dict[int, Array] = {}
    at, room = 0, len(ranks) - 1
    for number, (split, share) in enumerate(wanted.items()):
        still_to_fill = len(wanted) - number - 1
        count = min(max(1, round(share * len(ranks))), room - at - still_to_fill)
        taken[split] = order[at : at + count]
        at += count
    return taken


def _by_threshold(ranks: Array, wanted: dict[int, float]) -> dict[int, Array]:
    uniform = ranks.astype(np.float64) / 2.0**64
    taken: dict[int, Array] = {}
    edge = 0.0
    for split, share in wanted.items():
        places = np.flatnonzero((uniform >= edge) & (uniform < edge + share))
        # A share that is less than one group in all still gets one, from the other end of the ranks.
        taken[split] = places if len(places) else np.argsort(ranks)[-1 - len(taken) :][:1]
        edge += share
    return taken


def _given_by_group(count: int, inverse: Array, given: Array, name_of: Callable[[int], str]) -> Array:
    """(groups,) int8 split that the source names for each group, or NONE."""
    named = np.full(count, NONE, dtype=np.int8)
    for split in range(len(SPLITS)):
        mine = np.unique(inverse[given == split])
        clash = mine[named[mine] != NONE]
        if len(clash):
            raise InputError(
                f"the group {name_of(int(clash[0]))!r} is in two of the source's splits, "
                f"{SPLITS[int(named[clash[0]])]} and {SPLITS[split]}\n"
                "hint: keep a group in one split, or drop the split column"
            )
        named[mine] = split
    return named


def keep_unique(digests: Array, splits: Array) -> Array:
    """(N,) bool: of equal pictures one stays, a held-out one (test, then val) before a training one, else the first.

    Args:
        digests: (N,) fixed-width bytes, equal for equal pictures.
        splits: (N,) numbers of SPLITS.
    """
    order = np.lexsort((np.arange(len(digests)), -splits.astype(np.int64), digests))
    ordered = digests[order]
    kept = np.zeros(len(digests), dtype=bool)
    kept[order[np.concatenate([[True], ordered[1:] != ordered[:-1]])]] = True
    return kept
