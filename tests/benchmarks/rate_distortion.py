"""What the codes of a picture are worth: PSNR at equal bits and equal training time, and against WebP at equal bytes.

Against vector-quantize-pytorch: one level of `VectorQuantize` and of `ResidualVQ` in the project's own encoder and
decoder, at the bits of the project's two and three levels; ours as the encoder gives them and refined
(`hvqd_model.codec.refinement`), beside what refinement gives the peer's one level. Against WebP: photographs, the
project's codes coded by a real entropy coder with tables counted on the training pictures.
"""

from __future__ import annotations

import io
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from coding import size_for_bits
from digit_coder import DigitCoder
from peer_quantizers import PeerVQ
from picture_sets import PictureSet, emoji, photographs, subset
from PIL import Image
from runner import Benchmark, Figures, Measure, Target, main
from torch import Tensor
from trials import (
    TURNS,
    VQTrial,
    affordable,
    configured,
    encoded,
    images_per_second,
    mean_psnr,
    reconstructions,
    run,
    tokenizer_trial,
)

from hvqd_model.codec.hierarchy import HierarchicalVQ
from hvqd_model.metrics import psnr
from workflows.config import RunConfig
from workflows.data.batches import CodeTable, ImageTable, to_input

Array = np.ndarray[Any, Any]

BITS = 800.0
"""An image's codes."""
SECONDS = {"emoji": 120.0, "photos": 120.0, "webp": 180.0}
"""Of training, each tokenizer."""
QUICK_SECONDS = 6.0
ROUNDS = 2
"""Of refinement."""
REFINED, QUICK_REFINED = 60, 12
"""Held-out pictures that are refined, evenly spread: each costs some hundred decodings."""
SIDES = {"emoji": 32, "photos": 64}
PRESETS = {"emoji": "tiny", "photos": "cpu"}
FINEST = {"emoji": 4, "photos": 8}
"""The finest stride of all sides."""
PYRAMID = ("vq.model.hierarchy=pyramid", "vq.model.width=48", "vq.train.learning_rate=0.003")
NETWORKS = {"": ("vq.model.hierarchy=features", "vq.model.width=32"), "_pyramid": PYRAMID}
"""What the quantizers are between, by the end of a tokenizer's name: convolutions, or a pyramid's transforms."""
WEBP_QUALITIES = (0, 1, 2, 3, 5, 7, 10, 14, 18, 22, 27, 32, 38, 45, 52, 60, 68, 76, 84)
WEBP_CONTAINER = 20
"""Bytes of a file before the picture's own data: RIFF header and chunk header."""
WEBP_FRAME = 10
"""Bytes of the picture's data that say what is known here: frame tag, start code, width and height."""
STEPS = ((81, 25, 25, 5), (15, 15, 9, 9, 7, 7), (9, 9, 7, 7, 5, 5, 3), (5, 5, 5, 5, *(3,) * 6), (3,) * 12)
"""Of the tokenizer that is compared with WebP: a pyramid of five levels of quantizer fsq, all on the grid of 8 x 8."""
CURVE = {"low": 0.013, "middle": 0.006, "high": 0.0025, "highest": 0.0008}
"""What a bit a pixel costs in its loss."""


@dataclass(frozen=True)
class Arm:
    """One of the tokenizers that are compared."""

    config: RunConfig
    depth: int
    """Quantizers of the peer's residual; 0 for the project's own."""

    @property
    def bits(self) -> float:
        """Of an image's codes."""
        return self.config.vq_config.bits * max(1, self.depth)

    def trial(self, pictures: ImageTable) -> VQTrial:
        """Its training."""
        if not self.depth:
            return tokenizer_trial(self.config, pictures)
        settings = self.config.vq.train
        batches = settings.global_batch // settings.micro_batch
        make = partial(PeerVQ, depth=self.depth, micro_batch=settings.micro_batch, batches_a_step=batches)
        return tokenizer_trial(self.config, pictures, make=make)


