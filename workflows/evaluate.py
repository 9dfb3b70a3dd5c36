"""Judging a tokenizer and a prior on the test split: figures with their protocol, floors and intervals, and pictures.

What is slow (drawn pictures, features) is kept under `evaluation/parts/` while the step is unfinished, keyed by the
request, so that an interrupted evaluation goes on; the parts are no piece of the artifact.

Axes: N test pictures, n pictures of a set, D features.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hvqd_model import metrics
from hvqd_model.randomness import derive_key
from infra.models import Registry
from infra.tracking import Tracker
from workflows.artifacts import Manifest, check_files, digest_of, find_manifest, read_manifest, write_manifest
from workflows.config import EvaluationSettings
from workflows.context import Context
from workflows.evaluation_figures import (
    Figure,
    PictureSet,
    Resampling,
    class_figures,
    code_figures,
    nearest_figures,
    reconstruction_figures,
    rounded,
    set_figures,
)
from workflows.evaluation_grids import Grid, draw_grids
from workflows.evaluation_sets import (
    MOST_TRAIN,
    PARTS_FOLDER,
    Parts,
    Subject,
    drawn,
    floor,
    gather,
    gather_version,
    marginals,
    untrained,
)
from workflows.generate import decode_codes, padded
from workflows.judge import ClassJudge
from workflows.protocol import Protocol
from workflows.registry import find_version, intervals_of, intervals_tag, judged_tag, load_version, parts_tag
from workflows.requests import PARENTS, request_of

COMMANDS = {
    "dataset": "hvqd data build",
    "vq": "hvqd train vq",
    "codes": "hvqd encode",
    "prior": "hvqd train prior",
}
_BITS_DRAWS = 8
_RIDGE = 0.01


def evaluate(context: Context) -> Manifest:
    """Make `evaluation/`: metrics.json and picture grids.

    Raises:
        InputError: a parent is missing or damaged (named, with how to make it).
    """
    root, store = context.root, context.root.child("evaluation")
    parents = {kind: read_manifest(root.child(kind), COMMANDS[kind]) for kind in PARENTS["evaluation"]}
    request = request_of("evaluation", context.config, parents)
    present = find_manifest(store)
    if present is not None and present.request == request:
        check_files(store, present)
        return present
    store.delete("manifest.json")  # what follows overwrites its files
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hvqd-evaluation-") as folder:
        subject = gather(context, parents, Parts(store, request), Path(folder))
        figures, pictures, parts = _judge(subject)
        protocol = _protocol(subject, parents["dataset"].digest)
        store.write_json("metrics.json", _content(figures, pictures, protocol))
        store.write_json("code_counts.json", [count.tolist() for count in subject.counts])
        for name, grid in pictures.items():
            store.write_bytes(name, grid.png)
            if context.run is not None:
                (Path(folder) / name).write_bytes(grid.png)
                context.run.log_file(Path(folder) / name, "evaluation")
    values = {name: figure.json["value"] for name, figure in sorted(figures.items())}
    if context.run is not None:
        context.run.log_metrics(values, step=0)
    manifest = write_manifest(
        store,
        "evaluation",
        request,
        {kind: parent.digest for kind, parent in parents.items()},
        facts={"figures": values, "protocol_digest": digest_of(protocol), "kid_parts": parts},
        provenance={
            "seconds": round(time.monotonic() - started, 1),
            "workers": 1,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        leave_out=(f"{PARTS_FOLDER}/",),
    )
    store.delete(PARTS_FOLDER)
    return manifest


@dataclass(frozen=True)
class VersionFigures:
    """What a registered version shows when it is judged anew."""

    version: str
    protocol_digest: str
    values: dict[str, float]
    folder: str
    """URL of the folder with metrics.json and the pictures."""


def evaluate_version(context: Context, tracker: Tracker, name: str, pinned: Protocol | None = None) -> VersionFigures:
    """Judge a registered version by this configuration's protocol, on this root's pictures, and tell the registry.

    Promotion compares two versions only when both were judged alike: this is how an older one catches up.

    Args:
        name: its number or an alias.
        pinned: the protocol of a file, whose settings the configuration has; anything else is refused.

    Raises:
        InputError: no such version, or one that this root's dataset does not fit; not the protocol that is asked for.
    """
    registry, model = Registry(tracker.uri), context.config.tracking.model_name
    number = find_version(tracker, model, name)
    dataset = read_manifest(context.root.child("dataset"), COMMANDS["dataset"])
    if pinned is not None:
        pinned.check_dataset(dataset, context.root.child("dataset").url)
    bundle = load_version(tracker, model, f"models:/{model}/{number}")
    key = digest_of([bundle.digest, dataset.digest, *_settings(context)])
    store = context.root.child("evaluations", f"{model}-version-{number}-{key[:12]}")
    subject = gather_version(context, dataset, bundle, Parts(store, key))
    protocol = _protocol(subject, dataset.digest)
    if pinned is not None:
        pinned.check_digest(digest_of(protocol), subject.features.weights_digest)
    figures, pictures, parts = _judge(subject)
    for picture, grid in pictures.items():
        store.write_bytes(picture, grid.png)
    store.write_json("metrics.json", _content(figures, pictures, protocol))
    store.delete(PARTS_FOLDER)
    values = {name: figure.json["value"] for name, figure in sorted(figures.items())}
    digest = digest_of(protocol)
    registry.set_tag(model, number, judged_tag(digest), json.dumps(values, sort_keys=True))
    registry.set_tag(model, number, parts_tag(digest), json.dumps(parts))
    spans = intervals_of({name: figure.json for name, figure in figures.items()})
    registry.set_tag(model, number, intervals_tag(digest), json.dumps(spans, sort_keys=True))
    return VersionFigures(number, digest, values, store.url)


def _settings(context: Context) -> list[object]:
    config = context.config
    return [config.evaluation.model_dump(mode="json"), config.sampling.model_dump(mode="json")]


def _content(
    figures: Mapping[str, Figure], pictures: Mapping[str, Grid], protocol: Mapping[str, Any]
) -> dict[str, Any]:
    """metrics.json."""
    return {
        "protocol": {**protocol, "n": {name: figure.n for name, figure in sorted(figures.items())}},
        "figures": {name: figure.json for name, figure in sorted(figures.items())},
        "grids": {name: grid.layout for name, grid in pictures.items()},
    }


def _judge(subject: Subject) -> tuple[dict[str, Figure], Mapping[str, Grid], dict[str, Any]]:
    """Figures, pictures, and the parts of the samples' KID, by which another version's can be compared with it."""
    settings, train, test = subject.context.config.evaluation, subject.train, subject.test
    resampling = Resampling(settings.resamples, settings.seed)
    sampling = subject.context.config.sampling
    # Fresh weights predict the same with and without a class: guidance would cost a second pass for nothing.
    unguided = sampling.model_copy(update={"guidance": 1.0})
    batch = sampling.batch
    prefixes = [decode_codes(subject.vq, test.codes[: level + 1], batch) for level in range(len(test.codes))]
    figures = reconstruction_figures(test.pictures, prefixes, test.groups, resampling)
    grids = subject.prior.config.grids
    figures |= code_figures(subject.counts, subject.encoded, _bits(subject), grids, test.groups, resampling)

    rows = np.arange(min(len(train.ids), MOST_TRAIN)) * len(train.ids) // min(len(train.ids), MOST_TRAIN)
    train_features = subject.features_of("train", train.pictures[rows])
    real = PictureSet(test.pictures, subject.features_of("test", test.pictures), test.labels, test.groups)
    reconstructed = subject.features_of("reconstructions", prefixes[-1])
    sets = {
        "reconstructions": PictureSet(prefixes[-1], reconstructed, test.labels, test.groups),
        "samples": drawn(subject, "samples", subject.prior, settings.samples, sampling),
        "marginals": marginals(subject, settings.baseline_samples),
        "untrained": drawn(subject, "untrained", untrained(subject), settings.baseline_samples, unguided),
    }
    subject.context.progress.say("comparing with the test pictures")
    for name, found in {"real": floor(subject, rows, train_features, settings.samples), **sets}.items():
        figures |= set_figures(name, real, found, resampling)
    labels = np.asarray(train.labels[rows], dtype=np.int64)
    classes = subject.prior.config.classes
    if classes and (labels >= 0).any():
        judge = ClassJudge(train_features, labels, len(classes), _RIDGE)
        majority = int(np.bincount(labels[labels >= 0]).argmax())
        asked = {name: sets[name] for name in ("reconstructions", "samples", "marginals")}
        figures |= class_figures(judge, {"real": real, **asked}, majority, resampling)
    compared = {"samples": sets["samples"], "heldout": real, "reconstructions": sets["reconstructions"]}
    distances, neighbours = nearest_figures(train_features, compared, resampling)
    grids_drawn = draw_grids(test.pictures, prefixes, sets, classes, train.pictures, rows, neighbours["samples"])
    parts = metrics.kid_parts(torch.from_numpy(real.features), torch.from_numpy(sets["samples"].features), real.groups)
    return figures | distances, grids_drawn, _rounded(asdict(parts))


def _rounded(parts: dict[str, Any]) -> dict[str, Any]:
    """Six significant digits, as all figures have."""

    def short(value: Any) -> Any:
        if isinstance(value, tuple):
            return [short(item) for item in value]
        return rounded(value) if isinstance(value, float) else value

    return {name: short(value) for name, value in parts.items()}


def _bits(subject: Subject) -> list[NDArray[np.float64]]:
    """(N,) of each level: the prior's bound on the code length of the test pictures."""
    test, config = subject.test, subject.context.config
    batch, count = config.sampling.batch, len(subject.test.ids)
    keys = torch.tensor([derive_key("evaluation bits", config.evaluation.seed, str(name)) for name in test.ids])
    labels = torch.from_numpy(np.array(test.labels, dtype=np.int64))
    if not subject.prior.config.classes:
        labels = torch.full_like(labels, -1)

    def make() -> NDArray[np.float64]:
        found = []
        for start in range(0, count, batch):
            end = min(start + batch, count)
            codes = [padded(torch.from_numpy(level[start:end].astype(np.int64)), batch) for level in subject.test.codes]
            bound = subject.prior.bits(
                codes, padded(labels[start:end], batch), padded(keys[start:end], batch), _BITS_DRAWS
            )
            found.append(torch.stack(bound)[:, : end - start].numpy())
            subject.say("test pictures, bits")(end, count)
        return np.concatenate(found, axis=1)

    return list(subject.parts.array("bits", make))


