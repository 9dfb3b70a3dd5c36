"""Pictures of every source become a dataset, on a real Ray: the same one whatever is interrupted, wherever it runs."""

from __future__ import annotations

import io
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from infra.cluster import connect, disconnect
from infra.errors import InputError
from infra.storage import Store
from tests.command_line import environment, run_hvqd, start_hvqd
from tests.pictures import decoded, encoded, noise, write_files, write_tar
from workflows.artifacts import Manifest, check_files, find_manifest
from workflows.commands.job import exit_status
from workflows.config import RunConfig
from workflows.context import Context, Silent
from workflows.data.batches import ImageTable, read_shards, shard_names
from workflows.data.ingest import build_dataset
from workflows.data.pictures import prepare
from workflows.data.splits import SPLITS
from workflows.loading import load_config, to_yaml

MOST_WORKERS = 3


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One local Ray for all builds of this module that run in this process."""
    connect(None, MOST_WORKERS)
    yield
    disconnect()


def config_for(source: Path, *overrides: str) -> RunConfig:
    """The preset `integration` on a source."""
    return load_config("integration", None, [f"data.source={source}", "data.limit=null", *overrides])


def build(root: Path, source: Path, *overrides: str) -> Manifest:
    """The dataset of a source under a root."""
    return build_dataset(Context(config_for(source, *overrides), Store(str(root))))


def rows_of(root: Path, manifest: Manifest) -> dict[str, list[dict[str, Any]]]:
    """All rows of each split."""
    store = Store(str(root / "dataset"))
    return {
        split: [
            row for table in read_shards(store, manifest, shard_names(manifest, split)) for row in table.to_pylist()
        ]
        for split in SPLITS
    }


def bomb() -> bytes:
    """A PNG whose header promises 10^10 pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def mixed_files() -> dict[str, bytes]:
    """36 readable pictures in two classes, of many modes and sizes, one of them a copy of another."""
    plain = {
        f"{'cat' if number % 2 else 'dog'}/{number:02}.png": encoded(noise(number, 20 + number)) for number in range(24)
    }
    sixteen = (np.arange(400, dtype=np.uint16) * 163).reshape(20, 20)
    modes = {
        "cat/grey.png": encoded(noise(100).convert("L")),
        "cat/palette.gif": encoded(noise(101).quantize(16), "GIF"),
        "cat/alpha.png": encoded(Image.merge("RGBA", [*noise(102).split(), noise(103).convert("L")])),
        "cat/grey_alpha.png": encoded(noise(104).convert("LA")),
        "dog/cmyk.jpg": encoded(noise(105).convert("CMYK"), "JPEG"),
        "dog/sixteen.png": encoded(Image.fromarray(sixteen)),
        "dog/animated.webp": encoded(noise(106), "WEBP", save_all=True, append_images=[noise(107)]),
        "dog/float.tiff": encoded(noise(108).convert("F"), "TIFF"),
        "dog/deep/er.jpg": encoded(noise(109, 40, 20), "JPEG"),
        "dog/large.bmp": encoded(noise(110, 300, 200), "BMP"),
        "dog/copy.bmp": encoded(noise(3, 23), "BMP"),  # the pixels of cat/03.png
        "cat/one_bit.png": encoded(noise(111).convert("1")),
    }
    return {**plain, **modes}