def arms(name: str, seed: int) -> dict[str, Arm]:
    """The tokenizers at BITS an image, ours and theirs between the same networks."""
    side, finest = SIDES[name], FINEST[name]

    def arm(network: str, strides: tuple[int, ...], depth: int = 0) -> Arm:
        tokens = sum((side // stride) ** 2 for stride in strides) * max(1, depth)
        model = {
            "strides": list(strides),
            "codebook_sizes": [size_for_bits(tokens, BITS)] * len(strides),
            "code_dim": [min(64, 3 * stride**2) for stride in strides],
            "level_dropout": 0.0,  # theirs have none
        }
        changes = [f"data.image_size=[{side},{side}]", *(f"vq.model.{key}={value}" for key, value in model.items())]
        return Arm(configured(PRESETS[name], [*changes, *NETWORKS[network]], seed), depth)

    found = {
        "two_levels": arm("", (finest, finest)),  # three do not gain anything between convolutions
        "three_levels_pyramid": arm("_pyramid", (2 * finest, finest, finest)),
    }
    for network in NETWORKS:
        found[f"peer_one_level{network}"] = arm(network, (finest,), 1)
        found[f"peer_residual{network}"] = arm(network, (finest,), 2)
    return found


# ---- against vector-quantize-pytorch ----


def compare(name: str, pictures: PictureSet, quick: bool, seed: int) -> Figures:
    """PSNR of every arm after the same training time, and what ours is ahead of the better peer."""
    sides = arms(name, seed)
    speeds = images_per_second({side: arm.trial(pictures.train) for side, arm in sides.items()}, 1 if quick else TURNS)
    figures: Figures = {}
    for side, arm in sides.items():
        trial = arm.trial(pictures.train)
        images = affordable(speeds[side], QUICK_SECONDS if quick else SECONDS[name], arm.config.vq.train)
        run(trial, images)
        check_codes(trial.model, pictures.held_out)
        found = mean_psnr(reconstructions(trial.model, pictures.held_out), pictures.held_out)
        figures |= {f"{name}_psnr_{side}": found, f"{name}_bits_{side}": arm.bits, f"{name}_images_{side}": images}
        if arm.depth < 2:  # the codes of a peer's residual are digits of one number, with no codebook of their own
            gained, figures[f"{name}_refined_per_second_{side}"] = refined(trial.model, pictures.held_out, quick)
            figures[f"{name}_psnr_{side}_refined"] = found + gained

    def best(networks: Sequence[str], kind: str, *, peer: bool) -> float:
        of_side = [side for side, arm in sides.items() if bool(arm.depth) == peer and network_of(side) in networks]
        return max(figures[f"{name}_psnr_{side}{kind}"] for side in of_side)

    def gain(networks: Sequence[str], kind: str) -> float:
        return best(networks, kind, peer=False) - best(networks, "", peer=True)

    gains = {f"{name}_gain_db{kind}": gain(list(NETWORKS), kind) for kind in ("", "_refined")}
    within = {
        f"{name}_gain_db{kind}_within{network or '_convolutions'}": gain([network], kind)
        for network in NETWORKS
        for kind in ("", "_refined")
    }
    return gains | within | figures


def network_of(side: str) -> str:
    """The name of what a tokenizer's quantizers are between."""
    return max((network for network in NETWORKS if side.endswith(network)), key=len)


def some_of(table: ImageTable, quick: bool) -> ImageTable:
    """The pictures that are refined."""
    most = QUICK_REFINED if quick else REFINED
    return subset(table, np.unique(np.linspace(0, len(table) - 1, most).astype(np.int64)))


def refined(model: HierarchicalVQ, table: ImageTable, quick: bool) -> tuple[float, float]:
    """What refinement gives in dB, on some of the pictures, and how many it does a second."""
    some = some_of(table, quick)
    plain = mean_psnr(reconstructions(model, some), some)
    started = time.perf_counter()
    better = mean_psnr(reconstructions(model, some, refine_rounds=ROUNDS), some)
    return better - plain, len(some) / (time.perf_counter() - started)


def check_codes(model: HierarchicalVQ, table: ImageTable) -> None:
    """What codes decode to is what the model makes of the pictures itself, whoever's quantizer it has.

    Raises:
        RuntimeError: it is not.
    """
    images = table.batch(slice(0, 16))
    with torch.no_grad():
        expected = model(images, torch.arange(len(images))).reconstruction.clamp(-1, 1)
    worst = float((model.decode(model.encode(images)) - expected).abs().max())
    if worst > 1e-4:
        raise RuntimeError(f"{type(model).__name__}: codes decode to other pictures, by up to {worst:.3g}")


def compare_emoji(quick: bool, seed: int) -> Figures:
    """The bundled emoji at 32 x 32."""
    return compare("emoji", emoji(SIDES["emoji"]), quick, seed)


def compare_photographs(path: Path, quick: bool, seed: int) -> Figures:
    """Photographs at 64 x 64; the seed chooses the fold."""
    return compare("photos", photographs(path, SIDES["photos"], seed), quick, seed)


# ---- against WebP ----


def webp_curve(pictures: Array) -> tuple[Array, Array]:
    """Bytes a file and PSNR at each quality, means over (N, H, W, 3) uint8 pictures; the bytes rise."""
    sizes, decibels = [], []
    for quality in WEBP_QUALITIES:
        files = [webp(picture, quality) for picture in pictures]
        decoded = np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])
        sizes.append(np.mean([len(file) for file in files]))
        decibels.append(float(psnr(torch.from_numpy(decoded), torch.from_numpy(pictures), 255.0).mean()))
    return np.array(sizes), np.array(decibels)