def _protocol(subject: Subject, dataset: str) -> dict[str, Any]:
    """How the figures are made: versions are comparable exactly when this is equal."""
    config = subject.context.config
    settings, usual = config.evaluation, EvaluationSettings()
    # Numbers were no part of the description at first: where they are the usual ones it is what it was.
    drawn = f"{settings.samples} samples, {settings.baseline_samples} of each baseline"
    is_usual = (settings.samples, settings.baseline_samples) == (usual.samples, usual.baseline_samples)
    return {
        **({} if is_usual else {"drawn": drawn}),
        "dataset": dataset,
        "split": "test",
        "reference": f"{len(subject.test.ids)} test pictures of {len(np.unique(subject.test.groups))} concepts",
        "pictures": "8-bit RGB on the dataset's background, at the size of the dataset",
        "extractor": subject.features.protocol,
        "intervals": f"95 %, bootstrap over concepts, {config.evaluation.resamples} resamples; drawn pictures are a "
        "concept each; none for FID, whose bias grows in resamples, and for figures of the whole codebook",
        "seed": config.evaluation.seed,
        "sampling": config.sampling.model_dump(mode="json"),
        "labels": "asked classes are drawn as often as the training pictures have them",
        "kid": "unbiased, kernel (x.y / 1280 + 1)^3, over all pairs",
        "fid": "FID (EfficientNet-Lite0), never comparable with an Inception FID; biased upwards for few pictures",
        "neighbours": "recall, density, coverage: 5 nearest neighbours, at most as many pictures as the reference has",
        "real": "training pictures of whole concepts against the test pictures; for class accuracy, the test pictures",
        "marginals": "each position's code comes from a training picture of its own, independent of other positions",
        "untrained": "a prior with fresh weights, sampled alike but for guidance, which changes nothing there",
        "judge": "multinomial logistic regression on standardized features of "
        f"{min(len(subject.train.ids), MOST_TRAIN)} real training pictures, ridge {_RIDGE}, L-BFGS",
        "class_shuffled": "the accuracy that the same pictures would have with their asked classes shuffled",
        "class_majority": "share, among the test pictures, of the largest class of the training pictures",
        "nearest": "median Euclidean feature distance to the nearest training picture",
        "usage": "usage and perplexity over the codes of all splits",
        "bits": f"upper bound, {_BITS_DRAWS} noise levels a picture; bits_l a code, bits_total a picture",
    }
