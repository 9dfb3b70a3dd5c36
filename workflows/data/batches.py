"""Training's view of the data: which image comes when, and tables that hand out batches.

The order is a pure function of (size, seed, position), so a run goes on from nothing but a number, with any number of
workers. Each epoch is a permutation by a Feistel network with cycle walking (Black and Rogaway, CT-RSA 2002), so no
list of the data set's size is ever kept.

Tables read shards once a machine: decoded arrays lie in a cache ($HVQD_CACHE, else ~/.cache/hvqd) under the digest of
the shards they came from, and are mapped into memory.

Axes: N rows, H x W pixels, L levels of h x w codes.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from hvqd_model.prior.conditions import Conditions
from hvqd_model.randomness import derive_key
from infra.errors import EnvironmentFailure, InputError
from infra.storage import Store
from workflows.artifacts import MANIFEST, Manifest
from workflows.data.columns import ConditionColumns
from workflows.data.latents import read_latents

Array = np.ndarray[Any, Any]

_ROUNDS = 4


# ---- the order ----


def permuted(positions: Array, size: int, key: int) -> Array:
    """(n,) int64 places of (n,) positions in [0, size) under a keyed permutation of that range."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    rounds = [np.uint64(derive_key("round", key, index) & (2**64 - 1)) for index in range(_ROUNDS)]

    def encrypt(values: Array) -> Array:
        left, right = values >> np.uint64(half), values & mask
        for round_key in rounds:
            mixed = right + round_key
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & mask)
        return (left << np.uint64(half)) | right

    with np.errstate(over="ignore"):
        places = encrypt(positions.astype(np.uint64))
        outside = places >= size
        while outside.any():  # walk the cycle until it comes back into the range: below 4 steps on average
            places[outside] = encrypt(places[outside])
            outside = places >= size
    return places.astype(np.int64)


def epoch_order(size: int, seed: int, epoch: int) -> Array:
    """(size,) int64 permutation: the order of one epoch."""
    return permuted(np.arange(size), size, derive_key("epoch", seed, epoch))


