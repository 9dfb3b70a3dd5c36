"""The hierarchical prior against three others that train on the same pictures for the same time.

ours      a nested pyramid: two levels at 32 x 32 (else the preset `tiny`), three at 64 x 64, noise on codes
flat      one level of as many bits a picture, noise on codes, the same transformer
gaussian  one level, Gaussian noise on the latents behind the same codes, the same transformer
unet      diffusers' U-Net on pixels (DDIM, 50 steps), as many weights as our tokenizer and prior together

The first three train a tokenizer and a prior, the last one trains for the sum of both times. How fast each trains is
measured in turns, and each gets the images that it can train on in its time. Each side's guidance is the one of three
whose pictures have the lowest KID against the validation split; figures are against the test split. Models and
pictures are kept: an interruption costs one training at most. A full run takes hours on two cores.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from coding import size_for_bits
from drawn import Jury, Material, drawing, drawn_features, kept_array, kept_model, requests, trained
from numpy.typing import NDArray
from picture_sets import emoji_classes, emoji_splits, subset
from pixel_diffusion import SAMPLING_STEPS, PixelTrial, draw_pixels, widest_unet
from runner import Benchmark, Figures, Target, code_digest, main, work_folder
from safetensors.torch import load_file, save_file
from torch import nn
from trials import (
    NESTED_PYRAMID,
    TURNS,
    PriorTrial,
    Trial,
    VQTrial,
    affordable,
    configured,
    images_per_second,
    run,
    tokenizer_trial,
    weights,
)

from hvqd_model import HierarchicalPrior, HierarchicalVQ, metrics
from workflows.data.batches import ImageTable
from workflows.drawing.generate import Pictures

Side = Literal["ours", "flat", "gaussian", "unet"]
SIDES: tuple[Side, ...] = ("ours", "flat", "gaussian", "unet")
GUIDANCES = (1.0, 2.0, 4.0)
PICTURES, QUICK_PICTURES = 1_000, 12
CHOOSING, QUICK_CHOOSING = 100, 8
"""Pictures of each guidance that is tried."""
QUICK_STEPS = 5
"""Of DDIM, whose fifty steps at 64 x 64 take minutes for a dozen pictures."""
UNET_RATE = 1e-3
"""Of its learning: the best of 5e-4, 1e-3 and 2e-3 is not known; this one is usual for a net so small."""
Draw = Callable[[list[int], list[int]], Pictures]


@dataclass(frozen=True)
class Size:
    """One size of pictures."""

    preset: str
    changes: tuple[str, ...]
    flat_stride: int
    tokenizer_seconds: float
    prior_seconds: float


PYRAMID = tuple(f"vq.model.{setting}" for setting in NESTED_PYRAMID)
SIZES = {
    "32": Size("tiny", ("vq.model.strides=[8,4]", "vq.model.codebook_sizes=[256,512]"), 4, 120, 240),
    "64": Size(
        "cpu", ("vq.model.strides=[32,16,8]", "vq.model.codebook_sizes=[1024,1024,2048]", *PYRAMID), 8, 240, 480
    ),
}


@dataclass(frozen=True)
class Contest:
    """Everything at one size and seed."""

    size: Size
    seed: int
    quick: bool
    folder: Path

    @cached_property
    def splits(self) -> dict[str, ImageTable]:
        """The bundled emoji; quickly a few of them."""
        found = emoji_splits(self.config("ours").data.image_size[0])
        return {name: subset(table, np.arange(0, len(table), 20 if self.quick else 1)) for name, table in found.items()}

    def config(self, side: Side) -> Any:
        """The preset, in one process, with the side's levels."""
        changes = [*self.size.changes]
        if side != "ours":
            bits = configured(self.size.preset, changes).vq_config.bits
            rows, columns = (length // self.size.flat_stride for length in configured(self.size.preset).data.image_size)
            codes = size_for_bits(rows * columns, bits)
            changes += [f"vq.model.strides=[{self.size.flat_stride}]", f"vq.model.codebook_sizes=[{codes}]"]
        small = ["sampling.batch=24", "prior.model.width=64", "prior.model.depth=2"]
        changes += small if self.quick else ["sampling.batch=100"]
        return configured(self.size.preset, changes, self.seed)

    def seconds(self, usual: float) -> float:
        """Of training."""
        return 3.0 if self.quick else usual

    # ---- training ----

    def speeds(self, name: str, trials: Mapping[str, Trial]) -> dict[str, float]:
        """Images a second, measured in turns once and kept."""
        found = kept_array(
            self.folder / f"speeds-{name}.npy",
            lambda: np.array(list(images_per_second(trials, 1 if self.quick else TURNS).values())),
        )
        return dict(zip(trials, found.tolist(), strict=True))

    def tokenizers(self) -> dict[str, HierarchicalVQ]:
        """Ours and the flat one."""

        def trial(side: Side) -> VQTrial:
            return tokenizer_trial(self.config(side), self.splits["train"])

        names: tuple[Side, ...] = ("ours", "flat")
        speeds = self.speeds("tokenizers", {side: trial(side) for side in names})

        def make(side: Side) -> HierarchicalVQ:
            fresh = trial(side)
            run(fresh, affordable(speeds[side], self.seconds(self.size.tokenizer_seconds), fresh.settings))
            return fresh.model

        return {side: kept_model(self.folder / f"vq-{side}", HierarchicalVQ, partial(make, side)) for side in names}

    def material(self, side: Side, tokenizers: Mapping[str, HierarchicalVQ]) -> Material:
        """What a side's prior learns from."""
        vq = tokenizers["ours" if side == "ours" else "flat"]
        return Material(self.config(side), vq, self.splits["train"], self.splits["test"], emoji_classes())

    def drawers(self) -> tuple[dict[Side, Callable[[float], Draw]], Figures]:
        """What draws each side's pictures at a guidance, all trained; and their sizes and budgets."""
        tokenizers = self.tokenizers()
        materials = {side: self.material(side, tokenizers) for side in SIDES if side != "unet"}
        trials: dict[Side, Callable[[], PriorTrial]] = {
            "ours": partial(materials["ours"].trial, seed=self.seed),
            "flat": partial(materials["flat"].trial, seed=self.seed),
            "gaussian": partial(materials["gaussian"].trial, ("noise", "gaussian"), seed=self.seed),
        }
        most = weights(tokenizers["ours"], trials["ours"]().model)
        trials["unet"] = partial(self.pixel_trial, most)
        speeds = self.speeds("priors", {side: trials[side]() for side in SIDES})
        figures: Figures = {}
        drawers: dict[Side, Callable[[float], Draw]] = {}
        for side in SIDES:
            usual = self.size.prior_seconds + (self.size.tokenizer_seconds if side == "unet" else 0)
            images = affordable(speeds[side], self.seconds(usual), self.config("ours").prior.train)
            figures[f"training_images_{side}"] = float(images)
            figures[f"weights_{side}"] = float(weights(trials[side]().objective))
            if side == "unet":
                drawers[side] = self.unet_drawing(trials[side], images)
            else:
                prior = kept_model(
                    self.folder / f"prior-{side}",
                    HierarchicalPrior,
                    lambda side=side, images=images: trained(trials[side](), images),
                )
                drawers[side] = prior_drawing(materials[side], prior)
        return drawers, figures

    def pixel_trial(self, most: int) -> PixelTrial:
        """The U-Net with fresh weights."""
        torch.manual_seed(self.seed)
        side, classes = self.config("ours").data.image_size[0], len(emoji_classes())
        settings = self.config("ours").prior.train.model_copy(update={"learning_rate": UNET_RATE, "betas": (0.9, 0.99)})
        return PixelTrial(widest_unet(side, classes, most), settings, self.seed, self.splits["train"], classes)

    def unet_drawing(self, make: Callable[[], PriorTrial], images: int) -> Callable[[float], Draw]:
        """The trained U-Net's drawing."""
        trial, kept = make(), self.folder / "unet.safetensors"
        model: nn.Module = trial.objective.model
        if not kept.is_file():
            run(trial, images)
            save_file({name: value.contiguous() for name, value in model.state_dict().items()}, kept)
        model.load_state_dict(load_file(kept))
        model.eval()
        side, classes = self.config("ours").data.image_size[0], len(emoji_classes())
        steps = QUICK_STEPS if self.quick else SAMPLING_STEPS
        return lambda scale: lambda seeds, asked: draw_pixels(model, side, classes, seeds, asked, scale, steps)


def prior_drawing(material: Material, prior: HierarchicalPrior) -> Callable[[float], Draw]:
    """A prior's drawing."""
    sampling = material.config.sampling

    def draw(scale: float) -> Draw:
        return drawing(material.vq, prior, sampling.model_copy(update={"guidance": scale}))

    return draw


# ---- judging ----


def chosen_guidance(contest: Contest, jury: Jury, side: Side, drawer: Callable[[float], Draw], count: int) -> float:
    """The scale whose pictures are nearest to the validation split."""
    real = torch.from_numpy(jury.features(np.asarray(contest.splits["val"].images)))
    seeds, asked = requests(class_rows(contest), count, "choosing", contest.seed)
    found: dict[float, float] = {}
    for scale in GUIDANCES:
        features, _ = drawn_features(contest.folder / f"{side}-choose-{scale:g}", jury, seeds, asked, drawer(scale))
        found[scale] = metrics.kid(real, torch.from_numpy(features))
    return min(GUIDANCES, key=lambda scale: found[scale])


def class_rows(contest: Contest) -> tuple[int, ...]:
    """Training pictures of each class."""
    return tuple(np.bincount(contest.splits["train"].labels, minlength=len(emoji_classes())).tolist())


def drawing_speeds(drawers: Mapping[Side, Draw], counts: Mapping[Side, int], turns: int) -> dict[Side, float]:
    """Pictures a second that each side draws, in turns."""
    spent: dict[Side, list[float]] = {side: [] for side in drawers}
    for _ in range(turns):
        for side, draw in drawers.items():
            started = time.perf_counter()
            draw(list(range(counts[side])), [0] * counts[side])
            spent[side].append((time.perf_counter() - started) / counts[side])
    return {side: 1 / statistics.median(found) for side, found in spent.items()}


def measure(name: str, quick: bool, seed: int) -> Figures:
    """All four sides at one size."""
    folder = work_folder("peers") / ("quick" if quick else f"{name}-{seed}-{code_digest()[:12]}")
    if quick:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    contest = Contest(SIZES[name], seed, quick, folder)
    drawers, figures = contest.drawers()
    jury = Jury(contest.splits["train"], contest.splits["test"], len(emoji_classes()))
    seeds, asked = requests(class_rows(contest), QUICK_PICTURES if quick else PICTURES, "peers", seed)
    seen: dict[Side, NDArray[np.float32]] = {}
    chosen: dict[Side, Draw] = {}
    for side in SIDES:
        scale = chosen_guidance(contest, jury, side, drawers[side], QUICK_CHOOSING if quick else CHOOSING)
        chosen[side] = drawers[side](scale)
        seen[side], _ = drawn_features(folder / f"{side}-pictures", jury, seeds, asked, chosen[side])
        figures |= {f"guidance_{side}": scale, **jury.figures(side, seen[side], asked)}
    for side in SIDES[1:]:
        lead, error = jury.lead(seen["ours"], seen[side])
        figures |= {f"lead_over_{side}": lead, f"lead_over_{side}_high": lead + 1.96 * error}
    batch = contest.config("ours").sampling.batch
    speeds = drawing_speeds(chosen, dict.fromkeys(SIDES, batch) | {"unet": 4}, 1 if quick else TURNS)
    figures |= {f"draws_per_second_{side}": speed for side, speed in speeds.items()}
    figures["draws_ours_to_unet"] = speeds["ours"] / speeds["unet"]
    return {f"{figure}_{name}": value for figure, value in figures.items()}


BENCHMARK = Benchmark(
    name="peers",
    what=(
        "Emoji at 32 x 32 (two levels) and 64 x 64 (three): our prior, a flat one-level prior at the same bits a "
        "picture, a flat Gaussian prior on the same latents (all with the same transformer, on tokenizers of equal "
        "training time), and diffusers' U-Net on pixels with DDIM of 50 steps, which trains for the time of tokenizer "
        "and prior together and has as many weights as both of ours. Guidance of each side is chosen on the validation "
        "split. KID of 1,000 pictures against the test split with its standard error; `lead_over` is the other's KID "
        "less ours and `_high` the upper end of its 95 % interval; recall; the share in which the asked class is "
        "recognised; pictures drawn a second, in turns. Each repeat has a seed of its own."
    ),
    parts={name: partial(measure, name) for name in SIZES},
    targets=(
        *(Target(f"lead_over_{side}_64", ">=", 0.0) for side in SIDES[1:]),
        Target("lead_over_flat_high_32", ">=", 0.0),
        *(Target(f"lead_over_{side}_32", ">=", 0.0) for side in ("gaussian", "unet")),
        *(Target(f"draws_ours_to_unet_{name}", ">=", 5.0) for name in SIZES),
    ),
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
