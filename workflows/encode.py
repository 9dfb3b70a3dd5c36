"""Step 3: the pictures of `dataset/` become codes, once, so that the prior never runs the tokenizer.

Every dataset shard has its shard of codes, row for row; for a Gaussian prior also the latents behind them, with their
statistics over the training split. Pictures go through the network in batches of one fixed size,
cut at fixed rows and padded, on one thread: a picture's codes depend neither on the number of workers nor on where an
interrupted job stopped. Finished parts of a shard are kept aside and are not done again.

Axes: N rows of a shard, L levels of h x w codes.
"""

from __future__ import annotations

import hashlib
import io
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from hvqd_model.codec.hierarchy import HierarchicalVQ
from hvqd_model.export import load_model
from infra.errors import InputError
from infra.storage import Store
from workflows.artifacts import (
    MANIFEST,
    FileEntry,
    Manifest,
    check_files,
    find_manifest,
    read_manifest,
    write_manifest,
)
from workflows.config import REFINED, EncodeSettings
from workflows.context import Context
from workflows.data.batches import read_shards, shard_names, to_input
from workflows.data.distributed import Summary, map_units
from workflows.data.latents import FACT, gathered_statistics, latent_columns, write_sums
from workflows.data.shards import STAGING, clear_stale, finished_shards, mark_finished, to_parquet
from workflows.data.splits import SPLITS
from workflows.requests import request_of
from workflows.training.precision import Precision, choose_precision, computing_in

BATCH = 64
"""Pictures the network sees at once, always."""
PART_ROWS = 256
"""Rows that an interruption can cost; a multiple of BATCH, so that batches never depend on it."""


def encode_dataset(context: Context) -> Manifest:
    """The artifact `codes/`: for each dataset shard the codes of its pictures, and the manifest.

    Raises:
        InputError: the dataset or the tokenizer is missing or damaged, or they do not fit each other.
    """
    dataset_store, store = context.root.child("dataset"), context.root.child("codes")
    dataset = read_manifest(dataset_store, "hvqd data build")
    vq = read_manifest(context.root.child("vq"), "hvqd train vq")
    parents = {"dataset": dataset, "vq": vq}
    request = request_of("codes", context.config, parents)
    present = find_manifest(store)
    if present is not None and present.request == request:
        check_files(store, present)
        return present
    started = time.monotonic()
    root, staging = context.root, store.child(STAGING, request[:16])
    model = load_tokenizer(root, vq)
    if list(model.config.image_size) != list(dataset.facts["image_size"]):
        raise InputError(
            f"the tokenizer is for pictures of {list(model.config.image_size)}, "
            f"the dataset has {dataset.facts['image_size']}\nhint: run `hvqd train vq` on this dataset first"
        )
    entries = finished_shards(store, staging)
    clear_stale(store, staging, finished=entries)
    names = [name for split in SPLITS for name in shard_names(dataset, split)]
    total = sum(int(count) for count in dataset.facts["rows"].values())
    waiting = [name for name in names if name not in entries]
    settings, with_latents = context.config.encode, context.config.prior.model.noise == "gaussian"
    done, speed = 0, _Speed()
    jobs = map_units(
        lambda: _Encoder(root, dataset, vq, staging, store, settings, with_latents),
        waiting,
        context.config.compute,
        on_gpus=True,
    )
    for summary in jobs:
        speed.add(summary)
        entries[str(summary["name"])] = FileEntry(int(summary["bytes"]), str(summary["sha256"]))
        done += int(summary["rows"])
        context.progress.update(done, total, "pictures")
    facts: Mapping[str, Any] = {
        "rows": dict(dataset.facts["rows"]),
        "grids": [list(grid) for grid in model.config.grids],
        "codebook_sizes": list(model.config.codebook_sizes),
        "code_dim": list(model.config.code_dims),
        "classes": list(dataset.facts["classes"]),
    }
    if settings.refine_rounds:
        facts = {**facts, REFINED: settings.refine_rounds}
    if with_latents:
        facts = {**facts, FACT: gathered_statistics(staging, shard_names(dataset, "train"), model.config.levels)}
    digests = {name: parent.digest for name, parent in parents.items()}
    provenance = {"seconds": round(time.monotonic() - started, 1), "encoded_now": done, **speed.figures}
    manifest = write_manifest(
        store, "codes", request, digests, facts, provenance, known=entries, leave_out=(f"{STAGING}/",)
    )
    store.child(STAGING).delete()
    context.progress.say(f"  {total:,} pictures in {len(names)} shards, {model.config.tokens} codes each{speed}")
    if context.run is not None:
        figures = {"pictures": float(total), "seconds": provenance["seconds"], **speed.figures}
        context.run.log_metrics({name: value for name, value in figures.items() if name != "precision"}, step=0)
    return manifest


@dataclass
class _Speed:
    """How fast the tokenizer worked, without starting and storing."""

    pictures: int = 0
    seconds: float = 0.0
    """Of all processes together."""
    precisions: set[str] = field(default_factory=set)

    def add(self, summary: Mapping[str, Any]) -> None:
        """Count one shard."""
        self.pictures += int(summary["encoded"])
        self.seconds += float(summary["seconds"])
        self.precisions.add(str(summary["precision"]))

    @property
    def figures(self) -> dict[str, Any]:
        """For the manifest; nothing when nothing was encoded."""
        if self.pictures == 0:
            return {}
        rate = round(self.pictures / max(self.seconds, 1e-9), 1)
        return {"images_per_second_per_process": rate, "precision": ", ".join(sorted(self.precisions))}

    def __str__(self) -> str:
        """For the user, after what was done."""
        figures = self.figures
        if not figures:
            return ""
        return f"; {figures['images_per_second_per_process']:,.0f} images/s a process in {figures['precision']}"


