"""What holds for every store, wherever it lies: the unit tests ask a local folder, the integration tests a real S3."""

from __future__ import annotations

import hashlib
import json
import pickle
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.lease import hold
from infra.storage import Store


def what_is_written_is_read_back(store: Store) -> None:
    contents = {"a": b"", "b/c.bin": bytes(range(256)), "b/ä ö.txt": b"1", "b/d/e": b"x" * 100_000}
    for name, content in contents.items():
        store.write_bytes(name, content)
    assert {name: store.read_bytes(name) for name in contents} == contents
    store.write_bytes("b/c.bin", b"shorter")
    assert store.read_bytes("b/c.bin") == b"shorter"


def json_is_read_back_and_does_not_depend_on_the_order_of_keys(store: Store) -> None:
    store.write_json("first.json", {"b": [1, None, "ü"], "a": 0.1})
    store.write_json("second.json", {"a": 0.1, "b": [1, None, "ü"]})
    assert store.read_json("first.json") == {"a": 0.1, "b": [1, None, "ü"]}
    assert store.read_bytes("first.json") == store.read_bytes("second.json")
    assert list(json.loads(store.read_bytes("first.json"))) == ["a", "b"]


def a_missing_file_is_not_found_and_leaves_nothing(store: Store) -> None:
    store.write_bytes("present", b"1")
    for ask in (store.read_bytes, store.read_json, store.sha256, lambda name: store.open(name).__enter__()):
        with pytest.raises(FileNotFoundError):
            ask("absent")
    with tempfile.TemporaryDirectory() as folder:
        with pytest.raises(FileNotFoundError):
            store.download("absent", Path(folder) / "copy")
        assert list(Path(folder).iterdir()) == []
    with pytest.raises(FileNotFoundError):
        next(store.child("nowhere").walk())


def files_and_folders_exist_once_written(store: Store) -> None:
    assert not store.exists("folder/file") and not store.exists("folder")
    store.write_bytes("folder/file", b"1")
    assert store.exists("folder/file") and store.exists("folder")
    assert not store.exists("folder/fil") and not store.exists("fold")


def a_folder_is_empty_before_and_after_it_holds_files(store: Store) -> None:
    folder = store.child("held")
    assert folder.is_empty()
    folder.write_bytes("deep/down", b"1")
    assert not folder.is_empty() and not store.is_empty()
    folder.child("deep").delete()
    assert folder.is_empty(), "whether or not the store still shows the folder"


def files_lists_everything_below_with_sizes_and_nothing_beside(store: Store) -> None:
    inner = store.child("run")
    assert inner.files() == {}
    for size, name in enumerate(["z", "a/b/c", "a/b.txt", "a-b", ".hidden"]):
        inner.write_bytes(name, b"x" * size)
    store.write_bytes("run-2/other", b"1")
    assert list(inner.files().items()) == [(".hidden", 4), ("a-b", 3), ("a/b.txt", 2), ("a/b/c", 1), ("z", 0)]


def walk_finds_the_same_files_in_the_same_order_every_time(store: Store) -> None:
    for size, name in enumerate(["z", "a/b/c", "a/b.txt", "a-b", "a/b/d/e"]):
        store.write_bytes(name, b"x" * size)
    walked = list(store.walk())
    assert dict(walked) == store.files() and len(walked) == 5
    assert list(store.walk()) == walked
    assert list(store.walk("a/b/")) == [("a/b/c", 1), ("a/b/d/e", 4)]


def children_are_the_names_directly_below(store: Store) -> None:
    folder = store.child("vq")
    assert folder.children() == []
    for name in ("vq/inner", "model/weights", "model/config", "manifest.json"):
        folder.write_bytes(name, b"1")
    assert folder.children() == ["manifest.json", "model", "vq"]
    assert store.child("vq", "/vq/").children() == ["inner"]


def deleting_takes_a_file_or_a_folder_and_nothing_beside(store: Store) -> None:
    for name in ("run/a", "run/b/c", "run/b/d", "run/bc", "run-2/a"):
        store.write_bytes(name, b"1")
    run = store.child("run")
    run.delete("a")
    assert list(store.files()) == ["run-2/a", "run/b/c", "run/b/d", "run/bc"]
    run.delete("b")
    run.delete("absent")
    assert list(store.files()) == ["run-2/a", "run/bc"]
    run.delete()
    run.delete()
    assert list(store.files()) == ["run-2/a"]


