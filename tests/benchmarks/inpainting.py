"""What holes in held-out pictures are filled with: how near it comes to what was there, by two ways to prepare codes.

now      colours are spread into the hole before encoding; coarse codes stay wherever their cells miss the hole
grey     the hole is plain grey when it is encoded, and codes around the hole are drawn anew on every level

Beside them the spread colours alone, and the reconstruction of the whole picture, which is the most that codes can do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from drawn import Material, trained
from gate_power import trained_root
from runner import Benchmark, Figures, Measure, Target, main
from torch import Tensor

from hvqd_model import HierarchicalPrior, HierarchicalVQ, load_model
from hvqd_model.diffusion.samplers import SamplerSettings
from hvqd_model.editing import Codes, Complete, code_masks, inpaint, spread_colours
from hvqd_model.prior.completion import complete
from hvqd_model.randomness import derive_key, uniform
from workflows.config import SamplingSettings
from workflows.drawing.generate import to_uint8
from workflows.evaluation.features import FeatureExtractor

PICTURES, QUICK_PICTURES = 200, 8
AT_ONCE = 25
HOLE = 10 / 32
"""Side of the hole, of the picture's."""
FEATURE_SIZE = 64


def holes(count: int, side: int, seed: int) -> Tensor:
    """(n, H, W) bool: a square in each picture, anywhere but at its edge."""
    length, margin = round(HOLE * side), side // 8
    keys = torch.tensor([derive_key("hole", seed, index) for index in range(count)])
    places = (uniform(keys, (2,)) * (side - 2 * margin - length + 1)).long() + margin
    found = torch.zeros(count, side, side, dtype=torch.bool)
    for hole, (row, column) in zip(found, places.tolist(), strict=True):
        hole[row : row + length, column : column + length] = True
    return found


def inpaint_grey(vq: HierarchicalVQ, images: Tensor, hole: Tensor, fill: Complete) -> Tensor:
    """The other way: a code around the hole is drawn with it on every level."""
    masks = [
        F.max_pool2d(marks[:, None].float(), 3, stride=1, padding=1)[:, 0] > 0 for marks in code_masks(vq, hole, 0)
    ]
    drawn = vq.decode(fill(vq.encode(images.masked_fill(hole[:, None], 0.0)), masks))
    return torch.where(hole[:, None], drawn, images)


def filling(prior: HierarchicalPrior, seeds: Tensor, sampling: SamplingSettings) -> Complete:
    """Draws unknown codes, told nothing of the class."""
    walk = SamplerSettings(sampling.steps, "confidence", sampling.temperature, gumbel_scale=sampling.gumbel_scale)

    def draw(codes: Sequence[Tensor], unknown: Sequence[Tensor]) -> Codes:
        return complete(prior, codes, unknown, seeds, settings=walk)

    return draw


@torch.no_grad()
def figures_of(material: Material, prior: HierarchicalPrior, pictures: int, seed: int) -> Figures:
    """PSNR in the hole, in dB, and the distance in features of the whole picture, of each way."""
    rows = np.linspace(0, len(material.judged) - 1, min(pictures, len(material.judged))).astype(np.int64)
    vq, images = material.vq, material.judged.batch(rows)
    hole = holes(len(images), images.shape[2], seed)
    keys = torch.tensor([derive_key("inpainting", seed, index) for index in range(len(images))])
    ways: dict[str, Callable[[Tensor, Tensor, Complete], Tensor]] = {
        "now": lambda x, marks, fill: inpaint(vq, x, marks, fill),
        "grey": lambda x, marks, fill: inpaint_grey(vq, x, marks, fill),
        "spread": lambda x, marks, _: spread_colours(x, marks),
        "reconstruction": lambda x, marks, _: torch.where(marks[:, None], vq.decode(vq.encode(x)), x),
    }
    features = FeatureExtractor(FEATURE_SIZE)
    real = features(to_uint8(images))
    figures: Figures = {}
    for name, way in ways.items():
        parts = []
        for first in range(0, len(images), AT_ONCE):
            some = slice(first, first + AT_ONCE)
            parts.append(way(images[some], hole[some], filling(prior, keys[some], material.config.sampling)))
        found = torch.cat(parts).clamp(-1, 1)
        squares = ((found - images).square() * hole[:, None]).sum((1, 2, 3)) / (3 * hole.sum((1, 2)))
        figures[f"psnr_{name}"] = float((10 * torch.log10(4 / squares.clamp_min(1e-6))).mean())
        figures[f"distance_{name}"] = float(np.linalg.norm(features(to_uint8(found)) - real, axis=1).mean())
    figures["psnr_gain"] = figures["psnr_now"] - figures["psnr_grey"]
    figures["distance_ratio"] = figures["distance_now"] / figures["distance_grey"]
    return figures


def measure(quick: bool, seed: int, root: Path | None = None) -> Figures:
    """The figures of a root's models; quickly, of some that have hardly learned anything."""
    if quick:
        material = Material.hardly_trained()
        return figures_of(material, trained(material.trial(), 64), QUICK_PICTURES, seed)
    root = root or trained_root()
    prior = load_model(root / "prior" / "model")
    assert isinstance(prior, HierarchicalPrior)
    return figures_of(Material.of_root(root), prior, PICTURES, seed)


def parts(root: Path | None = None) -> Mapping[str, Measure]:
    """One part."""
    return {"holes": partial(measure, root=root)}


BENCHMARK = Benchmark(
    name="inpainting",
    what=(
        "Square holes of 10 of 32 pixels in 200 held-out pictures, filled by `tiny` told no class: PSNR within the "
        "hole (a draw, not the mean of all that would fit) and distance of the whole picture in the features of an "
        "evaluation. `now` is `hvqd edit inpaint`; `grey` encodes the hole as plain grey and draws codes around it "
        "anew on every level; `spread` has the colours around the hole spread into it and nothing drawn."
    ),
    parts=parts(),
    repeats=1,
    targets=(Target("psnr_gain", ">=", 1.0), Target("distance_ratio", "<=", 1.0)),
    of_root=parts,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
