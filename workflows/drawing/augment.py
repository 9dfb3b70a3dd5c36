"""`hvqd augment`: variants of pictures, as a dataset that `hvqd data build` reads.

A variant keeps its picture's coarse codes; of the finer ones a share is drawn anew for the picture's own class, style,
caption and label map, as far as the model was told these. What is drawn follows from the seed, the picture's id and the
variant's number alone.

The folder holds parquet shards, a row a picture, with a picture's variants in its group, so that a split never parts
them; what a source holds out has no variants, so that a model is judged by real pictures. The manifest says what they
were made with and is written last; the same command goes on where it was stopped.

Axes: H x W pixels.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from hvqd_model.editing import renoised
from hvqd_model.prior.conditions import Conditions, known_conditions
from hvqd_model.randomness import derive_key
from infra.errors import InputError
from infra.storage import Store, open_store
from workflows.artifacts import MANIFEST, Manifest, check_files, digest_of, find_manifest, read_manifest, write_manifest
from workflows.config import DataSettings, RunConfig
from workflows.context import Progress
from workflows.data.batches import read_shards, shard_names
from workflows.data.label_maps import fitted_map
from workflows.data.pictures import Rejected, prepare
from workflows.data.reading import read_unit
from workflows.data.shards import STAGING, clear_stale, finished_shards, mark_finished, to_parquet
from workflows.data.sources import Raw, list_units, source_digest
from workflows.data.splits import SPLITS, TRAIN, split_number
from workflows.drawing.bundle import LoadedBundle
from workflows.drawing.editing import Editor, kept_levels
from workflows.drawing.generate import Pictures
from workflows.drawing.sheets import column_sheet, to_png

KIND = "augmentation"
_DATASET = "dataset"
PART_PICTURES = 64
"""Originals that an interruption can cost."""
_SHOWN = 6
_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("id", "class", "group", "style", "caption", "split", "license")),
        ("image", pa.binary()),
        ("seg", pa.binary()),
    ]
)


@dataclass(frozen=True)
class AugmentRequest:
    """What is asked for."""

    source: str
    """`dataset`, the root's own, a split of it, or what `hvqd data build` takes."""
    out: str
    """Folder or URL of the new dataset."""
    count: int
    """Variants of each picture."""
    strength: float
    """Share of the finer codes that is drawn anew."""
    keep: int | None
    """Coarse levels that stay as they are; None for all but the finest."""
    originals: bool
    """Whether the pictures themselves are in the new dataset, too."""
    model: str | None
    """Model folder or `models:/name@alias`; None takes the root's champion."""
    seed: int
    sheet: Path | None = None
    """PNG file that shows the first pictures and their variants."""


@dataclass(frozen=True, eq=False)
class _Original:
    """A picture of the source at the model's size."""

    raw: Raw
    pixels: Pictures
    """(H, W, 3)"""
    png: bytes
    seg: bytes | None


@dataclass(frozen=True)
class _Part:
    """Some pictures of the source, read when it is their turn."""

    pictures: int
    read: Callable[[], Iterator[Raw]]


@dataclass
class _Counts:
    """What has been written, for the manifest."""

    originals: int = 0
    variants: int = 0
    unchanged: int = 0
    """Variants whose codes were drawn as they had been, or as an earlier variant's; left out."""
    rejected: int = 0
    unknown_classes: int = 0
    """Pictures of a class that the model was not trained with; none is asked for."""

    def add(self, other: dict[str, int]) -> None:
        """Count a part."""
        for name, value in other.items():
            setattr(self, name, getattr(self, name) + value)


