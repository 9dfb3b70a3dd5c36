"""Stage 2: the prior over the codes. Times are spread evenly over the global batch, whoever computes which part."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from hvqd_model.codec.quantizer import CodebookStatistics
from hvqd_model.prior.conditions import Conditions
from hvqd_model.prior.prior import HierarchicalPrior
from hvqd_model.randomness import derive_key, split_keys, uniform
from workflows.config import TrainSettings
from workflows.data.batches import CodeTable, batch_indices
from workflows.training import collectives
from workflows.training.alarms import Watch
from workflows.training.engine import Engine
from workflows.training.precision import Precision
from workflows.training.stage import ObjectiveOutput, Position, place_on

_VALIDATION_IMAGES = 512
_VALIDATION_DRAWS = 4


class PriorObjective(nn.Module):
    """The prior's loss; in evaluation, the true bound in bits a code, or the errors of a Gaussian prior."""

    def __init__(self, model: HierarchicalPrior, precision: Precision) -> None:
        super().__init__()
        self.model = model
        self.precision = precision

    def forward(
        self, codes: tuple[Tensor, ...], labels: Tensor | Conditions, times: Tensor, keys: Tensor
    ) -> ObjectiveOutput:
        """The loss of (B, h, w) codes of each level, or of (B, h, w, C) latents."""
        with torch.autocast(keys.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            if self.training:
                output = self.model(codes, labels, times, keys)
                return ObjectiveOutput(output.loss, output.metrics)
            if self.model.config.noise == "gaussian":
                return self._errors(self.model.errors(codes, labels, keys, _VALIDATION_DRAWS))
            bits = self.model.bits(codes, labels, keys, _VALIDATION_DRAWS)
        metrics = {
            f"bits_{level}": found.mean() / size
            for level, (found, size) in enumerate(zip(bits, self.model.sizes, strict=True))
        }
        total = torch.stack([found.mean() for found in bits]).sum()
        return ObjectiveOutput(total, {**metrics, "bits_total": total})

    def _errors(self, errors: tuple[Tensor, ...]) -> ObjectiveOutput:
        """Mean squared errors of what is predicted: of each level, and of all tokens together."""
        means = [found.mean() for found in errors]
        total = sum(mean * size for mean, size in zip(means, self.model.sizes, strict=True)) / self.model.config.tokens
        assert isinstance(total, Tensor)
        return ObjectiveOutput(total, {**{f"error_{level}": mean for level, mean in enumerate(means)}, "error": total})


class PriorStage:
    """Stage 2 as the loop sees it."""

    name = "prior"
    companion = None
    picture = None

    def __init__(
        self,
        model: HierarchicalPrior,
        settings: TrainSettings,
        seed: int,
        precision: Precision,
        train: CodeTable,
        validation: CodeTable,
    ) -> None:
        self.objective = PriorObjective(model, precision)
        self.settings, self.seed = settings, seed
        self.train, self.validation = train, validation
        self._key = derive_key(seed, self.name)

    @property
    def model(self) -> HierarchicalPrior:
        """The prior."""
        return self.objective.model

    def watch(self) -> Watch:
        """Alarms of any training."""
        return Watch("prior", self.settings, None)

    def batch(self, position: Position) -> tuple[Any, ...]:
        """Codes, conditions, low-discrepancy times (science: (u + i/B) mod 1) and keys."""
        indices = batch_indices(len(self.train), self._key, position.first, position.count)
        places = torch.arange(position.first, position.first + position.count, dtype=torch.int64)
        shift = uniform(torch.tensor([position.images_seen]), stream=derive_key(self._key, "times"))
        spread = (torch.arange(position.count, dtype=torch.float64) + position.offset) / position.global_batch
        return *self._codes(self.train, indices), (shift + spread) % 1.0, split_keys(places, self._key)

    @staticmethod
    def _codes(table: CodeTable, indices: Any) -> tuple[tuple[Tensor, ...], Tensor | Conditions]:
        levels = table.latent_batch(indices) if table.latents else table.batch(indices)
        return levels, table.conditions(indices)

    def before_step(self, engine: Engine, images_seen: int) -> dict[str, float]:
        """Nothing happens outside the loss."""
        return {}

    def after_micro_batch(self, output: ObjectiveOutput) -> dict[str, Tensor]:
        """Nothing happens outside the loss."""
        return {}

    def after_step(self, statistics: tuple[CodebookStatistics, ...], images_seen: int) -> dict[str, Tensor]:
        """Nothing happens outside the loss."""
        return {}

    def evaluate(self, engine: Engine) -> dict[str, float]:
        """The bound on validation codes, bits a code of each level and bits an image; same noise every time.

        A Gaussian prior has the errors of what it predicts instead.
        """
        unit = self.settings.micro_batch
        count = min(len(self.validation), _VALIDATION_IMAGES)
        batches = math.ceil(count / (unit * engine.world))
        sums: dict[str, Tensor] = {}
        for batch in range(batches):
            first = (batch * engine.world + engine.rank) * unit
            indices = torch.arange(first, first + unit) % count
            codes, labels = self._codes(self.validation, indices.numpy())
            times = torch.zeros(unit, dtype=torch.float64)
            keys = split_keys(indices, derive_key(self._key, "validation"))
            output = engine.forward(*place_on(engine.device, codes, labels, times, keys))
            for name, value in output.metrics.items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value / batches
        return {f"val_{name}": value for name, value in collectives.mean_metrics(sums).items()}

    def after_evaluation(self, figures: dict[str, float]) -> dict[str, float]:
        """Nothing follows from them."""
        return {}

    def interval(self) -> dict[str, Any]:
        """Nothing is gathered."""
        return {}

    def load_interval(self, gathered: dict[str, Any]) -> None:
        """Nothing was gathered."""
