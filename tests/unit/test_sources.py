"""Sources and their reading: what counts as a picture, what is known about it, and units that follow from it alone."""

from __future__ import annotations

import io
import json
import tarfile
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.errors import InputError
from tests.pictures import encoded, noise, write_files, write_tar
from workflows.config import DataSettings
from workflows.data import sources
from workflows.data.reading import read_unit
from workflows.data.sources import BUNDLED, UNIT_PICTURES, Raw, Unit, check_source, list_units

PNG = encoded(noise(0, 4, 4))


def settings_for(source: Path | str, **changes: Any) -> DataSettings:
    """Settings that name the source."""
    return DataSettings(source=str(source), **changes)


def read(source: Path | str, **changes: Any) -> list[Raw]:
    """All pictures of a source, in order."""
    return [raw for unit in list_units(settings_for(source, **changes)) for raw in read_unit(unit)]


def digests(source: Path | str, **changes: Any) -> list[str]:
    """The digests of a source's units, in order."""
    return [unit.digest for unit in list_units(settings_for(source, **changes))]


def write_rows(path: Path, rows: list[dict[str, Any]], row_group_size: int = 1000) -> Path:
    """A parquet file of the rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return path


# ---- folders ----


def test_the_class_of_a_picture_in_a_folder_is_the_first_sub_folder(tmp_path: Path) -> None:
    write_files(tmp_path, {"cat/a.png": b"1", "cat/deep/er/b.JPG": b"2", "dog/c.webp": b"3", "d.gif": b"4"})
    assert [(raw.id, raw.label, raw.content) for raw in read(tmp_path)] == [
        ("cat/a.png", "cat", b"1"),
        ("cat/deep/er/b.JPG", "cat", b"2"),
        ("d.gif", "", b"4"),
        ("dog/c.webp", "dog", b"3"),
    ]


def test_hidden_files_and_files_that_are_no_pictures_are_passed_over(tmp_path: Path) -> None:
    files = [
        ".a.png",
        ".hidden/a.png",
        "x/.git/a.png",
        "__MACOSX/a.png",
        "x/._b.png",
        "notes.txt",
        "c.pdf",
        "d.png.bak",
    ]
    write_files(tmp_path, {**dict.fromkeys(files, PNG), "x/b.png": PNG})
    assert [raw.id for raw in read(tmp_path)] == ["x/b.png"]


def test_a_link_to_a_folder_is_followed_unless_it_leads_back(tmp_path: Path) -> None:
    write_files(tmp_path / "elsewhere", {"a.png": PNG})
    source = write_files(tmp_path / "source", {"own.png": PNG})
    (source / "linked").symlink_to(tmp_path / "elsewhere")
    (source / "back").symlink_to(source)
    assert [raw.id for raw in read(source)] == ["linked/a.png", "own.png"]


def test_a_file_that_goes_away_after_it_was_listed_has_no_content(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.png": PNG, "b.png": PNG})
    (unit,) = list_units(settings_for(tmp_path))
    (tmp_path / "a.png").unlink()
    assert [raw.content for raw in read_unit(unit)] == [None, PNG]


def test_the_order_does_not_depend_on_the_order_in_which_files_were_made(tmp_path: Path) -> None:
    names = [f"{folder}/{number}.png" for folder in "ba" for number in (3, 1, 2)]
    one = write_files(tmp_path / "one", dict.fromkeys(names, PNG))
    other = write_files(tmp_path / "other", dict.fromkeys(reversed(names), PNG))
    assert [raw.id for raw in read(one)] == [raw.id for raw in read(other)] == sorted(names)


# ---- tar ----


def test_files_of_one_key_in_a_tar_belong_together(tmp_path: Path) -> None:
    described = {"class": "dog", "group": "g", "style": "s", "caption": "c", "split": "test", "license": "l", "n": [1]}
    shard = write_tar(
        tmp_path / "a.tar",
        {
            "x/1.jpg": b"one",
            "x/1.cls": b"cat\n",
            "x/1.txt": "a café\n".encode(),
            "x/2.png": b"two",
            "x/2.json": json.dumps(described).encode(),
            "3.label.json": b"{}",
            "4.webp": b"four",
            "4.json": b"not json",
            "5.json": b'{"label": 7}',
            "5.png": b"five",
        },
    )
    assert read(shard) == [
        Raw("a.tar/x/1", b"one", label="cat", caption="a café"),
        Raw("a.tar/x/2", b"two", label="dog", group="g", style="s", caption="c", split="test", license="l"),
        Raw("a.tar/4", b"four"),
        Raw("a.tar/5", b"five", label="7"),
    ]


def test_a_plain_extension_is_the_picture_of_a_key_and_hidden_files_are_none(tmp_path: Path) -> None:
    shard = write_tar(
        tmp_path / "a.tar", {"./1.mask.png": b"mask", "./1.png": b"one", "./._1.png": b"note", ".2.png": b"2"}
    )
    assert read(shard) == [Raw("a.tar/./1", b"one")]


def test_shards_in_a_folder_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_tar(tmp_path / f"{name}.tar", {f"{number}.png": b"x" for number in (2, 1)})
    write_files(tmp_path, {"aa/c.png": b"x"})
    assert [raw.id for raw in read(tmp_path)] == ["a.tar/2", "a.tar/1", "aa/c.png", "b.tar/2", "b.tar/1"]


# ---- parquet ----


def test_columns_of_a_parquet_file_say_what_is_known(tmp_path: Path) -> None:
    row = {
        "picture": b"one", "kind": 3, "who": "w", "style": "s", "caption": "c", "seg": b"map", "split": "val",
        "license": "l", "id": "mine", "other": 1.5,
    }  # fmt: skip
    file = write_rows(tmp_path / "a.parquet", [row, {**row, "picture": None, "kind": None, "id": None}])
    found = read(file, image_column="picture", class_column="kind", group_column="who")
    common = {"group": "w", "style": "s", "caption": "c", "split": "val", "license": "l", "seg": b"map"}
    assert found == [
        Raw(id="mine", content=b"one", label="3", **common),
        Raw(id="a.parquet/0/1", content=None, label="", **common),
    ]


def test_an_image_may_be_a_struct_with_bytes(tmp_path: Path) -> None:
    rows = [{"image": {"bytes": b"one", "path": "p"}, "seg": {"bytes": b"map", "path": None}}]
    rows.append({"image": {"bytes": None, "path": "p"}, "seg": {"bytes": None, "path": None}})
    assert read(write_rows(tmp_path / "a.parquet", rows)) == [
        Raw("a.parquet/0/0", b"one", seg=b"map"),
        Raw("a.parquet/0/1", None),
    ]


def test_an_image_column_without_bytes_has_no_content(tmp_path: Path) -> None:
    assert [raw.content for raw in read(write_rows(tmp_path / "a.parquet", [{"image": "path/to/a.png"}]))] == [None]


def test_rows_are_read_from_the_middle_of_large_row_groups(tmp_path: Path) -> None:
    count = 2 * UNIT_PICTURES + 40
    file = write_rows(tmp_path / "a.parquet", [{"image": str(n).encode()} for n in range(count)], row_group_size=count)
    units = list(list_units(settings_for(file)))
    assert [len(unit.members) for unit in units] == [UNIT_PICTURES, UNIT_PICTURES, 40]
    assert [raw.content for unit in units for raw in read_unit(unit)] == [str(n).encode() for n in range(count)]
    chosen = read(file, limit=20)
    assert len(chosen) == 20
    assert all(raw.content == raw.id.rpartition("/")[2].encode() for raw in chosen), "each row is the one it says"


def test_the_bundled_emoji_have_all_that_is_known_about_them() -> None:
    first = next(read_unit(next(list_units(settings_for("emoji")))))
    assert all(
        (first.id, first.content, first.label, first.group, first.style, first.caption, first.license, first.seg)
    )
    assert (
        sum(len(unit.members) for unit in list_units(settings_for("emoji")))
        == pq.ParquetFile(BUNDLED).metadata.num_rows
    )


# ---- units ----


def test_a_unit_holds_pictures_of_one_container_and_row_group_only(tmp_path: Path) -> None:
    write_files(tmp_path, {f"a/{number:04}.png": b"x" for number in range(UNIT_PICTURES + 1)})
    write_tar(tmp_path / "b.tar", {"1.png": b"x"})
    write_rows(tmp_path / "c.parquet", [{"image": b"x"}] * 5, row_group_size=3)
    units = list(list_units(settings_for(tmp_path)))
    assert [(unit.kind, len(unit.members)) for unit in units] == [
        ("folder", UNIT_PICTURES), ("folder", 1), ("tar", 1), ("parquet", 3), ("parquet", 2),
    ]  # fmt: skip
    assert len({unit.digest for unit in units}) == 5
    assert digests(tmp_path) == [unit.digest for unit in units], "listing again gives the same units"


def test_a_unit_changes_with_the_folder_it_lists(tmp_path: Path) -> None:
    source = write_files(tmp_path, {"a.png": b"1", "b.png": b"2"})
    seen = {tuple(digests(source))}
    for change in ({"c.png": b"3"}, {"a.png": b"longer"}):
        write_files(source, change)
        seen.add(tuple(digests(source)))
    (source / "b.png").rename(source / "d.png")
    seen.add(tuple(digests(source)))
    assert len(seen) == 4


def test_a_unit_changes_with_its_container_and_with_the_columns_asked_for(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", {"1.png": b"x"})
    before = digests(shard)
    write_tar(shard, {"1.png": b"x", "2.txt": bytes(10_240)})
    assert digests(shard) != before
    file = write_rows(tmp_path / "a.parquet", [{"image": b"x", "kind": "k"}])
    plain = digests(file)
    assert digests(file, class_column="kind") != plain
    write_rows(file, [{"image": b"x", "kind": "k", "more": list(range(100))}])
    assert digests(file) != plain


# ---- limits ----


def test_a_limit_takes_the_same_pictures_wherever_and_in_whatever_company_they_lie(tmp_path: Path) -> None:
    one = write_files(tmp_path / "one", {f"{number}.png": b"x" for number in range(40)})
    other = write_files(tmp_path / "a/b/other", {f"{number}.png": b"x" for number in range(40)})
    chosen = [raw.id for raw in read(one, limit=10)]
    assert len(chosen) == 10 and chosen == sorted(chosen)
    assert [raw.id for raw in read(other, limit=10)] == chosen
    assert set(chosen) < {raw.id for raw in read(one, limit=11)}, "a larger limit adds to a smaller one"
    assert len(read(one, limit=1000)) == 40


def test_a_limit_keeps_groups_together_as_far_as_it_goes(tmp_path: Path) -> None:
    rows = [{"image": b"x", "group": f"g{number % 10}"} for number in range(50)]
    chosen = read(write_rows(tmp_path / "a.parquet", rows), limit=17, group_column="group")
    sizes = Counter(raw.group for raw in chosen)
    assert sorted(sizes.values()) == [2, 5, 5, 5]


# ---- a listing does not grow with the pixels ----


def peak_of(units: Iterator[Unit]) -> int:
    """Bytes of Python and of Arrow that listing needs at most."""
    before = pa.default_memory_pool().bytes_allocated()
    tracemalloc.start()
    try:
        arrow = [pa.default_memory_pool().bytes_allocated() - before for _ in units]
        return tracemalloc.get_traced_memory()[1] + max(arrow)
    finally:
        tracemalloc.stop()


def test_listing_a_folder_or_a_tar_reads_no_pixels(tmp_path: Path) -> None:
    size = 1 << 30  # files with holes: a gigabyte to read, nothing on the disk
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(size)
    entry = tarfile.TarInfo("large.png")
    entry.size = size
    with (tmp_path / "large.tar").open("wb") as file:
        file.write(entry.tobuf())
        file.truncate(512 + size + 1024)
    for name in ("", "large.tar"):
        assert peak_of(list_units(settings_for(tmp_path / name))) < 1 << 20


def test_listing_a_parquet_file_reads_no_pixels(tmp_path: Path) -> None:
    rows = [{"image": bytes(1 << 20), "group": "g"} for _ in range(16)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", compression="none", use_dictionary=False)
    assert (tmp_path / "a.parquet").stat().st_size > 16 << 20
    for group_column in (None, "group"):
        assert peak_of(list_units(settings_for(tmp_path / "a.parquet", group_column=group_column))) < 1 << 20


def test_units_come_while_the_source_is_still_being_walked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "UNIT_PICTURES", 2)
    write_files(tmp_path, {f"a/{number}.png": b"x" for number in range(5)})
    (tmp_path / "b.tar").write_bytes(b"no tar")
    units = list_units(settings_for(tmp_path))
    assert [len(next(units).members) for _ in range(2)] == [2, 2]
    with pytest.raises(InputError, match=r"b\.tar cannot be read"):
        list(units)


# ---- wrong sources ----


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", r"^data\.source does not exist: .*/absent\nhint: give a folder, \.tar or \.parquet"),
        ("absent.tar", r"^data\.source does not exist: .*/absent\.tar\nhint: check the path$"),
        ("absent.parquet", r"^data\.source does not exist: .*/absent\.parquet\nhint: check the path$"),
        ("empty", r"^no pictures in data\.source: .*/empty\nhint: give a folder with pictures"),
        ("texts", r"^no pictures in data\.source: .*/texts\nhint: "),
        ("texts.tar", r"^no pictures in data\.source: .*/texts\.tar\nhint: "),
        ("single.png", r"^data\.source is a single file: .*/single\.png\nhint: "),
        ("broken.tar", r"/broken\.tar cannot be read: .*\nhint: copy the file again, or leave it out$"),
        ("cut.tar", r"/cut\.tar cannot be read: unexpected end of data\nhint: copy the file again"),
        ("broken.parquet", r"/broken\.parquet cannot be read: .*\nhint: copy the file again"),
        ("cut.parquet", r"/cut\.parquet cannot be read: .*\nhint: copy the file again"),
        (
            "a.parquet",
            r"/a\.parquet has no column data\.image_column=image \(pixels\)\nhint: --set data\.image_column=",
        ),
    ],
)
def test_a_wrong_source_is_named_with_what_to_do(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    write_files(
        tmp_path, {"texts/a.txt": b"x", "single.png": PNG, "broken.tar": b"x" * 2000, "broken.parquet": b"x" * 99}
    )
    write_tar(tmp_path / "texts.tar", {"a.txt": b"x"})
    write_rows(tmp_path / "a.parquet", [{"pixels": b"x"}])
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    whole = write_tar(tmp_path / "whole.tar", {"a.png": bytes(3000), "b.png": bytes(3000)}).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:5000])
    with pytest.raises(InputError, match=message):
        check_source(settings_for(tmp_path / name))
    with pytest.raises(InputError, match=message):
        list(list_units(settings_for(tmp_path / name, limit=5)))


def test_columns_that_the_settings_name_must_be_there(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.parquet", [{"image": b"x", "kind": "k"}])
    for setting in ("class_column", "group_column"):
        with pytest.raises(
            InputError, match=rf"has no column data\.{setting}=sort \(image, kind\)\nhint: --set data\.{setting}="
        ):
            check_source(settings_for(file, **{setting: "sort"}))


def test_a_parquet_file_that_breaks_after_it_was_listed_is_named(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.parquet", [{"image": encoded(noise(number))} for number in range(20)])
    (unit,) = list_units(settings_for(file))
    content = bytearray(file.read_bytes())
    content[4:2000] = b"\xff" * 1996
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.parquet cannot be read: .*\nhint: copy the file again, or leave it out$"):
        list(read_unit(unit))


def test_looking_at_a_source_reads_its_beginning_only(tmp_path: Path) -> None:
    write_files(tmp_path, {f"a/{number:03}.png": b"x" for number in range(UNIT_PICTURES + 1)})
    (tmp_path / "b.tar").write_bytes(io.BytesIO(b"no tar").getvalue())
    check_source(settings_for(tmp_path, limit=5))