def webp(picture: Array, quality: int) -> bytes:
    """A picture as a lossy WebP file, with the encoder's best effort."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "WEBP", quality=quality, method=6)
    return buffer.getvalue()


def coded_bytes(model: HierarchicalVQ, train: CodeTable, held_out: CodeTable) -> float:
    """The mean bytes of a held-out picture's codes, which are decoded again to be sure.

    Raises:
        RuntimeError: the decoder gives other codes.
    """
    coder = DigitCoder.counted(train.codes, model.config.steps)
    contents = coder.encode(held_out.codes)
    if any((a != b).any() for a, b in zip(coder.decode(contents), held_out.codes, strict=True)):
        raise RuntimeError("the entropy coder does not give the codes back")
    return float(np.mean([len(content) for content in contents]))


def rounded(pictures: Tensor) -> Tensor:
    """(N, 3, H, W) in [-1, 1] at the 256 values that a file's pixels have."""
    pixels = ((pictures + 1) * 127.5).round().clamp(0, 255).byte()
    return to_input(pixels.permute(0, 2, 3, 1).numpy())


def compare_webp(path: Path, quick: bool, seed: int) -> Figures:
    """The project's bytes and PSNR at three rates, and WebP's PSNR at the same bytes; one fold."""
    pictures = photographs(path, SIDES["photos"], seed)
    counted = subset(pictures.train, np.arange(0, len(pictures.train), 10)) if quick else pictures.train
    pictures = PictureSet(pictures.train, some_of(pictures.held_out, quick))
    size, decibels = webp_curve(pictures.held_out.images)
    pixels = SIDES["photos"] ** 2
    figures: Figures = {"webp_container_bytes": float(WEBP_CONTAINER + WEBP_FRAME)}
    for quality, count, found in zip(WEBP_QUALITIES, size, decibels, strict=True):
        if 0.1 <= 8 * count / pixels <= 1.2:
            figures |= {f"webp_bpp_quality_{quality}": 8 * count / pixels, f"webp_psnr_quality_{quality}": found}
    configs = {
        name: configured("tiny", ["data.image_size=[64,64]", *pyramid(weight)], seed) for name, weight in CURVE.items()
    }
    timed = {"pyramid": tokenizer_trial(configs["low"], pictures.train)}  # a weight changes nothing of its speed
    speed = images_per_second(timed, 1 if quick else TURNS)["pyramid"]
    for name, config in configs.items():
        trial = tokenizer_trial(config, pictures.train)
        images = affordable(speed, QUICK_SECONDS if quick else SECONDS["webp"], config.vq.train)
        run(trial, images)
        codes = encoded(trial.model, pictures.held_out)
        coded = coded_bytes(trial.model, encoded(trial.model, counted), codes)
        ours = mean_psnr(rounded(decoded(trial.model, codes)), pictures.held_out)
        figures |= {f"photos_bpp_{name}": 8 * coded / pixels, f"photos_psnr_{name}": ours}
        for words, container in (("", 0), ("without_container_", WEBP_CONTAINER + WEBP_FRAME)):
            theirs = np.interp(coded, size - container, decibels, left=math.nan, right=math.nan)
            figures[f"photos_lead_on_webp_{words}db_{name}"] = ours - float(theirs)
    figures["photos_images"] = images
    asked = [name for name in CURVE if figures[f"photos_bpp_{name}"] <= 0.5]
    for lead in ("photos_lead_on_webp_db", "photos_lead_on_webp_without_container_db"):
        found = [figures[f"{lead}_{name}"] for name in asked]  # nan where WebP's files are never as small
        figures[lead] = min((value for value in found if math.isfinite(value)), default=math.nan)
    return figures


