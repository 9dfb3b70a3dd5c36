"""KID over the number of steps, for every sampler of both kinds of noise.

Both priors are trained here on the codes, or the latents, of one tokenizer (that of `--root`, else of `runs/tiny`, else
one trained here), with the preset's settings and images but a small network, which they share: so many picture-steps
of the preset's own take hours on two cores. Priors and pictures are kept: an interruption costs a few hundred pictures.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from drawn import (
    SMALL_BATCH,
    SMALL_NETWORK,
    Jury,
    Material,
    drawing,
    drawn_features,
    kept_model,
    requests,
    tokenizer_digest,
    trained,
)
from gate_power import trained_root
from runner import Benchmark, Figures, Measure, Target, main, work_folder

from hvqd_model import HierarchicalPrior
from workflows.config import SamplingSettings

STEPS, QUICK_STEPS = (4, 8, 16, 32, 64, 128), (4, 16)
PICTURES, QUICK_PICTURES = 2_000, 24
SAMPLERS: dict[str, tuple[str, ...]] = {
    "discrete": ("confidence", "ancestral", "purity"),
    "gaussian": ("ddpm", "ddim", "dpm-solver++", "heun"),
}
NOISES: dict[str, tuple[tuple[str, Any], ...]] = {"discrete": (), "gaussian": (("noise", "gaussian"),)}
"""What a family changes in the preset's prior."""
GUIDANCES: dict[str, dict[str, Any]] = {"discrete": {}, "gaussian": {"guidance": 1.0, "fine_guidance": None}}
"""What it changes in the preset's sampling: the preset's guidance is chosen for codes, and doubles the evaluations."""
SETTINGS = {"discrete": "sampler", "gaussian": "gaussian_sampler"}
"""The setting that names a sampler of the family."""


def curves(
    family: str,
    material: Material,
    prior: HierarchicalPrior,
    jury: Jury,
    folder: Path,
    sampling: SamplingSettings,
    steps: tuple[int, ...],
    pictures: int,
) -> Figures:
    """kid_SAMPLER_STEPS and its standard error, and the family's best KID at 16 steps over its best at the most.

    Args:
        folder: of what has been drawn.
    """
    seeds, asked = requests(material.class_rows, pictures, "steps")
    figures: Figures = {}
    best: dict[int, float] = {}
    for count in steps:  # all samplers at few steps first: those say most
        for sampler in SAMPLERS[family]:
            changes = GUIDANCES[family] | {
                "steps": count,
                SETTINGS[family]: sampler,
                "batch": min(SMALL_BATCH, pictures),
            }
            settings = sampling.model_copy(update=changes)
            draw = drawing(material.vq, prior, settings)
            features, _ = drawn_features(folder / f"{sampler}-{count}", jury, seeds, asked, draw)
            value, error = jury.kid(features)
            figures |= {f"kid_{sampler}_{count}": value, f"kid_error_{sampler}_{count}": error}
            best[count] = min(value, best.get(count, value))
    figures[f"{family}_16_to_{steps[-1]}"] = best[16] / best[steps[-1]]
    return figures


def measure(family: str, quick: bool, seed: int, root: Path | None = None) -> Figures:
    """One family's curves; quickly, of models that have hardly learned anything."""
    if quick:
        return quick_curves(family)
    root = root or trained_root()
    material = Material.of_root(root)
    folder = work_folder("steps") / tokenizer_digest(root)[:12] / family
    folder.mkdir(parents=True, exist_ok=True)
    trial = partial(material.trial, *SMALL_NETWORK, *NOISES[family])
    images = material.config.prior.train.images
    prior = kept_model(folder / "prior", HierarchicalPrior, lambda: trained(trial(), images))
    jury = Jury(material.train, material.judged, len(material.classes))
    return curves(family, material, prior, jury, folder, material.config.sampling, STEPS, PICTURES)


def quick_curves(family: str) -> Figures:
    """The same of a tokenizer and a prior of a few steps."""
    material = Material.hardly_trained()
    prior = trained(material.trial(*SMALL_NETWORK, *NOISES[family]), 64)
    folder = work_folder("steps") / f"quick-{family}"
    shutil.rmtree(folder, ignore_errors=True)
    jury = Jury(material.train, material.judged, len(material.classes))
    return curves(family, material, prior, jury, folder, material.config.sampling, QUICK_STEPS, QUICK_PICTURES)


def parts(root: Path | None = None) -> Mapping[str, Measure]:
    """A part for each kind of noise."""
    return {family: partial(measure, family, root=root) for family in SAMPLERS}


BENCHMARK = Benchmark(
    name="steps",
    what=(
        "KID of 2,000 pictures (classes as often as in the data; codes with the preset's guidance, latents without) "
        "against the test pictures, at 4 to 128 steps of each sampler, and its standard error over concepts and "
        "samples. The priors, one of noise on codes and one of Gaussian noise, learned the codes and the latents of "
        "one tokenizer of `tiny` with the preset's settings and images, but a network of half its width and four "
        "blocks. Heun asks the network twice a step. `16_to_128` compares the lowest KID of any sampler at 16 steps "
        "with the lowest of any at 128."
    ),
    parts=parts(),
    repeats=1,
    targets=tuple(Target(f"{family}_16_to_128", "<=", 1.1) for family in SAMPLERS),
    of_root=parts,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
