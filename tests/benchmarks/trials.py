"""One training of the tokenizer or the prior in a benchmark: the product's loop, stages and presets, in one process.

The engine is the plain one; nothing is logged, evaluated or checkpointed on the way. "The same time" for several
trainings means: how fast each of them is is measured side by side, in turns, and each gets the images that it can train
on in that time. So a busy machine changes no result, and a schedule knows its end.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from hvqd_model.codec.hierarchy import HierarchicalVQ
from hvqd_model.config import PriorConfig, VQConfig
from hvqd_model.metrics import psnr
from hvqd_model.prior.prior import HierarchicalPrior
from hvqd_model.randomness import derive_key
from workflows.config import RunConfig, TrainSettings
from workflows.data.batches import CodeTable, ImageTable
from workflows.encode import encode_batches
from workflows.loading import load_config
from workflows.training.alarms import Alarm
from workflows.training.engine import Engine
from workflows.training.judges import build_judges
from workflows.training.loop import Record, TrainState, train
from workflows.training.plain import PlainEngine
from workflows.training.prior_stage import PriorStage
from workflows.training.vq_stage import VQStage

NEVER = 1 << 60
TOKENS_A_CODE = 20
TURN_STEPS = 3
"""Timed steps of a turn; one more before them warms the caches."""
TURNS = 3
CPU = torch.device("cpu")


class VQTrial(VQStage):
    """The tokenizer's stage without evaluation on the way."""

    def evaluate(self, engine: Engine) -> dict[str, float]:
        """Nothing: what is held out is judged when training is over."""
        return {}


class PriorTrial(PriorStage):
    """The prior's stage without evaluation on the way."""

    def evaluate(self, engine: Engine) -> dict[str, float]:
        """Nothing: what is held out is judged when training is over."""
        return {}


Trial = VQTrial | PriorTrial


@dataclass
class Nothing:
    """Checkpoints that keep nothing and go on from where they are told; a reporter that tells nobody."""

    images_seen: int = 0

    def restore(self, engine: Engine) -> TrainState:
        """No state but the position."""
        return TrainState(self.images_seen)

    def save(self, engine: Engine, state: TrainState) -> None:
        """Not kept."""

    def progress(self, images_seen: int, total: int, note: str) -> None:
        """Nobody is told."""

    def record(self, record: Record) -> None:
        """Nobody is told."""

    def alarm(self, alarm: Alarm) -> None:
        """Nobody is told."""

    def catch_up(self, history: list[Record], alarms: list[Alarm]) -> None:
        """Nobody is told."""

    def picture(self, images_seen: int, png: bytes) -> None:
        """Nobody is told."""


@dataclass
class StopWatch(Nothing):
    """Remembers when each step ended."""

    ends: list[float] = field(default_factory=list)

    def progress(self, images_seen: int, total: int, note: str) -> None:
        """A step is over."""
        self.ends.append(time.perf_counter())


# ---- what is trained ----


CONVOLUTIONS = ("vq.model.width=32", "vq.model.code_dim=64")
"""For the tokenizers that are no pyramids: what the architecture has where a preset says nothing."""
NESTED_PYRAMID = ("hierarchy=nested-pyramid", "level_dropout=0.1", "width=48", "code_dim=48")
"""Under vq.model, as `tiny` has it."""


def configured(preset: str, changes: Sequence[str] = (), seed: int = 0) -> RunConfig:
    """A preset in one process, without intervals on the way."""
    quiet = [
        f"{stage}.train.{interval}_every_images={NEVER}"
        for stage in ("vq", "prior")
        for interval in ("log", "evaluate", "checkpoint")
    ]
    return load_config(preset, None, ["compute.workers=1", *quiet, *changes], seed=seed)


def tokenizer_trial(
    config: RunConfig,
    pictures: ImageTable,
    architecture: VQConfig | None = None,
    make: Callable[[VQConfig], HierarchicalVQ] = HierarchicalVQ,
) -> VQTrial:
    """Stage 1 with fresh weights.

    Args:
        architecture: other than the configuration's.
        make: the tokenizer, from its architecture.
    """
    torch.manual_seed(derive_key(config.seed, "vq", "weights"))
    model = make(architecture or config.vq_config)
    judges = build_judges(config.vq.train, config.seed, "fp32", CPU)
    return VQTrial(model, config.vq.train, config.seed, "fp32", pictures, pictures, judges)


def prior_trial(config: RunConfig, tokenizer: HierarchicalVQ, codes: CodeTable, held_out: CodeTable) -> PriorTrial:
    """Stage 2 with fresh weights, without classes."""
    torch.manual_seed(derive_key(config.seed, "prior", "weights"))
    architecture = PriorConfig(
        **config.prior.model.model_dump(),
        grids=tokenizer.config.grids,
        codebook_sizes=tokenizer.config.codebook_sizes,
        code_dim=tokenizer.config.code_dims,
    )
    model = HierarchicalPrior(architecture, tokenizer.codebooks)
    return PriorTrial(model, config.prior.train, config.seed, "fp32", codes, held_out)


# ---- training ----


def with_images(trial: Trial, images: int) -> None:
    """Set a trial's budget."""
    trial.settings = trial.settings.model_copy(update={"images": images})