def pyramid(rate_weight: float) -> list[str]:
    """The settings of the tokenizer that is compared with WebP."""
    model: dict[str, Any] = {
        "hierarchy": "pyramid",
        "strides": [8] * len(STEPS),
        "quantizer": "fsq",
        "fsq_steps": [list(steps) for steps in STEPS],
        "codebook_sizes": [math.prod(steps) for steps in STEPS],
        "rate_weight": rate_weight,
        "level_dropout": 0.0,
        "width": 48,
    }
    return ["vq.train.learning_rate=0.006", *(f"vq.model.{name}={json.dumps(value)}" for name, value in model.items())]


def decoded(model: HierarchicalVQ, table: CodeTable) -> Tensor:
    """(N, 3, H, W) in [-1, 1] from codes."""
    levels = [torch.from_numpy(np.asarray(level)).long() for level in table.codes]
    return torch.cat([model.decode(batch) for batch in zip(*(level.split(100) for level in levels), strict=True)])


def with_photographs(path: Path) -> dict[str, Measure]:
    """The parts that need them."""
    return {"photos": partial(compare_photographs, path), "webp": partial(compare_webp, path)}


BENCHMARK = Benchmark(
    name="rate_distortion",
    what=(
        "Mean PSNR of held-out pictures at 800 bits an image after the same training time (how many images that is, "
        "is measured side by side first): the project's two levels on one grid between convolutions (as a preset has "
        "them), and three, one of them coarser, of a pyramid (`_pyramid`), against one level of "
        "vector-quantize-pytorch's `VectorQuantize` and `ResidualVQ` of two quantizers on that grid in the same "
        "convolutions and in the same transforms of a pyramid. Emoji at 32 x 32 with the `tiny` preset's settings; "
        "photographs (`--photos`) at 64 x 64 with the `cpu` preset's, three folds that keep a photograph whole. "
        "`gain_db` is the best of ours over the best of theirs, `within` one kind of network or over both, by the "
        "encoder alone and with two rounds of refinement (`encode.refine_rounds`), "
        f"which ours alone offers; what it adds is measured on {REFINED} pictures, also for the peer's one level in "
        "our tokenizer. Against WebP: a pyramid of quantizer fsq trained at four weights of its bits, on all training "
        "pictures of one fold, its codes coded by an entropy coder with tables counted on the training pictures, digit "
        "by digit by what is around (and decoded again), pixels rounded to 8 bits; "
        "WebP at its best effort, its PSNR between qualities interpolated at the same bytes. Its container and frame "
        "header, 30 bytes, are counted and also left out. `lead` is the smallest at up to .5 bits a pixel. Seconds of "
        "training a "
        f"tokenizer: {', '.join(f'{name} {seconds:.0f}' for name, seconds in SECONDS.items())}."
    ),
    parts={"emoji": compare_emoji},
    with_photographs=with_photographs,
    once=frozenset({"webp"}),
    targets=(
        Target("emoji_gain_db_refined", ">=", 0.7),
        Target("photos_gain_db_refined", ">=", 0.7),
        Target("photos_lead_on_webp_db", ">=", 0.0),
        Target("photos_lead_on_webp_without_container_db", ">=", 0.0),
    ),
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