def augment(request: AugmentRequest, config: RunConfig, progress: Progress) -> dict[str, Any]:
    """Write the dataset.

    Returns:
        JSON values: folder, digest, facts (how many originals, variants, …), sheet where one was asked for.

    Raises:
        InputError: no such source, a strength, level or count out of range, a folder that holds something else.
    """
    if not 0 < request.strength <= 1:
        raise InputError(
            f"--strength must be above 0 and at most 1: {request.strength:g}\n"
            "hint: 0.3 to 0.7 changes some of a picture"
        )
    store = open_store(request.out)
    _check_out(request, store)
    editor = Editor.open(request, config)
    request = replace(request, keep=kept_levels(request.keep, editor.bundle.vq.config.levels))
    settings = config.data.model_copy(update={"image_size": editor.bundle.vq.config.image_size})
    source = _source(request.source, config, settings)
    asked = _as_asked(request, source.digest, editor, settings)
    digest = digest_of(asked)
    present = find_manifest(store)
    if present is not None and present.request == digest:
        check_files(store, present)
        manifest = present
    else:
        manifest = _write(request, editor, source, settings, store, digest, asked, progress)
    answer: dict[str, Any] = {"folder": store.url, "digest": manifest.digest, "facts": dict(manifest.facts)}
    if request.sheet is not None:
        answer["sheet"] = _write_sheet(request, editor, source, settings)
    return answer


def _as_asked(request: AugmentRequest, source: str, editor: Editor, settings: DataSettings) -> dict[str, Any]:
    """All that the result depends on, as it stands in the manifest."""
    return {
        "model": editor.bundle.digest,
        "source": source,
        "variants": request.count,
        "strength": request.strength,
        "keep": request.keep,
        "originals": request.originals,
        "seed": request.seed,
        "sampling": editor.sampling.of_noise(editor.bundle.prior.config.noise),
        "pictures": settings.model_dump(mode="json", include={"image_size", "resize", "background", "limit"}),
    }


def _check_out(request: AugmentRequest, store: Store) -> None:
    """Refuse to write where other things are: what an earlier request left is taken down."""
    names = store.files()
    foreign = [name for name in names if name != MANIFEST and not name.startswith(("part-", f"{STAGING}/"))]
    manifest = find_manifest(store) if MANIFEST in names else None
    if foreign or (manifest is not None and manifest.kind != KIND):
        raise InputError(
            f"--out must be a new folder, or one that `hvqd augment` has made: {request.out} holds "
            f"{foreign[0] if foreign else f'an artifact of kind {manifest.kind}'}\n"  # type: ignore[union-attr]
            "hint: name a folder that does not exist yet"
        )
    if "://" in request.source or not Path(request.source).is_dir() or not store.is_local:
        return
    if store.path.resolve().is_relative_to(Path(request.source).resolve()):
        raise InputError(
            f"--out must not lie in the source, which it would change: {request.out}\nhint: name a folder beside it"
        )


# ---- the source ----


@dataclass(frozen=True)
class _Source:
    """The pictures, in a fixed order."""

    parts: list[_Part]
    digest: str
    """Of the listing, or of the dataset and the split."""


def _source(name: str, config: RunConfig, settings: DataSettings) -> _Source:
    if name in (_DATASET, *SPLITS):
        return _of_dataset(SPLITS if name == _DATASET else (name,), open_store(config.root).child("dataset"))
    units = list(list_units(settings.model_copy(update={"source": name})))
    parts = []
    for unit in units:
        for first in range(0, len(unit.members), PART_PICTURES):
            some = replace(unit, members=unit.members[first : first + PART_PICTURES])
            parts.append(_Part(len(some.members), lambda some=some: read_unit(some)))  # type: ignore[misc]
    return _Source(parts, source_digest(unit.content_digest for unit in units))


def _of_dataset(splits: Sequence[str], store: Store) -> _Source:
    manifest = read_manifest(store, "hvqd data build")
    parts = []
    for split in splits:
        for name in shard_names(manifest, split):
            rows = int(next(read_shards(store, manifest, [name])).num_rows)
            for first in range(0, rows, PART_PICTURES):

                def read(name: str = name, first: int = first, split: str = split) -> Iterator[Raw]:
                    (table,) = read_shards(store, manifest, [name])
                    return _rows(table.slice(first, PART_PICTURES), manifest, split)

                parts.append(_Part(min(PART_PICTURES, rows - first), read))
    if not parts:
        raise InputError(f"{store.url} has no pictures in {', '.join(splits)}\nhint: name another split")
    return _Source(parts, f"{manifest.digest}/{','.join(splits)}")


