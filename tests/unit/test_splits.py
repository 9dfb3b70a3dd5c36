"""Splits by group and exact duplicates: what holds for any pictures, in any order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import InputError
from workflows.data.splits import NONE, SPLITS, TEST, TRAIN, VAL, assign_splits, group_key, keep_unique, split_number

Array = np.ndarray[Any, Any]


def keys_of(groups: list[str]) -> Array:
    """(N,) keys of named groups."""
    return np.array([group_key(group) for group in groups], dtype=np.uint64)


def assign(
    groups: list[str], given: dict[str, int] | None = None, *, val: float = 0.2, test: float = 0.1, seed: int = 0
) -> Array:
    """(N,) splits of pictures of named groups; `given` are the source's own, by group."""
    named = np.array([(given or {}).get(group, NONE) for group in groups], dtype=np.int8)
    return assign_splits(keys_of(groups), named, val, test, seed, lambda position: groups[position])


def numbered(count: int) -> list[str]:
    """Names of groups of one picture each."""
    return [f"g{number}" for number in range(count)]


def test_the_words_of_a_source_name_splits() -> None:
    words = {"train": TRAIN, "Training": TRAIN, "val": VAL, "validation": VAL, "VALID": VAL, "dev": VAL, "test": TEST}
    assert {word: split_number(word) for word in words} == words
    assert split_number("testing") == TEST
    assert split_number("") == NONE
    with pytest.raises(InputError, match=r"split column must say train, val or test: holdout\nhint: rename the split"):
        split_number("holdout")


def test_keys_of_groups_differ_and_never_change() -> None:
    assert len({group_key(group) for group in numbered(10_000)}) == 10_000
    assert group_key("cat") == 0x3327DD2C7B9D982F, "another key would move the pictures of finished datasets"


def test_shares_are_met_exactly() -> None:
    counts = np.bincount(assign(numbered(200), val=0.06, test=0.05), minlength=3)
    assert counts.tolist() == [178, 12, 10]


@given(
    sizes=st.lists(st.integers(1, 4), min_size=3, max_size=30),
    val=st.floats(0.01, 0.49),
    test=st.floats(0.01, 0.49),
    seed=st.integers(0, 2**31),
    shuffle=st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_any_three_groups_fill_all_splits_whole_in_any_order(
    sizes: list[int], val: float, test: float, seed: int, shuffle: Any
) -> None:
    groups = [f"g{number}" for number, size in enumerate(sizes) for _ in range(size)]
    found = dict(zip(groups, assign(groups, val=val, test=test, seed=seed).tolist(), strict=True))
    assert set(found.values()) == {TRAIN, VAL, TEST}
    other = groups.copy()
    shuffle.shuffle(other)
    assert assign(other, val=val, test=test, seed=seed).tolist() == [found[group] for group in other], (
        "a group is in one split, whatever the order"
    )


def test_the_seed_chooses_the_groups() -> None:
    groups = numbered(100)
    drawn = [assign(groups, seed=seed) for seed in range(20)]
    assert len({tuple(splits) for splits in drawn}) == 20
    often = np.mean([splits == TEST for splits in drawn], axis=0)
    assert often.max() < 0.6, "no group is held out whatever the seed"


def test_the_sources_own_splits_stay() -> None:
    groups = numbered(30)
    own = {"g1": TRAIN, "g2": VAL, "g3": TEST}
    found = assign(groups, own)
    assert (found[1], found[2], found[3]) == (TRAIN, VAL, TEST)
    assert np.bincount(found).tolist() == [28, 1, 1], "what the source has named is not added to"


def test_a_split_that_the_source_does_not_name_is_taken_from_the_rest() -> None:
    groups = numbered(20)
    found = assign(groups, {**dict.fromkeys(groups[:15], TRAIN), **dict.fromkeys(groups[15:], VAL)})
    assert (found[15:] == VAL).all()
    assert np.bincount(found[:15], minlength=3).tolist() == [13, 0, 2]


def test_a_group_with_some_named_pictures_follows_them() -> None:
    groups = ["a", "a", "b", "c", "d"]
    named = np.array([TEST, NONE, NONE, NONE, NONE], dtype=np.int8)
    found = assign_splits(keys_of(groups), named, 0.2, 0.2, 0, str)
    assert found[:2].tolist() == [TEST, TEST]


def test_a_group_in_two_of_the_sources_splits_is_named() -> None:
    groups = ["a", "b", "b", "c"]
    named = np.array([NONE, TRAIN, TEST, NONE], dtype=np.int8)
    with pytest.raises(
        InputError, match=r"^the group 'b' is in two of the source's splits, train and test\nhint: keep"
    ):
        assign_splits(keys_of(groups), named, 0.2, 0.2, 0, lambda position: groups[position])


@pytest.mark.parametrize(
    ("groups", "given"),
    [(["a", "b"], {}), (["a"] * 9, {}), ([], {}), (["a", "b", "c"], {"a": VAL, "b": TEST, "c": TEST})],
)
def test_fewer_groups_than_splits_are_refused(groups: list[str], given: dict[str, int]) -> None:
    message = (
        rf"^{len(set(groups))} group\(s\) of pictures cannot fill the splits train, val and test\nhint: give at least"
    )
    with pytest.raises(InputError, match=message):
        assign(groups, given)


def test_many_groups_are_split_by_a_threshold_that_new_ones_do_not_move() -> None:
    groups = numbered(102_000)
    found, fewer = assign(groups), assign(groups[:101_000])
    np.testing.assert_allclose(np.bincount(found) / len(groups), [0.7, 0.2, 0.1], atol=0.005)
    np.testing.assert_array_equal(found[:101_000], fewer)
    np.testing.assert_array_equal(assign(groups[::-1]), found[::-1])


def test_a_share_of_less_than_one_of_many_groups_still_gets_one() -> None:
    found = assign(numbered(100_001), val=1e-12, test=1e-12)
    assert np.bincount(found).tolist() == [99_999, 1, 1]


# ---- duplicates ----


def kept_slowly(digests: list[bytes], splits: list[int]) -> list[bool]:
    """One picture at a time: it stays when no equal one is more held out, or as much and earlier."""
    ranks = [(-split, position) for position, split in enumerate(splits)]
    return [
        all(rank <= other for other, equal in zip(ranks, digests, strict=True) if equal == digest)
        for rank, digest in zip(ranks, digests, strict=True)
    ]


@given(
    st.lists(
        st.tuples(st.sampled_from([b"a" * 16, b"b" * 16, b"\0" * 16, b"b" * 15 + b"\0"]), st.integers(0, 2)), min_size=1
    )
)
@settings(max_examples=100, deadline=None)
def test_of_equal_pictures_the_most_held_out_and_first_one_stays(pictures: list[tuple[bytes, int]]) -> None:
    digests, splits = map(list, zip(*pictures, strict=True))
    found = keep_unique(np.array(digests, dtype="S16"), np.array(splits, dtype=np.int8))
    assert found.tolist() == kept_slowly(digests, splits)
    assert int(found.sum()) == len(set(digests))


def test_there_are_three_splits() -> None:
    assert [SPLITS[number] for number in (TRAIN, VAL, TEST)] == ["train", "val", "test"]
