"""The smallest trainings that are still whole: tables in memory, models of a few thousand weights, both stages.

Some weights are large enough (over 10,000 elements) for ZeRO-3 to shard them; smaller ones it keeps whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hvqd_model.codec.hierarchy import HierarchicalVQ
from hvqd_model.config import PriorConfig, VQConfig
from hvqd_model.prior.latents import LatentStatistics
from hvqd_model.prior.prior import HierarchicalPrior
from workflows.config import TrainSettings, VQTrainSettings
from workflows.data.batches import CodeTable, ImageTable
from workflows.training.alarms import Alarm
from workflows.training.engine import Engine
from workflows.training.judges import build_judges
from workflows.training.loop import Record, TrainState
from workflows.training.precision import Precision
from workflows.training.prior_stage import PriorStage
from workflows.training.vq_stage import VQStage

GLOBAL_BATCH = 8
GRIDS = ((2, 2), (4, 4))
CODES = (8, 16)
CODE_DIM = 8
CLASSES = ("circle", "square", "star")


def image_table(count: int, seed: int = 0) -> ImageTable:
    """Pictures of 16 x 16 pixels: smooth colour ramps with a bright square somewhere."""
    generator = np.random.default_rng(seed)
    ramps = np.linspace(0, 1, 16)[None, :, None, None] * generator.uniform(0, 160, (count, 1, 1, 3))
    images = np.broadcast_to(ramps, (count, 16, 16, 3)).copy()
    for image, (row, column) in zip(images, generator.integers(0, 11, (count, 2)), strict=True):
        image[row : row + 5, column : column + 5] += generator.uniform(40, 95, 3)
    names = np.array([f"picture-{index}" for index in range(count)])
    labels = np.arange(count, dtype=np.int64) % len(CLASSES)
    return ImageTable(names, labels, names, names, names, images.astype(np.uint8))


def code_table(count: int, seed: int = 0, grids: Sequence[tuple[int, int]] = GRIDS) -> CodeTable:
    """Codes that depend on the class, with some noise, so that there is something to learn."""
    generator = np.random.default_rng(seed)
    names = np.array([f"picture-{index}" for index in range(count)])
    labels = np.arange(count, dtype=np.int64) % len(CLASSES)
    codes = tuple(
        ((labels[:, None, None] + generator.integers(0, 3, (count, *grid))) % size).astype(np.int32)
        for grid, size in zip(grids, CODES, strict=True)
    )
    return CodeTable(names, labels, names, names, codes)


def vq_settings(steps: int, **changes: Any) -> VQTrainSettings:
    """Twenty steps' worth of images or so, in float32."""
    return VQTrainSettings(**_settings(steps, changes))


def prior_settings(steps: int, **changes: Any) -> TrainSettings:
    """The same for the prior."""
    return TrainSettings(**_settings(steps, changes))


def _settings(steps: int, changes: dict[str, Any]) -> dict[str, Any]:
    base: dict[str, Any] = {
        "images": steps * GLOBAL_BATCH,
        "global_batch": GLOBAL_BATCH,
        "micro_batch": GLOBAL_BATCH,
        "warmup_images": 0,
        "precision": "fp32",
        "log_every_images": GLOBAL_BATCH,
        "evaluate_every_images": 1_000_000,
        "checkpoint_every_images": 1_000_000,
    }
    return base | changes


def vq_stage(settings: VQTrainSettings, weights: int = 0, **architecture: Any) -> VQStage:
    """Stage 1 with fresh weights drawn from the seed `weights`."""
    chosen: dict[str, Any] = {
        "codebook_sizes": CODES,
        "code_dim": CODE_DIM,
        "width": 16,
        "width_multipliers": (1, 3),
        "image_size": (16, 16),
    }
    torch.manual_seed(weights)
    model = HierarchicalVQ(VQConfig(**(chosen | architecture)))
    judges = build_judges(settings, 5, "fp32", torch.device("cpu"))
    return VQStage(model, settings, 5, "fp32", image_table(20), image_table(6, seed=1), judges)


def latent_table(table: CodeTable, codebooks: Sequence[Tensor]) -> CodeTable:
    """The same with latents: each code's vector and some noise around it."""
    generator = np.random.default_rng(len(table))
    vectors = [codebook.numpy()[codes] for codebook, codes in zip(codebooks, table.codes, strict=True)]
    latents = tuple((found + generator.normal(0, 0.3, found.shape)).astype(np.float16) for found in vectors)
    return replace(table, latents=latents)


def prior_stage(
    settings: TrainSettings, weights: int = 0, precision: Precision = "fp32", **architecture: Any
) -> PriorStage:
    """Stage 2 with fresh weights drawn from the seed `weights`."""
    torch.manual_seed(weights)
    config = PriorConfig(
        grids=GRIDS,
        codebook_sizes=CODES,
        code_dim=CODE_DIM,
        classes=CLASSES,
        **({"width": 64, "depth": 1, "heads": 2} | architecture),
    )
    codebooks = [torch.randn(size, CODE_DIM) for size in CODES]
    tables = [code_table(20), code_table(6, seed=1)]
    if config.noise == "gaussian":
        tables = [latent_table(table, codebooks) for table in tables]
    statistics = [LatentStatistics(book.mean(0), book.std(0)) for book in codebooks]
    model = HierarchicalPrior(config, codebooks, statistics if config.noise == "gaussian" else None)
    return PriorStage(model, settings, 5, precision, *tables)


@dataclass
class GoOn:
    """Keeps nothing, and goes on with the engine as it stands."""

    images_seen: int = 0
    saved: list[int] = field(default_factory=list)

    def restore(self, engine: Engine) -> TrainState:
        """No state but the position."""
        return TrainState(self.images_seen)

    def save(self, engine: Engine, state: TrainState) -> None:
        """Remember when."""
        self.saved.append(state.images_seen)


@dataclass
class Heard:
    """A reporter that remembers what it was told."""

    records: list[Record] = field(default_factory=list)
    steps: list[tuple[int, int, str]] = field(default_factory=list)
    alarms: list[Alarm] = field(default_factory=list)
    pictures: list[tuple[int, bytes]] = field(default_factory=list)
    past: list[tuple[list[Record], list[Alarm]]] = field(default_factory=list)

    def progress(self, images_seen: int, total: int, note: str) -> None:
        """A step."""
        self.steps.append((images_seen, total, note))

    def record(self, record: Record) -> None:
        """A line of the history."""
        self.records.append(record)

    def alarm(self, alarm: Alarm) -> None:
        """What goes wrong."""
        self.alarms.append(alarm)

    def catch_up(self, history: list[Record], alarms: list[Alarm]) -> None:
        """What was told before."""
        self.past.append((history, alarms))

    def picture(self, images_seen: int, png: bytes) -> None:
        """What an evaluation looked at."""
        self.pictures.append((images_seen, png))
