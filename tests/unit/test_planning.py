"""The plan of a dataset: what the index of the staging files decides, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.errors import InputError
from infra.storage import Store
from workflows.config import DataSettings
from workflows.data.planning import INDEX, Plan, make_plan, rejected_rows
from workflows.data.splits import NONE, SPLITS, TEST, TRAIN, group_key

SCHEMA = pa.schema([*INDEX, ("id", pa.string()), ("group", pa.string()), ("image", pa.binary())])


def good(name: str, label: str = "", **more: Any) -> dict[str, Any]:
    """A readable picture; its pixels are its own unless `pixels` says otherwise."""
    pixels, group = more.pop("pixels", name), more.pop("group", name)
    row = {"id": name, "reason": None, "label": label, "style": "", "license": "", "given": NONE, "group": group}
    return {**row, "group_key": group_key(group), "digest": pixels.encode().ljust(16, b"."), **more}


def bad(name: str, reason: str) -> dict[str, Any]:
    """A rejected picture."""
    return {"id": name, "reason": reason}


def stage(folder: Path, *units: list[dict[str, Any]]) -> tuple[list[str], Store]:
    """Staging files, one a unit."""
    names = [f"unit-{number}.parquet" for number in range(len(units))]
    for name, rows in zip(names, units, strict=True):
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), folder / name)
    return names, Store(str(folder))


def plan(folder: Path, *units: list[dict[str, Any]], seed: int = 0, **changes: Any) -> Plan:
    """The plan of the units' pictures."""
    return make_plan(*stage(folder, *units), DataSettings(source="mine", **changes), seed)


def pictures(count: int, label: str = "") -> list[dict[str, Any]]:
    """Pictures that differ."""
    return [good(f"{label}{number}", label) for number in range(count)]


def test_every_readable_picture_has_its_place_class_and_split(tmp_path: Path) -> None:
    units = [
        [good("a", "dog"), bad("b", "empty: x"), good("c", "cat")],
        [bad("d", "empty: x")],
        [good("e"), good("f", "dog"), good("g", "cat"), *pictures(10)],
    ]
    found = plan(tmp_path, *units, max_rejected_share=0.5)
    assert found.units.tolist() == [0, 0] + [2] * 13
    assert found.places.tolist() == [0, 2, *range(13)]
    assert found.classes == ["cat", "dog"], "in the order of their names"
    assert found.labels.tolist() == [1, 0, NONE, 1, 0] + [NONE] * 10
    assert (found.rejected, found.duplicates, found.dropped) == (2, 0, [])
    assert sum(len(found.rows(split)) for split in SPLITS) == 15
    assert np.sum([found.class_rows(split) for split in SPLITS], axis=0).tolist() == [2, 2]


def test_the_plan_depends_on_seed_and_pictures_not_on_how_they_are_cut_into_units(tmp_path: Path) -> None:
    rows = [*pictures(20, "cat"), *pictures(20, "dog")]
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    one, other = plan(tmp_path / "one", rows), plan(tmp_path / "other", rows[:7], rows[7:])
    np.testing.assert_array_equal(one.splits, other.splits)
    np.testing.assert_array_equal(one.labels, other.labels)
    assert (plan(tmp_path / "one", rows, seed=1).splits != one.splits).any()


def test_styles_and_licences_are_those_of_the_pictures_that_stay(tmp_path: Path) -> None:
    rows = [good(str(number), style=f"s{number % 2}", license="l") for number in range(10)]
    gone = good("gone", pixels="0", style="s9", license="l9", given=TRAIN)
    found = plan(tmp_path, [*rows[1:], {**rows[0], "given": TEST}, gone])
    assert (found.styles, found.licences, found.duplicates) == (["s0", "s1"], ["l"], 1)


def test_of_equal_pictures_in_two_splits_the_held_out_one_stays(tmp_path: Path) -> None:
    copies = [good("copy in train", pixels="same", given=TRAIN), good("copy in test", pixels="same", given=TEST)]
    rows = [*pictures(10), *copies]
    found = plan(tmp_path, rows)
    assert found.splits[10:].tolist() == [NONE, TEST]
    assert found.duplicates == 1


def test_pictures_of_a_group_stay_together(tmp_path: Path) -> None:
    rows = [good(f"{group}{number}", group=f"g{group}") for group in range(12) for number in range(3)]
    splits = plan(tmp_path, rows).splits.reshape(12, 3)
    assert (splits == splits[:, :1]).all()


def test_rejected_pictures_are_listed_by_id_with_their_reasons(tmp_path: Path) -> None:
    units = [[bad("z", "empty: x"), *pictures(20)], [bad("b", "truncated: y"), good("only", "rare")]]
    found = plan(tmp_path, *units, small_classes="drop")
    names, store = stage(tmp_path, *units)
    assert rejected_rows(found, names, store) == [
        {"id": "b", "reason": "truncated: y"},
        {"id": "only", "reason": "class: rare has no other"},
        {"id": "z", "reason": "empty: x"},
    ]


# ---- what is refused ----


