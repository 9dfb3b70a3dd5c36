"""Sources of pictures, cut into units of work that any machine can do alone.

folder    every picture below a folder; class = the first sub-folder, when there are any
tar       WebDataset shards: members of one key belong together; .cls or .txt or .json beside a picture
parquet   an image column and optional columns for class, group, style, caption, split, license and label map
emoji     the bundled parquet

Listing reads names, tar headers and parquet footers only. A unit holds at most a few hundred pictures of one container,
in a fixed order, so that units do not depend on who works on them.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from infra.errors import InputError
from infra.storage import Store, open_store
from workflows.config import DataSettings
from workflows.data.pictures import EXTENSIONS

BUNDLED = Path(__file__).parent / "bundled" / "emoji64.parquet"
UNIT_PICTURES = 256


@dataclass(frozen=True)
class Columns:
    """Names of a parquet source's columns; those that are absent are None."""

    image: str
    label: str | None = None
    group: str | None = None
    style: str | None = None
    caption: str | None = None
    seg: str | None = None
    split: str | None = None
    license: str | None = None
    id: str | None = None


EMOJI = Columns("image", "group", "concept", "vendor", "caption", "seg", "split", "license", "id")


@dataclass(frozen=True)
class Unit:
    """Pictures of one container, in order."""

    kind: Literal["folder", "tar", "parquet"]
    folder: str
    """URL of the store."""
    name: str
    """The container's name in it; empty for a folder of files."""
    members: tuple[Any, ...]
    """Folder: file names. Tar: [key, {extension: [offset, bytes]}]. Parquet: [row group, row]."""
    columns: Columns | None = None


@dataclass(frozen=True)
class Raw:
    """A picture as the source has it."""

    id: str
    content: bytes
    label: str = ""
    group: str = ""
    style: str = ""
    caption: str = ""
    split: str = ""
    license: str = ""
    seg: bytes | None = None


def list_units(settings: DataSettings) -> list[Unit]:
    """The source's units.

    Raises:
        InputError: there is no such source, or nothing in it that could be a picture.
    """
    located = _locate(settings.source)
    if settings.limit is not None:
        located = iter(_chosen(located, settings.limit))
    units = list(_units(located, _columns(settings)))
    if not units:
        raise InputError(
            f"no pictures in data.source: {settings.source}\n"
            "hint: give a folder with pictures, .tar shards or .parquet files (or `emoji`, the bundled set)"
        )
    return units


Located = tuple[Literal["folder", "tar", "parquet"], str, str, Any]
"""Kind, store URL, container, member."""


def _locate(source: str) -> Iterator[Located]:
    """Every picture's place, in a fixed order."""
    if source == "emoji":
        yield from _parquet_rows(Store(str(BUNDLED.parent)), BUNDLED.name)
        return
    store = open_store(source).quick()
    parent, _, base = store.url.rpartition("/")
    if _is_container(base):
        yield from _container(Store(parent, "quick"), base)
        return
    if store.is_local and not store.path.is_dir():
        what = "is a single file" if store.path.exists() else "does not exist"
        raise InputError(
            f"data.source {what}: {source}\nhint: give a folder, .tar or .parquet, or `emoji` for the bundled set"
        )
    names = list(store.files())
    containers = [name for name in names if _is_container(name)]
    if containers:
        for name in containers:
            yield from _container(store, name)
        return
    for name in names:
        if Path(name).suffix.lower() in EXTENSIONS and not any(part.startswith(".") for part in name.split("/")):
            yield "folder", store.url, "", name


def _is_container(name: str) -> bool:
    return name.endswith((".tar", ".parquet"))


def _container(store: Store, name: str) -> Iterator[Located]:
    yield from _tar_members(store, name) if name.endswith(".tar") else _parquet_rows(store, name)


def _damaged(store: Store, name: str, error: Exception) -> InputError:
    reason = " ".join(str(error).split())
    return InputError(f"{store.url}/{name} cannot be read: {reason}\nhint: copy the file again, or leave it out")


def _tar_members(store: Store, name: str) -> Iterator[Located]:
    """Pictures of a WebDataset shard with the places of what belongs to them."""
    groups: dict[str, dict[str, list[int]]] = {}
    try:
        with store.open(name) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if member.isfile():
                    head, _, base = member.name.rpartition("/")
                    stem, _, extension = base.partition(".")
                    key = f"{head}/{stem}" if head else stem
                    groups.setdefault(key, {})[extension.lower()] = [member.offset_data, member.size]
    except FileNotFoundError as error:
        raise InputError(f"data.source does not exist: {store.url}/{name}\nhint: check the path") from error
    except tarfile.TarError as error:
        raise _damaged(store, name, error) from error
    for key, parts in groups.items():
        if _picture_part(parts) is not None:
            yield "tar", store.url, name, [key, parts]


def _picture_part(parts: Iterable[str]) -> str | None:
    return next((extension for extension in parts if f".{extension.rpartition('.')[2]}" in EXTENSIONS), None)


