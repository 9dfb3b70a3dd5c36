"""The tokenizer's choices, each switched in turn from what the `tiny` preset has."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from picture_sets import emoji
from runner import Benchmark, Figures, main
from torch import Tensor
from trials import codebook_use, configured, mean_psnr, reconstructions, run, tokenizer_trial

from hvqd_model.codec.codebooks import EMAQuantizer
from hvqd_model.codec.hierarchy import HierarchicalVQ
from hvqd_model.codec.losses import ssim
from hvqd_model.codec.perceptual import perceptual_distance
from hvqd_model.config import VQConfig
from hvqd_model.randomness import uniform
from workflows.data.batches import ImageTable
from workflows.evaluation.feature_network import FeatureMaps

IMAGES = {"quick": 640, "full": 24_000}
WEIGHTS = (0.01, 0.05)
"""Of the perceptual loss: beside a pixel loss of about .02 and distances of about 1."""


class RandomStart(HierarchicalVQ):
    """Codebooks that start from vectors drawn at random, without k-means."""

    def start_codebook(self, level: int, vectors: Tensor, key: int) -> None:
        """Begin quantizing with some of the (N, D) vectors."""
        quantizer = self.quantizers[level]
        assert isinstance(quantizer, EMAQuantizer)
        order = torch.argsort(uniform(torch.arange(len(vectors)), (1,), key)[:, 0])
        chosen = quantizer.prepare(vectors)[order[torch.arange(quantizer.codes) % len(order)]]
        quantizer.embedding.copy_(chosen)
        quantizer.counts.zero_()
        quantizer.sums.zero_()
        quantizer.started.fill_(True)


@dataclass(frozen=True)
class Variant:
    """A change of the preset."""

    settings: tuple[str, ...] = ()
    make: Callable[[VQConfig], HierarchicalVQ] = HierarchicalVQ


def variants() -> dict[str, Variant]:
    """Every switch in the position that the preset does not have."""
    now = configured("tiny").vq
    dropout = ("without_level_dropout", 0.0) if now.model.level_dropout else ("with_level_dropout", 0.15)
    if now.model.hierarchy == "nested-pyramid":  # whose coarse levels learn from nothing else
        dropout = ("with_little_level_dropout", 0.01)
    restarts = ("without_restarts", 0.0) if now.model.restart_threshold else ("with_restarts", 0.05)
    estimator = "rotation" if now.model.estimator == "straight-through" else "straight-through"
    return {
        "preset": Variant(),
        dropout[0]: Variant((f"vq.model.level_dropout={dropout[1]}",)),
        f"with_{estimator.replace('-', '_')}": Variant((f"vq.model.estimator={estimator}",)),
        "without_kmeans": Variant(make=RandomStart),
        restarts[0]: Variant((f"vq.model.restart_threshold={restarts[1]}",)),
        **(
            {"without_perceptual": Variant(("vq.train.perceptual_weight=0",))}
            if now.train.perceptual_weight
            else {f"with_perceptual_{weight}": Variant((f"vq.train.perceptual_weight={weight}",)) for weight in WEIGHTS}
        ),
    }


def measure(name: str, variant: Variant, quick: bool, seed: int) -> Figures:
    """PSNR of all levels and of the coarsest alone, SSIM, feature distance, usage of the level that uses less."""
    pictures = emoji(32)
    config = configured("tiny", variant.settings, seed)
    trial = tokenizer_trial(config, pictures.train, make=variant.make)
    run(trial, IMAGES["quick" if quick else "full"])
    model, held_out = trial.model, pictures.held_out
    whole = reconstructions(model, held_out)
    similar = ssim(whole + 1, held_out.batch(slice(None)) + 1, data_range=2.0).mean()
    return {
        f"psnr_{name}": mean_psnr(whole, held_out),
        f"psnr_coarsest_{name}": mean_psnr(reconstructions(model, held_out, 1), held_out),
        f"ssim_{name}": float(similar),
        f"feature_distance_{name}": feature_distance(whole, held_out),
        f"usage_{name}": min(codebook_use(model, pictures.train)),
    }


def feature_distance(pictures: Tensor, table: ImageTable) -> float:
    """The mean distance (0 to 4) of (N, 3, H, W) pictures in [-1, 1] in the maps that the perceptual loss looks at."""
    maps = FeatureMaps(torch.device("cpu"))
    found = []
    with torch.no_grad():
        for first in range(0, len(table), 100):
            targets = table.batch(slice(first, first + 100))
            found.append(perceptual_distance(maps(pictures[first : first + 100]), maps(targets)))
    return float(torch.cat(found).mean())


BENCHMARK = Benchmark(
    name="ablation",
    what=(
        "The `tiny` preset's tokenizer after 24,000 images, with each of its choices switched in turn: PSNR and SSIM "
        "of held-out emoji, their distance in the perceptual loss's feature maps (less is better), PSNR of the "
        "coarsest level alone, and the share of codes that occur in 20 tokens a code of training pictures (of the "
        "level that uses less)."
    ),
    parts={name: partial(measure, name, variant) for name, variant in variants().items()},
    targets=(),
    repeats=2,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
