"""Sources of pictures, cut into units of work that any machine can do alone.

folder    every picture below a folder; class = the first sub-folder, when there are any
tar       WebDataset shards: files of one key belong together; .cls, .txt or .json beside a picture
parquet   an image column and optional columns for class, group, style, caption, split, license, label map and id
emoji     the bundled parquet

Listing reads names, tar headers and parquet footers only, one folder or container at a time, and yields units as it
goes. A unit holds at most UNIT_PICTURES pictures of one container, in an order that follows from the source alone, and
its name covers what it refers to: a changed source has other units.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from infra.errors import EnvironmentFailure, InputError
from infra.storage import Store, open_store
from workflows.artifacts import digest_of
from workflows.config import DataSettings
from workflows.data.pictures import EXTENSIONS

BUNDLED = Path(__file__).parent / "bundled" / "emoji64.parquet"
UNIT_PICTURES = 256
_CONTAINERS = (".tar", ".parquet")


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
class Located:
    """Where one picture is."""

    kind: Literal["folder", "tar", "parquet"]
    folder: str
    """URL of the store."""
    name: str
    """The container's name in it; empty for a folder of files."""
    member: tuple[Any, ...]
    """Folder: (file name, bytes). Tar: (key, {extension: [offset, bytes]}). Parquet: (row group, row)."""
    size: int = 0
    """The container's bytes, which tell when it has changed."""
    group: str | None = None
    """What a limit keeps whole, where it is known without reading the picture."""


@dataclass(frozen=True)
class Unit:
    """Pictures of one container (and one row group of it), in order."""

    kind: Literal["folder", "tar", "parquet"]
    folder: str
    name: str
    size: int
    members: tuple[tuple[Any, ...], ...]
    columns: Columns

    @property
    def digest(self) -> str:
        """Of everything the unit refers to."""
        return digest_of([self.kind, self.folder, self.name, self.size, self.members, vars(self.columns)])

    @property
    def content_digest(self) -> str:
        """Of what is there, wherever it lies: names, sizes and places."""
        return digest_of([self.kind, self.name, self.size, self.members])


@dataclass(frozen=True)
class Raw:
    """A picture as the source has it."""

    id: str
    content: bytes | None
    """The file; None when the source has nothing there."""
    label: str = ""
    group: str = ""
    style: str = ""
    caption: str = ""
    split: str = ""
    license: str = ""
    seg: bytes | None = None


def list_units(settings: DataSettings) -> Iterator[Unit]:
    """The source's units, as they are found.

    Raises:
        InputError: there is no such source, or nothing in it that could be a picture.
    """
    columns = _columns(settings)
    located = _locate(settings.source, columns)
    if settings.limit is not None:
        located = iter(_chosen(located, settings.limit))
    empty = True
    for unit in _units(located, columns):
        empty = False
        yield unit
    if empty:
        raise InputError(
            f"no pictures in data.source: {settings.source}\n"
            "hint: give a folder with pictures, .tar shards or .parquet files (or `emoji`, the bundled set)"
        )


def source_digest(contents: Iterable[str]) -> str:
    """Of a source's whole listing, from its units' content digests in order.

    It is another one when a picture is added, taken away, renamed or replaced by a file of another size.
    """
    return digest_of(list(contents))


def has_changed(settings: DataSettings, recorded: str | None) -> bool:
    """Whether a local source is another one than when its listing had this digest.

    A source that is away has not changed (a root may be used where its pictures are not), and one in an object store
    is not asked: to list it can take minutes.
    """
    if recorded is None or (settings.source != "emoji" and not open_store(settings.source).is_local):
        return False
    try:
        return source_digest(unit.content_digest for unit in list_units(settings)) != recorded
    except (InputError, EnvironmentFailure):
        return False


def check_source(settings: DataSettings) -> None:
    """Look at the source's beginning, within seconds and before anything is written.

    Raises:
        InputError: there is no such source, or nothing in it that could be a picture.
    """
    next(list_units(settings.model_copy(update={"limit": None})))  # a limit would walk through all of it


def _columns(settings: DataSettings) -> Columns:
    if settings.source == "emoji":
        return EMOJI
    return Columns(
        settings.image_column, settings.class_column, settings.group_column, "style", "caption", "seg", "split",
        "license", "id",
    )  # fmt: skip


def _locate(source: str, columns: Columns) -> Iterator[Located]:
    """Every picture's place, in a fixed order."""
    if source == "emoji":
        yield from _parquet_rows(Store(str(BUNDLED.parent)), BUNDLED.name, columns)
        return
    store = open_store(source).quick()
    if store.url.endswith(_CONTAINERS) and not (store.is_local and store.path.is_dir()):
        parent, _, base = store.url.rpartition("/")
        yield from _container(Store(parent, "quick"), base, columns)
        return
    if store.is_local and not store.path.is_dir():
        what = "is a single file" if store.path.exists() else "does not exist"
        raise InputError(
            f"data.source {what}: {source}\nhint: give a folder, .tar or .parquet, or `emoji` for the bundled set"
        )
    for name, size in _walked(store, source):
        if _is_hidden(name):
            continue
        if name.endswith(_CONTAINERS):
            yield from _container(store, name, columns)
        elif Path(name).suffix.lower() in EXTENSIONS:
            yield Located("folder", store.url, "", (name, size))


