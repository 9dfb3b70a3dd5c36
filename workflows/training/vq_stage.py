"""Stage 1: the tokenizer. Codebooks start from k-means once the features have settled, then move after every step."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hvqd_model.codec.hierarchy import HierarchicalVQ, VQOutput
from hvqd_model.codec.quantizer import CodebookStatistics
from hvqd_model.randomness import derive_key, split_keys
from workflows.config import VQTrainSettings
from workflows.data.batches import ImageTable, batch_indices
from workflows.drawing.generate import to_uint8
from workflows.drawing.sheets import prefix_sheet, to_png
from workflows.training import collectives
from workflows.training.alarms import Watch
from workflows.training.codebook_use import CodebookUse
from workflows.training.engine import Engine
from workflows.training.judges import Judges
from workflows.training.precision import Precision
from workflows.training.stage import ObjectiveOutput, Position, place_on

_VALIDATION_IMAGES = 512
_SHEET_PICTURES = 12
_SHEET_SIDE = 160  # a sheet of larger pictures would weigh ten megabytes an evaluation
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
                prefixes = self._prefixes(output.codes)
                metrics = self._metrics(images, prefixes) | self._norms(output)
                if self.judges.features is not None:
                    metrics["perceptual"] = self.judges.distance(output.reconstruction, images)
                return ObjectiveOutput(output.loss, metrics, output.statistics, output.vectors, prefixes=prefixes)
            verdict = self.judges.judge(images, output, self.model.last_weight)
        metrics = output.metrics | verdict.metrics
        return ObjectiveOutput(verdict.loss, metrics, output.statistics, output.vectors, verdict.evidence)

    def _prefixes(self, codes: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """(B, 3, H, W) of each prefix; nothing until all codebooks have started."""
        levels = self.model.config.levels
        if not all(self.model.started(level) for level in range(levels)):
            return ()
        return tuple(self.model.decode(codes[:count]) for count in range(1, levels + 1))

    def _metrics(self, images: Tensor, prefixes: tuple[Tensor, ...]) -> dict[str, Tensor]:
        metrics = {}
        for count, pictures in enumerate(prefixes, 1):
            name = "psnr" if count == len(prefixes) else f"psnr_prefix_{count}"
            error = (pictures - images).flatten(1).square().mean(1)
            metrics[name] = (10 * torch.log10(4 / error.clamp_min(1e-10))).mean()
        return metrics

    def _norms(self, output: VQOutput) -> dict[str, Tensor]:
        """Mean norms by level: of the vectors before quantization, of the codes they became, and of all codes.

        In `forward`, because under ZeRO-3 a codebook that is learned by gradient is whole nowhere else.
        """
        norms = {}
        for level, (vectors, found) in enumerate(zip(output.vectors, output.statistics, strict=True)):
            if self.model.started(level):
                codes = self.model.codebooks[level].norm(dim=1)
                norms[f"vector_norm_{level}"] = vectors.norm(dim=1).mean()
                norms[f"code_norm_{level}"] = (found.counts * codes).sum() / found.counts.sum().clamp_min(1)
                norms[f"codebook_norm_{level}"] = codes.mean()
        return norms


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
        self.picture: bytes | None = None
        self._use = CodebookUse()
        self._key = derive_key(seed, self.name)

    @property
    def model(self) -> HierarchicalVQ:
        """The tokenizer."""
        return self.objective.model

    @cached_property
    def _mean_picture_psnr(self) -> float:
        """PSNR in dB of the validation pictures' mean as every one's reconstruction: what no code at all is worth."""
        pictures = self.validation.images[:_VALIDATION_IMAGES].astype(np.float64)
        errors = np.square(pictures - pictures.mean(0)).mean((1, 2, 3))
        return float((10 * np.log10(255**2 / np.maximum(errors, 1e-10))).mean())

    def watch(self) -> Watch:
        """Alarms of a tokenizer."""
        return Watch("vq", self.settings, self.model.config)

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
        norms = {f"codebook_norm_{level}": self._start(engine, level, images_seen) for level in waiting}
        return {"codebooks_started": float(len(waiting)), **norms} if waiting else {}

    def _start(self, engine: Engine, level: int, images_seen: int) -> float:
        """Fit one level's codebook to vectors of the next pictures, the same whatever the number of ranks.

        Returns:
            The mean norm of its codes.
        """
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
            norm = float(self.model.codebooks[level].norm(dim=1).mean())
        engine.module.train()
        return norm

    def after_micro_batch(self, output: ObjectiveOutput) -> dict[str, Tensor]:
        """The adversary learns from the reconstructions."""
        if self.companion is None or output.evidence is None:
            return {}
        return self.companion.learn(output.evidence)

    def after_step(self, statistics: tuple[CodebookStatistics, ...], images_seen: int) -> dict[str, Tensor]:
        """Move the codebooks, and the adversary; at the end of a logging interval also how much of them was used."""
        metrics = self.model.update(statistics, derive_key(self._key, "update", images_seen))
        metrics |= self._use.add(statistics, images_seen, self.settings)
        return metrics if self.companion is None else metrics | self.companion.step(images_seen)

    def evaluate(self, engine: Engine) -> dict[str, float]:
        """PSNR of every prefix and of the mean picture, norms, and how much of each codebook is used."""
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
        for level in range(len(used)):  # a codebook's norm is no matter of which pictures
            if (norm := figures.pop(f"val_codebook_norm_{level}", None)) is not None:
                figures[f"codebook_norm_{level}"] = norm
        if "val_psnr" in figures:
            figures["val_psnr_mean_picture"] = self._mean_picture_psnr
        self.picture = self._sheet(engine)
        return figures

    def _sheet(self, engine: Engine) -> bytes | None:
        """Some validation pictures, always the same ones, and their reconstructions; None before codebooks start.

        Every rank computes it, for ZeRO-3's sake; it changes with no number of ranks and is part of no state.
        """
        if len(self.validation) == 0:
            return None
        places = np.unique(np.linspace(0, len(self.validation) - 1, _SHEET_PICTURES).round().astype(np.int64))
        parts = []
        for chosen in np.array_split(places, math.ceil(len(places) / self.settings.micro_batch)):
            keys = torch.from_numpy(chosen)
            parts.append(engine.forward(*place_on(engine.device, self.validation.batch(chosen), keys)).prefixes)
        if engine.rank != 0 or not parts[0]:
            return None
        prefixes = [to_uint8(torch.cat(pictures)) for pictures in zip(*parts, strict=True)]
        sheet = prefix_sheet(self.validation.images[places], list(enumerate(prefixes, 1)), most_side=_SHEET_SIDE)
        return to_png(sheet)

    def after_evaluation(self, figures: dict[str, float]) -> dict[str, float]:
        """The adversary goes when the validation PSNR has fallen too far."""
        if self.companion is None or "val_psnr" not in figures:
            return {}
        return self.companion.observe(figures["val_psnr"])

    def interval(self) -> dict[str, Any]:
        """How the codebooks were used since the window began."""
        return self._use.state()

    def load_interval(self, gathered: dict[str, Any]) -> None:
        """Go on with the window."""
        self._use.load(gathered)
