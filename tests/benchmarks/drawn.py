"""What the prior's benchmarks share: what priors learn from, trained ones that are kept, and what their pictures show.

Pictures are judged as in an evaluation: features of EfficientNet-Lite0, KID with its standard error over concepts and
samples, recall, and a linear judge of classes that has learned from real training pictures.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from picture_sets import emoji_classes, emoji_splits, subset
from runner import Figures
from trials import PriorTrial, configured, run, tokenizer_trial

from hvqd_model import HierarchicalPrior, HierarchicalVQ, PriorConfig, load_model, metrics, save_model
from hvqd_model.prior.latents import LatentStatistics
from hvqd_model.randomness import derive_key
from infra.storage import open_store
from workflows.artifacts import read_manifest
from workflows.config import RunConfig, SamplingSettings
from workflows.data.batches import CodeTable, ImageTable
from workflows.drawing.bundle import draw_labels
from workflows.drawing.generate import Pictures, draw_images
from workflows.encode import encode_latents
from workflows.evaluation.features import FeatureExtractor
from workflows.evaluation.judge import ClassJudge
from workflows.loading import config_from, load_config, read_remembered

AT_ONCE = 500
"""Pictures that an interruption can cost."""
FEATURE_SIZE, RIDGE, RESAMPLES = 64, 0.01, 500
SMALL_NETWORK: tuple[tuple[str, Any], ...] = (("width", 64), ("depth", 4))
"""Under prior.model: where many priors, or very many steps, must fit into an hour of two cores."""
SMALL_BATCH = 100
"""Pictures at once, which make a small network faster."""
_WIDTH_95 = 2 * 1.96
"""Standard errors in a 95 % interval."""
Model = TypeVar("Model", HierarchicalPrior, HierarchicalVQ)


@dataclass(frozen=True)
class Material:
    """A tokenizer, the pictures whose codes priors learn, and the pictures that they are judged by."""

    config: RunConfig
    vq: HierarchicalVQ
    train: ImageTable
    judged: ImageTable
    classes: tuple[str, ...]

    @classmethod
    def of_root(cls, root: Path) -> Material:
        """Of a run's root: its tokenizer, its training pictures, and its test pictures."""
        store = open_store(str(root))
        config = config_from(read_remembered(store) or load_config("tiny").model_dump(mode="json"))
        dataset = read_manifest(store.child("dataset"), "hvqd data build")
        tables = [ImageTable.open(store.child("dataset"), dataset, split) for split in ("train", "test")]
        vq = load_model(root / "vq" / "model")
        assert isinstance(vq, HierarchicalVQ)
        return cls(config, vq, tables[0], tables[1], tuple(dataset.facts["classes"]))

    @classmethod
    def hardly_trained(cls) -> Material:
        """What a quick form takes: a few emoji, and a tokenizer of a few steps."""
        config = configured("tiny", ["sampling.batch=24"])
        splits = emoji_splits(config.data.image_size[0])
        train, judged = (subset(splits[name], np.arange(0, len(splits[name]), 20)) for name in ("train", "test"))
        tokenizer = tokenizer_trial(config, train)
        run(tokenizer, 2 * config.vq.train.global_batch)
        return cls(config, tokenizer.model, train, judged, emoji_classes())

    @cached_property
    def class_rows(self) -> tuple[int, ...]:
        """Training pictures of each class."""
        return tuple(np.bincount(self.train.labels[self.train.labels >= 0], minlength=len(self.classes)).tolist())

    def coded(self, pictures: ImageTable, *, with_latents: bool = False) -> CodeTable:
        """Pictures' codes and classes, and the latents behind the codes where they are wanted."""
        codes, latents = encode_latents(self.vq, pictures.images)
        kept = tuple(level.astype(np.float16) for level in latents) if with_latents else ()
        return CodeTable(pictures.ids, pictures.labels, pictures.styles, pictures.groups, tuple(codes), latents=kept)

    def trial(self, *changes: tuple[str, Any], seed: int = 0) -> PriorTrial:
        """A fresh prior for the classes and these codes, as the configuration has it but for some of its settings."""
        settings = self.config.prior.model.model_validate(self.config.prior.model.model_dump() | dict(changes))
        architecture = PriorConfig(
            **settings.model_dump(),
            grids=self.vq.config.grids,
            codebook_sizes=self.vq.config.codebook_sizes,
            code_dim=self.vq.config.code_dims,
            classes=self.classes,
        )
        table = self.coded(self.train, with_latents=settings.noise == "gaussian")
        torch.manual_seed(derive_key(seed, "prior", "weights"))
        prior = HierarchicalPrior(architecture, self.vq.codebooks, statistics_of(table))
        return PriorTrial(prior, self.config.prior.train, seed, "fp32", table, table)


def statistics_of(table: CodeTable) -> list[LatentStatistics] | None:
    """Mean and deviation of each level's latents; None of a table without any."""
    found = []
    for latents in table.latents:
        rows = np.asarray(latents, dtype=np.float64).reshape(-1, latents.shape[-1])
        mean, deviation = (torch.from_numpy(part).float() for part in (rows.mean(0), rows.std(0).clip(1e-6)))
        found.append(LatentStatistics(mean, deviation))
    return found or None


