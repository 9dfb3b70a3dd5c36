"""The store on a local disk: writes are whole or absent, and what a disk refuses is explained."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.errors import EnvironmentFailure, InputError
from infra.storage import Store, open_store
from tests.store_facts import FACTS

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact.__name__)
def test_on_a_local_folder(fact: Callable[[Store], None], tmp_path: Path) -> None:
    fact(open_store(str(tmp_path / "root")))


def in_another_process(script: str, folder: Path) -> str:
    """What a script prints that prepares its process with `setup` and then writes to the store at `folder`."""
    found = subprocess.run(
        [sys.executable, "-c", script, str(folder)], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


# ---- whole or absent ----

LIMITED = """
import resource, sys
from pathlib import Path
from infra.errors import EnvironmentFailure
from infra.storage import Store

store = Store(sys.argv[1])
store.write_bytes("kept", b"before")
Path(sys.argv[1], "..", "source").write_bytes(b"x" * 100_000)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
for write in (
    lambda: store.write_bytes("kept", b"x" * 100_000),
    lambda: store.write_bytes("new", b"x" * 100_000),
    lambda: store.upload(Path(sys.argv[1], "..", "source"), "copy"),
):
    try:
        write()
    except EnvironmentFailure as error:
        print(error)
"""


def test_a_write_that_the_disk_cuts_short_leaves_what_was_there(tmp_path: Path) -> None:
    root = tmp_path / "root"
    said = in_another_process(LIMITED, root).splitlines()
    reason = "the file is larger than this machine allows"
    assert said[0::2] == [f"cannot write {root}/{name}: {reason}" for name in ("kept", "new", "copy")]
    assert all(line.startswith("hint: free some space or choose another --root; earlier") for line in said[1::2])
    assert {path.name: path.read_bytes() for path in root.iterdir()} == {"kept": b"before"}


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    contents = [bytes([value]) * 200_000 for value in range(20)]
    store.write_bytes("shared", contents[0])
    seen: set[bytes] = set()
    ended = threading.Event()

    def read() -> None:
        while not ended.is_set():
            seen.add(store.read_bytes("shared"))

    reader = threading.Thread(target=read)
    reader.start()
    for content in contents:
        store.write_bytes("shared", content)
    ended.set()
    reader.join()
    assert seen and seen <= set(contents)


def test_what_a_killed_writer_left_is_no_file(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.write_bytes("whole", b"1")
    (tmp_path / ".half.0123.partial").write_bytes(b"x")
    assert store.files() == {"whole": 1} and list(store.walk()) == [("whole", 1)] and store.children() == ["whole"]


# ---- links ----


def test_walk_follows_links_to_folders_once_and_never_in_a_circle(tmp_path: Path) -> None:
    for name in ("a/one", "b/two", "outside/three"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
    root = tmp_path / "root"
    root.mkdir()
    (root / "to-a").symlink_to(tmp_path / "a")
    (root / "itself").symlink_to(root)
    (tmp_path / "a" / "to-b").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "to-a").symlink_to(tmp_path / "a")
    assert list(open_store(str(root)).walk()) == [("to-a/one", 1), ("to-a/to-b/two", 1)]


# ---- what a disk refuses ----

UNPRIVILEGED = """
import os, sys
from infra.errors import EnvironmentFailure
from infra.storage import Store, open_store

store = open_store(sys.argv[1])
try:
    store.child("warm").check_writable()  # loads what is loaded late, while everything can be read
except EnvironmentFailure:
    pass
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
for action in (store.check_writable, lambda: store.write_bytes("a/b", b"1"), lambda: store.read_bytes("secret")):
    try:
        action()
    except EnvironmentFailure as error:
        print(error)
"""


def test_a_folder_of_somebody_else_is_named_with_what_to_check(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"1")
    (tmp_path / "secret").chmod(0o000)
    tmp_path.chmod(0o500)
    try:
        said = in_another_process(UNPRIVILEGED, tmp_path).splitlines()
    finally:
        tmp_path.chmod(0o700)
    starts = [f"cannot write {tmp_path}", f"cannot write {tmp_path}/a/b", f"cannot read {tmp_path}/secret"]
    assert len(said) == 6
    for line, start in zip(said[0::2], starts, strict=True):
        assert line.startswith(f"{start}: permission denied (")
    assert set(said[1::2]) == {
        "hint: check the folder's owner, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for an object store"
    }


def test_a_root_that_cannot_be_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    for name, reason in (("file/run", "Not a directory"), ("file", "File exists"), ("x" * 300, "File name too long")):
        with pytest.raises(EnvironmentFailure, match=rf"cannot write .*{name}.*: .*{reason}.*\nhint: choose a root"):
            open_store(str(tmp_path / name)).check_writable()


def test_a_place_where_no_folder_can_be_made_is_named() -> None:
    assert Path("/proc").is_dir()
    with pytest.raises(EnvironmentFailure, match=r"cannot write /proc/hvqd/run.*\nhint: "):
        open_store("/proc/hvqd/run").check_writable()


# ---- addresses ----


def test_local_addresses_become_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert open_store("runs/x/").url == str(tmp_path / "runs" / "x")
    assert open_store(f"file://{tmp_path}/runs").url == str(tmp_path / "runs")
    assert open_store("~/x").url == str(tmp_path / "home" / "x")
    assert open_store("runs").is_local and open_store("runs").path == tmp_path / "runs"
    assert list(tmp_path.iterdir()) == [], "opening a store writes nothing"


def test_a_remote_store_is_no_local_folder() -> None:
    store = open_store("s3://bucket/prefix//")
    assert store.url == "s3://bucket/prefix" and not store.is_local
    assert store.child("a", "b/").url == "s3://bucket/prefix/a/b"
    with pytest.raises(InputError, match="s3://bucket/prefix is not a local folder\nhint: "):
        _ = store.path


@pytest.mark.parametrize("url", ["nosuch://bucket/prefix", "S4://x", "gcs3://x/y"])
def test_an_unknown_scheme_is_refused(url: str) -> None:
    with pytest.raises(InputError, match=rf"the scheme of {url.split(':')[0]}:// is not supported: .*\nhint: a local"):
        open_store(url)


@pytest.mark.parametrize("url", ["s3://", "s3:///prefix"])
def test_an_address_without_a_bucket_is_refused(url: str) -> None:
    with pytest.raises(InputError, match=f"the URL names no bucket: {url}\nhint: a local folder, or s3://bucket"):
        open_store(url)


def test_a_scheme_that_can_only_be_read_is_refused() -> None:
    with pytest.raises(InputError, match="the scheme of https:// is not supported: it can only be read\nhint: "):
        open_store("https://host/x")


def test_a_sub_folder_that_lies_elsewhere_is_read_there_and_not_deleted_with_the_folder(tmp_path: Path) -> None:
    base = open_store(str(tmp_path / "base"))
    base.child("dataset", "deep").write_bytes("file", b"shared")
    mine = open_store(str(tmp_path / "mine")).sharing(dataset=base.child("dataset"))
    assert mine.child("dataset", "deep").read_bytes("file") == b"shared"
    assert mine.quick().child("dataset").url == base.child("dataset").url
    mine.child("own").write_bytes("file", b"mine")
    assert list(mine.files()) == ["own/file"]
    mine.delete()
    assert base.child("dataset", "deep").read_bytes("file") == b"shared"
    assert mine.child("data").url == f"{tmp_path}/mine/data"