def load_tokenizer(root: Store, vq: Manifest) -> HierarchicalVQ:
    """The tokenizer under a root, its files checked against its manifest.

    Raises:
        InputError: a file is missing or damaged (named).
    """
    store = root.child("vq")
    with tempfile.TemporaryDirectory(prefix="hvqd-") as scratch:
        for name, entry in vq.files.items():
            if not name.startswith("model/"):
                continue
            rebuild = f"hint: delete {store.url}/{MANIFEST} and run `hvqd train vq` again"
            try:
                content = store.read_bytes(name)
            except FileNotFoundError as error:
                raise InputError(f"{store.url}/{name} is missing\n{rebuild}") from error
            if hashlib.sha256(content).hexdigest() != entry.sha256:
                raise InputError(f"{store.url}/{name} is damaged: its digest has changed\n{rebuild}")
            Path(scratch, Path(name).name).write_bytes(content)
        model = load_model(Path(scratch))
    if not isinstance(model, HierarchicalVQ):
        raise InputError(f"{store.url}/model is no tokenizer but a {type(model).__name__}\nhint: run `hvqd train vq`")
    return model


def encode_batches(
    model: HierarchicalVQ,
    pixels: np.ndarray[Any, Any],
    device: str = "cpu",
    precision: Precision = "fp32",
    batch: int = BATCH,
    refine_rounds: int = 0,
) -> list[np.ndarray[Any, Any]]:
    """(N, h, w) int32 codes of each level, coarse first, from (N, H, W, 3) uint8 pictures.

    The network sees `batch` pictures at a time; the last batch is padded with its own last picture.
    """
    return encode_latents(model, pixels, device, precision, batch, refine_rounds)[0]


def encode_latents(
    model: HierarchicalVQ,
    pixels: np.ndarray[Any, Any],
    device: str = "cpu",
    precision: Precision = "fp32",
    batch: int = BATCH,
    refine_rounds: int = 0,
) -> tuple[list[np.ndarray[Any, Any]], list[np.ndarray[Any, Any]]]:
    """The codes as `encode_batches` gives them, and the (N, h, w, C) float32 latents behind them."""
    found: list[list[np.ndarray[Any, Any]]] = []
    behind: list[list[np.ndarray[Any, Any]]] = []
    with torch.no_grad():
        for first in range(0, len(pixels), batch):
            rows = pixels[first : first + batch]
            padded = np.concatenate([rows, np.repeat(rows[-1:], batch - len(rows), axis=0)])
            with computing_in(precision, torch.device(device)):
                codes, latents = model.encode_with_latents(to_input(padded).to(device), refine_rounds)
            found.append([level[: len(rows)].cpu().numpy().astype(np.int32) for level in codes])
            behind.append([level[: len(rows)].cpu().numpy() for level in latents])
    both = [[np.concatenate(level) for level in zip(*parts, strict=True)] for parts in (found, behind)]
    return both[0], both[1]


@dataclass
class _Encoder:
    """Encodes shards, part by part."""

    root: Store
    dataset: Manifest
    vq: Manifest
    staging: Store
    store: Store
    settings: EncodeSettings
    with_latents: bool = False
    seconds: float = 0.0
    """What the network took for `encoded` pictures of the present shard."""
    encoded: int = 0

    def __post_init__(self) -> None:
        torch.set_num_threads(1)  # sums in another order could tip a picture between two codes
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.precision, _ = choose_precision(self.settings.precision, torch.device(self.device))
        self.model = load_tokenizer(self.root, self.vq).to(self.device)

    def __call__(self, name: str) -> Summary:
        """Write the codes of one dataset shard under the same name, and the sums of its latents if they are kept."""
        self.seconds, self.encoded = 0.0, 0
        (table,) = read_shards(self.root.child("dataset"), self.dataset, [name])
        parts = [self._part(name, table, first) for first in range(0, table.num_rows, PART_ROWS)]
        described = table.select(["id", "label", "style", "group"]).combine_chunks()
        codes = pa.concat_tables(parts).combine_chunks()
        for level in codes.column_names:
            described = described.append_column(level, codes[level])
        if self.with_latents:
            write_sums(self.staging, name, codes, self.model.config.code_dims)
        note = mark_finished(self.store, self.staging, name, to_parquet(described), described.num_rows)
        return {**note, "seconds": self.seconds, "encoded": self.encoded, "precision": self.precision}

    def _part(self, name: str, table: pa.Table, first: int) -> pa.Table:
        """The codes of PART_ROWS rows: from an interrupted run, or made now."""
        part = f"part-{name.removesuffix('.parquet')}-{first:09d}.parquet"
        try:
            return pq.read_table(io.BytesIO(self.staging.read_bytes(part)))
        except FileNotFoundError:
            pass
        encoded = table["image"].slice(first, PART_ROWS)
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(content.as_py())).convert("RGB")) for content in encoded])
        columns = {}
        started = time.perf_counter()
        rounds = self.settings.refine_rounds
        found, latents = encode_latents(self.model, pixels, self.device, self.precision, refine_rounds=rounds)
        self.seconds, self.encoded = self.seconds + time.perf_counter() - started, self.encoded + len(pixels)
        for level, codes in enumerate(found):
            flat = pa.array(codes.reshape(-1), pa.int32())
            columns[f"codes_{level}"] = pa.FixedSizeListArray.from_arrays(flat, codes[0].size)
        made = pa.table({**columns, **(latent_columns(latents) if self.with_latents else {})})
        self.staging.write_bytes(part, to_parquet(made))
        return made
