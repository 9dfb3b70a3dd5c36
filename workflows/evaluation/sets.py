"""The sets of pictures that test pictures are compared with: drawn ones, baselines, and the floor.

Axes: n pictures of a set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from hvqd_model import HierarchicalPrior
from hvqd_model.randomness import derive_key, uniform
from workflows.config import SamplingSettings
from workflows.drawing.draw_apart import batches_apart, in_this_process
from workflows.drawing.generate import Pictures, as_asked, decode_codes, draw_images
from workflows.evaluation.figures import PictureSet
from workflows.evaluation.subject import Subject

_CHUNK = 250
"""Pictures that an interruption costs, about."""


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