def batch_indices(size: int, seed: int, images_seen: int, count: int) -> Array:
    """(count,) int64 rows of the next images after `images_seen`; the stream crosses from epoch to epoch.

    Raises:
        ValueError: the table is empty.
    """
    if size < 1:
        raise ValueError("there are no images to train on\nhint: lower data.validation_share and data.test_share")
    stream = np.arange(images_seen, images_seen + count, dtype=np.int64)
    rows = np.empty(count, dtype=np.int64)
    for epoch in np.unique(stream // size):
        here = stream // size == epoch
        rows[here] = permuted(stream[here] % size, size, derive_key("epoch", seed, int(epoch)))
    return rows


# ---- the tables ----


def shard_names(manifest: Manifest, split: str) -> list[str]:
    """The parquet files of a split, in order."""
    return sorted(name for name in manifest.files if name.startswith(f"{split}-") and name.endswith(".parquet"))


def read_shards(store: Store, manifest: Manifest, names: list[str]) -> Iterator[pa.Table]:
    """The shards' contents one after the other, each checked against its digest.

    Raises:
        InputError: a shard is missing or damaged (named).
    """
    for name in names:
        rebuild = f"hint: delete {store.url}/{MANIFEST} and run the same command again to rebuild the {manifest.kind}"
        try:
            content = store.read_bytes(name)
        except FileNotFoundError as error:
            raise InputError(f"the shard {store.url}/{name} is missing\n{rebuild}") from error
        if hashlib.sha256(content).hexdigest() != manifest.files[name].sha256:
            raise InputError(f"the shard {store.url}/{name} is damaged: its digest has changed\n{rebuild}")
        try:
            yield pq.read_table(io.BytesIO(content))
        except pa.ArrowException as error:
            raise InputError(f"the shard {store.url}/{name} cannot be read: {error}\n{rebuild}") from error


def cache_folder() -> Path:
    """Where decoded shards are kept on this machine."""
    return Path(os.environ.get("HVQD_CACHE") or Path.home() / ".cache" / "hvqd")


def cached_entry(key: str, make: Callable[[Path], None]) -> Path:
    """The folder of a cache entry, made now if there is none; of several processes that ask at once, one makes it."""
    target = cache_folder() / key
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with (target.parent / f".{key}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # let go when the process ends, however it ends
            if not target.is_dir():
                _make_entry(target, make)
    except OSError as error:
        raise EnvironmentFailure(
            f"cannot write the cache at {target.parent}: {error}\nhint: free some space, or name a folder in HVQD_CACHE"
        ) from error
    return target


def _make_entry(target: Path, make: Callable[[Path], None]) -> None:
    """Whole or absent: made beside its place and renamed."""
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name[:12]}-"))
    try:
        make(scratch)
        scratch.rename(target)
    except OSError:
        if not target.is_dir():  # a machine that shares the folder without sharing locks may have been first
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _cache_key(manifest: Manifest, names: list[str], variant: str) -> str:
    lines = [manifest.kind, *(manifest.files[name].sha256 for name in names), *([variant] if variant else [])]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def to_input(pixels: Array) -> Tensor:
    """(n, 3, H, W) float32 in [-1, 1] from (n, H, W, 3) uint8."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


@dataclass(frozen=True)
class ImageTable:
    """One split of a dataset."""

    ids: Array
    """(N,) strings."""
    labels: Array
    """(N,) int64, -1 for no class."""
    styles: Array
    """(N,) strings."""
    groups: Array
    """(N,) strings: what splits keep together and intervals resample."""
    captions: Array
    """(N,) strings."""
    images: Array
    """(N, H, W, 3) uint8, mapped from the cache."""

    @classmethod
    def open(cls, store: Store, manifest: Manifest, split: str) -> ImageTable:
        """The table of a split; empty when the split has no rows.

        Raises:
            InputError: a shard is missing or damaged (named).
        """
        height, width = manifest.facts["image_size"]

        def fill(arrays: Sequence[Array], table: pa.Table, first: int) -> None:
            for row, encoded in enumerate(table["image"], first):
                arrays[0][row] = np.asarray(Image.open(io.BytesIO(encoded.as_py())).convert("RGB"))

        rows, (images,) = decoded_split(
            store, manifest, split, [((height, width, 3), np.dtype(np.uint8))], fill, with_captions=True
        )
        return cls(
            ids=_strings(rows["id"]),
            labels=rows["label"].to_numpy(),
            styles=_strings(rows["style"]),
            groups=_strings(rows["group"]),
            captions=_strings(rows["caption"]),
            images=images,
        )

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, indices: Array | slice) -> Tensor:
        """(n, 3, H, W) float32 pictures in [-1, 1]."""
        return to_input(self.images[indices])


@dataclass(frozen=True)
class CodeTable:
    """One split of an encoded dataset."""

    ids: Array
    """(N,) strings."""
    labels: Array
    """(N,) int64, -1 for no class."""
    styles: Array
    """(N,) strings."""
    groups: Array
    """(N,) strings."""
    codes: tuple[Array, ...]
    """(N, h, w) int32 of each level, coarse first, mapped from the cache."""
    more: ConditionColumns | None = None
    """What the rows are beside their class, for a prior that is told so."""
    latents: tuple[Array, ...] = ()
    """(N, h, w, C) float16 of each level, mapped from the cache; empty unless they were asked for."""

    @classmethod
    def open(cls, store: Store, manifest: Manifest, split: str, *, with_latents: bool = False) -> CodeTable:
        """The table of a split; empty when the split has no rows.

        Args:
            with_latents: whether the latents behind the codes are wanted too; they must be there.

        Raises:
            InputError: a shard is missing or damaged (named).
        """
        grids = [tuple(int(side) for side in grid) for grid in manifest.facts["grids"]]

        def fill(arrays: Sequence[Array], table: pa.Table, first: int) -> None:
            for level, grid in enumerate(grids):
                flat = pc.list_flatten(table[f"codes_{level}"]).to_numpy()
                arrays[level][first : first + table.num_rows] = flat.reshape(-1, *grid)
            for level, shape in enumerate(latent_shapes):
                arrays[len(grids) + level][first : first + table.num_rows] = read_latents(table, level, shape)

        latent_shapes: list[tuple[int, ...]] = []
        if with_latents:
            latent_shapes = [(*grid, int(dim)) for grid, dim in zip(grids, manifest.facts["code_dim"], strict=True)]
        rows, arrays = decoded_split(
            store,
            manifest,
            split,
            [
                *((grid, np.dtype(np.int32)) for grid in grids),
                *((shape, np.dtype(np.float16)) for shape in latent_shapes),
            ],
            fill,
            with_captions=False,
            variant="latents" if with_latents else "",
        )
        return cls(
            ids=_strings(rows["id"]),
            labels=rows["label"].to_numpy(),
            styles=_strings(rows["style"]),
            groups=_strings(rows["group"]),
            codes=tuple(arrays[: len(grids)]),
            latents=tuple(arrays[len(grids) :]),
        )

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, indices: Array) -> tuple[Tensor, ...]:
        """(n, h, w) int64 codes of each level."""
        return tuple(torch.from_numpy(level[indices].astype(np.int64)) for level in self.codes)

    def latent_batch(self, indices: Array) -> tuple[Tensor, ...]:
        """(n, h, w, C) float32 latents of each level."""
        return tuple(torch.from_numpy(level[indices].astype(np.float32)) for level in self.latents)

    def conditions(self, indices: Array) -> Tensor | Conditions:
        """(n,) int64 classes, or all conditions of the rows."""
        labels = torch.as_tensor(self.labels[indices], dtype=torch.int64)
        return labels if self.more is None else self.more.batch(labels, indices)


def decoded_split(
    store: Store,
    manifest: Manifest,
    split: str,
    shapes: list[tuple[tuple[int, ...], np.dtype[Any]]],
    fill: Callable[[Sequence[Array], pa.Table, int], None],
    *,
    with_captions: bool,
    variant: str = "",
) -> tuple[pa.Table, list[Array]]:
    """A split's describing columns and its arrays (N, *shape), from the cache or decoded into it now.

    Args:
        shapes: shape of a row, and type, of each array.
        fill: writes a shard's rows into the arrays from a row on.
        variant: tells entries apart that hold other arrays of the same shards.
    """
    names = shard_names(manifest, split)
    count = int(manifest.facts["rows"].get(split, 0)) if names else 0
    described = pa.schema([("id", pa.string()), ("label", pa.int64()), ("style", pa.string()), ("group", pa.string())])
    if with_captions:
        described = described.append(pa.field("caption", pa.string()))
    if count == 0:
        return described.empty_table(), [np.zeros((0, *shape), dtype=dtype) for shape, dtype in shapes]

    def make(folder: Path) -> None:
        arrays = [
            np.lib.format.open_memmap(folder / f"array-{number}.npy", mode="w+", dtype=dtype, shape=(count, *shape))
            for number, (shape, dtype) in enumerate(shapes)
        ]
        first = 0
        with pq.ParquetWriter(folder / "rows.parquet", described) as writer:
            for table in read_shards(store, manifest, names):
                fill(arrays, table, first)
                writer.write_table(table.select(described.names).cast(described))
                first += table.num_rows
        for array in arrays:
            array.flush()

    folder = cached_entry(_cache_key(manifest, names, variant), make)
    try:
        rows = pq.read_table(folder / "rows.parquet")
        arrays = [np.load(folder / f"array-{number}.npy", mmap_mode="r") for number in range(len(shapes))]
    except (OSError, ValueError, pa.ArrowException) as error:
        raise EnvironmentFailure(
            f"the cache entry {folder} is damaged: {error}\nhint: delete it and run the same command again"
        ) from error
    return rows, arrays


def _strings(column: pa.ChunkedArray) -> Array:
    return np.array(column.to_pylist(), dtype=np.str_)
