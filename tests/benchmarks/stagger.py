"""What the stagger is worth: KID, bits and cost of priors from joint (0) to strictly coarse before fine (1).

All learn the codes of one tokenizer for the same time: how fast each trains is measured in turns, and each gets the
images that it can train on while the first takes half its preset's budget. Priors and pictures are kept.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
from drawn import (
    SMALL_BATCH,
    SMALL_NETWORK,
    Jury,
    Material,
    bits_an_image,
    drawing,
    drawn_features,
    kept_array,
    kept_model,
    requests,
    tokenizer_digest,
    trained,
)
from gate_power import trained_root
from numpy.typing import NDArray
from runner import Benchmark, Figures, Measure, Target, main, work_folder
from trials import TURNS, images_per_second

from hvqd_model import HierarchicalPrior

STAGGERS = (0.0, 0.25, 0.5, 1.0)
PICTURES, QUICK_PICTURES = 2_000, 24
QUICK_IMAGES = 64


def name_of(stagger: float) -> str:
    """As it stands in figures: 0, 0.25, 0.5, 1."""
    return f"{stagger:g}"


def speeds(material: Material, turns: int) -> NDArray[np.float64]:
    """Images a second that each of the staggers trains on."""
    found = images_per_second({name_of(at): material.trial(*SMALL_NETWORK, ("stagger", at)) for at in STAGGERS}, turns)
    return np.array([found[name_of(at)] for at in STAGGERS])


def figures_of(material: Material, jury: Jury, folder: Path, budget: int, pictures: int, turns: int) -> Figures:
    """Of every stagger: speed, images, bits, KID, recall, asked class, and the seconds that drawing a picture takes.

    Args:
        folder: of what is kept.
        budget: images of training at stagger 0.
    """
    fast = kept_array(folder / "speeds.npy", lambda: speeds(material, turns))
    seeds, asked = requests(material.class_rows, pictures, "stagger")
    held_out = material.coded(material.judged)
    batch = material.config.prior.train.global_batch
    figures: Figures = {}
    for at, speed in zip(STAGGERS, fast.tolist(), strict=True):
        name = name_of(at)
        images = max(1, round(budget * speed / fast[0] / batch)) * batch
        trial = partial(material.trial, *SMALL_NETWORK, ("stagger", at))
        prior = kept_model(folder / f"prior-{name}", HierarchicalPrior, lambda t=trial, n=images: trained(t(), n))
        sampling = material.config.sampling.model_copy(update={"batch": min(SMALL_BATCH, pictures)})
        draw = drawing(material.vq, prior, sampling)
        features, seconds = drawn_features(folder / f"pictures-{name}", jury, seeds, asked, draw)
        figures |= {f"training_images_per_second_{name}": speed, f"training_images_{name}": float(images)}
        figures |= {f"bits_{name}": bits_an_image(prior, held_out), f"draw_seconds_{name}": seconds}
        figures |= jury.figures(name, features, asked)
    best = min(figures[f"kid_{name_of(at)}"] for at in STAGGERS)
    figures["preset_to_best_kid"] = figures[f"kid_{name_of(material.config.prior.model.stagger)}"] / best
    return figures


def measure(quick: bool, seed: int, root: Path | None = None) -> Figures:
    """The figures of a root's tokenizer; quickly, of models that have hardly learned anything."""
    if quick:
        material, folder = Material.hardly_trained(), work_folder("stagger") / "quick"
        shutil.rmtree(folder, ignore_errors=True)
    else:
        root = root or trained_root()
        material, folder = Material.of_root(root), work_folder("stagger") / tokenizer_digest(root)[:12]
    folder.mkdir(parents=True, exist_ok=True)
    jury = Jury(material.train, material.judged, len(material.classes))
    budget, pictures = (QUICK_IMAGES, QUICK_PICTURES) if quick else (material.config.prior.train.images // 2, PICTURES)
    return figures_of(material, jury, folder, budget, pictures, 1 if quick else TURNS)


def parts(root: Path | None = None) -> Mapping[str, Measure]:
    """One part; within it everything is kept."""
    return {"staggers": partial(measure, root=root)}


BENCHMARK = Benchmark(
    name="stagger",
    what=(
        "Priors of stagger 0, 0.25, 0.5 and 1 on the codes of one tokenizer of `tiny`, with a network of half the "
        "preset's width and four blocks, trained for the same time (that of half the preset's images at stagger 0): "
        "bits of held-out codes, KID of 2,000 pictures with its standard error, "
        "recall, the share in which the asked class is recognised, and what training and drawing cost. "
        "`preset_to_best_kid` is the KID of the preset's stagger over the lowest."
    ),
    parts=parts(),
    repeats=1,
    targets=(Target("preset_to_best_kid", "<=", 1.1),),
    of_root=parts,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