def folders_survive_the_way_up_and_down(store: Store) -> None:
    contents = {"a": b"1", "b/c": b"22", "b/d/e.bin": b"\0" * 3}
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "source", Path(folder) / "target"
        for name, content in contents.items():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(content)
        store.child("copy").upload_folder(source)
        store.upload(source / "a", "single")
        assert store.child("copy").files() == {"a": 1, "b/c": 2, "b/d/e.bin": 3} and store.read_bytes("single") == b"1"
        found = store.child("copy").download_folder(target)
        files = [path for path in found.rglob("*") if path.is_file()]
        assert {path.relative_to(found).as_posix(): path.read_bytes() for path in files} == contents
        single = store.download("copy/b/c", target / "deep" / "single")
        assert single.read_bytes() == b"22" and list(single.parent.iterdir()) == [single]


def the_digest_is_that_of_the_content(store: Store) -> None:
    content = bytes(range(251)) * 9_000  # more than two of the blocks it is read in
    store.write_bytes("large", content)
    store.write_bytes("empty", b"")
    assert store.sha256("large") == hashlib.sha256(content).hexdigest()
    assert store.sha256("empty") == hashlib.sha256(b"").hexdigest()


def an_open_file_can_be_read_from_any_place(store: Store) -> None:
    store.write_bytes("numbers", bytes(range(200)))
    with store.open("numbers") as file:
        file.seek(-3, 2)
        assert file.read() == bytes([197, 198, 199])
        file.seek(10)
        assert file.read(2) == bytes([10, 11]) and file.tell() == 12


def arrow_reads_and_writes_the_same_files(store: Store) -> None:
    table = pa.table({"id": [1, 2, 3], "text": ["a", "b", None]})
    store.write_bytes("folder/marker", b"1")
    filesystem, path = store.child("folder").arrow()
    pq.write_table(table, f"{path}/t.parquet", filesystem=filesystem)
    assert store.child("folder").children() == ["marker", "t.parquet"]
    with store.open("folder/t.parquet") as file:
        assert pq.read_table(file).equals(table)
    assert pq.read_table(f"{path}/t.parquet", filesystem=filesystem).equals(table)


def asking_whether_it_can_be_written_leaves_nothing(store: Store) -> None:
    store.check_writable()
    assert store.files() == {} and store.children() == []


def a_copy_sent_to_another_process_is_the_same_store(store: Store) -> None:
    store.write_bytes("a", b"1")
    copy = pickle.loads(pickle.dumps(store.child("inner").quick()))
    copy.write_bytes("b", b"2")
    assert copy == store.child("inner").quick() and store.files() == {"a": 1, "inner/b": 1}


def of_many_writers_of_a_new_name_exactly_one_succeeds(store: Store) -> None:
    for name in ("a", "b/c"):
        begin, won = threading.Barrier(8), []

        def write(number: int, name: str = name, begin: threading.Barrier = begin, won: list[int] = won) -> None:
            begin.wait()
            if store.create_bytes(name, b"%d" % number * 1_000):
                won.append(number)

        together(write, 8)
        assert len(won) == 1
        assert store.read_bytes(name) == b"%d" % won[0] * 1_000
        assert not store.create_bytes(name, b"late") and store.read_bytes(name) == b"%d" % won[0] * 1_000
    assert sorted(store.files()) == ["a", "b/c"], "nothing half-written is left"


def holders_of_a_lease_take_turns(store: Store) -> None:
    inside: list[int] = []
    most, turns = [], []

    def work(number: int) -> None:
        for _ in range(3):
            with hold(store, "counting", patience_seconds=120) as lease:
                inside.append(number)
                most.append(len(inside))
                turns.append(lease.number)
                lease.check_held()
                inside.remove(number)

    together(work, 3)
    assert len(most) == 9 and max(most) == 1
    assert turns == sorted(set(turns)), "numbers only grow"
    assert len(store.children()) == 1, "what is past is cleared away"


def together(work: Callable[[int], None], count: int) -> None:
    """Run work(0), work(1), … at once; what one raises is raised here."""
    with ThreadPoolExecutor(count) as pool:
        for done in [pool.submit(work, number) for number in range(count)]:
            done.result()


FACTS: list[Callable[[Store], None]] = [
    what_is_written_is_read_back,
    json_is_read_back_and_does_not_depend_on_the_order_of_keys,
    a_missing_file_is_not_found_and_leaves_nothing,
    files_and_folders_exist_once_written,
    a_folder_is_empty_before_and_after_it_holds_files,
    files_lists_everything_below_with_sizes_and_nothing_beside,
    walk_finds_the_same_files_in_the_same_order_every_time,
    children_are_the_names_directly_below,
    deleting_takes_a_file_or_a_folder_and_nothing_beside,
    folders_survive_the_way_up_and_down,
    the_digest_is_that_of_the_content,
    an_open_file_can_be_read_from_any_place,
    arrow_reads_and_writes_the_same_files,
    asking_whether_it_can_be_written_leaves_nothing,
    a_copy_sent_to_another_process_is_the_same_store,
    of_many_writers_of_a_new_name_exactly_one_succeeds,
    holders_of_a_lease_take_turns,
]
