"""Stage 1: the tokenizer. Codebooks start from k-means once the features have settled, then move after every step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from hvqd_model.codec.hierarchy import HierarchicalVQ
from hvqd_model.codec.quantizer import CodebookStatistics
from hvqd_model.randomness import derive_key, split_keys
from workflows.config import VQTrainSettings
from workflows.data.batches import ImageTable, batch_indices
from workflows.training import collectives
from workflows.training.engine import Engine
from workflows.training.judges import Judges
from workflows.training.precision import Precision
from workflows.training.stage import ObjectiveOutput, Position, place_on

_VALIDATION_IMAGES = 512
_POOL_VECTORS_PER_CODE = 8


class VQObjective(nn.Module):
    """The tokenizer's loss; in evaluation, what each prefix of levels reconstructs."""

    def __init__(self, model: HierarchicalVQ, precision: Precision, judges: Judges) -> None:
        super().__init__()
        self.model = model
        self.precision = precision
        self.judges = judges

    def forward(self, images: Tensor, keys: Tensor) -> ObjectiveOutput:
        """The loss of (B, 3, H, W) pictures in [-1, 1]."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            output = self.model(images, keys)
            if not self.training:
                metrics = self._prefixes(images, output.codes)
                if self.judges.features is not None:
                    metrics["perceptual"] = self.judges.distance(output.reconstruction, images)
                return ObjectiveOutput(output.loss, metrics, output.statistics, output.vectors)
            verdict = self.judges.judge(images, output, self.model.decoder.out.weight)
        metrics = output.metrics | verdict.metrics
        return ObjectiveOutput(verdict.loss, metrics, output.statistics, output.vectors, verdict.evidence)

    def _prefixes(self, images: Tensor, codes: tuple[Tensor, ...]) -> dict[str, Tensor]:
        levels = self.model.config.levels
        if not all(self.model.started(level) for level in range(levels)):
            return {}
        metrics = {}
        for count in range(1, levels + 1):
            name = "psnr" if count == levels else f"psnr_prefix_{count}"
            error = (self.model.decode(codes[:count]) - images).flatten(1).square().mean(1)
            metrics[name] = (10 * torch.log10(4 / error.clamp_min(1e-10))).mean()
        return metrics


class VQStage:
    """Stage 1 as the loop sees it."""

    name = "vq"

    def __init__(
        self,
        model: HierarchicalVQ,
        settings: VQTrainSettings,
        seed: int,
        precision: Precision,
        train: ImageTable,
        validation: ImageTable,
        judges: Judges | None = None,
    ) -> None:
        self.objective = VQObjective(model, precision, judges or Judges())
        self.companion = self.objective.judges.adversary
        self.settings, self.seed = settings, seed
        self.train, self.validation = train, validation
        self._key = derive_key(seed, self.name)

    @property
    def model(self) -> HierarchicalVQ:
        """The tokenizer."""
        return self.objective.model

    def batch(self, position: Position) -> tuple[Any, ...]:
        """Pictures and their keys."""
        return self._pictures(position.first, position.count)

    def _pictures(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        keys = split_keys(torch.arange(first, first + count, dtype=torch.int64), self._key)
        return self.train.batch(batch_indices(len(self.train), self._key, first, count)), keys

    def before_step(self, engine: Engine, images_seen: int) -> dict[str, float]:
        """Start the codebooks, and the adversary, when it is time."""
        started = self._start_codebooks(engine, images_seen)
        return started if self.companion is None else {**started, **self.companion.before_step(images_seen)}

    def _start_codebooks(self, engine: Engine, images_seen: int) -> dict[str, float]:
        if images_seen < self.settings.codebook_start * self.settings.images:
            return {}
        waiting = [level for level in self.model.start_order if not self.model.started(level)]
        for level in waiting:
            self._start(engine, level, images_seen)
        return {"codebooks_started": float(len(waiting))} if waiting else {}

    def _start(self, engine: Engine, level: int, images_seen: int) -> None:
        """Fit one level's codebook to vectors of the next pictures, the same whatever the number of ranks."""
        codes = self.model.config.codebook_sizes[level]
        rows, columns = self.model.config.grids[level]
        pictures = min(math.ceil(_POOL_VECTORS_PER_CODE * codes / (rows * columns)), len(self.train))
        unit = self.settings.micro_batch * engine.world
        share = math.ceil(pictures / unit) * self.settings.micro_batch
        engine.module.eval()
        pool = []
        with torch.no_grad():
            for start in range(0, share, self.settings.micro_batch):
                first = images_seen + engine.rank * share + start
                inputs = place_on(engine.device, *self._pictures(first, self.settings.micro_batch))
                pool.append(engine.forward(*inputs).vectors[level])
        vectors = collectives.gather_rows(torch.cat(pool))
        quantizer = self.model.quantizers[level]
        with engine.editing(quantizer.parameters()):
            self.model.start_codebook(level, vectors, derive_key(self._key, "start", level))
            # Ranks may differ in their last bits (other processors): rank 0's codebook is everybody's.
            collectives.broadcast_buffers([*quantizer.buffers(), *(p.data for p in quantizer.parameters())])
        engine.module.train()

    def after_micro_batch(self, output: ObjectiveOutput) -> dict[str, Tensor]:
        """The adversary learns from the reconstructions."""
        if self.companion is None or output.evidence is None:
            return {}
        return self.companion.learn(output.evidence)

    def after_step(self, statistics: tuple[CodebookStatistics, ...], images_seen: int) -> dict[str, Tensor]:
        """Move the codebooks, and the adversary."""
        metrics = self.model.update(statistics, derive_key(self._key, "update", images_seen))
        return metrics if self.companion is None else metrics | self.companion.step(images_seen)

    def evaluate(self, engine: Engine) -> dict[str, float]:
        """PSNR of every prefix, and how much of each codebook the validation pictures use."""
        unit = self.settings.micro_batch
        count = min(len(self.validation), _VALIDATION_IMAGES)
        batches = math.ceil(count / (unit * engine.world))
        sums: dict[str, Tensor] = {}
        used: list[Tensor] = []
        for batch in range(batches):
            first = (batch * engine.world + engine.rank) * unit
            indices = torch.arange(first, first + unit) % count
            output = engine.forward(*place_on(engine.device, self.validation.batch(indices.numpy()), indices))
            for name, value in output.metrics.items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value / batches
            counts = [part.counts for part in output.statistics]
            used = [total + more for total, more in zip(used, counts, strict=True)] if used else counts
        figures = {f"val_{name}": value for name, value in collectives.mean_metrics(sums).items()}
        for level, found in enumerate(used):
            share = collectives.sum_over_ranks(found.clone())
            share = share / share.sum().clamp_min(1)
            figures[f"val_perplexity_{level}"] = float(torch.exp(-torch.xlogy(share, share).sum()))
        return figures

    def after_evaluation(self, figures: dict[str, float]) -> dict[str, float]:
        """The adversary goes when the validation PSNR has fallen too far."""
        if self.companion is None or "val_psnr" not in figures:
            return {}
        return self.companion.observe(figures["val_psnr"])