def _is_hidden(name: str) -> bool:
    """Whether a file is one that people do not see, or a Mac's note about another file."""
    return any(part.startswith((".", "__MACOSX")) for part in name.removeprefix("./").split("/"))


def _walked(store: Store, source: str) -> Iterator[tuple[str, int]]:
    try:
        yield from store.walk()
    except FileNotFoundError as error:
        raise InputError(f"data.source does not exist: {source}\nhint: check the path") from error


def _container(store: Store, name: str, columns: Columns) -> Iterator[Located]:
    yield from _tar_members(store, name) if name.endswith(".tar") else _parquet_rows(store, name, columns)


def damaged(store: Store, name: str, error: Exception) -> InputError:
    """The error for a container that cannot be read."""
    reason = " ".join(str(error).split())
    return InputError(f"{store.url}/{name} cannot be read: {reason}\nhint: copy the file again, or leave it out")


def _missing(store: Store, name: str) -> InputError:
    return InputError(f"data.source does not exist: {store.url}/{name}\nhint: check the path")


def _tar_members(store: Store, name: str) -> Iterator[Located]:
    """Pictures of a WebDataset shard with the places of what belongs to them."""
    keyed: dict[str, dict[str, list[int]]] = {}
    try:
        with store.open(name) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if member.isfile() and not _is_hidden(member.name):
                    head, slash, base = member.name.rpartition("/")
                    stem, _, extension = base.partition(".")
                    keyed.setdefault(f"{head}{slash}{stem}", {})[extension.lower()] = [member.offset_data, member.size]
            size = int(file.seek(0, 2))
    except FileNotFoundError as error:
        raise _missing(store, name) from error
    except tarfile.TarError as error:
        raise damaged(store, name, error) from error
    for key, parts in keyed.items():
        if picture_part(parts) is not None:
            yield Located("tar", store.url, name, (key, parts), size)


def picture_part(parts: Iterable[str]) -> str | None:
    """The extension of the picture among the files of a WebDataset key: `png` comes before `mask.png`."""
    pictures = [extension for extension in parts if f".{extension.rpartition('.')[2]}" in EXTENSIONS]
    return min(pictures, key=lambda extension: extension.count("."), default=None)


def _parquet_rows(store: Store, name: str, columns: Columns) -> Iterator[Located]:
    try:
        with store.open(name) as file:
            size = int(file.seek(0, 2))
            parquet = pq.ParquetFile(file)
            check_columns(columns, parquet.schema_arrow.names, f"{store.url}/{name}")
            for number in range(parquet.metadata.num_row_groups):
                groups: list[Any] = [None] * parquet.metadata.row_group(number).num_rows
                if columns.group is not None:
                    groups = parquet.read_row_group(number, columns=[columns.group])[columns.group].to_pylist()
                for row, group in enumerate(groups):
                    key = None if group is None else str(group)
                    yield Located("parquet", store.url, name, (number, row), size, key)
    except FileNotFoundError as error:
        raise _missing(store, name) from error
    except (pa.ArrowException, OSError) as error:
        raise damaged(store, name, error) from error


def check_columns(columns: Columns, present: list[str], where: str) -> None:
    """Raises InputError when a column that the settings name is not there."""
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


def _chosen(located: Iterator[Located], limit: int) -> list[Located]:
    """The `limit` pictures of the smallest hash, groups kept together as far as it goes, in the source's order."""

    def rank(entry: tuple[int, Located]) -> tuple[bytes, bytes, int]:
        position, item = entry
        member = json.dumps([item.name, item.member[0] if item.kind != "parquet" else item.member])
        return _hash(item.group if item.group is not None else member), _hash(member), position

    return [item for _, item in sorted(heapq.nsmallest(limit, enumerate(located), key=rank), key=lambda pair: pair[0])]


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _units(located: Iterator[Located], columns: Columns) -> Iterator[Unit]:
    """Consecutive pictures of one container and row group, at most UNIT_PICTURES together."""
    members: list[Located] = []

    def unit() -> Unit:
        first = members[0]
        return Unit(first.kind, first.folder, first.name, first.size, tuple(item.member for item in members), columns)

    def belongs(item: Located) -> bool:
        last = members[-1]
        same_container = (item.kind, item.folder, item.name) == (last.kind, last.folder, last.name)
        return same_container and (item.kind != "parquet" or item.member[0] == last.member[0])

    for item in located:
        if members and (len(members) >= UNIT_PICTURES or not belongs(item)):
            yield unit()
            members = []
        members.append(item)
    if members:
        yield unit()
