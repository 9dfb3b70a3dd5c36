"""Pictures a second that one worker reads from shards on S3, after decoding, against what `tiny` needs and webdataset.

The bundled pictures at 32 x 32 lie on an S3 server of this machine, as our parquet shards and as webdataset's tar
shards of the same encoded pictures. A worker reads them as a training does: passes over the training split in batches
of 16 float tensors. `first_epoch_ratio` compares the first pass alone, in which we fill the cache that later passes map
into memory; webdataset streams and decodes every pass, as it does in trainings.
"""

from __future__ import annotations

import io
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from runner import REPOSITORY, Benchmark, Figures, Target, main, work_folder

sys.path.insert(0, str(REPOSITORY))

from infra.storage import Store, renew
from tests.services import seaweedfs
from workflows.artifacts import read_manifest
from workflows.data.batches import ImageTable, batch_indices, read_shards, shard_names

_BATCH = 16
_EPOCHS = 10  # about as often as `tiny` sees its training split
_NEED = 240.0
"""Images a second that the fastest stage of `tiny` takes on two cores of the kind in docs/benchmarks.md."""


def dataset() -> Path:
    """The `tiny` preset's dataset, built once."""
    from tests.command_line import environment, run_hvqd

    folder = work_folder("data_path")
    root = folder / "run"
    if not (root / "dataset" / "manifest.json").exists():
        command = ("data", "build", "--preset", "tiny", "--root", str(root), "--json")
        run_hvqd(*command, cwd=folder, env=environment(folder)).succeeded()
    return root / "dataset"


def ours(store: Store, epochs: int) -> Iterator[tuple[int, float]]:
    """(pictures, seconds) of each pass."""
    started = time.monotonic()
    table = ImageTable.open(store, read_manifest(store, "hvqd data build"), "train")
    for epoch in range(epochs):
        total = torch.zeros(())
        for first in range(0, len(table) - _BATCH + 1, _BATCH):
            total += table.batch(batch_indices(len(table), 0, epoch * len(table) + first, _BATCH)).mean()
        yield len(table), time.monotonic() - started
        started = time.monotonic()


def write_tars(source: Store, target: Store, rows: int) -> list[str]:
    """The same encoded pictures in tar shards; their names."""
    manifest = read_manifest(source, "hvqd data build")
    encoded = [
        value.as_py()
        for table in read_shards(source, manifest, shard_names(manifest, "train"))
        for value in table["image"]
    ]
    names = []
    for number, first in enumerate(range(0, len(encoded), rows)):
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w") as tar:
            for place, picture in enumerate(encoded[first : first + rows], first):
                entry = tarfile.TarInfo(f"{place:08d}.png")
                entry.size = len(picture)
                tar.addfile(entry, io.BytesIO(picture))
        names.append(f"train-{number:05d}.tar")
        target.write_bytes(names[-1], content.getvalue())
    return names


def theirs(store: Store, names: list[str], epochs: int) -> Iterator[tuple[int, float]]:
    """(pictures, seconds) of each pass: webdataset's own pipeline, shuffled, decoded, batched."""
    import webdataset
    import webdataset.tariterators

    def opened(source: Iterator[dict[str, str]]) -> Iterator[dict[str, object]]:
        for entry in source:
            yield {**entry, "stream": io.BytesIO(store.read_bytes(entry["url"]))}

    def to_tensor(picture: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.asarray(picture.convert("RGB"))).permute(2, 0, 1).float().div_(127.5).sub_(1)

    for _ in range(epochs):
        started, count, total = time.monotonic(), 0, torch.zeros(())
        pipeline = webdataset.DataPipeline(
            webdataset.SimpleShardList(names),
            opened,
            webdataset.tariterators.tar_file_expander,
            webdataset.tariterators.group_by_keys,
            webdataset.shuffle(1000),
            webdataset.decode("pil"),
            webdataset.to_tuple("png"),
            webdataset.map_tuple(to_tensor),
            webdataset.batched(_BATCH),
        )
        for (batch,) in pipeline:
            total += batch.mean()
            count += len(batch)
        yield count, time.monotonic() - started


def rate(passes: list[tuple[int, float]]) -> float:
    """Pictures a second over passes."""
    return sum(count for count, _ in passes) / sum(seconds for _, seconds in passes)


def measure(quick: bool, seed: int) -> Figures:
    """Both sides."""
    epochs = 2 if quick else _EPOCHS
    folder = dataset()
    with tempfile.TemporaryDirectory(prefix="hvqd-data-") as name, seaweedfs(Path(name)) as server:
        os.environ.update(server.env)
        renew()  # another server than the last repeat's
        os.environ["HVQD_CACHE"] = f"{name}/cache"  # an empty one: the first pass pays for it
        root = Store(f"s3://{server.bucket}/data-{seed}")
        root.child("ours").upload_folder(folder)
        names = write_tars(Store(str(folder)), root.child("theirs"), 2048)
        own = list(ours(root.child("ours"), epochs))
        peer = list(theirs(root.child("theirs"), names, epochs))
    assert own[0][0] == peer[0][0], "the same pictures"
    return {
        "images_per_second_ours": rate(own),
        "images_per_second_webdataset": rate(peer),
        "ratio": rate(own) / rate(peer),
        "times_the_need": rate(own) / _NEED,
        "first_epoch_per_second_ours": rate(own[:1]),
        "first_epoch_ratio": rate(own[:1]) / rate(peer[:1]),
        "later_epochs_per_second_ours": rate(own[1:]),
    }


BENCHMARK = Benchmark(
    name="data_path",
    what=__doc__ or "",
    parts={"reading": measure},
    targets=(Target("times_the_need", ">=", 10), Target("ratio", ">=", 1.5)),
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
