"""What an evaluation judges, and by what: the models, the pictures of every split, and what is already made.

Axes: N test pictures, n pictures of a set, D features.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvqd_model import HierarchicalPrior, HierarchicalVQ, load_model
from infra.errors import InputError
from infra.storage import Store
from workflows.artifacts import Manifest, check_files
from workflows.config import REFINED
from workflows.context import Context
from workflows.data.batches import CodeTable, ImageTable
from workflows.data.splits import SPLITS
from workflows.drawing.bundle import LoadedBundle
from workflows.drawing.generate import Pictures
from workflows.encode import encode_batches
from workflows.evaluation.features import FeatureExtractor

PARTS_FOLDER = "parts"
# Larger splits are judged by this many of their pictures, evenly spread: kernels and distances grow with the square.
_MOST_TEST = 5_000
MOST_TRAIN = 20_000


class Parts:
    """Arrays that an unfinished evaluation has already made."""

    def __init__(self, store: Store, request: str) -> None:
        self._store = store.child(PARTS_FOLDER, request[:16])

    def array(self, name: str, make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """The array of this name, made now unless it is there."""
        found = self.find(name)
        return self.keep(name, make()) if found is None else found

    def find(self, name: str) -> NDArray[Any] | None:
        """The array of this name, if it is there and whole."""
        try:
            found: NDArray[Any] = np.load(io.BytesIO(self._store.read_bytes(f"{name}.npy")), allow_pickle=False)
        except (FileNotFoundError, ValueError, EOFError):
            return None
        return found

    def folder(self, name: str) -> Store:
        """For what is no array."""
        return self._store.child(name)

    def keep(self, name: str, made: NDArray[Any]) -> NDArray[Any]:
        """The array, which is there from now on."""
        content = io.BytesIO()
        np.save(content, made, allow_pickle=False)
        self._store.write_bytes(f"{name}.npy", content.getvalue())
        return made


@dataclass(frozen=True)
class Split:
    """One split's pictures and codes, a row each."""

    ids: NDArray[Any]
    pictures: Pictures
    labels: NDArray[np.int64]
    groups: NDArray[Any]
    codes: tuple[NDArray[np.int64], ...]


@dataclass(frozen=True)
class Subject:
    """What is judged, and by what."""

    context: Context
    vq: HierarchicalVQ
    prior: HierarchicalPrior
    train: Split
    test: Split
    counts: tuple[NDArray[np.int64], ...]
    """(K,) of each level over every split."""
    encoded: int
    """Pictures of every split."""
    features: FeatureExtractor
    parts: Parts
    refine_rounds: int
    """Of the codes that the prior learned, and so of those that it is judged by."""

    def say(self, unit: str) -> Callable[[int, int], None]:
        """A callback that reports (done, total) to the user."""
        return lambda done, total: self.context.progress.update(done, total, unit)

    def features_of(self, name: str, pictures: Pictures) -> NDArray[np.float32]:
        """(n, D) features, kept as a part."""
        return self.parts.array(f"features-{name}", lambda: self.features(pictures, self.say(f"features of {name}")))


def gather(context: Context, parents: Mapping[str, Manifest], parts: Parts, scratch: Path) -> Subject:
    models = []
    for kind in ("vq", "prior"):
        store = context.root.child(kind)
        check_files(store, parents[kind], deep=True)
        models.append(load_model(store.child("model").download_folder(scratch / kind)))
    vq, prior = models
    if not isinstance(vq, HierarchicalVQ) or not isinstance(prior, HierarchicalPrior):
        raise InputError(
            f"vq/model and prior/model must hold a tokenizer and a prior: "
            f"{type(vq).__name__} and {type(prior).__name__}\nhint: train both again"
        )
    splits = {name: _read_split(context.root, parents, name) for name in SPLITS}
    return _subject(context, vq, prior, splits, parts, int(parents["codes"].facts.get(REFINED, 0)))