def _rows(table: pa.Table, manifest: Manifest, split: str) -> Iterator[Raw]:
    classes = manifest.facts["classes"]
    for row in table.to_pylist():
        yield Raw(
            id=row["id"],
            content=row["image"],
            label="" if row["label"] < 0 else classes[row["label"]],
            group=row["group"],
            style=row["style"] or "",
            caption=row["caption"] or "",
            split=split,
            license=row["license"] or "",
            seg=row["seg"],
        )


def _prepared(part: _Part, settings: DataSettings) -> tuple[list[_Original], int]:
    """The part's pictures at the model's size, and how many could not be read."""
    found, rejected = [], 0
    for raw in part.read():
        try:
            picture = prepare(raw.content, raw.seg, settings)
        except Rejected:
            rejected += 1
            continue
        pixels = np.asarray(Image.open(io.BytesIO(picture.png)))
        found.append(_Original(raw, pixels, picture.png, picture.seg_png))
    return found, rejected


# ---- the variants ----


def _varied(originals: Sequence[_Original], request: AugmentRequest, editor: Editor) -> list[list[Pictures | None]]:
    """n variants (H, W, 3) of each original; None for one whose codes are the original's or an earlier variant's."""
    codes = editor.codes(np.stack([original.pixels for original in originals]))
    count = request.count
    repeated = tuple(level.repeat_interleave(count, 0) for level in codes)
    seeds = [
        derive_key("augment", request.seed, original.raw.id, variant)
        for original in originals
        for variant in range(count)
    ]
    given = told(editor.bundle, originals).each(lambda part: part.repeat_interleave(count, 0))
    assert request.keep is not None  # since `augment`
    unknown = renoised(repeated, torch.tensor(seeds, dtype=torch.int64), request.strength, request.keep)
    drawn = editor.drawer(given, seeds)(repeated, unknown)
    pictures = editor.pictures(drawn)
    flat = torch.cat([level.flatten(1) for level in drawn], 1)
    before = torch.cat([level.flatten(1) for level in codes], 1)
    found: list[list[Pictures | None]] = [[] for _ in originals]
    for place in range(len(flat)):
        is_new = not bool((flat[place] == _seen(flat, before, place, count)).all(1).any())
        found[place // count].append(pictures[place] if is_new else None)
    return found


def _seen(flat: Tensor, before: Tensor, place: int, count: int) -> Tensor:
    """The codes of a variant's original and of its earlier variants."""
    original, variant = divmod(place, count)
    return torch.cat([before[original : original + 1], flat[place - variant : place]])


def told(bundle: LoadedBundle, originals: Sequence[_Original]) -> Conditions:
    """What the model is told of pictures: what it was trained with and they have, and nothing else."""
    config, known = bundle.prior.config, known_conditions(bundle.prior.config)
    labels = torch.tensor([_number(original.raw.label, config.classes) for original in originals])
    styles = texts = maps = None
    if "style" in known:
        styles = torch.tensor([_number(original.raw.style, config.styles) for original in originals])
    if "text" in known and bundle.text is not None:
        captions = [original.raw.caption for original in originals]
        vectors = np.asarray(bundle.text.encoder(captions), dtype=np.float32)
        texts = torch.from_numpy(vectors * np.array([[bool(caption.strip())] for caption in captions]))
    if "map" in known:
        maps = torch.from_numpy(np.stack([_map(original, config) for original in originals]))
    return Conditions(labels, styles, texts, maps)


def _number(name: str, names: Sequence[str]) -> int:
    return names.index(name) if name in names else -1


def _map(original: _Original, config: Any) -> np.ndarray[Any, Any]:
    found = fitted_map(original.seg, config.map_size)
    if found.max() >= config.map_labels:
        raise InputError(
            f"the label map of {original.raw.id} must have labels 0 to {config.map_labels - 1}: {found.max()}\n"
            "hint: use the labels of the training maps"
        )
    return found


# ---- what is written ----


def _write(
    request: AugmentRequest,
    editor: Editor,
    source: _Source,
    settings: DataSettings,
    store: Store,
    digest: str,
    asked: dict[str, Any],
    progress: Progress,
) -> Manifest:
    staging = store.child(STAGING, digest[:16])
    entries = finished_shards(store, staging)
    clear_stale(store, staging, finished=entries)
    counts, done, total = _Counts(), 0, sum(part.pictures for part in source.parts)
    for number, part in enumerate(source.parts):
        name, note = f"part-{number:05d}.parquet", f"counts-{number:05d}.json"
        if name not in entries:
            originals, rejected = _prepared(part, settings)
            rows, found = _part_rows(originals, request, editor)
            staging.write_json(note, {**found, "rejected": rejected})
            content = to_parquet(pa.Table.from_pylist(rows, _SCHEMA))
            mark_finished(store, staging, name, content, len(rows))
        counts.add(staging.read_json(note))
        done += part.pictures
        progress.update(done, total, "pictures")
    if counts.originals == 0:
        raise InputError(
            f"no picture of {request.source} can be read ({counts.rejected} were rejected)\n"
            "hint: `hvqd data build` on it says why"
        )
    manifest = write_manifest(
        store,
        KIND,
        digest,
        {"model": editor.bundle.digest},
        {"asked": asked, **vars(counts), "columns": {"class_column": "class", "group_column": "group"}},
        {"source": request.source, "model": request.model or "champion"},
        known=finished_shards(store, staging),
        leave_out=(f"{STAGING}/",),
    )
    store.child(STAGING).delete()
    return manifest


def _part_rows(
    originals: list[_Original], request: AugmentRequest, editor: Editor
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The rows of some originals, each followed by its variants, and their numbers."""
    to_vary = [original for original in originals if request.source in SPLITS or not _is_held_out(original)]
    varied = iter(_varied(to_vary, request, editor) if to_vary else ())
    has_map = "map" in known_conditions(editor.bundle.prior.config)
    rows, new = [], 0
    for original in originals:
        row = _row(original)
        if request.originals:
            rows.append({**row, "image": original.png, "seg": original.seg})
        for number, picture in enumerate(next(varied) if original in to_vary else ()):
            if picture is not None:
                png = to_png(Image.fromarray(picture))
                # A map that the model was not told about need not fit what it has drawn.
                own = {"id": f"{original.raw.id}#{number}", "image": png, "seg": original.seg if has_map else None}
                rows.append({**row, **own})
                new += 1
    known = ("", *editor.bundle.classes)
    return rows, {
        "originals": len(originals),
        "variants": new,
        "unchanged": len(to_vary) * request.count - new,
        "unknown_classes": sum(original.raw.label not in known for original in to_vary),
    }


def _is_held_out(original: _Original) -> bool:
    return split_number(original.raw.split) > TRAIN


def _row(original: _Original) -> dict[str, Any]:
    raw = original.raw
    return {
        "id": raw.id,
        "class": raw.label,
        "group": raw.group or raw.id,
        "style": raw.style,
        "caption": raw.caption,
        "split": raw.split,
        "license": raw.license,
    }


def _write_sheet(request: AugmentRequest, editor: Editor, source: _Source, settings: DataSettings) -> str:
    """The first pictures, their reconstructions and their variants, side by side."""
    from workflows.drawing.reconstruct import write_picture

    assert request.sheet is not None
    originals = _prepared(source.parts[0], settings)[0][:_SHOWN]
    real = np.stack([original.pixels for original in originals])
    blank = np.full_like(real[0], 255)
    variants = [[blank if one is None else one for one in row] for row in _varied(originals, request, editor)]
    columns = [("picture", "", real), ("codes", "", editor.pictures(editor.codes(real)))]
    columns += [
        (f"variant {number + 1}", "", np.stack([row[number] for row in variants])) for number in range(request.count)
    ]
    return write_picture(request.sheet, to_png(column_sheet(columns)))
