"""Which picture goes where: splits by group, and exact duplicates. Pure functions on what a picture is called.

A group (all drawings of one concept, all crops of one photograph) never spans two splits. Up to 100,000 groups the
shares are met exactly, by rank of a hash, and no split is empty; beyond that a threshold on the hash needs no ranking.

Axes: N pictures, in the source's order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from infra.errors import InputError

Array = np.ndarray[Any, Any]

SPLITS = ("train", "val", "test")
_EXACT_GROUPS = 100_000
_ALIASES = {"validation": "val", "valid": "val", "dev": "val", "training": "train"}


def group_rank(group: str, seed: int) -> float:
    """A uniform number in [0, 1) that depends on the group and the seed alone."""
    digest = hashlib.blake2b(f"{seed}\x1f{group}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def assign_splits(
    groups: Sequence[str], given: Sequence[str], validation_share: float, test_share: float, seed: int
) -> Array:
    """(N,) strings train, val or test.

    Args:
        groups: of each picture.
        given: the source's own split of each picture, "" where it has none. Splits that the source never names are
            filled from its training groups.

    Raises:
        InputError: a split that is none of ours, a group in two of the source's splits, or fewer groups than splits.
    """
    found = _given_by_group(groups, given)
    present = set(found.values())
    wanted = {
        split: share for split, share in (("test", test_share), ("val", validation_share)) if split not in present
    }
    free = sorted({group for group in groups if found.get(group, "train") == "train"})
    if len(free) < len(wanted) + 1:
        raise InputError(
            f"{len(set(groups))} group(s) of pictures cannot fill the splits train, val and test\n"
            "hint: give at least three pictures (of three groups, when there are groups)"
        )
    found |= dict.fromkeys(free, "train")
    found |= _by_threshold(free, wanted, seed) if len(free) > _EXACT_GROUPS else _by_quota(free, wanted, seed)
    return np.array([found[group] for group in groups])


def _by_quota(free: list[str], wanted: dict[str, float], seed: int) -> dict[str, str]:
    """The groups of lowest rank fill the held-out splits, at least one each; at least one group stays to train on."""
    ranked = sorted(free, key=lambda group: (group_rank(group, seed), group))
    found: dict[str, str] = {}
    for number, (split, share) in enumerate(wanted.items()):
        still_to_fill = len(wanted) - number - 1
        room = len(free) - 1 - len(found) - still_to_fill
        count = min(max(1, round(share * len(free))), room)
        found |= dict.fromkeys(ranked[len(found) : len(found) + count], split)
    return found


def _by_threshold(free: list[str], wanted: dict[str, float], seed: int) -> dict[str, str]:
    found: dict[str, str] = {}
    for group in free:
        rank, edge = group_rank(group, seed), 0.0
        for split, share in wanted.items():
            if edge <= rank < edge + share:
                found[group] = split
            edge += share
    return found


def _given_by_group(groups: Sequence[str], given: Sequence[str]) -> dict[str, str]:
    named: dict[str, str] = {}
    for group, raw in zip(groups, given, strict=True):
        if not raw:
            continue
        split = _ALIASES.get(raw, raw)
        if split not in SPLITS:
            raise InputError(
                f"the source's split column must say train, val or test: {raw}\nhint: rename the split, or the column"
            )
        if named.setdefault(group, split) != split:
            raise InputError(
                f"the group {group!r} is in two of the source's splits, {named[group]} and {split}\n"
                "hint: keep a group in one split, or drop the split column"
            )
    return named


def keep_unique(digests: Sequence[str], splits: Array) -> Array:
    """(N,) bool: of equal pictures one stays, a held-out one (test, then val) before a training one."""
    order = {split: place for place, split in enumerate(reversed(SPLITS))}
    best: dict[str, tuple[int, int]] = {}
    for index, (digest, split) in enumerate(zip(digests, splits, strict=True)):
        rank = (order[str(split)], index)
        if digest not in best or rank < best[digest]:
            best[digest] = rank
    kept = np.zeros(len(digests), dtype=bool)
    kept[[index for _, index in best.values()]] = True
    return kept
