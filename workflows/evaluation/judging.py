"""One evaluation's figures and pictures, from its subject: the sets that are drawn, and what is measured on them.

Axes: N test pictures, n pictures of a set, L levels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvqd_model import metrics
from hvqd_model.randomness import derive_key
from workflows.drawing.generate import decode_codes, padded
from workflows.encode import encode_latents
from workflows.evaluation.figures import (
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
from workflows.evaluation.grids import Grid, draw_grids
from workflows.evaluation.judge import ClassJudge
from workflows.evaluation.novelty import EvaluationAlarm, coverage_figures, memorisation_figures, novelty_alarms
from workflows.evaluation.sets import drawn, floor, marginals, untrained
from workflows.evaluation.subject import MOST_TRAIN, Subject

DRAWS = 8
"""Noise levels that each test picture meets."""
RIDGE = 0.01


@dataclass(frozen=True)
class Judged:
    """What an evaluation found."""

    figures: dict[str, Figure]
    pictures: Mapping[str, Grid]
    kid_parts: dict[str, Any]
    """Of the samples' KID, by which another version's can be compared with it."""
    class_counts: dict[str, dict[str, int]]
    """By class: how many of the pictures drawn without a class, and of the reconstructions, the judge takes for it."""
    alarms: list[EvaluationAlarm]

    @property
    def values(self) -> dict[str, float]:
        """The figures alone."""
        return {name: figure.json["value"] for name, figure in sorted(self.figures.items())}

    @property
    def spans_of_bits(self) -> dict[str, float]:
        """bits_0_low, bits_0_high …: the ends of the intervals of the bounds on the code length."""
        found = {name: figure.json for name, figure in self.figures.items() if name.startswith("bits_")}
        return {
            f"{name}_{end}": figure[end]
            for name, figure in sorted(found.items())
            for end in ("low", "high")
            if figure[end] is not None
        }


def judge_subject(subject: Subject) -> Judged:
    """Draw what is needed and measure it."""
    settings, train, test = subject.context.config.evaluation, subject.train, subject.test
    resampling = Resampling(settings.resamples, settings.seed)
    sampling = subject.context.config.sampling
    # Fresh weights predict the same with and without a class: guidance would cost a second pass for nothing.
    unguided = sampling.model_copy(update={"guidance": 1.0})
    batch = sampling.batch
    prefixes = [decode_codes(subject.vq, test.codes[: level + 1], batch) for level in range(len(test.codes))]
    figures = reconstruction_figures(test.pictures, prefixes, test.groups, resampling)
    grids = subject.prior.config.grids
    gaussian = subject.prior.config.noise == "gaussian"
    bits = None if gaussian else _by_level(subject, "bits")
    figures |= code_figures(subject.counts, subject.encoded, bits, grids, test.groups, resampling)
    if gaussian:
        errors = _by_level(subject, "errors")
        figures |= {f"error_{level}": resampling.mean(found, test.groups) for level, found in enumerate(errors)}

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
    class_counts: dict[str, dict[str, int]] = {}
    if classes and (labels >= 0).any():
        judge = ClassJudge(train_features, labels, len(classes), RIDGE)
        majority = int(np.bincount(labels[labels >= 0]).argmax())
        asked = {name: sets[name] for name in ("reconstructions", "samples", "marginals")}
        figures |= class_figures(judge, {"real": real, **asked}, majority, resampling)
        count = settings.baseline_samples
        unasked = drawn(subject, "unasked", subject.prior, count, unguided, with_classes=False)
        covered, class_counts = coverage_figures(judge, unasked.features, reconstructed, classes)
        figures |= covered
    compared = {"samples": sets["samples"], "heldout": real, "reconstructions": sets["reconstructions"]}
    distances, neighbours = nearest_figures(train_features, compared, resampling)
    figures |= distances
    near = {name: found for name, (found, _) in neighbours.items()}
    copies = _copies(subject, rows, train_features)
    figures |= memorisation_figures(figures, near["samples"], near["reconstructions"], copies)
    grids_drawn = draw_grids(test.pictures, prefixes, sets, classes, train.pictures, rows, neighbours["samples"])
    parts = metrics.kid_parts(torch.from_numpy(real.features), torch.from_numpy(sets["samples"].features), real.groups)
    return Judged(figures, grids_drawn, _rounded(asdict(parts)), class_counts, novelty_alarms(figures))


def _copies(subject: Subject, rows: NDArray[np.int64], train_features: NDArray[np.float32]) -> NDArray[np.float64]:
    """(n,) distances to the nearest training picture that reconstructions of training pictures have."""
    count = min(len(rows), subject.context.config.evaluation.baseline_samples)
    chosen = rows[np.arange(count) * len(rows) // count]
    codes = [level[chosen] for level in subject.train.codes]
    pictures = decode_codes(subject.vq, codes, subject.context.config.sampling.batch)
    features = subject.features_of("copies", pictures)
    distances, _ = metrics.nearest(torch.from_numpy(features), torch.from_numpy(train_features))
    found: NDArray[np.float64] = distances.double().numpy()
    return found


def _rounded(parts: dict[str, Any]) -> dict[str, Any]:
    """Six significant digits, as all figures have."""

    def short(value: Any) -> Any:
        if isinstance(value, tuple):
            return [short(item) for item in value]
        return rounded(value) if isinstance(value, float) else value

    return {name: short(value) for name, value in parts.items()}


def _by_level(subject: Subject, kind: str) -> list[NDArray[np.float64]]:
    """(N,) of each level: the bits of the test pictures' codes, or the errors of a Gaussian prior on their latents."""
    test, config = subject.test, subject.context.config
    batch, count = config.sampling.batch, len(subject.test.ids)
    keys = torch.tensor([derive_key("evaluation bits", config.evaluation.seed, str(name)) for name in test.ids])
    labels = torch.from_numpy(np.array(test.labels, dtype=np.int64))
    if not subject.prior.config.classes:
        labels = torch.full_like(labels, -1)

    def levels(start: int, end: int) -> list[Tensor]:
        if kind == "bits":
            return [torch.from_numpy(level[start:end].astype(np.int64)) for level in test.codes]
        _, latents = encode_latents(subject.vq, test.pictures[start:end], refine_rounds=subject.refine_rounds)
        return [torch.from_numpy(level) for level in latents]

    def make() -> NDArray[np.float64]:
        measure = subject.prior.bits if kind == "bits" else subject.prior.errors
        found = []
        for start in range(0, count, batch):
            end = min(start + batch, count)
            given = [padded(level, batch) for level in levels(start, end)]
            values = measure(given, padded(labels[start:end], batch), padded(keys[start:end], batch), DRAWS)
            found.append(torch.stack(values)[:, : end - start].numpy())
            subject.say("test pictures under the prior")(end, count)
        return np.concatenate(found, axis=1)

    return list(subject.parts.array(kind, make))