def test_no_readable_picture_is_an_error_that_shows_the_first(tmp_path: Path) -> None:
    message = (
        r"^no readable picture among the 3 of data\.source=mine: 2 unreadable, 1 empty \(first: a: empty: no bytes\)\n"
        r"hint: check the files; PNG, JPEG, WebP, GIF, BMP, TIFF and JPEG 2000 are read$"
    )
    with pytest.raises(InputError, match=message):
        plan(tmp_path, [bad("a", "empty: no bytes"), bad("b", "unreadable: x")], [bad("c", "unreadable: y")])


def test_too_many_rejections_are_an_error_that_says_how_many_and_why(tmp_path: Path) -> None:
    units = [pictures(17), [bad("a", "too small: 2 x 2"), bad("b", "unreadable: x"), bad("c", "unreadable: y")]]
    message = (
        r"^3 of 20 pictures were rejected, more than data\.max_rejected_share=0\.1: 2 unreadable, 1 too small "
        r"\(first: a: too small: 2 x 2\)\nhint: repair the source, or raise data\.max_rejected_share$"
    )
    with pytest.raises(InputError, match=message):
        plan(tmp_path, *units)
    assert plan(tmp_path, *units, max_rejected_share=0.15).rejected == 3


@pytest.mark.parametrize("count", [1, 2])
def test_fewer_pictures_than_splits_are_refused(tmp_path: Path, count: int) -> None:
    message = rf"^data\.source=mine has {count} readable picture\(s\); .* at least one each\nhint: give at least three"
    with pytest.raises(InputError, match=message):
        plan(tmp_path, pictures(count))


def test_three_pictures_are_enough(tmp_path: Path) -> None:
    assert sorted(plan(tmp_path, pictures(3)).splits.tolist()) == [0, 1, 2]


def test_copies_of_one_picture_do_not_fill_the_splits(tmp_path: Path) -> None:
    rows = [good(str(number), pixels="same") for number in range(30)]
    with pytest.raises(
        InputError, match=r"^no pictures are left for train and val after leaving out 29 duplicates\nhint: "
    ):
        plan(tmp_path, rows)


def test_a_class_with_a_single_picture_is_refused_dropped_or_kept(tmp_path: Path) -> None:
    rows = [
        *pictures(10, "cat"),
        good("x", "emu"),
        good("y", "dodo", pixels="same"),
        good("z", "dodo", pixels="same"),
        good("w"),
    ]
    message = (
        r"^2 class\(es\) have a single picture, which cannot be both learned and tested: dodo, emu\n"
        r"hint: add pictures, or set data\.small_classes=drop \(or keep\)$"
    )
    with pytest.raises(InputError, match=message):
        plan(tmp_path, rows)
    dropped = plan(tmp_path, rows, small_classes="drop")
    assert dropped.classes == ["cat"]
    assert dropped.splits[10:13].tolist() == [NONE] * 3
    assert dropped.splits[13] != NONE, "no class is no small class"
    assert [(unit, place) for unit, place, _ in dropped.dropped] == [(0, 10), (0, 11), (0, 12)]
    kept = plan(tmp_path, rows, small_classes="keep")
    assert kept.classes == ["cat", "dodo", "emu"]
    assert kept.splits[10] != NONE


def test_many_small_classes_are_named_in_short(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^7 class\(es\) .*: c0, c1, c2, c3, c4, …\nhint: "):
        plan(tmp_path, [good(str(number), f"c{number}") for number in range(7)])


def test_a_group_in_two_of_the_sources_splits_is_named_wherever_it_lies(tmp_path: Path) -> None:
    clash = [good("a", group="mine", given=TRAIN), good("b", group="mine", given=TEST)]
    with pytest.raises(InputError, match=r"^the group 'mine' is in two of the source's splits, train and test\nhint: "):
        plan(tmp_path, [*pictures(5, "cat"), good("only", "rare")], [*pictures(3), *clash], small_classes="drop")


# ---- digest and memory ----


def test_the_plans_digest_covers_all_that_shapes_the_shards(tmp_path: Path) -> None:
    found = plan(tmp_path, pictures(10))
    names = ["unit-0.parquet"]
    seen = {found.digest(names), found.digest(["unit-1.parquet"])}
    for field in ("units", "places", "labels", "splits"):
        seen.add(dataclasses.replace(found, **{field: getattr(found, field) + 1}).digest(names))
    seen.add(dataclasses.replace(found, classes=["cat"]).digest(names))
    assert len(seen) == 7
    assert plan(tmp_path, pictures(10)).digest(names) == found.digest(names)


def test_planning_reads_no_pixels(tmp_path: Path) -> None:
    rows = [{**row, "image": np.random.default_rng(number).bytes(1 << 20)} for number, row in enumerate(pictures(24))]
    names, store = stage(tmp_path, rows[:12], rows[12:])
    assert sum(store.files().values()) > 24 << 20
    pool = pa.system_memory_pool()
    before, usual = pool.max_memory(), pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        make_plan(names, store, DataSettings(source="mine"), seed=0)
    finally:
        pa.set_memory_pool(usual)
    assert pool.max_memory() - before < 2 << 20