BAD = {
    "cat/bomb.png": (bomb(), "too large: 100000 x 100000 has more than 50000000 pixels"),
    "cat/cut.jpg": (encoded(noise(200, 64, 64), "JPEG")[:-500], "truncated: "),
    "cat/empty.png": (b"", "empty: the file has no bytes"),
    "dog/clear.png": (encoded(Image.new("RGBA", (16, 16))), "empty: fully transparent"),
    "dog/small.png": (encoded(noise(201, 4, 30)), "too small: 4 x 30 is shorter than 8 pixels"),
    "dog/text.png": (b"a text", "unreadable: not a picture in a known format"),
}
SOME_BAD = "data.max_rejected_share=0.2"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of good and bad files."""
    files = {
        **mixed_files(),
        **{name: content for name, (content, _) in BAD.items()},
        "cat/.hidden.png": b"",
        "notes.txt": b"",
    }
    return write_files(tmp_path_factory.mktemp("mixed"), files)


@pytest.fixture(scope="module")
def built(mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """A root with the dataset of the mixed folder, in several shards; read it, never change it."""
    root = tmp_path_factory.mktemp("built")
    return root, build(root, mixed, SOME_BAD, "data.shard_rows=10")


# ---- what comes out ----


def test_a_mixed_folder_becomes_whole_shards_and_a_list_of_what_was_rejected(built: tuple[Path, Manifest]) -> None:
    root, manifest = built
    store = Store(str(root / "dataset"))
    check_files(store, manifest, deep=True)
    assert find_manifest(store) == manifest
    assert set(store.files()) == {*manifest.files, "manifest.json"}, "nothing else is left, staging least of all"
    assert len(shard_names(manifest, "train")) == 3
    rejected = {row["id"]: row["reason"] for row in pq.read_table(root / "dataset" / "rejected.parquet").to_pylist()}
    assert list(rejected) == sorted(BAD)
    for name, (_, reason) in BAD.items():
        assert rejected[name].startswith(reason)
    assert (manifest.facts["rejected"], manifest.facts["duplicates"]) == (6, 1)


def test_classes_are_the_sub_folders_and_splits_share_the_pictures_out(built: tuple[Path, Manifest]) -> None:
    root, manifest = built
    rows = rows_of(root, manifest)
    assert manifest.facts["classes"] == ["cat", "dog"]
    assert {split: len(found) for split, found in rows.items()} == manifest.facts["rows"]
    names = [row["id"] for found in rows.values() for row in found]
    assert len(names) == len(set(names)) == 35
    assert set(mixed_files()) - set(names) in ({"cat/03.png"}, {"dog/copy.bmp"})
    for found in rows.values():
        assert [row["id"] for row in found] == sorted(row["id"] for row in found), "in the source's order"
        assert all(manifest.facts["classes"][row["label"]] == row["id"].split("/")[0] for row in found)
    counts = {
        split: np.bincount([row["label"] for row in found], minlength=2).tolist() for split, found in rows.items()
    }
    assert counts == manifest.facts["class_rows"]
    assert len(rows["val"]) == len(rows["test"]) == 2, "6 and 5 hundredths of 36"
    assert min(counts["train"]) >= 12, "both classes are there to be learned"


def test_training_reads_the_pictures_at_the_runs_size(
    built: tuple[Path, Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, manifest = built
    monkeypatch.setenv("HVQD_CACHE", str(tmp_path))
    table = ImageTable.open(Store(str(root / "dataset")), manifest, "train")
    assert len(table) == manifest.facts["rows"]["train"] == 31
    files, settings = mixed_files(), config_for(root).data
    for name, image in zip(table.ids.tolist(), table.images, strict=True):
        np.testing.assert_array_equal(image, decoded(prepare(files[name], None, settings).png))


# ---- the same dataset, whatever happens ----


def test_a_current_dataset_is_not_made_again(built: tuple[Path, Manifest], mixed: Path) -> None:
    root, manifest = built
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert build(root, mixed, SOME_BAD, "data.shard_rows=10", "compute.workers=1") == manifest
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_a_picture_added_to_the_folder_makes_the_dataset_anew(
    built: tuple[Path, Manifest], mixed: Path, tmp_path: Path
) -> None:
    """Where its pictures are not at hand a dataset stays current."""
    root = Path(shutil.copytree(built[0], tmp_path / "root"))
    source = Path(shutil.copytree(mixed, tmp_path / "source"))
    settings = (SOME_BAD, "data.shard_rows=10", "compute.workers=1")
    before = build(root, source, *settings)
    assert before.digest == built[1].digest
    Image.new("RGB", (32, 32), (1, 200, 3)).save(source / "cat" / "new.png")
    after = build(root, source, *settings)
    assert sum(after.facts["rows"].values()) == sum(before.facts["rows"].values()) + 1
    assert set(Store(str(root / "dataset")).files()) == {*after.files, "manifest.json"}
    shutil.rmtree(source)
    assert build(root, source, *settings) == after


def test_neither_the_workers_nor_the_place_of_the_source_change_the_content(
    built: tuple[Path, Manifest], mixed: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(mixed, tmp_path / "elsewhere"))
    changes = [SOME_BAD, "data.shard_rows=10", f"compute.workers={MOST_WORKERS}"]
    changes += [f"{stage}.train.global_batch=48" for stage in ("vq", "prior")]  # a multiple of 16 x 3
    assert build(tmp_path / "root", source, *changes).digest == built[1].digest


def test_other_settings_replace_the_dataset_and_leave_nothing_of_the_old_one(
    built: tuple[Path, Manifest], mixed: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(built[0], tmp_path / "root"))
    manifest = build(root, mixed, SOME_BAD, "data.shard_rows=1000", "seed=1")
    assert manifest.digest != built[1].digest
    assert set(Store(str(root / "dataset")).files()) == {*manifest.files, "manifest.json"}
    assert len(shard_names(manifest, "train")) == 1


@dataclass
class Heard(Silent):
    """A progress that remembers."""

    updates: list[tuple[float, float, str]] = field(default_factory=list)

    def update(self, done: float, total: float, unit: str, note: str = "") -> None:
        """One more thing heard."""
        self.updates.append((done, total, unit))


def test_a_build_killed_while_decoding_goes_on_and_ends_with_the_same_digest(tmp_path: Path) -> None:
    source, count = tmp_path / "source", 30
    for number in range(count):  # one unit each, so large that decoding all takes a while
        picture = encoded(noise(number, 8, 8).resize((1600, 1600), Image.Resampling.NEAREST), compress_level=1)
        write_tar(source / f"{number:03}.tar", {"a.png": picture})
    config = config_for(source)
    undisturbed = build_dataset(Context(config, Store(str(tmp_path / "undisturbed"))))
    (tmp_path / "mine.yaml").write_text(to_yaml(config))
    root = tmp_path / "root"
    command = ["data", "build", "--config", str(tmp_path / "mine.yaml"), "--root", str(root)]
    process = start_hvqd(*command, cwd=tmp_path, env=environment(tmp_path))
    staging = Store(str(root / "dataset" / "staging"))
    deadline = time.monotonic() + 300
    while len(staging.files() if staging.path.is_dir() else ()) < 2:
        assert process.poll() is None, f"ended before it was killed: {process.communicate()}"
        assert time.monotonic() < deadline, "no two decoded units within five minutes"
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert find_manifest(Store(str(root / "dataset"))) is None, "half a dataset does not call itself one"
    finished = len(staging.files())
    assert 2 <= finished < count
    heard = Heard()
    resumed = build_dataset(Context(config, Store(str(root)), heard))
    assert resumed.digest == undisturbed.digest
    assert set(Store(str(root / "dataset")).files()) == {*resumed.files, "manifest.json"}
    decoding = [update for update in heard.updates if update[2] == "pictures"]
    assert len(decoding) == count - finished, "what was decoded is not decoded again"
    assert decoding[-1] == (count, count, "pictures")


# ---- other sources ----


def test_a_tar_or_parquet_source_gives_the_pictures_of_its_files(tmp_path: Path) -> None:
    files = {name: content for name, content in mixed_files().items() if "copy" not in name}
    names = list(files)
    for shard, mine in enumerate((names[:20], names[20:])):
        members = {}
        for name in mine:
            key = name.replace("/", "_").replace(".", "_")
            members[f"{key}.{name.rpartition('.')[2]}"] = files[name]
            members[f"{key}.cls"] = name.split("/")[0].encode()
        write_tar(tmp_path / "tar" / f"{shard}.tar", members)
    rows = [{"image": {"bytes": files[name], "path": None}, "kind": name.split("/")[0]} for name in names]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=16)
    settings = config_for(tmp_path).data
    expected = {(prepare(files[name], None, settings).png, name.split("/")[0]) for name in names}
    assert len(expected) == 35
    for source, *changes in (("tar",), ("a.parquet", "data.class_column=kind")):
        root = tmp_path / f"root of {source}"
        manifest = build(root, tmp_path / source, *changes)
        found = [row for split in rows_of(root, manifest).values() for row in split]
        assert {(row["image"], manifest.facts["classes"][row["label"]]) for row in found} == expected
        assert len(found) == 35


def test_groups_captions_and_label_maps_of_a_parquet_file_reach_the_dataset(tmp_path: Path) -> None:
    rows = [
        {
            "image": encoded(noise(number)),
            "seg": encoded(Image.fromarray(np.full((16, 16), number, dtype=np.uint8))),
            "caption": f"caption {number}",
            "concept": f"g{number // 3}",
            "style": "drawn",
            "license": "CC0",
            "id": f"p{number:02}",
        }
        for number in range(30)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    manifest = build(tmp_path, tmp_path / "a.parquet", "data.group_column=concept")
    found = rows_of(tmp_path, manifest)
    assert (manifest.facts["styles"], manifest.facts["licences"]) == (["drawn"], ["CC0"])
    groups = {split: {row["group"] for row in mine} for split, mine in found.items()}
    assert sum(len(mine) for mine in groups.values()) == len(set().union(*groups.values())) == 10
    for row in [row for mine in found.values() for row in mine]:
        number = int(row["id"][1:])
        assert (row["group"], row["caption"]) == (f"g{number // 3}", f"caption {number}")
        assert (np.asarray(Image.open(io.BytesIO(row["seg"]))) == number).all()
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(row["image"]))), np.asarray(noise(number)))


# ---- bad input ----


def refused(root: Path, source: Path, *overrides: str) -> str:
    """What the user is told, after checking that it is two lines of status 2 and that no dataset was begun."""
    with pytest.raises(InputError) as refusal:
        build(root, source, *overrides)
    status, text = exit_status(refusal.value)
    lines = text.splitlines()
    assert (status, len(lines)) == (2, 2) and lines[1].startswith("hint: ")
    assert not (root / "dataset").exists(), "nothing half-written"
    return lines[0]


def test_a_folder_without_a_readable_picture_is_refused(tmp_path: Path) -> None:
    source = write_files(tmp_path / "source", {f"{number}.png": b"no picture" for number in range(3)})
    assert refused(tmp_path, source).startswith(
        f"no readable picture among the 3 of data.source={source}: 3 unreadable"
    )


def test_one_picture_only_is_refused(tmp_path: Path) -> None:
    source = write_files(tmp_path / "source", {"a.png": encoded(noise(0))})
    assert refused(tmp_path, source).startswith(f"data.source={source} has 1 readable picture(s)")


def test_a_class_with_a_single_picture_is_refused(tmp_path: Path) -> None:
    source = write_files(tmp_path / "source", {f"cat/{number}.png": encoded(noise(number)) for number in range(6)})
    write_files(source, {"emu/only.png": encoded(noise(7))})
    assert refused(tmp_path, source).startswith("1 class(es) have a single picture")


def test_too_many_rejections_are_refused_and_an_earlier_dataset_stays(
    built: tuple[Path, Manifest], mixed: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(built[0], tmp_path / "root"))
    with pytest.raises(InputError, match=r"^6 of 42 pictures were rejected, more than data\.max_rejected_share=0\.1: "):
        build(root, mixed)
    store = Store(str(root / "dataset"))
    assert find_manifest(store) == built[1]
    check_files(store, built[1], deep=True)
    assert set(store.files()) == {*built[1].files, "manifest.json"}


def test_what_a_worker_refuses_reaches_the_user_in_its_own_words(tmp_path: Path) -> None:
    rows = [{"image": encoded(noise(number)), "split": "holdout"} for number in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    message = refused(tmp_path / "root", tmp_path / "a.parquet")
    assert message == "the source's split column must say train, val or test: holdout"


@pytest.mark.parametrize(
    ("name", "problem"), [("absent", "data.source does not exist: "), ("empty", "no pictures in data.source: ")]
)
def test_a_source_with_nothing_in_it_ends_with_status_two_and_an_untouched_root(
    tmp_path: Path, name: str, problem: str
) -> None:
    (tmp_path / "empty").mkdir()
    command = ["data", "build", str(tmp_path / name), "--root", str(tmp_path / "root"), "--preset", "integration"]
    ended = run_hvqd(*command, cwd=tmp_path, env=environment(tmp_path))
    lines = ended.err.splitlines()
    assert (ended.status, ended.out, len(lines)) == (2, "", 2)
    assert lines[0] == f"error: {problem}{tmp_path / name}" and lines[1].startswith("hint: ")
    assert not (tmp_path / "root").exists()


def test_after_a_failure_nothing_is_left_that_could_end_the_process_in_its_own_way(tmp_path: Path) -> None:
    """A thread of Ray that asks for something after `disconnect` ends the process with status 1."""
    script = (
        "import sys, threading, time\n"
        "import ray.cloudpickle\n"
        "from infra.cluster import disconnect\n"
        "from infra.errors import InputError\n"
        "from workflows.config import ComputeSettings\n"
        "from workflows.data.distributed import map_units\n"
        "class Worker:\n"
        "    def __call__(self, unit):\n"
        "        if unit == 1:\n"
        "            raise InputError('unit 1 is bad')\n"
        "        time.sleep(0.5)\n"
        "        return {'unit': unit}\n"
        "ray.cloudpickle.register_pickle_by_value(sys.modules['__main__'])\n"
        "try:\n"
        "    list(map_units(Worker, range(200), ComputeSettings(workers=2)))\n"
        "except InputError as error:\n"
        "    print(error, [thread.name for thread in threading.enumerate()])\n"
        "    disconnect()\n"
        "    sys.exit(2)\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=90)
    assert (done.returncode, done.stdout.count("unit 1 is bad")) == (2, 1), done.stderr
    assert "Executor" not in done.stdout, "the other 199 units are not done first, nor go on behind"