def _parquet_rows(store: Store, name: str) -> Iterator[Located]:
    try:
        with store.open(name) as file:
            metadata = pq.ParquetFile(file).metadata
    except FileNotFoundError as error:
        raise InputError(f"data.source does not exist: {store.url}/{name}\nhint: check the path") from error
    except (pa.ArrowException, OSError) as error:
        raise _damaged(store, name, error) from error
    for group in range(metadata.num_row_groups):
        for row in range(metadata.row_group(group).num_rows):
            yield "parquet", store.url, name, [group, row]


def _chosen(located: Iterator[Located], limit: int) -> list[Located]:
    """The `limit` pictures of the smallest hash, in the source's order."""
    ranked = [
        (
            hashlib.blake2b(json.dumps([name, member]).encode(), digest_size=8).digest(),
            position,
            (kind, url, name, member),
        )
        for position, (kind, url, name, member) in enumerate(located)
    ]
    return [item for _, _, item in sorted(sorted(ranked)[:limit], key=lambda entry: entry[1])]


def _columns(settings: DataSettings) -> Columns:
    if settings.source == "emoji":
        return EMOJI
    return Columns(
        settings.image_column, settings.class_column, settings.group_column, "style", "caption", "seg", "split",
        "license", "id",
    )  # fmt: skip


def _units(located: Iterator[Located], columns: Columns) -> Iterator[Unit]:
    """Consecutive pictures of one container and row group, at most UNIT_PICTURES together."""
    key: tuple[Any, ...] | None = None
    members: list[Any] = []

    def unit() -> Unit:
        assert key is not None
        return Unit(key[0], key[1], key[2], tuple(members), columns if key[0] == "parquet" else None)

    for kind, url, name, member in located:
        found = (kind, url, name, member[0] if kind == "parquet" else None)
        if members and (found != key or len(members) >= UNIT_PICTURES):
            yield unit()
            members = []
        key = found
        members.append(member)
    if members:
        yield unit()


# ---- reading ----


def read_unit(unit: Unit) -> Iterator[Raw]:
    """The unit's pictures as the source has them, in order.

    Raises:
        InputError: the container cannot be read, or lacks a column.
    """
    store = Store(unit.folder)
    match unit.kind:
        case "folder":
            for name in unit.members:
                head, slash, _ = name.partition("/")
                yield Raw(name, store.read_bytes(name), label=head if slash else "")
        case "tar":
            yield from _read_tar(store, unit)
        case "parquet":
            yield from _read_parquet(store, unit)


def _read_tar(store: Store, unit: Unit) -> Iterator[Raw]:
    with store.open(unit.name) as file:
        for key, parts in unit.members:

            def part(extension: str, parts: dict[str, list[int]] = parts) -> bytes:
                offset, size = parts[extension]
                file.seek(offset)
                return bytes(file.read(size))

            picture = _picture_part(parts)
            assert picture is not None
            described: dict[str, Any] = {}
            if "json" in parts:
                try:
                    loaded = json.loads(part("json"))
                    described = loaded if isinstance(loaded, dict) else {}
                except ValueError:
                    described = {}
            text = part("txt").decode("utf-8", "replace").strip() if "txt" in parts else ""
            label = part("cls").decode("utf-8", "replace").strip() if "cls" in parts else ""
            yield Raw(
                id=f"{unit.name}/{key}",
                content=part(picture),
                label=label or str(described.get("class") or described.get("label") or ""),
                group=str(described.get("group") or ""),
                style=str(described.get("style") or ""),
                caption=text or str(described.get("caption") or ""),
                split=str(described.get("split") or ""),
                license=str(described.get("license") or ""),
            )


def _read_parquet(store: Store, unit: Unit) -> Iterator[Raw]:
    assert unit.columns is not None
    columns = unit.columns
    try:
        with store.open(unit.name) as file:
            parquet = pq.ParquetFile(file)
            present = parquet.schema_arrow.names
            _check_columns(columns, present, f"{store.url}/{unit.name}")
            wanted = [name for name in vars(columns).values() if name in present]
            table = parquet.read_row_group(unit.members[0][0], columns=sorted(set(wanted)))
    except pa.ArrowException as error:
        raise _damaged(store, unit.name, error) from error
    for group, row in unit.members:

        def value(column: str | None, row: int = row) -> Any:
            return table[column][row].as_py() if column in table.column_names else None

        def text(column: str | None, row: int = row) -> str:
            found = value(column, row)
            return "" if found is None else str(found)

        content = value(columns.image)
        if isinstance(content, dict):  # the datasets library stores {"bytes": …, "path": …}
            content = content.get("bytes")
        seg = value(columns.seg)
        yield Raw(
            id=text(columns.id) or f"{unit.name}/{group}/{row}",
            content=content if isinstance(content, bytes) else b"",
            label=text(columns.label),
            group=text(columns.group),
            style=text(columns.style),
            caption=text(columns.caption),
            split=text(columns.split),
            license=text(columns.license),
            seg=seg if isinstance(seg, bytes) else None,
        )


def _check_columns(columns: Columns, present: list[str], where: str) -> None:
    for setting, column in (
        ("image_column", columns.image),
        ("class_column", columns.label),
        ("group_column", columns.group),
    ):
        if column is not None and column not in present:
            raise InputError(
                f"{where} has no column data.{setting}={column} ({', '.join(present)})\n"
                f"hint: --set data.{setting}=NAME names another one"
            )
