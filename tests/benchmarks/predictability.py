"""What codes cost a prior: bits an image of the project's hierarchy and of one flat level, at equal PSNR.

Both tokenizers train for the same time, then the same small prior on the codes of each, again for the same time. Two
flat codebook sizes enclose the hierarchy's PSNR; the flat bits are interpolated to it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from picture_sets import PictureSet, emoji, subset
from runner import Benchmark, Figures, Target, main
from trials import (
    NESTED_PYRAMID,
    TURNS,
    affordable,
    bits_an_image,
    configured,
    encoded,
    images_per_second,
    mean_psnr,
    prior_trial,
    reconstructions,
    run,
    tokenizer_trial,
)

from workflows.config import RunConfig

TOLERANCE = 0.2
"""dB that count as equal PSNR where the flat sizes do not enclose the hierarchy's."""
FLAT_SIZES = (256, 1024)
QUICK_SECONDS = 8.0
QUICK_PICTURES = 1_000


@dataclass(frozen=True)
class Case:
    """One picture size."""

    preset: str
    strides: tuple[int, ...]
    sizes: tuple[int, ...]
    tokenizer_seconds: float
    prior_seconds: float


CASES = {
    32: Case("tiny", (8, 4), (256, 512), 80.0, 80.0),
    64: Case("cpu", (32, 16, 8), (256, 256, 512), 120.0, 120.0),
}
HIERARCHY = tuple(f"vq.model.{setting}" for setting in NESTED_PYRAMID)
PRIOR = ("width=128", "depth=6", "heads=4", "stagger=0")


def sides(side: int, seed: int) -> dict[str, RunConfig]:
    """The configurations that are compared: the hierarchy, and one flat level at its finest stride in two sizes."""
    case = CASES[side]

    def configuration(strides: Sequence[int], sizes: Sequence[int]) -> RunConfig:
        prior = [f"prior.model.{setting}" for setting in PRIOR]
        codes = [f"vq.model.strides={list(strides)}", f"vq.model.codebook_sizes={list(sizes)}"]
        return configured(case.preset, [f"data.image_size=[{side},{side}]", *codes, *HIERARCHY, *prior], seed)

    flat = {f"flat_{size}": configuration(case.strides[-1:], (size,)) for size in FLAT_SIZES}
    return {"hierarchy": configuration(case.strides, case.sizes), **flat}


def measure(side: int, quick: bool, seed: int) -> Figures:
    """PSNR and bits of every side, and the bits of the hierarchy over those of a flat level as good as it."""
    case, configs, pictures = CASES[side], sides(side, seed), emoji(side)
    if quick:
        few = np.arange(min(QUICK_PICTURES, len(pictures.train)))
        pictures = PictureSet(subset(pictures.train, few), pictures.held_out)
    turns = 1 if quick else TURNS
    timed = {name: tokenizer_trial(config, pictures.train) for name, config in configs.items()}
    speeds = images_per_second(timed, turns)
    tokenizers, figures = {}, {}
    for name, config in configs.items():
        trial = tokenizer_trial(config, pictures.train)
        seconds = QUICK_SECONDS if quick else case.tokenizer_seconds
        run(trial, affordable(speeds[name], seconds, config.vq.train))
        tokenizers[name] = trial.model
        figures[f"psnr_{name}"] = mean_psnr(reconstructions(trial.model, pictures.held_out), pictures.held_out)
    tables = (pictures.train, pictures.held_out)
    codes = {name: [encoded(model, table) for table in tables] for name, model in tokenizers.items()}
    trials = {name: prior_trial(config, tokenizers[name], *codes[name]) for name, config in configs.items()}
    speeds = images_per_second(trials, turns)
    for name, config in configs.items():
        trial = prior_trial(config, tokenizers[name], *codes[name])
        run(trial, affordable(speeds[name], QUICK_SECONDS if quick else case.prior_seconds, config.prior.train))
        figures[f"bits_{name}"] = bits_an_image(trial)
    flat = flat_bits_at(
        figures["psnr_hierarchy"], [(figures[f"psnr_flat_{size}"], figures[f"bits_flat_{size}"]) for size in FLAT_SIZES]
    )
    figures["bits_flat_at_equal_psnr"] = flat
    ratio = {f"bits_ratio_{side}": figures["bits_hierarchy"] / flat}
    return ratio | {f"{name}_{side}": value for name, value in figures.items()}


def flat_bits_at(decibels: float, found: Sequence[tuple[float, float]]) -> float:
    """The flat level's bits at a PSNR, from (PSNR, bits) of its sizes; nan where none is as good or as bad."""
    points = sorted(found)
    if not points[0][0] - TOLERANCE <= decibels <= points[-1][0] + TOLERANCE:
        return math.nan
    return float(np.interp(decibels, [point[0] for point in points], [point[1] for point in points]))


BENCHMARK = Benchmark(
    name="predictability",
    what=(
        "The prior's bound on the codes of held-out emoji, bits an image without classes: a nested pyramid "
        "(two levels at 32 x 32, three at 64 x 64) against one flat level of the same transforms at its finest "
        "stride. Tokenizers train for the same time, then the same small prior on each one's codes (80 seconds each at "
        "32 x 32, 120 at 64 x 64; how many images that is, is measured side by side first). The flat level is trained "
        "with two codebook sizes, and its bits are interpolated to the hierarchy's PSNR; where the sizes miss it by "
        "more than .2 dB the figure is missing (nan)."
    ),
    repeats=2,
    parts={str(side): partial(measure, side) for side in CASES},
    targets=(Target("bits_ratio_64", "<=", 0.99), Target("bits_ratio_32", "<=", 1.0)),
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
