"""A stage as the loop sees it: what is trained, on which batches, and what happens around a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hvqd_model.codec.quantizer import CodebookStatistics
from hvqd_model.prior.conditions import Conditions
from workflows.config import TrainSettings
from workflows.training.alarms import Watch
from workflows.training.engine import Engine


@dataclass(frozen=True)
class Evidence:
    """What an adversary learns from one micro-batch, all detached."""

    real: Tensor
    """(B, 3, H, W) pictures."""
    fake: Tensor
    """(B, 3, H, W) their reconstructions."""
    gradients: Tensor
    """(2, n): of the reconstruction's loss and of the adversarial one, with respect to the decoder's last layer."""


@dataclass(frozen=True)
class ObjectiveOutput:
    """What an objective's `forward` returns for one micro-batch."""

    loss: Tensor
    metrics: dict[str, Tensor]
    statistics: tuple[CodebookStatistics, ...] = ()
    vectors: tuple[Tensor, ...] = ()
    """(B N, D) of each level before quantization: what codebooks start from."""
    evidence: Evidence | None = None
    """None while no adversary is at work."""
    prefixes: tuple[Tensor, ...] = ()
    """(B, 3, H, W) of each prefix of the levels; in evaluation only."""


@dataclass(frozen=True)
class Position:
    """Where in training a micro-batch stands; with the seed it is all that a batch and its randomness depend on."""

    images_seen: int
    """Images before this global batch."""
    offset: int
    """This micro-batch's first place within the global batch."""
    count: int
    """Images of the micro-batch."""
    global_batch: int

    @property
    def first(self) -> int:
        """The micro-batch's first image, counted from the start of training."""
        return self.images_seen + self.offset


Progress = Callable[[int, int, str], None]


class Companion(Protocol):
    """What a stage trains outside the engine, equal on all ranks; it is kept in checkpoints."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from them, wherever the tensors lie."""


class Stage(Protocol):
    """One of the two trainings."""

    name: str

    @property
    def settings(self) -> TrainSettings:
        """The optimisation."""

    @property
    def companion(self) -> Companion | None:
        """What is trained beside the objective, if anything."""

    @property
    def picture(self) -> bytes | None:
        """A PNG that shows what the last evaluation was about, if there is something to see."""

    @property
    def objective(self) -> nn.Module:
        """`forward(*batch) -> ObjectiveOutput` holds all maths that touches parameters."""

    def watch(self) -> Watch:
        """Who looks at the history for what goes wrong, and has seen nothing yet."""

    def batch(self, position: Position) -> tuple[Any, ...]:
        """The objective's inputs."""

    def before_step(self, engine: Engine, images_seen: int) -> dict[str, float]:
        """Called before every global batch on every rank; returns what is worth recording, usually nothing."""

    def after_micro_batch(self, output: ObjectiveOutput) -> dict[str, Tensor]:
        """Called after every micro-batch's backward; returns metrics."""

    def after_step(self, statistics: tuple[CodebookStatistics, ...], images_seen: int) -> dict[str, Tensor]:
        """Called after every applied step with the statistics of the global batch."""

    def evaluate(self, engine: Engine) -> dict[str, float]:
        """Figures on the validation split, equal on all ranks; changes nothing."""

    def after_evaluation(self, figures: dict[str, float]) -> dict[str, float]:
        """Called with what `evaluate` found, on every rank; returns what else is worth recording, usually nothing."""

    def interval(self) -> dict[str, Any]:
        """JSON values of what an unfinished logging interval has gathered, the same on all ranks."""

    def load_interval(self, gathered: dict[str, Any]) -> None:
        """Go on with what `interval` told; nothing begins the interval anew."""


def learning_rate_at(images_seen: int, settings: TrainSettings) -> float:
    """The learning rate of the step that begins at `images_seen`: linear warm-up, plateau, cosine."""
    warmup = min(1.0, (images_seen + settings.global_batch) / max(settings.warmup_images, settings.global_batch))
    start = settings.decay_start * settings.images
    past = max(0.0, images_seen - start) / max(settings.images - start, 1)
    floor = settings.final_learning_rate_share
    cosine = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(past, 1.0)))
    return settings.learning_rate * warmup * cosine


@dataclass
class RunningMean:
    """Means of metrics over steps, kept as tensors until they are asked for."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Count one more value of each metric."""
        for name, value in metrics.items():
            value = value.detach().double()
            self.sums[name] = self.sums[name].to(value.device) + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def take(self) -> dict[str, Tensor]:
        """The means so far, and begin anew."""
        means = {name: total / self.counts[name] for name, total in self.sums.items()}
        self.sums, self.counts = {}, {}
        return means

    def state(self) -> dict[str, Any]:
        """JSON values of what this rank has gathered."""
        return {"sums": {name: float(total) for name, total in self.sums.items()}, "counts": dict(self.counts)}

    def load(self, ranks: list[dict[str, Any]], rank: int, world: int) -> None:
        """Go on from every rank's `state`: from the own one, or with another number of ranks from their mean."""
        self.sums, self.counts = {}, {}
        if not ranks:
            return
        self.counts = dict(ranks[0]["counts"])
        for name in self.counts:
            own = ranks[rank]["sums"][name] if len(ranks) == world else sum(r["sums"][name] for r in ranks) / len(ranks)
            self.sums[name] = torch.tensor(own, dtype=torch.float64)


def place_on(device: torch.device, *tensors: Any) -> tuple[Any, ...]:
    """Tensors (and tuples of tensors) on the device; copies from page-locked memory overlap with computing on a GPU."""
    return _each(lambda tensor: tensor.to(device, non_blocking=True), tensors)


def pinned(*tensors: Any) -> tuple[Any, ...]:
    """Tensors (and tuples of tensors) in page-locked memory, for machines with a GPU."""
    return _each(lambda tensor: tensor.pin_memory(), tensors)


def _each(change: Callable[[Tensor], Tensor], tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    def changed(value: Any) -> Any:
        if isinstance(value, Conditions):
            return value.each(change)
        if isinstance(value, tuple):
            return tuple(changed(item) for item in value)
        return change(value) if isinstance(value, Tensor) else value

    return tuple(changed(tensor) for tensor in tensors)
