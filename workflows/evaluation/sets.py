"""What an evaluation judges: the models, the test pictures, and the sets of pictures they are compared with.

Axes: N test pictures, n pictures of a set, D features.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hvqd_model import HierarchicalPrior, HierarchicalVQ, load_model
from hvqd_model.randomness import derive_key, uniform
from infra.errors import InputError
from infra.storage import Store
from workflows.artifacts import Manifest, check_files
from workflows.config import REFINED, SamplingSettings
from workflows.context import Context
from workflows.data.batches import CodeTable, ImageTable
from workflows.data.splits import SPLITS
from workflows.drawing.bundle import LoadedBundle
from workflows.drawing.draw_apart import batches_apart, in_this_process
from workflows.drawing.generate import Pictures, as_asked, decode_codes, draw_images
from workflows.encode import encode_batches
from workflows.evaluation.features import FeatureExtractor
from workflows.evaluation.figures import PictureSet

PARTS_FOLDER = "parts"
# Larger splits are judged by this many of their pictures, evenly spread: kernels and distances grow with the square.
_MOST_TEST = 5_000
MOST_TRAIN = 20_000
_CHUNK = 250


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


def keys_of(count: int, *name: str | int) -> list[int]:
    return [derive_key(*name, index) for index in range(count)]


def _drawn_labels(subject: Subject, count: int) -> NDArray[np.int64]:
    """(count,) classes, as often as the training pictures have them."""
    if not subject.prior.config.classes:
        return np.full(count, -1, dtype=np.int64)
    keys = torch.tensor(keys_of(count, "evaluation label", subject.context.config.evaluation.seed))
    rows = (uniform(keys) * len(subject.train.labels)).long().numpy()
    return np.asarray(np.sort(subject.train.labels)[rows], dtype=np.int64)


def drawn(
    subject: Subject,
    name: str,
    prior: HierarchicalPrior,
    count: int,
    sampling: SamplingSettings,
    *,
    with_classes: bool = True,
) -> PictureSet:
    """Pictures drawn from a prior by the job's processes, chunk by chunk so that an interruption loses little.

    Args:
        with_classes: ask for classes as often as the training pictures have them; else for none.
    """
    seed = subject.context.config.evaluation.seed
    labels = _drawn_labels(subject, count) if with_classes else np.full(count, -1, dtype=np.int64)
    keys = np.array(keys_of(count, "evaluation sample", seed))
    size = sampling.batch * -(-_CHUNK // sampling.batch)
    chunks = {start: subject.parts.find(f"{name}-{start:06d}") for start in range(0, count, size)}
    missing = [start for start, found in chunks.items() if found is None]
    rows = np.concatenate([np.arange(0), *(np.arange(start, min(start + size, count)) for start in missing)])
    waiting = {start: dict[int, Pictures]() for start in missing}
    say, begun = subject.say(f"{name} drawn"), count - len(rows)
    batches = _batches(
        subject, name, prior, keys[rows].tolist(), labels[rows], sampling, lambda done: say(begun + done, count)
    )
    for first, pictures in batches:
        start = int(rows[first]) // size * size
        waiting[start][first] = pictures
        if sum(map(len, waiting[start].values())) == min(size, count - start):
            whole = np.concatenate([found for _, found in sorted(waiting.pop(start).items())])
            chunks[start] = subject.parts.keep(f"{name}-{start:06d}", whole)
    everything: Pictures = np.concatenate([found for found in chunks.values() if found is not None])
    return PictureSet(everything, subject.features_of(name, everything), labels, np.arange(count))


def _batches(
    subject: Subject,
    name: str,
    prior: HierarchicalPrior,
    seeds: Sequence[int],
    labels: NDArray[np.int64],
    sampling: SamplingSettings,
    say: Callable[[int], None],
) -> Iterator[tuple[int, Pictures]]:
    """The first picture's index and the pictures of every batch, in any order, from all processes the job may have.

    Args:
        say: called with the pictures done.
    """
    compute, done = subject.context.config.compute, 0
    if not in_this_process(-(-len(seeds) // sampling.batch), compute):
        asked = as_asked(prior, labels.tolist())
        shared = subject.parts.folder(f"models-{name}")
        for first, pictures in batches_apart(subject.vq, prior, seeds, asked, sampling, compute, shared):
            yield first, pictures
            done += len(pictures)
            say(done)
        return
    for first in range(0, len(seeds), sampling.batch):
        here = slice(first, first + sampling.batch)

        def report(done: int, _: int, first: int = first) -> None:
            say(first + done)

        yield first, draw_images(subject.vq, prior, seeds[here], labels[here].tolist(), sampling, report)


def untrained(subject: Subject) -> HierarchicalPrior:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(subject.context.config.evaluation.seed)
        return HierarchicalPrior(subject.prior.config, subject.vq.codebooks, subject.prior.statistics).eval()


def marginals(subject: Subject, count: int) -> PictureSet:
    """Pictures of codes drawn independently: each position's code comes from a training picture of its own."""
    config = subject.context.config
    keys = torch.tensor(keys_of(count, "evaluation marginals", config.evaluation.seed))
    codes = []
    for level, known in enumerate(subject.train.codes):
        flat = known.reshape(len(known), -1)
        rows = (uniform(keys, (flat.shape[1],), level) * len(flat)).long().numpy()
        codes.append(flat[rows, np.arange(flat.shape[1])].reshape(count, *known.shape[1:]).astype(np.int64))
    pictures = decode_codes(subject.vq, codes, config.sampling.batch)
    labels = _drawn_labels(subject, count)
    return PictureSet(pictures, subject.features_of("marginals", pictures), labels, np.arange(count))


def floor(subject: Subject, rows: NDArray[np.int64], features: NDArray[np.float32], count: int) -> PictureSet:
    """Training pictures of whole concepts: what a perfect generator would be like."""
    train, seed = subject.train, subject.context.config.evaluation.seed
    rank = {group: derive_key("evaluation floor", seed, str(group)) for group in np.unique(train.groups[rows])}
    order = np.argsort(np.array([rank[group] for group in train.groups[rows]]), kind="stable")[:count]
    chosen = rows[order]
    return PictureSet(train.pictures[chosen], features[order], train.labels[chosen], train.groups[chosen])