@torch.no_grad()
def bits_an_image(prior: HierarchicalPrior, table: CodeTable, draws: int = 4) -> float:
    """The mean bound on the length of a picture's codes."""
    total = 0.0
    for first in range(0, len(table), AT_ONCE):
        rows = np.arange(first, min(first + AT_ONCE, len(table)))
        keys = torch.tensor([derive_key("bits", int(row)) for row in rows])
        total += float(torch.stack(prior.bits(table.batch(rows), table.conditions(rows), keys, draws)).sum())
    return total / len(table)


def kept_model(folder: Path, kind: type[Model], make: Callable[[], Model]) -> Model:
    """The model of this folder, trained now unless it is there."""
    if not folder.is_dir():
        scratch = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(scratch, ignore_errors=True)
        save_model(make(), scratch)
        scratch.rename(folder)
    found = load_model(folder)
    assert isinstance(found, kind)
    return found


def trained(trial: PriorTrial, images: int) -> HierarchicalPrior:
    """The prior after so many images."""
    run(trial, images)
    return trial.model


def kept_array(path: Path, make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
    """The array of this file, made now unless it is there."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".partial.npy")
        np.save(scratch, make())
        scratch.replace(path)
    found: NDArray[Any] = np.load(path)
    return found


def requests(class_rows: Sequence[int], count: int, *name: str | int) -> tuple[list[int], NDArray[np.int64]]:
    """A seed for each of (n,) pictures, and a class as often as the training pictures have it."""
    seeds = [derive_key(*name, index) for index in range(count)]
    return seeds, np.asarray(draw_labels(seeds, class_rows), dtype=np.int64)


class Jury:
    """Says how near pictures are to held-out ones, and what they show."""

    def __init__(self, train: ImageTable, judged: ImageTable, classes: int) -> None:
        self.features = FeatureExtractor(FEATURE_SIZE)
        self._real = torch.from_numpy(self.features(np.asarray(judged.images)))
        self._groups = judged.groups
        self._train, self._classes = train, classes

    @cached_property
    def _judge(self) -> ClassJudge:
        """Learns when it is asked first: the features of all training pictures take their time."""
        known = self.features(np.asarray(self._train.images))
        return ClassJudge(known, self._train.labels, self._classes, RIDGE)

    def kid(self, features: NDArray[np.float32]) -> tuple[float, float]:
        """KID against the held-out pictures, and its standard error over concepts and samples."""
        other = torch.from_numpy(features)
        span = metrics.kid_interval(self._real, other, self._groups, np.arange(len(other)), RESAMPLES, 1234)
        assert span is not None
        return metrics.kid(self._real, other), (span[1] - span[0]) / _WIDTH_95

    def lead(self, ours: NDArray[np.float32], other: NDArray[np.float32]) -> tuple[float, float]:
        """How much larger the other set's KID is, and the standard error of that, paired over the held-out pictures."""
        parts = [metrics.kid_parts(self._real, torch.from_numpy(found), self._groups) for found in (other, ours)]
        return metrics.kid_difference(parts[0], parts[1], RESAMPLES, 1234)

    def figures(self, name: str, features: NDArray[np.float32], asked: NDArray[np.int64]) -> Figures:
        """kid, kid_error, recall and class (the share in which the asked class is recognised) of a set."""
        value, error = self.kid(features)
        near = metrics.neighbourhood(self._real, torch.from_numpy(features[: len(self._real)]))
        return {
            f"kid_{name}": value,
            f"kid_error_{name}": error,
            f"recall_{name}": float(near.recall.mean()),
            f"class_{name}": float((self._judge.judge(features) == asked).mean()),
        }


def drawn_features(
    folder: Path,
    jury: Jury,
    seeds: Sequence[int],
    asked: NDArray[np.int64],
    draw: Callable[[list[int], list[int]], Pictures],
) -> tuple[NDArray[np.float32], float]:
    """(n, D) features of what `draw` makes of seeds and classes, kept chunk by chunk, and the seconds of a picture."""
    features, seconds = [], []
    for first in range(0, len(seeds), AT_ONCE):
        some, classes = list(seeds[first : first + AT_ONCE]), asked[first : first + AT_ONCE].tolist()
        name = f"{first:06d}-{len(some):04d}.npy"

        def make(some: list[int] = some, classes: list[int] = classes, name: str = name) -> NDArray[Any]:
            started = time.perf_counter()
            pictures = draw(some, classes)
            np.save(folder / f"seconds-{name}", np.array(time.perf_counter() - started))
            return jury.features(pictures)

        folder.mkdir(parents=True, exist_ok=True)
        features.append(kept_array(folder / f"features-{name}", make))
        seconds.append(float(np.load(folder / f"seconds-{name}")))
    return np.concatenate(features), sum(seconds) / len(seeds)


def drawing(
    vq: HierarchicalVQ, prior: HierarchicalPrior, sampling: SamplingSettings
) -> Callable[[list[int], list[int]], Pictures]:
    """Draws with a prior."""
    return lambda seeds, classes: draw_images(vq, prior, seeds, classes, sampling)


def tokenizer_digest(root: Path) -> str:
    """Of a root's tokenizer, as its manifest says."""
    digest: str = read_manifest(open_store(str(root)).child("vq"), "hvqd train vq").digest
    return digest
