"""The order of training and its tables: each picture once an epoch, whatever the workers; shards checked, read once."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import EnvironmentFailure, InputError
from infra.storage import Store
from tests.pictures import encoded, noise
from workflows.artifacts import Manifest, write_manifest
from workflows.data.batches import (
    CodeTable,
    ImageTable,
    batch_indices,
    cache_folder,
    epoch_order,
    permuted,
    read_shards,
    shard_names,
    to_input,
)

SEEDS = st.integers(-(2**63), 2**63 - 1)

# ---- the order ----


@given(size=st.integers(1, 700), seed=SEEDS, epoch=st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_the_order_of_an_epoch_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    assert sorted(epoch_order(size, seed, epoch).tolist()) == list(range(size))


def test_the_order_of_an_epoch_is_a_permutation_at_every_small_and_power_of_two_size() -> None:
    sizes = [*range(70), *(2**power + step for power in range(7, 15) for step in (-1, 0, 1))]
    assert len(sizes) == 94
    for size in sizes:
        assert (np.sort(epoch_order(size, 5, 6)) == np.arange(size)).all()


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100
    assert (epoch_order(50, 1, 2) == epoch_order(50, 1, 2)).all()


def test_every_picture_is_as_likely_at_every_place() -> None:
    size, epochs = 16, 2_000
    orders = np.array([epoch_order(size, 0, epoch) for epoch in range(epochs)])
    counts = np.array([np.bincount(orders[:, place], minlength=size) for place in range(size)])
    expected = epochs / size
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    degrees = (size - 1) ** 2  # rows and columns both sum to `epochs`
    assert abs(chi_squared - degrees) < 5 * np.sqrt(2 * degrees)


def test_a_place_in_a_large_set_is_found_without_the_others() -> None:
    size, some = 10**12 + 7, np.array([0, 1, 10**12 + 6])
    places = permuted(some, size, key=3)
    assert ((places >= 0) & (places < size)).all() and len(set(places.tolist())) == 3
    np.testing.assert_array_equal(permuted(some[1:2], size, key=3), places[1:2])


@given(
    size=st.integers(1, 40),
    seed=SEEDS,
    workers=st.sampled_from([1, 2, 3, 4]),
    micro_batch=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    stops=st.lists(st.integers(1, 3), max_size=2),
)
@settings(max_examples=40, deadline=None)
def test_any_workers_batches_and_resumes_give_each_picture_once_an_epoch_in_one_order(
    size: int, seed: int, workers: int, micro_batch: int, accumulation: int, stops: list[int]
) -> None:
    global_batch = micro_batch * workers * accumulation
    seen, stream = 0, []
    for steps in [*stops, 2]:  # a resume knows nothing but how many images were seen
        for first in range(seen, seen + steps * global_batch, global_batch):
            parts = {
                offset: batch_indices(size, seed, first + offset, micro_batch)
                for rank in range(workers)
                for micro in range(accumulation)
                for offset in [(micro * workers + rank) * micro_batch]
            }
            stream += [int(row) for offset in sorted(parts) for row in parts[offset]]
        seen += steps * global_batch
    assert stream == batch_indices(size, seed, 0, seen).tolist(), "the same order, without a gap"
    for epoch in range(seen // size):
        here = stream[epoch * size : (epoch + 1) * size]
        assert here == epoch_order(size, seed, epoch).tolist()
        assert sorted(here) == list(range(size)), "each picture once"


def test_an_empty_table_gives_no_batches() -> None:
    with pytest.raises(ValueError, match=r"^there are no images to train on\nhint: lower data\.validation_share"):
        batch_indices(0, 0, 0, 4)


# ---- the tables ----


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that is empty at first."""
    monkeypatch.setenv("HVQD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def parquet(rows: list[dict[str, Any]]) -> bytes:
    """A parquet file's bytes."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def picture_row(number: int) -> dict[str, Any]:
    """One picture of a shard, of 6 x 4 pixels."""
    image = encoded(noise(number, 6, 4))
    label = number % 3 - 1
    return {"id": f"p{number}", "label": label, "style": "s", "caption": "c", "group": f"g{number}", "image": image}


def dataset(folder: Path, shards: dict[str, list[int]]) -> tuple[Store, Manifest]:
    """A dataset of pictures by their numbers."""
    store = Store(str(folder / "dataset"))
    for name, numbers in shards.items():
        store.write_bytes(name, parquet([picture_row(number) for number in numbers]))
    rows = {"train": sum(len(numbers) for name, numbers in shards.items() if name.startswith("train-")), "val": 0}
    return store, write_manifest(store, "dataset", "request", {}, {"rows": rows, "image_size": [4, 6]})


SHARDS = {"train-00000.parquet": [0, 1, 2], "train-00001.parquet": [3, 4]}


def test_a_table_holds_the_shards_rows_in_order(tmp_path: Path) -> None:
    table = ImageTable.open(*dataset(tmp_path, SHARDS), "train")
    assert len(table) == 5
    assert table.ids.tolist() == [f"p{number}" for number in range(5)]
    assert table.groups.tolist() == [f"g{number}" for number in range(5)]
    assert table.labels.tolist() == [-1, 0, 1, -1, 0]
    assert (set(table.styles.tolist()), set(table.captions.tolist())) == ({"s"}, {"c"})
    for number in range(5):
        np.testing.assert_array_equal(table.images[number], np.asarray(noise(number, 6, 4)))


def test_a_batch_is_in_minus_one_to_one_channels_first(tmp_path: Path) -> None:
    table = ImageTable.open(*dataset(tmp_path, SHARDS), "train")
    batch = table.batch(np.array([3, 0]))
    assert batch.shape == (2, 3, 4, 6) and batch.dtype == torch.float32
    expected = torch.from_numpy(np.asarray(noise(3, 6, 4)).astype(np.float32) / 127.5 - 1).permute(2, 0, 1)
    torch.testing.assert_close(batch[0], expected)
    ends = to_input(np.array([[[[0, 255, 0]]]], dtype=np.uint8))
    assert ends.flatten().tolist() == [-1.0, 1.0, -1.0]


def test_a_split_without_rows_is_an_empty_table(tmp_path: Path) -> None:
    store, manifest = dataset(tmp_path, SHARDS)
    for split in ("val", "test"):
        table = ImageTable.open(store, manifest, split)
        assert (len(table), table.images.shape, table.labels.dtype) == (0, (0, 4, 6, 3), np.int64)


def test_the_names_of_a_splits_shards_are_sorted_and_its_own(tmp_path: Path) -> None:
    _, manifest = dataset(tmp_path, {"train-00001.parquet": [1], "train-00000.parquet": [0], "test-00000.parquet": [2]})
    assert shard_names(manifest, "train") == ["train-00000.parquet", "train-00001.parquet"]
    assert shard_names(manifest, "val") == []


def test_codes_of_each_level_come_back_in_their_grids(tmp_path: Path) -> None:
    store, grids = Store(str(tmp_path / "codes")), [(1, 2), (2, 4)]
    codes = [np.arange(5 * h * w, dtype=np.int32).reshape(5, h, w) for h, w in grids]
    for shard, numbers in enumerate(([0, 1, 2], [3, 4])):
        rows = [
            {"id": f"p{n}", "label": n, "style": "", "group": "g"}
            | {f"codes_{level}": array[n].ravel().tolist() for level, array in enumerate(codes)}
            for n in numbers
        ]
        store.write_bytes(f"train-{shard:05d}.parquet", parquet(rows))
    manifest = write_manifest(store, "codes", "request", {}, {"rows": {"train": 5}, "grids": [list(g) for g in grids]})
    table = CodeTable.open(store, manifest, "train")
    assert table.labels.tolist() == list(range(5))
    for level, array in enumerate(codes):
        np.testing.assert_array_equal(table.codes[level], array)
        found = table.batch(np.array([4, 1]))[level]
        assert found.dtype == torch.int64
        np.testing.assert_array_equal(found.numpy(), array[[4, 1]])
    assert [array.shape for array in CodeTable.open(store, manifest, "val").codes] == [(0, 1, 2), (0, 2, 4)]


# ---- the cache ----


def test_shards_are_read_once_and_another_dataset_has_an_entry_of_its_own(tmp_path: Path, own_cache: Path) -> None:
    store, manifest = dataset(tmp_path, SHARDS)
    first = ImageTable.open(store, manifest, "train")
    for name in SHARDS:
        store.delete(name)  # whoever reads them again fails
    np.testing.assert_array_equal(ImageTable.open(store, manifest, "train").images, first.images)
    other = ImageTable.open(*dataset(tmp_path, {"train-00000.parquet": [7]}), "train")
    assert other.ids.tolist() == ["p7"]
    entries = [path for path in own_cache.iterdir() if path.is_dir()]
    assert len(entries) == 2, "nothing half-made is left beside the entries"


def test_of_several_that_ask_at_once_one_reads_the_shards(tmp_path: Path, own_cache: Path) -> None:
    store, manifest = dataset(tmp_path, SHARDS)
    with ThreadPoolExecutor(4) as pool:
        tables = list(pool.map(lambda _: ImageTable.open(store, manifest, "train"), range(4)))
    assert [table.ids.tolist() for table in tables] == [[f"p{number}" for number in range(5)]] * 4
    assert len([path for path in own_cache.iterdir() if path.is_dir()]) == 1


def test_a_damaged_shard_leaves_no_entry_in_the_cache(tmp_path: Path, own_cache: Path) -> None:
    store, manifest = dataset(tmp_path, SHARDS)
    good = store.read_bytes("train-00001.parquet")
    store.write_bytes("train-00001.parquet", good[:-1] + b"x")
    with pytest.raises(InputError, match=r"train-00001\.parquet is damaged"):
        ImageTable.open(store, manifest, "train")
    assert [path for path in own_cache.iterdir() if path.is_dir()] == []
    store.write_bytes("train-00001.parquet", good)
    assert len(ImageTable.open(store, manifest, "train")) == 5


def test_a_damaged_entry_of_the_cache_is_named(tmp_path: Path, own_cache: Path) -> None:
    store, manifest = dataset(tmp_path, SHARDS)
    ImageTable.open(store, manifest, "train")
    (entry,) = [path for path in own_cache.iterdir() if path.is_dir()]
    (entry / "array-0.npy").write_bytes(b"x")
    with pytest.raises(EnvironmentFailure, match=rf"^the cache entry {entry} is damaged: .*\nhint: delete it and run"):
        ImageTable.open(store, manifest, "train")


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, own_cache: Path) -> None:
    own_cache.write_text("a file, no folder")
    with pytest.raises(EnvironmentFailure, match=rf"^cannot write the cache at {own_cache}: .*\nhint: .* HVQD_CACHE$"):
        ImageTable.open(*dataset(tmp_path, SHARDS), "train")


def test_the_cache_lies_in_the_home_folder_unless_it_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HVQD_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "hvqd"


# ---- damaged shards ----


def test_a_missing_or_damaged_shard_is_named_with_how_to_rebuild(tmp_path: Path) -> None:
    store, manifest = dataset(tmp_path, SHARDS)
    rebuild = rf"\nhint: delete {store.url}/manifest\.json and run the same command again to rebuild the dataset$"
    content = store.read_bytes("train-00000.parquet")
    store.write_bytes("train-00000.parquet", content[:-1] + b"x")
    with pytest.raises(InputError, match=rf"^the shard {store.url}/train-00000\.parquet is damaged: .*{rebuild}"):
        list(read_shards(store, manifest, ["train-00000.parquet"]))
    store.delete("train-00000.parquet")
    with pytest.raises(InputError, match=rf"^the shard {store.url}/train-00000\.parquet is missing{rebuild}"):
        list(read_shards(store, manifest, ["train-00000.parquet"]))


def test_a_shard_that_is_no_parquet_file_is_named(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.write_bytes("train-00000.parquet", b"no parquet")
    manifest = write_manifest(store, "dataset", "request", {})
    with pytest.raises(
        InputError, match=r"train-00000\.parquet cannot be read: .*\nhint: delete .*/manifest\.json and run"
    ):
        list(read_shards(store, manifest, ["train-00000.parquet"]))
