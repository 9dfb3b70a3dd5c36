"""Reading the pictures of a unit, with what the source says about them.

folder    label = the first folder of the file's name
tar       .cls is the class, .txt the caption; .json may hold class (or label), group, style, caption, split, license
parquet   the columns; an image is bytes, or a struct with `bytes` as the datasets library writes it
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra.storage import Store
from workflows.data.sources import UNIT_PICTURES, Raw, Unit, check_columns, damaged, picture_part


def read_unit(unit: Unit) -> Iterator[Raw]:
    """The unit's pictures as the source has them, in order.

    Raises:
        InputError: the container cannot be read, or lacks a column.
    """
    store = Store(unit.folder)
    match unit.kind:
        case "folder":
            for name, _ in unit.members:
                head, slash, _ = name.partition("/")
                yield Raw(name, _content(store, name), label=head if slash else "")
        case "tar":
            yield from _read_tar(store, unit)
        case "parquet":
            yield from _read_parquet(store, unit)


def _content(store: Store, name: str) -> bytes | None:
    try:
        return store.read_bytes(name)
    except OSError:  # a broken link, or a file that went away since it was listed
        return None


def _read_tar(store: Store, unit: Unit) -> Iterator[Raw]:
    with store.open(unit.name) as file:
        for key, parts in unit.members:

            def part(extension: str, parts: dict[str, list[int]] = parts) -> bytes:
                offset, size = parts[extension]
                file.seek(offset)
                return bytes(file.read(size))

            def line(extension: str, parts: dict[str, list[int]] = parts) -> str:
                return part(extension, parts).decode("utf-8", "replace").strip() if extension in parts else ""

            described = _described(line("json"))
            picture = picture_part(parts)
            assert picture is not None
            yield Raw(
                id=f"{unit.name}/{key}",
                content=part(picture),
                label=line("cls") or described.get("class", "") or described.get("label", ""),
                group=described.get("group", ""),
                style=described.get("style", ""),
                caption=line("txt") or described.get("caption", ""),
                split=described.get("split", ""),
                license=described.get("license", ""),
            )


def _described(text: str) -> dict[str, str]:
    """The values of a .json as text; nothing when it is not a JSON object."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    items = value.items() if isinstance(value, dict) else ()
    return {str(name): str(field) for name, field in items if isinstance(field, (str, int, float))}


def _read_parquet(store: Store, unit: Unit) -> Iterator[Raw]:
    group, wanted = unit.members[0][0], [row for _, row in unit.members]
    try:
        with store.open(unit.name) as file:
            parquet = pq.ParquetFile(file)
            present = parquet.schema_arrow.names
            check_columns(unit.columns, present, f"{store.url}/{unit.name}")
            names = sorted({name for name in vars(unit.columns).values() if name in present})
            at = 0
            # A row group may be far larger than a unit: only the batches that the unit needs are kept.
            for batch in parquet.iter_batches(UNIT_PICTURES, row_groups=[group], columns=names):
                rows = [row - at for row in wanted if at <= row < at + batch.num_rows]
                for row in rows:
                    yield _parquet_row(unit, batch, row, f"{unit.name}/{group}/{at + row}")
                at += batch.num_rows
                if at > wanted[-1]:
                    return
    except (pa.ArrowException, OSError) as error:  # Arrow reports a damaged page as an OSError
        raise damaged(store, unit.name, error) from error


def _parquet_row(unit: Unit, batch: pa.RecordBatch, row: int, place: str) -> Raw:
    def value(column: str | None) -> Any:
        return batch[column][row].as_py() if column in batch.schema.names else None

    def text(column: str | None) -> str:
        found = value(column)
        return "" if found is None else str(found)

    def encoded(column: str | None) -> bytes | None:
        found = value(column)
        found = found.get("bytes") if isinstance(found, dict) else found
        return found if isinstance(found, bytes) else None

    columns = unit.columns
    return Raw(
        id=text(columns.id) or place,
        content=encoded(columns.image),
        label=text(columns.label),
        group=text(columns.group),
        style=text(columns.style),
        caption=text(columns.caption),
        split=text(columns.split),
        license=text(columns.license),
        seg=encoded(columns.seg),
    )
