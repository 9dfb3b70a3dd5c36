"""How much of its codebooks each kind of quantizer uses after the `tiny` preset's training."""

from __future__ import annotations

import sys
from functools import partial
from typing import get_args

from picture_sets import emoji
from runner import Benchmark, Figures, Target, main
from trials import CONVOLUTIONS, codebook_use, configured, mean_psnr, reconstructions, run, tokenizer_trial

from hvqd_model.config import QuantizerKind

KINDS: tuple[QuantizerKind, ...] = get_args(QuantizerKind)
SIZES = (1_024, 4_096)
SETTINGS: dict[QuantizerKind, tuple[str, ...]] = {
    "ema": (),
    "gradient": ("vq.model.l2_normalize=true", "vq.model.code_dim=16"),
    "simvq": (),
    "fsq": (),
}
"""What docs/tokenizer.md advises for each kind beside the preset's settings."""
QUICK_IMAGES = 640


def measure(kind: QuantizerKind, size: int, quick: bool, seed: int) -> Figures:
    """Usage of each level over all training pictures, at least 20 tokens a code, and held-out PSNR.

    The quick form knows nothing of the larger codebooks: their k-means alone takes a minute.
    """
    if quick and size > min(SIZES):
        return {}
    pictures = emoji(32)
    levels = ["vq.model.hierarchy=features", "vq.model.strides=[8,4]", f"vq.model.codebook_sizes=[{size},{size}]"]
    config = configured("tiny", [*CONVOLUTIONS, *levels, f"vq.model.quantizer={kind}", *SETTINGS[kind]], seed)
    trial = tokenizer_trial(config, pictures.train)
    run(trial, QUICK_IMAGES if quick else config.vq.train.images)
    name = f"{size}_{kind}"
    used = codebook_use(trial.model, pictures.train, whole=True)
    figures = {f"usage_{name}_level_{level}": share for level, share in enumerate(used)}
    decibels = mean_psnr(reconstructions(trial.model, pictures.held_out), pictures.held_out)
    return {f"usage_{name}": min(used), **figures, f"psnr_{name}": decibels}


BENCHMARK = Benchmark(
    name="codebook_use",
    what=(
        "The share of codes that occur at least once in the training pictures (emoji, 32 x 32; at least 20 tokens a "
        "code), after the `tiny` preset's training, by quantizer and codebook size of both levels, `features` codes: "
        "`usage` is that of the level that uses less. Beside it the PSNR of held-out pictures. The codebook that "
        "learns by gradient has codes of 16 dimensions on the unit sphere."
    ),
    parts={f"{size}_{kind}": partial(measure, kind, size) for size in SIZES for kind in KINDS},
    targets=tuple(
        Target(f"usage_{size}_{kind}", ">=", 0.95 if size == min(SIZES) else 0.8) for size in SIZES for kind in KINDS
    ),
    repeats=1,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