def run(trial: Trial, images: int) -> None:
    """Train to the end of the budget; the model holds the weights that the product would export."""
    with_images(trial, images)
    engine = engine_of(trial)
    train(engine, trial, Nothing(), Nothing())
    trial.objective.load_state_dict(engine.export())
    trial.objective.eval()


def engine_of(trial: Trial) -> PlainEngine:
    """A plain engine for the trial."""
    settings: TrainSettings = trial.settings
    return PlainEngine(trial.objective, settings, CPU)


def images_per_second(trials: Mapping[str, Trial], turns: int = TURNS) -> dict[str, float]:
    """How fast each of the trials trains once its codebooks have started, measured in turns; spends the trials."""
    engines = {name: engine_of(trial) for name, trial in trials.items()}
    seen = dict.fromkeys(trials, 0)
    seconds: dict[str, list[float]] = {name: [] for name in trials}
    for trial in trials.values():
        if isinstance(trial, VQTrial):
            start_somewhere(trial.model)
    for turn in range(turns + 1):  # the first is not counted
        for name in trials if turn % 2 else reversed(trials):
            watch = StopWatch(seen[name])
            seen[name] += (1 + TURN_STEPS) * trials[name].settings.global_batch
            with_images(trials[name], seen[name])
            train(engines[name], trials[name], watch, watch)
            if turn:
                seconds[name] += [(watch.ends[-1] - watch.ends[0]) / TURN_STEPS]
    return {name: trials[name].settings.global_batch / statistics.median(found) for name, found in seconds.items()}


def start_somewhere(model: HierarchicalVQ) -> None:
    """Let the codebooks start, from vectors that mean nothing: enough for a tokenizer that is only timed."""
    generator = torch.Generator().manual_seed(0)
    for level, shape in enumerate(zip(model.config.codebook_sizes, model.config.code_dims, strict=True)):
        model.start_codebook(level, torch.randn(shape, generator=generator), 0)


def affordable(images_a_second: float, seconds: float, settings: TrainSettings) -> int:
    """The whole global batches that fit into the time, in images; at least two: codebooks start before the second."""
    return max(2, int(images_a_second * seconds / settings.global_batch)) * settings.global_batch


def weights(*modules: nn.Module) -> int:
    """How many trained numbers modules have."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def closest_below(size_of: Callable[[int], int], choices: Iterable[int], most: int) -> int:
    """Of rising choices, the last whose size is at most `most`.

    Raises:
        ValueError: even the first is larger.
    """
    found: int | None = None
    for choice in choices:
        if size_of(choice) > most:
            break
        found = choice
    if found is None:
        raise ValueError(f"no choice has a size of at most {most}\nhint: offer a smaller one")
    return found


# ---- judging ----


def reconstructions(
    model: HierarchicalVQ, table: ImageTable, levels: int | None = None, refine_rounds: int = 0
) -> Tensor:
    """(N, 3, H, W) in [-1, 1]: encoded and decoded by the first `levels`, all by default."""
    found = []
    for first in range(0, len(table), 100):
        codes = model.encode(table.batch(slice(first, first + 100)), refine_rounds)
        found.append(model.decode(codes[:levels]))
    return torch.cat(found)


def mean_psnr(pictures: Tensor, table: ImageTable) -> float:
    """The mean of the pictures' PSNR in dB, of (N, 3, H, W) in [-1, 1]."""
    parts = [
        psnr(pictures[first : first + 100], table.batch(slice(first, first + 100)), 2.0)
        for first in range(0, len(table), 100)
    ]
    return float(torch.cat(parts).mean())


def encoded(model: HierarchicalVQ, table: ImageTable, refine_rounds: int = 0) -> CodeTable:
    """The table's codes, without classes."""
    codes = encode_batches(model, table.images, refine_rounds=refine_rounds)
    return CodeTable(table.ids, np.full(len(table), -1), table.styles, table.groups, tuple(codes))


def codebook_use(model: HierarchicalVQ, table: ImageTable, *, whole: bool = False) -> list[float]:
    """The share of each level's codes that occur at least once in the table's first TOKENS_A_CODE tokens a code.

    Args:
        model: the tokenizer.
        table: the pictures.
        whole: look at all pictures, however many more tokens they have.

    Raises:
        ValueError: the table has fewer.
    """
    sizes, grids = model.config.codebook_sizes, model.config.grids
    wanted = max(
        math.ceil(TOKENS_A_CODE * size / (rows * columns)) for size, (rows, columns) in zip(sizes, grids, strict=True)
    )
    if wanted > len(table):
        raise ValueError(f"usage needs {wanted} pictures: {len(table)}\nhint: smaller codebooks, or more pictures")
    codes = encode_batches(model, table.images if whole else table.images[:wanted])
    return [len(np.unique(found)) / size for found, size in zip(codes, sizes, strict=True)]


def bits_an_image(trial: PriorTrial) -> float:
    """The prior's bound on the held-out codes."""
    trial.objective.eval()
    with torch.no_grad():
        figures = PriorStage.evaluate(trial, engine_of(trial))
    return figures["val_bits_total"]