def gather_version(context: Context, dataset: Manifest, bundle: LoadedBundle, parts: Parts) -> Subject:
    """The same for a registered version, on the pictures of this root, encoded as those were that it learned from.

    Raises:
        InputError: the version is for other pictures or classes.
    """
    size, classes = tuple(dataset.facts["image_size"]), tuple(dataset.facts["classes"])
    if bundle.vq.config.image_size != size or bundle.classes not in ((), classes):
        raise InputError(
            f"the version draws pictures of {list(bundle.vq.config.image_size)} of the classes "
            f"{', '.join(bundle.classes) or 'none'}; the dataset has {list(size)} of {', '.join(classes) or 'none'}\n"
            "hint: judge it in a root whose dataset it was made for"
        )
    splits = {name: _encode_split(context, dataset, bundle, name, parts) for name in SPLITS}
    return _subject(context, bundle.vq, bundle.prior, splits, parts, bundle.refine_rounds)


def _encode_split(context: Context, dataset: Manifest, bundle: LoadedBundle, split: str, parts: Parts) -> Split:
    images = ImageTable.open(context.root.child("dataset"), dataset, split)
    shapes = [(len(images.ids), *grid) for grid in bundle.vq.config.grids]

    def make() -> NDArray[np.int32]:
        context.progress.say(f"  encoding the {split} pictures")
        found = encode_batches(bundle.vq, images.images, refine_rounds=bundle.refine_rounds)
        return np.concatenate([level.reshape(len(images.ids), -1) for level in found], axis=1)

    flat = parts.array(f"codes-{split}", make)
    edges = np.cumsum([rows * columns for _, rows, columns in shapes])[:-1]
    codes = [level.reshape(shape) for level, shape in zip(np.split(flat, edges, axis=1), shapes, strict=True)]
    return Split(images.ids, images.images, images.labels, images.groups, tuple(codes))


def _subject(
    context: Context,
    vq: HierarchicalVQ,
    prior: HierarchicalPrior,
    splits: Mapping[str, Split],
    parts: Parts,
    refine_rounds: int,
) -> Subject:
    if len(splits["test"].ids) < 2 or len(splits["train"].ids) < 2:
        raise InputError(
            f"the test and train splits need at least 2 pictures each: {len(splits['test'].ids)} and "
            f"{len(splits['train'].ids)}\nhint: raise data.test_share, or bring more pictures"
        )
    counts = tuple(
        np.sum([np.bincount(split.codes[level].reshape(-1), minlength=size) for split in splits.values()], axis=0)
        for level, size in enumerate(vq.config.codebook_sizes)
    )
    return Subject(
        context=context,
        vq=vq,
        prior=prior,
        train=splits["train"],
        test=_at_most(splits["test"], _MOST_TEST),
        counts=counts,
        encoded=sum(len(split.ids) for split in splits.values()),
        features=FeatureExtractor(context.config.evaluation.feature_size),
        parts=parts,
        refine_rounds=refine_rounds,
    )


def _read_split(root: Store, parents: Mapping[str, Manifest], split: str) -> Split:
    images = ImageTable.open(root.child("dataset"), parents["dataset"], split)
    codes = CodeTable.open(root.child("codes"), parents["codes"], split)
    if not np.array_equal(images.ids, codes.ids):
        raise InputError(
            f"the rows of codes/{split} are not those of dataset/{split}\n"
            "hint: delete the codes' manifest.json and run `hvqd encode` again"
        )
    return Split(images.ids, images.images, images.labels, images.groups, tuple(codes.codes))


def _at_most(split: Split, most: int) -> Split:
    if len(split.ids) <= most:
        return split
    rows = np.arange(most) * len(split.ids) // most
    return Split(
        split.ids[rows],
        split.pictures[rows],
        split.labels[rows],
        split.groups[rows],
        tuple(level[rows] for level in split.codes),
    )
