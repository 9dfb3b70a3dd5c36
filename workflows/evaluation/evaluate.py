"""Judging a tokenizer and a prior on the test split: figures with their protocol, floors and intervals, and pictures.

What is slow (drawn pictures, features) is kept under `evaluation/parts/` while the step is unfinished, keyed by the
request, so that an interrupted evaluation goes on; the parts are no piece of the artifact.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from infra.models import Registry
from infra.tracking import Tracker
from workflows.artifacts import (
    Manifest,
    check_files,
    check_lineage,
    digest_of,
    find_manifest,
    read_manifest,
    write_manifest,
)
from workflows.config import EvaluationSettings
from workflows.context import Context
from workflows.evaluation.judging import DRAWS, RIDGE, Judged, judge_subject
from workflows.evaluation.novelty import EvaluationAlarm, described
from workflows.evaluation.protocol import Protocol
from workflows.evaluation.subject import MOST_TRAIN, PARTS_FOLDER, Parts, Subject, gather, gather_version
from workflows.release.registry import find_version, intervals_of, intervals_tag, judged_tag, load_version, parts_tag
from workflows.requests import PARENTS, request_of

COMMANDS = {
    "dataset": "hvqd data build",
    "vq": "hvqd train vq",
    "codes": "hvqd encode",
    "prior": "hvqd train prior",
}


def evaluate(context: Context) -> Manifest:
    """Make `evaluation/`: metrics.json and picture grids.

    Raises:
        InputError: a parent is missing or damaged (named, with how to make it).
    """
    root, store = context.root, context.root.child("evaluation")
    parents = {kind: read_manifest(root.child(kind), COMMANDS[kind]) for kind in PARENTS["evaluation"]}
    check_lineage(parents, COMMANDS, of=("codes", "prior"))
    request = request_of("evaluation", context.config, parents)
    present = find_manifest(store)
    if present is not None and present.request == request:
        check_files(store, present)
        return present
    store.delete("manifest.json")  # what follows overwrites its files
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hvqd-evaluation-") as folder:
        subject = gather(context, parents, Parts(store, request), Path(folder))
        judged = judge_subject(subject)
        protocol = _protocol(subject, parents["dataset"].digest)
        store.write_json("metrics.json", _content(judged, protocol))
        store.write_json("code_counts.json", [count.tolist() for count in subject.counts])
        for name, grid in judged.pictures.items():
            store.write_bytes(name, grid.png)
            if context.run is not None:
                (Path(folder) / name).write_bytes(grid.png)
                context.run.log_file(Path(folder) / name, "evaluation")
    _raise_alarms(context, judged.alarms)
    values = judged.values
    if context.run is not None:
        context.run.log_metrics(values | judged.spans_of_bits, step=0)
    manifest = write_manifest(
        store,
        "evaluation",
        request,
        {kind: parent.digest for kind, parent in parents.items()},
        facts={"figures": values, "protocol_digest": digest_of(protocol), "kid_parts": judged.kid_parts},
        provenance={
            "seconds": round(time.monotonic() - started, 1),
            "workers": context.config.compute.most_workers,
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
    config = context.config
    registry, model = Registry(tracker.uri), config.tracking.model_name
    number = find_version(tracker, model, name)
    dataset = read_manifest(context.root.child("dataset"), COMMANDS["dataset"])
    if pinned is not None:
        pinned.check_dataset(dataset, context.root.child("dataset").url)
    bundle = load_version(tracker, model, f"models:/{model}/{number}")
    sampling = config.sampling.of_noise(config.prior.model.noise)
    key = digest_of([bundle.digest, dataset.digest, config.evaluation.model_dump(mode="json"), sampling])
    store = context.root.child("evaluations", f"{model}-version-{number}-{key[:12]}")
    subject = gather_version(context, dataset, bundle, Parts(store, key))
    protocol = _protocol(subject, dataset.digest)
    if pinned is not None:
        pinned.check_digest(digest_of(protocol), subject.features.weights_digest)
    judged = judge_subject(subject)
    for picture, grid in judged.pictures.items():
        store.write_bytes(picture, grid.png)
    store.write_json("metrics.json", _content(judged, protocol))
    store.delete(PARTS_FOLDER)
    _raise_alarms(context, judged.alarms)
    values, digest = judged.values, digest_of(protocol)
    registry.set_tag(model, number, judged_tag(digest), json.dumps(values, sort_keys=True))
    registry.set_tag(model, number, parts_tag(digest), json.dumps(judged.kid_parts))
    spans = intervals_of({name: figure.json for name, figure in judged.figures.items()})
    registry.set_tag(model, number, intervals_tag(digest), json.dumps(spans, sort_keys=True))
    return VersionFigures(number, digest, values, store.url)


def _raise_alarms(context: Context, alarms: Sequence[EvaluationAlarm]) -> None:
    """Tell the user and the tracker."""
    for alarm in alarms:
        for line in alarm.text.splitlines():
            context.progress.say(f"  {line}")
        if context.run is not None:
            context.run.set_tags({f"hvqd.alarm.{'_'.join(alarm.name.split())}": alarm.text})


def _content(judged: Judged, protocol: Mapping[str, Any]) -> dict[str, Any]:
    """metrics.json."""
    return {
        "protocol": {**protocol, "n": {name: figure.n for name, figure in sorted(judged.figures.items())}},
        "further_figures": described(),
        "figures": {name: figure.json for name, figure in sorted(judged.figures.items())},
        "class_counts": judged.class_counts,
        "alarms": [alarm.as_json() for alarm in judged.alarms],
        "grids": {name: grid.layout for name, grid in judged.pictures.items()},
    }


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
        "sampling": config.sampling.of_noise(subject.prior.config.noise),
        "labels": "asked classes are drawn as often as the training pictures have them",
        "kid": "unbiased, kernel (x.y / 1280 + 1)^3, over all pairs",
        "fid": "FID (EfficientNet-Lite0), never comparable with an Inception FID; biased upwards for few pictures",
        "neighbours": "recall, density, coverage: 5 nearest neighbours, at most as many pictures as the reference has",
        "real": "training pictures of whole concepts against the test pictures; for class accuracy, the test pictures",
        "marginals": "each position's code comes from a training picture of its own, independent of other positions",
        "untrained": "a prior with fresh weights, sampled alike but for guidance, which changes nothing there",
        "judge": "multinomial logistic regression on standardized features of "
        f"{min(len(subject.train.ids), MOST_TRAIN)} real training pictures, ridge {RIDGE}, L-BFGS",
        "class_shuffled": "the accuracy that the same pictures would have with their asked classes shuffled",
        "class_majority": "share, among the test pictures, of the largest class of the training pictures",
        "nearest": "median Euclidean feature distance to the nearest training picture",
        "usage": "usage and perplexity over the codes of all splits",
        **_likelihood(subject),
    }


def _likelihood(subject: Subject) -> dict[str, str]:
    if subject.prior.config.noise == "gaussian":
        said = subject.prior.config.gaussian.prediction
        return {
            "errors": f"error_l: mean squared error of the predicted {said} of level l's normalised latents, "
            f"{DRAWS} noise levels a picture; Gaussian noise bounds no code length"
        }
    return {"bits": f"upper bound, {DRAWS} noise levels a picture; bits_l a code, bits_total a picture"}
