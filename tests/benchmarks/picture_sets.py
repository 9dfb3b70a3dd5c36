"""The pictures that benchmarks train on and judge by: the bundled emoji, and photographs from a parquet file.

Pictures go through the product's own preparation (`workflows.data.pictures`) and are kept decoded in the cache.
"""

from __future__ import annotations

import hashlib
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from workflows.config import DataSettings
from workflows.data.batches import ImageTable, cache_folder
from workflows.data.pictures import prepare
from workflows.data.sources import BUNDLED, EMOJI
from workflows.data.splits import SPLITS

Array = np.ndarray[Any, Any]

FOLDS = 3


@dataclass(frozen=True)
class PictureSet:
    """Pictures to train on, and others to judge by; no group is in both."""

    train: ImageTable
    held_out: ImageTable


def emoji(side: int) -> PictureSet:
    """The bundled emoji at (side, side) pixels; held out are the validation and the test split."""
    pictures, split = _emoji(side)
    trains = split == "train"
    return PictureSet(subset(pictures, trains), subset(pictures, ~trains))


def emoji_splits(side: int) -> dict[str, ImageTable]:
    """The bundled emoji at (side, side) pixels, by split: train, val and test."""
    pictures, split = _emoji(side)
    return {name: subset(pictures, split == name) for name in SPLITS}


def emoji_classes() -> tuple[str, ...]:
    """The names of the classes, in the order of their numbers."""
    return tuple(np.unique(_column(BUNDLED, str(EMOJI.label))).tolist())


def _emoji(side: int) -> tuple[ImageTable, Array]:
    """All pictures, and the split of each."""
    columns = [EMOJI.split, EMOJI.group, EMOJI.label]
    split, groups, labels = (_column(BUNDLED, str(name)) for name in columns)
    return _table(BUNDLED, side, groups, labels), split


def photographs(path: Path, side: int, fold: int) -> PictureSet:
    """Crops of photographs at (side, side) pixels, from a parquet file with the columns `image` and `photo`.

    A photograph's crops stay together; every photograph is held out in one of the FOLDS folds.
    """
    photos = _column(path, "photo")
    pictures = _table(path, side, photos, photos)
    held_out = folds(photos) == fold % FOLDS
    return PictureSet(subset(pictures, ~held_out), subset(pictures, held_out))


def folds(groups: Array) -> Array:
    """(N,) numbers of FOLDS folds: groups stay whole, and folds hold as many groups as each other, give or take one."""
    names = np.unique(groups)
    order = np.argsort([hashlib.sha256(str(name).encode()).hexdigest() for name in names])
    fold_of = np.empty(len(names), dtype=np.int64)
    fold_of[order] = np.arange(len(names)) % FOLDS
    return np.asarray(fold_of[np.searchsorted(names, groups)])


def subset(table: ImageTable, rows: Array) -> ImageTable:
    """The rows of a table, by a mask or by numbers."""
    return ImageTable(*(getattr(table, name)[rows] for name in table.__dataclass_fields__))


def _column(path: Path, name: str) -> Array:
    """(N,) strings."""
    return np.asarray(pq.read_table(path, columns=[name])[name].to_pylist(), dtype=str)


def _table(path: Path, side: int, groups: Array, labels: Array) -> ImageTable:
    names = np.arange(len(groups)).astype(str)
    numbers = np.unique(labels, return_inverse=True)[1].astype(np.int64)
    return ImageTable(names, numbers, names, groups, names, _pixels(path, side))


def _pixels(path: Path, side: int) -> Array:
    """(N, side, side, 3) uint8, from the cache when they have been decoded before."""
    kept = cache_folder() / "benchmarks" / f"{path.stem}-{path.stat().st_size}-{side}.npy"
    if not kept.exists():
        settings = DataSettings(image_size=(side, side))
        encoded = pq.read_table(path, columns=["image"])["image"].to_pylist()
        prepared = (prepare(content, None, settings).png for content in encoded)
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(png))) for png in prepared])
        kept.parent.mkdir(parents=True, exist_ok=True)
        scratch = kept.with_suffix(f".{os.getpid()}.npy")
        np.save(scratch, pixels)
        scratch.replace(kept)
    found: Array = np.load(kept)
    return found
